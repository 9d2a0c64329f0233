"""06_train.py against transformers, naive recomputation, and runs that are cut short."""

import contextlib
import copy
import gzip
import itertools
import json
import lzma
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

chapter = import_module("06_train")
receipt = import_module("benchmarks.record").receipt
DeepSeek, DeepSeekConfig, Recipe = chapter.DeepSeek, chapter.DeepSeekConfig, chapter.Recipe

ROOT = Path(__file__).resolve().parents[1]
FULL = "No space left on device"
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,  # with beta_slow: one pair keeps its speed, the others are slowed
    "beta_slow": 0.5,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,  # not equal to mscale, so that mixing them up shows
}
TINY = DeepSeekConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=12,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=20,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=6,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    rope_scaling=YARN,
    max_position_embeddings=64,
    initializer_range=0.1,
)
PLAIN = replace(TINY, q_lora_rank=None, n_group=1, topk_group=1, rope_scaling=None)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def fp32(monkeypatch):
    """For comparisons with a tolerance of fp32, on machines that would train in bf16."""
    monkeypatch.setattr(chapter, "autocast", lambda device: contextlib.nullcontext())


def lively(model):
    """Weights that hide nothing: no norm is 1, no bias 0, and the logits are of order 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.normal_(1, 0.2)
            elif not name.endswith(("embed_tokens.weight", "lm_head.weight")):
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(0, 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-1, -0.1)  # below 0: a dropped group must not win by a 0
    return model


def model_of(config=TINY):
    return lively(DeepSeek(config))


def tokens_of(*shape, vocabulary=61):
    return torch.randint(vocabulary, shape)


def assert_close(got, want, tol):
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs().max().item()
    assert error <= tol, f"error {error:.2e} > {tol:.0e}"


def same_weights(a, b):
    """Bit for bit, names and dtypes included."""
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert {n: t.dtype for n, t in a.items()} == {n: t.dtype for n, t in b.items()}
    return all(torch.equal(a[name], b[name]) for name in a)


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# transformers with the same weights ---------------------------------------------------------

V3_VARIANTS = {
    "groups": {},
    "plain_q": {"q_lora_rank": None},
    "no_yarn": {"rope_scaling": None},
    "half_split": {"rope_interleave": False},
    "two_shared": {"n_shared_experts": 2, "n_group": 1, "topk_group": 1},
    "not_renormalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.3},
    "one_kind_of_layer": {"first_k_dense_replace": 0, "rms_norm_eps": 1e-3},
    "dense": {"first_k_dense_replace": 3, "qk_nope_head_dim": 12, "v_head_dim": 20},
}
SOFTMAX = {"scoring_func": "softmax", "norm_topk_prob": False}
V2_VARIANTS = {
    "v2_greedy": {**SOFTMAX, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "v2_groups": {**SOFTMAX, "topk_method": "group_limited_greedy", "q_lora_rank": None},
}
VARIANTS = V3_VARIANTS | V2_VARIANTS


def transformers_class(config):
    transformers = pytest.importorskip("transformers")
    version = 3 if config.topk_method == "noaux_tc" else 2
    return getattr(transformers, f"DeepseekV{version}ForCausalLM")


def theirs_from(folder, config, dtype=torch.float32):
    model, report = transformers_class(config).from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    # what it can't find it invents, with no more than a warning
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def theirs_of(config, dtype=torch.float32):
    """A model that transformers built by itself, from its own spelling of the config."""
    cls = transformers_class(config)
    raw = config.to_dict()
    yarn = raw.pop("rope_scaling")
    rope = {"rope_type": "default"} if yarn is None else {"rope_type": "yarn", **yarn}
    rope.pop("type", None)
    raw["rope_parameters"] = rope | {"rope_theta": raw.pop("rope_theta")}
    theirs = cls.config_class(**raw)
    theirs._attn_implementation = "eager"
    return lively(cls(theirs)).to(dtype)


def assert_same_model(ours, theirs):
    """Logits, loss, and the gradient of every parameter."""
    tokens = tokens_of(3, 40)  # past YaRN's original context of 16
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.2, -100)
    want = theirs(tokens, labels=labels)
    assert 0.3 < want.logits.std() < 10  # of order 1, which the tolerance is about
    assert_close(ours(tokens), want.logits, 1e-4)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]  # transformers shifts inside
    loss = ours.loss(tokens, shifted)
    assert_close(loss, want.loss, 1e-5)
    loss.backward()
    want.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        scale = gradients[name].abs().max().item()
        assert scale > 0, name
        # sums of 120 positions in fp32: 1e-7 relative each, amplified through three layers
        assert_close(parameter.grad / scale, gradients[name] / scale, 1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_reads_ours(variant, tmp_path):
    config = replace(TINY, **VARIANTS[variant])
    ours = model_of(config)
    ours.save_pretrained(tmp_path)
    assert_same_model(ours, theirs_from(tmp_path, config))


@pytest.mark.parametrize("variant", VARIANTS)
def test_we_read_transformers(variant, tmp_path):
    config = replace(TINY, **VARIANTS[variant])
    theirs = theirs_of(config)
    theirs.save_pretrained(tmp_path)
    ours = DeepSeek.from_pretrained(tmp_path)
    # transformers writes an MTP depth of its own, and V2's config has no scoring or layout to say
    assert replace(ours.config, num_nextn_predict_layers=0) == config
    assert_same_model(ours, theirs)


def test_router_bias_stays_fp32_in_a_bf16_checkpoint(tmp_path):
    ours = model_of().to(torch.bfloat16)
    bias = ours.mixtures()[0].gate.e_score_correction_bias
    assert bias.dtype == torch.float32 and not torch.equal(bias, bias.bfloat16().float())
    ours.save_pretrained(tmp_path / "ours")
    stored = load_file(tmp_path / "ours/model.safetensors")
    for name, tensor in stored.items():
        wide = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), name
    theirs = theirs_from(tmp_path / "ours", TINY, torch.bfloat16)
    assert torch.equal(theirs.model.layers[1].mlp.gate.e_score_correction_bias, bias)

    theirs.save_pretrained(tmp_path / "theirs")
    again = DeepSeek.from_pretrained(tmp_path / "theirs")
    assert same_weights(again, ours)
    wide = DeepSeek.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert {t.dtype for t in wide.state_dict().values()} == {torch.float32}
    assert same_weights(wide.to(torch.bfloat16), ours)


def test_autocast_is_near_fp32():
    """What a CPU with bf16 trains in; the dtypes are as wide where they have to be."""
    model, tokens = model_of(), tokens_of(3, 41)
    want = model.loss(tokens[:, :-1], tokens[:, 1:])
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    # a logit of order 1 is off by 2^-8 a rounding, and the mean of 120 evens it out
    assert_close(loss, want, 0.05)
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())


# Checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["groups", "plain_q", "two_shared", "v2_greedy"])
def test_round_trip_is_exact(variant, dtype, tmp_path):
    ours = model_of(replace(TINY, **VARIANTS[variant])).to(dtype)
    ours.save_pretrained(tmp_path)
    again = DeepSeek.from_pretrained(str(tmp_path))
    assert again.config == ours.config
    assert same_weights(again, ours)
    tokens = tokens_of(2, 20)
    assert torch.equal(again(tokens), ours(tokens))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_names_are_the_released_ones(tmp_path):
    """FACTS: the tensor list of V3's checkpoint, for one dense layer and one mixture."""
    config = replace(TINY, num_hidden_layers=2)
    DeepSeek(config).save_pretrained(tmp_path)
    layers = []
    for layer in range(2):
        names = ["input_layernorm", "post_attention_layernorm"]
        parts = "q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj"
        names += [f"self_attn.{part}" for part in parts.split()]
        if layer:
            names += ["mlp.gate"]
            inner = ["shared_experts", *(f"experts.{e}" for e in range(8))]
            names += [f"mlp.{i}.{p}_proj" for i in inner for p in ("gate", "up", "down")]
        else:
            names += [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
        layers += [f"model.layers.{layer}.{name}.weight" for name in names]
    top = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    bias = ["model.layers.1.mlp.gate.e_score_correction_bias"]
    stored = load_file(tmp_path / "model.safetensors")
    assert sorted(stored) == sorted([*top, *layers, *bias])
    # (out, in), and q_b's rows are those of the heads in order
    assert stored["model.layers.1.mlp.experts.3.gate_proj.weight"].shape == (12, 32)
    assert stored["model.layers.1.mlp.experts.3.down_proj.weight"].shape == (32, 12)
    assert stored["model.layers.0.self_attn.q_b_proj.weight"].shape == (2 * (8 + 8), 20)


def test_shards_with_an_index(tmp_path):
    theirs = theirs_of(TINY)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists()
    ours, tokens = DeepSeek.from_pretrained(tmp_path), tokens_of(2, 20)
    assert_close(ours(tokens), theirs(tokens).logits, 1e-4)
    # Saved over it, ours is what the folder holds: the old shards must not be read again.
    other = model_of()
    other.save_pretrained(tmp_path)
    assert same_weights(DeepSeek.from_pretrained(tmp_path), other)


def test_missing_shard_is_named(tmp_path):
    theirs_of(TINY).save_pretrained(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=lost.name):
        DeepSeek.from_pretrained(tmp_path)


def announce(folder, depth):
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | {"num_nextn_predict_layers": depth}
    file.write_text(json.dumps(raw))


def test_mtp_that_config_and_weights_tell_differently(tmp_path, capsys):
    """V3's file has layer 61 of 61: index num_hidden_layers. Either way the main model loads."""
    plain = model_of()
    plain.save_pretrained(tmp_path)
    DeepSeek.from_pretrained(tmp_path)
    assert capsys.readouterr().err == ""
    announce(tmp_path, 1)
    again = DeepSeek.from_pretrained(tmp_path)
    captured = capsys.readouterr()
    assert "notice" in captured.err and "no MTP weights" in captured.err and captured.out == ""
    assert again.config == plain.config and same_weights(again, plain)

    model_of(replace(TINY, num_nextn_predict_layers=1)).save_pretrained(tmp_path)
    DeepSeek.from_pretrained(tmp_path)
    DeepSeek.from_pretrained(tmp_path, with_mtp=False)
    assert capsys.readouterr().err == ""
    announce(tmp_path, 0)
    assert not DeepSeek.from_pretrained(tmp_path).mtp
    assert "num_nextn_predict_layers 0" in capsys.readouterr().err


def test_half_an_mtp_module_is_refused(tmp_path):
    model_of(replace(TINY, num_nextn_predict_layers=1)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.3.eh_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="1 tensors missing: model.layers.3.eh_proj.weight"):
        DeepSeek.from_pretrained(tmp_path)


def drop(tensors):
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]


def add(tensors):
    tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = torch.zeros(12, 32)


def reshape(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous()


@pytest.mark.parametrize(
    "change, words",
    [
        (drop, "missing.*experts.5.up_proj"),
        (add, "unexpected.*experts.8.up_proj"),
        (reshape, r"lm_head.weight \(32, 61\).*\(61, 32\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_wrong_tensors_are_named(change, words, tmp_path):
    model_of().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        DeepSeek.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("config.json", None, "config.json"),
        ("config.json", b"{", "config.json"),
        ("config.json", b"[1]", "config.json"),
        ("config.json", b'{"model_type": "llama"}', "model_type 'llama'"),
        ("config.json", b'{"vocab_size": "many"}', "vocab_size"),
        ("model.safetensors", None, "safetensors"),
        ("model.safetensors", b"", "model.safetensors"),
        ("model.safetensors", b"garbage" * 9, "model.safetensors"),
    ],
)
def test_unreadable_checkpoint(file, content, words, tmp_path):
    model_of().save_pretrained(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        DeepSeek.from_pretrained(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"weight_map": 3}'])
def test_unreadable_index(content, tmp_path):
    model_of().save_pretrained(tmp_path)
    os.rename(tmp_path / "model.safetensors", tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match="index.json"):
        DeepSeek.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_truncated_weights(kept, tmp_path):
    model_of().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(ValueError, match="model.safetensors"):
        DeepSeek.from_pretrained(tmp_path)


def test_full_disk_keeps_the_old_weights(tmp_path, monkeypatch):
    old = model_of()
    old.save_pretrained(tmp_path)
    before = snapshot(tmp_path)

    def half(tensors, path, metadata=None):
        Path(path).write_bytes(b"the first half")
        raise OSError(28, FULL)

    monkeypatch.setattr(chapter, "save_file", half)
    with pytest.raises(OSError, match=FULL):
        model_of().save_pretrained(tmp_path)
    assert snapshot(tmp_path) == before


# The config ---------------------------------------------------------------------------------

# As released, inert keys included; the values that build a model are in FACTS, section 1.
COMMON_JSON = {
    "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "ep_size": 1,
    "hidden_act": "silu", "initializer_range": 0.02, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "moe_layer_freq": 1, "pretraining_tp": 1,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-06,
    "rope_theta": 10000, "seq_aux": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip
V3_JSON = COMMON_JSON | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
    "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 3, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8, "topk_group": 4,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "transformers_version": "4.33.1", "vocab_size": 129280,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
}  # fmt: skip
V2_LITE_JSON = COMMON_JSON | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
    "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1,
    "topk_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0,
    "scoring_func": "softmax", "topk_method": "greedy", "vocab_size": 102400,
    "rope_scaling": COMMON_JSON["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip


def new_spelling(raw):
    """As transformers 5 writes it."""
    raw = dict(raw)
    scaling = dict(raw.pop("rope_scaling") or {"type": "default"})
    theta = float(raw.pop("rope_theta"))
    return raw | {
        "rope_parameters": {"rope_type": scaling.pop("type"), **scaling, "rope_theta": theta}
    }


@pytest.mark.parametrize("raw, preset", [(V3_JSON, "v3"), (V2_LITE_JSON, "v2-lite")])
@pytest.mark.parametrize("spelling", [dict, new_spelling], ids=["rope_scaling", "rope_parameters"])
def test_released_config(raw, preset, spelling):
    raw = spelling(raw)
    before = json.dumps(raw)
    config = DeepSeekConfig.from_dict(raw)
    assert json.dumps(raw) == before  # the caller's dict is left alone
    # the files' 0.02 is not what the papers trained with, see FACTS
    assert config == replace(chapter.PRESETS[preset][0], initializer_range=0.02)
    # written and read again it is the same, whatever else the file held
    assert DeepSeekConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    # 0.1352338 and 0.1147214: FACTS, section 10
    want = {"v3": 0.1352338, "v2-lite": 0.1147214}[preset]
    with torch.device("meta"):
        block = DeepSeek(replace(config, num_hidden_layers=4)).model.layers[0]
    assert abs(block.self_attn.scale - want) < 1e-7


def test_released_v3_is_fp8():
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with pytest.raises(ValueError, match="quantization_config"):
        DeepSeekConfig.from_dict(V3_JSON | {"quantization_config": fp8})


def test_v2_without_its_defaults():
    """What V2's config class would fill in; groups may be null in its files."""
    left_out = ("scoring_func", "topk_method", "norm_topk_prob", "n_group", "topk_group")
    raw = {key: value for key, value in V2_LITE_JSON.items() if key not in left_out}
    want = replace(chapter.PRESETS["v2-lite"][0], initializer_range=0.02)
    nulls = {"n_group": None, "topk_group": None}
    assert DeepSeekConfig.from_dict(raw | nulls) == want


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_of_transformers(variant):
    config = replace(TINY, **VARIANTS[variant])
    raw = json.loads(json.dumps(theirs_of(config).config.to_dict()))
    assert replace(DeepSeekConfig.from_dict(raw), num_nextn_predict_layers=0) == config


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"tie_word_embeddings": True},
        {"attention_dropout": 0.1},
        {"moe_layer_freq": 2},
        {"quantization_config": {"quant_method": "fp8"}},
        {"model_type": "deepseek_v4"},
        {"model_type": None},
        {"topk_method": "dice"},
        {"scoring_func": "tanh"},
        {"hidden_size": None},
        {"eos_token_id": 129280},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "surprise": 1}},
        {"rope_scaling": {"type": "yarn"}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4}},
    ],
    ids=lambda change: json.dumps(change)[1:40],
)
def test_file_with_other_maths_is_refused(change):
    [(name, _)] = change.items()
    with pytest.raises(ValueError, match=name.removesuffix("_method")):
        DeepSeekConfig.from_dict(V3_JSON | change)


@pytest.mark.parametrize("value", [{}, {"attention_bias": False, "hidden_act": "silu"}])
def test_inert_keys_are_ignored(value):
    inert = {"use_cache": False, "pad_token_id": 3, "head_dim": 64, "anything": {"a": [1]}}
    assert DeepSeekConfig.from_dict(V3_JSON | inert | value) == DeepSeekConfig.from_dict(V3_JSON)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_experts_per_tok": 9}, "9 .*experts"),
        ({"topk_group": 1}, "3 .*experts.* 1 of 4 groups"),
        ({"n_group": 3}, "8 .*experts.* 3 groups"),
        ({"topk_group": 5}, "5 of 4 groups"),
        ({"n_group": 8, "topk_group": 8}, "8 .*one"),  # no best two in a group of one
        ({"qk_rope_head_dim": 7}, "7 channels"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace 4"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"vocab_size": -61}, "vocab_size"),
        ({"q_lora_rank": 0}, "q_lora_rank"),
        ({"q_lora_rank": "none"}, "q_lora_rank"),
        ({"eos_token_id": 61}, "eos_token_id 61"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),  # several, as transformers allows
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*linear"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor 0.5"),
        ({"topk_method": "dice"}, "topk_method"),
        ({"scoring_func": "tanh"}, "scoring_func"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false, got 'yes'"),
    ],
    ids=lambda value: str(value)[1:40] if isinstance(value, dict) else "",
)
def test_impossible_values_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        replace(TINY, **change)


def test_unknown_keyword_is_named():
    with pytest.raises(TypeError, match="num_experts"):
        DeepSeekConfig(num_experts=8)


@pytest.mark.parametrize("preset", chapter.PRESETS)
def test_presets_are_written_and_read(preset):
    config, _ = chapter.PRESETS[preset]
    assert DeepSeekConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("preset, want", [("v2-lite", 15_706_484_224), ("v3", 671_026_419_200)])
def test_parameters_of_the_released_models(preset, want):
    """To the unit, as in the checkpoints' listings; the routers' biases are in them."""
    with torch.device("meta"):
        model = DeepSeek(chapter.PRESETS[preset][0])
    count = lambda module: sum(tensor.numel() for tensor in module.state_dict().values())
    assert count(model) - count(model.mtp) == want
    assert count(model.mtp) == (
        11_610_068_224 if preset == "v3" else 0
    )  # one MoE layer, eh_proj, three norms
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    if preset == "v3":  # the attention of one layer
        layer = model.model.layers[60].self_attn
        assert sum(p.numel() for p in layer.parameters()) == 187_107_328


def test_initialisation():
    """V3 §4.2: every matrix alike, the router and the stacked experts too."""
    model = DeepSeek(
        replace(TINY, hidden_size=128, moe_intermediate_size=64, initializer_range=0.05)
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:  # the standard deviation of n draws is off by 1/√(2n): five times that is never
            assert abs(parameter.std() / 0.05 - 1) < 5 / (2 * parameter.numel()) ** 0.5, name
    for mixture in model.mixtures():
        assert not mixture.gate.e_score_correction_bias.any()


# The loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 7, 511, 512, 513, 1300])  # slices are of 512
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_sliced_cross_entropy(N, dtype, tol):
    """Relative to the largest entry: a sum of 1300 terms loses a hundred roundings at most."""
    hidden = torch.randn(N, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 24, dtype=dtype, requires_grad=True)
    labels = torch.randint(50, (N,))
    want = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    wanted = torch.autograd.grad(3 * want, (hidden, weight))  # 3: the upstream is not always 1
    got = chapter.LinearCrossEntropy.apply(hidden, weight, labels)
    assert_close(got / want, torch.ones_like(want), tol)
    for mine, other in zip(torch.autograd.grad(3 * got, (hidden, weight)), wanted, strict=True):
        assert mine.dtype == dtype
        assert_close(mine, other, tol * other.abs().max().item())


def test_sliced_cross_entropy_in_bf16():
    """As under autocast: bf16 states, an fp32 weight; the sums stay in fp32."""
    hidden = torch.randn(1300, 24).bfloat16().requires_grad_()
    weight = torch.randn(50, 24).bfloat16().float().requires_grad_()
    labels = torch.randint(50, (1300,))
    got = chapter.LinearCrossEntropy.apply(hidden, weight, labels)
    want = F.cross_entropy(hidden.float() @ weight.T, labels, reduction="sum")
    wanted = torch.autograd.grad(want, (hidden, weight))
    gradients = torch.autograd.grad(got, (hidden, weight))
    # a logit of size 15 is off by up to 2^-5, without a sign: the total by much less than that
    assert abs(got - want) < 1300 * 2**-8
    assert gradients[0].dtype == torch.bfloat16 and gradients[1].dtype == torch.float32
    for mine, other in zip(gradients, wanted, strict=True):
        assert (mine.float() - other.float()).norm() < 2**-5 * other.float().norm()


def test_every_label_below_0_is_left_out():
    model, tokens = model_of(), tokens_of(2, 21)
    labels = tokens[:, 1:].clone()
    labels[:, ::2] = -1
    assert torch.equal(
        model.loss(tokens[:, :-1], labels),
        model.loss(tokens[:, :-1], labels.masked_fill(labels < 0, -100)),
    )


@pytest.mark.parametrize("ignored", [0.0, 0.4, 0.99])
def test_loss_is_cross_entropy_of_the_logits(ignored):
    """Value and every gradient, in float64, with labels left out; 2 · 300 rows are two slices."""
    model = model_of(replace(TINY, max_position_embeddings=512)).double()
    tokens = tokens_of(2, 301)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape) < ignored] = -100
    want = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), labels.flatten())
    wanted = torch.autograd.grad(want, list(model.parameters()))
    got = model.loss(tokens[:, :-1], labels)
    assert_close(got, want, 1e-10)
    for mine, other in zip(torch.autograd.grad(got, list(model.parameters())), wanted, strict=True):
        assert_close(mine, other, 1e-10)


def test_model_is_causal():
    model, tokens = model_of(), tokens_of(2, 30)
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 61
    before, after = model(tokens), model(changed)
    assert_close(after[:, :20], before[:, :20], 1e-5)
    assert (after[:, 20:] - before[:, 20:]).abs().amin(-1).max() > 0


# Generation ---------------------------------------------------------------------------------

PROMPTS = [[5, 9, 2, 2, 7], [11], [3, 1, 4, 1, 5, 9, 2, 6, 5]]


@torch.no_grad()
def naive_greedy(model, prompt, new):
    """No cache: everything is computed again for every token."""
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


@pytest.mark.parametrize("variant", ["groups", "plain_q", "half_split", "v2_greedy"])
def test_greedy_is_argmax_of_a_full_pass(variant):
    """Unequal prompts in one batch; 30 tokens go past YaRN's original context of 16."""
    model = model_of(replace(TINY, **VARIANTS[variant]))
    got = model.generate(PROMPTS, 30)
    assert got == [naive_greedy(model, prompt, 30) for prompt in PROMPTS]
    assert got == [model.generate([prompt], 30)[0] for prompt in PROMPTS]
    assert len({tuple(row) for row in got}) == 3 and len(set(got[0])) > 5  # no constant output


def test_a_checkpoint_is_never_older_than_ten_minutes(corpus, tmp_path, monkeypatch):
    clock, saved = itertools.count(0, 400.0), []  # each step takes 400 s
    monkeypatch.setattr(chapter.time, "perf_counter", lambda: next(clock))
    save = lambda self, model, optimizer, encoding, state: saved.append(state["step"])
    monkeypatch.setattr(chapter.Run, "save", save)
    recipe = replace(RECIPE, steps=8)
    chapter.train(fresh_model(corpus), corpus, recipe, tmp_path, reports=1)
    assert saved == [2, 4, 6, 8]


def test_weights_that_are_lost_replace_no_checkpoint(corpus, tmp_path, monkeypatch):
    """By a gradient that is no number (each step has two); by one so large that all is NaN."""
    model, calls = fresh_model(corpus), itertools.count()
    spoil = lambda grad: grad * (math.inf if next(calls) == 5 else 1)
    hook = model.model.norm.weight.register_hook(spoil)
    with pytest.raises(ValueError, match=r"no number at step 3: lower the recipe's learning_rate"):
        chapter.train(model, corpus, replace(RECIPE, steps=8), tmp_path / "a")
    hook.remove()
    saved = DeepSeek.from_pretrained(tmp_path / "a/checkpoint")
    assert all(p.isfinite().all() for p in saved.parameters())
    state = json.loads((tmp_path / "a/checkpoint/training/state.json").read_text())
    assert state["step"] == 2
    monkeypatch.setattr(chapter, "evaluate", lambda *a: (math.nan, 0))
    with pytest.raises(ValueError, match=r"held-out loss nan after step 1: lower"):
        chapter.train(fresh_model(corpus), corpus, replace(RECIPE, steps=8), tmp_path / "b")
    assert not (tmp_path / "b/checkpoint").exists()


def test_a_resumed_run_holds_no_file_of_the_last_checkpoint(reference, corpus, tmp_path):
    shutil.copytree(reference[1], tmp_path / "run")
    model = fresh_model(corpus)
    optimizer = chapter.make_optimizer(model, RECIPE)
    chapter.Run(tmp_path / "run").restore(model, optimizer)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path) not in maps.read_text()


def test_a_signal_that_was_ignored_stays_so():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with chapter.interrupts() as seen:
            signal.raise_signal(signal.SIGTERM)
            assert not seen and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
            assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_folder_behind_a_broken_link_ends_in_an_error(tmp_path):
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere" / "deeper")
    with pytest.raises(FileExistsError):
        chapter.fresh_folder(tmp_path / "broken", "nano")


def test_what_follows_from_the_config_is_no_weight(tmp_path):
    """Kimi K2's files hold the rotary frequencies of each layer."""
    model = model_of()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert same_weights(DeepSeek.from_pretrained(tmp_path), model)


def test_evaluate_leaves_the_mode_as_it_was(corpus):
    model = fresh_model(corpus)
    for training in True, False:
        chapter.evaluate(model.train(training), corpus.held_out[:200], 16, 8)
        assert model.training is training


def test_fp8_codes_are_not_saved_without_their_scheme(tmp_path):
    model = model_of()
    state = model.model.layers[0].self_attn.o_proj
    state.weight = nn.Parameter(state.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="save_released"):
        model.save_pretrained(tmp_path / "codes")
    assert not (tmp_path / "codes/model.safetensors").exists()


def test_a_row_ends_at_eos():
    model = model_of()
    free = model.generate(PROMPTS, 12)
    eos = free[0][4]
    assert eos not in free[0][:4]
    want = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert model.generate(PROMPTS, 12, eos_token_id=eos) == want
    assert len(want[0]) == 5 and any(len(row) == 12 for row in want)  # one ended, others went on
    assert model.generate(PROMPTS, 0) == [[], [], []]


@pytest.mark.parametrize(
    "shape, dtype, few",
    [
        ((1, 1), torch.bfloat16, True),
        ((4, 8), torch.bfloat16, True),
        ((3, 11), torch.bfloat16, False),
        ((0, 8), torch.bfloat16, False),
        ((1, 1), torch.float32, False),
    ],
)
def test_a_linear_layer_decodes_a_few_bf16_rows_its_own_way(shape, dtype, few, monkeypatch):
    layer, x = chapter.Linear(40, 24, bias=False).to(dtype), torch.randn(*shape, 40).to(dtype)
    asked, few_rows = [], chapter.moe.few_rows
    monkeypatch.setattr(chapter.moe, "few_rows", lambda *a: asked.append(1) or few_rows(*a))
    want = layer(x).detach()  # with gradients: as nn.Linear
    assert not asked
    with torch.no_grad():
        got = layer(x)
    assert len(asked) == few and got.shape == want.shape and got.dtype == dtype
    assert torch.allclose(got, want, rtol=8e-3, atol=8e-3 * float(dtype == torch.bfloat16))
    with torch.no_grad(), pytest.raises(RuntimeError):
        layer(x.to(torch.float16))  # not the weight's dtype: refused as ever
    biased, one = chapter.Linear(40, 24).to(dtype), torch.randn(40).to(dtype)
    with torch.no_grad():
        assert torch.equal(biased(x), nn.Linear.forward(biased, x))
        assert torch.equal(layer(one), nn.Linear.forward(layer, one))


@pytest.mark.parametrize(
    "prompts, new, options, words",
    [
        ([], 5, {}, "at least one token"),
        ([[1, 2], []], 5, {}, "at least one token"),
        ([[1] * 60, [1]], 5, {}, "65 > max_position_embeddings = 64"),
        ([[1]], 5, {"temperature": -1.0}, "temperature"),
        ([[1]], 5, {"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ([[1]], 5, {"temperature": 1.0, "top_p": 1.5}, "top_p"),
    ],
)
def test_generate_refuses(prompts, new, options, words):
    with pytest.raises(ValueError, match=words):
        model_of().generate(prompts, new, **options)


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DRAFTING = replace(TINY, num_nextn_predict_layers=1, eos_token_id=60)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_a_recorded_step_is_the_step(device):
    """Rows, learning rate and MTP weight of each call reach the replay; the texts have borders."""
    recipe = Recipe(8, 12, 4, accumulate=2, learning_rate=1e-2, bias_update_speed=0.02)
    plain = model_of(DRAFTING).to(device).train()
    graphed = copy.deepcopy(plain)
    optimizers = [chapter.make_optimizer(model, recipe) for model in (plain, graphed)]
    steps = [
        partial(chapter.training_step, plain, optimizers[0], recipe),
        chapter.GraphedStep(graphed, optimizers[1], recipe),
    ]
    kept = copy.deepcopy(graphed.state_dict())
    assert steps[1].compile() > 0
    assert all(torch.equal(t, kept[name]) for name, t in graphed.state_dict().items())
    if device == "cpu":  # nothing is recorded there: what is replayed is computed again
        replay = lambda: setattr(steps[1], "out", steps[1].step())
        steps[1].graph = SimpleNamespace(replay=replay)
    for call in range(8):
        rows = [torch.randint(61, (4, 13)) for _ in range(2)]
        settings = (call + 1) / 8, 0.3 if call < 5 else 0.1
        (loss, drafting, loads), (*got, got_loads) = (step(rows, *settings) for step in steps)
        # the same products, but bf16's on a GPU and the order of their sums
        tol = {"rtol": 1e-5 if device == "cpu" else 1e-2, "atol": 0}
        if call == 3:  # the last that was not replayed
            before = [p.detach().clone() for p in graphed.parameters()]
        torch.testing.assert_close(torch.stack(got), torch.stack([loss, drafting]), **tol)
        assert device == "cuda" or torch.equal(got_loads, loads)
    assert all(state["step"] == 8 for optimizer in optimizers for state in optimizer.state.values())
    for mine, other, then in zip(graphed.parameters(), plain.parameters(), before, strict=True):
        assert (mine - other).norm() <= (1e-4 if device == "cpu" else 0.2) * (other - then).norm()
    for mine, other in zip(graphed.mixtures(), plain.mixtures(), strict=True):
        mine, other = (m.gate.e_score_correction_bias for m in (mine, other))
        assert other.abs().max() > 0.06 and (mine - other).abs().max() <= 0.04 * (device == "cuda")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_labels_left_out_cost_nothing_and_teach_nothing(device):
    model, states = model_of().to(device), torch.randn(50, 32, device=device, requires_grad=True)
    labels = torch.randint(61, (50,), device=device).masked_fill(
        torch.rand(50, device=device) < 0.4, -100
    )
    want = F.cross_entropy(model.head(states), labels, reduction="sum")
    wanted = torch.autograd.grad(want, (states, model.lm_head.weight))
    got = model.nats(states, labels)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    for mine, other in zip(
        torch.autograd.grad(got, (states, model.lm_head.weight)), wanted, strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert model.nats(states, torch.full_like(labels, -100)).abs() < 1e-3  # none is left


def test_a_few_labels_among_many_that_are_left_out_keep_their_digits():
    """As a GPU has them: left out by the sum, not by an index that would be waited for."""
    hidden, weight = torch.randn(4000, 8), torch.randn(61, 8)
    labels = torch.full((4000,), -100)
    labels[::500] = torch.randint(61, (8,))
    got = chapter.LinearCrossEntropy.apply(hidden, weight, labels, False)
    want = F.cross_entropy((hidden @ weight.T).double(), labels, reduction="sum")
    assert abs(got.item() - want.item()) <= 1e-6 * want.item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_command_on_a_gpu(tmp_path):
    """Its steps are recorded; what it leaves goes on, by recorded steps again."""
    command = [
        sys.executable,
        str(ROOT / "06_train.py"),
        "--device",
        "cuda",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run([*command, "--quick"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "heldout_bits_per_byte" in done.stdout and "capturable" not in done.stderr
    model = DeepSeek(chapter.QUICK).cuda()
    recipe = chapter.PRESETS["nano"][1]
    step = chapter.stepper(model, chapter.make_optimizer(model, recipe), recipe)
    assert isinstance(step, chapter.GraphedStep)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("rows, few", [(1, True), (2, True), (3, False)])
def test_a_linear_layer_decodes_two_rows_its_own_way_on_a_gpu(rows, few, monkeypatch):
    asked, few_rows = [], chapter.moe.few_rows
    monkeypatch.setattr(chapter.moe, "few_rows", lambda *a: asked.append(1) or few_rows(*a))
    for O in 24, 163_840:  # Kimi K2's vocabulary: a grid has 65,535 programs on its other axes
        layer = chapter.Linear(40, O, bias=False).cuda()
        x, asked[:] = torch.randn(1, rows, 40, device="cuda"), []
        with torch.no_grad():
            got = layer(x)
            assert len(asked) == few and (got - nn.Linear.forward(layer, x)).abs().max() < 1e-4
            assert not few or torch.equal(layer(x[:, -1:]), got[:, -1:])


def test_what_runs_in_the_background_is_waited_for():
    assert chapter.in_background(divmod, 7, 2).result() == (3, 1)
    with pytest.raises(ZeroDivisionError):
        chapter.in_background(divmod, 7, 0).result()


def test_context_can_be_filled():
    assert len(model_of().generate([[1] * 60], 4)[0]) == 4


def test_sampling_follows_its_generator():
    model = model_of()
    draw = lambda seed: model.generate(
        PROMPTS, 20, 1.5, 0.9, generator=torch.Generator().manual_seed(seed)
    )
    state = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), state)  # with a generator, nobody else's is used


PROBABILITIES = torch.tensor([0.05, 0.5, 0.15, 0.3])


@pytest.mark.parametrize(
    "top_p, support",
    [(1.0, [0, 1, 2, 3]), (0.97, [0, 1, 2, 3]), (0.94, [1, 2, 3]), (0.79, [1, 3]), (0.51, [1, 3])]
    + [(0.49, [1]), (1e-6, [1])],
)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_choose_samples_the_smallest_set(top_p, support, temperature):
    """The support exactly, the frequencies within five standard deviations of 40,000 draws."""
    draws = 40_000
    logits = (temperature * PROBABILITIES.log() + 7).expand(draws, 4)  # + 7: logits have no zero
    got = chapter.mtp.choose(logits, temperature, top_p, torch.Generator().manual_seed(1))
    assert got.shape == (draws,)
    counts = torch.bincount(got, minlength=4).double()
    assert counts.nonzero()[:, 0].tolist() == support
    want = torch.zeros(4).double()
    want[support] = PROBABILITIES[support].double() / PROBABILITIES[support].sum()
    sigma = (draws * want * (1 - want)).sqrt()
    assert ((counts - draws * want).abs() <= 5 * sigma + 1e-2).all()


def test_choose_has_rows_of_their_own():
    logits = torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, 9.0], [9.0, 0.0, 0.0]])
    assert chapter.mtp.choose(logits, 0.0, 1.0).tolist() == [1, 2, 0]
    assert chapter.mtp.choose(logits, 1.0, 0.5).tolist() == [1, 2, 0]


# The tokenizer ------------------------------------------------------------------------------


def naive_bpe(texts, vocabulary):
    """Recount every pair before every merge -> the tokens, and each chunk in its last state."""
    chunks = [list(c.encode()) for text in texts for c in regex.findall(chapter.CHUNKS, text)]
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < vocabulary:
        count = Counter(pair for chunk in chunks for pair in itertools.pairwise(chunk))
        if not count:
            break
        pair = min(count, key=lambda pair: (-count[pair], pair))
        for chunk in chunks:
            i = 0
            while i + 1 < len(chunk):
                if (chunk[i], chunk[i + 1]) == pair:
                    chunk[i : i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return tokens, chunks


SMALL_TEXTS = [
    ["aaaaa aaaa aaa aaaaaaa"],  # pairs that overlap themselves
    ["abab abba baba", "abab"],
    ["def f(x):\n    return x\n\n\ndef g(x):\n        return f(x) + 1234567\n"],
    ["naïve café – ÄÖÜ 漢字漢字 🙂🙂 \r\n\ttab"],
    [""],
    [],
]


@pytest.mark.parametrize("texts", SMALL_TEXTS, ids=range(len(SMALL_TEXTS)))
@pytest.mark.parametrize("vocabulary", [256, 257, 270, 400])
def test_bpe_is_the_naive_one(texts, vocabulary):
    assert chapter.train_bpe(texts, vocabulary) == naive_bpe(texts, vocabulary)[0]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(alphabet="abc \n", max_size=40), max_size=6), st.integers(256, 300))
def test_bpe_is_the_naive_one_on_dense_ties(texts, vocabulary):
    assert chapter.train_bpe(texts, vocabulary) == naive_bpe(texts, vocabulary)[0]


def english(seed, words):
    """Text with a Zipf law, lines and indentation: what BPE and a small model can learn."""
    rng = random.Random(seed)
    stems = ["".join(rng.choices("aeioulnrst", k=rng.randint(2, 8))) for _ in range(150)]
    lines = []
    for _ in range(words // 8):
        picked = [stems[min(int(rng.paretovariate(0.7)) - 1, 149)] for _ in range(8)]
        lines.append("    " * rng.randint(0, 2) + " ".join(picked))
    return "\n".join(lines) + "\n"


def test_encoding_applies_the_merges_in_order():
    """tiktoken's tokens of the training text are the pieces that training ended with."""
    text = english(1, 2000)
    tokens = chapter.train_bpe([text], 400)
    want, chunks = naive_bpe([text], 400)
    assert tokens == want and len(set(tokens)) == 400
    encoding = chapter.encoding_of(tokens)
    assert encoding.encode_ordinary(text) == [token for chunk in chunks for token in chunk]
    assert encoding.n_vocab == 401
    assert encoding.encode_single_token(chapter.END) == 400


@pytest.fixture(scope="module")
def encoding():
    return chapter.encoding_of(chapter.train_bpe([english(2, 3000), "naïve 漢字"], 400))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes_come_back(encoding, data):
    tokens = chapter.encode_bytes(encoding, data)
    assert encoding.decode_bytes(tokens) == data


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=300) | st.text(alphabet=" \n\r\t\u00a0\u2028a1-", max_size=60))
def test_any_text_comes_back(encoding, text):
    tokens = chapter.encode_bytes(encoding, text.encode())
    assert encoding.decode(tokens) == text
    assert encoding.n_vocab - 1 not in tokens
    assert tokens == encoding.encode_ordinary(text)


@pytest.mark.parametrize("data", [b"\xff" * 50, b"ok \xc3", "é".encode()[1:] + b" end", b"\x00"])
def test_bytes_that_are_no_text(encoding, data):
    assert encoding.decode_bytes(chapter.encode_bytes(encoding, data)) == data


def test_long_runs(encoding):
    """One chunk of 100,000 characters: a table of spaces, a minified file."""
    for text in (" " * 100_000, "a" * 100_000, "\n" * 100_000):
        assert encoding.decode(chapter.encode_bytes(encoding, text.encode())) == text


@pytest.mark.parametrize("unit", [" ", "ACGT", "-=", "\n", "\t "], ids=repr)
def test_runs_that_tiktoken_would_panic_at(unit, encoding):
    """Its regex has a stack of a million steps. Shorter runs get the tokens they always had."""
    text = "x " + unit * (1_500_000 // len(unit)) + "y"
    assert encoding.decode(chapter.encode_bytes(encoding, text.encode())) == text
    short = "x " + unit * (90_000 // len(unit)) + "y 1"
    tokens = chapter.encode_bytes(encoding, 2 * short.encode())
    assert tokens == encoding.encode_ordinary(2 * short)


def test_end_never_comes_from_text(encoding):
    text = f"a {chapter.END} b{chapter.END}"
    tokens = chapter.encode_bytes(encoding, text.encode())
    assert encoding.encode_single_token(chapter.END) not in tokens
    assert encoding.decode(tokens) == text


def test_saved_encoding_gives_the_same_ids(encoding, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("a tokenizer of ours needs no network")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    chapter.save_encoding(encoding, tmp_path / "encoding.json")
    assert [path.name for path in tmp_path.iterdir()] == ["encoding.json"]
    again = chapter.load_encoding(tmp_path / "encoding.json")
    text = english(3, 500) + "naïve 漢字 🙂 \x00"
    assert again.encode_ordinary(text) == encoding.encode_ordinary(text)
    assert again.encode_single_token(chapter.END) == encoding.encode_single_token(chapter.END)
    assert again.n_vocab == encoding.n_vocab
    for token in range(encoding.n_vocab):
        assert again.decode_single_token_bytes(token) == encoding.decode_single_token_bytes(token)
    raw = json.loads((tmp_path / "encoding.json").read_text())
    few, path = dict(list(raw["mergeable_ranks"].items())[:9]), tmp_path / "bad.json"
    below = {t: i - 1 for i, t in enumerate(raw["mergeable_ranks"])}
    for bad in (
        None, "a", 3, raw | {"mergeable_ranks": []}, raw | {"special_tokens": []},
        raw | {"mergeable_ranks": few}, raw | {"mergeable_ranks": below},
        raw | {"pat_str": ""}, raw | {"special_tokens": {"<x>": 7}},
    ):  # fmt: skip
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=r"bad.json is no tokenizer of ours"):
            chapter.load_encoding(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"mergeable_ranks": {"!": 1}}'])
def test_garbage_is_no_tokenizer(content, tmp_path):
    (tmp_path / "encoding.json").write_bytes(content)
    with pytest.raises(ValueError, match="encoding.json"):
        chapter.load_encoding(tmp_path / "encoding.json")


# The data -----------------------------------------------------------------------------------


def test_default_corpus():
    """The standard library: at least 400 KB held out, no content in both parts or twice."""
    documents = chapter.read_documents(None)
    assert len(documents) > 300 and len(set(documents)) == len(documents)
    train, held_out = chapter.split_documents(documents)
    assert sum(map(len, held_out)) >= 400_000
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(documents)
    assert all(
        any(line in d for d in documents) for line in (b"class ArgumentParser", b"def dumps")
    )


def test_library_files_are_files(tmp_path, monkeypatch):
    """Neither a folder named like a module nor an editor's lock, a link that leads nowhere."""
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "folder.py/inside.py").write_text("1")
    (tmp_path / ".#lock.py").symlink_to("nowhere")
    monkeypatch.setattr(chapter.sysconfig, "get_paths", lambda: dict.fromkeys(
        ("stdlib", "purelib"), tmp_path))  # fmt: skip
    assert set(chapter.library_files(packages=True)) == {tmp_path / "folder.py/inside.py"}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=50), min_size=40, max_size=120, unique=True))
def test_split(documents):
    train, held_out = chapter.split_documents(documents)
    assert sorted(train + held_out) == sorted(documents)
    assert not set(train) & set(held_out)
    size = sum(map(len, documents))
    # a twentieth, reached with the last of the held-out documents
    assert size / 20 <= sum(map(len, held_out)) < size / 20 + 50
    # by content: neither names nor order of the files play a part
    assert chapter.split_documents(documents[::-1]) == (train, held_out)


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_folder_of_every_kind(tmp_path):
    lines = "".join(json.dumps({"text": f"record {i} é", "id": i}) + "\n" for i in range(50))
    write_files(
        tmp_path,
        {
            "a.txt": "plain text\n",
            "deep/er/b.md": "# title\n",
            "c.py": "x = 1\n",
            "copy of c.py": "x = 1\n",
            "d.jsonl": lines,
            "empty.txt": "",
            "latin1.txt": b"caf\xe9\n",
            "picture.png": "not text",
            "data.json": '{"text": "not a line"}',
        },
    )
    documents = chapter.read_documents(tmp_path)
    want = [b"plain text\n", b"# title\n", b"x = 1\n", b"caf\xe9\n"]
    want += [f"record {i} é".encode() for i in range(50)]
    assert sorted(documents) == sorted(want)
    assert documents == chapter.read_documents(tmp_path)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ".weird"])
def test_single_file_is_cut_at_line_ends(suffix, tmp_path):
    """A file given by name counts whatever it is called."""
    text = english(4, 9000).encode()
    (tmp_path / f"book{suffix}").write_bytes(text)
    documents = chapter.read_documents(tmp_path / f"book{suffix}")
    assert b"".join(documents) == text  # no byte lost, none twice
    assert len(documents) >= 20 and all(d.endswith(b"\n") for d in documents)


def test_copies_count_once_before_a_document_is_called_long(tmp_path):
    copies = {f"{i}.txt": english(1, 3000) for i in range(30)}
    write_files(tmp_path, copies | {"other.txt": english(2, 3000)})
    documents = chapter.read_documents(tmp_path)
    total = sum(map(len, documents))
    assert b"".join(documents) == (english(1, 3000) + english(2, 3000)).encode()
    held_out = sum(map(len, chapter.split_documents(documents)[1]))
    assert 0.05 * total <= held_out < 0.1 * total


def test_text_without_line_ends(tmp_path):
    text = english(4, 9000).replace("\n", " ").encode()
    (tmp_path / "line.txt").write_bytes(text)
    documents = chapter.read_documents(tmp_path / "line.txt")
    assert b"".join(documents) == text and len(documents) >= 10


def test_single_jsonl(tmp_path):
    lines = [json.dumps({"text": english(i, 16)}) for i in range(60)]
    (tmp_path / "d.jsonl").write_text("\n\n".join(lines) + "\n \n")
    assert chapter.read_documents(tmp_path / "d.jsonl") == [
        json.loads(line)["text"].encode() for line in lines
    ]


def test_one_book_among_notes_is_in_both_parts(tmp_path):
    """Else a document of most of the text would be held out whole, with nothing to learn from."""
    notes = {f"{i}.txt": f"note {i}\n" for i in range(60)}
    write_files(tmp_path, {**notes, "book.txt": english(5, 20_000)})
    documents = chapter.read_documents(tmp_path)
    train, held_out = map(b"".join, chapter.split_documents(documents))
    assert len(held_out) < 0.2 * len(train)


@pytest.mark.parametrize("line", ["{", '"text"', '{"txt": "a"}', '{"text": 3}', "[]", "null"])
def test_broken_jsonl_names_file_and_line(line, tmp_path):
    good = json.dumps({"text": "fine"})
    (tmp_path / "d.jsonl").write_text(f"{good}\n{good}\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=r"d\.jsonl, line 3"):
        chapter.read_documents(tmp_path)


def test_a_folder_that_holds_the_runs(tmp_path, encoding):
    """`--data .`: what a run has written is not the text of the next one."""
    write_files(tmp_path, {f"{i}.txt": english(i, 80) for i in range(50)})
    before = chapter.read_documents(tmp_path)
    run = tmp_path / "runs/nano"
    write_files(run, {"run.json": "{}", "metrics.jsonl": '{"step": 1}\n'})
    assert chapter.read_documents(tmp_path) == before


def documents_of(count=60, words=150, seed=0):
    return [english(seed * 1000 + i, words).encode() for i in range(count)]


def test_prepared_tokens_are_the_documents(tmp_path):
    documents = [*documents_of(), b"\xff\xfe no text", f"says {chapter.END}".encode()]
    corpus = chapter.prepare(documents, 300, tmp_path)
    assert corpus.encoding.n_vocab == 300 and corpus.train.dtype == np.uint16
    assert isinstance(corpus.train, np.memmap)
    end = corpus.encoding.encode_single_token(chapter.END)
    parts = chapter.split_documents(documents)
    for tokens, part in zip((corpus.train, corpus.held_out), parts, strict=True):
        starts = np.flatnonzero(tokens == end)
        assert starts[0] == 0 and len(starts) == len(part)
        pieces = np.split(np.asarray(tokens), starts[1:])
        assert [corpus.encoding.decode_bytes(p[1:].tolist()) for p in pieces] == part
    train, held_out = map(b"".join, parts)
    assert corpus.held_out_bytes == len(held_out)
    size = lambda data: 8 * len(lzma.compress(data, preset=9)) / len(held_out)
    want = {
        "gzip": 8 * len(gzip.compress(held_out, 9)) / len(held_out),
        "xz": size(held_out),
        "xz_given_training": size(train + held_out) - size(train),
    }
    assert corpus.rivals == pytest.approx(want, rel=1e-12)
    assert want["xz_given_training"] < want["xz"]


def test_tokenizer_has_not_seen_the_held_out_text(tmp_path):
    documents = documents_of()
    train, _ = chapter.split_documents(documents)
    corpus = chapter.prepare(documents, 300, tmp_path)
    want = chapter.train_bpe([document.decode() for document in train], 299)
    assert corpus.encoding.token_byte_values() == sorted(want)


def test_cache_is_used_and_follows_the_source(tmp_path, monkeypatch):
    documents = documents_of()
    first = chapter.prepare(documents, 300, tmp_path)
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:

        def again(*args):
            raise AssertionError("nothing has changed")

        patch.setattr(chapter, "train_bpe", again)
        patch.setattr(chapter, "encode_bytes", again)
        patch.setattr(lzma, "compress", again)
        second = chapter.prepare(documents, 300, tmp_path)
    assert np.array_equal(first.train, second.train) and second.rivals == first.rivals
    assert snapshot(tmp_path) == before

    other = chapter.prepare([*documents[:-1], b"something else"], 300, tmp_path)
    assert len(other.train) + len(other.held_out) != len(first.train) + len(first.held_out)
    assert chapter.prepare(documents, 290, tmp_path).encoding.n_vocab == 290
    kept = chapter.prepare(documents, 300, tmp_path)  # the others have not replaced it
    assert np.array_equal(kept.train, first.train)


def test_cache_that_was_cut_short_is_rebuilt(tmp_path, monkeypatch):
    documents = documents_of()
    with monkeypatch.context() as patch:

        def full(*args, **kwargs):
            raise OSError(28, FULL)

        patch.setattr(lzma, "compress", full)  # after the tokens have been written
        with pytest.raises(OSError, match=FULL):
            chapter.prepare(documents, 300, tmp_path)
    corpus = chapter.prepare(documents, 300, tmp_path)
    assert corpus.rivals.keys() == {"gzip", "xz", "xz_given_training"}
    before = snapshot(tmp_path)
    for name in "train", "held_out", "encoding.json", "rivals.json":
        for content in b"", (corpus.folder / name).read_bytes()[:-1]:
            (corpus.folder / name).write_bytes(content)
            chapter.prepare(documents, 300, tmp_path)
            assert snapshot(tmp_path) == before
        (corpus.folder / name).unlink()
        chapter.prepare(documents, 300, tmp_path)
        assert snapshot(tmp_path) == before


def test_large_vocabulary_is_uint32(tmp_path, monkeypatch):
    """A named encoding of 70,000 tokens, as if tiktoken had fetched it."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"zq" + i.to_bytes(3, "big"): 256 + i for i in range(70_000)}
    big = tiktoken.Encoding(
        "big",
        pat_str=r"\w+|\W+",
        mergeable_ranks=ranks,
        special_tokens={chapter.END: 70_300, "<|other|>": 70_299},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"big": big}.__getitem__)
    documents = documents_of()
    corpus = chapter.prepare(documents, "big", tmp_path)
    assert corpus.train.dtype == np.uint32
    assert corpus.train[0] == 70_300 and corpus.encoding.n_vocab == 70_301
    train, _ = chapter.split_documents(documents)
    want = big.encode_ordinary(train[0].decode())
    assert corpus.train[1 : 1 + len(want)].tolist() == want


# Batches ------------------------------------------------------------------------------------


def take(tokens, recipe, count, seed=0, skip=0):
    return list(itertools.islice(chapter.batches(tokens, recipe, seed, skip), count))


@pytest.mark.parametrize("length, context, batch", [(1000, 10, 4), (905, 7, 3), (61, 10, 5)])
def test_batches(length, context, batch):
    tokens, recipe = np.arange(length, dtype=np.uint16), Recipe(1, context, batch)
    per_epoch = ((length - 1) // context - 1) // batch
    epochs = take(tokens, recipe, 3 * per_epoch)
    starts = []
    for part in epochs:
        assert part.shape == (batch, context + 1) and part.dtype == torch.int64
        assert torch.equal(part, part[:, :1] + torch.arange(context + 1))  # consecutive text
        starts += part[:, 0].tolist()
    size = per_epoch * batch
    for epoch in range(3):
        seen = starts[epoch * size :][:size]
        assert len(set(seen)) == size  # every window once
        assert len({start % context for start in seen}) == 1  # side by side, from one offset on
        assert seen != sorted(seen) or size < 8  # shuffled
    assert starts[:size] != starts[size : 2 * size]


def test_every_window_of_an_epoch():
    tokens, recipe = np.arange(10 * 41 + 1, dtype=np.uint16), Recipe(1, 10, 4)
    starts = torch.cat(take(tokens, recipe, 10))[:, 0]
    assert sorted((starts // 10).tolist()) == list(range(40))


def test_batches_repeat_and_resume():
    tokens, recipe = np.arange(500, dtype=np.uint32), Recipe(1, 10, 4)
    whole = torch.stack(take(tokens, recipe, 40))  # more than three epochs
    assert torch.equal(whole, torch.stack(take(tokens, recipe, 40)))
    assert not torch.equal(whole, torch.stack(take(tokens, recipe, 40, seed=1)))
    for skip in (1, 5, 11, 12, 13, 24, 39):
        rest = torch.stack(take(tokens, recipe, 40 - skip, skip=skip))
        assert torch.equal(rest, whole[skip:])


def test_text_shorter_than_a_batch():
    recipe = Recipe(1, context=10, batch_size=4)
    [batch] = take(np.arange(51, dtype=np.uint16), recipe, 1)  # the least that is enough
    assert len(batch) == 4
    with pytest.raises(ValueError, match="50 tokens.*51"):
        take(np.arange(50, dtype=np.uint16), recipe, 1)


# Evaluation ---------------------------------------------------------------------------------


@torch.no_grad()
def naive_nats(model, tokens, context, stride):
    """Token by token: of the windows every `stride`, the first that reaches it predicts it."""
    rows, total = {}, 0.0  # by how many tokens are read: they can share a forward
    for at in range(1, len(tokens)):
        start = max(0, math.ceil((at - context) / stride)) * stride
        assert min(at, context - stride) <= at - start <= context
        rows.setdefault(at - start, []).append(tokens[start : at + 1])
    for several in rows.values():
        text = torch.from_numpy(np.stack(several).astype(np.int64))
        log_probs = model(text[:, :-1])[:, -1].log_softmax(-1)
        total -= log_probs.gather(1, text[:, -1:]).sum().item()
    return total


@pytest.mark.parametrize(
    "length, context, stride",
    [(2, 16, 8), (9, 16, 8), (16, 16, 8), (17, 16, 8), (18, 16, 8), (24, 16, 8), (25, 16, 8)]
    + [(60, 16, 16), (33, 16, 16), (60, 16, 4), (61, 16, 5), (65, 16, 1)]
    + [(2300, 16, 4), (9000, 16, 16)],  # more windows than evaluate takes at once
)
def test_each_token_is_predicted_once(length, context, stride, fp32):
    model = model_of()
    tokens = tokens_of(length).numpy().astype(np.uint16)
    nats, _ = chapter.evaluate(model, tokens, context, stride)
    want = naive_nats(model, tokens, context, stride)
    assert abs(nats - want) < 1e-5 * length  # fp32, nats of about 4 each


def test_one_window_is_one_forward(fp32):
    model = model_of()
    tokens = tokens_of(50)
    want = F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="sum")
    for context, stride in (49, 49), (49, 7), (64, 32):
        nats, _ = chapter.evaluate(model, tokens.numpy(), context, stride)
        assert abs(nats - want.item()) < 1e-3


def test_evaluation_counts_the_load_of_its_own_text(fp32):
    """A model that has never been trained, and one whose last batch was other text."""
    model, tokens = model_of(), tokens_of(97).numpy()
    counts = torch.zeros(2, 8, dtype=torch.long)
    for layer, mixture in enumerate(model.mixtures()):

        def note(gate, inputs, output, layer=layer):
            counts[layer] += torch.bincount(output[0].flatten(), minlength=8)

        mixture.gate.register_forward_hook(note)
    _, loads = chapter.evaluate(model, tokens, 16, 16)
    assert torch.equal(loads, counts)
    assert loads.sum(1).tolist() == [96 * 3, 96 * 3]  # every token chooses three

    model.train()
    model.loss(tokens_of(1, 64), tokens_of(1, 64)).backward()
    _, again = chapter.evaluate(model, tokens, 16, 16)
    assert torch.equal(again, loads)


def test_evaluation_changes_nothing(fp32):
    model, tokens = model_of(), tokens_of(80).numpy()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    chapter.evaluate(model, tokens, 16, 8)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(p.grad is None for p in model.parameters())


# Training -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return chapter.prepare(documents_of(), 300, tmp_path_factory.mktemp("corpus"))


RECIPE = Recipe(
    steps=16, context=16, batch_size=2, accumulate=2, learning_rate=3e-3, bias_update_speed=0.01
)


def fresh_model(corpus, **changes):
    torch.manual_seed(3)
    config = replace(TINY, vocab_size=corpus.encoding.n_vocab, initializer_range=0.05)
    return DeepSeek(replace(config, **changes))


def losses(folder):
    return [(entry["step"], entry["loss"]) for entry in chapter.Run(folder).metrics()]


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """An uninterrupted run of RECIPE: the model, and its folder."""
    folder, model = tmp_path_factory.mktemp("reference"), fresh_model(corpus)
    trained = chapter.train(model, corpus, RECIPE, folder, seed=5)
    assert trained["step"] == 16 and trained["tokens"] == 16 * 4 * 16
    return model, folder


def test_it_learns(reference):
    values = [loss for _, loss in losses(reference[1])]
    assert [step for step, _ in losses(reference[1])] == list(range(1, 17))
    assert abs(values[0] - math.log(300)) < 0.3  # at first every token is as likely
    assert values[-1] < values[0] - 0.5


def test_checkpoint_is_the_trained_model(reference, corpus):
    model, folder = reference
    assert same_weights(DeepSeek.from_pretrained(folder / "checkpoint"), model)
    encoding = chapter.load_encoding(folder / "checkpoint/encoding.json")
    assert encoding.token_byte_values() == corpus.encoding.token_byte_values()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint", "metrics.jsonl"]


def test_held_out_loss_is_logged(reference, corpus):
    model, folder = reference
    metrics = chapter.Run(folder).metrics()
    probed = [entry["step"] for entry in metrics if "held_out_loss" in entry]
    assert probed == [2, 4, 6, 8, 10, 12, 14, 16]  # eight reports
    last = {}
    for name in ("held_out", "train"):
        probe = getattr(corpus, name)[: 32 * 16 + 1]
        nats, _ = chapter.evaluate(model, probe, 16, 16)
        last[name] = nats / (len(probe) - 1)
    # the same sums by the same weights, and only of the one text
    assert metrics[-1]["held_out_loss"] == pytest.approx(last["held_out"], rel=1e-6)
    assert abs(last["train"] - last["held_out"]) > 1e-4
    assert all(len(entry["max_violation"]) == 2 for entry in metrics)


class Cut(Exception):
    pass


def stop_at(monkeypatch, step, how):
    log = chapter.Run.log

    def cut(self, **metrics):
        log(self, **metrics)
        if metrics["step"] == step:
            how()

    monkeypatch.setattr(chapter.Run, "log", cut)


def killed():
    raise Cut


@pytest.mark.parametrize(
    "step, how",
    [
        (1, "ctrl_c"), (7, "ctrl_c"), (8, "ctrl_c"), (16, "ctrl_c"), (7, "sigterm"),
        (5, "killed"), (15, "killed"),
    ],
)  # fmt: skip
def test_resumed_is_uninterrupted(step, how, reference, corpus, tmp_path, monkeypatch):
    """Bit for bit, weights and logged losses; a killed run goes back to its last checkpoint."""
    model = fresh_model(corpus)
    with monkeypatch.context() as patch:
        if how == "killed":
            stop_at(patch, step, killed)
            expected = Cut
        else:
            number = signal.SIGTERM if how == "sigterm" else signal.SIGINT
            stop_at(patch, step, lambda: signal.raise_signal(number))
            expected = KeyboardInterrupt
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with pytest.raises(expected):
            chapter.train(model, corpus, RECIPE, tmp_path, seed=5)
        after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        assert after == handlers
    stopped = losses(tmp_path)[-1][0]
    assert stopped in (step, step + 1)  # the step in progress may be finished first
    other = fresh_model(corpus)
    torch.manual_seed(99)  # nothing hangs on the state of the generator
    chapter.train(other, corpus, RECIPE, tmp_path, seed=5, resume=True)
    assert same_weights(other, reference[0])
    assert losses(tmp_path) == losses(reference[1])
    strip = lambda entry: {k: v for k, v in entry.items() if k != "seconds"}
    ours, theirs = (chapter.Run(folder).metrics() for folder in (tmp_path, reference[1]))
    assert list(map(strip, ours)) == list(map(strip, theirs))
    seconds = [entry["seconds"] for entry in ours]
    assert seconds == sorted(seconds)  # the clock goes on too


def test_a_line_that_was_cut_in_two(reference, corpus, tmp_path):
    """The disk was full, or the machine went down, in the middle of metrics.jsonl."""
    folder = tmp_path / "run"
    shutil.copytree(reference[1], folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "lo')
    model = fresh_model(corpus)
    chapter.train(model, corpus, RECIPE, folder, seed=5, resume=True)
    assert losses(folder) == losses(reference[1])


def test_two_processes_may_write_the_same_file(tmp_path, monkeypatch):
    path = tmp_path / "train"

    def slowly(fresh):
        fresh.write_text("one")
        monkeypatch.setattr(os, "getpid", lambda: 2)  # meanwhile another writes all of it
        chapter.save_whole(path, lambda other: other.write_text("two"))
        assert path.read_text() == "two"

    chapter.save_whole(path, slowly)
    assert path.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["train"]


def test_killed_before_the_first_checkpoint(reference, corpus, tmp_path, monkeypatch):
    for step in 1, 2:  # the second: when the first probe was logged, and nothing saved yet
        folder = tmp_path / str(step)
        with monkeypatch.context() as patch, pytest.raises(Cut):
            stop_at(patch, step, killed)
            chapter.train(fresh_model(corpus), corpus, RECIPE, folder, seed=5)
        assert not (folder / "checkpoint").exists()
        model = fresh_model(corpus)
        chapter.train(model, corpus, RECIPE, folder, seed=5, resume=True)
        assert same_weights(model, reference[0]) and losses(folder) == losses(reference[1])


def test_a_second_run_into_the_same_folder_is_refused(reference, corpus, tmp_path):
    shutil.copytree(reference[1], tmp_path / "run")
    before = snapshot(tmp_path)
    for left in "checkpoint", "metrics.jsonl":  # what of a run may be there alone
        with pytest.raises(ValueError, match="holds a run already"):
            chapter.train(fresh_model(corpus), corpus, RECIPE, tmp_path / "run", seed=5)
        assert snapshot(tmp_path) == before
        path = tmp_path / "run" / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        before = snapshot(tmp_path)
        if left == "checkpoint":
            continue
        chapter.train(fresh_model(corpus), corpus, RECIPE, tmp_path / "run", seed=5)


@pytest.mark.parametrize("lost", ["step", "exp_avg", "exp_avg_sq"])
def test_a_checkpoint_that_lost_moments_is_refused(lost, reference, corpus, tmp_path):
    shutil.copytree(reference[1], tmp_path / "run")
    path = tmp_path / "run/checkpoint/training/optimizer.safetensors"
    moments = load_file(path)
    save_file({k: t for k, t in moments.items() if not k.endswith(f":{lost}")}, path)
    with pytest.raises(ValueError, match="can't be resumed: .* lacks moments"):
        chapter.train(fresh_model(corpus), corpus, RECIPE, tmp_path / "run", seed=5, resume=True)


def test_killed_between_the_two_renames(reference, corpus, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(reference[1], folder)
    os.rename(folder / "checkpoint", folder / "checkpoint.old")
    model = fresh_model(corpus)
    chapter.train(model, corpus, RECIPE, folder, seed=5, resume=True)
    assert same_weights(model, reference[0])


@pytest.mark.parametrize(
    "what, fails_at",
    [("save_file", 0), ("save_file", 1), *(("replace", n) for n in range(6))],  # all there are
)
def test_full_disk_keeps_a_checkpoint(what, fails_at, reference, corpus, tmp_path, monkeypatch):
    """Whatever write of the second checkpoint fails, one is left whole, and --resume finds it."""
    calls = itertools.count()
    real = {"save_file": chapter.save_file, "replace": os.replace}[what]
    armed = []

    def failing(*args, **kwargs):
        if armed and next(calls) >= fails_at:
            raise OSError(28, FULL)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        stop_at(patch, 3, lambda: armed.append(True))  # the checkpoint of step 2 is there
        patch.setattr(*((chapter, what) if what == "save_file" else (os, what)), failing)
        with pytest.raises(OSError, match=FULL):
            chapter.train(fresh_model(corpus), corpus, RECIPE, tmp_path, seed=5)
    model = fresh_model(corpus)
    chapter.train(model, corpus, RECIPE, tmp_path, seed=5, resume=True)
    assert same_weights(model, reference[0])
    assert losses(tmp_path) == losses(reference[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "metrics.jsonl"]


def test_full_disk_in_the_words_of_safetensors(tmp_path, monkeypatch):
    """Its own error is no OSError; a caller should not have to know that."""

    def full(*args, **kwargs):
        raise chapter.SafetensorError(FULL)

    monkeypatch.setattr(chapter, "save_file", full)
    with pytest.raises(OSError, match=FULL):
        model_of().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_loss_that_is_no_number_stops_the_run(corpus, tmp_path):
    model = fresh_model(corpus)
    nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="step 1"):
        chapter.train(model, corpus, RECIPE, tmp_path)
    assert not (tmp_path / "checkpoint").exists()


class Spy:
    """Gradients before they are clipped, the norm they are clipped to, and each step's groups."""

    def __init__(self, monkeypatch):
        self.gradients, self.norms, self.groups, self.clipped = [], [], [], []
        clip = nn.utils.clip_grad_norm_

        def note(parameters, max_norm, *args, **kwargs):
            parameters = list(parameters)
            self.gradients.append([p.grad.clone() for p in parameters])
            self.norms.append(max_norm)
            return clip(parameters, max_norm, *args, **kwargs)

        def before_step(optimizer, args, kwargs):
            groups = optimizer.param_groups
            grads = [p.grad for group in groups for p in group["params"]]
            self.clipped.append(torch.stack([g.norm() for g in grads]).norm().item())
            self.groups.append([{k: v for k, v in group.items()} for group in groups])

        monkeypatch.setattr(nn.utils, "clip_grad_norm_", note)
        self.hook = register_optimizer_step_pre_hook(before_step)


@pytest.fixture
def spy(monkeypatch, fp32):
    spy = Spy(monkeypatch)
    yield spy
    spy.hook.remove()


def one_step(corpus, folder, **changes):
    model = fresh_model(corpus)
    chapter.train(model, corpus, replace(RECIPE, steps=1, **changes), folder, seed=5)
    return model


def test_accumulation_is_one_large_batch(corpus, tmp_path, spy):
    """Gradients, loss and the bias' step: two batches of 4 are the batch of 8."""
    parts = one_step(corpus, tmp_path / "parts", batch_size=4, accumulate=2)
    whole = one_step(corpus, tmp_path / "whole", batch_size=8, accumulate=1)
    for mine, other in zip(*spy.gradients, strict=True):
        assert_close(mine, other, 1e-5 * max(1.0, other.abs().max().item()))  # fp32 sums
    [(_, mine)], [(_, other)] = losses(tmp_path / "parts"), losses(tmp_path / "whole")
    assert abs(mine - other) < 1e-5
    for a, b in zip(parts.mixtures(), whole.mixtures(), strict=True):
        assert torch.equal(a.gate.e_score_correction_bias, b.gate.e_score_correction_bias)
    loads = [
        chapter.Run(tmp_path / name).metrics()[0]["max_violation"] for name in ("parts", "whole")
    ]
    assert loads[0] == loads[1]


def test_bias_steps_once_by_the_counts_of_all_batches(corpus, tmp_path, fp32, monkeypatch):
    """γ·sign(mean − load), from everything the gates chose in the step, and nothing else."""
    model = fresh_model(corpus)
    counts = [torch.zeros(8) for _ in model.mixtures()]
    for count, mixture in zip(counts, model.mixtures(), strict=True):

        def note(gate, inputs, output, count=count):
            if torch.is_grad_enabled():  # the report after the step is no batch
                count += torch.bincount(output[0].flatten(), minlength=8)

        mixture.gate.register_forward_hook(note)
    recipe = replace(RECIPE, steps=1, accumulate=3, warmup=1e-3)  # no warm-up: scale 1
    chapter.train(model, corpus, recipe, tmp_path, seed=5)
    for count, mixture in zip(counts, model.mixtures(), strict=True):
        assert count.sum() == 3 * 2 * 16 * 3  # batches, rows, tokens, experts of each
        want = recipe.bias_update_speed * (count.mean() - count).sign()
        assert_close(mixture.gate.e_score_correction_bias, want, 1e-8)
        assert want.unique().numel() >= 2


def test_balance_loss_reaches_the_router(corpus, tmp_path, spy):
    """The gradient differs by α times that of Σ f·P, in the routers and all that lies below."""
    alpha = 0.5
    one_step(corpus, tmp_path / "without", balance_alpha=0.0, accumulate=1)
    one_step(corpus, tmp_path / "with", balance_alpha=alpha, accumulate=1)
    model = fresh_model(corpus).train()
    [batch] = take(corpus.train, RECIPE, 1, seed=5)
    model(batch[:, :-1])
    balance = sum(mixture.balance_loss for mixture in model.mixtures())
    assert 1.5 < balance < 4  # about 1 a mixture
    wanted = torch.autograd.grad(alpha * balance, list(model.parameters()), allow_unused=True)
    names = [name for name, _ in model.named_parameters()]
    for name, without, got, want in zip(names, *spy.gradients, wanted, strict=True):
        want = torch.zeros_like(got) if want is None else want
        assert_close(got - without, want, 1e-5)  # fp32 gradients of size 0.1
        if name.endswith("mlp.gate.weight"):
            assert want.abs().max() > 1e-3


def test_optimizer(corpus, tmp_path, spy):
    """AdamW with decay on matrices only; the norm is clipped to 1; the rate goes up and down."""
    recipe = replace(RECIPE, steps=20, warmup=0.2, decay=0.5, final=0.1)
    model = fresh_model(corpus)
    with torch.no_grad():
        model.lm_head.weight *= 30  # large gradients, or there is nothing to clip
    chapter.train(model, corpus, recipe, tmp_path)
    assert len(spy.groups) == 20
    first = spy.groups[0]
    assert sum(len(group["params"]) for group in first) == len(list(model.parameters()))
    for group in first:
        matrices = {p.dim() > 1 for p in group["params"]}
        assert matrices == {group["weight_decay"] > 0}
        assert group["weight_decay"] in (0.0, 0.1) and tuple(group["betas"]) == (0.9, 0.95)
    assert set(spy.norms) == {1.0} and max(spy.clipped) <= 1.0001
    assert torch.stack([g.norm() for g in spy.gradients[0]]).norm() > 1
    rates = [groups[0]["lr"] / recipe.learning_rate for groups in spy.groups]
    assert rates[0] < 0.1 and rates[:5] == sorted(rates[:5])  # warm-up in four steps
    assert rates[4:11] == pytest.approx([1.0] * 7)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[15] == pytest.approx(0.1 + 0.9 / 2)  # halfway down the cosine
    assert 0.1 < rates[-1] < 0.15


def test_schedule_has_no_jumps():
    recipe = Recipe(1000, 1, 1)
    scales = [recipe.scale(step / 1000) for step in range(1001)]
    assert max(scales) == 1 and scales[-1] == pytest.approx(recipe.final)
    assert 0 < scales[0] <= 0.1
    steepest = max(abs(b - a) for a, b in itertools.pairwise(scales))
    assert steepest < 2 / (1000 * recipe.warmup)
    assert Recipe(1, 1, 1, warmup=1e-4).scale(0) == 1.0


def test_minutes_end_the_run(corpus, tmp_path):
    """The same schedule over time: the rate has come down when the time is over."""
    begin = time.perf_counter()
    trained = chapter.train(fresh_model(corpus), corpus, RECIPE, tmp_path, minutes=0.01)
    assert 0.6 <= trained["seconds"] < 0.6 + 0.5 and time.perf_counter() - begin < 30
    assert (tmp_path / "checkpoint/model.safetensors").exists()


# Several processes --------------------------------------------------------------------------

SEVERAL = """
import argparse, contextlib, signal, sys
from pathlib import Path
sys.path[:0] = [".", "tests"]
import torch
import test_train as tests

chapter, folder = tests.chapter, Path(sys.argv[1])
chapter.autocast = lambda device: contextlib.nullcontext()
with chapter.processes(argparse.Namespace(device="cpu")):
    rank = chapter.rank_and_size()[0]
    with chapter.first_rank_first():
        corpus = chapter.prepare(tests.documents_of(), 300, folder / "corpus")

    def train(name, **options):
        model = tests.fresh_model(corpus, num_nextn_predict_layers=1)
        chapter.shard(model)
        try:
            chapter.train(model, corpus, tests.RECIPE, folder / name, seed=5, **options)
        finally:
            held = sum(t.to_local().numel() for t in model.parameters())
            print(name, held / sum(t.numel() for t in model.parameters()))

    train("two")
    train("one_then_two", resume=True)
    log = chapter.Run.log

    def cut(self, **metrics):  # only the first process hears it
        log(self, **metrics)
        if metrics["step"] == 7:
            signal.raise_signal(signal.SIGINT)

    chapter.Run.log = cut
    with contextlib.suppress(KeyboardInterrupt):
        train("two_then_one")
"""


def torchrun(*arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=300)


def test_two_processes_make_the_run_of_one(corpus, tmp_path, fp32, monkeypatch):
    """fp32: the same steps but for the order of sums. Each goes on with what the other left."""

    def train(name, **options):
        model = fresh_model(corpus, num_nextn_predict_layers=1)
        chapter.train(model, corpus, RECIPE, tmp_path / name, seed=5, **options)
        return chapter.released_tensors(model)

    want = train("one")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 7, lambda: signal.raise_signal(signal.SIGINT))
        train("one_then_two")
    script = tmp_path / "several.py"
    script.write_text(SEVERAL)
    done = torchrun(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert chapter.Run(tmp_path / "two_then_one").metrics()[-1]["step"] == 7
    train("two_then_one", resume=True)
    for line in done.stdout.splitlines():  # of an odd number of rows one process has one more
        assert 0.5 <= float(line.split()[1]) < 0.53, line
    expected = chapter.Run(tmp_path / "one").metrics()
    for name in "two", "one_then_two", "two_then_one":
        metrics = chapter.Run(tmp_path / name).metrics()
        assert [entry["step"] for entry in metrics] == list(range(1, 17))
        for ours, theirs in zip(metrics, expected, strict=True):
            assert ours["max_violation"] == theirs["max_violation"]  # the loads are whole batches'
            for key in {"loss", "mtp_loss", "held_out_loss"} & theirs.keys():
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
        saved = chapter.released_tensors(DeepSeek.from_pretrained(tmp_path / name / "checkpoint"))
        for key, tensor in want.items():
            assert_close(saved[key], tensor, 2e-5)


def test_a_batch_that_the_processes_cannot_share(monkeypatch):
    monkeypatch.setattr(chapter, "rank_and_size", lambda: (1, 3))
    with pytest.raises(ValueError, match="a batch of 2 rows can't be shared by 3 processes"):
        next(chapter.batches(np.arange(1000), RECIPE, 0, 0))
    monkeypatch.setattr(chapter, "rank_and_size", lambda: (0, 1))
    whole = next(chapter.batches(np.arange(1000), RECIPE, 0, 3))
    for rank in 0, 1:
        monkeypatch.setattr(chapter, "rank_and_size", lambda rank=rank: (rank, 2))
        assert torch.equal(next(chapter.batches(np.arange(1000), RECIPE, 0, 3)), whole[rank::2])


@pytest.mark.slow
def test_torchrun_from_the_command_line(tmp_path):
    """One receipt, one folder; what a Ctrl-C has stopped goes on in one process."""
    flags = ["--quick", "--device", "cpu", "--out", tmp_path]
    done = torchrun("06_train.py", *flags)
    assert done.returncode == 0, done.stderr
    checks, measures = receipt(done.stdout.splitlines())
    assert len({m["name"] for m in measures}) == len(measures) > 8 and len(checks) == 4
    assert all(check["ok"] for check in checks)
    assert [path.name for path in tmp_path.glob("quick*")] == ["quick"]
    flags[-1] = tmp_path / "three"
    done = torchrun("06_train.py", *flags, processes=3)
    assert done.returncode != 0 and "8 rows can't be shared by 3 processes" in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
    assert not flags[-1].exists()  # said before any work


# The command --------------------------------------------------------------------------------

MEASURES = {
    "heldout_bits_per_byte", "gzip_bits_per_byte", "xz_bits_per_byte",
    "xz_given_training_bits_per_byte", "tokens_per_second", "max_violation",
}  # fmt: skip
COMMAND = ["--quick", "--device", "cpu", "--steps", "40", "--data", "text", "--out", "out"]


def start(folder, *args):
    env = os.environ | {"PYTHONIOENCODING": "utf-8"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    command = [sys.executable, str(ROOT / "06_train.py"), *args]
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """`python 06_train.py --quick` on small text -> its folder, stdout, stderr."""
    import matplotlib.font_manager  # noqa: F401 - builds its cache now, or the first run says so

    folder = tmp_path_factory.mktemp("ran")
    files = {f"{i}.txt": document for i, document in enumerate(documents_of(seed=1))}
    write_files(folder / "text", files)
    with start(folder, *COMMAND) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return folder, out, err


def progress_only(err):
    """tqdm's bar and no other word."""
    pieces = [piece.strip() for piece in re.split(r"[\r\n]", err)]
    return all(re.match(r"\d+%\|", piece) for piece in pieces if piece)


def test_receipt(ran):
    folder, out, err = ran
    lines = out.splitlines()
    checks, measures = receipt(lines)
    assert len(checks) >= 3 and all(check["ok"] for check in checks)
    values = {measure["name"]: measure["value"] for measure in measures}
    assert values.keys() >= MEASURES
    assert 1 < values["heldout_bits_per_byte"] < 8
    assert values["xz_given_training_bits_per_byte"] < values["xz_bits_per_byte"]
    assert values["tokens_per_second"] > 0 and values["max_violation"] >= 0
    assert len(lines) < 60 and max(map(len, lines)) < 200
    assert progress_only(err), err
    assert "step" in err and "tokens/s" in err and "loss" in err


def test_measured_bits_are_those_of_the_checkpoint(ran):
    """From the files alone: all held-out bytes, by the last weights."""
    folder, out, _ = ran
    _, measures = receipt(out.splitlines())
    values = {measure["name"]: measure["value"] for measure in measures}
    model = DeepSeek.from_pretrained(folder / "out/quick/checkpoint")
    encoding = chapter.load_encoding(folder / "out/quick/checkpoint/encoding.json")
    _, held_out = chapter.split_documents(chapter.read_documents(folder / "text"))
    tokens = []
    for document in held_out:
        tokens += [encoding.encode_single_token(chapter.END), *encoding.encode(document.decode())]
    context = json.loads((folder / "out/quick/run.json").read_text())["recipe"]["context"]
    [before] = re.findall(r"every token with at least (\d+) before it", out)
    nats, loads = chapter.evaluate(model, np.array(tokens), context, context - int(before))
    bits = nats / math.log(2) / sum(map(len, held_out))
    # printed to five digits; the two processes may split their sums among other threads
    assert values["heldout_bits_per_byte"] == pytest.approx(bits, abs=2e-4)
    worst = ((loads.amax(1) - loads.float().mean(1)) / loads.float().mean(1)).max()
    assert values["max_violation"] == pytest.approx(worst.item(), rel=1e-3)


def test_run_folder(ran):
    folder, out, _ = ran
    run = folder / "out/quick"
    [figure] = run.rglob("*.png")
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10_000
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics] == list(range(1, 41))
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("*.old"))
    assert sorted(path.name for path in folder.iterdir()) == ["out", "text"]  # --out: all it writes

    text = (run / "run.json").read_text()
    entry = json.loads(text)
    expected = "command commit versions device seed config recipe data data_digest".split()
    assert set(expected) <= entry.keys()
    assert entry["command"].endswith(shlex.join(["06_train.py", *COMMAND]))
    assert entry["device"] == "cpu" and entry["seed"] == 0 and entry["data"] == "../../text"
    assert {"python", "torch", "numpy", "tiktoken"} <= entry["versions"].keys()
    saved = DeepSeek.from_pretrained(run / "checkpoint").config
    assert DeepSeekConfig(**entry["config"]) == saved
    assert Recipe(**entry["recipe"]).steps == 40
    for place in (folder, ROOT, Path.home(), Path(sys.prefix)):  # nothing of this machine
        assert len(str(place)) < 2 or str(place) not in text
    assert not re.search(r'["\s=]/\w', text)


def test_quick_has_a_size_of_its_own(ran):
    entry = json.loads((ran[0] / "out/quick/run.json").read_text())
    config = replace(chapter.QUICK, vocab_size=512, bos_token_id=511, eos_token_id=511)
    assert entry["config"] == asdict(config)


def test_ctrl_c_and_the_command_it_prints(ran):
    """SIGINT to the process, then what it said: bit for bit the run that was left alone."""
    folder = ran[0]
    run, first = folder / "out/quick-2", snapshot(folder / "out/quick")
    cache = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("data-*/*")}
    with start(folder, *COMMAND) as process:
        while process.poll() is None and not (run / "metrics.jsonl").exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert progress_only(err), err
    assert len((run / "metrics.jsonl").read_text().splitlines()) < 40  # else nothing was tested
    [line] = [line for line in out.splitlines() if "go on" in line]
    command = shlex.split(line[line.index("python ") :])
    assert Path(command[1]).name == "06_train.py"
    with start(folder, *command[2:], "--device", "cpu") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert progress_only(err), err
    assert receipt(out.splitlines())[1]
    assert (run / "checkpoint/model.safetensors").read_bytes() == first[
        Path("checkpoint/model.safetensors")
    ]
    assert losses(run) == losses(folder / "out/quick")
    assert (run / "curves.png").exists()
    # neither run has touched the first one, made its tokens again, or written anywhere else
    assert snapshot(folder / "out/quick") == first
    assert cache == {path: path.stat().st_mtime_ns for path in (folder / "out").glob("data-*/*")}
    assert sorted(path.name for path in folder.iterdir()) == ["out", "text"]


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """main() in this process, in an empty folder -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["06_train.py", *map(str, args)])
        try:
            chapter.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def assert_refused(result, *words):
    """Exit code 2 and one line; argparse puts its usage before it."""
    code, _, err = result
    *usage, message = err.splitlines()
    assert code == 2, err
    assert all(line.startswith(("usage:", " ")) for line in usage), err
    for word in words:
        assert re.search(word, message), f"no {word!r} in {message!r}"


@pytest.mark.parametrize(
    "args, word",
    [
        (["--preset", "nonsense"], "nonsense"),
        (["--preset", "v3"], "v3"),  # instantiable, not trainable here
        (["--steps", "0"], "--steps"),
        (["--steps", "-3"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "nan"], "--minutes"),
        (["--device", "nonsense"], "nonsense"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "meta"], "meta"),
        (["--surprise"], "--surprise"),
        (["--encoding", "nonsense"], "nonsense"),
        (["--data", "nowhere"], "nowhere"),
        (["--steps", "3", "--minutes", "1"], "not both"),
        (["--seed", "-1"], "--seed"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(args, word, cli, tmp_path):
    assert_refused(cli("--quick", *args), word)
    assert not list(tmp_path.iterdir())


def test_a_run_behind_a_link_finds_its_data_again(tmp_path, ran):
    """`..` of a path leads elsewhere once a link is followed."""
    (tmp_path / "disk/deep/er").mkdir(parents=True)
    (tmp_path / "runs").symlink_to("disk/deep/er")
    shutil.copytree(ran[0] / "text", tmp_path / "text")
    settings = ["--quick", "--device", "cpu", "--steps", "2", "--data", "text", "--out", "runs"]
    for command in settings, ["--resume", "runs/quick", "--device", "cpu"]:
        with start(tmp_path, *command) as process:
            out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err


def test_resume_takes_no_flag_that_the_run_has_settled(cli, tmp_path):
    assert_refused(cli("--resume", "nowhere"), "nowhere")
    for flag, *value in (
        ["--quick"], ["--preset", "mini"], ["--encoding", "gpt2"], ["--seed", "7"],
        ["--steps", "9"], ["--minutes", "1"], ["--precision", "fp8"], ["--out", "elsewhere"],
    ):  # fmt: skip
        assert_refused(cli("--resume", "nowhere", flag, *value), f"{flag}: a resumed run keeps")
    assert not list(tmp_path.iterdir())


def test_encoding_that_cannot_be_fetched(cli, tmp_path, monkeypatch):
    def offline(name):
        raise ConnectionError("HTTPSConnectionPool: Max retries exceeded\nand more lines")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    write_files(tmp_path / "text", {f"{i}.txt": d for i, d in enumerate(documents_of(8))})
    before = snapshot(tmp_path)
    flags = "--quick", "--data", "text", "--encoding"
    assert_refused(cli(*flags, "o200k_base"), "o200k_base can't be had: HTTPS", "Max retries")
    assert snapshot(tmp_path) == before and not (tmp_path / "runs/quick").exists()


@pytest.mark.parametrize(
    "files, words",
    [
        ({}, ["text"]),
        ({"a.txt": ""}, ["text"]),
        ({"a.png": "picture"}, ["text"]),
        ({"a.txt": "one line\n"}, ["text"]),
        ({"a.txt": "one line\n", "b.txt": "two lines\n"}, ["token"]),
        ({f"{i}.txt": f"line {i}\n" for i in range(20)}, ["token"]),
        ({"a.jsonl": '{"text": "a"}\n{"txt": "b"}\n'}, [r"a\.jsonl, line 2"]),
    ],
    ids=["no_file", "empty", "no_text", "one_line", "two_lines", "twenty_lines", "broken_jsonl"],
)
def test_bad_data(files, words, cli, tmp_path):
    """One line says what is wrong, and no run begins; a run that is there stays as it is."""
    (tmp_path / "text").mkdir()
    write_files(tmp_path / "text", files)
    write_files(tmp_path / "runs/quick", {"run.json": "{}"})
    assert_refused(cli("--quick", "--data", "text"), *words)
    left = {path.name for path in (tmp_path / "runs").iterdir()}
    assert {name for name in left if not name.startswith("data-")} == {"quick"}
    assert snapshot(tmp_path / "runs/quick") == {Path("run.json"): b"{}"}


@pytest.fixture
def stopped(ran, tmp_path):
    """A copy of the finished run and its text, to be spoilt."""
    shutil.copytree(ran[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "out/quick"


def rewrite(path, **changes):
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | changes))


def cut_file(path, kept=0.6):
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])


SPOILT = {
    "other_config": lambda run: rewrite(
        run / "run.json",
        config=json.loads((run / "run.json").read_text())["config"] | {"hidden_size": 32},
    ),
    "unknown_config": lambda run: rewrite(run / "run.json", config={"surprise": 1}),
    "unknown_recipe": lambda run: rewrite(run / "run.json", recipe={"surprise": 1}),
    "run_json_garbage": lambda run: (run / "run.json").write_bytes(b"\xff garbage"),
    "run_json_list": lambda run: (run / "run.json").write_text("[1, 2]"),
    "run_json_empty": lambda run: (run / "run.json").write_text("{}"),
    "run_json_missing": lambda run: (run / "run.json").unlink(),
    "weights_cut": lambda run: cut_file(run / "checkpoint/model.safetensors"),
    "weights_missing": lambda run: (run / "checkpoint/model.safetensors").unlink(),
    "optimizer_cut": lambda run: cut_file(next(run.rglob("optimizer*"))),
    "state_garbage": lambda run: next(run.rglob("state*.json")).write_text("{"),
    "state_empty": lambda run: next(run.rglob("state*.json")).write_text("{}"),
    "no_checkpoint": lambda run: shutil.rmtree(run / "checkpoint"),
    "other_text": lambda run: (run.parents[1] / "text/0.txt").write_text("other text\n"),
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_resume_refuses(spoil, stopped, cli):
    SPOILT[spoil](stopped)
    before = snapshot(stopped)
    assert_refused(cli("--resume", stopped.relative_to(Path.cwd()), "--device", "cpu"))
    assert snapshot(stopped) == before


def test_resume_knows_a_run_with_a_small_vocabulary(cli, tmp_path):
    """Text that yields fewer tokens than were asked for: run.json holds what came of it."""
    binary = "".join(random.Random(0).choices("01", k=30_000))  # chunks of three digits: 8 merges
    data = write_files(tmp_path / "text", {"a.txt": binary}) / "a.txt"
    args = ("--quick", "--steps", "4", "--seed", "7", "--device", "cpu")
    code, _, err = cli(*args, "--data", data)
    assert code == 0, err
    entry = json.loads((tmp_path / "runs/quick/run.json").read_text())
    assert entry["config"]["vocab_size"] < 300 and entry["seed"] == 7
    code, _, err = cli("--resume", "runs/quick", "--device", "cpu")
    assert code == 0, err


def test_worst_layer_is_reported(cli, ran, monkeypatch):
    """Loads that are even in the first mixture and 17 against 9 in the second, by hand."""
    evaluate = chapter.evaluate
    loads = torch.tensor([[10] * 8, [17, *[9] * 7]])
    monkeypatch.setattr(chapter, "evaluate", lambda *args: (evaluate(*args)[0], loads))
    monkeypatch.setattr(chapter, "QUICK", replace(chapter.QUICK, num_hidden_layers=3))
    args = ("--quick", "--steps", "2", "--device", "cpu", "--data", ran[0] / "text")
    code, out, err = cli(*args)
    assert code == 0, err
    [worst] = [m["value"] for m in receipt(out.splitlines())[1] if m["name"] == "max_violation"]
    assert worst == pytest.approx(0.7)  # (17 − 10) / 10


def test_full_disk_ends_in_one_line(cli, stopped, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, FULL)

    monkeypatch.setattr(chapter, "save_file", full)
    before = snapshot(stopped)
    code, _, err = cli(*COMMAND)
    lines = [line for line in re.split(r"[\r\n]", err) if line and not progress_only(line)]
    assert code == 2 and len(lines) == 1 and FULL in lines[0], err
    assert snapshot(stopped) == before


def test_yarn_without_its_original_context_stretches_the_configs():
    raw = {"rope_scaling": {"type": "yarn", "factor": 4}, "max_position_embeddings": 8192}
    config = DeepSeekConfig.from_dict(chapter.QUICK.to_dict() | raw)
    assert config.rope_scaling["original_max_position_embeddings"] == 8192


def test_the_last_third_begins_at_two_thirds():
    assert Recipe(100, 8, 1).mtp_weight_at(2 / 3) == pytest.approx(0.1)


def test_a_second_signal_kills_as_ever(monkeypatch):
    """Unless it comes at once: torchrun may send its workers one that they have had already."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with chapter.interrupts() as seen:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert seen == [signal.SIGINT] * 2
        now[0] += 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


class Begun(Exception):
    pass


@pytest.fixture
def begun(cli, tmp_path, monkeypatch):
    """`main` with these flags -> the model, recipe and further arguments that `train` gets."""
    write_files(tmp_path / "text", {f"{i}.txt": d for i, d in enumerate(documents_of(seed=1))})
    called = []

    def train(model, corpus, recipe, *rest):
        called.append((model, recipe, *rest))
        raise Begun

    monkeypatch.setattr(chapter, "train", train)

    def call(*args):
        with pytest.raises(Begun):
            cli("--device", "cpu", *args)
        return called.pop()

    return call


def test_flags_reach_the_training_and_the_resumed_one(begun, tmp_path):
    flags = "--precision", "fp8", "--minutes", "2", "--seed", "5", "--data", "text"
    model, recipe, folder, *rest = begun("--quick", *flags)
    assert model.precision == "fp8" and rest == [5, 2.0, False] and recipe.steps == 30
    again, same, place, *rest = begun("--resume", folder)
    assert again.precision == "fp8" and rest == [5, 2.0, True] and same == recipe
    assert all(map(torch.equal, model.parameters(), again.parameters()))  # of the same seed
    other, *_ = begun("--quick", "--data", "text", "--seed", "6")
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_bench_takes_the_precision_and_reads_no_text(cli, monkeypatch):
    called = []
    monkeypatch.setattr(chapter, "read_documents", None)
    spy = lambda model, recipe, seed: called.append((model.precision, seed))
    monkeypatch.setattr(chapter, "bench", spy)
    args = "--quick", "--bench", "--precision", "fp8", "--seed", "5", "--device", "cpu"
    assert cli(*args)[0] == 0 and called == [("fp8", 5)]


@pytest.mark.parametrize("preset, packages", [("nano", False), ("mini", True)])
def test_a_larger_model_reads_the_packages_too(preset, packages, cli, monkeypatch):
    def read(source, packages):
        raise ValueError(f"asked for {source}, {packages}")

    monkeypatch.setattr(chapter, "read_documents", read)
    assert_refused(cli("--preset", preset, "--device", "cpu"), f"asked for None, {packages}")
    assert_refused(cli("--quick", "--preset", preset, "--device", "cpu"), "asked for None, False")


def test_one_process_at_a_time_trains_in_a_folder(ran, cli):
    run = ran[0] / "out/quick"
    before = snapshot(run)
    with chapter.alone(run):
        assert_refused(cli("--resume", run, "--device", "cpu"), "another process is training there")
    assert snapshot(run) == before


def test_a_run_that_was_moved_is_told_where_its_text_lies(ran, cli, tmp_path):
    folder = tmp_path / "far/away"
    shutil.copytree(ran[0] / "out/quick", folder / "quick")
    assert_refused(cli("--resume", folder / "quick"), "text: no such file or folder")
    (tmp_path / "other").mkdir()
    write_files(tmp_path / "other", {f"{i}.txt": english(i, 80) for i in range(50)})
    refused = cli("--resume", folder / "quick", "--data", tmp_path / "other")
    assert_refused(refused, "was trained on other text than .*other holds now")
    assert not list(folder.glob("data-*"))  # no tokens were made of it
    code, out, err = cli("--resume", folder / "quick", "--data", ran[0] / "text", "--device", "cpu")
    assert code == 0, err


def test_kinds_of_files(tmp_path):
    text = {f"{i}.TXT": english(i, 80) for i in range(50)}
    write_files(tmp_path / "upper", text | {"D.JSONL": json.dumps({"text": "half \ud800 of it"})})
    documents = chapter.read_documents(tmp_path / "upper")
    assert len(documents) == 51 and b"half ? of it" in documents
    packed = tmp_path / "text.jsonl.gz"
    packed.write_bytes(gzip.compress(b"".join(documents)))
    with pytest.raises(ValueError, match=r"text\.jsonl\.gz: no UTF-8 text"):
        chapter.read_documents(packed)
    write_files(tmp_path / "upper/runs/grpo", {"run.json": "{}"})  # of 07: its stages lie within
    write_files(tmp_path / "upper/runs/grpo/rl", {"metrics.jsonl": '{"step": 1}'})
    assert chapter.read_documents(tmp_path / "upper") == documents


def test_ids_that_stand_for_nothing_are_spelled_all_the_same():
    ranks = {bytes([byte]): byte for byte in range(256)}
    gaps = tiktoken.Encoding(
        "gaps", pat_str=".", mergeable_ranks=ranks, special_tokens={"<e>": 300}
    )
    assert chapter.spelled(gaps, [104, 105, 280, 300, 0xC3, 0xA9]) == "hi\ufffd<e>é"


def test_where_a_run_keeps_its_checkpoint(tmp_path):
    assert chapter.checkpoint_of(tmp_path) == tmp_path
    for name in "rl/checkpoint", "checkpoint.old", "checkpoint":
        (tmp_path / name).mkdir(parents=True)
        assert chapter.checkpoint_of(tmp_path) == tmp_path / name


@pytest.mark.parametrize(
    "scaling, message",
    [
        ("yarn", "rope_scaling must be an object"),
        ({"type": "yarn", "factor": "4"}, "factor must be a number > 0, got '4'"),
        ({"type": "yarn", "factor": 4.0, "beta_fast": 0}, "beta_fast must be a number > 0, got 0"),
        ({**YARN, "original_max_position_embeddings": 0}, "original_max_position_embeddings must"),
    ],
)
def test_impossible_rope_scaling_is_named(scaling, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, rope_scaling=scaling)


def test_other_impossible_arguments_are_named():
    with pytest.raises(ValueError, match="want theta > 1, got 1.0"):
        replace(TINY, rope_theta=1.0)
    with pytest.raises(ValueError, match="rms_norm_eps must be a number > 0, got inf"):
        replace(TINY, rms_norm_eps=math.inf)
    with pytest.raises(ValueError, match="256 bytes or more, got 100"):
        chapter.train_bpe(["text"], 100)
    model = model_of()
    for tokens, context, stride in (np.arange(9), 8, 16), (np.arange(1), 8, 4):
        with pytest.raises(ValueError, match="stride <= context and 2 tokens or more"):
            chapter.evaluate(model, tokens, context, stride)
    recipe = Recipe(1, 8, 2)
    with pytest.raises(ValueError, match=r"want a model in training"):
        optimizer = chapter.make_optimizer(model, recipe)
        chapter.training_step(model.eval(), optimizer, recipe, [tokens_of(2, 9)], 1.0, 0.0)


def test_a_config_shares_no_dict():
    scaling = dict(YARN)
    config = replace(TINY, rope_scaling=scaling)
    scaling["factor"] = 8.0
    assert config.rope_scaling == YARN and config.rope_scaling is not YARN


def test_saving_a_tied_or_compiled_model(tmp_path):
    model, tokens = model_of(), tokens_of(1, 9)
    model.lm_head.weight = model.model.embed_tokens.weight
    want = model(tokens)
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    model.save_pretrained(tmp_path)
    assert torch.equal(DeepSeek.from_pretrained(tmp_path)(tokens), want)


def test_the_mtp_loss_that_is_logged_is_without_its_weight(corpus, tmp_path, monkeypatch):
    model = fresh_model(corpus, num_nextn_predict_layers=1)
    step = lambda rows, scale, weight: (torch.tensor(1.0), torch.tensor(0.6), None)
    monkeypatch.setattr(chapter, "stepper", lambda *_: step)
    chapter.train(model, corpus, replace(RECIPE, steps=3, mtp_weight=0.3), tmp_path)
    found = [entry.get("mtp_loss") for entry in chapter.Run(tmp_path).metrics()]
    assert found[0] == pytest.approx(2.0)
