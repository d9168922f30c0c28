"""What the linters see: the pinned versions, and the types of the public names."""

import ast
import re
from pathlib import Path

import ds

ROOT = Path(__file__).parents[1]


def test_pre_commit_runs_the_ruff_of_make_lint():
    pinned = re.search(r'"ruff==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert pinned and re.findall(r"rev: v(\S+)", hooks) == [pinned[1]]


def test_type_checkers_see_the_public_names():
    tree = ast.parse(Path(ds.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names = {name: (module, name) for name, module in ds._PUBLIC.items()}
    modules = {name: tuple(module.rsplit(".", 1)) for name, module in ds._MODULES.items()}
    assert seen == names | modules
