"""What runs on a GPU, run here on an emulated one: a process for each file (tests/emulated)."""

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ["tests/emulated/refusals.py", *sorted(map(str, ROOT.glob("tests/gpu/test_*.py")))]


@pytest.fixture(scope="module")
def running():
    """Start all of them: each keeps one core busy."""
    pytest.importorskip("triton", reason="needs Triton (pip install --no-deps triton)")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "tests.emulated", "-m", "pytest", "-q", "-n", "0"]
    with ExitStack() as stack:
        started = {}
        for file in FILES:
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                [*command, "-m", "not slow", file], cwd=ROOT, env=environment, stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
            stack.callback(process.kill)
            started[file] = process, log
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: Path(file).stem)
def test_emulated(file, running):
    process, log = running[file]
    status = process.wait()
    log.seek(0)
    assert status == 0, log.read()[-20_000:]
