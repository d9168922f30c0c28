"""dstudent sample: draw images from a model."""

from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

from ds.cli.verb import Code, Here, Model, Verb, loaded, say
from ds.diffusion.noise import noise
from ds.models.execution import Execution, Precision
from ds.models.images import save, target
from ds.models.interpolate import great_circle
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
    array, uint8 [N, H, W, C], and no suffix a directory of PNGs.
    """

    model: Model
    out: Path = Path("samples.png")
    seed: Seed = 0  # of the noise
    indices: str = "0-63"  # of the noise: numbers and ranges, such as 3,7,100-199
    between: Natural = 0  # number of images between one index and the next, on a great circle
    scale: Natural = 0  # enlarge pictures by this factor; 0 enlarges small images only
    nfe: Count | None = None  # network calls of a student; None: as it was saved
    batch_size: Count | None = None  # None: 256, or what fills a GPU
    precision: Precision | None = None  # None: bfloat16 on GPUs, float32 on CPUs
    force: bool = False  # replace the result of an earlier `sample`
    code: Code = None
    machine: Here = field(default_factory=Machine)

    def idle(self) -> dict[str, str]:
        array = {"scale": "on an array; it is for pictures"}
        return array if self.out.suffix in (".npy", ".npz") else {}

    def prepare(self) -> Callable[[], None]:
        indices = _indices(self.indices)
        if self.between and indices.count < 2:
            raise ValueError("sample: between needs two indices or more, such as --indices 3,7")
        target(self.out, force=self.force, apart=[self.model])
        model = loaded(self.model, self.machine.use(), self.code, self.nfe)
        if len(model.shape) == 3:  # other shapes are refused when they are drawn
            self._check_size(indices.count, model.shape)
        execution = self.precision and Execution.default(model, precision=self.precision)
        sampler = Sampler(model, batch_size=self.batch_size, execution=execution)
        return partial(self._draw, sampler, indices)

    def _check_size(self, count: int, shape: tuple[int, ...]) -> None:
        """Raise ValueError if the images, enlarged, do not fit the memory or the format."""
        scale = self._scale(shape)
        if self.out.suffix == ".gif" and scale * max(shape[1:]) > GIF:
            raise ValueError(
                f"sample: a side of a .gif has at most {GIF:,} pixels, at a scale of {scale} it "
                f"has {scale * max(shape[1:]):,}"
            )
        many = (count - 1) * (self.between + 1) + 1
        if self.out.suffix in (".npy", ".npz"):
            check_memory(f"sample: {many} images", 2 * many * prod(shape))
        elif not self.out.suffix:  # one picture at a time
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
        calls = "1 network call" if model.nfe == 1 else f"{model.nfe} network calls"
        say(f"samples: {self.out}, {len(images)} images, {calls} each")


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
