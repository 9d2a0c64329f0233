r"""Which tiles are fastest: configurations of the chapters' kernels, shipped and not, on this GPU.

Each is timed alone, L2 emptied before it, medians; a line says whether it is what a chapter would
run. Configurations are spelt as in the chapters: (BM, BN, warps, stages, …).

Run:  python benchmarks/tiles.py          needs a GPU
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
attn = import_module("01_attention")
mla = import_module("02_mla")
moe = import_module("03_moe_router")
fp8 = import_module("04_fp8_gemm")
Task = tuple[str, tuple, bool, Callable[[], Tensor]]  # name, configuration, shipped, what to time

FORWARD = (128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)
KEYS = (64, 64, 8, 2), (64, 128, 8, 1), (64, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 3)
KEYS += (64, 64, 4, 1), (64, 64, 4, 2), (32, 64, 4, 2)
QUERIES = (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (128, 128, 8, 2), (128, 32, 8, 3)
DECODE = (16, 64, 4, 2, 1, 2), (16, 64, 4, 3, 1, 1), (16, 32, 4, 3, 1, 2)
DECODE += (32, 64, 8, 2, 1, 1), (32, 64, 4, 2, 1, 2), (64, 64, 8, 2, 1, 1), (128, 32, 8, 2, 2, 1)


def flash(D: int, V: int, B: int, H: int, T: int, device: str) -> Iterator[Task]:
    """Forward, then backward's two kernels, causal, bf16."""
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    q, k, v, do = (make(B, H, T, width) for width in (D, D, V, V))
    out, lse, scale = torch.empty_like(do), do.new_empty(B, H, T, dtype=torch.float32), D**-0.5
    dq, dk, dv, base_2 = *map(torch.empty_like, (q, k, v)), scale * 1.4426950408889634
    delta = torch.zeros_like(lse)
    ships = attn.flash_configs(D, V, 2, attn.gpu(q.device)[0], T)
    for which, configs, further, last in (
        ("forward", FORWARD, [out, lse], [base_2]),
        ("keys", KEYS, [do, lse, delta, dk, dv], [base_2, scale]),
        ("queries", QUERIES, [do, lse, delta, dq], [base_2, scale]),
    ):

        def run(config, which=which, further=further, last=last) -> Tensor:
            kernel = getattr(attn, f"flash_{which}_kernel")
            with patch.object(attn, "flash_configs", lambda *_: {which: config}):
                attn._FlashAttention.launch(kernel, which, q, k, v, further, last, True)
            return further[-1]

        for config in configs:
            name = f"flash_{which}_{D}_{V}_T{T}"
            yield name, config, config == ships[which], partial(run, config)


def decode(H: int, queries: int, B: int, S: int, device: str) -> Iterator[Task]:
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    q, entries = make(B, H, queries, 576), make(B, S, 576)
    lengths, rows = torch.full((B,), S, device=device), H * queries
    call = partial(mla.launch_decode, q, entries, 512, 0.07, lengths, None)
    ships = mla.decode_config(rows, 512, 2, mla.gpu(q.device)[0])
    if mla.fits_hopper(q, entries, 512, 0.07):
        ships = None
        yield f"decode_{H}x{queries}_batch_{B}", ("mla_hopper_kernel",), True, partial(call, None)
    for config in DECODE:
        if config[0] <= max(16, rows):
            name = f"decode_{H}x{queries}_batch_{B}"
            yield name, config, config == ships, partial(call, config)


def products(N: int, D: int, I: int, E: int, K: int, device: str) -> Iterator[Task]:
    """What `grouped_product` chooses from, for the three products of some experts, and gathered."""
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    pairs = torch.rand(N, E, device=device).topk(K).indices.flatten()
    ends = pairs.bincount(minlength=E).cumsum(0).to(torch.int32)
    token_of_row = pairs.argsort(stable=True) // K
    x, few, weight, grad = make(N * K, D), make(N, D), make(E, 2 * I, D), make(N * K, 2 * I)
    for name, which, operands, turned in (
        ("forward", "rows", (x, weight, None), False),
        ("forward_gathered", "rows", (few, weight, token_of_row), False),
        ("dgrad", "rows", (grad, weight, None), True),
        ("wgrad", "weights", (grad, x, None), False),
        ("wgrad_gathered", "weights", (grad, few, token_of_row), False),
    ):
        for run in moe.grouped_launches(which, operands, torch.bfloat16, ends, turned):
            yield f"grouped_{name}", run.args, True, run


def gemm(M: int, N: int, K: int, device: str) -> Iterator[Task]:
    a = fp8.quantize_tiles(torch.randn(M, K, device=device))
    b = fp8.quantize_blocks(torch.randn(N, K, device=device))
    for config in fp8.gemm_configs(M, True, False, fp8.gpu(a[0].device)[0], a_tiles=True):
        run = partial(fp8.launch_gemm, *a, *b, torch.bfloat16, config)
        yield f"fp8_{M}x{N}x{K}", tuple(config), True, run


def families(device: str) -> Iterator[Iterator[Task]]:
    for D, V in (128, 128), (192, 128):
        for T in 4096, 16384:
            yield flash(D, V, 16384 // T, 16, T, device)
    for H, queries, B in (16, 1, 64), (16, 2, 64), (128, 1, 128):
        yield decode(H, queries, B, 8192, device)
    yield products(8192, 2048, 1408, 64, 6, device)
    if fp8.has_kernels(torch.empty(0, device=device)):
        for N, K in fp8.V3_SHAPES:
            yield gemm(4096, N, K, device)


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--device", default="cuda", help="cuda, cuda:1, … (%(default)s)")
    device = torch.device(cli.parse_args().device)
    if device.type != "cuda" or not torch.cuda.is_available() or attn.triton is None:
        cli.exit(2, "there is no GPU here, or no Triton: there is nothing to time\n")
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    torch.cuda.set_device(device.index or 0)  # its timers are of the current one
    for family in families(device):
        for name, config, shipped, run in family:
            spelt = " ".join(map(str, config))
            try:
                ms = do_bench(run, rep=30, return_mode="median")
            except (CompilationError, OutOfResources) as error:
                print(f"skipped  {name} {spelt}: {type(error).__name__}")
                continue
            fp8.measure(name, ms, f"ms   ({spelt}){'   shipped' * shipped}")


if __name__ == "__main__":
    main()
