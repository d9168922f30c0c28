"""Batches for training: which rows a step sees is a function of (seed, step) alone.

So a run that is resumed at step k sees exactly what it would have seen without the interruption,
and nothing about the order has to be saved.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from ds import ops
from ds.pairs import PairStore

Batch = dict[str, Tensor]


class Source(Protocol):
    """Rows that can be drawn; `draws` number the draws of a run, so that noise can be fresh."""

    feeds: str

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int], draws: Sequence[int]) -> Batch: ...

    def fingerprint(self) -> str: ...


class Pairs:
    """The pairs of a store in `rows`, all of them by default."""

    feeds: ClassVar = "pairs"

    def __init__(self, store: PairStore, rows: range | None = None):
        self.store = store
        self.rows = range(len(store)) if rows is None else rows
        if not self.rows or not (self.rows[0] >= 0 and self.rows[-1] < len(store)):
            raise ValueError(f"Pairs: {self.rows} is not within the store's {len(store)} pairs")

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Sequence[int], draws: Sequence[int]) -> Batch:
        indices = torch.as_tensor(rows) * self.rows.step + self.rows.start
        images = self.store.images(indices)
        if images.dtype != torch.uint8:
            return {"x0": self.store.targets(indices), "noise": self.store.noise(indices)}
        return _prepared(images, indices, self.store.seed)

    def fingerprint(self) -> str:
        return f"{self.store.sha256} {self.rows}"


class Images:
    """uint8 images [N, H, W, C] in memory, with fresh noise at every draw."""

    feeds: ClassVar = "images"

    def __init__(self, images: Tensor, *, seed: int = 0):
        self.images = images
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Sequence[int], draws: Sequence[int]) -> Batch:
        return _prepared(self.images[torch.as_tensor(rows)], torch.as_tensor(draws), self.seed)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.images.cpu().contiguous().numpy()).hexdigest()
        return f"{len(self)} images {digest}, seed {self.seed}"


def _prepared(images: Tensor, indices: Tensor, seed: int) -> Batch:
    x0, noise = ops.prepare_batch(images, indices, seed)
    return {"x0": x0, "noise": noise}


class Batches:
    """Shuffled batches without end: batches.at(step). Every epoch has its own order.

    Rows that do not fill a last batch wait for another epoch's order. Raises ValueError if there
    are fewer rows than a batch holds.
    """

    def __init__(self, source: Source, batch_size: int, seed: int):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if len(source) < batch_size:
            raise ValueError(f"batch_size ({batch_size}) exceeds the {len(source)} training rows")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.per_epoch = len(source) // batch_size
        self._order = lru_cache(maxsize=1)(self._shuffle)

    def at(self, step: int) -> Batch:
        """Return the batch of a step, on the CPU."""
        epoch, position = divmod(step, self.per_epoch)
        first = position * self.batch_size
        rows = self._order(epoch)[first : first + self.batch_size]
        return self.source.batch(rows, range(step * self.batch_size, (step + 1) * self.batch_size))

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.source))


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 scanned digits: uint8 [N, 8, 8, 1] and labels [N]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    levels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    return torch.from_numpy(levels)[..., None], torch.from_numpy(data.target)
