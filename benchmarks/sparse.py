r"""V3.2's continued training, on the model that 06_train.py trained: what does reading less cost?

nano reads 256 tokens of Python; with an indexer in each layer it reads --read of them. Stages as in
DeepSeek-V3.2 (arXiv:2512.02556, §2.1): warm-up of the indexers, then sparse training. Beside the
second, on the same batches: the model as it was, trained on, and one that reads the last tokens
instead. Bits per byte of all held-out text.

Run:  python benchmarks/sparse.py runs/nano [--read 32]          6 minutes on two CPU cores
"""

import argparse
import copy
import json
import math
import sys
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sparse = import_module("10_sparse_attention")
chapter = import_module("06_train")


def by_position(q: Tensor, w: Tensor, k: Tensor) -> Tensor:
    """In place of `index_scores`: the last are read."""
    shape = len(q), q.shape[2], k.shape[1]
    return torch.arange(shape[-1], device=q.device, dtype=torch.float32).expand(shape)


class Trial:
    def __init__(self, run: Path, device: torch.device):
        entry = json.loads((run / "run.json").read_text())
        self.model = chapter.DeepSeek.from_pretrained(run / "checkpoint", device, with_mtp=False)
        self.recipe, self.device = chapter.Recipe(**entry["recipe"]), device
        encoding = chapter.load_encoding(run / "checkpoint/encoding.json")
        folder, dtype = run.parent / entry["data_digest"], chapter.token_dtype(encoding)
        self.train, self.held_out = (np.memmap(folder / n, dtype, "r") for n in chapter.FILES[1:])
        self.bytes = len(encoding.decode_bytes(self.held_out.tolist()))
        self.bytes -= self.held_out.tolist().count(self.model.config.eos_token_id) * len(
            chapter.END
        )

    def learn(self, model: chapter.DeepSeek, steps: int, rate: float, skip=200) -> list[float]:
        """At a constant rate, on text in another order than the run's -> the index losses.

        skip: batches that were read before; the indexers read the first 200.
        """
        indexers = model.indexers() if isinstance(model, sparse.SparseDeepSeek) else []
        own = set(map(id, indexers))
        groups = [p for p in model.parameters() if p.requires_grad and id(p) not in own], indexers
        optimizer = torch.optim.AdamW(sum(groups, []), rate, betas=(0.9, 0.95), weight_decay=0.0)
        batches, found = chapter.batches(self.train, self.recipe, seed=1, skip=skip), []
        model.train()
        for _ in tqdm(range(steps), leave=False, disable=None):
            rows = next(batches).to(self.device)
            with chapter.autocast(self.device):
                loss = model.loss(rows[:, :-1], rows[:, 1:])
                balance = sum(m.balance_loss for m in model.mixtures())
            loss = loss + self.recipe.balance_alpha * balance
            if isinstance(model, sparse.SparseDeepSeek):
                index_loss = model.take_index_loss()
                found.append(index_loss.item())
                loss = loss + index_loss
            loss.backward()
            for group in groups:  # apart: no gradient of an indexer may shorten the model's
                torch.nn.utils.clip_grad_norm_(group, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return found

    def report(self, model: chapter.DeepSeek, name: str, text: str) -> None:
        context = self.recipe.context
        nats, _ = chapter.evaluate(model, self.held_out, context, context // 2)
        sparse.measure(name, nats / math.log(2) / self.bytes, f"bit/byte held out   {text}")


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    cli.add_argument("run", type=Path, help="folder of a run of 06_train.py")
    cli.add_argument("--read", type=int, default=8, help="tokens of the context (%(default)s)")
    cli.add_argument("--device", default=default, help="cpu, cuda, cuda:1, … (%(default)s)")
    cli.add_argument("--seed", type=int, default=0, help="of the indexers (%(default)s)")
    args = cli.parse_args()
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # each backend raises a type of its own
        cli.exit(2, f"cannot run on --device {args.device}: {str(error).splitlines()[0][:100]}\n")
    torch.manual_seed(args.seed)
    try:
        trial = Trial(args.run, torch.device(args.device))
        K, build = args.read, sparse.SparseDeepSeek.from_dense
        model = build(trial.model, index_n_heads=4, index_head_dim=32, index_topk=K)
    except (OSError, KeyError, ValueError) as error:
        cli.exit(2, f"{args.run}: {error}\n")
    context, rate = trial.recipe.context, 5e-4
    trial.report(trial.model, "dense", f"reads all of {context}")
    with patch.object(sparse, "index_scores", by_position):
        trial.report(model, "window", f"the last {K}, not trained for it")
    trial.report(model, "untrained_indexer", f"{K} that an untrained indexer scores highest")
    model.warm_up()
    losses = trial.learn(model, 200, 3e-3, skip=0)
    model.warm_up(False)
    gone = f"index loss {losses[0]:.2f} -> {sum(losses[-20:]) / 20:.2f} nats over the layers"
    trial.report(model, "warm_up", f"{K}; indexers trained for 200 steps: {gone}")
    window = copy.deepcopy(model)
    trial.learn(model, 300, rate)
    trial.report(model, "sparse_training", f"{K}; all trained for 300 steps")
    with patch.object(sparse, "index_scores", by_position):
        trial.learn(window, 300, rate)
        trial.report(window, "window_training", f"the last {K}; trained as long")
    trial.learn(trial.model, 300, rate)
    trial.report(trial.model, "dense_training", f"all of {context}; trained as long")


if __name__ == "__main__":
    main()
