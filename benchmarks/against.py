"""Compare this checkout with another commit: the same cases in both, in turns.

The other commit is checked out and built in a worktree of its own. Printed is, for each case, how
many times as long ours took there as here.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.harness import ROOT, git

TURNS = 3


def compare(revision: str, arguments: Sequence[str]) -> None:
    """Print the table; the arguments are those of `python -m benchmarks`."""
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other"
        git("worktree", "add", "--detach", str(other), revision)
        try:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=other, check=True)
            turns = [(_rows(other, arguments), _rows(ROOT, arguments)) for _ in range(TURNS)]
        finally:
            git("worktree", "remove", "--force", str(other))
    for case in turns[0][1]:
        ratios = [there[case] / here[case] for there, here in turns if case in there]
        if ratios:
            print(f"{case:58} {median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})")


def _rows(checkout: Path, arguments: Sequence[str]) -> dict[str, float]:
    """Run cases in a checkout; return the microseconds of ours by case."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks", "--out", folder, *arguments]
        subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
        saved = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    rows = (row for one in saved for row in one["cases"])
    return {row["case"]: list(row["us"].values())[-1]["median"] for row in rows}
