"""What runs on a GPU, run on an emulated one: two processes (tests/emulated) share its files."""

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob("tests/gpu/test_*.py"))
LONG = ROOT / "tests/gpu/test_sampling.py"
SHARES = {  # of about the same length
    "sampling and refusals": [LONG, ROOT / "tests/emulated/refusals.py"],
    "the rest": [file for file in FILES if file != LONG],
}


@pytest.fixture(scope="module")
def running():
    """Start both: each keeps one core busy."""
    pytest.importorskip("triton", reason="needs Triton (pip install --no-deps triton)")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "tests.emulated", "-m", "pytest", "-q", "-n", "0"]
    with ExitStack() as stack:
        started = {}
        for name, files in SHARES.items():
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                [*command, "-m", "not slow", *map(str, files)],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
            stack.callback(process.kill)
            started[name] = process, log
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
def test_emulated(share, running):
    process, log = running[share]
    status = process.wait()
    log.seek(0)
    assert status == 0, log.read()[-20_000:]
