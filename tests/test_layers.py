"""The shape of the library: what may import what, and what stays out of it."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ds

ROOT = Path(ds.__file__).parent
# The rooms of ds, from the ground up. A room imports from itself and from those before it.
ROOMS = (
    "system", "ops", "nets", "diffusion", "engine", "models", "analytic", "pairs", "methods",
    "training", "evaluation", "cli",
)  # fmt: skip
MOST_ENTRIES, MOST_FILES, MOST_LINES = 14, 12, 600
# Of a method, by its folder, or by its file outside of one.
METHOD_LINES = {
    "flow": 150, "consistency": 180, "progressive_distillation.py": 180, "drifting.py": 180,
}  # fmt: skip
# Longer files, each with the reason why it is one.
LONG = {}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
TREES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in FILES}


def part(path):
    """Return the room of ds that a path belongs to."""
    return path.parts[0]


def imports(tree):
    """Yield every module that a tree imports, at its top or inside functions, as dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "ds":
                yield from (f"ds.{alias.name}" for alias in node.names)
            else:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_down():
    for path, tree in TREES.items():
        own = part(path)
        for name in imports(tree):
            package, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if package == "ds" and rest and other != "__version__":
                assert ROOMS.index(other) <= ROOMS.index(own), f"{path} imports {name}"


def test_no_imports_go_in_a_circle():
    def module(path):
        return ".".join(["ds", *path.with_suffix("").parts]).removesuffix(".__init__")

    found = {module(path): {*imports(tree)} for path, tree in TREES.items()}
    # What is imported from a module is either a module itself or one of its names.
    left = {
        name: {n if n in found else n.rpartition(".")[0] for n in names} & found.keys() - {name}
        for name, names in found.items()
    }
    while ready := [name for name, names in left.items() if not names & left.keys()]:
        for name in ready:
            del left[name]
    assert not left


def entries(folder):
    return [p.name for p in folder.iterdir() if p.name not in ("__pycache__", "lib")]


def test_ds_is_seen_at_a_glance():
    assert len(entries(ROOT)) <= MOST_ENTRIES


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=str)
def test_a_folder_holds_a_dozen_files(folder):
    files = [p for p in folder.iterdir() if p.is_file() and p.name != "__init__.py"]
    assert len(files) <= MOST_FILES, folder


def test_a_file_is_read_in_one_sitting():
    for path in TREES:
        lines = len((ROOT / path).read_text().splitlines())
        assert (lines > MOST_LINES) == (str(path) in LONG), f"{path}: {lines} lines"


def test_a_method_is_as_short_as_its_paper_s_box():
    for path in (p for p in TREES if part(p) == "methods"):
        lines = len((ROOT / path).read_text().splitlines())
        assert lines <= METHOD_LINES.get(path.parts[1], MOST_LINES), f"{path}: {lines} lines"


def test_ops_need_torch_and_nothing_else():
    for path, tree in TREES.items():
        if part(path) == "ops":
            others = {n for n in imports(tree) if not n.startswith("ds.ops")}
            roots = {name.split(".")[0] for name in others}
            assert roots <= {"torch", *sys.stdlib_module_names}, path


def test_the_library_knows_no_tests_benchmarks_or_examples():
    for path, tree in TREES.items():
        roots = {name.split(".")[0] for name in imports(tree)}
        assert roots.isdisjoint({"tests", "benchmarks", "examples"}), path


def test_a_file_is_named_after_what_it_holds():
    for path in TREES:
        assert path.stem.strip("_") not in {"utils", "util", "helpers", "helper", "common", "misc"}


def test_only_the_command_line_prints():
    for path, tree in TREES.items():
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        prints = [f.lineno for f in calls if isinstance(f, ast.Name) and f.id == "print"]
        assert not prints or part(path) == "cli", f"{path}: {prints}"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_importing_ds_imports_no_torch():
    assert run("import sys, ds; print('torch' in sys.modules)").stdout == "False\n"


def test_help_imports_no_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['dstudent', '--help']\n"
        "try:\n    runpy.run_module('ds.cli', run_name='__main__')\n"
        "finally:\n    print('torch' in sys.modules)"
    )
    assert run(code).stdout.endswith("False\n")


def test_a_first_image_imports_no_compiler_and_nothing_that_trains(tmp_path):
    code = f"""
import sys, ds.cli.sample
net = ds.nets.UNetConfig(image_size=4, in_channels=1, channels=4, channel_mult=(1,),
                         num_res_blocks=1, attention_resolutions=(), norm_groups=2).build()
ds.Student(net, ds.methods.DenoisingStudent()).save_pretrained({str(tmp_path / "net")!r})
ds.Sampler(ds.load_student({str(tmp_path / "net")!r}))(0, [0])
heavy = "torch._dynamo torch._inductor torch.distributed.checkpoint triton sympy scipy torchvision"
print({{*heavy.split()}} & {{*sys.modules}})
"""
    assert run(code).stdout == "set()\n"


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
def test_public_functions_and_classes_have_docstrings():
    for path, tree in TREES.items():
        definitions = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        public = [n for n in definitions if not n.name.startswith("_") and part(path) != "ops"]
        assert not [node.name for node in public if not ast.get_docstring(node)], path
