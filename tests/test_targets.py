"""make test and make test-slow: together they run every test, and neither one of the other's."""

import itertools
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.combinations import covering

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "Makefile").is_file(), reason="needs a checkout")


def marks(target: str) -> str:
    """Return which tests a target of make chooses by their marks; it may choose by nothing else."""
    done = subprocess.run(
        ["make", "-n", target], cwd=ROOT, check=True, capture_output=True, text=True
    )
    (line,) = (line for line in done.stdout.splitlines() if " -m pytest " in line)
    words = shlex.split(line.partition(" -m pytest ")[2])
    assert not {"-k", "--deselect", "--ignore"} & {*words}
    return words[words.index("-m") + 1]


def test_every_test_is_run_by_one_of_the_two_targets():
    assert (marks("test"), marks("test-slow")) == ("not slow", "slow")
    run = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {"make test", "make test-slow"} <= {*run}


def test_few_combinations_hold_every_value():
    axes = [[(axis, value) for value in range(size)] for axis, size in enumerate((2, 5, 3))]
    every = {values: {*values} for values in itertools.product(*axes)}
    chosen = covering(every)
    assert len(chosen) == 5
    assert set().union(*chosen) == {value for axis in axes for value in axis}


TEST = """
import pytest

@pytest.mark.each_value
@pytest.mark.parametrize(("a", "b"), [(1, 2), (1, 3), (4, 3)])
@pytest.mark.parametrize("c", [False, True])
def test(a, b, c): ...

@pytest.mark.slow
def test_slow(): ...
"""
OWN = "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", "--import-mode", "importlib"


@pytest.mark.parametrize(
    ("chosen", "found"),
    [("not slow", "3/7 tests collected (4"), ("slow", "4/7 tests collected (3")],
)
def test_values_that_are_given_together_count_as_one(tmp_path, capsys, chosen, found):
    (tmp_path / "test_it.py").write_text(TEST)
    assert pytest.main([*OWN, "--collect-only", "-m", chosen, str(tmp_path)]) == 0
    assert found in capsys.readouterr().out


@pytest.mark.slow
def test_processes_that_share_the_tests_count_what_they_leave_out(tmp_path):
    (tmp_path / "test_it.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", *OWN, "-n", "2", "-m", "not slow", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "3 passed, 4 deselected" in done.stdout, done.stdout + done.stderr
