"""How results are held against the truth: float64, within what PyTorch in the same dtype is off."""

import torch
from torch import Tensor

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def assert_close(
    name: str,
    exact: Tensor,
    ours: Tensor,
    plain: Tensor,
    factor: float = 2.0,
    terms: float = 0.0,
) -> None:
    """Assert that `ours` is as close to the float64 answer as plain PyTorch in the same dtype.

    Allow `factor` times the largest error of `plain`, two roundings of the largest value of
    `exact`, and two float32 roundings of `terms`, the size of what cancels in a sum. A float64
    result has no more exact answer to compare with, so it is allowed 16 roundings.
    """
    assert ours.dtype == plain.dtype, f"{name} is {ours.dtype}, not {plain.dtype}"
    assert ours.shape == exact.shape, f"{name} is {list(ours.shape)}, not {list(exact.shape)}"
    if not exact.numel():
        return
    roundings = 16 if ours.dtype == torch.float64 else 2
    floor = roundings * torch.finfo(ours.dtype).eps * exact.abs().max() + 2 * 2**-23 * terms
    error, allowed = ((result.double() - exact).abs().max() for result in (ours, plain))
    assert error <= factor * allowed + floor, (
        f"{name} is off by {error:.3g} > {factor} * {allowed:.3g} + {floor:.3g}"
    )


def assert_same_bits(ours, theirs) -> None:
    """Assert that two sequences of tensors are equal; a NaN is not equal to itself."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), f"number {i} differs"


def gradient_like(x: Tensor) -> Tensor:
    """Draw a gradient with the strides of x."""
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    return torch.empty_like(x).copy_(drawn)


def poisoned(allocate):
    """Return a function that allocates, and fills with NaN what it allocates."""
    return lambda *args, **kwargs: allocate(*args, **kwargs).fill_(float("nan"))


def poison(monkeypatch) -> None:
    """Fill with NaN what torch.empty and torch.empty_like allocate."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
