"""examples/slurm: the job scripts, with stand-ins for srun and scontrol."""

import os
import random
import re
import shlex
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ds
from ds.cli.verb import parse
from ds.pairs.store import is_finished
from tests.kill import TEACH, seconds

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
SRUN = """#!/bin/bash
[[ $1 == --* ]] && shift
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done
status=0
for process in $(jobs -p); do wait "$process" || status=$?; done
exit "$status"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> requeued; fi
"""
# Makes what $MAKES names, and says with what it was called.
DSTUDENT = """#!/bin/bash
if [[ $2 == info ]]; then echo '"finished": '"$FINISHED"; exit; fi
echo "$RANK of $WORLD_SIZE, GPU $LOCAL_RANK, at $MASTER_ADDR: $@" >> called
if [[ $MAKES ]]; then mkdir -p "$MAKES"; fi
exit "$FAILS"
"""
REAL = f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m ds.cli "$@"\n'
QUICK = {"FINISHED": "true", "MAKES": "", "FAILS": "0"}


class Cluster:
    """A folder in which job scripts run, with the programs they call."""

    def __init__(self, folder: Path, dstudent: str):
        self.folder, programs = folder, folder / "bin"
        programs.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("dstudent", dstudent)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)

    def start(self, script: str, *args: Any, tasks: int = 1, **more: str) -> subprocess.Popen:
        job = {
            "SLURM_JOB_ID": str(free_port() - 20000),
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NTASKS": str(tasks),
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        command = ["bash", str(ROOT / "examples" / "slurm" / script), *map(str, args)]
        return subprocess.Popen(command, cwd=self.folder, env=os.environ | job | more)

    def run(self, *args: Any, **more: Any) -> int:
        return self.start(*args, **more).wait()

    def said(self, name: str) -> list[str]:
        file = self.folder / name
        return sorted(file.read_text().splitlines()) if file.exists() else []


def free_port() -> int:
    """Return a free port among those that train.sbatch chooses from."""
    for port in random.SystemRandom().sample(range(20000, 30000), 100):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_bash_and_asks_for_what_it_needs(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    asked = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=USR1@120" in asked and "#SBATCH --requeue" in asked
    assert not stat.S_IMODE(script.stat().st_mode) & stat.S_IXUSR  # sbatch runs it


def test_the_commands_of_the_page_are_what_the_scripts_take():
    page = (ROOT / "docs" / "cluster.md").read_text().replace("\\\n", "")
    found = re.findall(r"^sbatch (?:--\S+ )*examples/slurm/(\w+)\.sbatch (\S+) (.+)", page, re.M)
    assert {script for script, _, _ in found} == {script.stem for script in SCRIPTS}
    for script, out, rest in found:
        verb = {"pairs": "pairs", "train": "distill"}[script]
        assert str(parse(verb, [*rest.split(), "--out", out]).out) == out


def test_every_process_of_a_training_knows_its_place(tmp_path):
    cluster = Cluster(tmp_path, DSTUDENT)
    args = "train.sbatch", "student", "digits", "--teacher", "a b"
    assert cluster.run(*args, tasks=2, **QUICK | {"MAKES": "student"}) == 0
    rest = "at 127.0.0.1: distill digits --teacher a b --out student"
    assert cluster.said("called") == [f"{i} of 2, GPU {i}, {rest}" for i in (0, 1)]
    assert cluster.said("requeued") == []


@pytest.mark.parametrize(
    ("script", "left"), [("train.sbatch", {}), ("pairs.sbatch", {"FINISHED": "false"})]
)
def test_a_job_that_was_stopped_is_queued_again_and_one_that_failed_is_not(script, left, tmp_path):
    cluster = Cluster(tmp_path, DSTUDENT)
    assert cluster.run(script, "out", "digits", **QUICK | left, SLURM_JOB_ID="7") == 0
    assert cluster.said("requeued") == ["requeue 7"]
    assert cluster.run(script, "out", "digits", **QUICK | left | {"FAILS": "2"}) == 2
    assert cluster.said("requeued") == ["requeue 7"]


@pytest.mark.slow
def test_the_scripts_make_pairs_and_a_student(tmp_path):
    """Two jobs of an array fill a store, and two processes train on it."""
    cluster = Cluster(tmp_path, REAL)
    seconds("teach", "digits", "--out", tmp_path / "teacher", *TEACH)
    small = "--pairs.count 192 --pairs.held-out 64 --pairs.shard-size 32 --solve.steps 2"
    pairs = ["pairs.sbatch", "pairs", "digits", "--teacher", "teacher", *small.split()]
    assert [job.wait() for job in [cluster.start(*pairs) for _ in range(2)]] == [0, 0]
    assert is_finished(tmp_path / "pairs")
    train = ["train.sbatch", "student", "digits", "--teacher", "teacher", "--store", "pairs"]
    assert cluster.run(*train, "--held-out", 64, "--train.epochs", 1, tasks=2) == 0
    assert ds.load_student(tmp_path / "student").shape == (1, 8, 8)
    assert cluster.said("requeued") == []
