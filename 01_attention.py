# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<=2.13", "triton>=3.6; sys_platform == 'linux'", "matplotlib>=3.8", "numpy>=1.26",
# ]
# ///
r"""01 · Attention: every token asks a question of all the tokens before it.

To write the next token a model rereads the keys and values of all earlier ones. With ordinary heads
at DeepSeek-V3's size that is 4.0 MB a token: one sequence of 128k tokens needs 524 GB. Sharing keys
between heads shrinks it 16 or 128 times; what V3 does instead is chapter 02.

    x (B,T,C) ─┬─ q_proj ─► q (B,H,T,D) ─ RoPE ────────────────┐
               ├─ k_proj ─► k (B,G,T,D) ─ RoPE ─► KVCache ─ k ─► softmax(q·kᵀ/√D)
               └─ v_proj ─► v (B,G,T,D) ────────► (B,G,S,D)     │ (B,H,T,S), j ≤ i
                                                      └─── v ─► · ─► o_proj ─► (B,T,C)
               G = H: MHA [1]     1 < G < H: GQA [4]     G = 1: MQA [3]
               multi-head, grouped-query and multi-query attention

    attention   oᵢ = Σⱼ≤ᵢ softmaxⱼ(qᵢ·kⱼ / √D) vⱼ                                    [1] eq. 1
    RoPE        pair p of position m turns by the angle m·θ^(−2p/D)                  [2] eq. 34
                so qₘ·kₙ depends on the contents and on n − m alone                  [2] eq. 16
    online      m' = max(m, max s)    ℓ' = ℓ·e^(m−m') + Σ e^(s−m')                   [5] alg. 3
    softmax     o' = o·e^(m−m') + Σ e^(s−m') v,   and at the end o/ℓ                 [6] alg. 1
                s: scores of the next block of keys; m, ℓ, o in the code: row_max, row_sum, out

    axis  config name            here  V3      [1] Vaswani et al. 2017, arXiv:1706.03762
    B     batch                     2   –      [2] RoFormer, Su et al. 2021, arXiv:2104.09864
    T, S  new tokens, key slots    37  128k    [3] MQA, Shazeer 2019, arXiv:1911.02150
    C     hidden_size             128  7168    [4] GQA, Ainslie et al. 2023, arXiv:2305.13245
    H     num_attention_heads       8   128    [5] Milakov & Gimelshein 2018, arXiv:1805.02867
    G     num_key_value_heads  8, 2, 1    –    [6] FlashAttention-2, Dao 2023, arXiv:2307.08691
    D     head_dim                 16   128    [7] DeepSeek-V2, arXiv:2405.04434
    R     rotated channels         16    64    V3: DeepSeek-V3, arXiv:2412.19437, §4.2
    V     width of a value         16   128

V3 has no G: its config says num_key_value_heads = 128, and MLA (chapter 02) ignores it.

Run:  python 01_attention.py [--bench]          4 s on two CPU cores, 22 s with --bench
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    import triton
    from triton import language as tl
except ImportError:  # macOS, Windows: each kernel has a twin, the same function in plain PyTorch
    triton = tl = None

# %% 1. The equation, word for word ----------------------------------------------------------
# Every attention function of this chapter takes these arguments (some a `block` as well), so each
# can stand in for another. Only for a query that may see no key do their results differ.


def attention(q: Tensor, k: Tensor, v: Tensor, causal=True, scale=None, mask=None) -> Tensor:
    """[1] eq. 1 with the whole (T, S) matrix of scores in memory: the oracle.

    q: (B, H, T, D), k: (B, G, S, D), v: (B, G, S, V), G divides H -> (B, H, T, V) in q's dtype.
    causal: the queries are the last T of the S positions, and position i sees the keys j <= i.
    mask: True where a query may look, broadcasts to (B, H, T, S); it replaces the causal rule.
    """
    (H, T, D), (G, S) = q.shape[1:], k.shape[1:3]
    k_per_head, v_per_head = (t.repeat_interleave(H // G, dim=1) for t in (k, v))  # (B, H, S, ·)
    scores = torch.einsum("BHTD,BHSD->BHTS", q, k_per_head) * (D**-0.5 if scale is None else scale)
    if mask is None and causal:
        mask = torch.arange(S, device=q.device) <= torch.arange(S - T, S, device=q.device)[:, None]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("BHTS,BHSV->BHTV", scores.softmax(-1), v_per_head)


def layer_reference(layer: "GroupedQueryAttention", x: Tensor) -> Tensor:
    """The layer on whole float64 sequences; a pair of channels is one complex number here."""

    def turned(heads: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * layer.frequencies.double()
        pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)))  # (B, H or G, T, D/2)
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    q, k, v = (p(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for p in projections)
    out = attention(turned(q), turned(k), v)  # (B, H, T, D)
    return layer.o_proj(out.transpose(1, 2).flatten(2))


# %% 2. The pieces ---------------------------------------------------------------------------
# First the layer with its cache. To prefill is to pass a whole prompt through it at once; to decode
# is to add one token at a time. A key is stored already turned: its position never changes.


# >>> copy: rope_frequencies, apply_rope, KVCache, GroupedQueryAttention (needs torch)
def rope_frequencies(dim: int, theta: float = 10000.0, device=None) -> Tensor:
    """Radians per position of each pair of channels, θ^(−2p/dim): (dim/2,) fp32."""
    if dim % 2:
        raise ValueError(f"RoPE turns pairs of channels, {dim} is odd")
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """Turn each pair of channels by the angle of its position (RoFormer, arXiv:2104.09864, eq. 34).

    x: (..., T, R), any float dtype -> the same; cos, sin: (T, R/2), or broadcast to (..., T, R/2).
    interleaved: pairs are (0, 1), (2, 3), … as DeepSeek stores them; else (0, R/2), (1, R/2 + 1), …
    as Llama does.
    """
    axis = -1 if interleaved else -2
    a, b = x.unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(axis)  # (..., T, R/2) each
    return torch.stack((a * cos - b * sin, a * sin + b * cos), axis).flatten(-2).to(x.dtype)


def half_split_order(dim: int, device=None) -> Tensor:
    """[0, 2, …, 1, 3, …]: x[..., order] turns interleaved channels into half-split ones.

    A checkpoint changes layout when each head's rows of q_proj and k_proj take this order;
    order.argsort() leads back.
    """
    return torch.arange(dim, device=device).view(-1, 2).T.flatten()


def torch_attention(q: Tensor, k: Tensor, v: Tensor, causal=True, scale=None, mask=None) -> Tensor:
    """F.scaled_dot_product_attention, its queries the last T of the S positions under causal."""
    T, S = q.shape[2], k.shape[2]
    if mask is None and causal and T != S:  # PyTorch's is_causal would take the first T instead
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    share = q.shape[1] != k.shape[1]
    causal = causal and mask is None
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=share)


class KVCache:
    """Keys and values of one layer, in slots allocated once; each row has its own number of tokens.

    Slot j holds the token at position j; a query at position i looks at the slots j <= i. That one
    rule is causality, and it hides what is stale, at and past `lengths`: nobody needs to clear it,
    unless it is NaN or infinite, for 0 · NaN is NaN. Unequal prompts: append them right-padded,
    then truncate(prompt_lengths). A rejected draft: truncate again. Not for use inside a
    checkpoint (torch.utils): what is computed again would be appended again.
    """

    def __init__(
        self, batch: int, max_tokens: int, num_key_value_heads: int, head_dim: int,
        device=None, dtype=None,
    ):  # fmt: skip
        shape = (batch, num_key_value_heads, max_tokens, head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # not empty: 0 weight · NaN is NaN
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=self.k.device)  # (B,)
        self.used = 0  # the longest row, as a Python int: asking `lengths` would wait for the GPU

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: (B, G, T, D), written after each row's last token -> both, (B, G, S = used, D)."""
        (B, G, room, D), T = self.k.shape, k.shape[2]
        if k.shape != (B, G, T, D) or v.shape != k.shape or {k.dtype, v.dtype} != {self.k.dtype}:
            got = f"{tuple(k.shape)}, {tuple(v.shape)} {k.dtype}"
            raise ValueError(f"cache takes two of ({B}, {G}, T, {D}) {self.k.dtype}, got {got}")
        if self.used + T > room:
            raise ValueError(f"cache has {room} slots: {self.used} used + {T} new do not fit")
        if self.k.requires_grad and not self.used:  # cut off the last text's autograd graph
            self.k, self.v = self.k.detach(), self.v.detach()
        rows = torch.arange(B, device=self.k.device)[:, None]  # (B, 1)
        slots = self.lengths[:, None] + torch.arange(T, device=self.k.device)  # (B, T)
        self.k[rows, :, slots] = k.transpose(1, 2)  # the two index axes come first: (B, T, G, D)
        self.v[rows, :, slots] = v.transpose(1, 2)
        self.lengths = self.lengths + T  # not +=: the caller may keep the old ones for truncate
        self.used += T
        return self.k[:, :, : self.used], self.v[:, :, : self.used]

    def truncate(self, lengths: Tensor | list[int] | int) -> None:
        """Keep the first `lengths` tokens of each row ((B,) or one number), forget the rest."""
        kept = torch.as_tensor(lengths, device=self.k.device).expand_as(self.lengths)
        if ((kept < 0) | (kept > self.lengths)).any():
            raise ValueError(f"cannot keep {kept.tolist()} tokens of {self.lengths.tolist()}")
        self.lengths = kept.to(torch.int64, copy=True)
        self.used = max(kept.tolist(), default=0)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, (B',) indices that may repeat, or a mask (B,)."""
        self.k, self.v, self.lengths = self.k[rows], self.v[rows], self.lengths[rows]
        self.used = max(self.lengths.tolist(), default=0)


class GroupedQueryAttention(nn.Module):
    """Causal attention with H query heads on G heads of keys and values, H/G on each.

    x: (B, T, C) -> (B, T, C). With a cache the T tokens stand behind what each row already holds.
    rope_theta=None: no RoPE. attention: a function with the signature of `torch_attention`.
    """

    def __init__(
        self, hidden_size: int, num_attention_heads: int, num_key_value_heads: int,
        head_dim: int | None = None, rope_theta: float | None = 10000.0, interleaved: bool = True,
        attention=None,
    ):  # fmt: skip
        super().__init__()
        C, H, G = hidden_size, num_attention_heads, num_key_value_heads
        if head_dim is None and C % H:
            raise ValueError(f"hidden_size {C} is not a multiple of {H} heads: give head_dim")
        if G < 1 or H % G:
            raise ValueError(f"{H} query heads cannot share {G} key-value heads evenly")
        self.head_dim = head_dim or C // H
        self.rope_theta, self.interleaved = rope_theta, interleaved
        self.attention = attention or torch_attention
        self.q_proj = nn.Linear(C, H * self.head_dim, bias=False)
        self.k_proj = nn.Linear(C, G * self.head_dim, bias=False)
        self.v_proj = nn.Linear(C, G * self.head_dim, bias=False)
        self.o_proj = nn.Linear(H * self.head_dim, C, bias=False)
        # A plain attribute: .to(bfloat16) would round a buffer, and position 1000 be off by a
        # radian; a meta device would empty it.
        D, theta = self.head_dim, rope_theta
        self.frequencies = None if theta is None else rope_frequencies(D, theta)  # (D/2,)

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions: (..., T) -> cos, sin: (..., T, D/2), in fp32 for a narrower dtype."""
        if self.frequencies.device != positions.device:
            self.frequencies = rope_frequencies(self.head_dim, self.rope_theta, positions.device)
        wide = torch.promote_types(dtype, torch.float32)
        angles = positions[..., None].to(wide) * self.frequencies.to(wide)
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or G, T, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        (B, T, _), mask = x.shape, None
        if cache is not None and len(cache.lengths) != B:
            raise ValueError(f"cache has {len(cache.lengths)} rows, x has {B}")
        positions = torch.arange(T, device=x.device)  # (T,)
        if cache is not None:
            positions = cache.lengths[:, None, None] + positions  # (B, 1, T)
        if self.frequencies is not None:
            cos, sin = self.cos_sin(positions, x.dtype)  # (T, D/2) or (B, 1, T, D/2)
            q, k = (apply_rope(t, cos, sin, self.interleaved) for t in (q, k))
        if cache is not None:
            k, v = cache.append(k, v)  # (B, G, S, D)
            if cache.used > T:  # else all rows began empty, and the plain causal kernel will do
                slots = torch.arange(cache.used, device=x.device)
                mask = slots <= positions[..., None]  # (B, 1, T, S)
        out = self.attention(q, k, v, causal=mask is None, scale=self.head_dim**-0.5, mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)


# <<< copy
# Now attention without the T × S matrix. Softmax seems to need a whole row of scores before it can
# divide. It does not: keep the largest score so far, the sum and the output relative to it, and
# shrink both when a larger score turns up.


# >>> copy: online_softmax_attention, flash_attention, tiled_attention (needs torch, triton, tl)
from functools import lru_cache


def online_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, causal=True, scale=None, mask=None, block=128
) -> Tensor:
    """Attention that meets the keys `block` at a time and never holds a whole row of scores.

    The inner loop of FlashAttention-2 (arXiv:2307.08691, alg. 1); arguments as flash_attention.
    """
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    if mask is None and causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask is not None:
        mask = mask.expand(B, H, T, S).unflatten(1, (G, -1))  # a view, no memory
    wide = torch.promote_types(q.dtype, torch.float32)  # sums of bf16 terms would stop growing
    q_scaled = q.to(wide).unflatten(1, (G, -1)) * (D**-0.5 if scale is None else scale)
    out = q_scaled.new_zeros(*q_scaled.shape[:-1], v.shape[-1])  # (B, G, H/G, T, V)
    row_sum = q_scaled.new_zeros(*q_scaled.shape[:-1], 1)  # (B, G, H/G, T, 1)
    row_max = torch.full_like(row_sum, torch.finfo(wide).min)  # not −inf: (−inf) − (−inf) is NaN
    for start in range(0, S, block):
        k_block, v_block = (t[:, :, None, start : start + block].to(wide) for t in (k, v))
        scores = q_scaled @ k_block.mT  # (B, G, H/G, T, block)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., start : start + block], float("-inf"))
        # detach: the maximum cancels in out / row_sum, so no gradient belongs to it
        new_max = torch.maximum(row_max, scores.detach().amax(-1, keepdim=True))
        weights, shrink = (scores - new_max).exp(), (row_max - new_max).exp()
        row_sum = row_sum * shrink + weights.sum(-1, keepdim=True)
        out = out * shrink + weights @ v_block
        row_max = new_max
    # row_sum: of the largest alone 1; 0 of a row that sees nothing
    return (out / row_sum.clamp(min=1)).flatten(1, 2).to(q.dtype)  # (B, H, T, V)


def first_order(backward):
    """For a Function's backward: refuses create_graph, which asks for its own derivative too. Its
    steps are not recorded, and what depends on saved tensors alone would count as a constant."""

    def checked(ctx, *grads):
        if torch.is_grad_enabled():  # by create_graph
            raise RuntimeError("no second derivative of this: want create_graph=False")
        return backward(ctx, *grads)

    return checked


def fitting(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor | None:
    """The mask as (B, H, T, S); ValueError with the shapes when the arguments do not fit."""
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    if H % G or k.shape != (B, G, S, D) or v.shape[:3] != (B, G, S):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"want (B, H, T, D), (B, G, S, D), (B, G, S, V), H % G = 0; got {shapes}")
    if causal and mask is None and T > S:
        raise ValueError(f"causal: {T} queries are more than {S} keys, the first would see nothing")
    return None if mask is None else mask.expand(B, H, T, S)


# The kernels. A row's weights are 2^(score − lse), lse = log₂ Σ 2^score of the row (log-sum-exp):
# forward keeps it, and backward needs nothing else to make them again. A width such as MLA's 192
# is no power of two, as a tile's must be: its channels come in two parts, D1 = 128 and D2 = 64.
if triton is not None:

    @triton.jit
    def _rows(
        at, row, count, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
        CUT: tl.constexpr = True,
    ):  # fmt: skip
        """Channels FIRST to FIRST + WIDTH of these rows; 0 past channel D or (CUT) the last row."""
        d = FIRST + tl.arange(0, WIDTH)
        place = at + row[:, None].to(tl.int64) * stride + d[None, :]
        if FIRST + WIDTH > D:
            inside = (row[:, None] < count) & (d[None, :] < D)
            return tl.load(place, mask=inside, other=0.0)
        if CUT:
            return tl.load(place, mask=row[:, None] < count, other=0.0)
        return tl.load(place)

    @triton.jit
    def _write(at, value, row, count, stride, FIRST: tl.constexpr, D: tl.constexpr):
        d = FIRST + tl.arange(0, value.shape[1])
        inside = (row[:, None] < count) & (d[None, :] < D)
        place = at + row[:, None].to(tl.int64) * stride + d[None, :]
        tl.store(place, value.to(at.dtype.element_ty), mask=inside)

    @triton.jit
    def flash_forward_kernel(
        q, k, v, out, lse, q_b, q_h, q_t, k_b, k_g, k_s, v_b, v_g, v_s, H, PER_GROUP, T, S, scale,
        CAUSAL: tl.constexpr, D: tl.constexpr, V: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
        VP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """BM queries of one head, BN keys a step; VP: V, padded to a power of two.

        q_b, …: strides, out has none: it is contiguous. scale: times log₂ e, for exp2. CUT 0: the
        key blocks that all BM queries see whole, without a mask; CUT 1: those that need one.
        """
        tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those that see most keys begin first
        head = tl.program_id(1).to(tl.int64)
        b, h = head // H, head % H
        q += b * q_b + h * q_h
        k += b * k_b + h // PER_GROUP * k_g
        v += b * v_b + h // PER_GROUP * v_g
        m = tile * BM + tl.arange(0, BM)
        q1 = _rows(q, m, T, q_t, 0, D1, D)
        if D2:
            q2 = _rows(q, m, T, q_t, D1, D2, D)
        row_max, row_sum = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
        total = tl.zeros((BM, VP), tl.float32)
        end = tl.minimum(S, S - T + (tile + 1) * BM) if CAUSAL else S
        whole = (S - T + tile * BM + 1 if CAUSAL else S) // BN * BN  # keys that all BM queries see
        for CUT in tl.static_range(0, 2):
            for start in range(whole if CUT else 0, end if CUT else whole, BN):
                n = start + tl.arange(0, BN)
                k1 = _rows(k, n, S, k_s, 0, D1, D, CUT)
                scores = tl.dot(q1, k1.T, input_precision=PRECISION)  # (BM, BN)
                if D2:
                    k2 = _rows(k, n, S, k_s, D1, D2, D, CUT)
                    scores = tl.dot(q2, k2.T, scores, input_precision=PRECISION)
                if CUT:
                    seen = n[None, :] < S
                    if CAUSAL:
                        seen = seen & (n[None, :] <= S - T + m[:, None])
                    scores = tl.where(seen, scores, float("-inf"))
                new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)  # finite: all see key 0
                weights = tl.math.exp2(scores * scale - new_max[:, None])  # one multiply-add each
                shrink = tl.math.exp2(row_max - new_max)
                row_sum = row_sum * shrink + tl.sum(weights, 1)
                v_tile = _rows(v, n, S, v_s, 0, VP, V, CUT)
                weights = weights.to(v_tile.dtype)
                total = tl.dot(weights, v_tile, total * shrink[:, None], input_precision=PRECISION)
                row_max = new_max
        _write(out + head * T * V, total / row_sum[:, None], m, T, V, 0, V)
        tl.store(lse + head * T + m, row_max + tl.math.log2(row_sum), mask=m < T)

    @triton.jit
    def flash_delta_kernel(
        out, do, delta, rows, V: tl.constexpr, VP: tl.constexpr, BM: tl.constexpr
    ):
        """Σ do·out of each row, which backward takes off dp."""
        m = tl.program_id(0) * BM + tl.arange(0, BM)
        a, b = _rows(out, m, rows, V, 0, VP, V), _rows(do, m, rows, V, 0, VP, V)
        tl.store(delta + m, tl.sum(a.to(tl.float32) * b.to(tl.float32), 1), mask=m < rows)

    @triton.jit
    def flash_keys_kernel(
        q, k, v, do, lse, delta, dk, dv, q_b, q_h, q_t, k_b, k_g, k_s, v_b, v_g, v_s,
        G, PER_GROUP, T, S, scale, natural_scale,
        CAUSAL: tl.constexpr, D: tl.constexpr, V: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
        VP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """dk and dv of BN keys, over all queries of all heads that share them: no atomic sums.

        d…: the loss's gradient; s: scores, p: weights = softmax(s), out = p v. So dv = pᵀ do and
        dp = do vᵀ; softmax gives ds = p · (dp − delta), delta = Σ p·dp = Σ do·out of a row, which
        flash_delta_kernel has summed; dk = dsᵀ q · scale.
        """
        tile, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
        b, g = group // G, group % G
        k += b * k_b + g * k_g
        v += b * v_b + g * v_g
        n = tile * BN + tl.arange(0, BN)
        k1, v_tile = _rows(k, n, S, k_s, 0, D1, D), _rows(v, n, S, v_s, 0, VP, V)
        dk1, dv_sum = tl.zeros((BN, D1), tl.float32), tl.zeros((BN, VP), tl.float32)
        if D2:
            k2, dk2 = _rows(k, n, S, k_s, D1, D2, D), tl.zeros((BN, D2), tl.float32)
        first = tl.maximum(tile * BN - (S - T), 0) // BM * BM if CAUSAL else 0
        for h in range(0, PER_GROUP):
            head = group * PER_GROUP + h  # of all B·H
            q_head = q + b * q_b + (g * PER_GROUP + h) * q_h
            for start in range(first, T, BM):
                m = start + tl.arange(0, BM)
                q1 = _rows(q_head, m, T, q_t, 0, D1, D)
                do_tile = _rows(do + head * T * V, m, T, V, 0, VP, V)
                scores = tl.dot(k1, q1.T, input_precision=PRECISION)  # (BN, BM)
                if D2:
                    q2 = _rows(q_head, m, T, q_t, D1, D2, D)
                    scores = tl.dot(k2, q2.T, scores, input_precision=PRECISION)
                row_lse = tl.load(lse + head * T + m, mask=m < T, other=float("inf"))  # 2^-inf: 0
                weights = tl.math.exp2(scores * scale - row_lse[None, :])
                if CAUSAL:
                    weights = tl.where(n[:, None] <= S - T + m[None, :], weights, 0.0)
                narrow = weights.to(do_tile.dtype)
                dv_sum = tl.dot(narrow, do_tile, dv_sum, input_precision=PRECISION)
                dp = tl.dot(v_tile, do_tile.T, input_precision=PRECISION)
                row_delta = tl.load(delta + head * T + m, mask=m < T, other=0.0)
                ds = (weights * (dp - row_delta[None, :])).to(q1.dtype)
                dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
                if D2:
                    dk2 = tl.dot(ds, q2, dk2, input_precision=PRECISION)
        _write(dk + group * S * D, dk1 * natural_scale, n, S, D, 0, D)
        if D2:
            _write(dk + group * S * D, dk2 * natural_scale, n, S, D, D1, D)
        _write(dv + group * S * V, dv_sum, n, S, V, 0, V)

    @triton.jit
    def flash_queries_kernel(
        q, k, v, do, lse, delta, dq, q_b, q_h, q_t, k_b, k_g, k_s, v_b, v_g, v_s,
        H, PER_GROUP, T, S, scale, natural_scale,
        CAUSAL: tl.constexpr, D: tl.constexpr, V: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
        VP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """dq = ds k of BM queries of one head."""
        tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
        b, h = head // H, head % H
        q += b * q_b + h * q_h
        k += b * k_b + h // PER_GROUP * k_g
        v += b * v_b + h // PER_GROUP * v_g
        m = tile * BM + tl.arange(0, BM)
        q1, do_tile = _rows(q, m, T, q_t, 0, D1, D), _rows(do + head * T * V, m, T, V, 0, VP, V)
        dq1 = tl.zeros((BM, D1), tl.float32)
        if D2:
            q2, dq2 = _rows(q, m, T, q_t, D1, D2, D), tl.zeros((BM, D2), tl.float32)
        row_lse = tl.load(lse + head * T + m, mask=m < T, other=float("inf"))
        row_delta = tl.load(delta + head * T + m, mask=m < T, other=0.0)
        end = tl.minimum(S, S - T + (tile + 1) * BM) if CAUSAL else S
        whole = (S - T + tile * BM + 1 if CAUSAL else S) // BN * BN
        for CUT in tl.static_range(0, 2):
            for start in range(whole if CUT else 0, end if CUT else whole, BN):
                n = start + tl.arange(0, BN)
                k1, v_tile = _rows(k, n, S, k_s, 0, D1, D, CUT), _rows(v, n, S, v_s, 0, VP, V, CUT)
                scores = tl.dot(q1, k1.T, input_precision=PRECISION)
                if D2:
                    k2 = _rows(k, n, S, k_s, D1, D2, D, CUT)
                    scores = tl.dot(q2, k2.T, scores, input_precision=PRECISION)
                weights = tl.math.exp2(scores * scale - row_lse[:, None])
                if CUT and CAUSAL:
                    weights = tl.where(n[None, :] <= S - T + m[:, None], weights, 0.0)
                elif CUT:  # of a key past the last: 2^(0 − lse) may be infinite, and ∞ · 0 is NaN
                    weights = tl.where(n[None, :] < S, weights, 0.0)
                dp = tl.dot(do_tile, v_tile.T, input_precision=PRECISION)
                ds = (weights * (dp - row_delta[:, None])).to(k1.dtype)
                dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
                if D2:
                    dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)
        _write(dq + head * T * D, dq1 * natural_scale, m, T, D, 0, D)
        if D2:
            _write(dq + head * T * D, dq2 * natural_scale, m, T, D, D1, D)


@lru_cache
def gpu(device: torch.device) -> tuple[tuple[int, int], int]:
    """Its compute capability and how many SMs it has, asked for once."""
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count


def flash_configs(
    D: int, V: int, itemsize: int, capability: tuple[int, int], S: int = 4096
) -> dict[str, tuple[int, int, int, int]]:
    """(BM, BN, warps, stages) of each kernel for S keys; the tests compile them, and find nothing
    spilt but up to 184 bytes of a Hopper's keys (Triton 3.9: 104)."""
    widest = max(D, V)
    if itemsize == 4:
        small = (16, 16, 4, 1)
        return {
            "forward": small,
            "keys": small,
            "queries": (32, 32, 8, 1) if 128 < widest <= 192 else (16, 16, 8, 1),
        }
    if widest > 192:
        return {"forward": (32, 32, 8, 1), "keys": (32, 32, 8, 1), "queries": (32, 32, 4, 1)}
    if capability[0] == 9:  # wgmma wants 64 rows
        keys = (64 if widest <= 128 else 32, 64, 4, 2)  # tiles that spill nothing are slower
        queries = (128, 64 if widest <= 128 else 32, 8, 3)
        small = widest <= 128 and S <= 8192  # two programs an SM; with more keys large ones win
        forward = (64, 64, 4, 3) if small else (128, 64, 8, 3)
        return {"forward": forward, "keys": keys, "queries": queries}
    if capability[0] == 10:
        forward = (128, 64, 8, 3) if widest > 64 else (64, 64, 8, 2)
        return {"forward": forward, "keys": (64, 32, 8, 2), "queries": (64, 64, 4, 2)}
    keys = (32, 64 if widest <= 128 else 32, 8, 1)
    return {"forward": (64, 32, 4, 2), "keys": keys, "queries": (32, 32, 4, 1)}


class _FlashAttention(torch.autograd.Function):
    """Forward and backward by the kernels; the same bits at every run."""

    @staticmethod
    def launch(kernel, which: str, q, k, v, further: list, last: list, causal: bool) -> None:
        """A program for each tile of BM queries of a head, or of BN keys of a group."""
        (B, H, T, D), (G, S), V = q.shape, k.shape[1:3], v.shape[-1]
        place = gpu(q.device)[0] if q.is_cuda else (8, 0)
        BM, BN, warps, stages = flash_configs(D, V, q.element_size(), place, S)[which]
        D1 = max(16, 1 << (D.bit_length() - 1))
        D2 = 0 if D <= D1 else max(16, triton.next_power_of_2(D - D1))
        over_keys = which == "keys"
        grid = (triton.cdiv(S, BN), B * G) if over_keys else (triton.cdiv(T, BM), B * H)
        with torch.cuda.device_of(q):  # Triton launches on the current GPU, whatever q says
            kernel[grid](
                q, k, v, *further, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                G if over_keys else H, H // G, T, S, *last, CAUSAL=causal, D=D, V=V, D1=D1, D2=D2,
                VP=max(16, triton.next_power_of_2(V)), BM=BM, BN=BN, PRECISION="ieee",
                num_warps=warps, num_stages=stages,
            )  # fmt: skip

    @staticmethod
    def forward(ctx, q, k, v, causal, scale):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        base_2 = scale * 1.4426950408889634  # log₂ e
        arguments = [out, lse], [base_2], causal
        _FlashAttention.launch(flash_forward_kernel, "forward", q, k, v, *arguments)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = causal, scale, base_2
        return out

    @staticmethod
    @first_order
    def backward(ctx, do):
        q, k, v, out, lse = ctx.saved_tensors
        causal, scale, base_2 = ctx.settings
        do, V, delta = do.contiguous(), out.shape[-1], torch.empty_like(lse)
        with torch.cuda.device_of(q):
            flash_delta_kernel[(triton.cdiv(lse.numel(), 32),)](
                out, do, delta, lse.numel(), V=V, VP=max(16, triton.next_power_of_2(V)), BM=32
            )
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        for kernel, which, wanted in (
            (flash_keys_kernel, "keys", [dk, dv]),
            (flash_queries_kernel, "queries", [dq]),
        ):
            arguments = [do, lse, delta, *wanted], [base_2, scale], causal
            _FlashAttention.launch(kernel, which, q, k, v, *arguments)
        return dq, dk, dv, None, None


def in_autocast_dtype(x: Tensor) -> Tensor:
    """Where autocast is on, in its dtype, as nn.Linear would take it: float64 stays."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, causal=True, scale=None, mask=None, block=128
) -> Tensor:
    """Tiles of queries, each of which meets the key blocks up to its diagonal (arXiv:2307.08691).

    q: (B, H, T, D), k: (B, G, S, D), v: (B, G, S, V), G divides H -> (B, H, T, V) in q's dtype.
    causal: the queries are the last T of the S positions, and position i sees the keys j <= i.
    mask: True where a query may look, broadcasts to (B, H, T, S); it replaces the causal rule.
    On a GPU (sm_80 or newer), without a mask and for widths up to 256, by kernels that keep no
    weights, forward and backward; otherwise by their PyTorch twin, which is not fast, and keeps
    them for autograd.
    """
    q, k, v = map(in_autocast_dtype, (q, k, v))
    mask, T, S, tiles = fitting(q, k, v, causal, mask), q.shape[2], k.shape[2], []
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    narrow = q.dtype in (torch.float16, torch.bfloat16, torch.float32) and q.dtype == k.dtype
    if mask is None and q.is_cuda and triton is not None and narrow and q.numel() and S:
        fits = max(q.shape[-1], v.shape[-1]) <= 256 and v.dtype == k.dtype and scale > 0
        if fits and q.shape[:2].numel() < 2**16 and gpu(q.device)[0] >= (8, 0):
            return _FlashAttention.apply(q, k, v, causal, scale)
    for start in range(0, max(T, 1), block):
        stop = min(start + block, T)
        seen = S - T + stop if causal and mask is None else S  # past it the diagonal hides all keys
        rows = None if mask is None else mask[:, :, start:stop]
        q_tile, k_seen, v_seen = q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen]
        tiles.append(online_softmax_attention(q_tile, k_seen, v_seen, causal, scale, rows, block))
    return torch.cat(tiles, dim=2)


# The same tiles for training where there is no GPU kernel. A tile takes all its keys at once, so it
# needs no running maximum. Backward makes the weights again, unless they are few: those it keeps.


KEPT_WEIGHTS = 2**24  # bytes, of all heads, up to which they are kept


class _TiledAttention(torch.autograd.Function):
    """One tile a step: t queries of H/G heads against the s keys they may see."""

    @staticmethod
    def tiles(T: int, S: int, causal: bool, block: int):
        """Yields a tile's slice of the queries, and how many keys it sees."""
        for start in range(0, T, block):
            rows = slice(start, min(start + block, T))
            yield rows, S - T + rows.stop if causal else S

    @staticmethod
    def weights(q: Tensor, k: Tensor, rows: slice, seen: int, causal, scale, mask) -> Tensor:
        """softmax(scale · q kᵀ) of one tile: (B, G, H/G·t, s)."""
        (B, H), G, t = q.shape[:2], k.shape[1], rows.stop - rows.start
        q_tile = q[:, :, rows].reshape(B * G, H // G * t, q.shape[-1])
        k_seen = k[:, :, :seen].flatten(0, 1)  # (B·G, s, D)
        # beta=0: what the first argument holds is never read
        scores = torch.baddbmm(q.new_empty(()), q_tile, k_seen.mT, beta=0, alpha=scale)
        scores = scores.view(B, H, t, seen)
        if mask is not None:
            scores.masked_fill_(~mask[:, :, rows], float("-inf"))
        elif causal:  # the diagonal crosses only the last t keys
            scores[..., -t:] += q.new_full((t, t), float("-inf")).triu(1)
        weights = scores.softmax(-1)  # sums in fp32 or wider
        if mask is not None:  # as in SDPA, what sees nothing gets 0
            weights.masked_fill_(~mask[:, :, rows].any(-1, keepdim=True), 0.0)
        return weights.view(B, G, H // G * t, seen)

    @staticmethod
    def forward(ctx, q, k, v, causal, scale, mask, block):
        q, k, v = (x.contiguous() for x in (q, k, v))
        (B, H, T, _), S = q.shape, k.shape[2]
        out, kept = q.new_empty(B, H, T, v.shape[-1]), []
        few = B * H * T * S * q.itemsize <= KEPT_WEIGHTS
        for rows, seen in _TiledAttention.tiles(T, S, causal, block):
            weights = _TiledAttention.weights(q, k, rows, seen, causal, scale, mask)
            out[:, :, rows] = (weights @ v[:, :, :seen]).view_as(out[:, :, rows])
            if few:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, None if few else mask, *kept)
        ctx.settings = causal, scale, block
        return out

    @staticmethod
    @first_order
    def backward(ctx, grad):
        q, k, v, mask, *kept = ctx.saved_tensors
        S, (causal, scale, block) = k.shape[2], ctx.settings
        again = _TiledAttention.weights
        wide = torch.promote_types(k.dtype, torch.float32)  # summed over the tiles
        dq, dk, dv = torch.empty_like(q), *(torch.zeros_like(x, dtype=wide) for x in (k, v))
        for i, (rows, seen) in enumerate(_TiledAttention.tiles(q.shape[2], S, causal, block)):
            weights = kept[i] if kept else again(q, k, rows, seen, causal, scale, mask)
            shape = weights.shape[:3]  # (B, G, H/G·t)
            q_tile, do = (x[:, :, rows].reshape(*shape, x.shape[-1]) for x in (q, grad))
            dv[:, :, :seen] += weights.mT @ do
            dp = do @ v[:, :, :seen].mT  # (B, G, H/G·t, s)
            # (dp − Σⱼ pⱼ·dpⱼ)·p, in one pass and in fp32
            ds = torch.ops.aten._softmax_backward_data(dp, weights, -1, dp.dtype)
            dq[:, :, rows] = (ds @ k[:, :, :seen]).mul_(scale).view_as(dq[:, :, rows])
            dk[:, :, :seen] += ds.mT @ q_tile
        dk *= scale
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, causal=True, scale=None, mask=None, block=None
) -> Tensor:
    """Attention by tiles of queries, in the width of its input, forward and backward.

    q: (B, H, T, D), k: (B, G, S, D), v: (B, G, S, V), G divides H -> (B, H, T, V) in q's dtype.
    causal and mask as in flash_attention. It holds block × S weights a head at a time; backward
    makes them again (arXiv:2205.14135, algorithm 4), unless all of them are within 16 MB: then it
    keeps them, as SDPA does without a kernel. Under autocast in its dtype, as SDPA.
    block: queries a tile, which changes the time it takes alone; None: 64, of two bytes 128.
    """
    q, k, v = map(in_autocast_dtype, (q, k, v))
    mask = fitting(q, k, v, causal, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if block is None:
        block = 128 if q.dtype.itemsize == 2 else 64
    with torch.autocast(q.device.type, enabled=False):
        return _TiledAttention.apply(q, k, v, causal and mask is None, scale, mask, block)


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


def verify_attention(device: torch.device) -> None:
    """The oracle against a number worked by hand; then PyTorch and the blocked forms against it."""
    q = torch.tensor([[3.0]], dtype=torch.float64, device=device).log()  # scores 0 and ln 3
    k, v = q.new_tensor([[0.0], [1.0]]), q.new_tensor([[0.0], [4.0]])
    by_hand = attention(q[None, None], k[None, None], v[None, None])
    check("oracle = ¼·0 + ¾·4, by hand", by_hand, torch.full_like(by_hand, 3.0), EXACT)
    for H, G, T, S in (8, 8, 37, 37), (8, 2, 37, 37), (8, 1, 5, 37):
        q, k, v = (torch.randn(2, *s, 16).to(q) for s in ((H, T), (G, S), (G, S)))
        want, shape = attention(q, k, v), f"H={H} G={G} T={T} S={S}"
        check(f"PyTorch SDPA   = oracle, {shape}", torch_attention(q, k, v), want, EXACT)
        online = online_softmax_attention(q, k, v, block=8)
        check(f"online softmax = oracle, {shape}", online, want, EXACT)
        check(f"flash tiles    = oracle, {shape}", flash_attention(q, k, v, block=8), want, EXACT)
        check(f"tiled          = oracle, {shape}", tiled_attention(q, k, v, block=8), want, EXACT)


def verify_kernels(device: torch.device) -> None:
    """FlashAttention's kernels in fp32 against the oracle in float64, gradients too."""
    shapes = (2, 4, 100, 192), (2, 2, 130, 192), (2, 2, 130, 128)
    inputs = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out, want = flash_attention(*inputs), attention(*wide)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, upstream)
    grads = torch.autograd.grad(want, wide, upstream.double())
    for name, a, b in zip(("output", "dq", "dk", "dv"), (out, *got), (want, *grads), strict=True):
        check(f"flash kernel's {name}, fp32", a, b, 1e-4)  # sums of 130 terms of order 1


def verify_rope(device: torch.device) -> None:
    """[2] eq. 16: only the distance counts; and both layouts give the same products."""
    q, k = torch.randn(2, 64, 1, 16, dtype=torch.float64, device=device)  # 64 pairs of vectors

    def products(m: int, n: int, interleaved: bool = True) -> Tensor:
        order = half_split_order(16, device)
        q_in, k_in = (q, k) if interleaved else (q[..., order], k[..., order])
        frequencies = rope_frequencies(16, device=device).double()
        angles = torch.tensor([[m], [n]], device=device) * frequencies
        cos, sin = angles.cos(), angles.sin()  # (2, R/2)
        q_turned = apply_rope(q_in, cos[:1], sin[:1], interleaved)
        return (q_turned * apply_rope(k_in, cos[1:], sin[1:], interleaved)).sum(-1)

    # an angle near 1000 is itself off by 1e-13
    check("RoPE: positions (1000, 993) = (7, 0)", products(1000, 993), products(7, 0), 1e-11)
    check("interleaved = half-split, permuted", products(9, 4), products(9, 4, False), EXACT)


def verify_layer(device: torch.device) -> None:
    """The layer against its equation and against nn.MultiheadAttention."""
    x = torch.randn(2, 37, 128, dtype=torch.float64).to(device)
    for name, G in ("MHA", 8), ("GQA", 2), ("MQA", 1):
        layer = GroupedQueryAttention(128, 8, G).to(x)
        check(f"{name} layer = equation, RoPE in ℂ", layer(x), layer_reference(layer, x), EXACT)
    plain = GroupedQueryAttention(128, 8, 8, rope_theta=None).to(x)
    rival = nn.MultiheadAttention(128, 8, bias=False, batch_first=True).to(x)
    projections = (plain.q_proj, plain.k_proj, plain.v_proj)
    rival.in_proj_weight.data = torch.cat([p.weight for p in projections])
    rival.out_proj.weight.data = plain.o_proj.weight
    hidden = torch.ones(37, 37, dtype=torch.bool, device=device).triu(1)
    want = rival(x, x, x, attn_mask=hidden, need_weights=False)[0]
    check("MHA layer = nn.MultiheadAttention", plain(x), want, EXACT)


@torch.no_grad()
def verify_cache(device: torch.device) -> None:
    """Prefill in two parts of any size, then token by token; then two rows of unequal length."""
    x = torch.randn(2, 37, 128, dtype=torch.float64).to(device)
    layer = GroupedQueryAttention(128, 8, 2).to(x)
    full, runs = layer(x), []
    for first in range(1, 36, 4):
        cache = KVCache(2, 37, 2, 16, x.device, x.dtype)
        second = (37 - first) // 2
        sizes = [first, second] + [1] * (37 - first - second)
        runs.append(torch.cat([layer(part, cache) for part in x.split(sizes, dim=1)], dim=1))
    want = full.expand(len(runs), -1, -1, -1)
    check("prefill in any split + decode = one pass", torch.stack(runs), want, EXACT)
    cache, prompts = KVCache(2, 42, 2, 16, x.device, x.dtype), x.clone()
    prompts[0, 28:], prompts[1, 4:] = 5.0, 5.0  # padding that would show
    layer(prompts, cache)
    cache.truncate([28, 4])  # what comes later is now stale
    new, want = (torch.stack([t[0, 28:33], t[1, 4:9]]) for t in (x, full))  # (2, 5, C)
    check("rows of unequal length = each alone", layer(new, cache), want, EXACT)


# %% 4. What does it buy? --------------------------------------------------------------------
# A cache grows with context × layers × G. At V3's size (61 layers, 128 heads of 128, bf16) MHA
# needs 524 GB at 128k tokens: seven 80 GB cards for one reader. MQA needs 4 GB, but its 128 heads
# share one key.


def bytes_per_token(num_key_value_heads: int, layers: int = 61, head_dim: int = 128) -> int:
    """Of all layers, read off a real cache of one slot."""
    one = KVCache(1, 1, num_key_value_heads, head_dim, dtype=torch.bfloat16)
    return layers * (one.k.nbytes + one.v.nbytes)


def experiment(out: Path) -> None:
    """Bytes a token for each kind of attention, beside [7] table 1; then the figure."""
    paper = {"MHA": 2 * 128 * 128, "GQA-8": 2 * 8 * 128, "MQA": 2 * 128, "MLA": 512 + 64}
    per_token = {name: bytes_per_token(G) for name, G in (("MHA", 128), ("GQA-8", 8), ("MQA", 1))}
    want = torch.tensor([61 * paper[name] * 2 for name in per_token])
    check("bytes of KVCache = [7] table 1", torch.tensor(list(per_token.values())), want, 0)
    per_token["MLA"] = 61 * paper["MLA"] * 2  # the paper's: 02 builds the cache that holds it
    for name, size in per_token.items():
        text = f"= {size:,} B   [7] table 1: {paper[name]:,} · 61 layers · 2 B"
        measure(f"kv_bytes_per_token_{name.lower().replace('-', '')}", size, text)
    draw(per_token, out)
    print(f"figure   {out}")


def draw(per_token: dict[str, int], out: Path) -> None:
    """Bytes of one sequence's cache against its length, one line a kind of attention."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook hands down its own, which may be missing here
    from matplotlib import pyplot as plt

    contexts = [1024 * 2**i for i in range(8)]  # 1k … 128k
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, size in per_token.items():
        label = "MLA: how? The question the next chapter answers" if name == "MLA" else name
        gigabytes = [size * tokens / 1e9 for tokens in contexts]
        axes.plot(contexts, gigabytes, "--" if name == "MLA" else "o-", label=label)
        axes.annotate(f"   {gigabytes[-1]:.3g} GB", (contexts[-1], gigabytes[-1]), va="center")
    axes.axhline(80, color="gray", lw=0.8)
    axes.annotate("all memory of one 80 GB card", (contexts[0], 80), va="bottom", color="gray")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{tokens // 1024}k" for tokens in contexts])
    axes.set_xlim(right=contexts[-1] * 2)
    axes.set(xlabel="context (tokens)", ylabel="KV cache of one sequence (GB)")
    axes.set_title("At V3's size one 128k-token sequence with MHA needs 524 GB of cache")
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)


# %% 5. How fast? ----------------------------------------------------------------------------


def race(tasks: dict[str, Callable], device: torch.device, rounds: int = 9) -> dict[str, float]:
    """Median milliseconds of each task; every round runs them all, so drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds + 1):
        for name, task in tasks.items():
            begin = time.perf_counter()
            task()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # [0]: warm-up


def bench_training(device: torch.device) -> None:
    """Forward and backward in bf16 at 06's nano size, where values are narrower than keys."""
    shapes = (8, 4, 256, 48), (8, 4, 256, 48), (8, 4, 256, 32)
    inputs = [torch.randn(s, device=device, dtype=torch.bfloat16).requires_grad_() for s in shapes]
    upstream = torch.randn_like(inputs[2])

    def step(function: Callable) -> None:
        torch.autograd.grad(function(*inputs), inputs, upstream)

    ms = race({f.__name__: partial(step, f) for f in (tiled_attention, torch_attention)}, device)
    for name, value in ms.items():
        ratio = f"{value / ms['torch_attention']:.2f}x SDPA"
        measure(f"train_{name}_ms", value, f"ms   {ratio}   B=8 H=4 T=256 D=48 V=32 bf16")


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that anything under it makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(made) if isinstance(t, Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return made


def bench_contexts(device: torch.device, out: Path) -> None:
    """Forward and backward against context, with and without the T × T matrix; then the figure."""
    gpu = device.type == "cuda"
    tiles = flash_attention if gpu else tiled_attention
    contexts = [(1024 if gpu else 256) * 2**i for i in range(5)]
    ms, largest = ({f.__name__: [] for f in (attention, tiles)} for _ in range(2))
    for T in contexts:
        make = partial(torch.randn, 1, 8, T, 64, device=device, dtype=torch.bfloat16)
        inputs = [make().requires_grad_() for _ in "qkv"]
        step = lambda f, i=inputs: torch.autograd.grad(f(*i).sum(), i)
        times = race({f.__name__: partial(step, f) for f in (attention, tiles)}, device, 3)
        for function in (attention, tiles):
            with Largest() as seen:
                step(function)
            largest[function.__name__].append(seen.bytes / 1e6)
            ms[function.__name__].append(times[function.__name__])
    for name in ms:
        text = f"ms   forward and backward, its largest tensor {largest[name][-1]:,.0f} MB"
        measure(f"context_{contexts[-1]}_{name}_ms", ms[name][-1], text)
    draw_contexts(contexts, {"forward and backward (ms)": ms, "largest tensor (MB)": largest}, out)
    print(f"figure   {out}")


def draw_contexts(contexts: list[int], panels: dict[str, dict], out: Path) -> None:
    os.environ["MPLBACKEND"] = "Agg"  # a notebook hands down its own, which may be missing here
    from matplotlib import pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, (what, curves) in zip(both, panels.items(), strict=True):
        for name, values in curves.items():
            axes.plot(contexts, values, "o-", label=name)
            axes.annotate(f"  {values[-1]:,.0f}", (contexts[-1], values[-1]), va="center")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(contexts, [f"{T:,}" for T in contexts])
        axes.set_xlim(right=contexts[-1] * 1.5)
        axes.set(xlabel="context (tokens)", ylabel=what)
    both[0].legend(title="8 heads of 64, causal, bf16")
    values = list(panels["largest tensor (MB)"].values())
    ratio = values[0][-1] / values[1][-1]
    figure.suptitle(f"At {contexts[-1]:,} tokens the largest tensor is 1/{ratio:,.0f} as large")
    figure.savefig(out, dpi=150)
    plt.close(figure)


def sdpa_by(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """SDPA's own kernel, values padded where they must be as wide as keys; None: not here."""
    D, V = q.shape[-1], v.shape[-1]
    try:
        with sdpa_kernel(backend):
            wide = F.pad(v, (0, D - V)) if D > V else v
            return F.scaled_dot_product_attention(q, k, wide, is_causal=True)[..., :V]
    except RuntimeError:
        return None


def bench_kernels(device: torch.device) -> None:
    """FlashAttention beside SDPA's backends: an ordinary head, and MLA's 192 and 128 channels."""
    for D, V in (128, 128), (192, 128):
        for T in 4096, 16384:
            B, H = 16384 // T, 16
            shapes = (B, H, T, D), (B, H, T, D), (B, H, T, V)
            make = partial(torch.randn, device=device, dtype=torch.bfloat16)
            q, k, v = (make(shape).requires_grad_() for shape in shapes)
            rivals = {
                "flash": flash_attention,
                "SDPA": torch_attention,
                "SDPA flash": partial(sdpa_by, SDPBackend.FLASH_ATTENTION),
                "SDPA cuDNN": partial(sdpa_by, SDPBackend.CUDNN_ATTENTION),
            }
            outs = {name: rival(q, k, v) for name, rival in rivals.items()}
            outs = {name: out for name, out in outs.items() if out is not None}
            upstream = torch.randn_like(outs["flash"])
            backward = lambda out, i=(q, k, v), u=upstream: torch.autograd.grad(out, i, u, True)
            passes = {
                "forward": {name: partial(rivals[name], q, k, v) for name in outs},
                "backward": {name: partial(backward, out) for name, out in outs.items()},
            }
            for which, tasks in passes.items():
                # graphs: what Python takes to launch is not counted; autograd's backward has none
                forward = which == "forward"
                bench = triton.testing.do_bench_cudagraph if forward else triton.testing.do_bench
                ms = {name: bench(task, return_mode="median") for name, task in tasks.items()}
                products = D + V if forward else 3 * D + 2 * V  # and backward's scores anew
                speed = B * H * T * T * products / 1e9 / ms["flash"]  # half of T² is hidden
                others = [f"{n} {ms['flash'] / t:.2f}x" for n, t in ms.items() if n != "flash"]
                text = f"TFLOP/s; its time beside {', '.join(others) or 'none'}"
                measure(f"flash_{which}_{D}_{V}_T{T}", speed, text)


@torch.no_grad()
def bench(device: torch.device) -> None:
    """One forward pass of attention; then one decoded token with the cache and without."""
    T, H, G, D, dtype = 1024, 8, 2, 64, torch.float32
    if device.type == "cuda":
        T, H, G, D, dtype = 4096, 32, 8, 128, torch.bfloat16
    q, k, v = (torch.randn(1, n, T, D, device=device, dtype=dtype) for n in (H, G, G))
    rivals = attention, online_softmax_attention, flash_attention, tiled_attention, torch_attention
    ms = race({f.__name__: partial(f, q, k, v) for f in rivals}, device)
    for name, value in ms.items():
        ratio = f"{value / ms['torch_attention']:.2f}x SDPA"
        measure(f"forward_{name}_ms", value, f"ms   {ratio}   T={T} H={H} G={G} D={D} {dtype}")
    layer = GroupedQueryAttention(H * D, H, G).to(device, dtype)
    x = torch.randn(1, T, H * D, device=device, dtype=dtype)
    cache = KVCache(1, T, G, D, device, dtype)
    layer(x[:, :-1], cache)

    def decode() -> None:
        cache.truncate(T - 1)
        layer(x[:, -1:], cache)

    ms = race({"cached": decode, "recomputed": partial(layer, x)}, device)
    measure("token_cached_ms", ms["cached"], f"ms   token {T} of one layer, C={H * D}")
    ratio = f"{ms['recomputed'] / ms['cached']:.1f}x cached"
    measure("token_recomputed_ms", ms["recomputed"], f"ms   {ratio}")


# %% Exercises -------------------------------------------------------------------------------
# 1. Break it: take `* shrink` out of the line of row_sum in online_softmax_attention. Which check
#    stops the chapter? Why would block=S have hidden it? Sort the keys of a single query so that
#    its largest score comes first: why is the broken code right again?
# 2. [7], table 1: MLA's cache at V3's size is that of GQA with 2.25 groups. Derive it. Which G
#    would V2-Lite need (27 layers, 16 heads of 128, the same 512 + 64)? Why is it the same G?
# 3. Let a query see the last W positions only: in the layer's `forward` build the mask without a
#    cache, too, and change its rule; give verify_layer's equation the same. Then make KVCache a
#    ring of W slots. Slot j no longer holds position j: what must the cache remember, and what can
#    `truncate` no longer undo?


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    cli.add_argument("--device", default=default, help="cpu, cuda, cuda:1, … (%(default)s)")
    cli.add_argument("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    cli.add_argument("--bench", action="store_true", help="also time it against PyTorch's SDPA")
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
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # graphs and timers are of the current one
    torch.manual_seed(args.seed)
    verify_attention(device)
    if device.type == "cuda" and triton is not None:
        verify_kernels(device)
    verify_rope(device)
    verify_layer(device)
    verify_cache(device)
    experiment(args.out / "01_attention.png")
    if args.bench:
        bench(device)
        bench_training(device)
        bench_contexts(device, args.out / "01_attention_contexts.png")
        if device.type == "cuda" and triton is not None:
            bench_kernels(device)


if __name__ == "__main__":
    main()
