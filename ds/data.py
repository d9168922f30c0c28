"""Batches for training: which rows a step sees is a function of (seed, step) alone.

So a run that is resumed at step k sees exactly what it would have seen without the interruption,
and nothing about the order has to be saved.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ds import ops
from ds.checkpoint import fingerprint
from ds.config import to_json
from ds.pairs import PairStore
from ds.philox import noise
from ds.sample import Teacher

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
        if not self.rows or not (self.rows[0] >= 0 and self.rows[-1] < len(store)):
            raise ValueError(f"Pairs: {self.rows} is not within the store's {len(store)} pairs")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Sequence[int]) -> Tensor:
        return self.store.images(self.indices(rows, rows))

    def indices(self, rows: Sequence[int], draws: Sequence[int]) -> Tensor:
        return torch.as_tensor(rows) * self.rows.step + self.rows.start

    def prepare(self, images: Tensor, indices: Tensor) -> Batch:
        if images.dtype == torch.uint8:
            return _prepared(images, indices, self.store.seed)
        z = noise(self.store.seed, indices, self.store.shape, device=images.device)
        return {"x0": images.movedim(-1, 1).float(), "noise": z}

    def fingerprint(self) -> str:
        return f"{self.store.sha256} {self.rows}"


class Generated(AbstractSource):
    """Pairs that a teacher makes when a step needs them: no store, and no pair comes twice.

    Every step costs the teacher's network calls. `rows` are those of an epoch. The teacher's
    network is on the device that trains.
    """

    feeds: ClassVar = "pairs"

    def __init__(self, teacher: Teacher, rows: int, *, seed: int):
        self.teacher, self.rows, self.seed = teacher, rows, seed

    def __len__(self) -> int:
        return self.rows

    def read(self, rows: Sequence[int]) -> Tensor:
        return torch.empty(len(rows), 0, dtype=torch.uint8)

    def indices(self, rows: Sequence[int], draws: Sequence[int]) -> Tensor:
        return torch.as_tensor(draws)

    def prepare(self, images: Tensor, indices: Tensor) -> Batch:
        z = noise(self.seed, indices, self.teacher.shape, device=indices.device)
        return {"x0": self.teacher.sample(z), "noise": z}

    def fingerprint(self) -> str:
        t = self.teacher
        made = f"{fingerprint(t.denoiser)} {to_json(t.solver)} {list(t.grid)}"
        return f"{self.rows} pairs of {made}, seed {self.seed}"


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
    x0, noise = ops.prepare_batch(images, indices, seed)
    return {"x0": x0, "noise": noise}


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
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if len(source) < batch_size:
            raise ValueError(f"batch_size ({batch_size}) exceeds the {len(source)} training rows")
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
