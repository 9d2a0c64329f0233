r"""MTP on the model that 06_train.py trained: acceptance, and what drafting does to its speed.

Reads a run's checkpoint and held-out text. Greedy text after 200 prompts of all lengths up to 128
must be the same token for token with drafts and without. Costs and speeds are of batch 1 in fp32,
interleaved, medians. The figure shows acceptance by position and kind of token, and speed-up
against acceptance.

--graphs: a step is one CUDA graph, with drafts (draft, verification, bookkeeping) and without, so
that what Python takes to launch kernels is not what is compared.
--ablation N instead trains the nano model for N steps with MTP and without, three seeds each, and
compares the main head's held-out loss.

Run:  python benchmarks/mtp.py runs/nano            1 minute on two CPU cores
      python benchmarks/mtp.py runs/nano --graphs   needs a GPU
      python benchmarks/mtp.py --ablation 600      11 minutes
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
mtp = import_module("05_mtp")
chapter = import_module("06_train")
files = import_module("08_checkpoints")  # FixedCache


class Decoding:
    """Greedy text of a batch, a step at a time: `step` as one CUDA graph, and what it remembers."""

    def __init__(self, model: "chapter.DeepSeek", batch: int, room: int, layers: int):
        c, weight = model.config, model.lm_head.weight
        self.model, self.rows = model, torch.arange(batch, device=weight.device)
        sizes = batch, room, c.kv_lora_rank, c.qk_rope_head_dim
        place = {"device": weight.device, "dtype": weight.dtype}
        self.caches = [files.FixedCache(*sizes, **place) for _ in range(layers)]
        self.lengths = self.rows.new_zeros(layers, batch)  # of all caches: cut by one kernel
        for cache, lengths in zip(self.caches, self.lengths, strict=True):
            cache.lengths = lengths
        self.pending = self.rows.new_zeros(batch)  # chosen, and in no cache yet

    def record(self) -> None:
        """From now on `run` is `step`, on a GPU as a graph; the caches hold what nobody needs."""
        self.run = self.step
        if self.pending.is_cuda:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):  # compiles the kernels
                    self.step()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=aside):
                self.step()
            self.run = graph.replay

    def read(self, prompts: list[list[int]]) -> torch.Tensor:
        """The prompts into the main model's caches -> its states (B, T, C); `pending` follows."""
        width = max(map(len, prompts))
        padded = [prompt + [0] * (width - len(prompt)) for prompt in prompts]
        self.padded = torch.tensor(padded, device=self.pending.device)
        kept = torch.tensor([len(prompt) for prompt in prompts], device=self.pending.device)
        self.lengths.zero_()
        states = self.model.hidden(self.padded, self.caches[: len(self.model.model.layers)])
        self.lengths.copy_(kept)
        self.pending.copy_(self.model.head(states[self.rows, kept - 1]).argmax(-1))
        return states


class Plain(Decoding):
    def __init__(self, model: "chapter.DeepSeek", batch: int, room: int):
        super().__init__(model, batch, room, len(model.model.layers))
        self.record()

    def step(self) -> None:
        states = self.model.hidden(self.pending[:, None], self.caches)
        self.pending.copy_(self.model.head(states[:, 0]).argmax(-1))

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        self.read(prompts)
        columns = [self.pending.tolist()]
        while len(columns) < new:
            self.run()
            columns.append(self.pending.tolist())
        return [list(row) for row in zip(*columns, strict=True)]


class Speculative(Decoding):
    """Draft, verification and what is kept of them: 05's loop at temperature 0."""

    def __init__(self, model: "chapter.DeepSeek", module, batch: int, room: int):
        super().__init__(model, batch, room, 1 + len(model.model.layers))
        self.module, make = module, self.rows.new_zeros
        self.kept, self.left = make(batch), make(batch)  # tokens in the caches; still to be written
        self.fresh, self.joined = make(batch) + 1, make(batch, 2)  # pairs new to the module
        self.states = self.model.lm_head.weight.new_zeros(batch, 2, model.config.hidden_size)
        self.out = make(batch, 3)  # what a step tells the host: accepted, draft, token after it
        self.record()

    def draft(self) -> torch.Tensor:
        embedded = self.model.embed(self.joined)
        guess = self.module(embedded, self.states, self.caches[-1])[self.rows, self.fresh - 1]
        return self.model.head(guess).argmax(-1)

    def verify(self, draft: torch.Tensor) -> torch.Tensor:
        tokens = torch.stack((self.pending, draft), 1)
        self.states.copy_(self.model.hidden(tokens, self.caches[:-1]))
        return self.model.head(self.states).argmax(-1)  # after the pending token; after the draft

    def step(self) -> None:
        draft = self.draft()
        self.caches[-1].truncate(self.kept)  # the second pair may have been padding
        after = self.verify(draft)
        accepted = draft == after[:, 0]
        chosen = torch.where(accepted, after[:, 1], after[:, 0])
        self.out.copy_(torch.stack((accepted, draft, chosen), 1))
        self.left -= 1 + accepted.long()
        self.fresh.copy_((1 + accepted.long()) * (self.left > 0))  # ended rows run on the spot
        self.kept += self.fresh
        self.lengths[:-1].copy_(self.kept)  # a rejected draft leaves no trace
        self.joined.copy_(torch.stack((torch.where(accepted, draft, chosen), chosen), 1))
        self.pending.copy_(chosen)

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list, list]:
        states = self.read(prompts)
        self.kept.copy_(self.lengths[0])
        joined = self.padded.roll(-1, 1)
        joined[self.rows, self.kept - 1] = self.pending
        self.lengths[-1].zero_()
        self.module(self.model.embed(joined), states, self.caches[-1])
        self.lengths[-1].copy_(self.kept - 1)  # the last pair comes again, in the first step
        self.states.copy_(states[self.rows, self.kept - 1, None].expand(-1, 2, -1))
        self.joined.copy_(self.pending[:, None].expand(-1, 2))
        self.fresh.fill_(1)
        self.left.fill_(new - 1)
        texts, verdicts = [[token] for token in self.pending.tolist()], [[] for _ in prompts]
        while any(len(text) < new for text in texts):
            self.run()
            for text, seen, (right, *two) in zip(texts, verdicts, self.out.tolist(), strict=True):
                if len(text) < new:
                    seen.append(bool(right))
                    text += two[: new - len(text)] if right else two[1:]
        return texts, verdicts


class Draft(Speculative):  # this and the next are a step's parts, for `costs`
    def step(self) -> None:
        self.draft()


class Verify(Speculative):
    def step(self) -> None:
        self.verify(self.pending)


class Graphs:
    """Stands in for what 05's report calls: a step is a graph, recorded once for each size."""

    def __init__(self, model: "chapter.DeepSeek"):
        self.model, self.made, self.draw = model, {}, mtp.speculative_generate

    def of(self, kind: Callable, *module, prompts: list, new: int) -> Decoding:
        room = -(-(max(map(len, prompts)) + new) // 256) * 256
        key = kind, *module, len(prompts), room
        if key not in self.made:
            self.made[key] = kind(self.model, *module, len(prompts), room)
        return self.made[key]

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        return self.of(Plain, prompts=prompts, new=new).generate(prompts, new)

    @torch.no_grad()
    def speculative_generate(self, model, module, prompts, new, temperature=0.0) -> tuple:
        if temperature:  # what is drawn is not recorded
            return self.draw(model, module, prompts, new, temperature)
        return self.of(Speculative, module, prompts=prompts, new=new).generate(prompts, new)

    @torch.no_grad()
    def costs(self, model, module, prompt: list[int], rounds: int) -> dict[str, float]:
        """As 05's, of graphs. A draft reads two pairs always: one of them may be padding."""
        size = {"prompts": [prompt], "new": 2 * (rounds + 3)}
        parts = {
            "plain": self.of(Plain, **size),
            "verify": self.of(Verify, module, **size),
            "draft1": self.of(Draft, module, **size),
        }
        for part in parts.values():
            part.read([prompt])
        times = {name: [] for name in parts}
        for _ in range(rounds + 3):
            for name, part in parts.items():
                times[name].append(mtp.seconds(part.run))
        cost = {name: statistics.median(values[3:]) for name, values in times.items()}
        return cost | {"draft2": cost["draft1"]}


def drafts(run: Path, device: torch.device, graphs: bool, out: Path) -> None:
    entry = json.loads((run / "run.json").read_text())
    model = chapter.DeepSeek.from_pretrained(run / "checkpoint", device).eval()
    if not model.mtp:
        raise ValueError(f"{run} has no MTP module to draft with")
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
    decode = partial(chapter.spelled, encoding)
    with contextlib.ExitStack() as stack:
        if graphs:
            made = Graphs(model)
            model.generate = made.generate
            for name in "speculative_generate", "costs":
                stack.enter_context(patch.object(mtp, name, getattr(made, name)))
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
        del corpus  # maps files of the folder, which Windows would not remove
    text = f"bit/byte, spread {statistics.stdev(gains):.2g}   V3 table 4: .729 - .729"
    mtp.measure("gain_of_mtp", statistics.fmean(gains), text)


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
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
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)  # graphs and timers are of the current one
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
