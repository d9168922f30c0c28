"""dstudent sample: images of a model."""

from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

from ds.cli.verb import Here, Model, Verb, say
from ds.diffusion.noise import noise
from ds.models.execution import Execution, Precision
from ds.models.images import save, target
from ds.models.interpolate import great_circle
from ds.models.load import load
from ds.models.sampler import Sampler, count
from ds.system.config import Count, Natural, Seed
from ds.system.cost import check_memory
from ds.training.presets import Machine

GIF = 2**16 - 1  # pixels of a side, by its format


class Ranges(Sequence):
    """Ranges of whole numbers, one after another, however long they are."""

    def __init__(self, parts: Iterable[range]):
        self.parts = [part for part in parts if count(part)]
        self.ends = [*accumulate(map(count, self.parts))]

    @property
    def count(self) -> int:
        """How many there are, which may be more than len() can say."""
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
    """Draw images from a teacher or a student, or a path between two of them.

    The name of `out` says what is written: a .png is one sheet, a .gif an animation, an .npy or
    .npz an array, uint8 [N, H, W, C], and a name without a suffix a directory of PNGs.
    """

    model: Model
    out: Path = Path("samples.png")
    seed: Seed = 0
    indices: str = "0-63"  # of the noise: numbers and ranges, such as 3,7,100-199
    between: Natural = 0  # images on the way from each index to the next, along a great circle
    scale: Natural = 0  # pixels of a picture for each of the image; 0 makes small images larger
    batch_size: Count | None = None  # None: 256, on GPUs what keeps all of one busy
    precision: Precision | None = None  # None: bfloat16 on GPUs, float32 on CPUs
    force: bool = False  # replace what an earlier `sample` has written there
    machine: Here = field(default_factory=Machine)

    def idle(self) -> dict[str, str]:
        array = {"scale": "on an array; it is for pictures"}
        return array if self.out.suffix in (".npy", ".npz") else {}

    def prepare(self) -> Callable[[], None]:
        indices = _indices(self.indices)
        if self.between and indices.count < 2:
            raise ValueError("sample: between needs two indices or more, such as --indices 3,7")
        target(self.out, force=self.force, apart=[self.model])
        model = load(self.model, device=self.machine.use())
        if len(model.shape) == 3:  # others are refused where they are drawn
            self._check_size(indices.count, model.shape)
        execution = self.precision and Execution.default(model, precision=self.precision)
        sampler = Sampler(model, batch_size=self.batch_size, execution=execution)
        return partial(self._draw, sampler, indices)

    def _check_size(self, count: int, shape: tuple[int, ...]) -> None:
        """Raise ValueError for more images than fit the memory, each pixel scaled."""
        scale = self._scale(shape)
        if self.out.suffix == ".gif" and scale * max(shape[1:]) > GIF:
            raise ValueError(
                f"sample: a side of a .gif has at most {GIF:,} pixels, at a scale of {scale} it "
                f"has {scale * max(shape[1:]):,}"
            )
        many = (count - 1) * (self.between + 1) + 1
        if self.out.suffix in (".npy", ".npz"):
            check_memory(f"sample: {many} images", 2 * many * prod(shape))
        elif not self.out.suffix:  # a picture at a time
            check_memory(f"sample: {many} images", (2 * many + 3 * scale**2) * prod(shape))
        else:
            check_memory(f"sample: pictures of {many} images", 3 * many * scale**2 * prod(shape))

    def _scale(self, shape: tuple[int, ...]) -> int:
        return self.scale or max(1, 64 // shape[-2])

    def _draw(self, sampler: Sampler, indices: Ranges) -> None:
        model = sampler.model
        if self.between:
            z = noise(self.seed, indices, model.shape)
            images, columns = sampler.draw(great_circle(z, self.between)), self.between + 1
        else:
            images, columns = sampler(self.seed, indices), None
        scale = self._scale(model.shape)
        save(images, self.out, columns=columns, scale=scale, force=self.force)
        say(f"samples: {self.out}, {len(images)} images, {model.nfe} network calls each")


def _indices(text: str) -> Ranges:
    """Read numbers and ranges: "3,7,100-199" has 102 of them."""
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
