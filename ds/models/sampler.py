"""Draw samples from a model in batches."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds.diffusion.conditions import Conditions, labels_of
from ds.diffusion.noise import Draws, as_bits, noise
from ds.engine import Plan, Target, can_run
from ds.models.execution import Execution, Runner
from ds.models.images import Rounding, to_uint8
from ds.models.model import Model, device_of
from ds.nets.blocks import AbstractUNet
from ds.system.ambient import without_ambient
from ds.system.config import Count, Seed, require
from ds.system.cost import check_memory

NARROW = ("float16", "fp8")  # precisions whose largest number is small
_PLAINER = {"cuda_graph": "engine", "engine": "eager"}
log = logging.getLogger("ds")
Labels = int | Sequence[int] | Tensor
# noise, conditions, randomness of the way, indices
_Work = tuple[Tensor, dict[str, Tensor], Draws | None, Sequence[int]]


class Sampler:
    """Draw from a teacher or a student in batches: sampler(seed, indices) -> uint8 images.

    `device` and `dtype` move the model's network in place. `execution` says how it is run, by
    default as `Execution.default` chooses; the attribute of that name says what is used, and
    `precision` what products are really computed in, a float16 network's in float16. If the
    default fails, a warning says why and a plainer mode is used; an execution that was asked for
    raises. `batch_size` is by default that of `default_batch_size`. `latency` is for one image at
    a time: the batch size is 1, and the default execution is the fastest for it.

    An image's noise depends on (seed, index) alone. So any split of the indices gives the same
    images, up to the rounding of convolutions whose algorithm depends on the batch size. Its class
    and its guidance scale, if the model takes them, are drawn from `conditions` in the same way, by
    default from all classes; labels may be given instead. A Sampler is pickled as its model and
    options, and prepared anew where it is unpickled.

    Measured with the CIFAR-10 network (benchmarks/results; docs/performance.md):

    <!-- table: sampler -->

        AMD EPYC, AVX512 with bfloat16, 1 thread:
            one call               16 at a time      18.8 images/s
            one call                4 at a time      16.7 images/s
            one call                1 at a time      13.4 images/s
            96 calls, float32       8 at a time     0.205 images/s
            96 calls, bfloat16      8 at a time      0.36 images/s
            96 calls, float32       1 at a time     0.138 images/s

    <!-- end -->

    Raises ValueError for a batch_size below 1 or beyond the memory, for an execution that the model
    or its device does not support, and for conditions that the model does not take. Every way to
    draw raises RuntimeError where a sample, or what the network returned on the way, is not finite,
    as an overflow of float16 makes it.
    """

    @without_ambient()
    def __init__(
        self,
        model: Model,
        *,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        execution: Execution | None = None,
        conditions: Conditions | None = None,
        latency: bool = False,
    ):
        require("Sampler", Count | None, batch_size=batch_size)
        require("Sampler", Execution | None, execution=execution)
        self.conditions = model.conditions(conditions)
        model.net.to(device=device, dtype=dtype)
        self.device = device_of(model.net, device or "cpu")
        self.batch_size = 1 if latency else batch_size or default_batch_size(model)
        self._again = partial(
            Sampler,
            model,
            batch_size=self.batch_size,
            execution=execution,
            conditions=conditions,
            latency=latency,
        )
        check_memory(
            f"Sampler: a batch_size of {self.batch_size}",
            self.batch_size * least_memory(model),
            self.device,
        )
        if execution is None:
            execution = Execution.default(model, latency=latency)
            self._runner = _prepared(model, execution, self.batch_size)
        else:
            execution.check(model, self.device)
            self._runner = _asked(model, execution, self.batch_size)
        self.model, self.execution = self._runner.model, self._runner.execution
        self.cold_start, self.precision = self._runner.cold_start, self._runner.precision

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the model and the options; plans, engines and graphs are made anew from them."""
        return self._again, ()

    def __call__(
        self,
        seed: int = 0,
        indices: Sequence[int] = range(64),
        labels: Labels | None = None,
        *,
        rounding: Rounding = "round",
    ) -> Tensor:
        """Return the images of `indices` as uint8 [N, H, W, C] on the CPU, latents decoded.

        `labels` are one class for all, or one for each index; without them each index draws its
        own. Raises ValueError for a model whose samples are no images, and for a label that is no
        class of it.
        """
        require("Sampler", Seed, seed=seed)
        self._check_images(count(indices))
        return self._images(self.batches(seed, indices, labels), rounding)

    def draw(
        self, z: Tensor, labels: Labels | None = None, *, rounding: Rounding = "round"
    ) -> Tensor:
        """Return the images of given noise [N, *shape], as a call does.

        Without `labels`, row i has the class and the scale of index i under the seed 0. Raises
        ValueError for a stochastic model: its noise depends on seeds and indices.
        """
        self._check_images(len(z))
        work = self._given(z, self._labels(labels, len(z)))
        return self._images(self._checked(work, "the noise given"), rounding)

    def _check_images(self, number: int) -> None:
        shape = self.model.require_images("Sampler")
        if decoder := self.model.decoder:
            decoding = decoder.memory(self.model.shape, min(number, self.batch_size))
            check_memory(f"Sampler: decoding {self.batch_size} at a time", decoding, self.device)
        # All of them, and once more while they are put together.
        check_memory(f"Sampler: {number} images", 2 * number * math.prod(shape))

    def _images(self, batches: Iterable[Tensor], rounding: Rounding) -> Tensor:
        c, h, w = self.model.require_images("Sampler")
        empty = torch.empty(0, h, w, c, dtype=torch.uint8, device="cpu")
        decoded = (self.model.decoded(x) for x in batches)
        return torch.cat([empty, *(to_uint8(x, rounding).cpu() for x in decoded)])

    def batches(
        self, seed: int, indices: Sequence[int], labels: Labels | None = None
    ) -> Iterator[Tensor]:
        """Yield the samples of `indices` in order, floats [N, *shape] on the model's device.

        `labels` are as in a call. Latents are not decoded; `model.decoded` does that. Raises
        RuntimeError for samples that are not finite: on a CPU in place of the batch that has them,
        on a GPU, which is not waited for, after the last batch.
        """
        given = self._labels(labels, count(indices))
        return self._checked(self._noise(seed, indices, given), f"seed {seed}")

    def sample(
        self,
        z: Tensor,
        draws: Draws | None = None,
        *,
        cond: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the samples of noise z [N, *shape] on the device: floats, about [-1, 1].

        `cond` holds what the model takes; without it, row i has the conditions of index i under the
        seed 0. A stochastic model takes its noise from `draws`. Raises ValueError if it has none,
        and RuntimeError for samples that are not finite, for which it waits for the device.
        """
        rows = range(len(z))
        cond = self._asked(0, as_bits(rows)) if cond is None else cond
        (x,) = self._checked([(z, cond, draws, rows)], "the noise given")
        return x

    def _labels(self, labels: Labels | None, number: int) -> Tensor | None:
        if labels is None:
            return None
        return labels_of("Sampler", labels, number, self.model.classes)

    def _asked(self, seed: int, index: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return the conditions of indices, [N] on the CPU, with labels that are given instead."""
        drawn = self.conditions.draw(seed, index)
        given = {} if labels is None else {"label": labels}
        return {name: value.to(self.device) for name, value in (drawn | given).items()}

    def _noise(self, seed: int, indices: Sequence[int], labels: Tensor | None) -> Iterator[_Work]:
        for start in range(0, len(indices), self.batch_size):
            rows = slice(start, start + self.batch_size)
            part, given = indices[rows], None if labels is None else labels[rows]
            bits = as_bits(part)
            index = bits.to(self.device)
            z = noise(seed, index, self.model.shape, device=self.device)
            yield z, self._asked(seed, bits, given), Draws(seed, index), part

    def _given(self, z: Tensor, labels: Tensor | None) -> Iterator[_Work]:
        for start in range(0, len(z), self.batch_size):
            part = range(len(z))[start : start + self.batch_size]
            given = None if labels is None else labels[part.start : part.stop]
            cond = self._asked(0, as_bits(part), given)
            yield z[part.start : part.stop].to(self.device), cond, None, part

    def _checked(self, work: Iterable[_Work], source: str) -> Iterator[Tensor]:
        """Yield the samples of batches; raise RuntimeError if one of them is not finite."""
        flags: list[tuple[Tensor, Sequence[int]]] = []
        for z, cond, draws, part in work:
            x, finite = self._runner.sample(z, cond, draws)
            flags.append((finite, part))
            if self.device.type == "cpu":
                self._check(flags, source)
                flags.clear()
            yield x
        self._check(flags, source)

    def _check(self, flags: list[tuple[Tensor, Sequence[int]]], source: str) -> None:
        """Raise RuntimeError for the first batch whose flag, which is read here, is false."""
        finite = torch.stack([flag for flag, _ in flags]).tolist() if flags else []
        if all(finite):
            return
        part = flags[finite.index(False)][1]
        advice = "look at its weights and its noise"
        if self.precision in NARROW:
            advice = f"{self.precision} is too narrow for it, use float32 or bfloat16"
        raise RuntimeError(
            f"Sampler: the network's numbers for samples {part[0]} to {part[-1]} of {source} are "
            f"not finite ({self.precision}, mode {self.execution.mode}); {advice}"
        )

    def seconds_each(self) -> float:
        """Measure the seconds that an image takes, from a few network calls."""
        return self._runner.seconds_each()


def _asked(model: Model, execution: Execution, batch_size: int) -> Runner:
    """Prepare an execution that was asked for; a RuntimeError says what to do instead."""
    try:
        return execution.prepare(model, batch_size)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            f"Sampler: {execution} cannot run here: {reason}; mode eager runs the network itself"
        ) from error


def _prepared(model: Model, execution: Execution, batch_size: int) -> Runner:
    """Prepare the default execution, or a plainer one if that fails, with a warning."""
    try:
        return execution.prepare(model, batch_size)
    except (RuntimeError, ValueError) as error:
        if (plainer := _PLAINER.get(execution.mode)) is None:
            raise
        log.warning(
            "Sampler: mode %s failed, %s is used instead, which is slower: %s",
            execution.mode,
            plainer,
            str(error).partition("\n")[0],
        )
    return _prepared(model, replace(execution, mode=plainer), batch_size)


def count(indices: Sequence[int]) -> int:
    """Return the number of indices; a range may have more than len() can return."""
    if isinstance(indices, range):
        return max(0, -((indices.start - indices.stop) // indices.step))
    return len(indices)


def least_memory(model: Model) -> int:
    """Return a lower bound on the bytes that sampling an image takes, whatever runs the network.

    A state, its noise prediction and its x0 are float32. The last block of a U-Net reads two maps
    of its first width, of at least 2 bytes an element, and writes one.
    """
    state = 3 * 4 * math.prod(model.shape)
    if not isinstance(model.net, AbstractUNet):
        return state
    c = model.net.config
    return state + 3 * 2 * c.widths[0] * math.prod(c.size)


def default_batch_size(model: Model) -> int:
    """Return the batch size of a Sampler that is given none.

    256; for a U-Net on a GPU about 512, chosen to keep every multiprocessor busy in every layer and
    to fit an eighth of the memory.
    """
    device = device_of(model.net)
    if device.type != "cuda" or not can_run(model.net):
        return 256
    gpu, target = torch.cuda.get_device_properties(device), Target(device, torch.bfloat16, 1)
    plan = Plan.of(model.net, target)
    fit = gpu.total_memory / 8 / (plan.peak() * target.dtype.itemsize)
    full = plan.full_batch(gpu.multi_processor_count)
    return full * max(1, round(min(512, fit) / full))
