"""09_cost.py: formulas against the model itself, counted operation by operation, and by hand."""

import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

base = import_module("06_train")
chapter = import_module("09_cost")
receipt = import_module("benchmarks.record").receipt
ROOT = Path(__file__).resolve().parents[1]
SMALL = replace(base.NANO, vocab_size=64, num_hidden_layers=2, bos_token_id=0, eos_token_id=1)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_formula_counts_what_the_model_holds(data):
    draw = lambda *choices: data.draw(st.sampled_from(choices))
    layers = draw(1, 2, 5)
    config = replace(
        SMALL, hidden_size=draw(16, 40), num_hidden_layers=layers, n_shared_experts=draw(0, 1, 2),
        first_k_dense_replace=draw(0, 1, layers), q_lora_rank=draw(None, 12),
        num_attention_heads=draw(1, 3), v_head_dim=draw(8, 20), num_nextn_predict_layers=draw(0, 1),
        topk_method=draw("noaux_tc", "greedy"),
    )  # fmt: skip
    with torch.device("meta"):
        model = base.DeepSeek(config)
    size = lambda module: sum(t.numel() for t in module.state_dict().values())
    assert chapter.total(chapter.count_parameters(config)) == size(model) - size(model.mtp)
    if config.num_nextn_predict_layers and config.first_k_dense_replace < layers:
        assert chapter.total(chapter.count_parameters(config, mtp=True)) == size(model.mtp)


def products(model, *arguments) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_flops_are_those_that_a_counter_sees(q_lora_rank, monkeypatch):
    """Of a model whose experts all serve every token: its products cannot hide in the routing."""
    config = replace(
        SMALL, first_k_dense_replace=2, q_lora_rank=q_lora_rank, num_nextn_predict_layers=0,
    )  # fmt: skip
    T, plain = 64, import_module("01_attention").attention  # all T² scores: twice the causal half
    monkeypatch.setattr(base, "cpu_or_gpu_attention", plain)
    model = base.DeepSeek(config)
    for block in model.model.layers:
        block.self_attn.attention = plain
    flops = chapter.flops_per_token(config, T, "prefill")
    got = products(model, torch.zeros(1, T, dtype=torch.int64))
    assert got == T * (flops["weights"] + 2 * flops["attention"])
    training = chapter.flops_per_token(config, T)
    assert all(training[key] == 3 * flops[key] for key in flops)


def test_a_decoded_token_takes_what_a_counter_sees():
    config = replace(SMALL, first_k_dense_replace=2, num_nextn_predict_layers=0)
    model, S = base.DeepSeek(config), 40
    caches = model.new_caches(1, S)
    with torch.no_grad():
        model(torch.zeros(1, S - 1, dtype=torch.int64), caches)
    with sdpa_kernel(SDPBackend.MATH):  # the counter doesn't know the CPU's own
        got = products(model, torch.zeros(1, 1, dtype=torch.int64), caches)
    flops = chapter.flops_per_token(config, S, "decode")
    L, R = config.kv_lora_rank, config.qk_rope_head_dim
    wasted = 2 * config.num_attention_heads * R * S * 2  # the twin sums R channels too many
    assert got == flops["weights"] + flops["attention"] + wasted
    assert L  # absorbed: W_UK and W_UV cost what kv_b_proj did


def test_a_token_uses_a_share_of_the_experts():
    counts = chapter.count_parameters(base.V3)
    stored, used = counts["routed experts"]
    assert stored == 32 * used  # 8 of 256
    assert all(pair[0] == pair[1] for name, pair in counts.items() if name != "routed experts")


def test_the_cache_is_what_the_cache_allocates():
    for config in base.NANO, base.MINI:
        caches = base.DeepSeek(config).bfloat16().new_caches(1, 1)
        want = sum(cache.entries.numel() * cache.entries.element_size() for cache in caches)
        assert chapter.kv_bytes_per_token(config) == want


@pytest.mark.parametrize("limited", [True, False])
def test_nodes_reached_by_simulation(limited):
    """50,000 tokens that choose at random: the formula within 5 standard errors."""
    c, draws = base.V3, random.Random(0)
    counts = []
    for _ in range(50_000):
        nodes = draws.sample(range(8), 4) if limited else range(8)
        experts = draws.sample([32 * n + i for n in nodes for i in range(32)], 8)
        counts.append(len({e // 32 for e in experts}))
    mean = sum(counts) / len(counts)
    spread = math.sqrt(sum((x - mean) ** 2 for x in counts) / len(counts) ** 2)
    assert abs(chapter.nodes_reached(c, limited=limited) - mean) <= 5 * spread


def test_nodes_that_the_experts_do_not_fill():
    with pytest.raises(ValueError, match="256 experts in 8 groups do not make 7 equal nodes"):
        chapter.nodes_reached(base.V3, nodes=7, limited=False)
    with pytest.raises(ValueError, match="do not make 16"):  # a group would be two nodes
        chapter.dispatch_bytes_per_token(base.V3, nodes=16)
    assert chapter.nodes_reached(base.V3, nodes=16, limited=False) > 6


def test_hours_and_dollars_by_hand():
    cost = chapter.training_cost(base.V3, 1e12, 0.5, "h100", 3.0, 4096)
    flops = sum(chapter.flops_per_token(base.V3, 4096).values())
    assert cost.hours == pytest.approx(1e12 * flops / (0.5 * 989e12) / 3600)
    assert cost.dollars == pytest.approx(3 * cost.hours) and cost.flops == 1e12 * flops
    v3 = chapter.training_cost(base.V3, chapter.TOKENS, chapter.MFU)
    assert v3.hours == pytest.approx(2.664e6, rel=0.01)


def test_the_waterfall_falls_to_the_published_sum():
    steps = chapter.waterfall()
    assert steps[-1].millions == pytest.approx(5.576)
    assert [s.millions for s in steps] == sorted((s.millions for s in steps), reverse=True)
    assert {step.kind for step in steps} <= {"published", "derived", "measured"}
    assert steps[0].hours == pytest.approx(6 * 671_026_419_200 * 14.8e12 / 400e12 / 3600)
    assert steps[2].hours == 2 * steps[3].hours == 2 * 2.664e6
    computing = steps[1].hours / 2.664e6 - 4 / 3  # what is sent is not the products' time
    assert 1.3 < computing < 1.5


def test_memory_by_hand():
    n = 671_026_419_200
    assert chapter.training_bytes(base.V3)["weights"] == 5 * n
    assert sum(chapter.training_bytes(base.V3, "bf16").values()) == 18 * n
    for recipe, sizes in ("fp8", (5, 4, 4)), ("bf16", (6, 4, 8)):
        assert [b / n for b in chapter.training_bytes(base.V3, recipe).values()] == [*sizes]
    # 8 of 256 experts, 4 of 8 nodes: a node of 32 is missed by C(96, 8) of C(128, 8) choices; of
    # those reached 7 in 8 are elsewhere, in 58 layers, 7168 numbers there in 1 byte, back in 2
    reached = 4 * (1 - math.comb(96, 8) / math.comb(128, 8))
    want = 58 * reached * 7 / 8 * 7168 * 3
    assert math.isclose(chapter.dispatch_bytes_per_token(base.V3), want, rel_tol=1e-12)
    c = replace(SMALL, num_hidden_layers=1, first_k_dense_replace=1, q_lora_rank=None)
    D, H = c.hidden_size, c.num_attention_heads
    plain = chapter.activation_bytes_per_token(c, frugal=False)
    out, latent = H * c.v_head_dim, c.kv_lora_rank + c.qk_rope_head_dim
    heads = H * (2 * (c.qk_nope_head_dim + c.qk_rope_head_dim) + c.v_head_dim)
    kept = 2 * D + D + latent + out + heads + latent + D + 3 * c.intermediate_size
    assert plain == 2 * kept
    assert chapter.activation_bytes_per_token(c) < plain / 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((base.V3, 1e12, 0.4, "b200"), "gpu is one of h800"),
        ((base.V3, 1e12, 1.2), "mfu is a share .* got 1.2"),
        ((base.V3, 1e12, 0.0), "mfu is a share"),
        ((base.V3, -1, 0.4), "tokens > 0"),
        ((base.V3, 1e12, 0.4, "h800", -2.0), "price >= 0"),
    ],
)
def test_cost_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        chapter.training_cost(*arguments)


def test_counting_refuses():
    with pytest.raises(ValueError, match="no MTP module"):
        chapter.count_parameters(base.V2_LITE, mtp=True)
    with pytest.raises(ValueError, match="not 'sampling'"):
        chapter.flops_per_token(base.V3, 10, "sampling")
    with pytest.raises(ValueError, match="not 'int4'"):
        chapter.training_bytes(base.V3, "int4")


def call(*arguments):
    command = [sys.executable, "09_cost.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_lesson(tmp_path):
    done = call("--out", tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    checks, measures = receipt(done.stdout.splitlines())
    assert len(checks) >= 18 and all(check["ok"] for check in checks) and len(measures) >= 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["09_cost.png", "09_cost_decode.png"]


def test_the_command_line(tmp_path):
    path = tmp_path / "config.json"
    raw = base.V3.to_dict() | {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(raw))
    done = call("--config", path)
    assert done.returncode == 0 and "671,026,419,200" in done.stdout, done.stderr
    assert call("--preset", "v3").stdout == done.stdout
    assert "an MTP module" in done.stdout and "4 of 8 groups" in done.stdout
    path.write_text(json.dumps(raw | {"model_type": "llama"}))
    done = call("--config", path)
    assert done.returncode == 2 and "model_type 'llama'" in done.stderr
    done = call("--mfu", "0.4")
    assert done.returncode == 2 and "--mfu is of one model: want --preset" in done.stderr
    done = call("--preset", "v3", "--mfu", "1.5")
    assert done.returncode == 2 and "got 1.5" in done.stderr
    done = call("--preset", "v3", "--config", path)
    assert done.returncode == 2 and "not both" in done.stderr


def said(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["09_cost.py", *map(str, flags)])
    chapter.main()
    return capsys.readouterr().out


def test_flags_reach_the_description(monkeypatch, capsys):
    flags = "--gpu", "a100", "--price", "3", "--mfu", "0.5", "--tokens", "1e12"
    out = said(monkeypatch, capsys, "--preset", "v3", *flags, "--context", "8192")
    cost = chapter.training_cost(base.V3, 1e12, 0.5, "a100", 3.0, 8192)
    assert f"{cost.hours:,.4g} A100 hours at 50%" in out and f"${cost.dollars:,.2f}" in out
    assert "at a context of 8,192" in out
    with pytest.raises(SystemExit):
        said(monkeypatch, capsys, "--context", "8192")
    assert "--context is of one model" in capsys.readouterr().err
    # V2 in 8 groups of another number of experts, V2-Lite in one: not limited to nodes
    assert "of 8 groups" not in said(monkeypatch, capsys, "--preset", "v2-lite")


def test_what_you_would_pay(monkeypatch, capsys):
    """At a speed that is given: `small` takes two batches a step."""
    monkeypatch.setattr(chapter, "own_rate", lambda device: (1e3, 1e9))
    chapter.yours(torch.device("cpu"), 3.0)
    _, measures = receipt(capsys.readouterr().out.splitlines())
    [small] = [m for m in measures if m["name"] == "own_hours_small"]
    config, recipe = base.PRESETS["small"]
    tokens = 40_000 * 16 * 2 * 2048
    flops = tokens * sum(chapter.flops_per_token(config, 2048).values())
    assert small["value"] == pytest.approx(flops / 1e9 / 3600, rel=1e-4)
    cost = chapter.training_cost(config, tokens, chapter.MFU, "h100", 3.0, 2048)
    assert f"${cost.dollars:,.2f} at $3.00" in small["text"]


def test_decoding_waits_for_memory_or_for_products():
    """One layer's 576 numbers are multiplied by 128 heads; of GQA each group's by its queries."""
    rates = chapter.decode_rates(8192)
    flops = 2 * 128 * (2 * 512 + 64) * 8192 * 61
    assert rates["v3"] == pytest.approx(660e12 / flops)
    assert rates["v2-lite"] == pytest.approx(3.35e12 / (27 * 576 * 2 * 8192))
    assert rates["llama-3.1-405b"] == pytest.approx(3.35e12 / (126 * 2 * 8 * 128 * 2 * 8192))


def test_kept_activations_by_hand():
    """One mixture behind a dense layer, a query latent, two experts of a token, a shared one."""
    c = replace(SMALL, num_hidden_layers=2, first_k_dense_replace=1, q_lora_rank=24)
    D, H, I, wide = c.hidden_size, c.num_attention_heads, c.moe_intermediate_size, 384
    latent, out = c.kv_lora_rank + c.qk_rope_head_dim, H * c.v_head_dim
    heads = H * (2 * (c.qk_nope_head_dim + c.qk_rope_head_dim) + c.v_head_dim)
    frugal = 2 * (4 * D + D + 24 + latent + 1.5 * out) + (D + 2 * wide) + 3 * (D + 2 * I)
    assert chapter.activation_bytes_per_token(c) == frugal
    plain = 2 * (4 * D + 2 * (D + 24 + latent) + 2 * (out + heads + 24 + latent))
    plain += 2 * (D + 3 * wide) + 3 * 2 * (D + 3 * I)
    assert chapter.activation_bytes_per_token(c, frugal=False) == plain


def test_the_share_of_the_peak_by_hand(capsys):
    chapter.verify_hours()
    _, measures = receipt(capsys.readouterr().out.splitlines())
    found = {m["name"]: m["value"] for m in measures}
    flops = chapter.flops_per_token(base.V3, 4096)
    peak = 989e12 * 180e3 * 3600 / 1e12  # of a token
    assert found["mfu_with_attention"] == pytest.approx(sum(flops.values()) / peak, rel=2e-3)
    assert found["mfu_with_attention"] == pytest.approx(chapter.MFU, abs=5e-3)
    counts = chapter.count_parameters(base.V3, mtp=True)
    drafts = 6 * (chapter.total(counts, 1) + 129280 * 7168)
    assert found["mfu_with_mtp"] == pytest.approx((sum(flops.values()) + drafts) / peak, rel=2e-3)


def test_costs_refuse_what_has_no_end_and_no_context():
    for tokens, price, context in (math.inf, 2.0, 9), (1e9, math.inf, 9), (1e9, 2.0, 0):
        with pytest.raises(ValueError, match="context >= 1"):
            chapter.training_cost(base.V3, tokens, 0.4, "h800", price, context)


def test_the_first_two_steps_of_ones_own_rate_warm_up(monkeypatch):
    clock = iter([t for n in range(6) for t in (100 * n, 100 * n + (50 if n < 2 else n))])
    monkeypatch.setattr(chapter.time, "perf_counter", lambda: next(clock))
    step = lambda *args: [torch.zeros(())]
    monkeypatch.setattr(base, "stepper", lambda *args: step)
    speed, flops = chapter.own_rate(torch.device("cpu"), steps=6)
    assert speed == 8 * 256 / 3.5  # of 2, 3, 4 and 5 seconds


@pytest.mark.parametrize("raw", [{}, {"command": "python 06_train.py", "seed": 0}])
def test_what_is_no_config_is_not_taken_for_v3(raw, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.json").write_text(json.dumps(raw))
    monkeypatch.setattr(sys, "argv", ["09_cost.py", "--config", str(tmp_path / "run.json")])
    with pytest.raises(SystemExit) as stopped:
        chapter.main()
    assert stopped.value.code == 2 and "it lacks hidden_size" in capsys.readouterr().err
