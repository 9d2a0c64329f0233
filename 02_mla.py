# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11,<=2.13", "matplotlib>=3.8", "numpy>=1.26"]
# ///
r"""02 · MLA: cache one short latent a token, and let every head read it.

A token in DeepSeek-V3's cache takes 70,272 bytes over all 61 layers. The keys and values of its 128
heads would take 3,997,696: 57 times as much. They are matrix times latent, so nothing is lost; and
nobody has to spell them out, for a matrix may change sides in a product: q·(W c) = (Wᵀ q)·c.

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

Run:  python 02_mla.py [--bench]          10 s on two CPU cores, 12 s with --bench
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
# RoPE must stay out of the latent: a turn between W_UQ and W_UK, another one for each distance,
# would keep W_UK from changing sides. So R channels carry the position, and only they are turned.


# >>> copy: yarn_frequencies, LatentCache, mla_decode, MultiHeadLatentAttention (needs torch, math)
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
    by the pair's index. ValueError: dim is odd, or factor below 1.
    """
    if dim % 2 or dim <= 0:
        raise ValueError(f"RoPE turns pairs of channels: {dim} channels are none or odd")
    if factor < 1:
        raise ValueError(f"YaRN stretches a context, by 1 or more: got factor {factor}")
    pair = torch.arange(dim // 2, dtype=torch.float32, device=device)  # (dim/2,)
    plain = 1.0 / theta ** (2 * pair / dim)
    if factor == 1:
        return plain
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
    rule is causality, and it hides what is stale, at and past `lengths`: nobody needs to clear it.
    Unequal prompts: append them right-padded, then truncate(prompt_lengths). A rejected draft:
    truncate again.
    """

    def __init__(
        self, batch: int, max_tokens: int, kv_lora_rank: int, qk_rope_head_dim: int,
        device=None, dtype=None,
    ):  # fmt: skip
        self.widths = (kv_lora_rank, qk_rope_head_dim)  # (L, R)
        shape = (batch, max_tokens, sum(self.widths))
        self.entries = torch.zeros(shape, device=device, dtype=dtype)  # not empty: 0 · NaN is NaN
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=self.entries.device)  # (B,)
        self.used = 0  # the longest row, as a Python int: asking `lengths` would wait for the GPU

    def append(self, latent: Tensor, k_rope: Tensor) -> Tensor:
        """latent: (B, T, L), k_rope: (B, T, R), behind each row's last -> all, (B, used, L + R).

        What comes in another dtype is rounded to the cache's. ValueError: other shapes, no room.
        """
        (B, room, _), T, (L, R) = self.entries.shape, latent.shape[1], self.widths
        if latent.shape != (B, T, L) or k_rope.shape != (B, T, R):
            got = f"{tuple(latent.shape)} and {tuple(k_rope.shape)}"
            raise ValueError(f"cache takes ({B}, T, {L}) and ({B}, T, {R}), got {got}")
        if self.used + T > room:
            raise ValueError(f"cache has {room} slots: {self.used} used + {T} new do not fit")
        rows = torch.arange(B, device=self.lengths.device)[:, None]  # (B, 1)
        slots = self.lengths[:, None] + torch.arange(T, device=self.lengths.device)  # (B, T)
        self.entries[rows, slots] = torch.cat((latent, k_rope), -1).to(self.entries.dtype)
        self.lengths = self.lengths + T  # not +=: the caller may keep the old ones for truncate
        self.used += T
        return self.entries[:, : self.used]

    def truncate(self, lengths: Tensor | list[int] | int) -> None:
        """Keep the first `lengths` tokens of each row ((B,) or one number), forget the rest."""
        kept = torch.as_tensor(lengths, device=self.lengths.device).expand_as(self.lengths)
        if ((kept < 0) | (kept > self.lengths)).any():
            raise ValueError(f"cannot keep {kept.tolist()} tokens of {self.lengths.tolist()}")
        self.lengths, self.used = kept.to(torch.int64, copy=True), int(kept.max())

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, (B',) indices that may repeat, or a mask (B,)."""
        self.entries, self.lengths = self.entries[rows], self.lengths[rows]


def padded_attention(q: Tensor, k: Tensor, v: Tensor, causal=True, scale=None, mask=None) -> Tensor:
    """F.scaled_dot_product_attention, also where values are narrower than keys.

    q: (B, H, T, D), k: (B, H, S, D), v: (B, H, S, V) -> (B, H, T, V) in q's dtype.
    causal: the queries are the last T of the S positions, and position i sees the keys j <= i.
    mask: True where a query may look, broadcasts to (B, H, T, S); it replaces the causal rule.
    """
    (T, D), (S, V) = q.shape[2:], v.shape[2:]
    if mask is None and causal and T not in (1, S):  # PyTorch's is_causal: the first T of S
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    causal = causal and mask is None and T > 1
    # With V ≠ D a CPU computes and keeps all T·S weights; zeros behind v let it work tile by tile.
    # B=8, H=8, T=512, D=48, V=32, forward and backward: 2.2x as fast in fp32, 1.7x in bf16.
    v_wide = F.pad(v, (0, D - V)) if D > V and v.device.type == "cpu" else v
    out = F.scaled_dot_product_attention(q, k, v_wide, mask, 0.0, causal, scale=scale)
    return out[..., :V]


def mla_decode(
    q: Tensor, entries: Tensor, kv_lora_rank: int, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Attention of all heads to the same entries: whole as keys, without their last R as values.

    q: (B, H, T, L + R), entries: (B, S, L + R) -> (B, H, T, L) in the entries' dtype; L is
    kv_lora_rank. mask: True where a query may look, broadcasts to (B, H, T, S); None: everywhere.
    This is the PyTorch twin that a Triton kernel will stand beside; bf16 entries make bf16 scores.
    Under autocast the products run in its dtype: a cache of another is cast at every step.
    """
    H, rows = q.shape[1], q.to(entries.dtype).flatten(1, 2)  # (B, H·T, L + R)
    # Entries on the left: a CPU takes six times as long over 16 bf16 rows times a long transpose.
    # beta=0: what the first argument holds is never read. alpha scales before a bf16 score rounds.
    scores = torch.baddbmm(rows.new_empty(()), entries, rows.mT, beta=0, alpha=scale)
    scores = scores.mT.unflatten(1, (H, -1))  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).flatten(1, 2)  # (B, H·T, S): summed in fp32 whatever the width
    out = weights @ entries  # (B, H·T, L + R): the R are wasted, but slicing first would copy
    return out[..., :kv_lora_rank].unflatten(1, (H, -1))  # (B, H, T, L)


class MultiHeadLatentAttention(nn.Module):
    """Causal attention that caches L + R numbers a token (V3, arXiv:2412.19437, eq. 1-11).

    x: (B, T, C) -> (B, T, C). With a cache the T tokens stand behind what each row already holds.
    q_lora_rank: width of the queries' own latent; None: a plain q_proj (V2-Lite, Moonlight).
    rope_scaling: None, or YaRN as released configs spell it: {"type": "yarn", "factor": 40,
        "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0, …}.
    rope_interleave: the layout of rotary channels, see `apply_rope`.
    linear: class of all projections but kv_b_proj, whose weight the absorbed form splits by head.
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
        kinds = {yarn.pop(key) for key in ("type", "rope_type") if key in yarn}
        mscale, all_dim = yarn.pop("mscale", 1.0), yarn.pop("mscale_all_dim", 0.0)
        known = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
        if kinds - {"yarn"}:
            raise ValueError(f"rope_scaling of type {', '.join(kinds)}: only yarn is known")
        if yarn.keys() - known:
            raise ValueError(f"rope_scaling: unknown {', '.join(sorted(yarn.keys() - known))}")
        if rope_scaling and "factor" not in yarn:
            raise ValueError(f"rope_scaling has no factor: {rope_scaling}")
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

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 6-9: x (B, T, C) -> without position (B, H, T, N), turned (B, H, T, R)."""
        if self.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.normed(self.q_a_layernorm, self.q_a_proj(x)))
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
        self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, mask: Tensor | None
    ) -> Tensor:
        """V2 app. C: W_UK joins the query, W_UV waits for the sum -> the same (B, H, T, V).

        W_UQ and W_UK stay two matrices: their product would be Q·L numbers a head, not Q·N + N·L.
        """
        B, H, T, _ = q_nope.shape
        w = self.kv_b_proj.weight.to(q_nope.dtype).unflatten(0, (H, -1))  # (H, N + V, L)
        w_uk, w_uv = w.split(self.kv_split, 1)  # (H, N, L), (H, V, L)
        q_latent = q_nope.transpose(0, 1).flatten(1, 2) @ w_uk  # (H, B·T, L)
        q_latent = q_latent.unflatten(1, (B, T)).transpose(0, 1)  # (B, H, T, L)
        q = torch.cat((q_latent, q_rope), -1)  # (B, H, T, L + R)
        mixed = mla_decode(q, entries, self.latent_split[0], self.scale, mask)  # (B, H, T, L)
        by_head = mixed.to(q.dtype).transpose(0, 1).flatten(1, 2)  # (H, B·T, L)
        out = w_uv @ by_head.mT  # (H, V, B·T); turned round, bf16 takes 4x as long on a CPU
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
        """absorb: which form; None: absorbed for a few tokens behind a filled cache, else explicit.

        Gradients flow through either, and through one call with a cache that was empty.
        """
        B, T, _ = x.shape
        positions, mask, entries = torch.arange(T, device=x.device), None, None  # (T,)
        if cache is not None:
            if len(cache.lengths) != B:
                raise ValueError(f"cache has {len(cache.lengths)} rows, x has {B}")
            positions = cache.lengths[:, None] + positions  # (B, T)
        cos, sin = self.cos_sin(positions, x.dtype)  # (T, R/2) or (B, T, R/2)
        q_nope, q_rope = self.queries(x, cos, sin)
        latent, k_rope = self.latents(x, cos, sin)
        if cache is not None:
            entries = cache.append(latent, k_rope)  # (B, S, L + R)
            if cache.used > T:  # else all rows began empty, and the plain causal kernel will do
                slots = torch.arange(cache.used, device=x.device)
                mask = slots <= positions[:, None, :, None]  # (B, 1, T, S)
        if absorb is None:
            absorb = mask is not None and T < self.absorb_below
        if absorb:
            if entries is None:
                entries = torch.cat((latent, k_rope), -1)
            if mask is None:
                mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
            out = self.absorbed(q_nope, q_rope, entries, mask)  # (B, H, T, V)
        else:
            if entries is not None:
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
    error = (got.double() - want.double()).abs().max().item()
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
    cache.truncate([28, 4])  # what lies behind is now stale
    new, want = (torch.stack([t[0, 28:33], t[1, 4:9]]) for t in (x, full))  # (2, 5, C)
    check("rows of unequal length = each alone", layer(new, cache), want, EXACT)


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


# Now time. A decoded token reads all of the cache once, so the bytes of a slot set the floor, and
# the operations on each byte say how far above it one ends up. MHA does 1: it waits for memory.
# Absorbed MLA reads a seventh of the bytes and does 30 on each (242 with V3's 128 heads; an H800
# balances at about 258, by FlashMLA's numbers): it pays in what processors have to spare. The two
# products with W_UK and W_UV cost the same at any context, so short ones favour MHA. Code that
# caches latents and expands all of them again at every step does 3,650 operations on a byte and is
# slower than MHA at every context: the cache shrank, the work did not.


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


def matmul_attention(q, k, v, causal=True, scale=None, mask=None, keys_left=False) -> Tensor:
    """One query token, q: (B, H, 1, D), by two products; keys_left is what `mla_decode` does."""
    q = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3) * (scale or q.shape[-1] ** -0.5)
    scores = (k @ q.mT).mT if keys_left else q @ k.mT  # (B, G, H/G, S), q: (B, G, H/G, D)
    return (scores.softmax(-1) @ v).flatten(1, 2).unsqueeze(2)  # (B, H, 1, V)


RIVALS = {  # which is fastest depends on dtype, heads and context: each kind of head takes its best
    "SDPA": partial(F.scaled_dot_product_attention, enable_gqa=True),
    "matmul": matmul_attention,
    "matmul, keys left": partial(matmul_attention, keys_left=True),
}


def decode_tasks(S: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    """The attention part of one token, from a head's query to its output, 16 heads of 128."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    tasks = {}
    for kind, G in ("MHA", 16), ("GQA-2", 2):
        q, k, v = random(1, 16, 1, 128), random(1, G, S, 128), random(1, G, S, 128)
        tasks |= {f"{kind}: {name}": partial(rival, q, k, v) for name, rival in RIVALS.items()}
    layer = MultiHeadLatentAttention(**V2_LITE, attention=matmul_attention).to(device, dtype)
    q_nope, q_rope, entries = random(1, 16, 1, 128), random(1, 16, 1, 64), random(1, S, 576)
    latent, k_rope = entries.split((512, 64), -1)
    tasks["MLA re-expanded: "] = partial(layer.explicit, q_nope, q_rope, latent, k_rope, None)
    tasks["MLA absorbed: "] = partial(layer.absorbed, q_nope, q_rope, entries, None)
    return tasks


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
        slow = {name: tasks.pop(name) for name in list(tasks) if "re-expanded" in name}
        times = race(tasks, device) | race(slow, device, rounds=2)  # so slow that two tell
        for kind, (ms, _) in fastest(times).items():
            curves.setdefault(kind, []).append(ms)
    operations = {"MHA": (8192, 2 * 16 * 256), "GQA-2": (1024, 2 * 16 * 256)}  # bytes, flop a slot
    operations["MLA re-expanded"] = (1152, 2 * 512 * 16 * 256 + 2 * 16 * (192 + 128))
    operations["MLA absorbed"] = (1152, 2 * 16 * (576 + 512))
    for kind, (size, flop) in operations.items():
        text = f"ms   a slot: {size:,} B, {flop:,} flop, {flop / size:,.0f} flop/B"
        name = kind.lower().replace(" ", "_").replace("-", "")
        measure(f"decode_16k_{name}_ms", curves[kind][-1], text)
    faster = [m < h for m, h in zip(curves["MLA absorbed"], curves["MHA"], strict=True)]
    if faster[-1]:
        first = max((i + 1 for i, less in enumerate(faster) if not less), default=0)
        measure("crossover_context", contexts[first], "tokens: from here on absorbed MLA beats MHA")
    draw(contexts, curves, out)
    print(f"figure   {out}")


def draw(contexts: list[int], curves: dict[str, list[float]], out: Path) -> None:
    """Milliseconds of the attention part of one token against context, one line a kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for kind, ms in curves.items():
        axes.plot(contexts, ms, "s--" if kind == "MLA re-expanded" else "o-", label=kind)
        axes.annotate(f"  {ms[-1]:,.1f} ms", (contexts[-1], ms[-1]), va="center")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{S // 1024}k" if S >= 1024 else str(S) for S in contexts])
    axes.set_xlim(right=contexts[-1] * 2.2)
    axes.set(xlabel="context (tokens)", ylabel="attention part of one token, one layer (ms)")
    mha, absorbed, expanded = (curves[k][-1] for k in ("MHA", "MLA absorbed", "MLA re-expanded"))
    title = f"A token at 16k: absorbed MLA takes 1/{mha / absorbed:.1f} of MHA's time, "
    axes.set_title(f"{title}re-expanded {expanded / mha:.0f}x")
    axes.legend(title="16 heads, V2-Lite's sizes, bf16")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)


# %% 5. How fast? ----------------------------------------------------------------------------
# The attention part counts the products with W_UK and W_UV. The whole layer gains less, as both
# kinds must read their projections for every token, 13.8M weights here and 16.8M in MHA. fp32
# gains less too: 30 operations a byte are cheap only where a processor has them to spare, and
# a CPU's fp32 product of 16 rows has few.


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
        best = fastest(race(tasks, device))
        (mine, _), (theirs, rival) = best["MLA absorbed"], best["MHA"]
        name = "bf16" if dtype is torch.bfloat16 else "fp32"
        bar = "   bar 2" if dtype is torch.bfloat16 else ""
        text = f"x   MHA {theirs:.2f} ms ({rival}) / MLA {mine:.2f} ms{bar}"
        measure(f"absorbed_ratio_{name}", theirs / mine, text)

        layer = MultiHeadLatentAttention(**V2_LITE).to(device, dtype)
        cache = LatentCache(1, S, 512, 64, device, dtype)
        cache.append(*(torch.randn(1, S, w, device=device, dtype=dtype) for w in (512, 64)))
        heads = HeadsWithCache(S, RIVALS[rival], device, dtype)
        x = torch.randn(1, 1, 2048, device=device, dtype=dtype)

        def decode(layer=layer, cache=cache, x=x) -> None:
            cache.truncate(S - 1)
            layer(x, cache)

        ms = race({"MLA": decode, "MHA": partial(heads, x)}, device)
        text = f"x   MHA {ms['MHA']:.2f} ms / MLA {ms['MLA']:.2f} ms"
        measure(f"layer_ratio_{name}", ms["MHA"] / ms["MLA"], text)


# %% Exercises -------------------------------------------------------------------------------
# 1. Break it: take `* m**2` out of `self.scale`. Which check stops the chapter, and why could a
#    prompt of one token never show it? Put m² back and leave out `* self.amplitude` instead.
# 2. Turn q_nope and k_nope too, in the explicit form. Why can no `absorbed` follow? Write down the
#    matrix that would have to stand between c and the query, and what it depends on.
# 3. GQA with 2 groups caches about as much as MLA and is faster in the figure. Count its operations
#    on a slot: why? Then read [1] app. D: what does it give up that MLA keeps?


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    cli.add_argument("--device", default=default, help="cpu, cuda, cuda:1, … (%(default)s)")
    cli.add_argument("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    cli.add_argument("--bench", action="store_true", help="also time it against plain MHA")
    cli.add_argument("--out", type=Path, default="runs", help="folder of the figure (%(default)s/)")
    args = cli.parse_args()
    try:
        device = torch.device(args.device)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # the checks need float64
    except Exception as error:  # each backend raises a type of its own
        cli.exit(2, f"cannot run on --device {args.device}: {str(error).splitlines()[0][:100]}\n")
    torch.manual_seed(args.seed)
    verify_forms(device)
    verify_layouts(device)
    verify_cache(device)
    verify_numbers(device)
    memory()
    decoding(device, args.out / "02_mla.png")
    if args.bench:
        bench(device)


if __name__ == "__main__":
    main()
