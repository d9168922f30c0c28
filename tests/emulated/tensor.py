"""Tensors on an emulated GPU, and what PyTorch's operations do with them."""

import functools
import threading
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.emulated import graphs

aten = torch.ops.aten
CPU = torch.device("cpu")

# Operations that wait for the GPU, because a result, or the size of it, goes to the CPU.
WAITS = {
    "_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2", "unique_dim",
    "unique_consecutive", "repeat_interleave.Tensor",
}  # fmt: skip
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}

_thread = threading.local()  # .current: the number of its GPU; .calls: where those it is in run
pinned: dict[int, Tensor] = {}  # by address, and so never given back
generators: dict[int, torch.Generator] = {}  # of GPUs, by the address of what C++ has
cpu_addresses: set[int] = set()  # that data_ptr() of a tensor of the CPU returned


def current() -> int:
    """Return the number of the thread's current GPU."""
    return getattr(_thread, "current", 0)


def set_current(index: int) -> None:
    _thread.current = index


def gpu(device: torch.device | str | int) -> torch.device:
    """Return a CUDA device with its number."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", current()) if device.index is None else device


@contextmanager
def _calling(place: torch.device):
    """Remember where a call runs: what C++ makes in it for a tensor of meta belongs there."""
    calls = _thread.__dict__.setdefault("calls", [])
    calls.append(place)
    try:
        yield
    finally:
        calls.pop()


class CudaTensor(Tensor):
    """A tensor of a GPU, `place`, whose values are those of `memory`, a tensor of the CPU.

    C++ takes it for one of the meta device, which PyTorch's autograd knows in every build.
    """

    @staticmethod
    def __new__(cls, memory: Tensor, place: torch.device, requires_grad: bool = False):
        autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
        x = torch.Tensor._make_wrapper_subclass(
            cls, memory.size(), strides=memory.stride(), storage_offset=memory.storage_offset(),
            dtype=memory.dtype, device="meta", requires_grad=requires_grad,
            _extra_dispatch_keys=autocast,
        )  # fmt: skip
        x.memory, x.place = memory, place
        return x

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, CudaTensor))
        with _calling(found.place), torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    device = property(lambda self: self.place)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return self.place.index

    def to(self, *args, **kwargs) -> Tensor:
        """Convert, unless it is there already, which C++ would not see."""
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(
            *(
                args
                if not args or not isinstance(args[0], Tensor)
                else (args[0].device, args[0].dtype)
            ),
            **{name: value for name, value in kwargs.items() if name != "copy"},
        )
        same = device is None or (device.type == "cuda" and gpu(device) == self.place)
        if same and dtype in (None, self.dtype) and memory_format is None:
            return self.clone() if kwargs.get("copy") else self
        return super().to(
            self.place if same else device,
            dtype or self.dtype,
            non_blocking=non_blocking,
            memory_format=memory_format or torch.preserve_format,
        )

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False) -> Tensor:
        return torch.tensor(
            data, dtype=dtype or self.dtype, device=device or self.place,
            requires_grad=requires_grad,
        )  # fmt: skip

    def data_ptr(self) -> int:
        address = self.memory.data_ptr()
        cpu_addresses.discard(address)  # which memory of the CPU that is free by now once had
        return address

    def untyped_storage(self):
        return self.memory.untyped_storage()

    def is_pinned(self, device=None) -> bool:
        return False

    def pin_memory(self, device=None) -> Tensor:
        raise RuntimeError(
            "cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned"
        )

    def record_stream(self, stream) -> None:
        pass

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    __array__ = numpy

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            new = CudaTensor(self.memory.clone(), self.place, self.requires_grad)
            new._is_param = isinstance(self, nn.Parameter)
            memo[id(self)] = new
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return self.memory.__reduce_ex__(protocol)

    def __repr__(self, **kwargs) -> str:
        return f"{self.memory!r} on {self.place}"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)


class OnGpu(TorchDispatchMode):
    """Sends every operation of a thread through `run`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func: torch._ops.OpOverload, args: tuple, kwargs: dict):
    """Do an operation on the memory of its tensors, or raise what a GPU would."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, CudaTensor)]
    target = _target(args, kwargs, ours)
    if not ours and (target is None or target.type != "cuda"):
        return _on_cpu(func, args, kwargs)
    if key := _made_of_others(func):
        with OnGpu(), _calling(ours[0].place if ours else target):
            return func._op_dk(key, *args, **kwargs)
    name = func._schema.name.removeprefix("aten::")
    if name in ("_to_copy", "copy_"):
        _check_copy(name, args, kwargs, target)
    else:
        _check_places(func, name, args, tensors, ours)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": CPU}
    generator = kwargs.get("generator")
    if generator is not None and generator._cdata not in generators:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    kwargs.pop("pin_memory", None)
    low_args, low_kwargs = tree_map(_memory, (args, kwargs))
    if "flash_attention" in name:  # chosen for the GPU's tensors; the CPU's reads dense rows alone
        low_args = tree_map(lambda x: x.contiguous() if isinstance(x, Tensor) else x, low_args)
    if name in ("div", "div_") and low_args[0].is_floating_point() and not low_kwargs:
        func, low_args = _reciprocal(func, *args)
    place = target or ours[0].place
    if place.type != "cuda":
        return func(*low_args, **low_kwargs)
    result = graphs.operate(place, func, low_args, low_kwargs)
    known = {id(x.memory): x for x in ours}  # what was written, and is its own result

    def on_gpu(x):
        if isinstance(x, Tensor):
            return known[id(x)] if id(x) in known else CudaTensor(x, place)
        return x

    return tree_map(on_gpu, result)


@functools.cache
def _made_of_others(func: torch._ops.OpOverload) -> torch._C.DispatchKey | None:
    """Return the key of the kernel that calls other operations, if there is one."""
    keys = ["CompositeImplicitAutograd"]
    if func.namespace == "ds":  # whose kernels are launched from Python
        keys.append("CompositeExplicitAutograd")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    found = [key for key in keys if has(func.name(), key)]
    return getattr(torch._C.DispatchKey, found[0]) if found else None


def _memory(x):
    """Return what an operation works on; a graph keeps the value of a number of the CPU."""
    if isinstance(x, CudaTensor):
        return x.memory
    kept = isinstance(x, Tensor) and graphs.CUDAGraph.captured is not None
    return x.clone() if kept else x


def _reciprocal(func: torch._ops.OpOverload, x: CudaTensor, y) -> tuple:
    """Turn division by a number into a multiplication, as ATen's div_true_kernel_cuda does."""
    if isinstance(y, CudaTensor):
        return func, (x.memory, y.memory)
    wide = torch.promote_types(x.dtype, torch.float32)
    multiply = aten.mul_ if func._schema.is_mutable else aten.mul
    return multiply.Tensor, (x.memory, torch.tensor(float(y), dtype=wide).reciprocal())


def _target(args: tuple, kwargs: dict, ours: list[CudaTensor]) -> torch.device | None:
    """Return the device that an operation names, as the caller means it."""
    given = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.device))
    if (device := next(given, None)) is None:
        return None
    if device.type == "meta" and getattr(_thread, "calls", None):
        return ours[0].place if ours else _thread.calls[-1]
    return gpu(device) if device.type == "cuda" else device


def _on_cpu(func, args: tuple, kwargs: dict):
    """Do an operation of other devices; a page of memory is pinned in name."""
    if func is aten.is_pinned.default:
        return args[0].untyped_storage().data_ptr() in pinned
    if func is aten._pin_memory.default:
        graphs.wait("cudaHostAlloc")
        copy = args[0].clone()
        pinned[copy.untyped_storage().data_ptr()] = copy
        return copy
    return func(*args, **kwargs)


def _check_copy(name: str, args: tuple, kwargs: dict, target: torch.device | None) -> None:
    """A copy between devices waits, but where it comes from pinned memory and need not."""
    source = args[0] if name == "_to_copy" else args[1]
    target = target or args[0].device
    if source.device.type == "cpu":
        non_blocking = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if not (non_blocking and source.untyped_storage().data_ptr() in pinned):
            graphs.wait("copy from memory of the CPU that is not pinned")
    elif target.type == "cpu":
        graphs.wait("copy to the CPU")


def _check_places(func, name: str, args: tuple, tensors: list[Tensor], ours: list) -> None:
    """Raise for tensors of several devices, and for what waits while a graph is captured."""
    places = {str(x.device) for x in tensors if x.dim() > 0 or isinstance(x, CudaTensor)}
    indexes = name in INDEXES and isinstance(args[0], CudaTensor)
    if indexes and "cpu" in places:
        graphs.wait("indices of the CPU")
        places.remove("cpu")
    if len(places) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(places, reverse=True))}! ({func})"
        )
    masks = indexes and any(
        isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1]
    )
    if masks or name in WAITS or f"{name}.{func._overloadname}" in WAITS:
        graphs.wait(str(func))


def to(x: Tensor, *args, _to=Tensor.to, **kwargs) -> Tensor:
    """Tensor.to, with the number of a GPU, for which C++ would ask the driver."""

    def numbered(device):
        named = isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"
        return gpu(device) if named else device

    kwargs = {name: numbered(value) for name, value in kwargs.items()}
    if args and isinstance(args[0], CudaTensor):
        args = (args[0].place, args[0].dtype, *args[1:])
    return _to(x, *map(numbered, args), **kwargs)


def cuda(x: Tensor, device=None, non_blocking: bool = False) -> Tensor:
    """Tensor.cuda."""
    return x.to(gpu("cuda" if device is None else device), non_blocking=non_blocking)


def made(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap torch.tensor and torch.as_tensor, which C++ hides from modes."""

    def on_device(data, *args, device=None, requires_grad=False, **kwargs):
        if device is None or torch.device(device).type != "cuda":
            if device is None and isinstance(data, CudaTensor):
                return data.to(kwargs.get("dtype"))
            rest = {} if device is None else {"device": device}
            rest |= {"requires_grad": True} if requires_grad else {}
            return make(data, *args, **rest, **kwargs)
        x = data if isinstance(data, CudaTensor) else make(data, *args, **kwargs)
        return x.to(gpu(device)).requires_grad_(requires_grad)

    return on_device
