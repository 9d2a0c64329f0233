r"""What FP8 costs in loss: default runs of 06_train.py in bf16 and in FP8, three seeds.

The same seed means the same weights and the same batches. bf16 runs twice, with chapter 01's tiles
and with SDPA for attention: two ways to round, whose difference is the noise that any gap must be
seen against. fp8_blocks, if asked for, gives dgrad 128×128 scales for dy in the linear layers, not
in the experts: what made a 16B model diverge ([1] B.2).
Each run has one thread; as many run at a time as there are cores.

Run:  python benchmarks/fp8.py          50 minutes on two CPU cores
      [1] DeepSeek-V3, arXiv:2412.19437: a relative loss error under 0.25 %
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
chapter = import_module("06_train")
measure = chapter.measure
BLOCKS = {"linear": partial(chapter.fp8.FP8Linear, gradient_blocks=True)}
ATTENTION = chapter.cpu_or_gpu_attention
VARIANTS = ("fp8", "bf16", "bf16_sdpa", "fp8_blocks")


def train(job: tuple[str, int], steps: int | None, device: str, data: Path) -> float:
    """One run, in a process of its own -> held-out nats per token."""
    variant, seed = job
    torch.set_num_threads(1)
    config, recipe = chapter.PRESETS["nano"]
    if steps:
        recipe = replace(recipe, steps=steps)
    corpus = chapter.prepare(chapter.read_documents(None), config.vocab_size, data)
    end = corpus.encoding.encode_single_token(chapter.END)
    sizes = {"vocab_size": corpus.encoding.n_vocab, "bos_token_id": end, "eos_token_id": end}
    by_sdpa = variant == "bf16_sdpa"  # set anew for each: a process makes several runs
    chapter.cpu_or_gpu_attention = chapter.mla.padded_attention if by_sdpa else ATTENTION
    chapter.PRECISIONS["fp8_blocks"] = chapter.PRECISIONS["fp8"] | BLOCKS
    torch.manual_seed(seed)
    precision = variant if variant.startswith("fp8") else "bf16"
    model = chapter.DeepSeek(replace(config, **sizes), precision).to(device)
    chapter.train(model, corpus, recipe, data / f"{variant}-{seed}", seed)
    nats, _ = chapter.evaluate(model, corpus.held_out, recipe.context, recipe.context // 2)
    return nats / (len(corpus.held_out) - 1)


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    cli.add_argument("--device", default=default, help="cpu, cuda, cuda:1, … (%(default)s)")
    cli.add_argument("--seeds", type=int, default=3, help="runs of each kind (%(default)s)")
    cli.add_argument("--steps", type=int, help="instead of a default run's")
    cli.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS[:-1],
                     help="of the runs; bf16 is always made (all but fp8_blocks)")  # fmt: skip
    args = cli.parse_args()
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # each backend raises a type of its own
        reason = str(error).splitlines()[0][:100]
        cli.exit(2, f"cannot run on --device {args.device}: {reason}\n")
    if args.seeds < 1 or args.steps is not None and args.steps < 1:
        cli.error(f"want at least one seed and one step: {args.seeds}, {args.steps}")
    variants = [v for v in VARIANTS if v in args.variants or v == "bf16"]  # what gaps are to
    jobs = [(variant, seed) for variant in variants for seed in range(args.seeds)]
    workers = 1 if args.device.startswith("cuda") else min(len(jobs), os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        chapter.prepare(chapter.read_documents(None), chapter.PRESETS["nano"][0].vocab_size, data)
        run = partial(train, steps=args.steps, device=args.device, data=data)
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            nats = {}
            for (variant, seed), value in zip(jobs, pool.map(run, jobs), strict=True):
                nats[variant, seed] = value
                text = f"nats a token held out, {value / math.log(2):.4f} bit"
                measure(f"{variant}_seed_{seed}", value, text)
    for variant in variants:
        if variant == "bf16":
            continue
        seeds = range(args.seeds)
        gaps = [100 * (nats[variant, s] / nats["bf16", s] - 1) for s in seeds]
        shown = ", ".join(f"{gap:+.3f}" for gap in gaps)
        name = {"fp8": "fp8_loss_gap", "bf16_sdpa": "rounding_loss_gap"}.get(
            variant, variant + "_gap"
        )
        measure(
            name, statistics.fmean(gaps), f"% of bf16's loss, seed by seed {shown}   [1]: < 0.25"
        )


if __name__ == "__main__":
    main()
