# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<=2.13", "numpy>=1.26", "tiktoken>=0.8", "regex>=2024.5", "matplotlib>=3.8",
#   "safetensors>=0.4.5", "tqdm>=4.66", "filelock>=4.3", "jinja2>=3.1",
# ]
# ///
r"""08 · Checkpoints: the released models in, ours out, and a chat with either.

DeepSeek-V3's checkpoint is 163 files, 91,991 tensors, 684,531,386,000 numbers, 641 GiB. This
chapter reads it, tensor by tensor, into the model of chapter 06, and writes what 06 and 07 have
trained in the same layout, so that it opens in the tools people use. No test of our model could be
stricter: the weights of one must fit into the other, to the last name.

    model-00001-of-00163.safetensors ─┐  headers first: names, shapes, types are all compared
    model.safetensors.index.json ─────┼─► then one tensor at a time ─► into its place in the model
    config.json ──────────────────────┘       FP8: w = code · weight_scale_inv, by blocks of 128×128

    name in a file, under model.layers.L.        shape in V3    stored as                   [1], [2]
    self_attn.q_b_proj.weight                    (24576, 1536)  E4M3
    self_attn.q_b_proj.weight_scale_inv          (192, 12)      fp32, a factor despite its name
    mlp.experts.E.gate_proj.weight               (2048, 7168)   E4M3; ours is stacked, gate first
    mlp.gate.e_score_correction_bias             (256,)         fp32, in any model
    eh_proj.weight, enorm.weight, …              L = 61         MTP: the layer after the last
    embed_tokens.weight, shared_head.head.weight L = 61         the main model's, once more

What reads a folder of `save_released`: transformers (AutoModelForCausalLM, AutoTokenizer, pipeline;
tested; FP8 in whole blocks only: 5.24 refuses V3's own 576 rows, and of 192 it makes two blocks of
96 without a word). vLLM and SGLang go by the same config.json and names: architectures
DeepseekV3ForCausalLM, num_nextn_predict_layers with its layer after the last, quantization_config
for FP8. Their fast MLA kernels are built for a latent of 512 + 64 channels; other sizes are left to
their Triton backends. Neither was run here.

    [1] DeepSeek-V3, arXiv:2412.19437, and its repository's README_WEIGHTS.md
    [2] tensor listings of the released checkpoints    [3] DeepSeek-R1, arXiv:2501.12948

Run:  python 08_checkpoints.py [FOLDER [--save NEW]]     a chat with what is in FOLDER; alone: 10 s
"""

import argparse
import base64
import codecs
import inspect
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MethodType

import numpy as np
import regex
import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

mla = import_module("02_mla")  # LatentCache
moe = import_module("03_moe_router")  # Experts, has_kernels
fp8 = import_module("04_fp8_gemm")  # quantize_blocks, quantize_tiles, dequantize, fp8_gemm
base = import_module("06_train")  # DeepSeek, DeepSeekConfig, released_tensors, save_whole

# %% 1. The layout, name by name -------------------------------------------------------------
QUANTIZED = regex.compile(  # of V3.2's indexer (10) two of three
    r".*\.(self_attn|mlp)\.((?!indexer).*_proj(_with_mqa)?|indexer\.(wq_b|wk))\.weight"
)
BLOCKS = {
    "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}  # fmt: skip
CODES, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
DTYPES = {"F32": FP32, "BF16": BF16, "F16": torch.float16}


def released_layout(c: "base.DeepSeekConfig") -> dict[str, tuple[tuple, torch.dtype]]:
    """Every tensor of V3's checkpoint, from its listing [2]: name -> shape, dtype. The oracle."""
    D, H, L, R = c.hidden_size, c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim
    N, V, Q, E = c.qk_nope_head_dim, c.v_head_dim, c.q_lora_rank, c.n_routed_experts
    found = {}

    def plain(name: str, *shape: int, dtype=BF16) -> None:
        found[name] = shape, dtype

    def in_blocks(name: str, rows: int, columns: int) -> None:
        plain(name, rows, columns, dtype=CODES)
        plain(f"{name}_scale_inv", math.ceil(rows / 128), math.ceil(columns / 128), dtype=FP32)

    def swiglu(name: str, width: int) -> None:
        in_blocks(f"{name}.gate_proj.weight", width, D)
        in_blocks(f"{name}.up_proj.weight", width, D)
        in_blocks(f"{name}.down_proj.weight", D, width)

    plain("model.embed_tokens.weight", c.vocab_size, D)
    plain("model.norm.weight", D)
    plain("lm_head.weight", c.vocab_size, D)
    for layer in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        name = f"model.layers.{layer}"
        plain(f"{name}.input_layernorm.weight", D)
        plain(f"{name}.post_attention_layernorm.weight", D)
        in_blocks(f"{name}.self_attn.q_a_proj.weight", Q, D)
        plain(f"{name}.self_attn.q_a_layernorm.weight", Q)
        in_blocks(f"{name}.self_attn.q_b_proj.weight", H * (N + R), Q)
        in_blocks(f"{name}.self_attn.kv_a_proj_with_mqa.weight", L + R, D)
        plain(f"{name}.self_attn.kv_a_layernorm.weight", L)
        in_blocks(f"{name}.self_attn.kv_b_proj.weight", H * (N + V), L)
        in_blocks(f"{name}.self_attn.o_proj.weight", D, H * V)
        if layer < c.first_k_dense_replace:
            swiglu(f"{name}.mlp", c.intermediate_size)
            continue
        plain(f"{name}.mlp.gate.weight", E, D)
        plain(f"{name}.mlp.gate.e_score_correction_bias", E, dtype=FP32)
        for expert in range(E):
            swiglu(f"{name}.mlp.experts.{expert}", c.moe_intermediate_size)
        swiglu(f"{name}.mlp.shared_experts", c.n_shared_experts * c.moe_intermediate_size)
        if layer >= c.num_hidden_layers:
            plain(f"{name}.embed_tokens.weight", c.vocab_size, D)
            plain(f"{name}.enorm.weight", D)
            plain(f"{name}.hnorm.weight", D)
            plain(f"{name}.eh_proj.weight", D, 2 * D)
            plain(f"{name}.shared_head.norm.weight", D)
            plain(f"{name}.shared_head.head.weight", c.vocab_size, D)
    return found


# %% 2. In: a tensor at a time ---------------------------------------------------------------


class Stored(nn.Module):
    """E4M3 codes (..., N, K) and the scale of each 128×128 block, as a released file has them.

    For inference: no gradient gets past them, and a forward that wants one raises RuntimeError.
    """

    def __init__(self, *shape: int):
        super().__init__()
        *batch, N, K = shape
        scales = *batch, math.ceil(N / 128), math.ceil(K / 128)
        self.register_buffer("weight", torch.empty(shape, dtype=CODES))
        self.register_buffer("weight_scale_inv", torch.empty(scales, dtype=FP32))

    def _apply(self, fn, recurse=True):
        """To another device, never to another dtype: codes without their scales are no weights."""
        for name, tensor in self._buffers.items():
            moved = fn(tensor)
            same = moved.dtype == tensor.dtype
            self._buffers[name] = moved if same else tensor.to(moved.device)
        return self


def without_gradient(x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("kept FP8 weights give no gradient: load them with keep_fp8=False")
    return x


class StoredLinear(Stored):
    """x (..., K) by tiles in FP8 times the codes: (..., N) in x's dtype or autocast's."""

    def forward(self, x: Tensor) -> Tensor:
        x = base.narrow(without_gradient(x))
        x_codes = fp8.quantize_tiles(x.flatten(0, -2))
        y = fp8.fp8_gemm(*x_codes, self.weight, self.weight_scale_inv, x.dtype)
        return y.view(*x.shape[:-1], len(self.weight))


class StoredExperts(moe.Experts):
    """Experts on their codes: one grouped product on a GPU, on a CPU one expert after another."""

    def __init__(self, experts: int, hidden_size: int, width: int):
        nn.Module.__init__(self)
        self.gate_up_proj = Stored(experts, 2 * width, hidden_size)
        self.down_proj = Stored(experts, hidden_size, width)
        self.grouped_gemm = stored_product


def stored_product(x: Tensor, stack: Stored, sizes: Tensor) -> Tensor:
    """03's grouped_gemm with weights that are FP8 already."""
    codes, scales = fp8.quantize_tiles(without_gradient(x))
    w, w_scales = stack.weight, stack.weight_scale_inv
    if fp8.has_kernels(x):
        ends = sizes.cumsum(0).to(torch.int32)
        return fp8.tuned_gemm(codes, scales, w, w_scales, x.dtype, ends)
    parts = zip(*(t.split(sizes.tolist()) for t in (codes, scales)), w, w_scales, strict=True)
    products = (fp8.fp8_gemm(*part, x.dtype) for part in parts if len(part[0]))
    return torch.cat([x.new_empty(0, w.shape[1]), *products])


class Shards:
    """The tensors of a folder's *.safetensors by name: their shapes and types, read from headers.

    ValueError for a file that is missing or damaged, a name that two files hold, and an index that
    puts one where it is not. Nothing but safetensors is ever opened: no pickle.
    """

    def __init__(self, folder: Path):
        self.folder, self.file, self.shape, self.kind = folder, {}, {}, {}
        for path in base.weight_files(folder):
            if path.parent != folder:
                raise ValueError(f"{folder}: its index points outside, to {path.name}")
            with self.opened(path) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    if name in self.file:
                        raise ValueError(f"{name} is in {self.file[name].name} and in {path.name}")
                    part = tensors.get_slice(name)
                    self.file[name], self.kind[name] = path, part.get_dtype()
                    self.shape[name] = tuple(part.get_shape())
        index = folder / "model.safetensors.index.json"
        if index.exists() and not (folder / "model.safetensors").exists():
            places = json.loads(index.read_text())["weight_map"]
            for name in places.keys() | self.file.keys():
                file = places.get(name)
                if name not in self.file or self.file[name].name != file:
                    raise ValueError(f"{index}: {name} is not in {file or 'it, but in a file'}")

    def opened(self, path: Path):
        try:
            return safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} can't be read: {error}") from None

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Each name and its tensor. A file is mapped anew once as much was read as the largest
        tensor has bytes: what is mapped counts as memory in use."""
        width = lambda name: 4 if self.kind[name] == "F32" else 2
        size = {name: math.prod(self.shape[name]) * width(name) for name in names}
        ordered = sorted(size, key=lambda name: (self.file[name], name))
        most, path, budget, tensors = max(size.values(), default=0), None, 0, None
        for name in ordered:
            if self.file[name] != path or size[name] > budget:
                path, budget = self.file[name], most
                tensors = None  # unmaps
                tensors = self.opened(path).__enter__()
            budget -= size[name]
            yield name, tensors.get_tensor(name)


def read_config(folder: Path, kind: type = base.DeepSeekConfig) -> "base.DeepSeekConfig":
    """Of a released folder; a quantization_config must be DeepSeek's 128×128 blocks of E4M3."""

    def make(raw: dict) -> base.DeepSeekConfig:
        scheme = raw.pop("quantization_config", None) or {}
        for key, want in BLOCKS.items():
            if scheme and scheme.get(key, want) != want:
                raise ValueError(f"quantization_config: {key} {scheme[key]!r} is not {want!r}")
        return kind.from_dict(raw)

    return base.read_config(folder / "config.json", make)


def dequantize_into(out: Tensor, codes: Tensor, scales: Tensor, rows: int = 1024) -> None:
    """Some rows at a time, so that no fp32 copy of the whole stands beside it."""
    for first in range(0, len(codes), rows):
        part = scales[first // 128 : (first + rows) // 128]
        out[first : first + rows] = fp8.dequantize(codes[first : first + rows], part)


def place_stored(model: "base.DeepSeek", coded: set[str]) -> None:
    """Put Stored modules where the file has codes; `kv_b_proj` is split by head, so it has none."""
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        released = regex.sub(r"^mtp\.(\d+)\.(block\.)?", lambda m: (
            f"model.layers.{model.config.num_hidden_layers + int(m[1])}."), path)  # fmt: skip
        if isinstance(module, nn.Linear) and f"{released}.weight" in coded and name != "kv_b_proj":
            fresh = StoredLinear(*module.weight.shape)
        elif type(module) is moe.Experts and f"{released}.0.down_proj.weight" in coded:
            (E, width, D) = module.gate_up_proj.shape
            if width % 256:
                want = "moe_intermediate_size must be a multiple of 128"
                raise ValueError(
                    f"keep_fp8: {want}, or gate and up share a block; got {width // 2}"
                )
            fresh = StoredExperts(E, D, width // 2)
        else:
            continue
        setattr(model.get_submodule(parent), name, fresh)


def load_released(
    folder: str | Path, device="cpu", dtype: torch.dtype | None = None, keep_fp8: bool = False,
    with_mtp: bool = True, progress: bool = False, model_class: type = base.DeepSeek,
) -> "base.DeepSeek":  # fmt: skip
    """V3, R1, V3.1, V2, V2-Lite, Moonlight, Kimi K2, or what `save_released` wrote, as 06's model.

    One file, or shards; a weight and its scale may be in different ones. Names, shapes and types
    are compared before a weight is read, and then there is one tensor in memory beside the model
    (and FP8's scales: 0.15 GiB of V3's 641). dtype: of the weights; None: that of the file's head,
    bf16 for FP8.
    keep_fp8: linear layers and experts, all but kv_b_proj, keep their codes and multiply in FP8: a
    byte a weight, for inference.
    with_mtp: see `DeepSeek.from_pretrained`. model_class: chapter 10 has one for V3.2.
    ValueError: what does not fit, by name; a scale of another shape; a NaN or an infinity.
    """
    folder = Path(folder)
    config, shards = read_config(folder, model_class.Config), Shards(folder)
    names = {name for name in shards.file if not name.endswith(base.NO_WEIGHT)}
    layers = config.num_hidden_layers
    numbered = ((n, regex.match(r"model\.layers\.(\d+)\.", n)) for n in names)
    behind = {n for n, layer in numbered if layer and int(layer[1]) >= layers}
    config = base.with_or_without_mtp(folder, config, bool(behind), with_mtp)
    if not config.num_nextn_predict_layers:
        names, behind = names - behind, set()
    shared = {n for n in behind if n.endswith(base.SHARED)}
    scales = {n for n in names if n.endswith("_scale_inv")}
    coded = {n for n in names if shards.kind[n] == "F8_E4M3"}
    check_types(folder, shards, names, coded, scales)
    if keep_fp8 and not coded:
        raise ValueError(f"{folder} has no weights in FP8 to be kept")

    with torch.device("meta"):
        model = model_class(config)
        if keep_fp8:
            place_stored(model, coded)
    want = base.released_tensors(model)
    kept = {n for n in scales if n in want}
    got = {n: shards.shape[n] for n in names - shared - (scales - kept)}
    base.compare_shapes(folder, got, {n: tuple(t.shape) for n, t in want.items()})
    if dtype is None:
        dtype = BF16 if coded else DTYPES[shards.kind["lm_head.weight"]]
    model.to(dtype).to_empty(device=device)
    target = base.released_tensors(model)
    factor = dict(shards.read(scales - kept))
    steps = tqdm(shards.read(got), total=len(got), disable=not progress, unit=" tensors")
    with torch.no_grad():
        for name, tensor in steps:
            ours = target[name]
            if name in coded and ours.dtype != CODES:
                dequantize_into(ours, tensor, factor[f"{name}_scale_inv"].float())
            else:
                ours.copy_(tensor)
            check_finite(folder, name, ours)
    for name, tensor in shards.read(shared):
        ours = "model.embed_tokens" if name.endswith(base.SHARED[0]) else "lm_head"
        if not torch.equal(tensor.to(device, dtype), target[f"{ours}.weight"]):
            raise ValueError(f"{folder}: {name} is not {ours}.weight, which MTP shares here")
    return model.requires_grad_(not (keep_fp8 and coded))


def check_types(folder: Path, shards: Shards, names: set, coded: set, scales: set) -> None:
    """A scale for all codes, of their shape, codes for every scale, and else floats."""
    for name in sorted(names):
        kind, shape = shards.kind[name], shards.shape[name]
        if name in scales:
            if name.removesuffix("_scale_inv") not in coded:
                raise ValueError(f"{folder}: {name} is the scale of no FP8 weight")
            if kind not in ("F32", "BF16", "F8_E8M0"):
                raise ValueError(f"{folder}: {name} is {kind}; want F32, BF16 or F8_E8M0")
        elif name in coded:
            if len(shape) != 2:
                raise ValueError(f"{folder}: {name} is FP8 of shape {shape}, want a matrix")
            if f"{name}_scale_inv" not in scales:
                raise ValueError(f"{folder}: {name} is FP8 and has no weight_scale_inv")
            want = tuple(math.ceil(n / 128) for n in shape)
            have = shards.shape[f"{name}_scale_inv"]
            if have != want:
                turned = ": it is transposed" if have == want[::-1] else ""
                raise ValueError(f"{folder}: {name}_scale_inv is {have}, want {want}{turned}")
        elif kind not in DTYPES:
            raise ValueError(f"{folder}: {name} is {kind}; want F32, BF16, F16 or F8_E4M3")


def check_finite(folder: Path, name: str, tensor: Tensor) -> None:
    if tensor.dtype == CODES:
        bad = (tensor.view(torch.uint8) & 0x7F == 0x7F).any()
    else:
        bad = any(not part.isfinite().all() for part in tensor.split(1024))
    if bad:
        raise ValueError(f"{folder}: {name} holds a NaN or an infinity")


# %% 3. Out ----------------------------------------------------------------------------------


def plan_files(model: "base.DeepSeek", in_fp8: bool) -> list[tuple[str, Tensor, bool]]:
    """(name, tensor, to be quantised) of all that a released folder holds, MTP's copies too."""
    tensors = base.released_tensors(model)
    in_fp8 = in_fp8 or CODES in {t.dtype for t in tensors.values()}  # config.json knows no mixture
    for depth in range(len(model.mtp)):
        prefix = f"model.layers.{model.config.num_hidden_layers + depth}."
        shared = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
        tensors |= {prefix + name: t for name, t in zip(base.SHARED, shared, strict=True)}
    return [
        (name, t.detach(), in_fp8 and t.dtype != CODES and bool(QUANTIZED.fullmatch(name)))
        for name, t in tensors.items()
    ]


def save_released(
    model: "base.DeepSeek", folder: str | Path, encoding: tiktoken.Encoding | None = None,
    in_fp8: bool = False, shard_bytes: int = 5 * 10**9, chat_template: str | None = None,
) -> None:  # fmt: skip
    """Write config.json, model*.safetensors and the tokenizer as the released folders are.

    in_fp8: projections of attention, FFN and experts as E4M3 codes with scales by 128×128 (V3's
    own form), which kept FP8 always is. Above shard_bytes (of weights) there are several files and
    an index. folder must be new, and appears when it is whole, or empty. ValueError: it is not, a
    weight in float64, a bos_token_id or eos_token_id that is no special token of encoding.
    """
    folder, ids = Path(folder).resolve(), (model.config.bos_token_id, model.config.eos_token_id)
    must_be_new(folder)
    if shard_bytes < 1:
        raise ValueError(f"want shard_bytes of 1 or more, got {shard_bytes}")
    for name, tensor, _ in (planned := plan_files(model, in_fp8)):
        if tensor.dtype == torch.float64:
            raise ValueError(f"{name} is float64, which no reader takes: model.float() first")
    if encoding is not None:
        special_ids(encoding, *ids)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)  # left by a kill
    fresh.mkdir()
    try:
        write_weights(model, planned, fresh, shard_bytes)
        if encoding is not None:
            save_tokenizer(encoding, fresh, *ids, chat_template)
        if not folder.exists():
            os.replace(fresh, folder)
        else:  # empty, and perhaps where somebody's shell is: it stays, its config.json comes last
            for path in sorted(fresh.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, folder / path.name)
            fresh.rmdir()
    except BaseException:
        shutil.rmtree(fresh)
        raise


def must_be_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: want a new folder, nothing is overwritten")


def write_weights(model: "base.DeepSeek", planned: list, folder: Path, shard_bytes: int) -> None:
    """What `plan_files` lists, its index and config.json."""
    shards, room, total = [], 0, 0
    for name, tensor, quantize in planned:
        size = tensor.numel() * (1 if quantize else tensor.element_size())
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append((name, tensor, quantize))
        room, total = room - size, total + size
    places = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        tensors = {}
        for name, tensor, quantize in shard:
            if quantize:
                codes, scales = fp8.quantize_blocks(tensor)
                tensors |= {name: codes.cpu(), f"{name}_scale_inv": scales.cpu()}
            else:
                tensors[name] = tensor.cpu().contiguous()
            places |= dict.fromkeys(tensors, file)
        copies = {name: t.clone() for name, t in tensors.items() if name.endswith(base.SHARED)}
        everything = tensors | copies
        write = lambda path, everything=everything: save_file(everything, path, {"format": "pt"})
        base.save_whole(folder / file, write)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    config = {**model.config.to_dict(), "torch_dtype": dtype}
    if any(name.endswith("_scale_inv") for name in places):
        config["quantization_config"] = BLOCKS
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


# %% 4. Tokenizers ---------------------------------------------------------------------------
# Two forms are about. tiktoken's: the tokens, and a token's id is its rank: of two neighbours that
# could merge, those of the lowest rank do. Hugging Face's tokenizer.json: a vocabulary and a list
# of merges, in their order. They agree where each token has one merge and ids follow the merges.

# A byte as a letter, which is how tokenizer.json writes it: printable ones as they are.
LETTERS = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b else None for b in range(256)]
for _byte, _spare in zip([b for b in range(256) if not LETTERS[b]], range(256, 512), strict=False):
    LETTERS[_byte] = chr(_spare)
BYTES = {letter: byte for byte, letter in enumerate(LETTERS)}

HAN = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
KIMI = "|".join((  # Moonlight's and Kimi's chunks, which their files leave to code
    r"[\p{Han}]+", *(rf"[^\r\n\p{{L}}\p{{N}}]?{HAN[0]}{a}{HAN[1]}{b}(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
                     for a, b in ("*+", "+*")),
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
))  # fmt: skip
# V3 cuts a text three times: numbers out of it, then Chinese and Japanese, then the rest, which is
V3_CUTS = (
    r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)  # fmt: skip
# therefore blind to them, though it cuts their pieces once more. In one: no class may hold a
# Japanese and another character, and spaces before a number or before Chinese end a piece.
_CJK = r"\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff"
_KANA = (
    rf"[{_CJK}&&[^\p{{L}}\p{{P}}\p{{S}}]]?[\p{{L}}\p{{M}}&&[{_CJK}]]+|[\p{{P}}\p{{S}}&&[{_CJK}]]+"
)
V3_CUT = "|".join((
    r"\p{N}{1,3}", _KANA, f"(?:(?!{_KANA})[{_CJK}])+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
    rf"[^\r\n\p{{L}}\p{{P}}\p{{S}}\p{{N}}{_CJK}]?[\p{{L}}\p{{M}}&&[^{_CJK}]]+",
    rf" ?[\p{{P}}\p{{S}}&&[^{_CJK}]]+[\r\n]*", r"\s*[\r\n]+",
    rf"\s+(?![^\s\p{{N}}{_CJK}])", r"\s+",
))  # fmt: skip


def with_gaps(pattern: str) -> str:
    """`pattern`, and what lies between its matches: tiktoken would drop that."""
    gap = lambda p: rf"|(?:(?!{p})[\s\S])+"
    half = pattern[: (len(pattern) - len(gap(""))) // 2]  # if it has gaps already, as ours saved
    return pattern if pattern == half + gap(half) else pattern + gap(pattern)


def matches_and_gaps(pattern, text: str) -> Iterator[str]:
    """All of the text, in turn what lies before a match, and the match; either may be empty."""
    place = 0
    for match in pattern.finditer(text):
        yield text[place : match.start()]
        yield match[0]
        place = match.end()
    yield text[place:]


class CutEncoding(tiktoken.Encoding):
    """One whose text is cut by several patterns, one after another, as V2's tokenizer.json asks.

    What a pattern matches is a piece, and so is what lies between; the next pattern cuts pieces.
    tiktoken knows one pattern alone: it gets the pieces, one by one.
    """

    def __init__(self, name: str, cuts: tuple[str, ...], mergeable_ranks, special_tokens):
        parts = {"mergeable_ranks": mergeable_ranks, "special_tokens": special_tokens}
        super().__init__(name, pat_str=r"(?s:.+)", **parts)
        self.cuts = cuts
        if any(r"\h" in cut for cut in cuts):  # hexadecimal digits there, blanks here
            raise ValueError(r"a pattern with \h")
        # as in Oniguruma, which the library of tokenizer.json uses: && is "and", $ ends a line
        self.compiled = [regex.compile(cut, regex.V1 | regex.MULTILINE) for cut in cuts]

    def encode_ordinary(self, text: str) -> list[int]:
        pieces = [text]
        for cut in self.compiled:
            pieces = [part for piece in pieces for part in matches_and_gaps(cut, piece)]
        ordinary = super().encode_ordinary
        return [token for piece in pieces if piece for token in ordinary(piece)]

    def encode_to_numpy(self, text: str, **special):
        return np.array(self.encode(text, **special), np.uint32)

    def __reduce__(self):
        return CutEncoding, (self.name, self.cuts, self._mergeable_ranks, self._special_tokens)

    def encode(self, text: str, *, allowed_special=frozenset(), disallowed_special="all"):
        """As tiktoken's: "all", or a set; ValueError for a special token that is not allowed."""
        known = self.special_tokens_set
        allowed = known if allowed_special == "all" else known & set(allowed_special)
        refused = known - allowed if disallowed_special == "all" else set(disallowed_special)
        for name in refused:
            if name in text:
                raise ValueError(f"the text holds {name!r}, a special token that is not allowed")
        names = map(regex.escape, sorted(allowed, key=len, reverse=True))
        parts = regex.split(f"({'|'.join(names)})", text) if allowed else [text]
        tokens = []
        for number, part in enumerate(parts):
            special = number % 2  # between two parts stands what was split at
            tokens += [self.encode_single_token(part)] if special else self.encode_ordinary(part)
        return tokens


def parts_of(token: bytes, ranks: dict[bytes, int], limit: float | None = None) -> list[bytes]:
    """The pieces that lower ranks make of a token, just before its own merge; or those below a
    limit."""
    parts = [token[i : i + 1] for i in range(len(token))]
    limit = ranks[token] if limit is None else limit
    while len(parts) > 1:
        pairs = [ranks.get(a + b, limit) for a, b in zip(parts, parts[1:], strict=False)]
        if min(pairs) >= limit:
            break
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def load_tokenizer(folder: str | Path) -> tiktoken.Encoding:
    """From encoding.json (06, 07), tokenizer.json (V3's, V2's) or tiktoken.model (Moonlight's).

    All added tokens become special ones: `encode(text, allowed_special="all")` gives the ids of
    Hugging Face's tokenizers, `encode_ordinary` never gives a special one. ValueError: no such
    file, or a tokenizer.json whose ids tiktoken could not reproduce (not byte-level BPE, ids that
    do not follow the merges, other cuts than by patterns and at digits).
    """
    folder = Path(folder)
    readers = {"encoding.json": base.load_encoding, "tokenizer.json": _read_merges}
    readers["tiktoken.model"] = _read_ranks
    for name, reader in readers.items():
        if (folder / name).exists():
            return reader(folder / name)
    raise ValueError(f"{folder} has no tokenizer: want one of {', '.join(readers)}")


def _read_ranks(path: Path) -> tiktoken.Encoding:
    """Lines of a token in base64 and its rank; special ones by tokenizer_config.json, and Kimi's
    256 reserved ids after the last."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        config = path.with_name("tokenizer_config.json")
        raw = json.loads(config.read_text("utf-8")) if config.exists() else {}
        added = raw.get("added_tokens_decoder", {}).items()
        named = {int(number): token["content"] for number, token in added}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no tiktoken vocabulary: {error!r}") from None
    reserved = range(len(ranks), len(ranks) + 256)
    special = {named.get(i, f"<|reserved_token_{i}|>"): i for i in reserved}
    special |= {content: number for number, content in named.items()}
    return _encoding(path, KIMI, ranks, special)


def _encoding(path: Path, cuts: str | tuple, ranks: dict, special: dict) -> tiktoken.Encoding:
    """ValueError where tiktoken would panic, at once or at some text."""
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{path}: of the 256 bytes {len(missing)} are no tokens, as {missing[0]}")
    if not all([cuts] if isinstance(cuts, str) else cuts) or "" in special:
        raise ValueError(f"{path}: an empty {'token' if '' in special else 'pattern'}")
    ids = [*ranks.values(), *special.values()]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"{path}: id {twice} stands for two tokens")
    parts, name = {"mergeable_ranks": ranks, "special_tokens": special}, path.parent.name
    try:
        if isinstance(cuts, str):
            return tiktoken.Encoding(name, pat_str=cuts, **parts)
        return CutEncoding(name, cuts, **parts)
    except (TypeError, ValueError, OverflowError, regex.error) as error:
        raise ValueError(f"{path} can't be read into tiktoken: {error}") from None


def _cuts_of(raw: dict) -> str | tuple[str, ...]:
    """The patterns that cut a text as the file's pre-tokenizers do; V3's three are one here."""
    steps = raw["pre_tokenizer"]
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    *splits, last = steps
    patterns = []
    for step in splits:
        kind = step["type"], step.get("behavior"), step.get("invert")
        if step["type"] == "Digits":
            patterns.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif kind == ("Split", "Isolated", False):
            patterns.append(step["pattern"].get("Regex"))
        else:
            patterns.append(None)
    plain = last["type"] == "ByteLevel" and not last["use_regex"] and not last["add_prefix_space"]
    if not plain or not patterns or not all(patterns):
        kinds = [step["type"] for step in steps]
        raise ValueError(
            f"pre_tokenizer of {kinds}: want isolated Splits or Digits, then ByteLevel"
        )
    escaped = tuple(p.replace("\r", r"\r").replace("\n", r"\n") for p in patterns)
    if len(patterns) == 1 or escaped == V3_CUTS:
        return with_gaps(V3_CUT if escaped == V3_CUTS else patterns[0])
    return tuple(patterns)


def _read_merges(path: Path) -> tiktoken.Encoding:
    try:
        raw = json.loads(path.read_text("utf-8"))
        model, normalizer = raw["model"], raw.get("normalizer")
        if normalizer and normalizer.get("normalizers") != []:
            raise ValueError(f"a normalizer {normalizer['type']!r} changes the text first")
        if model["type"] != "BPE" or model.get("byte_fallback") or model.get("dropout"):
            raise ValueError(f"a model {model['type']!r} that is not byte-level BPE")
        special = {token["content"]: token["id"] for token in raw["added_tokens"]}
        for token in raw["added_tokens"]:
            if token["lstrip"] or token["rstrip"] or token["single_word"]:
                raise ValueError(f"token {token['content']!r} takes its neighbours' spaces")
        ids = {t: i for t, i in model["vocab"].items() if t not in special}
        ranks = {bytes(BYTES[letter] for letter in token): i for token, i in ids.items()}
        split = lambda merge: merge.split(" ") if isinstance(merge, str) else merge
        pairs = [tuple(bytes(BYTES[c] for c in part) for part in split(m)) for m in model["merges"]]
        order = [ranks[a + b] for a, b in pairs]
        cuts = _cuts_of(raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} can't be read into tiktoken: {error}") from None
    falls = [i for i in range(1, len(order)) if order[i] < order[i - 1]]
    if falls:
        raise ValueError(f"{path}: ids do not follow the merges, as {pairs[falls[0]]} shows")
    merged = {a + b: (a, b) for a, b in reversed(pairs)}  # of several ways the first
    for token in ranks:
        parts = tuple(parts_of(token, ranks))
        if len(token) > 1 and merged.get(token) != parts:
            # alone in its chunk it is itself; inside one tiktoken may merge it, and no merge does
            alone = model.get("ignore_merges") and token not in merged
            if not alone or len(parts_of(token, ranks, math.inf)) == 1:
                raise ValueError(f"{path}: token {token!r} is not merged as ranks would merge it")
    return _encoding(path, cuts, ranks, special)


def special_ids(encoding: tiktoken.Encoding, *wanted: int | None) -> dict[int, str]:
    """id -> name of the special tokens. ValueError: one of `wanted` is not among them."""
    names = {encoding.encode_single_token(n): n for n in encoding.special_tokens_set}
    for number in wanted:
        if number is not None and number not in names:
            raise ValueError(f"token {number} is not a special one of {sorted(names)[:5]} …")
    return names


def save_tokenizer(
    encoding: tiktoken.Encoding, folder: str | Path, bos_token_id: int | None = None,
    eos_token_id: int | None = None, chat_template: str | None = None,
) -> None:  # fmt: skip
    """tokenizer.json and tokenizer_config.json, with which AutoTokenizer gives the same ids.

    A text begins with bos_token_id there unless add_special_tokens=False. ValueError: an id that
    is no special token.
    """
    folder = Path(folder)
    names = special_ids(encoding, bos_token_id, eos_token_id)
    tokens = encoding.token_byte_values()
    ranks = {token: encoding.encode_single_token(token) for token in tokens}
    spell = lambda token: "".join(LETTERS[byte] for byte in token)
    ordered = sorted(ranks, key=ranks.__getitem__)
    splits = [parts_of(token, ranks) for token in ordered if len(token) > 1]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = False
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    cuts = encoding.cuts if isinstance(encoding, CutEncoding) else [encoding._pat_str]
    splits_at = [{**split, "pattern": {"Regex": cut}} for cut in cuts]
    bos, processor = names.get(bos_token_id), None
    if bos is not None:
        text = {"Sequence": {"id": "A", "type_id": 0}}
        single = [{"SpecialToken": {"id": bos, "type_id": 0}}, text]
        pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
        entry = {bos: {"id": bos, "ids": [bos_token_id], "tokens": [bos]}}
        processor = {"type": "TemplateProcessing", "single": single, "pair": pair}
        processor["special_tokens"] = entry
    raw = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [
            {"id": number, "content": names[number], **flags, "special": True}
            for number in sorted(names)
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits_at, byte_level]},
        "post_processor": processor, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": True,  # a chunk that is a token is that token, as in tiktoken
            # the special ones too, as in V3's file: those it lacks are numbered anew on loading
            "vocab": {spell(token): ranks[token] for token in ordered}
            | {name: number for number, name in names.items()},
            "merges": [[spell(part) for part in parts] for parts in splits if len(parts) == 2],
        },
    }  # fmt: skip
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {
        "bos_token": bos,
        "eos_token": names.get(eos_token_id),
        "add_bos_token": bos is not None,
    }
    config |= {"chat_template": chat_template} if chat_template else {}
    write = lambda path, value: base.save_whole(
        path, lambda fresh: fresh.write_text(json.dumps(value, ensure_ascii=False), "utf-8")
    )
    write(folder / "tokenizer.json", raw)
    write(folder / "tokenizer_config.json", config)


# %% 5. A chat -------------------------------------------------------------------------------
# R1's turns [3]: what it thought is taken out of a past answer, and a new one begins in thought.
R1_TEMPLATE = """{{ bos_token }}
{%- for message in messages if message.role == 'system' %}
{{- message.content }}{{ '' if loop.last else '\n\n' }}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<｜User｜>' + message.content }}
{%- elif message.role == 'assistant' %}
{{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"""


def parsed(template: str):
    """A chat template: Jinja, in a sandbox. ValueError: it is none."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str):
        raise ValueError(message)

    try:
        extensions = ["jinja2.ext.loopcontrols"]
        compiled = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions
        )
        compiled.globals["raise_exception"] = refuse
        compiled.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        compiled.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # for no HTML page
        return compiled.from_string(template)
    except Exception as error:  # a template is a program: it may fail in any way
        raise ValueError(f"the chat template can't be parsed: {error}") from None


def render(template: str, messages: list[dict], bos_token="", eos_token="") -> str:
    """The text that a chat template makes of [{"role", "content"}, …].

    ValueError: it can't be parsed, or fails, or refuses (`raise_exception`) these messages.
    """
    tokens, ready = {"bos_token": bos_token, "eos_token": eos_token}, parsed(template)
    try:
        return ready.render({"messages": messages, "add_generation_prompt": True, **tokens})
    except Exception as error:
        raise ValueError(f"the chat template can't be rendered: {error}") from None


def read_template(folder: Path) -> str | None:
    """chat_template.jinja, or the entry of tokenizer_config.json; None: a model without turns."""
    path = folder / "chat_template.jinja"
    try:
        if path.exists():
            return path.read_text("utf-8") or None
        path = folder / "tokenizer_config.json"
        found = json.loads(path.read_text("utf-8")) if path.exists() else {}
        found = found.get("chat_template")
        if isinstance(found, list):  # several by name
            found = {one["name"]: one["template"] for one in found}["default"]
        return found or None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error!r}") from None


def read_ends(folder: Path) -> list[int] | None:
    """What ends an answer, where generation_config.json says so: Kimi K2's turns don't end with
    what its config.json calls the end."""
    path = folder / "generation_config.json"
    try:
        found = json.loads(path.read_text("utf-8")) if path.exists() else {}
        ends = found.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if not all(type(end) is int and end >= 0 for end in ends):
            raise ValueError(f"eos_token_id {ends}: want ids")
        return ends or None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error!r}") from None


class Talk:
    """One conversation with a model: what was said, and what fits into its context."""

    def __init__(
        self, model, encoding: tiktoken.Encoding, template: str | None = None, ends=None
    ):  # fmt: skip
        self.model, self.encoding, self.template = model, encoding, template
        self.messages: list[dict] = []
        c = model.config
        self.ends = [c.eos_token_id] if ends is None else ends
        if encoding.max_token_value >= c.vocab_size:
            most = f"ids up to {encoding.max_token_value}, the model {c.vocab_size} rows"
            raise ValueError(f"the tokenizer is of another model: it has {most}")
        try:
            names = special_ids(encoding, c.bos_token_id, c.eos_token_id)
        except ValueError as error:
            raise ValueError(f"the tokenizer is not that of config.json: {error}") from None
        self.marks = [names.get(i, "") for i in (c.bos_token_id, c.eos_token_id)]

    def prompt(self, room: int) -> list[int]:
        """Tokens of the conversation, at most `room`: the oldest turns go first, a system message
        stays. Without a template, the last message alone, behind what begins a text."""
        if self.template is None:
            tokens = self.encoding.encode_ordinary(self.messages[-1]["content"])
            begin = self.encoding.encode(self.marks[0], allowed_special="all")
            if room <= len(begin):
                raise ValueError(f"there is room for {room} tokens, and none for a message")
            return begin + tokens[len(begin) - room :]
        kept = list(self.messages)
        while True:
            text = render(self.template, kept, *self.marks)
            tokens = self.encoding.encode(text, allowed_special="all")
            old = [i for i, message in enumerate(kept[:-1]) if message["role"] != "system"]
            if len(tokens) <= room:
                return tokens
            if not old:
                raise ValueError(
                    f"this message takes {len(tokens)} tokens, there is room for {room}"
                )
            del kept[old[0] : old[0] + 2]  # a question and its answer

    def answer(self, text: str, hear, max_new_tokens: int, speculative: bool, **drawing) -> dict:
        """Say `text`; hear(piece) gets the answer as it comes -> tokens, seconds, prompt."""
        limit = self.model.config.max_position_embeddings
        if not 0 < max_new_tokens < limit:
            raise ValueError(f"want max_new_tokens of 1 to {limit - 1}, got {max_new_tokens}")
        self.messages.append({"role": "user", "content": text})
        pieces, count = [], 0
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def say(spelled: bytes, final: bool = False) -> None:
            pieces.append(decoder.decode(spelled, final))
            hear(pieces[-1])

        def listen(_: int, token: int) -> None:
            nonlocal count
            count += 1
            if token not in self.ends:
                try:
                    say(self.encoding.decode_single_token_bytes(token))
                except KeyError:  # a row that fills the embedding up to a round number
                    say("\ufffd".encode())

        try:
            prompt = self.prompt(limit - max_new_tokens)
            begin = time.perf_counter()
            self.model.generate(
                [prompt], max_new_tokens, eos_token_id=self.ends, speculative=speculative,
                listen=listen, **drawing,
            )  # fmt: skip
        except BaseException:
            self.messages.pop()  # it was not said
            raise
        say(b"", final=True)  # what is left of a character that never ended
        seconds = time.perf_counter() - begin
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        return {"tokens": count, "seconds": seconds, "prompt": len(prompt)}


def compile_decoding(model: "base.DeepSeek") -> None:
    """Take Python out of the pass that decodes a token: a small model waits for nothing else.

    On a GPU passes over one or two tokens, so drafts too, become CUDA graphs (`record_decoding`).
    On a CPU torch.compile fuses the pass over one token of one row or a few (nano: 16): half a
    minute, and as long again at the first text of several rows, and of unequal ones. A small model
    then writes more than twice as fast (benchmarks/checkpoints.py), drafts are as before, and one
    whose time goes into reading its weights gains nothing. ValueError: FP8 products, another kind
    of device, no C++ compiler on a CPU, or no Triton on a GPU.
    """
    device, tensors = model.lm_head.weight.device, model.state_dict().values()
    if model.precision == "fp8" or any(t.dtype == torch.float8_e4m3fn for t in tensors):
        raise ValueError("a model with FP8 products isn't compiled: load it without them")
    if moe.has_kernels(model.lm_head.weight):
        return record_decoding(model)
    if device.type != "cpu":
        raise ValueError(f"decoding is compiled on a CPU, or a GPU with Triton; not on {device}")
    c, plain = model.config, type(model).hidden
    few = 2 * c.n_routed_experts // c.num_experts_per_tok  # rows that of_few_compiled (03) takes
    compiled = torch.compile(plain, dynamic=True)

    def hidden(self, tokens: Tensor, caches: list | None = None) -> Tensor:
        one = caches is not None and tokens.shape[1] == 1 and len(tokens) <= few
        return (compiled if one and not torch.is_grad_enabled() else plain)(self, tokens, caches)

    model.hidden = MethodType(hidden, model)  # a copy's will be bound to the copy
    try:
        model.generate([[0, 0]], 8)
    except torch._dynamo.exc.TorchDynamoException as error:
        del model.hidden  # the class's own shows again
        raise ValueError(f"this machine can't compile: {str(error).splitlines()[0]}") from None


class FixedCache(mla.LatentCache):
    """A LatentCache that a CUDA graph can fill: written in place, and always of all its slots.

    Those at and past `lengths` are hidden from every query, as stale ones are.
    """

    def __init__(self, *sizes, **place):
        super().__init__(*sizes, **place)
        self.even, self.empty = False, True  # where rows begin is known to the GPU alone

    def clear(self) -> None:
        self.truncate(0)
        self.empty = True

    def select(self, rows: Tensor) -> None:
        """In place, for the graphs know these very tensors. ValueError: more rows, or fewer."""
        entries, lengths = self.entries[rows], self.lengths[rows]
        if len(lengths) != len(self.lengths):
            want = f"{len(self.lengths)} rows of caches that are recorded, got {len(lengths)}"
            raise ValueError(f"want all {want}: sample from a model without record_decoding")
        self.entries.copy_(entries)
        self.lengths.copy_(lengths)

    def append(self, latent: Tensor, k_rope: Tensor) -> Tensor:
        T, kept, self.used = latent.shape[1], self.lengths, 0
        super().append(latent, k_rope)
        prompt, self.empty = self.empty and T > 2, False  # it is not recorded, and needs no mask
        self.lengths, self.used = kept.copy_(self.lengths), T if prompt else self.room
        return self.entries[:, : self.used]

    def truncate(self, lengths: Tensor | int) -> None:
        self.lengths.copy_(torch.as_tensor(lengths))


class Replay:
    """`function(*inputs, caches)` for one or two tokens as a CUDA graph, one for each shape.

    inputs: (B, T) or (B, T, C), caches: a FixedCache or a list of them. With anything else, for
    more tokens, and where gradients are kept, it just calls. function: a method of a module; once
    its weights lie elsewhere, as after .to(), it is recorded anew.
    """

    def __init__(self, function: Callable):
        self.function, self.recorded, self.parts = function, {}, None
        self.signature = inspect.signature(function)

    def __reduce__(self) -> tuple:  # copied or pickled: of that module, if it is a method
        return Replay, (self.function,)

    def __call__(self, *arguments, **named) -> Tensor:
        *inputs, caches = arguments = self.signature.bind(*arguments, **named).args
        several = caches if isinstance(caches, list) else [caches]
        fits = isinstance(several[0], FixedCache) and inputs[0].shape[1] <= 2
        if not fits or torch.is_grad_enabled():
            return self.function(*arguments)
        if self.parts is None:  # not before: a copy in the making has none
            self.parts = [module._parameters for module in self.function.__self__.modules()]
        places = (p.data_ptr() for part in self.parts for p in part.values() if p is not None)
        key = (*map(id, several), *(x.shape for x in inputs), hash(tuple(places)))
        if key not in self.recorded:  # the caches too: alive, they keep their ids
            known = self.recorded.items()  # those of other weights won't be asked for again
            self.recorded = {other: kept for other, kept in known if other[-1] == key[-1]}
            with torch.inference_mode(False), torch.no_grad():  # it may be kept for other modes
                self.recorded[key] = caches, *self.record(inputs, caches, several)
        _, fixed, run, out = self.recorded[key]
        for place, x in zip(fixed, inputs, strict=True):
            place.copy_(x)
        run()
        for cache in several:  # what `append` would have noted
            cache.empty, cache.used = False, cache.room
        return out.clone()

    def record(self, inputs: list, caches, several: list[FixedCache]) -> tuple:
        """-> where it reads its inputs, what runs it, where it leaves its output."""
        fixed, lengths = [x.clone() for x in inputs], [cache.lengths.clone() for cache in several]

        def once() -> Tensor:
            for cache, length in zip(several, lengths, strict=True):
                cache.truncate(length)
            return self.function(*fixed, caches)

        if not inputs[0].is_cuda:
            out = once()
            run = lambda: out.copy_(self.function(*fixed, caches))
        else:
            aside = torch.cuda.Stream(inputs[0].device)
            aside.wait_stream(torch.cuda.current_stream(inputs[0].device))
            with torch.cuda.stream(aside):  # compiles the kernels, and times them
                for _ in range(3):
                    once()
            torch.cuda.current_stream(inputs[0].device).wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=aside):
                out = self.function(*fixed, caches)
            run = graph.replay
        for cache, length in zip(several, lengths, strict=True):
            cache.truncate(length)
        return fixed, run, out


class FixedCaches:
    """A model's `new_caches` where it records: they are kept, for each power of two."""

    def __init__(self, new_caches: Callable):
        self.new_caches, self.made = new_caches, {}

    def __reduce__(self) -> tuple:
        return FixedCaches, (self.new_caches,)  # of the copied model

    def __call__(self, batch: int, max_tokens: int, layers: int | None = None) -> list[FixedCache]:
        room = max(256, 1 << (max_tokens - 1).bit_length())  # so that a growing talk records few
        like = self.new_caches(batch, 1, layers)
        place = {"device": like[0].entries.device, "dtype": like[0].entries.dtype}
        key = batch, room, layers, *place.values()
        with torch.inference_mode(False):  # they may be filled in other modes, too
            if key not in self.made:
                self.made[key] = [FixedCache(batch, room, *cache.widths, **place) for cache in like]
            for cache in self.made[key]:
                cache.clear()
        return self.made[key]


def record_decoding(model: "base.DeepSeek") -> None:
    """From now on `model` decodes by graphs, which it keeps, with caches, for each power of two.

    Texts of a size share their caches: one at a time.
    """
    if isinstance(model.hidden, Replay):
        return
    model.new_caches, model.hidden = FixedCaches(model.new_caches), Replay(model.hidden)
    for module in model.mtp:
        module.forward = Replay(module.forward)


def chat(
    model: "base.DeepSeek", encoding: tiktoken.Encoding, lines: Iterable[str],
    template: str | None = None, system: str | None = None, max_new_tokens: int = 512,
    speculative: bool | None = None, ends: list[int] | None = None, **drawing,
) -> None:  # fmt: skip
    """Answer each of `lines` on stdout, as the tokens come; then tokens a second.

    template: None: a model that was taught no turns goes on with what it is given, each line by
    itself. speculative: let the MTP module draft; None: if there is one. ends: tokens that end an
    answer; None: the config's. drawing: temperature, top_p, generator of `DeepSeek.generate`.
    """
    talk = Talk(model, encoding, template, ends)
    if system:
        talk.messages.append({"role": "system", "content": system})
    drafts = bool(model.mtp) if speculative is None else speculative
    hear = lambda piece: print(piece, end="", flush=True)
    for line in lines:
        if not line.strip("\n"):
            continue
        try:
            said = talk.answer(line.strip("\n"), hear, max_new_tokens, drafts, **drawing)
        except ValueError as error:
            print(f"[{error}]")
            continue
        except KeyboardInterrupt:
            print("\n[interrupted: forgotten]")
            continue
        speed = said["tokens"] / said["seconds"]
        how = ", MTP drafts" if drafts else ""
        print(f"\n[{said['prompt']} + {said['tokens']} tokens, {speed:.0f} tokens/s{how}]")


# %% 6. Is it right? -------------------------------------------------------------------------
check, measure = base.check, base.measure
TINY = base.DeepSeekConfig(
    vocab_size=600, hidden_size=192, intermediate_size=320, moe_intermediate_size=128,
    num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=4, q_lora_rank=96,
    kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=40, n_routed_experts=8,
    num_experts_per_tok=2, n_group=4, topk_group=2, num_nextn_predict_layers=1,
    rope_scaling={**base.V3_YARN, "original_max_position_embeddings": 64}, initializer_range=0.05,
    bos_token_id=598, eos_token_id=599,
)  # fmt: skip
TEXT = "def f(x): return 2*x\n\tprint('naïve — ½ π')  # 中文、ひらがな 123456 \U0001f600\n\n   end"


def verify_layout() -> dict[str, tuple]:
    """V3 as this course would write it: the same names, shapes and types as the listing's."""
    layout = released_layout(base.V3)
    with torch.device("meta"):
        planned = plan_files(base.DeepSeek(base.V3).to(BF16), in_fp8=True)
    ours = {}
    for name, tensor, quantize in planned:
        ours[name] = tuple(tensor.shape), CODES if quantize else tensor.dtype
        if quantize:
            blocks = tuple(math.ceil(n / 128) for n in tensor.shape)
            ours[f"{name}_scale_inv"] = blocks, FP32
    different = len(ours.items() ^ layout.items())
    check("V3's tensors: names, shapes, types", torch.tensor(different), torch.tensor(0), 0)
    numbers = sum(math.prod(shape) for shape, _ in layout.values())
    got = torch.tensor([len(layout), numbers])
    want = torch.tensor([91_991, 684_531_386_000])
    check("91,991 of them, 684,531,386,000 numbers [2]", got, want, 0)
    return layout


def verify_round_trips(folder: Path) -> None:
    """Out and in again: fp32, bf16, FP8 in shards, FP8 that stays FP8."""
    torch.manual_seed(0)
    model = base.DeepSeek(TINY)
    for mixture in model.mixtures():
        mixture.gate.e_score_correction_bias.normal_()
    tokens = torch.randint(0, 600, (2, 90))  # past YaRN's original context
    with torch.no_grad():
        save_released(model, folder / "fp32")
        again = load_released(folder / "fp32")
        check("fp32: logits", again(tokens), model(tokens), 0)
        save_released(model, folder / "fp8", in_fp8=True, shard_bytes=200_000)
        files = len(list((folder / "fp8").glob("*.safetensors")))
        wide = load_released(folder / "fp8", dtype=FP32)
        want = model(tokens)
        off = lambda got: (got(tokens) - want).std() / want.std()
        measure("logits_off_by_fp8_weights", 100 * off(wide), f"% of their spread; {files} shards")
        kept = load_released(folder / "fp8", dtype=FP32, keep_fp8=True)
        text = "%   activations by tiles too: the products are FP8's"
        measure("logits_off_by_fp8_products", 100 * off(kept), text)
        # 3 % a rounded product, over three layers; near a tie a token goes to another expert
        apart = (kept(tokens) - wide(tokens)).std() / want.std()
        check("FP8 kept = FP8 decoded, but for tiles", apart, torch.zeros(()), 0.3)
        save_released(kept, folder / "again", in_fp8=True, shard_bytes=200_000)
    first, second = (dict(t.read(t.file)) for t in map(Shards, (folder / "fp8", folder / "again")))
    # kv_b_proj alone was decoded; its codes come back, its scale is 448·s/448, rounded twice
    apart = [(first[name].float() - t.float()).abs().max() for name, t in second.items()
             if not name.endswith("kv_b_proj.weight_scale_inv")]  # fmt: skip
    check("and written again, bit for bit", torch.stack(apart).max(), torch.tensor(0.0), 0)


def verify_tokenizers(folder: Path) -> None:
    """Through tokenizer.json and back: the same tokens of code and of several scripts."""
    folder.mkdir()
    encoding = base.encoding_of(base.train_bpe([Path(__file__).read_text("utf-8")], 800))
    save_tokenizer(encoding, folder, bos_token_id=800)
    loaded = load_tokenizer(folder)
    text = TEXT + base.END + "\x00\u3000tail"
    got, want = (torch.tensor(e.encode(text, allowed_special="all")) for e in (loaded, encoding))
    check("tokenizer.json and back: the same tokens", got, want, 0)
    ids = torch.tensor(loaded.encode_ordinary(base.END))
    check("a special token's name is text, unless allowed", (ids >= 800).sum(), torch.tensor(0), 0)


def verify_template() -> None:
    """R1's turns, by hand."""
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2"},
        {"role": "user", "content": "And 2+2?"},
    ]  # fmt: skip
    want = "<s>Be brief.<｜User｜>1+1?<｜Assistant｜>\n\n2</s>"
    want += "<｜User｜>And 2+2?<｜Assistant｜><think>\n"
    got = render(R1_TEMPLATE, messages, "<s>", "</s>")
    got, want = (torch.tensor(list(text.encode())) for text in (got, want))
    check("R1's template, past thoughts left out", got, want, 0)


# %% 7. What is in the 641 GiB? ----------------------------------------------------------------
PARTS = {  # of a name: where its bytes belong
    "experts": r"\.mlp\.experts\.", "attention": r"\.self_attn\.",
    "shared experts, dense FFN": r"\.mlp\.(shared_experts|gate_proj|up_proj|down_proj)",
    "embedding, head": r"embed_tokens|lm_head|shared_head\.head",
    "router, norms, eh_proj": r".",
}  # fmt: skip


def anatomy(layout: dict[str, tuple], out: Path) -> None:
    """GiB of each part of V3's files, as released and as they would be in bf16."""
    released, plain = (dict.fromkeys(PARTS, 0.0) for _ in range(2))
    for name, (shape, dtype) in layout.items():
        part = next(part for part, pattern in PARTS.items() if regex.search(pattern, name))
        released[part] += math.prod(shape) * dtype.itemsize / 2**30
        if not name.endswith("_scale_inv"):
            plain[part] += math.prod(shape) * 2 / 2**30
    for part, size in released.items():
        name = regex.sub(r"\W+", "_", part)
        measure(f"gib_{name}", size, f"GiB   {100 * size / sum(released.values()):.1f} % of all")
    total = torch.tensor(sum(released.values()))
    check("GiB of V3's files, published: 641.3", total, torch.tensor(641.3), 0.05)
    draw(released, plain, out)
    print(f"figure   {out}")


def draw(released: dict[str, float], plain: dict[str, float], out: Path) -> None:
    os.environ["MPLBACKEND"] = "Agg"  # a notebook hands down its own, which may be missing here
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    for row, sizes in enumerate((plain, released)):
        left = 0.0
        for number, (part, size) in enumerate(sizes.items()):
            axes.barh(row, size, left=left, color=f"C{number}", label=part if row else None)
            left += size
        axes.annotate(f"  {left:,.0f} GiB", (left, row), va="center")
    axes.set_yticks([0, 1], ["in bf16", "as released:\nFP8 by 128×128"])
    axes.set(xlabel="GiB", xlim=(0, 1.15 * sum(plain.values())))
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    share = released["experts"] / sum(released.values())
    axes.set_title(
        f"{share:.0%} of DeepSeek-V3's files are experts, and a token uses 1 in 32 of them"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)


# %% Exercises -------------------------------------------------------------------------------
# 1. Break it: read `weight_scale_inv` as what its name says, a divisor. Which lines tell? By how
#    much are the logits off, why does the loss of so untrained a model not say so, and why would a
#    test of shapes never notice?
# 2. Turn the scales round on the way out, (K/128, N/128). Which weights give it away by their shape
#    and which do not? Write a model in which none does.
# 3. Chat with runs/nano/checkpoint at --temperature 0, with the MTP drafts and with --no-mtp. The
#    text is the same, is the speed? Then try the checkpoint of 07: what does "5-9+7=" get?


def arguments() -> argparse.Namespace:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add = cli.add_argument
    add("folder", type=Path, nargs="?", help="a released folder, or one of 06's or 07's: chat")
    add("--save", type=Path, metavar="NEW", help="write FOLDER in the released layout, no chat")
    add("--fp8", action="store_true", help="with --save: weights as FP8 blocks; else: keep FP8")
    add("--device", default=default, help="cpu, cuda, cuda:1, … (%(default)s)")
    add("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    add("--temperature", type=float, default=0.6, help="0: always the likeliest (%(default)s)")
    add("--top-p", type=float, default=0.95, help="of the probability (%(default)s)")
    add("--max-new-tokens", type=int, help="of an answer (256; of a short context half)")
    add("--system", help="what the conversation begins with, where the model knows turns")
    add("--no-mtp", action="store_true", help="decode without drafts")
    add(
        "--compile",
        action="store_true",
        help="for a small model; on a CPU undrafted, twice as fast",
    )
    add("--out", type=Path, default="runs", help="folder of the figure (%(default)s/)")
    args = cli.parse_args()
    if not 0 <= args.seed < 2**63:
        cli.error(f"--seed must be >= 0 and fit 63 bits, got {args.seed}")
    try:
        base.mtp.validate_drawing(args.temperature, args.top_p)
    except ValueError as error:
        cli.error(f"--temperature, --top-p: {error}")
    if args.folder is None and (args.save or args.fp8 or args.compile):
        cli.error("--save, --fp8 and --compile want a FOLDER")
    if args.compile and (args.save or args.fp8):
        cli.error("--compile is for a chat, and not for weights kept in FP8")
    kind = args.device.split(":")[0]
    if args.compile and not (kind == "cpu" or kind == "cuda" and moe.triton):
        cli.error(f"--compile wants --device cpu, or cuda with Triton, got {args.device}")
    try:
        torch.zeros(1, device=args.device).item()
        if torch.device(args.device).type == "cuda":
            torch.cuda.set_device(
                torch.device(args.device).index or 0
            )  # graphs are of the current one
    except Exception as error:  # each backend raises a type of its own
        cli.exit(2, f"cannot run on --device {args.device}: {str(error).splitlines()[0][:100]}\n")
    if args.folder is None:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.out).close()
        except OSError as error:
            cli.error(f"--out {args.out}: {error.strerror}; want a folder that can be written to")
    return args


def converse(args: argparse.Namespace) -> None:
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder}: no such folder")
    if args.save:
        must_be_new(args.save)  # before 641 GiB are read
    folder = base.checkpoint_of(args.folder)
    encoding, template, ends = load_tokenizer(folder), read_template(folder), read_ends(folder)
    if template is not None:
        parsed(template)
    limit = read_config(folder).max_position_embeddings
    most = min(256, limit // 2) if args.max_new_tokens is None else args.max_new_tokens
    if not 0 < most < limit:
        raise ValueError(f"--max-new-tokens: want 1 to {limit - 1}, got {most}")
    keep = args.fp8 and not args.save
    model = load_released(folder, args.device, keep_fp8=keep, progress=True)
    if args.save:
        save_released(model, args.save, encoding, args.fp8, chat_template=template)
        print(f"{args.save}: {', '.join(sorted(p.name for p in args.save.iterdir()))}")
        return
    on_cpu = model.lm_head.weight.device.type == "cpu"
    if args.compile:
        print("compiling: half a minute" if on_cpu else "recording CUDA graphs", flush=True)
        compile_decoding(model)
    drawing = {"temperature": args.temperature, "top_p": args.top_p}
    drawing["generator"] = torch.Generator(args.device).manual_seed(args.seed)
    lines = prompted() if sys.stdin and sys.stdin.isatty() else sys.stdin or ()
    drafts = False if args.no_mtp or args.compile and on_cpu else None
    chat(model, encoding, lines, template, args.system, most, drafts, ends, **drawing)


def prompted() -> Iterator[str]:
    print("Ctrl-D ends; a model without a chat template goes on with what you write.")
    while True:
        try:
            yield input("\n> ")
        except (EOFError, KeyboardInterrupt):
            return print()


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    args = arguments()
    if args.folder is not None:
        try:
            return converse(args)
        except (ValueError, OSError, SafetensorError) as error:
            print(error, file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:  # while it is loaded or saved: there is nothing to lose
            raise SystemExit(130) from None
    layout = verify_layout()
    with tempfile.TemporaryDirectory() as folder:
        verify_round_trips(Path(folder))
        verify_tokenizers(Path(folder) / "tokenizer")
    verify_template()
    anatomy(layout, args.out / "08_checkpoints.png")


if __name__ == "__main__":
    main()
