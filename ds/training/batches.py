"""Batches for training: which rows a step sees is a function of (seed, step) alone.

So a run that is resumed at step k sees exactly what it would have seen without the interruption,
and nothing about the order has to be saved.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds.diffusion.noise import Draws
from ds.pairs.sources import AbstractSource, Batch
from ds.system.config import Count, Natural, require

CHUNKS = 16  # runs of consecutive rows in a window of the shuffle


def check_rows(rows: int, batch_size: int) -> None:
    """Raise ValueError if there are fewer rows than a batch holds."""
    require("Batches", Count, batch_size=batch_size)
    if rows < batch_size:
        raise ValueError(f"batch_size ({batch_size}) exceeds the {rows} training rows")


class Batches:
    """Shuffled batches without end: batches.at(number). Every epoch has its own order.

    Rows that do not fill a last batch are left out of that epoch. With a `window`, neighbours in
    the order lie in few places of the store: a window of the order holds that many rows, in 16
    chunks of consecutive ones. `part` is the range of positions in a batch that this process reads;
    other positions are skipped.

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

    def at(self, number: int) -> Batch:
        """Return a batch, on the CPU."""
        return self.source.prepare(*self.read(number), self.draws(number))

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        """Return what a batch is made of: images and indices, on the CPU."""
        rows, draws = self.rows(number)
        return self.source.read(rows), self.source.indices(rows, draws)

    def rows(self, number: int) -> tuple[Any, range]:
        """Return the rows of a batch and the numbers of their draws."""
        epoch, position = divmod(number, self.per_epoch)
        first, draw = position * self.batch_size, number * self.batch_size
        start, stop = self.part.start, self.part.stop
        rows = self._order(epoch)[first + start : first + stop]
        return rows, range(draw + start, draw + stop)

    def draws(self, number: int, device: torch.device | str = "cpu") -> Draws:
        """Return the random numbers of a batch."""
        draw = number * self.batch_size
        first, last = draw + self.part.start, draw + self.part.stop
        return Draws(self.seed, torch.arange(first, last, dtype=torch.int64, device=device))

    def _shuffle(self, epoch: int) -> np.ndarray:
        draw, count = np.random.default_rng((self.seed, epoch)), len(self.source)
        if not self.window:
            return draw.permutation(count)
        chunk = -(-self.window // CHUNKS)
        starts = chunk * draw.permutation(-(-count // chunk))
        near = np.concatenate([np.arange(s, min(s + chunk, count)) for s in starts])
        windows = (near[i : i + self.window] for i in range(0, count, self.window))
        return np.concatenate([draw.permutation(window) for window in windows])
