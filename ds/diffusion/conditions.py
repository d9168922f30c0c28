"""What a sample is asked for beside its noise: a class, and how far to be guided towards it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from ds.diffusion.noise import as_bits, words
from ds.nets.base import NO_CLASS
from ds.system.config import Between, check

COLUMNS, MOST_COLUMNS = 8, 16  # of a sheet of samples: without classes, and at most with them
# Streams of random numbers: of classes and of guidance scales.
_CLASSES, _SCALES = 0x4C9A71E35D08F2B6, 0x1B66E0D8A93F547C

NAMES = ("label", "guidance")  # what conditions can say
Scale = Annotated[float, Between(-1e6, 1e6)]
Class = Annotated[int, Between(NO_CLASS, 2**31 - 1)]


class Sheet(NamedTuple):
    """The form of a sheet of samples, row by row, and what each of them is asked for, [N] each."""

    rows: int
    columns: int
    cond: dict[str, Tensor]

    @property
    def count(self) -> int:
        """The number of samples."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Conditions:
    """The classes and guidance scales from which each sample draws its own.

    `classes` are drawn equally often; -1 among them is no class, and without any there are no
    labels. `guidance` is one scale for all samples, or the ends of a range, in which scales are
    even. Classes are kept sorted, each once.

    Raises ValueError for what is no class, and for a range whose ends are the wrong way round.
    """

    classes: tuple[Class, ...] = ()
    guidance: Scale | tuple[Scale, Scale] | None = None

    def __post_init__(self):
        if isinstance(self.classes, Iterable):
            found: Any = self.classes
            plain = found.tolist() if hasattr(found, "tolist") else found  # of an array or a tensor
            object.__setattr__(self, "classes", tuple(plain))
        if isinstance(self.guidance, list):  # as JSON has it
            object.__setattr__(self, "guidance", tuple(self.guidance))
        check(self, "Conditions: ")
        object.__setattr__(self, "classes", tuple(sorted({*self.classes})))
        if isinstance(self.guidance, tuple) and self.guidance[0] > self.guidance[1]:
            raise ValueError(
                f"Conditions: guidance must be a range from the lower scale to the higher, not "
                f"{self.guidance}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what `draw` returns."""
        return (*["label"] * bool(self.classes), *["guidance"] * (self.guidance is not None))

    def draw(self, seed: int, indices: Iterable[int] | Tensor) -> dict[str, Tensor]:
        """Draw the conditions of samples, each a function of (seed, index) alone.

        They are "label", int64 [N], and "guidance", float32 [N], on the device of a tensor of
        indices and else on the CPU. Their bits are the same on all devices.
        """
        index = indices if isinstance(indices, Tensor) else as_bits(indices)
        drawn = {}
        if self.classes:
            drawn["label"] = self._labels(seed ^ _CLASSES, index)
        if isinstance(self.guidance, tuple):
            low, high = self.guidance
            share = (words(seed ^ _SCALES, index).double() + 0.5) * 2.0**-32
            drawn["guidance"] = (low + (high - low) * share).float()
        elif self.guidance is not None:
            drawn["guidance"] = torch.full_like(index, self.guidance, dtype=torch.float32)
        return drawn

    def _labels(self, seed: int, index: Tensor) -> Tensor:
        if len(self.classes) == 1:
            return torch.full_like(index, self.classes[0])
        classes = torch.tensor(self.classes, dtype=torch.int64, device=index.device)
        return classes[words(seed, index) * len(classes) >> 32]

    def sheet(self, most: int) -> Sheet:
        """Return a sheet of `most` samples or a few less, always of the same classes.

        It has a column for each class, of more than 16 for as many spread among them evenly.
        Guidance scales rise from the first row to the last. Tensors are on the CPU.
        """
        shown = self.classes
        if len(shown) > MOST_COLUMNS:
            step = (len(shown) - 1) / (MOST_COLUMNS - 1)
            shown = tuple(shown[round(i * step)] for i in range(MOST_COLUMNS))
        columns = len(shown) if len(shown) > 1 else COLUMNS
        rows, cond = max(1, most // columns), {}
        if shown:
            labels = torch.tensor(shown, dtype=torch.int64, device="cpu")
            cond["label"] = labels.expand(columns).repeat(rows)
        if (g := self.guidance) is not None:
            low, high = g if isinstance(g, tuple) else (g, g)
            scales = torch.linspace(low, high, rows, dtype=torch.float32, device="cpu")
            cond["guidance"] = scales.repeat_interleave(columns)
        return Sheet(rows, columns, cond)


def labels_of(where: str, labels: int | Sequence[int] | Tensor, count: int, classes: int) -> Tensor:
    """Return given labels as int64 [count] on the CPU; one number is that of all samples.

    Raises ValueError, in the name of `where`, for another number of labels than samples, and for a
    label that is no class of a model with so many.
    """
    if not classes:
        raise ValueError(f"{where}: the model has no classes, leave the labels out")
    given = labels if isinstance(labels, Tensor) else _as_tensor(where, labels)
    if not given.numel():  # an empty list is one of floats
        given = given.to(torch.int64)
    if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool:
        raise ValueError(f"{where}: labels must be whole numbers, not {given.dtype}")
    given = given.to("cpu", torch.int64)
    if given.dim() == 0:
        given = given.expand(count)
    if given.shape != (count,):
        raise ValueError(
            f"{where}: {list(given.shape)} labels were given for {count} samples; give one a "
            f"sample, or a single one for all"
        )
    check_labels(where, given, classes)
    return given


def check_labels(where: str, label: Tensor, classes: int) -> None:
    """Raise ValueError for the first label that is none of so many classes."""
    outside = (label < NO_CLASS) | (label >= classes)
    if outside.any():
        raise ValueError(
            f"{where}: label {label[outside][0].item()} does not exist; the model has classes 0 to "
            f"{classes - 1}; {NO_CLASS} is no class"
        )


def _as_tensor(where: str, labels: Any) -> Tensor:
    try:
        return torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{where}: labels must be whole numbers, not {labels!r}") from None
