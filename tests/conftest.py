"""Tests run two at a time (`pytest -n 2`) get a thread each: with more they wait for each other."""

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for all children
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as behind a shell's &: some tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)
