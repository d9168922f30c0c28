"""Run the CPU library on another processor, emulated by qemu: a plugin of pytest.

DS_FOREIGN is the command that starts the runner (tests/foreign.cpp) with a library. Tests and
references stay on this processor; a call of the library is made there. What its pointers point to
is copied into memory that both share, and back: of a tensor, all of its storage.
"""

import ctypes
import mmap
import os
import shlex
import struct
import subprocess
import tempfile
from itertools import compress
from typing import Any

import pytest
from torch import Tensor

from ds.ops import _native

_BYTES = 1 << 28  # of the shared memory
_LINE = 64
_CALL, _ANSWER = struct.Struct("64s24qd"), struct.Struct("q")
_data_ptr, _addressof = Tensor.data_ptr, ctypes.addressof
_storages: dict[int, tuple[int, int]] = {}  # address and size, by an address of a tensor in it
_arrays: dict[int, Any] = {}  # of ctypes, by address


def _noted_data_ptr(x: Tensor) -> int:
    """Return the address, and note to what memory it belongs: calls are given numbers."""
    address, storage = _data_ptr(x), x.untyped_storage()
    _storages[address] = storage.data_ptr(), storage.nbytes()
    return address


def _noted_addressof(array: Any) -> int:
    address = _addressof(array)
    _arrays[address] = array
    return address


class _Memory:
    """Copies of what a call's pointers point to, from the first byte of the shared memory on."""

    def __init__(self, address: int, there: int):
        self.address, self.there = address, there
        self.end = 0
        self.copies: dict[int, tuple[int, int]] = {}  # offset and size, by the address here
        self.arrays: list[ctypes.Array] = []  # of addresses there

    def place(self, address: int, size: int) -> int:
        """Copy memory unless it is there already; return its address there."""
        if address not in self.copies:
            offset = -(-self.end // _LINE) * _LINE + address % _LINE  # as aligned as it was
            self.end = offset + size
            if self.end > _BYTES:
                raise MemoryError(f"a call takes {self.end} bytes, more than the {_BYTES} shared")
            ctypes.memmove(self.address + offset, address, size)
            self.copies[address] = offset, size
        return self.there + self.copies[address][0]

    def pointer(self, value: Any) -> int:
        """Return the address there of a tensor's address, of an array, or of a byref()."""
        if not value:
            return 0
        value = _arrays.get(value, value) if isinstance(value, int) else value
        if isinstance(value, int):
            storage, size = _storages[value]
            return self.place(storage, size) + value - storage
        value = getattr(value, "_obj", value)
        if getattr(value, "_type_", None) is ctypes.c_void_p:
            value = (ctypes.c_void_p * len(value))(*map(self.pointer, value))
            self.arrays.append(value)
        return self.place(_addressof(value), ctypes.sizeof(value))

    def copy_back(self) -> None:
        for address, (offset, size) in self.copies.items():
            ctypes.memmove(address, self.address + offset, size)


class _Function:
    """A function of the library there; declared as those of ctypes are."""

    argtypes: tuple = ()
    restype: Any = ctypes.c_int
    calls = 0  # of all functions

    def __init__(self, library: "Library", name: str):
        self.library, self.name = library, name

    def __call__(self, *args) -> int | None:
        _Function.calls += 1
        memory = _Memory(self.library.address, self.library.there)
        whole, real = [], [0.0]
        for value, kind in zip(args, self.argtypes, strict=True):
            if kind is ctypes.c_double:
                real = [value]
            else:
                is_pointer = kind is ctypes.c_void_p
                whole.append(memory.pointer(value) if is_pointer else kind(value).value)
        whole += [0] * (24 - len(whole))
        answer = self.library.ask(_CALL.pack(self.name.encode(), *whole, *real))
        memory.copy_back()
        return self.restype(answer).value if self.restype else None


class Library:
    """What ctypes.CDLL is for a library of this processor."""

    def __init__(self, command: str):
        with tempfile.TemporaryFile() as file:
            file.truncate(_BYTES)
            self.shared = mmap.mmap(file.fileno(), _BYTES)
            self.runner = subprocess.Popen(
                [*shlex.split(command), str(file.fileno()), str(_BYTES)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[file.fileno()],
            )  # fmt: skip
            self.there = self.ask(b"")
        self.address = _addressof(ctypes.c_char.from_buffer(self.shared))
        # Threads belong to the processor: there, calls are made on one.
        self.ds_set_parallel_for = lambda pool: None

    def __getattr__(self, name: str) -> _Function:
        function = _Function(self, name)
        setattr(self, name, function)
        return function

    def ask(self, call: bytes) -> int:
        assert self.runner.stdin and self.runner.stdout
        self.runner.stdin.write(call)
        self.runner.stdin.flush()
        answer = self.runner.stdout.read(_ANSWER.size)
        if len(answer) < _ANSWER.size:
            raise RuntimeError(f"the other processor ended with {self.runner.wait()}")
        return _ANSWER.unpack(answer)[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of other backends, which never call the library."""
    params = [getattr(getattr(item, "callspec", None), "params", {}) for item in items]
    others = [p.get("backend", "cpu") != "cpu" for p in params]
    config.hook.pytest_deselected(items=[*compress(items, others)])
    items[:] = [item for item, other in zip(items, others, strict=True) if not other]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where no call was made there, as with a library that was loaded before this plugin."""
    session.exitstatus = session.exitstatus or int(_Function.calls == 0)


Tensor.data_ptr, ctypes.addressof = _noted_data_ptr, _noted_addressof
_native._load = lambda name: Library(os.environ["DS_FOREIGN"])
_native.cpu_library.cache_clear()  # ds.ops has asked that of this processor for its level
