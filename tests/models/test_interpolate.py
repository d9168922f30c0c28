"""Paths between noise tensors."""

import pytest
import torch

from ds.models.interpolate import great_circle, nearest


@pytest.mark.parametrize("between", [0, 1, 9])
def test_a_great_circle_passes_through_its_points_in_even_steps(between):
    z = torch.nn.functional.normalize(torch.randn(3, 20, dtype=torch.float64), dim=1) * 4
    path = great_circle(z, between)
    assert len(path) == 2 * (between + 1) + 1
    torch.testing.assert_close(path[:: between + 1], z)
    torch.testing.assert_close(path.norm(dim=1), torch.full((len(path),), 4.0).double())
    steps = torch.acos((path[1:] * path[:-1]).sum(1) / 16)
    for leg in steps.split(between + 1):
        torch.testing.assert_close(leg, leg[:1].expand_as(leg))


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (0, [5, 7, 3]),
        (1, [5, 5, 7, 7, 3]),
        (2, [5, 5, 7, 7, 7, 3, 3]),
        (3, [5] * 3 + [7] * 4 + [3] * 2),
    ],
)
def test_a_path_keeps_the_label_of_its_nearer_end(between, expected):
    labels = nearest(torch.tensor([5, 7, 3]), between)
    assert labels.tolist() == expected
    assert len(labels) == len(great_circle(torch.randn(3, 4), between))
