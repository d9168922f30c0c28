"""What losses that compare rows with each other need: forces, features, and a memory of rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ds.nets.lpips import LPIPS

Kernel = Literal["laplace", "gaussian"]
EMPTY = -2  # the label of a place that holds no row yet


class Memory(nn.Module):
    """The last `size` rows that a run has seen, and their labels, in buffers that are saved.

    The places of a batch depend on its step alone, so a step that is taken again after an
    interruption leaves the same memory.
    """

    x0: Tensor
    label: Tensor

    def __init__(self, size: int, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("x0", torch.zeros(size, *shape, dtype=torch.float32, device="cpu"))
        self.register_buffer("label", torch.full((size,), EMPTY, dtype=torch.int64, device="cpu"))

    def forward(self, x0: Tensor, label: Tensor, step: int, keep: bool) -> tuple[Tensor, Tensor]:
        """Return the rows [size, *shape] and labels [size], those of a batch among them.

        The batch stays if it is to be kept. Raises ValueError for a batch that is too large.
        """
        size, count = len(self.label), len(label)
        if count > size:
            raise ValueError(
                f"memory: holds {size} rows, a batch has {count}; make it at least as large"
            )
        place = (torch.arange(count, dtype=torch.int64, device=label.device) + step * count) % size
        rows = self.x0.index_copy(0, place, x0)
        labels = self.label.index_copy(0, place, label)
        if keep:
            self.x0.copy_(rows)
            self.label.copy_(labels)
        return rows, labels


def force(
    x: Tensor,
    real: Tensor,
    away: Tensor,
    weights: tuple[Tensor, Tensor],
    kernel: Kernel,
    bandwidths: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Return the forces [N, D] on x / S, the sum over bandwidths, and S.

    Samples x [N, D] are pulled to `real` [M, D] with the first weights, [N, M], and pushed from
    `away` [K, D] with the second, [N, K]. S is the mean distance, so weighted, over sqrt(D), and
    bandwidths are shares of that distance. Deng et al. 2026, arXiv:2602.04770, Algorithm 2.
    """
    both = torch.cat(weights, 1)
    # Differences of rows: matrix products would lose the digits of small distances.
    exactly = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(x, torch.cat([real, away]), compute_mode=exactly)
    mean = (both * distance).sum() / both.sum()
    scale, total = mean / x.shape[1] ** 0.5, torch.zeros_like(x)  # Eq. 21
    for share in bandwidths:
        found = _affinities(distance / (share * mean), both, kernel, len(real))
        near, far = found.split([len(real), len(away)], 1)
        pull, push = near.sum(1, keepdim=True), far.sum(1, keepdim=True)
        moved = (push * (near @ real) - pull * (far @ away)) / scale
        if kernel == "laplace":
            moved = moved / moved.square().mean().sqrt().clamp(min=1e-30)  # Eq. 25
        total = total + moved
    return total, scale


def _affinities(distance: Tensor, weights: Tensor, kernel: Kernel, real: int) -> Tensor:
    """Return the affinities of rows at these distances, over the bandwidth; `real` come first."""
    if kernel == "gaussian":
        logits = weights.log() - distance.square() / 2
        return torch.cat([_softmax(logits[:, :real], 1), _softmax(logits[:, real:], 1)], 1)
    logits = (-distance).masked_fill(weights == 0, -torch.inf)
    return (_softmax(logits, 1) * _softmax(logits, 0)).sqrt() * weights


def _softmax(logits: Tensor, dim: int) -> Tensor:
    """Return the softmax; 0 where every logit is -inf."""
    return logits.softmax(dim).nan_to_num(0.0)


def pixels(x: Tensor) -> list[Tensor]:
    """Return the rows themselves, [N, D], as the one feature of images [N, *shape]."""
    return [x.flatten(1)]


class Features(nn.Module):
    """Pixels, and of each slice of VGG16 the mean and the deviation over the image, [N, D] each.

    `path` is the file of ds.nets.lpips. They have a gradient in the images.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.lpips = LPIPS.load(path)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [f.flatten(2) for f in self.lpips.features(x)]
        deviations = ((f.var(2) + 1e-6).sqrt() for f in maps)
        return [*pixels(x), *(f.mean(2) for f in maps), *deviations]
