"""Put the emulated GPU in the place of torch.cuda, for the rest of the process."""

import ctypes
import importlib
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from tests.emulated import graphs
from tests.emulated import tensor as tensors
from tests.emulated.interpreter import rounding_as_a_gpu
from tests.emulated.tensor import CudaTensor, OnGpu, gpu

VARIABLE = "DS_EMULATED_GPU"  # set for processes of a program that is run so (tests/conftest.py)
COUNT = 2
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
    total_memory=80 << 30, L2_cache_size=50 << 20, shared_memory_per_block_optin=227 << 10,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, warp_size=32,
)  # fmt: skip


_kept = ExitStack()  # what is to last as long as the process


class Stream:
    """A stream: work is done when it is given, so nothing is ever waited for."""

    cuda_stream = 0

    def __init__(self, device=None, priority: int = 0):
        self.device = gpu("cuda" if device is None else device)

    def wait_stream(self, stream) -> None: ...

    def wait_event(self, event) -> None: ...

    def synchronize(self) -> None:
        graphs.wait("cudaStreamSynchronize")

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True


class Event:
    """A moment of the CPU's clock."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False):
        self.seconds = 0.0

    def record(self, stream=None) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * max(end.seconds - self.seconds, 1e-6)

    def wait(self, stream=None) -> None: ...

    def synchronize(self) -> None:
        graphs.wait("cudaEventSynchronize")

    def query(self) -> bool:
        return True


class Generator(torch._C.Generator):
    """torch.Generator, of the CPU for all devices."""

    def __new__(cls, device: torch.device | str = "cpu"):
        generator = super().__new__(cls)
        if torch.device(device).type == "cuda":
            tensors.generators[generator._cdata] = generator
        return generator


@contextmanager
def device(index):
    """torch.cuda.device."""
    before = tensors.current()
    set_device(index)
    try:
        yield
    finally:
        tensors.set_current(before)


def device_of(x: Tensor):
    """torch.cuda.device_of, which does nothing for a tensor of the CPU."""
    return device(x.get_device() if x.is_cuda else -1)


def set_device(index) -> None:
    """torch.cuda.set_device."""
    index = index if isinstance(index, int) else gpu(index).index
    if index >= COUNT:
        raise RuntimeError("CUDA error: invalid device ordinal")
    if index >= 0:
        tensors.set_current(index)


@contextmanager
def stream(new):
    """torch.cuda.stream."""
    with device(new.device if new else -1):
        yield


def _nothing(*args, **kwargs) -> None: ...


def _always(value) -> Callable:
    return lambda *args, **kwargs: value


CUDA = {
    "_lazy_init": _nothing,
    "CUDAGraph": graphs.CUDAGraph,
    "Event": Event,
    "Stream": Stream,
    "current_device": tensors.current,
    "current_stream": Stream,
    "default_stream": Stream,
    "device": device,
    "device_count": _always(COUNT),
    "device_of": device_of,
    "empty_cache": _nothing,
    "get_device_capability": _always((H100.major, H100.minor)),
    "get_device_name": _always(H100.name),
    "get_device_properties": _always(H100),
    "get_rng_state": lambda *args: torch.get_rng_state(),
    "graph": graphs.graph,
    "init": _nothing,
    "ipc_collect": _nothing,
    "is_available": _always(True),
    "is_bf16_supported": _always(True),
    "is_current_stream_capturing": lambda: graphs.CUDAGraph.captured is not None,
    "is_initialized": _always(True),
    "manual_seed": _nothing,
    "manual_seed_all": _nothing,
    "max_memory_allocated": _always(1 << 30),
    "max_memory_reserved": _always(1 << 30),
    "mem_get_info": _always((79 << 30, 80 << 30)),
    "memory_allocated": _always(1 << 30),
    "memory_reserved": _always(1 << 30),
    "reset_peak_memory_stats": _nothing,
    "set_device": set_device,
    "set_rng_state": _nothing,
    "stream": stream,
    "synchronize": lambda device=None: graphs.wait("cudaDeviceSynchronize"),
    "utilization": _always(50),
}


def install() -> None:
    """Emulate from here on, in this process and in those of it that run tests."""
    if VARIABLE in os.environ and torch.cuda.is_available is CUDA["is_available"]:
        return
    os.environ[VARIABLE] = "1"
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    importlib.import_module("torch._dynamo")  # while the functions it has a table of are there
    for name, value in CUDA.items():
        setattr(torch.cuda, name, value)
    Tensor.to, Tensor.cuda = tensors.to, tensors.cuda
    torch.tensor, torch.as_tensor = tensors.made(torch.tensor), tensors.made(torch.as_tensor)
    F.scaled_dot_product_attention = _one_kernel(F.scaled_dot_product_attention)
    torch.compile = lambda model=None, **options: model or (lambda function: function)
    torch.load = _load(torch.load)
    torch.Generator = Generator
    sys.modules["nvidia.dali"] = None  # which asks the driver
    # A module that moves keeps its parameters, which others hold.
    torch.__future__.set_swap_module_params_on_conversion(True)
    _autocast()
    _in_every_thread()
    _launch_triton()
    _launch_cuda()


def _one_kernel(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """On a GPU attention is one kernel, where C++ sees a device that has none."""

    def fused(q, k, v, *args, **kwargs):
        if args or kwargs or q.dtype == torch.float64 or not isinstance(q, CudaTensor):
            return attention(q, k, v, *args, **kwargs)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]

    return fused


def _load(load: Callable) -> Callable:
    def loaded(file, map_location=None, **kwargs):
        if not isinstance(map_location, (str, torch.device)):
            return load(file, map_location=map_location, **kwargs)
        found = load(file, map_location="cpu", **kwargs)
        move = lambda x: x.to(map_location) if isinstance(x, Tensor) else x  # noqa: E731
        return tree_map(move, found)

    return loaded


# What autocast computes in the narrow type and in float32, of what is called here (ATen's
# autocast_mode.h has all).
LOW = ("addmm", "baddbmm", "bmm", "conv2d", "convolution", "linear", "matmul", "mm", "mv",
       "_scaled_dot_product_flash_attention_for_cpu")  # fmt: skip
WIDE = ("cumsum", "group_norm", "layer_norm", "mse_loss", "norm", "prod", "softmax", "sum")


def _autocast() -> None:
    """Let autocast cast tensors of the GPU: PyTorch's own kernels for that look at the device."""
    library = Library("aten", "IMPL")
    _kept.callback(library._destroy)  # which keeps what it registers

    def register(name: str, dtype: Callable[[], torch.dtype]) -> None:
        def cast(x):
            floats = isinstance(x, CudaTensor) and x.is_floating_point()
            return x.to(dtype()) if floats and x.dtype != torch.float64 else x

        for overload in getattr(torch.ops.aten, name).overloads():
            op = getattr(getattr(torch.ops.aten, name), overload)
            if not op._schema.is_mutable:
                library.impl(op, _below_autocast(op, cast), "AutocastCUDA")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that are replaced
        for name in LOW:
            register(name, lambda: torch.get_autocast_dtype("cuda"))
        for name in WIDE:
            register(name, lambda: torch.float32)


def _below_autocast(op, cast: Callable) -> Callable:
    def call(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return op(*tree_map(cast, args), **kwargs)

    return call


def _in_every_thread() -> None:
    _kept.enter_context(OnGpu())
    run = threading.Thread.run

    def run_on_gpu(self) -> None:
        with OnGpu():
            run(self)

    threading.Thread.run = run_on_gpu


def _launch_triton() -> None:
    """Hand the interpreter the memory of tensors, and nothing else that is one."""
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor
    from triton.tools.tensor_descriptor import TensorDescriptor

    _kept.enter_context(rounding_as_a_gpu())
    execute = GridExecutor.__call__

    def memory(name: str, x):
        if isinstance(x, CudaTensor):
            _check_current(name, x.place)
            return x.memory
        if isinstance(x, TensorDescriptor):
            return replace(x, base=memory(name, x.base))
        if isinstance(x, tuple):
            items = (memory(name, each) for each in x)
            return type(x)(*items) if hasattr(x, "_fields") else tuple(items)
        if isinstance(x, Tensor):
            raise ValueError(
                f"Pointer argument cannot be accessed from Triton (cpu tensor?): {name}"
            )
        return x

    def call(self, *args, **kwargs):
        name = self.fn.__name__
        args = [memory(name, x) for x in args]
        kwargs = {key: memory(name, x) for key, x in kwargs.items()}
        work = lambda: execute(self, *args, **kwargs)  # noqa: E731
        some = callable(self.grid) or 0 not in self.grid
        with _disable_current_modes():
            graphs.launch(gpu("cuda"), lambda: [name] * some, work)

    GridExecutor.__call__ = call
    interpreter._patch_lang = _patched_once(interpreter._patch_lang)


def _patched_once(patch: Callable) -> Callable:
    """Let functions that a kernel calls find the language patched: that is half of the time."""
    active: set[str] = set()

    def patch_once(function):
        names = {x.__name__ for x in function.__globals__.values() if isinstance(x, ModuleType)}
        names = {name for name in names if name.startswith("triton.language")}
        if names <= active:
            return SimpleNamespace(restore=_nothing)
        scope, added = patch(function), names - active
        active.update(added)

        def restore() -> None:
            scope.restore()
            active.difference_update(added)

        return SimpleNamespace(restore=restore)

    return patch_once


def _launch_cuda() -> None:
    """Let csrc/cuda interpret its kernels, and look at the addresses that they are given."""
    from ds.ops import _native

    try:
        lib = _native.cuda_library()
    except ImportError:
        return
    interpret, launch = lib.ds_cuda_interpret, _native.cuda_launch
    lib.ds_cuda_interpret = lambda order: interpret(order or 1)
    lib.ds_cuda_interpret(0)
    address = Tensor.data_ptr

    def data_ptr(x: Tensor) -> int:
        tensors.cpu_addresses.add(address(x))
        return address(x)

    def cuda_launch(function, x, *args):
        if not x.is_cuda:
            return launch(function, x, *args)
        lists = _lists(args)  # a graph outlives those of the caller
        if lists:
            args = ((ctypes.c_void_p * len(lists))(*map(ctypes.addressof, lists)), *args[1:])
        kinds = zip(args, function.argtypes, strict=False)
        given = {a for a, kind in kinds if kind is ctypes.c_void_p and isinstance(a, int)}
        if wrong := tensors.cpu_addresses & given.union(*lists):
            raise RuntimeError(
                f"CUDA error: an illegal memory access was encountered: {function.__name__} at "
                f"{', '.join(map(hex, wrong))}, memory of the CPU"
            )
        work = lambda lists=lists: launch(function, x, *args)  # noqa: E731
        graphs.launch(x.place, lambda: _kernels(function.__name__, args), work)

    _native.cuda_launch = cuda_launch
    Tensor.data_ptr = data_ptr


def _lists(args: tuple) -> list[ctypes.Array]:
    """Return copies of the lists of addresses that ds_cuda_adam takes, and nothing else does."""
    if not isinstance(args[0], ctypes.Array):
        return []
    count = args[2]
    arrays = (ctypes.string_at(address, 8 * count) for address in args[0])
    return [(ctypes.c_void_p * count).from_buffer_copy(array) for array in arrays]


def _kernels(name: str, args: tuple) -> list[str]:
    """Return the name of a function of csrc/cuda as often as it launches a kernel."""
    if name == "ds_cuda_group_norm_silu":
        return [name] * (1 if args[6] is None else 2)  # without a table, by a cluster
    if name == "ds_cuda_prepare_batch":
        return [name]
    if name == "ds_cuda_adam":
        count, max_norm = args[2], args[14]
        passes = -(-count // 56)  # kTensors of adam.cu
        return [name] * (passes + 1 + passes * (max_norm < math.inf))
    raise NotImplementedError(f"launches: how many kernels does {name} launch?")


def _check_current(name: str, place: torch.device) -> None:
    if place.index != tensors.current():
        raise RuntimeError(
            f"CUDA error: an illegal memory access was encountered: {name} runs on "
            f"cuda:{tensors.current()} and is given memory of {place}"
        )
