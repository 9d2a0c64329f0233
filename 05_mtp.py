# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11,<=2.13", "matplotlib>=3.8", "numpy>=1.26"]
# ///
r"""05 · MTP: predict two tokens at a time; train on both, then let the second one save a pass.

DeepSeek-V3 guesses the token after the next one right 85-90 % of the time [1]. A pass that checks
such a guess is hardly dearer than one that makes a token, and when the guess was right it has made
two: 1.8 times the tokens a second, of the same text. (In this chapter's small model a draft costs
0.6 of a pass, and the same text takes no less time. Eight layers that an H200 trained for a minute
write 1.49 times as fast: benchmarks/mtp.py --graphs.)

    t₁ … t_T ─► trunk ─► norm ─► hᵢ ──────────┬────► head ─► P(tᵢ₊₁)        the main model
                                              ▼
    tᵢ₊₁ ─► embed ─► enorm ─┐       ┌─ hnorm ─┘
                            ▼       ▼
                     eh_proj [e ; h] ─► block ─► norm ─► h¹ᵢ ─► head ─► P¹(tᵢ₊₂)   the module
                                                          └─► the next module, with tᵢ₊₂

    input    h'ᵢ = M [RMSNorm(hᵏ⁻¹ᵢ) ; RMSNorm(Emb(tᵢ₊ₖ))]                       [1] eq. 21
    block    hᵏ₁ … hᵏ_T₋ₖ = TRMₖ(h'₁ … h'_T₋ₖ)                                   [1] eq. 22
    output   Pᵏ(tᵢ₊ₖ₊₁) = head(hᵏᵢ), the main model's head and embedding         [1] eq. 23
             M: eh_proj, TRMₖ: the block of module k = 1 … D, h⁰: the main model's states h
    loss     Lᵏ = −1/T Σ ln Pᵏ(tᵢ), i = 2+k … T+1;     λ/D Σₖ Lᵏ is added        [1] eq. 24, 25
    accept   a draft d ~ q, where the main model says p: with min(1, p(d)/q(d))   [2] alg. 1
    else     draw from max(0, p − q), normalised: then the token is distributed as p

    axis  config name               here  V3      [1] DeepSeek-V3, arXiv:2412.19437
    T     context                    128  4096    [2] Leviathan et al. 2023, arXiv:2211.17192
    C     hidden_size                 96  7168
    V     vocab_size                 256  129280
    D     num_nextn_predict_layers     1  1       λ = 0.3, for the last third of the tokens 0.1

The released weights want [RMSNorm(Emb) ; RMSNorm(h)], the embedding first: eq. 21 prints the other
order. h is the state after the model's last norm, and a position keeps its number in the module.

Run:  python 05_mtp.py [--bench]          30 s on two CPU cores
"""

import argparse
import copy
import itertools
import keyword
import math
import os
import re
import statistics
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# %% 1. The equations, word for word ---------------------------------------------------------


def mtp_reference(modules, embed, head, states: Tensor, t: list[int]) -> Tensor:
    """[1] eq. 21-25 without λ, for one sequence: states (T, C) float64, t its T + 1 tokens."""
    T, total = len(states), 0.0
    h = list(states)
    for k, module in enumerate(modules, start=1):
        joined = []
        for i in range(T - k):  # eq. 21, with the embedding first; i counts from 0
            parts = module.enorm(embed.weight[t[i + k]]), module.hnorm(h[i])
            joined.append(module.eh_proj.weight @ torch.cat(parts))
        for i in range(T - k):  # eq. 22, each position with what stands before it and no more
            seen = torch.stack(joined[: i + 1])[None]
            h[i] = module.shared_head.norm(module.block(seen)[0, -1])
            total = total - (head.weight @ h[i]).log_softmax(0)[t[i + k + 1]] / T  # eq. 23, 24
    return total / len(modules)


def output_distribution(p: Tensor, q: Tensor) -> Tensor:
    """[2] alg. 1 by enumeration: how likely is each of the V tokens, over all drafts d ~ q?"""
    V, out = len(p), []
    rest = [max(0.0, p[x] - q[x]) for x in range(V)]
    for x in range(V):
        chance = 0.0
        for d in range(V):
            accepted = min(1.0, p[d] / q[d]) if q[d] > 0 else 0.0
            redrawn = (1 - accepted) * rest[x] / sum(rest) if accepted < 1 and sum(rest) else 0.0
            chance += q[d] * ((accepted if d == x else 0.0) + redrawn)
        out.append(chance)
    return torch.tensor(out, dtype=p.dtype)


# %% 2. The piece ----------------------------------------------------------------------------


# >>> copy: MTPModule, mtp_loss, choose, accept_or_redraw, speculative_generate (needs torch)
class MTPModule(nn.Module):
    """One depth of multi-token prediction (V3 eq. 21, 22): the state that predicts tᵢ₊₂, not tᵢ₊₁.

    block: a causal transformer block, called as block(x) or block(x, cache), (B, T, C) -> the same.
    Parameters carry the names of the released checkpoints, where they lie, with those of the block,
    in the layer after the last. Embedding and head are the main model's and stay with it.
    """

    def __init__(self, block: nn.Module, hidden_size: int, rms_norm_eps: float = 1e-6):
        super().__init__()
        self.enorm = nn.RMSNorm(hidden_size, eps=rms_norm_eps)
        self.hnorm = nn.RMSNorm(hidden_size, eps=rms_norm_eps)
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.block = block
        self.shared_head = nn.ModuleDict({"norm": nn.RMSNorm(hidden_size, eps=rms_norm_eps)})

    def forward(self, embedded: Tensor, hidden: Tensor, cache=None) -> Tensor:
        """Position i joins the state hᵢ with the embedding of a later token -> (B, T, C), normed.

        embedded, hidden: (B, T, C) each; hidden is the main model's after its last norm, or the
        output of the module before. With a cache, the positions stand behind those it holds.
        """
        joined = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1))
        x = joined.to(hidden.dtype)  # (B, T, C): what blocks add up stays fp32 under autocast
        x = self.block(x) if cache is None else self.block(x, cache)
        return self.shared_head["norm"](x)


def mtp_loss(
    modules, embed, head, hidden: Tensor, tokens: Tensor, weight: float = 0.3,
    documents: Tensor | None = None, nats=None,
) -> Tensor:  # fmt: skip
    """λ/D Σₖ Lᵏ (V3 eq. 24, 25), to be added to the main loss. Each Lᵏ is divided by T, not T − k.

    modules: the D modules, a chain. hidden: (B, T, C), the main model's states after its last norm
    over tokens[:, :T]; tokens: (B, T + 1), one more, the label of the last. weight: λ.
    embed, head: the main model's, (B, T) -> (B, T, C) and (…, C) -> (…, V).
    documents: (B, T + 1) int, which document a token is of; where hᵢ and the token that joins it
    are of two, nothing is predicted. nats: head and −Σ ln p in one, (N, C), (N,) -> (); labels of
    -100 don't count. ValueError: no module, tokens or documents of another shape, or fewer than
    D + 2 tokens.
    """
    (B, T), D = hidden.shape[:2], len(modules)
    if D == 0:
        raise ValueError("MTP of depth 0: there is no module to train")
    if tokens.shape != (B, T + 1):
        raise ValueError(f"hidden of {B} x {T} wants tokens ({B}, {T + 1}): {tuple(tokens.shape)}")
    if documents is not None and documents.shape != tokens.shape:
        raise ValueError(f"documents {tuple(documents.shape)}, tokens {tuple(tokens.shape)}")
    if T + 1 < D + 2:
        raise ValueError(f"depth {D} predicts nothing in {T + 1} tokens: it needs {D + 2}")

    def sum_of_cross_entropies(h: Tensor, y: Tensor) -> Tensor:
        logits = head(h)  # (N, V)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), y, reduction="sum")

    nats, total = nats or sum_of_cross_entropies, 0.0
    for k, module in enumerate(modules, start=1):
        hidden = module(embed(tokens[:, k:T]), hidden[:, : T - k])  # (B, T − k, C)
        labels = tokens[:, k + 1 :]
        if documents is not None:
            labels = labels.masked_fill(documents[:, : T - k] != documents[:, k:T], -100)
        total = total + nats(hidden.flatten(0, 1), labels.flatten())
    return weight / D * total / (B * T)


def validate_drawing(temperature: float, top_p: float) -> None:
    """ValueError: temperature below 0, or so near 0 that logits would overflow; top_p not > 0."""
    if not (temperature == 0 or 1e-5 <= temperature < float("inf")) or not 0 < top_p <= 1:
        got = f"{temperature}, {top_p}"
        raise ValueError(f"want temperature 0 or >= 1e-5, and 0 < top_p <= 1, got {got}")


def padded_prompts(
    prompts: list[list[int]], max_new_tokens: int, temperature: float, top_p: float
) -> tuple[Tensor, list[int]]:
    """(B, T) int64 with zeros on the right, and the lengths. ValueError: no prompt, an empty one,
    or impossible settings, before any pass is spent on them."""
    lengths = [len(prompt) for prompt in prompts]
    if not prompts or min(lengths) == 0:
        raise ValueError(f"every prompt needs at least one token, got lengths {lengths}")
    if max_new_tokens < 0:
        raise ValueError(f"want max_new_tokens >= 0, got {max_new_tokens}")
    validate_drawing(temperature, top_p)
    padded = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.tensor(prompt)
    return padded, lengths


def ends_of(eos_token_id: int | list[int] | None) -> set:
    """The tokens that end a text: one, several, or None. TypeError: anything else."""
    several = isinstance(eos_token_id, list | tuple | set)
    ends = eos_token_id if several else [eos_token_id]
    if not all(end is None or hasattr(end, "__index__") for end in ends):
        raise TypeError(f"want the id of a token, or a list of such, got {eos_token_id!r}")
    return {None if end is None else int(end) for end in ends}


def probabilities(logits: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """logits: (…, V) -> the distribution to draw from, (…, V) fp32.

    temperature 0 puts all of it on the likeliest token. top_p < 1 keeps the smallest set of tokens
    that holds so much. ValueError as `validate_drawing`.
    """
    validate_drawing(temperature, top_p)
    if temperature == 0:
        likeliest = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, likeliest, 1.0)
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = probs.sort(-1, descending=True)
        before = ranked.cumsum(-1) - ranked  # the probability of all likelier tokens
        kept = torch.zeros_like(probs).scatter(-1, order, ranked.masked_fill(before >= top_p, 0))
        probs = kept / kept.sum(-1, keepdim=True)
    return probs


def choose(logits: Tensor, temperature: float, top_p: float = 1.0, generator=None) -> Tensor:
    """logits: (B, V) -> one token a row, (B,); the other arguments as in `probabilities`."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = probabilities(logits, temperature, top_p)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def accept_or_redraw(
    draft: Tensor, q_logits: Tensor, logits: Tensor, temperature: float, top_p=1.0, generator=None
) -> tuple[Tensor, Tensor]:
    """Is the draft taken, and which token comes after it, or in its place (arXiv:2211.17192)?

    draft: (B,), drawn from q_logits (B, V); logits: (B, 2, V), the main model's for the draft's
    place and for the next -> bool (B,), tokens (B,). The text, with the draft where it is taken, is
    distributed as the main model's. ValueError: other shapes.
    """
    B, V = q_logits.shape
    if draft.shape != (B,) or logits.shape != (B, 2, V):
        got = f"{tuple(draft.shape)}, {tuple(q_logits.shape)}, {tuple(logits.shape)}"
        raise ValueError(f"want draft (B,), q_logits (B, V), logits (B, 2, V), got {got}")
    if temperature == 0:  # what the rule below comes to where p and q are sure
        likeliest = logits.argmax(-1)  # (B, 2)
        taken = draft == likeliest[:, 0]
        return taken, torch.where(taken, likeliest[:, 1], likeliest[:, 0])
    p, q = (probabilities(x, temperature, top_p) for x in (logits, q_logits))  # (B, 2, V), (B, V)
    p_draft, q_draft = (x.gather(1, draft[:, None])[:, 0] for x in (p[:, 0], q))  # (B,)
    uniform = torch.rand(len(draft), generator=generator, device=draft.device)
    taken = uniform * q_draft < p_draft  # with probability min(1, p/q)
    rest = (p[:, 0] - q).clamp(min=0)  # where p says more than q has brought
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[:, 0])  # p = q but for rounding
    following = torch.where(taken[:, None], p[:, 1], rest)
    return taken, torch.multinomial(following, 1, generator=generator)[:, 0]


@torch.no_grad()
def speculative_generate(
    model, module: MTPModule | None, prompts: list[list[int]], max_new_tokens: int,
    temperature: float = 0.0, top_p: float = 1.0, eos_token_id: int | list[int] | None = None,
    generator: torch.Generator | None = None, listen=None,
) -> tuple[list[list[int]], list[list[bool]]]:  # fmt: skip
    """What the main model alone would write, two tokens a pass where the module guessed right.

    Returns the new tokens of each prompt, and of each draft whether it was accepted. Greedy text
    (temperature 0) is the main model's own; sampled text has its distribution (arXiv:2211.17192).
    A pass over two tokens may round otherwise than one over one: in bf16 that decides near ties.
    prompts may differ in length; a row ends with eos_token_id (or one of them; kept) or
    max_new_tokens.
    listen(row, token) is called with each as it is chosen.

    model: embed(tokens) -> (B, T, C), hidden(tokens, caches) -> (B, T, C) after the last norm,
    head(hidden) -> logits, new_caches(batch, max_tokens, layers=None) -> a list, one a layer;
    a cache has truncate(lengths (B,)), which forgets what comes later. module: depth 1.
    ValueError: no module, no prompt, an empty one, or impossible settings.
    """
    if module is None:
        raise ValueError("no MTP module to draft with: use generate, or train one")
    padded, lengths = padded_prompts(prompts, max_new_tokens, temperature, top_p)
    drawing, ends = (temperature, top_p, generator), ends_of(eos_token_id)
    B, room, device = len(prompts), max(lengths) + max_new_tokens, module.enorm.weight.device
    padded, rows = padded.to(device), torch.arange(B, device=device)
    kept = torch.tensor(lengths, device=device)  # (B,) tokens that each row's caches shall hold
    caches, [module_cache] = model.new_caches(B, room), model.new_caches(B, room, layers=1)
    new, verdicts = [[] for _ in prompts], [[] for _ in prompts]
    going = [max_new_tokens > 0] * B

    def write(row: int, tokens: list[int]) -> None:
        for token in tokens:
            if going[row]:
                new[row].append(token)
                if listen:
                    listen(row, token)
                going[row] = token not in ends and len(new[row]) < max_new_tokens

    states = model.hidden(padded, caches)  # (B, T, C)
    pending = choose(model.head(states[rows, kept - 1]), *drawing)  # (B,) as yet in no cache
    joined = padded.roll(-1, 1)  # (B, T) the token that joins each state: the one after it
    joined[rows, kept - 1] = pending
    for cache in caches:
        cache.truncate(kept)  # the padding is forgotten
    for row, token in enumerate(pending.tolist()):
        write(row, [token])
    counts, fresh = lengths, kept  # (B,) so many pairs of state and token; the rest is padding
    while any(going):
        guess = module(model.embed(joined), states, module_cache)[rows, fresh - 1]  # (B, C)
        if len(set(counts)) > 1:
            module_cache.truncate(kept)  # where a row had fewer pairs, the last ones were padding
        q_logits = model.head(guess)  # (B, V)
        draft = choose(q_logits, *drawing)  # (B,)
        states = model.hidden(torch.stack((pending, draft), 1), caches)  # (B, 2, C)
        logits = model.head(states)  # (B, 2, V) after the pending token; after the draft
        accepted, pending = accept_or_redraw(draft, q_logits, logits, *drawing)  # (B,) each
        steps = torch.stack((accepted, draft, pending), 1).tolist()
        for row, (right, *two) in enumerate(steps):
            if going[row]:
                verdicts[row].append(bool(right))
                write(row, two if right else two[1:])
        # rows that have ended run along on the spot
        counts = [(1 + s[0]) * alive for s, alive in zip(steps, going, strict=True)]
        fresh, used = torch.tensor(counts, device=device), max(counts)
        kept = kept + fresh
        if min(counts) < 2:
            for cache in caches:
                cache.truncate(kept)  # a rejected draft leaves no trace
        # after an accepted draft two pairs are new to the module, else one
        joined = torch.stack((torch.where(accepted, draft, pending), pending), 1)[:, :used]
        states = states[:, :used]
    return new, verdicts


# <<< copy
# %% 3. Is it right? -------------------------------------------------------------------------
# A transformer small enough to read, with all that the piece asks of a model.


class Slots:
    """One layer's keys and values; slot j holds position j, and a query at i sees j <= i."""

    def __init__(self, batch: int, max_tokens: int, width: int, like: Tensor):
        self.k, self.v = like.new_zeros(2, batch, max_tokens, width)  # (B, S, C) each
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=like.device)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(k), device=k.device)[:, None]
        slots = self.lengths[:, None] + torch.arange(k.shape[1], device=k.device)  # (B, T)
        self.k[rows, slots], self.v[rows, slots] = k, v
        self.lengths = self.lengths + k.shape[1]
        used = int(self.lengths.max())
        return self.k[:, :used], self.v[:, :used]

    def truncate(self, lengths: Tensor) -> None:
        self.lengths = lengths.clone()


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


class TinyBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): (B, T, C) -> (B, T, C)."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.RMSNorm(width, eps=1e-6) for _ in "12")
        self.qkv, self.out = (nn.Linear(width, n * width, bias=False) for n in (3, 1))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, cache: Slots | None = None) -> Tensor:
        T, C = x.shape[1:]
        positions, mask = torch.arange(T, device=x.device)[None], None  # (1, T)
        if cache is not None:
            positions = positions + cache.lengths[:, None]  # (B, T)
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)  # (B, T, C) each
        speed = 1e4 ** -torch.linspace(0, 1, C // self.heads // 2, device=x.device, dtype=x.dtype)
        angles = (positions[..., None] * speed)[:, :, None]  # (B, T, 1, R/2), for every head
        q, k = (
            apply_rope(z.unflatten(-1, (self.heads, -1)), angles.cos(), angles.sin()).flatten(2)
            for z in (q, k)
        )
        if cache is not None:
            k, v = cache.append(k, v)  # (B, S, C)
            mask = torch.arange(k.shape[1], device=x.device) <= positions[:, None, :, None]
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm2(x))).square())


class TinyModel(nn.Module):
    """A few blocks, and MTP modules after them: tokens (B, T) -> logits (B, T, V)."""

    def __init__(self, vocab_size: int, width: int, layers: int = 2, depth: int = 1):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(TinyBlock(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.mtp = nn.ModuleList(MTPModule(TinyBlock(width), width) for _ in range(depth))
        nn.init.normal_(self.embed.weight, std=0.1)

    def hidden(self, tokens: Tensor, caches: list | None = None) -> Tensor:
        x = self.embed(tokens)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, cache)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))

    def new_caches(self, batch: int, max_tokens: int, layers: int | None = None) -> list:
        width, like = self.embed.weight.shape[1], self.embed.weight
        count = len(self.blocks) if layers is None else layers
        return [Slots(batch, max_tokens, width, like) for _ in range(count)]

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The likeliest tokens, one a pass, each prompt alone: what speculation has to equal."""
        texts = []
        for tokens in prompts:
            caches, new = self.new_caches(1, len(tokens) + max_new_tokens), []
            for _ in range(max_new_tokens):
                states = self.hidden(torch.tensor([tokens], device=self.head.weight.device), caches)
                tokens = [int(self.head(states[0, -1]).argmax())]
                new += tokens
            texts.append(new)
        return texts


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


def verify_loss(device: torch.device) -> None:
    """Depth 2 against the equations; then nothing of the future may reach a prediction."""
    model = TinyModel(17, 32, depth=2).double().to(device)
    tokens = torch.randint(17, (2, 13), device=device)  # (B, T + 1)
    states = model.hidden(tokens[:, :-1])
    loss = mtp_loss(model.mtp, model.embed, model.head, states, tokens, weight=1.0)
    pairs = zip(states, tokens.tolist(), strict=True)
    want = [mtp_reference(model.mtp, model.embed, model.head, h, t) for h, t in pairs]
    check("loss of depth 2 = [1] eq. 21-25", loss, torch.stack(want).mean(), EXACT)

    def guesses(t: Tensor) -> Tensor:  # (B, T − 1, V): position i guesses t[i + 2]
        joined = model.embed(t[:, 1:-1]), model.hidden(t[:, :-1])[:, :-1]
        return model.head(model.mtp[0](*joined))

    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 17  # the labels of positions 5 and later
    check("a guess of t₇ sees t₀ … t₆ alone", guesses(changed)[:, :6], guesses(tokens)[:, :6], 0)
    if torch.equal(guesses(changed)[:, 6], guesses(tokens)[:, 6]):
        raise SystemExit("check    a guess of t₈ doesn't see t₇   WRONG")


def verify_no_leak(device: torch.device, V: int = 8) -> None:
    """Nobody can guess dice: below ln V a module would be reading its own labels."""
    model = TinyModel(V, 32, layers=1).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(120):
        tokens = torch.randint(V, (32, 33), device=device)
        hidden = model.hidden(tokens[:, :-1])
        loss = mtp_loss(model.mtp, model.embed, model.head, hidden, tokens, weight=1.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() * 32 / 31)  # 31 of T = 32 positions have a label
    late = torch.tensor(losses[-40:]).mean()  # 0.003 above ln V, while it learns; a leak: far below
    check(f"trained on random tokens, loss stays ln {V}", late, torch.tensor(math.log(V)), 0.03)


def verify_greedy(device: torch.device) -> None:
    """Prompts of unequal length in one batch, against one token a pass, each prompt alone."""
    model = TinyModel(3, 32).double().to(device)  # of three tokens a blind guess is often right
    prompts = [torch.randint(3, (length,)).tolist() for length in (1, 2, 7, 12, 30)]
    want = torch.tensor(model.generate(prompts, 40))
    new, verdicts = speculative_generate(model, model.mtp[0], prompts, 40)
    check("greedy text = one token a pass, 5 prompts", torch.tensor(new), want, 0)
    rates = {sum(row) for row in verdicts}
    if len(rates) < 2:
        raise SystemExit(f"check    rows accepted alike, the test shows nothing: {rates}   WRONG")


def verify_sampling(device: torch.device, rows: int = 20_000, V: int = 3) -> None:
    """The distribution of drawn text: exactly, then of the real thing by a chi-square test."""
    p, q = torch.rand(2, 20, V, dtype=torch.float64, device=device)
    p, q = (x.square() / x.square().sum(-1, keepdim=True) for x in (p, q))
    got = torch.stack([output_distribution(*pair) for pair in zip(p, q, strict=True)])
    check("[2]'s rule, over all tokens: drawn from p", got.to(p), p, EXACT)

    model, prompt = TinyModel(V, 16).to(device), [0, 2]
    nn.init.normal_(model.head.weight, std=0.2)  # p and q are uneven; no text is too rare to count
    texts = torch.cartesian_prod(*[torch.arange(V)] * 3).to(device)  # (V³, 3)
    expected, blind = sampled_exactly(model, prompt, texts)
    new, _ = speculative_generate(model, model.mtp[0], [prompt] * rows, 3, temperature=1.0)
    powers = torch.tensor([V * V, V, 1])
    counts = (torch.tensor(new) * powers).sum(-1).bincount(minlength=V**3).to(device)
    chi_square = ((counts - rows * expected).square() / (rows * expected)).sum().cpu()
    # 27 − 1 = 26 degrees of freedom: `error` is about 26 if the decoder is right, and exceeds 60
    # in one run of six thousand
    check(f"χ² of {rows:,} sampled texts, {V**3} kinds", chi_square, torch.tensor(0.0), 60)
    power = rows * ((blind - expected).square() / expected).sum() + V**3 - 1
    measure("chi_square_if_all_drafts_were_taken", power.item(), "χ² would be; the limit is 60")


@torch.no_grad()
def sampled_exactly(model: TinyModel, prompt: list[int], texts: Tensor) -> tuple[Tensor, Tensor]:
    """The probability of each text (N, 3): of the main model; if the second were the draft."""
    whole = torch.cat((torch.tensor(prompt, device=texts.device).expand(len(texts), -1), texts), 1)
    states, last = model.hidden(whole), len(prompt) - 1
    p = model.head(states).softmax(-1)[:, last:-1].gather(-1, texts[..., None])[..., 0]  # (N, 3)
    guess = model.mtp[0](model.embed(whole[:, 1:]), states[:, :-1])[:, last]  # after the first
    q = model.head(guess).softmax(-1).gather(-1, texts[:, 1:2])[:, 0]
    return p.prod(-1), p[:, 0] * q * p[:, 2]


# %% 4. What does it buy? --------------------------------------------------------------------
# A model of bytes, trained for a few seconds on Python's own library. 06_train.py trains the real
# one; benchmarks/mtp.py measures that with the same functions.
KINDS = ("keyword", "identifier", "number", "space", "punctuation")
PATTERN = rf"\b({'|'.join(keyword.kwlist)})\b|([A-Za-z_]\w*)|(\d[\w.]*)|(\s+)|(.)"


def kinds_of(text: str) -> list[str]:
    """What Python takes each character for, by a regular expression."""
    kinds = []
    for match in re.finditer(PATTERN, text, re.DOTALL):
        kinds += [KINDS[match.lastindex - 1]] * len(match[0])
    return kinds


@dataclass
class Guess:
    """One draft: of which new token, what kind of token was right, and whether the draft was it."""

    position: int
    kind: str
    accepted: bool


def guesses_of(
    prompts: list[list[int]], new: list[list[int]], verdicts: list[list[bool]], decode: Callable
) -> list[Guess]:
    """decode: a list of tokens -> str, every token on its own."""
    found = []
    for prompt, tokens, row in zip(prompts, new, verdicts, strict=True):
        pieces = [decode([token]) for token in prompt + tokens]
        kinds, ends = kinds_of("".join(pieces)), list(itertools.accumulate(map(len, pieces)))
        position = 1  # the first new token is no draft's
        for accepted in row:
            place = len(prompt) + position
            begin, piece = ends[place - 1], pieces[place]
            begin += len(piece) - len(piece.lstrip()) if piece.strip() else 0  # " return"
            if piece:  # a special token may have no text
                found.append(Guess(position, kinds[begin], accepted))
            position += 1 + accepted
    return found


@torch.no_grad()
def rates_on(model, module: MTPModule, tokens: Tensor) -> tuple[float, float]:
    """tokens (B, T) of real text -> how often the module's likeliest token is the main model's, and
    Σ min(p, q) of the two distributions: the chance that a draft at temperature 1 is accepted."""
    states = model.hidden(tokens)
    p = model.head(states[:, 1:]).float().softmax(-1)  # after token i + 1, for i = 0 …
    q = model.head(module(model.embed(tokens[:, 1:]), states[:, :-1])).float().softmax(-1)
    same = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    return same, torch.minimum(p, q).sum(-1).mean().item()


@torch.no_grad()
def logit_gap(model, prompt: list[int], plain: list[int], other: list[int]) -> float:
    """By how much the main model prefers its own token where two texts part; 0 if they don't."""
    if plain == other:
        return 0.0
    place = next(i for i, pair in enumerate(zip(plain, other, strict=True)) if len(set(pair)) == 2)
    device = next(model.parameters()).device
    text = torch.tensor([prompt + plain[:place]], device=device)
    logits = model.head(model.hidden(text))[0, -1]
    return (logits[plain[place]] - logits[other[place]]).abs().item()


@torch.no_grad()
def costs(model, module: MTPModule, prompt: list[int], rounds: int) -> dict[str, float]:
    """Seconds after a cached prompt, batch 1: a pass over one token and over two, each with its
    head; a draft from one new pair and from two. Interleaved, medians; the caches grow."""
    device, room = module.enorm.weight.device, len(prompt) + 3 * (rounds + 3)
    caches, [module_cache] = model.new_caches(1, room), model.new_caches(1, room, layers=1)
    tokens = torch.tensor([[*prompt, 0]], device=device)
    states = model.hidden(tokens[:, :-1], caches)
    module(model.embed(tokens[:, 1:]), states, module_cache)
    tokens, states = tokens[:, :2], states[:, :1].expand(1, 2, -1)

    def verify(width: int) -> None:
        model.head(model.hidden(tokens[:, :width], caches)).argmax(-1)

    def draft(width: int) -> None:
        guess = module(model.embed(tokens[:, :width]), states[:, :width], module_cache)
        model.head(guess[:, -1]).argmax(-1)

    tasks = {
        "plain": (verify, 1),
        "verify": (verify, 2),
        "draft1": (draft, 1),
        "draft2": (draft, 2),
    }
    times = {name: [] for name in tasks}
    for _ in range(rounds + 3):
        for name, (task, width) in tasks.items():
            times[name].append(seconds(task, width))
    return {name: statistics.median(values[3:]) for name, values in times.items()}


def seconds(task: Callable, *arguments) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    begin = time.perf_counter()
    task(*arguments)
    synchronize()
    return time.perf_counter() - begin


def expected_speedup(acceptance: float, cost: dict[str, float]) -> float:
    """(1 + a) tokens for the price of a pass over two and a draft, in passes over one."""
    draft = (1 - acceptance) * cost["draft1"] + acceptance * cost["draft2"]
    return (1 + acceptance) * cost["plain"] / (cost["verify"] + draft)


def race(
    model, module: MTPModule, prompts: list[list[int]], new: int, rounds: int
) -> tuple[float, float, dict[str, float]]:
    """Greedy, one prompt at a time: tokens per second, speculative over plain; acceptance; costs.

    Behind the prompt: what a text of one token takes is taken off both. Costs are taken between
    the texts, so that all three see the machine in the same state.
    """
    ratios, verdicts, prices = [], [], []

    def plain(prompt: list[int], length: int) -> None:
        model.generate([prompt], length)

    def speculate(prompt: list[int], length: int) -> None:
        verdicts.extend(speculative_generate(model, module, [prompt], length)[1][0])

    for prompt in prompts[: rounds + 1]:  # the first one warms up
        both = [seconds(f, prompt, new) - seconds(f, prompt, 1) for f in (plain, speculate)]
        ratios.append(both[0] / both[1])
        prices.append(costs(model, module, prompts[0], rounds=5))
    price = {name: statistics.median(p[name] for p in prices[1:]) for name in prices[0]}
    return statistics.median(ratios[1:]), statistics.fmean(verdicts), price


def corrupted(module: MTPModule, noise: float) -> MTPModule:
    """A copy whose projection is off by `noise` times its own spread."""
    worse = copy.deepcopy(module)
    weight = worse.eh_proj.weight
    with torch.no_grad():
        weight += noise * weight.std() * torch.randn_like(weight)
    return worse


def report(model, prompts: list[list[int]], held_out: Tensor, decode: Callable, new: int) -> dict:
    """All measures of a trained model's drafts -> what `draw` wants. held_out: (B, T) tokens."""
    module, rates = model.mtp[0], {}
    for temperature in 0.0, 1.0:
        texts, verdicts = speculative_generate(model, module, prompts, new, temperature)
        found = guesses_of(prompts, texts, verdicts, decode)  # the figure shows drawn text
        rates[temperature] = statistics.fmean(guess.accepted for guess in found)
        if temperature == 0:
            greedy, plain = texts, model.generate(prompts, new)
            identical = sum(a == b for a, b in zip(greedy, plain, strict=True))
    measure("acceptance", rates[0.0], f"greedy text after {len(prompts)} prompts   [1]: 0.85-0.90")
    measure("acceptance_drawn", rates[1.0], "text drawn at temperature 1")
    same, overlap = rates_on(model, module, held_out)
    measure("acceptance_on_given_text", same, "greedy drafts, on held-out text itself")
    measure("overlap_on_given_text", overlap, "the same drawn at T = 1: Σ min(p, q)")
    measure("tokens_per_step", 1 + rates[0.0], "a draft and a pass over two tokens are a step")
    measure("identical_prompts", identical, f"of {len(prompts)}, {new} tokens each, as without MTP")
    gaps = [logit_gap(model, *row) for row in zip(prompts, plain, greedy, strict=True)]
    # On a CPU 0: the texts are the same. On a GPU two rows may round otherwise than one, and logits
    # of order 10 change places that tie to a thousandth of themselves.
    tol = 0 if held_out.device.type == "cpu" else 1e-2
    check(
        "texts with and without MTP: gap of logits", torch.tensor(max(gaps)), torch.tensor(0.0), tol
    )

    ratio, rate, cost = race(model, module, prompts, new, rounds=15)
    text = f"x {1e3 * cost['plain']:.2f} ms, a pass over one"
    measure("cost_of_verifying_two", cost["verify"] / cost["plain"], text)
    draft, two = (cost[name] / cost["plain"] for name in ("draft1", "draft2"))
    measure("cost_of_a_draft", draft, f"x   from two pairs {two:.2f}")
    text = f"x, by costs (1 + {rate:.2f}) / cost = {expected_speedup(rate, cost):.2f}   [1]: 1.8"
    measure("speedup", ratio, text)
    points = [(rate, ratio)]
    for noise in 2.0, 4.0:
        ratio, rate, _ = race(model, corrupted(module, noise), prompts, new, rounds=7)
        points.append((rate, ratio))
    return {"found": found, "points": points, "cost": cost}


def draw(out: Path, found: list[Guess], points: list, cost: dict[str, float]) -> None:
    """Acceptance by position and by kind of token; speed-up against acceptance."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook hands down its own, which may be missing here
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    overall = statistics.fmean(guess.accepted for guess in found)
    last = max(guess.position for guess in found)
    width = max(1, last // 10)
    by_bin, by_kind = defaultdict(list), defaultdict(list)
    for guess in found:
        by_bin[guess.position // width].append(guess.accepted)
        by_kind[guess.kind].append(guess.accepted)
    bins = sorted(by_bin)
    rates = [statistics.fmean(by_bin[b]) for b in bins]
    left.plot([(b + 0.5) * width for b in bins], rates, "o-")
    left.set(
        xlabel="position in text drawn at temperature 1", ylabel="drafts accepted", ylim=(0, 1)
    )
    left.axhspan(0.85, 0.90, color="gray", alpha=0.3, lw=0)
    left.annotate("V3: 0.85-0.90", (last, 0.91), ha="right", color="gray")
    left.set_title(f"{overall:.0%} of the drafts are accepted")
    names = sorted(by_kind, key=lambda kind: -statistics.fmean(by_kind[kind]))
    rates = [statistics.fmean(by_kind[name]) for name in names]
    middle.barh([f"{name} ({len(by_kind[name]):,})" for name in names], rates)
    middle.invert_yaxis()
    middle.set(xlabel="drafts accepted", xlim=(0, 1))
    easy, hard, high, low = names[0], names[-1], rates[0], rates[-1]
    middle.set_title(f"From {hard} to {easy}: {low:.0%} to {high:.0%}")
    a = torch.linspace(0, 1, 50).tolist()
    right.plot(a, [expected_speedup(x, cost) for x in a], label="(1 + a) / (verify two + draft)")
    right.plot(*zip(*points, strict=True), "o", label="measured, greedy; corrupted modules too")
    right.axhline(1, color="gray", lw=0.8)
    right.axhline(1.8, color="gray", lw=0.8, ls="--")
    right.annotate("V3: 1.8", (0, 1.82), color="gray")
    right.set(xlabel="acceptance a", ylabel="speed / speed without drafts", ylim=(0, 2))
    right.set_title(f"The speed: {points[0][1]:.2f}x here, 1.8x for V3")
    right.legend(loc="lower right")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def experiment(device: torch.device, out: Path) -> None:
    """Train, then measure."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))  # its top level
    data = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    cut = int(0.95 * len(data))
    train, held_out = data[:cut], data[cut:]
    model = TinyModel(256, 96).to(device)
    fit(model, train)
    starts = torch.linspace(0, len(held_out) - 200, 32).long().tolist()
    prompts = [held_out[start : start + 64].tolist() for start in starts]
    rows = held_out[: 50 * 128].long().view(50, 128).to(device)
    decode = lambda tokens: bytes(tokens).decode("latin-1")
    draw(out, **report(model, prompts, rows, decode, new=96))
    print(f"figure   {out}")


def fit(model: TinyModel, train: Tensor, steps: int = 400) -> None:
    """Batches of 8 windows of 128 bytes."""
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps, pct_start=0.1)
    device = model.head.weight.device
    for step in range(steps):
        starts = torch.randint(len(train) - 129, (8, 1))
        tokens = train[starts + torch.arange(129)].long().to(device)  # (B, T + 1)
        hidden = model.hidden(tokens[:, :-1])
        loss = F.cross_entropy(model.head(hidden).transpose(1, 2), tokens[:, 1:])
        weight = 0.3 if step < 2 / 3 * steps else 0.1
        loss = loss + mtp_loss(model.mtp, model.embed, model.head, hidden, tokens, weight)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


# %% 5. How fast? ----------------------------------------------------------------------------


def bench(device: torch.device) -> None:
    """The costs at larger widths: a pass over two tokens reads the weights once."""
    for width in 256, 1024:
        model = TinyModel(256, width, layers=4).to(device).eval()
        cost = costs(model, model.mtp[0], [0] * 256, rounds=20)
        relative = [cost[name] / cost["plain"] for name in ("verify", "draft1", "draft2")]
        text = "x a plain pass; draft of one pair {:.2f}, of two {:.2f}".format(*relative[1:])
        measure(f"cost_of_verifying_two_width_{width}", relative[0], text)
        text = "acceptance from which drafting pays (inf: none); 4 layers, batch 1"
        pays = [a / 100 for a in range(101) if expected_speedup(a / 100, cost) > 1]
        measure(f"break_even_width_{width}", pays[0] if pays else math.inf, text)


# %% Exercises -------------------------------------------------------------------------------
# 1. Break it: in mtp_loss let the module see token i + 2, by embed(tokens[:, k + 1 :]). Which check
#    stops the chapter? Leave out verify_loss, then verify_no_leak too: what does the loss on random
#    tokens become, and what the acceptance of a model that was trained so?
# 2. Keep rejected drafts: give `room` twice its size, and take the truncate after them out of
#    speculative_generate. Which check stops the chapter? At which token does a text go wrong first?
# 3. Draft two tokens a step with a chain of two modules. What must become of the second module's
#    cache when the first draft is rejected? From which acceptance of the second one does it pay?


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    cli.add_argument("--device", default=default, help="cpu, cuda, cuda:1, … (%(default)s)")
    cli.add_argument("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    cli.add_argument("--bench", action="store_true", help="also the costs at larger widths")
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
    torch.manual_seed(args.seed)
    verify_loss(device)
    verify_no_leak(device)
    verify_greedy(device)
    verify_sampling(device)
    experiment(device, args.out / "05_mtp.png")
    if args.bench:
        bench(device)


if __name__ == "__main__":
    main()
