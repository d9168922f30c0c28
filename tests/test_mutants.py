"""The runner of mutants: it notices a fault that a test sees, and none that changes nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.faults import mutants

SOURCE = '''"""Doc 1."""
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    ONE = 1


@dataclass(frozen=True)
class Box:
    size: "int > 0" = 2

    def __repr__(self):
        return "a" + "b"

    def room(self, x0: int, eps: int, *, more: bool = False) -> int:
        """Return 1 + 1."""
        assert x0 > 0, "never"
        logging.info("room %d", 3)
        if not x0 <= self.size or (
            more and eps
        ):
            raise ValueError(f"{x0 + 1} is too much")
        return max(x0, eps) - [4, 5][:eps][0]
'''
ROOT = Path(__file__).parents[1]
FAULTS = {
    (12, "constant", "2", "3"),
    (12, "constant", "2", "1"),
    (17, "constant", "False", "True"),
    (21, "sign", "not", ""),
    (21, "operator", "<=", "<"),
    (21, "operator", "or", "and"),
    (21, "name", "x0", "eps"),
    (22, "operator", "and", "or"),
    (22, "name", "eps", "x0"),
    (24, "no error", 'raise ValueError(f"{x0 + 1} is too much")', "pass"),
    (25, "no result", "return max(x0, eps) - [4, 5][:eps][0]", "return None"),
    (25, "name", "max", "min"),
    (25, "arguments", "x0, eps", "eps, x0"),
    (25, "name", "x0", "eps"),
    (25, "name", "eps", "x0"),
    (25, "operator", "-", "+"),
    (25, "constant", "4", "5"),
    (25, "constant", "4", "3"),
    (25, "constant", "5", "6"),
    (25, "constant", "5", "4"),
    (25, "slice", "eps", "(eps) - 1"),
    (25, "constant", "0", "1"),
}


def test_faults_are_in_code_and_nowhere_else():
    found = mutants("box.py", SOURCE)
    assert {(m.line, m.fault, m.old, m.new) for m in found} == FAULTS


@pytest.mark.parametrize(
    "file", sorted((ROOT / "ds/diffusion/solvers").glob("*.py")), ids=lambda f: f.name
)
def test_every_mutant_is_a_program_and_another_one(file):
    source = file.read_text()
    for mutant in mutants(str(file), source):
        broken = mutant.apply(source)
        assert broken != source
        compile(broken, str(file), "exec")


TEST = """
import box

def test_inside():
    assert box.inside(3, 5)

def test_border():
    assert not box.inside(5, 5)
"""
TRIED = """
import sys
from pathlib import Path
from tests.mutants import trial

trial.HEAVY = ()
trial.OWN = ("box", "test_box")
trial.prepare()
tree, tests = Path(sys.argv[1]), ["test_box.py::test_inside", "test_box.py::test_border"]
for source in sys.argv[2:]:
    (tree / "box.py").write_text(f"def inside(n, size):\\n    {source}\\n")
    print(trial.failing(tree, tests, 1.0 - trial.STARTS + 1.0, first=False))
"""


def test_a_fault_is_noticed_and_what_changes_nothing_is_not(tmp_path):
    (tmp_path / "test_box.py").write_text(TEST)
    sources = {
        "return n < size": [],
        "return size > n": [],
        "return n <= size": ["test_box.py::test_border"],
        "return None": ["test_box.py::test_inside"],
        "return 1 +": ["test_box.py"],
        "import os; os.kill(os.getpid(), 9)": ["killed"],
        "while True: pass": ["killed"],
    }
    run = [sys.executable, "-c", TRIED, str(tmp_path), *sources]
    out = subprocess.run(run, capture_output=True, text=True)
    assert out.stdout.splitlines() == [str(failed) for failed in sources.values()], out.stderr
