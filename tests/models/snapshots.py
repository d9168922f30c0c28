"""Write pickles as EDM's code does, from what ours reads of them, and pickles that would act."""

import pickle
import sys
from collections.abc import Callable
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

from torch import nn

from ds.models.convert.pickles import Stub

SOURCE = "raise RuntimeError('the source of a pickle was run')"


def _reconstruct_persistent_obj(meta):
    raise AssertionError(meta)


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class _Persistent:
    """An object of EDM's code, as its pickler writes it."""

    def __init__(self, stub: Stub):
        self.meta = {
            "type": "class", "version": 6, "module_src": SOURCE, "class_name": stub.name,
            "state": _written(stub.state),
        }  # fmt: skip

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


class _Container:
    def __init__(self, stub: Stub):
        self.kind, self.state = getattr(nn, stub.name), _written(stub.state)

    def __reduce__(self):
        return self.kind, (), self.state


class Call:
    """What calls a function when it is unpickled."""

    def __init__(self, f: Callable, *args: Any):
        self.f, self.args = f, args

    def __reduce__(self):
        return self.f, self.args


def _written(value: Any) -> Any:
    if isinstance(value, Stub):
        return (_Container if hasattr(nn, value.name) else _Persistent)(value)
    if type(value) is dict:
        return {key: _written(entry) for key, entry in value.items()}
    return value


@contextmanager
def _modules():
    """Let the pickler find the module whose function it names."""
    module = ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    names = {"torch_utils": ModuleType("torch_utils"), "torch_utils.persistence": module}
    with mock.patch.dict(sys.modules, names):
        yield


def written(value: Any, protocol: int = 4) -> bytes:
    """Return the pickle of plain values, tensors, stubs and calls."""
    with _modules():
        return pickle.dumps(_written(value), protocol)
