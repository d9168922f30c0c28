"""docs/environment.md has a row for every variable that is read, and no row without a reader."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "environment.md").read_text()
OURS = {"Of this package", "When it is built", "To work on this package"}
# Where variables of other packages are read, as far as Python can tell.
ELSEWHERE = {
    "OMP_NUM_THREADS": "torch/distributed/run.py",
    "CUDA_VISIBLE_DEVICES": "torch/cuda/__init__.py",
    "PYTORCH_ALLOC_CONF": "torch/cuda/memory.py",
    "RANK": "torch/distributed/rendezvous.py",
    "MASTER_ADDR": "torch/distributed/rendezvous.py",
    "MASTER_PORT": "torch/distributed/rendezvous.py",
    "TORCH_LOGS": "torch/_logging/_internal.py",
    "TORCHINDUCTOR_CACHE_DIR": "torch/_inductor/runtime/cache_dir_utils.py",
    "TRITON_CACHE_DIR": "triton/knobs.py",
    "TRITON_INTERPRET": "triton/knobs.py",
    "HF_HOME": "huggingface_hub/constants.py",
    "HF_TOKEN": "huggingface_hub/utils/_auth.py",
    "HF_HUB_OFFLINE": "huggingface_hub/constants.py",
}
# Read by native code, and by packages that the tests do not install.
UNSEEN = {
    "GOMP_SPINCOUNT",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "NCCL_DEBUG",
    "AWS_PROFILE",
    "AWS_ENDPOINT_URL",
    "GOOGLE_APPLICATION_CREDENTIALS",
}


def rows() -> dict[str, set[str]]:
    """Return the variables of the page by the heading they stand under."""
    parts = re.split(r"^## (.+)\n", PAGE, flags=re.MULTILINE)[1:]
    tables = zip(parts[::2], parts[1::2], strict=True)
    return {title: {*re.findall(r"^\| `(\w+)` \|", rest, re.MULTILINE)} for title, rest in tables}


def text(*patterns: str) -> str:
    files = (path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())
    return "\n".join(path.read_text(errors="ignore") for path in files)


def read() -> set[str]:
    """Return the variables that the sources read."""
    python = text("ds/**/*.py", "setup.py", "benchmarks/*.py", "kernels/**/*.py")
    found = {*re.findall(r'environ(?:\.get|\.setdefault)?[(\[]"([A-Z_]+)"', python)}
    found |= {*re.findall(r'"(\w+)" in os\.environ', python)}
    make, cmake = text("Makefile"), text("CMakeLists.txt")
    found |= {*re.findall(r"^(\w+)\s*\?=", make, re.MULTILINE)}
    sources = python + make + cmake + text("csrc/**/*", "tests/**/*.py", ".ci/*")
    found |= {*re.findall(r'getenv\("(\w+)"', sources), *re.findall(r"\$ENV\{(\w+)", cmake)}
    defined = {*re.findall(r"set\((DS_\w+)|\b(DS_\w+)=", cmake)}
    ours = {*re.findall(r"\bDS_[A-Z_]*[A-Z]\b", sources)}
    named = {*re.findall(r"\b(CXX|CUDACXX|[A-Z]+FLAGS)\b", (ROOT / "setup.py").read_text())}
    return found | named | ours - {name for pair in defined for name in pair}


def test_every_variable_that_is_read_has_a_row_and_every_row_is_read():
    found, page = read() - {"PATH", "PYTHONPATH"}, rows()
    assert {name for title in OURS for name in page[title]} == found


def test_the_variables_of_other_packages_are_read_by_them():
    page = rows()["Of other packages"]
    assert page == {*ELSEWHERE, *UNSEEN} - {"TORCHINDUCTOR_CACHE_DIR"}


@pytest.mark.parametrize(("variable", "file"), ELSEWHERE.items(), ids=[*ELSEWHERE])
def test_another_package_reads_a_variable(variable, file):
    package, _, rest = file.partition("/")
    spec = find_spec(package)
    assert spec and spec.origin
    assert re.search(rf"\b{variable}\b", (Path(spec.origin).parent / rest).read_text())
