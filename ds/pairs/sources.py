"""Sources: the rows that a run is trained on, and the noise that belongs to them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ds import ops
from ds.diffusion.conditions import Conditions
from ds.diffusion.noise import Draws, noise
from ds.models.execution import Execution
from ds.models.pretrained import fingerprint
from ds.models.sampler import Sampler
from ds.models.teacher import Teacher
from ds.nets.base import NO_CLASS
from ds.pairs.quantizer import Quantizer, fitting, quantize, row_of
from ds.pairs.rows import as_indices
from ds.pairs.store import PairStore
from ds.system import distributed
from ds.system.config import Count, Natural, Seed, require, to_json
from ds.system.cost import check_memory


class Batch(NamedTuple):
    """Rows of data and noise, float32 [N, *shape] each, on one device.

    `index`, int64 [N], is the index of the noise: of a pair, or of a draw. `draws` are the random
    numbers of the rows, and `cond` are the network's conditions, [N] each.
    """

    x0: Tensor
    noise: Tensor
    index: Tensor
    draws: Draws
    cond: dict[str, Tensor] = {}  # noqa: RUF012


class AbstractSource(ABC):
    """Rows that can be drawn. The draws of a run are numbered, so that noise can be fresh.

    A row is kept small, as a uint8 image and the index of its noise. Only that travels to the
    device, where `prepare` makes the batch.
    """

    feeds: ClassVar[str]

    @property
    def conditions(self) -> Conditions:
        """The classes and guidance scales of the rows, by which `prepare` fills `cond`."""
        return Conditions()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, rows: Sequence[int]) -> Tensor:
        """Return the images [N, H, W, C] as they are kept, on the CPU."""

    @abstractmethod
    def indices(self, rows: Sequence[int], draws: Sequence[int]) -> Tensor:
        """Return the indices of their noise, int64 [N] on the CPU.

        Labels that no index tells are a second column: [N, 2].
        """

    @abstractmethod
    def prepare(self, images: Tensor, indices: Tensor, draws: Draws) -> Batch:
        """Make the batch of what was read, on the device of the images."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a text that differs where the rows do."""

    def batch(
        self,
        rows: Sequence[int],
        draws: Sequence[int] | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Return the batch of some rows. Their draws have the numbers of the rows by default."""
        numbers = rows if draws is None else draws
        images, indices = self.read(rows).to(device), self.indices(rows, numbers).to(device)
        number = torch.as_tensor(numbers, dtype=torch.int64, device=device)
        return self.prepare(images, indices, Draws(seed, number))


class Pairs(AbstractSource):
    """The pairs of a store in `rows`, all of them by default."""

    feeds: ClassVar = "pairs"

    def __init__(self, store: PairStore, rows: range | None = None):
        self.store = store
        self.rows = range(len(store)) if rows is None else rows
        if not isinstance(self.rows, range):
            raise ValueError(f"Pairs: rows must be a range, not a {type(rows).__name__}")
        ends = [*self.rows[:1], *self.rows[-1:]]
        if not ends or min(ends) < 0 or max(ends) >= len(store):
            raise ValueError(f"Pairs: {self.rows} is not within the store's {len(store)} pairs")

    @property
    def conditions(self) -> Conditions:
        return self.store.conditions

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Sequence[int]) -> Tensor:
        return self.store.images(self.indices(rows, rows))

    def indices(self, rows: Sequence[int], draws: Sequence[int]) -> Tensor:
        return as_indices("Pairs", rows, len(self)) * self.rows.step + self.rows.start

    def prepare(self, images: Tensor, indices: Tensor, draws: Draws) -> Batch:
        return _prepared(images, indices, self.store.seed, draws, self.conditions)

    def fingerprint(self) -> str:
        return f"{self.store.sha256} {self.rows}"


class Generated(AbstractSource):
    """Pairs that a teacher makes while a student learns from them, without a store.

    The teacher makes a pool of `rows` pairs. It serves for `reuse` epochs, then the next pool takes
    its place. Pool p holds `rows` pairs, from pair first + p * rows on, of the store that this
    teacher would make with this seed and batch_size. So the pairs of a step depend on the step
    alone, and a resumed run makes the pool of its step again. The processes of torchrun share the
    work. `rows` must be a multiple of the run's batch size: all processes then change pools at the
    same step. The teacher's network is on the device that trains, and `execution` says how it is
    run, as for a ds.Sampler. So do `conditions` what it is asked for.

    Raises ValueError for sizes below 1, and as ds.Sampler does.
    """

    feeds: ClassVar = "pairs"

    def __init__(
        self,
        teacher: Teacher,
        rows: int,
        *,
        seed: int,
        first: int = 0,
        reuse: int = 1,
        batch_size: int | None = None,
        execution: Execution | None = None,
        conditions: Conditions | None = None,
    ):
        require("Generated", Count, rows=rows, reuse=reuse, draws=rows * reuse)
        require("Generated", Natural, first=first)
        require("Generated", Seed, seed=seed)
        self._quantizer: Quantizer = fitting(teacher)
        kept = row_of(teacher.shape, self._quantizer).bytes  # and once more while put together
        check_memory(f"Generated: a pool of {rows} pairs", 2 * kept * rows)
        self.rows, self.seed, self.first, self.reuse = rows, seed, first, reuse
        self._sampler = Sampler(
            teacher, batch_size=batch_size, execution=execution, conditions=conditions
        )
        self._pool, self._number = torch.empty(0, dtype=torch.float32, device="cpu"), -1
        self._about = (
            f"{fingerprint(teacher.denoiser)} {to_json(teacher.solver)} {list(teacher.grid)}, "
            f"{self._sampler.batch_size} at a time, {self._sampler.execution}"
            f"{_said(self.conditions)}"
        )

    @property
    def conditions(self) -> Conditions:
        return self._sampler.conditions

    def __len__(self) -> int:
        return self.rows

    def read(self, rows: Sequence[int]) -> Tensor:
        return torch.empty(len(rows), 0, dtype=torch.uint8, device="cpu")

    def indices(self, rows: Sequence[int], draws: Sequence[int]) -> Tensor:
        pools = torch.as_tensor(draws) // (self.rows * self.reuse)
        return self.first + pools * self.rows + torch.as_tensor(rows)

    def prepare(self, images: Tensor, indices: Tensor, draws: Draws) -> Batch:
        number = (int(indices[0]) - self.first) // self.rows  # waits for a GPU, once a step
        if number != self._number:
            self._pool, self._number = self._make(number).to(indices.device), number
        here = indices - self.first - number * self.rows
        return _prepared(self._pool[here], indices, self.seed, draws, self.conditions)

    def _make(self, number: int) -> Tensor:
        """Make a pool, this process its share of the batches, and return all of it on the CPU."""
        size, start = self._sampler.batch_size, self.first + number * self.rows
        share = distributed.share(-(-self.rows // size))
        mine = range(start, start + self.rows)[share.start * size : share.stop * size]
        made = [quantize(x, self._quantizer) for x in self._sampler.batches(self.seed, mine)]
        row = row_of(self._sampler.model.shape, self._quantizer)
        empty = torch.empty(0, *row.shape, dtype=row.dtype, device="cpu")
        return distributed.gather(torch.cat([empty, *made]))

    def fingerprint(self) -> str:
        return (
            f"{self.rows} pairs from {self.first} of {self._about}, seed {self.seed}, "
            f"each for {self.reuse} epochs"
        )


class Noise(AbstractSource):
    """`count` rows of fresh noise at every draw, for samples of a shape, and no data.

    What is asked for is as fresh: each draw has its own of `conditions`.
    """

    feeds: ClassVar = "noise"

    def __init__(
        self,
        count: int,
        shape: tuple[int, ...],
        *,
        seed: int = 0,
        conditions: Conditions | None = None,
    ):
        require("Noise", Count, count=count)
        require("Noise", Seed, seed=seed)
        self.count, self.shape, self.seed = count, tuple(shape), seed
        self._conditions = conditions or Conditions()

    @property
    def conditions(self) -> Conditions:
        return self._conditions

    def __len__(self) -> int:
        return self.count

    def read(self, rows: Sequence[int]) -> Tensor:
        return torch.empty(len(rows), 0, dtype=torch.float32, device="cpu")

    def indices(self, rows: Sequence[int], draws: Sequence[int]) -> Tensor:
        return torch.as_tensor(draws)

    def prepare(self, images: Tensor, indices: Tensor, draws: Draws) -> Batch:
        z = noise(self.seed, indices, self.shape, device=indices.device)
        return Batch(images, z, indices, draws, self.conditions.draw(self.seed, indices))

    def fingerprint(self) -> str:
        about = f"noise {list(self.shape)}, {self.count} rows, seed {self.seed}"
        return about + _said(self.conditions)


class Images(AbstractSource):
    """uint8 images [N, H, W, C] in memory, with fresh noise at every draw.

    `labels`, int64 [N], are the classes of the images: batches then have the condition "label".
    With `guidance`, a scale or a range of them, they have "guidance" too, fresh at every draw, for
    students of teachers that are told it.
    `rows`, int64, are those of the images that are used, all by default. With `flip` each is there
    twice, once as its mirror image.

    Raises ValueError for another number of labels than images, and for labels below -1, no class.
    """

    feeds: ClassVar = "images"

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        seed: int = 0,
        rows: Tensor | None = None,
        flip: bool = False,
        guidance: float | tuple[float, float] | None = None,
    ):
        self.images, self.seed, self.flip = images, seed, flip
        every = torch.arange(len(images), dtype=torch.int64, device="cpu")
        self.rows = every if rows is None else rows
        self.labels = None if labels is None else _classes(labels, len(images))
        self._scales = Conditions(guidance=guidance)

    @property
    def conditions(self) -> Conditions:
        """The classes of the images that are used, and the guidance scales."""
        if self.labels is None:
            return self._scales
        return replace(self._scales, classes=tuple(self.labels[self.rows].unique().tolist()))

    def __len__(self) -> int:
        return len(self.rows) * (2 if self.flip else 1)

    def read(self, rows: Sequence[int]) -> Tensor:
        wanted = torch.as_tensor(rows)
        found = self.images[self.rows[wanted % len(self.rows)]]
        mirrored = (wanted >= len(self.rows)).view(-1, 1, 1, 1)
        return torch.where(mirrored, found.flip(2), found) if self.flip else found

    def indices(self, rows: Sequence[int], draws: Sequence[int]) -> Tensor:
        index = torch.as_tensor(draws)
        if self.labels is None:
            return index
        here = self.rows[torch.as_tensor(rows) % len(self.rows)]
        return torch.stack([index, self.labels[here]], 1)

    def prepare(self, images: Tensor, indices: Tensor, draws: Draws) -> Batch:
        if self.labels is None:
            return _prepared(images, indices, self.seed, draws, self._scales)
        index, label = (column.contiguous() for column in indices.unbind(1))
        batch = _prepared(images, index, self.seed, draws, self._scales)
        return batch._replace(cond={"label": label, **batch.cond})

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.images.cpu().contiguous().numpy().data).hexdigest()
        said = f"{len(self)} images {digest}, seed {self.seed}"
        if self.labels is not None:
            said += f", labels {hashlib.sha256(self.labels.numpy().data).hexdigest()}"
        said += _said(self._scales)
        if len(self) == len(self.images) and bool((self.rows.diff() == 1).all()):
            return said
        rows = hashlib.sha256(self.rows.numpy().data).hexdigest()
        return f"{said}, rows {rows}" + (", flipped" if self.flip else "")


def _classes(labels: Tensor, count: int) -> Tensor:
    """Return the labels of so many images as int64 [N] on the CPU."""
    whole = not (labels.dtype.is_floating_point or labels.dtype.is_complex)
    if not whole or labels.shape != (count,) or not ((labels >= NO_CLASS) & (labels < 2**31)).all():
        raise ValueError(
            f"Images: labels must be whole numbers [{count}] from {NO_CLASS} (no class) on, one an "
            f"image, not {labels.dtype} {list(labels.shape)}"
            + (f" from {labels.min()} to {labels.max()}" if labels.numel() and whole else "")
        )
    return labels.to("cpu", torch.int64).contiguous()


def _said(conditions: Conditions) -> str:
    """Return the end of a fingerprint, empty without conditions."""
    return f", {conditions}" if conditions.names else ""


def _prepared(
    images: Tensor, indices: Tensor, seed: int, draws: Draws, conditions: Conditions
) -> Batch:
    """Make floats, channels first, of kept rows; add the noise of their indices, and conditions."""
    if images.dtype == torch.uint8:
        x0, z = ops.prepare_batch(images, indices, seed)
    else:
        x0 = images.movedim(-1, 1).float()
        z = noise(seed, indices, x0.shape[1:], device=x0.device)
    return Batch(x0, z, indices, draws, conditions.draw(seed, indices))


def digits() -> tuple[Tensor, Tensor]:
    """Return the 1,797 scanned digits of ds/pairs/digits: uint8 [N, 8, 8, 1] and labels [N]."""
    with np.load(Path(__file__).parent / "digits" / "images.npz") as data:
        levels = np.rint(data["images"] * (255 / 16)).astype(np.uint8)
        labels = data["labels"].astype(np.int64)
    return torch.from_numpy(levels)[..., None], torch.from_numpy(labels)
