"""A short run of kill.py, which takes more kills from the command line."""

import subprocess
import sys

import pytest

from tests.kill import ROOT

pytestmark = pytest.mark.slow


def test_kills_at_random_moments_change_nothing():
    command = [sys.executable, "-m", "tests.kill", "--kills", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    for verb in ("pairs", "distill"):
        assert f"{verb}: 2 kills" in done.stdout, done.stdout
