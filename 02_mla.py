# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<=2.13", "triton>=3.6; sys_platform == 'linux'", "matplotlib>=3.8", "numpy>=1.26",
# ]
# ///
r"""02 · MLA: cache one short latent a token, and let every head read it.

A token in DeepSeek-V3's cache takes 70,272 bytes over all 61 layers. An MHA of 128 heads of 128
would take 3,997,696: 57 times as much (V3's own heads, rotated channels included: 71). Keys and
values are matrix times latent, so nothing is lost; and nobody has to spell them out, for a matrix
may change sides in a product: q·(W c) = (Wᵀ q)·c.

    x (B,T,C) ─┬─ W_DQ ─ norm ─ W_UQ ─► qᶜ (B,H,T,N) ─ W_UKᵀ ─► (B,H,T,L)
               │             └─ W_QR ─► qᴿ (B,H,T,R) ─ RoPE ──┐    │
               ├─ W_DKV ─ norm ─► c  (B,T,L) ─┐               ▼    ▼
               └─ W_KR ── RoPE ─► kᴿ (B,T,R) ─┴─► LatentCache (B,S,L+R)
                                                              │ softmax (B,H,T,S)
               u (B,T,C) ◄─ W_O ─ (B,H,T,V) ◄─ W_UV ─ Σ p·c ◄─┘

    latent    c = norm(W_DKV x)     kᴿ = RoPE(W_KR x), one for all heads             [2] eq. 1, 3
    query     c' = norm(W_DQ x)     qᶜᵢ = W_UQᵢ c'     qᴿᵢ = RoPE(W_QRᵢ c')          [2] eq. 6–8
    explicit  kᶜᵢ = W_UKᵢ c         vᵢ = W_UVᵢ c                                     [2] eq. 2, 5
              oᵢ = Σⱼ≤ₜ softmaxⱼ(s·(qᶜᵢ·kᶜⱼᵢ + qᴿᵢ·kᴿⱼ)) vⱼᵢ     u = W_O [o₁; …]      [2] eq. 10, 11
    absorbed  qᶜᵢ·W_UKᵢ cⱼ = (W_UKᵢᵀ qᶜᵢ)·cⱼ     Σ pⱼ W_UVᵢ cⱼ = W_UVᵢ Σ pⱼ cⱼ       [1] app. C
    scale     s = m²/√(N+R)         m = 0.1·mscale_all_dim·ln(factor) + 1            [2] §4.3
              RoPE's cos and sin are times (0.1·mscale·ln(factor) + 1)/m, 1 in released models
    i: head, j: key, t: query. ᶜ: content, without position ("nope"), ᴿ: rotated. factor: YaRN [3]
    makes the context so many times as long; without YaRN it is 1, and so is m.

    axis  config name          here  V2-Lite    V3     [1] DeepSeek-V2, arXiv:2405.04434
    B     batch                   2        –     –     [2] DeepSeek-V3, arXiv:2412.19437
    T, S  new tokens, slots      40     160k  160k     [3] YaRN, arXiv:2309.00071
    C     hidden_size            64     2048  7168     [4] Insights into DeepSeek-V3, 2505.09343
    H     num_attention_heads     4       16   128
    Q     q_lora_rank            24     none  1536     The checkpoints keep W_DKV and W_KR in
    L     kv_lora_rank           32      512   512     kv_a_proj_with_mqa, W_UK and W_UV head by
    N     qk_nope_head_dim       16      128   128     head in kv_b_proj, W_UQ and W_QR head by
    R     qk_rope_head_dim        8       64    64     head in q_b_proj (q_proj when there is
    V     v_head_dim             12      128   128     no Q), W_O in o_proj.

Run:  python 02_mla.py [--bench]          10 s on two CPU cores, 17 s with --bench
"""

import argparse
import math
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

try:
    import triton
    from triton import language as tl
except ImportError:  # macOS, Windows: the PyTorch twin does it all
    triton = tl = None

# %% 1. The equations, word for word ---------------------------------------------------------


def yarn_reference(
    dim: int, theta: float, factor=1.0, original_max_position_embeddings=4096,
    beta_fast=32, beta_slow=1,
) -> Tensor:  # fmt: skip
    """[3] §3.2 pair by pair, in float64: count how often a pair turns in the original context."""
    plain = [theta ** (-2 * p / dim) for p in range(dim)]  # past dim/2 too: `high` may lie there
    turns = [original_max_position_embeddings * f / (2 * math.pi) for f in plain]
    low = max((p for p in range(dim) if turns[p] >= beta_fast), default=0)  # last that keeps
    high = min((p for p in range(dim) if turns[p] <= beta_slow), default=dim - 1)  # first slowed
    slow = [0 if p <= low else 1 if p >= high else (p - low) / (high - low) for p in range(dim)]
    blended = [f * (1 - s) + f / factor * s for f, s in zip(plain, slow, strict=True)]
    return torch.tensor(blended[: dim // 2], dtype=torch.float64)


def mla_reference(layer: "MultiHeadLatentAttention", x: Tensor, sizes: dict, yarn: dict) -> Tensor:
    """[2] eq. 1-11 for one sequence x (T, C) in float64: one position, head and key at a time.

    A pair of rotary channels is one complex number. The layer lends its weights and frequencies.
    """
    w = {name.removesuffix(".weight"): tensor for name, tensor in layer.state_dict().items()}
    H, L = sizes["num_attention_heads"], sizes["kv_lora_rank"]
    N, R, V = (sizes[f"{part}_head_dim"] for part in ("qk_nope", "qk_rope", "v"))
    frequencies = layer.frequencies.to(x)
    m, amplitude = 1.0, 1.0
    if yarn:
        m = 0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1
        amplitude = (0.1 * yarn["mscale"] * math.log(yarn["factor"]) + 1) / m

    def norm(z: Tensor, gain: Tensor) -> Tensor:
        return z / (z.square().mean() + 1e-6).sqrt() * gain

    def turned(channels: Tensor, t: int) -> Tensor:
        pairs = torch.complex(channels[0::2], channels[1::2])  # (R/2,)
        return amplitude * pairs * torch.polar(torch.ones_like(frequencies), t * frequencies)

    latents, keys, out = [], [], []
    for t, x_t in enumerate(x):
        down = w["kv_a_proj_with_mqa"] @ x_t  # (L + R,)
        latents.append(norm(down[:L], w["kv_a_layernorm"]))  # eq. 1, the norm from §4.2
        keys.append(turned(down[L:], t))  # eq. 3
        if "q_proj" in w:
            q = w["q_proj"] @ x_t
        else:
            q = w["q_b_proj"] @ norm(w["q_a_proj"] @ x_t, w["q_a_layernorm"])  # eq. 6-8
        heads = []
        for q_i, up in zip(q.view(H, N + R), w["kv_b_proj"].view(H, N + V, L), strict=True):
            q_turned, logits, values = turned(q_i[N:], t), [], []
            for c, k in zip(latents, keys, strict=True):
                content = q_i[:N] @ (up[:N] @ c)  # eq. 2
                position = (q_turned * k.conj()).real.sum()  # Re(q k*): the dot product of pairs
                logits.append((content + position) * m**2 / math.sqrt(N + R))
                values.append(up[N:] @ c)  # eq. 5
            heads.append(torch.stack(logits).softmax(0) @ torch.stack(values))  # eq. 10
        out.append(w["o_proj"] @ torch.cat(heads))  # eq. 11
    return torch.stack(out)


# %% 2. The piece ----------------------------------------------------------------------------
# RoPE must stay out of the latent: turned, q·k would be q·(turn · W_UK c). The turn depends on the
# distance of query and key, so no product of W_UKᵀ and q, made once, could serve all keys. So R
# channels of their own carry the position, and only they are turned.


# >>> copy: LatentCache, mla_decode, MultiHeadLatentAttention (needs torch, math, triton, tl)
from functools import lru_cache


# same as 01_attention.py
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """Turn each pair of channels by the angle of its position (RoFormer, arXiv:2104.09864, eq. 34).

    x: (..., T, R), any float dtype -> the same; cos, sin: (T, R/2), or broadcast to (..., T, R/2).
    interleaved: pairs are (0, 1), (2, 3), … as DeepSeek stores them; else (0, R/2), (1, R/2 + 1), …
    as Llama does.
    """
    axis = -1 if interleaved else -2
    a, b = x.unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(axis)  # (..., T, R/2) each
    return torch.stack((a * cos - b * sin, a * sin + b * cos), axis).flatten(-2).to(x.dtype)


def yarn_frequencies(
    dim: int, theta: float = 10000.0, factor: float = 1.0,
    original_max_position_embeddings: int = 4096, beta_fast: float = 32.0, beta_slow: float = 1.0,
    device=None,
) -> Tensor:  # fmt: skip
    """Radians per position of each pair of channels: (dim/2,) fp32. factor 1 is plain RoPE.

    YaRN (arXiv:2309.00071, §3.2) stretches the context: a pair that turns more than beta_fast times
    within the original one keeps its speed, one that turns less than beta_slow times is slowed by
    `factor`. Between the two the paper blends by the number of turns; all released code, this too,
    by the pair's index. ValueError: dim is odd, factor below 1, or theta of 1 to be stretched.
    """
    if dim % 2 or dim <= 0:
        raise ValueError(f"RoPE turns pairs of channels: {dim} channels are none or odd")
    if factor < 1:
        raise ValueError(f"YaRN stretches a context, by 1 or more: got factor {factor}")
    pair = torch.arange(dim // 2, dtype=torch.float32, device=device)  # (dim/2,)
    plain = 1.0 / theta ** (2 * pair / dim)
    if factor == 1:
        return plain
    if theta <= 1:
        raise ValueError(f"YaRN counts the turns of each pair: want theta > 1, got {theta}")
    context = original_max_position_embeddings

    def pair_that_turns(times: float) -> float:  # context · theta^(−2p/dim) = 2π · times
        return dim * math.log(context / (2 * math.pi * times)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), dim - 1)
    slowed = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)  # 0 keeps, 1 slows
    return plain * (1 - slowed) + plain / factor * slowed


def yarn_mscale(factor: float, mscale: float) -> float:
    """Temperature of a stretched context, 0.1·mscale·ln(factor) + 1 (arXiv:2412.19437, §4.3)."""
    return 0.1 * mscale * math.log(factor) + 1.0


class LatentCache:
    """One layer's memory: of each token the normed latent and the turned key, L + R numbers.

    Slot j holds the token at position j; a query at position i looks at the slots j <= i. That one
    rule is causality, and it hides what is stale, at and past `lengths`: nobody needs to clear it,
    unless it is NaN or infinite, for 0 · NaN is NaN. Unequal prompts: append them right-padded,
    then truncate(prompt_lengths). A rejected draft: truncate again. Not for use inside a
    checkpoint (torch.utils): what is computed again would be appended again.
    """

    pages: Tensor | None = None  # a PagedLatentCache has some

    def __init__(
        self, batch: int, max_tokens: int, kv_lora_rank: int, qk_rope_head_dim: int,
        device=None, dtype=None,
    ):  # fmt: skip
        self.widths, self.room = (kv_lora_rank, qk_rope_head_dim), max_tokens  # (L, R)
        shape = (batch, max_tokens, sum(self.widths))
        self.entries = torch.zeros(shape, device=device, dtype=dtype)  # not empty: 0 · NaN is NaN
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=self.entries.device)  # (B,)
        self.used = 0  # the longest row, as a Python int: asking `lengths` would wait for the GPU
        self.even = True  # do all rows hold `used`? Then no row needs slots or a mask of its own

    def append(self, latent: Tensor, k_rope: Tensor) -> Tensor:
        """latent: (B, T, L), k_rope: (B, T, R), behind each row's last -> all, (B, used, L + R);
        of a PagedLatentCache the pool.

        What comes in another dtype is rounded to the cache's. ValueError: other shapes, no room.
        """
        B, T, (L, R) = len(self.lengths), latent.shape[1], self.widths
        if latent.shape != (B, T, L) or k_rope.shape != (B, T, R):
            got = f"{tuple(latent.shape)} and {tuple(k_rope.shape)}"
            raise ValueError(f"cache takes ({B}, T, {L}) and ({B}, T, {R}), got {got}")
        if self.used + T > self.room:
            raise ValueError(f"cache has {self.room} slots: {self.used} used + {T} new do not fit")
        if self.entries.requires_grad and not self.used:
            self.entries = self.entries.detach()  # cut off the last text's autograd graph
        new = torch.cat((latent, k_rope), -1).to(self.entries.dtype)
        if self.even and self.pages is None:
            self.entries[:, self.used : self.used + T] = new
        else:
            rows = torch.arange(B, device=self.lengths.device)[:, None]  # (B, 1)
            slots = self.lengths[:, None] + torch.arange(T, device=self.lengths.device)  # (B, T)
            self.entries[self.place(rows, slots)] = new
        self.lengths = self.lengths + T  # not +=: the caller may keep the old ones for truncate
        self.used += T
        return self.entries if self.pages is not None else self.entries[:, : self.used]

    def place(self, rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Where in `entries` these slots are, (B, T), all of them the next of their rows (B, 1)."""
        return rows, slots

    def truncate(self, lengths: Tensor | list[int] | int) -> None:
        """Keep the first `lengths` tokens of each row ((B,) or one number), forget the rest."""
        kept = torch.as_tensor(lengths, device=self.lengths.device).expand_as(self.lengths)
        if ((kept < 0) | (kept > self.lengths)).any():
            raise ValueError(f"cannot keep {kept.tolist()} tokens of {self.lengths.tolist()}")
        self.lengths = kept.to(torch.int64, copy=True)
        self.count()

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, (B',) indices that may repeat, or a mask (B,)."""
        self.entries, self.lengths = self.entries[rows], self.lengths[rows]
        self.count()

    def count(self) -> None:
        """`used` and `even` after a change of `lengths`."""
        lengths = self.lengths.tolist()
        self.used, self.even = max(lengths, default=0), len(set(lengths)) < 2


class PagedLatentCache(LatentCache):
    """A LatentCache whose rows take pages of 64 slots from one pool as they grow (2309.06180).

    Slot j of a row is slot j % 64 of entries[pages[row, j // 64]]; entries: (pool, 64, L + R),
    pages: (B, ceil(max_tokens/64)) int32. pool: pages of all rows together; None: enough for B
    full ones. Rows that `select` repeats share their pages, and a page is copied before one of
    several that hold it writes to it. append: ValueError when the pool has too few pages left.
    """

    def __init__(
        self, batch: int, max_tokens: int, kv_lora_rank: int, qk_rope_head_dim: int,
        device=None, dtype=None, pool: int | None = None,
    ):  # fmt: skip
        each = -(-max_tokens // 64)  # pages of a full row
        pool = batch * each if pool is None else pool
        super().__init__(pool, 64, kv_lora_rank, qk_rope_head_dim, device, dtype)
        self.room, self.lengths = max_tokens, self.lengths.new_zeros(batch)
        self.pages = torch.zeros(batch, each, dtype=torch.int32, device=self.entries.device)
        # the pages of each row, how many rows hold a page, and which pages none does
        self.held: list[list[int]] = [[] for _ in range(batch)]
        self.holders, self.free = [0] * pool, list(range(pool))[::-1]
        self.sizes = [0] * batch  # `lengths`, without asking the GPU

    def place(self, rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        T = slots.shape[1]
        spans = [range(n // 64, -(-(n + T) // 64)) if T else range(0) for n in self.sizes]
        pairs = list(zip(self.held, spans, strict=True))
        written = [held[i] for held, span in pairs for i in span if i < len(held)]
        fresh = sum(len(span) for span in spans) - len(written)
        copies = sum(min(written.count(page), self.holders[page] - 1) for page in set(written))
        if fresh + copies > len(self.free):
            free = f"{len(self.free)} of {len(self.holders)} pages are free"
            raise ValueError(f"cache: {free}, the new tokens need {fresh + copies}")
        for held, span in pairs:
            for i in span:
                if i < len(held) and self.holders[held[i]] == 1:
                    continue
                page = self.free.pop()
                self.holders[page] = 1
                if i < len(held):
                    self.entries[page] = self.entries[held[i]]
                    self.holders[held[i]] -= 1
                held[i : i + 1] = [page]
        self.sizes = [n + T for n in self.sizes]
        if fresh + copies:
            self.tabulate()
        return self.pages[rows, slots // 64], slots % 64

    def tabulate(self) -> None:
        each = self.pages.shape[1]
        self.pages.copy_(torch.tensor([held + [0] * (each - len(held)) for held in self.held]))

    def truncate(self, lengths: Tensor | list[int] | int) -> None:
        super().truncate(lengths)
        self.sizes = self.lengths.tolist()
        for held, size in zip(self.held, self.sizes, strict=True):
            self.release(held[-(-size // 64) :])
            del held[-(-size // 64) :]

    def select(self, rows: Tensor) -> None:
        rows = torch.as_tensor(rows, device=self.lengths.device)
        before, chosen = self.held, torch.arange(len(self.held))[rows.cpu()].tolist()
        self.held = [list(before[row]) for row in chosen]
        for page in sum(self.held, []):
            self.holders[page] += 1
        self.release(sum(before, []))
        self.sizes, self.lengths = [self.sizes[row] for row in chosen], self.lengths[rows]
        self.pages = self.pages[rows]
        self.count()

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self.holders[page] -= 1
            if not self.holders[page]:
                self.free.append(page)


def unpaged(entries: Tensor, pages: Tensor, lengths: Tensor | None = None, used=None) -> Tensor:
    """(pool, 64, L + R) by pages (B, P) -> (B, 64·P, L + R), as a LatentCache has them.

    lengths: (B,) tokens of each row, of the longest `used`: no more pages than that takes, and 0
    past a row's end, where the table may lead to pages of other rows.
    """
    if lengths is None:
        return entries[pages].flatten(1, 2)
    rows = entries[pages[:, : -(-used // entries.shape[1])]].flatten(1, 2)
    past = torch.arange(rows.shape[1], device=rows.device) >= lengths[:, None]  # (B, S)
    return rows.masked_fill(past[..., None], 0)


def visible(lengths: Tensor, T: int, S: int) -> Tensor:
    """(B,) tokens of each row, the last T of them the queries -> True where they may look, of S
    slots: (B, 1, T, S)."""
    last = lengths[:, None] - T + torch.arange(T, device=lengths.device)  # (B, T)
    return torch.arange(S, device=lengths.device) <= last[:, None, :, None]


def padded_attention(q: Tensor, k: Tensor, v: Tensor, causal=True, scale=None, mask=None) -> Tensor:
    """F.scaled_dot_product_attention, also where values are narrower than keys.

    q: (B, H, T, D), k: (B, H, S, D), v: (B, H, S, V) -> (B, H, T, V) in q's dtype.
    causal: the queries are the last T of the S positions, and position i sees the keys j <= i.
    mask: True where a query may look, broadcasts to (B, H, T, S); it replaces the causal rule.
    """
    (T, D), (S, V) = q.shape[2:], v.shape[2:]
    if mask is None and causal and T not in (1, S):  # PyTorch's is_causal: the first T of S
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    causal = True if causal and mask is None and T > 1 else False  # under torch.compile, too
    # With V ≠ D a CPU computes and keeps all T·S weights; zeros after v let it work tile by tile.
    # B=8, H=8, T=512, D=48, V=32, forward and backward: 2.2x as fast in fp32, 1.7x in bf16.
    v_wide = F.pad(v, (0, D - V)) if D > V and v.device.type == "cpu" else v
    out = F.scaled_dot_product_attention(q, k, v_wide, mask, 0.0, causal, scale=scale)
    return out[..., :V]


# The kernel. All heads of a token read the same entries, so a program takes many heads: with 16 it
# does 30 operations on each byte that it reads. One token gives a GPU too few programs: the slots
# are cut into chunks as well, and a second kernel combines their softmaxes. The sums of 128 heads
# by 512 channels would fill all registers of an SM: then a program sums a part of the channels.
if triton is not None:

    @triton.jit
    def mla_decode_kernel(
        q, entries, out, lse, lengths, pages, q_b, e_b, e_s, p_b, ROWS, T, chunk, scale,
        PAGE: tl.constexpr, L: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
        LP: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """BM rows (head · T + query) of one sequence over one chunk of its slots; LP channels.

        q_b, e_b, e_s, p_b: strides. scale: of scores in base 2. out, lse: a chunk's of all rows.
        """
        tile, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        part, m = tile % PARTS, tile // PARTS * BM + tl.arange(0, BM)
        mine, r = part * LP + tl.arange(0, LP), L + tl.arange(0, RP)
        q_row, ours = q + b * q_b + m[:, None].to(tl.int64) * (L + R), m[:, None] < ROWS
        q_mine = tl.load(q_row + mine[None, :], mask=ours & (mine[None, :] < L), other=0.0)
        q_rope = tl.load(q_row + r[None, :], mask=ours & (r[None, :] < L + R), other=0.0)
        if PARTS == 2:
            rest = (1 - part) * LP + tl.arange(0, LP)
            q_rest = tl.load(q_row + rest[None, :], mask=ours & (rest[None, :] < L), other=0.0)
        length = tl.load(lengths + b).to(tl.int32)
        seen = length - T + 1 + m % T  # slots that a row's query may look at
        # finite: a chunk may hold no slot that the first of two queries sees
        row_max, row_sum = tl.full((BM,), -1e38, tl.float32), tl.zeros((BM,), tl.float32)
        total = tl.zeros((BM, LP), tl.float32)
        for start in range(split * chunk, tl.minimum(length, (split + 1) * chunk), BN):
            n = start + tl.arange(0, BN)
            if PAGE:
                block = tl.load(pages + b * p_b + start // PAGE).to(tl.int64)
                slot = start % PAGE + tl.arange(0, BN)
            else:
                block, slot = b, n
            row, filled = entries + block * e_b + slot[:, None] * e_s, n[:, None] < length
            latent = tl.load(row + mine[None, :], mask=filled & (mine[None, :] < L), other=0.0)
            rope = tl.load(row + r[None, :], mask=filled & (r[None, :] < L + R), other=0.0)
            scores = tl.dot(q_rope, rope.T, input_precision=PRECISION)  # (BM, BN)
            if PARTS == 2:
                other = tl.load(row + rest[None, :], mask=filled & (rest[None, :] < L), other=0.0)
                scores = tl.dot(q_rest, other.T, scores, input_precision=PRECISION)
            scores = tl.dot(q_mine, latent.T, scores, input_precision=PRECISION)
            scores = tl.where(n[None, :] < seen[:, None], scores * scale, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            weights = tl.math.exp2(scores - new_max[:, None])
            shrink = tl.math.exp2(row_max - new_max)
            row_sum = row_sum * shrink + tl.sum(weights, 1)
            weights = weights.to(latent.dtype)
            total = tl.dot(weights, latent, total * shrink[:, None], input_precision=PRECISION)
            row_max = new_max
        row_sum = tl.where(row_sum > 0, row_sum, 1.0)
        at = (split * tl.num_programs(2) + b) * ROWS + m
        value = (total / row_sum[:, None]).to(out.dtype.element_ty)
        tl.store(out + at[:, None] * L + mine[None, :], value, mask=ours & (mine[None, :] < L))
        tl.store(lse + at, row_max + tl.math.log2(row_sum), mask=m < ROWS)

    @triton.jit
    def mla_combine_kernel(
        parts, lse, out, lengths, ROWS, chunk, L: tl.constexpr, LP: tl.constexpr, SP: tl.constexpr
    ):
        """One row: Σ 2^lse·part / Σ 2^lse over the chunks that its sequence fills, SP at most."""
        row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
        splits = tl.cdiv(tl.load(lengths + row // ROWS).to(tl.int32), chunk)
        s, c = tl.arange(0, SP), tl.arange(0, LP)
        every = tl.load(lse + s * rows + row, mask=s < splits, other=float("-inf"))
        top = tl.max(every, 0)
        whole = top + tl.math.log2(tl.sum(tl.math.exp2(every - top), 0))
        total = tl.zeros((LP,), tl.float32)
        for first in range(0, splits, 8):  # eight at a time: one by one, each waits for memory
            s8 = first + tl.arange(0, 8)
            at = s8 * rows + row
            weight = tl.math.exp2(tl.load(lse + at, mask=s8 < splits, other=-float("inf")) - whole)
            inside = (s8[:, None] < splits) & (c[None, :] < L)
            part = tl.load(parts + at[:, None] * L + c[None, :], mask=inside, other=0.0)
            total += tl.sum(weight[:, None] * part, 0)
        tl.store(out + row * L + c, total.to(out.dtype.element_ty), mask=c < L)

    @triton.jit
    def by_head_kernel(
        x, weight, out, x_b, x_h, x_t, w_h, w_o, w_i, out_b, out_h, out_t, T, O, I,
        BO: tl.constexpr, BI: tl.constexpr,
    ):  # fmt: skip
        """BO of the O numbers of W[h] x[b, h, t], one row and head; all where strides say."""
        row, h, o = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) * BO
        b, t, o = (row // T).to(tl.int64), row % T, o + tl.arange(0, BO)
        x_row, matrix = x + b * x_b + h * x_h + t * x_t, weight + h * w_h
        total = tl.zeros((BO, BI), tl.float32)
        for start in range(0, I, BI):
            i = start + tl.arange(0, BI)
            inside = (o[:, None] < O) & (i[None, :] < I)
            w = tl.load(matrix + o[:, None] * w_o + i[None, :] * w_i, mask=inside, other=0.0)
            row_part = tl.load(x_row + i, mask=i < I, other=0.0)
            total += w.to(tl.float32) * row_part[None, :].to(tl.float32)
        value = tl.sum(total, 1).to(out.dtype.element_ty)
        tl.store(out + b * out_b + h * out_h + t * out_t + o, value, mask=o < O)


# The same for tiles of 64 rows on Hopper, warp by warp in Gluon, Triton's lower language; --bench
# times both. 512 channels of sums are too many registers for one group of warps: two share them.
# One of the two also scores and hands its weights over, another warp loads, and each goes on as
# soon as it has what it needs: the helper multiplies while the scorer is at the next scores.
try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    try:
        from triton.experimental.gluon.language import barrier
    except ImportError:  # Triton 3.6 calls it so
        from triton.experimental.gluon.language import thread_barrier as barrier
    try:
        from triton.experimental.gluon.language.nvidia.hopper.tma import async_load
    except ImportError:  # Triton 3.6 and 3.7 call it so
        from triton.experimental.gluon.language.nvidia.hopper.tma import (
            async_copy_global_to_shared as async_load,
        )
    HAS_GLUON = True
except ImportError:  # no Triton, or one without these: the kernel above does it all
    HAS_GLUON = False

if HAS_GLUON:

    @gluon.jit
    def publish(bar):
        """What these warps wrote is there for wgmma and for other warps."""
        fence_async_shared()
        barrier()
        mbarrier.arrive(bar, count=1)

    @gluon.jit
    def vacate(bar):
        """What wgmma has read may be replaced: all these warps saw it end, and one tells."""
        barrier()
        mbarrier.arrive(bar, count=1)

    @gluon.jit
    def clear_past(part, filled):
        """Zeros in the rows past a sequence's end: 0 · NaN is NaN, and nobody clears a cache."""
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        rows = gl.arange(0, 64, gl.SliceLayout(1, layout))
        for c in gl.static_range(4):
            piece = part.slice(c * 64, 64, dim=1)
            values = piece.load(layout)
            piece.store(gl.where(rows[:, None] < filled, values, gl.zeros_like(values)))
        fence_async_shared()
        barrier()

    @gluon.jit
    def hopper_loader(
        boxes, buffers, bars, pages, b, q_at, e_rows, first, steps, PAGE: gl.constexpr
    ):
        """The queries, then 64 entries a step, as soon as their place is free."""
        q_wide, q_narrow, e_wide, e_narrow = boxes
        q_low, q_high, q_rope, low, high, rope = buffers
        q_full, full, empty, _, _ = bars
        mbarrier.expect(q_full, 64 * 576 * 2)
        async_load(q_narrow, [q_at, 512], q_full, q_rope)
        async_load(q_wide, [q_at, 0], q_full, q_low)
        async_load(q_wide, [q_at, 256], q_full, q_high)
        for i in range(steps):
            start, stage, turn = first + i * 64, i & 1, (i >> 1) & 1
            if PAGE:
                at = gl.load(pages + start // PAGE).to(gl.int32) * e_rows + start % PAGE
            else:
                at = b * e_rows + start
            # rope is free after a step's scores, low and high after its sums
            mbarrier.wait(empty.index(stage), turn ^ 1)
            mbarrier.expect(full.index(stage), 64 * 64 * 2)
            async_load(e_narrow, [at, 512], full.index(stage), rope.index(stage))
            mbarrier.wait(empty.index(2 + stage), turn ^ 1)
            mbarrier.expect(full.index(2 + stage), 64 * 256 * 2)
            async_load(e_wide, [at, 0], full.index(2 + stage), low.index(stage))
            mbarrier.wait(empty.index(4 + stage), turn ^ 1)
            mbarrier.expect(full.index(4 + stage), 64 * 256 * 2)
            async_load(e_wide, [at, 256], full.index(4 + stage), high.index(stage))

    @gluon.jit
    def hopper_scorer(
        buffers, weights_at, shrink_at, bars, out, lse, at, m, T, length, first, steps, scale
    ):  # fmt: skip
        """Scores of 64 rows and 64 slots a step, weights of them, and sums of half the channels."""
        q_low, q_high, q_rope, low, high, rope = buffers
        q_full, full, empty, ready, taken = bars
        dtype: gl.constexpr = low.dtype
        square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
        wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
        left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
        of_row: gl.constexpr = gl.SliceLayout(1, square)
        n = gl.arange(0, 64, gl.SliceLayout(0, square))
        r = gl.arange(0, 64, of_row)
        seen = length - T + 1 + (m + r) % T  # slots that a row's query may look at
        row_max = gl.full((64,), -1e38, gl.float32, of_row)
        row_sum = gl.zeros((64,), gl.float32, of_row)
        total = gl.zeros((64, 256), gl.float32, wide)
        mbarrier.wait(q_full, 0)
        for i in range(steps):
            start, stage, turn = first + i * 64, i & 1, (i >> 1) & 1
            scores = gl.zeros((64, 64), gl.float32, square)
            mbarrier.wait(full.index(stage), turn)
            scores = warpgroup_mma(
                q_rope, rope.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True
            )
            mbarrier.wait(full.index(2 + stage), turn)
            scores = warpgroup_mma(q_low, low.index(stage).permute((1, 0)), scores, is_async=True)
            mbarrier.wait(full.index(4 + stage), turn)
            scores = warpgroup_mma(q_high, high.index(stage).permute((1, 0)), scores, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            vacate(empty.index(stage))
            if start + 64 > length - T + 1:  # a row's end may be here
                inside = (start + n)[None, :] < seen[:, None]
                scores = gl.where(inside, scores, gl.full_like(scores, float("-inf")))
            new_max = gl.maximum(row_max, gl.max(scores, 1) * scale)
            weights = gl.exp2(scores * scale - new_max[:, None])
            shrink = gl.exp2(row_max - new_max)
            row_sum = row_sum * shrink + gl.sum(weights, 1)
            row_max = new_max
            rounded = weights.to(dtype)
            mbarrier.wait(taken, (i & 1) ^ 1)
            weights_at.store(rounded)
            shrink_at.store(shrink)
            publish(ready)
            total *= gl.convert_layout(shrink, gl.SliceLayout(1, wide))[:, None]
            if start + 64 > length:
                clear_past(low.index(stage), length - start)
            total = warpgroup_mma(
                gl.convert_layout(rounded, left), low.index(stage), total, is_async=True
            )
            total = warpgroup_mma_wait(0, deps=[total])
            vacate(empty.index(2 + stage))
        row_sum = gl.where(row_sum > 0, row_sum, 1.0)
        mbarrier.wait(taken, (steps & 1) ^ 1)
        shrink_at.store(1 / row_sum)
        publish(ready)
        gl.store(lse + at + r, row_max + gl.log2(row_sum))
        total *= gl.convert_layout(1 / row_sum, gl.SliceLayout(1, wide))[:, None]
        write_half(out + at * 512, total, wide)

    @gluon.jit
    def hopper_helper(buffers, weights_at, shrink_at, bars, out, at, length, first, steps):
        """The sums of the other half, by the weights that it is handed."""
        q_low, q_high, q_rope, low, high, rope = buffers
        q_full, full, empty, ready, taken = bars
        wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
        of_row: gl.constexpr = gl.SliceLayout(1, wide)
        total = gl.zeros((64, 256), gl.float32, wide)
        for i in range(steps):
            start, stage, turn = first + i * 64, i & 1, (i >> 1) & 1
            mbarrier.wait(full.index(4 + stage), turn)
            mbarrier.wait(ready, i & 1)
            total *= shrink_at.load(of_row)[:, None]
            if start + 64 > length:  # the scorer is done with these rows
                clear_past(high.index(stage), length - start)
            total = warpgroup_mma(weights_at, high.index(stage), total, is_async=True)
            total = warpgroup_mma_wait(0, deps=[total])
            vacate(taken)
            mbarrier.arrive(empty.index(4 + stage), count=1)
        mbarrier.wait(ready, steps & 1)
        total *= shrink_at.load(of_row)[:, None]
        write_half(out + at * 512 + 256, total, wide)

    @gluon.jit
    def write_half(out, total, layout: gl.constexpr):
        rows = gl.arange(0, 64, gl.SliceLayout(1, layout))
        c = gl.arange(0, 256, gl.SliceLayout(0, layout))
        gl.store(out + rows[:, None] * 512 + c[None, :], total.to(out.dtype.element_ty))

    @gluon.jit
    def mla_hopper_kernel(
        q_wide, q_narrow, e_wide, e_narrow, out, lse, lengths, pages, p_b, e_rows, ROWS, T, chunk,
        scale, PAGE: gl.constexpr,
    ):  # fmt: skip
        """64 rows of one sequence over one chunk of its slots, 64 slots a step:

        loader  (1 warp)   entries ─ TMA ─► rope, low, high   two stages, each part freed by itself
        scorer  (4 warps)  S = Q Kᵀ ─► softmax ─► P, shrink ─┬─► P · channels 0–255
        helper  (4 warps)                                    └─► P · channels 256–511

        q_wide, q_narrow, e_wide, e_narrow: `boxes_of` queries and entries, of which a sequence or
        page begins every e_rows. The rest is `mla_decode_kernel`'s.
        """
        m, split, b = gl.program_id(0) * 64, gl.program_id(1), gl.program_id(2)
        length = gl.load(lengths + b).to(gl.int32)
        first = split * chunk
        steps = gl.maximum(gl.minimum(length, first + chunk) - first + 63, 0) // 64
        at = (split * gl.num_programs(2) + b).to(gl.int64) * ROWS + m
        dtype: gl.constexpr = e_wide.dtype
        flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        q_low = gl.allocate_shared_memory(dtype, [64, 256], q_wide.layout)
        q_high = gl.allocate_shared_memory(dtype, [64, 256], q_wide.layout)
        q_rope = gl.allocate_shared_memory(dtype, [64, 64], q_narrow.layout)
        low = gl.allocate_shared_memory(dtype, [2, 64, 256], e_wide.layout)
        high = gl.allocate_shared_memory(dtype, [2, 64, 256], e_wide.layout)
        rope = gl.allocate_shared_memory(dtype, [2, 64, 64], e_narrow.layout)
        weights_at = gl.allocate_shared_memory(dtype, [64, 64], e_narrow.layout)
        shrink_at = gl.allocate_shared_memory(gl.float32, [64], flat)
        q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        full = gl.allocate_shared_memory(gl.int64, [6, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [6, 1], mbarrier.MBarrierLayout())
        ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(q_full, count=1)
        mbarrier.init(ready, count=1)
        mbarrier.init(taken, count=1)
        for i in gl.static_range(6):  # rope's two stages, low's, high's
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=1)
        fence_async_shared()
        boxes = (q_wide, q_narrow, e_wide, e_narrow)
        buffers = (q_low, q_high, q_rope, low, high, rope)
        bars = (q_full, full, empty, ready, taken)
        q_at, table = b * ROWS + m, pages + b.to(gl.int64) * p_b
        gl.warp_specialize(
            [
                (hopper_scorer, (
                    buffers, weights_at, shrink_at, bars, out, lse, at, m, T, length, first, steps,
                    scale,
                )),
                (hopper_helper, (
                    buffers, weights_at, shrink_at, bars, out, at, length, first, steps,
                )),
                (hopper_loader, (boxes, buffers, bars, table, b, q_at, e_rows, first, steps, PAGE)),
            ],
            [4, 1], [240, 24],  # warps of helper and loader, registers a thread; the scorer's: 240
        )  # fmt: skip


def fits_hopper(q: Tensor, entries: Tensor, kv_lora_rank: int, scale: float) -> bool:
    """Whether `mla_hopper_kernel` takes it: V3's widths, whole tiles of rows, what TMA can read."""
    (_, H, T, width), (e_b, e_s, _) = q.shape, entries.stride()
    return (
        HAS_GLUON and gpu(q.device)[0] == (9, 0)
        and entries.dtype in (torch.bfloat16, torch.float16)
        and (kv_lora_rank, width) == (512, 576) and H * T % 64 == 0 and scale > 0
        and e_s >= width and e_s % 8 == 0 and e_b % e_s == 0
        and q.data_ptr() % 16 == entries.data_ptr() % 16 == 0
    )  # fmt: skip


def boxes_of(x: Tensor) -> list:
    """For TMA: the rows of x, (B, S, 576), all B in one list, by 64 x 256 and by 64 x 64."""
    (B, S, width), (x_b, x_s, _) = x.shape, x.stride()
    rows, swizzled = (B - 1) * (x_b // x_s) + S, gl.NVMMASharedLayout(128, 16, 2)
    return [GluonDescriptor(x, [rows, width], [x_s, 1], [64, n], swizzled) for n in (256, 64)]


def decode_config(
    rows: int, L: int, itemsize: int, capability: tuple[int, int], paged: bool = False
) -> tuple:
    """(BM, BN, warps, stages, parts of L, programs an SM holds); rows: heads · queries.

    The tests compile each for sm_80 to sm_120 and find nothing spilt, but 128 bytes at 32 rows on
    Hopper: twice the warps spill none, and are slower.
    """
    halves = 2 if L > 256 else 1
    if itemsize == 4:
        return 16, 16, 8, 1, 1, 1
    if capability[0] not in (8, 9, 10) or capability in ((8, 6), (8, 9)):  # 99 KB
        return (16, 32, 4, 2, 1, 1) if rows <= 16 else (32, 16, 8, 2, 1, 1)
    if capability[0] == 9 and 16 < rows <= 32:
        return 32, 64, 4, 2, 1, 2
    if capability[0] == 9 and rows <= 16 and not paged:  # paged: two programs, as below
        return 16, 64, 4, 3, 1, 1
    if rows <= 16:  # waits for memory: two programs take turns
        return (16, 32, 4, 2, 1, 2) if capability[0] == 8 else (16, 64, 4, 2, 1, 2)
    if rows <= 32:
        return (32, 32, 8, 2, 1, 1) if capability[0] == 8 else (32, 64, 8, 2, 1, 1)
    if capability[0] == 10:
        return 64, 32, 8, 2, 1, 1
    if capability[0] == 8 or rows <= 64:
        return 64, 32, 8, 2, halves, 1
    return 128, 32, 8, 2, halves, 1  # two groups of warps, 64 rows each: what wgmma wants


@lru_cache
def split_count(programs: int, blocks: int, at_a_time: int) -> int:
    """Into how many chunks of two blocks or more to cut a sequence: as many as make all rounds of
    programs end after the fewest blocks."""
    steps = lambda n: triton.cdiv(programs * n, at_a_time) * triton.cdiv(blocks, n)
    return min(range(1, 1 + max(1, min(blocks // 2, 4 * at_a_time // programs))), key=steps)


# same as 01_attention.py
@lru_cache
def gpu(device: torch.device) -> tuple[tuple[int, int], int]:
    """Its compute capability and how many SMs it has, asked for once."""
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count


def launch_decode(q, entries, kv_lora_rank: int, scale: float, lengths, pages, config) -> Tensor:
    """`mla_decode` by its kernels: as many chunks as keep the GPU busy, of 128 slots or more; in
    fp32, where the tensor cores are not exact enough to help, of 32.

    config: of `mla_decode_kernel`; None: `mla_hopper_kernel`, which has one shape.
    """
    BM, BN, warps, stages, parts, each = config or (64, 64, 4, 2, 1, 1)
    (B, H, T, width), L, PAGE = q.shape, kv_lora_rank, 0 if pages is None else entries.shape[1]
    S, R, ROWS = pages.shape[1] * PAGE if PAGE else entries.shape[1], width - L, H * T
    q, lengths = q.to(entries.dtype).contiguous(), lengths.contiguous()
    pages = None if pages is None else pages.contiguous()
    programs, block = triton.cdiv(ROWS, BM) * parts * B, 16 if entries.itemsize == 4 else 64
    at_a_time, blocks = each * (gpu(q.device)[1] if q.is_cuda else 132), triton.cdiv(S, block)
    splits = split_count(programs, blocks, at_a_time)
    chunk = triton.cdiv(S, splits * block) * block
    splits = triton.cdiv(S, chunk)
    out = torch.empty(B, H, T, L, dtype=entries.dtype, device=q.device)
    pieces = out if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)
    lse = out.new_empty(splits, B, ROWS, dtype=torch.float32)
    LP, padded = triton.next_power_of_2(L), triton.next_power_of_2
    grid, (e_b, e_s, _) = (programs // B, splits, B), entries.stride()
    p_b, scale = 0 if pages is None else pages.stride(0), scale * 1.4426950408889634
    with torch.cuda.device_of(q):  # Triton launches on the current GPU, whatever q says
        if config is None:
            mla_hopper_kernel[grid](
                *boxes_of(q.flatten(1, 2)), *boxes_of(entries), pieces, lse, lengths,
                lengths if pages is None else pages, p_b, e_b // e_s, ROWS, T, chunk, scale,
                PAGE=PAGE, num_warps=warps,
            )  # fmt: skip
        else:
            mla_decode_kernel[grid](
                q, entries, pieces, lse, lengths, pages, q.stride(0), e_b, e_s, p_b, ROWS, T,
                chunk, scale, PAGE=PAGE, L=L, R=R, PARTS=parts, LP=max(16, LP // parts),
                RP=max(16, padded(R)), BM=BM, BN=BN, PRECISION="ieee", num_warps=warps,
                num_stages=stages,
            )  # fmt: skip
        if splits > 1:
            mla_combine_kernel[(B * ROWS,)](
                pieces, lse, out, lengths, ROWS, chunk, L=L, LP=LP, SP=padded(splits)
            )
    return out


def chunked_decode(rows: Tensor, entries: Tensor, chunks: int, scale: float) -> Tensor:
    """What the kernels do, on a CPU, whose SDPA leaves all heads of a token to one of its threads:
    chunks of slots side by side, then their sum, each by the share of the softmax that it holds.

    rows: (B, 1, H·T, L + R), entries: (B, 1, S, L + R) -> (B, 1, H·T, L + R).
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # SDPA's, which returns LSE
    whole = entries.shape[2] // chunks * chunks
    kv = entries[:, 0, :whole].unflatten(1, (chunks, -1))  # (B, chunks, S/chunks, L + R)
    rest = entries[:, :, whole:]
    parts = [flash(rows.expand(-1, chunks, -1, -1), kv, kv, scale=scale)]
    if rest.shape[2]:  # slots that are left over: fewer than there are chunks
        parts.append(flash(rows, rest, rest, scale=scale))
    # (B, chunks or one more, H·T, L + R), and without its last axis in fp32 or wider
    out, lse = (torch.cat(both, 1) for both in zip(*parts, strict=True))
    return (lse.softmax(1)[..., None] * out).sum(1, keepdim=True).to(out.dtype)


def mla_decode(
    q: Tensor, entries: Tensor, kv_lora_rank: int, scale: float, mask: Tensor | None = None,
    lengths: Tensor | None = None, pages: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of all heads to the same entries: whole as keys, without their last R as values.

    q: (B, H, T, L + R), entries: (B, S, L + R) -> (B, H, T, L) in the entries' dtype; L is
    kv_lora_rank. lengths: (B,) tokens of each row, T to S, the last T of them the queries; each
    sees what is before it, and itself. None: everything. mask: True where a query may look,
    broadcasts to (B, H, T, S), instead of lengths. pages: (B, P) int, then entries are a pool
    (pages, 64, L + R), and slot j of row b is slot j % 64 of entries[pages[b, j // 64]].

    On a GPU by kernels (FlashDecoding: chunks of slots, then their sum; the same bits at every
    run) where no mask and no gradient is asked for; else by their PyTorch twin, which is SDPA,
    in chunks too for one query token and long caches of few, equal rows. Under autocast the twin's
    result takes that dtype, and a cache of another is cast at every step; the kernels keep to the
    cache's.
    """
    (B, H, T, width), size = q.shape, entries.shape[1]
    S = size if pages is None else pages.shape[1] * size
    if entries.shape[-1] != width or len(entries if pages is None else pages) != B:
        got = f"{tuple(q.shape)} and {tuple(entries.shape)}, pages {pages is not None}"
        raise ValueError(f"want (B, H, T, L + R) and (B, S, L + R) or pages (B, P); got {got}")
    if mask is not None and lengths is not None:
        raise ValueError("want a mask or lengths, got both")
    if lengths is not None and lengths.shape != (B,):
        raise ValueError(f"want lengths ({B},), one a row, got {tuple(lengths.shape)}")
    differentiable = torch.is_grad_enabled() and (q.requires_grad or entries.requires_grad)
    fits = triton is not None and kv_lora_rank <= 512 and width - kv_lora_rank <= 64
    fits = fits and (pages is None or size % 64 == 0) and entries.stride(-1) == 1
    fits = fits and q.numel() > 0 and S > 0 and B < 2**16
    fits = fits and (not q.is_cuda or gpu(q.device)[0] >= (8, 0))
    if q.is_cuda and lengths is None and mask is None and T == 1:
        lengths = q.new_full((B,), S, dtype=torch.int64)
    if q.is_cuda and fits and lengths is not None and not differentiable and entries.itemsize <= 4:
        config = None
        if not fits_hopper(q, entries, kv_lora_rank, scale):
            place, paged = gpu(q.device)[0], pages is not None
            config = decode_config(H * T, kv_lora_rank, entries.itemsize, place, paged)
        return launch_decode(q, entries, kv_lora_rank, scale, lengths, pages, config)
    if pages is not None:
        longest = None if lengths is None else max(lengths.tolist(), default=0)
        entries = unpaged(entries, pages, lengths, longest)
    if lengths is not None:
        mask = visible(lengths, T, entries.shape[1])
    # all heads are queries of one, (B, 1, H·T, L + R), and a block of entries, (B, 1, S, L + R), is
    # read for all of them
    rows, entries = q.to(entries.dtype).flatten(1, 2)[:, None].contiguous(), entries[:, None]
    if mask is not None:
        mask = mask.expand(B, H, T, entries.shape[2]).flatten(1, 2)[:, None]
    plain = mask is None and not (differentiable or torch.is_autocast_enabled(q.device.type))
    threads = 1 if torch.compiler.is_compiling() else torch.get_num_threads()
    chunks = min(threads // max(B, 1), S // 1024)
    if q.device.type == "cpu" and plain and chunks > 1 and q.numel() and entries.stride(-1) == 1:
        out = chunked_decode(rows, entries, chunks, scale)
    else:
        out = F.scaled_dot_product_attention(rows, entries, entries, mask, scale=scale)
    # (B, 1, H·T, L + R): of the values the last R are none, but to slice them off first would copy
    return out[:, 0, :, :kv_lora_rank].unflatten(1, (H, -1))  # (B, H, T, L)


def few_rows_on_gpu(q: Tensor) -> bool:
    """(B, H, T, …) of a model that decodes: so few rows (4: two texts and their drafts; not tuned)
    that to multiply them is to read the weights."""
    fits = triton is not None and q.is_cuda and q.itemsize <= 4 and q.numel() > 0
    return fits and q.shape[0] * q.shape[2] <= 4 and not torch.is_grad_enabled()


def by_head(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """out[b, h, t] = weight[h] x[b, h, t], by a kernel that reads all three where they lie.

    x: (B, H, T, I), weight: (H, O, I), out: (B, H, T, O); the last axes of x and out are dense.
    """
    (B, H, T, I), O = x.shape, weight.shape[1]
    grid, strides = (B * T, H, triton.cdiv(O, 32)), (t.stride()[:3] for t in (x, weight, out))
    with torch.cuda.device_of(x):
        by_head_kernel[grid](x, weight, out, *sum(strides, ()), T, O, I, BO=32, BI=32)
    return out


class MultiHeadLatentAttention(nn.Module):
    """Causal attention that caches L + R numbers a token (V3, arXiv:2412.19437, eq. 1-11).

    x: (B, T, C) -> (B, T, C). With a cache the T tokens stand behind what each row already holds.
    q_lora_rank: width of the queries' own latent; None: a plain q_proj (V2-Lite, Moonlight).
    rope_scaling: None, or YaRN as released configs spell it: {"type": "yarn", "factor": 40,
        "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0, …}.
    rope_interleave: the layout of rotary channels, see `apply_rope`.
    linear: class of all projections but kv_b_proj: the absorbed form never calls it, but splits its
        weight by head. So what wraps it, as LoRA does, has to be merged into the weight.
    attention: a function with the signature of `padded_attention`, for the explicit form.
    """

    def __init__(
        self, hidden_size: int, num_attention_heads: int, kv_lora_rank: int,
        qk_nope_head_dim: int, qk_rope_head_dim: int, v_head_dim: int,
        q_lora_rank: int | None = None, rope_theta: float = 10000.0,
        rope_scaling: dict | None = None, rope_interleave: bool = True,
        linear=nn.Linear, attention=None,
    ):  # fmt: skip
        super().__init__()
        C, H, Q, L = hidden_size, num_attention_heads, q_lora_rank, kv_lora_rank
        N, R, V = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.heads, self.q_lora_rank, self.interleaved = H, Q, rope_interleave
        self.latent_split, self.q_split, self.kv_split = (L, R), (N, R), (N, V)
        self.attention = attention or padded_attention
        if Q is None:
            self.q_proj = linear(C, H * (N + R), bias=False)
        else:
            self.q_a_proj = linear(C, Q, bias=False)
            self.q_a_layernorm = nn.RMSNorm(Q, eps=1e-6)  # 1e-6 in all models, whatever their eps
            self.q_b_proj = linear(Q, H * (N + R), bias=False)
        self.kv_a_proj_with_mqa = linear(C, L + R, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(L, eps=1e-6)
        self.kv_b_proj = nn.Linear(L, H * (N + V), bias=False)
        self.o_proj = linear(H * V, C, bias=False)

        yarn = dict(rope_scaling or {})
        kinds = {str(yarn.pop(key)) for key in ("type", "rope_type") if key in yarn}
        mscale, all_dim = yarn.pop("mscale", 1.0), yarn.pop("mscale_all_dim", 0.0)
        known = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
        if kinds - {"yarn"}:
            raise ValueError(f"rope_scaling of type {', '.join(kinds)}: only yarn is known")
        if yarn.keys() - known:
            raise ValueError(f"rope_scaling: unknown {', '.join(sorted(yarn.keys() - known))}")
        if rope_scaling and "factor" not in yarn:
            raise ValueError(f"rope_scaling has no factor: {rope_scaling}")
        for name, value in {"mscale": mscale, "mscale_all_dim": all_dim, **yarn}.items():
            if (
                not isinstance(value, int | float)
                or not 0 <= value < math.inf
                or (name in known and value == 0)
            ):
                raise ValueError(f"rope_scaling: {name} must be a number > 0, got {value!r}")
        self.rope = {"dim": R, "theta": rope_theta, **yarn}
        # A plain attribute: .to(bfloat16) would round a buffer, a meta device would empty it.
        self.frequencies = yarn_frequencies(**self.rope)  # (R/2,)
        factor = yarn.get("factor", 1.0)
        m = yarn_mscale(factor, all_dim)
        self.scale = (N + R) ** -0.5 * m**2  # of the whole logit, also of its part without RoPE
        self.amplitude = yarn_mscale(factor, mscale) / m  # of cos and sin; 1 in released models

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions: (..., T) -> cos, sin: (..., T, R/2), in fp32 for a narrower dtype."""
        if self.frequencies.device != positions.device:
            self.frequencies = yarn_frequencies(**self.rope, device=positions.device)
        wide = torch.promote_types(dtype, torch.float32)
        angles = positions[..., None].to(wide) * self.frequencies.to(wide)
        return angles.cos() * self.amplitude, angles.sin() * self.amplitude

    def normed(self, norm: nn.RMSNorm, x: Tensor) -> Tensor:
        """In the weight's dtype: under autocast the two differ, and a CPU takes 10x as long."""
        return norm(x.to(norm.weight.dtype)).to(x.dtype)

    def positions(self, x: Tensor, cache: LatentCache | None) -> Tensor:
        """Of x's tokens, behind what the cache holds: (T,), or (B, T) where its rows differ."""
        B, T, _ = x.shape
        if cache is not None and len(cache.lengths) != B:
            raise ValueError(f"cache has {len(cache.lengths)} rows, x has {B}")
        begin = cache.used if cache is not None and cache.even else 0
        positions = torch.arange(begin, begin + T, device=x.device)  # (T,)
        even = cache is None or cache.even
        return positions if even else cache.lengths[:, None] + positions

    def query_latent(self, x: Tensor) -> Tensor:
        """Eq. 6: x (B, T, C) -> the queries' own latent (B, T, Q); without one, x itself."""
        if self.q_lora_rank is None:
            return x
        return self.normed(self.q_a_layernorm, self.q_a_proj(x))

    def queries(self, q_low: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 7-9: what `query_latent` gave -> no position (B, H, T, N), turned (B, H, T, R)."""
        q = self.q_proj(q_low) if self.q_lora_rank is None else self.q_b_proj(q_low)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, N + R)
        q_nope, q_rope = q.split(self.q_split, -1)
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # (1, T, R/2) or (B, 1, T, R/2)
        return q_nope, apply_rope(q_rope, cos, sin, self.interleaved)

    def latents(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 1 and 3: x (B, T, C) -> normed latent (B, T, L), turned key (B, T, R)."""
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(self.latent_split, -1)
        latent_normed = self.normed(self.kv_a_layernorm, latent)  # the key has no norm
        return latent_normed, apply_rope(k_rope, cos, sin, self.interleaved)

    def explicit(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Eq. 2-5 and 10: spell out each head's keys and values -> (B, H, T, V)."""
        kv = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = kv.split(self.kv_split, -1)  # (B, H, S, N), (B, H, S, V)
        k_shared = k_rope[:, None].expand(-1, self.heads, -1, -1)  # (B, H, S, R)
        q, k = torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_shared), -1)
        return self.attention(q, k, v, causal=mask is None, scale=self.scale, mask=mask)

    def absorbed(
        self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, lengths=None, pages=None,
        decode=mla_decode,
    ) -> Tensor:  # fmt: skip
        """V2 app. C: W_UK joins the query, W_UV waits for the sum -> the same (B, H, T, V).

        W_UQ and W_UK stay two matrices: their product would be Q·L numbers a head, not Q·N + N·L.
        decode: attention to the entries, called as `mla_decode` is.
        """
        B, H, T, _ = q_nope.shape
        w = self.kv_b_proj.weight.to(q_nope.dtype).unflatten(0, (H, -1))  # (H, N + V, L)
        w_uk, w_uv = w.split(self.kv_split, 1)  # (H, N, L), (H, V, L)
        (L, R), few = self.latent_split, few_rows_on_gpu(q_nope)
        if few:
            q = q_nope.new_empty(B, H, T, L + R)
            by_head(q_nope, w_uk.mT, q[..., :L])  # w_uk turned: (H, L, N)
            q[..., L:] = q_rope
        else:
            q_latent = q_nope.transpose(0, 1).flatten(1, 2) @ w_uk  # (H, B·T, L)
            q_latent = q_latent.unflatten(1, (B, T)).transpose(0, 1)  # (B, H, T, L)
            q = torch.cat((q_latent, q_rope), -1)  # (B, H, T, L + R)
        mixed = decode(q, entries, L, self.scale, lengths=lengths, pages=pages)  # (B, H, T, L)
        mixed = mixed.to(q.dtype)
        if few:  # (B, H, T, V), lying as (B, T, H, V): so o_proj wants it
            return by_head(mixed, w_uv, q.new_empty(B, T, H, w_uv.shape[1]).transpose(1, 2))
        # the weight on the left: turned round, bf16 takes 4x as long on a CPU
        out = w_uv @ mixed.transpose(0, 1).flatten(1, 2).mT  # (H, V, B·T)
        return out.unflatten(-1, (B, T)).permute(2, 0, 3, 1)

    @property
    def absorb_below(self) -> float:
        """New tokens, to a long cache, below which the absorbed form needs fewer operations.

        A head spends on a slot L·(N + V) to expand it and N + R + V a query; absorbed, 2L + R.
        """
        (L, _), (N, V) = self.latent_split, self.kv_split
        return L * (N + V) / (2 * L - N - V) if 2 * L > N + V else math.inf

    def forward(
        self, x: Tensor, cache: LatentCache | None = None, absorb: bool | None = None
    ) -> Tensor:
        """absorb: which form; None: absorbed for a few tokens on top of others, else explicit.

        Gradients flow through either, and through one call with a cache that was empty.
        """
        B, T, _ = x.shape
        cos, sin = self.cos_sin(self.positions(x, cache), x.dtype)  # (T, R/2) or (B, T, R/2)
        q_nope, q_rope = self.queries(self.query_latent(x), cos, sin)
        latent, k_rope = self.latents(x, cos, sin)
        entries = pages = None
        if cache is not None:
            entries, pages = cache.append(latent, k_rope), cache.pages  # (B, S, L + R)
        # where all rows began empty, the plain causal kernel will do
        continued = cache is not None and cache.used > T
        if absorb is None:
            absorb = continued and T < self.absorb_below
        lengths = x.new_full((B,), T, dtype=torch.int64) if cache is None else cache.lengths
        if absorb:
            if entries is None:
                entries = torch.cat((latent, k_rope), -1)
            elif T == 1 and cache.even and pages is None and not x.is_cuda:
                lengths = None  # it sees all there is (a GPU's kernel wants them all the same)
            out = self.absorbed(q_nope, q_rope, entries, lengths, pages)  # (B, H, T, V)
        else:
            mask = visible(lengths, T, cache.used) if continued else None
            if entries is not None:
                if pages is not None:
                    entries = unpaged(entries, pages, lengths, cache.used)[:, : cache.used]
                latent, k_rope = entries.to(latent.dtype).split(self.latent_split, -1)
            out = self.explicit(q_nope, q_rope, latent, k_rope, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


# <<< copy
# %% 3. Is it right? -------------------------------------------------------------------------
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "kv_lora_rank": 32}
SIZES |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
V2_LITE = {"hidden_size": 2048, "num_attention_heads": 16, "kv_lora_rank": 512}
V2_LITE |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
V3 = {**V2_LITE, "hidden_size": 7168, "num_attention_heads": 128, "q_lora_rank": 1536}
# Of the 4 pairs one keeps its speed, two are blended; T = 40 is well past the original context.
STRETCH = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2, "beta_slow": 0.1}
YARN = {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.7, **STRETCH}


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


def random_layer(device: torch.device, **arguments) -> MultiHeadLatentAttention:
    """In float64, its norms random too: a gain of one could sit anywhere."""
    layer = MultiHeadLatentAttention(**SIZES, rope_theta=100.0, **arguments)
    for parameter in layer.to(device, torch.float64).parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def verify_forms(device: torch.device) -> None:
    """Explicit against the equations, absorbed against explicit."""
    x = torch.randn(2, 40, 64, dtype=torch.float64).to(device)
    settings = ("plain q_proj", None, {}), ("q-LoRA", 24, {}), ("q-LoRA, YaRN", 24, YARN)
    for name, Q, yarn in settings:
        layer = random_layer(device, q_lora_rank=Q, rope_scaling=yarn)
        equations = torch.stack([mla_reference(layer, row, SIZES, yarn) for row in x])
        check(f"explicit = equations, {name}", layer(x, absorb=False), equations, EXACT)
        check(f"absorbed = explicit, {name}", layer(x, absorb=True), layer(x, absorb=False), EXACT)


def verify_layouts(device: torch.device) -> None:
    """Interleaved channels against half-split ones: the same layer once its rows are in order."""
    x = torch.randn(2, 40, 64, dtype=torch.float64).to(device)
    layer = random_layer(device, q_lora_rank=24, rope_scaling=YARN)
    other = random_layer(device, q_lora_rank=24, rope_scaling=YARN, rope_interleave=False)
    other.load_state_dict(layer.state_dict())
    order = torch.arange(8, device=device).view(-1, 2).T.flatten()  # [0, 2, 4, 6, 1, 3, 5, 7]
    q_rows = other.q_b_proj.weight.data.view(4, 24, 24)[:, 16:]  # (H, R, Q), a view
    k_rows = other.kv_a_proj_with_mqa.weight.data[32:]  # (R, C), a view
    q_rows[:], k_rows[:] = q_rows[:, order], k_rows[order]
    check("half-split = interleaved, rows permuted", other(x), layer(x), EXACT)


@torch.no_grad()
def verify_cache(device: torch.device) -> None:
    """Prefill in two parts of any size, then token by token; then two rows of unequal length."""
    x = torch.randn(2, 40, 64, dtype=torch.float64).to(device)
    layer = random_layer(device, q_lora_rank=24, rope_scaling=YARN)
    full, runs = layer(x), []
    for first in range(1, 39, 4):
        second = (40 - first) // 2
        sizes = [first, second] + [1] * (40 - first - second)
        for absorb in (None, False):
            cache = LatentCache(2, 40, 32, 8, device, x.dtype)
            parts = [layer(part, cache, absorb) for part in x.split(sizes, dim=1)]
            runs.append(torch.cat(parts, dim=1))
    want = full.expand(len(runs), -1, -1, -1)
    check("prefill in any split + decode = one pass", torch.stack(runs), want, EXACT)
    cache, prompts = LatentCache(2, 45, 32, 8, device, x.dtype), x.clone()
    prompts[0, 28:], prompts[1, 4:] = 5.0, 5.0  # padding that would show
    layer(prompts, cache)
    cache.truncate([28, 4])  # what comes later is now stale
    new, want = (torch.stack([t[0, 28:33], t[1, 4:9]]) for t in (x, full))  # (2, 5, C)
    check("rows of unequal length = each alone", layer(new, cache), want, EXACT)
    paged = PagedLatentCache(2, 128, 32, 8, device, x.dtype, pool=3)
    layer(prompts, paged)
    paged.truncate([28, 4])
    paged.select(torch.tensor([0, 1, 0], device=device))  # row 2 shares row 0's page until now
    check(
        "in pages of 64, one of them shared at first",
        layer(new[[0, 1, 0]], paged),
        want[[0, 1, 0]],
        EXACT,
    )


def verify_kernels(device: torch.device) -> None:
    """`mla_decode` by kernels against its twin in float64: unequal rows, several chunks.

    bf16 goes to a Hopper's own; it rounds an output between 2 and 4 by up to 2^-7, and the weights.
    """
    for H, name, dtype, tol in (
        (16, "fp32", torch.float32, 1e-5),
        (64, "bf16", torch.bfloat16, 2e-2),
    ):
        for kind in (LatentCache, PagedLatentCache):
            cache = kind(2, 900, 512, 64, device, dtype)
            cache.append(*(torch.randn(2, 900, width, device=device) for width in (512, 64)))
            cache.truncate([900, 65])
            # two tokens: MTP's draft is verified so
            q = torch.randn(2, H, 2, 576, device=device, dtype=dtype)
            where = {"lengths": cache.lengths, "pages": cache.pages}
            got, want = (
                mla_decode(t, u, 512, 0.05, **where)
                for t, u in ((q, cache.entries), (q.double(), cache.entries.double()))
            )
            check(f"decode kernel's output, {name}, {kind.__name__}", got, want, tol)


def verify_numbers(device: torch.device) -> None:
    """YaRN pair by pair, and what can be worked by hand for the released models."""
    fast = torch.tensor([[1.0, 0.925, 0.55, 0.1, 0.025]])  # of pairs 10, 11, 16, 22, 31
    stretched, plain = (yarn_frequencies(64, factor=f, device=device) for f in (40.0, 1.0))
    ratio = (stretched / plain)[None, [10, 11, 16, 22, 31]].cpu()
    check("YaRN slows pairs 10 11 16 22 31 of 32, V3", ratio, fast, 1e-6)  # fp32: 2^-23 each
    for settings in (64, 1e4, 40.0), (8, 100.0, *STRETCH.values()):
        got, want = yarn_frequencies(*settings, device=device), yarn_reference(*settings)
        name = f"YaRN frequencies = pair by pair, R={settings[0]}"
        check(name, got.cpu() / want, torch.ones_like(want), 1e-6)
    scales = []
    for mscale in (None, 1.0, 0.707):  # Moonlight, V3, V2-Lite: the same 128 + 64 channels
        yarn = mscale and {"factor": 40, "mscale": mscale, "mscale_all_dim": mscale}
        with torch.device("meta"):
            scales.append(MultiHeadLatentAttention(**V3, rope_scaling=yarn).scale)
    by_hand = torch.tensor([[0.0721688, 0.1352338, 0.1147214]], dtype=torch.float64)
    got = torch.tensor([scales], dtype=torch.float64)
    check("softmax scale: no YaRN, V3, V2-Lite", got, by_hand, 5e-8)  # 7 digits given
    with torch.device("meta"):  # shapes without memory
        layer = MultiHeadLatentAttention(**V3)
    count = torch.tensor(sum(parameter.numel() for parameter in layer.parameters()))
    check("parameters of V3's layer: 187,107,328", count, torch.tensor(187_107_328), 0)
    size = torch.tensor(LatentCache(1, 1, 512, 64).entries.numel())
    check("elements of a cached token at V3's size: 576", size, torch.tensor(576), 0)


# %% 4. What does it buy? --------------------------------------------------------------------
# Memory first, beside the published numbers.
# fmt: off
PUBLISHED = {  # layers, numbers a token and layer; thousands of what are published where
    "v2_lite":        ( 27,         576, "15.6",    "elements, [1] table 9"),
    "v2":             ( 60,         576, "34.6",    "elements, [1] table 9"),
    "v3":             ( 61,         576, "70.272",  "bytes, [4] table 1"),
    "qwen2_5_72b":    ( 80, 2 * 8 * 128, "327.680", "bytes, [4] table 1"),
    "llama_3_1_405b": (126, 2 * 8 * 128, "516.096", "bytes, [4] table 1"),
}
# fmt: on


def memory() -> None:
    """Bytes of a cached token over all layers, bf16; the last two are GQA with 8 groups of 128."""
    ours, theirs = [], []
    for name, (layers, numbers, thousands, what) in PUBLISHED.items():
        size = 2 * layers * numbers
        unit = 2 if what.startswith("elements") else 1  # bytes
        ours.append(round(size / unit / 1e3, len(thousands.partition(".")[2])))
        theirs.append(float(thousands))
        text = f"= {size:,} B, {layers} layers   {thousands}K {what}"
        measure(f"kv_bytes_per_token_{name}", size, text)
    got, want = (torch.tensor(values, dtype=torch.float64) for values in (ours, theirs))
    check("cache of a token = published, to its digits", got, want, 0)


# Now time. A decoded token reads all of the cache once, so the bytes of a slot set the least time.
# More operations on a byte than the machine does while it reads one take longer. MHA does 1: it
# waits for memory. Absorbed MLA reads a seventh of the bytes and does 30 operations on each (242
# with V3's 128 heads: an H800 at FlashMLA's 660 TFLOP/s reads and computes equally long at 197):
# it spends what processors have to spare. The two products with W_UK and W_UV cost the same at any
# context, so short ones favour MHA. Code that caches latents and expands all of them again at every
# step does 3,650 operations on a byte and is slower than MHA at every context: the cache shrank,
# the work did not.


def race(
    tasks: dict[str, Callable], device: torch.device, rounds: int = 9, graphs: bool = True
) -> dict[str, float]:
    """Median milliseconds of each task; every round runs them all, so drift hits all alike.

    On a GPU by CUDA graphs, as a server would run them (Python takes longer to launch a kernel than
    it runs), and with nothing of it in L2 from the last time.
    """
    if device.type == "cuda" and graphs:
        return race_of_graphs(tasks, rounds)
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds + 1):
        for name, task in tasks.items():
            begin = time.perf_counter()
            task()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # [0]: warm-up


def race_of_graphs(tasks: dict[str, Callable], rounds: int) -> dict[str, float]:
    graphs, times = {name: torch.cuda.CUDAGraph() for name in tasks}, {name: [] for name in tasks}
    for name, task in tasks.items():
        task()  # compiles its kernels
        with torch.cuda.graph(graphs[name]):
            task()
    other = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # more than any L2 holds
    for _ in range(rounds):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            other.zero_()
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_attention(q, k, v, causal=True, scale=None, mask=None, keys_left=False) -> Tensor:
    """One query token, q: (B, H, 1, D), by two products; keys_left: the first one transposed."""
    q = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3) * (scale or q.shape[-1] ** -0.5)
    scores = (k @ q.mT).mT if keys_left else q @ k.mT  # (B, G, H/G, S), q: (B, G, H/G, D)
    return (scores.softmax(-1) @ v).flatten(1, 2).unsqueeze(2)  # (B, H, 1, V)


def matmul_decode(q, entries, kv_lora_rank, scale, **everything) -> Tensor:
    """`mla_decode` of one query token as MHA's fastest rival does it: bf16 rounds the scores."""
    k = entries[:, None]
    return matmul_attention(q, k, k, scale=scale, keys_left=True)[..., :kv_lora_rank]


def rows_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads of a group as rows of one query, as in `mla_decode`."""
    rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, G, H/G, D)
    return F.scaled_dot_product_attention(rows, k, v).flatten(1, 2).unsqueeze(2)


OPERATIONS = {  # of the attention part on one slot of the cache: bytes, flop
    "MHA": (8192, 2 * 16 * 256),
    "GQA-2": (1024, 2 * 16 * 256),
    "MLA re-expanded": (1152, 2 * 512 * 16 * 256 + 2 * 16 * (192 + 128)),
    "MLA absorbed": (1152, 2 * 16 * (576 + 512)),
}
PRODUCTS = {"matmul": matmul_attention, "keys left": partial(matmul_attention, keys_left=True)}
RIVALS = {  # which is fastest depends on dtype, heads and context: each kind of head takes its best
    "SDPA": partial(F.scaled_dot_product_attention, enable_gqa=True),
    "SDPA by groups": rows_attention,
    **PRODUCTS,
}


def decode_tasks(S: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    """The attention part of one token, from a head's query to its output, 16 heads of 128."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    tasks = {}
    for kind, G in ("MHA", 16), ("GQA-2", 2):
        q, k, v = random(1, 16, 1, 128), random(1, G, S, 128), random(1, G, S, 128)
        tasks |= {f"{kind}: {name}": partial(rival, q, k, v) for name, rival in RIVALS.items()}
    for kind, decode in ("absorbed", mla_decode), ("rounded", matmul_decode):
        layer = MultiHeadLatentAttention(**V2_LITE, attention=matmul_attention).to(device, dtype)
        q, entries = (random(1, 16, 1, 128), random(1, 16, 1, 64)), random(1, S, 576)
        tasks[f"MLA {kind}: "] = partial(layer.absorbed, *q, entries, decode=decode)
    latents = entries.split((512, 64), -1)
    tasks["MLA re-expanded: "] = partial(layer.explicit, *q, *latents, None)
    return tasks


def roof(device: torch.device) -> tuple[float, float]:
    """GB/s of a copy and Gflop/s of a square product in bf16, as measured here and now."""
    large = device.type == "cuda"
    a = torch.empty(2**30 if large else 2**27, dtype=torch.uint8, device=device)
    b, m = torch.zeros_like(a), 8192 if large else 1536
    x = torch.randn(m, m, device=device).bfloat16()
    tasks = {"copy": lambda: a.copy_(b), "product": lambda: x @ x}
    ms = race(tasks, device, rounds=3, graphs=False)  # they leave a copy to a slower engine
    return 2 * a.numel() / ms["copy"] / 1e6, 2 * m**3 / ms["product"] / 1e6


def fastest(times: dict[str, float]) -> dict[str, tuple[float, str]]:
    """{"kind: rival": ms} -> {kind: (ms, rival)} of its best rival."""
    best: dict[str, tuple[float, str]] = {}
    for name, ms in times.items():
        kind, rival = name.split(": ")
        best[kind] = min(best.get(kind, (math.inf, "")), (ms, rival))
    return best


@torch.no_grad()
def decoding(device: torch.device, out: Path) -> None:
    """Milliseconds a token against context for four kinds of attention, bf16; then the figure."""
    contexts = [128 * 2**i for i in range(8)]  # 128 … 16k
    curves: dict[str, list[float]] = {}
    for S in contexts:
        tasks = decode_tasks(S, device, torch.bfloat16)
        del tasks["MLA rounded: "]
        slow = {name: tasks.pop(name) for name in list(tasks) if "re-expanded" in name}
        times = race(tasks, device) | race(slow, device, rounds=2)  # so slow that two tell
        for kind, (ms, _) in fastest(times).items():
            curves.setdefault(kind, []).append(ms)
    points = {}
    for kind, (size, flop) in OPERATIONS.items():
        text = f"ms   a slot: {size:,} B, {flop:,} flop, {flop / size:,.0f} flop/B"
        name = kind.lower().replace(" ", "_").replace("-", "")
        measure(f"decode_16k_{name}_ms", curves[kind][-1], text)
        points[kind] = flop / size, flop * contexts[-1] / curves[kind][-1] / 1e6  # Gflop/s
    faster = [m < h for m, h in zip(curves["MLA absorbed"], curves["MHA"], strict=True)]
    if faster[-1]:
        first = max((i + 1 for i, less in enumerate(faster) if not less), default=0)
        measure("crossover_context", contexts[first], "tokens: from here on absorbed MLA beats MHA")
    bandwidth, peak = roof(device)
    measure("copy_bandwidth", bandwidth, "GB/s, read and written: the slope of the roof")
    measure("matmul_peak", peak, "Gflop/s in bf16: the roof")
    draw(contexts, curves, points, (bandwidth, peak), out)
    print(f"figure   {out}")


def draw(contexts: list[int], curves: dict, points: dict, roof: tuple, out: Path) -> None:
    """Left: a token's attention part against context. Right: the last of each, under the roof."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook hands down its own, which may be missing here
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for kind, ms in curves.items():
        left.plot(contexts, ms, "s--" if kind == "MLA re-expanded" else "o-", label=kind)
        last = f"{ms[-1]:,.1f}" if ms[-1] >= 1 else f"{ms[-1]:.2g}"
        left.annotate(f"  {last} ms", (contexts[-1], ms[-1]), va="center")
        right.plot(*points[kind], "s" if kind == "MLA re-expanded" else "o", ms=9)
        side = "right" if points[kind][0] > 1e3 else "left"
        right.annotate(f"  {kind}  ", points[kind], va="top", ha=side)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xticks(contexts, [f"{S // 1024}k" if S >= 1024 else str(S) for S in contexts])
    left.set_xlim(right=contexts[-1] * 2.2)
    left.set(xlabel="context (tokens)", ylabel="attention part of one token, one layer (ms)")
    left.legend(title="16 heads, V2-Lite's sizes, bf16")
    bandwidth, peak = roof
    right.plot([0.5, peak / bandwidth, 2e4], [0.5 * bandwidth, peak, peak], "k-", lw=1)
    right.annotate(f"{bandwidth:,.0f} GB/s", (1, bandwidth), ha="right", va="bottom")
    right.annotate(f"{peak:,.0f} Gflop/s", (2e4, peak), ha="right", va="bottom")
    right.set(xscale="log", yscale="log", xlabel="operations on a byte of cache", ylabel="Gflop/s")
    right.set_title("the same at 16k, under the roof of this machine")
    mha, absorbed, expanded = (curves[k][-1] for k in ("MHA", "MLA absorbed", "MLA re-expanded"))
    title = f"A token at 16k: absorbed MLA takes 1/{mha / absorbed:.1f} of MHA's time, "
    figure.suptitle(f"{title}re-expanded {expanded / mha:.0f}x")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)


# %% 5. How fast? ----------------------------------------------------------------------------
# The time of the attention part includes the products with W_UK and W_UV. A whole layer also reads
# all its projections for every token: 13.8M weights here, 16.8M in MHA.
# fp32 doubles the bytes of either; MHA, which waits for them, feels that more than absorbed MLA,
# which spends 30 operations on one of bf16, 15 on one of fp32. Without AMX the fastest MHA in bf16
# is two plain products, and their scores are rounded to bf16; those of `mla_decode` are fp32. So
# there is a second ratio: MLA by two plain products, against MHA by the same.


class HeadsWithCache:
    """A whole MHA layer on a full cache of S slots, without RoPE: nothing it could save on."""

    def __init__(self, S: int, attention: Callable, device: torch.device, dtype: torch.dtype):
        self.projections = [
            nn.Linear(2048, 2048, bias=False, device=device, dtype=dtype) for _ in "qkvo"
        ]
        self.k, self.v = torch.randn(2, 1, 16, S, 128, device=device, dtype=dtype)
        self.attention = attention

    def __call__(self, x: Tensor) -> Tensor:
        q_proj, k_proj, v_proj, o_proj = self.projections
        q, k, v = (p(x).view(1, 16, 1, 128) for p in (q_proj, k_proj, v_proj))
        self.k[:, :, -1:], self.v[:, :, -1:] = k, v  # its last slot
        return o_proj(self.attention(q, self.k, self.v).flatten(1)[:, None])


@torch.no_grad()
def bench(device: torch.device, S: int = 8192) -> None:
    """One token at 8k context, batch 1, against the fastest rival: attention part, whole layer."""
    for dtype in (torch.bfloat16, torch.float32):
        tasks = decode_tasks(S, device, dtype)
        del tasks["MLA re-expanded: "]
        if dtype is torch.float32:
            del tasks["MLA rounded: "]
        best = fastest(times := race(tasks, device))
        (mine, _), (theirs, rival) = best["MLA absorbed"], best["MHA"]
        name = "bf16" if dtype is torch.bfloat16 else "fp32"
        bar = "   our goal: 2x" if dtype is torch.bfloat16 and device.type == "cpu" else ""
        text = f"x   MHA {theirs:.3g} ms ({rival}) / MLA {mine:.3g} ms{bar}"
        measure(f"absorbed_ratio_{name}", theirs / mine, text)
        if dtype is torch.bfloat16:
            ms, alike = best["MLA rounded"][0], min(times[f"MHA: {name}"] for name in PRODUCTS)
            text = f"x   MHA {alike:.3g} ms / MLA {ms:.3g} ms, the scores of both rounded to bf16"
            measure("absorbed_ratio_bf16_scores", alike / ms, text)

        layer = MultiHeadLatentAttention(**V2_LITE).to(device, dtype)
        cache = LatentCache(1, S, 512, 64, device, dtype)
        cache.append(*(torch.randn(1, S, w, device=device, dtype=dtype) for w in (512, 64)))
        heads = HeadsWithCache(S, RIVALS[rival], device, dtype)
        x = torch.randn(1, 1, 2048, device=device, dtype=dtype)

        before = cache.lengths - 1

        def decode(layer=layer, cache=cache, x=x, before=before) -> None:
            cache.lengths, cache.used = before, S - 1  # truncate, which no CUDA graph may ask for
            layer(x, cache)

        ms = race({"MLA": decode, "MHA": partial(heads, x)}, device)
        text = f"x   MHA {ms['MHA']:.3g} ms / MLA {ms['MLA']:.3g} ms"
        measure(f"layer_ratio_{name}", ms["MHA"] / ms["MLA"], text)


@torch.no_grad()
def bench_kernels(device: torch.device, S: int = 8192) -> None:
    """`mla_decode` where it waits for memory and where it computes, by CUDA graphs."""
    ms_of = partial(triton.testing.do_bench_cudagraph, return_mode="median")
    bandwidth, _ = roof(device)
    for H, B, T in (16, 64, 1), (16, 64, 2), (128, 128, 1), (128, 32, 2):
        make = partial(torch.randn, device=device, dtype=torch.bfloat16)
        q, pool = make(B, H, T, 576), make(B * S // 64, 64, 576)
        pages = torch.randperm(len(pool), device=device).view(B, -1).to(torch.int32)
        lengths = torch.full((B,), S, device=device)
        decode = partial(mla_decode, q, kv_lora_rank=512, scale=0.07, lengths=lengths)
        plain = ms_of(partial(decode, entries=pool.view(B, S, 576)))
        paged = ms_of(partial(decode, entries=pool, pages=pages))
        speed = 2 * B * H * T * S * (576 + 512) / plain / 1e9
        share = pool.numel() * 2 / plain / 1e6 / bandwidth
        text = f"TFLOP/s, {plain:.3f} ms, {share:.0%} of the copy bandwidth; {paged:.3f} ms paged"
        if fits_hopper(q, pool, 512, 0.07):
            config = decode_config(H * T, 512, 2, (9, 0))
            call = partial(launch_decode, q, pool.view(B, S, 576), 512, 0.07, lengths, None)
            text += f"; {ms_of(partial(call, config=config)):.3f} by mla_decode_kernel"
            del call
        measure(f"mla_decode_{H}_heads_{T}_queries_batch_{B}", speed, text)
        del pool, decode
    B, H = 64, 16
    for kind, G, D in ("MHA", 16, 128), ("GQA-8", 8, 128), ("MLA_explicit", 16, 192):
        q, k, v = make(B, H, 1, D), make(B, G, S, D), make(B, G, S, 128)
        padded = F.pad(v, (0, D - 128))
        ms = ms_of(partial(F.scaled_dot_product_attention, q, k, padded, enable_gqa=G < H))
        text = f"ms   16 heads, batch {B}, {S} slots, by SDPA"
        measure(f"decode_{kind.replace('-', '_')}_ms", ms, text)


# %% Exercises -------------------------------------------------------------------------------
# 1. Break it: take `* m**2` out of `self.scale`. Which check stops the chapter, and why could a
#    prompt of one token never show it? Put m² back and leave out `* self.amplitude` instead.
# 2. Turn q_nope and k_nope too, in the explicit form. Why can no `absorbed` follow? Write down the
#    matrix that would have to stand between c and the query, and what it depends on.
# 3. GQA with 2 groups caches about as much as MLA and is faster in the figure. Count its operations
#    on a slot: why? Then read [1] app. D: what does it give up that MLA keeps?


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    cli.add_argument("--device", default=default, help="cpu, cuda, cuda:1, … (%(default)s)")
    cli.add_argument("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    cli.add_argument("--bench", action="store_true", help="also time it against plain MHA")
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
    verify_forms(device)
    verify_layouts(device)
    verify_cache(device)
    if device.type == "cuda" and triton is not None:
        verify_kernels(device)
    verify_numbers(device)
    memory()
    decoding(device, args.out / "02_mla.png")
    if args.bench:
        bench(device)
        if device.type == "cuda" and triton is not None:
            bench_kernels(device)


if __name__ == "__main__":
    main()
