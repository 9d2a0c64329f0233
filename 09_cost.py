# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<=2.13", "numpy>=1.26", "tiktoken>=0.8", "regex>=2024.5", "matplotlib>=3.8",
#   "safetensors>=0.4.5", "tqdm>=4.66", "filelock>=4.3",
# ]
# ///
r"""09 · Cost: why it was cheap, in arithmetic, from 671 billion weights to $5.576 million.

The figure in the news is one multiplication: 2.788 million hours of an H800, $2 each [1]. It is the
rent of the final run, and no more: not the research, the failed runs, the salaries, the machines.
This chapter asks where the hours come from. Everything is counted from a config.json: no weights.

    config ─► weights ─► active weights ─► FLOPs a token ─► × tokens ÷ FLOP/s ─► hours ─► dollars
                 │                             └─ attention: linear in the context
                 └─► bytes: weights, gradients, optimizer, activations, cache, what is sent

    a weight costs a token      2 FLOPs forward, 4 backward: 6 · active weights in training
    attention, a layer          2·H·(N+R+V)·t/2 forward, mean of a causal context t; ×3 in training
    absorbed, decoding          2·H·(2L+R)·t, a layer
    hours                       tokens · FLOPs a token / (FLOP/s of a GPU · 3600)
    MFU                         FLOP/s of a GPU that were of use / its bf16 peak

The main model alone: V3's MTP module took 4 % more FLOPs. Each number is marked: published (by
whom), derived (here, from published ones), or measured (now).

    [1] DeepSeek-V3, 2412.19437, table 1, §3.2, §4.2        [4] Llama 3, 2407.21783, table 4
    [2] DeepSeek-V2, 2405.04434, table 1                    [5] DeepGEMM's and FlashMLA's README
    [3] DeepSeek-R1, Nature 645:633, app. B.4.4             [6] Insights into V3, 2505.09343

Run:  python 09_cost.py [--preset v3 | --config config.json]        10 s on two CPU cores
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

base = import_module("06_train")  # DeepSeekConfig, PRESETS, stepper
check, measure = base.check, base.measure
Config = base.DeepSeekConfig

# %% 1. What is published --------------------------------------------------------------------


class Gpu(NamedTuple):
    """Dense peak in FLOP/s, bytes a second from memory."""

    bf16: float
    bandwidth: float


GPUS = {  # vendor's datasheets; an H800 is an H100 with 400 of its 900 GB/s between GPUs
    "h800": Gpu(989e12, 3.35e12),
    "h100": Gpu(989e12, 3.35e12),
    "h200": Gpu(989e12, 4.8e12),
    "a100": Gpu(312e12, 2.04e12),
}
TOKENS = 14.8e12  # [1] §4.2
HOURS = {"pre-training": 2.664e6, "context extension": 0.119e6, "post-training": 0.005e6}  # [1]
R1_HOURS = {"R1-Zero": 101e3, "SFT data": 5e3, "R1": 41e3}  # [3]
MFU = 0.39  # V3's, attention counted: derived in verify_hours
PRICE = 2.0  # $ an hour: [1]'s assumption
RENT = 39.33 / 8  # $ an hour of an H100, AWS EC2 capacity block, January 2025 (list price)
DENSE_RATE = 400e12  # FLOP/s of an H100, Llama 3 405B, bf16: 41 % of its peak [4]
EXPERT_RATE = 1 / (2 / 3 / 1304e12 + 1 / 3 / 1025e12)  # FP8, gate and up, then down, M = 4096 [5]
BF16_RATE = 744e12  # cuBLAS on an H200: matmul_peak in results/02_mla.bench.cuda.json
ATTENTION_RATE = 660e12  # FlashMLA, compute-bound [5]
V2 = replace(
    base.V3, vocab_size=102400, hidden_size=5120, intermediate_size=12288,
    moe_intermediate_size=1536, num_hidden_layers=60, first_k_dense_replace=1,
    n_routed_experts=160, n_shared_experts=2, num_experts_per_tok=6, topk_group=3,
    topk_method="group_limited_greedy", scoring_func="softmax", norm_topk_prob=False,
    routed_scaling_factor=16.0, num_nextn_predict_layers=0, bos_token_id=100000,
    eos_token_id=100001,
)  # fmt: skip
MOONLIGHT = replace(
    base.V2_LITE, vocab_size=163840, intermediate_size=11264, topk_method="noaux_tc",
    scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.446, rope_theta=50000.0,
    rope_scaling=None, max_position_embeddings=8192, rms_norm_eps=1e-5, bos_token_id=163584,
    eos_token_id=163586,
)  # fmt: skip
KIMI_K2 = replace(
    base.V3, vocab_size=163840, first_k_dense_replace=1, num_attention_heads=64,
    n_routed_experts=384, n_group=1, topk_group=1, routed_scaling_factor=2.827, rope_theta=50000.0,
    rope_scaling=base.V3.rope_scaling | {"factor": 32, "beta_fast": 1, "beta_slow": 1},
    max_position_embeddings=131072, num_nextn_predict_layers=0, bos_token_id=163584,
    eos_token_id=163585,
)  # fmt: skip
PRESETS = {name: config for name, (config, _) in base.PRESETS.items()}
PRESETS |= {"v2": V2, "moonlight": MOONLIGHT, "kimi-k2": KIMI_K2}
GQA = {
    "qwen2.5-72b": (80, 8, 64),
    "llama-3.1-405b": (126, 8, 128),
}  # layers, KV heads, heads; of 128

# %% 2. Counting -----------------------------------------------------------------------------


def count_parameters(c: Config, mtp: bool = False) -> dict[str, tuple[int, int]]:
    """{component: (stored, used by a token)} of the main model; mtp: of one MTP module alone.

    The router's bias is counted, as a file stores it. A token uses one row of the embedding: its
    matrix is listed as used, as papers do, and takes no FLOPs. ValueError: mtp of a config without.
    """
    if mtp and not c.num_nextn_predict_layers:
        raise ValueError("num_nextn_predict_layers is 0: there is no MTP module to count")
    D, H, L, R, Q = (
        c.hidden_size, c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim, c.q_lora_rank,
    )  # fmt: skip
    N, V, E, K = c.qk_nope_head_dim, c.v_head_dim, c.n_routed_experts, c.num_experts_per_tok
    query = D * H * (N + R) if Q is None else D * Q + Q * H * (N + R)
    attention = query + D * (L + R) + L * H * (N + V) + H * V * D
    norms = 2 * D + L + (Q or 0)
    expert = 3 * D * c.moe_intermediate_size
    router = E * D + (E if c.topk_method == "noaux_tc" else 0)
    layers = 1 if mtp else c.num_hidden_layers
    dense = 0 if mtp else c.first_k_dense_replace
    mixtures = layers - dense
    both = {
        "attention": layers * attention,
        "dense FFN": dense * 3 * D * c.intermediate_size,
        "shared experts": mixtures * c.n_shared_experts * expert,
        "router": mixtures * router,
        "norms": layers * norms + (3 * D if mtp else D),
    }
    counts = {name: (n, n) for name, n in both.items()}
    counts["routed experts"] = mixtures * E * expert, mixtures * K * expert
    if mtp:
        return counts | {"eh_proj": (2 * D * D, 2 * D * D)}
    table = c.vocab_size * D
    return counts | {"embedding": (table, table), "head": (table, table)}


def total(counts: dict[str, tuple[int, int]], which: int = 0, without: tuple = ()) -> int:
    """which: 0 stored, 1 used."""
    return sum(pair[which] for name, pair in counts.items() if name not in without)


def kv_bytes_per_token(c: Config) -> int:
    """Bytes of a cached token over all layers, in bf16: (L + R) numbers each ([2] table 1)."""
    return c.num_hidden_layers * (c.kv_lora_rank + c.qk_rope_head_dim) * 2


def flops_per_token(c: Config, context: int, mode: str = "training") -> dict[str, float]:
    """{"weights", "attention"}: FLOPs of one token; a multiply-add is two.

    mode: "training" (forward and backward, mean over a causal context), "prefill" (forward alone,
    the same mean), "decode" (one token after `context` others, absorbed). The main model alone.
    """
    if mode not in ("training", "prefill", "decode"):
        raise ValueError(f"mode is 'training', 'prefill' or 'decode', not {mode!r}")
    counts = count_parameters(c)
    weights = 2.0 * total(counts, 1, ("embedding", "norms"))
    H, L, R = c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim
    if mode == "decode":
        attention = 2.0 * H * (2 * L + R) * context * c.num_hidden_layers
    else:
        width = c.qk_nope_head_dim + R + c.v_head_dim
        attention = 2.0 * H * width * context / 2 * c.num_hidden_layers
    times = 3 if mode == "training" else 1
    return {"weights": times * weights, "attention": times * attention}


def activation_bytes_per_token(c: Config, frugal: bool = True) -> float:
    """Bytes that a token leaves for backward, all layers. frugal: [1] §3.2.3, §3.3.3: inputs of
    products in FP8, that of o_proj in 12 bits, norms, up-projections and SwiGLU computed again;
    else all of it kept in bf16. Without attention's log-sum-exp (4 bytes a head)."""
    D, H, I, Q = c.hidden_size, c.num_attention_heads, c.moe_intermediate_size, c.q_lora_rank or 0
    latent, out = c.kv_lora_rank + c.qk_rope_head_dim, H * c.v_head_dim
    heads = H * (2 * (c.qk_nope_head_dim + c.qk_rope_head_dim) + c.v_head_dim)  # q, k, v
    experts = c.num_experts_per_tok + c.n_shared_experts
    mixtures = c.num_hidden_layers - c.first_k_dense_replace
    residual, narrow = 2 * 2 * D, 1 if frugal else 2  # two additions, in bf16 either way
    attention = narrow * (D + Q + latent) + (
        1.5 * out if frugal else 2 * (out + heads + Q + latent)
    )
    ffn = lambda width, count: count * (narrow * (D + 2 * width) + (0 if frugal else 2 * width))
    mixed = mixtures * ffn(I, experts) + c.first_k_dense_replace * ffn(c.intermediate_size, 1)
    return c.num_hidden_layers * (residual + attention) + mixed


def training_bytes(c: Config, recipe: str = "fp8") -> dict[str, float]:
    """Bytes of the whole run's state, over all GPUs: weights, gradients, optimizer.

    recipe: "fp8" as [1] §3.3: codes of 1 byte, an fp32 master copy and gradient, Adam's two moments
    in bf16; "bf16": 2 bytes, fp32 master, gradient and moments. ValueError: another.
    """
    each = {"fp8": (1 + 4, 4, 2 + 2), "bf16": (2 + 4, 4, 4 + 4)}
    if recipe not in each:
        raise ValueError(f"recipe is one of {', '.join(each)}, not {recipe!r}")
    n = total(count_parameters(c))
    names = "weights", "gradients", "optimizer"
    return {name: n * size for name, size in zip(names, each[recipe], strict=True)}


def nodes_reached(c: Config, nodes: int = 8, limited: bool = True) -> float:
    """Nodes that a token of one layer is sent to, experts spread evenly and chosen at random.

    limited: to topk_group groups of experts, a group a node ([1] §2.1.2); else any of all experts.
    ValueError: nodes of unequal size, or limited and another number of groups than of nodes.
    """
    E, K = c.n_routed_experts, c.num_experts_per_tok
    if E % nodes or limited and c.n_group != nodes:
        raise ValueError(f"{E} experts in {c.n_group} groups do not make {nodes} equal nodes")
    among = c.topk_group if limited else nodes
    each = E // nodes
    missed = math.comb(among * each - each, K) / math.comb(among * each, K)
    return among * (1 - missed)


def dispatch_bytes_per_token(c: Config, nodes: int = 8, limited: bool = True) -> float:
    """Bytes between nodes a token, all mixtures, forward: out in FP8, back in bf16 ([1] §3.3.3)."""
    copies = nodes_reached(c, nodes, limited) * (nodes - 1) / nodes  # one of them is at home
    return (c.num_hidden_layers - c.first_k_dense_replace) * copies * c.hidden_size * (1 + 2)


class Cost(NamedTuple):
    hours: float  # of one GPU
    dollars: float
    flops: float


def training_cost(
    c: Config, tokens: float, mfu: float, gpu: str = "h800", price: float = PRICE,
    context: int = 4096,
) -> Cost:  # fmt: skip
    """What `tokens` cost at a share `mfu` of the bf16 peak of a GPU at `price` $ an hour.

    ValueError: an unknown GPU, an mfu outside of (0, 1], no tokens, a negative price, no context.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu is one of {', '.join(GPUS)}, not {gpu!r}")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu is a share of the bf16 peak, in (0, 1], got {mfu}")
    if not (0 < tokens < math.inf and 0 <= price < math.inf and context >= 1):
        raise ValueError(f"want tokens > 0, price >= 0, context >= 1: {tokens}, {price}, {context}")
    flops = tokens * sum(flops_per_token(c, context).values())
    hours = flops / (mfu * GPUS[gpu].bf16 * 3600)
    return Cost(hours, hours * price, flops)


# %% 3. Is it right? Published numbers are the checks ----------------------------------------


def exactly(name: str, got: float, want: float, tol: float = 0) -> None:
    check(
        name, torch.tensor(got, dtype=torch.float64), torch.tensor(want, dtype=torch.float64), tol
    )


def verify_parameters() -> None:
    """Totals to the last weight: V3's and V2-Lite's as the listings of their checkpoints have them,
    the others by hand from their configs; and chapter 06's own model."""
    published = {"v3": 671_026_419_200, "v2": 235_741_434_880, "v2-lite": 15_706_484_224}
    published |= {"moonlight": 15_960_110_208, "kimi-k2": 1_026_408_232_448}
    for name, want in published.items():
        exactly(f"{name}: weights = {want:,}", total(count_parameters(PRESETS[name])), want)
    exactly(
        "MTP module: 11,610,068,224", total(count_parameters(base.V3, mtp=True)), 11_610_068_224
    )
    for name in "nano", "mini", "small":
        config = PRESETS[name]
        with torch.device("meta"):
            model = base.DeepSeek(replace(config, num_nextn_predict_layers=0))
        stored = sum(t.numel() for t in model.state_dict().values())
        exactly(f"{name}: formula = the model of 06", total(count_parameters(config)), stored)
    counts, found = count_parameters(base.V3), []
    for what, without in (
        ("with_embedding_and_head", ()), ("with_head", ("embedding",)),
        ("without_both", ("embedding", "head")),
    ):  # fmt: skip
        found.append(total(counts, 1, without) / 1e9)
        measure(f"active_{what}", found[-1], "billion   published: 37B [1], 36.7B in its README")
    exactly("of the three, with the head alone is 37B", round(found[1]), 37)


def verify_bytes() -> None:
    """The cache of [6] table 1."""
    exactly("V3's cache: 70,272 B a token [6]", kv_bytes_per_token(base.V3), 70_272)
    for (name, (layers, heads, _)), want in zip(GQA.items(), (327_680, 516_096), strict=True):
        exactly(f"{name}'s: {want:,} B [6]", layers * 2 * heads * 128 * 2, want)


def mtp_flops_per_token() -> float:
    """What training V3's MTP module adds: its products and those of the head, not its attention."""
    head = count_parameters(base.V3)["head"][1]
    return 6 * (total(count_parameters(base.V3, mtp=True), 1) + head)


def verify_hours() -> None:
    """[1] table 1 and [3]; and the rate at which V3 was trained, in FLOP/s of a GPU."""
    exactly("2.664 + 0.119 + 0.005 = 2.788 M hours [1]", sum(HOURS.values()) / 1e6, 2.788, 1e-9)
    exactly("x $2 = $5.576 M [1]", sum(HOURS.values()) * PRICE / 1e6, 5.576, 1e-9)
    exactly("R1: 147 K hours = $294 K [3]", sum(R1_HOURS.values()) * PRICE / 1e3, 294, 1e-9)
    hours = HOURS["pre-training"] / TOKENS * 1e12
    exactly("180 K hours a trillion tokens [1]", hours / 1e3, 180, 0.05)
    days = hours / 2048 / 24
    exactly("3.7 days on 2048 GPUs [1]", days, 3.7, 0.05)
    used = total(count_parameters(base.V3), 1, ("embedding",))
    rate = 6 * used * 1e12 / (hours * 3600)
    text = f"of bf16's peak; 6 · active weights at {rate / 1e12:.0f} TFLOP/s   derived"
    measure("mfu", rate / GPUS["h800"].bf16, text)
    exactly("that is 34 % of the peak", rate / GPUS["h800"].bf16, 0.34, 0.005)
    flops = flops_per_token(base.V3, 4096)
    share = flops["attention"] / sum(flops.values())
    whole = rate / GPUS["h800"].bf16 / (1 - share)
    text = f"with attention, {100 * share:.0f} % of the FLOPs at 4k   derived"
    measure("mfu_with_attention", whole, text)
    mtp = mtp_flops_per_token() / sum(flops.values())
    text = f"and with the MTP module's products, {100 * mtp:.1f} % more   derived"
    measure("mfu_with_mtp", whole * (1 + mtp), text)


# %% 4. Why was it cheap? --------------------------------------------------------------------


class Step(NamedTuple):
    label: str
    hours: float
    price: float
    kind: str

    @property
    def millions(self) -> float:
        return self.hours * self.price / 1e6


def waterfall() -> list[Step]:
    """From a dense model of the same size to $5.576M, a factor a step.

    Backwards from what is published: V3's hours, in FP8, overlapped. Communication took as long as
    computing [1] §3.2, so without overlap twice the hours. In bf16 computing would take longer by
    the ratio of the products' rates, attention being bf16 anyway: an upper estimate, for what is no
    product gains nothing. And what is sent would be 2 + 2 bytes a channel instead of 1 + 2.
    """
    weights = total(count_parameters(base.V3))
    dense = 6 * weights * TOKENS / (DENSE_RATE * 3600)
    flops = flops_per_token(base.V3, 4096)
    at = lambda rate: flops["weights"] / rate + flops["attention"] / ATTENTION_RATE
    computing, sending = at(BF16_RATE) / at(EXPERT_RATE), (2 + 2) / (1 + 2)  # bf16's over FP8's
    trained = HOURS["pre-training"]
    rest = sum(HOURS.values()) - trained
    start, mixed = (
        "dense, 671B weights,\nbf16, 400 TFLOP/s [4]",
        "37B active: experts,\nnothing overlapped",
    )
    hidden, end = (
        "communication hidden\nbehind computing",
        "an hour at $2; also long\ncontext, post-training",
    )
    return [
        Step(start, dense, RENT, "derived"),
        Step(mixed, trained * (computing + sending), RENT, "derived"),
        Step("products and what is\nsent to experts in FP8", trained * 2, RENT, "derived"),
        Step(hidden, trained, RENT, "published"),
        Step(end, trained + rest, PRICE, "published"),
    ]


def why(out: Path) -> None:
    steps = waterfall()
    names = "dense", "active_only", "fp8", "overlap", "price"
    for name, step, before in zip(names, steps, [None, *steps], strict=False):
        factor = "" if before is None else f", 1/{before.millions / step.millions:.1f}"
        text = f"M$   {step.hours / 1e6:.3g} M hours at ${step.price:.2f}{factor}   {step.kind}"
        measure(f"waterfall_{name}", step.millions, text)
    flops = sum(flops_per_token(base.V3, 4096).values()) + mtp_flops_per_token()
    ideal = flops * TOKENS / (DENSE_RATE * 3600)
    text = "M: V3's FLOPs, attention and MTP counted, at Llama's rate; it took 2.664   derived"
    measure("hours_at_dense_rate", ideal / 1e6, text)
    for limited in True, False:
        sent = dispatch_bytes_per_token(base.V3, limited=limited)
        text = f"KB between nodes a token, {nodes_reached(base.V3, limited=limited):.2f} of 8 nodes"
        measure(
            f"dispatch_{'4_groups' if limited else 'anywhere'}", sent / 1e3, f"{text}   derived"
        )
    for recipe in "fp8", "bf16":
        state = sum(training_bytes(base.V3, recipe).values()) / 1e12
        kept = activation_bytes_per_token(base.V3, recipe == "fp8") / 1e6
        text = f"TB of weights, gradients, moments; {kept:.1f} MB a token of activations   derived"
        measure(f"training_state_{recipe}", state, text)
    draw_waterfall(steps, out)
    print(f"figure   {out}")


def draw_waterfall(steps: list[Step], out: Path) -> None:
    os.environ["MPLBACKEND"] = "Agg"  # a notebook hands down its own, which may be missing here
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 4.8), layout="constrained")
    colors = {"derived": "C0", "published": "C2"}
    for x, step in enumerate(steps):
        axes.bar(x, step.millions, color=colors[step.kind], width=0.6)
        text = f"${step.millions:,.1f}M" if step.millions > 10 else f"${step.millions:,.2f}M"
        axes.annotate(
            text, (x, step.millions), ha="center", va="bottom", fontsize=11, weight="bold"
        )
        if x:
            factor = steps[x - 1].millions / step.millions
            axes.annotate(
                f"÷ {factor:.1f}", (x - 0.5, step.millions * 1.5), ha="center", color="gray"
            )
    axes.set_yscale("log")
    axes.set_ylim(1, 600)
    axes.set_xticks(range(len(steps)), [step.label for step in steps], fontsize=8.5)
    axes.set_ylabel("million dollars, 14.8 trillion tokens")
    for kind, color in colors.items():
        axes.bar(0, 0, color=color, label=kind)
    axes.legend(title="GPU hours", frameon=False)
    ratio = steps[0].millions / steps[-1].millions
    axes.set_title(
        f"Why DeepSeek-V3 was cheap: four steps, a factor of {ratio:.0f}\n"
        "(rent of the final run; research, failed runs, people and machines are not in it)"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def decode_rates(context: int) -> dict[str, float]:
    """Tokens a second of one H800 that does nothing but attend, at `context`: the cache once from
    memory a token, or the products at FlashMLA's measured rate, whichever takes longer. Derived."""
    gpu, rates = GPUS["h800"], {}
    for name in "v3", "v2", "v2-lite":
        c = PRESETS[name]
        read = kv_bytes_per_token(c) * context / gpu.bandwidth
        computed = flops_per_token(c, context, "decode")["attention"] / ATTENTION_RATE
        rates[name] = 1 / max(read, computed)
    for name, (layers, heads, queries) in GQA.items():
        read = layers * 2 * heads * 128 * 2 * context / gpu.bandwidth
        computed = 2 * queries * 2 * 128 * context * layers / ATTENTION_RATE
        rates[name] = 1 / max(read, computed)
    return rates


def decode(out: Path) -> None:
    os.environ["MPLBACKEND"] = "Agg"  # a notebook hands down its own, which may be missing here
    from matplotlib import pyplot as plt

    contexts = [2**i for i in range(11, 18)]
    for name, rate in decode_rates(8192).items():
        text = "tokens/s, attention of one H800 at 8k   derived, nothing else counted"
        measure(f"decode_8k_{name.replace('-', '_').replace('.', '_')}", rate, text)
    cache = {name: kv_bytes_per_token(PRESETS[name]) / 1e3 for name in ("v3", "v2", "v2-lite")}
    cache |= {name: layers * 2 * heads * 128 * 2 / 1e3 for name, (layers, heads, _) in GQA.items()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, (name, size) in enumerate(cache.items()):
        left.barh(number, size, color=f"C{number}")
        left.annotate(f" {size:,.0f}", (size, number), va="center")
        if name != "v2":  # as v3
            rates = [decode_rates(t)[name] for t in contexts]
            right.plot(contexts, rates, "o-", color=f"C{number}", label=name)
    left.set_yticks(range(len(cache)), cache)
    left.invert_yaxis()
    left.set(xlabel="KV cache of a token (KB)", xlim=(0, 1.15 * max(cache.values())))
    right.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="tokens/s of attention")
    right.set_xticks(contexts, [f"{t // 1024}k" for t in contexts])
    right.legend(title="one H800, attention alone")
    ratio = cache["llama-3.1-405b"] / cache["v3"]
    title = f"A token of V3 caches 1/{ratio:.1f} of Llama 3.1 405B's"
    figure.suptitle(f"{title}; its 128 heads wait for computing, the others for memory")
    figure.savefig(out, dpi=150)
    plt.close(figure)
    print(f"figure   {out}")


# %% 5. What would you pay? ------------------------------------------------------------------


def own_rate(device: torch.device, steps: int = 8) -> tuple[float, float]:
    """(tokens/s, FLOP/s) of training `nano` here: median of a few steps of chapter 06."""
    config, recipe = base.PRESETS["nano"]
    torch.manual_seed(0)
    model = base.DeepSeek(config).to(device).train()
    step = base.stepper(model, base.make_optimizer(model, recipe), recipe)
    shape = recipe.batch_size, recipe.context + 1
    seconds = []
    for _ in range(steps):
        rows = torch.randint(config.vocab_size, shape, device=device)
        begin = time.perf_counter()
        step([rows], 1.0, 0.3)[0].item()
        seconds.append(time.perf_counter() - begin)
    speed = recipe.batch_size * recipe.context / statistics.median(seconds[2:])
    return speed, speed * sum(flops_per_token(config, recipe.context).values())


def yours(device: torch.device, price: float) -> None:
    """Hours and rent of each preset's own recipe, at the FLOP/s that nano reaches here."""
    speed, flops = own_rate(device)
    measure("own_tokens_per_second", speed, f"nano on this {device.type}   measured")
    measure("own_gflops", flops / 1e9, "GFLOP/s of use, MTP not counted   measured")
    for name in "nano", "mini", "small":
        config, recipe = base.PRESETS[name]
        tokens = recipe.steps * recipe.batch_size * recipe.accumulate * recipe.context
        per_token = sum(flops_per_token(config, recipe.context).values())
        hours = tokens * per_token / flops / 3600
        one = training_cost(config, tokens, MFU, "h100", price, recipe.context)
        text = f"hours here for {tokens:.3g} tokens; {one.hours:.2g} of an H100 at V3's MFU, "
        text += f"${one.dollars:,.2f} at ${price:.2f} an hour   derived"
        measure(f"own_hours_{name}", hours, text)


def describe(
    config: Config, context: int, tokens: float, mfu: float, gpu: str, price: float
) -> None:
    """All of it for one config."""
    counts = count_parameters(config)
    print(f"{'component':<18}{'stored':>20}{'used by a token':>20}")
    for name, (stored, used) in (counts | {"total": (total(counts), total(counts, 1))}).items():
        print(f"{name:<18}{stored:>20,}{used:>20,}")
    if config.num_nextn_predict_layers:
        print(f"{'an MTP module':<18}{total(count_parameters(config, mtp=True)):>20,}")
    print(f"cache              {kv_bytes_per_token(config):,} B a token in bf16")
    for mode in "training", "prefill", "decode":
        flops = flops_per_token(config, context, mode)
        both = f"{flops['weights']:.3g} for weights + {flops['attention']:.3g} for attention"
        print(f"{mode:<18} {both} FLOPs a token at a context of {context:,}")
    for recipe in "fp8", "bf16":
        sizes = ", ".join(f"{n} {b / 1e9:,.4g}" for n, b in training_bytes(config, recipe).items())
        kept = activation_bytes_per_token(config, recipe == "fp8") / 1e6
        print(f"{recipe} training      {sizes} GB; activations {kept:,.2f} MB a token")
    if config.num_hidden_layers > config.first_k_dense_replace and config.n_routed_experts % 8 == 0:
        for limited in (True, False) if config.n_group == 8 else (False,):
            sent = dispatch_bytes_per_token(config, limited=limited) / 1e3
            where = f"{config.topk_group} of 8 groups" if limited else "any expert"
            print(f"sent               {sent:,.1f} KB a token between 8 nodes, {where}")
    cost = training_cost(config, tokens, mfu, gpu, price, context)
    rate = f"{cost.hours:,.4g} {gpu.upper()} hours at {mfu:.0%} of its bf16 peak"
    print(f"{tokens:.3g} tokens     {cost.flops:.3g} FLOPs, {rate}: ${cost.dollars:,.2f}")


# %% Exercises -------------------------------------------------------------------------------
# 1. V3 at Llama 3's 41 %: what does --preset v3 --mfu 0.41 say? So what did the mixture cost
#    (MTP, 4 % of the FLOPs, is not in it)? And what would one of 16 of 512 experts of half the
#    width cost in bytes sent?
# 2. At which context does attention take half of a training token's FLOPs? And of a decoded one's?
# 3. The rent is $5.576M. Add what is not in it: 2,048 GPUs at $30,000, a year of 150 people. Which
#    of the three numbers would you quote, to whom?


def arguments() -> argparse.Namespace:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add = cli.add_argument
    add("--preset", choices=PRESETS, help="describe one of these, nothing else")
    add("--config", type=Path, help="or a released config.json")
    add("--tokens", type=float, default=TOKENS, help="to train on (%(default)g)")
    add("--mfu", type=float, default=MFU, help="share of the bf16 peak (%(default)s: V3's)")
    add("--gpu", choices=GPUS, default="h800", help="(%(default)s)")
    add("--price", type=float, default=PRICE, help="$ an hour (%(default)s)")
    add("--context", type=int, default=4096, help="tokens (%(default)s)")
    add("--device", default=default, help="of your own speed: cpu, cuda, … (%(default)s)")
    add("--out", type=Path, default="runs", help="folder of the figures (%(default)s/)")
    args = cli.parse_args()
    if args.preset and args.config:
        cli.error("--preset or --config, not both")
    for name in ("tokens", "mfu", "gpu", "context") if not (args.preset or args.config) else ():
        if getattr(args, name) != cli.get_default(name):
            cli.error(f"--{name} is of one model: want --preset or --config beside it")
    try:
        training_cost(base.NANO, args.tokens, args.mfu, args.gpu, args.price, args.context)

        def make(raw: dict) -> Config:
            if "hidden_size" not in raw:  # what it lacks would be V3's
                raise ValueError("no config of a model: it lacks hidden_size")
            # how weights are stored does not matter, only how many they are
            return Config.from_dict({**raw, "quantization_config": None})

        args.config = (
            base.read_config(args.config, make) if args.config else PRESETS.get(args.preset)
        )
    except ValueError as error:
        cli.error(str(error))
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # each backend raises a type of its own
        cli.exit(2, f"cannot run on --device {args.device}: {str(error).splitlines()[0][:100]}\n")
    if not (args.preset or args.config):
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
    if args.config:
        return describe(args.config, args.context, args.tokens, args.mfu, args.gpu, args.price)
    verify_parameters()
    verify_bytes()
    verify_hours()
    why(args.out / "09_cost.png")
    decode(args.out / "09_cost_decode.png")
    yours(torch.device(args.device), args.price)


if __name__ == "__main__":
    main()
