# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<=2.13", "numpy>=1.26", "tiktoken>=0.8", "regex>=2024.5", "matplotlib>=3.8",
#   "safetensors>=0.4.5", "tqdm>=4.66",
# ]
# ///
r"""10 · Sparse attention: a small indexer points at 2,048 tokens, and no others are read.

V3 made the cache short (02), and yet each new token reads all of it: at 131,072 tokens a layer of
V3 multiplies 18.3 billion numbers for one. V3.2 is V3 with an indexer in each layer. It scores all
tokens by 8,192 products each instead of 139,264, and attention reads the 2,048 best: 1.4 billion.

    x (B,T,C) ─┬─ 02's query latent c (B,T,Q) ─── W_q ─► qᴵ (B,J,T,E) ─ RoPE ──┐
               ├─ W_w ──────────────────────────────────► w  (B,T,J) ─────┐    │
               ├─ W_k ─ LayerNorm ─ RoPE ──► kᴵ (B,T,E) ─► LatentCache    ▼    ▼
               │                                  (B,S,L+R+E) ─┬─ kᴵ ─► scores I (B,T,S)
               └─ 02's latent and turned key (B,T,L+R) ──┘     │              │ top K
                                                               └─ K entries of S ─► 02's attention

    scores    I_ts = Σⱼ w_tj · ReLU(qᴵ_tj · kᴵ_s)                                      [1] eq. 1
    attention u_t = Attn(x_t, {entry_s | I_ts is among the K largest of I_t})          [1] eq. 2
    warm-up   Σ_t KL(p_t ‖ softmax(I_t)), p_t: the heads' softmax weights, averaged    [1] eq. 3
    sparse    the same over the K chosen alone, while the model learns to read them    [1] eq. 4

    axis  config name       here  V3.2
    J     index_n_heads        4    64     [1] DeepSeek-V3.2, arXiv:2512.02556
    E     index_head_dim      16   128     [2] its released inference code
    K     index_topk          16  2048
    B, T, S, C, Q, L, R, H                 as in 02

The choice passes no gradient, so the indexer learns from eq. 3 and 4 alone, and its inputs are
detached: nothing that it learns reaches the model. [2] keeps kᴵ in FP8, after a Hadamard turn of
both sides that no product feels; here it is one more part of the cache's entry, in its dtype.

Run:  python 10_sparse_attention.py [--bench]          40 s on two CPU cores, 55 s with --bench
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

mla = import_module("02_mla")  # MultiHeadLatentAttention, LatentCache, apply_rope, visible
base = import_module("06_train")  # DeepSeek, DeepSeekConfig, Block

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
    c = layer.query_latent(x[None])
    q_nope, q_rope = (q[0] for q in layer.queries(c, cos, sin))  # (H, T, N), (H, T, R)
    latent, k_rope = (part[0] for part in layer.latents(x[None], cos, sin))  # (T, L), (T, R)
    scores = scores_reference(*(part[0] for part in layer.indexer(x[None], c, cos, sin)))
    out = []
    for t in range(T):
        best = scores[t, : t + 1].argsort(descending=True)[: layer.index_topk].tolist()
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

AT_A_TIME = 2**25  # numbers that are gathered and scored


class LightningIndexer(nn.Module):
    """What a query looks for and what a token offers, for `index_scores` ([1] §2.1).

    Its rotary channels come first and are turned in halves, unlike those of the attention beside
    it; its keys have a LayerNorm, with a bias. Parameters carry the names of the released files.
    q_lora_rank None: it reads x, as the queries beside it do (V3.2 has no such model).
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
        first, rest = channels.split((self.rotary, channels.shape[-1] - self.rotary), -1)
        return torch.cat((mla.apply_rope(first, cos, sin, interleaved=False), rest), -1)

    def forward(
        self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C), query latent c (B, T, Q), angles (T, R/2) or (B, T, R/2) ->
        queries (B, J, T, E), their heads' weights (B, T, J), keys (B, T, E)."""
        q = self.wq_b(c).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, J, T, E)
        k = self.wk(x)  # (B, T, E)
        k = self.k_norm(k.to(self.k_norm.weight.dtype)).to(k.dtype)
        w = self.weights_proj(x) * (self.heads * q.shape[-1]) ** -0.5  # [2]: 1/√J and 1/√E
        return self.turned(q, cos.unsqueeze(-3), sin.unsqueeze(-3)), w, self.turned(k, cos, sin)


def index_scores(q: Tensor, w: Tensor, k: Tensor) -> Tensor:
    """[1] eq. 1: queries (B, J, T, E), weights (B, T, J), keys (B, S, E) -> (B, T, S) in fp32 or
    wider.

    Some queries at a time: all heads' products at once would be J times as many as the scores.
    """
    wide, k = torch.promote_types(q.dtype, torch.float32), k.to(q.dtype)
    J, S = q.shape[1], k.shape[1]
    rows, scores = max(1, 2**22 // max(J * S, 1)), []
    for q_rows, w_rows in zip(q.split(rows, 2), w.split(rows, 1), strict=True):
        # the keys on the left: a long transposed matrix would be copied
        products = k @ q_rows.transpose(1, 2).flatten(1, 2).mT  # (B, S, t·J)
        by_query = products.relu().to(wide).unflatten(-1, (-1, J)).transpose(1, 2)  # (B, t, S, J)
        scores.append((by_query @ w_rows[..., None].to(wide))[..., 0])  # (B, t, S)
    return torch.cat(scores, 1)


def highest(scores: Tensor, seen: Tensor, count: int) -> Tensor:
    """Of what each query may see, the `count` slots that it scores highest: (B, T, S) bool."""
    best = scores.masked_fill(~seen, -math.inf).topk(min(count, scores.shape[-1])).indices
    return torch.zeros_like(seen).scatter(-1, best, True) & seen


def index_divergence(attended: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
    """[1] eq. 3 and 4, a mean: KL(p_t ‖ softmax(I_t)) over the slots in `chosen`, in nats.

    attended: p, (B, T, S), each row's sum is 1 and what is not chosen is 0; scores: I, (B, T, S);
    chosen: (B, T, S) bool. Gradients reach the scores alone.
    """
    log_index = scores.masked_fill(~chosen, -math.inf).log_softmax(-1).masked_fill(~chosen, 0.0)
    p = attended.detach().to(scores.dtype)
    return (torch.xlogy(p, p) - p * log_index).sum(-1).mean()


class SparseLatentAttention(mla.MultiHeadLatentAttention):
    """02's layer, reading only the `index_topk` tokens that its indexer scores highest.

    x: (B, T, C) -> (B, T, C); a cache of 02, contiguous or paged, with room for R + E behind the
    latent. Its sizes are those of 02, and by name the indexer's. A few queries on a long cache
    gather their entries and read these, absorbed; many on a short one read all of it under a mask:
    the same numbers, and the work of a dense layer.
    dense=True reads everything, as while the indexer warms up. In training a forward without a
    cache leaves `index_loss`, eq. 3 if dense, else eq. 4, for the trainer to add; else it is None.
    """

    def __init__(
        self, hidden_size: int, *sizes, index_n_heads: int, index_head_dim: int, index_topk: int,
        linear=nn.Linear, **named,
    ):  # fmt: skip
        super().__init__(hidden_size, *sizes, linear=linear, **named)
        index = index_n_heads, index_head_dim, self.latent_split[1]
        self.indexer = LightningIndexer(hidden_size, self.q_lora_rank, *index, linear)
        self.index_topk, self.dense, self.index_loss = index_topk, False, None

    def forward(
        self, x: Tensor, cache: "mla.LatentCache | None" = None, gather: bool | None = None
    ) -> Tensor:
        """gather: which form; None: the one with fewer products, and never while learning."""
        (L, R), (B, T, _), learning = self.latent_split, x.shape, torch.is_grad_enabled()
        cos, sin = self.cos_sin(self.positions(x, cache), x.dtype)
        c = self.query_latent(x)
        q_nope, q_rope = self.queries(c, cos, sin)
        latent, k_rope = self.latents(x, cos, sin)
        q, w, k = self.indexer(x.detach(), c.detach(), cos, sin)
        if cache is None:
            entries = torch.cat((latent, k_rope, k), -1)
            lengths = x.new_full((B,), T, dtype=torch.int64)
        else:
            entries, lengths = cache.append(latent, torch.cat((k_rope, k), -1)), cache.lengths
            if cache.pages is not None:
                entries = mla.unpaged(entries, cache.pages, lengths, cache.used)[:, : cache.used]
        entries, k = entries.split((L + R, k.shape[-1]), -1)  # (B, S, L + R), (B, S, E)
        S, everything = entries.shape[1], self.dense or entries.shape[1] <= self.index_topk
        training, self.index_loss = self.training and learning and cache is None, None
        if gather is None:
            gather = not learning and self.gathering_pays(T, S)
        if everything and not training:
            out = self.read_all(q_nope, q_rope, entries, lengths)
        elif gather and not training:
            out = self.read_gathered(q_nope, q_rope, entries, (q, w, k), lengths)
        else:
            seen, scores = mla.visible(lengths, T, S)[:, 0], index_scores(q, w, k)  # (B, T, S)
            chosen = seen if everything else highest(scores, seen, self.index_topk)
            out = self.read(q_nope, q_rope, entries, chosen)
            if training:
                attended = self.attended(q_nope, q_rope, entries, chosen)
                self.index_loss = index_divergence(attended, scores, chosen)
        return self.o_proj(out.flatten(2))

    def gathering_pays(self, T: int, S: int) -> bool:
        """Whether K entries a query, absorbed, take fewer products than S spelled out for T."""
        (L, R), (N, V) = self.latent_split, self.kv_split
        return T * self.index_topk * (2 * L + R) < S * (L * (N + V) + T * (N + R + V))

    def read(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, mask: Tensor | None) -> Tensor:
        """Entries (B, S, L + R), spelled out, where mask (B, T, S) allows -> (B, T, H, V)."""
        latent, k_rope = entries.to(q_nope.dtype).split(self.latent_split, -1)
        mask = None if mask is None else mask[:, None]
        return self.explicit(q_nope, q_rope, latent, k_rope, mask).transpose(1, 2)

    def read_all(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, lengths: Tensor) -> Tensor:
        """As 02 does: absorbed for a few queries behind others -> (B, T, H, V)."""
        T, S = q_nope.shape[2], entries.shape[1]
        if S > T and T < self.absorb_below:
            return self.absorbed(q_nope, q_rope, entries, lengths).transpose(1, 2)
        mask = mla.visible(lengths, T, S)[:, 0] if S > T else None
        return self.read(q_nope, q_rope, entries, mask)

    def read_gathered(
        self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, index: tuple, lengths: Tensor
    ) -> Tensor:
        """The K entries that each query scores highest, as a cache of its own -> (B, T, H, V).

        index: what the indexer gave. Some queries at a time: each gathers K entries and scores S.
        """
        (B, S, width), T, (q, w, k) = entries.shape, q_nope.shape[2], index
        K = min(self.index_topk, S)
        rows, out = max(1, AT_A_TIME // (B * (K * width + S))), []
        ends = lengths[:, None] - T + torch.arange(1, T + 1, device=lengths.device)  # (B, T)
        parts = (q_nope, 2), (q_rope, 2), (q, 2), (w, 1), (ends, 1)
        for nope, rope, q_rows, w_rows, end in zip(
            *(part.split(rows, axis) for part, axis in parts), strict=True
        ):
            unseen = torch.arange(S, device=end.device) >= end[..., None]  # (B, t, S)
            scores = index_scores(q_rows, w_rows, k).masked_fill(unseen, -math.inf)
            best = scores.topk(K).indices.flatten(1)  # (B, t·K), of each query the unseen last
            own = entries.gather(1, best[..., None].expand(-1, -1, width)).view(-1, K, width)
            each = (part.transpose(1, 2).flatten(0, 1)[:, :, None] for part in (nope, rope))
            o = self.absorbed(*each, own, end.clamp(max=K).flatten())  # (B·t, H, 1, V)
            out.append(o[:, :, 0].unflatten(0, (B, -1)))
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
        index = {key: raw[key] for key in raw if key.startswith("index_")}
        rest = {key: raw[key] for key in raw.keys() - index.keys()} | {"model_type": "deepseek_v3"}
        known = {key: index[key] for key in cls.__annotations__ if key in index}
        return replace(super().from_dict(rest), **known)

    def to_dict(self) -> dict:
        names = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
        return super().to_dict() | names


class SparseBlock(base.Block):
    @staticmethod
    def attention(config: SparseConfig) -> Callable:
        sizes = {key: getattr(config, key) for key in SparseConfig.__annotations__}
        return partial(SparseLatentAttention, **sizes)


class SparseDeepSeek(base.DeepSeek):
    """DeepSeek-V3.2 of any size, a DeepSeek of 06 in all else: its files, `generate` and drafts.

    Released files: load_released(folder, model_class=SparseDeepSeek) in 08.
    """

    Config, Block = SparseConfig, SparseBlock

    @classmethod
    def from_dense(
        cls, model: base.DeepSeek, index_n_heads: int, index_head_dim: int, index_topk: int
    ) -> "SparseDeepSeek":
        """A copy of a V3, as V3.2 began: its weights, and indexers that have learnt nothing."""
        index = {"index_n_heads": index_n_heads, "index_head_dim": index_head_dim}
        config = SparseConfig(**vars(model.config), **index, index_topk=index_topk)
        sparse = cls(config, model.precision).to(model.lm_head.weight)
        own = {n: t for n, t in sparse.state_dict().items() if ".indexer." in n}
        sparse.load_state_dict(own | model.state_dict())
        return sparse

    def new_caches(self, batch: int, max_tokens: int, layers: int | None = None) -> list:
        c, weight = self.config, self.lm_head.weight
        place = {"device": weight.device, "dtype": base.narrow(weight[:1]).dtype}
        sizes = batch, max_tokens, c.kv_lora_rank, c.qk_rope_head_dim + c.index_head_dim
        count = len(self.model.layers) if layers is None else layers
        return [mla.LatentCache(*sizes, **place) for _ in range(count)]

    def attentions(self) -> list[SparseLatentAttention]:
        return [m for m in self.modules() if isinstance(m, SparseLatentAttention)]

    def warm_up(self, warming: bool = True) -> None:
        """[1]'s first stage: read everything, only the indexers learn. False: its second."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not warming or ".indexer." in name)
        for attention in self.attentions():
            attention.dense = warming

    def index_loss(self) -> Tensor:
        """Sum over the layers of what their last training forward left."""
        return torch.stack(
            [a.index_loss for a in self.attentions() if a.index_loss is not None]
        ).sum()


# %% 4. Is it right? -------------------------------------------------------------------------
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16}
SIZES |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
INDEX = {"index_n_heads": 16, "index_head_dim": 8, "index_topk": 6}
EXACT = 1e-12  # float64: sums of about 100 terms of size 1, each off by 1e-16


# same as 01_attention.py
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


# same as 01_attention.py
def measure(name: str, value: float, text: str = "") -> None:
    """Print one measured number: identifier, value, free text (unit, rival, paper's value)."""
    print(f"measure  {name:<44} {value:.5g} {text}".rstrip())


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
    check("eq. 3, by hand", kl, torch.tensor(by_hand), 1e-6)
    layer = SparseLatentAttention(**SIZES, **INDEX).to(device).train()
    out = layer(torch.randn(2, 40, 32, device=device))
    indexer = list(layer.indexer.parameters())
    others = [p for p in layer.parameters() if not any(p is own for own in indexer)]

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
        self.attention = SparseLatentAttention(**sizes)
        self.head = nn.Linear(64, self.VALUES, bias=False)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        return self.head(self.out(self.attention(self.norm(self.key(keys) + self.value(values)))))

    def batch(self, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
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
        loss, right = reader.answers(reader.batch())
        index_loss = reader.attention.index_loss if index else torch.zeros(())
        (loss + index_loss).backward()
        optimizer.step()
        reader.zero_grad()
        yield right.item(), index_loss.item()


def train_reader(device: torch.device, index_topk: int = 16) -> Reader:
    """Dense until it can read, then [1]'s two stages."""
    reader = Reader(index_topk).to(device)
    attention, everything = reader.attention, list(reader.parameters())
    attention.dense = True
    for step, (right, _) in enumerate(learn(reader, everything, 3e-3, index=False), 1):
        if right > 0.99 or step == 600:
            break
    report(reader, "dense", f"reads all 320 tokens, after {step} steps")
    attention.dense = False
    report(reader, "untrained_indexer", f"reads the {index_topk} that it scores highest")
    attention.dense = True
    warming = learn(reader, list(attention.indexer.parameters()), 1e-2, index=True)
    losses = [index_loss for _, index_loss in itertools.islice(warming, 100)]
    attention.dense = False
    text = f"index loss {losses[0]:.2f} -> {losses[-1]:.2f} nats"
    report(reader, "warm_up", f"100 steps of eq. 3, the rest frozen: {text}")
    for _ in itertools.islice(learn(reader, everything, 1e-3, index=True), 60):
        pass
    report(reader, "sparse_training", "60 steps of everything, eq. 4")
    return reader.eval()


@torch.no_grad()
def report(reader: Reader, name: str, text: str) -> None:
    reader.eval()
    loss, right = reader.answers(reader.batch(64))
    measure(f"right_{name}", right.item(), f"loss {loss.item():.3f}   {text}")


@torch.no_grad()
def compare_choices(reader: Reader, sizes: list[int]) -> dict[str, list[float]]:
    """Right answers against K, of the tokens that each of four ways to choose finds."""
    attention, (keys, values, want) = reader.attention, reader.batch(64)
    x = reader.norm(reader.key(keys) + reader.value(values))
    cos, sin = attention.cos_sin(attention.positions(x, None), x.dtype)
    c = attention.query_latent(x)
    q, entries = attention.queries(c, cos, sin), torch.cat(attention.latents(x, cos, sin), -1)
    seen = torch.ones(len(x), *x.shape[1:2] * 2, dtype=torch.bool, device=x.device).tril()
    scores = {
        "its indexer": index_scores(*attention.indexer(x, c, cos, sin)),
        "its attention to all": attention.attended(*q, entries, seen),
        "the last": torch.arange(x.shape[1], device=x.device).float().expand_as(seen),
        "any": torch.rand(seen.shape, device=x.device),
    }
    right = {name: [] for name in scores}
    for K, (name, score) in itertools.product(sizes, scores.items()):
        out = attention.read(*q, entries, highest(score, seen, K)).flatten(2)
        logits = reader.head(reader.out(attention.o_proj(out)))[:, -want.shape[1] :]
        right[name].append((logits.argmax(-1) == want).float().mean().item())
    return right


# %% 6. How fast? ----------------------------------------------------------------------------


def race(tasks: dict[str, Callable], device: torch.device, rounds: int) -> dict[str, float]:
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


@torch.no_grad()
def decode(device: torch.device, contexts: list[int], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one token's attention in one layer of V3's and V3.2's size, batch 1, bf16:
    what comes between the projections of x, absorption included."""
    heads = {"num_attention_heads": 128, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
    heads |= {"qk_rope_head_dim": 64, "v_head_dim": 128, "index_n_heads": 64, "index_head_dim": 128}
    layer = SparseLatentAttention(64, q_lora_rank=64, index_topk=2048, **heads)
    layer = layer.to(device, torch.bfloat16)
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    q, index_q, w = (make(1, 128, 1, n) for n in (128, 64)), make(1, 64, 1, 128), make(1, 1, 64)
    q_nope, q_rope = q
    found: dict[str, list[float]] = {"V3": [], "V3.2": [], "of that, index scores": []}
    for S in contexts:
        entries, k = make(1, S, 576 + 128).split((576, 128), -1)
        whole, lengths = entries.contiguous(), torch.tensor([S], device=device)
        score = partial(index_scores, index_q, w, k)
        dense = partial(layer.absorbed, q_nope, q_rope, whole)
        index = index_q, w, k
        sparse = partial(layer.read_gathered, q_nope, q_rope, entries, index, lengths)
        tasks = {"V3": dense, "V3.2": sparse, "of that, index scores": score}
        ms = race(tasks, device, rounds)
        for name, value in ms.items():
            found[name].append(value)
        text = f"ms a token at {S:,}; V3: {ms['V3']:.3g}, {ms['V3'] / ms['V3.2']:.2f}x"
        measure(f"decode_v32_{S // 1024}k", ms["V3.2"], text)
    return found


def draw(right: dict, sizes: list[int], ms: dict, contexts: list[int], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
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
        f"The indexer finds {right['its indexer'][index]:.0%} of the answers in 16 of 320 tokens; "
        f"at {contexts[-1] // 1024}k V3.2 takes 1/{ms['V3'][-1] / ms['V3.2'][-1]:.1f} of V3's time"
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
# 3. A token of V3.2 reads at least 2,048 entries and all index keys. From which context on do the
#    keys, in FP8 with 4 bytes of scale, take more bytes than the entries read?


def arguments() -> argparse.Namespace:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    cli.add_argument("--device", default=default, help="cpu, cuda, cuda:1, … (%(default)s)")
    cli.add_argument("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    cli.add_argument("--bench", action="store_true", help="decode to 128k tokens, not 32k")
    cli.add_argument("--out", type=Path, default="runs", help="folder of the figure (%(default)s/)")
    args = cli.parse_args()
    if args.out.exists() and not args.out.is_dir():
        cli.error(f"--out {args.out} is a file: want a folder")
    try:
        torch.zeros(1, dtype=torch.float64, device=args.device).item()  # the checks need float64
    except Exception as error:  # each backend raises a type of its own
        cli.exit(2, f"cannot run on --device {args.device}: {str(error).splitlines()[0][:100]}\n")
    return args


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    verify_layer(device)
    verify_learning(device)
    reader = train_reader(device)
    sizes = [1, 2, 4, 8, 16, 32, 64]
    right = compare_choices(reader, sizes)
    contexts = [2048 * 2**i for i in range(7 if args.bench else 5)]
    ms = decode(device, contexts, rounds=9 if args.bench else 7)
    draw(right, sizes, ms, contexts, args.out / "10_sparse_attention.png")


if __name__ == "__main__":
    main()
