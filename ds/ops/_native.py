"""The C++ library libds_cpu.so, which `pip install` builds where it finds a compiler."""

import ctypes
import functools
import json
from pathlib import Path

import torch

_DIRECTORY = Path(__file__).resolve().parent.parent / "lib"
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_BOOL, _DOUBLE = ctypes.c_bool, ctypes.c_double


def build_info() -> dict[str, str | bool]:
    """Return what the installation recorded: built, reason, compiler and flags."""
    try:
        return json.loads((_DIRECTORY / "build.json").read_text())
    except FileNotFoundError:
        reason = "the installation did not try to build it (run: pip install .)"
        return {"built": False, "reason": reason, "compiler": "", "flags": ""}


@functools.cache
def library() -> ctypes.CDLL:
    """Load libds_cpu.so and hand it PyTorch's thread pool.

    Raises:
        ImportError: the library was not built, or does not load; the text says why.
    """
    path = _DIRECTORY / "libds_cpu.so"
    if not path.is_file():
        raise ImportError(f"libds_cpu.so was not built: {build_info()['reason']}")
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"libds_cpu.so does not load: {error}") from error
    lib.ds_group_norm_silu.argtypes = [*[_POINTER] * 6, *[_INT] * 4, _DOUBLE, *[_BOOL] * 3]
    lib.ds_group_norm_silu_backward.argtypes = [*[_POINTER] * 10, *[_INT] * 4, *[_BOOL] * 3]
    lib.ds_noise.argtypes = [*[_POINTER] * 2, *[_INT] * 3, _BOOL]
    lib.ds_philox.argtypes = [_POINTER]
    lib.ds_philox.restype = None
    lib.ds_prepare_batch.argtypes = [*[_POINTER] * 4, *[_INT] * 4, _BOOL]
    lib.ds_quantize.argtypes = [*[_POINTER] * 2, *[_INT] * 3, *[_BOOL] * 3]
    lib.ds_solver_update.argtypes = [*[_POINTER] * 5, *[_INT] * 2, _BOOL]
    lib.ds_limit_simd.argtypes = [ctypes.c_int]
    # A look-up in torch._C also searches the libraries it is linked to, libtorch_cpu among them.
    pool = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    lib.ds_set_parallel_for.argtypes = [_POINTER]
    lib.ds_set_parallel_for(ctypes.cast(pool, _POINTER))
    return lib


def check(op: str, error: int) -> None:
    """Raise RuntimeError for an error code of the thread pool."""
    if error:
        raise RuntimeError(f"{op}: the thread pool failed with error {error}")
