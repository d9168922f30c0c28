"""How a network is run: in which precision, and eagerly, compiled, in the engine or as a graph."""

import copy
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ds.diffusion.noise import Draws, noise
from ds.engine import RUNS, Engine, Loop, Recurrence, Rewrites, Target, can_run
from ds.models.model import Model, device_of, dtype_name, dtype_of
from ds.system.ambient import tf32, without_ambient
from ds.system.config import check
from ds.system.cost import seconds_each

Precision = Literal["float32", "tf32", "bfloat16", "fp8"]
Mode = Literal["eager", "compile", "engine", "cuda_graph"]
ENGINE = ("engine", "cuda_graph")  # the modes that run ds.engine
_LOW = {"bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
log = logging.getLogger("ds")


@dataclass(frozen=True)
class Execution:
    """How a network is run; every field may change the last bits of an image.

    `precision` is that of convolutions and matrix products. States are float32.

        float32       the network's own dtype
        tf32          TF32 products on a GPU
        bfloat16      a bfloat16 copy of the network
        fp8           an experiment of the engine: set DS_EXPERIMENTAL=fp8 in the environment

    `mode` says what runs the network.

        eager         PyTorch, operation by operation
        compile       torch.compile; on a CPU with the weights frozen
        engine        ds.engine, for U-Nets: weights packed for one batch size
        cuda_graph    ds.engine with a step of the solver captured once and replayed, on GPUs

    With `tune`, cuDNN times its algorithms for the engine and takes the fastest; another process
    may choose others. Without `winograd`, the engine's 3x3 convolutions on a CPU are direct.
    """

    precision: Precision = "float32"
    mode: Mode = "eager"
    tune: bool = False
    winograd: bool = True

    def __post_init__(self):
        check(self, "Execution: ")

    @classmethod
    def default(
        cls,
        model: Model,
        *,
        precision: Precision | None = None,
        mode: Mode | None = None,
        latency: bool = False,
    ) -> "Execution":
        """Return the best execution of a model on its device, with the precision or mode given.

        The precision is bfloat16 for float32 U-Nets on GPUs, else float32. The mode is cuda_graph
        for U-Nets on GPUs (engine if a step cannot be captured, with a warning), engine for float32
        U-Nets on CPUs, else eager. With `latency`, a CPU measures how fast the engine, with
        Winograd's convolutions and without, and the network itself make a single image.
        """
        cuda, unet = device_of(model.net).type == "cuda", can_run(model.net)
        is_float32 = dtype_of(model.net) == torch.float32
        if precision is None:
            precision = "bfloat16" if unet and cuda and is_float32 else "float32"
        if mode is not None:
            return cls(precision, mode)
        if not unet or not (cuda or is_float32 or precision == "fp8"):
            return cls(precision, "eager")
        if cuda:
            return cls(precision, "cuda_graph" if _is_recurrence(model) else "engine")
        engine = cls(precision, "engine")
        if not latency:
            return engine
        ways = [engine, replace(engine, winograd=False)]
        if precision == "float32":
            ways.append(cls(precision, "eager"))
        return min(ways, key=lambda way: way.prepare(model, 1).seconds_each())

    def precision_of(self, model: Model) -> str:
        """Return what the products of a model are computed in: for "float32", its own dtype."""
        return dtype_name(model.net) if self.precision == "float32" else self.precision

    def check(self, model: Model, device: torch.device) -> None:
        """Raise ValueError if a model cannot be run in this way on a device."""
        if self.precision == "tf32" and device.type != "cuda":
            raise ValueError(f"precision tf32 is for CUDA GPUs, not for {device.type}")
        if self.precision == "fp8" and not fp8_is_open():
            raise ValueError(
                "precision fp8 is an experiment: it moves endpoints of the digits 4 times as far "
                "as bfloat16, and its speed was not measured; set DS_EXPERIMENTAL=fp8 to use it"
            )
        unet = can_run(model.net)
        if self.precision == "fp8" and not (unet and self.mode in ENGINE):
            raise ValueError("precision fp8 is for U-Nets in the mode engine or cuda_graph")
        if self.mode in ENGINE and not unet:
            raise ValueError(
                f"mode {self.mode} is for {RUNS}, not for this {type(model.net).__name__}; "
                f"use eager or compile"
            )
        if self.mode == "cuda_graph" and device.type != "cuda":
            raise ValueError(f"mode cuda_graph is for CUDA GPUs, not for {device.type}; use engine")

    def prepare(self, model: Model, batch_size: int) -> "Runner":
        """Return the model made ready: weights packed, compiled and captured where asked.

        Raises RuntimeError where the engine, the compiler or a graph fails.
        """
        return Runner(model, self, batch_size)


class Runner:
    """A model made ready to be run in one way: runner.sample(noise) -> samples, finite.

    `model` has the network that is run. `cold_start` holds the seconds that planning (weights
    packed or copied), compiling and capturing took. `dtype` names the dtype of the network's
    products.
    """

    def __init__(self, model: Model, execution: Execution, batch_size: int):
        self.execution, self.batch_size = execution, batch_size
        self.cold_start = {"plan": 0.0, "compile": 0.0, "capture": 0.0}
        self.device, self.precision = device_of(model.net), execution.precision_of(model)
        self._loop: Loop | None = None
        with self._timed("plan"):
            self.model = _planned(model, execution, batch_size)
        if execution.mode == "compile":
            with self._timed("compile"):
                self.model = self.model.compile()
                self.model.call(self._zeros())
        if execution.mode == "cuda_graph":
            engine = self.model.net
            assert isinstance(engine, Engine)
            with self._timed("capture"):
                self._loop = Loop(engine, Recurrence.of(model))
        self._watched = _Watched(self.model.net)
        self._watching = self.model.using(self._watched)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        with self._products():
            yield
        self.cold_start[part] = time.perf_counter() - begin

    def _products(self) -> Any:
        return tf32(self.execution.precision == "tf32")

    def _zeros(self) -> Tensor:
        shape = (self.batch_size, *self.model.shape)
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    @without_ambient()
    def sample(
        self, z: Tensor, cond: dict[str, Tensor] | None = None, draws: Draws | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the samples of noise z [N, *shape], floats on the device, and a flag.

        The flag, a bool on the device, says whether the samples are finite, and whether all that
        the network returned on the way was: a clip would hide an infinity. `cond` holds what the
        model takes. A stochastic model takes its noise from `draws`.
        """
        with self._products():
            if self._loop is not None:  # what is captured is linear, and hides nothing
                x = torch.cat([*_looped(self._loop, z, cond or {})])
                return x, _sum(x).isfinite()
            with self._watched.summing() as total:
                x = self._watching.sample(z, cond=cond, draws=draws)
            return x, (total() + _sum(x)).isfinite()

    @without_ambient()
    def seconds_each(self) -> float:
        """Measure the seconds that an image takes, by a few network calls."""
        with self._products():
            if (loop := self._loop) is not None:
                call = seconds_each(lambda _: loop.start().sum().item(), 1) / self.batch_size
            else:
                z = noise(0, range(self.batch_size), self.model.shape, device=self.device)
                # .item() waits for the device.
                call = seconds_each(lambda n: self.model.call(z[:n]).sum().item(), self.batch_size)
        return call * self.model.nfe


class _Watched(nn.Module):
    """A network, and the sum of what it returned while that was asked for."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self._here = threading.local()  # a sampler may serve several threads

    def __getattr__(self, name: str) -> Any:
        """Return what a method of the caller's looks for in its network."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)

    @contextmanager
    def summing(self) -> Iterator[Callable[[], Tensor | float]]:
        """Yield what returns the sum over the calls since."""
        self._here.total = 0.0
        yield lambda: self._here.total

    def forward(self, *args: Any, **cond: Any) -> Tensor:
        out = self.net(*args, **cond)
        self._here.total = self._here.total + _sum(out)
        return out


def _sum(x: Tensor) -> Tensor:
    """Return the sum of x in float32 or wider: it is finite only if every element is."""
    return x.sum(dtype=torch.promote_types(x.dtype, torch.float32))


def _looped(loop: Loop, z: Tensor, cond: dict[str, Tensor]) -> Iterator[Tensor]:
    """Yield the samples of noise [N, *shape] in parts, each no larger than the loop's batch."""
    for start in range(0, len(z), loop.images):
        part = slice(start, start + loop.images)
        told = {name: _filled(value[part], loop.images) for name, value in cond.items()}
        yield loop(_filled(z[part], loop.images), **told)[: len(z[part])].clone()


def _filled(x: Tensor, rows: int) -> Tensor:
    """Return x with zeros below it, up to so many rows."""
    missing = rows - len(x)
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def _planned(model: Model, execution: Execution, batch_size: int) -> Model:
    """Return the model with an engine, or with a copy of its network in the dtype of its products.

    A network that runs as it is stays itself.
    """
    low = _LOW.get(execution.precision)
    if execution.mode not in ENGINE:
        return model.using(copy.deepcopy(model.net).to(low)) if low else model
    options: dict[str, Any] = {"dtype": low or dtype_of(model.net), "tune": execution.tune}
    if not execution.winograd:
        target = Target(device_of(model.net), options["dtype"], batch_size)
        options["rewrites"] = replace(Rewrites.good_for(target), winograd=False)
    return model.engine(batch_size, **options)


def _is_recurrence(model: Model) -> bool:
    """Return whether a step of the model can be captured, with a warning if it cannot."""
    try:
        Recurrence.of(model)
    except ValueError as error:
        log.warning("Sampler: steps are launched one by one, which is slower: %s", error)
        return False
    return True


def fp8_is_open() -> bool:
    """Return whether the environment allows the experimental precision fp8."""
    return os.environ.get("DS_EXPERIMENTAL") == "fp8"
