"""benchmarks/tiles.py where there is no GPU: every task of it runs, in Triton's interpreter."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ahead import interpret

TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
TASKS = """
import sys
from importlib import import_module
import torch
sys.path.insert(0, "benchmarks")
tiles = import_module("tiles")
for chapter in tiles.attn, tiles.mla, tiles.moe, tiles.fp8:
    chapter.gpu = lambda device: ((9, 0), 2)
tiles.mla.fits_hopper = lambda *_: False  # Gluon has no interpreter
real = tiles.fp8.gemm_configs
tiles.fp8.gemm_configs = lambda *given, a_tiles: real(*given)
families = tiles.flash(16, 16, 1, 1, 40, "cpu"), tiles.decode(4, 1, 1, 70, "cpu")
families += tiles.products(5, 64, 8, 2, 1, "cpu"), tiles.gemm(130, 48, 48, "cpu")
for family in families:
    tasks = list(family)
    assert any(shipped for _, _, shipped, _ in tasks)
    assert len({(name, config) for name, config, _, _ in tasks}) == len(tasks)
    for name, config, _, run in tasks:
        assert isinstance(run(), torch.Tensor), (name, config)
"""


@TRITON
def test_every_task_runs():
    interpret(TASKS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so():
    script = Path(__file__).resolve().parents[1] / "benchmarks/tiles.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 2 and "no GPU" in done.stderr and not done.stdout
