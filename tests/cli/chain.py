"""The words of the commands that the tests give, and what these leave behind."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from ds.cli.__main__ import main

ROOT = Path(__file__).parents[2]
NET = ("--net.channels", "8", "--net.norm-groups", "4")
TEACH = (*NET, "--train.epochs", "1", "--train.check-every", "10", "--train.warmup-steps", "5")
PAIRS = (
    "--pairs.count",
    "128",
    "--pairs.held-out",
    "32",
    "--pairs.shard-size",
    "50",
    "--pairs.batch-size",
    "32",
    "--solve.steps",
    "5",
)
DISTILL = ("--held-out", "32", "--train.epochs", "3", "--train.check-every", "2")
JUDGE = ("--runtime.evaluate-every", "4", "--judge.extractor", "pixels", "--judge.count", "64")
EVALUATE = ("--count", "128", "--extractor", "pixels")


def run_chain(home: Path) -> None:
    teacher, store, student = (str(home / name) for name in ("teacher", "pairs", "student"))
    for args in (
        ("teach", "digits", "--out", teacher, *TEACH),
        ("pairs", "digits", "--teacher", teacher, "--out", store, *PAIRS),
        (
            "distill",
            "digits",
            "--teacher",
            teacher,
            "--store",
            store,
            "--out",
            student,
            *DISTILL,
            *JUDGE,
        ),
        ("sample", student, "--out", str(home / "sheet.png"), "--indices", "0-8", "--force"),
        (
            "sample",
            teacher,
            "--out",
            str(home / "images.npy"),
            "--indices",
            "0-4",
            "--seed",
            "4",
            "--force",
        ),
        ("evaluate", student, "--store", store, "--held-out", "32", *EVALUATE),
    ):
        assert main([*args]) == 0, args


def tree(home: Path) -> dict[str, str]:
    """The hash of every file, but for locks and the lines that tell the time."""
    return {
        str(f.relative_to(home)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(home.rglob("*"))
        if f.is_file() and f.name != ".lock"
    }


def refused(capsys, *args: str) -> str:
    """Run a command that must fail with one line on standard error; return the line."""
    assert main([*args]) == 2, args
    err = capsys.readouterr().err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("dstudent: ")
    assert "Traceback" not in err
    return lines[0]


def python(code: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def pairs_of(*more: str) -> list[str]:
    return ["pairs", "digits", "--teacher", "teacher", "--out", "new", *PAIRS, *more]


def distill_of(*more: str) -> list[str]:
    there = ("--teacher", "teacher", "--store", "pairs", "--out", "new")
    return ["distill", "digits", *there, *DISTILL, *more]


def recipe_of(*more: str) -> list[str]:
    return distill_of(*PAIRS, *more)


USES_OF_A_MODEL = {
    "pairs": pairs_of(),
    "distill": distill_of(),
    "sample": ["sample", "teacher", "--out", "new.npy"],
    "evaluate": ["evaluate", "teacher", "--out", "new.json", *EVALUATE],
}


DRY = {
    "demo": ["demo", "--out", "new"],
    "doctor": ["doctor"],
    "teach": ["teach", "digits", "--out", "new"],
    "pairs": ["pairs", "digits", "--teacher", "teacher", "--out", "new"],
    "info": ["pairs", "info", "pairs"],
    "verify": ["pairs", "verify", "pairs", "--teacher", "teacher"],
    "export": ["pairs", "export", "pairs", "new"],
    "distill": [
        "distill",
        "digits",
        "--teacher",
        "teacher",
        "--store",
        "pairs",
        "--out",
        "new",
        "--held-out",
        "32",
    ],
    "sample": ["sample", "teacher", "--out", "new.png"],
    "evaluate": ["evaluate", "student", "--extractor", "pixels", "--out", "new.json"],
    "convert": ["convert", "student", "new"],
    "report": ["report", "student", "--out", "new.html"],
    "verify of methods": ["verify", "mean_flow"],
    "verify of a store": ["pairs", "verify", "pairs"],
}
