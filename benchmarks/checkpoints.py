r"""Decoding, prefill and memory beside transformers' generate, from the same folder.

Two models with random weights, written by `save_released` and opened by both: `nano` as chapter 06
trains it (fp32), and four layers as wide as V2-Lite (bf16: 2.0 billion weights). Each side writes
the same number of tokens greedily after prompts of equal length, through its own cache; of
transformers' kinds of experts the fastest counts. Interleaved in one process, medians. Memory is
the peak of a process of its own, loading included. goal: what we had set out to reach.

compiled: nano once more after `compile_decoding`, beside theirs as it is, and compiled as well
(into their cache of fixed length, the faster of the two kinds that can be).

Run:  python benchmarks/checkpoints.py          8 minutes on two CPU cores
"""

import argparse
import contextlib
import importlib.util
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
chapter = import_module("08_checkpoints")
base, measure = chapter.base, chapter.measure
MODELS = {  # config, dtype, new tokens, rounds
    "nano": (replace(base.NANO, num_nextn_predict_layers=0), torch.float32, 64, 9),
    "v2_lite_4_layers": (
        replace(base.V2_LITE, num_hidden_layers=4, vocab_size=32768, bos_token_id=0,
                eos_token_id=1),
        torch.bfloat16, 16, 7,
    ),
}  # fmt: skip
PROMPT, PREFILL, EXPERTS = 64, 512, ("eager", "grouped_mm")


def write_model(name: str, folder: Path) -> None:
    config, dtype, _, _ = MODELS[name]
    torch.manual_seed(0)
    with torch.device("meta"):
        model = base.DeepSeek(config)
    model.to(dtype).to_empty(device="cpu")
    for parameter in model.parameters():  # in place: a second copy would be the peak
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02)
    chapter.save_released(model, folder)


def open_theirs(folder: Path, experts: str):
    from transformers import AutoModelForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):
        kind = {"experts_implementation": experts}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **kind).eval()
    model.generation_config.eos_token_id = None  # nothing ends early, and nothing watches for it
    return model


def compiled(model):
    """Theirs with each pass compiled: one graph for the prompt, one for a token."""
    model.generation_config.cache_implementation = "static"
    model.forward = torch.compile(model.forward, dynamic=False)
    return model


def prompts_of(config, batch: int, length: int) -> torch.Tensor:
    return torch.randint(2, config.vocab_size, (batch, length))


def decoders(ours, theirs: dict, prompts: torch.Tensor, new: int) -> dict[str, Callable]:
    """Functions that write `new` tokens after the prompts; none stops before."""
    rows, mask = prompts.tolist(), torch.ones_like(prompts)
    settings = {"max_new_tokens": new, "do_sample": False}
    call = lambda model: model.generate(prompts, attention_mask=mask, pad_token_id=0, **settings)
    tasks = {"ours": lambda: ours.generate(rows, new)}
    return tasks | {name: (lambda model=model: call(model)) for name, model in theirs.items()}


@torch.no_grad()
def race(tasks: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            begin = time.perf_counter()
            task()
            if number:  # the first warms up
                times[name].append(time.perf_counter() - begin)
    return times


def report(name: str, times: dict[str, list[float]], unit: str, amount: int, goal: str) -> None:
    """Ours, the faster of theirs, and the median of the ratios round by round."""
    medians = {who: statistics.median(seconds) for who, seconds in times.items()}
    rival = min((who for who in medians if who != "ours"), key=medians.get)
    ratios = [b / a for a, b in zip(times["ours"], times[rival], strict=True)]
    text = f"x   {amount / medians['ours']:,.0f} {unit} against {amount / medians[rival]:,.0f}"
    text += f" ({rival}); {min(ratios):.2f} to {max(ratios):.2f}"
    text += f"   goal {goal}" if goal else ""
    measure(name, statistics.median(ratios), text)


def speed(name: str, folder: Path) -> None:
    config, _, new, rounds = MODELS[name]
    ours = chapter.load_released(folder).eval()
    theirs = {kind: open_theirs(folder, kind) for kind in EXPERTS}
    tokens = prompts_of(config, 1, 32)
    with torch.no_grad():
        got, want = ours(tokens).float(), theirs["eager"](tokens).logits.float()
        spread = want.std()
    tol = 1e-4 if ours.lm_head.weight.dtype == torch.float32 else 0.1  # bf16: 2^-9 a rounding
    base.check(f"{name}: logits = transformers'", got / spread, want / spread, tol)
    if name == "nano":
        tasks = decoders(ours, theirs, prompts_of(config, 8, PROMPT), new)
        texts = {who: task() for who, task in tasks.items()}
        mine = torch.tensor(texts.pop("ours"))
        for kind, text in texts.items():
            base.check(f"{name}: text = that of {kind}", mine, text[:, PROMPT:], 0)
    for batch in 1, 8:
        tasks = decoders(ours, theirs, prompts_of(config, batch, PROMPT), new)
        times = race(tasks, rounds)
        report(f"decode_ratio_{name}_batch_{batch}", times, "tokens/s", batch * new, "3")
    tokens = prompts_of(config, 1, PREFILL)
    tasks = {"ours": lambda: ours(tokens, ours.new_caches(1, PREFILL))}  # theirs fill one, too
    tasks |= {kind: (lambda model=model: model(tokens)) for kind, model in theirs.items()}
    report(f"prefill_ratio_{name}", race(tasks, rounds), "tokens/s", PREFILL, "1")
    if name != "nano":  # the other's time is that of reading its weights
        return
    chapter.compile_decoding(ours)
    kinds = "grouped_mm", "batched_mm"
    also = {f"{kind}, compiled": compiled(open_theirs(folder, kind)) for kind in kinds}
    for batch in 1, 8:
        for kind, rivals in ("compiled", theirs), ("both_compiled", also):
            times = race(decoders(ours, rivals, prompts_of(config, batch, PROMPT), new), rounds)
            key = f"decode_ratio_{name}_batch_{batch}_{kind}"
            report(key, times, "tokens/s", batch * new, "3" if rivals is theirs else "")


def peak(name: str, folder: Path, who: str) -> int:
    """MB that a fresh process takes to load the folder and write 8 rows."""
    command = [sys.executable, __file__, "--peak", name, str(folder), who]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure_peak(name: str, folder: Path, who: str) -> None:
    import resource

    config, _, new, _ = MODELS[name]
    prompts = prompts_of(config, 8, PROMPT)
    if who == "ours":
        tasks = decoders(chapter.load_released(folder).eval(), {}, prompts, new)
    else:
        tasks = decoders(None, {who: open_theirs(folder, who)}, prompts, new)
    with torch.no_grad():
        tasks[who]()
    status = Path("/proc/self/status")
    if status.exists():  # there ru_maxrss is at least what the process that started this one held
        [kilobytes] = (line.split()[1] for line in status.open() if line.startswith("VmHWM"))
        return print(int(kilobytes) // 1024)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit)


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    cli.add_argument("--peak", nargs=3, metavar=("MODEL", "FOLDER", "WHO"), help=argparse.SUPPRESS)
    args = cli.parse_args()
    try:
        from transformers.utils import logging
    except ImportError:
        print("skipped: transformers is not installed")
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.peak:
        name, folder, who = args.peak
        return measure_peak(name, Path(folder), who)
    for name in args.models:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / name
            write_model(name, folder)
            if importlib.util.find_spec("resource"):  # Windows has none
                megabytes = {who: peak(name, folder, who) for who in ("ours", *EXPERTS)}
                rival = min(EXPERTS, key=megabytes.get)
                mine, theirs = megabytes["ours"], megabytes[rival]
                text = f"x   {mine:,} MB against {theirs:,} ({rival})   goal 1"
                measure(f"peak_memory_{name}", mine / theirs, text)
            speed(name, folder)


if __name__ == "__main__":
    main()
