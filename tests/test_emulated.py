"""What runs on a GPU, run here on an emulated one: a process for each file (tests/emulated)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ["tests/emulated/refusals.py", *sorted(map(str, ROOT.glob("tests/gpu/test_*.py")))]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: Path(file).stem)
def test_emulated(file):
    pytest.importorskip("triton", reason="needs Triton (pip install --no-deps triton)")
    command = [sys.executable, "-m", "tests.emulated", "-m", "pytest", "-q", "-n", "0", file]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
