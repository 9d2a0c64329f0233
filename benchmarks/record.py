r"""Run a chapter or a benchmark, re-judge its receipt, and store it under results/.

    python benchmarks/record.py 02_mla.py                ──► results/02_mla.cpu.json    + .png
    python benchmarks/record.py 02_mla.py --bench        ──► results/02_mla.bench.cpu.json
    python benchmarks/record.py benchmarks/moe.py        ──► results/benchmarks/moe.cuda.json

A script prints its receipt on stdout; everything else it prints is prose:

    check    absorbed = explicit, float64                error 3.1e-13   tol 1e-12   ok
    measure  heldout_bits_per_byte                       1.61 bit/byte   xz -9: 1.69

A record is named by the script, then its flags, then the kind of device: `02_mla.cpu` is always the
plain command, and a trial with another flag never replaces it. A new record replaces the old one of
its name, and only when the run has exited 0 with every check passed. The script runs at the root of
the repository. If its --help knows --out and none is given, it writes into a temporary folder: give
one to keep checkpoints. A single PNG goes beside the record under its name; of several, each adds
its own name; one over 2 MB is left out.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
LARGEST_FIGURE = 2_000_000  # bytes: results/ lives in git
ENV = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
CHECK = re.compile(r"check\s+(.+?)\s+error\s+(\S+)\s+tol\s+(\S+)\s+(ok|WRONG)")
MEASURE = re.compile(r"measure\s+([A-Za-z_]\w*)\s+(\S+)(?:\s+(.*))?")


def receipt(lines: list[str]) -> tuple[list[dict], list[dict]]:
    """The checks and measures among printed lines; ValueError for one that can't be believed."""
    checks, measures = [], []
    for line in map(str.rstrip, lines):
        if re.match(r"check\s{2,}", line):  # one space only: a sentence that begins with "check"
            found = CHECK.fullmatch(line)
            if not found:
                raise ValueError(f"unreadable check line: {line!r}")
            name, verdict = found[1], found[4]
            error, tol = float(found[2]), float(found[3])
            ok = 0 <= error <= tol < math.inf  # False for NaN too
            if ok != (verdict == "ok"):  # a wrong verdict, or a tolerance rounded in print
                raise ValueError(f"the line says {verdict}, its numbers don't: {line!r}")
            checks.append({"name": name, "error": number(error), "tol": number(tol), "ok": ok})
        elif re.match(r"measure\s{2,}", line):
            found = MEASURE.fullmatch(line)
            if not found:
                raise ValueError(f"unreadable measure line: {line!r}")
            value = number(float(found[2]))
            measures.append({"name": found[1], "value": value, "text": found[3] or ""})
    return checks, measures


def number(value: float) -> float | str:
    """JSON has no nan and no inf: they are stored as strings, which float() reads back."""
    return value if math.isfinite(value) else str(value)


def git_state(root: Path) -> dict:
    """Commit, and whether the tree is clean outside results/; None where git can't say."""

    def git(*args: str) -> str | None:
        try:
            run = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)
        except OSError:  # no git on this machine
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    # Earlier records don't make the code dirty; else only the first of a series could be clean.
    changes = git("status", "--porcelain", "--", ".", ":(exclude)results")
    return {
        "commit": git("rev-parse", "--verify", "HEAD"),
        "clean": None if changes is None else not changes,
    }


def describe_device(device: str) -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cpu = model[1] if model else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    kind = device.split(":")[0]
    return {"kind": kind, "gpu": gpu, "cpu": cpu, "threads": torch.get_num_threads()}


def versions() -> dict:
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def without_machine_paths(text: str, root: Path) -> str:
    """Paths in the repository become relative; of any other absolute path little is left."""
    home = os.path.expanduser("~")
    for place, short in ((str(root), ""), (home, "~/"), (tempfile.gettempdir(), "…/")):
        if place not in ("/", "~"):  # a home of "/" would match every slash
            text = text.replace(f"{place}{os.sep}", short)
    return re.sub(r"(?<![\w.~…:/])(?:[A-Z]:[\\/]|/)[^\s'\"]+[\\/]([^\s'\"\\/]*)", r"…/\1", text)


def run_live(command: list[str], root: Path) -> tuple[int, list[str]]:
    """Exit code and stdout lines, shown as they come; stderr (progress bars) goes straight on."""
    pipe = {"stdout": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    lines = []
    with subprocess.Popen(command, cwd=root, env=ENV, **pipe) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, lines


def knows(flag: str, command: list[str], root: Path) -> bool:
    if flag not in (root / command[1]).read_text("utf-8"):
        return False  # not even asked: a script without flags would run twice
    asked = [*command, "--help"]
    usage = subprocess.run(asked, cwd=root, env=ENV, capture_output=True, encoding="utf-8")
    return re.search(rf"(?<![\w-]){flag}(?![\w-])", usage.stdout) is not None


def figure_times(out: Path) -> dict[Path, int]:
    """The PNGs under a folder that are small enough for git, with the time of their last write."""
    found = {path: path.stat() for path in sorted(out.rglob("*.png"))}
    return {path: s.st_mtime_ns for path, s in found.items() if s.st_size <= LARGEST_FIGURE}


def record_name(script: Path, flags: list[str], kind: str) -> str:
    """`02_mla`, ["--bench", "--heads", "4"], "cpu" -> `02_mla.bench.heads-4.cpu`"""
    flags = re.split(r"\s+(?=--?[A-Za-z])", " ".join(flags))
    tags = [re.sub(r"[^\w.+-]+", "-", flag).strip("-.") for flag in flags]
    return ".".join([script.stem, *filter(None, tags), kind])


def store(entry: dict, target: Path, figures: dict[str, Path]) -> None:
    """Each file appears whole (written beside, then renamed), the record after its figures."""
    try:
        old = json.loads(target.read_text("utf-8"))["figures"]
    except (OSError, ValueError, LookupError, TypeError):  # none, or no record of ours
        old = []
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    for name, source in figures.items():
        shutil.copyfile(source, fresh)
        os.replace(fresh, target.parent / name)
    text = json.dumps(entry, indent=1, ensure_ascii=False, allow_nan=False)
    fresh.write_text(text + "\n", "utf-8")
    os.replace(fresh, target)
    for name in set(old) - set(figures):  # drawn by the run before, not by this one
        (target.parent / name).unlink(missing_ok=True)


def record(script: str, args: list[str], root: Path = ROOT) -> Path:
    """Run `script` with `args` and store its record, or raise SystemExit and store nothing."""
    path = Path(script).resolve()
    if not path.is_file() or not path.is_relative_to(root):
        raise SystemExit(f"not stored: {path.name} is no file of this repository")
    path = path.relative_to(root)
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ours.add_argument("--device")
    ours.add_argument("--out")
    given, flags = ours.parse_known_args(args)
    state = git_state(root)  # before the run: what it saw, not what was committed meanwhile

    with tempfile.TemporaryDirectory() as scratch:
        command, out = [sys.executable, path.as_posix(), *args], root / (given.out or scratch)
        if given.device is None:  # a script that can't be told where runs on the CPU
            gpu = torch.cuda.is_available() and knows("--device", command[:2], root)
            given.device = "cuda" if gpu else "cpu"
        if given.out is None and knows("--out", command[:2], root):
            command += ["--out", scratch]
        earlier, start = figure_times(out), time.perf_counter()
        exit_code, lines = run_live(command, root)
        seconds = time.perf_counter() - start
        if exit_code:
            raise SystemExit(f"not stored: {path} exited with {exit_code}")
        try:
            checks, measures = receipt([without_machine_paths(line, root) for line in lines])
        except ValueError as error:
            raise SystemExit(f"not stored: {error}") from None
        if wrong := [check["name"] for check in checks if not check["ok"]]:
            raise SystemExit(f"not stored: WRONG: {', '.join(wrong)}")
        if not checks and not measures:
            raise SystemExit(f"not stored: {path} printed no check and no measure line")

        device = describe_device(given.device)
        clean = [without_machine_paths(flag, root) for flag in flags]
        name = record_name(path, clean, device["kind"])
        drawn = [p for p, when in figure_times(out).items() if earlier.get(p) != when]
        parts = ["-".join(p.relative_to(out).with_suffix("").parts) for p in drawn]
        names = [f"{name}.png"] if len(drawn) == 1 else [f"{name}.{part}.png" for part in parts]
        entry = {
            "command": without_machine_paths(shlex.join(["python", path.as_posix(), *args]), root),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **state,
            "exit_code": exit_code,
            "seconds": round(seconds, 1),
            "device": device,
            "versions": versions(),
            "checks": checks,
            "measures": measures,
            "figures": names,
        }
        target = root / "results" / path.parent / f"{name}.json"
        store(entry, target, dict(zip(names, drawn, strict=True)))
    print(f"stored {target.relative_to(root)}")
    return target


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a character of a text
        sys.stdout.reconfigure(errors="replace")
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_argument("script", help="a chapter or a benchmark of this repository")
    cli.add_argument("flags", nargs=argparse.REMAINDER, help="passed on to it")
    options = cli.parse_args()
    record(options.script, options.flags)


if __name__ == "__main__":
    main()
