# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<=2.13", "numpy>=1.26", "tiktoken>=0.8", "regex>=2024.5", "matplotlib>=3.8",
#   "safetensors>=0.4.5", "tqdm>=4.66", "filelock>=4.3",
# ]
# ///
r"""10 · Sparse attention: a small indexer points at 2,048 tokens, and attention reads only these.

V3 made the cache short (02), and yet each new token reads all of it. Behind 131,072 others that is
131,072 · 128 heads · (2 · 512 + 64) = 18.3 billion products, in the attention of one layer. V3.2 is
V3 with an indexer in each: 131,072 · 64 heads · 128 products score all tokens, the 2,048 best are
read by 2,048 · 128 · 1,088 more, and that is 1.4 billion.

    x (B,T,C) ─┬─ 02's query latent c' (B,T,Q) ── W_q ─► qᴵ (B,J,T,E) ─ RoPE ──┐
               ├─ W_w ──────────────────────────────────► w  (B,T,J) ─────┐    │
               ├─ W_k ─ LayerNorm ─ RoPE ──► kᴵ (B,T,E) ─► LatentCache    ▼    ▼
               │                                  (B,S,L+R+E) ─┬─ kᴵ ─► scores I (B,T,S)
               └─ 02's latent and turned key (B,T,L+R) ──┘     │              │ top K
                                                               └─ K entries of S ─► 02's attention

    scores    I_ts = Σⱼ w_tj · ReLU(qᴵ_tj · kᴵ_s)                                      [1] eq. 1
    attention u_t = Attn(x_t, {entry_s | I_ts is among the K largest of I_t})          [1] eq. 2
    warm-up   KL(p_t ‖ softmax(I_t)), p_t: the heads' softmax weights, averaged        [1] eq. 3
    sparse    the same over the K chosen alone, while the model learns to read them    [1] eq. 4

    axis  config name     Reader  V3.2
    J     index_n_heads        4    64     [1] DeepSeek-V3.2, arXiv:2512.02556
    E     index_head_dim      16   128     [2] its released inference code
    K     index_topk          16  2048
    B, T, S, C, Q, L, N, R, V, H           as in 02

The choice passes no gradient, so the indexer learns from eq. 3 and 4 alone, and its inputs are
detached: no gradient of its loss reaches the model. [2] keeps kᴵ in FP8, after a Hadamard turn of
both sides that no product feels; here it is one more part of the cache's entry, in its dtype.

Run:  python 10_sparse_attention.py [--bench]          40 s on two CPU cores, 45 s with --bench
"""

import argparse
import itertools
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

mla = import_module("02_mla")  # MultiHeadLatentAttention, LatentCache, visible, race, …
base = import_module("06_train")  # DeepSeek, DeepSeekConfig, Block
check, measure = base.check, base.measure

# %% 1. The equations, word for word ---------------------------------------------------------


def scores_reference(q: Tensor, w: Tensor, k: Tensor) -> Tensor:
    """[1] eq. 1, one product at a time: q (J, T, E), w (T, J), k (S, E) -> I (T, S)."""
    scores = torch.zeros(len(w), len(k), dtype=q.dtype)
    for t, s, j in itertools.product(range(len(w)), range(len(k)), range(len(q))):
        scores[t, s] += w[t, j] * max(q[j, t] @ k[s], 0.0)
    return scores


@torch.no_grad()
def layer_reference(layer: "SparseLatentAttention", x: Tensor) -> Tensor:
    """[1] eq. 1 and 2, a token and a head at a time: x (T, C) -> (T, C).

    The layer lends its projections, which 02 has verified.
    """
    T, (N, _), (L, _) = len(x), layer.q_split, layer.latent_split
    cos, sin = layer.cos_sin(torch.arange(T), x.dtype)
    q_low = layer.query_latent(x[None])
    q_nope, q_rope = (q[0] for q in layer.queries(q_low, cos, sin))  # (H, T, N), (H, T, R)
    latent, k_rope = (part[0] for part in layer.latents(x[None], cos, sin))  # (T, L), (T, R)
    index_q, w = layer.indexer.queries(x[None], q_low, cos, sin)
    scores = scores_reference(index_q[0], w[0], layer.indexer.keys(x[None], cos, sin)[0])
    out = []
    for t in range(T):
        order = scores[t, : t + 1].argsort(descending=True, stable=True)  # of equals the earliest
        best = order[: layer.index_topk].tolist()
        heads = []
        for h, up in enumerate(layer.kv_b_proj.weight.view(layer.heads, -1, L)):
            logits = torch.stack([
                q_nope[h, t] @ (up[:N] @ latent[s]) + q_rope[h, t] @ k_rope[s] for s in best
            ])  # fmt: skip
            values = torch.stack([up[N:] @ latent[s] for s in best])
            heads.append((layer.scale * logits).softmax(0) @ values)
        out.append(layer.o_proj(torch.cat(heads)))
    return torch.stack(out)


# %% 2. The pieces ---------------------------------------------------------------------------

AT_A_TIME = 2**25  # numbers, where each query makes many


class LightningIndexer(nn.Module):
    """What a query looks for and what a token offers, for `index_scores` ([1] §2.1).

    Its rotary channels come first and are turned in halves, unlike those of the attention beside
    it; its keys have a LayerNorm, with a bias. Parameters carry the names of the released files.
    q_lora_rank None: it reads x, as the queries beside it do (V3.2 has no such model).
    linear: class of wq_b and wk; weights_proj is not FP8 in V3.2 either.
    """

    def __init__(
        self, hidden_size: int, q_lora_rank: int | None, index_n_heads: int, index_head_dim: int,
        qk_rope_head_dim: int, linear=nn.Linear,
    ):  # fmt: skip
        super().__init__()
        if index_head_dim < qk_rope_head_dim:
            few = f"index_head_dim {index_head_dim} < qk_rope_head_dim {qk_rope_head_dim}"
            raise ValueError(f"no room for the rotary channels: {few}")
        self.heads, self.rotary = index_n_heads, qk_rope_head_dim
        self.wq_b = linear(q_lora_rank or hidden_size, index_n_heads * index_head_dim, bias=False)
        self.wk = linear(hidden_size, index_head_dim, bias=False)
        self.k_norm = nn.LayerNorm(index_head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(hidden_size, index_n_heads, bias=False)

    def turned(self, channels: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(..., T, E) -> the same, the first R channels turned."""
        first, rest = channels.split((self.rotary, channels.shape[-1] - self.rotary), -1)
        return torch.cat((mla.apply_rope(first, cos, sin, interleaved=False), rest), -1)

    def queries(self, x: Tensor, q_low: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, C), the queries' latent (B, T, Q), angles (T, R/2) or (B, T, R/2) ->
        queries (B, J, T, E), their heads' weights (B, T, J)."""
        q = self.wq_b(q_low).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, J, T, E)
        w = self.weights_proj(x) * (self.heads * q.shape[-1]) ** -0.5  # [2]: 1/√J and 1/√E
        return self.turned(q, cos.unsqueeze(-3), sin.unsqueeze(-3)), w

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, E)."""
        k = self.wk(x)
        normed = self.k_norm(k.to(self.k_norm.weight.dtype)).to(k.dtype)
        return self.turned(normed, cos, sin)


def index_scores(q: Tensor, w: Tensor, k: Tensor) -> Tensor:
    """[1] eq. 1: queries (B, J, T, E), weights (B, T, J), keys (B, S, E) -> (B, T, S).

    Products are in q's dtype ([2] has them in FP8), their sum over J in fp32 or wider. Some queries
    at a time: the products of all are J times as many as the scores. A gradient keeps them all.
    """
    wide, scores = torch.promote_types(q.dtype, torch.float32), []
    (B, J), S = q.shape[:2], k.shape[1]
    rows = max(1, AT_A_TIME // max(1, B * J * S))
    with torch.autocast(q.device.type, enabled=False):  # it would add up in bf16
        k, w = k.to(q.dtype), w[..., None].to(wide)
        for q_rows, w_rows in zip(q.split(rows, 2), w.split(rows, 1), strict=True):
            # the keys on the left: a long transposed matrix would be copied
            products = k @ q_rows.transpose(1, 2).flatten(1, 2).mT  # (B, S, J for each query)
            by_query = products.relu().to(wide).unflatten(-1, (-1, J)).transpose(1, 2)
            scores.append((by_query @ w_rows)[..., 0])  # (B, some of T, S, J) -> (B, some of T, S)
    return torch.cat(scores, 1)


def ranked(scores: Tensor, seen: Tensor) -> Tensor:
    """Scores (B, T, S) for topk: unseen slots last, and of those at 0 the earliest first. With few
    heads ReLU makes many, and among equals topk would choose by S. All others stay as they are."""
    place = torch.arange(scores.shape[-1], device=scores.device, dtype=scores.dtype)
    return torch.where(seen, scores - torch.finfo(torch.float32).tiny * place, -math.inf)


def highest(scores: Tensor, seen: Tensor, count: int) -> Tensor:
    """Of what each query may see, the `count` slots that it scores highest: (B, T, S) bool."""
    best = ranked(scores, seen).topk(min(count, scores.shape[-1])).indices
    return torch.zeros_like(seen).scatter(-1, best, True) & seen


def index_divergence(attended: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
    """[1] eq. 3 and 4, a mean: KL(p_t ‖ softmax(I_t)) over the slots in `chosen`, in nats.

    attended: p, (B, T, S), each row's sum is 1 and what is not chosen is 0; scores: I, (B, T, S);
    chosen: (B, T, S) bool. Gradients reach the scores alone.
    """
    log_index = scores.masked_fill(~chosen, -math.inf).log_softmax(-1).masked_fill(~chosen, 0.0)
    p = attended.detach().to(scores.dtype)
    each = (torch.xlogy(p, p) - p * log_index).sum(-1)  # (B, T)
    return each.sum() / max(1, each.numel())


def as_rows(part: Tensor, cache: "mla.LatentCache | None") -> Tensor:
    """Some channels of a cache's entries as (B, S, ·): those of a pool by their pages."""
    if cache is None or cache.pages is None:
        return part
    return mla.unpaged(part, cache.pages, cache.lengths, cache.used)[:, : cache.used]


class SparseLatentAttention(mla.MultiHeadLatentAttention):
    """02's layer, reading only the `index_topk` tokens that its indexer scores highest.

    x: (B, T, C) -> (B, T, C); a cache of 02, contiguous or paged, with room for R + E behind the
    latent. Its sizes are 02's, and index_… by name. A few queries on a long cache gather their
    entries and read these, absorbed; many on a short one read all of it under a mask: the same
    numbers, and the work of a dense layer.
    dense=True reads everything, as while the indexer warms up. In training a forward without a
    cache leaves `index_loss`, eq. 3 if dense, else eq. 4, for the trainer to add; else it is None.
    """

    def __init__(
        self, hidden_size: int, *sizes, index_n_heads: int, index_head_dim: int, index_topk: int,
        linear=nn.Linear, **named,
    ):  # fmt: skip
        super().__init__(hidden_size, *sizes, linear=linear, **named)
        if index_topk < 1:
            raise ValueError(f"want index_topk of 1 or more, got {index_topk}")
        R = self.latent_split[1]
        self.indexer = LightningIndexer(
            hidden_size, self.q_lora_rank, index_n_heads, index_head_dim, R, linear
        )
        self.index_topk, self.dense, self.index_loss = index_topk, False, None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"index_loss": None}  # a copy.deepcopy can't take a graph along

    def forward(
        self, x: Tensor, cache: "mla.LatentCache | None" = None, gather: bool | None = None
    ) -> Tensor:
        """gather: which form; None: the one with fewer products, and never while learning."""
        (B, T, _), learning, self.index_loss = x.shape, torch.is_grad_enabled(), None
        cos, sin = self.cos_sin(self.positions(x, cache), x.dtype)
        q_low = self.query_latent(x)
        q = self.queries(q_low, cos, sin)  # (B, H, T, N), (B, H, T, R)
        latent, k_rope = self.latents(x, cos, sin)
        index_keys = self.indexer.keys(x.detach(), cos, sin)  # (B, T, E)
        if cache is None:
            entries, lengths = torch.cat((latent, k_rope), -1), torch.full((B,), T, device=x.device)
        else:
            both = cache.append(latent, torch.cat((k_rope, index_keys), -1))
            entries, index_keys = both.split((sum(self.latent_split), index_keys.shape[-1]), -1)
            lengths = cache.lengths
        # entries (B, S, L + R), index_keys (B, S, E); of a paged cache they are its pool's
        S = T if cache is None else cache.used
        training = self.training and learning and cache is None
        everything = self.dense or S <= self.index_topk
        if everything and not training:
            return self.o_proj(self.read_all(*q, entries, lengths, cache).flatten(2))
        index_q, w = self.indexer.queries(x.detach(), q_low.detach(), cos, sin)
        index = index_q, w, as_rows(index_keys, cache)  # (B, J, T, E), (B, T, J), (B, S, E)
        if gather is None:
            gather = not learning and self.gathering_pays(T, S)
        if gather and not training:
            out = self.read_gathered(*q, entries, index, lengths, cache)
        else:
            seen, scores = mla.visible(lengths, T, S)[:, 0], index_scores(*index)  # (B, T, S)
            chosen = seen if everything else highest(scores, seen, self.index_topk)
            entries = as_rows(entries, cache)
            out = self.read(*q, entries, chosen[:, None])
            if training:
                attended = self.attended(*q, entries, chosen)
                self.index_loss = index_divergence(attended, scores, chosen)
        return self.o_proj(out.flatten(2))

    def gathering_pays(self, T: int, S: int) -> bool:
        """Are the products of K absorbed entries a query fewer than of S, spelled out once?"""
        (L, R), (N, V) = self.latent_split, self.kv_split
        return T * self.index_topk * (2 * L + R) < S * (L * (N + V) + T * (N + R + V))

    def read(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, mask: Tensor | None) -> Tensor:
        """Entries (B, S, L + R), spelled out, where mask (B, 1, T, S) allows -> (B, T, H, V)."""
        latent, k_rope = entries.to(q_nope.dtype).split(self.latent_split, -1)
        return self.explicit(q_nope, q_rope, latent, k_rope, mask).transpose(1, 2)

    def read_all(
        self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, lengths: Tensor,
        cache: "mla.LatentCache | None",
    ) -> Tensor:  # fmt: skip
        """As 02 does: absorbed for a few queries behind others -> (B, T, H, V)."""
        T, S = q_nope.shape[2], entries.shape[1] if cache is None else cache.used
        if S > T and T < self.absorb_below:
            if T == 1 and cache.even and cache.pages is None:
                lengths = None  # it sees all there is
            return self.absorbed(q_nope, q_rope, entries, lengths, cache.pages).transpose(1, 2)
        mask = mla.visible(lengths, T, S) if S > T else None
        return self.read(q_nope, q_rope, as_rows(entries, cache), mask)

    def read_gathered(
        self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, index: tuple[Tensor, Tensor, Tensor],
        lengths: Tensor, cache: "mla.LatentCache | None" = None,
    ) -> Tensor:  # fmt: skip
        """The K entries that each query scores highest, as a cache of its own -> (B, T, H, V).

        entries: (B, S, L + R), or the pool of a paged cache; index: arguments of `index_scores`.
        Some queries at a time, each with its K entries and S scores.
        """
        index_q, w, index_keys = index
        (B, T, _), S, size, device = w.shape, index_keys.shape[1], entries.shape[1], entries.device
        K, row = min(self.index_topk, S), torch.arange(B, device=device)[:, None]
        count, out = max(1, AT_A_TIME // max(1, B * (K * entries.shape[-1] + S))), []
        pages, even = (None, True) if cache is None else (cache.pages, cache.even)
        full = even and S - T + 1 >= K  # each query sees as many as it reads
        ends = lengths[:, None] - T + torch.arange(1, T + 1, device=device)  # (B, T)
        parts = (q_nope, 2), (q_rope, 2), (index_q, 2), (w, 1), (ends, 1)
        pieces = (part.split(count, axis) for part, axis in parts)
        for nope, rope, index_rows, w_rows, end in zip(*pieces, strict=True):
            seen = torch.arange(S, device=device) < end[..., None]  # (B, some of T, S)
            scores = ranked(index_scores(index_rows, w_rows, index_keys), seen)
            best = scores.topk(K).indices.flatten(1)  # of each query the unseen last
            place = (row, best) if pages is None else (pages[row, best // size], best % size)
            own = entries[place].view(-1, K, entries.shape[-1])  # (B · some of T, K, L + R)
            nope, rope = (q.transpose(1, 2).flatten(0, 1)[:, :, None] for q in (nope, rope))
            filled = None if full else end.clamp(max=K).flatten()
            o = self.absorbed(nope, rope, own, filled)[:, :, 0]  # (B · some of T, H, V)
            out.append(o.unflatten(0, end.shape))
        return torch.cat(out, 1)

    @torch.no_grad()
    def attended(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, mask: Tensor) -> Tensor:
        """[1] eq. 3's p: softmax weights within mask, averaged over the heads: (B, T, S)."""
        latent, k_rope = entries.split(self.latent_split, -1)
        heads, total = self.kv_b_proj.weight.to(q_nope.dtype).chunk(self.heads), 0.0
        for h, matrices in enumerate(heads):  # a head at a time: (T, S) is large
            up = matrices[: self.q_split[0]]  # (N, L)
            logits = q_nope[:, h] @ (latent @ up.T).mT + q_rope[:, h] @ k_rope.mT
            hidden = (self.scale * logits).masked_fill(~mask, -math.inf)
            total = total + hidden.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        return total / self.heads


# %% 3. The model: V3 with another attention -------------------------------------------------


@dataclass(frozen=True)
class SparseConfig(base.DeepSeekConfig):
    """DeepSeekConfig and V3.2's three sizes of the indexer. ValueError as there."""

    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048

    def __post_init__(self):
        super().__post_init__()
        with torch.device("meta"):
            SparseBlock(self, layer=0)

    @classmethod
    def from_dict(cls, raw: dict) -> "SparseConfig":
        """From the contents of V3.2's config.json, or transformers'."""
        kind = raw.get("model_type", "deepseek_v32")
        if kind != "deepseek_v32":
            raise ValueError(f"model_type {kind!r}: want 'deepseek_v32'")
        return super().from_dict(raw | {"model_type": "deepseek_v3"})

    def to_dict(self) -> dict:
        names = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
        return super().to_dict() | names


class SparseBlock(base.Block):
    @staticmethod
    def attention(config: SparseConfig) -> Callable:
        sizes = "index_n_heads", "index_head_dim", "index_topk"
        return partial(SparseLatentAttention, **{size: getattr(config, size) for size in sizes})


class SparseDeepSeek(base.DeepSeek):
    """DeepSeek-V3.2 of any size, a DeepSeek of 06 in all else: its files, `generate` and drafts.

    Released files: load_released(folder, model_class=SparseDeepSeek) in 08.
    """

    Config, Block = SparseConfig, SparseBlock

    @classmethod
    def from_dense(
        cls, model: base.DeepSeek, index_n_heads: int, index_head_dim: int, index_topk: int
    ) -> "SparseDeepSeek":
        """A copy of a V3, as V3.2 began from V3.1: its weights, indexers that have learnt nothing.

        ValueError: it has indexers already, or keeps FP8 codes (08).
        """
        tensors = model.state_dict()
        if isinstance(model, SparseDeepSeek):
            raise ValueError("the model has indexers already: want a dense one")
        if any(t.dtype == torch.float8_e4m3fn for t in tensors.values()):
            raise ValueError("the model keeps FP8 codes: load it with keep_fp8=False")
        sizes = {"index_n_heads": index_n_heads, "index_head_dim": index_head_dim}
        config = SparseConfig(**vars(model.config), **sizes, index_topk=index_topk)
        sparse = cls(config, model.precision).to(model.lm_head.weight)
        own = {n: t for n, t in sparse.state_dict().items() if ".indexer." in n}
        sparse.load_state_dict(own | tensors)
        return sparse

    def cache_widths(self) -> tuple[int, int]:
        latent, rotary = super().cache_widths()
        return latent, rotary + self.config.index_head_dim

    def attentions(self) -> list[SparseLatentAttention]:
        return [m for m in self.modules() if isinstance(m, SparseLatentAttention)]

    def indexers(self) -> list[nn.Parameter]:
        return [p for a in self.attentions() for p in a.indexer.parameters()]

    def warm_up(self, warming: bool = True) -> None:
        """[1]'s first stage: read everything, only the indexers learn. False: its second."""
        self.requires_grad_(not warming)
        for attention in self.attentions():
            attention.dense = warming
            attention.indexer.requires_grad_(True)

    def take_index_loss(self) -> Tensor:
        """Sum of what the layers' last training forward left, once. ValueError: there was none."""
        left = [a.index_loss for a in self.attentions() if a.index_loss is not None]
        for attention in self.attentions():
            attention.index_loss = None
        if not left:
            raise ValueError("no index loss: want a forward before, in training, without a cache")
        return torch.stack(left).sum()


# %% 4. Is it right? -------------------------------------------------------------------------
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16}
SIZES |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
INDEX = {"index_n_heads": 16, "index_head_dim": 8, "index_topk": 6}
EXACT = 1e-12  # float64: sums of about 100 terms of size 1, each off by 1e-16


def verify_layer(device: torch.device) -> None:
    """Against the equations, against 02's layer where K is enough for all, and through a cache."""
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    layer = SparseLatentAttention(**SIZES, **INDEX).to(x.dtype)
    q, w, k = torch.randn(3, 9, 5), torch.randn(9, 3), torch.randn(7, 5)
    got = index_scores(*(part[None].double() for part in (q, w, k)))[0]
    check("scores = eq. 1", got, scores_reference(q.double(), w.double(), k.double()), EXACT)
    want = torch.stack([layer_reference(layer, row) for row in x])
    layer, x = layer.to(device), x.to(device)
    check("layer = eq. 1 and 2, 6 of 40 tokens", layer(x), want, EXACT)
    with torch.no_grad():
        check("gathered = masked", layer(x, gather=True), layer(x, gather=False), EXACT)
        for split in 3, 20, 39:
            cache = mla.LatentCache(2, 40, 16, 4 + 8, device, x.dtype)
            parts = x.split((split, *[1] * (40 - split)), 1)
            got = torch.cat([layer(part, cache) for part in parts], 1)
            check(f"prefill of {split}, then decode = full", got, layer(x), EXACT)
    dense = mla.MultiHeadLatentAttention(**SIZES).to(x)
    dense.load_state_dict(layer.state_dict(), strict=False)
    layer.index_topk = 40
    check("K = T: 02's layer", layer(x), dense(x), EXACT)


def verify_learning(device: torch.device) -> None:
    """Two losses, two sets of weights; and eq. 3 worked by hand."""
    p, scores = torch.tensor([[[0.5, 0.25, 0.25, 0.0]]]), torch.tensor([[[1.0, 1.0, 1.0, 9.0]]])
    by_hand = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)  # against a third each
    kl = index_divergence(p, scores, torch.tensor([[[True, True, True, False]]]))
    check("eq. 3, by hand", kl, torch.tensor(by_hand), 1e-6)  # logarithms of order 1 in fp32
    layer = SparseLatentAttention(**SIZES, **INDEX).to(device).train()
    x = torch.randn(2, 40, 32, device=device, requires_grad=True)  # of the layers before
    out, indexer = layer(x), list(layer.indexer.parameters())
    others = [x, *(p for p in layer.parameters() if not any(p is own for own in indexer))]

    def reached(loss: Tensor, parameters: list) -> Tensor:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return torch.tensor([float(g is not None and bool(g.any())) for g in grads])

    for name, loss, mine, theirs in (
        ("the output's", out.square().sum(), others, indexer),
        ("the index loss's", layer.index_loss, indexer, others),
    ):
        check(f"{name} gradient reaches its own", reached(loss, mine), torch.ones(len(mine)), 0)
        check(f"{name} gradient: no other", reached(loss, theirs), torch.zeros(len(theirs)), 0)


# %% 5. What does it buy? --------------------------------------------------------------------
# A dictionary: 256 keys in random order, each with one of 16 values, then 64 questions. A token is
# the sum of two embeddings; a question has a key and no value. The answer is somewhere, once.


class Reader(nn.Module):
    """One layer that looks things up: keys and values (B, T) -> logits (B, T, 16)."""

    KEYS, VALUES, QUESTIONS = 256, 16, 64

    def __init__(self, index_topk: int):
        super().__init__()
        sizes = {"hidden_size": 64, "num_attention_heads": 2, "q_lora_rank": 64, "kv_lora_rank": 64}
        sizes |= {"qk_nope_head_dim": 32, "qk_rope_head_dim": 8, "v_head_dim": 32}
        self.key, self.value = nn.Embedding(self.KEYS, 64), nn.Embedding(self.VALUES + 1, 64)
        self.norm, self.out = nn.RMSNorm(64, eps=1e-6), nn.RMSNorm(64, eps=1e-6)
        sizes |= {"index_n_heads": 4, "index_head_dim": 16, "index_topk": index_topk}
        self.attention = SparseLatentAttention(**sizes, attention=base.cpu_or_gpu_attention)
        self.head = nn.Linear(64, self.VALUES, bias=False)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        return self.head(self.out(self.attention(self.norm(self.key(keys) + self.value(values)))))

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys (B, 320), values (B, 320), the answers to the last 64 (B, 64)."""
        device, V = self.head.weight.device, self.VALUES
        keys = torch.rand(size, self.KEYS, device=device).argsort(-1)
        values = torch.randint(V, keys.shape, device=device)
        asked = torch.randint(self.KEYS, (size, self.QUESTIONS), device=device)
        unknown = torch.full_like(asked, V)
        text = torch.cat((keys, keys.gather(1, asked)), 1), torch.cat((values, unknown), 1)
        return *text, values.gather(1, asked)

    def answers(self, batch: tuple) -> tuple[Tensor, Tensor]:
        """The loss, and the share of right answers."""
        keys, values, want = batch
        logits = self(keys, values)[:, -self.QUESTIONS :]
        right = (logits.argmax(-1) == want).float().mean()
        return F.cross_entropy(logits.flatten(0, 1), want.flatten()), right


def learn(reader: Reader, parameters: list, rate: float, index: bool) -> Iterator[tuple]:
    """An endless run of steps, each with its right answers and, if there is one, index loss."""
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.95))
    reader.train(index)
    while True:
        loss, right = reader.answers(reader.batch(8 if index else 16))
        index_loss = reader.attention.index_loss if index else torch.zeros_like(loss)
        (loss + index_loss).backward()
        optimizer.step()
        reader.zero_grad()
        yield right.item(), index_loss.item()


def train_reader(device: torch.device, index_topk: int = 16) -> Reader:
    """Dense until it can read, then [1]'s two stages."""
    reader = Reader(index_topk).to(device)
    attention, all_weights = reader.attention, list(reader.parameters())
    attention.dense = True
    for step, (right, _) in enumerate(learn(reader, all_weights, 3e-3, index=False), 1):
        if right > 0.99 or step == 600:
            break
    dense = report(reader, "dense", f"reads all 320 tokens, after {step} steps")
    attention.dense = False
    report(reader, "untrained_indexer", f"reads the {index_topk} that it scores highest")
    attention.dense = True
    warming = learn(reader, list(attention.indexer.parameters()), 1e-2, index=True)
    losses = [index_loss for _, index_loss in itertools.islice(warming, 100)]
    attention.dense = False
    text = f"index loss {losses[0]:.2f} -> {losses[-1]:.2f} nats"
    report(reader, "warm_up", f"100 steps of eq. 3, the rest frozen: {text}")
    for _ in itertools.islice(learn(reader, all_weights, 1e-3, index=True), 60):
        pass
    sparse = report(reader, "sparse_training", "60 steps of all weights, eq. 4")
    # such shares of 4,096 answers scatter by 0.002; an untrained indexer's is 0.87 off
    check("right answers: reading 16 = reading all", sparse, dense, 0.05)
    return reader.eval()


@torch.no_grad()
def report(reader: Reader, name: str, text: str) -> Tensor:
    loss, right = reader.eval().answers(reader.batch(64))
    measure(f"right_{name}", right.item(), f"loss {loss.item():.3f}   {text}")
    return right


@torch.no_grad()
def compare_choices(reader: Reader, sizes: list[int]) -> dict[str, list[float]]:
    """Right answers against K, of the tokens that each of four ways to choose finds."""
    attention, (keys, values, want) = reader.attention, reader.batch(64)
    x = reader.norm(reader.key(keys) + reader.value(values))
    cos, sin = attention.cos_sin(attention.positions(x, None), x.dtype)
    q_low, (B, T, _) = attention.query_latent(x), x.shape
    q, entries = attention.queries(q_low, cos, sin), torch.cat(attention.latents(x, cos, sin), -1)
    seen = torch.ones(B, T, T, dtype=torch.bool, device=x.device).tril()
    indexer = attention.indexer
    index = *indexer.queries(x, q_low, cos, sin), indexer.keys(x, cos, sin)
    scores = {
        "its indexer": index_scores(*index),
        "its attention to all": attention.attended(*q, entries, seen),
        "the last": torch.arange(T, device=x.device).float().expand_as(seen),
        "at random": torch.rand(seen.shape, device=x.device),
    }
    right = {name: [] for name in scores}
    for K, (name, score) in itertools.product(sizes, scores.items()):
        out = attention.read(*q, entries, highest(score, seen, K)[:, None]).flatten(2)
        logits = reader.head(reader.out(attention.o_proj(out)))[:, -want.shape[1] :]
        right[name].append((logits.argmax(-1) == want).float().mean().item())
    return right


# %% 6. How fast? ----------------------------------------------------------------------------


@torch.no_grad()
def decode(device: torch.device, contexts: list[int], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one token's attention in one layer of V3's and V3.2's size, batch 1, bf16:
    what comes between the projections of x, absorption included."""
    heads = {"num_attention_heads": 128, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
    heads |= {"qk_rope_head_dim": 64, "v_head_dim": 128, "index_n_heads": 64, "index_head_dim": 128}
    layer = SparseLatentAttention(64, q_lora_rank=64, index_topk=2048, **heads)
    layer = layer.to(device, torch.bfloat16)
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    q = make(1, 128, 1, 128), make(1, 128, 1, 64)
    index_q, w = make(1, 64, 1, 128), make(1, 1, 64)
    found: dict[str, list[float]] = {"V3": [], "V3.2": [], "of that, index scores": []}
    for S in contexts:
        entries, index_keys = make(1, S, 576 + 128).split((576, 128), -1)
        index, lengths = (index_q, w, index_keys), torch.tensor([S], device=device)
        ms = mla.race({
            "V3": partial(layer.absorbed, *q, entries.contiguous()),
            "V3.2": partial(layer.read_gathered, *q, entries, index, lengths),
            "of that, index scores": partial(index_scores, *index),
        }, device, rounds)  # fmt: skip
        for name, value in ms.items():
            found[name].append(value)
        text = f"ms a token at {S:,}; V3: {ms['V3']:.3g}, {ms['V3'] / ms['V3.2']:.2f}x"
        measure(f"decode_v32_{S // 1024}k", ms["V3.2"], text)
    return found


def draw(right: dict, sizes: list[int], ms: dict, contexts: list[int], out: Path) -> None:
    os.environ["MPLBACKEND"] = "Agg"  # a notebook hands down its own, which may be missing here
    from matplotlib import pyplot as plt

    figure, (left, axes) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for (name, values), style in zip(right.items(), ("o-", "x:", "s-", "^-"), strict=True):
        left.plot(sizes, values, style, label=name)
    left.set_xscale("log", base=2)
    left.set_xticks(sizes, [str(K) for K in sizes])
    left.set(xlabel="K: tokens read, of 320", ylabel="right answers")
    left.legend(title="chosen by")
    for (name, values), style in zip(ms.items(), ("o-", "o-", "o:"), strict=True):
        axes.plot(contexts, values, style, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{S // 1024}k" for S in contexts])
    axes.set(xlabel="context (tokens)", ylabel="ms a token, attention of one layer")
    axes.legend()
    index = sizes.index(16)
    figure.suptitle(
        f"The indexer finds {right['its indexer'][index]:.1%} of the answers in 16 of 320 tokens; "
        f"at {contexts[-1] // 1024}k V3.2 is {ms['V3'][-1] / ms['V3.2'][-1]:.1f} times as fast"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)
    print(f"figure   {out}")


# %% Exercises -------------------------------------------------------------------------------
# 1. Break it: leave out the ReLU of eq. 1. Which check stops the chapter? Without it the scores are
#    one product of a mixed query with the key: why would J heads then be no better than one?
# 2. Let eq. 3 use the attention of one head alone instead of all, and train the Reader again. With
#    four heads that look for four different things, what would it miss?
# 3. A token of V3.2 reads at most 2,048 entries, say in bf16, and all index keys. From which
#    context on are the keys, in FP8 with 4 bytes of scale each, more bytes than the entries?


def arguments() -> argparse.Namespace:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    cli.add_argument("--device", default=default, help="cpu, cuda, cuda:1, … (%(default)s)")
    cli.add_argument("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    cli.add_argument("--bench", action="store_true", help="decode to 128k tokens, not 32k")
    cli.add_argument("--out", type=Path, default="runs", help="folder of the figure (%(default)s/)")
    args = cli.parse_args()
    if not 0 <= args.seed < 2**63:
        cli.error(f"--seed must be >= 0 and fit 63 bits, got {args.seed}")
    try:
        torch.zeros(1, dtype=torch.float64, device=args.device).item()  # the checks need float64
    except Exception as error:  # each backend raises a type of its own
        cli.exit(2, f"cannot run on --device {args.device}: {str(error).splitlines()[0][:100]}\n")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        cli.error(f"--out {args.out}: {error.strerror}; want a folder that can be written to")
    return args


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    args = arguments()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # graphs and timers are of the current one
    torch.manual_seed(args.seed)
    verify_layer(device)
    verify_learning(device)
    reader = train_reader(device)
    sizes = [1, 2, 4, 8, 16, 32, 64]
    right = compare_choices(reader, sizes)
    contexts = [4096 * 2**i for i in range(6 if args.bench else 4)]
    ms = decode(device, contexts, rounds=9 if args.bench else 7)
    draw(right, sizes, ms, contexts, args.out / "10_sparse_attention.png")


if __name__ == "__main__":
    main()
