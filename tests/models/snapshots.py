"""Write pickles as EDM's code does, from what ours reads of them, and pickles that would act."""

import pickle
import sys
from collections.abc import Callable
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

from torch import Tensor, nn

from ds.models.convert.pickles import Stub

SOURCE = "raise RuntimeError('the source of a pickle was run')"


def _reconstruct_persistent_obj(meta):
    raise AssertionError(meta)


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class _Persistent:
    """An object of EDM's code, as its pickler writes it."""

    def __init__(self, name: str, state: Any):
        self.meta = {
            "type": "class", "version": 6, "module_src": SOURCE, "class_name": name, "state": state,
        }  # fmt: skip

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


class _Container:
    def __init__(self, name: str, state: Any):
        self.kind, self.state = getattr(nn, name), state

    def __reduce__(self):
        return self.kind, (), self.state


class Call:
    """What calls a function when it is unpickled."""

    def __init__(self, f: Callable, *args: Any):
        self.f, self.args = f, args

    def __reduce__(self):
        return self.f, self.args


def _written(value: Any, done: dict[int, Any]) -> Any:
    """Return a value with each stub replaced, once, by what pickles as EDM's objects do."""
    if isinstance(value, Stub):
        if id(value) not in done:
            kind = _Container if hasattr(nn, value.name) else _Persistent
            done[id(value)] = kind(value.name, _written(value.state, done))
        return done[id(value)]
    if type(value) is dict:
        return {key: _written(entry, done) for key, entry in value.items()}
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
        return pickle.dumps(_written(value, {}), protocol)


def snapshot(about: dict[str, Any], weights: dict[str, Tensor]) -> Stub:
    """Return a network in its preconditioner, as EDM's code makes it, of settings and weights."""
    inner = Stub(about["network"], {"_init_args": (), "_init_kwargs": dict(about["settings"])})
    for key, w in weights.items():
        module, *_, last = inner, *key.split(".")
        for part in key.split(".")[:-1]:
            module = _parts(module)["_modules"].setdefault(part, Stub("Part"))
        _parts(module)["_buffers" if last == "freqs" else "_parameters"][last] = w
    outer = Stub(about["preconditioner"], dict(about["state"]))
    _parts(outer)["_modules"]["model"] = inner
    for module in _all(inner):
        _parts(module)
    return outer


def _parts(module: Stub) -> dict[str, Any]:
    for name in ("_parameters", "_buffers", "_modules"):
        module.state.setdefault(name, {})
    return module.state


def _all(module: Stub) -> list[Stub]:
    return [module, *(m for part in _parts(module)["_modules"].values() for m in _all(part))]
