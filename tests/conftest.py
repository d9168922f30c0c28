"""Small networks on one thread, and a GPU's tests and kernels where there is one."""

import os
import shutil
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import emulated
from tests.combinations import mark_slow, slow

if emulated.VARIABLE in os.environ:  # in the workers of an emulated run
    emulated.install()

# Without a GPU the Triton kernels run in an interpreter. This is read when triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Peers in float32 compute in float32: cuDNN would take TF32, of 10 bits, unless it is told so.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

# Networks of the tests are so small that they are quicker done than shared out.
torch.set_num_threads(1)


CHROMIUM = shutil.which("chromium")


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what cannot run here, and mark what is slow of `each_value`."""
    mark_slow(items)
    missing = [] if CHROMIUM else ["browser"]
    if not torch.cuda.is_available():
        missing.append("gpu")
    elif emulated.VARIABLE in os.environ:
        missing.append("compiles")
    left_out = [item for item in items if any(map(item.get_closest_marker, missing))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count them for the process that reports; pytest-xdist does not."""
    for item in items:
        if (output := getattr(item.config, "workeroutput", None)) is not None:
            output["deselected"] = output.get("deselected", 0) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    reporter = node.config.pluginmanager.get_plugin("terminalreporter")
    output = getattr(node, "workeroutput", {})  # a process that has died left none
    reporter.stats["deselected"] = [SimpleNamespace()] * output.get("deselected", 0)


@pytest.fixture(params=["aot_eager", slow("inductor")])
def compiler(request, monkeypatch) -> str:
    """Let torch.compile stop at a graph of PyTorch's calls, or go on to machine code."""
    if request.param == "aot_eager":
        compile = torch.compile
        monkeypatch.setattr(
            torch,
            "compile",
            lambda model, fullgraph=False, **_: compile(
                model, fullgraph=fullgraph, backend="aot_eager"
            ),
        )
    return request.param


@pytest.fixture(scope="module", autouse=True)
def fresh_compiler():
    """Forget after a file what was compiled: networks of all files share one limit."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Spell out what UTF-8 cannot hold, as names of files can, in which workers report."""
    report = yield
    report.sections = [
        (title, said.encode(errors="backslashreplace").decode()) for title, said in report.sections
    ]
    return report
