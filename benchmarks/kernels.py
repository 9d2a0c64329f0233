r"""What the compiler makes of every kernel configuration that the chapters ship, GPU by GPU.

No GPU is needed: each is compiled ahead of time, and the binary says what it takes. Registers are
those of a thread (255 at most); what is spilt lives in slow memory. On a Hopper flash_keys and
mla_decode for 32 rows spill a little, and are faster than others that do not (benchmarks/tiles.py).

Run:  python benchmarks/kernels.py          4 minutes on one CPU core
"""

import argparse
import itertools
import sys
from importlib import import_module
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "tests")]
ahead = import_module("ahead")
attn = import_module("01_attention")
mla = import_module("02_mla")
moe = import_module("03_moe_router")
fp8 = import_module("04_fp8_gemm")
GROUPED = [("rows", False, False), ("rows", True, False), ("rows", False, True)]
GROUPED += [("weights", False, False), ("weights", False, True)]
WIDTHS = (64, 64), (128, 128), (192, 128), (256, 256)  # of queries and keys, of values


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.parse_args()
    if fp8.triton is None:
        cli.exit(2, "Triton is not installed: there is nothing to compile with\n")
    for capability in 89, 90, 100, 120:
        for rows, kind, config in ahead.shipped(fp8, capability):
            got = ahead.compile_gemm(fp8, capability, config, **kind)
            how = [name for name in ("tma", "flatten", "swap") if getattr(config, name)]
            what = [kind.get("group", "dense"), kind.get("out", "bf16")]
            what += ["a_blocks"] * ("a_blocks" in kind) + ["b_tiles"] * ("b_blocks" in kind)
            tile = f"{config.BM}x{config.BN}", f"{config.warps}w", f"{config.stages}s"
            show("_".join((f"fp8_sm{capability}", f"M{rows}", *what, *tile, *how)), got)
    for config in fp8.gemm_configs(4096, True, False, (9, 0), a_tiles=True):
        for out in ("bf16", "fp32") if config.consumers else ():
            stages = fp8.ring_stages(config, {"bf16": torch.bfloat16, "fp32": torch.float32}[out])
            tile = f"{config.BM}x{config.BN}", f"{config.consumers}consumers", f"{stages}s"
            got = ahead.compile_specialized(fp8, config, out)
            show("_".join(("fp8_sm90", "M4096", "dense", out, *tile)), got)
    for capability in 80, 86, 90, 100, 120:
        for D, V in WIDTHS:
            for which in "forward", "keys", "queries":
                lengths = (4096, 16384) if (capability, which) == (90, "forward") else (4096,)
                for S in lengths:
                    got = ahead.compile_flash(attn, capability, which, D, V, S=S)
                    many = "_many_keys" * (S > 4096)
                    show(f"flash_{which}_sm{capability}_bf16_{D}_{V}{many}", got)
        for rows, page in itertools.product((16, 32, 64, 128), (0, 64)):
            got = ahead.compile_decode(mla, capability, rows, page=page)
            show(f"mla_decode_sm{capability}_bf16_{rows}_rows{'_paged' * bool(page)}", got)
        if capability == 90:
            for page in 0, 64:
                got = ahead.compile_hopper(mla, page=page)
                show(f"mla_hopper_sm90_bf16_64_rows{'_paged' * bool(page)}", got)
        for turned in False, True:
            got = ahead.compile_by_head(mla, capability, turned)
            show(f"by_head_sm{capability}_bf16{'_turned' * turned}", got)
        few = {f"few_{name}": got for name, got in ahead.compile_few(moe, capability).items()}
        for name, got in (ahead.compile_swiglu(moe, capability) | few).items():
            show(f"{name}_sm{capability}_bf16", got)
        for which, turned, gather in GROUPED:
            for config in moe.grouped_configs(which, 2, divmod(capability, 10)):
                got = ahead.compile_grouped(moe, capability, which, config, "bf16", turned, gather)
                tile, warps, stages, by = config
                how = [name for name, on in (("dgrad", turned), ("gather", gather)) if on]
                how += [
                    "x".join(map(str, tile)),
                    f"{warps}w",
                    f"{stages}s",
                    *[by.lower()] * (by != "pointers"),
                ]
                show("_".join((f"grouped_{which}_sm{capability}_bf16", *how)), got)


def show(name: str, got: ahead.Compiled) -> None:
    code = sum(line.rstrip().endswith(";") for line in got.sass.splitlines())
    text = f"registers, {got.shared / 1024:.0f} KB shared, {code:,} instructions"
    fp8.measure(name, got.registers, f"{text}, {got.spilled} bytes spilt")


if __name__ == "__main__":
    main()
