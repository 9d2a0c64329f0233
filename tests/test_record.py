"""record.py believes numbers, not verdicts, and a failed run leaves the last good record alone."""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

record = import_module("benchmarks.record")

OK = 'print("check    oracle = piece                  error 3.1e-13   tol 1e-12   ok")\n'
MEASURE = 'print("measure  bits_per_byte                  1.61 bit/byte   xz -9: 1.69")\n'
OPTIONS = """
import argparse, pathlib
cli = argparse.ArgumentParser()
cli.add_argument("--device")
cli.add_argument("--out")
cli.add_argument("--bench", action="store_true")
args = cli.parse_args()
"""
FIGURE = """
out = pathlib.Path(args.out)
out.mkdir(exist_ok=True)
(out / "{}.png").write_bytes(b"{}")
"""


@pytest.fixture
def run(tmp_path):
    """Write a fake chapter into an empty repository and record it."""

    def run(source: str, *args: str, script: str = "02_mla.py") -> tuple[Path, dict]:
        path = tmp_path / script
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        target = record.record(str(path), ["--device", "cpu", *args], root=tmp_path)
        return target.relative_to(tmp_path), json.loads(target.read_text("utf-8"))

    return run


def stored(root: Path) -> list[str]:
    files = (path for path in (root / "results").rglob("*") if path.is_file())
    return sorted(path.relative_to(root / "results").as_posix() for path in files)


def test_a_good_run_is_stored_whole(run, capsys):
    target, entry = run("print('prose')\n" + OK + MEASURE)
    assert target == Path("results/02_mla.cpu.json")
    check = {"name": "oracle = piece", "error": 3.1e-13, "tol": 1e-12, "ok": True}
    measure = {"name": "bits_per_byte", "value": 1.61, "text": "bit/byte   xz -9: 1.69"}
    assert (entry["checks"], entry["measures"]) == ([check], [measure])
    assert entry["command"] == "python 02_mla.py --device cpu"
    assert entry["device"]["kind"] == "cpu" and entry["device"]["gpu"] is None
    assert entry["device"]["cpu"] and entry["device"]["threads"] >= 1
    assert entry["versions"]["python"] and entry["versions"]["torch"]
    assert entry["date"].endswith("+00:00") and entry["seconds"] >= 0 and entry["exit_code"] == 0
    assert entry["figures"] == []
    assert "prose\ncheck    oracle" in capsys.readouterr().out  # the reader sees the run itself


def check_line(error: str, tol: str, verdict: str) -> str:
    return f'print("check    a name                 error {error}   tol {tol}   {verdict}")\n'


@pytest.mark.parametrize(
    "source, why",
    [
        (check_line("2e-3", "1e-3", "WRONG"), "WRONG: a name"),
        (check_line("nan", "1e-3", "ok"), "numbers don't"),
        (check_line("2e-3", "1e-3", "ok"), "numbers don't"),
        (check_line("1e-4", "1e-3", "WRONG"), "numbers don't"),
        (check_line("nan", "1e-3", "WRONG"), "WRONG: a name"),
        (check_line("tiny", "1e-3", "ok"), "tiny"),
        (check_line("1e-4", "1e-3", "fine"), "unreadable check"),
        ('print("measure  two words 3")\n', "not stored"),
        ('print("measure  nothing")\n', "unreadable measure"),
        (MEASURE + "raise SystemExit(3)\n", "exited with 3"),
        ('print("check that this is prose")\n', "no check and no measure"),
    ],
)
def test_a_bad_run_keeps_the_old_record(run, tmp_path, source, why):
    target, _ = run(OPTIONS + OK + FIGURE.format("curve", "old"))
    before = (tmp_path / target).read_bytes()
    with pytest.raises(SystemExit) as refused:
        run(OPTIONS + OK * ("prose" not in source) + source + FIGURE.format("curve", "new"))
    assert why in str(refused.value)
    assert (tmp_path / target).read_bytes() == before
    assert (tmp_path / "results/02_mla.cpu.png").read_bytes() == b"old"
    assert stored(tmp_path) == ["02_mla.cpu.json", "02_mla.cpu.png"]


def test_nan_and_inf_measures_stay_json(run):
    source = 'print("measure  a   nan")\nprint("measure  b   -inf seconds")\n'
    _, entry = run(source)
    assert [m["value"] for m in entry["measures"]] == ["nan", "-inf"]


def test_long_names_and_names_that_mention_error(run):
    name = "the worst error of a name that is longer than its column of forty-four"
    _, entry = run(check_line("0.0e+00", "1e-3", "ok").replace("a name", name))
    assert entry["checks"][0]["name"] == name


def test_each_set_of_flags_has_its_own_record(run, tmp_path):
    run(OK)
    run(OK, "--bench")
    run(OK, "--minutes", "0.5", "--bench", "--note", "a b")
    run(OK, script="benchmarks/mla.py")
    assert stored(tmp_path) == [
        "02_mla.bench.cpu.json",
        "02_mla.cpu.json",
        "02_mla.minutes-0.5.bench.note-a-b.cpu.json",
        "benchmarks/mla.cpu.json",
    ]


def test_figures(run, tmp_path):
    several = OPTIONS + OK + FIGURE.format("curve", "1") + FIGURE.format("load", "2")
    _, entry = run(several)
    assert entry["figures"] == ["02_mla.cpu.curve.png", "02_mla.cpu.load.png"]
    _, entry = run(OPTIONS + OK + FIGURE.format("curve", "3"))
    assert entry["figures"] == ["02_mla.cpu.png"]  # and the two that nobody draws now are gone
    assert stored(tmp_path) == ["02_mla.cpu.json", "02_mla.cpu.png"]
    assert (tmp_path / "results/02_mla.cpu.png").read_bytes() == b"3"
    assert entry["command"] == "python 02_mla.py --device cpu"  # no temporary --out


def test_only_figures_of_this_run_and_small_enough(run, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "LARGEST_FIGURE", 10)
    out = tmp_path / "runs"
    out.mkdir()
    (out / "stale.png").write_bytes(b"stale")
    draw = FIGURE.format("curve", "small") + FIGURE.format("huge", "more than ten")
    _, entry = run(OPTIONS + OK + draw, "--out", "runs")
    assert entry["figures"] == ["02_mla.cpu.png"]
    assert (tmp_path / "results/02_mla.cpu.png").read_bytes() == b"small"
    assert (out / "curve.png").exists()  # the reader's folder is left as it is


def test_no_out_for_a_script_that_does_not_know_it(run):
    strict = OPTIONS.replace('cli.add_argument("--out")', 'cli.add_argument("--output")')
    run(strict + "assert args.output is None  # argparse takes --out for it\n" + OK)
    run("import sys\nassert sys.argv[1:] == ['--device', 'cpu'], '--out'\n" + OK)


def test_a_script_that_knows_no_device_ran_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    for source, kind in (OPTIONS + OK, "cuda"), (OK, "cpu"):
        (tmp_path / "02_mla.py").write_text(source)
        assert (
            record.record(str(tmp_path / "02_mla.py"), [], root=tmp_path).suffixes[0] == f".{kind}"
        )


def test_no_machine_paths(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/jane doe")
    show = f'print("measure  saved   1 {tmp_path}/runs/a.pt, /data/models/v3, 12/s at /s")\n'
    paths = [f"--a={tmp_path}/runs", "--b", "/data/models/v3", "--c", "/home/jane doe/x y"]
    _, entry = run(show, *paths)
    assert entry["measures"][0]["text"] == "runs/a.pt, …/v3, 12/s at /s"
    assert entry["command"].endswith("--a=runs --b …/v3 --c '~/x y'")
    for place in (str(tmp_path), "/data", "jane"):
        assert place not in json.dumps(entry, ensure_ascii=False)


def test_a_home_at_the_root_leaves_addresses_alone(run, monkeypatch):
    monkeypatch.setenv("HOME", "/")  # as in some containers
    _, entry = run('print("measure  speed   1 as in https://example.org/a/b")\n')
    assert entry["measures"][0]["text"] == "as in https://example.org/a/b"


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
def test_commit_and_clean_tree(run, tmp_path):
    def git(*args: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *who, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    _, entry = run(OK)
    assert (entry["commit"], entry["clean"]) == (None, None)  # no repository
    git("init", "--quiet")
    (tmp_path / "02_mla.py").write_text(OK)
    git("add", "02_mla.py")
    git("commit", "--quiet", "-m", "one")
    first = git("rev-parse", "HEAD")
    _, entry = run(OK)
    assert (entry["commit"], entry["clean"]) == (first, True)  # results/ itself doesn't count
    who = "-c user.name=a -c user.email=a@b -c commit.gpgsign=false"
    meanwhile = f"import os\nassert os.system('git add *.py && git {who} commit -qm two') == 0\n"
    _, entry = run(meanwhile + OK)
    assert (entry["commit"], entry["clean"]) == (first, False)  # as they were when it began
    assert git("rev-parse", "HEAD") != first


def test_a_script_elsewhere_is_refused(run, tmp_path):
    with pytest.raises(SystemExit, match="no file of this repository"):
        record.record(__file__, [], root=tmp_path)


def test_the_command_line_exits_non_zero():
    command = [sys.executable, str(Path(record.__file__)), "no_such_chapter.py", "--bench"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "not stored: no_such_chapter.py is no file of this repository\n"


def test_an_error_below_zero_is_none():
    with pytest.raises(ValueError, match="the line says ok, its numbers don't"):
        record.receipt([f"check    a{' ' * 20}error -1e-3   tol 1e-3   ok"])


def test_a_record_appears_whole_or_not_at_all(run, tmp_path, monkeypatch):
    """A full disk, or a kill, in the middle of a copy or of the last file."""
    target, _ = run(OPTIONS + OK + FIGURE.format("curve", "old"))
    before = (tmp_path / target).read_bytes()

    def full(source, place):
        Path(place).write_bytes(b"ha")
        raise OSError("full")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="full"):
        run(OPTIONS + OK + FIGURE.format("curve", "new"))
    assert (tmp_path / "results/02_mla.cpu.png").read_bytes() == b"old"
    real = Path.write_text

    def half(path, text, *more):
        if path.parent.name != "results":
            return real(path, text, *more)
        real(path, text[:9], *more)
        raise OSError("full")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="full"):
        run(OPTIONS + OK)
    assert (tmp_path / target).read_bytes() == before


def test_the_command_line_passes_flags_on(monkeypatch):
    asked = []
    monkeypatch.setattr(record, "record", lambda *args: asked.append(args))
    monkeypatch.setattr(sys, "argv", ["record.py", "02_mla.py", "--bench", "--out", "x"])
    record.main()
    assert asked == [("02_mla.py", ["--bench", "--out", "x"])]


def test_a_flag_that_begins_like_ours_is_the_scripts(run):
    more = OPTIONS.replace('"--bench"', '"--dev", action="store_true")\ncli.add_argument("--bench"')
    target, entry = run(more + OK, "--dev")
    assert target == Path("results/02_mla.dev.cpu.json")
