"""kernels/ is ds.ops.kernels: in a checkout, in a wheel, and never a package of its own name."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
pytestmark = pytest.mark.skipif(not KERNELS, reason="needs a checkout")


def found(folder: Path, *names: str) -> list[str]:
    """Return the files from which a Python started in a folder would import modules, or ""."""
    code = "import importlib.util as u, sys\n"
    code += "for name in sys.argv[1:]: s = u.find_spec(name); print(s and s.origin or '')"
    result = subprocess.run(
        [sys.executable, "-c", code, *names],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_checkout_finds_the_folder():
    names = [f"ds.ops.kernels.{path.stem}" for path in KERNELS]
    assert found(ROOT, *names) == [str(path) for path in KERNELS]


def test_the_folder_hides_no_package_named_kernels():
    """Python takes a folder without __init__.py only where nothing else has the name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert found(ROOT, "kernels") == [""]


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools")
def test_a_wheel_has_them_as_ds_ops_kernels(tmp_path):
    source, installed = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "kernels", source / "kernels")
    (source / "ds" / "ops").mkdir(parents=True)
    (source / "ds" / "ops" / "__init__.py").touch()
    shutil.copy(ROOT / "ds" / "__init__.py", source / "ds")  # where the version is
    shutil.copy(ROOT / "ds" / "ops" / "kernels.py", source / "ds" / "ops")
    (source / "README.md").touch()
    result = subprocess.run(
        [sys.executable, "setup.py", "bdist_wheel"],
        cwd=source,
        env=os.environ | {"DS_BUILD_EXT": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next((source / "dist").glob("*.whl"))) as wheel:
        wheel.extractall(installed)
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {
        "ds",
        "denoising_student",
    }
    names = [f"ds.ops.kernels.{path.stem}" for path in KERNELS]
    folder = installed / "ds" / "ops" / "kernels"
    assert found(installed, *names) == [str(folder / path.name) for path in KERNELS]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_import_torch_triton_and_one_another_only(path):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            another = node.module.startswith("ds.ops.kernels.")
            assert another or node.module.split(".")[0] in allowed
