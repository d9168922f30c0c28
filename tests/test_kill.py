"""A short run of kill.py, which takes more kills from the command line."""

import subprocess
import sys
from pathlib import Path


def test_kills_at_random_moments_change_nothing():
    script = Path(__file__).parent / "kill.py"
    done = subprocess.run(
        [sys.executable, script, "--kills", "2"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for verb in ("pairs", "distill"):
        assert f"{verb}: 2 kills" in done.stdout, done.stdout
