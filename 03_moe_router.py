# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<=2.13", "triton>=3.6; sys_platform == 'linux'", "matplotlib>=3.8", "numpy>=1.26",
# ]
# ///
r"""03 · DeepSeekMoE: many small experts, a few for each token, kept busy by a bias, not a loss.

One MoE layer of DeepSeek-V3 stores 11.3 billion parameters and uses 398 million of them for a
token; the whole model stores 671 billion and uses 37. That pays only if all experts stay busy, and
a router left alone does the opposite: who is chosen improves, and who is better gets chosen.

    x (N,D) ─┬─ gate ─► s (N,E) ─ + b ─► best groups ─► top K ─► w (N,K)
             │         sigmoid   bias: who, never how much         │
             │                                        ┌────────────┘
             ├─ sort by expert ─► rows (N·K,D) ─► SwiGLUₑ · w ─► Σₖ ─┐
             │                    one product an expert              │
             └─ shared SwiGLU ───────────────────────────────────────+─► y (N,D)

    layer     h'ₜ = uₜ + Σᵢ FFNˢᵢ(uₜ) + Σᵢ gᵢₜ FFNᵢ(uₜ)      uₜ is added outside     [1] eq. 12
    weight    gᵢₜ = g'ᵢₜ / Σⱼ g'ⱼₜ       times routed_scaling_factor, V3: 2.5        [1] eq. 13
    affinity  sᵢₜ = sigmoid(uₜᵀeᵢ)       uₜ: row of x, eᵢ: row of gate.weight        [1] eq. 15
    choice    g'ᵢₜ = sᵢₜ if sᵢₜ + bᵢ is in the top K of all sⱼₜ + bⱼ, else 0         [1] eq. 16
    bias      bᵢ ← bᵢ + γ·sign(mean load − loadᵢ)            after each step         [1] §2.1.2
    loss      α Σᵢ fᵢPᵢ       fᵢ = E/(K·T) · (tokens of the sequence that chose i)   [1] eq. 17, 18
                              Pᵢ = mean over its tokens of sᵢₜ / Σⱼ sⱼₜ              [1] eq. 19, 20
    MaxVio    max load / mean load − 1      0: all even, E/K − 1: all on the same K  [2] eq. 4
    α, γ      how strong the loss is, how long a step of the bias; FFNˢ: a shared expert

    axis  config name            here  V3      [1] DeepSeek-V3, arXiv:2412.19437
    N     tokens, B·T              24  –       [2] Wang et al. 2024, arXiv:2408.15664
    D     hidden_size              32  7168    [3] DeepSeekMoE, Dai et al. 2024, arXiv:2401.06066
    E     n_routed_experts         16  256     [4] DeepSeek-V2, arXiv:2405.04434
    K     num_experts_per_tok       4  8       V3: [1] §4.2
    G     n_group                   4  8       the K lie in topk_group = 2 (V3: 4) of G groups
    I     moe_intermediate_size    24  2048    and n_shared_experts = 1, that every token visits

Run:  python 03_moe_router.py [--bench]          16 s on one CPU core, 30 s with --bench
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    import triton
    from triton import language as tl
except ImportError:  # macOS, Windows: the PyTorch twins do it all
    triton = tl = None

# %% 1. The equation, word for word ----------------------------------------------------------
# One token after the other, one expert after the other.


def choose_reference(scores: Tensor, gate: "Router", dropped: float = float("-inf")) -> list[int]:
    """[1] eq. 16 and §2.1.2 for one token's scores (E,); `dropped`: a lost group's score."""
    bias, size = gate.e_score_correction_bias, gate.n_routed_experts // gate.n_group
    c = (scores if bias is None else scores + bias).tolist()
    best = 2 if gate.topk_method == "noaux_tc" else 1  # V3: K/topk_group = 8/4; V2: maximum, [4]
    groups = [range(first, first + size) for first in range(0, len(c), size)]
    groups.sort(key=lambda group: sum(sorted(c[i] for i in group)[-best:]))
    for group in groups[: -gate.topk_group]:
        for i in group:
            c[i] = dropped
    return sorted(range(len(c)), key=c.__getitem__)[-gate.num_experts_per_tok :]


def moe_reference(moe: "MoE", x: Tensor) -> tuple[Tensor, Tensor]:
    """[1] eq. 12-20, x: (B, T, D) float64 -> output (B, T, D), Σ fᵢPᵢ averaged over B."""
    gate, experts = moe.gate, moe.experts
    E, K, outputs, losses = gate.n_routed_experts, gate.num_experts_per_tok, [], []

    def expert(i: int, u: Tensor) -> Tensor:
        gated, up = (experts.gate_up_proj[i] @ u).chunk(2)  # (I,) each
        return experts.down_proj[i] @ (gated / (1 + (-gated).exp()) * up)

    for sequence in x:
        f, P = [0] * E, [0] * E
        for u in sequence:
            s = torch.stack([(u @ e).exp() for e in gate.weight])
            s = s / s.sum() if gate.scoring_func == "softmax" else s / (1 + s)
            chosen = choose_reference(s, gate)
            total = sum(s[i] for i in chosen) if gate.norm_topk_prob else 1
            y = moe.shared_experts(u)
            for i in chosen:
                y = y + gate.routed_scaling_factor * s[i] / total * expert(i, u)
                f[i] += E / (K * len(sequence))
            for i in range(E):
                P[i] = P[i] + s[i] / s.sum() / len(sequence)
            outputs.append(y)
        losses.append(sum(f[i] * P[i] for i in range(E)))
    return torch.stack(outputs).view(x.shape), torch.stack(losses).mean()


# %% 2. The piece ----------------------------------------------------------------------------
# Tokens are sorted by expert, so that each expert's are neighbours: then a layer is two grouped
# products, whatever the load, and no token is ever dropped. On a CPU a few experts at a time are
# computed from x to y, in memory that the next ones use again; on a GPU no sorted copy of x is
# made: forward's kernels fetch each row while they multiply.


# >>> copy: Router, SwiGLU, MoE, grouped_gemm, max_violation (needs torch, triton, tl)
import math
from collections.abc import Callable
from functools import lru_cache, partial

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor


class Router(nn.Module):
    """Which K of the E experts serve a token, and with what weights (V3 eq. 13-16).

    topk_method: "noaux_tc" is V3's (a bias helps to choose, a group ranks by the sum of its best
    two), "group_limited_greedy" V2's (no bias, a group ranks by its best), "greedy" V2-Lite's (no
    bias, no groups). Arguments and parameters carry the names of the released configs; a choice
    that cannot be made, or a name that is unknown, raises ValueError.
    """

    def __init__(
        self, hidden_size: int, n_routed_experts: int, num_experts_per_tok: int,
        n_group: int = 1, topk_group: int = 1, routed_scaling_factor: float = 1.0,
        norm_topk_prob: bool = True, scoring_func: str = "sigmoid", topk_method: str = "noaux_tc",
    ):  # fmt: skip
        super().__init__()
        if scoring_func not in ("sigmoid", "softmax"):
            raise ValueError(f"scoring_func is 'sigmoid' or 'softmax', not {scoring_func!r}")
        if topk_method not in ("noaux_tc", "group_limited_greedy", "greedy"):
            raise ValueError(f"unknown topk_method {topk_method!r}")
        if topk_method == "greedy":
            n_group = topk_group = 1
        E, K, G, kept = n_routed_experts, num_experts_per_tok, n_group, topk_group
        if G < 1 or E % G:
            raise ValueError(f"{E} experts do not split into {G} groups")
        if not 1 <= kept <= G or not 1 <= K <= kept * (E // G):
            raise ValueError(f"cannot choose {K} experts from {kept} of {G} groups of {E // G}")
        if topk_method == "noaux_tc" and 1 < G == E:
            raise ValueError(f"a group ranks by its best two experts, each of the {G} holds one")
        self.n_routed_experts, self.num_experts_per_tok = E, K
        self.n_group, self.topk_group = G, kept
        self.routed_scaling_factor, self.norm_topk_prob = routed_scaling_factor, norm_topk_prob
        self.scoring_func, self.topk_method = scoring_func, topk_method
        self.weight = nn.Parameter(torch.empty(E, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)
        bias = torch.zeros(E, dtype=torch.float32) if topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn, recurse=True):
        """Keep the bias in fp32 under .to(bfloat16): its steps are smaller than bf16's."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if before is not None and before.is_meta and not after.is_meta:
            after.zero_()  # to_empty left whatever was in memory
        elif before is not None and after.dtype != torch.float32:
            self.e_score_correction_bias = before.to(after.device)
        return self

    def _load_from_state_dict(self, *arguments):
        super()._load_from_state_dict(*arguments)
        if self.e_score_correction_bias is not None:  # assign=True takes what dtype there is
            self.e_score_correction_bias = self.e_score_correction_bias.float()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (N, D) -> the chosen (N, K) int64, their weights (N, K), all scores (N, E).

        Scores and weights are fp32, or float64 for such x, whatever autocast says: in bf16 near
        ties would fall another way.
        """
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            product = few_rows if are_few(x, 2) else F.linear
            logits = product(x.to(wide), self.weight.to(wide))
        scores = logits.sigmoid() if self.scoring_func == "sigmoid" else logits.softmax(-1)
        indices = self.choose(scores.detach())
        weights = scores.gather(-1, indices)  # of the scores alone: the bias has done its work
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return indices, weights * self.routed_scaling_factor, scores

    def choose(self, scores: Tensor) -> Tensor:
        """scores: (N, E) -> the chosen experts (N, K), in no order."""
        choice, G = scores, self.n_group
        if self.e_score_correction_bias is not None:
            choice = choice + self.e_score_correction_bias
        if G > 1:
            grouped = choice.unflatten(-1, (G, -1))  # (N, G, E/G)
            best = 2 if self.topk_method == "noaux_tc" else 1
            rank = grouped.topk(best, -1).values.sum(-1)  # (N, G)
            kept = rank.topk(self.topk_group, -1, sorted=False).indices
            dropped = torch.ones_like(rank, dtype=torch.bool).scatter_(-1, kept, False)
            # −inf and not 0: a biased score may be negative, and 0 would beat it
            choice = grouped.masked_fill(dropped[..., None], float("-inf")).flatten(-2)
        return choice.topk(self.num_experts_per_tok, -1, sorted=False).indices

    @torch.no_grad()
    def update_bias(self, load: Tensor, gamma: float, center: bool = False) -> None:
        """b += γ·sign(mean load − load): the crowded lose ground, the idle gain (V3 §2.1.2).

        Call it after the optimizer's step, so that a token's choice never depends on its own batch.
        load: (E,) tokens an expert got in the whole batch, over all micro-batches and devices.
        center: take the mean off the step, which changes no choice and keeps b from drifting.
        """
        bias = self.e_score_correction_bias
        if bias is None or load.shape != bias.shape:
            want = "no bias" if bias is None else f"a bias of {len(bias)} experts"
            raise ValueError(f"{self.topk_method} has {want}, the load is {tuple(load.shape)}")
        load = load.to(bias.device)
        load = load if load.is_floating_point() else load.long()  # of int32 the product overflows
        step = (load.sum() - len(load) * load).sign().to(bias.dtype)  # in integers: no rounding
        bias += gamma * (step - step.mean() if center else step)


class SwiGLU(nn.Module):
    """down(silu(gate x)·up x): (..., D) -> (..., D); the dense layers and the shared experts."""

    def __init__(self, hidden_size: int, intermediate_size: int, linear=nn.Linear):
        super().__init__()
        self.gate_proj = linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def has_amx() -> bool:
    """Has this CPU a unit for tiles of bf16? (torch 2.11 can't say: then no.)"""
    return getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)


def few_rows(x: Tensor, weight: Tensor, amx: bool = has_amx()) -> Tensor:
    """x Wᵀ of a few rows, without a gradient: x (n, I), weight (O, I) -> (n, O).

    The time is that of reading the weight. On a CPU it depends on the routine that reads, in bf16:
    with AMX mv for one row, and the weight on the left for more, are sooner done than linear;
    without, they take up to twice as long (see --bench). On a GPU a kernel reads, which gives a row
    the same bits alone and beside others.
    """
    if has_kernels(x):
        return few_products(x, weight)
    if weight.dtype.itemsize > 2 or not amx:
        return F.linear(x, weight)
    return torch.mv(weight, x[0])[None] if len(x) == 1 else (weight @ x.T).T


def _products(x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    """Each expert's rows times its matrix, transposed, written straight into the rows of y."""
    y = x.new_empty(len(x), weight.shape[1])
    for rows, w, out in zip(x.split(sizes), weight.unbind(), y.split(sizes), strict=True):
        if len(rows):
            torch.mm(rows, w.to(x.dtype).T, out=out)
    return y


def _products_backward(grad: Tensor, x: Tensor, weight: Tensor, sizes: list[int], dw=None):
    """The gradient of x; that of the weight is written into dw, unless it is frozen."""
    dx = torch.empty_like(x)
    by_expert = (t.split(sizes) for t in (grad, x, dx))
    # unbind: autograd would turn each weight[e] into zeros of the size of the whole stack
    into = [None] * len(weight) if dw is None else dw.unbind()
    for g, rows, out, w, dw_e in zip(*by_expert, weight.unbind(), into, strict=True):
        if len(rows):
            torch.mm(g, w.to(x.dtype), out=out)
        if dw is None:
            continue
        if dw.dtype == x.dtype:
            torch.mm(g.T, rows, out=dw_e)  # zeros for an expert without rows
        else:
            dw_e.copy_(g.T @ rows)
    return dx


# same as 01_attention.py
def first_order(backward):
    """For a Function's backward: refuses create_graph, which asks for its own derivative too. Its
    steps are not recorded, and what depends on saved tensors alone would count as a constant."""

    def checked(ctx, *grads):
        if torch.is_grad_enabled():  # by create_graph
            raise RuntimeError("no second derivative of this: want create_graph=False")
        return backward(ctx, *grads)

    return checked


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, sizes):
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return _products(x, weight, sizes)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dw = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        return _products_backward(grad, x, weight, ctx.sizes, dw), dw, None


# The kernels. How many rows an expert has is known to the GPU alone, and asking would make it wait:
# so each program finds out from the experts' last rows which tile of which expert is its own.
if triton is not None:

    @triton.jit
    def _tiles_up_to(ends, E, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
        """Tiles of ROWS rows of the first expert, of the first two, …: (EXPERTS,)."""
        e = tl.arange(0, EXPERTS)
        end = tl.load(ends + e, mask=e < E, other=0)
        start = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
        return tl.cumsum(tl.cdiv(end - start, ROWS), 0)

    @triton.jit
    def grouped_rows_kernel(
        x, weight, out, ends, source, N, K, E, EXPERTS: tl.constexpr, TURNED: tl.constexpr,
        TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
        GROUP: tl.constexpr,
    ):  # fmt: skip
        """Tiles (BM, BN) of out[m] = w x[m], w of m's expert; a program takes each num_programs-th.

        weight: (E, N, K), or TURNED (E, K, N). source: row m is x[source[m]]. TMA: weight, and x
        without a source, are descriptors. GROUP rows of tiles follow one another: what they share
        stays in L2.
        """
        up_to, tiles_n = _tiles_up_to(ends, E, BM, EXPERTS), tl.cdiv(N, BN)
        for tile in tl.range(
            tl.program_id(0), tl.max(up_to, 0) * tiles_n, tl.num_programs(0), flatten=TMA
        ):
            expert = tl.sum((up_to * tiles_n <= tile).to(tl.int32), 0)
            place = tile - tl.max(tl.where(up_to * tiles_n <= tile, up_to, 0), 0) * tiles_n
            first_row = tl.load(ends + expert - 1, mask=expert > 0, other=0)
            last_row = tl.load(ends + expert)
            top = place // (GROUP * tiles_n) * GROUP
            height = tl.minimum(tl.cdiv(last_row - first_row, BM) - top, GROUP)
            m0 = first_row + (top + place % (GROUP * tiles_n) % height) * BM
            n0 = place % (GROUP * tiles_n) // height * BN
            m, n, k = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN), tl.arange(0, BK)
            row = m
            if source is not None:
                row = tl.load(source + m, mask=m < last_row, other=0)
            if source is not None or not TMA:
                x_at = x + row[:, None].to(tl.int64) * K + k[None, :]
            if not TMA:
                w_at = weight + expert.to(tl.int64) * N * K
                w_at += (k[:, None] * N + n[None, :]) if TURNED else (n[None, :] * K + k[:, None])
            total = tl.zeros((BM, BN), tl.float32)
            for start in range(0, K, BK):
                inside = k < K - start
                if source is None and TMA:  # rows of the next expert too: they are not stored
                    rows = x.load([m0, start])
                else:
                    ours = (m[:, None] < last_row) & inside[None, :]
                    rows = tl.load(x_at + start, mask=ours, other=0.0)
                if TMA and TURNED:
                    w = weight.load([expert * K + start, n0])
                elif TMA:
                    w = weight.load([expert * N + n0, start]).T
                else:
                    ours = (n[None, :] < N) & inside[:, None]
                    w = tl.load(w_at + start * (N if TURNED else 1), mask=ours, other=0.0)
                total = tl.dot(rows, w, total, input_precision="ieee")
            at = out + m[:, None].to(tl.int64) * N + n[None, :]
            inside = (m[:, None] < last_row) & (n[None, :] < N)
            tl.store(at, total.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def grouped_weights_kernel(
        grad, x, out, ends, source, grad_box, x_box, N, K,
        TMA: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    ):  # fmt: skip
        """One tile (BN, BK) of out[e] = Σ grad[m] x[m]ᵀ over the rows of expert e: (E, N, K).

        TMA: descriptors of grad and x fetch all rows but the last few, which a mask must end.
        """
        tiles_k = tl.cdiv(K, BK)
        tile, expert = tl.program_id(0), tl.program_id(1)
        n0, k0 = tile // tiles_k * BN, tile % tiles_k * BK
        n, k = n0 + tl.arange(0, BN), k0 + tl.arange(0, BK)
        first_row = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        last_row = tl.load(ends + expert)
        total = tl.zeros((BN, BK), tl.float32)
        if TMA:
            whole = (last_row - first_row) // BR * BR
            for start in range(first_row, first_row + whole, BR):
                g, rows = grad_box.load([start, n0]), x_box.load([start, k0])
                total = tl.dot(g.T, rows, total)
            first_row += whole
        for start in range(first_row, last_row, BR):
            m = start + tl.arange(0, BR)
            row, ours = m, m[:, None] < last_row
            if source is not None:
                row = tl.load(source + m, mask=m < last_row, other=0)
            g_at = grad + m[:, None].to(tl.int64) * N + n[None, :]
            x_at = x + row[:, None].to(tl.int64) * K + k[None, :]
            g = tl.load(g_at, mask=ours & (n[None, :] < N), other=0.0)
            rows = tl.load(x_at, mask=ours & (k[None, :] < K), other=0.0)
            total = tl.dot(g.T, rows, total, input_precision="ieee")
        at = out + expert.to(tl.int64) * N * K + n[:, None].to(tl.int64) * K + k[None, :]
        inside = (n[:, None] < N) & (k[None, :] < K)
        tl.store(at, total.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def swiglu_kernel(gate_up, weights, out, I, BLOCK: tl.constexpr):
        """One row of silu(gate) · up · its weight, all products in fp32."""
        row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        gate = tl.load(gate_up + row * 2 * I + i, mask=i < I, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * I + I + i, mask=i < I, other=0.0).to(tl.float32)
        weight = tl.load(weights + row).to(tl.float32)
        value = gate * tl.sigmoid(gate) * up * weight
        tl.store(out + row * I + i, value.to(out.dtype.element_ty), mask=i < I)

    @triton.jit
    def swiglu_backward_kernel(
        grad, gate_up, weights, d_gate_up, d_weights, I, BLOCK: tl.constexpr
    ):
        """silu'(g) = σ(g) + silu(g)·(1 − σ(g)); a row's weight gets Σ grad·silu(gate)·up."""
        row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        gate = tl.load(gate_up + row * 2 * I + i, mask=i < I, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * I + I + i, mask=i < I, other=0.0).to(tl.float32)
        g = tl.load(grad + row * I + i, mask=i < I, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        tl.store(d_weights + row, tl.sum(g * silu * up, 0).to(d_weights.dtype.element_ty))
        g *= tl.load(weights + row).to(tl.float32)
        d_gate = g * up * (sigmoid + silu * (1 - sigmoid))
        at = d_gate_up + row * 2 * I + i
        tl.store(at, d_gate.to(at.dtype.element_ty), mask=i < I)
        tl.store(at + I, (g * silu).to(at.dtype.element_ty), mask=i < I)

    @triton.jit
    def combine_kernel(rows, rows_of_token, out, D, K, BLOCK: tl.constexpr):
        """BLOCK channels of one token's sum over its K rows."""
        n, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for k in range(0, K):
            row = tl.load(rows_of_token + n * K + k)
            total += tl.load(rows + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(out + n * D + d, total.to(out.dtype.element_ty), mask=d < D)

    # A decoded token is one row, and a tile of one row is no product for the tensor cores: the time
    # is that of reading the weights, so each program reads BO of their rows, as they lie. A row's
    # numbers come out the same alone and beside another. (Programs of weights are on the first
    # axis: a grid's others end at 65,535.)

    @triton.jit
    def few_rows_kernel(
        x, weight, out, chosen, O, I, TOP: tl.constexpr, PAIR: tl.constexpr, BO: tl.constexpr,
        BI: tl.constexpr,
    ):  # fmt: skip
        """BO outputs of one token: Σ over its TOP rows r of x of W[chosen[r]] x[r]. PAIR: those of
        a second token too, so that weights are read once.

        x: (N·TOP, I), chosen: (N·TOP,) or None, weight: (E, O, I), or (O, I) -> out: (N, O).
        """
        n, o = tl.program_id(1).to(tl.int64), tl.program_id(0) * BO + tl.arange(0, BO)
        total, second = tl.zeros((BO, BI), tl.float32), tl.zeros((BO, BI), tl.float32)
        for r in range(n * TOP, n * TOP + TOP):
            matrix = weight
            if chosen is not None:
                matrix += tl.load(chosen + r).to(tl.int64) * O * I
            for start in range(0, I, BI):
                i = start + tl.arange(0, BI)
                inside = (o[:, None] < O) & (i[None, :] < I)
                at = matrix + o[:, None].to(tl.int64) * I + i[None, :]
                w = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                row = tl.load(x + r * I + i, mask=i < I, other=0.0).to(tl.float32)
                total += w * row[None, :]
                if PAIR:
                    row = tl.load(x + (r + 1) * I + i, mask=i < I, other=0.0).to(tl.float32)
                    second += w * row[None, :]
        tl.store(out + n * O + o, tl.sum(total, 1).to(out.dtype.element_ty), mask=o < O)
        if PAIR:
            tl.store(out + O + o, tl.sum(second, 1).to(out.dtype.element_ty), mask=o < O)

    @triton.jit
    def few_gate_up_kernel(
        x, gate_up, out, chosen, weights, I, D, TOP: tl.constexpr, BO: tl.constexpr,
        BI: tl.constexpr,
    ):  # fmt: skip
        """BO of silu(gate) · up · its weight, of one pair of token and expert.

        x: (N, D), gate_up: (E, 2 I, D), chosen, weights: (N·TOP,) -> out: (N·TOP, I).
        """
        r, o = tl.program_id(1).to(tl.int64), tl.program_id(0) * BO + tl.arange(0, BO)
        matrix = gate_up + tl.load(chosen + r).to(tl.int64) * 2 * I * D
        gate, up = tl.zeros((BO, BI), tl.float32), tl.zeros((BO, BI), tl.float32)
        for start in range(0, D, BI):
            d = start + tl.arange(0, BI)
            inside = (o[:, None] < I) & (d[None, :] < D)
            at = matrix + o[:, None].to(tl.int64) * D + d[None, :]
            row = tl.load(x + r // TOP * D + d, mask=d < D, other=0.0)[None, :].to(tl.float32)
            gate += tl.load(at, mask=inside, other=0.0).to(tl.float32) * row
            up += tl.load(at + I * D, mask=inside, other=0.0).to(tl.float32) * row
        g, weight = tl.sum(gate, 1), tl.load(weights + r).to(tl.float32)
        value = g * tl.sigmoid(g) * tl.sum(up, 1) * weight
        tl.store(out + r * I + o, value.to(out.dtype.element_ty), mask=o < I)


# A third kernel does all three products on a Hopper, warp by warp in Gluon, Triton's lower language
# (04 has its plan): one warp loads, two groups of four warps multiply, and none of them stops
# between two tiles: while the groups store one, the loader is at the next.
try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    try:
        from triton.experimental.gluon.language import barrier
    except ImportError:  # Triton 3.6 calls it so
        from triton.experimental.gluon.language import thread_barrier as barrier
    try:
        from triton.experimental.gluon.language.nvidia.hopper.tma import async_load, async_store
    except ImportError:  # Triton 3.6 and 3.7 call them so
        from triton.experimental.gluon.language.nvidia.hopper.tma import (
            async_copy_global_to_shared as async_load,
        )
        from triton.experimental.gluon.language.nvidia.hopper.tma import (
            async_copy_shared_to_global as async_store,
        )
    HAS_GLUON = True
except ImportError:  # no Triton, or one without these: the kernels above do it all
    HAS_GLUON = False

if HAS_GLUON:
    # same as 04_fp8_gemm.py
    @gluon.jit
    def _next(stage, phase, STAGES: gl.constexpr):
        """The next stage of the ring, and how often round: odd or even."""
        last = stage == STAGES - 1
        return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)

    @gluon.jit
    def _previous(stage, STAGES: gl.constexpr):
        """The stage before. Kept in a variable instead, that began as `stage`, it would not change:
        Triton takes the two for one all through a loop."""
        return gl.where(stage == 0, STAGES - 1, stage - 1)

    @gluon.jit
    def _begin():
        """Stage, phase and `at`, when no tile has been looked for yet."""
        zero = gl.to_tensor(0)
        return zero, zero, (zero - 1, zero, zero, zero, zero)

    @gluon.jit
    def _find(tile, at, ends, sizes, WEIGHTS: gl.constexpr):
        """On to the expert that a tile belongs to: (expert, tiles before its own, its own, the rows
        from which and up to which it has), then the row of its part of out and the column at which
        the tile begins."""
        expert, before, tiles, first_row, last_row = at
        height, N, _, _ = sizes
        tiles_n = gl.cdiv(N, 256)
        while tile >= before + tiles:
            before += tiles
            expert += 1
            first_row = last_row
            last_row = gl.load(ends + expert)
            tiles = gl.cdiv(height if WEIGHTS else last_row - first_row, 128) * tiles_n
        tiles_m, place = tiles // tiles_n, tile - before
        top = place // (8 * tiles_n) * 8  # 8 rows of tiles follow one another
        inside, rows = place % (8 * tiles_n), gl.minimum(tiles_m - top, 8)
        m0, n0 = (top + inside % rows) * 128, inside // rows * 256
        return (expert, before, tiles, first_row, last_row), m0, n0

    @gluon.jit
    def _load_grouped(
        boxes, ends, ring, sizes, WEIGHTS: gl.constexpr, TURNED: gl.constexpr,
        STAGES: gl.constexpr,
    ):  # fmt: skip
        """Fills the ring, tile after tile, as far ahead as it has stages."""
        a, b = boxes
        a_bufs, b_bufs, full, empty = ring
        _, N, K, tiles = sizes
        stage, phase, at = _begin()
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            at, m0, n0 = _find(tile, at, ends, sizes, WEIGHTS)
            expert, _, _, first_row, last_row = at
            for k in range(0, last_row - first_row if WEIGHTS else K, 64):
                mbarrier.wait(empty.index(stage), phase ^ 1)  # passes at once in the first round
                bar = full.index(stage)
                mbarrier.expect(bar, (128 + 256) * 64 * 2)  # zeros from beyond the edge count, too
                for c in gl.static_range(2):
                    if WEIGHTS:
                        a_at = [first_row + k, m0 + 64 * c]
                    else:  # rows of the next expert too: they are not stored
                        a_at = [first_row + m0 + 64 * c, k]
                    async_load(a, a_at, bar, a_bufs.index(stage * 2 + c))
                if WEIGHTS:
                    b_at = [first_row + k, n0]
                elif TURNED:
                    b_at = [expert * K + k, n0]
                else:
                    b_at = [expert * N + n0, k]
                async_load(b, b_at, bar, b_bufs.index(stage))
                stage, phase = _next(stage, phase, STAGES)

    @gluon.jit
    def _multiply_grouped(
        store, ends, ring, sizes, c: gl.constexpr, WEIGHTS: gl.constexpr, TURNED: gl.constexpr,
        STAGES: gl.constexpr,
    ):  # fmt: skip
        """Rows 64 c to 64 c + 63 of every tile."""
        LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
        a_bufs, b_bufs, full, empty = ring
        height, N, K, tiles = sizes
        stage, phase, at = _begin()
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            at, m0, n0 = _find(tile, at, ends, sizes, WEIGHTS)
            expert, _, _, first_row, last_row = at
            depth = last_row - first_row if WEIGHTS else K
            rows_left = (height if WEIGHTS else last_row - first_row) - m0
            if rows_left <= 64 * c:  # the other group has all there is
                for _ in range(0, depth, 64):
                    mbarrier.wait(full.index(stage), phase)
                    mbarrier.arrive(empty.index(stage), count=1)
                    stage, phase = _next(stage, phase, STAGES)
            else:
                total = gl.zeros((64, 256), gl.float32, LAYOUT)
                for k in range(0, depth, 64):
                    mbarrier.wait(full.index(stage), phase)
                    left, right = a_bufs.index(stage * 2 + c), b_bufs.index(stage)
                    if WEIGHTS:  # (64 of the expert's rows, 64 of height): to be turned
                        if depth - k < 64:
                            _clear_past(left, depth - k)
                        left = left.permute((1, 0))
                    elif not TURNED:  # (256 of N, 64 of K)
                        right = right.permute((1, 0))
                    total = warpgroup_mma(left, right, total, is_async=True)
                    total = warpgroup_mma_wait(1, deps=(total,))  # for the step before this one
                    if k > 0:
                        mbarrier.arrive(empty.index(_previous(stage, STAGES)), count=1)
                    stage, phase = _next(stage, phase, STAGES)
                total = warpgroup_mma_wait(0, deps=(total,))
                if depth > 0:
                    mbarrier.arrive(empty.index(_previous(stage, STAGES)), count=1)
                row = (expert * height if WEIGHTS else first_row) + m0 + 64 * c
                _store_grouped(store, total, row, n0, rows_left - 64 * c, N, c, LAYOUT)
        tma.store_wait(0)

    @gluon.jit
    def _store_grouped(store, total, row, n0, rows_left, N, c: gl.constexpr, LAYOUT: gl.constexpr):
        """64 rows by TMA; number by number where they are fewer, or fp32, which has no buffers."""
        if len(store) == 1 or rows_left < 64:
            m = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
            n = n0 + gl.arange(0, 256, gl.SliceLayout(0, LAYOUT))
            inside = (m < rows_left)[:, None] & (n < N)[None, :]
            to = store[0] + (row + m)[:, None].to(gl.int64) * N + n[None, :]
            gl.store(to, total.to(store[0].dtype.element_ty), mask=inside)
        else:
            buffer = store[2].index(c)
            tma.store_wait(0)  # the tile before this one has left it
            buffer.store(total.to(buffer.dtype))
            fence_async_shared()  # TMA will see it
            async_store(store[1], [row, n0], buffer)

    @gluon.jit
    def _clear_past(part, filled):
        """Zeros in the rows of grad that are the next expert's. Those of x stay, times 0: a NaN in
        them is in this gradient, too."""
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        values = part.load(layout)
        ours = gl.arange(0, 64, gl.SliceLayout(1, layout)) < filled
        part.store(gl.where(ours[:, None], values, gl.zeros_like(values)))
        fence_async_shared()
        barrier()

    @gluon.jit
    def grouped_hopper_kernel(
        a, b, out, out_box, ends, height, N, K, E, WEIGHTS: gl.constexpr, TURNED: gl.constexpr,
        STAGES: gl.constexpr,
    ):  # fmt: skip
        """Tiles (128, 256) of out, by steps of 64; a program takes each num_programs-th.

        out (M, N): row m is w a[m], w of m's expert, a: (M, K), b: (E, N, K), or TURNED (E, K, N).
        WEIGHTS: out (E, height, N): Σ a[m] b[m]ᵀ over an expert's rows, a: (M, height), b: (M, N).
        a, b and out_box are descriptors, E and the axis after it one; out_box is None for fp32.
        """
        tiles_n, tiles, first_row = gl.cdiv(N, 256), gl.to_tensor(0), gl.to_tensor(0)
        for e in range(E):
            last_row = gl.load(ends + e)
            tiles += gl.cdiv(height if WEIGHTS else last_row - first_row, 128) * tiles_n
            first_row = last_row
        a_bufs = gl.allocate_shared_memory(a.dtype, [STAGES * 2, 64, 64], a.layout)
        ROWS: gl.constexpr = 64 if WEIGHTS or TURNED else 256
        b_bufs = gl.allocate_shared_memory(b.dtype, [STAGES, ROWS, 64 * 256 // ROWS], b.layout)
        if out_box is not None:
            out_bufs = gl.allocate_shared_memory(out_box.dtype, [2, 64, 256], out_box.layout)
            store = out, out_box, out_bufs
        else:
            store = (out,)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(full.index(stage), count=1)
            mbarrier.init(empty.index(stage), count=2)
        fence_async_shared()  # TMA will see them initialised
        ring, sizes = (a_bufs, b_bufs, full, empty), (height, N, K, tiles)
        gl.warp_specialize(
            [
                (_multiply_grouped, (store, ends, ring, sizes, 0, WEIGHTS, TURNED, STAGES)),
                (_multiply_grouped, (store, ends, ring, sizes, 1, WEIGHTS, TURNED, STAGES)),
                (_load_grouped, ((a, b), ends, ring, sizes, WEIGHTS, TURNED, STAGES)),
            ],
            [4, 1], [240, 24],  # warps and registers of all but the first, which has the rest
        )  # fmt: skip


# same as 01_attention.py
@lru_cache
def gpu(device: torch.device) -> tuple[tuple[int, int], int]:
    """Its compute capability and how many SMs it has, asked for once."""
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count


def grouped_configs(which: str, itemsize: int, capability: tuple[int, int]) -> list[tuple]:
    """(tile, warps, stages, by) of what may run, the first unless a timing says otherwise.

    tile: (BM, BN, BK) of "rows", (BN, BK, BR) of "weights". by: "pointers" or "TMA" fetch the
    operands of the two Triton kernels; "Gluon" is the third (12 warps: three of them only complete
    the loader's group). The tests compile all of them for sm_80 to sm_120 and find nothing spilt.
    """
    if itemsize == 4:
        return [((32, 32, 32), 4, 2, "pointers"), ((64, 64, 16), 4, 2, "pointers")]
    tma, large = capability[0] in (9, 10), capability == (8, 0)  # all others: 99 KB to share
    may = [((128, 256, 64), 12, 3, "Gluon")] if HAS_GLUON and capability == (9, 0) else []
    if which == "weights":  # row numbers are fetched before the rows: two more stages
        narrow = (128, 128, 32), 4, 6, "pointers"
        if tma:
            tiles = ((128, 256, 64), 8, 3), ((128, 128, 64), 4, 3), ((128, 128, 64), 8, 3)
            return [*may, *((*tile, "TMA") for tile in tiles), narrow]
        if large:
            return [((128, 128, 64), 8, 5, "pointers"), narrow]
        return [((128, 128, 32), 8, 5, "pointers"), ((64, 64, 32), 4, 5, "pointers")]
    if tma:
        tiles = ((128, 256, 64), 8, 3), ((128, 128, 64), 8, 4), ((64, 128, 64), 4, 4)
        may += [(*tile, "TMA") for tile in tiles]
        return may + [(*tile, "pointers") for tile in tiles[1:]]
    if large:
        return [((128, 128, 64), 8, 3, "pointers"), ((128, 128, 32), 8, 4, "pointers")]
    return [((128, 128, 32), 8, 3, "pointers"), ((64, 64, 32), 4, 4, "pointers")]


def grouped_launches(which: str, operands: tuple, out_dtype, ends: Tensor, turned=False) -> list:
    """Functions that compute the product, one a configuration; operands with their source or None.

    "rows": x (M, K), weight (E, N, K), or turned (E, K, N) -> (M, N). "weights": grad (M, N), x
    (M, K) -> (E, N, K). source: (M,) int, the row of x that stands for each row.
    """
    x, other, source = operands
    # Triton's interpreter has TMA, and no Gluon
    place, sms = gpu(x.device) if x.is_cuda else ((10, 0), 132)
    E, M = len(ends), len(x) if source is None else len(source)
    if which == "weights":
        (M, N), K, shape = x.shape, other.shape[1], (E, x.shape[1], other.shape[1])
    else:
        K, N, shape = x.shape[1], other.shape[-1 if turned else 1], None
    # descriptors want rows of whole 16 bytes; a step past K would meet the next expert's weights
    aligned = K % 64 == N % 8 == x.data_ptr() % 16 == other.data_ptr() % 16 == 0
    may = grouped_configs(which, x.element_size(), place)
    if which == "weights" and N % 64:  # Gluon stores 64 rows at a time
        may = [config for config in may if config[-1] != "Gluon"]

    def launch(tile: tuple[int, int, int], warps: int, stages: int, by: str) -> Tensor:
        out = torch.empty(shape or (M, N), dtype=out_dtype, device=x.device)
        if not out.numel() or not M:
            return out.zero_()
        a, b, rows = x, other, source
        if source is not None and (by == "Gluon" or (which, by) == ("weights", "TMA")):
            rows = None  # TMA takes whole boxes: of a copy, where rows lie apart
            if which == "weights":
                b = b.index_select(0, source)
            else:
                a = a.index_select(0, source)
        options = {"num_warps": warps, "num_stages": stages}
        with torch.cuda.device_of(x):  # Triton launches on the current GPU, whatever x says
            if by == "Gluon":
                launch_hopper(which, a, b, out, ends, turned, stages, sms)
            elif which == "weights":
                (BN, BK, BR), boxes = tile, (None, None)
                if by == "TMA":
                    make = TensorDescriptor.from_tensor
                    boxes = make(a, [BR, BN]), make(b, [BR, BK])
                grid = triton.cdiv(N, BN) * triton.cdiv(K, BK), E
                grouped_weights_kernel[grid](
                    a, b, out, ends, rows, *boxes, N, K, by == "TMA", *tile, **options
                )
            else:
                BM, BN, BK = tile
                programs = (M // BM + E) * triton.cdiv(N, BN)  # at most
                if by == "TMA":
                    box = [BK, BN] if turned else [BN, BK]
                    b = TensorDescriptor.from_tensor(b.flatten(0, 1), box)
                    a = a if source is not None else TensorDescriptor.from_tensor(a, [BM, BK])
                    if x.is_cuda:
                        each = 2 if BM * BN <= 128 * 64 else 1
                        programs = min(programs, each * sms)
                grouped_rows_kernel[(programs,)](
                    a, b, out, ends, rows, N, K, E, EXPERTS=triton.next_power_of_2(E),
                    TURNED=turned, TMA=by == "TMA", BM=BM, BN=BN, BK=BK, GROUP=8, **options,
                )  # fmt: skip
        return out

    return [partial(launch, *config) for config in may if aligned or config[-1] == "pointers"]


def launch_hopper(
    which: str, a: Tensor, b: Tensor, out: Tensor, ends: Tensor, turned: bool, stages: int, sms: int
) -> None:
    """`grouped_hopper_kernel` writes out, (M, N) or (E, N, K); operands as above, no source."""
    weights, swizzled = which == "weights", gl.NVMMASharedLayout(128, 16, 2)
    a_box, b_box, out_box = (
        GluonDescriptor.from_tensor(t.flatten(0, -2), box, swizzled) if t.itemsize == 2 else None
        for t, box in (
            (a, [64, 64]), (b, [64, 256] if weights or turned else [256, 64]), (out, [64, 256])
        )
    )  # fmt: skip
    height, K, N = a.shape[1] if weights else 0, a.shape[1], out.shape[-1]
    tiles_m = len(ends) * triton.cdiv(height, 128) if weights else len(a) // 128 + len(ends)
    stages += out_box is None  # no buffers to store from: room for one more
    grouped_hopper_kernel[(min(sms, tiles_m * triton.cdiv(N, 256)),)](
        a_box, b_box, out, out_box, ends, height, N, K, len(ends), WEIGHTS=weights, TURNED=turned,
        STAGES=stages, num_warps=4,
    )  # fmt: skip


@lru_cache
def fastest_of() -> dict[tuple, int]:
    """Which of `grouped_launches` won, for each kind of product that this process has timed."""
    return {}


def grouped_product(which: str, operands: tuple, out_dtype, ends: Tensor, turned=False) -> Tensor:
    """The fastest of `grouped_launches`, which the first product of its kind times; while a CUDA
    graph is recorded, the first."""
    launches = grouped_launches(which, operands, out_dtype, ends, turned)
    x, other, source = operands
    size = (len(x) if source is None else len(source)).bit_length()
    shapes = size, x.shape[1:], other.shape[1:]
    key = which, turned, len(launches), x.device, x.dtype, out_dtype, shapes, source is None
    best, may_time = fastest_of(), x.is_cuda and not torch.cuda.is_current_stream_capturing()
    if key not in best and len(launches) > 1 and may_time:
        want = launches[-1]()  # the plainest says what is right
        ms = [milliseconds(launch, want) for launch in launches]
        if min(ms) == math.inf:  # NaN: nothing is said about any
            return want
        best[key] = ms.index(min(ms))
    return launches[best.get(key, 0)]()


def milliseconds(run: Callable[[], Tensor], want: Tensor) -> float:
    """inf if it does not compile or gives another product: what was never seen on this GPU has to
    earn its place."""
    with torch.cuda.device_of(want):  # do_bench listens to the current GPU alone
        try:
            error = (run().float() - want.float()).norm()
        except (RuntimeError, triton.errors.TritonError):
            return math.inf
        right = error <= 1e-3 * want.float().norm()
        if not right:
            return math.inf
        return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")


def combine(rows: Tensor, rows_of_token: Tensor) -> Tensor:
    """The sum of the rows of each token: (P, D), (N, K) int -> (N, D)."""
    if not has_kernels(rows):
        return F.embedding_bag(rows_of_token, rows, mode="sum")
    (N, K), D = rows_of_token.shape, rows.shape[1]
    out = rows.new_empty(N, D)
    if out.numel():
        with torch.cuda.device_of(rows):
            combine_kernel[N, triton.cdiv(D, 1024)](
                rows.contiguous(), rows_of_token.contiguous(), out, D, K, BLOCK=1024
            )
    return out


class _Dispatch(torch.autograd.Function):
    """x: (N, D) -> rows (P, D) by expert. Backward combines: autograd's would add row by row."""

    @staticmethod
    def forward(ctx, x, token_of_row, rows_of_token):
        ctx.save_for_backward(rows_of_token)
        return x.index_select(0, token_of_row)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        (rows_of_token,) = ctx.saved_tensors
        return combine(grad, rows_of_token), None, None


class _Combine(torch.autograd.Function):
    """rows (P, D) -> y: (N, D), each token the sum of its K rows. Backward dispatches."""

    @staticmethod
    def forward(ctx, rows, token_of_row, rows_of_token):
        ctx.save_for_backward(token_of_row)
        return combine(rows, rows_of_token)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        (token_of_row,) = ctx.saved_tensors
        return grad.index_select(0, token_of_row), None, None


class _GroupedKernels(torch.autograd.Function):
    """`grouped_gemm` by kernels, with the gather of its rows: forward copies none of x."""

    @staticmethod
    def forward(ctx, x, weight, ends, token_of_row, rows_of_token):
        w = weight.to(x.dtype)
        ctx.save_for_backward(x, w, ends, token_of_row, rows_of_token)
        ctx.dtype = weight.dtype
        return grouped_product("rows", (x, w, token_of_row), x.dtype, ends)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        x, w, ends, token_of_row, rows_of_token = ctx.saved_tensors
        grad = grad.contiguous()
        dx = grouped_product("rows", (grad, w, None), x.dtype, ends, turned=True)
        if rows_of_token is not None:
            dx = combine(dx, rows_of_token)
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None, None
        dw = grouped_product("weights", (grad, x, token_of_row), ctx.dtype, ends)
        return dx, dw, None, None, None


class _WeightedSwiGLU(torch.autograd.Function):
    """`weighted_swiglu` by kernels: each direction reads and writes every number once."""

    @staticmethod
    def forward(ctx, gate_up, weights):
        P, I = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(P, I)
        ctx.save_for_backward(gate_up, weights)
        if out.numel():
            with torch.cuda.device_of(out):
                swiglu_kernel[(P,)](gate_up, weights, out, I, BLOCK=triton.next_power_of_2(I))
        return out

    @staticmethod
    @first_order
    def backward(ctx, grad):
        gate_up, weights = ctx.saved_tensors
        P, I = grad.shape
        d_gate_up, d_weights = torch.empty_like(gate_up), torch.empty_like(weights)
        if grad.numel():
            with torch.cuda.device_of(grad):
                swiglu_backward_kernel[(P,)](
                    grad.contiguous(), gate_up, weights, d_gate_up, d_weights, I,
                    BLOCK=triton.next_power_of_2(I),
                )  # fmt: skip
        return d_gate_up, d_weights


def weighted_swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    """silu(gate) · up, each row times its weight: (P, 2I), the gate's half first, (P,) -> (P, I).

    w·(W h) = W (w·h): so an expert's weight meets the narrow side of its second matrix.
    """
    if has_kernels(gate_up) and gate_up.shape[1] <= 2**15:  # a row at a time is in registers
        return _WeightedSwiGLU.apply(gate_up.contiguous(), weights.contiguous())
    gate, up = gate_up.chunk(2, -1)  # (P, I) each
    return F.silu(gate) * up * weights[:, None]


def has_kernels(x: Tensor) -> bool:
    """On a GPU with Triton, and in a dtype that the kernels take."""
    wide = x.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return x.is_cuda and triton is not None and wide


FEW = 2, 512, 2  # rows of weights that a program holds, columns at a time, warps


def are_few(x: Tensor, most: int) -> bool:
    """Rows of a model that decodes on a GPU: to multiply them is to read the weights.

    most: 2 where each is a row of one matrix (a token and its draft), 8 where each has experts of
    its own (--bench times 1, 2 and 8).
    """
    return has_kernels(x) and 0 < len(x) <= most and not torch.is_grad_enabled()


def few_products(x: Tensor, weight: Tensor, chosen: Tensor | None = None) -> Tensor:
    """`few_rows_kernel`: x (n, I), weight (O, I) -> (n, O); chosen: (N, K) experts, for each token
    the sum over its K rows of x (N·K, I), weight (E, O, I) -> (N, O)."""
    top, (O, I) = 1 if chosen is None else chosen.shape[1], weight.shape[-2:]
    out, pair = x.new_empty(len(x) // top, O), chosen is None and len(x) == 2
    BO, BI, warps = FEW
    with torch.cuda.device_of(x):
        few_rows_kernel[triton.cdiv(O, BO), 1 if pair else len(out)](
            x.contiguous(), weight.contiguous(), out, chosen, O, I, TOP=top, PAIR=pair, BO=BO,
            BI=BI, num_warps=warps,
        )  # fmt: skip
    return out


# same as 01_attention.py
def in_autocast_dtype(x: Tensor) -> Tensor:
    """Where autocast is on, in its dtype, as nn.Linear would take it: float64 stays."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def grouped_gemm(x: Tensor, weight: Tensor, sizes: Tensor, routes=(None, None)) -> Tensor:
    """Each expert's rows times its own matrix, transposed: y = x W_eᵀ, in the dtype of x.

    x: (M, A) rows sorted by expert, weight: (E, B, A), sizes: (E,) int rows of each -> (M, B).
    routes: token_of_row (M,), rows_of_token (N, K), and x is (N, A): row r is x[token_of_row[r]];
    one without the other raises ValueError.
    Under autocast it takes autocast's dtype, as nn.Linear does. Shapes that do not fit raise
    ValueError. On a GPU by kernels without atomic sums: the same bits at every call, by the tiles
    that the first of its kind chose. That sizes sum to M is not checked there, it would have to
    wait. On a Hopper a NaN in an expert's rows can reach the gradient of the expert before it.
    """
    x = in_autocast_dtype(x)
    counts = None if has_kernels(x) else sizes.tolist()  # else it would be waited for
    M = len(x if routes[0] is None else routes[0])
    if (routes[0] is None) != (routes[1] is None):
        raise ValueError("want routes (token_of_row, rows_of_token), got one without the other")
    fits = x.dim() == 2 and weight.dim() == 3 and x.shape[-1] == weight.shape[-1]
    fits = fits and sizes.shape == weight.shape[:1]
    if not fits or counts is not None and (sum(counts) != M or min(counts, default=0) < 0):
        got = f"{tuple(x.shape)}, {tuple(weight.shape)}, {tuple(sizes.shape)}"
        got += "" if counts is None else f" summing to {sum(counts)}"
        raise ValueError(f"want (M, A), (E, B, A), (E,) summing to M; got {got}")
    if counts is None:
        ends = sizes.cumsum(0).to(torch.int32)
        return _GroupedKernels.apply(x.contiguous(), weight.contiguous(), ends, *routes)
    rows = x if routes[0] is None else _Dispatch.apply(x, *routes)
    return _GroupedGemm.apply(rows, weight, counts)


class _ExpertsInBlocks(torch.autograd.Function):
    """Some experts at a time, all the way from x to y, in memory that the next ones use again.

    All at once, each step between would take fresh memory (50 MB for 4096 tokens of width 512 and 6
    experts each, in fp32), which has to be paged in. rows P are those of all blocks together.
    """

    @staticmethod
    def blocks(sizes: list[int], rows: int = 2048):
        """Slices of experts, and of the rows they have: at least so many, but in the last."""
        first = start = stop = 0
        for last, size in enumerate(sizes, 1):
            stop += size
            if stop - start >= rows or last == len(sizes):
                yield slice(first, last), slice(start, stop)
                first, start = last, stop

    @staticmethod
    def forward(ctx, x, row_weights, gate_up_proj, down_proj, token_of_row, sizes):
        wide = torch.promote_types(x.dtype, torch.float32)  # a sum of K in bf16 would round K times
        y, saved = torch.zeros_like(x, dtype=wide), []
        for e, r in _ExpertsInBlocks.blocks(sizes):
            token = token_of_row[r]
            gate_up = _products(x.index_select(0, token), gate_up_proj[e], sizes[e])  # (rows, 2I)
            gate, up = gate_up.chunk(2, -1)  # (rows, I) each
            hidden = F.silu(gate).mul_(up).mul_(row_weights[r, None])
            y.index_add_(0, token, _products(hidden, down_proj[e], sizes[e]).to(wide))
            saved.append(gate_up)
        tensors = x, row_weights, gate_up_proj, down_proj, token_of_row
        ctx.save_for_backward(*tensors, *saved)
        ctx.sizes = sizes
        return y.to(x.dtype).detach()  # y itself, torch 2.11 would compile to a gradient of 0

    @staticmethod
    @first_order
    def backward(ctx, grad):
        x, row_weights, gate_up_proj, down_proj, token_of_row, *saved = ctx.saved_tensors
        dx = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        wanted = (True, *ctx.needs_input_grad[2:4])  # of the stacks: not where they are frozen
        d_weights, d_gate_up_proj, d_down_proj = (
            torch.empty_like(t) if want else None
            for t, want in zip((row_weights, gate_up_proj, down_proj), wanted, strict=True)
        )
        part = lambda stack, e: None if stack is None else stack[e]
        blocks = _ExpertsInBlocks.blocks(ctx.sizes)
        for (e, r), gate_up in zip(blocks, saved, strict=True):
            token, sizes, w = token_of_row[r], ctx.sizes[e], row_weights[r, None]
            gate, up = gate_up.chunk(2, -1)
            silu = F.silu(gate)
            product = silu * up  # (rows, I)
            d_hidden = _products_backward(
                grad.index_select(0, token), product * w, down_proj[e], sizes,
                part(d_down_proj, e),
            )  # fmt: skip
            d_weights[r] = (d_hidden * product).sum(-1)  # (rows,)
            d_product = d_hidden.mul_(w)
            d_gate = torch.ops.aten.silu_backward(d_product * up, gate)
            d_gate_up = torch.cat((d_gate, silu.mul_(d_product)), -1)  # (rows, 2I)
            rows = x.index_select(0, token)
            d_rows = _products_backward(
                d_gate_up, rows, gate_up_proj[e], sizes, part(d_gate_up_proj, e)
            )
            dx.index_add_(0, token, d_rows.to(dx.dtype))
        return dx.to(x.dtype), d_weights, d_gate_up_proj, d_down_proj, None, None


def filled_up(load: Tensor, pairs: int) -> Tensor:
    """load: (E,) rows of the experts, `pairs` together -> the same in units of 16 or of 64.

    oneDNN compiles a bf16 product for each new number of rows, and these change every step; rounded
    up, they repeat. The coarser unit is for experts with so many rows that it adds few.
    """
    unit = 64 if pairs >= 256 * len(load) else 16
    return (load + unit - 1) // unit * unit


class Experts(nn.Module):
    """E SwiGLUs in two stacks: gate_up_proj (E, 2I, D), the gate's rows first; down_proj (E, D, I).

    Every token reaches all of its experts: an expert's rows are as many as chose it.
    grouped_gemm=None: the module's own, on a CPU some experts at a time.
    """

    def __init__(self, experts: int, hidden_size: int, width: int, grouped_gemm=None):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, width))
        nn.init.normal_(self.gate_up_proj, std=hidden_size**-0.5)
        nn.init.normal_(self.down_proj, std=width**-0.5)
        self.grouped_gemm = grouped_gemm

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor, load: Tensor) -> Tensor:
        """x: (N, D), chosen (N, K), their weights (N, K), load (E,) -> Σₖ wₖ·FFNₖ(x): (N, D)."""
        kind, x = x.device.type, in_autocast_dtype(x)  # before each row is copied K times
        (N, K), own = indices.shape, kind == "cpu" and self.grouped_gemm is None
        if own and 0 < N * K <= 2 * len(load) and not torch.is_grad_enabled():  # two an expert
            if torch.compiler.is_compiling():
                return self.of_few_compiled(x, indices, weights)
            if N * K < len(load):
                return self.of_few(x, indices, weights, load)
        if self.grouped_gemm is None and are_few(x, 8):
            return self.of_few_on_gpu(x, indices, weights)
        keys = torch.uint8 if kind == "cuda" and len(load) <= 256 else torch.int32
        by_expert = indices.flatten().to(keys)  # shorter keys are sorted faster
        order = by_expert.argsort(stable=True)  # the (token, k) pairs by expert: N·K
        token_of_row, row = order // K, torch.arange(N * K, device=x.device)
        sizes, P = load, N * K
        if kind == "cpu" and x.dtype == torch.bfloat16 and N * K > 16 * len(load):
            sizes = filled_up(load, N * K)
            P = int(sizes.sum())
            # before an expert's own rows come those that fill up: token 0 again, with weight 0
            row = row + (sizes - load).cumsum(0).repeat_interleave(load)
            token_of_row = order.new_zeros(P).scatter(0, row, token_of_row)
        row_of_pair = torch.empty_like(order).scatter(0, order, row)
        row_weights = weights.new_zeros(P).scatter(0, row_of_pair, weights.flatten()).to(x.dtype)
        if own:
            stacks = self.gate_up_proj, self.down_proj
            return _ExpertsInBlocks.apply(x, row_weights, *stacks, token_of_row, sizes.tolist())
        product, routes = self.grouped_gemm or grouped_gemm, (token_of_row, row_of_pair.view(N, K))
        if product is grouped_gemm:
            gate_up = grouped_gemm(x, self.gate_up_proj, sizes, routes)  # (P, 2I)
        else:
            gate_up = product(_Dispatch.apply(x, *routes), self.gate_up_proj, sizes)
        hidden = weighted_swiglu(gate_up, row_weights)  # (P, I); what combines is a plain sum
        return _Combine.apply(product(hidden, self.down_proj, sizes), *routes)

    def of_few(self, x: Tensor, indices: Tensor, weights: Tensor, load: Tensor) -> Tensor:
        """The same for a few tokens being decoded: an expert that has none is not asked, and one
        that has several is read from memory once."""
        (N, K), order = indices.shape, indices.flatten().argsort(stable=True)
        sizes = {e: n for e, n in enumerate(load.tolist()) if n}
        rows = x[order // K]  # (N·K, D), by expert
        out, parts = torch.empty_like(rows), list(sizes.values())
        for e, mine, result in zip(sizes, rows.split(parts), out.split(parts), strict=True):
            gate, up = few_rows(mine, self.gate_up_proj[e].to(x.dtype)).chunk(2, -1)
            result.copy_(few_rows(F.silu(gate) * up, self.down_proj[e].to(x.dtype)))
        by_token = torch.empty_like(out).index_copy_(0, order, out).view(N, K, -1)
        return (weights.to(x.dtype)[:, None] @ by_token)[:, 0]  # (N, 1, K) @ (N, K, D) -> (N, D)

    def of_few_on_gpu(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The same by two kernels that read the chosen experts where they lie, none sorted."""
        (N, K), (_, D, I) = indices.shape, self.down_proj.shape
        hidden, chosen, (BO, BI, warps) = x.new_empty(N * K, I), indices.contiguous(), FEW
        with torch.cuda.device_of(x):
            few_gate_up_kernel[triton.cdiv(I, BO), N * K](
                x.contiguous(), self.gate_up_proj.contiguous(), hidden, chosen,
                weights.contiguous(), I, D, TOP=K, BO=BO, BI=BI, num_warps=warps,
            )  # fmt: skip
        return few_products(hidden, self.down_proj, chosen)

    def of_few_compiled(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The same for torch.compile: two loops that read the chosen experts where they lie, so
        that nothing waits for the choice. One that several tokens chose is read for each."""
        (N, K), chosen = indices.shape, indices.flatten()
        rows = x.repeat_interleave(K, 0)[:, None]  # (N·K, 1, D)
        gate, up = (self.gate_up_proj[chosen] * rows).sum(-1).chunk(2, -1)  # (N·K, I) each
        hidden = F.silu(gate) * up * weights.view(-1, 1)  # (N·K, I)
        out = (self.down_proj[chosen] * hidden[:, None]).sum(-1)  # (N·K, D)
        return out.view(N, K, -1).sum(1).to(x.dtype)


class MoE(nn.Module):
    """Shared experts + K of E routed ones (V3 eq. 12, without the residual): (B, T, D) -> the same.

    Every forward leaves `load`, (E,) int64, the tokens each expert got. A training forward leaves
    `balance_loss`, eq. 17 without its α, for the trainer to add; in eval it is None. Both are
    overwritten, never added to, so a forward that is recomputed counts nothing twice. (Checkpoint
    with use_reentrant=False: the other kind runs the first forward without gradients, and the
    balance loss it leaves has none.)
    linear, grouped_gemm: stand-ins with the signatures of nn.Linear and of `grouped_gemm`.
    router: what `Router` takes beyond the sizes.
    """

    def __init__(
        self, hidden_size: int, moe_intermediate_size: int, n_routed_experts: int,
        num_experts_per_tok: int, n_shared_experts: int = 1, linear=nn.Linear, grouped_gemm=None,
        **router,
    ):  # fmt: skip
        super().__init__()
        D, I, E = hidden_size, moe_intermediate_size, n_routed_experts
        self.gate = Router(D, E, num_experts_per_tok, **router)
        self.experts = Experts(E, D, I, grouped_gemm)
        shared = n_shared_experts * I  # several shared experts are one wider SwiGLU
        self.shared_experts = SwiGLU(D, shared, linear) if shared else None
        self.load: Tensor | None = None
        self.balance_loss: Tensor | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"balance_loss": None}  # a copy.deepcopy can't take a graph along

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # (N, D), N = B·T
        indices, weights, scores = self.gate(tokens)  # (N, K), (N, K), (N, E)
        chosen = indices.flatten()  # (N·K,)
        load = chosen.new_zeros(self.gate.n_routed_experts)
        self.load = load.scatter_add_(0, chosen, torch.ones_like(chosen))
        self.balance_loss = None
        if self.training:
            by_sequence = (t.unflatten(0, x.shape[:-1]) for t in (scores, indices))  # (B, T, ·)
            self.balance_loss = sequence_balance_loss(*by_sequence)
        y = self.experts(tokens, indices, weights, self.load).view(x.shape)
        return y if self.shared_experts is None else y + self.shared_experts(x)


def sequence_balance_loss(scores: Tensor, indices: Tensor) -> Tensor:
    """Σᵢ fᵢ·Pᵢ of each sequence, averaged over the batch (V3 eq. 17-20 without α); 1 when even.

    scores: (..., T, E), not yet normalised, indices: (..., T, K) -> (). f has no gradient. It
    counts the experts that were chosen, by bias and groups too, as most code does; eq. 18 prints
    the top K of the bare scores.
    """
    if not scores.numel():
        return scores.sum()  # of nothing: 0, where a mean would be NaN
    E, chosen = scores.shape[-1], indices.flatten(-2)  # (..., T·K)
    counts = scores.new_zeros(*scores.shape[:-2], E)
    counts.scatter_add_(-1, chosen, scores.new_ones(chosen.shape))
    f = counts * E / chosen.shape[-1]  # (..., E): eq. 18, E / (K·T) · count
    P = (scores / scores.sum(-1, keepdim=True)).mean(-2)  # (..., E): eq. 19 and 20
    return (f * P).sum(-1).mean()


def max_violation(load: Tensor) -> Tensor:
    """(max − mean) / mean over the last axis (arXiv:2408.15664, eq. 4): 0 is even.

    load: (..., E) tokens of each expert -> (...) fp32. E/K − 1 if all tokens choose the same K, NaN
    if there are none.
    """
    mean = load.float().mean(-1)
    return (load.amax(-1).float() - mean) / mean


# <<< copy
# %% 3. Is it right? -------------------------------------------------------------------------


def check(name: str, got: Tensor, want: Tensor, tol: float) -> None:
    """Print the worst absolute error beside its tolerance; stop the chapter if it is over."""
    if got.shape != want.shape:  # broadcasting would hide the difference
        raise SystemExit(
            f"check    {name}: got {tuple(got.shape)}, want {tuple(want.shape)}   WRONG"
        )
    error = (got.cpu().double() - want.cpu().double()).abs().max().item()
    ok = error <= tol  # False for NaN too
    print(f"check    {name:<44} error {error:.1e}   tol {tol:.0e}   {'ok' if ok else 'WRONG'}")
    if not ok:
        raise SystemExit(1)


def measure(name: str, value: float, text: str = "") -> None:
    """Print one measured number: identifier, value, free text (unit, rival, paper's value)."""
    print(f"measure  {name:<44} {value:.5g} {text}".rstrip())


EXACT = 1e-12  # float64: sums of about 100 terms of size 1, each off by 1e-16
V3 = dict(n_group=4, topk_group=2, routed_scaling_factor=2.5)
V2 = dict(
    n_group=4, topk_group=2, routed_scaling_factor=16.0, norm_topk_prob=False,
    scoring_func="softmax", topk_method="group_limited_greedy",
)  # fmt: skip


def layer(device: torch.device, dtype=torch.float64, **router) -> "MoE":
    """The layer of the table, its biases so negative that a mask of 0 would show."""
    moe = MoE(32, 24, 16, 4, **router).to(device, dtype)
    if moe.gate.e_score_correction_bias is not None:
        moe.gate.e_score_correction_bias.copy_(0.1 * torch.randn(16) - 0.6)
    return moe


def gradients(loss: Tensor, moe: "MoE", x: Tensor) -> Tensor:
    """Of x and of every parameter, in one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [x, *moe.parameters()])])


def verify_layer(device: torch.device) -> None:
    """Output, loss and every gradient against the loops, for V3's router and for V2's."""
    x = torch.randn(2, 12, 32, dtype=torch.float64).to(device).requires_grad_()
    upstream = torch.randn_like(x)
    for name, options in ("V3", V3), ("V2", V2):
        moe = layer(device, **options)
        got, (want, loss) = moe(x), moe_reference(moe, x)
        check(f"{name} layer = loops over tokens and experts", got, want, EXACT)
        check(f"{name} Σ fᵢPᵢ = loops", moe.balance_loss, loss, EXACT)
        # 7 is an α that no gradient can hide behind
        got_gradients = gradients((got * upstream).sum() + 7 * moe.balance_loss, moe, x)
        want_gradients = gradients((want * upstream).sum() + 7 * loss, moe, x)
        check(f"{name} every gradient = the loops'", got_gradients, want_gradients, 1e-10)
    x = torch.randn(2, 1024, 32, dtype=torch.float64).to(device).requires_grad_()
    want = moe(x)  # on a CPU in a few blocks of experts
    want_gradients = gradients(want.square().sum(), moe, x)
    moe.experts.grouped_gemm = grouped_gemm
    got = moe(x)
    check("some experts at a time = all at once", got, want, EXACT)
    # sums over 2048 tokens of outputs as large as V2's factor of 16 makes them
    check("and every gradient", gradients(got.square().sum(), moe, x), want_gradients, 1e-8)


def verify_kernels(device: torch.device) -> None:
    """The layer by kernels, fp32, beside the same in float64: output and gradients."""
    moe, x = MoE(96, 40, 16, 4), torch.randn(2, 50, 96)
    runs = []
    for dtype in torch.float32, torch.float64:
        moe, x_in = moe.to(device, dtype), x.to(device, dtype).requires_grad_()
        out = moe(x_in)
        upstream = torch.ones_like(out)
        runs.append((out, *torch.autograd.grad(out, (x_in, *moe.experts.parameters()), upstream)))
    names = "output", "dx", "d_gate_up", "d_down"
    for name, got, want in zip(names, *runs, strict=True):
        check(f"grouped kernels: {name}, fp32", got, want, 1e-4)  # sums of up to 100 terms


def verify_router(device: torch.device) -> None:
    """What the bias may change, and what it may not."""
    x = torch.randn(1024, 32, dtype=torch.float64).to(device)
    gate = layer(device, **V3).gate
    indices, weights, scores = gate(x)
    want = torch.full_like(weights[:, 0], 2.5)
    check("Σ weights = routed_scaling_factor", weights.sum(-1), want, EXACT)
    of_chosen = scores.gather(1, indices)
    want = 2.5 * of_chosen / of_chosen.sum(-1, keepdim=True)
    check("weights = the chosen's scores, without bias", weights, want, EXACT)

    def experts_of(indices: Tensor | list) -> Tensor:
        return torch.zeros(1024, 16).scatter(1, torch.as_tensor(indices).cpu(), 1.0)

    got, want = experts_of(indices), experts_of([choose_reference(s, gate) for s in scores])
    check("experts of 1024 tokens = loops", got, want, 0)
    masked = experts_of([choose_reference(s, gate, dropped=0.0) for s in scores])
    share = 100 * (masked != want).any(-1).double().mean().item()
    measure("tokens_misrouted_by_a_mask_of_0", share, "% if dropped groups counted 0, not −inf")
    gate.e_score_correction_bias.zero_()
    share = 100 * (experts_of(gate(x)[0]) != want).any(-1).double().mean().item()
    measure("tokens_that_the_bias_moves", share, "% choose otherwise without it")


@torch.no_grad()
def verify_balance(device: torch.device) -> None:
    """Limit cases of the loss, of dispatch and of MaxVio; then the bias in a closed loop."""
    one = torch.ones((), dtype=torch.float64, device=device)
    even = torch.arange(32, device=device).view(1, 8, 4) % 16
    got = sequence_balance_loss(one.expand(1, 8, 16), even)
    check("Σ fᵢPᵢ = 1 for even scores and load", got, one, EXACT)
    moe, x = layer(device), torch.randn(2, 12, 32, dtype=torch.float64).to(device)
    order = torch.randperm(12, device=device)
    check("tokens in another order: the same outputs", moe(x[:, order]), moe(x)[:, order], EXACT)
    moe.gate.e_score_correction_bias[:4] += 10
    check("all tokens on 4 experts: none is dropped", moe(x), moe_reference(moe, x)[0], EXACT)
    check("and MaxVio is E/K − 1", max_violation(moe.load), 3 * one, 0)
    gate = Router(32, 16, 4).to(device)
    x = torch.randn(4096, 32).to(device) + 2 * torch.randn(32).to(device)  # all somewhat alike

    def load() -> Tensor:
        return gate(x)[0].flatten().bincount(minlength=16)

    before = max_violation(load()).item()
    for _ in range(400):
        gate.update_bias(load(), gamma=0.002)
    measure("max_violation_of_an_untrained_router", before)
    # a step of γ moves up to a tenth of an expert's 1024 tokens to and fro
    check("after 400 bias updates MaxVio is below 0.2", max_violation(load()), 0 * one, 0.2)


@torch.no_grad()
def verify_sizes(device: torch.device) -> None:
    """Narrow products, and V3's own layer without its memory."""
    moe = layer(device, torch.float32, **V3)
    x = torch.randn(4, 128, 32).to(device)
    want = moe(x)
    with torch.autocast(device.type, torch.bfloat16):
        got = moe(x)
    scale = want.std()  # a dozen roundings of 2^-9, on values of up to 8 σ
    check("bf16 autocast = fp32, in standard deviations", got / scale, want / scale, 0.2)
    with torch.device("meta"):
        moe = MoE(7168, 2048, 256, 8)
    stored = sum(t.numel() for t in moe.state_dict().values())
    used = stored - (256 - 8) * sum(p[0].numel() for p in moe.experts.parameters())
    want = torch.tensor([11_320_164_608, 398_196_992])
    check("V3's parameters: stored and used, one layer", torch.tensor([stored, used]), want, 0)


# %% 4. What does it buy? --------------------------------------------------------------------
# Tokens of 64 kinds, each kind with a linear map of its own to learn, the k-th kind 1/k as frequent
# (Zipf), and all of them sharing one large component, as the hidden states of a language model do.
# That component decides whom an untrained router likes: the same experts for every token.
#
# Seeds 0 to 4 on a CPU: without balancing MaxVio ends between 3.7 and 7.0, with α = 0.01 between
# 0.9 and 2.7, with α = 0.1 between 0.06 and 0.66, with the bias between 0.04 and 0.09. None at all
# costs 8 to 57 % more loss than the bias. But the bias's loss lies from 5 % under to 21 % over that
# of α = 0.1: in so small a world the bias saves the search for α and nothing more. At 1B parameters
# [2] found a perplexity of 9.50 with the bias, 9.56 with α = 0.001.


def skewed_data(seed: int, kinds: int = 64, D: int = 32) -> Callable:
    """draw(n) -> x: (n, D) and what to make of it, y: (n, D), scaled to variance 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    frequency = 1 / torch.arange(1, kinds + 1)
    centre, maps = normal(kinds, D) + 2 * normal(D), normal(kinds, D, D)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        kind = torch.multinomial(frequency, n, replacement=True, generator=generator)
        x = centre[kind] + normal(n, D) / 2
        return x, torch.einsum("NCD,ND->NC", maps[kind], x)

    spread = draw(8192)[1].std()
    maps /= spread
    return draw


def train(
    device: torch.device, seed: int, alpha: float, gamma: float, steps: int = 600
) -> tuple[list[float], list[float], Tensor, float]:
    """16 experts, top 2, 512 tokens a step -> MaxVio, loss of every step; held-out load, loss.

    The learning rate and γ fall to 0 over the last 30 % of the steps (V3's γ: 0 at the end).
    """
    draw = skewed_data(seed)
    heldout = [t.to(device) for t in draw(8192)]
    torch.manual_seed(seed)
    moe = MoE(32, 32, 16, 2, n_shared_experts=0).to(device)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=2e-3, weight_decay=0)
    violations, losses = [], []
    for step in range(steps):
        x, y = (t.to(device) for t in draw(512))
        loss = F.mse_loss(moe(x), y)
        (loss + alpha * moe.balance_loss).backward()
        left = min(1.0, (1 - step / steps) / 0.3)
        optimizer.param_groups[0]["lr"] = 2e-3 * left
        optimizer.step()
        optimizer.zero_grad()
        moe.gate.update_bias(moe.load, gamma * left)
        violations.append(max_violation(moe.load).item())
        losses.append(loss.item())
    with torch.no_grad():
        loss = F.mse_loss(moe.eval()(heldout[0]), heldout[1]).item()
    return violations, losses, moe.load, loss


def experiment(device: torch.device, seed: int, out: Path) -> None:
    """Three ways to balance and none; MaxVio on held-out tokens, as in [2] table 2 (1B model)."""
    paper = {"loss_1e1": "[2], α = 0.001: 0.72", "bias": "[2], γ = 0.001: 0.04"}
    runs = {}
    ways = {"none": (0, 0), "loss_1e2": (0.01, 0), "loss_1e1": (0.1, 0), "bias": (0, 0.01)}
    for name, (alpha, gamma) in ways.items():
        runs[name] = violations, _, load, loss = train(device, seed, alpha, gamma)
        idle = (load < load.double().mean() / 10).sum().item()
        text = f"α={alpha:g} γ={gamma:g}: {idle} of 16 nearly idle   {paper.get(name, '')}"
        measure(f"max_violation_{name}", max_violation(load).item(), text)
        measure(f"heldout_loss_{name}", loss, "squared error; 1 is the variance of y")
    draw_figure(runs, out)
    print(f"figure   {out}")


def draw_figure(runs: dict[str, tuple], out: Path) -> None:
    """MaxVio and loss over steps, one line a way to balance."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook hands down its own, which may be missing here
    from matplotlib import pyplot as plt

    labels = {
        "none": "no balancing",
        "loss_1e2": "auxiliary loss, α = 0.01",
        "loss_1e1": "auxiliary loss, α = 0.1",
        "bias": "bias, γ = 0.01",
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, (violations, losses, load, loss) in runs.items():
        left.plot(smooth(violations), label=f"{labels[name]}: {max_violation(load).item():.2f}")
        right.plot(smooth(losses), label=f"{labels[name]}: {loss:.3f}")
    lines = (7, "-", "E/K − 1: every token on the same two"), (0.72, "--", "[2], α = 0.001: 0.72")
    for value, style, text in (*lines, (0.04, "--", "[2], bias: 0.04")):
        left.axhline(value, color="gray", ls=style, lw=0.8)
        left.annotate(text, (600, value), va="bottom", ha="right", color="gray")
    left.set_yscale("log")
    ticks = [0.03, 0.1, 0.3, 1, 3, 10]
    left.set_yticks(ticks, [str(tick) for tick in ticks])
    left.set(xlabel="step of 512 tokens", ylabel="MaxVio of a batch (mean of 20 steps)")
    right.set(xlabel="step of 512 tokens", ylabel="loss, share of the variance (mean of 20 steps)")
    right.set_yscale("log")
    for axes in (left, right):
        axes.legend(title="held out, at the end")
    bias, none = (max_violation(runs[name][2]).item() for name in ("bias", "none"))
    figure.suptitle(f"On skewed data the bias brings MaxVio from {none:.1f} to {bias:.2f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def smooth(values: list[float], width: int = 20) -> list[float]:
    return [statistics.mean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


# %% 5. How fast? ----------------------------------------------------------------------------


def race(tasks: dict[str, Callable], device: torch.device, rounds: int = 9) -> dict[str, float]:
    """Median milliseconds of each task; every round runs them all, so drift hits all alike.

    On a GPU by its own clock, behind 8 GB of other writing: Python is then ahead of it with
    launching, as it is in the middle of a large model (unless a task waits for its numbers).
    """

    def by_clock(task: Callable) -> float:
        begin = time.perf_counter()
        task()
        return 1e3 * (time.perf_counter() - begin)

    def by_events(task: Callable) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        for _ in range(4):
            other.zero_()
        begin.record()
        task()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    cuda, times = device.type == "cuda", {name: [] for name in tasks}
    other = torch.empty(2**31 if cuda else 0, dtype=torch.uint8, device=device)
    for _ in range(rounds + 1):
        for name, task in tasks.items():
            times[name].append((by_events if cuda else by_clock)(task))
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # [0]: warm-up


def torch_grouped_mm(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """PyTorch's own grouped product in the seam of ours."""
    if torch.is_autocast_enabled(x.device.type):  # it does not look itself
        weight = weight.to(x.dtype)
    return F.grouped_mm(x, weight.mT, offs=sizes.cumsum(0).to(torch.int32))


def one_by_one(experts: "Experts", x: Tensor, indices: Tensor, weights: Tensor, load) -> Tensor:
    """What one writes first: for each expert find its tokens, compute, add."""
    y = torch.zeros_like(x)
    for i in range(len(load)):
        token, k = torch.where(indices == i)
        gate, up = F.linear(x[token], experts.gate_up_proj[i]).chunk(2, -1)
        out = F.linear(F.silu(gate) * up, experts.down_proj[i]) * weights[token, k, None]
        y = y.index_add(0, token, out.to(y.dtype))
    return y


def bench(device: torch.device) -> None:
    """Routed experts, forward and backward, beside what PyTorch offers for as many FLOPs."""
    N, D, I, E, K = 2048, 256, 128, 32, 4
    if device.type == "cuda":
        N, D, I, E, K = 8192, 2048, 1408, 64, 6
    experts, layer = Experts(E, D, I).to(device), MoE(D, I, E, K, 2, n_group=1, topk_group=1)
    dense, wide = SwiGLU(D, K * I).to(device), SwiGLU(D, (K + 2) * I).to(device)
    modules = experts, dense, layer.to(device), wide
    x, upstream = torch.randn(2, N, D, device=device)
    routes = []  # a new one each call: the loads of a real step are never those of the last
    for _ in range(16):
        scores = torch.rand(N, E, device=device) + torch.randn(E, device=device) / 10
        indices = scores.topk(K).indices
        load = indices.flatten().bincount(minlength=E)
        routes.append((indices, torch.rand(N, K, device=device), load))

    def step(function: Callable) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype != weights):
            x_in = x.detach().to(dtype).requires_grad_()
            y = function(x_in)
        y.backward(upstream.to(y.dtype))
        for module in modules:
            module.zero_grad()

    def routed(function: Callable, product: Callable | None = None) -> Callable:
        calls = iter(range(10**6))

        def task() -> None:
            experts.grouped_gemm = product
            step(lambda x_in: function(x_in, *routes[next(calls) % len(routes)]))

        return task

    kinds = {
        "float32": (torch.float32, torch.float32),
        "bfloat16": (torch.bfloat16, torch.float32),  # by autocast
        "bfloat16_weights": (torch.bfloat16, torch.bfloat16),
    }
    if device.type == "cpu":
        del kinds["bfloat16_weights"]
    for kind, (dtype, weights) in kinds.items():
        for module in modules:
            module.to(weights)
        tasks = {
            "layer": lambda: step(layer),  # router, routed experts and two shared ones
            "layer_dense": lambda: step(wide),
            "dense": lambda: step(dense),
            "ours": routed(experts),
            "one_by_one": routed(lambda *args: one_by_one(experts, *args)),
        }
        if hasattr(F, "grouped_mm") and (device.type == "cpu" or dtype == torch.bfloat16):
            tasks["torch_grouped_mm"] = routed(experts, torch_grouped_mm)
        ms = race(tasks, device)
        for name, value in ms.items():
            rival = "layer_dense" if name.startswith("layer") else "dense"
            text = f"ms   {value / ms[rival]:.2f}x {rival}   N={N} D={D} I={I} E={E} K={K}"
            measure(f"step_{name}_{kind}_ms", value, text)


def bench_kernels(device: torch.device) -> None:
    """The three products of V2-Lite's first matrices alone, beside PyTorch's, bf16."""
    N, D, I, E, K = 8192, 2048, 1408, 64, 6
    sizes = torch.rand(N, E, device=device).topk(K).indices.flatten().bincount(minlength=E)
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    x, weight, grad = make(N * K, D), make(E, 2 * I, D), make(N * K, 2 * I)
    ends = sizes.cumsum(0).to(torch.int32)
    products = {
        "forward": (
            partial(grouped_product, "rows", (x, weight, None), x.dtype, ends),
            lambda: F.grouped_mm(x, weight.mT, offs=ends),
        ),
        "dgrad": (
            partial(grouped_product, "rows", (grad, weight, None), x.dtype, ends, turned=True),
            lambda: F.grouped_mm(grad, weight, offs=ends),
        ),
        "wgrad": (
            partial(grouped_product, "weights", (grad, x, None), x.dtype, ends),
            lambda: F.grouped_mm(grad.T, x, offs=ends),
        ),
    }
    for name, (ours, theirs) in products.items():
        ours()  # the first of its kind chooses a configuration
        mine, other = (triton.testing.do_bench(f, return_mode="median") for f in (ours, theirs))
        text = f"TFLOP/s, {other / mine:.2f}x torch's grouped_mm   our goal: 1x"
        measure(f"grouped_{name}", 2 * N * K * D * 2 * I / mine / 1e9, text)
    experts = Experts(E, D, I).to(device, torch.bfloat16)
    for n in 1, 2, 8:
        scores, token = torch.rand(n, E, device=device), make(n, D)
        weights, indices = scores.topk(K)
        load = indices.flatten().bincount(minlength=E)
        us = {}
        for name, product in ("few", None), ("grouped", grouped_gemm):
            experts.grouped_gemm = product
            decode = torch.no_grad()(partial(experts, token, indices, weights, load))
            decode()
            us[name] = 1e3 * triton.testing.do_bench_cudagraph(decode, return_mode="median")
        text = f"µs, without gradients; {us['grouped']:.3g} as grouped products"
        measure(f"experts_of_{n}", us["few"], text)


@torch.no_grad()
def bench_few_rows(device: torch.device) -> None:
    """What `few_rows` does with AMX, beside linear: V2-Lite's first matrices in bf16, more than a
    cache holds."""
    weights = torch.randn(24, 2816, 2048).bfloat16().unbind()
    gigabytes = sum(w.numel() * w.itemsize for w in weights) / 1e9
    ours = "the first" if has_amx() else "linear"
    for n in 1, 8, 32:
        x = torch.randn(n, 2048).bfloat16()
        tasks = {
            "few": lambda x=x: [few_rows(x, w, amx=True) for w in weights],
            "linear": lambda x=x: [F.linear(x, w) for w in weights],
        }
        speed = {name: 1e3 * gigabytes / ms for name, ms in race(tasks, device).items()}
        text = f"GB/s of weights read, {speed['linear']:.1f} by linear; here {ours} is used"
        measure(f"few_rows_{n}", speed["few"], text)


# %% Exercises -------------------------------------------------------------------------------
# 1. Break it: turn the sign round in `update_bias`. Which check stops the chapter? Take that check
#    out: at which MaxVio does max_violation_bias end? Why is that the largest there is?
# 2. Put 0.0 for −inf in `choose`: which check stops the chapter? Then write + 0.6 for − 0.6 in
#    `layer`: why does none any more? The released V3 has biases above +2 in every layer: why would
#    no output of that model have shown the mistake?
# 3. [3] cuts each expert into m of 1/m the width and activates m times as many: 16 choose 2 are 120
#    sets of experts, 64 choose 8 are 4,426,165,368, at the same cost. Do it in `train` with m = 2
#    and 4. Does the held-out loss fall? Does the step take as long as before?


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    cli.add_argument("--device", default=default, help="cpu, cuda, cuda:1, … (%(default)s)")
    cli.add_argument("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    cli.add_argument("--bench", action="store_true", help="also time it against PyTorch's own")
    cli.add_argument("--out", type=Path, default="runs", help="folder of the figure (%(default)s/)")
    args = cli.parse_args()
    if not 0 <= args.seed < 2**63:
        cli.error(f"--seed must be >= 0 and fit 63 bits, got {args.seed}")
    try:
        device = torch.device(args.device)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # the checks need float64
    except Exception as error:  # each backend raises a type of its own
        cli.exit(2, f"cannot run on --device {args.device}: {str(error).splitlines()[0][:100]}\n")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        cli.error(f"--out {args.out}: {error.strerror}; want a folder that can be written to")
    # oneDNN keeps 1,024 compiled products: in --bench a rival would push out those of another
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # graphs and timers are of the current one
    torch.manual_seed(args.seed)
    verify_layer(device)
    if device.type == "cuda" and triton is not None:
        verify_kernels(device)
    verify_router(device)
    verify_balance(device)
    verify_sizes(device)
    experiment(device, args.seed, args.out / "03_moe_router.png")
    if args.bench:
        bench(device)
        if device.type == "cpu":
            bench_few_rows(device)
        if device.type == "cuda" and triton is not None:
            bench_kernels(device)


if __name__ == "__main__":
    main()
