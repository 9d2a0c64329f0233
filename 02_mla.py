# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11,<=2.13", "matplotlib>=3.8", "numpy>=1.26"]
# ///
r"""02 · Multi-head latent attention: cache one short latent a token, not the keys and values of every head."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# >>> copy: apply_rope, yarn_frequencies, yarn_mscale, normed, LatentCache, MultiHeadLatentAttention (needs torch)
import math
from collections.abc import Callable


# same as 01_attention.py
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """Rotate every pair of channels by the angle of its position (RoFormer, arXiv:2104.09864, eq. 34).

    x: (..., T, R), any float dtype -> the same; cos, sin: (T, R/2) or with leading axes that broadcast.
    interleaved: pairs are (0, 1), (2, 3), … as DeepSeek stores them; else (0, R/2), (1, R/2 + 1), … as Llama.
    """
    axis = -1 if interleaved else -2
    a, b = x.unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(axis)  # (..., T, R/2) each
    return torch.stack((a * cos - b * sin, a * sin + b * cos), axis).flatten(-2).to(x.dtype)


def yarn_frequencies(
    dim: int,
    theta: float = 10_000.0,
    factor: float = 1.0,
    original_max_position_embeddings: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Radians a position turns each pair: (dim/2,) fp32. YaRN (arXiv:2309.00071, eq. 14-15 and 17-18).

    A pair that turns more than `beta_fast` times within the original context keeps its speed; one that turns less
    than `beta_slow` times is slowed by `factor`; between them the two are blended. factor 1 is plain RoPE.
    """
    if dim % 2 or dim <= 0:
        raise ValueError(f"rotary dim must be even and positive, got {dim}")
    pair = torch.arange(0, dim, 2, dtype=torch.float32, device=device)  # (dim/2,)
    plain = 1.0 / theta ** (pair / dim)
    if factor <= 1:
        return plain

    def pair_that_turns(times: float) -> float:  # plain[p]·L = 2π·times, solved for p
        return (
            dim
            * math.log(original_max_position_embeddings / (times * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), dim - 1)
    slowed = ((pair / 2 - low) / max(high - low, 1e-3)).clamp(0, 1)  # 0 keeps, 1 slows
    return plain * (1 - slowed) + plain / factor * slowed


def yarn_mscale(factor: float, mscale: float) -> float:
    """The attention temperature of a context stretched `factor` times: 0.1·mscale·ln(factor) + 1 (V3 §4.3)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """RMSNorm in fp32 whatever the width of x: a bf16 mean of squares keeps 8 bits."""
    return norm(x.float() if x.dtype != torch.float64 else x).to(x.dtype)


class LatentCache:
    """What MLA remembers of a token: its normed latent and its rotated shared key, C + R numbers.

    Rows fill independently: `lengths` (B,) counts the tokens of each. A key in slot j is visible to the query at
    position i if j <= i; that one rule gives causality, hides the padding of shorter prompts and forgets rejected
    drafts, because every later token overwrites its own slot.
    """

    def __init__(
        self,
        batch: int,
        max_tokens: int,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.entries = torch.zeros(
            batch, max_tokens, kv_lora_rank + qk_rope_head_dim, device=device, dtype=dtype
        )
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.used, self.ragged = (
            0,
            False,
        )  # the longest row; whether rows differ: known without asking the device

    def positions(self, tokens: int) -> Tensor:
        """(B, T) positions, and slots, of the next `tokens` tokens of each row."""
        return self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)

    def append(self, latent: Tensor, k_rope: Tensor) -> Tensor:
        """latent: (B, T, C), k_rope: (B, T, R) -> all entries so far, (B, S, C + R), a view."""
        batch, tokens, _ = latent.shape
        if batch != len(self.lengths) or self.used + tokens > self.entries.shape[1]:
            raise ValueError(
                f"cache of {len(self.lengths)} rows x {self.entries.shape[1]} tokens holds {self.used}: "
                f"no room for {batch} x {tokens} more"
            )
        rows = torch.arange(batch, device=self.lengths.device)[:, None]
        new = torch.cat((latent, k_rope), -1).to(self.entries.dtype)
        if self.ragged:
            self.entries[rows, self.positions(tokens)] = new
        else:
            self.entries[:, self.used : self.used + tokens] = new
        self.lengths = self.lengths + tokens
        self.used += tokens
        return self.entries[:, : self.used]

    def truncate(self, lengths: Tensor | int) -> None:
        """Keep the first `lengths` (B,) tokens of each row, or the same number of all."""
        lengths = torch.as_tensor(lengths, device=self.lengths.device).expand_as(self.lengths)
        if (lengths < 0).any() or (lengths > self.lengths).any():
            raise ValueError(f"cannot keep {lengths.tolist()} tokens of {self.lengths.tolist()}")
        self.lengths = lengths.clone()
        self.used, self.ragged = int(lengths.max()), bool((lengths != lengths[0]).any())


class MultiHeadLatentAttention(nn.Module):
    """Causal attention through a latent of C numbers a token (V2 §2.1, V3 eq. 1-11): (B, T, D) -> (B, T, D).

    q_lora_rank: width of the query's own latent, or None for a plain q_proj (V2-Lite, Moonlight).
    rope_scaling: YaRN as released configs spell it, {"factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, …}.
    linear: the class of every projection but kv_b_proj, which absorbed decode must split by head.
    attention: called as F.scaled_dot_product_attention is, with q, k (B, H, T, N + R) and v (B, H, T, V).
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        rope_theta: float = 10_000.0,
        rope_scaling: dict | None = None,
        rope_interleave: bool = True,
        linear: Callable[..., nn.Module] = nn.Linear,
        attention: Callable[..., Tensor] | None = None,
    ):
        super().__init__()
        self.heads, self.nope, self.rope, self.v = (
            num_attention_heads,
            qk_nope_head_dim,
            qk_rope_head_dim,
            v_head_dim,
        )
        self.latent, self.interleaved = kv_lora_rank, rope_interleave
        self.attention = attention or F.scaled_dot_product_attention
        q_width = num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q_proj = linear(hidden_size, q_width, bias=False)
        else:
            self.q_a_proj = linear(hidden_size, q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(
                q_lora_rank, eps=1e-6
            )  # 1e-6 whatever the model's eps, as released
            self.q_b_proj = linear(q_lora_rank, q_width, bias=False)
        self.kv_a_proj_with_mqa = linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(kv_lora_rank, eps=1e-6)
        kv_width = num_attention_heads * (qk_nope_head_dim + v_head_dim)
        self.kv_b_proj = nn.Linear(kv_lora_rank, kv_width, bias=False)
        self.o_proj = linear(num_attention_heads * v_head_dim, hidden_size, bias=False)

        yarn = dict(rope_scaling or {})
        factor, all_dim = yarn.get("factor", 1.0), yarn.get("mscale_all_dim") or 0.0
        known = ("original_max_position_embeddings", "beta_fast", "beta_slow")
        self.rope_arguments = {"theta": rope_theta, "factor": factor}
        self.rope_arguments |= {name: yarn[name] for name in known if name in yarn}
        self.frequencies: Tensor | None = (
            None  # made on first use: a buffer would follow .bfloat16()
        )
        # m² multiplies the whole logit; cos and sin carry only what mscale adds to it: 1 in V3
        self.scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5 * yarn_mscale(
            factor, all_dim
        ) ** 2
        self.amplitude = yarn_mscale(factor, yarn.get("mscale") or 1.0) / yarn_mscale(
            factor, all_dim
        )

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: (T,) or (B, T) -> cos and sin, (T, R/2) or (B, T, R/2), fp32."""
        if self.frequencies is None or self.frequencies.device != positions.device:
            self.frequencies = yarn_frequencies(
                self.rope, device=positions.device, **self.rope_arguments
            )
        angles = positions[..., None] * self.frequencies
        return angles.cos() * self.amplitude, angles.sin() * self.amplitude

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """V3 eq. 6-9: x (B, T, D) -> the part without position (B, H, T, N), the rotated (B, H, T, R)."""
        if hasattr(self, "q_proj"):
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(normed(self.q_a_layernorm, self.q_a_proj(x)))
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, N + R)
        q_nope, q_rope = q.split((self.nope, self.rope), -1)
        return q_nope, apply_rope(q_rope, cos, sin, self.interleaved)

    def latents(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """V3 eq. 1 and 3: x (B, T, D) -> normed latent (B, T, C), rotated key of all heads (B, T, R)."""
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.latent, self.rope), -1)
        latent = normed(self.kv_a_layernorm, latent)
        return latent, apply_rope(k_rope, cos, sin, self.interleaved)  # the rope key has no norm

    def explicit(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask):
        """Every head's keys and values spelled out (V3 eq. 2-5, 10): for training and prefill."""
        kv = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = kv.split((self.nope, self.v), -1)  # (B, H, S, N), (B, H, S, V)
        shared = k_rope[:, None].expand(-1, self.heads, -1, -1)  # (B, H, S, R)
        q, k = torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, shared), -1)
        causal = mask is None and q.shape[2] > 1
        return self.attention(q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale)

    def absorbed(
        self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The same numbers without keys or values (V2 App. C): all heads read one latent.

        q·(W_uk c) = (W_ukᵀ q)·c, so W_uk moves to the query, and W_uv, by the same step, behind the sum.
        """
        w_uk, w_uv = self.kv_b_proj.weight.unflatten(0, (self.heads, -1)).split(
            (self.nope, self.v), 1
        )
        q_latent = torch.einsum("BHTN,HNC->BHTC", q_nope, w_uk.to(q_nope.dtype))
        q = torch.cat((q_latent, q_rope), -1)  # (B, H, T, C + R)
        scores = (
            q.flatten(1, 2) @ entries.mT
        )  # (B, H·T, S): one product, as the heads share the key
        scores = scores.unflatten(1, (self.heads, -1)).to(
            torch.promote_types(q.dtype, torch.float32)
        )
        scores = scores * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(-1).to(entries.dtype).flatten(1, 2)  # (B, H·T, S)
        out = (weights @ entries[..., : self.latent]).unflatten(1, (self.heads, -1))  # (B, H, T, C)
        return torch.einsum("BHTC,HVC->BHTV", out, w_uv.to(out.dtype))

    def forward(
        self, x: Tensor, cache: LatentCache | None = None, absorb: bool | None = None
    ) -> Tensor:
        """x: (B, T, D) -> (B, T, D). With a cache, x continues each of its rows.

        absorb: choose the form; None takes the one with fewer operations.
        """
        B, T, _ = x.shape
        if cache is None:
            positions, mask = torch.arange(T, device=x.device), None
            cos, sin = self.rotation(positions)  # (T, R/2)
        else:
            fresh, positions = cache.used == 0, cache.positions(T)  # (B, T)
            cos, sin = self.rotation(positions)  # (B, T, R/2)
        q_nope, q_rope = self.queries(x, cos.unsqueeze(-3), sin.unsqueeze(-3))
        latent, k_rope = self.latents(x, cos, sin)
        entries = None
        if cache is not None:
            entries = cache.append(latent, k_rope)  # (B, S, C + R)
            slots = torch.arange(cache.used, device=x.device)
            hidden_keys = not fresh and (T > 1 or cache.ragged)
            mask = slots <= positions[:, None, :, None] if hidden_keys else None  # (B, 1, T, S)
            latent, k_rope = entries.split((self.latent, self.rope), -1)
        if absorb is None:
            absorb = cache is not None and not fresh and T < self.absorb_below
        if absorb:
            if entries is None:
                entries = torch.cat((latent, k_rope), -1)
            if mask is None and T > 1:
                mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
            out = self.absorbed(q_nope, q_rope, entries, mask)  # (B, H, T, V)
        else:
            out = self.explicit(q_nope, q_rope, latent, k_rope, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    @property
    def absorb_below(self) -> float:
        """Query tokens a step below which the absorbed form takes fewer operations than the explicit.

        A head and cached token cost C·(N + V) to expand, then T·(N + R + V); absorbed, T·(2C + R).
        """
        spare = 2 * self.latent - self.nope - self.v
        return self.latent * (self.nope + self.v) / spare if spare > 0 else math.inf


# <<< copy
