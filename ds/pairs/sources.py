"""Batches for training: which rows a step sees is a function of (seed, step) alone.

So a run that is resumed at step k sees exactly what it would have seen without the interruption,
and nothing about the order has to be saved.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ds import ops
from ds.diffusion.noise import noise
from ds.models.pretrained import fingerprint
from ds.models.sampler import Sampler
from ds.models.teacher import Teacher
from ds.pairs.rows import as_indices
from ds.pairs.store import PairStore, quantize
from ds.system import distributed
from ds.system.config import Count, Natural, Seed, require, to_json
from ds.system.cost import check_memory

Batch = dict[str, Tensor]
CHUNKS = 16  # of consecutive rows, that make a window of the shuffle


class AbstractSource(ABC):
    """Rows that can be drawn; `draws` number the draws of a run, so that noise can be fresh.

    What is kept of a row is small, images in uint8 and the index of their noise, and only that
    travels to the device, where `prepare` makes the batch.
    """

    feeds: ClassVar[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, rows: Sequence[int]) -> Tensor:
        """Return the images [N, H, W, C] as they are kept, on the CPU."""

    @abstractmethod
    def indices(self, rows: Sequence[int], draws: Sequence[int]) -> Tensor:
        """Return the indices of their noise, int64 [N] on the CPU."""

    @abstractmethod
    def prepare(self, images: Tensor, indices: Tensor) -> Batch:
        """Make the batch of what was read, on the device of the images."""

    @abstractmethod
    def fingerprint(self) -> str: ...

    def batch(self, rows: Sequence[int], draws: Sequence[int]) -> Batch:
        """Return the batch of the rows, on the CPU."""
        return self.prepare(self.read(rows), self.indices(rows, draws))


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

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Sequence[int]) -> Tensor:
        return self.store.images(self.indices(rows, rows))

    def indices(self, rows: Sequence[int], draws: Sequence[int]) -> Tensor:
        return as_indices("Pairs", rows, len(self)) * self.rows.step + self.rows.start

    def prepare(self, images: Tensor, indices: Tensor) -> Batch:
        return _prepared(images, indices, self.store.seed)

    def fingerprint(self) -> str:
        return f"{self.store.sha256} {self.rows}"


class Generated(AbstractSource):
    """Pairs that a teacher makes while a student learns from them, without a store.

    The teacher makes a pool of `rows` pairs, which serves for `reuse` epochs and gives way to the
    next. Pool p are the pairs from first + p * rows on of the store that this teacher would make
    with this seed and batch_size: which pairs a step sees is a function of the step, and a run that
    is resumed makes the pool of its step again. The processes of torchrun share the making. `rows`
    is a multiple of the run's batch size, so that all of them change pools at the same step. The
    teacher's network is on the device that trains; `options` are those of its ds.Sampler.

    Raises ValueError for sizes below 1.
    """

    feeds: ClassVar = "pairs"

    def __init__(
        self, teacher: Teacher, rows: int, *, seed: int, first: int = 0, reuse: int = 1,
        batch_size: int | None = None, **options: Any,
    ):  # fmt: skip
        require("Generated", Count, rows=rows, reuse=reuse, draws=rows * reuse)
        require("Generated", Natural, first=first)
        require("Generated", Seed, seed=seed)
        kept = 1 if len(teacher.shape) == 3 else 4  # bytes; and once more while put together
        check_memory(f"Generated: a pool of {rows} pairs", 2 * kept * rows * prod(teacher.shape))
        self.rows, self.seed, self.first, self.reuse = rows, seed, first, reuse
        self._sampler = Sampler(teacher, batch_size=batch_size, **options)
        self._quantizer = "round" if len(teacher.shape) == 3 else "float32"
        self._pool, self._number = torch.empty(0, dtype=torch.float32, device="cpu"), -1
        self._about = (
            f"{fingerprint(teacher.denoiser)} {to_json(teacher.solver)} {list(teacher.grid)}, "
            f"{self._sampler.batch_size} at a time, {options}"
        )

    def __len__(self) -> int:
        return self.rows

    def read(self, rows: Sequence[int]) -> Tensor:
        return torch.empty(len(rows), 0, dtype=torch.uint8, device="cpu")

    def indices(self, rows: Sequence[int], draws: Sequence[int]) -> Tensor:
        pools = torch.as_tensor(draws) // (self.rows * self.reuse)
        return self.first + pools * self.rows + torch.as_tensor(rows)

    def prepare(self, images: Tensor, indices: Tensor) -> Batch:
        number = (int(indices[0]) - self.first) // self.rows  # waits for a GPU, once a step
        if number != self._number:
            self._pool, self._number = self._make(number).to(indices.device), number
        here = indices - self.first - number * self.rows
        return _prepared(self._pool[here], indices, self.seed)

    def _make(self, number: int) -> Tensor:
        """Make a pool, this process its share of the batches, and return all of it on the CPU."""
        size, start = self._sampler.batch_size, self.first + number * self.rows
        share = distributed.share(-(-self.rows // size))
        mine = range(start, start + self.rows)[share.start * size : share.stop * size]
        made = [quantize(x, self._quantizer) for x in self._sampler.batches(self.seed, mine)]
        c, *rest = self._sampler.model.shape
        empty = np.empty((0, *rest, c), np.uint8 if self._quantizer == "round" else np.float32)
        return distributed.gather(torch.from_numpy(np.concatenate([empty, *made])))

    def fingerprint(self) -> str:
        return (
            f"{self.rows} pairs from {self.first} of {self._about}, seed {self.seed}, "
            f"each for {self.reuse} epochs"
        )


class Images(AbstractSource):
    """uint8 images [N, H, W, C] in memory, with fresh noise at every draw."""

    feeds: ClassVar = "images"

    def __init__(self, images: Tensor, *, seed: int = 0):
        self.images = images
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: Sequence[int]) -> Tensor:
        return self.images[torch.as_tensor(rows)]

    def indices(self, rows: Sequence[int], draws: Sequence[int]) -> Tensor:
        return torch.as_tensor(draws)

    def prepare(self, images: Tensor, indices: Tensor) -> Batch:
        return _prepared(images, indices, self.seed)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.images.cpu().contiguous().numpy()).hexdigest()
        return f"{len(self)} images {digest}, seed {self.seed}"


def _prepared(images: Tensor, indices: Tensor, seed: int) -> Batch:
    """Make floats, channels first, of what is kept, and the noise of its indices beside it."""
    if images.dtype == torch.uint8:
        x0, z = ops.prepare_batch(images, indices, seed)
    else:
        x0 = images.movedim(-1, 1).float()
        z = noise(seed, indices, x0.shape[1:], device=x0.device)
    return {"x0": x0, "noise": z, "index": indices}


def check_rows(rows: int, batch_size: int) -> None:
    """Raise ValueError for a batch that so many rows cannot fill."""
    require("Batches", Count, batch_size=batch_size)
    if rows < batch_size:
        raise ValueError(f"batch_size ({batch_size}) exceeds the {rows} training rows")


class Batches:
    """Shuffled batches without end: batches.at(step). Every epoch has its own order.

    Rows that do not fill a last batch wait for another epoch's order. With a `window`, rows that
    are near each other in the order lie in few places of the store: a window of the order holds
    that many rows, of 16 chunks of consecutive ones. `part` are the positions of a batch to read,
    for a process that reads its share; the others are none of its business.

    Raises ValueError if there are fewer rows than a batch holds.
    """

    def __init__(
        self,
        source: AbstractSource,
        batch_size: int,
        seed: int,
        *,
        window: int = 0,
        part: range | None = None,
    ):
        check_rows(len(source), batch_size)
        require("Batches", Natural, seed=seed, window=window)
        self.source, self.batch_size, self.seed, self.window = source, batch_size, seed, window
        self.part = range(batch_size) if part is None else part
        self.per_epoch = len(source) // batch_size
        self._order = lru_cache(maxsize=1)(self._shuffle)

    def at(self, step: int) -> Batch:
        """Return the batch of a step, on the CPU."""
        return self.source.prepare(*self.read(step))

    def read(self, step: int) -> tuple[Tensor, Tensor]:
        """Return what the batch of a step is made of: images and indices, on the CPU."""
        rows, draws = self.rows(step)
        return self.source.read(rows), self.source.indices(rows, draws)

    def rows(self, step: int) -> tuple[np.ndarray, range]:
        """Return the rows of a step and the numbers of their draws."""
        epoch, position = divmod(step, self.per_epoch)
        first, number = position * self.batch_size, step * self.batch_size
        start, stop = self.part.start, self.part.stop
        rows = self._order(epoch)[first + start : first + stop]
        return rows, range(number + start, number + stop)

    def _shuffle(self, epoch: int) -> np.ndarray:
        draw, count = np.random.default_rng((self.seed, epoch)), len(self.source)
        if not self.window:
            return draw.permutation(count)
        chunk = -(-self.window // CHUNKS)
        starts = chunk * draw.permutation(-(-count // chunk))
        near = np.concatenate([np.arange(s, min(s + chunk, count)) for s in starts])
        windows = (near[i : i + self.window] for i in range(0, count, self.window))
        return np.concatenate([draw.permutation(window) for window in windows])


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 scanned digits: uint8 [N, 8, 8, 1] and labels [N]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    levels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    return torch.from_numpy(levels)[..., None], torch.from_numpy(data.target)
