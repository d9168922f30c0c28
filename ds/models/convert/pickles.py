"""Read the pickles of EDM's code opcode by opcode. Nothing of them is imported, called or run.

Such a file holds the source text of its own classes, which its authors' code runs to load it. Here
the text is dropped: an object becomes a `Stub` of its class name and its attributes. No unpickler
of Python's is used. A file names what it wants called; eleven names have a meaning here, and the
first other name refuses the file. So does an opcode that none of its writers uses.
"""

import math
import pickletools
import struct
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ds.system.config import short
from ds.system.files import first_line, is_of_the_machine, opened, unjudged

_MOST, _MOST_OF_A_STORAGE = 1_000_000, 1_000  # opcodes; ten times those of published networks
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of a storage that torch.save wrote
_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
_NUMBERS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "b1": "?"}


class Stub:
    """An object of a pickle: the name of its class, and its attributes by name."""

    def __init__(self, name: str, state: dict[str, Any] | None = None):
        self.name, self.state = name, state or {}


class _Global:
    """A name that a pickle asks for."""

    def __init__(self, name: str):
        self.name = name


class _DType:
    """A dtype of NumPy's numbers, by its code, such as "f8"."""

    def __init__(self, code: Any):
        self.code, self.order = code, "<"


def load(path: Path) -> Any:
    """Return what a pickle holds: plain values, tensors and `Stub`s.

    Raises ValueError, naming the file, for one that is damaged, asks for another name than EDM's
    pickles do, or claims more than it holds.
    """
    with opened(path) as file:
        try:
            content = _Bounded(file)
            storages = {"torch.storage._load_from_bytes": _Storages(content.left)}
            return _Machine({**_CALLS, **storages}).run(content)
        except Exception as error:  # its type depends on the damage
            if is_of_the_machine(error):
                raise unjudged(path, error) from None
            raise ValueError(
                f"{path}: not a whole pickle of EDM's networks ({first_line(error)}); nothing in "
                f"it was run"
            ) from None


class _Bounded:
    """A file that is never asked for more than the rest of it, whatever length it claims."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.left = file.seek(0, 2)
        file.seek(0)

    def read(self, count: int) -> bytes:
        content = self.file.read(min(count, self.left))
        self.left -= len(content)
        return content

    def readline(self) -> bytes:
        line = self.file.readline(1 << 10)  # a name
        self.left -= len(line)
        return line


class _Machine:
    """Pickle's stack machine, without a way out of it.

    Keys are texts or whole numbers: the hash of nested tuples could take for ever.
    """

    def __init__(self, calls: Mapping[str, Callable], *, most: int = _MOST):
        self.calls, self.most = calls, most
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: Any) -> Any:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(file)):
            if count == self.most:
                raise ValueError(f"it has more than {self.most:,} opcodes")
            step = _STEPS.get(opcode.name)
            if step is None or (opcode.name == "BINPERSID" and self.calls is not _STORAGE_CALLS):
                raise ValueError(f"its opcode {opcode.name} is refused")
            step(self, arg)
        return self.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("it takes from an empty stack")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise ValueError(f"it changes what is no {kind.__name__}")
        return self.stack[-1]

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        """Return what was pushed since the last mark, which is taken away."""
        if not self.marks:
            raise ValueError("a mark is missing")
        values, self.stack = self.stack, self.marks.pop()
        return values

    def last(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def ask(self, *name: Any) -> None:
        if not all(isinstance(part, str) for part in name):
            raise ValueError("it asks for what is no name")
        full = ".".join(name)
        if full not in self.calls:
            raise ValueError(f"it asks for {short(repr(full))}")
        self.push(_Global(full))

    def call(self) -> None:
        f, args = self.last(2)
        if not isinstance(f, _Global) or type(args) is not tuple:
            raise ValueError("it calls what is no name")
        self.push(self.calls[f.name](*args))

    def extend(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def fill(self, values: list[Any]) -> None:
        target = self.top(dict)
        if len(values) % 2 or not {*map(type, values[::2])} <= {str, int}:
            raise ValueError("a dict has a key that is no text or whole number")
        target.update(zip(values[::2], values[1::2], strict=True))

    def add(self, values: list[Any]) -> None:
        target = self.top(set)
        if not {*map(type, values)} <= {str, int}:
            raise ValueError("a set has a member that is no text or whole number")
        target.update(values)

    def build(self) -> None:
        state = self.pop()
        target = self.stack[-1] if self.stack else None
        if type(target) is Stub and type(state) is dict and not target.state:
            target.state = state
        elif type(target) is _DType and type(state) is tuple and state[1:2] in ((">",), ("<",)):
            target.order = state[1]
        elif type(target) is not _DType or state[1:2] != ("|",):
            raise ValueError("it sets the state of what has none")

    def recall(self, key: int) -> None:
        if key not in self.memo:
            raise ValueError("it recalls what it has not noted")
        self.push(self.memo[key])

    def note(self, key: int | None) -> None:
        value = self.pop()
        self.memo[len(self.memo) if key is None else key] = value
        self.push(value)


# What each opcode does; those that EDM's pickles and their storages do not have are refused.
_LITERALS = (
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
)  # fmt: skip
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    **dict.fromkeys(_LITERALS, _Machine.push),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_SET": lambda m, _: m.push(set()),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "MARK": lambda m, _: m.mark(),
    "TUPLE": lambda m, _: m.push(tuple(m.marked())),
    "TUPLE1": lambda m, _: m.push(m.last(1)),
    "TUPLE2": lambda m, _: m.push(m.last(2)),
    "TUPLE3": lambda m, _: m.push(m.last(3)),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.marked()),
    "ADDITEMS": lambda m, _: m.add(m.marked()),
    "SETITEM": lambda m, _: m.fill([*m.last(2)]),
    "SETITEMS": lambda m, _: m.fill(m.marked()),
    "GLOBAL": lambda m, arg: m.ask(*arg.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.ask(*m.last(2)),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.call(),
    "BUILD": lambda m, _: m.build(),
    "BINPUT": _Machine.note,
    "LONG_BINPUT": _Machine.note,
    "MEMOIZE": _Machine.note,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "BINPERSID": lambda m, _: None,  # of a storage: the tuple that describes it stays
}


def _object(about: Any) -> Stub:
    """Return an object of EDM's code. The source text of its class is not looked at."""
    fields = about if type(about) is dict else {}
    name, state = fields.get("class_name"), fields.get("state")
    if type(name) is not str or type(state) is not dict:
        raise ValueError("an object without a class name and attributes")
    return Stub(name, state)


def _container(name: str) -> Callable[[], Stub]:
    return lambda: Stub(name)


def _parameter(w: Any, *_: Any) -> Tensor:
    if not isinstance(w, Tensor):
        raise ValueError("a parameter that is no tensor")
    return w


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """Return a view of a storage, which holds as many numbers as the tensor has, or more."""
    if not isinstance(storage, Tensor) or not (type(size) is type(stride) is tuple):
        raise ValueError("a tensor without a storage, a size or a stride")
    if len(size) > 8 or len(size) != len(stride) or not all(map(_whole, (offset, *size, *stride))):
        raise ValueError("a tensor whose size or stride is none")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > storage.numel() or (0 not in size and last >= storage.numel()):
        raise ValueError("a tensor is larger than what is stored of it")
    return storage.as_strided(size, stride, offset)


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


class _Storages:
    """Read the bytes that torch.save wrote for a storage; of all of them, no more than `left`."""

    def __init__(self, left: int):
        self.left = left

    def __call__(self, content: Any) -> Tensor:
        if type(content) is not bytes:
            raise ValueError("a storage that is no bytes")
        self.left -= len(content)
        if self.left < 0:
            raise ValueError("its storages are larger than the file")
        return _storage(BytesIO(content))


def _storage(file: BytesIO) -> Tensor:
    """Return the numbers of a storage, [numel]."""
    magic, protocol, system, about, _ = (
        _Machine(_STORAGE_CALLS, most=_MOST_OF_A_STORAGE).run(file) for _ in range(5)
    )
    if (magic, protocol) != (_MAGIC, _PROTOCOL) or type(system) is not dict:
        raise ValueError("a storage that torch.save did not write")
    if type(about) is not tuple or len(about) != 6 or type(about[1]) is not _Global:
        raise ValueError("a storage that is not described")
    dtype, count = _STORAGES[about[1].name], about[4]
    (stored,) = struct.unpack("<q", file.read(8))
    numbers = bytearray(file.read())
    if not _whole(count) or stored != count or count * dtype.itemsize != len(numbers):
        raise ValueError(f"a storage holds {len(numbers):,} bytes, not those that it claims")
    if system.get("little_endian") is not True:
        raise ValueError("a storage of a machine that writes the high bytes first")
    if not count:
        return torch.empty(0, dtype=dtype, device="cpu")
    return torch.frombuffer(numbers, dtype=dtype)


def _number(dtype: Any, content: Any) -> Any:
    """Return a number of NumPy as a plain one."""
    if type(dtype) is not _DType or type(dtype.code) is not str or type(content) is not bytes:
        raise ValueError("a number of an unknown kind")
    if dtype.code not in _NUMBERS:
        raise ValueError(f"a number of the kind {short(repr(dtype.code))}")
    return struct.unpack(dtype.order + _NUMBERS[dtype.code], content)[0]


_CONTAINERS = ("ModuleDict", "ModuleList", "Sequential")
# With that of storages, the eleven names: three are those of containers, two those of one function.
_CALLS: dict[str, Callable] = {
    "collections.OrderedDict": lambda: {},
    "dnnlib.util.EasyDict": lambda: {},
    "torch_utils.persistence._reconstruct_persistent_obj": _object,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "numpy.dtype": lambda code, *_: _DType(code),
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    **{f"torch.nn.modules.container.{name}": _container(name) for name in _CONTAINERS},
}
_STORAGE_CALLS: dict[str, Callable] = dict.fromkeys(_STORAGES, lambda: None)
