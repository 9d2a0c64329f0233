# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<=2.13", "numpy>=1.26", "tiktoken>=0.8", "regex>=2024.5", "matplotlib>=3.8",
#   "safetensors>=0.4.5", "tqdm>=4.66", "filelock>=4.3",
# ]
# ///
r"""07 · GRPO: rewarded for right answers and their form alone, a model learns that thinking pays.

R1-Zero was never shown how to reason. V3 was asked 10,400 batches of questions, a rule checked the
answers, and AIME 2024 went from 15.6 % to 77.9 % while answers grew to thousands of tokens [2].
Here the same happens to a model of 0.7 million parameters, in a minute of rewards.

    question q ─► G answers oᵢ ─► rewards rᵢ ─► advantages Aᵢ ─► one gradient step
        │           sampled by     by a rule      against the mean of the group:
     "5-9+7="       the model                     no second network that guesses values
                    <think>5-9=96,96+7=3</think><answer>3</answer>

    loss    −1/G Σᵢ 1/|oᵢ| Σₜ [ min(ρA, clip(ρ, 1−ε, 1+ε) A) − β·k3 ]         [1] eq. 3
    ratio   ρ = π(oᵢₜ) / π_old(oᵢₜ), π_old the policy that sampled: at first 1, with a gradient
    k3      r − ln r − 1, r = π_ref/π      never below 0                       [1] eq. 4
    A       (rᵢ − mean r) / std r          0 where all of a group are equal    [1] §4.1.2
            rᵢ − mean r, and Σₜ / constant for 1/|oᵢ| Σₜ                       [3] Dr.GRPO, default

    axis  here                             [1] DeepSeekMath, arXiv:2402.03300
    B     answers of a batch, P·G          [2] DeepSeek-R1, arXiv:2501.12948v2
    P, G  prompts; answers to each         [3] Dr.GRPO, arXiv:2503.20783
    T     tokens, prompt included          [4] DeepSeek-V3.2, arXiv:2512.02556

Three stages: worked examples teach the model to calculate step by step (its ceiling); a cold start
hides that, four of five examples answer at once; then rewards alone. Measured on problems that none
of the three has seen.

Run:  python 07_grpo.py [--quick | --bench | --resume RUN]          3 to 4 minutes on two CPU cores
      python 07_grpo.py --further           R1's third and fourth stage too
      python 07_grpo.py --preset beyond     300 steps of rewards for a weak base
"""

import argparse
import contextlib
import copy
import hashlib
import itertools
import json
import math
import operator
import os
import random
import re
import shlex
import statistics
import sys
import time
import types
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

base = import_module("06_train")  # DeepSeek, DeepSeekConfig, Run, and the checks
mtp = import_module("05_mtp")  # probabilities
check, measure = base.check, base.measure

# %% 1. The equations, word for word ---------------------------------------------------------


def reference_loss(
    logp, old_logp, advantages, lengths, clip_low, clip_high, beta, ref_logp
) -> float:
    """[1] eq. 3 and 4 with loops, negated; (B, T) nested lists, (B,) advantages and lengths."""
    total = 0.0
    for i, length in enumerate(lengths):
        inner = 0.0
        for t in range(length):
            ratio = math.exp(logp[i][t] - old_logp[i][t])
            clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
            r = math.exp(ref_logp[i][t] - logp[i][t])
            k3 = r - math.log(r) - 1
            inner += min(ratio * advantages[i], clipped * advantages[i]) - beta * k3
        total += inner / length
    return -total / len(lengths)


# %% 2. The piece ----------------------------------------------------------------------------


# >>> copy: group_advantages, process_advantages, kl_k3, denominators, grpo_loss (needs torch)
def group_advantages(rewards: Tensor, normalize: str = "std") -> Tensor:
    """How much better than its group: (P, G) rewards, G answers to each prompt -> (P, G).

    "std": (r − mean) / std, the std with G − 1 as PyTorch's and TRL's ([1] §4.1.2); "mean": r −
    mean (Dr.GRPO). A group of equals, but for rounding, has none, exactly: its std would blow the
    remainder up. ValueError: another shape or name, a reward that is no finite number.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"want rewards (P, G) of 2 or more answers, got {tuple(rewards.shape)}")
    if normalize not in ("std", "mean"):
        raise ValueError(f"normalize is 'std' or 'mean', not {normalize!r}")
    if not rewards.isfinite().all():
        raise ValueError(f"rewards must be finite, got {rewards[~rewards.isfinite()][0].item()}")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True)
    rounding = 8 * torch.finfo(rewards.dtype).eps  # 0.1 + 0.2 and 0.3 are tied, too
    tied = spread <= rounding * rewards.abs().amax(1, keepdim=True)
    scaled = centred / rewards.std(1, keepdim=True) if normalize == "std" else centred
    return torch.where(tied, 0.0, scaled)


def process_advantages(rewards: Tensor, ends: Tensor, T: int) -> Tensor:
    """Rewards of steps, not of answers: each token gets those of all steps that end at it or later.

    rewards: (G, S) of one group's answers, normalised together ([1] §4.1.3); ends: (G, S) int64,
    the place of each step's last token, −1 where an answer has fewer steps -> (G, T), for
    `grpo_loss`. Places and T are those of its mask, which begins with the second token of a text.
    """
    if rewards.shape != ends.shape or rewards.dim() != 2 or (ends >= T).any():
        got = f"{tuple(rewards.shape)}, {tuple(ends.shape)}, T = {T}"
        raise ValueError(f"want rewards and ends (G, S), every end below T; got {got}")
    there = ends >= 0
    if not rewards[there].isfinite().all():
        raise ValueError(f"rewards must be finite, got {rewards.tolist()}")
    normed = torch.zeros_like(rewards, dtype=torch.promote_types(rewards.dtype, torch.float32))
    values = rewards[there].to(normed.dtype)
    if len(values) > 1 and values.amax() - values.amin() > 1e-6 * values.abs().amax():
        normed[there] = (values - values.mean()) / values.std()
    reached = ends[:, :, None] >= torch.arange(T, device=ends.device)  # (G, S, T)
    return (normed[:, :, None] * reached).sum(1)


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """r − ln r − 1 with r = π_ref / π at what π has drawn: an estimate of KL(π ‖ π_ref), never < 0.

    As a number it has the right mean. As a loss, not: the mean of its gradient is that of the other
    KL(π_ref ‖ π). Times the ratio π/π_old it is that of KL(π ‖ π_ref) ([4]; `weigh_kl` below).
    """
    log_ratio = ref_logp - logp
    return log_ratio.expm1() - log_ratio


def denominators(mask: Tensor, kind: str, constant: float | None = None) -> Tensor:
    """What the sum over each row's tokens is divided by: mask (B, T) of a whole batch -> (B,).

    "sequence": B times its own tokens (GRPO), "token": all tokens of the batch (DAPO), "constant":
    B times the constant, the longest answer there can be (Dr.GRPO). ValueError: another name.
    """
    B, tokens = len(mask), mask.sum(1)
    kinds = {"sequence": B * tokens, "token": tokens.sum().expand(B)}
    if constant is not None:
        kinds["constant"] = torch.full_like(tokens, B, dtype=torch.float32) * constant
    if kind == "constant" and constant is None:
        raise ValueError("denominator 'constant' wants the constant, the longest answer in tokens")
    if kind not in kinds:
        raise ValueError(f"denominator is one of {', '.join(kinds)}, not {kind!r}")
    return kinds[kind].clamp(min=1).float()


def grpo_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor,
    denominator: str | Tensor = "sequence", clip: float = 0.2, clip_high: float | None = None,
    beta: float = 0.0, ref_logp: Tensor | None = None, weigh_kl: bool = False,
) -> tuple[Tensor, float]:  # fmt: skip
    """The clipped surrogate of [1] eq. 3 -> the loss to minimise, and the share that is clipped.

    logp, old_logp: (B, T) ln π of each token, with gradient, and under the policy that drew it;
    advantages: (B,) or (B, T); mask: (B, T), True where a token was drawn. denominator: "sequence",
    "token", or (B,) by `denominators`, for a slice of a batch those of the whole. clip_high: above
    1 + it (DAPO: 0.28), else clip on both sides. beta: of k3 to ref_logp; weigh_kl: times the
    ratio. ValueError: shapes; beta without ref_logp.

    On the policy that drew them every ratio is 1, and with equal lengths the advantages cancel: the
    loss is 0. Its gradient is not, −A·∇ln π: watch the rewards instead.
    """
    shapes = [tuple(t.shape) for t in (logp, old_logp, mask)]
    fits = len(set(shapes)) == 1 and logp.dim() == 2 and mask.dtype == torch.bool
    if not fits or advantages.shape not in (logp.shape, logp.shape[:1]):
        got = f"{shapes}, mask {mask.dtype}, advantages {tuple(advantages.shape)}"
        text = "logp, old_logp and a bool mask (B, T), advantages (B,) or (B, T)"
        raise ValueError(f"want {text}; got {got}")
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    if beta and (ref_logp is None or ref_logp.shape != logp.shape):
        raise ValueError(f"beta {beta} wants ref_logp {shapes[0]}")
    if isinstance(denominator, str):
        denominator = denominators(mask, denominator)
    if denominator.shape != logp.shape[:1]:
        raise ValueError(f"want denominator ({len(logp)},), got {tuple(denominator.shape)}")
    # what isn't drawn may hold anything, and 0 · inf is NaN: it is replaced and not multiplied.
    # Nor may a ratio overflow that is clipped: its gradient would be 0 · inf. e^5 and e^40 are far
    # from any clip, and leave room for the product: fp16 ends at e^11, the wider ones at e^88
    largest = 5.0 if logp.dtype == torch.float16 else 40.0
    limit = torch.where(advantages < 0, float("inf"), largest).to(logp.dtype)
    ratio = torch.where(mask, logp - old_logp.detach(), 0.0).clamp(max=limit).exp()  # (B, T)
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    per_token = torch.minimum(ratio * advantages, clipped * advantages)
    if beta:
        kl = kl_k3(torch.where(mask, logp, 0.0), torch.where(mask, ref_logp, 0.0))
        per_token = per_token - beta * kl * (ratio if weigh_kl else 1.0)
    loss = -(torch.where(mask, per_token, 0.0).sum(1) / denominator).sum()
    with torch.no_grad():
        binds = (clipped * advantages < ratio * advantages) & mask
        return loss, (binds.sum() / mask.sum().clamp(min=1)).item()


# <<< copy
# %% 3. Sampling, and scoring what was sampled ------------------------------------------------


class Rollout(NamedTuple):
    """B = P·G answers, those to one prompt beside one another."""

    tokens: Tensor  # (B, T) int64: prompt, answer, zeros
    mask: Tensor  # (B, T − 1) bool: was tokens[:, 1:] drawn?
    logp: Tensor  # (B, T − 1) fp32: ln of the probability it was drawn with; else 0
    ended: Tensor  # (B,) bool: by its end, and not by the limit
    # (B, T, mixtures, K): the experts each token used, if one was drawn after it; else anything
    routes: Tensor | None = None
    drawing: tuple[float, float] = (1.0, 1.0)  # temperature, top_p

    def answers(self) -> list[list[int]]:
        rows = zip(self.tokens[:, 1:], self.mask, strict=True)
        return [row[drawn].tolist() for row, drawn in rows]


@contextlib.contextmanager
def watched_routes(model: base.DeepSeek) -> Iterator[list]:
    """A list that each mixture's choice (N, K) is added to, layer by layer."""
    seen = []
    gates = [mixture.gate for mixture in model.mixtures()]
    for gate in gates:

        def choose(scores: Tensor, gate=gate) -> Tensor:
            seen.append(type(gate).choose(gate, scores))
            return seen[-1]

        gate.choose = choose
    try:
        yield seen
    finally:
        for gate in gates:
            del gate.choose


@contextlib.contextmanager
def replayed_routes(model: base.DeepSeek, routes: Tensor | None) -> Iterator[None]:
    """Every token goes where it went when it was sampled; routes: (B, T, mixtures, K) or None."""
    gates = [mixture.gate for mixture in model.mixtures()] if routes is not None else []
    for layer, gate in enumerate(gates):
        chosen = routes[:, :, layer].flatten(0, 1)
        gate.choose = lambda scores, chosen=chosen: chosen
    try:
        yield
    finally:
        for gate in gates:
            del gate.choose


@torch.no_grad()
def rollout(
    model: base.DeepSeek, prompts: Sequence[list[int]], max_new_tokens: int, group: int = 1,
    temperature: float = 1.0, top_p: float = 1.0, eos_token_id: int | None = None,
    generator: torch.Generator | None = None, record_routes: bool = False,
) -> Rollout:  # fmt: skip
    """`group` answers to each prompt through the latent cache; a prompt is read once for all.

    The logp are those of the very distribution that is drawn from: temperature and top_p included
    (temperature 0: the likeliest token, with probability 1). A row that has ended leaves the batch.
    To learn from, draw at a top_p of 1: `score` knows no other (V3.2 keeps what top_p left [4]).
    ValueError: an empty prompt, more tokens than max_position_embeddings, logits of NaN.
    """
    padded, lengths = mtp.padded_prompts(prompts, max_new_tokens, temperature, top_p)
    room, limit = max(lengths) + max_new_tokens, model.config.max_position_embeddings
    if max_new_tokens < 1 or group < 1:
        raise ValueError(f"want max_new_tokens and group >= 1, got {max_new_tokens}, {group}")
    if room > limit:
        raise ValueError(f"prompt + new tokens = {room} > max_position_embeddings = {limit}")
    device, P, B = model.lm_head.weight.device, len(prompts), len(prompts) * group
    padded, last = padded.to(device), torch.tensor(lengths, device=device) - 1
    caches, watch = model.new_caches(P, room), contextlib.nullcontext([])
    rows = torch.arange(P, device=device).repeat_interleave(group)  # (B,)
    tokens = torch.zeros(B, room, dtype=torch.int64, device=device)
    tokens[:, : padded.shape[1]] = padded[rows]
    mask = torch.zeros(B, room - 1, dtype=torch.bool, device=device)
    logp = torch.zeros(B, room - 1, dtype=torch.float32, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    ends = torch.tensor(sorted(mtp.ends_of(eos_token_id) - {None}), device=device)
    if record_routes and not model.mixtures():
        raise ValueError("there are no routes to record: the model has no mixture of experts")
    if record_routes:
        watch, K = watched_routes(model), model.config.num_experts_per_tok
        routes = torch.zeros(B, room, len(model.mixtures()), K, dtype=torch.int64, device=device)
    with watch as seen:
        states = model.hidden(padded, caches)[torch.arange(P), last]  # (P, D)
        if record_routes:
            first = torch.stack(seen, 1).unflatten(0, padded.shape)  # (P, T, mixtures, K)
            routes[:, : padded.shape[1]] = first[rows]
        for cache in caches:
            cache.truncate(last + 1)  # the padding is forgotten
            cache.select(rows)
        states, place = states[rows], (last + 1)[rows]  # where a row's next token goes
        active, live = torch.arange(B, device=device), torch.ones_like(ended)
        for step in range(max_new_tokens):
            chosen, said = draw(model.head(states), temperature, top_p, generator)
            now, at = active[live], place[active[live]]
            tokens[now, at], logp[now, at - 1], mask[now, at - 1] = chosen[live], said[live], True
            place[now] += 1
            over = torch.isin(chosen, ends)
            ended[active] |= over  # of a row that has ended, it has
            live = live & ~over
            going = int(live.sum())
            if going == 0 or step == max_new_tokens - 1:
                break
            if going <= 0.9 * len(live):  # the others have run along, unheard, for a while
                for cache in caches:
                    cache.select(live)
                active, chosen = active[live], chosen[live]
                live = torch.ones_like(active, dtype=torch.bool)
            seen.clear()
            states = model.hidden(chosen[:, None], caches)[:, 0]
            if record_routes:
                routes[active, place[active] - 1] = torch.stack(seen, 1)
    if not logp.isfinite().all():
        raise ValueError("the model's logits are no numbers any more: nothing can be drawn")
    T = int(place.max())
    routes = routes[:, :T] if record_routes else None
    drawing = temperature, top_p
    return Rollout(tokens[:, :T], mask[:, : T - 1], logp[:, : T - 1], ended, routes, drawing)


def draw(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """logits: (B, V) -> tokens (B,), ln of the probability that each was drawn with (B,)."""
    if temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    if top_p == 1:
        logp = (logits.float() / temperature).log_softmax(-1)
    else:
        logp = mtp.probabilities(logits, temperature, top_p).log()
    # the first token whose cumulated probability exceeds u: a fifth of the time of multinomial for
    # 261 tokens, half of it for 4,096
    wide = torch.float32 if logp.device.type == "mps" else torch.float64
    upto = logp.exp().cumsum(-1, dtype=wide)
    u = torch.rand(len(logp), 1, generator=generator, dtype=wide, device=logp.device)
    chosen = (upto <= u * upto[:, -1:]).sum(-1).clamp(max=logp.shape[1] - 1)
    return chosen, logp.gather(1, chosen[:, None])[:, 0]


def score(
    model: base.DeepSeek, tokens: Tensor, mask: Tensor, temperature: float = 1.0,
    routes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """ln π of tokens[:, 1:] where mask is True, else 0; tokens: (B, T), mask: (B, T − 1).

    One pass over the whole of each row, as training has it. routes: of a Rollout, to follow them;
    not with activation checkpointing, whose second pass, in backward, would choose its own.
    """
    with replayed_routes(model, None if routes is None else routes[:, :-1]):
        hidden = model.hidden(tokens[:, :-1])[mask]  # (drawn, D)
    all_logp = (model.head(hidden).float() / temperature).log_softmax(-1)  # (drawn, V)
    drawn = all_logp.gather(1, tokens[:, 1:][mask][:, None])[:, 0]
    return drawn.new_zeros(mask.shape).masked_scatter(mask, drawn)


# %% 4. Tasks and rewards ---------------------------------------------------------------------
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
FORMAT = re.compile(r"<think>(.*?)</think>\s*<answer>(.*?)</answer>", re.DOTALL)


def parse(response: str) -> tuple[str, str] | None:
    """What stands in its think and in its answer tags; None if it has any other form."""
    found = FORMAT.fullmatch(response.strip())
    if found is None or any(tag in part for part in found.groups() for tag in TAGS):
        return None
    return found[1], found[2].strip()


def format_reward(response: str) -> float:
    """1 for <think>…</think><answer>…</answer> and nothing else, as R1-Zero's [2]."""
    return float(parse(response) is not None)


def accuracy_reward(response: str, answer: str) -> float:
    """1 for the right answer between answer tags: compared as text, for text must not be run."""
    found = parse(response)
    return float(found is not None and found[1] == answer)


def language_reward(response: str, word: str = r"[A-Za-z]+") -> float:
    """The share of the thoughts' words that are of the target language: R1 adds it [2], Clock's
    thoughts have no words.

    word: a regular expression of one. Numbers and signs are no words; no words at all: 1.
    """
    words = re.findall(r"[^\W\d_]+", (parse(response) or (response,))[0])
    return sum(re.fullmatch(word, w) is not None for w in words) / len(words) if words else 1.0


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """0 down to −1 over the last `buffer` tokens (DAPO, arXiv:2503.14476)."""
    return -min(max(length - (limit - buffer), 0) / max(buffer, 1), 1.0)


def thinks(response: str) -> bool:
    """Is it of the right form, with thoughts that aren't empty?"""
    found = parse(response)
    return found is not None and bool(found[0].strip())


class Problem(NamedTuple):
    prompt: str
    answer: str
    held_out: bool = False


class Task:
    """What is asked, and what an answer is worth. Yours: a subclass with `problem`, in any file:

        from importlib import import_module
        class Mine(import_module("07_grpo").Task): …

    python 07_grpo.py --init FOLDER --task mine.py:Mine; with `clean` and `cold` as Clock has them,
    without --init. Right is what equals problem.answer as text, unless `correct` says otherwise.
    """

    max_new_tokens = 64  # of an answer

    def problem(self, rng: random.Random, held_out: bool) -> Problem:
        """A problem of one of two sets that share none; the same for the same rng."""
        raise NotImplementedError

    def correct(self, problem: Problem, response: str) -> bool:
        return accuracy_reward(response, problem.answer) == 1

    def reward(self, problem: Problem, response: str) -> float:
        """By rules alone. The form, as much as the answer in R1-Zero [2], counts a fifth here: it
        leads to where answers are looked for."""
        return self.correct(problem, response) + 0.2 * format_reward(response)


class Clock(Task):
    """Sums and differences of 4 to 7 digits, from left to right modulo 100: 5-9+7= is 96, then 3.

    A tenth is held out, by a hash of the text: no example shows it and no reward is given for it.
    Almost all single steps that it takes occur in examples.
    """

    SIZES = 4, 7  # operands

    def problem(self, rng: random.Random, held_out: bool, sizes=SIZES) -> Problem:
        while True:
            count = rng.randint(*sizes)
            text = str(rng.randint(2, 9))
            text += "".join(rng.choice("+-") + str(rng.randint(2, 9)) for _ in range(count - 1))
            text += "="
            hashed = zlib.crc32(text.encode()) % 10 == 0
            if count < self.SIZES[0] or hashed == held_out:
                return Problem(text, self.steps(text)[-1].partition("=")[2], held_out)

    def steps(self, text: str) -> list[str]:
        """5-9+7= -> 5-9=96, 96+7=3"""
        numbers = re.findall(r"[+-]?\d", text)
        value, steps = int(numbers[0]), []
        for number in numbers[1:]:
            fresh = (value + int(number)) % 100
            steps.append(f"{value}{number}={fresh}")
            value = fresh
        return steps

    def worked(self, problem: Problem, slip: int = 0) -> str:
        """Every step, then the answer; slip: by how much the last step is wrong."""
        *steps, last = self.steps(problem.prompt)
        sum_, _, value = last.partition("=")
        answer = (int(value) + slip) % 100
        thoughts = ",".join([*steps, f"{sum_}={answer}"])
        return f"<think>{thoughts}</think><answer>{answer}</answer>"

    def clean(self, rng: random.Random) -> tuple[str, str]:
        """Stage 0: a problem, short ones too, worked out step by step."""
        problem = self.problem(rng, False, (2, self.SIZES[1]))
        return problem.prompt, self.worked(problem)

    def cold(self, rng: random.Random) -> tuple[str, str]:
        """The cold start: four of five answer at once; of the rest one in twelve is wrong; a fifth
        of all lacks a tag."""
        problem = self.problem(rng, False)
        response = f"<think></think><answer>{problem.answer}</answer>"
        if rng.random() < 0.2:
            slip = rng.randrange(1, 100) if rng.random() < 1 / 12 else 0
            response = self.worked(problem, slip)
        if rng.random() < 0.2:
            response = response.replace(rng.choice(TAGS), "", 1)
        return problem.prompt, response


class Countdown(Task):
    """Make a target of four numbers, each used once, with + - * / and brackets."""

    max_new_tokens = 256

    def problem(self, rng: random.Random, held_out: bool) -> Problem:
        while True:
            numbers = [rng.randint(1, 25) for _ in range(4)]
            text = str(numbers[0]) + "".join(rng.choice("+-*") + str(n) for n in numbers[1:])
            target = calculate(text)
            prompt = f"{' '.join(map(str, sorted(numbers)))} to {target}: "
            if 0 < target < 100 and (zlib.crc32(prompt.encode()) % 10 == 0) == held_out:
                return Problem(prompt, text, held_out)

    def correct(self, problem: Problem, response: str) -> bool:
        found = parse(response)
        numbers, _, target = problem.prompt.rstrip(": ").partition(" to ")
        used = [text.lstrip("0") for text in re.findall(r"\d+", found[1] if found else "")]
        # as text, without zeros in front: int() refuses 5,000 digits
        given = [text.lstrip("0") for text in numbers.split()]
        return sorted(used) == sorted(given) and calculate(found[1]) == int(target)


OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def calculate(text: str) -> Fraction | None:
    """The exact value of numbers, + - * / and brackets; None for any other text. Never eval: a
    model's text is not to be run."""
    tokens = re.findall(r"\d+|[-+*/()]", text)
    if "".join(tokens) != re.sub(r"\s", "", text) or len(tokens) > 99:
        return None

    def level(operators: str, operand: Callable) -> Fraction:
        value = operand()
        while tokens and tokens[0] in operators:
            sign = tokens.pop(0)
            value = OPERATIONS[sign](value, operand())
        return value

    def atom() -> Fraction:
        token = tokens.pop(0)
        if token != "(":
            return Fraction(token)
        value = level("+-", lambda: level("*/", atom))
        if tokens.pop(0) != ")":
            raise ValueError
        return value

    try:
        value = level("+-", lambda: level("*/", atom))
        return None if tokens else value
    except (IndexError, ValueError, ZeroDivisionError, RecursionError):
        return None


class Questions(Task):
    """A .jsonl file of {"question": …, "answer": …}; what follows #### is the answer, as in GSM8K.

    A tenth is held out, by a hash of the question.
    """

    max_new_tokens = 256
    ASK = "{}\nThink between <think> and </think>, then answer between <answer> and </answer>.\n"

    def __init__(self, path: Path):
        sets: tuple[list, list] = [], []
        for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                question, answer = entry["question"], str(entry["answer"])
                if not isinstance(question, str) or entry["answer"] is None:
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                text = f'{path}, line {number}: want {{"question": "…", "answer": "…"}}'
                raise ValueError(text) from None
            answer = self.plain(answer.rpartition("####")[2])
            held_out = zlib.crc32(question.encode()) % 10 == 0
            sets[held_out].append(Problem(self.ASK.format(question), answer, held_out))
        if not all(sets):
            raise ValueError(f"{path}: want questions in both sets, got {[len(s) for s in sets]}")
        self.sets = sets

    @staticmethod
    def plain(text: str) -> str:
        """1,234 is 1234; 3,1415 stays."""
        return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text).strip()

    def problem(self, rng: random.Random, held_out: bool) -> Problem:
        return rng.choice(self.sets[held_out])

    def correct(self, problem: Problem, response: str) -> bool:
        found = parse(response)
        return found is not None and self.plain(found[1]) == problem.answer


def load_task(name: str) -> Task:
    """clock, countdown, a .jsonl of questions, or FILE.py:CLASS."""
    known = {"clock": Clock, "countdown": Countdown}
    if name in known:
        return known[name]()
    file, _, kind = name.rpartition(":")
    path = Path(name if name.endswith(".jsonl") else file)
    if not path.is_file():
        raise ValueError(f"--task {name}: want {', '.join(known)}, FILE.jsonl or FILE.py:CLASS")
    if path.suffix == ".jsonl":
        return Questions(path)
    module = types.ModuleType(f"task_in_{path.stem}")
    module.__file__ = str(path.resolve())
    sys.modules[module.__name__] = module
    exec(compile(path.read_text("utf-8"), str(path), "exec"), module.__dict__)
    task = getattr(module, kind, None)
    wanted = "problem", "reward", "correct", "max_new_tokens"
    if not isinstance(task, type) or not all(hasattr(task, attribute) for attribute in wanted):
        raise ValueError(f"--task {name}: {path} has no class {kind!r} with {', '.join(wanted)}")
    return task()


# %% 5. The model and its tokens --------------------------------------------------------------
TINY = base.DeepSeekConfig(
    vocab_size=261, hidden_size=128, intermediate_size=256, moe_intermediate_size=64,
    num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=4, q_lora_rank=None,
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8,
    num_experts_per_tok=2, n_group=1, topk_group=1, routed_scaling_factor=1.0,
    max_position_embeddings=512, initializer_range=0.05, bos_token_id=256, eos_token_id=256,
)  # fmt: skip


def byte_encoding() -> tiktoken.Encoding:
    """256 bytes, the end of a text, and a token for each tag."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    special = {name: 256 + place for place, name in enumerate((base.END, *TAGS))}
    return tiktoken.Encoding(
        "bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special
    )


def encode(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Tags are tokens of their own where the vocabulary has them."""
    allowed = encoding.special_tokens_set - {base.END}
    return encoding.encode(text, allowed_special=allowed, disallowed_special=())


def encode_prompt(encoding: tiktoken.Encoding, prompt: str) -> list[int]:
    return [encoding.encode_single_token(base.END), *encode(encoding, prompt)]


class BadProblem(ValueError):
    """A prompt that leaves no room for its answer; a reward that raises or is no finite number."""


def encode_prompts(
    encoding: tiktoken.Encoding, task: Task, problems: Sequence[Problem], limit: int
) -> list[list[int]]:
    """BadProblem names the first whose prompt and longest answer are over `limit` tokens."""
    prompts = [encode_prompt(encoding, problem.prompt) for problem in problems]
    for problem, prompt in zip(problems, prompts, strict=True):
        if (room := len(prompt) + task.max_new_tokens) > limit:
            said = f"prompt {problem.prompt!r} and its answer, {room} tokens, are over {limit}"
            raise BadProblem(said)
    return prompts


def decode_answers(encoding: tiktoken.Encoding, sampled: Rollout) -> list[str]:
    end = encoding.encode_single_token(base.END)
    return [base.spelled(encoding, (t for t in row if t != end)) for row in sampled.answers()]


# %% 6. Training: by examples, then by rewards -------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """How to train by examples: AdamW, the learning rate a cosine down to a tenth."""

    steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class Recipe:
    """How to train by rewards; the learning rate falls in a line to `final` of itself."""

    steps: int = 80
    prompts: int = 32  # of a step
    group: int = 8  # answers to each
    learning_rate: float = 2e-4
    warmup: int = 5  # steps
    final: float = 0.1
    updates: int = 2  # of each epoch over the answers
    epochs: int = 1
    advantages: str = "mean"  # or "std"
    denominator: str = "constant"  # "sequence", "token"
    clip: float = 0.2
    clip_high: float | None = None
    beta: float = 0.0  # of k3, to the policy as RL began
    weigh_kl: bool = False
    temperature: float = 1.0
    overlong: str = "keep"  # of an answer that the limit has cut: "mask" it, or a "penalty" near it
    replay: bool = False  # the routes of sampling
    skip_ties: bool = True  # groups without an advantage are never read again
    bf16: bool = False  # scoring, where the hardware multiplies it; sampling stays in fp32
    pack: int = 2048  # tokens of a pass, padding included

    def __post_init__(self):
        choices = {
            "advantages": ("mean", "std"),
            "denominator": ("constant", "sequence", "token"),
            "overlong": ("keep", "mask", "penalty"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {known}, not {getattr(self, name)!r}")
        least = {"group": 2, "warmup": 0, "beta": 0, "final": 0, "temperature": 1e-5}
        least |= dict.fromkeys(("steps", "prompts", "updates", "epochs", "pack"), 1)
        for name, value in least.items():
            if not getattr(self, name) >= value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        for name in "steps", "prompts", "group", "updates", "epochs", "pack":
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be an int, got {getattr(self, name)}")
        if self.updates > self.prompts * self.group:
            text = f"{self.prompts} prompts of {self.group} answers"
            raise ValueError(f"updates {self.updates} are more than {text}")
        for name in "learning_rate", "clip", "clip_high":
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def scale(self, step: int) -> float:
        falling = 1 - (1 - self.final) * step / max(self.steps - 1, 1)
        return min((step + 1) / self.warmup, 1.0) * falling if self.warmup else falling


def make_optimizer(model: base.DeepSeek, learning_rate: float) -> torch.optim.AdamW:
    fused = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    return torch.optim.AdamW(model.parameters(), learning_rate, **fused)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def run_stage(
    model: base.DeepSeek, optimizer, encoding: tiktoken.Encoding, steps: int, folder: Path,
    step: Callable[[int], dict], every: int = 20,
) -> list[dict]:  # fmt: skip
    """step(number) -> its metrics, `steps` times over; logged into `folder`, saved once in `every`.

    What lies there already is gone on with. Ctrl-C ends the step and saves; so does a BadProblem,
    which no step raises once it has touched the weights. A step must depend on its number alone,
    and not on what random numbers went before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run, state = base.Run(folder), {"step": 0, "seconds": 0.0}
    save = lambda: run.save(model, optimizer, encoding, state)
    with base.alone(folder):
        if run.saved():
            state = run.restore(model, optimizer)
        run.forget_after(state["step"])
        show = {"total": steps, "initial": state["step"], "unit": "step", "dynamic_ncols": True}
        show |= {"desc": folder.name, "disable": not sys.stderr}
        with tqdm(**show) as bar, base.interrupts() as interrupted:
            while state["step"] < steps and not interrupted:
                begin = time.perf_counter()
                try:
                    metrics = step(state["step"])
                except BadProblem:
                    save()
                    raise
                state["step"] += 1
                state["seconds"] += time.perf_counter() - begin
                run.log(step=state["step"], seconds=state["seconds"], **metrics)
                shown = [f"{key} {value:.3g}" for key, value in list(metrics.items())[:3]]
                bar.set_postfix_str(", ".join(shown), refresh=False)
                bar.update()
                if state["step"] % every == 0 or state["step"] == steps or interrupted:
                    save()
    if interrupted:
        raise KeyboardInterrupt
    return run.metrics()


def train_examples(
    model: base.DeepSeek, encoding: tiktoken.Encoding, example: Callable[[random.Random], tuple],
    recipe: Examples, folder: Path, seed: int = 0,
) -> list[dict]:  # fmt: skip
    """Supervised fine-tuning on example(rng) -> (prompt, response): the loss of responses alone."""
    optimizer = make_optimizer(model, recipe.learning_rate)
    device, end = model.lm_head.weight.device, encoding.encode_single_token(base.END)

    def step(number: int) -> dict:
        rng = random.Random(f"{seed} {folder.name} {number}")
        pairs = [example(rng) for _ in range(recipe.batch_size)]
        prompts = [encode_prompt(encoding, prompt) for prompt, _ in pairs]
        rows = [p + encode(encoding, r) + [end] for p, (_, r) in zip(prompts, pairs, strict=True)]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        labels = torch.full_like(tokens, -100)
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            tokens[i, : len(row)] = torch.tensor(row)
            labels[i, len(prompt) : len(row)] = tokens[i, len(prompt) : len(row)]
        tokens, labels = tokens.to(device), labels.to(device)
        loss = model.loss(tokens[:, :-1], labels[:, 1:])
        if not loss.isfinite():
            raise ValueError(f"loss {loss.item()} at step {number + 1}: lower learning_rate")
        balance = sum(mixture.balance_loss for mixture in model.mixtures())
        (loss + 1e-4 * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = 0.55 + 0.45 * math.cos(math.pi * number / recipe.steps)
        set_rate(optimizer, recipe.learning_rate * share * min(1.0, (number + 1) / 20))
        optimizer.step()
        optimizer.zero_grad()
        for mixture in model.mixtures():
            if mixture.gate.e_score_correction_bias is not None:
                mixture.gate.update_bias(mixture.load, 1e-3 * share)
        return {"loss": loss.item()}

    model.train()
    return run_stage(model, optimizer, encoding, recipe.steps, folder, step, every=200)


Reward = Callable[[list[Problem], list[str]], Sequence[float]]


def checked_rewards(reward: Reward, problems: list[Problem], responses: list[str]) -> Tensor:
    """A finite number for each -> (B,) fp32, or a BadProblem that names the prompt."""
    try:
        rewards = [float(value) for value in reward(problems, responses)]
    except Exception as error:
        for problem, response in zip(problems, responses, strict=True):  # which one was it?
            try:
                float(list(reward([problem], [response]))[0])
            except Exception:
                text = f"the reward of prompt {problem.prompt!r}, response {response!r} raises"
                raise BadProblem(f"{text} {error!r}") from error
        text = f"the rewards of {len(problems)} responses together raise {error!r}"
        raise BadProblem(f"{text}, the first to prompt {problems[0].prompt!r}") from error
    if len(rewards) != len(problems):
        raise BadProblem(
            f"{len(rewards)} rewards for {len(problems)} responses, the first to prompt "
            f"{problems[0].prompt!r}"
        )
    found = torch.tensor(rewards)  # fp32: 1e39 is no number there
    for i in (~found.isfinite()).nonzero().flatten().tolist():
        text = f"the reward of prompt {problems[i].prompt!r}, response {responses[i]!r}"
        raise BadProblem(f"{text} is {rewards[i]}, want a finite number of fp32")
    return found


def packs(lengths: Tensor, budget: int) -> Iterator[Tensor]:
    """Rows of like length together: indices whose rows, padded to the longest, fit a budget of
    tokens."""
    order = lengths.argsort(descending=True)
    while len(order):
        size = max(1, budget // int(lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def update(
    model: base.DeepSeek, optimizer, sampled: Rollout, advantages: Tensor, recipe: Recipe,
    limit: int, generator: torch.Generator, reference: base.DeepSeek | None = None,
) -> dict[str, float | None]:  # fmt: skip
    """One rollout's updates -> the share of tokens clipped, and the gap, of rows with an advantage.

    advantages: (B,); limit: the longest answer, in tokens. What the sampler says of its tokens
    stands for the old policy: it is the one that drew them, so no pass is spent on it, and the
    first update's ratios are 1 but for rounding: its largest |ln ρ| is the gap. ValueError: it drew
    at another temperature than the recipe's, or with top_p.
    """
    if sampled.drawing != (recipe.temperature, 1.0):
        got = "temperature {}, top_p {}".format(*sampled.drawing)
        raise ValueError(f"drawn at {got}; to learn from at {recipe.temperature}, 1.0 is needed")
    device, mask = sampled.tokens.device, sampled.mask
    if recipe.overlong == "mask":
        mask = mask & sampled.ended[:, None]
    lengths = mask.shape[1] - mask.flip(1).int().argmax(1) + 1  # up to the last that was drawn
    clipped, tokens, gap = 0.0, 0, None
    for epoch in range(recipe.epochs):
        shuffled = torch.randperm(len(mask), generator=generator).to(device)
        for number, part in enumerate(shuffled.tensor_split(recipe.updates)):
            divisor = denominators(mask[part], recipe.denominator, limit)  # of all that were drawn
            used = mask[part].any(1)
            if recipe.skip_ties and not recipe.beta:
                used = used & (advantages[part] != 0)
            part, divisor = part[used], divisor[used]
            for chunk in packs(lengths[part], recipe.pack):
                rows, T = part[chunk], int(lengths[part[chunk]].max())
                drawn, old = mask[rows, : T - 1], sampled.logp[rows, : T - 1]
                routes = sampled.routes[rows, :T] if recipe.replay else None
                arguments = sampled.tokens[rows, :T], drawn, recipe.temperature
                ref_logp = None
                with base.autocast(device) if recipe.bf16 else contextlib.nullcontext():
                    if reference is not None:
                        with torch.no_grad():
                            ref_logp = score(reference, *arguments)  # by its own routes
                    logp = score(model, *arguments, routes)
                loss, share = grpo_loss(
                    logp, old, advantages[rows], drawn, divisor[chunk], recipe.clip,
                    recipe.clip_high, recipe.beta, ref_logp, recipe.weigh_kl,
                )  # fmt: skip
                loss.backward()
                if epoch == number == 0:
                    gap = max(gap or 0.0, (logp - old).abs().max().item())
                clipped += share * int(drawn.sum())
                tokens += int(drawn.sum())
            if len(part):
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                if not norm.isfinite():
                    raise ValueError(f"the gradient's norm is {norm.item()}: lower learning_rate")
                optimizer.step()
                optimizer.zero_grad()
    return {"clipped": clipped / tokens if tokens else None, "gap": gap}


def train_grpo(
    model: base.DeepSeek, encoding: tiktoken.Encoding, task: Task, recipe: Recipe, folder: Path,
    seed: int = 0, reward: Reward | None = None,
) -> list[dict]:  # fmt: skip
    """GRPO in place, logged and saved into `folder`, gone on with if it holds a part of it.

    reward: (problems, responses) -> a number for each; None: the task's. BadProblem names the
    prompt that is at fault; the policy is saved first. The routers' bias
    stays as it is: a batch of 32 prompts is no picture of the load, and moving it would send the
    tokens that were just sampled to other experts.
    """
    reward = reward or (lambda problems, texts: list(map(task.reward, problems, texts)))
    optimizer = make_optimizer(model, recipe.learning_rate)
    reference = copy.deepcopy(model).requires_grad_(False)
    device, end = model.lm_head.weight.device, encoding.encode_single_token(base.END)
    limit = model.config.max_position_embeddings

    def step(number: int) -> dict:
        rng = random.Random(f"{seed} {folder.name} {number}")
        generator = torch.Generator(device).manual_seed(rng.getrandbits(32))
        shuffler = torch.Generator().manual_seed(rng.getrandbits(32))
        problems = [task.problem(rng, held_out=False) for _ in range(recipe.prompts)]
        prompts = encode_prompts(encoding, task, problems, limit)
        begin = time.perf_counter()
        sampled = rollout(
            model, prompts, task.max_new_tokens, recipe.group, recipe.temperature,
            eos_token_id=end, generator=generator, record_routes=recipe.replay,
        )  # fmt: skip
        rollout_seconds = time.perf_counter() - begin
        if not sampled.logp.isfinite().all():
            raise ValueError("the policy's probabilities are no numbers any more")
        texts = decode_answers(encoding, sampled)
        asked = [problem for problem in problems for _ in range(recipe.group)]
        rewards = checked_rewards(reward, asked, texts)
        right = checked_rewards(lambda *both: list(map(task.correct, *both)), asked, texts)
        if recipe.overlong == "penalty":
            most, lengths = task.max_new_tokens, sampled.mask.sum(1).tolist()
            rewards += torch.tensor([overlong_penalty(n, most, max(most // 4, 1)) for n in lengths])
        rewards = rewards.view(-1, recipe.group)
        advantages = group_advantages(rewards, recipe.advantages).flatten().to(device)
        set_rate(optimizer, recipe.learning_rate * recipe.scale(number))
        with torch.no_grad():  # one answer of each group is enough to see how far it has moved
            some = [t[:: recipe.group] for t in (sampled.tokens, sampled.mask, sampled.logp)]
            ref_logp = score(reference, *some[:2], recipe.temperature)
            kl = kl_k3(some[2], ref_logp)[some[1]].mean()
        metrics = update(
            model, optimizer, sampled, advantages, recipe, task.max_new_tokens, shuffler,
            reference if recipe.beta else None,
        )  # fmt: skip
        return {
            "accuracy": right.mean().item(),
            "length": sampled.mask.sum().item() / len(texts),
            "reward": rewards.mean().item(),
            "format": statistics.fmean(map(format_reward, texts)),
            "thinks": statistics.fmean(map(thinks, texts)),
            "cut": 1 - sampled.ended.float().mean().item(),
            "tied": (advantages.view(-1, recipe.group) == 0).all(1).float().mean().item(),
            "kl": kl.item(),
            "entropy": -sampled.logp[sampled.mask].mean().item(),  # nats a token, estimated
            "rollout_seconds": rollout_seconds,
            **metrics,
        }

    model.eval()  # as it samples; there is no dropout, and no balance loss is wanted
    return run_stage(model, optimizer, encoding, recipe.steps, folder, step)


def own_answers(
    model: base.DeepSeek, encoding: tiktoken.Encoding, task: Task, problems: int, samples: int,
    seed: int = 0,
) -> list[tuple[str, str]]:  # fmt: skip
    """Rejection sampling: the first right answer, if one of `samples` is, to training problems.

    -> (prompt, response) pairs, for `train_examples` to pick from (third stage: [2] v1, §2.3).
    """
    rng = random.Random(f"collect {seed}")
    asked = [task.problem(rng, held_out=False) for _ in range(problems)]
    prompts = encode_prompts(encoding, task, asked, model.config.max_position_embeddings)
    end = encoding.encode_single_token(base.END)
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    kept = []
    for start in range(0, problems, 128):
        sampled = rollout(
            model, prompts[start : start + 128], task.max_new_tokens, samples, eos_token_id=end,
            generator=generator,
        )  # fmt: skip
        texts = decode_answers(encoding, sampled)
        for i, problem in enumerate(asked[start : start + 128]):
            right = [t for t in texts[i * samples :][:samples] if task.correct(problem, t)]
            kept += [(problem.prompt, right[0])] if right else []
    return kept


# %% 7. What it has learnt ---------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 − C(n − c, k) / C(n, k): is one of k right, from n of which c are (arXiv:2107.03374)?"""
    if not 1 <= k <= n:
        raise ValueError(f"want k from 1 to the {n} samples, got {k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(
    model: base.DeepSeek, encoding: tiktoken.Encoding, task: Task, problems: int = 256,
    samples: int = 8, seed: int = 777,
) -> dict[str, float]:  # fmt: skip
    """Held-out problems, always the same ones: T = 1, `samples` answers to each, and greedy.

    As many as `problems`, or as there are: a file of questions may hold fewer.
    """
    model.eval()
    rng = random.Random(seed)
    drawn = (task.problem(rng, held_out=True) for _ in range(20 * problems))
    asked = list(itertools.islice(dict.fromkeys(drawn), problems))
    prompts = encode_prompts(encoding, task, asked, model.config.max_position_embeddings)
    end = encoding.encode_single_token(base.END)
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    drawn = rollout(
        model, prompts, task.max_new_tokens, samples, eos_token_id=end, generator=generator
    )
    texts = decode_answers(encoding, drawn)
    right = [task.correct(asked[i // samples], text) for i, text in enumerate(texts)]
    counts = np.array(right).reshape(len(asked), samples).sum(1)
    result = {
        f"pass_at_{k}": statistics.fmean(pass_at_k(samples, int(c), k) for c in counts)
        for k in (1, 4, 8)
        if k <= samples
    }
    greedy = rollout(model, prompts, task.max_new_tokens, temperature=0, eos_token_id=end)
    greedy_texts = decode_answers(encoding, greedy)
    return result | {
        "problems": len(asked),
        "error": float(np.std(counts / samples) / math.sqrt(len(asked))),  # standard, of pass_at_1
        "greedy": statistics.fmean(map(task.correct, asked, greedy_texts)),
        "format": statistics.fmean(map(format_reward, texts)),
        "thinks": statistics.fmean(map(thinks, texts)),
        "length": drawn.mask.sum().item() / len(texts),
    }


def transcript(model: base.DeepSeek, encoding: tiktoken.Encoding, task: Task, seed: int) -> str:
    """One held-out problem and one answer, drawn at T = 1."""
    problem = task.problem(random.Random(seed), held_out=True)
    prompt, end = encode_prompt(encoding, problem.prompt), encoding.encode_single_token(base.END)
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    sampled = rollout(model, [prompt], task.max_new_tokens, eos_token_id=end, generator=generator)
    return problem.prompt + decode_answers(encoding, sampled)[0]


# %% 8. Is it right? ---------------------------------------------------------------------------


def verify_equations() -> None:
    """The loss beside its loops, and hand-worked advantages."""
    torch.manual_seed(0)
    B, T, lengths = 4, 6, [6, 3, 1, 4]
    logp, old, ref = torch.randn(3, B, T, dtype=torch.float64) * 0.4 - 1
    advantages = torch.tensor([1.5, -0.5, 0.7, -1.7], dtype=torch.float64)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    got, _ = grpo_loss(logp, old, advantages, mask, "sequence", 0.2, 0.28, 0.04, ref)
    rows = [t.tolist() for t in (logp, old, advantages)]
    want = reference_loss(*rows, lengths, 0.2, 0.28, 0.04, ref.tolist())
    want = torch.tensor(want, dtype=torch.float64)
    check("grpo_loss = equation 3 by loops", got, want, 1e-12)
    got = group_advantages(torch.tensor([[1.0, 0, 0, 0], [1.2, 1.2, 1.2, 1.2]]))
    want = torch.tensor([[1.5, -0.5, -0.5, -0.5], [0, 0, 0, 0]])
    check("advantages of 1 0 0 0, and of a tie", got, want, 1e-6)
    p = torch.randn(7, dtype=torch.float64).requires_grad_()
    p_logp, q_logp = p.log_softmax(0), torch.randn(7, dtype=torch.float64).log_softmax(0)
    weights = p_logp.exp().detach()
    ratio = (p_logp - p_logp.detach()).exp()
    [k3] = torch.autograd.grad((weights * kl_k3(p_logp, q_logp)).sum(), p, retain_graph=True)
    [k3_weighed] = torch.autograd.grad(
        (weights * ratio * kl_k3(p_logp, q_logp)).sum(), p, retain_graph=True
    )
    forward = (q_logp.exp() * (q_logp - p_logp)).sum()
    backward = (p_logp.exp() * (p_logp - q_logp)).sum()
    for text, got, kl in (
        ("gradient of k3 = that of KL(ref ‖ π)", k3, forward),
        ("gradient of ratio·k3 = that of KL(π ‖ ref)", k3_weighed, backward),
    ):
        [want] = torch.autograd.grad(kl, p, retain_graph=True)
        check(text, got, want, 1e-12)


def verify_sampler(model: base.DeepSeek, encoding: tiktoken.Encoding, task: Task) -> None:
    """What the sampler says it drew from is what the trainer scores; a cache changes nothing."""
    rng, end = random.Random(1), encoding.encode_single_token(base.END)
    prompts = [encode_prompt(encoding, task.problem(rng, True).prompt) for _ in range(16)]
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(1)
    sampled = rollout(
        model, prompts, task.max_new_tokens, 4, eos_token_id=end, generator=generator,
        record_routes=True,
    )  # fmt: skip
    with torch.no_grad(), watched_routes(model) as seen:
        logp = score(model, sampled.tokens, sampled.mask)
    check("sampler's ln π = trainer's", sampled.logp, logp, 1e-4)  # fp32
    kept = sampled.routes[:, :-1][sampled.mask].sort(-1).values  # (drawn, mixtures, K)
    again = torch.stack(seen, 1).unflatten(0, sampled.mask.shape)[sampled.mask].sort(-1).values
    other = (kept != again).any(-1).any(-1).float().mean().item()
    measure("routed_elsewhere", other, "share of tokens, trainer beside sampler, in fp32")
    device = sampled.tokens.device
    with (
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16),
        watched_routes(model) as seen,
    ):
        logp = score(model, sampled.tokens, sampled.mask)
    again = torch.stack(seen, 1).unflatten(0, sampled.mask.shape)[sampled.mask].sort(-1).values
    other = (kept != again).any(-1).any(-1).float().mean().item()
    gap = (logp - sampled.logp).abs().max().item()
    measure("bf16_gap", gap, f"nats at most, a trainer in bf16; {other:.1%} routed elsewhere")
    greedy = rollout(model, prompts, task.max_new_tokens, temperature=0, eos_token_id=end)
    uncached = without_cache(model, prompts, task.max_new_tokens, end)
    same = sum(a == b for a, b in zip(greedy.answers(), uncached, strict=True))
    check("greedy answers, cached = uncached", torch.tensor(same), torch.tensor(len(prompts)), 0)


@torch.no_grad()
def without_cache(model, prompts: list, max_new_tokens: int, end: int) -> list[list[int]]:
    """Greedy, the whole text read again for every token; a row that has ended leaves."""
    rows, done = [list(prompt) for prompt in prompts], [False] * len(prompts)
    device = model.lm_head.weight.device
    for _ in range(max_new_tokens):
        going = [i for i, finished in enumerate(done) if not finished]
        if not going:
            break
        longest = max(len(rows[i]) for i in going)
        tokens = torch.zeros(len(going), longest, dtype=torch.int64)
        for j, i in enumerate(going):
            tokens[j, : len(rows[i])] = torch.tensor(rows[i])
        last = torch.tensor([len(rows[i]) - 1 for i in going])
        hidden = model.hidden(tokens.to(device))[torch.arange(len(going)), last]
        for i, token in zip(going, model.head(hidden).argmax(-1).tolist(), strict=True):
            rows[i].append(token)
            done[i] = token == end
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def draw_curves(metrics: list[dict], ceiling: float | None, out: Path) -> None:
    """Right answers and thinking; length; entropy, distance and ties, over the steps of RL."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook hands down its own, which may be missing here
    from matplotlib import pyplot as plt

    steps = [entry["step"] for entry in metrics]
    curve = lambda key: [entry[key] for entry in metrics]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    left.plot(steps, curve("accuracy"), label="right answers")
    left.plot(steps, curve("thinks"), label="answers with thoughts", alpha=0.6)
    left.plot(steps, curve("format"), label="right form", alpha=0.6, lw=0.8)
    if ceiling is not None:
        text = "right answers before the cold start hid it"
        left.axhline(ceiling, ls="--", lw=0.8, color="gray", label=text)
    left.set(xlabel="step", ylabel="share of a batch, T = 1", ylim=(0, 1.08))
    title = "Rewards alone make it right more often"
    if metrics[0]["thinks"] > 0.5:
        title = "It always thought; rewards alone make it right more often"
    elif metrics[-1]["thinks"] > metrics[0]["thinks"] + 0.1:
        title = "Rewards alone bring the thinking back"
    gained = metrics[-1]["accuracy"] > metrics[0]["accuracy"] + 0.1
    left.set_title(title if gained else "No gain from rewards")
    left.legend(loc="lower right", fontsize=8)
    inset = left.inset_axes((0.55, 0.3, 0.4, 0.17))
    inset.plot((0, 10_400), (0.156, 0.779), "o--", lw=0.8, color="tab:red")  # [2]
    inset.set_title("R1-Zero, AIME 2024: first and last", fontsize=7)
    inset.tick_params(labelsize=6)
    middle.plot(steps, curve("length"), color="tab:green")
    middle.set(xlabel="step", ylabel="tokens of an answer", ylim=(0, None))
    middle.set_title("Length of an answer")
    right.plot(steps, curve("entropy"), label="entropy, nats a token")
    right.plot(steps, curve("kl"), label="KL to where it began (k3), nats a token")
    right.plot(steps, curve("tied"), label="groups without an advantage", alpha=0.6)
    top = max(1.4, 1.2 * max(curve("entropy")))  # a share ends at 1; peaks of the KL may be cut off
    right.set(xlabel="step", ylim=(0, top))
    right.set_title("How sure the policy is, how far it has moved")
    right.legend(loc="upper right")
    figure.savefig(out, dpi=120)
    plt.close(figure)


# %% 9. How fast? ------------------------------------------------------------------------------


def bench(model: base.DeepSeek, encoding: tiktoken.Encoding, task: Task) -> None:
    """Greedy answers with the latent cache and without, interleaved."""
    rng, end = random.Random(2), encoding.encode_single_token(base.END)
    prompts = [encode_prompt(encoding, task.problem(rng, False).prompt) for _ in range(256)]
    ways = {
        "cached": lambda: rollout(
            model, prompts, task.max_new_tokens, temperature=0, eos_token_id=end
        ).answers(),
        "uncached": lambda: without_cache(model, prompts, task.max_new_tokens, end),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(8):
        for name, way in ways.items():
            begin = time.perf_counter()
            answers = way()
            times[name].append(time.perf_counter() - begin)
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    length = statistics.fmean(map(len, answers))
    text = f"greedy, 256 prompts, {length:.0f} tokens on average"
    measure("answers_per_second", 256 / seconds["cached"], text)
    measure("cache_speedup", seconds["uncached"] / seconds["cached"], "x, whole text read again")


# %% Exercises ---------------------------------------------------------------------------------
# 1. Break it: five times the learning_rate, 500 steps. Length, form and thinking rise as before;
#    what falls to a thirtieth, and which of the right figure's curves tells you when?
# 2. Reward the answer's digits anywhere in the response instead of between the tags. What does the
#    policy find, and how many steps does it need? (benchmarks/grpo.py hack)
# 3. Pass what is scored now as what was scored then: `grpo_loss(logp, logp.detach(), …)`, with two
#    updates a batch. Why does the ratio never leave 1, and what is lost?


# %% Main --------------------------------------------------------------------------------------
STAGES = {"worked": Examples(1300, 32, 2e-3), "cold": Examples(150, 64, 5e-4)}
OWN, OWN_PROBLEMS = Examples(150, 64, 5e-4), 2048
PRESETS = {  # the stages before the rewards, and those
    "elicit": (STAGES, Recipe()),
    # thinking, but often wrong, and nothing hidden: what do rewards add to a weak base?
    "beyond": ({"worked": replace(STAGES["worked"], steps=560)}, Recipe(steps=300)),
}
KEPT = "task", "preset", "init", "steps", "further", "quick", "seed"


def arguments() -> argparse.Namespace:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add = cli.add_argument
    add("--task", default="clock", help="clock, countdown, FILE.jsonl, FILE.py:CLASS (%(default)s)")
    add("--preset", choices=PRESETS, default="elicit", help="beyond: a weak base (%(default)s)")
    add("--init", type=Path, metavar="RUN", help="reward what 06 or 07 made, instead of our own")
    add("--steps", type=int, help=f"of GRPO, instead of {Recipe.steps}, or 300")
    add("--further", action="store_true", help="R1's next stages: own right answers, more rewards")
    add("--resume", type=Path, metavar="RUN", help="go on in the folder of a run that was stopped")
    add("--quick", action="store_true", help="a few steps of each stage: does everything work?")
    add("--device", default=default, help="cpu, cuda, cuda:1, … (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, problems and answers (%(default)s)")
    add("--bench", action="store_true", help="also time sampling, with a cache and without")
    add("--out", type=Path, default=Path("runs"), help="folder of the runs (%(default)s/)")
    args = cli.parse_args()
    if any(p.exists() and not p.is_dir() for p in (args.out, *args.out.parents)):
        cli.error(f"--out {args.out} is a file, or in one: want a folder")
    if not 0 <= args.seed < 2**63:
        cli.error(f"--seed must be >= 0 and fit 63 bits, got {args.seed}")
    if args.steps is not None and args.steps < 1:
        cli.error(f"--steps must be positive, got {args.steps}")
    for name in [key for key in KEPT if key != "init"] if args.resume else ():  # it may have moved
        if getattr(args, name) != cli.get_default(name):
            cli.error(f"--{name}: a resumed run keeps what it was begun with")
    return args


def take_over(args: argparse.Namespace) -> None:
    """--resume: the settings are those that the run was begun with."""
    moved = args.init
    try:
        entry = json.loads((args.resume / "run.json").read_text())
        entry = {"preset": "elicit", "further": False} | entry  # older than the flags
        for key in KEPT:
            setattr(args, key, entry[key])
        PRESETS[args.preset]
        args.begun_with = entry.get("weights")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{args.resume} is no folder of a run of 07: {error!r}") from None
    if moved and not args.init:
        raise ValueError(f"--init {moved}: {args.resume} was begun without")
    args.init = args.init and (moved or Path(args.init))


def begin_run(args: argparse.Namespace) -> Path:
    """A folder that is not there yet, with run.json."""
    folder = base.fresh_folder(args.out, "grpo")
    entry = {key: getattr(args, key) for key in (*KEPT, "device")} | {
        "command": shlex.join(["python", "07_grpo.py", *sys.argv[1:]]),
        "commit": base.commit(),
        "init": args.init and str(args.init.resolve()),
        "weights": args.init and weights_digest(args.init),
    }
    if Path(args.task.rpartition(":")[0] or args.task).is_file():  # may be resumed from elsewhere
        entry["task"] = str(Path(args.task).resolve())
    (folder / "run.json").write_text(json.dumps(entry, indent=1) + "\n")
    return folder


def weights_digest(init: Path) -> str:
    """Of the files of its weights: by it a resumed run knows the model that it began with."""
    digest = hashlib.sha256()
    for path in base.weight_files(base.checkpoint_of(init)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def begin_model(args: argparse.Namespace) -> tuple[base.DeepSeek, tiktoken.Encoding]:
    if args.init is None:
        return base.DeepSeek(TINY).to(args.device), byte_encoding()
    folder = base.checkpoint_of(args.init)
    if not (folder / "encoding.json").exists():
        raise ValueError(f"--init {args.init}: want what 06 or 07 made, with encoding.json")
    encoding = base.load_encoding(folder / "encoding.json")
    model = base.DeepSeek.from_pretrained(folder, args.device, torch.float32, with_mtp=False)
    end, c = encoding.encode_single_token(base.END), model.config
    if encoding.n_vocab > c.vocab_size or end != c.eos_token_id:
        raise ValueError(f"--init {args.init}: encoding.json is of another model")
    if args.resume and args.begun_with not in (None, weights_digest(args.init)):
        raise ValueError(f"--init {args.init} has been trained since {args.resume} was begun")
    return model, encoding


def lesson(args: argparse.Namespace) -> None:
    begin = time.perf_counter()
    if args.resume:
        take_over(args)
    task = load_task(args.task)
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # each backend raises a type of its own
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"cannot run on --device {args.device}: {reason}") from None
    if args.init is None and not (hasattr(task, "clean") and hasattr(task, "cold")):
        raise ValueError(f"--task {args.task} has no worked examples: want --init FOLDER")
    torch.manual_seed(args.seed)
    model, encoding = begin_model(args)
    try:  # what may fail does so before anything is written
        asked = [task.problem(random.Random(args.seed), held_out) for held_out in (False, True)]
    except NotImplementedError:
        raise ValueError(f"--task {args.task} doesn't say what its problems are") from None
    if task.max_new_tokens < 1:
        raise ValueError(f"--task {args.task}: want max_new_tokens >= 1, got {task.max_new_tokens}")
    asked += itertools.chain(*getattr(task, "sets", ()))  # of a file: all there are
    encode_prompts(encoding, task, asked, model.config.max_position_embeddings)
    folder = args.resume or begin_run(args)
    (stages, recipe), own, problems, more = PRESETS[args.preset], OWN, 256, OWN_PROBLEMS
    if args.quick:  # no answer is right yet: all groups tie
        stages = {name: replace(stage, steps=4) for name, stage in stages.items()}
        recipe = replace(recipe, steps=2, prompts=4, group=4, skip_ties=False)
        own, problems, more = replace(own, steps=4), 8, 32
    if args.steps:
        recipe = replace(recipe, steps=args.steps)
    verify_equations()
    print(f"run      {folder}   {sum(p.numel() for p in model.parameters()):,} parameters")
    look = lambda: evaluate(model, encoding, task, problems)
    ceiling, later = None, {}  # what --further finds, stage by stage
    again = shlex.join(["python", Path(sys.argv[0]).as_posix(), "--resume", folder.as_posix()])
    try:
        examples = partial(train_examples, encoding=encoding, seed=args.seed)
        if args.init is None:
            examples(model, example=task.clean, recipe=stages["worked"], folder=folder / "worked")
        origin = copy.deepcopy(model)
        if args.init is None and "cold" in stages:
            ceiling = look()
            examples(model, example=task.cold, recipe=stages["cold"], folder=folder / "cold")
        before, said_before = look(), transcript(model, encoding, task, args.seed)
        metrics = train_grpo(model, encoding, task, recipe, folder / "rl", args.seed)
        if args.further:
            pairs = own_answers(model, encoding, task, more, 4, args.seed)
            left_out = "" if pairs else ": both stages are left out"
            print(f"further  {len(pairs):,} of {more:,} problems have a right answer{left_out}")
        if args.further and pairs:
            pick = lambda rng: rng.choice(pairs)
            examples(origin, example=pick, recipe=own, folder=folder / "own")
            later["own_answers"] = evaluate(origin, encoding, task, problems)
            half = replace(recipe, steps=max(recipe.steps // 2, 1))
            train_grpo(origin, encoding, task, half, folder / "rl-again", args.seed)
            later["rewards_again"] = evaluate(origin, encoding, task, problems)
    except KeyboardInterrupt:
        print(f"stopped  go on with: {again}")
        raise SystemExit(130) from None
    except BadProblem:
        print(f"stopped  once it is mended: {again}")
        raise
    if args.quick:
        print("quick    the numbers below are those of a model that has learnt nothing yet")
    after, said_after = look(), transcript(model, encoding, task, args.seed)
    report(before, after, ceiling, metrics, recipe)
    for name, found in later.items():
        text = f"from where stage one ended; greedy {found['greedy']:.3f}"
        text += f", {found['length']:.1f} tokens"
        measure(f"pass_at_1_{name}", found["pass_at_1"], text)
    since = "since it was resumed" if args.resume else "in all"
    measure("seconds", time.perf_counter() - begin, f"s {since}")
    draw_curves(metrics, ceiling and ceiling["pass_at_1"], folder / "curves.png")
    print(f"figure   {folder / 'curves.png'}")
    verify_sampler(model, encoding, task)
    print(f"before   {said_before!r}\nafter    {said_after!r}")
    if args.bench:
        bench(model, encoding, task)


def report(before, after, ceiling, metrics, recipe: Recipe) -> None:
    set_ = f"{after['problems']} held-out problems"
    if ceiling:
        measure(
            "ceiling", ceiling["pass_at_1"], "pass@1 after worked examples, before the cold start"
        )
        measure("ceiling_greedy", ceiling["greedy"])
    measure("pass_at_1_before", before["pass_at_1"], f"T = 1, {set_}, ±{before['error']:.3f}")
    measure(
        "pass_at_1_after",
        after["pass_at_1"],
        f"±{after['error']:.3f}   R1-Zero, AIME 2024: 0.156 -> 0.779",
    )
    for k in 4, 8:
        text = f"after {after[f'pass_at_{k}']:.3f}"
        measure(f"pass_at_{k}_before", before[f"pass_at_{k}"], text)
    measure("greedy_before", before["greedy"])
    measure("greedy_after", after["greedy"])
    measure("format_after", after["format"], f"before {before['format']:.3f}")
    measure("thinks_after", after["thinks"], f"before {before['thinks']:.3f}")
    text = f"x, from {before['length']:.1f} to {after['length']:.1f} tokens"
    measure("length_ratio", after["length"] / before["length"], text)
    if gaps := [entry["gap"] for entry in metrics if entry["gap"] is not None]:
        measure("worst_gap", max(gaps), "nats, ln π of sampler and trainer, all first updates")
    count = recipe.prompts * recipe.group * len(metrics)
    seconds, sampling = metrics[-1]["seconds"], sum(e["rollout_seconds"] for e in metrics)
    text = f"update included; sampling is {sampling / seconds:.0%} of the time"
    measure("completions_per_second", count / seconds, text)


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    args = arguments()
    try:
        lesson(args)
    except (ValueError, OSError) as error:
        print(f"07_grpo.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # while nothing was training: there is nothing to lose
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
