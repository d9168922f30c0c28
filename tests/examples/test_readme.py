"""examples/README.md: every program is on it, and every name on it exists."""

import re

from tests.examples import EXAMPLES

PAGE = (EXAMPLES / "README.md").read_text()


def test_every_example_is_in_the_table_and_every_row_is_one():
    rows = re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", PAGE, re.MULTILINE)
    there = [f.name + "/" * f.is_dir() for f in EXAMPLES.iterdir() if f.name != "__pycache__"]
    parts = {"README.md", "serve.html"}
    assert sorted(rows) == sorted({*there} - parts)


def test_every_program_says_how_it_is_run():
    for program in EXAMPLES.glob("*.py"):
        assert f"    python examples/{program.name}" in program.read_text(), program.name
