"""Draw samples from a model in batches."""

import copy
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ds.diffusion.noise import noise
from ds.engine import Engine, Loop, Place, Plan, Recurrence
from ds.models.images import Rounding, to_uint8
from ds.models.model import Model, device_of, dtype_of
from ds.nets import UNet
from ds.system.ambient import without_ambient
from ds.system.config import Count, Seed, require
from ds.system.cost import check_memory, seconds_each

# Of a network's products; states are float32. fp8 is an experiment, behind a gate.
Precision = Literal["float32", "tf32", "bfloat16", "fp8"]
_LOW = {"bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
log = logging.getLogger("ds")


def uses_engine(net: nn.Module, precision: Precision = "float32") -> bool:
    """Say whether a Sampler runs a network through ds.engine unless it is told otherwise.

    On CUDA it does every U-Net, on CPUs those in float32, where the images are the same but for the
    rounding of float32. Nothing else computes in fp8.
    """
    if not isinstance(net, UNet):
        return False
    narrow = device_of(net).type == "cpu" and dtype_of(net) != torch.float32
    return precision == "fp8" or not narrow


def count(indices: Sequence[int]) -> int:
    """Return how many indices there are; a range may have more than len() can say."""
    if isinstance(indices, range):
        return max(0, -((indices.start - indices.stop) // indices.step))
    return len(indices)


def least_memory(model: Model) -> int:
    """Return bytes that sampling takes for each image at least, whatever runs the network.

    A state, its noise prediction and its x0 are float32. The last block of a U-Net reads two maps
    of its first width, of 2 bytes a number or more, and writes one.
    """
    state = 3 * 4 * math.prod(model.shape)
    if not isinstance(model.net, UNet):
        return state
    c = model.net.config
    return state + 3 * 2 * c.channels * c.channel_mult[0] * c.image_size**2


def usual_batch(model: Model) -> int:
    """Return how many images a Sampler takes at a time unless it is told otherwise.

    256; of a U-Net on CUDA about 512, as many as keep every multiprocessor busy in every layer and
    fit an eighth of the memory.
    """
    device = device_of(model.net)
    if device.type != "cuda" or not isinstance(model.net, UNet):
        return 256
    gpu, place = torch.cuda.get_device_properties(device), Place(device, torch.bfloat16, 1)
    plan = Plan.of(model.net, place)
    fit = gpu.total_memory / 8 / (plan.peak() * place.dtype.itemsize)
    full = plan.full_batch(gpu.multi_processor_count)
    return full * max(1, round(min(512, fit) / full))


def usual_precision(net: nn.Module) -> Precision:
    """Return the precision that nobody asked for: bfloat16 for U-Nets on CUDA, else float32."""
    wide = isinstance(net, UNet) and dtype_of(net) == torch.float32
    return "bfloat16" if wide and device_of(net).type == "cuda" else "float32"


def uses_loop(model: Model, device: torch.device) -> bool:
    """Say whether a Sampler with an engine replays a captured step unless it is told otherwise.

    On CUDA it does, of every model whose samples are a ds.engine.Recurrence; others are announced.
    """
    if device.type != "cuda":
        return False
    try:
        Recurrence.of(model)
    except ValueError as error:
        log.warning("Sampler: steps are launched one by one, which is slower: %s", error)
        return False
    return True


class Sampler:
    """Draw from a teacher or a student in batches: sampler(seed, indices) -> uint8 images.

    `device` and `dtype` move the model's network, in place. `precision` is that of its products:
    "float32" as the weights are, "tf32" on CUDA, "bfloat16" in a copy of the network, "fp8" in an
    engine, which is an experiment and asks for DS_EXPERIMENTAL=fp8 in the environment; by default
    bfloat16 for U-Nets on CUDA, else float32. Then

        compile    compiles the network, on a CPU frozen with its weights as they are now
        engine     runs a U-Net through ds.engine, with weights as they are now and packed for this
                   batch size; by default where `uses_engine` says so
        loop       with an engine, replays one step for all steps, on CUDA a captured graph; by
                   default where `uses_loop` says so
        tune       with an engine on CUDA, lets cuDNN try its algorithms and take the fastest, which
                   another process may find to be another one: images then differ by rounding
        latency    takes one image at a time: on a CPU by the fastest of the network itself and two
                   engines, tried here

    `batch_size` is that of `usual_batch` by default. Where an engine or a loop that nobody asked
    for cannot be had, a warning says why, and the network itself is run, or its steps one by one.

    The noise of an image depends on (seed, index) alone, so any split of the indices gives the same
    images, up to the rounding of a convolution whose algorithm depends on the batch size.
    `cold_start` has the seconds it took to plan (pack weights), compile and capture. A Sampler is
    pickled as its model and its options, and plans anew where it is unpickled.

    What the CIFAR-10 network was measured to reach (benchmarks/results; docs/performance.md):

    .. table: sampler

    AMD EPYC, AVX512 with bfloat16, 1 thread:
        one call               16 at a time      13.7 images/s
        one call                4 at a time      14.5 images/s
        one call                1 at a time      10.5 images/s
        96 calls, float32       8 at a time     0.165 images/s
        96 calls, bfloat16      8 at a time     0.189 images/s
        96 calls, float32       1 at a time     0.102 images/s

    .. end

    Raises ValueError for a batch_size below 1 or beyond the memory, for compile and engine at once,
    for tf32 without CUDA, for fp8 without an engine or unless the gate is open, and for a loop
    without an engine or of a model that is no ds.engine.Recurrence.
    """

    @without_ambient()
    def __init__(
        self,
        model: Model,
        *,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        precision: Precision | None = None,
        compile: bool = False,
        engine: bool | None = None,
        loop: bool | None = None,
        tune: bool = False,
        latency: bool = False,
    ):
        require("Sampler", Count | None, batch_size=batch_size)
        if compile and (engine or latency):
            raise ValueError("Sampler: compile and engine are two ways to do one thing; choose one")
        model.net.to(device=device, dtype=dtype)
        self.device = device_of(model.net, device or "cpu")
        self.precision = precision or usual_precision(model.net)
        self.batch_size = 1 if latency else batch_size or usual_batch(model)
        self._again = partial(
            Sampler, model, batch_size=self.batch_size, precision=self.precision, compile=compile,
            engine=engine, loop=loop, tune=tune, latency=latency,
        )  # fmt: skip
        check_memory(
            f"Sampler: a batch_size of {self.batch_size}",
            self.batch_size * least_memory(model),
            self.device,
        )
        self.cold_start = {"plan": 0.0, "compile": 0.0, "capture": 0.0}
        usual = engine is None and not compile and uses_engine(model.net, self.precision)
        check_precision(self.precision, self.device, engine or usual)
        low = _LOW.get(self.precision)
        self.model, self._loop = model, None
        if engine or usual:
            with self._timed("plan"), _tried(engine or self.precision == "fp8"):
                self.model = self._packed(model, low or dtype_of(model.net), latency, tune)
        if self.model is model and low:
            with self._timed("plan"):
                self.model = model.using(copy.deepcopy(model.net).to(low))
        if compile:
            with self._timed("compile"):
                self.model = self.model.compile()
                z = torch.zeros(
                    self.batch_size, *model.shape, dtype=torch.float32, device=self.device
                )
                self.model.call(z)
        runs = isinstance(self.model.net, Engine)
        if loop and not runs:
            raise ValueError("Sampler: loop needs an engine, and so a U-Net")
        if loop or (loop is None and runs and uses_loop(model, self.device)):
            with self._timed("capture"), _tried(loop):
                self._loop = Loop(self.model.net, Recurrence.of(model))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the model and the options; plans, engines and graphs are made anew from them."""
        return self._again, ()

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        with _tf32(self.precision == "tf32"):
            yield
        self.cold_start[part] = time.perf_counter() - begin

    def _packed(self, model: Model, dtype: torch.dtype, latency: bool, tune: bool) -> Model:
        """Return the model with an engine for its network, or with what is quicker on one image."""
        packed = model.engine(self.batch_size, dtype=dtype, tune=tune)
        if not latency or self.device.type == "cuda":
            return packed
        direct = replace(packed.net.rewrites, winograd=False)
        ways = [packed, model.engine(1, dtype=dtype, rewrites=direct)]
        if dtype == dtype_of(model.net):
            ways.append(model)
        return min(ways, key=_latency)

    def __call__(
        self, seed: int = 0, indices: Sequence[int] = range(64), *, rounding: Rounding = "round"
    ) -> Tensor:
        """Return the images of `indices` as uint8 [N, H, W, C] on the CPU.

        Raises ValueError for a model whose samples are no images.
        """
        require("Sampler", Seed, seed=seed)
        self._check_images(count(indices))
        return self._images(self.batches(seed, indices), rounding)

    def draw(self, z: Tensor, *, rounding: Rounding = "round") -> Tensor:
        """Return the images of given noise [N, *shape], as a call does."""
        self._check_images(len(z))
        parts = (part.to(self.device) for part in z.split(self.batch_size))
        return self._images(map(self.sample, parts), rounding)

    def _check_images(self, number: int) -> None:
        if len(self.model.shape) != 3:
            raise ValueError(
                f"Sampler: samples of shape {list(self.model.shape)} are no images [C, H, W]; "
                f"use `batches`"
            )
        # All of them, and once more while they are put together.
        check_memory(f"Sampler: {number} images", 2 * number * math.prod(self.model.shape))

    def _images(self, batches: Iterable[Tensor], rounding: Rounding) -> Tensor:
        c, h, w = self.model.shape
        empty = torch.empty(0, h, w, c, dtype=torch.uint8, device="cpu")
        return torch.cat([empty, *(to_uint8(x, rounding).cpu() for x in batches)])

    def batches(self, seed: int, indices: Sequence[int]) -> Iterator[Tensor]:
        """Yield the samples of `indices` in order, floats [N, *shape] on the model's device."""
        for start in range(0, len(indices), self.batch_size):
            part = indices[start : start + self.batch_size]
            yield self.sample(noise(seed, part, self.model.shape, device=self.device))

    @without_ambient()
    def seconds_each(self) -> float:
        """Measure how long an image takes, by a few network calls."""
        if self._loop is not None:

            def step(_: int) -> None:
                self._loop.start().sum().item()  # waits for the device

            return seconds_each(step, 1) / self.batch_size * self.model.nfe
        z = noise(0, range(self.batch_size), self.model.shape, device=self.device)

        def work(n: int) -> None:
            with _tf32(self.precision == "tf32"):
                self.model.call(z[:n]).sum().item()

        return seconds_each(work, self.batch_size) * self.model.nfe

    @without_ambient()
    def sample(self, z: Tensor) -> Tensor:
        """Return the samples of noise z [N, *shape] on the device: floats, about [-1, 1]."""
        with _tf32(self.precision == "tf32"):
            if self._loop is None:
                return self.model.sample(z)
            return torch.cat([self._looped(part) for part in z.split(self._loop.images)])

    def _looped(self, z: Tensor) -> Tensor:
        missing = self._loop.images - len(z)
        filled = torch.cat([z, z.new_zeros(missing, *z.shape[1:])]) if missing else z
        return self._loop(filled)[: len(z)].clone()


@contextmanager
def _tried(asked: bool | None) -> Iterator[None]:
    """Do what may be left out unless it was asked for; a failure is told then."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if asked:
            raise
        reason = str(error).partition("\n")[0]
        log.warning("Sampler: goes on without the engine or its loop, which is slower: %s", reason)


def check_precision(precision: str, device: torch.device, engine: bool) -> None:
    """Raise ValueError for a precision that there is not, or not on this device and in this way."""
    if precision not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise ValueError(f"precision must be one of {known}, not {precision!r}")
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision tf32 is for CUDA GPUs, not for {device.type}")
    if precision == "fp8" and not fp8_is_open():
        raise ValueError(
            "precision fp8 is an experiment: endpoints of the digits move 4 times as far as in "
            "bfloat16, its speed was not measured; to use it all the same, set DS_EXPERIMENTAL=fp8"
        )
    if precision == "fp8" and not engine:
        raise ValueError("precision fp8 is for U-Nets in the engine: leave engine on, compile off")


def fp8_is_open() -> bool:
    """Say whether the environment asks for the experiment by its name."""
    return os.environ.get("DS_EXPERIMENTAL") == "fp8"


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in products and convolutions, which PyTorch keeps for the process."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = allowed
        yield
    finally:
        for place, was in zip(places, before, strict=True):
            place.allow_tf32 = was


def _latency(model: Model) -> float:
    """Return how long a network call for one image takes."""
    z = torch.zeros(1, *model.shape, dtype=torch.float32, device="cpu")
    return seconds_each(lambda _: model.call(z), 1)
