"""Methods, one file each: ways to make a network that samples in few calls.

A file of this folder that defines a final subclass of AbstractMethod is a method, and needs no
mention elsewhere.
"""

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

from ds.methods.base import AbstractMethod, Progress

__all__ = ["AbstractMethod", "Progress"]


def defined_in(module: ModuleType) -> list[type[AbstractMethod]]:
    """Return the final methods that a module defines itself."""
    return [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, AbstractMethod) and not inspect.isabstract(cls)
        if cls.__module__ == module.__name__
    ]


for _file in pkgutil.iter_modules(__path__):
    for _method in defined_in(importlib.import_module(f"{__name__}.{_file.name}")):
        globals()[_method.__name__] = _method
        __all__ += [_method.__name__]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"ds.methods has no {name}; it has {', '.join(__all__)}")
