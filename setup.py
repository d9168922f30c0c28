"""Build the native library with CMake and put it and kernels/ into the package.

Everything else is in pyproject.toml.

Without a working compiler the installation still succeeds. ds/lib/build.json records what was
built, or why nothing was, for ds.ops and `dstudent doctor`.

DS_BUILD_EXT=0 skips the build. CXX and CXXFLAGS are read by CMake.
"""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libds_cpu.so"
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file())


class BuildFailed(Exception):
    """The library could not be built; the text says why in one line."""


def cmake(source: Path, build: Path) -> dict[str, str]:
    """Build the library in a folder and return its compiler and flags."""
    configure = ["-S", str(source), "-B", str(build), "-G", "Ninja"]
    for arguments in (configure, ["--build", str(build), "--target", "ds_cpu"]):
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
    return f"the C++ build failed: {text[:500]}"


class BuildNative(build_ext):
    """Write lib/libds_cpu.so, where it can be built, and lib/build.json."""

    def run(self):
        folder = self._folder()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LIBRARY).unlink(missing_ok=True)  # never install that of an earlier build
        info = {"built": False, "reason": "", "compiler": "", "flags": ""}
        try:
            if os.environ.get("DS_BUILD_EXT") == "0":
                raise BuildFailed("the build was switched off with DS_BUILD_EXT=0")
            # A folder that stays would hold the path of a ninja that pip has since removed.
            with tempfile.TemporaryDirectory() as build:
                info |= cmake(ROOT, Path(build))
                self.copy_file(str(Path(build) / LIBRARY), str(folder / LIBRARY))
            info["built"] = True
        except BuildFailed as error:
            info["reason"] = str(error)
            self.warn(f"{LIBRARY} was not built: {error}")
            self.warn("ds works without it, slower on CPUs; install a C++17 compiler and reinstall")
        (folder / "build.json").write_text(json.dumps(info, indent=2) + "\n")

    def _folder(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib).resolve()) / "ds" / "lib"

    def get_outputs(self):
        return [str(path) for path in self._folder().glob("*")]

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    """Tag the wheel for every Python, since the library is loaded with ctypes."""

    def get_tag(self):
        folder = Path(self.get_finalized_command("build_ext").build_lib) / "ds" / "lib"
        built = (folder / LIBRARY).is_file()
        self.root_is_pure = not built
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    # Installed as ds.kernels: a top-level package `kernels` would hide Hugging Face's.
    packages=[*find_packages(include=["ds", "ds.*"]), "ds.kernels"],
    package_dir={"ds.kernels": "kernels"},
    ext_modules=[Extension("ds.lib.libds_cpu", sources=[], depends=["CMakeLists.txt", *SOURCES])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
