"""Each of 01-05 as a reader runs it: alone in an empty folder, in a minute."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

receipt = import_module("benchmarks.record").receipt

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(ROOT.glob("0[1-5]_*.py"))
SLOW = set()  # stems of chapters whose plain run takes over 20 s on two cores
SCREEN = (45, 120)  # lines, columns
MINUTE = 60  # seconds, on two cores
if "PYTEST_XDIST_WORKER" in os.environ:  # one of two
    MINUTE = 120
INLINE = "module://matplotlib_inline.backend_inline"  # what a notebook hands down
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def start(chapter: Path, folder: Path, *args: str) -> subprocess.CompletedProcess:
    """A copy in an empty folder: what a chapter needs beside it would be missing there. In the
    poorest terminal, and with a backend for figures that is not installed."""
    folder.mkdir()
    shutil.copy(chapter, folder)
    env = os.environ | {"PYTHONIOENCODING": "ascii", "MPLBACKEND": INLINE}
    env.pop("PYTHONPATH", None)  # else the repository could still be found
    command = [sys.executable, chapter.name, *args]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, encoding="ascii", timeout=MINUTE
    )


def lessons() -> Iterator:
    for chapter in CHAPTERS:
        slow = [pytest.mark.slow] if chapter.stem in SLOW else []
        yield pytest.param((chapter, "cpu"), id=chapter.stem, marks=slow)
        gpu = [pytest.mark.gpu, NO_GPU]
        yield pytest.param((chapter, "cuda"), id=f"{chapter.stem}-cuda", marks=gpu)


@pytest.mark.parametrize("lesson", list(lessons()))
def test_lesson(lesson, tmp_path):
    import matplotlib.font_manager  # noqa: F401 - builds its cache now, or the first run says so

    chapter, device = lesson
    out, folder = tmp_path / "out", tmp_path / "empty"
    done = start(chapter, folder, "--device", device, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""  # no warnings

    lines = done.stdout.splitlines()
    assert len(lines) <= SCREEN[0]
    assert [line for line in lines if len(line) > SCREEN[1]] == []
    checks, measures = receipt(lines)
    assert len(checks) >= 3 and all(check["ok"] for check in checks)
    assert measures

    [figure] = out.rglob("*.png")
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in folder.iterdir()] == [chapter.name]  # --out is where it writes


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_help(chapter, tmp_path):
    done = start(chapter, tmp_path / "empty", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for flag in ("--device", "--seed", "--bench", "--out"):
        assert flag in done.stdout


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_device_that_is_none(chapter, tmp_path):
    done = start(chapter, tmp_path / "empty", "--device", "nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    *usage, message = done.stderr.splitlines()
    assert "nonsense" in message and "Traceback" not in done.stderr
    assert all(line.startswith(("usage:", " ")) for line in usage)  # argparse's own lines


@pytest.mark.parametrize("path", sorted(ROOT.glob("[0-9]*.py")), ids=lambda path: path.stem)
def test_a_folder_that_is_a_file_and_a_seed_of_no_generator(path, tmp_path, monkeypatch, capsys):
    """Said at once, and not by a traceback behind the last check."""
    (tmp_path / "file").write_text("mine")
    bad = [("--out", str(tmp_path / "file")), ("--out", str(tmp_path / "file/deeper/still"))]
    bad += [("--out", os.devnull)]
    if '"--seed"' in path.read_text("utf-8"):
        bad += [("--seed", "-1"), ("--seed", str(10**20))]
    for flag, value in bad:
        monkeypatch.setattr(sys, "argv", [path.name, flag, value])
        with pytest.raises(SystemExit) as stopped:
            import_module(path.stem).main()
        said = capsys.readouterr()
        assert stopped.value.code == 2 and not said.out
        want = "want a folder" if flag == "--out" else "--seed must be >= 0 and fit 63"
        assert want in said.err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_the_seed_is_set_and_bench_is_asked_for(chapter, tmp_path, monkeypatch):
    """`main` alone: what it calls notes the seed and does nothing."""
    module, called = import_module(chapter.stem), []
    for name in vars(module).copy():
        if name.startswith(("verify", "experiment", "memory", "decoding", "bench")):
            stub = lambda *args, name=name: called.append((name, args, torch.initial_seed()))
            monkeypatch.setattr(module, name, stub)
    args = [chapter.name, "--device", "cpu", "--seed", "5", "--out", str(tmp_path)]
    for flags, benches in ([], False), (["--bench"], True):
        called.clear()
        monkeypatch.setattr(sys, "argv", args + flags)
        module.main()
        assert {seed for *_, seed in called} == {5}
        assert any(name.startswith("bench") for name, *_ in called) == benches
        seeds = [args[1] for name, args, _ in called if name == "experiment" and len(args) == 3]
        assert seeds == [5] * (chapter.stem == "03_moe_router")
