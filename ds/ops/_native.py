"""The native libraries, libds_cpu.so and libds_cuda.so, which `pip install` builds where it can."""

import ctypes
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_DIRECTORY = Path(__file__).resolve().parent / "lib"
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_BOOL, _DOUBLE = ctypes.c_bool, ctypes.c_double
_ENUM, _TEXT = ctypes.c_int, ctypes.c_char_p
INTERFACE = 4  # of the functions that are declared here; CMakeLists.txt has it too
# The data types that the CUDA library takes, as csrc/cuda/launch.cuh numbers them.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def build_info(library: str = "cpu") -> dict[str, str | bool]:
    """Return what the installation recorded of a library: built, reason, compiler and flags.

    The libraries are "cpu" and "cuda".
    """
    try:
        return json.loads((_DIRECTORY / "build.json").read_text())[library]
    except FileNotFoundError:
        reason = "the installation did not try to build it (run: pip install .)"
        return {"built": False, "reason": reason, "compiler": "", "flags": ""}


@functools.cache
def cpu_library() -> ctypes.CDLL:
    """Load libds_cpu.so and hand it PyTorch's thread pool.

    Raises:
        ImportError: the library was not built, or does not load; the text says why.
    """
    lib = _load("cpu")
    lib.ds_adam_chunks.argtypes, lib.ds_adam_chunks.restype = [_POINTER, _INT], _INT
    lib.ds_adam.argtypes = [*[_POINTER] * 2, _INT, *[_POINTER] * 5, _BOOL]
    lib.ds_gather_rows.argtypes = [*[_POINTER] * 4, *[_INT] * 3, _POINTER]
    lib.ds_gather_rows.restype = None
    lib.ds_group_norm_silu.argtypes = [*[_POINTER] * 6, *[_INT] * 4, _DOUBLE, *[_BOOL] * 3, _INT]
    lib.ds_group_norm_silu_backward.argtypes = [*[_POINTER] * 10, *[_INT] * 4, *[_BOOL] * 3, _INT]
    lib.ds_noise.argtypes = [*[_POINTER] * 2, *[_INT] * 3, _BOOL]
    lib.ds_philox.argtypes = [_POINTER]
    lib.ds_philox.restype = None
    lib.ds_prepare_batch.argtypes = [*[_POINTER] * 4, *[_INT] * 4, _BOOL]
    lib.ds_quantize.argtypes = [*[_POINTER] * 2, *[_INT] * 3, *[_BOOL] * 3]
    lib.ds_solver_update.argtypes = [*[_POINTER] * 5, *[_INT] * 2, _BOOL]
    lib.ds_winograd_conv.argtypes = [*[_POINTER] * 6, *[_INT] * 7, *[_BOOL] * 2]
    lib.ds_winograd_weight.argtypes = [*[_POINTER] * 2, *[_INT] * 2, _BOOL]
    lib.ds_winograd_weight_gradient.argtypes = [*[_POINTER] * 3, *[_INT] * 6]
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


@functools.cache
def cuda_library() -> ctypes.CDLL:
    """Load libds_cuda.so, which needs no GPU and no driver for that.

    Raises:
        ImportError: the library was not built, or does not load; the text says why.
    """
    lib = _load("cuda")
    place = [_ENUM, _POINTER]
    signatures = {
        "interpret": ([_ENUM], None),
        "unavailable": ([_ENUM, _ENUM], _TEXT),
        "adam_chunks": ([_POINTER, _INT], _INT),
        "adam": (
            [*[_POINTER] * 2, _INT, *[_POINTER] * 5, *[_DOUBLE] * 4, _BOOL, *[_DOUBLE] * 2, _ENUM,
             *place], _TEXT,
        ),
        "group_norm_silu_tiles": ([*[_INT] * 4, _BOOL, _POINTER], _INT),
        "group_norm_silu": (
            [*[_POINTER] * 7, *[_INT] * 5, _DOUBLE, _BOOL, *[_ENUM] * 3, *place], _TEXT,
        ),
        "prepare_batch": ([*[_POINTER] * 4, *[_INT] * 4, _ENUM, *place], _TEXT),
    }  # fmt: skip
    for name, (arguments, result) in signatures.items():
        function = getattr(lib, f"ds_cuda_{name}")
        function.argtypes, function.restype = arguments, result
    return lib


def cuda_kernels(capability: int, shared: int = 48 * 1024) -> ctypes.CDLL:
    """Return the CUDA library, for kernels that need a compute capability and shared memory.

    Raises:
        ImportError: it was not built or does not load, or a GPU of this machine cannot run them.
    """
    lib = cuda_library()
    if reason := lib.ds_cuda_unavailable(capability, shared):
        raise ImportError(reason.decode())
    return lib


def cuda_launch(function: Callable[..., bytes | None], x: Tensor, *args) -> None:
    """Call a function of the CUDA library for the device of x and its current stream.

    Raises:
        RuntimeError: the launch failed; the text is CUDA's.
    """
    if x.is_cuda:
        with torch.cuda.device_of(x):
            error = function(*args, x.device.index, torch.cuda.current_stream().cuda_stream)
    else:  # the kernels are interpreted
        error = function(*args, 0, None)
    if error:
        raise RuntimeError(f"{function.__name__}: {error.decode()}")


def _load(name: str) -> ctypes.CDLL:
    path = _DIRECTORY / f"libds_{name}.so"
    if not path.is_file():
        raise ImportError(f"{path.name} was not built: {build_info(name)['reason']}")
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"{path.name} does not load: {error}") from error
    number = getattr(lib, f"ds_{name}_interface", None)
    if number is None or number() != INTERFACE:
        raise ImportError(
            f"{path.name} belongs to another version of this code (run: pip install .)"
        )
    return lib
