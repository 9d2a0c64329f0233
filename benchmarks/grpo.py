r"""What GRPO does on other seeds, for longer, in variants, with a leaky reward, and beside TRL.

    seeds     the chapter's run from nothing: before, after, and the ceiling
    variants  std or mean, KL, clip-higher, token or sequence mean, four epochs, five times the rate
    stable    500 steps: does it decay after its peak?
    beyond    a weak base that always thinks: rewards beside more examples and rejection sampling
    hack      a reward that looks for the answer anywhere; what the policy finds; the fix
    r1        R1's four stages, and a dense model that learns from the result or from rewards alone
    trl       completions a second beside TRL's GRPOTrainer, same weights, update included

Each run has one thread; as many run at a time as there are cores. Intervals are over seeds: the
mean plus or minus the standard deviation.

Run:  python benchmarks/grpo.py seeds          13 minutes on two CPU cores
"""

import argparse
import contextlib
import copy
import io
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
chapter = import_module("07_grpo")
attn = import_module("01_attention")  # GroupedQueryAttention, KVCache
base, measure = chapter.base, chapter.measure
Recipe, Examples = chapter.Recipe, chapter.Examples
TASK, ENCODING = chapter.Clock(), chapter.byte_encoding()
VARIANTS = {
    "default": {},
    "std": {"advantages": "std"},
    "kl": {"beta": 0.04},
    "kl_weighed": {"beta": 0.04, "weigh_kl": True},
    "clip_high": {"clip_high": 0.28},
    "token_mean": {"denominator": "token"},
    "sequence_mean": {"denominator": "sequence"},
    "4_epochs": {"epochs": 4},
    "4_epochs_clip_high": {"epochs": 4, "clip_high": 0.28},
    "rate_x5": {"learning_rate": 1e-3},
}


def quietly(function: Callable, *arguments):
    """No progress bars: several would write over one another."""
    with contextlib.redirect_stderr(io.StringIO()):
        return function(*arguments)


def look(model, seed: int = 777) -> dict:
    return chapter.evaluate(model, ENCODING, TASK, seed=seed)


def examples(model, example: Callable, recipe: Examples, seed: int, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        chapter.train_examples(model, ENCODING, example, recipe, Path(folder) / name, seed)


def rewarded(model, recipe: Recipe, seed: int, reward=None) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = ENCODING, TASK, recipe, Path(folder) / "rl", seed, reward
        return chapter.train_grpo(model, *arguments)


def base_of(seed: int, store: Path) -> list[nn.Module]:
    """The models of the chapter's first two stages, kept in `store`: worked, and cold-started."""
    torch.set_num_threads(1)
    folders = [store / f"worked-{seed}", store / f"cold-{seed}"]
    if not (folders[1] / "config.json").exists():
        torch.manual_seed(seed)
        model = base.DeepSeek(chapter.TINY)
        examples(model, TASK.clean, chapter.STAGES["worked"], seed, "worked")
        model.save_pretrained(folders[0])
        examples(model, TASK.cold, chapter.STAGES["cold"], seed, "cold")
        model.save_pretrained(folders[1])
    return [base.DeepSeek.from_pretrained(folder) for folder in folders]


def seeds(seed: int, store: Path, steps: int) -> dict:
    worked, model = base_of(seed, store)
    ceiling, before = look(worked), look(model)
    metrics = rewarded(model, Recipe(steps=steps), seed)
    fresh = look(model, seed=1000 + seed)  # problems that no one has looked at before
    return {"ceiling": ceiling, "before": before, "after": look(model), "fresh": fresh,
            "metrics": metrics}  # fmt: skip


def variant(job: tuple[str, int], store: Path, steps: int) -> dict:
    name, seed = job
    _, model = base_of(seed, store)
    metrics = rewarded(model, Recipe(steps=steps, **VARIANTS[name]), seed)
    return {"after": look(model), "metrics": metrics}


def report_seeds(runs: dict[int, dict]) -> None:
    for seed, run in runs.items():
        before, after, ceiling, fresh = (run[k] for k in ("before", "after", "ceiling", "fresh"))
        text = f"from {before['pass_at_1']:.3f}; ceiling {ceiling['pass_at_1']:.3f}; "
        text += f"fresh problems {fresh['pass_at_1']:.3f}"
        measure(f"pass_at_1_seed_{seed}", after["pass_at_1"], text)
        text = f"format {after['format']:.4f}, pass@8 before {before['pass_at_8']:.3f}, "
        text += f"length x{after['length'] / before['length']:.2f}"
        measure(f"greedy_seed_{seed}", after["greedy"], text)
    for key, stage in ("before", "before"), ("after", "after"), ("ceiling", "ceiling"):
        spread(f"pass_at_1_{key}", [run[stage]["pass_at_1"] for run in runs.values()])
    spread("pass_at_1_fresh", [run["fresh"]["pass_at_1"] for run in runs.values()])
    spread("greedy_after", [run["after"]["greedy"] for run in runs.values()])


def spread(name: str, values: list[float], text: str = "") -> None:
    shown = ", ".join(f"{value:.3f}" for value in values)
    deviation = f"± {statistics.stdev(values):.3f}, " if len(values) > 1 else ""
    measure(name, statistics.fmean(values), f"{deviation}seed by seed {shown} {text}".rstrip())


def report_variants(runs: dict[tuple, dict]) -> None:
    for name in dict.fromkeys(name for name, _ in runs):
        mine = [run for (other, _), run in runs.items() if other == name]
        length = statistics.fmean(run["after"]["length"] for run in mine)
        step = [next((e["step"] for e in r["metrics"] if e["accuracy"] >= 0.8), 0) for r in mine]
        text = f"length {length:.1f}, first batch of 0.8 at step {step}"
        spread(f"pass_at_1_{name}", [run["after"]["pass_at_1"] for run in mine], text)


def report_stable(runs: dict[tuple, dict]) -> None:
    for (name, seed), run in runs.items():
        accuracy = [entry["accuracy"] for entry in run["metrics"]]
        n = min(50, len(accuracy))
        windows = [statistics.fmean(accuracy[i : i + n]) for i in range(len(accuracy) - n + 1)]
        last, best = windows[-1], max(windows)
        text = f"mean of the last {n} of {len(accuracy)} steps; best {n}: {best:.3f}; "
        text += f"held out {run['after']['pass_at_1']:.3f}, greedy {run['after']['greedy']:.3f}"
        measure(f"last_50_{name}_seed_{seed}", last, text)
        measure(f"decay_{name}_seed_{seed}", best - last)


# A weak base, and three ways to make it better ------------------------------------------------
WEAK, RECIPE = chapter.PRESETS["beyond"]


def weak_base(seed: int) -> tuple[nn.Module, int]:
    """The first of 560, 540, … steps of training that leave a third of its answers wrong, or more.

    Learning is sudden here, at a step that no two seeds share, so one number of steps won't do.
    """
    for steps in range(WEAK["worked"].steps, 0, -20):
        torch.manual_seed(seed)
        model = base.DeepSeek(chapter.TINY)
        examples(model, TASK.clean, replace(WEAK["worked"], steps=steps), seed, "worked")
        if look(model)["pass_at_1"] <= 2 / 3:
            return model, steps
    raise ValueError(f"seed {seed}: even untrained it is right in two of three answers")


def beyond(seed: int, store: Path, steps: int) -> dict:
    """Rewards, and as many seconds of more examples, or of rounds of its own right answers."""
    torch.set_num_threads(1)
    model, worked = weak_base(seed)
    found = {"weak_base": look(model, seed=1000 + seed) | {"worked": worked}}

    def timed(name: str, learn: Callable) -> float:
        student, begin = copy.deepcopy(model), time.process_time()
        learn(student, lambda: time.process_time() - begin)
        seconds = time.process_time() - begin
        found[name] = look(student, seed=1000 + seed) | {"seconds": seconds}
        return seconds

    def at_rate(student, example: Callable, spent: Callable) -> None:
        """One run, one optimizer, as long as the budget lasts by the time of its first 20 steps."""
        begin = spent()
        examples(copy.deepcopy(student), example, Examples(20, 32, 5e-4), seed, "pace")
        steps = max(int((budget - spent()) / (spent() - begin) * 20), 1)
        examples(student, example, Examples(steps, 32, 5e-4), seed, "more")

    def own_answers(student, spent: Callable) -> None:
        own, rounds = [], itertools.count(1000 * seed)
        while spent() < budget / 2:
            own += chapter.own_answers(student, ENCODING, TASK, 512, 4, next(rounds))
        at_rate(student, partial(pick, own), spent)

    recipe = replace(RECIPE, steps=steps)
    budget = timed("rewards", lambda student, _: rewarded(student, recipe, seed))
    timed("more_examples", lambda student, spent: at_rate(student, TASK.clean, spent))
    timed("own_answers", own_answers)
    return found


def pick(pairs: list, rng: random.Random):
    return rng.choice(pairs)


def report_stages(runs: dict[int, dict]) -> None:
    for stage in next(iter(runs.values())):
        mine = [run[stage] for run in runs.values()]
        text = f"; greedy {statistics.fmean(m['greedy'] for m in mine):.3f}"
        if "worked" in mine[0]:
            text += f", after {', '.join(str(m['worked']) for m in mine)} steps"
        text += f", length {statistics.fmean(m['length'] for m in mine):.1f}"
        if "seconds" in mine[0]:
            text += f", {statistics.fmean(m['seconds'] for m in mine):.0f} s of one core"
        spread(f"pass_at_1_{stage}", [m["pass_at_1"] for m in mine], text)


def report_beyond(runs: dict[int, dict]) -> None:
    report_stages(runs)
    gain = lambda run, way: run[way]["pass_at_1"] - run["weak_base"]["pass_at_1"]
    for way in "rewards", "more_examples", "own_answers":
        spread(f"gain_of_{way}", [gain(run, way) for run in runs.values()])


# A reward that leaks --------------------------------------------------------------------------


def leaky(problems: list, texts: list[str]) -> list[float]:
    """Looks for the answer anywhere in the response."""
    return [float(p.answer in text) for p, text in zip(problems, texts, strict=True)]


def hack(job: tuple[str, int], store: Path, steps: int) -> dict:
    name, seed = job
    _, model = base_of(seed, store)
    metrics = rewarded(model, Recipe(steps=steps), seed, leaky if name == "leaky" else None)
    said = [chapter.transcript(model, ENCODING, TASK, s) for s in range(2)]
    return {"after": look(model), "metrics": metrics, "said": said}


def report_hack(runs: dict[tuple, dict]) -> None:
    for (name, seed), run in runs.items():
        last = run["metrics"][-1]
        text = f"held out; its own reward {last['reward']:.3f}, length {last['length']:.1f}"
        measure(f"pass_at_1_{name}_seed_{seed}", run["after"]["pass_at_1"], text)
    for (name, _), run in runs.items():
        print(f"{name}: {run['said'][0]!r}")


# R1's stages, and distillation ----------------------------------------------------------------


class Dense(base.DeepSeek):
    """Chapter 01's grouped-query attention and dense layers in the place of MLA and experts."""

    def __init__(self):
        c = replace(chapter.TINY, first_k_dense_replace=chapter.TINY.num_hidden_layers)
        super().__init__(c)
        for block in self.model.layers:
            block.self_attn = attn.GroupedQueryAttention(c.hidden_size, 4, 2, 32)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=c.initializer_range)

    def new_caches(self, batch: int, max_tokens: int, layers=None) -> list:
        return [attn.KVCache(batch, max_tokens, 2, 32) for _ in self.model.layers]

    def save_pretrained(self, folder: Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)  # it lives as long as this benchmark


def r1(seed: int, store: Path, steps: int) -> dict:
    worked, model = base_of(seed, store)
    found = {"base": look(worked), "cold_start": look(model)}
    rewarded(model, Recipe(steps=steps), seed)
    found["rewards"] = look(model)
    own = partial(pick, chapter.own_answers(model, ENCODING, TASK, 2048, 4, seed))
    examples(worked, own, chapter.OWN, seed, "own")  # as R1: the base again
    found["own_answers"] = look(worked)
    rewarded(worked, Recipe(steps=max(steps // 2, 1)), seed + 1)
    found["rewards_again"] = look(worked)

    torch.manual_seed(seed)
    dense = Dense()  # its base has seen the cold start's examples only, four of five at once
    examples(dense, TASK.cold, Examples(450, 64, 2e-3), seed, "cold")
    found["dense"] = look(dense)
    distilled, begin = copy.deepcopy(dense), time.process_time()
    examples(distilled, own, Examples(300, 64, 1e-3), seed, "distil")
    seconds = time.process_time() - begin
    found["dense_distilled"] = look(distilled) | {"seconds": seconds}
    begin = time.process_time()
    rewarded(dense, Recipe(steps=2 * steps), seed)
    seconds = time.process_time() - begin
    found["dense_rewards_alone"] = look(dense) | {"seconds": seconds}
    return found


# Beside TRL -----------------------------------------------------------------------------------


def trl(store: Path, rounds: int = 7, steps: int = 10) -> None:
    """The first steps from the cold start, in turns; whole wall time of both, start-up left out."""
    try:
        import datasets
        import transformers
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        print(f"skipped: {error.name} is not installed (pip install trl)")
        return
    base_of(0, store)  # sets one thread
    cold = store / "cold-0"
    specials = {name: 256 + i for i, name in enumerate((base.END, *chapter.TAGS))}
    tokenizer = byte_tokenizer(specials)
    rng = random.Random(0)
    problems = [TASK.problem(rng, held_out=False) for _ in range(32 * steps)]
    answers = {problem.prompt: problem for problem in problems}

    def reward(prompts, completions, **_) -> list[float]:
        clean = [text.replace(base.END, "") for text in completions]
        return [
            TASK.reward(answers[p.removeprefix(base.END)], text)
            for p, text in zip(prompts, clean, strict=True)
        ]

    class Stopwatch(transformers.TrainerCallback):
        def __init__(self):
            self.marks = []

        def on_step_end(self, *args, **kwargs):
            self.marks.append(time.perf_counter())

    def theirs(folder: str, bf16: bool) -> float:
        """Seconds a batch of 256 completions, the first one left out."""
        model = transformers.AutoModelForCausalLM.from_pretrained(cold, dtype=torch.float32)
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=128, gradient_accumulation_steps=1,
            steps_per_generation=2, num_generations=8, max_completion_length=TASK.max_new_tokens,
            max_steps=2 * steps, learning_rate=2e-4, beta=0.0, epsilon=0.2, loss_type="dr_grpo",
            scale_rewards="none", temperature=1.0, bf16=bf16, gradient_checkpointing=False,
            report_to=[], save_strategy="no", logging_steps=1000, disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        watch = Stopwatch()
        trainer = GRPOTrainer(
            model=model, reward_funcs=reward, args=config, processing_class=tokenizer,
            callbacks=[watch],
            train_dataset=datasets.Dataset.from_dict(
                {"prompt": [base.END + problem.prompt for problem in problems]}
            ),
        )  # fmt: skip
        trainer.train()
        return (watch.marks[-1] - watch.marks[1]) / (steps - 1)  # two updates a batch

    def ours(bf16: bool, skip_ties: bool = False) -> float:
        model = base.DeepSeek.from_pretrained(cold)
        recipe = Recipe(steps=steps, skip_ties=skip_ties, bf16=bf16)
        begin = time.perf_counter()
        metrics = rewarded(model, recipe, 0)  # logging and saving included
        return (time.perf_counter() - begin - metrics[0]["seconds"]) / (steps - 1)

    kinds: dict[str, Callable[[], float]] = {
        "ours_fp32": lambda: ours(False),
        "ours_bf16": lambda: ours(True),
        "ours_bf16_skipping": lambda: ours(True, True),
        **{f"trl_{'bf16' if b else 'fp32'}": partial(temporary, theirs, b) for b in (False, True)},
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, kind in kinds.items():
            times[name].append(kind())
    for name, seconds in times.items():
        text = f"median of {rounds} rounds, the update included"
        measure(f"completions_per_second_{name}", 256 / statistics.median(seconds), text)
    rival = [min(pair) for pair in zip(times["trl_fp32"], times["trl_bf16"], strict=True)]
    for name, text in (
        ("ours_fp32", "in fp32"),
        ("ours_bf16", "same work, scored in bf16"),
        ("ours_bf16_skipping", "and groups without an advantage skipped"),
    ):
        ratios = [theirs / ours for theirs, ours in zip(rival, times[name], strict=True)]
        name = "trl_ratio" + name.removeprefix("ours").replace("_bf16", "", 1)
        text = f"x the faster of TRL's, {text}; {min(ratios):.2f} to {max(ratios):.2f}"
        measure(name, statistics.median(ratios), text)


def temporary(function: Callable, *arguments):
    with tempfile.TemporaryDirectory() as folder:
        return function(folder, *arguments)


def byte_tokenizer(specials: dict[str, int]):
    """transformers' tokenizer with the chapter's ids: a byte is a token, a tag is one."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {}
    for byte in range(256):  # ByteLevel writes bytes as letters: GPT-2's table
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte
        vocab[byte] = chr(byte) if printable else None
    spare = iter(range(256, 512))
    table = {vocab[b] or chr(next(spare)): b for b in range(256)}
    if sorted(table) != letters:
        raise ValueError("the byte alphabet is another one than GPT-2's")
    inner = tokenizers.Tokenizer(models.BPE(table | specials, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    added = [tokenizers.AddedToken(name, special=name == base.END) for name in specials]
    inner.add_tokens(added)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=base.END, pad_token=base.END, padding_side="left"
    )


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    jobs_of = {
        "seeds": (seeds, report_seeds, None, 80),
        "variants": (variant, report_variants, list(VARIANTS), 80),
        "stable": (variant, report_stable, ["default", "rate_x5"], 500),
        "beyond": (beyond, report_beyond, None, RECIPE.steps),
        "hack": (hack, report_hack, ["leaky", "fixed"], 40),
        "r1": (r1, report_stages, None, 80),
        "trl": None,
    }
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("what", choices=jobs_of)
    cli.add_argument("--seeds", type=int, default=3, help="runs of each kind (%(default)s)")
    cli.add_argument("--steps", type=int, help="of GRPO, instead of the experiment's own")
    cli.add_argument("--store", type=Path, help="keep the first stages' models here")
    args = cli.parse_args()
    if args.seeds < 1 or args.steps is not None and args.steps < 1:
        cli.error(f"want at least one seed and one step: {args.seeds}, {args.steps}")
    with tempfile.TemporaryDirectory() as folder:
        store = args.store or Path(folder)
        if args.what == "trl":
            return trl(store, steps=args.steps or 10)
        work, report, kinds, steps = jobs_of[args.what]
        every = range(args.seeds)
        jobs = [(kind, seed) for kind in kinds for seed in every] if kinds else list(every)
        task = partial(quietly, partial(work, store=store, steps=args.steps or steps))
        first = partial(quietly, partial(base_of, store=store))
        workers = min(len(jobs), os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            if args.what != "beyond":  # which has bases of its own
                list(pool.map(first, every))  # before several want the same
            runs = dict(zip(jobs, pool.map(task, jobs), strict=True))
    report(runs)


if __name__ == "__main__":
    main()
