"""07_grpo.py against loops, finite differences, published formulas, and runs that are cut short."""

import itertools
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

chapter = import_module("07_grpo")
base = chapter.base
Recipe, grpo_loss, rollout = chapter.Recipe, chapter.grpo_loss, chapter.rollout
ROOT = Path(__file__).resolve().parents[1]
CLOCK, ENCODING = chapter.Clock(), chapter.byte_encoding()
SMALL = replace(
    chapter.TINY, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
    num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, initializer_range=0.2,
)  # fmt: skip
END = 256


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return base.DeepSeek(SMALL).eval()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def prompts(count=6, seed=0):
    rng = random.Random(seed)
    return [chapter.encode_prompt(ENCODING, CLOCK.problem(rng, False).prompt) for _ in range(count)]


# Advantages ----------------------------------------------------------------------------------


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 1]])
    std = chapter.group_advantages(rewards)
    half = 0.5 / math.sqrt(1 / 3)
    want = torch.tensor([[1.5, -0.5, -0.5, -0.5], [-half, -half, half, half]])
    assert torch.allclose(std, want)
    want = torch.tensor([[0.75, -0.25, -0.25, -0.25], [-0.5, -0.5, 0.5, 0.5]])
    assert torch.equal(chapter.group_advantages(rewards, "mean"), want)


@pytest.mark.parametrize("normalize", ["std", "mean"])
@pytest.mark.parametrize("value", [1.2, 0.1, 1 / 3, -7e5, 0.0])
def test_a_tie_has_no_advantage_whatever_its_mean_rounds_to(value, normalize):
    got = chapter.group_advantages(torch.full((2, 7), value), normalize)
    assert torch.equal(got, torch.zeros(2, 7))


@pytest.mark.parametrize("normalize", ["std", "mean"])
def test_rewards_that_rounding_alone_tells_apart_are_a_tie(normalize):
    for values, dtype in (
        ([0.10000002, 0.1, 0.1], torch.float32),
        ([0.1 + 0.2, 0.3, 0.3], torch.float64),
    ):
        rewards = torch.tensor([values], dtype=dtype)
        assert rewards.amax() > rewards.amin()
        assert not chapter.group_advantages(rewards, normalize).any()
        ends = torch.zeros_like(rewards, dtype=torch.int64)
        assert not chapter.process_advantages(rewards, ends, 2).any()


def test_a_small_difference_is_no_tie():
    rewards = torch.tensor([[1.0, 1.0, 1.0, 1.0 + 1e-5]])
    assert chapter.group_advantages(rewards)[0, 3] == pytest.approx(1.5, rel=0.02)


@pytest.mark.parametrize(
    "rewards, normalize, message",
    [
        (torch.ones(4), "std", r"\(4,\)"),
        (torch.ones(4, 1), "std", r"\(4, 1\)"),
        (torch.ones(2, 4), "max", "'max'"),
        (torch.tensor([[1.0, math.nan]]), "std", "nan"),
        (torch.tensor([[1.0, math.inf]]), "mean", "inf"),
    ],
)
def test_advantages_refuse(rewards, normalize, message):
    with pytest.raises(ValueError, match=message):
        chapter.group_advantages(rewards, normalize)


def test_process_rewards_must_be_finite():
    ends = torch.tensor([[1, 2], [1, -1]])
    with pytest.raises(ValueError, match="rewards must be finite"):
        chapter.process_advantages(torch.tensor([[1.0, math.nan], [0.0, 1.0]]), ends, 4)
    chapter.process_advantages(torch.tensor([[1.0, 2.0], [0.0, math.nan]]), ends, 4)  # not there


def test_routes_of_a_model_without_experts_are_refused():
    dense = base.DeepSeek(replace(SMALL, first_k_dense_replace=SMALL.num_hidden_layers))
    with pytest.raises(ValueError, match="no mixture of experts"):
        chapter.rollout(dense, [[1, 2]], 3, record_routes=True)


def test_process_supervision_by_loops():
    rewards = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]])
    ends = torch.tensor([[1, 3, 6], [2, 4, -1]])
    values = [1.0, 0.0, 2.0, 0.5, 1.0]
    mean, std = torch.tensor(values).mean().item(), torch.tensor(values).std().item()
    want = torch.zeros(2, 8)
    for i, steps in enumerate([[(1.0, 1), (0.0, 3), (2.0, 6)], [(0.5, 2), (1.0, 4)]]):
        for t in range(8):
            want[i, t] = sum((r - mean) / std for r, end in steps if end >= t)
    got = chapter.process_advantages(rewards, ends, 8)
    assert torch.allclose(got, want, atol=1e-6)
    assert torch.equal(chapter.process_advantages(torch.ones(2, 3), ends, 8), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="T = 6"):
        chapter.process_advantages(rewards, ends, 6)


# The loss ------------------------------------------------------------------------------------


def batch(B=4, T=6, lengths=(6, 3, 1, 4)):
    logp, old, ref = torch.randn(3, B, T, dtype=torch.float64) * 0.4 - 1
    advantages = torch.tensor([1.5, -0.5, 0.7, -1.7], dtype=torch.float64)[:B]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return logp, old, advantages, mask, ref


def published(loss_type, logp, old, advantages, mask, clip, high, limit):
    """TRL's documented formulas for its loss types, from the same per-token term."""
    B, terms = len(logp), []
    for i in range(B):
        row = []
        for t in range(logp.shape[1]):
            if mask[i, t]:
                ratio = math.exp(logp[i, t] - old[i, t])
                cut = min(max(ratio, 1 - clip), 1 + high)
                row.append(-min(ratio * advantages[i], cut * advantages[i]).item())
        terms.append(row)
    if loss_type == "grpo":
        return sum(sum(row) / len(row) for row in terms) / B
    total = sum(map(sum, terms))
    return total / (sum(map(len, terms)) if loss_type == "dapo" else B * limit)


@pytest.mark.parametrize("high", [None, 0.28])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_loss_is_the_published_formula(loss_type, high):
    logp, old, advantages, mask, _ = batch()
    kind = {"grpo": "sequence", "dapo": "token", "dr_grpo": torch.full((4,), 4 * 9.0)}[loss_type]
    got, _ = grpo_loss(logp, old, advantages, mask, kind, clip_high=high)
    want = published(loss_type, logp, old, advantages, mask, 0.2, high or 0.2, 9)
    assert got.item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("beta, weigh_kl", [(0.0, False), (0.3, False), (0.3, True)])
def test_gradients_by_finite_differences(beta, weigh_kl):
    logp, old, advantages, mask, ref = batch()
    near = (logp - old).exp()
    assert ((near - 0.8).abs().min() > 1e-4) and ((near - 1.2).abs().min() > 1e-4)  # off the kinks
    loss = lambda x: grpo_loss(
        x, old, advantages, mask, beta=beta, ref_logp=ref, weigh_kl=weigh_kl
    )[0]
    assert torch.autograd.gradcheck(loss, logp.requires_grad_())


def test_on_policy_the_loss_is_zero_and_the_gradient_is_reinforce():
    logp = torch.randn(4, 5, dtype=torch.float64).requires_grad_()
    advantages = chapter.group_advantages(torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64))[0]
    mask = torch.ones(4, 5, dtype=torch.bool)
    loss, clipped = grpo_loss(logp, logp.detach(), advantages, mask)
    assert abs(loss.item()) < 1e-15 and clipped == 0
    [gradient] = torch.autograd.grad(loss, logp)
    assert torch.allclose(gradient, -advantages[:, None].expand(4, 5) / 20)


def test_old_log_probs_are_constants():
    logp, old, advantages, mask, _ = batch()
    old.requires_grad_()
    loss, _ = grpo_loss(logp.requires_grad_(), old, advantages, mask)
    loss.backward()
    assert old.grad is None and logp.grad.abs().sum() > 0


@pytest.mark.parametrize("ratio, advantage, moves", [
    (1.3, 1.0, False), (1.3, -1.0, True), (0.7, 1.0, True), (0.7, -1.0, False),
    (1.1, 1.0, True), (0.9, -1.0, True), (1.25, 1.0, True),
])  # fmt: skip
def test_what_the_clip_stops(ratio, advantage, moves):
    """clip 0.2 below, 0.28 above; only what would go on in the direction it has gone."""
    logp = torch.tensor([[math.log(ratio)]]).requires_grad_()
    arguments = torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1, dtype=torch.bool)
    loss, clipped = grpo_loss(logp, *arguments, clip_high=0.28)
    loss.backward()
    assert bool(logp.grad.abs().sum() > 0) == moves and clipped == float(not moves)


@pytest.mark.parametrize("weigh_kl", [False, True])
def test_the_weight_of_k3(weigh_kl):
    logp, old, advantages, mask, ref = batch()
    loss = lambda beta: grpo_loss(
        logp, old, advantages, mask, "token", beta=beta, ref_logp=ref, weigh_kl=weigh_kl
    )[0]
    k3 = (ref - logp).exp() - (ref - logp) - 1
    want = (k3 * ((logp - old).exp() if weigh_kl else 1))[mask].mean()
    assert (loss(0.5) - loss(0.0)).item() == pytest.approx(0.5 * want.item(), abs=1e-12)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_what_was_not_drawn_may_hold_anything(junk):
    logp, old, advantages, mask, ref = batch()
    want, _ = grpo_loss(logp, old, advantages, mask, beta=0.1, ref_logp=ref)
    spoilt = [torch.where(mask, t, junk).requires_grad_() for t in (logp, old, ref)]
    got, _ = grpo_loss(*spoilt[:2], advantages, mask, beta=0.1, ref_logp=spoilt[2])
    got.backward()
    assert got == want and spoilt[0].grad.isfinite().all()


def test_advantages_by_token():
    logp, old, advantages, mask, _ = batch()
    want, _ = grpo_loss(logp, old, advantages, mask)
    got, _ = grpo_loss(logp, old, advantages[:, None].expand(4, 6), mask)
    assert got == want


def test_an_empty_row_is_no_division_by_zero():
    logp, old, advantages, mask, _ = batch(lengths=(6, 0, 1, 4))
    loss, _ = grpo_loss(logp.requires_grad_(), old, advantages, mask)
    loss.backward()
    assert loss.isfinite() and logp.grad[1].abs().sum() == 0


def test_loss_refuses():
    logp, old, advantages, mask, ref = batch()
    for change, message in (
        ({"old_logp": old[:, :3]}, r"\(4, 3\)"),
        ({"advantages": advantages[:3]}, r"advantages \(3,\)"),
        ({"advantages": torch.ones(4, 8)}, r"advantages \(4, 8\)"),
        ({"mask": mask.float()}, "mask torch.float32"),
        ({"denominator": torch.ones(4, 1)}, r"want denominator \(4,\), got \(4, 1\)"),
        ({"denominator": torch.ones(1)}, r"want denominator \(4,\), got \(1,\)"),
        ({"denominator": "mean"}, "'mean'"),
        ({"beta": 0.1}, "beta 0.1 wants ref_logp"),
    ):
        arguments = {"logp": logp, "old_logp": old, "advantages": advantages, "mask": mask}
        with pytest.raises(ValueError, match=message):
            grpo_loss(**(arguments | change))


def test_advantages_of_what_was_not_drawn_may_be_nan():
    logp, old, advantages, mask, _ = batch()
    by_token = advantages[:, None].expand(logp.shape)
    want, _ = grpo_loss(logp, old, by_token, mask)
    nan = torch.full_like(logp, math.nan)
    spoilt = (torch.where(mask, t, nan) for t in (logp, old, by_token))
    assert torch.equal(grpo_loss(*spoilt, mask)[0], want)


def test_k3_estimates_the_divergence_and_is_never_negative():
    p, q = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    k3 = chapter.kl_k3(p, q)
    assert (k3 >= 0).all() and chapter.kl_k3(p, p).abs().max() == 0
    kl = (p.exp() * (p - q)).sum()
    assert (p.exp() * k3).sum().item() == pytest.approx(kl.item(), abs=1e-12)


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_denominators_are_those_of_the_whole_batch(kind):
    logp, old, advantages, mask, _ = batch()
    want, _ = grpo_loss(logp, old, advantages, mask, kind)
    divisor = chapter.denominators(mask, kind, 99)
    parts = [
        grpo_loss(logp[r], old[r], advantages[r], mask[r], divisor[r])[0] for r in ([0, 2], [1, 3])
    ]
    assert sum(parts).item() == pytest.approx(want.item(), abs=1e-7)
    assert chapter.denominators(mask, "constant", 9).tolist() == [36.0] * 4


# Rollouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_sampler_and_trainer_agree(model, temperature):
    sampled = rollout(model, prompts(), 20, 3, temperature, eos_token_id=END, generator=generator())
    logp = chapter.score(model, sampled.tokens, sampled.mask, temperature)
    assert sampled.mask.sum() > 300
    assert (logp - sampled.logp).abs().max() <= 1e-4
    other = chapter.score(model, sampled.tokens, sampled.mask, temperature * 1.3)
    assert (other - sampled.logp).abs().max() > 0.05


def test_a_rollout_is_prompt_answer_zeros(model):
    asked = prompts()
    sampled = rollout(model, asked, 12, 2, eos_token_id=END, generator=generator())
    answers = sampled.answers()
    for row, (prompt, answer) in enumerate(
        zip((p for p in asked for _ in "ab"), answers, strict=True)
    ):
        whole = prompt + answer
        assert sampled.tokens[row].tolist() == whole + [0] * (sampled.tokens.shape[1] - len(whole))
        assert sampled.ended[row] == (answer[-1] == END) and len(answer) <= 12
        assert END not in answer[:-1] and (sampled.ended[row] or len(answer) == 12)
        drawn = [False] * (len(prompt) - 1) + [True] * len(answer)
        assert sampled.mask[row].tolist()[: len(drawn)] == drawn
        assert not sampled.mask[row][len(drawn) :].any()
    assert (sampled.logp[~sampled.mask] == 0).all()


def test_rows_that_end_leave_and_change_nothing(model):
    """Biased towards its end the model stops early, in many rows at once."""
    with torch.no_grad():
        model.lm_head.weight[END] = model.lm_head.weight.mean(0)
        model.lm_head.weight *= 0.5
    sampled = rollout(model, prompts(8), 40, 8, eos_token_id=5, generator=generator())
    lengths = sampled.mask.sum(1)
    assert sampled.ended.sum() > 5 and lengths.min() < 20 and lengths.max() == 40
    logp = chapter.score(model, sampled.tokens, sampled.mask)
    assert (logp - sampled.logp).abs().max() <= 1e-4


def test_greedy_is_generate_and_needs_no_cache(model):
    asked = prompts()
    greedy = rollout(model, asked, 15, temperature=0, eos_token_id=7)
    assert greedy.answers() == model.generate(asked, 15, eos_token_id=7)
    assert greedy.answers() == chapter.without_cache(model, asked, 15, 7)
    assert (greedy.logp == 0).all()


def test_nucleus_log_probs_are_of_the_nucleus(model):
    sampled = rollout(model, prompts(), 10, 4, 0.9, 0.6, generator=generator())
    logits = model(sampled.tokens[:, :-1])[sampled.mask]
    probs = chapter.mtp.probabilities(logits, 0.9, 0.6)
    drawn = sampled.tokens[:, 1:][sampled.mask]
    want = probs.gather(1, drawn[:, None])[:, 0].log()
    assert want.isfinite().all() and (sampled.logp[sampled.mask] - want).abs().max() <= 1e-3


def test_the_same_generator_the_same_answers(model):
    answers = [rollout(model, prompts(), 9, 4, generator=generator(s)).answers() for s in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert len({tuple(a) for a in answers[0][:4]}) == 4  # one prompt, four answers


def test_draws_follow_the_distribution():
    """Chi-square over 5 tokens, 40,000 draws: 4 degrees of freedom, 1 in 10^5 above 28.5."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -math.inf, 0.5])
    chosen, logp = chapter.draw(logits.expand(40_000, 6), 1.0, 1.0, generator())
    probs = logits.softmax(-1)
    counts = chosen.bincount(minlength=6).double()
    assert counts[4] == 0
    expected = probs.double() * 40_000
    kept = expected > 0
    assert ((counts - expected)[kept].square() / expected[kept]).sum() < 28.5
    assert torch.allclose(logp, probs[chosen].log(), atol=1e-6)
    wrong = (probs.roll(1).double() * 40_000)[kept]  # power: another distribution fails
    assert ((counts[kept] - wrong).square() / wrong.clamp(min=1)).sum() > 1000


@pytest.mark.parametrize("bad, message", [
    (([], 4), r"lengths \[\]"), (([[1], []], 4), r"\[1, 0\]"), (([[1]], 0), "group >= 1, got 0, 1"),
    (([[1]], 600), "601 > max_position_embeddings = 512"),
])  # fmt: skip
def test_rollout_refuses(model, bad, message):
    with pytest.raises(ValueError, match=message):
        rollout(model, *bad)


def test_routes_are_recorded_and_replayed(model):
    sampled = rollout(model, prompts(), 12, 3, eos_token_id=9, generator=generator(),
                      record_routes=True)  # fmt: skip
    assert sampled.routes.shape == (*sampled.tokens.shape, 1, 2)
    with torch.no_grad(), chapter.watched_routes(model) as seen:
        want = chapter.score(model, sampled.tokens, sampled.mask)
    again = torch.stack(seen, 1).unflatten(0, sampled.mask.shape).sort(-1).values
    read = sampled.mask | (torch.arange(again.shape[1]) < 8)  # 8: the shortest prompt
    assert torch.equal(sampled.routes[:, :-1].sort(-1).values[read], again[read])
    follow = lambda routes: chapter.score(model, sampled.tokens, sampled.mask, 1.0, routes)
    assert (follow(sampled.routes) - want).abs().max() <= 1e-5
    assert (follow((sampled.routes + 1) % 4) - want).abs().max() > 1e-3
    assert "choose" not in vars(model.mixtures()[0].gate)


# Updates -------------------------------------------------------------------------------------


def updated(model, sampled, advantages, **changes):
    """The weights after one SGD update, as one vector."""
    mine = base.DeepSeek(SMALL).eval()
    mine.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(mine.parameters(), 0.5)
    recipe = replace(Recipe(updates=1), **changes)
    metrics = chapter.update(mine, optimizer, sampled, advantages, recipe, 20, generator())
    return torch.cat([p.detach().flatten() for p in mine.parameters()]), metrics


@pytest.fixture
def sampled(model):
    """Some answers end, some are cut: its end is the token that the model likes best."""
    free = rollout(model, prompts(), 20, 4, generator=generator())
    end = free.tokens[:, 1:][free.mask].mode().values.item()
    return rollout(
        model, prompts(), 20, 4, eos_token_id=end, generator=generator(), record_routes=True
    )


@pytest.fixture
def advantages(sampled):
    rewards = torch.randn(6, 4)
    rewards[2], rewards[5] = 1.2, 0.0
    return chapter.group_advantages(rewards, "mean").flatten()


@pytest.mark.parametrize("denominator", ["constant", "sequence", "token"])
def test_skipping_ties_and_packing_change_no_update(model, sampled, advantages, denominator):
    plain, _ = updated(model, sampled, advantages, denominator=denominator, skip_ties=False)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (plain - before).abs().max() > 1e-3
    for changes in {"skip_ties": True}, {"pack": 64}, {"pack": 1}, {"replay": True}:
        got, _ = updated(model, sampled, advantages, denominator=denominator, **changes)
        assert (got - plain).abs().max() <= 2e-5, changes


@pytest.mark.parametrize("denominator", ["constant", "sequence", "token"])
def test_update_is_the_gradient_of_the_loss(model, sampled, advantages, denominator):
    got, metrics = updated(model, sampled, advantages, denominator=denominator)
    logp = chapter.score(model, sampled.tokens, sampled.mask)
    divisor = torch.full((24,), 24.0 * 20) if denominator == "constant" else denominator
    loss, _ = grpo_loss(logp, sampled.logp, advantages, sampled.mask, divisor)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    zeros = lambda p: torch.zeros_like(p) if p.grad is None else p.grad
    want = torch.cat([(p - 0.5 * zeros(p)).detach().flatten() for p in model.parameters()])
    assert (got - want).abs().max() <= 1e-5
    assert metrics["gap"] <= 1e-4


def by_hand(model, sampled, advantages, parts, routes=None, **settings):
    """SGD updates on these rows in turn, each by `score` and `grpo_loss` alone."""
    mine = base.DeepSeek(SMALL).eval()
    mine.load_state_dict(model.state_dict())
    temperature = settings.pop("temperature", 1.0)
    for part in parts:
        route = None if routes is None else routes[part]
        logp = chapter.score(mine, sampled.tokens[part], sampled.mask[part], temperature, route)
        arguments = logp, sampled.logp[part], advantages[part], sampled.mask[part]
        grpo_loss(*arguments, **settings)[0].backward()
        torch.nn.utils.clip_grad_norm_(mine.parameters(), 1.0)
        torch.optim.SGD(mine.parameters(), 0.5).step()
        mine.zero_grad()
    return torch.cat([p.detach().flatten() for p in mine.parameters()])


def test_each_update_is_divided_by_its_own_tokens(model, sampled, advantages):
    got, _ = updated(model, sampled, advantages, updates=2, denominator="token")
    parts = torch.randperm(24, generator=generator()).chunk(2)
    want = by_hand(model, sampled, advantages, parts, denominator="token")
    assert (got - want).abs().max() <= 1e-5


@pytest.mark.parametrize("name, value", [
    ("clip", 0.02), ("clip_high", 0.9), ("temperature", 2.0), ("weigh_kl", True),
])  # fmt: skip
def test_settings_reach_the_loss(model, sampled, advantages, name, value):
    """Rows drawn by another policy, so that ratios are far from 1."""
    sampled = sampled._replace(logp=sampled.logp + 0.3 * torch.randn(sampled.logp.shape))
    changes, plain = {"denominator": "token", name: value}, {"denominator": "token"}
    want = {"denominator": "token", name: value}
    if name == "weigh_kl":
        reference = base.DeepSeek(SMALL).eval()
        with torch.no_grad():
            ref_logp = chapter.score(reference, sampled.tokens, sampled.mask)
        mine = base.DeepSeek(SMALL).eval()
        mine.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD(mine.parameters(), 0.5)
        recipe = replace(Recipe(updates=1, beta=0.5), **changes)
        chapter.update(mine, optimizer, sampled, advantages, recipe, 20, generator(), reference)
        got = torch.cat([p.detach().flatten() for p in mine.parameters()])
        want |= {"beta": 0.5, "ref_logp": ref_logp}
        plain |= {"beta": 0.5, "ref_logp": ref_logp}
    else:
        if name == "temperature":
            sampled = sampled._replace(drawing=(value, 1.0))
        got, _ = updated(model, sampled, advantages, **changes)
    everything = [torch.arange(24)]
    assert (got - by_hand(model, sampled, advantages, everything, **want)).abs().max() <= 2e-5
    assert (got - by_hand(model, sampled, advantages, everything, **plain)).abs().max() > 1e-4


@pytest.mark.parametrize("drawing", [{"temperature": 0.7}, {"top_p": 0.9}, {"temperature": 0}])
def test_an_update_wants_answers_as_its_recipe_draws_them(model, advantages, drawing):
    """Their ln π would be that of another distribution than `score`'s: first ratios far from 1."""
    other = rollout(model, prompts(), 20, 4, **drawing, eos_token_id=END, generator=generator())
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"drawn at temp.*, top_p .* at 1.0, 1.0 is needed"):
        updated(model, other, advantages)
    assert all(map(torch.equal, before, model.parameters()))


def test_replay_follows_the_recorded_routes(model, sampled, advantages):
    shifted = sampled._replace(routes=(sampled.routes + 1) % 4)
    got, _ = updated(model, shifted, advantages, replay=True, denominator="token")
    rows = [torch.arange(24)]
    want = by_hand(model, sampled, advantages, rows, shifted.routes, denominator="token")
    assert (got - want).abs().max() <= 2e-5
    assert (got - updated(model, sampled, advantages, denominator="token")[0]).abs().max() > 1e-3


def test_the_gap_is_seen(model, sampled, advantages):
    other = sampled._replace(logp=sampled.logp - 0.25 * (torch.arange(24) == 3)[:, None])
    _, metrics = updated(model, other, advantages)
    assert metrics["gap"] == pytest.approx(0.25, abs=1e-4)


def test_bf16_scores_in_bf16(model, sampled, advantages):
    capable = base.autocast(torch.device("cpu"))
    _, metrics = updated(model, sampled, advantages, bf16=True)
    assert (metrics["gap"] > 1e-3) == isinstance(capable, torch.autocast)


def test_later_updates_see_the_ratio_move(model, sampled, advantages):
    once, first = updated(model, sampled, advantages, updates=1)
    _, second = updated(model, sampled, advantages, updates=1, epochs=4)
    assert first["clipped"] == 0 and second["clipped"] > 0.001


def test_masked_overlong_answers_teach_nothing(model, sampled):
    cut = (~sampled.ended).float()
    assert 2 < cut.sum() < len(cut)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    masked, _ = updated(model, sampled, cut, overlong="mask")
    assert torch.equal(masked, before)
    kept, _ = updated(model, sampled, cut)
    assert not torch.equal(kept, before)


@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_a_policy_of_nan_stops_the_run_and_is_not_saved(tmp_path, where, monkeypatch):
    train(tmp_path / "rl", 2, some)
    saved = (tmp_path / "rl/checkpoint/model.safetensors").read_bytes()
    if where == "weight":
        draw = chapter.draw
        spoil = lambda logits, *args: draw(logits * math.nan, *args)
        monkeypatch.setattr(chapter, "draw", spoil)
    else:
        spoil = lambda *args: (args[0].sum() * math.nan, 0.0)
        monkeypatch.setattr(chapter, "grpo_loss", spoil)
    with pytest.raises(ValueError, match=r"no numbers any more|norm is nan"):
        train(tmp_path / "rl", 5, some)
    assert (tmp_path / "rl/checkpoint/model.safetensors").read_bytes() == saved


def test_all_tied_is_no_update(model, sampled):
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    got, metrics = updated(model, sampled, torch.zeros(24))
    assert torch.equal(got, before) and metrics == {"clipped": None, "gap": None}


def test_reference_holds_back(model, sampled):
    """Without rewards k3 alone moves the policy: towards the reference, and not if it is there."""
    reference = base.DeepSeek(SMALL).eval()
    mine = base.DeepSeek(SMALL).eval()
    mine.load_state_dict(model.state_dict())
    recipe, zeros = Recipe(updates=1, beta=1.0), torch.zeros(24)

    @torch.no_grad()
    def distance():
        logp = [chapter.score(m, sampled.tokens, sampled.mask) for m in (mine, reference)]
        return chapter.kl_k3(*logp)[sampled.mask].mean().item()

    optimizer, before = torch.optim.SGD(mine.parameters(), 0.1), distance()
    for to, moves in (model, False), (reference, True):
        for _ in range(10):
            chapter.update(mine, optimizer, sampled, zeros, recipe, 20, generator(), to)
        assert (distance() < 0.9 * before) == moves


def test_packs_are_all_rows_once_by_length():
    lengths = torch.tensor([5, 50, 7, 30, 31, 6])
    packs = list(chapter.packs(lengths, 64))
    assert sorted(torch.cat(packs).tolist()) == list(range(6))
    assert [len(p) * int(lengths[p].max()) <= 64 for p in packs] == [True] * len(packs)
    assert [p.tolist() for p in packs[:2]] == [[1], [4, 3]]


# Tasks and rewards ---------------------------------------------------------------------------


@pytest.mark.parametrize("text, found", [
    ("<think>a</think><answer>3</answer>", ("a", "3")),
    (" <think></think>\n<answer> 3 </answer>\n", ("", "3")),
    ("<think>a</think><answer>3</answer>.", None),
    ("<think>a</think>", None),
    ("<answer>3</answer>", None),
    ("<think>a</think><answer>3</answer><answer>4</answer>", None),
    ("<think><think>a</think><answer>3</answer>", None),
    ("<answer>3</answer><think>a</think><answer>3</answer>", None),
])  # fmt: skip
def test_parse(text, found):
    assert chapter.parse(text) == found
    assert chapter.format_reward(text) == float(found is not None)
    assert chapter.accuracy_reward(text, "3") == float(found is not None and found[1] == "3")


@pytest.mark.parametrize("text, value", [
    ("1+2*3", 7), ("(1+2)*3", 9), ("8/4/2", 1), ("10-3-2", 5), ("2*(3+4)-5", 9), ("7", 7),
    (" 1 + 1 ", 2), ("1/0", None), ("", None), ("1+", None), ("(1", None), ("1)", None),
    ("2**9", None), ("1 2", None), ("__import__('os')", None), ("1+a", None), ("+1", None),
    ("(" * 40 + "1" + ")" * 40, 1), ("(" * 90, None), ("1+" * 500 + "1", None),
    ("8/(3-8/3)", 24), ("9" * 400 + "/3", 3 * int("1" * 400)), ("9" * 5000, None),
])  # fmt: skip
def test_calculate(text, value):
    assert chapter.calculate(text) == value


@given(st.recursive(
    st.integers(0, 99).map(str),
    lambda part: st.tuples(part, st.sampled_from("+-*/"), part).map(lambda t: f"({''.join(t)})")
    | st.tuples(part, st.sampled_from("+-*"), part).map("".join),
    max_leaves=6,
))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_calculate_as_python_does(text):
    digits = re.sub(r"\b0+(?=\d)", "", text)
    try:
        want = eval(digits)
    except ZeroDivisionError:
        want = None
    got = chapter.calculate(digits)
    assert got == want or float(got) == pytest.approx(want)


def test_language_and_length_rewards():
    answer = "<answer>1</answer>"
    assert chapter.language_reward(f"<think>two more words</think>{answer}") == 1
    assert chapter.language_reward(f"<think>zwei größere 词 1+1</think>{answer}") == 1 / 3
    assert chapter.language_reward(f"<think>1+1=2</think>{answer}") == 1
    assert [chapter.overlong_penalty(n, 100, 20) for n in (10, 80, 90, 100, 120)] == [
        0, 0, -0.5, -1, -1
    ]  # fmt: skip


def test_clock_is_right_and_its_sets_share_nothing():
    rng = random.Random(0)
    train = {CLOCK.problem(rng, False) for _ in range(2000)}
    held_out = {CLOCK.problem(rng, True) for _ in range(2000)}
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    for problem in train | held_out:
        assert eval(problem.prompt[:-1]) % 100 == int(problem.answer)
        assert CLOCK.reward(problem, CLOCK.worked(problem)) == 1.2
        assert CLOCK.reward(problem, CLOCK.worked(problem, 3)) == 0.2
    shown = {prompt for prompt, _ in (CLOCK.clean(rng) for _ in range(5000))}
    shown |= {prompt for prompt, _ in (CLOCK.cold(rng) for _ in range(5000))}
    assert not {p.prompt for p in held_out} & shown


def test_the_steps_of_a_chain():
    problem = chapter.Problem("5-9+7=", "3")
    assert CLOCK.worked(problem) == "<think>5-9=96,96+7=3</think><answer>3</answer>"
    assert CLOCK.worked(problem, 98) == "<think>5-9=96,96+7=1</think><answer>1</answer>"


def test_the_cold_start_is_as_described():
    rng = random.Random(0)
    pairs = [CLOCK.cold(rng) for _ in range(10_000)]
    texts = [text for _, text in pairs]
    formed = [(p, t) for p, t in pairs if chapter.parse(t)]
    assert len(formed) / 10_000 == pytest.approx(0.8, abs=0.02)
    thinking = [(p, t) for p, t in formed if chapter.parse(t)[0]]
    assert len(thinking) / len(formed) == pytest.approx(0.2, abs=0.02)
    wrong = [eval(p[:-1]) % 100 != int(chapter.parse(t)[1]) for p, t in thinking]
    assert sum(wrong) / len(wrong) == pytest.approx(1 / 12, abs=0.03)
    assert all(sum(tag in text for tag in chapter.TAGS) >= 3 for text in texts)


def test_countdown():
    task, rng = chapter.Countdown(), random.Random(0)
    for held_out in False, True:
        problem = task.problem(rng, held_out)
        right = f"<think>…</think><answer>{problem.answer}</answer>"
        assert task.correct(problem, right) and task.reward(problem, right) == 1.2
        target = problem.prompt.partition(" to ")[2].rstrip(": ")
        assert not task.correct(problem, f"<think></think><answer>{target}</answer>")
        assert not task.correct(problem, problem.answer)
        assert task.correct(problem, right.replace("<answer>", "<answer>0"))  # 07 is 7
        assert not task.correct(problem, f"<think></think><answer>{'1' * 5000}</answer>")


def test_a_file_of_questions(tmp_path):
    path = tmp_path / "q.jsonl"
    lines = [
        {"question": f"What is {n} + {n}?", "answer": f"double\n#### {2 * n}"} for n in range(90)
    ]
    lines.append({"question": "How many?", "answer": "1,234"})
    path.write_text("\n".join(map(json.dumps, lines)))
    task = chapter.load_task(str(path))
    assert sum(map(len, task.sets)) == 91 and 2 < len(task.sets[1]) < 20
    for held_out in False, True:
        problem = task.problem(random.Random(1), held_out)
        assert problem.held_out == held_out
        assert task.correct(problem, f"<think>x</think><answer>{problem.answer}</answer>")
    [many] = [p for p in itertools.chain(*task.sets) if p.answer == "1234"]
    assert task.correct(many, "<think></think><answer>1,234</answer>")
    found = chapter.evaluate(base.DeepSeek(SMALL), ENCODING, task, 50, 2)
    assert found["problems"] == len(task.sets[1])  # each once
    path.write_text(
        json.dumps(lines[0] | {"question": "a\u2028b?"}, ensure_ascii=False)
        + "\n\n"
        + "\n".join(map(json.dumps, lines))
    )
    assert sum(map(len, chapter.load_task(str(path)).sets)) == 92
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8-sig")  # as Windows' editors do
    assert sum(map(len, chapter.load_task(str(path)).sets)) == 91
    for bad in '{"question": "no answer"}', '{"question": "q", "answer": null}':
        path.write_text(f"{json.dumps(lines[0])}\n{bad}\n")
        with pytest.raises(ValueError, match=r"q.jsonl, line 2"):
            chapter.load_task(str(path))
    pairs = ("1,234", "1234"), ("3,1415", "3,1415"), ("1,234,567 m", "1234567 m"), ("1,23", "1,23")
    for text, want in pairs:
        assert task.plain(text) == want


def test_a_task_of_ones_own(tmp_path):
    (tmp_path / "mine_for_07.py").write_text(
        "from importlib import import_module\n"
        "grpo = import_module('07_grpo')\n\n\n"
        "class Echo(grpo.Task):\n"
        "    beside = __file__\n\n"
        "    def problem(self, rng, held_out):\n"
        "        digit = str(rng.randrange(5) + 5 * held_out)\n"
        "        return grpo.Problem(digit, digit, held_out)\n"
    )
    task = chapter.load_task(f"{tmp_path}/mine_for_07.py:Echo")
    assert task.beside == str(tmp_path / "mine_for_07.py")
    problem = task.problem(random.Random(0), True)
    assert task.reward(problem, f"<think></think><answer>{problem.answer}</answer>") == 1.2
    for name in "Other", "", "grpo":
        with pytest.raises(ValueError, match="has no class"):
            chapter.load_task(f"{tmp_path}/mine_for_07.py:{name}")


def test_the_held_out_are_asked(model):
    class Spy(chapter.Clock):
        max_new_tokens = 8
        asked = []

        def problem(self, rng, held_out):
            self.asked.append(held_out)
            return super().problem(rng, held_out)

    task = Spy()
    found = chapter.evaluate(model, ENCODING, task, 10, 4)
    assert set(task.asked) == {True} and found["problems"] == 10
    assert found["pass_at_4"] >= found["pass_at_1"] and "pass_at_8" not in found


def test_an_unknown_task():
    with pytest.raises(ValueError, match="--task chess: want clock, countdown"):
        chapter.load_task("chess")


def test_rewards_are_checked():
    problems = [chapter.Problem("2+2=", "4"), chapter.Problem("3+3=", "6")]
    check = lambda reward: chapter.checked_rewards(reward, problems, ["a", "b"])
    assert check(lambda p, t: [1, 0.5]).tolist() == [1.0, 0.5]
    with pytest.raises(ValueError, match=r"prompt '3\+3=', response 'b' raises ZeroDivision"):
        check(lambda p, t: [1 / (x.answer != "6") for x in p])
    with pytest.raises(ValueError, match=r"prompt '3\+3=', response 'b' is nan"):
        check(lambda p, t: [1.0, math.nan])
    for bad, said in (1e39, "is 1e\\+39"), (None, "raises TypeError"):  # fp32 has no 1e39
        with pytest.raises(chapter.BadProblem, match=rf"prompt '3\+3=', response 'b' {said}"):
            check(lambda p, t, bad=bad: [bad if x.answer == "6" else 1.0 for x in p])
    with pytest.raises(chapter.BadProblem, match=r"2 responses together raise Zero.*'2\+2='"):
        check(lambda p, t: [1 / (len(p) - 2)])
    with pytest.raises(ValueError, match=r"1 rewards for 2 responses.*'2\+2='"):
        check(lambda p, t: [1.0])


def test_pass_at_k_by_enumeration():
    for n, c, k in itertools.product((4, 6), range(7), (1, 2, 4)):
        if c <= n:
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            want = sum(map(any, draws)) / len(draws)
            assert chapter.pass_at_k(n, c, k) == pytest.approx(want)
    with pytest.raises(ValueError, match="from 1 to the 4 samples, got 5"):
        chapter.pass_at_k(4, 2, 5)


# Runs ----------------------------------------------------------------------------------------


def train(folder, steps, reward=None, model=None, **changes):
    torch.manual_seed(0)
    model = model or base.DeepSeek(SMALL)
    recipe = replace(Recipe(steps=5, prompts=3, group=3), **changes)
    task = chapter.Clock()
    task.max_new_tokens = 12
    patched = replace(recipe, steps=steps)
    schedule = Recipe.scale
    try:  # the same schedule, cut short
        Recipe.scale = lambda self, step: schedule(recipe, step)
        metrics = chapter.train_grpo(model, ENCODING, task, patched, folder, 3, reward)
    finally:
        Recipe.scale = schedule
    return torch.cat([p.detach().flatten() for p in model.parameters()]), metrics


def some(problems, texts):
    return [len(text.encode()) % 3 for text in texts]


@pytest.mark.parametrize("changes", [{}, {"beta": 0.1, "replay": True, "overlong": "penalty"}])
def test_a_resumed_run_ends_in_the_same_weights(tmp_path, changes):
    whole, metrics = train(tmp_path / "a" / "rl", 5, some, **changes)
    train(tmp_path / "b" / "rl", 2, some, **changes)
    again, resumed = train(tmp_path / "b" / "rl", 5, some, **changes)
    assert torch.equal(whole, again)
    for a, b in zip(metrics, resumed, strict=True):
        drop = ("seconds", "rollout_seconds")
        assert {k: v for k, v in a.items() if k not in drop} == {
            k: v for k, v in b.items() if k not in drop
        }


def test_a_reward_that_raises_stops_cleanly_with_a_checkpoint(tmp_path):
    calls = itertools.count()

    def reward(problems, texts):
        if next(calls) >= 2:
            raise RuntimeError("the judge is out")
        return some(problems, texts)

    with pytest.raises(ValueError, match=r"reward of prompt '.*=', .* raises RuntimeError"):
        train(tmp_path / "rl", 5, reward)
    state = json.loads((tmp_path / "rl/checkpoint/training/state.json").read_text())
    assert state["step"] == 2
    whole, _ = train(tmp_path / "other" / "rl", 5, some)
    again, _ = train(tmp_path / "rl", 5, some)
    assert torch.equal(whole, again)


def test_the_reference_is_the_policy_as_it_began(tmp_path):
    _, metrics = train(tmp_path / "rl", 5, some, beta=0.01, updates=1, learning_rate=1e-2)
    kl = [entry["kl"] for entry in metrics]
    assert kl[0] <= 1e-6 and kl[4] > 1e-3


def test_the_learning_rate_of_each_step(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(chapter, "set_rate", lambda optimizer, rate: rates.append(rate))
    train(tmp_path / "rl", 5, some, warmup=2, final=0.2, learning_rate=1.0)
    assert rates == pytest.approx([0.5, 0.8, 0.6, 0.4, 0.2])


def test_long_answers_are_penalised(tmp_path):
    """A limit of 12 tokens, so from 9 on; almost all answers of a random model are as long."""
    even = lambda problems, texts: [1.0] * len(texts)
    _, kept = train(tmp_path / "a" / "rl", 1, even)
    _, penalised = train(tmp_path / "b" / "rl", 1, even, overlong="penalty")
    assert kept[0]["reward"] == 1 and kept[0]["length"] > 11
    assert penalised[0]["reward"] < 0.2


def test_the_router_bias_is_frozen(tmp_path):
    model = base.DeepSeek(SMALL)
    gate = model.mixtures()[0].gate
    gate.e_score_correction_bias[:] = torch.tensor([0.1, -0.2, 0.0, 0.05])
    before = gate.e_score_correction_bias.clone()
    train(tmp_path / "rl", 2, some, model)
    assert torch.equal(gate.e_score_correction_bias, before)


def test_the_kind_of_advantage(tmp_path, monkeypatch):
    kinds = []
    real = chapter.group_advantages
    spy = lambda rewards, kind: kinds.append(kind) or real(rewards, kind)
    monkeypatch.setattr(chapter, "group_advantages", spy)
    train(tmp_path / "a" / "rl", 1, some)
    train(tmp_path / "b" / "rl", 1, some, advantages="std")
    assert kinds == ["mean", "std"]


def test_a_prompt_without_room_is_named_and_the_policy_saved(tmp_path):
    class Long(chapter.Clock):
        def problem(self, rng, held_out):
            problem = super().problem(rng, held_out)
            return problem if rng.random() < 0.5 else problem._replace(prompt="9" * 600)

    model, long = (
        base.DeepSeek(SMALL),
        f"9{{600}}' and its answer, 665 .* {SMALL.max_position_embeddings}",
    )
    with pytest.raises(chapter.BadProblem, match=long):
        chapter.train_grpo(model, ENCODING, Long(), Recipe(steps=4, prompts=2, group=2), tmp_path)
    assert (tmp_path / "checkpoint/model.safetensors").exists()
    with pytest.raises(chapter.BadProblem, match=long):
        chapter.evaluate(model, ENCODING, Long(), 8)


def test_the_figure_says_what_came_of_it(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda self, text, **k: said.append(text))
    for accuracy, begin, end, title in (
        (0.6, 0.0, 0.0, "Rewards alone make it right more often"),
        (0.6, 0.2, 0.9, "Rewards alone bring the thinking back"),
        (0.6, 0.9, 0.9, "It always thought; rewards alone make it right more often"),
        (0.15, 0.0, 0.9, "No gain from rewards"),
    ):
        plain = {"format": 1, "length": 9, "entropy": 1, "kl": 0, "tied": 0}
        first = plain | {"step": 1, "accuracy": 0.1, "thinks": begin}
        last = plain | {"step": 2, "accuracy": accuracy, "thinks": end}
        chapter.draw_curves([first, last], None, tmp_path / "a.png")
        assert title in said
        said.clear()


def test_a_task_that_cannot_tell_stops_before_the_update(tmp_path):
    """Also with a reward of one's own: the policy is saved as the last step left it."""

    class Unsure(chapter.Clock):
        max_new_tokens = 20

        def correct(self, problem, response):
            raise KeyError("no judge today")

    model = base.DeepSeek(SMALL)
    before = [p.detach().clone() for p in model.parameters()]
    recipe = Recipe(steps=2, prompts=2, group=2)
    with pytest.raises(chapter.BadProblem, match="no judge today"):
        chapter.train_grpo(model, ENCODING, Unsure(), recipe, tmp_path / "rl", 0, some)
    assert all(map(torch.equal, before, model.parameters()))
    assert (tmp_path / "rl/checkpoint/model.safetensors").exists()


@pytest.mark.parametrize(
    "change, words", [({"updates": 5}, "5 are more"), ({"updates": 1.5}, "int, got 1.5")]
)
def test_updates_are_parts_of_a_rollout(change, words):
    with pytest.raises(ValueError, match=words):
        Recipe(prompts=2, group=2, **change)
    assert Recipe(prompts=2, group=2, updates=4)


def test_examples_teach(tmp_path):
    model = base.DeepSeek(SMALL)
    example = lambda rng: ("5+5=", "<think></think><answer>10</answer>")
    metrics = chapter.train_examples(
        model, ENCODING, example, chapter.Examples(30, 4, 1e-2), tmp_path / "e"
    )
    assert metrics[-1]["loss"] < 0.2 < 3 < metrics[0]["loss"]
    greedy = rollout(
        model.eval(), [chapter.encode_prompt(ENCODING, "5+5=")], 12, temperature=0, eos_token_id=END
    )
    assert chapter.decode_answers(ENCODING, greedy) == ["<think></think><answer>10</answer>"]


def test_examples_count_answers_alone(tmp_path):
    """What the prompt says has no part in the loss."""
    seen = []

    class Spy(base.DeepSeek):
        def loss(self, tokens, labels):
            seen.append((tokens, labels))
            return super().loss(tokens, labels)

    torch.manual_seed(0)
    pairs = iter([("1+1=", "ab"), ("22+2=", "c")])
    with pytest.raises(StopIteration):
        chapter.train_examples(
            Spy(SMALL), ENCODING, lambda rng: next(pairs), chapter.Examples(2, 2, 1e-3),
            tmp_path / "e",
        )  # fmt: skip
    [(tokens, labels)] = seen
    rows = [[t for t in row if t != -100] for row in labels.tolist()]
    assert rows == [[*b"ab", END], [*b"c", END]]
    assert tokens[0, :5].tolist() == [END, *b"1+1="]


def test_encoding_keeps_its_tags(tmp_path):
    base.save_encoding(ENCODING, tmp_path / "encoding.json")
    loaded = base.load_encoding(tmp_path / "encoding.json")
    text = "<think>5-9=96</think><answer>3</answer>"
    tokens = chapter.encode(loaded, text)
    assert tokens == chapter.encode(ENCODING, text) and len(tokens) == 4 + 7
    assert loaded.decode(tokens) == text


@pytest.mark.parametrize("name, value", [
    ("advantages", "max"), ("denominator", "rows"), ("overlong", "cut"), ("group", 1),
    ("temperature", 0.0), ("steps", 0), ("learning_rate", 0.0), ("pack", 0), ("warmup", -1),
    ("beta", -0.1), ("clip", 0.0), ("clip_high", -0.2), ("final", -1),
])  # fmt: skip
def test_recipe_refuses(name, value):
    with pytest.raises(ValueError, match=str(value)):
        replace(Recipe(), **{name: value})


def start(*args, **options):
    command = [sys.executable, "07_grpo.py", *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **options)  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_the_command_from_nothing_and_from_a_checkpoint(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    out = whole[1]
    for name in ("pass_at_1_before", "pass_at_1_after", "greedy_after", "ceiling", "length_ratio",
                 "pass_at_8_before", "completions_per_second", "bf16_gap"):  # fmt: skip
        assert f"measure  {name} " in out
    assert "WRONG" not in out and (tmp_path / "grpo/curves.png").exists()
    assert "measure  worst_gap" in out  # it has made updates, though all groups tie
    assert max(map(len, out.splitlines())) <= 130
    trained = tmp_path / "grpo/rl/checkpoint"
    code, out, err = finish(start("--quick", "--init", str(trained), "--out", str(tmp_path)))
    assert code == 0, err
    again = finish(start("--quick", "--init", str(trained.parent), "--out", str(tmp_path / "b")))
    assert re.findall("measure  pass.*", again[1]) == re.findall("measure  pass.*", out)
    assert "ceiling" not in out and (tmp_path / "grpo-2/rl/checkpoint/config.json").exists()


def test_the_further_stages_and_a_weak_base(tmp_path):
    (tmp_path / "easy.py").write_text(
        "from importlib import import_module\ngrpo = import_module('07_grpo')\n"
        "class Easy(grpo.Clock):\n    max_new_tokens = 8\n"
        "    def correct(self, problem, response):\n        return len(response) % 2 == 0\n"
    )
    easy = "--task", str(tmp_path / "easy.py:Easy")
    code, out, err = finish(start("--quick", "--further", *easy, "--out", str(tmp_path)))
    assert code == 0, err
    right = int(re.search(r"further  (\d+) of 32 problems", out)[1])
    assert 20 < right <= 32  # of four answers one has an even length: 15 of 16
    for name in "own_answers", "rewards_again":
        assert f"measure  pass_at_1_{name} " in out
    assert sorted(p.name for p in (tmp_path / "grpo").iterdir() if p.is_dir()) == [
        "cold", "own", "rl", "rl-again", "worked",
    ]  # fmt: skip
    again = finish(start("--resume", str(tmp_path / "grpo")))[1]
    measured = lambda text, name: re.search(rf"measure  {name} .*", text)[0]
    for name in "pass_at_1_after", "pass_at_1_own_answers", "pass_at_1_rewards_again":
        assert measured(out, name) == measured(again, name)
    code, out, err = finish(start("--quick", "--preset", "beyond", "--out", str(tmp_path)))
    assert code == 0, err
    assert "ceiling" not in out and not (tmp_path / "grpo-2/cold").exists()


def test_own_answers_are_right_and_one_a_problem():
    task = chapter.Clock()
    torch.manual_seed(0)
    model = base.DeepSeek(SMALL)
    assert chapter.own_answers(model, ENCODING, task, 8, 2) == []  # it knows nothing
    task.correct = lambda problem, text: True
    assert len(chapter.own_answers(model, ENCODING, task, 8, 2)) == 8
    task.correct = lambda problem, text: "1" in text or len(text) < 30
    pairs = chapter.own_answers(model, ENCODING, task, 140, 3, seed=1)  # over two batches
    assert 0 < len(pairs) < 140 and all(task.correct(None, text) for _, text in pairs)
    rng = random.Random("collect 1")
    asked = [task.problem(rng, held_out=False).prompt for _ in range(140)]
    places = [asked.index(prompt) for prompt, _ in pairs]
    assert places == sorted(set(places))  # in their order, none twice
    assert pairs == chapter.own_answers(model, ENCODING, task, 140, 3, seed=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a quick run that nobody stops prints, and where it lies."""
    folder = tmp_path_factory.mktemp("whole")
    code, out, err = finish(start("--quick", "--out", str(folder)))
    assert code == 0, err
    return folder, out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["int", "kill"])
def test_a_killed_command_goes_on_to_the_same_end(tmp_path, number, whole):
    process = start("--quick", "--out", str(tmp_path))
    metrics = tmp_path / "grpo/cold/metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and metrics.read_text().count("\n") >= 1:
            break
        time.sleep(0.02)
    process.send_signal(number)
    code, out, _ = finish(process)
    if number == signal.SIGINT:
        assert code == 130 and f"--resume {tmp_path}/grpo" in out
    code, out, err = finish(start("--resume", str(tmp_path / "grpo")))
    assert code == 0, err
    assert "measure  pass_at_1_after" in out
    ends = [path / "grpo/rl/checkpoint/model.safetensors" for path in (tmp_path, whole[0])]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_a_task_in_a_file_is_found_again_from_elsewhere(tmp_path):
    (tmp_path / "own.py").write_text(
        "from importlib import import_module\ngrpo = import_module('07_grpo')\n"
        "class Own(grpo.Clock):\n    max_new_tokens = 20\n"
    )
    (tmp_path / "elsewhere").mkdir()
    for folder, args in (
        (tmp_path, ("--quick", "--task", "own.py:Own", "--out", "r")),
        (tmp_path / "elsewhere", ("--resume", str(tmp_path / "r/grpo"))),
    ):
        command = [sys.executable, str(ROOT / "07_grpo.py"), *args]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_a_loss_of_nan_stops_the_examples(tmp_path):
    model = base.DeepSeek(SMALL)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    example = lambda rng: ("5+5=", "<think></think><answer>10</answer>")
    with pytest.raises(ValueError, match="loss nan at step 1"):
        chapter.train_examples(model, ENCODING, example, chapter.Examples(3, 2, 1e-3), tmp_path)
    assert not (tmp_path / "checkpoint").exists()


def test_a_checkpoint_is_saved_over_what_a_kill_has_left(tmp_path):
    train(tmp_path / "rl", 1, some)
    shutil.copytree(tmp_path / "rl/checkpoint", tmp_path / "rl/checkpoint.old")
    whole, _ = train(tmp_path / "rl", 5, some)
    again, _ = train(tmp_path / "other" / "rl", 5, some)
    assert torch.equal(whole, again)


@pytest.mark.parametrize("args, message", [
    (("--task", "chess"), "--task chess"),
    (("--task", "countdown"), "has no worked examples: want --init FOLDER"),
    (("--device", "cuda:99"), "cannot run on --device cuda:99"),
    (("--init", "/nowhere"), "/nowhere"),
    (("--resume", "/nowhere"), "/nowhere is no folder of a run of 07"),
    (("--steps", "0"), "--steps must be positive, got 0"),
    (("--resume", "/nowhere", "--steps", "9"), "--steps: a resumed run keeps"),
    (("--task", "LAZY:Lazy"), "doesn't say what its problems are"),
    (("--task", "LAZY:Long"), "are over 512"),
    (("--task", "LAZY:Mute"), "want max_new_tokens >= 1, got 0"),
    (("--task", "LAZY:Asks"), "33333' and its answer, 515 tokens, are over 512"),
    (("--resume", "BEGUN", "--init", "x"), "--init x: "),
    (("--resume", "LIST"), "is no folder of a run of 07: TypeError"),
    (("--resume", "PRESET"), "is no folder of a run of 07: KeyError('nope')"),
])  # fmt: skip
def test_the_command_refuses_and_leaves_nothing(args, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "lazy.py").write_text(
        "from importlib import import_module\ngrpo = import_module('07_grpo')\n"
        "class Lazy(grpo.Task):\n    clean = cold = None\n"
        "class Long(grpo.Clock):\n    max_new_tokens = 510\n"
        "class Mute(grpo.Clock):\n    max_new_tokens = 0\n"
        "class Asks(grpo.Clock):\n"
        "    sets = [[grpo.Problem('3' * n, '') for n in (5, 450)], [grpo.Problem('2', '')]]\n"
    )
    entry = dict(task="clock", init=None, steps=None, quick=True, seed=0, preset="nope")
    begun = entry | {"preset": "elicit"}
    for name, content in ("list", []), ("preset", entry), ("begun", begun):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(content))
    places = {"LAZY": "lazy.py", "LIST": "list", "PRESET": "preset", "BEGUN": "begun"}
    for word, place in places.items():
        args = [arg.replace(word, str(tmp_path / place)) for arg in args]
    monkeypatch.setattr(sys, "argv", ["07_grpo.py", *args, "--out", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as stopped:
        chapter.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(tmp_path):
    shutil.rmtree(tmp_path / "grpo", ignore_errors=True)
    code, out, err = finish(start("--quick", "--device", "cuda", "--out", str(tmp_path)))
    assert code == 0, err
    assert "WRONG" not in out


def test_advantages_of_whole_numbers():
    rewards = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 1]])
    want = chapter.group_advantages(rewards.float())
    assert torch.equal(chapter.group_advantages(rewards), want)
    ends = torch.tensor([[0, 1, 2, 3], [1, 2, 3, -1]])
    want = chapter.process_advantages(rewards.float(), ends, 4)
    assert torch.equal(chapter.process_advantages(rewards, ends, 4), want)


def test_of_nothing_drawn_the_loss_and_the_share_are_zero():
    logp, old, advantages, mask, _ = batch(lengths=(0, 0, 0, 0))
    loss, clipped = grpo_loss(logp, old, advantages, mask)
    assert loss == 0 and clipped == 0


def test_a_reference_must_have_the_shape_of_the_policys():
    logp, old, advantages, mask, ref = batch()
    with pytest.raises(ValueError, match=r"beta 0.1 wants ref_logp \(4, 6\)"):
        grpo_loss(logp, old, advantages, mask, beta=0.1, ref_logp=ref[:, :1])


def test_a_group_of_none_is_refused(model):
    with pytest.raises(ValueError, match="group >= 1, got 4, 0"):
        rollout(model, [[1]], 4, 0)


def test_logits_of_bf16_are_drawn_from_in_fp32():
    logits = torch.randn(50, 300).bfloat16()
    chosen, logp = chapter.draw(logits, 0.7, 1.0, generator())
    want = (logits.float() / 0.7).log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    assert logp.dtype == torch.float32 and torch.equal(logp, want)


def test_thoughts_may_have_lines_and_blanks_are_none():
    text = "<think>5-9=96\n96+7=3</think>\n<answer>3</answer>"
    assert chapter.parse(text) == ("5-9=96\n96+7=3", "3") and chapter.thinks(text)
    assert not chapter.thinks("<think> \n</think><answer>3</answer>")
    assert chapter.language_reward("two Wörter") == 0.5  # of no form: all of it
    assert [chapter.overlong_penalty(n, 100, 0) for n in (100, 101)] == [0, -1]


def test_countdowns_sets_share_nothing_and_each_number_is_used_once():
    task = chapter.Countdown()
    draw = lambda held_out: {task.problem(random.Random(n), held_out).prompt for n in range(300)}
    assert not draw(False) & draw(True)  # from the same random numbers
    problem = chapter.Problem("2 2 3 5 to 30: ", "2*3*5")
    for text, right in ("2*3*5", False), ("2*(2*5+5)", False), ("(2+2-3)*5*6", False):
        assert task.correct(problem, f"<think></think><answer>{text}</answer>") == right
    problem = chapter.Problem("2 2 3 5 to 32: ", "2*3*5+2")
    assert task.correct(problem, "<think></think><answer>2*3*5+2</answer>")


def test_a_task_may_hold_dataclasses(tmp_path):
    """Whose annotations are looked up in sys.modules, where the file's module has to be."""
    (tmp_path / "data.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from importlib import import_module\n\n\n"
        "@dataclass\nclass Entry:\n    text: str\n\n\n"
        "class Own(import_module('07_grpo').Clock):\n    entry = Entry('a')\n"
    )
    assert chapter.load_task(f"{tmp_path}/data.py:Own").entry.text == "a"


def test_the_end_of_a_text_is_no_part_of_one():
    text = f"2+2={base.END}"  # here it is as many letters as it has
    found = chapter.encode(ENCODING, text)
    assert found == list(text.encode()) and ENCODING.encode_single_token(base.END) not in found


def test_a_prompt_and_its_answer_may_fill_the_context():
    problem = chapter.Problem("1" * 10, "")
    room = 1 + 10 + CLOCK.max_new_tokens
    assert len(chapter.encode_prompts(ENCODING, CLOCK, [problem], room)) == 1
    with pytest.raises(chapter.BadProblem, match=f"{room} tokens, are over {room - 1}"):
        chapter.encode_prompts(ENCODING, CLOCK, [problem], room - 1)


def test_the_schedule_of_a_single_step():
    assert Recipe(steps=1, warmup=0).scale(0) == 1


def test_steps_that_no_checkpoint_has_kept_are_forgotten(tmp_path):
    train(tmp_path / "rl", 2, some)
    with (tmp_path / "rl/metrics.jsonl").open("a") as file:  # then it was killed
        file.write('{"step": 3, "loss": 9}\n')
    _, metrics = train(tmp_path / "rl", 4, some)
    assert [entry["step"] for entry in metrics] == [1, 2, 3, 4]


def test_an_interrupt_saves_the_step_it_ends(tmp_path):
    calls = itertools.count()

    def reward(problems, texts):
        if next(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return some(problems, texts)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "rl", 5, reward)
    state = json.loads((tmp_path / "rl/checkpoint/training/state.json").read_text())
    assert state["step"] == 3


def test_a_step_of_examples_by_hand(tmp_path, monkeypatch):
    """SGD instead of AdamW: the loss, the balance loss, the clip; then the bias."""
    seen = []

    class Spy(base.DeepSeek):
        def loss(self, tokens, labels):
            seen.append((tokens, labels))
            return super().loss(tokens, labels)

    model, mine = Spy(SMALL), base.DeepSeek(SMALL).train()
    mine.load_state_dict(model.state_dict())
    sgd = lambda model, rate: torch.optim.SGD(model.parameters(), rate)
    monkeypatch.setattr(chapter, "make_optimizer", sgd)
    recipe = chapter.Examples(1, 4, 20.0)  # its first step's rate: a twentieth
    chapter.train_examples(model, ENCODING, CLOCK.clean, recipe, tmp_path / "e")
    [mixture] = mine.mixtures()
    (mine.loss(*seen[0]) + 1e-4 * mixture.balance_loss).backward()
    torch.nn.utils.clip_grad_norm_(mine.parameters(), 1.0)
    sgd(mine, 1.0).step()
    assert all(map(torch.equal, model.parameters(), mine.parameters()))
    mixture.gate.update_bias(mixture.load, 1e-3)
    bias = model.mixtures()[0].gate.e_score_correction_bias
    assert torch.equal(bias, mixture.gate.e_score_correction_bias) and bias.any()


def test_the_learning_rate_of_examples(tmp_path, monkeypatch):
    """A cosine down to a tenth, behind 20 steps of warm-up."""
    rates = []
    monkeypatch.setattr(chapter, "set_rate", lambda optimizer, rate: rates.append(rate))
    recipe = chapter.Examples(40, 1, 1e-3)
    chapter.train_examples(base.DeepSeek(SMALL), ENCODING, CLOCK.clean, recipe, tmp_path / "e")
    cosine = [0.55 + 0.45 * math.cos(math.pi * n / 40) for n in range(40)]
    want = [1e-3 * c * min(1, (n + 1) / 20) for n, c in enumerate(cosine)]
    assert rates == pytest.approx(want)


def test_the_gap_is_of_all_packs_and_of_the_first_epoch(model, sampled, advantages):
    for row in range(4):
        other = sampled._replace(logp=sampled.logp - 0.25 * (torch.arange(24) == row)[:, None])
        _, metrics = updated(model, other, advantages, pack=1)
        assert metrics["gap"] == pytest.approx(0.25, abs=1e-4)
    _, metrics = updated(model, sampled, advantages, epochs=3)
    assert metrics["gap"] <= 1e-4


def test_the_metrics_of_a_step_by_hand(tmp_path, monkeypatch):
    """One group ties; the reference says ln π = −9 of every token."""
    drawn, temperatures, real = [], [], chapter.rollout
    spy = lambda *args, **named: drawn.append(real(*args, **named)) or drawn[-1]

    def score(model, tokens, mask, temperature=1.0):
        temperatures.append(temperature)
        return torch.where(mask, -9.0, 0.0)

    monkeypatch.setattr(chapter, "rollout", spy)
    monkeypatch.setattr(chapter, "score", score)
    monkeypatch.setattr(chapter, "update", lambda *_: {"clipped": None, "gap": None})
    reward = lambda problems, texts: [1, 1, 1, 0, 1, 2, 0, 1, 2]
    model = base.DeepSeek(SMALL)
    with torch.no_grad():  # some answers end
        model.lm_head.weight[END] = 0.5 * model.lm_head.weight[7]
    _, [found] = train(tmp_path / "rl", 1, reward, model, temperature=2.0)
    [sampled] = drawn
    mask, logp = sampled.mask, sampled.logp
    assert found["tied"] == pytest.approx(1 / 3) and found["reward"] == 1
    assert found["cut"] == pytest.approx(1 - sampled.ended.float().mean().item())
    assert found["entropy"] == pytest.approx(-logp[mask].mean().item())
    assert found["length"] == pytest.approx(mask.sum().item() / 9)
    r = (-9 - logp[::3])[mask[::3]]
    assert found["kl"] == pytest.approx((r.exp() - r - 1).mean().item(), rel=1e-4)
    assert temperatures == [2.0]


def test_an_evaluation_is_the_same_again_and_knows_its_error(model):
    class Spy(chapter.Clock):
        max_new_tokens = 8

        def correct(self, problem, response):
            right.append(len(response) % 3 == 0)
            return right[-1]

    found = []
    for number in 1, 2:
        torch.manual_seed(number)  # of no account
        right = []
        found.append(chapter.evaluate(model, ENCODING, Spy(), 10, 4))
    assert found[0] == found[1]
    shares = torch.tensor(right[:40]).view(10, 4).double().mean(1)
    want = shares.std(correction=0) / math.sqrt(10)
    assert found[0]["error"] == pytest.approx(want.item()) and want > 0


@pytest.fixture
def stages(monkeypatch):
    """`main` with these flags -> (folder, model, steps, seed) of each stage; nothing is trained."""
    called, found = [], {"pass_at_1": 0.5, "greedy": 0.5, "length": 9.0}

    def stage(model, encoding, example, recipe, folder, seed=0):
        called.append((folder.name, model, recipe.steps, seed))

    def rewards(*args):
        stage(*args)
        return [{}]

    for name, stub in {
        "train_examples": stage, "train_grpo": rewards, "own_answers": lambda *_: [("1+1=", "2")],
        "bench": lambda *_: called.append(("bench", None, 0, 0)), "evaluate": lambda *_: found,
    }.items():  # fmt: skip
        monkeypatch.setattr(chapter, name, stub)
    for name in "verify_equations", "verify_sampler", "transcript", "report", "draw_curves":
        monkeypatch.setattr(chapter, name, lambda *_: None)

    def run(*args):
        called.clear()
        monkeypatch.setattr(sys, "argv", ["07_grpo.py", *args])
        chapter.main()
        return list(called)

    return run


def test_flags_reach_the_stages(stages, tmp_path):
    flags = "--seed", "5", "--steps", "7", "--further", "--bench", "--device", "cpu"
    found = stages(*flags, "--out", str(tmp_path))
    assert [(name, steps, seed) for name, _, steps, seed in found] == [
        ("worked", 1300, 5), ("cold", 150, 5), ("rl", 7, 5), ("own", 150, 5), ("rl-again", 3, 5),
        ("bench", 0, 0),
    ]  # fmt: skip
    worked, cold, rl, own, again, _ = (model for _, model, *_ in found)
    assert worked is cold is rl and own is again and own is not rl  # from where stage one ended


def test_a_run_from_a_checkpoint_is_resumed_from_elsewhere(stages, tmp_path, monkeypatch):
    base.DeepSeek(SMALL).save_pretrained(tmp_path / "from")
    base.save_encoding(ENCODING, tmp_path / "from/encoding.json")
    monkeypatch.chdir(tmp_path)
    [(name, *_)] = stages("--init", "from", "--out", "runs", "--device", "cpu")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert name == stages("--resume", "../runs/grpo", "--device", "cpu")[0][0] == "rl"


def test_worked_examples_are_clean_and_cold(tmp_path, monkeypatch, capsys):
    (tmp_path / "half.py").write_text(
        "from importlib import import_module\ngrpo = import_module('07_grpo')\n"
        "class Half(grpo.Task):\n    clean = grpo.Clock.clean\n"
    )
    args = "--task", f"{tmp_path}/half.py:Half", "--out", str(tmp_path / "runs")
    monkeypatch.setattr(sys, "argv", ["07_grpo.py", *args])
    with pytest.raises(SystemExit):
        chapter.main()
    assert "has no worked examples: want --init FOLDER" in capsys.readouterr().err


def test_several_tokens_may_end_an_answer(model):
    free = rollout(model, [[1, 2]], 6, 3, temperature=0)
    first = free.answers()[0]
    ended = rollout(model, [[1, 2]], 6, 3, temperature=0, eos_token_id=[first[2], 10**6])
    stop = first.index(first[2]) + 1
    assert ended.ended.all() and ended.answers() == [first[:stop]] * 3


def test_a_sampler_of_nan_says_so(model):
    broken = base.DeepSeek(model.config)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="logits are no numbers"):
        rollout(broken, [[1, 2]], 3, 2)


def test_sampling_and_scoring_under_another_default_dtype(model):
    want = rollout(model, [[1, 2]], 4, 2, generator=generator())
    torch.set_default_dtype(torch.float64)
    try:
        got = rollout(model, [[1, 2]], 4, 2, generator=generator())
        scored = chapter.score(model, got.tokens, got.mask)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got.tokens, want.tokens) and got.logp.dtype == torch.float32
    assert (scored - want.logp).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_clipped_ratio_that_overflows_has_no_gradient(dtype):
    logp = torch.tensor([[0.0, -1.0]], dtype=dtype, requires_grad=True)
    old = torch.tensor([[-200.0, -1.0]], dtype=dtype)
    for advantage, want in (1.0, -0.5), (0.0, 0.0):
        loss, _ = grpo_loss(logp, old, torch.tensor([advantage], dtype=dtype), logp.detach() < 1)
        [gradient] = torch.autograd.grad(loss, logp)
        assert loss.isfinite() and gradient[0].tolist() == [0.0, want]
    old = torch.tensor([[-6.0, -1.0]], dtype=dtype)  # below 0 nothing clips a large one
    loss, _ = grpo_loss(logp, old, torch.tensor([-1.0], dtype=dtype), logp.detach() < 1)
    [gradient] = torch.autograd.grad(loss, logp)
    assert gradient[0, 0].item() == pytest.approx(math.exp(6) / 2, rel=2e-3)


def test_small_differences_of_large_rewards_in_float64_are_no_ties():
    rewards = torch.tensor([[1000.001, 1000, 1000]], dtype=torch.float64)
    assert chapter.group_advantages(rewards)[0, 0] > 1
    assert not chapter.group_advantages(rewards.new_tensor([[0.1 + 0.2, 0.3]])).any()


def test_the_model_a_run_began_with_must_not_change(tmp_path, monkeypatch, capsys):
    init = tmp_path / "init"
    saved = base.DeepSeek(SMALL)
    saved.save_pretrained(init / "checkpoint")
    base.save_encoding(ENCODING, init / "checkpoint/encoding.json")
    entry = dict(task="clock", preset="elicit", init=str(init), steps=None, further=False)
    entry |= dict(quick=True, seed=0, weights=chapter.weights_digest(init))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps(entry))

    def refused(*args) -> str:
        argv = ["07_grpo.py", "--resume", str(tmp_path / "run"), "--device", "cpu", *map(str, args)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stopped:
            chapter.main()
        assert stopped.value.code == 2
        return capsys.readouterr().err

    with torch.no_grad():
        saved.lm_head.weight.add_(1)
    saved.save_pretrained(init / "checkpoint")
    assert "init has been trained since" in refused()
    init.rename(tmp_path / "moved")
    assert "want what 06 or 07 made, with encoding.json" in refused()
    assert "moved has been trained since" in refused("--init", tmp_path / "moved")
    other = base.encoding_of(base.train_bpe(["the cat the hat " * 9], 265))
    base.save_encoding(other, tmp_path / "moved/checkpoint/encoding.json")
    assert "encoding.json is of another model" in refused("--init", tmp_path / "moved")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
