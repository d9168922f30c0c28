"""Methods, one file each: ways to make a network that samples in few calls.

A file of this folder, or of a folder in it, that defines a final subclass of AbstractMethod is a
method, and needs no mention elsewhere. Its proof is in the file of the same name in proofs/.
"""

import importlib
import inspect
import itertools
import pkgutil
from types import ModuleType
from typing import Any, TypeGuard

from ds.methods.base import AbstractMethod, Progress

__all__ = ["AbstractMethod", "Progress"]


def is_method(value: Any) -> TypeGuard[type[AbstractMethod]]:
    """Return whether a value is a final method."""
    is_class = issubclass(type(value), type)  # isinstance takes list[int] for one in Python 3.10
    return is_class and issubclass(value, AbstractMethod) and not inspect.isabstract(value)


def defined_in(module: ModuleType) -> list[type[AbstractMethod]]:
    """Return the final methods that a module defines itself."""
    values = vars(module).values()
    return [cls for cls in values if is_method(cls) and cls.__module__ == module.__name__]


def files() -> list[ModuleType]:
    """Return the modules of this folder and of the folders in it."""
    files = pkgutil.walk_packages(__path__, f"{__name__}.")
    return [importlib.import_module(file.name) for file in files]


for _method in itertools.chain.from_iterable(map(defined_in, files())):
    globals()[_method.__name__] = _method
    __all__ += [_method.__name__]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"ds.methods has no {name}; it has {', '.join(__all__)}")
