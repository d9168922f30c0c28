"""An op: a schema, and a table of the backends that can compute it."""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ds.ops.dispatch import transforms
from ds.ops.dispatch.takes import PLAIN, make_check

Kernel = Callable[..., Tensor | tuple[Tensor, ...] | None]
DEVICES = ("cpu", "cuda")

_library = torch.library.Library("ds", "DEF")
_ops: list["Op"] = []
_forced: str | None = os.environ.get("DS_BACKEND") or None
_IN_PLACE = "the op writes its arguments"
# Arguments of these types go to an op as they are. PyTorch converts others, such as NumPy numbers.
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

    `takes` says which arguments fit (takes.py here). That is checked before any backend runs,
    whoever calls the op. The reference is plain PyTorch, runs everywhere and comes last.

    With `fake`, which returns the outputs' metadata, the op is opaque to torch.compile and
    autograd. Without it they see through the op to the PyTorch functions that its backends call.

    A derivative that the op has no rule for goes through the reference (docs/notes/0024). An op
    that writes its arguments has none and refuses, as does one with `no_derivative`, the reason.
    """

    def __init__(
        self,
        schema: str,
        takes: str,
        reference: Kernel,
        fake: Kernel | None = None,
        *,
        no_derivative: str = "",
    ):
        self.name = schema.partition("(")[0]
        self._loaders: dict[tuple[str, str], Callable[[], Kernel]] = {}
        self._reference, self._opaque = reference, fake is not None
        self._chains: dict[tuple[str, str | None], list[tuple[str, Kernel]]] = {}
        self._function: type[torch.autograd.Function] | None = None
        self._traced: type[torch.autograd.Function] | None = None
        self._tangents: Kernel | None = None
        _library.define(schema)
        self._dispatched = getattr(torch.ops.ds, self.name)
        self.schema, self.takes = self._dispatched.default._schema, takes
        self.no_derivative = no_derivative or _IN_PLACE * self.schema.is_mutable
        self._defaults = [argument.default_value for argument in self.schema.arguments]
        self._check = make_check(self.schema, takes, fake=False)
        self._check_traced = make_check(self.schema, takes, fake=True)
        if fake is None:
            _library.impl(self.name, self.compute, "CompositeImplicitAutograd")
            self._function = transforms.differentiable_twice(self.name, self.compute, reference)
        else:
            self._register(fake)
        _ops.append(self)

    def _register(self, fake: Kernel) -> None:
        """Register what the dispatcher calls of an opaque op."""

        def checked(*args):
            self._check_traced(*args)
            return fake(*args)

        torch.library.register_fake(f"ds::{self.name}", checked, lib=_library)
        _library.impl(self.name, self.compute, "CompositeExplicitAutograd")
        _library.impl(self.name, transforms.untraced(self._differentiate), "Autograd")
        _library.impl(self.name, transforms.untraced(self._batch), "FuncTorchBatched")

    def __call__(self, *args):
        """Call the op, past PyTorch's dispatcher if nothing but autograd needs to see the call.

        The dispatcher takes longer than the launch (docs/notes/0003).
        """
        if torch.compiler.is_compiling():
            return self._dispatched(*args)
        if _watched(args):
            if transforms.active() and transforms.tangents_are_lost():
                raise ValueError(
                    f"{self.name}: this PyTorch makes every tangent 0 in inference mode; use "
                    f"torch.no_grad() instead"
                )
            return self._dispatched(*args)
        if not torch.is_grad_enabled():
            return self.compute(*args)
        if self._function is None:
            recorded = any(x.requires_grad for x in transforms.tensors(args))
            return (self._dispatched if recorded else self.compute)(*args)
        return self._function.apply(*args, *self._defaults[len(args) :])

    def backend(self, name: str, *devices: str) -> Callable[[Callable[[], Kernel]], None]:
        """Add a backend by its loader, which returns the kernel or raises ImportError."""

        def add(loader: Callable[[], Kernel]) -> None:
            self._loaders.update({(device, name): loader for device in devices})

        return add

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """Give the op its gradient, as torch.library.register_autograd does.

        `backward` is called with gradients enabled if it is to be differentiated in turn.
        """

        def function(compute: Kernel) -> type[torch.autograd.Function]:
            def forward(ctx, *args):
                outputs = compute(*args)
                setup_context(ctx, args, outputs)
                return outputs

            methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
            return type(self.name, (torch.autograd.Function,), methods)

        self._function, self._traced = function(self.compute), function(self._below_autograd)

    def register_tangents(self, tangents: Callable) -> None:
        """Give the op a rule for forward mode: tangents(primals, tangents, results) of the results.

        Primals and tangents are in the order of the schema; what carries no tangent has None. The
        rule is made of differentiable functions, so that gradients flow through its result.
        """
        self._tangents = tangents

    def _differentiate(self, *args):
        """Compute the op for one level of autograd, as the dispatcher's kernel for that.

        A level is plain autograd, dual numbers, or one transform of torch.func. What is no concern
        of this one is passed on to the level below.
        """
        args = (*args, *self._defaults[len(args) :])
        tensors = transforms.tensors(args)
        dual = transforms.any_dual(tensors)
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if not (dual or recorded):
            return self._below_autograd(*args)
        if self.no_derivative:
            self._refuse_derivatives(args)
        if dual and self._tangents is not None:
            return self._apply_tangents(args)
        if dual or self._traced is None or transforms.in_functorch():
            return self._call_reference(*args)
        return self._traced.apply(*args)

    def _apply_tangents(self, args: tuple):
        """Compute the results without tangents, by any backend, and give them theirs."""
        primals, tangents = zip(*map(transforms.unpack, args), strict=True)
        results = self._differentiate(*primals)
        found = self._tangents(primals, tangents, results)
        if isinstance(results, Tensor):
            return transforms.pack(results, found)
        return tuple(map(transforms.pack, results, found))

    def _below_autograd(self, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return self._dispatched(*args)

    def _refuse_derivatives(self, args: tuple) -> None:
        """Raise ValueError if an argument needs a derivative."""
        for argument, value in zip(self.schema.arguments, args, strict=False):
            if any(transforms.needs_derivative(x) for x in transforms.tensors((value,))):
                raise ValueError(
                    f"{self.name}: {argument.name} needs a derivative, and there is none because "
                    f"{self.no_derivative}; detach it, or call the op under torch.no_grad()"
                )

    def check(self, *args) -> None:
        """Raise for arguments that the op does not take, in place of a call."""
        if not transforms.active():
            self._check(*args)
            return
        self._check_traced(*args)
        if self.no_derivative:
            self._refuse_derivatives(args)
        if self.schema.is_mutable and transforms.any_wrapped(args):
            self._batch(*args)

    def _batch(self, *args):
        if self.schema.is_mutable:
            raise ValueError(
                f"{self.name}: does not run under torch.func transforms, because {_IN_PLACE}; "
                "call it outside of them"
            )
        return self._call_reference(*args, *self._defaults[len(args) :])

    def _call_reference(self, *args):
        """Call the reference with tensors that may have no memory, for PyTorch to differentiate."""
        plain = PLAIN.issuperset(map(type, transforms.tensors(args)))
        (self._check if plain and not transforms.active() else self._check_traced)(*args)
        device = args[0].device.type
        if self._opaque and device in DEVICES:
            with torch.autocast(device, enabled=False):
                return self._reference(*args)
        return self._reference(*args)

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

    def compute(self, *args):
        """Check the arguments and call a backend, or the reference under a transform."""
        if not self._opaque and transforms.active():
            return self._call_reference(*args)
        self._check(*args)
        return self._compute_checked(args)

    def call_checked(self, *args):
        """Call the op, with no gradient to record, on arguments that `check` let pass just now."""
        return self._dispatched(*args) if _watched(args) else self._compute_checked(args)

    def _compute_checked(self, args: tuple):
        device = args[0].device.type
        if self._opaque and device in DEVICES and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # the op computes in the dtypes it is given
                return self._call_backend(device, args)
        return self._call_backend(device, args)

    def _call_backend(self, device: str, args: tuple):
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
    """Return whether a mode, a transform, a tracer or a kind of argument must see calls of ops."""
    return bool(
        forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch._C._functorch.peek_interpreter_stack()
        or not _USUAL.issuperset(map(type, args))
    )


def same_order(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one shape lie in memory in the same order.

    The stride of a dimension of size 1 does not matter.
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
