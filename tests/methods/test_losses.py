"""Losses of rows, against their formulas written out."""

import pytest
import torch

from ds.methods import losses

ERROR = torch.tensor([[[3.0, 0.0], [0.0, -4.0]], [[0.0, 0.1], [0.0, 0.0]]], dtype=torch.float64)

WIDTH = 4 * 0.00054  # of rows of 4 elements
HUBER = [((size + WIDTH**2) ** 0.5 - WIDTH) / 4 for size in (25, 0.01)]
LEVELS = torch.tensor([[[[0.6]], [[0.9]]], [[[0.8]], [[0.3]]]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (losses.mean(ERROR, "l1"), 7.1 / 8),
        (losses.mean(ERROR, "l2"), 25.01 / 8),
        (losses.mean(ERROR, "pseudo_huber"), sum(HUBER) / 2),
        (losses.relative_huber(ERROR), HUBER),
        (losses.squares(ERROR), [25, 0.01]),
        # of the size of a whole row: element by element, the first would be 9.24 - 4
        (losses.pseudo_huber(ERROR, 2.0), [29**0.5 - 2, 4.01**0.5 - 2]),
        (losses.pseudo_huber(ERROR, 0.0), [5, 0.1]),
        (losses.adaptive(ERROR, 0.0, 1e-3), [25, 0.01]),
        (losses.truncated_snr(ERROR, *LEVELS), [25 / 4, 0.01 / 4 * 9]),  # of x0, of the noise
        (losses.adaptive(ERROR, 0.5, 1e-3), [25 / 25.001**0.5, 0.01 / 0.011**0.5]),
    ],
)
def test_a_loss_is_its_formula(loss, expected):
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_the_adaptive_weight_has_no_gradient():
    error = ERROR.clone().requires_grad_()
    losses.adaptive(error, 1.0, 1e-3).sum().backward()
    expected = 2 * ERROR / (losses.squares(ERROR) + 1e-3)[:, None, None]
    torch.testing.assert_close(error.grad, expected)


def test_a_pseudo_huber_loss_is_a_square_near_zero_and_a_size_far_from_it():
    small, large = 1e-4 * ERROR, 1e4 * ERROR
    near = losses.squares(small) / 4
    torch.testing.assert_close(losses.pseudo_huber(small, 2.0), near, rtol=1e-4, atol=1e-14)
    far = losses.squares(large).sqrt() - 2
    torch.testing.assert_close(losses.pseudo_huber(large, 2.0), far, rtol=1e-4, atol=0.01)
