"""The build: with compilers, with broken ones, and switched off."""

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "ds" / "ops" / "lib" / "libds_cpu.so"
_tools = [shutil.which("cmake"), shutil.which("ninja"), importlib.util.find_spec("setuptools")]
needs_tools = pytest.mark.skipif(
    None in _tools or not (ROOT / "setup.py").is_file(),
    reason="needs a checkout and the build requirements (pip install setuptools cmake ninja)",
)
pytestmark = [needs_tools, pytest.mark.slow]
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Copy what the build reads; the package itself is not needed."""
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "README.md").touch()
    shutil.copytree(ROOT / "ds" / "pairs" / "digits", tmp_path / "ds" / "pairs" / "digits")
    (tmp_path / "ds" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    return tmp_path


def setup(checkout: Path, *command: str, **environment: str) -> str:
    """Run setup.py, without nvcc, which takes a minute."""
    result = subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=checkout,
        env=os.environ | {"CUDACXX": "/bin/false"} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def built(checkout: Path) -> dict[str, dict[str, str | bool]]:
    """Return what the build in place recorded."""
    return json.loads((checkout / "ds" / "ops" / "lib" / "build.json").read_text())


def wheel(checkout: Path) -> tuple[str, dict[str, dict[str, str | bool]], list[str]]:
    """Return the tag, build.json and file names of the one wheel in dist/."""
    (path,) = (checkout / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (info,) = (name for name in names if name.endswith("ds/ops/lib/build.json"))
        return path.stem.split("-", 2)[2], json.loads(archive.read(info)), names


def empty_sources(checkout: Path, *, but: str = "") -> None:
    """Leave little to compile; whether the whole library compiles, every other test shows."""
    for source in (checkout / "csrc" / "cpu").glob("*.cpp"):
        if source.name != but:
            source.write_text("")


@needs_compiler
def test_a_wheel_with_the_library_serves_every_python(checkout):
    empty_sources(checkout, but="simd.cpp")
    setup(checkout, "bdist_wheel")
    tag, info, names = wheel(checkout)
    assert tag.startswith("py3-none-")
    assert not tag.endswith("-any")
    assert "ds/ops/lib/libds_cpu.so" in names
    assert info["cpu"]["built"] is True
    assert info["cpu"]["reason"] == ""
    assert info["cpu"]["compiler"].split()[0] in {"GNU", "Clang", "AppleClang"}
    assert "-O3" in info["cpu"]["flags"]
    with zipfile.ZipFile(next((checkout / "dist").glob("*.whl"))) as archive:
        library = ctypes.CDLL(archive.extract("ds/ops/lib/libds_cpu.so", checkout / "unpacked"))
    assert library.ds_limit_simd(0) == 0

    # A later build without a compiler must not pick up the library that lies in build/.
    shutil.rmtree(checkout / "dist")
    setup(checkout, "bdist_wheel", DS_BUILD_EXT="0")
    assert "ds/ops/lib/libds_cpu.so" not in wheel(checkout)[2]


def test_without_a_compiler_the_wheel_is_pure_and_says_why(checkout):
    output = setup(checkout, "bdist_wheel", CXX="/bin/false")
    tag, info, names = wheel(checkout)
    assert tag == "py3-none-any"
    assert not [name for name in names if name.endswith(".so")]
    for library in ("cpu", "cuda"):
        assert info[library]["built"] is False
        assert info[library]["reason"].startswith("the build failed: ")
        assert "/bin/false" in info[library]["reason"]
        assert f"libds_{library}.so was not built" in output
    assert "install a C++17 compiler" in output


@needs_compiler
def test_a_compile_error_is_the_recorded_reason(checkout):
    (checkout / "csrc" / "cpu" / "simd.h").write_text("#error this machine is too old\n")
    setup(checkout, "build_ext", "--inplace")
    info = built(checkout)["cpu"]
    assert info["built"] is False
    assert "this machine is too old" in info["reason"]


@pytest.mark.skipif(
    shutil.which("objdump") is None or not LIBRARY.is_file(),
    reason="needs objdump (install binutils) and libds_cpu.so (run: pip install .)",
)
def test_only_kernels_for_newer_processors_hold_their_instructions():
    """Of AVX, all names begin with v; other functions are run before the processor is known."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    functions = re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", listing, re.MULTILINE)
    assert functions
    newer = {name for name, body in functions if re.search(r"\tv[a-z]|%[yz]mm", body)}
    assert not [name for name in newer if "run_avx" not in name]


@needs_compiler
def test_the_cpu_library_survives_an_nvcc_that_fails(checkout):
    empty_sources(checkout)
    output = setup(checkout, "build_ext", "--inplace", CUDACXX="/bin/false")
    info = built(checkout)
    assert info["cpu"]["built"] is True
    assert (checkout / "ds" / "ops" / "lib" / "libds_cpu.so").is_file()
    assert info["cuda"]["built"] is False
    assert not (checkout / "ds" / "ops" / "lib" / "libds_cuda.so").exists()
    assert "no nvcc that works was found (install the CUDA toolkit" in info["cuda"]["reason"]
    assert "libds_cuda.so was not built" in output


def test_without_cmake_the_reason_names_it(checkout):
    setup(checkout, "build_ext", "--inplace", PATH=str(checkout))
    for info in built(checkout).values():
        assert info["reason"] == "cmake was not found (pip install cmake ninja)"


def test_the_build_can_be_switched_off(checkout):
    setup(checkout, "build_ext", "--inplace", DS_BUILD_EXT="0")
    for info in built(checkout).values():
        assert info["reason"] == "the build was switched off with DS_BUILD_EXT=0"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout of git")
def test_the_source_archive_holds_the_whole_checkout(tmp_path):
    command = ["-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    setup(ROOT, *command, "--formats=zip")
    (path,) = tmp_path.glob("*.zip")
    names = {name.partition("/")[2] for name in zipfile.ZipFile(path).namelist()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    assert {*tracked.stdout.splitlines()} - names == set()
    assert not [name for name in names if name.endswith((".so", ".pyc", "build.json"))]


def test_a_wheel_holds_what_is_no_module(checkout):
    shutil.copytree(ROOT / "ds", checkout / "ds", dirs_exist_ok=True)
    setup(checkout, "bdist_wheel", DS_BUILD_EXT="0")
    found = {name for name in wheel(checkout)[2] if name.startswith("ds/")}
    tracked = {str(p.relative_to(ROOT)) for p in (ROOT / "ds").rglob("*") if p.is_file()}
    absent = {name for name in tracked - found if not name.endswith((".so", ".pyc"))}
    assert absent <= {"ds/ops/lib/build.json"}
    assert any(name.endswith("licenses/ds/pairs/digits/README.md") for name in wheel(checkout)[2])
