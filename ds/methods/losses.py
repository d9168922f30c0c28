"""Losses of an error [N, *shape]: what a student made minus what it should have made."""

from typing import Literal

from torch import Tensor


def mean(error: Tensor, kind: Literal["l1", "l2", "pseudo_huber"]) -> Tensor:
    """Return the mean over all elements of an error's size or square, or of `relative_huber`."""
    if kind == "pseudo_huber":
        return relative_huber(error).mean()
    return error.abs().mean() if kind == "l1" else error.square().mean()


def squares(error: Tensor) -> Tensor:
    """Return the sum of the squares of each row, [N]."""
    return error.flatten(1).square().sum(1)


def pseudo_huber(error: Tensor, width: float) -> Tensor:
    """Return sqrt(|error|**2 + width**2) - width of each row, [N], its size over all elements.

    It grows as the square of errors far below `width`, and in proportion to those far above. With
    the width 0 its gradient is nan where an error is 0. Song & Dhariwal 2023, arXiv:2310.14189,
    section 3.3.
    """
    return (squares(error) + width**2).sqrt() - width


def relative_huber(error: Tensor, width: float = 0.00054) -> Tensor:
    """Return the pseudo-Huber loss of each row of D elements, its width `width` * D, over D: [N].

    Lee et al. 2024, arXiv:2405.20320, section 4.2.
    """
    size = error[0].numel()
    return pseudo_huber(error, width * size) / size


def adaptive(error: Tensor, power: float, offset: float) -> Tensor:
    """Return |error|**2 / (|error|**2 + offset)**power of each row, [N].

    The divisor has no gradient: a power of 0 is least squares, and 0.5 about |error|. Geng et al.
    2025, arXiv:2505.13447, section 4.3.
    """
    size = squares(error)
    return size * (size.detach() + offset) ** -power


def truncated_snr(error: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the larger of the mean squared errors of x0 and of the noise, of each row, [N].

    `error` is that of x0. That of the noise is alpha / sigma times as large, so the weight is the
    SNR, at least 1. Salimans & Ho 2022, arXiv:2202.00512, Eq. 9.
    """
    return ((alpha / sigma).clamp(min=1) * error).square().flatten(1).mean(1)
