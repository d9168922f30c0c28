"""What the figures of an evaluation need of a set of features that is never all in memory."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ds.evaluation.metrics import InceptionScore

BLOCK = 1024  # rows that are added up at a time
PAIRWISE = 16384  # rows of a set whose distances to the other's are taken


class Statistics:
    """Moments, first rows and Inception Score of n rows of features [D] that come in parts.

    Rows are added up in float64, in blocks of a fixed size. So the same rows in the same order give
    the same bits, whatever the parts. Of features, `logits` makes those of a score, or None, and
    `classify` the class of each row, or None. The first `keep` rows are kept.
    """

    def __init__(
        self,
        n: int,
        width: int,
        logits: Callable[[Tensor], Tensor | None],
        keep: int,
        classify: Callable[[Tensor], Tensor | None] = lambda _: None,
    ):
        self._logits, self._score, self._keep = logits, InceptionScore(n), keep
        self._classify = classify
        self._count = 0
        zeros = partial(torch.zeros, dtype=torch.float64, device="cpu")
        self._shift, self._sum, self._squares = zeros(width), zeros(width), zeros(width, width)
        self._rest = zeros(0, width)  # a block that is not full
        self._first: list[Tensor] = []
        self._classes: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Add rows of features, float64 [N, D] on the CPU.

        Raises ValueError for rows that are not finite.
        """
        if not (finite := features.isfinite().all(1)).all():
            row = self._count + len(self._rest) + int((~finite).nonzero()[0])
            raise ValueError(f"evaluate: the features of image {row} are not finite")
        rows = torch.cat([self._rest, features])
        full = len(rows) - len(rows) % BLOCK
        for block in rows[:full].split(BLOCK) if full else ():
            self._fold(block)
        self._rest = rows[full:].clone()

    def _fold(self, block: Tensor) -> None:
        if self._count < self._keep:
            self._first.append(block[: self._keep - self._count].clone())
        if not self._count:  # sums around the mean of the first block lose no digits
            self._shift = block.mean(0)
        centred = block - self._shift
        self._sum += centred.sum(0)
        self._squares.addmm_(centred.T, centred)
        self._count += len(block)
        if (logits := self._logits(block)) is not None:
            self._score.add(logits)
        if (classes := self._classify(block)) is not None:
            self._classes.append(classes)

    def finish(self) -> None:
        """Add the rows that fill no block; no more come."""
        if len(self._rest):
            self._fold(self._rest)
            self._rest = self._rest[:0].clone()

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean [D] and the unbiased covariance [D, D]."""
        n, offset = self._count, self._sum / self._count
        covariance = (self._squares - n * offset.outer(offset)) / (n - 1)
        return self._shift + offset, covariance

    @property
    def first(self) -> Tensor:
        """The rows that are kept."""
        return torch.cat(self._first)

    @property
    def classes(self) -> Tensor | None:
        """The class that each row is found in, int64 [n], or None without a classifier."""
        return torch.cat(self._classes) if self._classes else None

    @property
    def score(self) -> tuple[float, float] | None:
        """The Inception Score and its deviation, or None without logits."""
        return self._score.result() if self._score.count else None
