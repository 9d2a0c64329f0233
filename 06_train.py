# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<=2.13", "numpy>=1.26", "tiktoken>=0.8", "regex>=2024.5", "matplotlib>=3.8",
#   "safetensors>=0.4.5", "tqdm>=4.66", "filelock>=4.3",
# ]
# ///
r"""06 · Training: the tested pieces become a whole DeepSeek-V3, and five minutes teach it Python.

V3 was pre-trained in 2.664 million GPU hours [1]. The same architecture, small, on two CPU cores:
after five minutes it predicts Python that it has never seen better than `xz -9` can pack it.

    Python's library ─► documents ─► BPE ─► one stream of tokens ─► windows (B, T + 1)
                           └─ 5 % of the bytes held out, whole files, by the hash of their content

    tokens (B,T) ─► embed_tokens ─► x (B,T,D) ─► layers ×L ─► norm ─┬─► lm_head ─► (B,T,V)
       a layer:  x = x + MLA(norm(x))   [02]                        └─► MTP module [05] ─► lm_head
                 x = x + FFN(norm(x))   dense, then MoE [03]

    loss      −mean ln p(next token) + α · Σ balance_loss over the mixtures          [1] eq. 17
              + λ · −mean ln p'(token after the next)                                [1] eq. 25
    after a step, in each mixture      bias_e += γ · sign(mean load − load_e)        [1] §2.1.2
    learning rate    0 ─warm-up─► constant ─cosine─► final                           [1] §4.2

    axis  config name                     nano  V3        [1] DeepSeek-V3, arXiv:2412.19437
    B     batch_size (Recipe)                8  15360
    T     context (Recipe)                 256  4096
    D     hidden_size                      128  7168
    L     num_hidden_layers                  3  61
    E, K  n_routed_experts, …_per_tok    16, 2  256, 8
    V     vocab_size                      4096  129280

    sections   1 config   2 model   3 its files   4 sizes   5 tokenizer   6 data   7 training
               8 several GPUs   9 what came out   10 how fast        in a hurry: 2, 5 and 7

Run:  python 06_train.py [--quick | --bench | --resume RUN]          5 minutes on two CPU cores
      python 06_train.py --preset mini --minutes 1                   on one GPU; its data apart
      torchrun --nproc-per-node 8 06_train.py --preset small       on 8 GPUs (FSDP2; not tried yet)
"""

import argparse
import base64
import bisect
import contextlib
import copy
import datetime
import gzip
import hashlib
import heapq
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread

import numpy as np
import regex
import tiktoken
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from tqdm import tqdm

attn = import_module("01_attention")  # tiled_attention
mla = import_module("02_mla")  # MultiHeadLatentAttention, LatentCache
moe = import_module("03_moe_router")  # MoE, SwiGLU, max_violation
fp8 = import_module("04_fp8_gemm")  # FP8Linear, fp8_grouped_gemm
mtp = import_module("05_mtp")  # MTPModule, mtp_loss, choose, speculative_generate
check, measure = attn.check, attn.measure

# %% 1. The config: a released config.json, field by field -----------------------------------

# Keys that change the maths, with the one value we build. A file may leave them out.
BUILT = {
    "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "tie_word_embeddings": False,
    "attention_dropout": 0.0, "moe_layer_freq": 1, "quantization_config": None,
    "sliding_window": None, "index_topk": None,
}  # fmt: skip
V2_DEFAULTS = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}


@dataclass(frozen=True)
class DeepSeekConfig:
    """Sizes and switches under the names of a released config.json; the defaults are V3's.

    ValueError names the field whose value is impossible, contradicts another, or isn't built here.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432  # of a dense layer's SwiGLU
    moe_intermediate_size: int = 2048  # of one expert
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3  # so many layers are dense, the rest mixtures
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    rope_interleave: bool = True
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006  # [1] §4.2; the released files say 0.02
    num_nextn_predict_layers: int = 0  # MTP modules
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1

    def __post_init__(self):
        may_be_zero = {"n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int or field.name == "q_lora_rank" and value is not None:
                least = 0 if field.name in may_be_zero else 1
                if not isinstance(value, int) or value < least:
                    raise ValueError(f"{field.name} must be an int >= {least}, got {value!r}")
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be true or false, got {value!r}")
            if field.type is float and not (
                isinstance(value, (int, float)) and 0 < value < math.inf
            ):
                raise ValueError(f"{field.name} must be a number > 0, got {value!r}")
        if self.rope_scaling is not None:
            if not isinstance(self.rope_scaling, dict):
                raise ValueError(f"rope_scaling must be an object or null: {self.rope_scaling!r}")
            object.__setattr__(self, "rope_scaling", dict(self.rope_scaling))  # no one else's
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace {self.first_k_dense_replace} is more than "
                f"num_hidden_layers {self.num_hidden_layers}"
            )
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(self, name)
            if token is not None and not (isinstance(token, int) and 0 <= token < self.vocab_size):
                raise ValueError(f"{name} {token!r} is outside the vocabulary of {self.vocab_size}")
        with torch.device("meta"):  # the pieces check their own arguments, and cost nothing there
            Block(self, layer=0)
            Block(self, layer=self.first_k_dense_replace)

    @classmethod
    def from_dict(cls, raw: dict) -> "DeepSeekConfig":
        """From the contents of a config.json, with either spelling of the rotary settings.

        Keys we don't know are ignored; ValueError for one of BUILT with another value than ours.
        """
        raw = dict(raw)
        kind = raw.get("model_type", "deepseek_v3")
        if kind not in ("deepseek_v3", "deepseek_v2", "kimi_k2"):  # Kimi K2 is a V3 by its sizes
            want = "deepseek_v3, deepseek_v2 or kimi_k2 (deepseek_v32: 10's SparseDeepSeek)"
            raise ValueError(f"model_type {kind!r}: want {want}")
        known = {field.name for field in fields(cls)}
        for key, ours in BUILT.items():
            if key not in known and raw.get(key, ours) != ours:
                raise ValueError(f"{key} = {raw[key]!r} is not built here, only {ours!r}")
        if new := raw.pop("rope_parameters", None):  # transformers 5
            theta = new.get("rope_theta", 10000.0)
            scaled = new.get("rope_type", "default") != "default"
            scaling = {k: v for k, v in new.items() if k != "rope_theta"} if scaled else None
            for key, value in (("rope_theta", theta), ("rope_scaling", scaling)):
                if key in raw and raw[key] not in (value, new):
                    raise ValueError(f"{key} = {raw[key]!r} contradicts rope_parameters = {new!r}")
                raw[key] = value
        if scaling := raw.get("rope_scaling"):
            scaling = {"type": scaling.get("rope_type", "yarn"), **scaling}
            scaling.pop("rope_type", None)
            longest = raw.get("max_position_embeddings", cls.max_position_embeddings)
            scaling.setdefault("original_max_position_embeddings", longest)
            raw["rope_scaling"] = scaling
        if kind == "deepseek_v2":
            raw = V2_DEFAULTS | {"n_group": 1, "topk_group": 1} | raw
            raw |= {key: 1 for key in ("n_group", "topk_group") if raw[key] is None}
        return cls(**{key: value for key, value in raw.items() if key in known})

    def to_dict(self) -> dict:
        """What goes into config.json, so that transformers builds the same model: a released kind.
        Its V2 is always softmax, not renormalised, and interleaved, and its V3 always sigmoid."""
        version = 3 if self.topk_method == "noaux_tc" else 2
        return {
            "architectures": [f"DeepseekV{version}ForCausalLM"],
            "model_type": f"deepseek_v{version}",
            **asdict(self),
            "num_key_value_heads": self.num_attention_heads,  # vestigial: MLA has none
            **{key: value for key, value in BUILT.items() if value is not None},
        }


# %% 2. The model: wiring, and nothing that an earlier chapter taught ------------------------


def cpu_or_gpu_attention(q, k, v, causal=True, scale=None, mask=None) -> Tensor:
    """On a CPU chapter 01's tiles: with SDPA a training step takes longer (see --bench). On a GPU
    SDPA: an H200 takes 0.7 to 0.85 of the time of 01's kernels for it (01's --bench)."""
    tiled = q.device.type == "cpu" and q.shape[2] > 1
    function = attn.tiled_attention if tiled else mla.padded_attention
    return function(q, k, v, causal=causal, scale=scale, mask=mask)


# under autocast each projection would cast its own copy of what it reads: this casts one for all
narrow = attn.in_autocast_dtype


class Linear(nn.Linear):
    """nn.Linear, and 03's few_rows for the rows of a model that decodes."""

    def forward(self, x: Tensor) -> Tensor:
        # on a CPU bf16 alone (03's --bench goes to 32); on a GPU a token, or it and its draft
        most = 32 * (x.dtype.itemsize == 2) if x.is_cpu else 2 * moe.has_kernels(x)
        few = most and x.dim() > 1 and 0 < x.shape[:-1].numel() <= most and self.bias is None
        if not few or x.dtype != self.weight.dtype or torch.is_grad_enabled():
            return super().forward(x)
        return moe.few_rows(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class Block(nn.Module):
    """x + MLA(norm(x)), then x + FFN(norm(x)): (B, T, D) -> (B, T, D).

    linear, grouped_gemm: stand-ins for nn.Linear and for 03's, in another precision.
    """

    def __init__(self, config: DeepSeekConfig, layer: int, linear=Linear, grouped_gemm=None):
        super().__init__()
        c = config
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = self.attention(c)(
            c.hidden_size, c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim,
            c.qk_rope_head_dim, c.v_head_dim, c.q_lora_rank, c.rope_theta, c.rope_scaling,
            c.rope_interleave, linear=linear, attention=cpu_or_gpu_attention,
        )  # fmt: skip
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        if layer < c.first_k_dense_replace:
            self.mlp = moe.SwiGLU(c.hidden_size, c.intermediate_size, linear)
        else:
            self.mlp = moe.MoE(
                c.hidden_size, c.moe_intermediate_size, c.n_routed_experts, c.num_experts_per_tok,
                c.n_shared_experts, n_group=c.n_group, topk_group=c.topk_group,
                topk_method=c.topk_method, scoring_func=c.scoring_func,
                norm_topk_prob=c.norm_topk_prob, routed_scaling_factor=c.routed_scaling_factor,
                linear=linear, grouped_gemm=grouped_gemm,
            )  # fmt: skip

    @staticmethod
    def attention(config: DeepSeekConfig) -> Callable:
        return mla.MultiHeadLatentAttention  # chapter 10 has another

    def forward(self, x: Tensor, cache=None) -> Tensor:
        x = x + self.self_attn(narrow(self.input_layernorm(x)), cache)
        return x + self.mlp(narrow(self.post_attention_layernorm(x)))


PRECISIONS = {
    "bf16": {},  # by autocast, where the hardware has it
    "fp8": {"linear": fp8.FP8Linear, "grouped_gemm": fp8.fp8_grouped_gemm},
}


class LinearCrossEntropy(torch.autograd.Function):
    """Σ −log softmax(h Wᵀ)[label] over N positions, without the (N, V) logits or their gradient.
    A row whose label is below 0 adds nothing to the sum. Its gradient is that of label 0: `nats`,
    which alone calls this, lets none of it through.

    At V3's vocabulary the fp32 logits of 4,096 tokens are 2.1 GB. The gradient of a slice of rows
    is (softmax − onehot), so forward multiplies it into both operands and forgets the slice.
    """

    ROWS = {"cpu": 256, "cuda": 2048}  # of a slice: a CPU's caches hold it; a GPU wants more work

    @staticmethod
    def forward(ctx, hidden, weight, labels, with_gradient=True):
        rows = LinearCrossEntropy.ROWS.get(weight.device.type, 256)
        wide = torch.promote_types(weight.dtype, torch.float32)
        dh, dw = torch.empty_like(hidden), torch.zeros_like(weight, dtype=wide)
        total, weight = dw.new_zeros(()), weight.to(hidden.dtype)
        # written again for every slice: fresh memory would have to be paged in each time
        scores = torch.empty(min(rows, len(hidden)), len(weight), dtype=wide, device=dw.device)
        products = torch.empty_like(scores, dtype=hidden.dtype)
        dw_slice, dw_wide = torch.empty_like(weight), torch.empty_like(dw)
        slices = (t.split(rows) for t in (hidden, labels[:, None], dh))
        for h, label, dh_out in zip(*slices, strict=True):
            product, s = products[: len(h)], scores[: len(h)]  # (rows, V)
            s.copy_(torch.mm(h, weight.T, out=product))
            counted, label = label[:, 0] >= 0, label.clamp(min=0)
            best, at_label = s.amax(-1), s.gather(1, label)[:, 0]
            probs = torch.softmax(s, -1, out=s)
            # ln Σ exp sⱼ = best − ln p(best): no second exp, and p(best) is never below 1/V
            total += ((best - probs.amax(-1).log() - at_label) * counted).sum()
            if not with_gradient:
                continue
            product.copy_(probs.scatter_add_(1, label, probs.new_full(label.shape, -1.0)))
            torch.mm(product, weight, out=dh_out)
            dw += dw_wide.copy_(torch.mm(product.T, h, out=dw_slice))
        ctx.save_for_backward(dh, dw)
        return total

    @staticmethod
    @attn.first_order
    def backward(ctx, grad):
        dh, dw = ctx.saved_tensors
        return dh * grad.to(dh.dtype), dw * grad, None, None


class DeepSeek(nn.Module):
    """DeepSeek-V3 (or V2) of any size: tokens (B, T) int64 -> logits (B, T, vocab_size).

    Its MTP modules (num_nextn_predict_layers) train it and draft for it; its logits are the same
    without them. Losses read lm_head.weight itself: not an adapter, a bias or a hook there.
    precision "fp8": the products of MLA, FFN and experts are those of chapter 04, but kv_b_proj's,
    which the absorbed form splits by head. ValueError: any other but "bf16".
    """

    Config, Block = DeepSeekConfig, Block

    def __init__(self, config: DeepSeekConfig, precision: str = "bf16"):
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}")
        self.precision, products = precision, PRECISIONS[precision]
        self.config = config
        V, D = config.vocab_size, config.hidden_size
        self.model = nn.Module()  # a level of its own, as in the released names
        self.model.embed_tokens = nn.Embedding(V, D)
        layers = range(config.num_hidden_layers)
        self.model.layers = nn.ModuleList(self.Block(config, i, **products) for i in layers)
        self.model.norm = nn.RMSNorm(D, eps=config.rms_norm_eps)
        self.lm_head = Linear(D, V, bias=False)
        self.mtp = nn.ModuleList(
            mtp.MTPModule(self.Block(config, i, **products), D, config.rms_norm_eps)
            for i in range(layers.stop, layers.stop + config.num_nextn_predict_layers)
        )
        for parameter in self.parameters():
            if parameter.dim() > 1:  # [1] §4.2: all but the norms, experts and router included
                nn.init.normal_(parameter, std=config.initializer_range)

    def forward(self, tokens: Tensor, caches: list | None = None) -> Tensor:
        return self.head(self.hidden(tokens, caches))

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.embed_tokens(tokens)

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm_head(narrow(hidden))

    def hidden(self, tokens: Tensor, caches: list | None = None) -> Tensor:
        """tokens: (B, T) -> the state after the final norm, (B, T, D)."""
        x = self.embed(tokens)  # (B, T, D)
        for layer, block in enumerate(self.model.layers):
            x = block(x, None if caches is None else caches[layer])
        return self.model.norm(x)

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats; tokens, labels: (B, T); labels below 0 are left out."""
        counted = (labels >= 0).sum()
        return self.nats(self.hidden(tokens).flatten(0, 1), labels.flatten()) / counted

    def nats(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Σ −ln p(label) of states (N, D) and labels (N,); labels below 0 are left out."""
        hidden, left_out = narrow(hidden), labels < 0
        if hidden.is_cuda:  # to ask how many they are would be to wait for the GPU
            hidden = hidden.masked_fill(left_out[:, None], 0.0)  # no gradient comes back through 0
        elif left_out.any():
            hidden, labels = hidden[~left_out], labels[~left_out]
        arguments = hidden, self.lm_head.weight, labels, torch.is_grad_enabled()
        return LinearCrossEntropy.apply(*arguments)

    def losses(self, rows: Tensor, mtp_weight: float) -> tuple[Tensor, Tensor]:
        """rows: (B, T + 1) -> the mean cross-entropy of T tokens; the MTP loss, weighted (05)."""
        hidden, labels = self.hidden(rows[:, :-1]), rows[:, 1:]  # (B, T, D), (B, T)
        loss = self.nats(hidden.flatten(0, 1), labels.flatten()) / labels.numel()
        if not self.mtp:
            return loss, loss.new_zeros(())
        end, documents = self.config.eos_token_id, None
        if end is not None:
            documents = (rows == end).cumsum(1)  # END begins a document: this numbers them
        arguments = self.mtp, self.embed, self.head, hidden, rows, mtp_weight, documents
        return loss, mtp.mtp_loss(*arguments, nats=self.nats)

    def mixtures(self) -> list:
        """The main model's MoE layers in order; each remembers the load of its last forward."""
        return [block.mlp for block in self.model.layers if isinstance(block.mlp, moe.MoE)]

    def mtp_mixtures(self) -> list:
        return [module.block.mlp for module in self.mtp if isinstance(module.block.mlp, moe.MoE)]

    def new_caches(self, batch: int, max_tokens: int, layers: int | None = None) -> list:
        """An empty latent cache for every layer, or for so many."""
        weight, sizes = self.lm_head.weight, (batch, max_tokens, *self.cache_widths())
        place = {"device": weight.device, "dtype": narrow(weight[:1]).dtype}
        count = len(self.model.layers) if layers is None else layers
        return [mla.LatentCache(*sizes, **place) for _ in range(count)]

    def cache_widths(self) -> tuple[int, int]:
        """Of a token's entry: the latent, and what stands behind it."""
        return self.config.kv_lora_rank, self.config.qk_rope_head_dim

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0,
        top_p: float = 1.0, eos_token_id: int | list[int] | None = None,
        generator: torch.Generator | None = None, speculative: bool = False,
        listen: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """The tokens after each prompt, through the latent cache; prompts may differ in length.

        temperature 0 takes the likeliest token; top_p < 1 samples from the smallest set of tokens
        that holds so much probability. A row ends with eos_token_id (or one of them; kept) or
        max_new_tokens.
        speculative: the MTP module drafts. Fewer passes, the same text where it is greedy, the same
        distribution where it is drawn (05). listen(row, token) hears each as it is chosen.
        """
        padded, lengths = mtp.padded_prompts(prompts, max_new_tokens, temperature, top_p)
        room, limit = max(lengths) + max_new_tokens, self.config.max_position_embeddings
        if room > limit:
            raise ValueError(f"prompt + new tokens = {room} > max_position_embeddings = {limit}")
        if speculative:
            module = self.mtp[0] if self.mtp else None
            settings = max_new_tokens, temperature, top_p, eos_token_id, generator, listen
            return mtp.speculative_generate(self, module, prompts, *settings)[0]
        device = self.lm_head.weight.device
        last = torch.tensor(lengths, device=device) - 1  # (B,)
        caches = self.new_caches(len(prompts), room)
        states = self.hidden(padded.to(device), caches)[torch.arange(len(last)), last]  # (B, D)
        for cache in caches:
            cache.truncate(last + 1)  # the padding is forgotten
        new, going = [[] for _ in prompts], [max_new_tokens > 0] * len(prompts)
        ends = mtp.ends_of(eos_token_id)
        while any(going):
            chosen = mtp.choose(self.head(states), temperature, top_p, generator)
            for row, token in enumerate(chosen.tolist()):
                if going[row]:
                    new[row].append(token)
                    if listen:
                        listen(row, token)
                    going[row] = token not in ends and len(new[row]) < max_new_tokens
            if any(going):  # rows that have ended run along, unheard
                states = self.hidden(chosen[:, None], caches)[:, 0]
        return new

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each whole beside the old one, then renamed."""
        folder = Path(folder)
        tensors = {n: t.detach().cpu().contiguous() for n, t in released_tensors(self).items()}
        if any(t.dtype == torch.float8_e4m3fn for t in tensors.values()):
            raise ValueError("the model keeps FP8 codes: save_released (08) writes these")
        if self.lm_head.weight is self.model.embed_tokens.weight:  # tied: a file holds both
            tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
        folder.mkdir(parents=True, exist_ok=True)
        for layer in range(len(self.mtp)):
            prefix = f"model.layers.{self.config.num_hidden_layers + layer}."
            shared = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
            tensors |= {prefix + n: t.clone() for n, t in zip(SHARED, shared, strict=True)}
        dtype = str(self.lm_head.weight.dtype).removeprefix("torch.")
        text = json.dumps({**self.config.to_dict(), "torch_dtype": dtype}, indent=1)
        weights = lambda path: save_file(tensors, path, {"format": "pt"})
        save_whole(folder / "model.safetensors", weights)
        save_whole(folder / "config.json", lambda path: path.write_text(text + "\n"))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device="cpu", dtype: torch.dtype | None = None, with_mtp=True
    ) -> "DeepSeek":
        """A model from config.json and *.safetensors with released names (fp32 or bf16 weights).

        dtype None keeps the file's. ValueError lists names that are missing, unexpected or of
        another shape. MTP modules, in the layers after the last (61 in V3), come too, unless
        with_mtp=False; a config that tells of some where the files have none gets a notice.
        """
        folder = Path(folder)
        config = read_config(folder / "config.json", cls.Config.from_dict)
        got, behind, shared = {}, {}, {}
        for file in weight_files(folder):
            try:
                with safe_open(file, "pt", device=str(device)) as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - not a dict
                        if name.endswith(NO_WEIGHT):
                            continue
                        layer = regex.match(r"model\.layers\.(\d+)\.", name)
                        if not layer or int(layer[1]) < config.num_hidden_layers:
                            got[name] = tensors.get_tensor(name)
                        elif with_mtp:
                            part = shared if name.endswith(SHARED) else behind
                            part[name] = tensors.get_tensor(name)
            except (SafetensorError, FileNotFoundError) as error:
                raise ValueError(f"{file} can't be read: {error}") from None
        config = with_or_without_mtp(folder, config, bool(behind), with_mtp)
        drafts = config.num_nextn_predict_layers > 0
        got |= behind if drafts else {}
        for name, tensor in shared.items():
            ours = "model.embed_tokens" if name.endswith(SHARED[0]) else "lm_head"
            if drafts and not torch.equal(tensor, got.get(f"{ours}.weight", tensor)):
                raise ValueError(f"{folder}: {name} is not {ours}.weight, which MTP shares here")
        with torch.device("meta"):
            model = cls(config)
        shapes = ({n: tuple(t.shape) for n, t in d.items()} for d in (got, released_tensors(model)))
        compare_shapes(folder, *shapes)
        if dtype is None:
            dtype = got["lm_head.weight"].dtype
        model.to(dtype).to_empty(device=device)
        with torch.no_grad():
            for name, ours in released_tensors(model).items():  # views of the parameters
                ours.copy_(got.pop(name))
        return model


# %% 3. Checkpoints: the released layout -----------------------------------------------------
# Three things differ: a file has every expert's matrices apart, we stack them for the grouped GEMM;
# an MTP module is a layer after the last, its block's names among its own; and it repeats
SHARED = ("embed_tokens.weight", "shared_head.head.weight")  # which it shares with the model
NO_WEIGHT = ".rotary_emb.inv_freq"  # Kimi K2's files hold it, though it follows from the config
STACKED = regex.compile(r"(.*\.experts)\.(gate_up|down)_proj(?:\.(weight|weight_scale_inv))?")


def released_tensors(model: DeepSeek) -> dict[str, Tensor]:
    """The weights under their released names, without SHARED; views, not copies."""
    found = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("._orig_mod", "")  # of a block that is compiled
        if name.startswith("mtp."):
            _, depth, rest = name.split(".", 2)
            layer = model.config.num_hidden_layers + int(depth)
            name = f"model.layers.{layer}.{rest.removeprefix('block.')}"
        if not (stack := STACKED.fullmatch(name)):
            found[name] = tensor
            continue
        prefix, which, kind = stack.groups("weight")
        names = ("gate", "up") if which == "gate_up" else ("down",)
        for expert, stacked in enumerate(tensor.unbind()):
            for part, short in zip(stacked.chunk(len(names)), names, strict=True):  # gate first
                found[f"{prefix}.{expert}.{short}_proj.{kind}"] = part
    return found


def with_or_without_mtp(folder, config: DeepSeekConfig, found: bool, wanted: bool):
    """The config, its MTP modules left out if not wanted, or unless it and the files have some."""
    told = config.num_nextn_predict_layers
    if wanted and found != bool(told):
        what = "has weights of an MTP module" if found else "has no MTP weights"
        says = f"config.json says num_nextn_predict_layers {told}"
        print(f"notice: {folder.resolve().name} {what}, {says}: main model only", file=sys.stderr)
    return config if wanted and found and told else replace(config, num_nextn_predict_layers=0)


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that an index names, or all *.safetensors."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():  # before an index, which may tell of shards it has replaced
        return [whole]
    files = sorted(folder.glob("*.safetensors"))
    if index.exists():
        try:
            names = json.loads(index.read_text())["weight_map"].values()
            files = sorted(folder / name for name in set(names))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} can't be read: {error!r}") from None
    if not files:
        said = f"{index} names no files" if index.exists() else f"{folder} has no *.safetensors"
        raise ValueError(said)
    return files


def compare_shapes(folder: Path, got: dict[str, tuple], want: dict[str, tuple]) -> None:
    """ValueError lists the tensors that are missing, unexpected or of another shape."""
    shapes = [n for n in want.keys() & got.keys() if want[n] != got[n]]
    wrong = {"missing": want.keys() - got.keys(), "unexpected": got.keys() - want.keys()}
    wrong["of another shape"] = {f"{n} {got[n]}, want {want[n]}" for n in shapes}
    for what, names in wrong.items():
        if names:
            some = ", ".join(sorted(names)[:5])
            raise ValueError(f"{folder}: {len(names)} tensors {what}: {some}")


def save_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`path` holds its old contents or all of the new ones, also when the disk fills up."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another run may write it too
    try:
        fresh.touch()
        mode = fresh.stat().st_mode
        write(fresh)
        fresh.chmod(mode)  # what safetensors writes is for its owner alone
        os.replace(fresh, path)
    except SafetensorError as error:  # a full disk, in the words of safetensors
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        fresh.unlink(missing_ok=True)


def read_config(path: Path, make: Callable[[dict], DeepSeekConfig]) -> DeepSeekConfig:
    """make(what a config.json holds). ValueError names the file."""
    try:
        raw = json.loads(path.read_text("utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"want an object, got {str(raw)[:40]}")
        return make(raw)
    except (OSError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


# %% 4. Sizes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How to train: one learning rate cycle over `steps` (or over --minutes)."""

    steps: int
    context: int  # tokens of a sequence
    batch_size: int  # sequences of a forward pass
    accumulate: int = 1  # passes of a step
    learning_rate: float = 2.2e-4
    warmup: float = 0.05  # share of the run; then constant, then a cosine down to `final`
    decay: float = 0.6  # share of the run
    final: float = 0.02  # of learning_rate
    weight_decay: float = 0.1  # of matrices
    bias_update_speed: float = 0.001  # γ; falls with the learning rate
    balance_alpha: float = 1e-4
    mtp_weight: float = 0.3  # λ; a third of it for the last third of the run [1] §4.2

    def scale(self, done: float) -> float:
        """The learning rate's factor when a share `done` of the run lies behind."""
        if done < self.warmup:
            return min(max(done, 1e-3) / self.warmup, 1.0)
        left = min((1 - done) / self.decay, 1.0)  # 1 until the decay begins
        return self.final + (1 - self.final) * (1 - math.cos(math.pi * left)) / 2

    def mtp_weight_at(self, done: float) -> float:
        return self.mtp_weight if done < 2 / 3 else self.mtp_weight / 3


V3_YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
    "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
V2_LITE = DeepSeekConfig(
    vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
    num_hidden_layers=27, first_k_dense_replace=1, num_attention_heads=16, q_lora_rank=None,
    n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, n_group=1, topk_group=1,
    topk_method="greedy", scoring_func="softmax", norm_topk_prob=False, routed_scaling_factor=1.0,
    rope_scaling={**V3_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    max_position_embeddings=163840, bos_token_id=100000, eos_token_id=100001,
)  # fmt: skip
NANO = DeepSeekConfig(
    vocab_size=4096, hidden_size=128, intermediate_size=384, moe_intermediate_size=128,
    num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=4, q_lora_rank=None,
    kv_lora_rank=48, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16,
    num_experts_per_tok=2, n_group=1, topk_group=1, routed_scaling_factor=1.0,
    num_nextn_predict_layers=1, initializer_range=0.04, bos_token_id=4095, eos_token_id=4095,
)  # fmt: skip
MINI = replace(
    NANO, vocab_size=16384, hidden_size=512, intermediate_size=1536, moe_intermediate_size=256,
    num_hidden_layers=8, num_attention_heads=8, q_lora_rank=256, kv_lora_rank=128,
    qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=32,
    num_experts_per_tok=4, initializer_range=0.02, bos_token_id=16383, eos_token_id=16383,
)  # fmt: skip
SMALL = replace(
    MINI, vocab_size=32768, hidden_size=1024, intermediate_size=3072, moe_intermediate_size=512,
    num_hidden_layers=16, num_attention_heads=16, q_lora_rank=512, kv_lora_rank=256,
    n_routed_experts=64, num_experts_per_tok=6, n_group=8, topk_group=4,
    routed_scaling_factor=2.5, initializer_range=0.015, bos_token_id=32767, eos_token_id=32767,
)  # fmt: skip
V3 = DeepSeekConfig(
    rope_scaling=V3_YARN, max_position_embeddings=163840, num_nextn_predict_layers=1
)  # fmt: skip
PRESETS = {
    "nano": (NANO, Recipe(1000, 256, 8, learning_rate=5e-3, bias_update_speed=0.003)),
    "mini": (MINI, Recipe(4000, 1024, 16, learning_rate=1.5e-3)),
    "small": (SMALL, Recipe(40_000, 2048, 16, accumulate=2, learning_rate=6e-4)),
    "v2-lite": (V2_LITE, None),  # trained on clusters: here for their sizes
    "v3": (V3, None),
}
QUICK = replace(
    NANO, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2,
    vocab_size=512, n_routed_experts=8, kv_lora_rank=32, bos_token_id=511, eos_token_id=511,
)  # fmt: skip


# %% 5. The tokenizer: byte-level BPE from scratch -------------------------------------------
# A chunk is what a token may never cross. The first alternative is for code: a line's end and the
# indentation after it are one chunk, so before long they are one token.
CHUNKS = (
    r"""\s*[\r\n]+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
)
END = "<|endoftext|>"  # before every document: the first thing a model sees, and where it stops


def train_bpe(texts: Iterable[str], vocab_size: int) -> list[bytes]:
    """The tokens of byte pair encoding (arXiv:1508.07909), in the order of their ids, bytes first.

    Again and again the most frequent pair of neighbours becomes a token; of equals, the one with
    the smaller ids. Only words that hold the pair are touched; a heap knows which pair leads.
    ValueError: vocab_size below the 256 bytes.
    """
    if vocab_size < 256:
        raise ValueError(f"want vocab_size of 256 bytes or more, got {vocab_size}")
    chunks = Counter()
    for text in texts:
        chunks.update(regex.findall(CHUNKS, text))
    words, copies = [list(chunk.encode()) for chunk in chunks], list(chunks.values())
    tokens = [bytes([byte]) for byte in range(256)]
    count, found_in = Counter(), defaultdict(set)  # pair -> how often; in which words
    for w, word in enumerate(words):
        for pair in zip(word, word[1:], strict=False):
            count[pair] += copies[w]
            found_in[pair].add(w)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size:
        negative, pair = heapq.heappop(heap)
        if -negative != count[pair]:  # its count fell since it was pushed
            if count[pair] > 0:
                heapq.heappush(heap, (-count[pair], pair))
            continue
        changes = Counter()
        for w in found_in.pop(pair):
            merged = merge(words[w], pair, len(tokens))
            for old in zip(words[w], words[w][1:], strict=False):
                changes[old] -= copies[w]
            for new in zip(merged, merged[1:], strict=False):
                changes[new] += copies[w]
                found_in[new].add(w)
            words[w] = merged
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for other, change in changes.items():
            count[other] += change
            if change > 0:
                heapq.heappush(heap, (-count[other], other))
    return tokens


def merge(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """[1, 2, 1, 2, 3], (1, 2), 9 -> [9, 9, 3]"""
    merged, i = [], 0
    while i < len(word):
        hit = word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]
        merged.append(new if hit else word[i])
        i += 2 if hit else 1
    return merged


def encoding_of(tokens: list[bytes]) -> tiktoken.Encoding:
    """A tiktoken.Encoding of these tokens, and END after them."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {END: len(tokens)}
    return tiktoken.Encoding("bpe", pat_str=CHUNKS, mergeable_ranks=ranks, special_tokens=special)


def save_encoding(encoding: tiktoken.Encoding, path: Path) -> None:
    """One JSON file with all that load_encoding needs. ValueError: another kind of encoding."""
    if type(encoding) is not tiktoken.Encoding:
        raise ValueError(f"{path}: no place for the cuts of a {type(encoding).__name__}")
    rank = encoding.encode_single_token
    ranks = {base64.b64encode(t).decode(): rank(t) for t in encoding.token_byte_values()}
    special = {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set}
    raw = {"pat_str": encoding._pat_str, "special_tokens": special, "mergeable_ranks": ranks}
    save_whole(path, lambda fresh: fresh.write_text(json.dumps(raw)))


def load_encoding(path: Path) -> tiktoken.Encoding:
    try:
        raw = json.loads(path.read_text())
        ranks = {base64.b64decode(t): rank for t, rank in raw.pop("mergeable_ranks").items()}
        # what tiktoken would panic at
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise ValueError(f"byte {missing[0]} is no token")
        ids = [*ranks.values(), *raw["special_tokens"].values()]
        if len(set(ids)) < len(ids):
            raise ValueError("an id stands for two tokens")
        if not raw["pat_str"]:
            raise ValueError("an empty pattern")
        return tiktoken.Encoding(path.stem, mergeable_ranks=ranks, **raw)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is no tokenizer of ours: {error}") from None


MOST = 100_000  # characters of a run without a chunk's end: of a million tiktoken panics
LONG_RUNS = regex.compile(
    "|".join(rf"(?<!{c}){c}{{{MOST},}}" for c in (r"\p{L}", r"\s", r"[^\s\p{L}\p{N}]"))
)


def encode_bytes(encoding: tiktoken.Encoding, data: bytes) -> list[int]:
    """Tokens whose decode_bytes is exactly `data`: what is no UTF-8 goes byte by byte."""
    tokens = []
    parts = regex.split(r"([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape"))
    for number, part in enumerate(parts):
        if number % 2:  # bytes, one a surrogate
            bad = part.encode("utf-8", "surrogateescape")
            tokens += [encoding.encode_single_token(bytes([byte])) for byte in bad]
            continue
        runs = LONG_RUNS.finditer(part) if len(part) >= MOST else ()
        cuts = [i for run in runs for i in range(run.start() + MOST, run.end(), MOST)]
        for begin, end in itertools.pairwise([0, *cuts, len(part)]):
            tokens += encoding.encode_ordinary(part[begin:end])
    return tokens


# %% 6. The data: text that every machine has ------------------------------------------------
# Left out of the standard library: tests and demos (2.5 times the rest), tables of characters,
# and site-packages, which is not part of it.
NOT_LIBRARY = {"test", "tests", "idlelib", "idle_test", "lib2to3", "encodings", "site-packages"}
NOT_LIBRARY |= {"dist-packages", "ensurepip", "turtledemo", "pydoc_data", "__pycache__"}
SUFFIXES = {".txt", ".md", ".py", ".jsonl"}
HELD_OUT_SHARE, HELD_OUT_LIMIT = 1 / 20, 2_000_000  # of the bytes; bytes


def library_files(packages: bool) -> list[Path]:
    """The .py files of Python's standard library; with `packages` also all that is installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    kept = [p for p in root.rglob("*.py") if not NOT_LIBRARY & set(p.relative_to(root).parts)]
    if packages:
        kept += Path(sysconfig.get_paths()["purelib"]).rglob("*.py")
    return sorted(p for p in kept if p.is_file())


def read_documents(source: Path | None, packages: bool = False) -> list[bytes]:
    """Documents, each content once: of a file or folder of .txt, .md, .py, .jsonl ("text" fields).

    source None: the standard library. Where one document is over a twentieth of all (a book), the
    long ones are cut at line ends, so that whole pieces can be held out.
    """
    if source is None:
        files = library_files(packages)
    elif source.is_dir():
        files = (p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        of_a_run = lambda p: any((q / "run.json").exists() for q in p.parents[:2])
        files = sorted(p for p in files if p.name != "metrics.jsonl" or not of_a_run(p))
    elif source.is_file():
        files = [source]
    else:
        raise ValueError(f"--data {source}: no such file or folder")
    documents = []
    for file in files:
        raw, kind = file.read_bytes(), file.suffix.lower()
        if kind not in SUFFIXES and b"\0" in raw:  # packed, or UTF-16
            raise ValueError(f"--data {file}: no UTF-8 text, there are zero bytes in it")
        documents += [raw] if kind != ".jsonl" else jsonl_texts(file, raw)
    once = lambda documents: list(dict.fromkeys(d for d in documents if d))  # in their order
    documents = once(documents)
    total = sum(map(len, documents))
    if max(map(len, documents), default=0) > HELD_OUT_SHARE * total:
        pieces = (cut(document, max(2048, total // 80)) for document in documents)
        documents = once(itertools.chain.from_iterable(pieces))
    if len(documents) < 2:
        kinds = ", ".join(sorted(SUFFIXES))
        want = f"want {kinds}, over 4 KB in all without what is repeated"
        raise ValueError(f"--data {source}: no text to train on ({want})")
    return documents


def jsonl_texts(file: Path, raw: bytes) -> Iterator[bytes]:
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)["text"].encode("utf-8", "replace")  # half a surrogate pair
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f'{file}, line {number}: want {{"text": "…"}}') from None


def cut(document: bytes, size: int) -> Iterator[bytes]:
    """Pieces of `size` bytes, or up to twice as many to reach the end of a line."""
    while document:
        end = document.find(b"\n", size, 2 * size) + 1 or 2 * size
        yield document[:end]
        document = document[end:]


def split_documents(documents: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Train and held-out, by content: the held-out ones are first in the order of their hashes."""
    ranked = sorted(documents, key=lambda document: hashlib.sha256(document).digest())
    totals = list(itertools.accumulate(map(len, ranked)))
    want = min(HELD_OUT_SHARE * totals[-1], HELD_OUT_LIMIT)
    count = min(bisect.bisect_left(totals, want) + 1, len(ranked) - 1)
    return ranked[count:], ranked[:count]


@dataclass
class Corpus:
    """Token streams, END before every document, and what they were made of."""

    encoding: tiktoken.Encoding
    train: np.ndarray  # uint16, or uint32 for a large vocabulary; memory-mapped
    held_out: np.ndarray
    held_out_bytes: int
    rivals: dict[str, float]  # bits per byte of the held-out documents
    folder: Path


FILES = "encoding.json", "train", "held_out"  # and rivals.json, last, with their sizes


def intact(folder: Path) -> bool:
    """Has `prepare` written all there is, and is it still as long?"""
    try:
        sizes = json.loads((folder / "rivals.json").read_text())["sizes"]
        return all((folder / name).stat().st_size == sizes[name] for name in FILES)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def digest_of(documents: list[bytes], vocabulary: int | str) -> str:
    """The name of the folder of their tokens."""
    digest = hashlib.sha256(f"{vocabulary} {CHUNKS} {HELD_OUT_SHARE} {HELD_OUT_LIMIT}".encode())
    for document in documents:
        digest.update(hashlib.sha256(document).digest())
    return f"data-{digest.hexdigest()[:12]}"


def prepare(documents: list[bytes], vocabulary: int | str, cache: Path) -> Corpus:
    """Tokenizer, token files and compressors' results, kept under `cache` for the same documents.

    vocabulary: the size of a tokenizer trained here on the training part, or the name of one of
    tiktoken's encodings (its vocabulary is fetched from the network by tiktoken, if not cached).
    """
    folder = cache / digest_of(documents, vocabulary)
    train, held_out = split_documents(documents)
    if not intact(folder):
        rivals = in_background(compressors, b"".join(train), b"".join(held_out))
        if isinstance(vocabulary, int):
            texts = (document.decode("utf-8", "replace") for document in train)
            encoding = encoding_of(train_bpe(texts, vocabulary - 1))
        else:
            encoding = named_encoding(vocabulary)
        folder.mkdir(parents=True, exist_ok=True)
        save_encoding(encoding, folder / "encoding.json")
        for name, part in ("train", train), ("held_out", held_out):
            save_whole(folder / name, lambda path, part=part: write_tokens(encoding, part, path))
        sizes = {name: (folder / name).stat().st_size for name in FILES}
        text = json.dumps({"rivals": rivals.result(), "sizes": sizes})
        save_whole(folder / "rivals.json", lambda path: path.write_text(text))
    encoding = load_encoding(folder / "encoding.json")
    streams = (np.memmap(folder / name, token_dtype(encoding), "r") for name in FILES[1:])
    rivals = json.loads((folder / "rivals.json").read_text())["rivals"]
    return Corpus(encoding, *streams, sum(map(len, held_out)), rivals, folder)


def token_dtype(encoding: tiktoken.Encoding) -> type:
    return np.uint16 if encoding.n_vocab <= 2**16 else np.uint32


def write_tokens(encoding: tiktoken.Encoding, documents: list[bytes], path: Path) -> None:
    end = encoding.encode_single_token(END)
    with path.open("wb") as file:
        for document in documents:
            np.array([end, *encode_bytes(encoding, document)], token_dtype(encoding)).tofile(file)


def spelled(encoding: tiktoken.Encoding, tokens: Iterable[int]) -> str:
    """Their text; an id that a named encoding gives to no token is U+FFFD."""

    def one(token: int) -> bytes:
        try:
            return encoding.decode_single_token_bytes(token)
        except KeyError:
            return "\ufffd".encode()

    return b"".join(map(one, tokens)).decode("utf-8", "replace")


def named_encoding(name: str) -> tiktoken.Encoding:
    try:
        encoding = tiktoken.get_encoding(name)
        encoding.encode_single_token(END)
        return encoding
    except KeyError:
        raise ValueError(f"--encoding {name} has no {END}") from None
    except Exception as error:  # an unknown name, or whatever the network library raises
        reason = (str(error) or repr(error)).splitlines()[0][:100]
        raise ValueError(f"--encoding {name} can't be had: {reason}") from None


def compressors(train: bytes, held_out: bytes) -> dict[str, float]:
    """Bits per byte of the held-out text; the last one has read the training text first."""
    import lzma  # not every Python was built with it, and only this needs it

    bits = 8 / len(held_out)
    xz = lambda data: len(lzma.compress(data, preset=9))
    seen = train[-60_000_000:]  # what fits into the window of xz -9
    alone = in_background(xz, seen)  # 0.7 GB of memory each
    both = xz(seen + held_out)
    return {
        "gzip": bits * len(gzip.compress(held_out, 9)),
        "xz": bits * xz(held_out),
        "xz_given_training": bits * (both - alone.result()),
    }


def in_background(task: Callable, *arguments) -> Future:
    """What it will return, from a thread that keeps no program from ending."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(task(*arguments))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


# %% 7. Training -----------------------------------------------------------------------------


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 where the hardware multiplies it; a CPU without the instruction is slower with it."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)  # newer than torch 2.11
    if device.type == "cpu" and not capabilities().get("avx512_bf16", False):
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def batches(tokens: np.ndarray, recipe: Recipe, seed: int, skip: int) -> Iterator[Tensor]:
    """(batch_size, context + 1) int64, the same for the same seed; the first `skip` are left out.

    Every epoch cuts the stream at another offset and shuffles the windows. Of several processes
    each gets its `own_rows`.
    """
    own = own_rows(recipe.batch_size)
    windows = (len(tokens) - 1) // recipe.context - 1
    if windows < recipe.batch_size:
        raise ValueError(
            f"the training text has {len(tokens)} tokens, a batch needs "
            f"{(recipe.batch_size + 1) * recipe.context + 1}"
        )
    per_epoch = windows // recipe.batch_size
    for number in itertools.count(skip):
        epoch, place = divmod(number, per_epoch)
        if place == 0 or number == skip:
            rng = np.random.default_rng((seed, epoch))
            offset, order = rng.integers(recipe.context), rng.permutation(windows)
        chosen = order[place * recipe.batch_size :][: recipe.batch_size] * recipe.context + offset
        rows = [tokens[at : at + recipe.context + 1].astype(np.int64) for at in chosen[own]]
        yield torch.from_numpy(np.stack(rows))


def make_optimizer(model: DeepSeek, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}]
    groups += [{"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def training_step(
    model: DeepSeek, optimizer, recipe: Recipe, rows: list[Tensor], scale: float | Tensor,
    mtp_weight: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """One update from `accumulate` batches (B, T + 1) -> mean loss (nats; NaN too where a gradient
    is no number), mean MTP loss, weighted, loads (layers, E), those of the MTP modules last: all of
    them over all processes."""
    device, mixtures = model.lm_head.weight.device, model.mixtures() + model.mtp_mixtures()
    if not model.training:  # its mixtures would count no load
        raise ValueError("want a model in training: model.train()")
    losses, loads = 0.0, 0
    for part in rows:
        part = part.to(device, non_blocking=True)
        with autocast(device):
            both = torch.stack(model.losses(part, mtp_weight))  # of the next token; the MTP loss
            balance = sum(m.balance_loss for m in mixtures)
        ((both.sum() + recipe.balance_alpha * balance) / len(rows)).backward()
        losses = losses + both.detach() / len(rows)
        loads = loads + torch.stack([m.load for m in mixtures]) if mixtures else None
    losses, loads = over_ranks(losses, "mean"), over_ranks(loads, "sum")
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate * scale
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()
    optimizer.zero_grad()
    for mixture, load in zip(mixtures, loads if mixtures else (), strict=True):
        if mixture.gate.e_score_correction_bias is not None:
            mixture.gate.update_bias(load, recipe.bias_update_speed * scale)
    return *(losses + 0 * norm), loads  # 0 · norm: NaN where the norm is no finite number, else 0


class GraphedStep:
    """`training_step` on one GPU: after a few calls it is recorded as a CUDA graph and replayed.

    A step is thousands of kernels of some µs each, and Python takes longer to launch one than most
    of them run. A replay launches all at once. What it reads has a place of its own: the rows, the
    learning rate's factor and the MTP loss's weight. What it returns, the next call overwrites.
    """

    WARM_UP = 3  # calls that make the optimizer's state, and compile what is left to compile

    def __init__(self, model: DeepSeek, optimizer, recipe: Recipe):
        self.arguments, self.graph, self.calls = (model, optimizer, recipe), None, 0
        device, size = model.lm_head.weight.device, (recipe.batch_size, recipe.context + 1)
        make = partial(torch.zeros, device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.rows = [make(size, dtype=torch.int64) for _ in range(recipe.accumulate)]
        self.scale, self.mtp_weight = make(()), make(())

    def __call__(self, rows: list[Tensor], scale: float, mtp_weight: float) -> tuple:
        for place, part in zip(self.rows, rows, strict=True):
            place.copy_(part)
        self.scale.fill_(scale)
        self.mtp_weight.fill_(mtp_weight)
        self.calls += 1
        if self.graph is None:
            if self.calls <= self.WARM_UP:
                with self.aside():
                    return self.step()
            for group in self.arguments[1].param_groups:
                group["capturable"] = True  # its step count and learning rate are on the GPU
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self.out = self.step()
            self.graph = graph
        self.graph.replay()
        return self.out

    def step(self) -> tuple:
        return training_step(*self.arguments, self.rows, self.scale, self.mtp_weight)

    def compile(self) -> float:
        """Seconds of a first step, made by a copy of the model: no minute of training is spent on
        compiling kernels and choosing their tiles."""
        begin, (model, _, recipe) = time.perf_counter(), self.arguments
        other = copy.deepcopy(model)
        rows = [part.random_(model.config.vocab_size) for part in self.rows]
        nothing = torch.optim.SGD([nn.Parameter(torch.zeros(()))])  # moments would take memory
        with self.aside():
            training_step(other, nothing, recipe, rows, self.scale, self.mtp_weight)[0].item()
        return time.perf_counter() - begin

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """On the stream to be recorded: gradients add up on that which first used the weight."""
        if self.stream is None:  # a CPU
            yield
            return
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)


def stepper(model: DeepSeek, optimizer, recipe: Recipe) -> Callable[..., tuple]:
    """(rows, scale, mtp_weight) -> what `training_step` returns: recorded where it can be."""
    graphed = moe.has_kernels(model.lm_head.weight) and model.precision == "bf16"
    if graphed and rank_and_size()[1] == 1:
        return GraphedStep(model, optimizer, recipe)
    # FP8's products, processes that share weights, a GPU without Triton: they wait for its numbers
    return partial(training_step, model, optimizer, recipe)


@torch.no_grad()
def evaluate(model: DeepSeek, tokens: np.ndarray, context: int, stride: int):
    """Σ −ln p of tokens[1:], each predicted once, and the load (layers, E) it put on the experts.

    Windows of `context` tokens, `stride` apart: every token, but for those at the very beginning of
    the text, is predicted from at least context − stride tokens before it. ValueError: a stride
    that leaves some out, or nothing to predict.
    """
    if not 0 < stride <= context or len(tokens) < 2:
        got = f"{stride}, {context} and {len(tokens)} tokens"
        raise ValueError(f"want 0 < stride <= context and 2 tokens or more, got {got}")
    training = model.training
    model.eval()
    device, nats, loads = model.lm_head.weight.device, 0.0, 0
    starts = range(0, max(len(tokens) - 1 - (context - stride), 1), stride)
    full = [start for start in starts if start + context < len(tokens)]
    rows = max(1, 8192 // context)
    groups = [full[i : i + rows] for i in range(0, len(full), rows)]
    for group in groups + [[start] for start in starts[len(full) :]]:
        windows = np.stack([tokens[s : s + context + 1] for s in group]).astype(np.int64)
        part = torch.from_numpy(windows).to(device)
        labels = part[:, 1:].clone()
        first = int(group[0] == 0)  # of the others the window before has predicted these
        labels[first:, : context - stride] = -100
        with autocast(device):
            loss = model.loss(part[:, :-1], labels)
        nats += loss.item() * int((labels != -100).sum())
        if mixtures := model.mixtures():
            loads = loads + torch.stack([m.load for m in mixtures])
    model.train(training)
    return nats, loads


def checkpoint_of(folder: Path) -> Path:
    """Of the folder of a run, of this chapter or of 07; any other folder is one itself."""
    stages = folder, folder / "rl-again", folder / "rl"
    names = "checkpoint", "checkpoint.old"  # .old: killed between two renames
    found = (stage / name for stage in stages for name in names if (stage / name).exists())
    return next(found, folder)


class Run:
    """The folder of one training run: run.json, metrics.jsonl, checkpoint/, curves.png, lock."""

    def __init__(self, folder: Path):
        self.folder, self.checkpoint = folder, folder / "checkpoint"

    def log(self, **metrics) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def metrics(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]  # else cut by a kill
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    def saved(self) -> bool:
        return self.checkpoint.exists() or (self.folder / "checkpoint.old").exists()

    def is_young(self) -> bool:
        """Killed before its first checkpoint, which follows the first probe of held-out text."""
        return not self.saved() and not any("held_out_loss" in e for e in self.metrics()[:-1])

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that no checkpoint has kept."""
        kept = [json.dumps(entry) + "\n" for entry in self.metrics() if entry["step"] <= step]
        save_whole(self.folder / "metrics.jsonl", lambda path: path.write_text("".join(kept)))

    def save(self, model: DeepSeek, optimizer, encoding: tiktoken.Encoding, state: dict) -> None:
        """checkpoint/ is the model as save_pretrained writes it, its tokenizer, and training/.

        Written whole beside the last one, which it then replaces: a kill costs at most the new one.
        Of several processes the first writes, and all must call.
        """
        fresh, old = self.folder / "checkpoint.tmp", self.folder / "checkpoint.old"
        plain, moments, first = gathered(model), {}, not rank_and_size()[0]
        names = {id(p): name for name, p in model.named_parameters()}
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                value = whole(value.detach())
                if first:
                    moments[f"{names[id(parameter)]}:{key}"] = value.cpu()
        if not first:
            return
        shutil.rmtree(fresh, ignore_errors=True)
        plain.save_pretrained(fresh)
        save_encoding(encoding, fresh / "encoding.json")
        (fresh / "training").mkdir()
        save_whole(fresh / "training/optimizer.safetensors", lambda path: save_file(moments, path))
        (fresh / "training/state.json").write_text(json.dumps(state))
        if self.checkpoint.exists():
            shutil.rmtree(old, ignore_errors=True)  # left by a kill below
            os.replace(self.checkpoint, old)
        os.replace(fresh, self.checkpoint)
        shutil.rmtree(old, ignore_errors=True)

    def restore(self, model: DeepSeek, optimizer) -> dict:
        """Weights and moments into place -> the state that was saved beside them."""
        with first_rank_first():
            if not self.checkpoint.exists() and (self.folder / "checkpoint.old").exists():
                # killed between renames
                os.replace(self.folder / "checkpoint.old", self.checkpoint)
        saved = DeepSeek.from_pretrained(self.checkpoint)
        if saved.config != model.config:
            raise ValueError(f"{self.checkpoint} holds a model of another config")
        weights = saved.state_dict()
        with torch.no_grad():
            for name, ours in model.state_dict().items():
                ours.copy_(part_of(weights[name], ours))
        try:
            with safe_open(self.checkpoint / "training/optimizer.safetensors", "pt") as file:
                # copies, not the mapped file: the next save deletes it
                moments = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            state = json.loads((self.checkpoint / "training/state.json").read_text())
            state = {"step": int(state["step"]), "seconds": float(state["seconds"])}
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.checkpoint} can't be resumed: {error}") from None
        for name, parameter in model.named_parameters():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}:{key}" in moments]
            if len(keys) in (1, 2):
                raise ValueError(f"{self.checkpoint} can't be resumed: {name} lacks moments")
            if keys:  # else it was never trained
                optimizer.state[parameter] = {
                    key: part_of(moments[f"{name}:{key}"], parameter) for key in keys
                }
        return state


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """ValueError while another process trains there: each would undo what the other saves."""
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder}: another process is training there") from None
    except (OSError, NotImplementedError):  # a file system that knows no locks
        pass
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def interrupts() -> Iterator[list]:
    """A list that Ctrl-C and SIGTERM (a cluster's) fill, so that no step is cut in two. One a
    second later kills as ever; at once the same may come from a shell and from torchrun."""
    seen, before, times = [], {}, []

    def note(number, frame):
        seen.append(number)
        times.append(time.monotonic())
        if times[-1] > times[0] + 1:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for number in signal.SIGINT, signal.SIGTERM:
        if signal.getsignal(number) is signal.SIG_IGN:  # as a shell's & may ask for
            continue
        before[number] = signal.signal(number, note) or signal.SIG_DFL  # None: not Python's
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


LOWER = "lower the recipe's learning_rate (a checkpoint, if there is one, is of an earlier step)"


def train(
    model: DeepSeek, corpus: Corpus, recipe: Recipe, folder: Path, seed: int = 0,
    minutes: float | None = None, resume: bool = False, reports: int = 8,
) -> dict:  # fmt: skip
    """Train in place, logging into `folder` -> {"step", "seconds", "tokens"}.

    minutes: run the same schedule over so much training time instead of recipe.steps. Ctrl-C or
    SIGTERM ends the step, saves, and raises KeyboardInterrupt; resume=True goes on as if nothing
    had happened, from the last checkpoint or from the beginning. Checkpoints: eight, and one after
    ten minutes without. ValueError: a folder that holds a run already.
    """
    run, optimizer = Run(folder), make_optimizer(model, recipe)
    state, rank, stop = {"step": 0, "seconds": 0.0}, rank_and_size()[0], False
    if not resume and not rank and (run.saved() or (folder / "metrics.jsonl").exists()):
        raise ValueError(f"{folder} holds a run already: resume=True, or another folder")
    if resume and not run.is_young():
        state = run.restore(model, optimizer)
    folder.mkdir(parents=True, exist_ok=True)
    if resume and not rank:
        run.forget_after(state["step"])
    rows = batches(corpus.train, recipe, seed, state["step"] * recipe.accumulate)
    per_step = recipe.batch_size * recipe.context * recipe.accumulate
    share = lambda: state["seconds"] / 60 / minutes if minutes else state["step"] / recipe.steps
    device = model.lm_head.weight.device
    agreed = lambda own: over_ranks(torch.tensor(float(own), device=device), "mean").item()
    # a slice of the held-out text for the curve; all of it is read once, at the end
    probe = corpus.held_out[: 32 * recipe.context + 1]
    run_step = stepper(model, optimizer, recipe)
    model.train()
    if isinstance(run_step, GraphedStep):
        print(f"kernels  compiled and timed, {run_step.compile():.0f} s", flush=True)
    reported, saved = int(share() * reports), state["seconds"]
    total = None if minutes else recipe.steps
    shown = {"total": total, "initial": state["step"], "unit": "step", "dynamic_ncols": True}
    with tqdm(**shown, disable=rank > 0 or not sys.stderr) as bar, interrupts() as interrupted:
        while share() < 1 and not stop:
            begin, scale = time.perf_counter(), recipe.scale(share())
            parts = [next(rows) for _ in range(recipe.accumulate)]
            weight = recipe.mtp_weight_at(share())
            loss, drafting, loads = run_step(parts, scale, weight)
            loss = loss.item()  # waits for the device
            if not math.isfinite(loss):
                said = f"the loss or a gradient is no number at step {state['step'] + 1}"
                raise ValueError(f"{said}: {LOWER}")
            state["step"] += 1
            state["seconds"] += agreed(time.perf_counter() - begin)
            entry = {"step": state["step"], "loss": loss, "seconds": state["seconds"]}
            if model.mtp and weight:
                entry["mtp_loss"] = float(drafting) / weight  # by T, as in the paper, not T − 1
            if loads is not None:
                entry["max_violation"] = moe.max_violation(loads).tolist()
            speed = per_step * state["step"] / state["seconds"]
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
            due = int(share() * reports) > reported
            if due:
                reported = int(share() * reports)
                nats, _ = evaluate(model, probe, recipe.context, recipe.context)
                if not math.isfinite(nats):
                    raise ValueError(f"held-out loss {nats} after step {state['step']}: {LOWER}")
                entry["held_out_loss"] = nats / (len(probe) - 1)
            if not rank:
                run.log(**entry)
            stop = agreed(bool(interrupted)) > 0
            if due or stop or state["seconds"] > saved + 600:
                run.save(model, optimizer, corpus.encoding, state)
                saved = state["seconds"]
    if agreed(bool(interrupted)) > 0:
        raise KeyboardInterrupt
    return state | {"tokens": state["step"] * per_step}


# %% 8. More than one GPU --------------------------------------------------------------------
# torchrun starts this file N times. Each process keeps an Nth of every weight, gradient and moment,
# gathers a layer's weights while it computes with them (FSDP2), and reads an Nth of a batch's rows.
# So it is the run that one process would make, step by step, with the same checkpoints: either goes
# on with what the other has left.


def rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_rows(batch_size: int) -> slice:
    """This process's rows of a batch. ValueError: they don't come out even."""
    rank, ranks = rank_and_size()
    if batch_size % ranks:
        raise ValueError(f"a batch of {batch_size} rows can't be shared by {ranks} processes")
    return slice(rank, None, ranks)


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """The others come in when the first has left: they find the files that it wrote."""
    rank, ranks = rank_and_size()
    if rank:
        dist.barrier()
    yield
    if ranks > 1 and not rank:
        dist.barrier()


@contextlib.contextmanager
def processes(args: argparse.Namespace) -> Iterator[None]:
    """Under torchrun, of more than one: a GPU for each, and one that speaks for all."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    backend = "nccl" if args.device.startswith("cuda") else "gloo"
    # the others wait while the first prepares the data: of a gigabyte that takes an hour
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=3))
    with contextlib.redirect_stdout(io.StringIO() if dist.get_rank() else sys.stdout):
        yield
    dist.destroy_process_group()


def over_ranks(value, how: str):
    """The "sum" or "mean" of a tensor over all processes; of anything else, or alone, itself."""
    ranks = rank_and_size()[1]
    if ranks == 1 or not isinstance(value, Tensor):
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / ranks if how == "mean" else value


def shard(model: DeepSeek) -> None:
    """In place; all processes must hold the same weights. One alone stays as it is. What is sharded
    trains and is evaluated, and `gathered` gives the model that generates."""
    ranks = rank_and_size()[1]
    if ranks == 1:
        return
    mesh = init_device_mesh(model.lm_head.weight.device.type, (ranks,))
    for part in (*model.model.layers, *model.mtp, model):
        fully_shard(part, mesh=mesh)
    for name in ("losses", "loss"):  # what is called instead of forward
        register_fsdp_forward_method(model, name)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, place: Tensor) -> Tensor:
    """What this process holds of a tensor, laid out as `place` is; a single number stays whole."""
    tensor = tensor.to(place.device)
    if not isinstance(place, DTensor) or not tensor.dim():
        return tensor
    return distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None)


def gathered(model: DeepSeek) -> DeepSeek | None:
    """The model; a sharded one as a whole one on the CPU of the first process: all must ask."""
    if not isinstance(model, FSDPModule):
        return model
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = whole(tensor)
        if not rank_and_size()[0]:
            tensors[name] = tensor.cpu()
    if not tensors:
        return None
    with torch.device("meta"):
        plain = DeepSeek(model.config, model.precision)
    plain.load_state_dict(tensors, assign=True)
    return plain


# %% 9. The receipt: what came out, beside what else compresses ------------------------------


def verify_sizes() -> None:
    """The released models, instantiated without memory: their parameters, to the unit."""
    count = lambda module: sum(tensor.numel() for tensor in module.state_dict().values())
    for name, *want in ("v2-lite", 15_706_484_224, 0), ("v3", 671_026_419_200, 11_610_068_224):
        with torch.device("meta"):
            model = DeepSeek(PRESETS[name][0])
        got = [count(model) - count(model.mtp), count(model.mtp)]
        text = f"parameters of {name} = {want[0]:,}"  # the routers' biases included
        check(text, torch.tensor(got), torch.tensor(want), 0)


@torch.no_grad()
def verify_model(model: DeepSeek, tokens: Tensor) -> None:
    """tokens: (2, T). The loss that never holds the logits; decoding through the caches."""
    model.eval()
    logits = model(tokens[:, :-1])  # (2, T − 1, V)
    want = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    check("loss by slices = cross_entropy of the logits", loss, want, 1e-5)  # fp32, nats of ~5
    caches = model.new_caches(2, tokens.shape[1])
    sizes = [8, *[1] * (tokens.shape[1] - 9)]
    parts = [model(part, caches) for part in tokens[:, :-1].split(sizes, dim=1)]
    # fp32, of order 1; where the last bit of an activation decides between two codes of FP8, 3 %
    # of it, that is seen in the logits
    tol = 1e-4 if model.precision == "bf16" else 0.1
    check("prefill + cached decode = one pass", torch.cat(parts, 1), logits, tol)


def report(model: DeepSeek, corpus: Corpus, recipe: Recipe, run: Run, trained: dict) -> None:
    """All the measures of a finished run, its figure, and a few lines that it wrote."""
    model.eval()
    begin = time.perf_counter()
    stride = recipe.context // 2
    nats, loads = evaluate(model, corpus.held_out, recipe.context, stride)
    bits = nats / math.log(2) / corpus.held_out_bytes
    seconds = time.perf_counter() - begin
    text = f"bit/byte over all {corpus.held_out_bytes:,} bytes; fewer are better"
    measure("heldout_bits_per_byte", bits, text)
    for name, value in corpus.rivals.items():
        measure(f"{name}_bits_per_byte", value, "bit/byte, same bytes")
    measure("tokens_per_second", trained["tokens"] / trained["seconds"], "in training steps alone")
    measure("trained_tokens", trained["tokens"], f"of {len(corpus.train):,} in the training text")
    if model.mixtures():
        worst = moe.max_violation(loads).max().item()
        most = model.config.n_routed_experts / model.config.num_experts_per_tok - 1
        text = f"held-out text, worst layer; 0: even, {most:g}: the worst there is"
        measure("max_violation", worst, text)
    measure("evaluation_seconds", seconds, f"s, every token with at least {stride} before it")
    if model.mtp:
        report_drafts(model, corpus)
    if run.metrics():
        draw(run, corpus, bits, len(model.mixtures()))
        print(f"figure   {run.folder / 'curves.png'}")
    prompt = "def "
    tokens = [corpus.encoding.encode_single_token(END), *corpus.encoding.encode(prompt)]
    end = model.config.eos_token_id
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(0)
    [written] = model.generate([tokens], 120, 0.7, 0.95, end, generator)
    print(f"sample   (T = 0.7, top-p 0.95)\n{prompt}{spelled(corpus.encoding, written)}")


def report_drafts(model: DeepSeek, corpus: Corpus, count: int = 64, length: int = 64) -> None:
    """Greedy text after held-out prompts: how often is the MTP module's guess the next token?"""
    length = min(length, len(corpus.held_out))
    starts = np.linspace(0, len(corpus.held_out) - length, count).astype(int)
    prompts = [corpus.held_out[start : start + length].tolist() for start in starts]
    new, verdicts = mtp.speculative_generate(model, model.mtp[0], prompts, length)
    verdicts = list(itertools.chain.from_iterable(verdicts))
    acceptance = statistics.fmean(verdicts)
    measure("acceptance", acceptance, f"accepted share of {len(verdicts):,} drafts   V3: 0.85-0.90")
    measure("tokens_per_step", 1 + acceptance, f"greedy, {count} prompts of {length}, {length} new")
    same = sum(a == b for a, b in zip(new, model.generate(prompts, length), strict=True))
    measure("identical_prompts", same, f"of {count} continued as without drafts")


def draw(run: Run, corpus: Corpus, bits: float, mixtures: int) -> None:
    """Loss and expert load over the steps, from metrics.jsonl; mixtures: the main model's."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook hands down its own, which may be missing here
    from matplotlib import pyplot as plt

    metrics = run.metrics()
    steps = np.array([entry["step"] for entry in metrics])
    per_token = len(corpus.held_out) / corpus.held_out_bytes / math.log(2)  # nats -> bits a byte
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    loss = np.array([entry["loss"] for entry in metrics]) * per_token
    width = max(1, len(loss) // 50)
    smooth = np.convolve(loss, np.ones(width) / width, "valid")
    left.plot(steps, loss, color="tab:blue", alpha=0.2, lw=0.6)
    left.plot(steps[width - 1 :], smooth, color="tab:blue", label="training batch, smoothed")
    probed = [(e["step"], e["held_out_loss"] * per_token) for e in metrics if "held_out_loss" in e]
    left.plot(*np.array(probed).T, "o-", color="tab:orange", label="held-out text, a slice of it")
    left.plot(steps[-1], bits, "*", ms=13, color="tab:red", label=f"held-out text, all: {bits:.2f}")
    names = {"xz": "xz -9", "xz_given_training": "xz -9 that has read the training text"}
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
    for key, name in names.items():
        value = corpus.rivals[key]
        left.axhline(value, ls="--", lw=0.8, color="gray")
        text = f"{name}: {value:.2f}"
        left.annotate(text, (steps[0], value), va="bottom", color="gray", bbox=paper)
    lowest = min(bits, corpus.rivals["xz_given_training"])
    left.set(xlabel="step", ylabel="bits per byte", ylim=(min(1.2, 0.9 * lowest), 4))
    left.set_title(f"Unseen text takes {bits:.2f} bits a byte; xz needs {corpus.rivals['xz']:.2f}")
    left.legend()
    if "max_violation" in metrics[0]:
        violations = np.array([entry["max_violation"] for entry in metrics])  # (steps, layers)
        for layer, line in enumerate(violations.T):
            kept = np.convolve(line, np.ones(width) / width, "valid")
            name = f"mixture {layer + 1}" if layer < mixtures else "MTP's mixture"
            right.plot(steps[width - 1 :], kept, label=name)
        right.set(xlabel="step", ylabel="MaxVio of the batch", ylim=(0, None))
        right.set_title("The bias keeps the experts' load even")
        right.legend()
    figure.savefig(run.folder / "curves.png", dpi=120)
    plt.close(figure)


# %% 10. How fast? ---------------------------------------------------------------------------


def bench(model: DeepSeek, recipe: Recipe, seed: int) -> None:
    """A training step with our pieces, and with what torch offers in their place, interleaved."""
    generator = torch.Generator().manual_seed(seed)
    shape = recipe.batch_size, recipe.context + 1
    rows = [torch.randint(model.config.vocab_size, shape, generator=generator)]
    optimizer = make_optimizer(model, recipe)

    def plain_nats(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model.head(hidden), labels, reduction="sum")

    def step(attention: Callable, nats: Callable) -> float:
        for block in [*model.model.layers, *(module.block for module in model.mtp)]:
            block.self_attn.attention = attention
        model.nats = nats
        begin = time.perf_counter()
        training_step(model, optimizer, recipe, rows, 1.0, 0.3)[0].item()
        return time.perf_counter() - begin

    ours, sliced = cpu_or_gpu_attention, model.nats
    variants = {
        "ours": (ours, sliced, ""),
        "sdpa": (mla.padded_attention, sliced, "attention by SDPA"),
        "logits": (ours, plain_nats, "whole logits"),
    }
    if model.lm_head.weight.device.type == "cuda":  # where ours is SDPA
        del variants["sdpa"]
        variants["flash"] = (attn.flash_attention, sliced, "attention by 01's kernels")
    model.train()
    times = {name: [] for name in variants}
    for _ in range(10):
        for name, variant in variants.items():
            times[name].append(step(*variant[:2]))
    del model.nats
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}  # [0]: warm
    for name, (*_, text) in variants.items():
        speed = recipe.batch_size * recipe.context / medians[name]
        ratio = f"{medians[name] / medians['ours']:.2f}x the time   {text}" if text else ""
        measure(f"step_{name}_tokens_per_second", speed, ratio)


# %% Exercises -------------------------------------------------------------------------------
# 1. Break it: give update_bias −γ (in training_step). Which curve shows it first, the loss or
#    MaxVio? Which experts does the router then choose, and why does the loss hardly notice?
# 2. xz that has read the training text still wins: it copies whole lines. Give the model what xz
#    has, a longer Recipe.context at the same number of tokens a step. Where does the gain end?
# 3. V3 rotates 64 of 192 channels, nano 16 of 48. Set qk_rope_head_dim to 2, 8 and 32 with
#    qk_nope_head_dim + qk_rope_head_dim = 48, three seeds each. Is the difference larger than the
#    spread between seeds?


# %% Main ------------------------------------------------------------------------------------


KEPT = "preset", "encoding", "steps", "minutes", "precision", "quick", "seed", "out"


def arguments() -> argparse.Namespace:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    trainable = [name for name, (_, recipe) in PRESETS.items() if recipe]
    add = cli.add_argument
    add("--preset", choices=trainable, default="nano", help="size of the model (%(default)s)")
    add("--data", type=Path, help="a file or folder of .txt, .md, .py, .jsonl (Python's library)")
    add("--encoding", help="a named encoding of tiktoken instead of a tokenizer trained here")
    add("--steps", type=int, help="instead of the preset's")
    add("--minutes", type=float, help="train for so long instead of a number of steps")
    add("--precision", choices=PRECISIONS, default="bf16", help="of the products (%(default)s)")
    add("--resume", type=Path, metavar="RUN", help="go on in the folder of a run that was stopped")
    add("--quick", action="store_true", help="a tiny model and 30 steps: does everything work?")
    add("--device", default=default, help="cpu, cuda, cuda:1, … (%(default)s)")
    add("--seed", type=int, default=0, help="of weights and data order (%(default)s)")
    add("--bench", action="store_true", help="only time a training step, against torch's own parts")
    add("--out", type=Path, default=Path("runs"), help="folder of the runs (%(default)s/)")
    args = cli.parse_args()
    if any(p.exists() and not p.is_dir() for p in (args.out, *args.out.parents)):
        cli.error(f"--out {args.out} is a file, or in one: want a folder")
    for name in ("steps", "minutes"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            cli.error(f"--{name} must be positive, got {value}")
    if args.steps and args.minutes:
        cli.error("--steps or --minutes, not both")
    if not 0 <= args.seed < 2**63:
        cli.error(f"--seed must be >= 0 and fit 63 bits, got {args.seed}")
    for name in KEPT if args.resume else ():
        if getattr(args, name) != cli.get_default(name):
            cli.error(f"--{name}: a resumed run keeps what it was begun with")
    return args


def begin_run(args, config: DeepSeekConfig, recipe: Recipe, corpus, packages, vocabulary) -> Run:
    """A folder that is not there yet, with run.json: what it takes to make this run again."""
    folder = fresh_folder(args.out, "quick" if args.quick else args.preset)
    entry = {
        "command": shlex.join(["python", "06_train.py", *sys.argv[1:]]),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in ("torch", "numpy", "tiktoken")},
        },
        **{key: getattr(args, key) for key in ("device", "seed", "minutes", "precision")},
        # as it lies from here: a resumed run may be started in another folder
        "data": args.data and path_from(folder, args.data),
        "data_digest": corpus.folder.name,
        "packages": packages,
        "vocabulary": vocabulary,  # what was asked for: config has what came of it
        "config": asdict(config),
        "recipe": asdict(recipe),
    }
    (folder / "run.json").write_text(json.dumps(entry, indent=1) + "\n")
    return Run(folder)


def path_from(folder: Path, path: Path) -> str:
    with contextlib.suppress(ValueError):  # Windows: on another drive
        return os.path.relpath(path.resolve(), folder.resolve())
    return str(path.resolve())


def fresh_folder(parent: Path, stem: str) -> Path:
    """A new one: parent/stem, or stem-2, …"""
    parent.mkdir(parents=True, exist_ok=True)
    for name in itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            (parent / name).mkdir()
            return parent / name


def commit() -> str | None:
    """Of the repository this file lies in, if git can tell."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() or None


def lesson(args: argparse.Namespace) -> None:
    config, recipe = PRESETS[args.preset]
    if args.quick:
        config, recipe = QUICK, Recipe(30, context=64, batch_size=8, learning_rate=3e-3)
    packages = args.preset in ("mini", "small") and not args.quick
    vocabulary = args.encoding or config.vocab_size
    if args.resume:
        try:
            entry = json.loads((args.resume / "run.json").read_text())
            config, recipe = DeepSeekConfig(**entry["config"]), Recipe(**entry["recipe"])
            args.seed, args.minutes, digest = (entry[k] for k in ("seed", "minutes", "data_digest"))
            packages, vocabulary = entry["packages"], entry["vocabulary"]
            args.precision = entry.get("precision", "bf16")  # runs older than the flag have none
            if entry["data"] and not args.data:  # it may have moved
                args.data = args.resume.resolve() / entry["data"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{args.resume} is no folder of a run of 06: {error!r}") from None
        args.out = args.resume.resolve().parent  # the tokens lie there
    elif args.steps:
        recipe = replace(recipe, steps=args.steps)
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)  # graphs are of the current one
    except Exception as error:  # each backend raises a type of its own
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"cannot run on --device {args.device}: {reason}") from None
    own_rows(recipe.batch_size)  # raises, before any work, if they can't be shared
    torch.manual_seed(args.seed)
    if args.bench:
        return bench(DeepSeek(config, args.precision).to(device), recipe, args.seed)

    begin = time.perf_counter()
    with first_rank_first():
        documents = read_documents(args.data, packages)
        if args.resume and digest != digest_of(documents, vocabulary):
            where = args.data or "the library"
            raise ValueError(f"{args.resume} was trained on other text than {where} holds now")
        corpus = prepare(documents, vocabulary, args.out)
    next(batches(corpus.train, recipe, args.seed, 0))  # raises if the text is too short
    config = replace(
        config,
        vocab_size=corpus.encoding.n_vocab,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), corpus.encoding.encode_single_token(END)),
    )
    measure("data_seconds", time.perf_counter() - begin, f"s, {len(documents):,} documents")
    model = DeepSeek(config, args.precision).to(device)
    rows = torch.from_numpy(corpus.train[:130].astype(np.int64)).view(2, 65).to(device)
    verify_sizes()
    verify_model(model, rows)
    shard(model)
    if args.resume or rank_and_size()[0]:  # the first process keeps the books
        run = Run(args.resume or args.out)
    else:
        run = begin_run(args, config, recipe, corpus, packages, vocabulary)
    text = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    print(f"run      {run.folder}   {text}, {rank_and_size()[1]} process(es)")
    if args.precision == "fp8":
        emulated = "emulated, E4M3 numbers multiplied in fp32: slower than bf16"
        print(f"fp8      {'by kernels' if fp8.has_kernels(rows) else emulated}")
    first = not rank_and_size()[0]
    try:
        with alone(run.folder) if first else contextlib.nullcontext():
            trained = train(
                model, corpus, recipe, run.folder, args.seed, args.minutes, bool(args.resume)
            )
    except KeyboardInterrupt:
        script, folder = (shlex.quote(Path(p).as_posix()) for p in (sys.argv[0], run.folder))
        print(f"stopped  go on with: python {script} --resume {folder}")
        raise SystemExit(130) from None
    if args.quick:
        print("quick    the numbers below are those of a model that has learnt nothing yet:")
        print("         its greedy text repeats itself, which is easy to draft")
    model = gathered(model)
    if first:
        report(model.to(device), corpus, recipe, run, trained)


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    args = arguments()
    try:
        with processes(args):
            lesson(args)
    except (ValueError, OSError) as error:
        print(f"06_train.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # while nothing was training: there is nothing to lose
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
