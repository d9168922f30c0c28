"""The shape of the library: what may import what, and what stays out of it."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ds

ROOT = Path(ds.__file__).parent
# A file imports from rows above its own, a folder also from itself. The command line is one thing.
ROWS = [
    ["budget", "config", "kernels", "signals"],
    ["ops"],
    ["ambient", "apex", "files", "metrics", "philox", "ranks", "schedule"],
    ["arrays", "staging"],
    ["targets"],
    ["grids", "images", "nets", "places"],
    ["denoiser", "engine", "resume", "rows", "shard"],
    ["checkpoint", "solvers"],
    ["sample"],
    ["analytic", "export", "methods", "pairs"],
    ["archives", "data", "load"],
    ["features", "hub", "loader", "optim", "posthoc", "records", "speed"],
    ["train"],
    ["doctor", "evaluation", "presets", "report"],
    ["frontier"],
    ["__main__", "demo", "verbs"],
]
ROW = {name: row for row, names in enumerate(ROWS) for name in names}
COMMAND_LINE = ROWS[-1]
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
TREES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in FILES}
every_file = pytest.mark.parametrize("path", TREES, ids=str)


def part(path):
    """The file or folder of ds that a path belongs to."""
    return path.parts[0].removesuffix(".py")


def row(name):
    assert name in ROW, f"ds.{name} has no row at the top of {Path(__file__).name}; give it one"
    return ROW[name]


def imports(tree):
    """Every module a tree imports, at its top or inside functions, as dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "ds":
                yield from (f"ds.{alias.name}" for alias in node.names)
            else:
                yield node.module


@every_file
def test_imports_point_down(path):
    own = part(path)
    for name in imports(TREES[path]):
        package, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if package != "ds" or not rest or other == own:
            continue
        if own in COMMAND_LINE and other in COMMAND_LINE:
            continue
        assert row(other) < row(own), f"ds.{own} imports ds.{other}"


@every_file
def test_every_file_has_its_row(path):
    row(part(path))


@pytest.mark.parametrize("path", [p for p in TREES if part(p) == "ops"], ids=str)
def test_ops_need_torch_and_nothing_else(path):
    for name in imports(TREES[path]):
        known = name.startswith(("ds.ops", "ds.kernels")) or name.split(".")[0] in {
            "torch",
            *sys.stdlib_module_names,
        }
        assert known, name


@every_file
def test_the_library_knows_no_tests_benchmarks_or_examples(path):
    roots = {name.split(".")[0] for name in imports(TREES[path])}
    assert roots.isdisjoint({"tests", "benchmarks", "examples"})


@every_file
def test_a_file_is_named_after_what_it_holds(path):
    assert path.stem.strip("_") not in {"utils", "util", "helpers", "helper", "common", "misc"}


@pytest.mark.parametrize("path", [p for p in TREES if part(p) not in COMMAND_LINE], ids=str)
def test_only_the_command_line_prints(path):
    calls = [node.func for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]
    assert not [f.lineno for f in calls if isinstance(f, ast.Name) and f.id == "print"]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_importing_ds_imports_no_torch():
    assert run("import sys, ds; print('torch' in sys.modules)").stdout == "False\n"


def test_help_imports_no_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['dstudent', '--help']\n"
        "try:\n    runpy.run_module('ds', run_name='__main__')\n"
        "finally:\n    print('torch' in sys.modules)"
    )
    assert run(code).stdout.endswith("False\n")


@pytest.mark.parametrize("name", [n for n in ds.__all__ if n != "__version__"])
def test_a_public_name_has_a_docstring(name):
    value = getattr(ds, name)
    text = inspect.getdoc(value) or ""
    # A dataclass without one is given its signature.
    assert text and not text.startswith(f"{name}(")


@pytest.mark.parametrize("name", ds.ops.__all__)
def test_an_op_has_a_docstring(name):
    assert inspect.getdoc(getattr(ds.ops, name))


# The files of ds.ops are private: their public names are those of the folder.
@pytest.mark.parametrize("path", [p for p in TREES if part(p) != "ops"], ids=str)
def test_public_functions_and_classes_have_docstrings(path):
    public = [
        node
        for node in TREES[path].body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert not [node.name for node in public if not ast.get_docstring(node)]
