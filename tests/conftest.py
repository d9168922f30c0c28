"""Small networks on one thread, and a GPU's tests and kernels where there is one."""

import os
import shutil
import sys

import pytest
import torch

from tests import emulated

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what cannot run here, and begin with files of slow tests.

    Else one process would be left with those at the end.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    missing = [] if CHROMIUM else ["browser"]
    if not torch.cuda.is_available():
        missing.append("gpu")
    elif emulated.VARIABLE in os.environ:
        missing.append("compiles")
    left_out = [item for item in items if any(map(item.get_closest_marker, missing))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


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
