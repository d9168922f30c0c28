"""Build the native libraries with CMake and put them and kernels/ into the package.

Everything else is in pyproject.toml.

Without a working compiler the installation still succeeds. ds/ops/lib/build.json records which
library was built, or why it was not, for ds.ops and `dstudent doctor`.

DS_BUILD_EXT=0 skips the build. CXX, CXXFLAGS, CUDACXX and CUDAFLAGS are read by CMake.
"""

import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# What the build needs for each library, and what is lost without it.
NEEDS = {
    "cpu": "ds works without it, slower on CPUs; install a C++17 compiler and reinstall",
    "cuda": "ds works without it; install the CUDA toolkit and reinstall to have it on GPUs",
}
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file())


def file_name(library: str) -> str:
    return f"libds_{library}.so"


class BuildFailed(Exception):
    """The library could not be built; the text says why in one line."""


def cmake(library: str, source: Path, build: Path) -> dict[str, str]:
    """Build a library in a folder and return its compiler and flags."""
    configure = ["-S", str(source), "-B", str(build), "-G", "Ninja", f"-DDS_LIBRARY={library}"]
    for arguments in (configure, ["--build", str(build), "--target", f"ds_{library}"]):
        try:
            subprocess.run(["cmake", *arguments], check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise BuildFailed("cmake was not found (pip install cmake ninja)") from error
        except subprocess.CalledProcessError as error:
            raise BuildFailed(explain(error.stderr + error.stdout)) from error
    return json.loads((build / "compiler.json").read_text())


def explain(output: str) -> str:
    """Return the first complaint in the output of CMake or of the compiler as one line."""
    pattern = r"CMake Error[^\n]*\n(.*?)\n\n\n|[^\n]*\berror:[^\n]*"
    complaint = re.search(pattern, output + "\n\n\n", re.DOTALL)
    text = (complaint.group(1) or complaint.group(0)) if complaint else output[-500:]
    text = " ".join(text.split()).partition(" It fails with the following output")[0]
    return f"the build failed: {text[:500]}"


class BuildNative(build_ext):
    """Write lib/libds_cpu.so and lib/libds_cuda.so, where they can be built, and lib/build.json."""

    def run(self):
        self._folder().mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor() as pool:
            infos = dict(zip(NEEDS, pool.map(self._build, NEEDS), strict=True))
        for library, info in infos.items():
            if not info["built"]:
                self.warn(f"{file_name(library)} was not built: {info['reason']}")
                self.warn(NEEDS[library])
        (self._folder() / "build.json").write_text(json.dumps(infos, indent=2) + "\n")

    def _build(self, library: str) -> dict[str, str | bool]:
        """Build one library, and return what build.json says of it."""
        name, info = file_name(library), {"built": False, "reason": "", "compiler": "", "flags": ""}
        (self._folder() / name).unlink(missing_ok=True)  # never install that of an earlier build
        try:
            if os.environ.get("DS_BUILD_EXT") == "0":
                raise BuildFailed("the build was switched off with DS_BUILD_EXT=0")
            # A folder that stays would hold the path of a ninja that pip has since removed.
            with tempfile.TemporaryDirectory() as build:
                info |= cmake(library, ROOT, Path(build))
                self.copy_file(str(Path(build) / name), str(self._folder() / name))
            info["built"] = True
        except BuildFailed as error:
            info["reason"] = str(error)
        return info

    def _folder(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib).resolve()) / "ds" / "ops" / "lib"

    def get_outputs(self):
        return [str(path) for path in self._folder().glob("*")]

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    """Tag the wheel for every Python, since the libraries are loaded with ctypes."""

    def get_tag(self):
        folder = Path(self.get_finalized_command("build_ext").build_lib) / "ds" / "ops" / "lib"
        built = any((folder / file_name(library)).is_file() for library in NEEDS)
        self.root_is_pure = not built
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    # Installed as ds.ops.kernels: a top-level package `kernels` would hide Hugging Face's.
    packages=[*find_packages(include=["ds", "ds.*"]), "ds.ops.kernels"],
    package_dir={"ds.ops.kernels": "kernels"},
    ext_modules=[
        Extension("ds.ops.lib.libds_cpu", sources=[], depends=["CMakeLists.txt", *SOURCES])
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
