"""An op: a schema, and a table of the backends that can compute it."""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ds.ops._takes import PLAIN, make_check

Kernel = Callable[..., Tensor | tuple[Tensor, ...] | None]
DEVICES = ("cpu", "cuda")

_library = torch.library.Library("ds", "DEF")
_ops: list["Op"] = []
_forced: str | None = os.environ.get("DS_BACKEND") or None
# What goes to an op as it is: all else, such as a number of NumPy's, PyTorch converts.
_USUAL = PLAIN | {int, float, bool, type(None), list, torch.dtype}


class Unsupported(Exception):
    """Raised by a kernel, before any work, for arguments it does not take; the text says which."""


class Row(NamedTuple):
    """One backend of one op on one kind of device."""

    op: str
    device: str
    backend: str
    status: str  # "chosen", "ready" or "missing"
    reason: str  # why it is missing, else ""


class Op:
    """`torch.ops.ds.<name>`: define it by its schema and reference, then add backends, best first.

    `takes` says which arguments fit (ds/ops/_takes.py), and that is checked before any backend is
    called, from wherever. The reference is plain PyTorch, runs everywhere and comes last. With
    `fake` the op is opaque to torch.compile and autograd, and `fake` gives the outputs' metadata;
    without it they see through the op to the PyTorch functions that its backends call.
    """

    def __init__(self, schema: str, takes: str, reference: Kernel, fake: Kernel | None = None):
        self.name = schema.partition("(")[0]
        self._loaders: dict[tuple[str, str], Callable[[], Kernel]] = {}
        self._reference, self._opaque = reference, fake is not None
        self._chains: dict[tuple[str, str | None], list[tuple[str, Kernel]]] = {}
        self._function: type[torch.autograd.Function] | None = None
        _library.define(schema)
        key = "CompositeExplicitAutograd" if fake else "CompositeImplicitAutograd"
        _library.impl(self.name, self._run, key)
        self._dispatched = getattr(torch.ops.ds, self.name)
        self.schema, self.takes = self._dispatched.default._schema, takes
        self._defaults = [argument.default_value for argument in self.schema.arguments]
        self.check = make_check(self.schema, takes, fake=False)
        if fake:
            check = make_check(self.schema, takes, fake=True)

            def checked(*args):
                check(*args)
                return fake(*args)

            torch.library.register_fake(f"ds::{self.name}", checked, lib=_library)
        _ops.append(self)

    def __call__(self, *args):
        """Call the op, past PyTorch's dispatcher where nobody but autograd takes notice.

        The dispatcher takes longer than the launch (docs/notes/0003), and does nothing then.
        """
        if torch.compiler.is_compiling() or _watched(args):
            return self._dispatched(*args)
        if not torch.is_grad_enabled():
            return self._run(*args)
        if self._function is None:
            return self._dispatched(*args)
        return self._function.apply(*args, *self._defaults[len(args) :])

    def backend(self, name: str, *devices: str) -> Callable[[Callable[[], Kernel]], None]:
        """Add a backend by its loader, which returns the kernel or raises ImportError."""

        def add(loader: Callable[[], Kernel]) -> None:
            self._loaders.update({(device, name): loader for device in devices})

        return add

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """Give the op its gradient, as torch.library.register_autograd does."""
        torch.library.register_autograd(
            f"ds::{self.name}", backward, setup_context=setup_context, lib=_library
        )

        def forward(ctx, *args):
            outputs = self._run(*args)
            setup_context(ctx, args, outputs)
            return outputs

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self.name, (torch.autograd.Function,), methods)

    def backends(self) -> set[str]:
        """Return the names of the backends on any device."""
        return {"reference", *(name for _, name in self._loaders)}

    def rows(self, device: str) -> list[Row]:
        """Return the table of this op on a kind of device, in the order of preference."""
        missing = self._missing(device)
        try:
            chosen = self._chain(device)[0][0]
        except RuntimeError:
            chosen = None
        rows = []
        for name in [*(name for kind, name in self._loaders if kind == device), "reference"]:
            ready = "missing" if name in missing else "ready"
            status = "chosen" if name == chosen else ready
            rows.append(Row(self.name, device, name, status, missing.get(name, "")))
        return rows

    def _run(self, *args):
        self.check(*args)
        device = args[0].device.type
        if self._opaque and device in DEVICES and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # dtypes are those that it is given
                return self._compute(device, args)
        return self._compute(device, args)

    def _compute(self, device: str, args: tuple):
        reason = ""
        for _, kernel in self._chains.get((device, _forced)) or self._chain(device):
            try:
                return kernel(*args)
            except Unsupported as error:
                reason = str(error)
        raise RuntimeError(f"{self.name}: backend {_forced!r} was asked for, but {reason}")

    def _chain(self, device: str) -> list[tuple[str, Kernel]]:
        """Load the kernels to try in turn: the forced one alone, or by default all that load."""
        if _forced is not None:
            _check_backend(_forced)
        if _forced in self.backends():
            chain = [(_forced, self._load(device, _forced))]
        else:
            missing = self._missing(device)
            names = [name for kind, name in self._loaders if kind == device and name not in missing]
            chain = [(name, self._load(device, name)) for name in [*names, "reference"]]
        self._chains[device, _forced] = chain
        return chain

    def _load(self, device: str, name: str) -> Kernel:
        if name == "reference":
            return self._reference
        wanted = f"{self.name}: backend {name!r} was asked for on {device}, but "
        if (device, name) not in self._loaders:
            raise RuntimeError(wanted + "it does not run on that kind of device")
        try:
            return self._loaders[device, name]()
        except ImportError as error:
            raise RuntimeError(wanted + str(error)) from error

    def _missing(self, device: str) -> dict[str, str]:
        """Return the backends that do not load on a kind of device, with the reasons."""
        missing = {}
        for (kind, name), loader in self._loaders.items():
            if kind != device:
                continue
            try:
                loader()
            except ImportError as error:
                missing[name] = str(error)
        return missing


def _watched(args: tuple) -> bool:
    """Say whether a mode, a transform, a tracer or a kind of argument wants to see calls of ops."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch._C._functorch.peek_interpreter_stack()
        or not _USUAL.issuperset(map(type, args))
    )


def same_order(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors of one shape lie in memory in one order.

    The stride of a dimension of size 1, such as that of a single image, says nothing.
    """
    if a.stride() == b.stride():
        return True
    sizes = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(of_a == of_b for size, of_a, of_b in sizes if size > 1)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend, in place of DS_BACKEND, for every op that has one of this name.

    An op without such a backend on any device keeps its default: "cpu" forces the C++ kernels and
    leaves the rest alone. Process-wide, because autograd runs backward in threads of its own.

    Raises:
        ValueError: no op has a backend of this name.
        RuntimeError: from the op's call; the backend is missing or does not take the arguments.
    """
    global _forced
    _check_backend(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def table() -> list[Row]:
    """Return every backend of every op for each kind of device, best first within an op.

    A forced backend that is missing leaves its op without a row marked "chosen".
    """
    return [row for op in _ops for device in DEVICES for row in op.rows(device)]


def triton_kernels(op: str) -> ModuleType:
    """Import kernels/<op>.py, or raise ImportError with the reason."""
    try:
        return importlib.import_module(f"ds.ops.kernels.{op}")
    except ImportError as error:
        raise ImportError(f"Triton does not load: {error} (pip install triton)") from error


def _check_backend(name: str) -> None:
    known = set().union(*(op.backends() for op in _ops))
    if name not in known:
        raise ValueError(f"backend must be one of {', '.join(sorted(known))}, not {name!r}")
