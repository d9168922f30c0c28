"""Conditions: classes and guidance scales as functions of (seed, index)."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from ds.diffusion.conditions import Conditions, labels_of
from ds.diffusion.noise import Draws, noise

DIGITS = Conditions(classes=range(10), guidance=(1.0, 4.0))


def test_the_label_of_an_index_is_the_same_in_any_split():
    whole = DIGITS.draw(5, range(100))
    parts = [DIGITS.draw(5, part) for part in (range(0, 37), torch.arange(37, 99), [99])]
    for name, values in whole.items():
        assert torch.equal(values, torch.cat([part[name] for part in parts]))
    assert whole["label"].dtype == torch.int64 and whole["guidance"].dtype == torch.float32
    backwards = DIGITS.draw(5, range(99, -1, -1))
    assert torch.equal(backwards["label"].flip(0), whole["label"])


def test_labels_and_scales_are_those_of_the_specification():
    """As computed by hand from Philox4x32-10: they are part of what a store means."""
    drawn = DIGITS.draw(7, [0, 1, 2**63, 2**64 - 1])
    assert drawn["label"].tolist() == [9, 7, 0, 7]
    assert drawn["guidance"].tolist() == pytest.approx(
        [3.948424, 2.258993, 3.107995, 2.454906], abs=1e-6
    )


def test_each_class_is_drawn_equally_often():
    n = 200_000
    counts = Conditions((3, 5, 7)).draw(1, range(n))["label"].bincount(minlength=8)
    assert counts.sum() == counts[[3, 5, 7]].sum()
    assert chisquare(counts[[3, 5, 7]]).pvalue > 1e-3
    many = Conditions(range(1000)).draw(2, range(n))["label"].bincount(minlength=1000)
    assert chisquare(many).pvalue > 1e-3


def test_scales_are_even_in_their_range():
    scales = DIGITS.draw(3, range(20_000))["guidance"].double()
    assert kstest((scales - 1) / 3, "uniform").pvalue > 1e-3


def test_labels_scales_noise_and_draws_have_nothing_to_do_with_one_another():
    index = torch.arange(50_000)
    label, scale = DIGITS.draw(11, index).values()
    others = (
        scale,
        noise(11, index, ()),
        Draws(11, index).uniform(0),
        DIGITS.draw(12, index)["label"],
    )
    for other in others:
        pair = torch.stack([label.double(), other.double()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.015  # three deviations


def test_without_classes_or_scale_nothing_is_drawn():
    assert Conditions().draw(0, range(3)) == {} and Conditions().names == ()
    assert Conditions(guidance=2.5).draw(0, range(3))["guidance"].tolist() == [2.5] * 3
    assert Conditions((4, -1)).names == ("label",)
    assert set(Conditions((4, -1)).draw(0, range(50))["label"].tolist()) == {4, -1}


def test_the_order_of_classes_makes_no_difference():
    assert Conditions((7, 3, 7)) == Conditions([3, 7]) and Conditions((7, 3)).classes == (3, 7)


@pytest.mark.parametrize("given", [[7, 3], range(3, 8, 4), np.array([3, 7]), torch.tensor([7, 3])])
def test_classes_may_be_a_list_a_range_an_array_or_a_tensor(given):
    assert Conditions(given).classes == (3, 7)
    assert {type(c) for c in Conditions(given).classes} == {int}


@pytest.mark.parametrize(
    ("classes", "count", "rows", "columns", "first"),
    [
        ((), 64, 8, 8, None),
        ((3,), 64, 8, 8, [3] * 8),
        ((2, 5), 64, 32, 2, [2, 5]),
        (range(10), 64, 6, 10, [*range(10)]),
        (range(10), 4, 1, 10, [*range(10)]),
        (range(31), 48, 3, 16, [*range(0, 31, 2)]),
        (range(1000), 64, 4, 16, None),
    ],
)
def test_a_sheet_has_a_column_for_each_class(classes, count, rows, columns, first):
    sheet = Conditions(tuple(classes)).sheet(count)
    assert (sheet.rows, sheet.columns, sheet.count) == (rows, columns, rows * columns)
    if not classes:
        assert sheet.cond == {}
        return
    label = sheet.cond["label"].view(rows, columns)
    assert torch.equal(label, label[:1].expand(rows, columns))
    assert first is None or label[0].tolist() == first
    assert (label[0, 0], label[0, -1]) == (classes[0], classes[-1])


def test_scales_rise_from_the_first_row_of_a_sheet_to_the_last():
    sheet = Conditions((0, 1), (1.0, 4.0)).sheet(8)
    assert sheet.cond["guidance"].view(4, 2).tolist() == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert Conditions(guidance=2.0).sheet(64).cond["guidance"].tolist() == [2.0] * 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": (3, -2)}, r"classes\[1\] must be at least -1, not -2"),
        ({"classes": (1.5,)}, r"classes\[0\] must be a whole number, not 1.5"),
        ({"classes": 3}, "classes must be a list, not 3"),
        ({"guidance": (4.0, 1.0)}, r"from the lower scale to the higher, not \(4.0, 1.0\)"),
        ({"guidance": "much"}, "guidance must be a number or a list or null, not 'much'"),
        ({"guidance": float("nan")}, "guidance must be"),
    ],
)
def test_conditions_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Conditions(**fields)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (12, "x: label 12 does not exist; the model has classes 0 to 9; -1 is no class"),
        ([0, 1, -2], "x: label -2 does not exist; the model has classes 0 to 9"),
        ([0, 1], r"x: \[2\] labels were given for 3 samples"),
        ([[0, 1, 2]], r"x: \[1, 3\] labels were given for 3 samples"),
        ([0.5, 1, 2], "x: labels must be whole numbers, not torch.float32"),
        (["cat", 1, 2], r"x: labels must be whole numbers, not \['cat', 1, 2\]"),
        (torch.ones(3, dtype=torch.bool), "x: labels must be whole numbers, not torch.bool"),
        (2**70, "x: labels must be whole numbers"),
    ],
)
def test_a_label_that_does_not_exist_is_one_clear_line(labels, message):
    with pytest.raises(ValueError, match=message) as error:
        labels_of("x", labels, 3, 10)
    assert "\n" not in str(error.value)


def test_a_label_of_a_model_without_classes_is_one_clear_line():
    with pytest.raises(ValueError, match="x: the model has no classes, leave the labels out"):
        labels_of("x", 0, 3, 0)


@pytest.mark.parametrize("given", [4, [4, 4, 4], torch.tensor([4, 4, 4], dtype=torch.int32)])
def test_labels_may_be_a_number_a_list_or_a_tensor(given):
    found = labels_of("x", given, 3, 10)
    assert found.tolist() == [4, 4, 4] and found.dtype == torch.int64
