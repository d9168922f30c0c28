"""What methods say about their own proof, and that a proof fails where a method is wrong."""

import math

import pytest
import torch

import ds
from ds.methods import Denoising
from ds.methods.proof import Check, exact
from tests.methods.test_methods import found

EDM = Denoising(ds.schedule.EDM(), "preconditioned")  # the same loss on another path
ARC = Denoising(ds.schedule.Trig(), "x0", snr_weight=True)  # for progressive distillation
METHODS = [*(cls() for cls in found()), EDM, ARC]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_the_identities_of_a_method_hold_and_their_controls_do_not(method):
    for check in method.identity():
        assert check.passed, check
        assert check.controls, "an identity without a control shows nothing"


@pytest.mark.parametrize(
    ("check", "passed"),
    [
        (Check("", 1.0, 2.0), True),
        (Check("", 3.0, 2.0), False),
        (Check("", 3.0, 2.0, at_least=True), True),
        (Check("", 1.0, 2.0, {"wrong": 3.0}), True),
        (Check("", 1.0, 2.0, {"wrong": 3.0, "as good": 1.5}), False),
        (Check("", 3.0, 2.0, {"wrong": 1.0}, at_least=True), True),
        (Check("", 3.0, 2.0, {"as good": 2.5}, at_least=True), False),
        (Check("", 1.0, 2.0, {"wrong": 3.0}, miss=4.0), False),
        (Check("", math.nan, 2.0), False),
        (Check("", 1.0, 2.0, {"broken": math.nan}), False),
    ],
)
def test_a_check_passes_where_the_value_meets_the_bar_and_the_controls_miss_it(check, passed):
    assert check.passed is passed


def test_the_control_shown_is_the_one_nearest_to_passing():
    assert Check("", 0.0, 1.0, {"a": 5.0, "b": 3.0}).control == 3
    assert Check("", 9.0, 1.0, {"a": 0.5, "b": 0.3}, at_least=True).control == 0.5
    assert math.isnan(Check("", 0.0).control)


def test_a_residual_is_judged_by_its_largest_element():
    check = exact("residual", torch.tensor([0.0, -1e-3]), one_way_off=torch.tensor([0.0, -2.0]))
    assert (check.value, check.controls, check.passed) == (
        pytest.approx(1e-3),
        {"one way off": 2.0},
        False,
    )
