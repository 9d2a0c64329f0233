r"""MTP on the model that 06_train.py trained: acceptance, and what drafting does to its speed.

Reads a run's checkpoint and held-out text. Greedy text after 200 prompts of all lengths up to 128
must be the same token for token with drafts and without. Costs and speeds are of batch 1 in fp32,
interleaved, medians. The figure shows acceptance by position and kind of token, and speed-up
against acceptance.

--graphs: passes and drafts are CUDA graphs, with drafts and without, so that what Python takes to
launch them is not what is compared.
--ablation N instead trains the nano model for N steps with MTP and without, three seeds each, and
compares the main head's held-out loss.

Run:  python benchmarks/mtp.py runs/nano            1 minute on two CPU cores
      python benchmarks/mtp.py runs/nano --graphs   needs a GPU
      python benchmarks/mtp.py --ablation 600      11 minutes
"""

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
mtp = import_module("05_mtp")
chapter = import_module("06_train")


class FixedCache(chapter.mla.LatentCache):
    """A LatentCache that a CUDA graph can fill: written in place, and always of all its slots.

    Those at and past `lengths` are hidden from every query, as stale ones are.
    """

    def __init__(self, *sizes, **place):
        super().__init__(*sizes, **place)
        self.even = False  # where a row's slots begin is known to the GPU alone

    def append(self, latent: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
        kept, self.used = self.lengths, 0
        super().append(latent, k_rope)
        self.lengths, self.used = kept.copy_(self.lengths), self.room
        return self.entries

    def truncate(self, lengths: torch.Tensor | int) -> None:
        self.lengths.copy_(torch.as_tensor(lengths))


class Replay:
    """`function(*inputs, caches)` for one or two tokens as a CUDA graph, one for each shape.

    inputs: (B, T) or (B, T, C), caches: a FixedCache or a list of them. With anything else, and for
    more tokens, it just calls.
    """

    def __init__(self, function: Callable):
        self.function, self.recorded = function, {}

    def __deepcopy__(self, memo: dict) -> "Replay":
        return Replay(copy.deepcopy(self.function, memo))  # of the copied module, if it is a method

    def __call__(self, *arguments) -> torch.Tensor:
        *inputs, caches = arguments
        several = caches if isinstance(caches, list) else [caches]
        if not isinstance(several[0], FixedCache) or inputs[0].shape[1] > 2:
            return self.function(*arguments)
        key = (*map(id, several), *(x.shape for x in inputs))
        if key not in self.recorded:  # the caches too: alive, they keep their ids
            self.recorded[key] = caches, *self.record(inputs, caches, several)
        _, fixed, run, out = self.recorded[key]
        for place, x in zip(fixed, inputs, strict=True):
            place.copy_(x)
        run()
        return out.clone()

    def record(self, inputs: list, caches, several: list[FixedCache]) -> tuple:
        """-> where it reads its inputs, what runs it, where it leaves its output."""
        fixed, lengths = [x.clone() for x in inputs], [cache.lengths.clone() for cache in several]

        def once() -> torch.Tensor:
            for cache, length in zip(several, lengths, strict=True):
                cache.truncate(length)
            return self.function(*fixed, caches)

        if not inputs[0].is_cuda:
            out = once()
            run = lambda: out.copy_(self.function(*fixed, caches))
        else:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # compiles the kernels, and times them
                for _ in range(3):
                    once()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self.function(*fixed, caches)
            run = graph.replay
        for cache, length in zip(several, lengths, strict=True):
            cache.truncate(length)
        return fixed, run, out


def record_passes(model: "chapter.DeepSeek") -> None:
    """From now on `model` decodes by graphs. Texts of a size share their caches: one at a time."""
    made, c, weight = {}, model.config, model.lm_head.weight

    def new_caches(batch: int, max_tokens: int, layers: int | None = None) -> list[FixedCache]:
        key = batch, -(-max_tokens // 256) * 256, layers
        if key not in made:
            sizes = *key[:2], c.kv_lora_rank, c.qk_rope_head_dim
            place = {"device": weight.device, "dtype": weight.dtype}
            count = c.num_hidden_layers if layers is None else layers
            made[key] = [FixedCache(*sizes, **place) for _ in range(count)]
        for cache in made[key]:
            cache.truncate(0)
        return made[key]

    model.new_caches, model.hidden = new_caches, Replay(model.hidden)
    for module in model.mtp:
        module.forward = Replay(module.forward)


def drafts(run: Path, device: torch.device, graphs: bool, out: Path) -> None:
    entry = json.loads((run / "run.json").read_text())
    model = chapter.DeepSeek.from_pretrained(run / "checkpoint", device).eval()
    if not model.mtp:
        raise ValueError(f"{run} has no MTP module to draft with")
    if graphs:
        record_passes(model)
    encoding = chapter.load_encoding(run / "checkpoint/encoding.json")
    dtype = chapter.token_dtype(encoding)
    held_out = np.memmap(run.parent / entry["data_digest"] / "held_out", dtype, "r")
    starts = np.linspace(0, len(held_out) - 128, 200).astype(int)
    lengths = np.resize(np.arange(1, 129), 200)  # every cache split up to 128
    lengths[0] = 128  # the costs are taken after this one
    pairs = zip(starts, lengths, strict=True)
    prompts = [held_out[start : start + length].tolist() for start, length in pairs]
    width = entry["recipe"]["context"]
    count = min(50, len(held_out) // width)
    if not count:
        raise ValueError(f"{len(held_out)} tokens held out: want {width} at least")
    rows = torch.from_numpy(held_out[: count * width].astype(np.int64)).view(count, width)
    decode = lambda tokens: encoding.decode(tokens, errors="replace")
    found = mtp.report(model, prompts, rows.to(device), decode, new=128)
    figure = out / "mtp.png"
    mtp.draw(figure, **found)
    print(f"figure   {figure}")


def ablation(steps: int, device: torch.device) -> None:
    """Same seed, same batches, same number of tokens."""
    config, recipe = chapter.PRESETS["nano"]
    recipe = replace(recipe, steps=steps)
    documents = chapter.read_documents(None)
    gains = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = chapter.prepare(documents, config.vocab_size, Path(folder))
        end = corpus.encoding.encode_single_token(chapter.END)
        sizes = {"vocab_size": corpus.encoding.n_vocab, "bos_token_id": end, "eos_token_id": end}
        for seed in range(3):
            bits = {}
            for depth in 1, 0:
                torch.manual_seed(seed)
                model = chapter.DeepSeek(replace(config, num_nextn_predict_layers=depth, **sizes))
                run = Path(folder) / f"seed{seed}-depth{depth}"
                chapter.train(model.to(device), corpus, recipe, run, seed)
                stride = recipe.context // 2
                nats, _ = chapter.evaluate(model, corpus.held_out, recipe.context, stride)
                bits[depth] = nats / math.log(2) / corpus.held_out_bytes
                kind = "with" if depth else "without"
                text = f"bit/byte held out, {steps} steps"
                mtp.measure(f"seed_{seed}_{kind}_mtp", bits[depth], text)
            gains.append(bits[0] - bits[1])
    text = f"bit/byte, spread {statistics.stdev(gains):.2g}   V3 table 4: .729 - .729"
    mtp.measure("gain_of_mtp", statistics.fmean(gains), text)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    cli.add_argument("run", type=Path, nargs="?", help="folder of a run of 06_train.py")
    cli.add_argument("--ablation", type=int, metavar="STEPS", help="train with and without MTP")
    cli.add_argument("--device", default=default, help="cpu, cuda, cuda:1, … (%(default)s)")
    cli.add_argument("--graphs", action="store_true", help="decode by CUDA graphs")
    cli.add_argument("--seed", type=int, default=0, help="of drawn text (%(default)s)")
    cli.add_argument("--out", type=Path, default="runs", help="folder of the figure (%(default)s/)")
    args = cli.parse_args()
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device).item()
    except Exception as error:  # each backend raises a type of its own
        cli.exit(2, f"cannot run on --device {args.device}: {str(error).splitlines()[0][:100]}\n")
    if (args.run is None) == (args.ablation is None):
        cli.error("want the folder of a run, or --ablation STEPS")
    if args.graphs and (device.type != "cuda" or not args.run):
        cli.error(f"--graphs wants a run and a GPU, got --device {args.device}")
    if args.ablation is not None and args.ablation < 1:
        cli.error(f"--ablation must be positive, got {args.ablation}")
    torch.manual_seed(args.seed)
    try:
        if args.run:
            drafts(args.run, device, args.graphs, args.out)
        else:
            ablation(args.ablation, device)
    except (OSError, KeyError, ValueError) as error:
        cli.exit(2, f"{args.run}: {error}\n")


if __name__ == "__main__":
    main()
