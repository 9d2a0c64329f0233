r"""Routed experts, forward + backward, beside transformers' and beside a dense layer as wide.

4096 tokens, width 512, 64 experts of 256, 6 a token. All sides have the same weights and the same
choice of experts, a new one in every round, as in training. transformers' experts run in "eager"
and "grouped_mm"; ours are compared with the better. The dense SwiGLU has the width that a token
uses, 6·256: what an ideal dispatch would cost. Interleaved, medians.

Run:  python benchmarks/moe.py          1 minute on two CPU cores
"""

import argparse
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
chapter = import_module("03_moe_router")

N, D, I, E, K = 4096, 512, 256, 64, 6


def choices(rounds: int, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Experts (N, K), weights (N, K) and load (E,) of an uneven router, one set a round."""
    made = []
    for _ in range(rounds):
        scores = torch.randn(N, E, device=device) + 0.3 * torch.randn(E, device=device)
        weights, indices = scores.softmax(-1).topk(K)
        made.append((indices, weights, indices.flatten().bincount(minlength=E)))
    return made


def rivals(ours: nn.Module, device: torch.device) -> dict[str, nn.Module]:
    """transformers' experts with our weights."""
    try:
        from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
    except ImportError:
        print("skipped: transformers is not installed")
        return {}
    found = {}
    for kind in "eager", "grouped_mm":
        config = DeepseekV3Config(hidden_size=D, moe_intermediate_size=I, n_routed_experts=E)
        config._experts_implementation = kind
        found[kind] = DeepseekV3Experts(config).to(device)
        found[kind].load_state_dict(ours.state_dict())
    return found


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    cli.add_argument("--device", default=default)
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--rounds", type=int, default=9)
    args = cli.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    ours = chapter.Experts(E, D, I, chapter.grouped_gemm).to(device)
    dense, others = chapter.SwiGLU(D, K * I).to(device), rivals(ours, device)
    rounds = choices(args.rounds + 1, device)
    x = torch.randn(N, D, device=device, requires_grad=True)
    upstream = torch.randn(N, D, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        bf16 = dtype is torch.bfloat16
        name = "bf16" if bf16 else "fp32"

        def step(side: str, indices: Tensor, weights: Tensor, load: Tensor, bf16=bf16) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                if side == "dense":
                    y = dense(x)
                else:
                    last = (load,) if side == "ours" else ()
                    side = ours if side == "ours" else others[side]
                    y = side(x, indices, weights, *last)
            y.float().backward(upstream)
            grad, x.grad = x.grad, None
            for module in (ours, dense, *others.values()):
                module.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return grad

        sides = ["ours", "dense", *others]
        times: dict[str, list[float]] = {side: [] for side in sides}
        for choice in rounds:
            for side in sides:
                begin = time.perf_counter()
                step(side, *choice)
                times[side].append(time.perf_counter() - begin)
        if others:
            want = step("eager", *rounds[0])
            error = (step("ours", *rounds[0]) - want).abs().max() / want.abs().max()
            tol = 2e-2 if bf16 else 1e-5  # relative: sums of 6 products rounded to 8 or 24 bits
            verdict = "ok" if error <= tol else "WRONG"
            text = f"gradient of x = transformers, {name}"
            print(f"check    {text:<44} error {error:.1e}   tol {tol:.0e}   {verdict}")
            if verdict != "ok":
                raise SystemExit(1)
        medians = {side: statistics.median(seconds[1:]) for side, seconds in times.items()}
        mine = medians["ours"]
        if others:
            best = min(others, key=medians.get)
            text = f"times the speed of {best}   {1e3 * medians[best]:.0f} / {1e3 * mine:.0f} ms"
            print(f"measure  {'moe_ratio_' + name:<44} {medians[best] / mine:.4g} {text}")
        text = f"times a dense layer's time   {1e3 * mine:.0f} / {1e3 * medians['dense']:.0f} ms"
        print(f"measure  {'moe_dense_ratio_' + name:<44} {mine / medians['dense']:.4g} {text}")


if __name__ == "__main__":
    main()
