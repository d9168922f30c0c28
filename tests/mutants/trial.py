"""Run tests of a tree in a forked process, and say which of them fail."""

import gc
import os
import resource
import select
import signal
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import pytest

OWN = ("ds", "tests", "benchmarks", "examples")
# What many tests import, and nothing of ours.
HEAVY = (
    "torch._dynamo", "torch.distributed.checkpoint", "scipy.stats", "safetensors.torch", "tyro",
    "sklearn.datasets", "matplotlib.pyplot", "torchmetrics", "diffusers.models",
)  # fmt: skip
PLUGINS = ("_hypothesis_pytestplugin", "pytest_timeout")
STARTS = 8.0  # seconds for imports and collection, beyond those of the tests


def prepare() -> None:
    """Import what is heavy, once for all that is forked; let hypothesis draw the same each time."""
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = False  # or every process would compile the tree again
    from hypothesis import settings

    settings.register_profile("mutants", derandomize=True, database=None)
    for name in (*HEAVY, *PLUGINS):
        import_module(name)
    gc.freeze()


class _Only:
    """Run some tests of the files that pytest collects, and keep the names of those that fail."""

    def __init__(self, tests: Iterable[str]):
        self.tests, self.failed = {*tests}, []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # A fault can move a parameter and so the name of a test: then all of its cases are run.
        moved = {test.partition("[")[0] for test in self.tests - {item.nodeid for item in items}}
        items[:] = [
            item
            for item in items
            if item.nodeid in self.tests or item.nodeid.partition("[")[0] in moved
        ]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.pytest_runtest_logreport(report)

    def pytest_runtest_logreport(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def failing(tree: Path, tests: list[str], seconds: float, *, first: bool) -> list[str]:
    """Return which tests of a tree fail, or the first alone.

    Where a conftest does not import, or the process is killed or takes more seconds of a processor,
    the list has that one word. Raises RuntimeError if the tree has none of the tests.
    """
    read, write = os.pipe()
    if not (child := os.fork()):
        _in_child(tree, tests, seconds + STARTS, first, write)
    os.close(write)
    # Others may use the processors: far longer than they are used here.
    ready, _, _ = select.select([read], [], [], 30 * (seconds + STARTS))
    told = os.read(read, 2**16).decode() if ready else "took too long"
    os.close(read)
    _end(child)
    code, _, failed = told.partition("\n")
    if code == "5":
        raise RuntimeError(f"{tree}: pytest finds none of {tests}")
    if code in ("0", "1", "2"):
        return failed.splitlines()
    return ["does not import" if code == "4" else code or "killed"]


def _end(child: int) -> None:
    """End a process and all that it started."""
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _in_child(tree: Path, tests: list[str], seconds: float, first: bool, write: int) -> None:
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = sys.path[0] = str(tree)
        for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
            del sys.modules[name]
        only = _Only(tests)
        files = dict.fromkeys(test.partition("::")[0] for test in tests)
        options = [f"-p{name}" for name in ("no:cacheprovider", *PLUGINS)] + ["-x"] * first
        options.append("--hypothesis-profile=mutants")
        code = pytest.main([*options, *files], plugins=[only])
        os.write(write, "\n".join([str(int(code)), *only.failed]).encode())
    finally:
        os._exit(0)
