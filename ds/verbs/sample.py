"""dstudent sample: images of a model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ds.images import check_name, save
from ds.load import load
from ds.philox import noise
from ds.presets import Machine
from ds.sample import Precision, Sampler, great_circle
from ds.verbs.options import Here, Model, Verb, say


@dataclass(frozen=True, kw_only=True)
class Sample(Verb):
    """Draw images from a teacher or a student, or a path between two of them.

    The name of `out` says what is written: a .png is one sheet, a .gif an animation, an .npy or
    .npz an array, uint8 [N, H, W, C], and a name without a suffix a directory of PNGs.
    """

    model: Model
    out: Path = Path("samples.png")
    seed: int = 0
    indices: str = "0-63"  # of the noise: numbers and ranges, such as 3,7,100-199
    between: int = 0  # images on the way from each index to the next, along a great circle
    scale: int = 0  # pixels of a picture for each of the image; 0 makes small images larger
    batch_size: int | None = None  # None: 256, on GPUs what keeps all of one busy
    precision: Precision | None = None  # None: bfloat16 on GPUs, float32 on CPUs
    machine: Here = field(default_factory=Machine)

    def idle(self) -> dict[str, str]:
        array = {"scale": "on an array; it is for pictures"}
        return array if self.out.suffix in (".npy", ".npz") else {}

    def prepare(self) -> Callable[[], None]:
        indices = _indices(self.indices)
        if self.between < 0:
            raise ValueError(f"sample: between must be at least 0, not {self.between}")
        if self.between and len(indices) < 2:
            raise ValueError("sample: between needs two indices or more, such as --indices 3,7")
        check_name(self.out)
        model = load(self.model, device=self.machine.use())
        sampler = Sampler(model, batch_size=self.batch_size, precision=self.precision)
        return partial(self._draw, sampler, indices)

    def _draw(self, sampler: Sampler, indices: list[int]) -> None:
        model = sampler.model
        if self.between:
            z = noise(self.seed, indices, model.shape)
            images, columns = sampler.draw(great_circle(z, self.between)), self.between + 1
        else:
            images, columns = sampler(self.seed, indices), None
        scale = self.scale or max(1, 64 // images.shape[1])
        save(images, self.out, columns=columns, scale=scale)
        say(f"samples: {self.out}, {len(images)} images, {model.nfe} network calls each")


def _indices(text: str) -> list[int]:
    """Read numbers and ranges: "3,7,100-199" has 102 of them."""
    indices: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"indices {text!r}: {part!r} is no number and no range such as 0-63")
        indices += range(int(first), int(last or first) + 1)
    if not indices:
        raise ValueError(f"indices {text!r} are none")
    return indices
