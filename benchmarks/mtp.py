r"""MTP on the model that 06_train.py trained: acceptance, and what drafting does to its speed.

Reads a run's checkpoint and held-out text. Greedy text behind 200 prompts of all lengths up to 128
must be the same token for token with drafts and without. Costs and speeds are of batch 1 in fp32,
interleaved, medians. The figure shows acceptance by position and kind of token, and speed-up
against acceptance.

--ablation N instead trains the nano model for N steps with MTP and without, three seeds each, and
compares the main head's held-out loss.

Run:  python benchmarks/mtp.py runs/nano            1 minute on two CPU cores
      python benchmarks/mtp.py --ablation 600      11 minutes
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
mtp = import_module("05_mtp")
chapter = import_module("06_train")


def drafts(run: Path, device: torch.device, out: Path) -> None:
    entry = json.loads((run / "run.json").read_text())
    model = chapter.DeepSeek.from_pretrained(run / "checkpoint", device).eval()
    if not model.mtp:
        raise ValueError(f"{run} has no MTP module to draft with")
    encoding = chapter.load_encoding(run / "checkpoint/encoding.json")
    dtype = chapter.token_dtype(encoding)
    held_out = np.memmap(run.parent / entry["data_digest"] / "held_out", dtype, "r")
    starts = np.linspace(0, len(held_out) - 128, 200).astype(int)
    lengths = np.resize(np.arange(1, 129), 200)  # every cache split up to 128
    lengths[0] = 128  # the costs are taken behind this one
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
    if args.ablation is not None and args.ablation < 1:
        cli.error(f"--ablation must be positive, got {args.ablation}")
    torch.manual_seed(args.seed)
    try:
        if args.run:
            drafts(args.run, device, args.out)
        else:
            ablation(args.ablation, device)
    except (OSError, KeyError, ValueError) as error:
        cli.exit(2, f"{args.run}: {error}\n")


if __name__ == "__main__":
    main()
