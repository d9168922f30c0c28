"""dstudent sample: draw images from a model."""

import logging
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds.cli.verb import (
    Classes,
    Code,
    Guidance,
    Here,
    Model,
    Verb,
    asked,
    labels_in,
    loaded,
    say,
)
from ds.diffusion.noise import noise
from ds.models.execution import Execution, Precision
from ds.models.images import ARRAYS, grey_channels, save, target
from ds.models.interpolate import great_circle, nearest
from ds.models.sampler import Sampler, count
from ds.models.student import Student
from ds.models.teacher import Teacher
from ds.system.config import Count, Natural, Seed
from ds.system.cost import check_memory
from ds.training.presets import Machine

log = logging.getLogger("ds")
GIF = 2**16 - 1  # pixels of a side, by its format


class Ranges(Sequence):
    """Ranges of whole numbers, one after another, however long they are."""

    def __init__(self, parts: Iterable[range]):
        self.parts = [part for part in parts if count(part)]
        self.ends = [*accumulate(map(count, self.parts))]

    @property
    def count(self) -> int:
        """The number of items, which may be more than len() can return."""
        return self.ends[-1] if self.ends else 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(self.count))]
        if not 0 <= at < self.count:
            raise IndexError(at)
        part = bisect(self.ends, at)
        return self.parts[part][at - self.ends[part]]


@dataclass(frozen=True, kw_only=True)
class Sample(Verb):
    """Draw images from a teacher or a student, or a path between images.

    The suffix of --out chooses the format: .png is one sheet, .gif an animation, .npy or .npz an
    array, uint8 [N, H, W, C], and no suffix a directory of PNGs. Latents are decoded if the model
    has a decoder. Samples that are no pictures go into arrays as they are, float32; in pictures
    each of their channels is grey, black at its least number and white at its largest.
    """

    model: Model
    out: Path = Path("samples.png")
    seed: Seed = 0  # of the noise
    indices: str = "0-63"  # of the noise: numbers and ranges, such as 3,7,100-199
    classes: Classes = None
    # the class of each image in order, such as 0-9 or cat,dog, from the first again after the last;
    # a sheet then has a column for each
    labels: str | None = None
    guidance: Guidance = None
    # number of images between one index and the next, on a great circle; each has the class of the
    # nearer
    between: Natural = 0
    scale: Natural = 0  # enlarge pictures by this factor; 0 enlarges small images only
    nfe: Count | None = None  # network calls of a student or a flow; None: as saved
    batch_size: Count | None = None  # None: 256, or what fills a GPU
    precision: Precision | None = None  # None: bfloat16 on GPUs, float32 on CPUs
    force: bool = False  # replace the result of an earlier `sample`
    code: Code = None
    machine: Here = field(default_factory=Machine)

    def idle(self) -> dict[str, str]:
        idle = {"scale": "on an array; it is for pictures"} if self.out.suffix in ARRAYS else {}
        if self.labels is not None:
            idle["classes"] = "with --labels, which give the class of each image"
        return idle

    def prepare(self) -> Callable[[], None]:
        indices = _indices(self.indices)
        if self.between and indices.count < 2:
            raise ValueError("sample: between needs two indices or more, such as --indices 3,7")
        target(self.out, force=self.force, apart=[self.model])
        model = loaded(self.model, self.machine.use(), self.code, self.nfe)
        classes = None if self.labels is not None else self.classes
        model, conditions = asked(model, classes, self.guidance)
        labels = None if self.labels is None else labels_in("labels", self.labels, model)
        if self.between and isinstance(conditions.guidance, tuple):
            raise ValueError("sample: between needs one --guidance, such as 2, and not a range")
        self._check_size(indices.count, self._picture(model), size=1 if model.image_shape else 4)
        execution = self.precision and Execution.default(model, precision=self.precision)
        sampler = Sampler(
            model, batch_size=self.batch_size, execution=execution, conditions=conditions
        )
        return partial(self._draw, sampler, indices, labels)

    def _picture(self, model: Teacher | Student) -> tuple[int, ...]:
        """Return the shape of what is written of a sample: of a picture, (C, H, W).

        Raises ValueError for samples that no picture can show.
        """
        if (shape := model.image_shape) is not None:
            return shape
        if self.out.suffix in ARRAYS:
            return model.shape
        if len(model.shape) != 3:
            raise ValueError(
                f"sample: samples of shape {list(model.shape)} are no pictures; write them as an "
                f"array, such as --out samples.npy"
            )
        channels, height, width = model.shape
        log.warning(
            "samples %s are no pictures, and the model has no decoder; each of the %d channels is "
            "shown in grey, scaled to its own range; --out samples.npy keeps the numbers",
            list(model.shape),
            channels,
        )
        return 1, height, channels * width

    def _check_size(self, count: int, shape: tuple[int, ...], size: int) -> None:
        """Raise ValueError if what is written does not fit the memory or the format.

        `size` is that of a number in bytes.
        """
        many = (count - 1) * (self.between + 1) + 1
        needed = 2 * size * many * prod(shape)  # all of them, and once more while put together
        if self.out.suffix not in ARRAYS:
            scale, at_once = self._scale(shape[1]), many if self.out.suffix else 1
            if self.out.suffix == ".gif" and scale * max(shape[1:]) > GIF:
                raise ValueError(
                    f"sample: a side of a .gif has at most {GIF:,} pixels, at a scale of {scale} "
                    f"it has {scale * max(shape[1:]):,}"
                )
            needed += 3 * scale**2 * at_once * prod(shape)
        check_memory(f"sample: {many} of them in {self.out}", needed)

    def _scale(self, height: int) -> int:
        return self.scale or max(1, 64 // height)

    def _draw(self, sampler: Sampler, indices: Ranges, labels: list[int] | None) -> None:
        model = sampler.model
        columns = self.between + 1 if self.between else len(labels or ()) or None
        found = self._drawn(sampler, indices, labels)
        scale = self._scale(found.shape[1])
        save(found, self.out, columns=columns, scale=scale, force=self.force)
        what = "images" if model.image_shape else "samples"
        calls = "1 network call" if model.nfe == 1 else f"{model.nfe} network calls"
        say(f"samples: {self.out}, {len(found)} {what}, {calls} each")

    def _drawn(self, sampler: Sampler, indices: Ranges, labels: list[int] | None) -> Tensor:
        """Return uint8 pictures [N, H, W, C]; floats [N, *shape] of what is none, for an array."""
        path, model = None, sampler.model
        if self.between:
            path = great_circle(noise(self.seed, indices, model.shape), self.between)
        told = labels and [labels[i % len(labels)] for i in range(len(indices))]
        if model.image_shape:
            if path is None:
                return sampler(self.seed, indices, told)
            return sampler.draw(path, self._along(sampler, indices, told))
        if path is None:
            parts = sampler.batches(self.seed, indices, told)
        else:
            cond = sampler.conditions.draw(self.seed, range(len(path)))
            if (along := self._along(sampler, indices, told)) is not None:
                cond["label"] = along
            parts = (
                sampler.sample(
                    path[rows].to(sampler.device),
                    cond={name: value[rows].to(sampler.device) for name, value in cond.items()},
                )
                for rows in torch.arange(len(path), dtype=torch.int64, device="cpu").split(
                    sampler.batch_size
                )
            )
        found = torch.cat([x.float().cpu() for x in parts])
        return found if self.out.suffix in ARRAYS else grey_channels(found)

    def _along(self, sampler: Sampler, indices: Ranges, told: list[int] | None) -> Tensor | None:
        """Return the labels along a path: each image has that of the nearer of its ends."""
        if not sampler.model.classes:
            return None
        drawn = sampler.conditions.draw(self.seed, [*indices])["label"]
        ends = drawn if told is None else torch.tensor(told, dtype=torch.int64, device="cpu")
        return nearest(ends, self.between)


def _indices(text: str) -> Ranges:
    """Read numbers and ranges: "3,7,100-199" is 102 indices."""
    ranges = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"indices {text!r}: {part!r} is no number and no range such as 0-63")
        if max(len(first), len(last)) > 20 or int(last or first) >= 2**64:
            raise ValueError(f"indices {text!r}: {part!r} is beyond the 64 bits of an index")
        ranges.append(range(int(first), int(last or first) + 1))
    found = Ranges(ranges)
    if not found.count:
        raise ValueError(f"indices {text!r} are none")
    return found
