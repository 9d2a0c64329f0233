r"""The routed experts of 03_moe_router.py beside transformers' and beside a dense SwiGLU.

4096 tokens of width 512, 64 experts of 256, top 6, forward and backward, the same weights in all.
transformers runs its eager and its grouped_mm experts; in bf16 once under autocast (fp32 weights,
as in training) and once with bf16 weights, each beside ours with the same weights; the ratio shown
is the smaller. Each round brings another routing, as each step of a training does: oneDNN compiles
its bf16 products anew for every number of rows it has not met. Every round runs all rivals in turn;
the medians are shown. oneDNN may keep all that it compiles: of the 1,024 products that it keeps by
default one rival would push out another's.

Run:  python benchmarks/moe.py          2 minutes on two CPU cores
"""

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
moe = import_module("03_moe_router")
check, measure = moe.check, moe.measure

N, D, I, E, K = 4096, 512, 256, 64, 6
NARROW = "_bf16_weights"
Route = tuple[Tensor, Tensor, Tensor]


def draw_route(device: torch.device) -> Route:
    """Experts (N, K), their weights (N, K), load (E,), about as uneven as a balanced router's."""
    scores = torch.rand(N, E, device=device) + 0.1 * torch.randn(E, device=device)
    values, indices = scores.topk(K, -1)
    weights = (values / values.sum(-1, keepdim=True)).requires_grad_()
    return indices, weights, indices.flatten().bincount(minlength=E)


def make_transformers(ours: nn.Module, implementation: str) -> nn.Module | None:
    """transformers' experts with a copy of our weights; None where it is not installed."""
    try:
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf
    except ImportError:
        return None
    sizes = dict(hidden_size=D, moe_intermediate_size=I, n_routed_experts=E, num_experts_per_tok=K)
    config = hf.DeepseekV3Config(**sizes)
    config._experts_implementation = implementation
    experts = hf.DeepseekV3Experts(config).to(ours.gate_up_proj.device)
    experts.load_state_dict(ours.state_dict())
    return experts


class Rival:
    """One module in one precision; a call is a forward and a backward on a route."""

    def __init__(self, module: nn.Module, call: Callable, x: Tensor, upstream: Tensor, amp: bool):
        self.module, self.call, self.amp = module, call, amp
        dtype = torch.bfloat16 if amp else next(module.parameters()).dtype
        self.x, self.upstream = x.to(dtype).requires_grad_(), upstream.to(dtype)

    def __call__(self, route: Route) -> Tensor:
        self.x.grad = route[1].grad = None
        self.module.zero_grad(set_to_none=True)
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.amp):
            y = self.call(self.module, self.x, *route)
        y.backward(self.upstream.to(y.dtype))
        return y.detach()


def run_ours(experts: nn.Module, x: Tensor, indices: Tensor, weights: Tensor, load: Tensor):
    return experts(x, indices, weights, load)


def run_theirs(experts: nn.Module, x: Tensor, indices: Tensor, weights: Tensor, load: Tensor):
    return experts(x, indices, weights)


def run_dense(mlp: nn.Module, x: Tensor, *route: Tensor):
    return mlp(x)


class Products:
    """Ours without dispatch, SwiGLU and combine: the six products of each expert, in its blocks."""

    def __init__(self, experts: nn.Module, x: Tensor, bf16: bool):
        self.stacks = experts.gate_up_proj.detach(), experts.down_proj.detach()
        self.x = x.detach().to(torch.bfloat16 if bf16 else x.dtype)

    def __call__(self, route: Route) -> None:
        load = route[2]
        sizes = (moe.filled_up(load, N * K) if self.x.dtype == torch.bfloat16 else load).tolist()
        d_stacks = [torch.empty_like(stack) for stack in self.stacks]
        for e, r in moe._ExpertsInBlocks.blocks(sizes):
            (w1, w2), (d1, d2) = ([stack[e] for stack in pair] for pair in (self.stacks, d_stacks))
            rows = self.x[torch.arange(r.stop - r.start, device=self.x.device) % N]
            gate_up = moe._products(rows, w1, sizes[e])
            hidden = gate_up[:, :I].contiguous()
            out = moe._products(hidden, w2, sizes[e])
            moe._products_backward(out, hidden, w2, sizes[e], d2)
            moe._products_backward(gate_up, rows, w1, sizes[e], d1)


def verify(ours: Rival, theirs: Rival, route: Route, name: str, tol: float) -> None:
    """Output and every gradient, each as the size of the error over the size of the thing."""
    results = []
    for rival in (ours, theirs):
        y = rival(route)
        parameters = rival.module.gate_up_proj, rival.module.down_proj
        results.append([y, rival.x.grad, route[1].grad, *(p.grad for p in parameters)])
    pairs = [(got.double(), want.double()) for got, want in zip(*results, strict=True)]
    errors = torch.stack([(got - want).norm() / want.norm() for got, want in pairs])
    check(f"{name}: y, 4 gradients", errors, torch.zeros_like(errors), tol)


def race(rivals: dict[str, Rival], routes: list[Route]) -> dict[str, float]:
    """Median milliseconds; the first round only warms up."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for route in routes:
        for name, rival in rivals.items():
            begin = time.perf_counter()
            rival(route)
            if rival.x.is_cuda:
                torch.cuda.synchronize(rival.x.device)
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def compare(device: torch.device, bf16: bool, rounds: int) -> None:
    ours = moe.Experts(E, D, I).to(device)
    dense = moe.SwiGLU(D, K * I).to(device)
    x, upstream = torch.randn(2, N, D, device=device)
    routes = [draw_route(device) for _ in range(rounds + 1)]
    short = "bf16" if bf16 else "fp32"
    rivals = {
        "ours": Rival(ours, run_ours, x, upstream, bf16),
        "products": Products(ours, x, bf16),
        "dense": Rival(dense, run_dense, x, upstream, bf16),
    }
    if bf16:
        for name, module, run in ("ours", ours, run_ours), ("dense", dense, run_dense):
            narrow = copy.deepcopy(module).bfloat16()
            rivals[name + NARROW] = Rival(narrow, run, x, upstream, False)
    for implementation in "eager", "grouped_mm":
        theirs = make_transformers(ours, implementation)
        if theirs is not None:
            name = f"transformers_{implementation}"
            rivals[name] = Rival(theirs, run_theirs, x, upstream, bf16)
            if bf16:
                narrow = copy.deepcopy(theirs).bfloat16()
                rivals[name + NARROW] = Rival(narrow, run_theirs, x, upstream, False)
    theirs = [name for name in rivals if name.startswith("transformers")]
    for name in theirs:
        # bf16: a dozen roundings of 2^-9 on either side; fp32: sums in another order
        tol, ours = 2e-2 if bf16 else 1e-5, "ours" + NARROW * name.endswith(NARROW)
        verify(rivals[ours], rivals[name], routes[0], f"{short}, {name}", tol)
    ms = race(rivals, routes)
    for name, value in ms.items():
        wide = ms["dense" + NARROW * name.endswith(NARROW)]
        measure(f"{name}_{short}_ms", value, f"ms   {value / wide:.2f}x dense")
    rest = ms["ours"] - ms["products"]
    text = f"x the time of as wide a dense SwiGLU; {rest:.0f} ms are no product"
    measure(f"moe_dense_ratio_{short}", ms["ours"] / ms["dense"], text)
    if bf16:
        ratio = ms["ours" + NARROW] / ms["dense" + NARROW]
        measure(f"moe_dense_ratio{NARROW}", ratio, "x, weights in bf16 on both sides")
    if theirs:
        ratios = {n: ms[n] / ms["ours" + NARROW * n.endswith(NARROW)] for n in theirs}
        best = min(ratios, key=ratios.get)
        measure(f"moe_ratio_{short}", ratios[best], f"times as fast as {best}")


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    cli.add_argument("--device", default=default, help="cpu, cuda, cuda:1, … (%(default)s)")
    cli.add_argument("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    cli.add_argument("--rounds", type=int, default=9, help="timed, after one (%(default)s)")
    args = cli.parse_args()
    if args.rounds < 1:
        cli.error(f"--rounds must be positive, got {args.rounds}")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")  # before the first product
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device).item()
    except Exception as error:  # each backend raises a type of its own
        cli.exit(2, f"cannot run on --device {args.device}: {str(error).splitlines()[0][:100]}\n")
    torch.manual_seed(args.seed)
    try:
        import transformers  # noqa: F401
    except ImportError:
        print("skipped: transformers is not installed, only the dense rival is timed")
    for bf16 in False, True:
        compare(device, bf16, args.rounds)


if __name__ == "__main__":
    main()
