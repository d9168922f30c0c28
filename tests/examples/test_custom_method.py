"""examples/custom_method.py: a method that the library has never seen."""

import pytest
import torch
from torch import nn

import ds
from ds.cli.__main__ import main
from ds.methods.base import Progress
from ds.pairs.sources import Batch
from tests.cli.chain import DISTILL, PAIRS, TEACH
from tests.examples import EXAMPLES, load

own = load("custom_method")
DATA = ds.analytic.Gaussian()


class Ends(nn.Module):
    """Answer so that a call's image is the noise times a factor of its time."""

    def __init__(self, **factors: float):
        super().__init__()
        self.factors = nn.ParameterDict(
            {name: torch.tensor(value, dtype=torch.float64) for name, value in factors.items()}
        )

    def forward(self, x, t):
        return x - self.factors[f"t{int(t[0])}"] * x


def rows(z: torch.Tensor, x0: torch.Tensor) -> Batch:
    draws = ds.Draws(0, torch.arange(len(z)))
    return Batch(x0, z, {}, draws)


def test_the_second_call_sees_the_first_image_and_half_of_the_noise():
    z = torch.randn(5, 3, dtype=torch.float64)
    made = own.DrawAndCorrect()._calls(Ends(t999=0.2, t500=3.0), z, 2, None)
    assert torch.allclose(made[0], 0.2 * z) and torch.allclose(made[1], 3 * (0.1 + 0.5) * z)


def test_the_loss_is_nothing_for_the_exact_map_and_something_for_another():
    z, method = torch.randn(64, 3, dtype=torch.float64), own.DrawAndCorrect()
    batch, progress = rows(z, 0.2 * z), Progress(0, 1)
    exact = Ends(t999=0.2, t500=0.2 / 0.6)
    for factor, wrong in exact.factors.items():
        other = Ends(t999=0.2, t500=0.2 / 0.6)
        other.factors[factor].data = wrong.detach() + 0.1
        assert method.loss({"student": other}, batch, progress) > 1e-4
    assert method.loss({"student": exact}, batch, progress) < 1e-20


def test_the_first_call_learns_from_its_own_error_alone():
    z, net = torch.randn(64, 3, dtype=torch.float64), Ends(t999=0.2, t500=1.0)
    own.DrawAndCorrect().loss({"student": net}, rows(z, 0.2 * z), Progress(0, 1)).backward()
    first, second = (net.factors[name].grad.abs() for name in ("t999", "t500"))
    assert first < 1e-12 and second > 1e-3


def test_a_third_call_is_refused():
    assert own.DrawAndCorrect().times(2) == (999, 500)
    with pytest.raises(ValueError, match="draws in 1 or 2 network calls, not 3"):
        own.DrawAndCorrect().times(3)


@pytest.mark.slow
def test_two_calls_come_nearer_than_one(tmp_path, monkeypatch):
    monkeypatch.setattr(own, "HELD_OUT", 2000)
    found = own.main(tmp_path, count=10_000, steps=600)
    error = {nfe: scores["error on held-out noise"] for nfe, scores in found.items()}
    assert error[2] < 0.9 * error[1] < 0.3


@pytest.mark.slow
def test_the_command_line_takes_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = str(EXAMPLES / "custom_method.py")
    assert main(["teach", "digits", "--out", "teacher", *TEACH]) == 0
    there = ("--teacher", "teacher", "--out", "student", "--method", file)
    assert main(["distill", "digits", *there, *PAIRS, *DISTILL]) == 0
    draw = ("--code", file, "--nfe", "2", "--indices", "0-3", "--out", "two.png")
    assert main(["sample", "student", *draw]) == 0
    assert (tmp_path / "two.png").exists()
