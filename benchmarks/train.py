r"""A whole training step beside transformers' DeepseekV3ForCausalLM, from the same weights.

Both sides take the `nano` config without MTP, the same batch, and AdamW (fused) with clipping.
transformers runs in {eager, grouped_mm experts} × {fp32, bf16 autocast} with its default attention
(SDPA); each is timed, and ours is compared with the best of them. Interleaved, medians.

Run:  python benchmarks/train.py          1 minute on two CPU cores
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
chapter = import_module("06_train")


def our_step(model, recipe, rows: Tensor) -> Callable[[], float]:
    step = chapter.stepper(model, chapter.make_optimizer(model, recipe), recipe)
    return lambda: step([rows], 1.0, 0.0)[0].item()


def their_step(model, recipe, rows: Tensor, bf16: bool) -> Callable[[], float]:
    """The loop of transformers' own examples: labels in, loss out."""
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def step() -> float:
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=bf16):
            # shift_labels: ours are shifted already
            loss = model(input_ids=tokens, shift_labels=labels, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    cli.add_argument("--device", default=default)
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--rounds", type=int, default=15)
    args = cli.parse_args()
    if args.rounds < 1:
        cli.error(f"--rounds must be positive, got {args.rounds}")
    # oneDNN keeps 1,024 compiled products: rivals would push out those of one another
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    try:
        from transformers import DeepseekV3ForCausalLM
        from transformers.utils import logging
    except ImportError:
        print("skipped: transformers is not installed")
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device).item()
    except Exception as error:  # each backend raises a type of its own
        cli.exit(2, f"cannot run on --device {args.device}: {str(error).splitlines()[0][:100]}\n")
    torch.manual_seed(args.seed)
    config, recipe = chapter.PRESETS["nano"]
    config = replace(config, num_nextn_predict_layers=0)
    ours = chapter.DeepSeek(config).to(device).train()
    shape = recipe.batch_size, recipe.context + 1
    rows = torch.randint(config.vocab_size, shape, device=device)  # (B, T + 1)

    steps, first = {"ours": our_step(ours, recipe, rows)}, {}
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        for experts in "eager", "grouped_mm":
            for bf16 in False, True:
                model = DeepseekV3ForCausalLM.from_pretrained(
                    folder, experts_implementation=experts, dtype=torch.float32
                )
                name = f"{experts}_{'bf16' if bf16 else 'fp32'}"
                steps[name] = their_step(model.to(device).train(), recipe, rows, bf16)
    times = {name: [] for name in steps}
    for _ in range(args.rounds + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            loss = step()
            times[name].append(time.perf_counter() - begin)
            first.setdefault(name, loss)
    # bf16 rounds the logits to 8 bits; averaged over a batch little of that is left
    losses = torch.tensor(list(first.values()))
    chapter.check("first loss = transformers", losses, losses[:1].expand_as(losses), 1e-2)
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    tokens = recipe.batch_size * recipe.context
    for name, seconds in medians.items():
        chapter.measure(f"{name}_tokens_per_second", tokens / seconds, f"{seconds:.3f} s")
    best = min((name for name in medians if name != "ours"), key=medians.get)
    ratio = medians[best] / medians["ours"]
    chapter.measure("transformers_ratio", ratio, f"times the tokens/s of {best}")


if __name__ == "__main__":
    main()
