"""The CUDA library: it loads everywhere, and says what keeps its kernels from running."""

import subprocess
import sys

import pytest
import torch

from ds import ops
from ds.ops import _native
from ds.ops.group_norm_silu import forward
from tests.cuda.conftest import FORWARDS

pytestmark = pytest.mark.skipif(
    not _native.build_info("cuda")["built"], reason=str(_native.build_info("cuda")["reason"])
)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
REASON = "CUDA driver|no CUDA-capable device"


@without_gpu
def test_without_a_gpu_it_loads_and_says_why_it_cannot_run():
    with pytest.raises(ImportError, match=REASON):
        _native.cuda_kernels(capability=80)
    rows = [
        row for row in ops.table() if row.device == "cuda" and row.backend in ("cluster", "cuda")
    ]
    assert {row.op for row in rows} >= {"group_norm_silu", "adam_step"}
    for row in rows:
        assert row.status == "missing"
        assert any(reason in row.reason for reason in REASON.split("|"))


@without_gpu
def test_a_failed_launch_is_an_error_with_the_text_of_cuda():
    """Only with the interpreter off after loading does a launch reach a machine without a GPU."""
    lib = _native.cuda_library()
    lib.ds_cuda_interpret(FORWARDS)
    kernel = forward._load("cuda", "cuda")
    lib.ds_cuda_interpret(0)
    x = torch.zeros(1, 8, 4, 4)
    with pytest.raises(RuntimeError, match=r"ds_cuda_group_norm_silu: .*(CUDA driver|no CUDA)"):
        kernel(x, torch.ones(8), torch.zeros(8), 2, 1e-6, True)


def test_it_brings_its_own_runtime_and_shows_only_its_own_names():
    path = _native._DIRECTORY / "libds_cuda.so"
    code = f"import ctypes; ctypes.CDLL({str(path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env={})
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True
    )
    if symbols.returncode:
        pytest.skip("nm is not installed")
    names = [line.split()[-1] for line in symbols.stdout.splitlines() if " T " in line]
    assert names and all(name.startswith("ds_cuda_") for name in names)
