"""08_checkpoints.py against transformers, the tokenizers library, and damaged files."""

import base64
import copy
import functools
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import regex
import tiktoken
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

base = import_module("06_train")
chapter = import_module("08_checkpoints")
receipt = import_module("benchmarks.record").receipt
ROOT = Path(__file__).resolve().parents[1]
TINY, CODES = chapter.TINY, torch.float8_e4m3fn
V2_LIKE = replace(
    TINY, q_lora_rank=None, topk_method="greedy", scoring_func="softmax", norm_topk_prob=False,
    n_group=1, topk_group=1, routed_scaling_factor=1.0, num_nextn_predict_layers=0,
)  # fmt: skip
TOKENS = torch.arange(140).view(2, 70) * 7 % 590


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def model_of(config=TINY, dtype=torch.float32):
    model = base.DeepSeek(config)
    for mixture in model.mixtures() + model.mtp_mixtures():
        if mixture.gate.e_score_correction_bias is not None:
            mixture.gate.e_score_correction_bias.normal_()
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def encoding():
    text = (ROOT / "08_checkpoints.py").read_text("utf-8")
    return base.encoding_of(base.train_bpe([text], 590))


def same_weights(a, b):
    ours, theirs = base.released_tensors(a), base.released_tensors(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def spoil(folder, change):
    """Change the tensors of a one-file folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# Round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard_bytes", [10**9, 100_000], ids=["one", "shards"])
@pytest.mark.parametrize("config", [TINY, V2_LIKE], ids=["v3", "v2"])
def test_round_trip_is_bit_exact(config, shard_bytes, dtype, tmp_path):
    model = model_of(config, dtype)
    chapter.save_released(model, tmp_path / "out", shard_bytes=shard_bytes)
    again = chapter.load_released(tmp_path / "out")
    same_weights(model, again)
    assert again.config == model.config
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 5) == (shard_bytes < 10**9)
    for mixture in again.mixtures():  # fp32 in any model
        bias = mixture.gate.e_score_correction_bias
        assert bias is None or bias.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(again(TOKENS), model(TOKENS))
    if shard_bytes == 10**9:  # 06 reads the same folder
        same_weights(model, base.DeepSeek.from_pretrained(tmp_path / "out"))


def test_mtp_weights_survive_or_are_left_out(tmp_path, capsys):
    model = model_of()
    chapter.save_released(model, tmp_path / "out", shard_bytes=300_000)
    assert len(chapter.load_released(tmp_path / "out").mtp) == 1
    without = chapter.load_released(tmp_path / "out", with_mtp=False)
    assert len(without.mtp) == 0 and without.config.num_nextn_predict_layers == 0
    with torch.no_grad():
        assert torch.equal(without(TOKENS), model(TOKENS))
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    assert len(chapter.load_released(tmp_path / "out").mtp) == 0
    assert "has weights of an MTP module" in capsys.readouterr().err


def blocks_by_loops(weight):
    """DeepSeek's description: scale = amax / 448 of each block, zeros around a partial one."""
    N, K = weight.shape
    codes = torch.empty(N, K, dtype=CODES)
    scales = torch.empty(math.ceil(N / 128), math.ceil(K / 128))
    for i in range(len(scales)):
        for j in range(scales.shape[1]):
            rows, columns = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = weight[rows, columns].abs().max() / 448
            codes[rows, columns] = (weight[rows, columns] / scales[i, j]).to(CODES)
    return codes, scales


def fp8_folder(folder, model, shards=False):
    """A released FP8 folder by the description, not by the code under test."""
    names = released_names(model.config)
    tensors = {name: t.clone() for name, t in base.released_tensors(model).items()}
    layer = f"model.layers.{model.config.num_hidden_layers}."
    if model.mtp:
        tensors[layer + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[layer + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    decoded = {}
    for name in list(tensors):
        if names[name] == CODES:
            codes, scales = blocks_by_loops(tensors[name].float())
            tensors |= {name: codes, f"{name}_scale_inv": scales}
            wide = codes.float()
            for i, row in enumerate(scales):
                for j, scale in enumerate(row):
                    wide[128 * i : 128 * i + 128, 128 * j : 128 * j + 128] *= scale
            decoded[name] = wide
    folder.mkdir()
    config = model.config.to_dict() | {"torch_dtype": "bfloat16"}
    scheme = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config["quantization_config"] = scheme | {"activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config))
    if not shards:
        save_file(tensors, folder / "model.safetensors")
        return decoded
    parts = {"a.safetensors": {}, "b.safetensors": {}}  # a weight and its scale apart
    for name, tensor in tensors.items():
        parts["b.safetensors" if name.endswith("_scale_inv") else "a.safetensors"][name] = tensor
    for file, part in parts.items():
        save_file(part, folder / file)
    places = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return decoded


def released_names(config):
    return {name: dtype for name, (_, dtype) in chapter.released_layout(config).items()}


@pytest.mark.parametrize("shards", [False, True], ids=["one", "shards"])
def test_fp8_by_the_description_loads(shards, tmp_path):
    model = model_of(dtype=torch.bfloat16)
    decoded = fp8_folder(tmp_path / "fp8", model, shards)
    loaded = chapter.load_released(tmp_path / "fp8")
    got = base.released_tensors(loaded)
    for name, tensor in base.released_tensors(model).items():
        want = decoded[name].bfloat16() if name in decoded else tensor
        assert torch.equal(got[name], want), name
    wide = chapter.load_released(tmp_path / "fp8", dtype=torch.float32)
    got = base.released_tensors(wide)
    assert all(torch.equal(got[name], want) for name, want in decoded.items())


def test_fp8_kept_is_the_products_of_chapter_04(tmp_path):
    fp8 = chapter.fp8
    model = model_of()
    chapter.save_released(model, tmp_path / "fp8", in_fp8=True)
    kept = chapter.load_released(tmp_path / "fp8", dtype=torch.float32, keep_fp8=True)
    wide = chapter.load_released(tmp_path / "fp8", dtype=torch.float32)
    layer = kept.model.layers[1]
    assert type(layer.self_attn.q_a_proj) is chapter.StoredLinear
    assert type(layer.mlp.experts) is chapter.StoredExperts
    assert type(layer.self_attn.kv_b_proj) is torch.nn.Linear  # split by head
    x = torch.randn(3, 5, 192)
    rounded = fp8.dequantize(*fp8.quantize_tiles(x.flatten(0, 1))).view_as(x)
    want = wide.model.layers[1].self_attn.q_a_proj(rounded)
    assert (layer.self_attn.q_a_proj(x) - want).abs().max() <= 1e-4 * want.abs().max()
    experts = wide.model.layers[1].mlp.experts
    sizes = torch.tensor([3, 0, 1, 2, 0, 0, 4, 5])
    got = chapter.stored_product(x.flatten(0, 1), layer.mlp.experts.gate_up_proj, sizes)
    want = chapter.moe.grouped_gemm(rounded.flatten(0, 1), experts.gate_up_proj, sizes)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert layer.self_attn.q_a_proj(x[:, :0]).shape == (3, 0, 96)
    empty = chapter.stored_product(x[:0, 0], layer.mlp.experts.gate_up_proj, 0 * sizes)
    assert empty.shape == (0, 256)
    moved = kept.to(torch.bfloat16)  # codes stay codes, scales fp32
    assert moved.model.layers[1].self_attn.q_a_proj.weight.dtype == CODES
    assert moved.model.layers[1].mlp.experts.down_proj.weight_scale_inv.dtype == torch.float32
    with torch.no_grad():
        among = layer.mlp(x)[:1, :1]
        assert torch.allclose(layer.mlp(x[:1, :1]), among, rtol=1e-4, atol=1e-5)  # a token alone
        chapter.save_released(kept, tmp_path / "again")
    coded = [
        {name for name, kind in chapter.Shards(tmp_path / folder).kind.items() if kind == "F8_E4M3"}
        for folder in ("again", "fp8")
    ]
    assert coded[0] == coded[1]  # kv_b_proj too, which the model had decoded


def test_fp8_kept_gives_no_gradient_and_says_so(tmp_path):
    chapter.save_released(model_of(), tmp_path / "fp8", in_fp8=True)
    kept = chapter.load_released(tmp_path / "fp8", dtype=torch.float32, keep_fp8=True)
    assert kept(TOKENS).isfinite().all()  # gradients enabled, none asked for
    kept.requires_grad_(True)
    with pytest.raises(RuntimeError, match="keep_fp8=False"):
        kept(TOKENS)
    wide = chapter.load_released(tmp_path / "fp8", dtype=torch.float32)
    wide(TOKENS).sum().backward()  # decoded, they train


def test_an_empty_folder_is_filled_where_it_is(tmp_path, monkeypatch):
    """Also ".", and beside what a killed run of the same number has left."""
    (tmp_path / "here").mkdir()
    (tmp_path / f"here.{os.getpid()}.tmp").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = model_of()
    chapter.save_released(model, ".")
    assert Path("config.json").exists()  # the shell's folder is the one that was filled
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert torch.equal(chapter.load_released(".")(TOKENS), model(TOKENS))


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, encoding, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        chapter.save_released(model_of(), out)
    assert [p.name for p in out.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="shard_bytes"):
        chapter.save_released(model_of(), tmp_path / "zero", shard_bytes=0)
    with pytest.raises(ValueError, match="float64"):
        chapter.save_released(model_of(dtype=torch.float64), tmp_path / "wide")
    (tmp_path / "new.tmp").mkdir()
    (tmp_path / "new.tmp" / "notes.txt").write_text("mine")
    monkeypatch.setattr(chapter, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        chapter.save_released(model_of(), tmp_path / "new")
    with pytest.raises(ValueError, match="token 598 is not a special one"):  # before any weight
        chapter.save_released(model_of(), tmp_path / "new", encoding)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.tmp", "out"]
    assert (tmp_path / "new.tmp" / "notes.txt").read_text() == "mine"


# transformers -------------------------------------------------------------------------------

HF_V3 = dict(
    vocab_size=600, hidden_size=96, intermediate_size=160, moe_intermediate_size=48,
    num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4,
    q_lora_rank=40, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
    n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=4, topk_group=2,
    max_position_embeddings=512, bos_token_id=598, eos_token_id=599, initializer_range=0.1,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.7,
    mscale_all_dim=1.1, beta_fast=32, beta_slow=1, rope_theta=10000.0,
)  # fmt: skip
HF_MODELS = {
    "v3": {}, "no_q_lora": {"q_lora_rank": None}, "yarn": {"rope_parameters": YARN},
    "half_split": {"rope_interleave": False}, "one_group": {"n_group": 1, "topk_group": 1},
    "not_normed": {"norm_topk_prob": False}, "all_dense": {"first_k_dense_replace": 3},
}  # fmt: skip


def theirs(kind, dtype=torch.float32, **changed):
    config, model = {
        "v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
        "v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
    }[kind]
    model = model(config(**{**HF_V3, **changed})).eval().to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data.normal_()
    return model


@pytest.mark.parametrize("options", HF_MODELS)
def test_what_transformers_wrote_loads_with_equal_logits(options, tmp_path):
    model = theirs("v3", **HF_MODELS[options])
    model.save_pretrained(tmp_path)
    ours = chapter.load_released(tmp_path)
    with torch.no_grad():
        error = (ours(TOKENS) - model(TOKENS).logits).abs().max()
    assert error <= 2e-5, error


def test_v2_in_shards_of_bf16(tmp_path):
    model = theirs(
        "v2", torch.bfloat16, q_lora_rank=None, topk_method="greedy", n_group=None,
        topk_group=None, norm_topk_prob=False, routed_scaling_factor=1.0,
    )  # fmt: skip
    model.save_pretrained(tmp_path, max_shard_size="150KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = chapter.load_released(tmp_path)
    assert ours.lm_head.weight.dtype == torch.bfloat16
    wide = chapter.load_released(tmp_path, dtype=torch.float32)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert (wide(TOKENS) - other(TOKENS).logits).abs().max() <= 2e-5


@pytest.mark.parametrize("shard_bytes", [10**9, 200_000], ids=["one", "shards"])
@pytest.mark.parametrize("config", [TINY, V2_LIKE], ids=["v3", "v2"])
def test_what_we_write_opens_in_transformers(config, shard_bytes, encoding, tmp_path):
    """AutoModel, AutoTokenizer, pipeline: the same logits, ids and greedy text."""
    config = replace(config, vocab_size=591, bos_token_id=590, eos_token_id=590)
    model = model_of(config)
    chapter.save_released(model, tmp_path / "out", encoding, shard_bytes=shard_bytes)
    other, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    with torch.no_grad():
        error = (model(TOKENS) - other.eval()(TOKENS).logits).abs().max()
    assert error <= 1e-4, error
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "import torch\n\nclass Naïve:\n    pass  # 中文"
    ids = encoding.encode_ordinary(text)
    assert tokenizer(text, add_special_tokens=False).input_ids == ids
    assert tokenizer(text).input_ids == [590, *ids]
    assert tokenizer.decode(ids) == text
    write = transformers.pipeline("text-generation", model=other, tokenizer=tokenizer)
    got = write(text, max_new_tokens=8, do_sample=False, return_full_text=False)
    want = model.generate([[590, *ids]], 8, eos_token_id=590)[0]
    want = [token for token in want if token != 590]
    assert got[0]["generated_text"] == tokenizer.decode(want)


def test_an_fp8_folder_opens_in_transformers(tmp_path):
    """In whole blocks: of 576 rows their decoder (5.24) says that 5 scales do not divide them, and
    192 it decodes by blocks of 96, in silence."""
    whole = {"hidden_size": 256, "intermediate_size": 384, "q_lora_rank": 128, "kv_lora_rank": 96}
    heads = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    model = model_of(replace(TINY, **whole, **heads))
    chapter.save_released(model, tmp_path / "fp8", in_fp8=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8",
        dtype=torch.float32,
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
    )
    ours = chapter.load_released(tmp_path / "fp8", dtype=torch.float32)
    with torch.no_grad():
        want = theirs(TOKENS).logits
        assert (ours(TOKENS) - want).abs().max() < 1e-4 * want.abs().max()
        assert (model(TOKENS) - want).abs().max() > 1e-2 * want.abs().max()  # FP8 it was


# Bad files ----------------------------------------------------------------------------------

BROKEN = {
    "missing": (lambda t: t.pop("model.norm.weight"), "1 tensors missing: model.norm.weight"),
    "unexpected": (lambda t: t.update(x=torch.ones(2)), "1 tensors unexpected: x"),
    "shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(191)}),
        r"another shape: model.norm.weight \(191,\), want \(192,\)",
    ),
    "nan": (
        lambda t: t["lm_head.weight"][5].fill_(float("nan")), "lm_head.weight holds a NaN",
    ),
    "infinite_bias": (
        lambda t: t["model.layers.1.mlp.gate.e_score_correction_bias"].fill_(float("inf")),
        "e_score_correction_bias holds a NaN or an inf",
    ),
    "integers": (
        lambda t: t.update({"model.norm.weight": torch.ones(192, dtype=torch.int8)}),
        "model.norm.weight is I8; want F32",
    ),
    "scale_of_nothing": (
        lambda t: t.update({"model.norm.weight_scale_inv": torch.ones(2)}), "scale of no FP8",
    ),
    "mtp_head": (
        lambda t: t["model.layers.3.shared_head.head.weight"].add_(1), "is not lm_head.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused(case, tmp_path):
    change, message = BROKEN[case]
    chapter.save_released(model_of(), tmp_path / "out")
    spoil(tmp_path / "out", change)
    with pytest.raises(ValueError, match=message):
        chapter.load_released(tmp_path / "out")


KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"  # (144, 192): scales (2, 2)
DOWN = "model.layers.0.mlp.down_proj.weight"  # (192, 320): scales (2, 3)
BROKEN_FP8 = {
    "no_scale": (lambda t: t.pop(f"{DOWN}_scale_inv"), "is FP8 and has no weight_scale_inv"),
    "transposed": (
        lambda t: t.update({f"{DOWN}_scale_inv": t[f"{DOWN}_scale_inv"].T.contiguous()}),
        r"_scale_inv is \(3, 2\), want \(2, 3\): it is transposed",
    ),
    "floor": (
        lambda t: t.update({f"{KV_A}_scale_inv": torch.ones(1, 1)}), r"is \(1, 1\), want \(2, 2\)",
    ),
    "bytes": (
        lambda t: t.update({f"{DOWN}_scale_inv": torch.full((2, 3), 127, dtype=torch.uint8)}),
        "is U8; want F32",
    ),
    "nan_scale": (
        lambda t: t[f"{DOWN}_scale_inv"].fill_(float("nan")), "down_proj.weight holds a NaN",
    ),
    "nan_code": (
        lambda t: t[DOWN].view(torch.uint8)[3, 4].fill_(0x7F), "down_proj.weight holds a NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("keep", [False, True], ids=["decoded", "kept"])
@pytest.mark.parametrize("case", BROKEN_FP8)
def test_a_broken_fp8_file_is_refused(case, keep, tmp_path):
    change, message = BROKEN_FP8[case]
    chapter.save_released(model_of(), tmp_path / "out", in_fp8=True)
    spoil(tmp_path / "out", change)
    with pytest.raises(
        ValueError, match=message.replace("down_proj.weight h", "down_proj.weight(_scale_inv)? h")
    ):
        chapter.load_released(tmp_path / "out", keep_fp8=keep)


def test_a_square_scale_turned_round_is_seen_by_nothing_but_the_numbers(tmp_path):
    """Codes and scales are independent, so no check of one tensor can tell; its neighbours do."""
    model = model_of()
    chapter.save_released(model, tmp_path / "out", in_fp8=True)

    def turn_all(tensors):
        for name in list(tensors):
            if name.endswith("_scale_inv"):
                tensors[name] = tensors[name].T.contiguous()

    spoil(tmp_path / "out", turn_all)
    with pytest.raises(ValueError, match="it is transposed"):
        chapter.load_released(tmp_path / "out")


CONFIGS = {
    "model_type": ({"model_type": "llama"}, "model_type 'llama'"),
    "kimi": ({"model_type": "kimi_linear"}, "model_type 'kimi_linear'"),
    "bias": ({"attention_bias": True}, "attention_bias = True is not built"),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq' is not 'fp8'"),
    "blocks": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
        r"weight_block_size \[64, 64\] is not \[128, 128\]",
    ),
    "e5m2": ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "fmt 'e5m2'"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_not_ours_is_refused(case, tmp_path):
    change, message = CONFIGS[case]
    chapter.save_released(model_of(), tmp_path / "out")
    path = tmp_path / "out/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        chapter.load_released(tmp_path / "out")


def test_kimi_k2_is_a_v3_of_other_sizes(tmp_path):
    """Its frequencies have no ramp: beta_fast = beta_slow. transformers has its maths as V3's."""
    yarn = {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 16}
    yarn |= {"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    model = model_of(replace(TINY, n_group=1, topk_group=1, rope_theta=5e4, rope_scaling=yarn))
    chapter.save_released(model, tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "kimi_k2"}))
    weights = load_file(tmp_path / "model.safetensors")  # as in K2's files, and no weight
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors")
    with torch.no_grad():
        got, want = chapter.load_released(tmp_path)(TOKENS), other(TOKENS).logits
    assert (got - want).abs().max() <= 1e-4


def test_a_cpu_has_a_number_too(monkeypatch):
    words = ["08_checkpoints.py", "folder", "--compile", "--device", "cpu:0"]
    monkeypatch.setattr(sys, "argv", words)
    assert chapter.arguments().compile


def test_damaged_files_are_named(tmp_path):
    model = model_of()
    chapter.save_released(model, tmp_path / "whole")
    weights = (tmp_path / "whole/model.safetensors").read_bytes()
    for name, content in {
        "truncated": weights[: len(weights) // 2],
        "empty": b"",
        "huge_header": (2**60).to_bytes(8, "little") + weights[8:],
        "no_json": (16).to_bytes(8, "little") + b"not json at all!" + weights[24:],
        "pickle": b"\x80\x04\x95" + weights[3:],
    }.items():
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        (tmp_path / name / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model.safetensors can't be read"):
            chapter.load_released(tmp_path / name)
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]}}).encode()
    path = tmp_path / "whole/model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    with pytest.raises(ValueError, match=r"model.safetensors can't be read"):
        chapter.load_released(tmp_path / "whole")


def test_shards_that_do_not_fit_their_index(tmp_path):
    chapter.save_released(model_of(), tmp_path / "out", shard_bytes=400_000)
    index = tmp_path / "out/model.safetensors.index.json"
    raw = json.loads(index.read_text())
    first = sorted(set(raw["weight_map"].values()))[0]
    (tmp_path / "out" / first).rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=f"{first} can't be read"):
        chapter.load_released(tmp_path / "out")
    (tmp_path / "kept").rename(tmp_path / "out" / first)
    name = next(n for n, file in raw["weight_map"].items() if file == first)
    others = sorted(set(raw["weight_map"].values()) - {first})
    index.write_text(json.dumps({"weight_map": raw["weight_map"] | {name: others[0]}}))
    with pytest.raises(ValueError, match=f"{name} is not in {others[0]}"):
        chapter.load_released(tmp_path / "out")
    fewer = raw["weight_map"].copy()
    del fewer["model.norm.weight"]
    index.write_text(json.dumps({"weight_map": fewer}))
    with pytest.raises(ValueError, match="model.norm.weight is not in it, but in a file"):
        chapter.load_released(tmp_path / "out")
    index.write_text(json.dumps({"weight_map": {name: "../kept.safetensors"}}))
    with pytest.raises(ValueError, match="outside"):
        chapter.load_released(tmp_path / "out")
    index.write_text("[]")
    with pytest.raises(ValueError, match="can't be read"):
        chapter.load_released(tmp_path / "out")


def test_gate_and_up_in_one_block_cannot_be_kept(tmp_path):
    model = model_of(replace(TINY, moe_intermediate_size=72))
    chapter.save_released(model, tmp_path / "out", in_fp8=True)
    chapter.load_released(tmp_path / "out")
    with pytest.raises(ValueError, match="multiple of 128.*got 72"):
        chapter.load_released(tmp_path / "out", keep_fp8=True)


# Memory -------------------------------------------------------------------------------------

PEAK = """
import resource, sys
from importlib import import_module
import torch
chapter = import_module("08_checkpoints")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = chapter.load_released(sys.argv[1], keep_fp8=sys.argv[2] == "kept")
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
print(1024 * (after - before), held)
"""


SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in ("bf16", "kept")]


@pytest.mark.parametrize("how", ["fp8", *SLOW])
def test_peak_memory_is_the_model_and_twice_its_largest_tensor(how, tmp_path):
    """Resident, what is mapped of the files included."""
    config = replace(
        TINY, vocab_size=16000, hidden_size=1024, intermediate_size=4096, moe_intermediate_size=512,
        n_routed_experts=32, num_hidden_layers=4, num_nextn_predict_layers=0,
    )  # fmt: skip
    model = model_of(config, torch.bfloat16)
    chapter.save_released(model, tmp_path / "out", in_fp8=how != "bf16", shard_bytes=60_000_000)
    largest = max(t.numel() * t.element_size() for t in base.released_tensors(model).values())
    command = [sys.executable, "-c", PEAK, str(tmp_path / "out"), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    grown, held = map(int, done.stdout.split())
    assert held > 5 * largest  # or the bar would say little
    assert grown <= held + 2 * largest, (grown / 1e6, held / 1e6, largest / 1e6)


# Tokenizers ---------------------------------------------------------------------------------

SPECIALS = ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<think>"]
SAMPLES = [
    "def f(x):\n    return 'naïve' + x[1234567]\n\n\n  # done  ",
    "Don't  SHOUT, it's   fine…",
    "中文和日本語、ひらがなカタカナ。混ぜるEnglishと123数字45",
    "한국어 텍스트",
    "العربية ١٢٣ עברית",
    "Ünïcödé ÀÉÎ \ufb01 ½²",
    "\x00\x01 control\x7f\u200b\u200d",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea 1\ufe0f\u20e3",
    "a\r\nb\rc\n\td\u2028e\u3000f\xa0 g",
    "  \n  \n",
    "!!!abc ?def -x_y",
    "\uff46\uff55\uff4c\uff4c \uff11\uff12",
    "ก็ไม่รู้ हिन्दी नमस्ते",
    "\u3099\u309a\u309b\u309c\u309d\u30fb\u30fc\u30a0\u30ff",
    "\u3040\u3040\u3072\x00\u3097\u3098\u30fb\u3099a",
    " 1  2   3\n4",
]


@functools.cache
def trained(cuts: tuple[str, ...]):
    """A tokenizer as V3's file describes one, trained by the tokenizers library."""
    pre = tokenizers.pre_tokenizers

    def split(p):
        return pre.Digits(True) if p == "digits" else pre.Split(tokenizers.Regex(p), "isolated")

    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    last = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre.Sequence([*map(split, cuts), last])
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    code = (ROOT / "08_checkpoints.py").read_text("utf-8")
    inner.train_from_iterator([code, *SAMPLES * 5], trainer)
    return inner


def in_folder(inner, folder):
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    return chapter.load_tokenizer(folder)


CUTS = {
    "v3": chapter.V3_CUTS,
    "kimi": (chapter.KIMI,),
    "ours": (base.CHUNKS,),
    "with_gaps": (r"\p{L}+|\p{N}{1,3}",),
    # the third cuts what the second has found once more, for : to ~ holds the letters
    "v2": ("[\r\n]", r"\s?[A-Za-zµÀ-ÖØ-öø-ƺͰ-ͳԱ-Ֆ]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$",
           "[一-龥ࠀ-一가-퟿]+", "digits"),
}  # fmt: skip
TEXTS = st.text(
    st.one_of(
        st.sampled_from(
            " \n\r\t.!'abcXYZ019中龥あゞーヿ゠・é½\u3000\x00\u200b\u3040\u3099\u309b\u3098"
        ),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=30,
)


@pytest.mark.parametrize("cuts", CUTS)
def test_a_tokenizer_json_gives_the_ids_of_the_tokenizers_library(cuts, tmp_path):
    inner = trained(CUTS[cuts])
    ours = in_folder(inner, tmp_path)

    @settings(max_examples=400, deadline=None)
    @given(TEXTS)
    def compare(text):
        ids = inner.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, allowed_special="all") == ids
        assert ours.decode_bytes(ids) == text.encode()

    compare()
    text = "".join(SAMPLES) + (ROOT / "06_train.py").read_text("utf-8")
    text += "<think>" + SPECIALS[0] + " <｜User｜>hi"
    assert ours.encode(text, allowed_special="all") == inner.encode(text).ids
    ordinary = ours.encode_ordinary("a<think>b")  # as text, where it is not allowed
    assert not set(ordinary) & {ours.encode_single_token(name) for name in SPECIALS}


@pytest.mark.parametrize("cuts", CUTS)
def test_what_we_write_gives_the_same_ids_there(cuts, tmp_path):
    ours = in_folder(trained(CUTS[cuts]), tmp_path)
    (tmp_path / "out").mkdir()
    bos = ours.encode_single_token(SPECIALS[0])
    chapter.save_tokenizer(ours, tmp_path / "out", bos, bos, chapter.R1_TEMPLATE)
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")

    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def compare(text):
        want = ours.encode(text, allowed_special="all")
        assert other.encode(text, add_special_tokens=False).ids == want
        assert other.encode(text).ids == [bos, *want]
        assert auto(text, add_special_tokens=False).input_ids == want

    compare()
    for text in SAMPLES:
        assert auto(text).input_ids == [bos, *ours.encode_ordinary(text)]
    for name in SPECIALS:  # their ids are the lowest, as V3's are
        text = f"a{name}b{name}"
        assert auto(text).input_ids == [bos, *ours.encode(text, allowed_special="all")]
        assert auto.decode(ours.encode(text, allowed_special="all")) == text
    again = chapter.load_tokenizer(tmp_path / "out")
    assert again._pat_str == ours._pat_str  # what lies between matches is not added again
    assert getattr(again, "cuts", None) == getattr(ours, "cuts", None)
    assert again.encode_ordinary(SAMPLES[0]) == ours.encode_ordinary(SAMPLES[0])


def test_runs_of_digits_may_stay_together(tmp_path):
    pre = tokenizers.pre_tokenizers
    for alone in True, False:
        inner = trained(CUTS["v2"])
        last = pre.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre.Split(tokenizers.Regex(r"[a-z]+"), "isolated")
        before, inner.pre_tokenizer = (
            inner.pre_tokenizer,
            pre.Sequence([split, pre.Digits(alone), last]),
        )
        ours = in_folder(inner, tmp_path / str(alone))
        inner.pre_tokenizer = before
        assert ours.cuts == ("[a-z]+", r"\p{N}" if alone else r"\p{N}+")


def test_codes_to_be_kept_must_be_there_and_be_matrices(tmp_path):
    chapter.save_released(model_of(), tmp_path / "plain")
    with pytest.raises(ValueError, match="no weights in FP8 to be kept"):
        chapter.load_released(tmp_path / "plain", keep_fp8=True)
    chapter.save_released(model_of(), tmp_path / "fp8", in_fp8=True)
    name = "model.layers.0.self_attn.o_proj.weight"
    spoil(tmp_path / "fp8", lambda t: t.update({name: t[name].flatten().clone()}))
    with pytest.raises(ValueError, match=r"o_proj.weight is FP8 of shape \(\d+,\), want a matrix"):
        chapter.load_released(tmp_path / "fp8")


def test_several_cuts_let_special_tokens_in_as_tiktoken_does(tmp_path):
    several, one = (in_folder(trained(CUTS[name]), tmp_path / name) for name in ("v2", "v3"))
    for encoding in several, one:
        with pytest.raises(ValueError, match="<think>"):
            encoding.encode("a<think>b")
        ids = encoding.encode("a<think>b", allowed_special={"<think>"})
        assert ids[1] == encoding.encode_single_token("<think>") and len(ids) == 3
        plain = encoding.encode("a<think>b", disallowed_special=())
        assert plain == encoding.encode_ordinary("a<think>b")
        with pytest.raises(ValueError, match="<think>"):
            encoding.encode("a<think>", allowed_special="all", disallowed_special={"<think>"})
        unknown = encoding.encode("ab<think>", allowed_special={"b", ""}, disallowed_special=())
        assert unknown == encoding.encode_ordinary("ab<think>")
        assert encoding.encode_to_numpy("ab").tolist() == encoding.encode("ab")
        for other in copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding)):
            assert other.encode_ordinary(SAMPLES[0]) == encoding.encode_ordinary(SAMPLES[0])
    with pytest.raises(ValueError, match="no place for the cuts of a CutEncoding"):
        base.save_encoding(several, tmp_path / "encoding.json")


@pytest.mark.parametrize(
    "cuts", [(r"\s+$", r"\p{L}+"), (r"[a-z&&[aeiou]]+", r"^\s+"), (r"\h+", "x")]
)
def test_patterns_are_those_of_the_tokenizers_library(cuts, tmp_path):
    inner, text = trained(cuts), "hello  \nworld abc  \n  axe fade " * 2
    if r"\h+" in cuts:
        with pytest.raises(ValueError, match=r"\\h"):
            in_folder(inner, tmp_path)
        return
    ids = inner.encode(text, add_special_tokens=False).ids
    assert in_folder(inner, tmp_path).encode_ordinary(text) == ids


def test_a_token_that_later_merges_could_make_is_refused(tmp_path):
    """abc has no merge, and is made of a and b, then ab and c, where tiktoken merges by ranks."""
    vocab = {chapter.LETTERS[byte]: byte for byte in range(256)} | {"abc": 256, "ab": 257}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b")], ignore_merges=True))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\w+"), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    with pytest.raises(ValueError, match="is not merged as ranks would merge it"):
        in_folder(inner, tmp_path)


def test_special_tokens_keep_their_ids_there(tmp_path):
    """Below all others, among them, above them, and behind a gap."""
    ranks = {bytes([byte]): byte + 3 for byte in range(256)}
    special = {"<a>": 0, "<b>": 2, "<c>": 259, "<d>": 270}
    ours = tiktoken.Encoding("gaps", pat_str=".", mergeable_ranks=ranks, special_tokens=special)
    chapter.save_tokenizer(ours, tmp_path, 0, 270)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "x<d><b>y<c><a>"
    want = ours.encode(text, allowed_special="all")
    assert auto(text, add_special_tokens=False).input_ids == want and auto.decode(want) == text
    assert auto.bos_token_id == 0 and auto.eos_token_id == 270
    again = chapter.load_tokenizer(tmp_path)
    assert again.encode(text, allowed_special="all") == want


def tiktoken_folder(folder, ranks, added=None):
    folder.mkdir()
    lines = [f"{base64.b64encode(t).decode()} {r}\n" for t, r in ranks.items()]
    (folder / "tiktoken.model").write_text("".join(lines))
    if added:
        decoder = {str(i): {"content": name} for name, i in added.items()}
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({"added_tokens_decoder": decoder}))
    return folder


def test_a_tiktoken_vocabulary_is_kimis(tmp_path):
    """The form of Moonlight: ranks in one file, names of special tokens in another."""
    kimi = in_folder(trained((chapter.KIMI,)), tmp_path / "json")
    tokens = sorted(kimi.token_byte_values(), key=kimi.encode_single_token)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    n = len(ranks)
    folder = tiktoken_folder(tmp_path / "kimi", ranks, {"[BOS]": n, "<|im_end|>": n + 2})
    ours = chapter.load_tokenizer(folder)
    assert ours.n_vocab == n + 256
    assert ours.encode("[BOS]x<|im_end|>", allowed_special="all")[::2] == [n, n + 2]
    assert ours.encode(f"<|reserved_token_{n + 1}|>", allowed_special="all") == [n + 1]
    shift = kimi.encode_single_token(tokens[0])
    for text in SAMPLES:
        assert [i + shift for i in ours.encode_ordinary(text)] == kimi.encode_ordinary(text)
    (folder / "tiktoken.model").write_text("not base64\n")
    with pytest.raises(ValueError, match="no tiktoken vocabulary"):
        chapter.load_tokenizer(folder)


def edited(tmp_path, change):
    in_folder(trained(CUTS["v3"]), tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return tmp_path


def swap_ids(raw):
    vocab = raw["model"]["vocab"]
    a, b = (next(t for t, i in vocab.items() if i == n) for n in (400, 900))
    vocab[a], vocab[b] = vocab[b], vocab[a]


def another_merge(raw):
    merges = raw["model"]["merges"]
    i = next(i for i, (a, b) in enumerate(merges) if len(a) == 2 and len(b) == 1)
    a, b = merges[i]
    merges[i] = [a[0], a[1] + b]


def alone(raw, parts):
    """A token that no merge makes, of so many that some make: Hugging Face has it as a whole chunk
    only, tiktoken inside one as well, if there are two."""
    model = raw["model"]
    model["ignore_merges"] = True
    (a, b), *_ = [m for m in model["merges"] if len(m[0]) == len(m[1]) == 1 and m[0] + m[1] != "qz"]
    if parts == 2:
        model["merges"].remove([a, b])
    else:
        model["vocab"]["QJQXZ"] = 10**5


NOT_OURS = {
    "unigram": (lambda raw: raw["model"].update(type="Unigram"), "Unigram"),
    "byte_fallback": (lambda raw: raw["model"].update(byte_fallback=True), "not byte-level BPE"),
    "normalizer": (lambda raw: raw.update(normalizer={"type": "NFC"}), "normalizer 'NFC'"),
    "digits": (lambda raw: raw.update(pre_tokenizer={"type": "Digits"}), "pre_tokenizer"),
    "removed": (
        lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        "want isolated Splits or Digits",
    ),
    "no_regex": (
        lambda raw: raw["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="("),
        "can't be read into tiktoken",
    ),
    "strip": (lambda raw: raw["added_tokens"][0].update(lstrip=True), "neighbours' spaces"),
    "order": (swap_ids, "ids do not follow the merges"),
    "merge": (another_merge, "not merged as ranks would|ids do not follow|can't be read"),
    "lost": (lambda raw: alone(raw, 2), "is not merged as ranks would merge it"),
    "ids": (lambda raw: raw["added_tokens"][0].update(id=-1), "can't be read into tiktoken"),
    "nothing": (
        lambda raw: raw["added_tokens"].append(raw["added_tokens"][0] | {"content": ""}),
        "an empty token",
    ),
    "no_byte": (lambda raw: raw["model"]["vocab"].pop("~"), "1 are no tokens, as 126"),
    "twice": (lambda raw: raw["model"]["vocab"].update({"~": 1}), "stands for two tokens"),
    "not_json": (None, "can't be read"),
}


@pytest.mark.parametrize("case", NOT_OURS)
def test_a_tokenizer_that_tiktoken_could_not_reproduce_is_refused(case, tmp_path):
    change, message = NOT_OURS[case]
    folder = edited(tmp_path, change or (lambda raw: None))
    if change is None:
        (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=message):
        chapter.load_tokenizer(folder)


def test_a_token_of_several_that_do_not_merge_is_one_as_a_whole_chunk(tmp_path):
    folder = edited(tmp_path, lambda raw: alone(raw, 5))
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = chapter.load_tokenizer(folder)
    for text in "QJQXZ", "a QJQXZ", "QJQXZa b":
        assert ours.encode_ordinary(text) == inner.encode(text, add_special_tokens=False).ids


def test_an_empty_normalizer_is_none_and_newlines_may_be_spelt(tmp_path):
    def change(raw):
        raw["normalizer"] = {"type": "Sequence", "normalizers": []}
        last = raw["pre_tokenizer"]["pretokenizers"][2]["pattern"]
        last["Regex"] = last["Regex"].replace(r"\r", "\r").replace(r"\n", "\n")
        raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]

    folder = edited(tmp_path, change)
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = chapter.load_tokenizer(folder)
    for text in SAMPLES:
        assert ours.encode_ordinary(text) == inner.encode(text).ids


def test_no_tokenizer_is_said(tmp_path, encoding):
    with pytest.raises(ValueError, match="has no tokenizer: want one of encoding.json"):
        chapter.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="token 3 is not a special one"):
        chapter.save_tokenizer(encoding, tmp_path, bos_token_id=3)


# Chat ---------------------------------------------------------------------------------------

R1_PUBLISHED = (  # without its tools, as the released tokenizer_config.json has it
    "{% set ns = namespace(system_prompt='', is_first_sp=true) %}{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}"
    "{% set ns.system_prompt = ns.system_prompt + message['content'] %}"
    "{% set ns.is_first_sp = false %}{%- else %}"
    "{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}"
    "{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor %}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system"]),
            "content": st.text("ab \n</think>{}", max_size=12),
        }
    ),
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(MESSAGES)
def test_r1s_template(messages):
    marks = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    want = chapter.render(R1_PUBLISHED, messages, *marks)
    assert chapter.render(chapter.R1_TEMPLATE, messages, *marks) == want


def test_a_template_is_rendered_in_a_sandbox():
    with pytest.raises(ValueError, match="can't be rendered"):
        chapter.render("{{ messages.__class__.__mro__[1].__subclasses__() }}", [])
    with pytest.raises(ValueError, match="can't be parsed"):
        chapter.render("{% for %}", [])
    for fails in "{{ 1 // 0 }}", "{{ 'a' + 1 }}", "{{ messages.0.x.y }}":
        with pytest.raises(ValueError, match="can't be rendered"):
            chapter.render(fails, [])
    with pytest.raises(ValueError, match="roles must take turns"):
        chapter.render("{{ raise_exception('roles must take turns') }}", [])
    assert chapter.render("{% for i in [1, 2] %}{{ i }}{% break %}{% endfor %}", []) == "1"


def test_a_template_is_found_or_refused(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    assert chapter.read_template(tmp_path) is None
    several = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    for content, want in (
        ({}, None),
        ({"chat_template": "A"}, "A"),
        ({"chat_template": several}, "D"),
    ):
        config.write_text(json.dumps(content))
        assert chapter.read_template(tmp_path) == want
    for content in [], {"chat_template": several[:1]}, {"chat_template": ["x"]}:
        config.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="tokenizer_config.json"):
            chapter.read_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("J")
    assert chapter.read_template(tmp_path) == "J"


@pytest.fixture(scope="module")
def spoken(encoding):
    torch.manual_seed(0)
    small = {"vocab_size": 591, "bos_token_id": 590, "eos_token_id": 590}
    model = model_of(replace(TINY, **small, max_position_embeddings=96))
    return model, encoding


TURNS = "{{ bos_token }}{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"


def test_a_conversation_streams_the_greedy_text(spoken, capsys):
    model, encoding = spoken
    for drafts in None, False:
        chapter.chat(model, encoding, ["import os\n", "\n"], None, None, 12, drafts)
        out = capsys.readouterr().out
        want = model.generate([[590, *encoding.encode_ordinary("import os")]], 12, eos_token_id=590)
        text = encoding.decode_bytes([t for t in want[0] if t != 590]).decode("utf-8", "replace")
        assert out.startswith(text.rstrip("\ufffd"))
        assert regex.search(rf"\[\d+ \+ {len(want[0])} tokens, \d+ tokens/s", out)
        assert ("MTP drafts" in out) == (drafts is None)


def test_the_oldest_turns_leave_first_and_the_system_message_stays(spoken):
    model, encoding = spoken
    talk = chapter.Talk(model, encoding, TURNS)
    talk.messages = [{"role": "system", "content": "S"}]
    for i in range(6):
        talk.messages.append({"role": "user", "content": f"question {i} " * 2})
        talk.messages.append({"role": "assistant", "content": f"answer {i}"})
    talk.messages.append({"role": "user", "content": "last"})
    whole = encoding.decode(talk.prompt(10**6))
    assert all(f"answer {i}" in whole for i in range(6))
    cut = encoding.decode(talk.prompt(len(encoding.encode(whole, allowed_special="all")) - 1))
    assert "[system:S]" in cut and "question 0" not in cut and "answer 0" not in cut
    assert "question 1" in cut and cut.endswith("[user:last]")
    with pytest.raises(ValueError, match="there is room for 5"):
        talk.prompt(5)


def test_what_is_too_long_is_said_and_forgotten(spoken, capsys):
    model, encoding = spoken
    lines = ["hello " * 90, "hi"]
    chapter.chat(model, encoding, lines, TURNS, "S", 8)
    out = capsys.readouterr().out
    assert "[this message takes" in out and "tokens/s" in out
    chapter.chat(model, encoding, ["hello " * 90], None, None, 8)  # no turns: the end of it
    assert "[88 + " in capsys.readouterr().out
    chapter.chat(model, encoding, ["x"], None, None, 96)
    assert "want max_new_tokens of 1 to 95, got 96" in capsys.readouterr().out
    chapter.chat(model, encoding, ["x"], None, None, 95)
    assert "there is room for 1 tokens, and none for a message" in capsys.readouterr().out


def test_tokens_that_are_half_a_character_or_none_at_all(spoken):
    model, encoding = spoken
    talk, heard = chapter.Talk(model, encoding), []
    half = encoding.encode_single_token(b"\xe4")

    class Scripted:
        config = model.config

        def generate(self, prompts, max_new_tokens, listen, **options):
            for token in [*encoding.encode_ordinary("ab"), half, 10**6, half]:
                listen(0, token)

    talk.model = Scripted()
    talk.answer("x", heard.append, 8, False)
    assert "".join(heard) == talk.messages[-1]["content"] == "ab\ufffd\ufffd\ufffd"


@pytest.mark.parametrize("drafts", [False, True])
def test_an_answer_ends_with_any_of_several_tokens(spoken, drafts):
    model, encoding = spoken
    [whole] = model.generate([[590, 5]], 12)
    ends = [whole[7], whole[4]]
    [new] = model.generate([[590, 5]], 12, eos_token_id=ends, speculative=drafts)
    assert new == whole[: 1 + min(whole.index(token) for token in ends)]


def test_what_ends_an_answer_may_stand_in_generation_config(tmp_path):
    path = tmp_path / "generation_config.json"
    assert chapter.read_ends(tmp_path) is None
    for content, want in ({}, None), ({"eos_token_id": 7}, [7]), ({"eos_token_id": [7, 9]}, [7, 9]):
        path.write_text(json.dumps(content))
        assert chapter.read_ends(tmp_path) == want
    path.write_text('{"eos_token_id": []}')
    assert chapter.read_ends(tmp_path) is None
    for bad in '"x"', "[[1]]", '["<end>"]', "1e999", "true", "7.9", "-1":
        path.write_text(f'{{"eos_token_id": {bad}}}')
        with pytest.raises(ValueError, match="generation_config.json"):
            chapter.read_ends(tmp_path)
    for content in "{", "[]":
        path.write_text(content)
        with pytest.raises(ValueError, match="generation_config.json"):
            chapter.read_ends(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(spoken):
    model, encoding = spoken
    small = model_of(replace(TINY, vocab_size=300, bos_token_id=None, eos_token_id=None))
    with pytest.raises(
        ValueError, match="of another model: it has ids up to 590, the model 300 rows"
    ):
        chapter.Talk(small, encoding)


def test_an_answer_can_be_interrupted(spoken, capsys, monkeypatch):
    model, encoding = spoken

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", interrupted)
    chapter.chat(model, encoding, ["one", "two"], TURNS, None, 8)
    assert capsys.readouterr().out.count("[interrupted: forgotten]") == 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_decoding_writes_the_same(backend, monkeypatch):
    """Greedy text in fp32; of a copy and of unequal prompts too, where no code is generated."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model, rows = model_of(), [[[1, 2, 3]]]
    if backend == "eager":
        rows += [[[5], [6, 7, 8, 9], [10, 11]], [[7, 7]] * 8, [[7, 7]] * 9]
    want = [model.generate(prompts, 20) for prompts in rows]
    counters.clear()
    chapter.compile_decoding(model)
    assert [model.generate(prompts, 20) for prompts in rows] == want
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.neg_()
    assert other.generate(rows[0], 20) != want[0] == model.generate(rows[0], 20, speculative=True)
    model.loss(TOKENS, TOKENS).backward()  # what is trained goes the plain way
    assert model.lm_head.weight.grad.isfinite().all()


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_recorded_decoding_writes_the_same(device):
    """Alone and together, prompts of all lengths: on a CPU a pass is called instead of replayed."""
    model = model_of(replace(TINY, max_position_embeddings=300)).to(device)
    recorded = copy.deepcopy(model)
    chapter.record_decoding(recorded)
    prompts_of = lambda *lengths: [torch.randint(40, (n,)).tolist() for n in lengths]
    for prompts in prompts_of(1, 9, 40), prompts_of(30), prompts_of(2, 2, 2), prompts_of(250):
        for options in {}, {"speculative": True}, {}:  # the last finds all that it needs recorded
            want = model.generate(prompts, 40, **options)
            got = recorded.generate(prompts, 40, **options)
            gaps = [
                base.mtp.logit_gap(model, *texts) for texts in zip(prompts, want, got, strict=True)
            ]
            assert max(gaps) <= (0 if device == "cpu" else 1e-2)
    # (B, width) of the passes: 3 rows or 1, 1 token or 2; rooms of 256 and of 512
    seen = {key[-2] for key in recorded.hidden.recorded}
    assert seen == {(B, T) for B in (1, 3) for T in (1, 2)} and len(recorded.hidden.recorded) == 6
    drawn = recorded.generate([[1, 2]], 8, 1.0, generator=torch.Generator(device).manual_seed(0))
    assert drawn == model.generate(
        [[1, 2]], 8, 1.0, generator=torch.Generator(device).manual_seed(0)
    )
    caches = recorded.new_caches(1, 20)
    with torch.no_grad():
        first = recorded.hidden(torch.tensor([[3]], device=device), caches)
        kept = first.clone()
        assert not torch.equal(recorded.hidden(torch.tensor([[4]], device=device), caches), first)
    assert torch.equal(first, kept)  # its own, not where the graph leaves it
    two, count = torch.tensor([[5], [6]], device=device), len(recorded.hidden.recorded)
    assert recorded.hidden(two, recorded.new_caches(2, 20)).requires_grad
    assert len(recorded.hidden.recorded) == count  # called, not replayed
    other = copy.deepcopy(recorded)  # records anew, what is computed by its own weights
    assert not other.hidden.recorded and other.hidden.function.__self__ is other
    model.loss(TOKENS.to(device), TOKENS.to(device)).backward()


def test_what_is_recorded_is_of_these_weights_and_of_no_mode():
    model = model_of(replace(TINY, max_position_embeddings=300))
    recorded = copy.deepcopy(model)
    chapter.record_decoding(recorded)
    once = recorded.hidden
    chapter.record_decoding(recorded)
    assert recorded.hidden is once  # not a recording of recordings
    prompts = [[3, 4, 5], [6, 7]]
    with torch.inference_mode():
        assert recorded.generate(prompts, 9) == model.generate(prompts, 9)
    assert recorded.generate(prompts, 9) == model.generate(prompts, 9)
    count = len(once.recorded)
    other = copy.deepcopy(recorded).double()  # caches of its own, in its own dtype
    assert other.new_caches(2, 20)[0].entries.dtype == torch.float64
    assert recorded.new_caches(2, 20)[0].entries.dtype == torch.float32
    weight = recorded.model.layers[1].self_attn.o_proj.weight
    weight.data = weight.data * 2  # elsewhere
    model.model.layers[1].self_attn.o_proj.weight.data *= 2
    assert recorded.generate(prompts, 9) == model.generate(prompts, 9)
    assert len(once.recorded) == count  # those of the old weights are dropped
    tokens = torch.tensor([[5, 6]])
    with torch.no_grad():
        got = recorded.hidden(caches=recorded.new_caches(1, 9), tokens=tokens)
        assert (got - model.hidden(tokens)).abs().max() <= 1e-4


def test_a_part_of_a_prompt_behind_a_replayed_one_sees_it(monkeypatch):
    """On a GPU a replay runs none of the cache's Python: so here it leaves no trace of it."""
    model = model_of()
    recorded = copy.deepcopy(model)
    chapter.record_decoding(recorded)
    record = chapter.Replay.record

    def silent(self, inputs, caches, several):
        fixed, run, out = record(self, inputs, caches, several)

        def quiet():
            noted = [(cache.empty, cache.used) for cache in several]
            run()
            for cache, (empty, used) in zip(several, noted, strict=True):
                cache.empty, cache.used = empty, used

        return fixed, quiet, out

    monkeypatch.setattr(chapter.Replay, "record", silent)
    tokens = torch.randint(500, (1, 9))
    with torch.no_grad():
        want = model.hidden(tokens)
        for _ in range(2):  # the second time the first part is replayed
            caches = recorded.new_caches(1, 20)
            first = recorded.hidden(tokens[:, :2], caches)
            got = torch.cat((first, recorded.hidden(tokens[:, 2:], caches)), 1)
            assert (got - want).abs().max() <= 1e-4


def test_recorded_caches_keep_their_rows():
    model = model_of()
    chapter.record_decoding(model)
    [cache, *_] = model.new_caches(2, 9)
    cache.append(torch.ones(2, 3, cache.widths[0]), torch.ones(2, 3, cache.widths[1]))
    cache.entries[1] *= 2
    place = cache.entries.data_ptr()
    cache.select(torch.tensor([1, 0]))
    assert cache.entries.data_ptr() == place and cache.entries[:, 0, 0].tolist() == [2, 1]
    with pytest.raises(ValueError, match="want all 2 rows of caches that are recorded, got 4"):
        cache.select(torch.tensor([0, 0, 1, 1]))
    assert cache.entries.data_ptr() == place and len(cache.lengths) == 2


def test_a_graph_finds_a_cache_where_it_was_recorded():
    cache = chapter.FixedCache(2, 8, 4, 2)
    lengths, entries = cache.lengths, cache.entries
    prompt = cache.append(torch.ones(2, 3, 4), torch.ones(2, 3, 2))
    assert prompt.shape == (2, 3, 6) and cache.used == 3  # all there is: no mask is needed
    cache.truncate(torch.tensor([1, 2]))
    found = cache.append(2 * torch.ones(2, 1, 4), 2 * torch.ones(2, 1, 2))
    assert cache.lengths is lengths and cache.entries is entries and cache.used == 8
    assert found.shape == entries.shape and found.data_ptr() == entries.data_ptr()
    assert lengths.tolist() == [2, 3]
    assert entries[:, :4, 0].tolist() == [[1, 2, 1, 0], [1, 1, 2, 0]]  # what is stale stays
    cache.clear()
    assert (
        len(cache.append(torch.ones(2, 1, 4), torch.ones(2, 1, 2))[0]) == 8
    )  # recorded: all slots
    assert len(cache.append(torch.ones(2, 3, 4), torch.ones(2, 3, 2))[0]) == 8  # behind others


def test_what_cannot_be_compiled_is_said_and_left_as_it_was():
    with pytest.raises(ValueError, match="FP8"):
        chapter.compile_decoding(base.DeepSeek(TINY, "fp8"))
    with torch.device("meta"), pytest.raises(ValueError, match="not on meta"):
        chapter.compile_decoding(base.DeepSeek(TINY))
    torch.compiler.reset()
    model = model_of()
    want = model.generate([[1, 2]], 5)
    nothing = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    with torch._inductor.config.patch(nothing), pytest.raises(ValueError, match="compiler"):
        chapter.compile_decoding(model)
    assert model.generate([[1, 2]], 5) == want and "hidden" not in vars(model)


def test_the_lesson(tmp_path):
    command = [sys.executable, "08_checkpoints.py", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    checks, measures = receipt(done.stdout.splitlines())
    assert len(checks) >= 9 and all(check["ok"] for check in checks) and len(measures) >= 6
    assert [path.name for path in tmp_path.iterdir()] == ["08_checkpoints.png"]


def test_the_command_line(tmp_path, encoding):
    """A folder as 06 writes it: exported, then talked to from what was exported."""
    model = model_of(replace(TINY, vocab_size=591, bos_token_id=590, eos_token_id=590))
    run = tmp_path / "run/checkpoint"
    model.save_pretrained(run)
    base.save_encoding(encoding, run / "encoding.json")

    def call(*arguments, said=""):
        command = [sys.executable, "08_checkpoints.py", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, input=said, capture_output=True, text=True)

    done = call(tmp_path / "run", "--save", tmp_path / "new", "--fp8")
    assert done.returncode == 0 and "tokenizer.json" in done.stdout, done.stderr
    talk = ["--temperature", "0", "--max-new-tokens", "6", "--device", "cpu"]
    done = call(tmp_path / "new", *talk, "--fp8", "--no-mtp", said="import os\n")
    assert done.returncode == 0 and "MTP" not in done.stdout, done.stderr
    mode = lambda path: path.stat().st_mode
    assert mode(tmp_path / "new/model.safetensors") == mode(tmp_path / "new/config.json")
    (tmp_path / "run/checkpoint/model.safetensors").write_bytes(b"")  # not even looked at:
    for flags, message in (
        (["--max-new-tokens", "0"], "--max-new-tokens: want 1 to 4095, got 0"),
        (["--temperature", "nan"], "--temperature, --top-p: want temperature 0"),
        (["--top-p", "1.5"], "0 < top_p <= 1, got 0.6, 1.5"),
    ):
        done = call(tmp_path / "run", *flags, said="x\n")
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    [first] = model.generate([[590, *encoding.encode_ordinary("x")]], 1)
    (run / "generation_config.json").write_text(json.dumps({"eos_token_id": first}))
    model.save_pretrained(run)
    done = call(tmp_path / "run", *talk, "--no-mtp", said="x\n")
    assert done.returncode == 0 and " + 1 tokens" in done.stdout, done.stdout + done.stderr
    (run / "tokenizer_config.json").write_text('{"chat_template": "{% for %}"}')
    done = call(tmp_path / "run", said="x\n")
    assert done.returncode == 2 and "template can't be parsed" in done.stderr
    done = call(tmp_path / "run", "--save", tmp_path / "new")
    assert done.returncode == 2 and "not empty" in done.stderr
    assert "Traceback" not in done.stderr
    done = call("--fp8")
    assert done.returncode == 2 and "want a FOLDER" in done.stderr
    done = call(tmp_path / "run", "--compile", "--fp8")
    assert done.returncode == 2 and "--compile is for a chat" in done.stderr
    done = call(tmp_path / "run", "--compile", "--device", "meta")
    assert done.returncode == 2 and "--compile wants --device cpu, or cuda" in done.stderr


def test_flags_reach_the_chat(tmp_path, encoding, monkeypatch):
    """`main` alone: nothing is loaded, and nobody talks."""
    config = replace(TINY, vocab_size=591, bos_token_id=590, eos_token_id=590)
    small = replace(config, max_position_embeddings=90)
    kept, said = [], []
    model = base.DeepSeek(config)
    load = lambda folder, device, keep_fp8, progress: kept.append(keep_fp8) or model
    monkeypatch.setattr(chapter, "load_released", load)
    monkeypatch.setattr(chapter, "chat", lambda *args, **drawing: said.append((args, drawing)))

    def call(config, *flags):
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        base.save_encoding(encoding, tmp_path / "encoding.json")
        argv = ["08_checkpoints.py", str(tmp_path), "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        chapter.main()
        args, drawing = said.pop()
        generator = drawing.pop("generator")
        return kept.pop(), *args[4:], *drawing.items(), generator.initial_seed()

    plain = call(config)
    assert plain == (False, None, 256, None, None, ("temperature", 0.6), ("top_p", 0.95), 0)
    assert call(small)[2] == 45  # half of a short context
    flags = "--system", "S", "--max-new-tokens", "9", "--no-mtp", "--fp8", "--seed", "7"
    found = call(config, *flags, "--temperature", "0.3", "--top-p", "0.5")
    assert found == (True, "S", 9, False, None, ("temperature", 0.3), ("top_p", 0.5), 7)


def test_gate_and_up_of_64_share_a_block_too(tmp_path):
    chapter.save_released(model_of(replace(TINY, moe_intermediate_size=64)), tmp_path, in_fp8=True)
    with pytest.raises(ValueError, match="multiple of 128.*got 64"):
        chapter.load_released(tmp_path, keep_fp8=True)


def test_a_name_that_two_files_hold_is_refused(tmp_path):
    """Without an index, which would say which one it is."""
    chapter.save_released(model_of(), tmp_path, shard_bytes=400_000)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert chapter.load_released(tmp_path)
    first = min(tmp_path.glob("*.safetensors"))
    shutil.copy(first, tmp_path / "zz.safetensors")
    with pytest.raises(ValueError, match=f"is in {first.name} and in zz.safetensors"):
        chapter.load_released(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_scales_may_be_narrow(dtype, tmp_path):
    """Powers of two, of which each type holds all: as V3.1's."""
    model = model_of(dtype=torch.bfloat16)
    chapter.save_released(model, tmp_path, in_fp8=True)

    def narrow(tensors):
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = tensors[name].log2().ceil().exp2()

    spoil(tmp_path, narrow)
    want = chapter.load_released(tmp_path)
    to = lambda tensors: tensors.update(
        {name: t.to(dtype) for name, t in tensors.items() if name.endswith("_scale_inv")}
    )
    spoil(tmp_path, to)
    same_weights(chapter.load_released(tmp_path), want)
    kept = chapter.load_released(tmp_path, keep_fp8=True)
    assert kept.model.layers[0].self_attn.o_proj.weight_scale_inv.dtype == torch.float32


def test_what_is_written_beside_the_weights(tmp_path, monkeypatch, encoding):
    moved, replace_ = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: moved.append(Path(b).name) or replace_(a, b))
    config = replace(TINY, vocab_size=591, bos_token_id=590, eos_token_id=590)
    model, out = model_of(config, torch.bfloat16), tmp_path / "out"
    out.mkdir()
    chapter.save_released(model, out, encoding, shard_bytes=100_000, chat_template="T")
    assert moved[-1] == "config.json"  # into a folder that was there
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = chapter.Shards(out)
    want = sum(t.numel() * t.element_size() for _, t in shards.read(shards.file))
    assert index["metadata"]["total_size"] == want
    assert chapter.read_template(out) == "T"
    raw = json.loads((out / "tokenizer_config.json").read_text())
    assert raw["add_bos_token"] and not raw["clean_up_tokenization_spaces"]
    chapter.save_tokenizer(encoding, tmp_path)  # of a model without a beginning
    assert not json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"]


def test_of_two_special_tokens_the_longer_is_meant(tmp_path):
    ranks = {bytes([byte]): byte for byte in range(256)}
    special = {"<a>": 256, "<a>b": 257}
    several = chapter.CutEncoding("cuts", (".",), ranks, special)
    assert several.encode("x<a>b<a>", allowed_special="all") == [ord("x"), 257, 256]


def test_as_many_ids_as_rows_and_no_more(spoken):
    model, encoding = spoken
    most = encoding.max_token_value
    ends = {"bos_token_id": None, "eos_token_id": None}
    chapter.Talk(model_of(replace(TINY, vocab_size=most + 1, **ends)), encoding)
    with pytest.raises(ValueError, match=f"ids up to {most}, the model {most} rows"):
        chapter.Talk(model_of(replace(TINY, vocab_size=most, **ends)), encoding)


def test_what_could_not_be_answered_is_forgotten(spoken):
    model, encoding = spoken
    talk = chapter.Talk(model, encoding, TURNS)
    with pytest.raises(ValueError, match="this message takes"):
        talk.answer("hello " * 90, print, 8, False)
    assert talk.messages == []


def test_without_turns_the_end_of_a_long_text_is_read(spoken):
    model, encoding = spoken
    talk = chapter.Talk(model, encoding)
    talk.messages = [{"role": "user", "content": "hello " * 50 + "the end"}]
    assert encoding.decode(talk.prompt(20)).endswith("hello the end")


def test_an_old_index_beside_a_whole_file_is_of_no_account(tmp_path):
    chapter.save_released(model_of(), tmp_path)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00009.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert chapter.load_released(tmp_path)


def test_a_folder_that_is_not_empty_is_said_before_anything_is_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/notes.txt").write_text("mine")
    monkeypatch.setattr(chapter, "load_tokenizer", None)
    argv = ["08_checkpoints.py", str(tmp_path), "--save", str(tmp_path / "new"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        chapter.main()
    assert "not empty" in capsys.readouterr().err


def test_an_empty_template_file_is_none(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("")
    assert chapter.read_template(tmp_path) is None


def test_end_0_is_one(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert chapter.read_ends(tmp_path) == [0]


def test_a_file_of_several_tensors_is_no_larger_than_asked(tmp_path):
    chapter.save_released(model_of(), tmp_path, shard_bytes=100_000)
    for path in tmp_path.glob("*.safetensors"):
        sizes = [t.numel() * t.element_size() for t in load_file(path).values()]
        assert len(sizes) == 1 or sum(sizes) <= 100_000


@pytest.mark.parametrize("keep", [False, True], ids=["decoded", "kept"])
def test_a_code_may_be_minus_nan(keep, tmp_path):
    chapter.save_released(model_of(), tmp_path, in_fp8=True)
    spoil(tmp_path, lambda t: t[DOWN].view(torch.uint8)[3, 4].fill_(0xFF))
    with pytest.raises(ValueError, match="down_proj.weight holds a NaN"):
        chapter.load_released(tmp_path, keep_fp8=keep)


def test_a_model_without_drafts_talks_without(spoken, capsys):
    _, encoding = spoken
    small = {"vocab_size": 591, "bos_token_id": 590, "eos_token_id": 590}
    chapter.chat(model_of(replace(V2_LIKE, **small)), encoding, ["import os\n"], None, None, 4)
    out = capsys.readouterr().out
    assert "tokens/s]" in out and "MTP" not in out


def test_none_of_the_ends_is_part_of_an_answer(spoken):
    model, encoding = spoken
    ends = encoding.encode_ordinary("yz")
    talk = chapter.Talk(model, encoding, ends=ends)

    class Scripted:
        config = model.config

        def generate(self, prompts, max_new_tokens, listen, **options):
            for token in [*encoding.encode_ordinary("ab"), ends[-1]]:
                listen(0, token)

    talk.model = Scripted()
    talk.answer("x", lambda piece: None, 8, False)
    assert talk.messages[-1]["content"] == "ab"


def test_what_is_saved_takes_its_template_along(tmp_path, encoding, monkeypatch):
    model = base.DeepSeek(replace(TINY, vocab_size=591, bos_token_id=590, eos_token_id=590))
    model.save_pretrained(tmp_path / "old")
    base.save_encoding(encoding, tmp_path / "old/encoding.json")
    (tmp_path / "old/chat_template.jinja").write_text(TURNS)
    argv = ["08_checkpoints.py", str(tmp_path / "old"), "--save", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", [*argv, "--device", "cpu"])
    chapter.main()
    assert chapter.read_template(tmp_path / "new") == TURNS
    monkeypatch.setattr(sys, "argv", ["08_checkpoints.py", "--save", str(tmp_path / "more")])
    with pytest.raises(SystemExit):  # and not a lesson of 10 s
        chapter.arguments()


@pytest.mark.parametrize("change, message", [
    (lambda raw: raw["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True), "want"),
    (lambda raw: raw["added_tokens"][0].update(rstrip=True), "neighbours' spaces"),
    (lambda raw: raw["added_tokens"][0].update(single_word=True), "neighbours' spaces"),
    (lambda raw: raw["model"].update(dropout=0.1), "not byte-level BPE"),
])  # fmt: skip
def test_more_that_tiktoken_could_not_reproduce(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        chapter.load_tokenizer(edited(tmp_path, change))


def test_templates_see_what_transformers_gives_them():
    text = '{{ messages[0] | tojson }} {{ strftime_now("%Y") }}'
    messages = [{"role": "user", "content": "a<b & 'é'"}]
    want = json.dumps(messages[0], ensure_ascii=False)
    said = chapter.render(text, messages)
    assert said.startswith(want + " 2") and len(said) == len(want) + 5


def test_a_model_that_records_can_be_saved(tmp_path):
    model = model_of()
    chapter.record_decoding(model)
    want = model.generate([[3, 4, 5]], 5)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert again.hidden.recorded == {} and again.generate([[3, 4, 5]], 5) == want
    assert again.hidden.function.__self__ is again


def test_a_smaller_tokenizer_is_of_another_model_too():
    encoding = base.encoding_of(base.train_bpe(["some text"], 260))
    model = model_of(replace(TINY, bos_token_id=None, eos_token_id=599))
    with pytest.raises(ValueError, match="token 599 is not a special one"):
        chapter.Talk(model, encoding)
