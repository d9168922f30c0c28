"""c-rectified flow: its rounds, what runs its result, and the coupling of a rotation."""

import pytest
import torch
from torch import nn

import ds
from ds.evaluation.scores import even_noise
from ds.evaluation.verify import verify
from ds.methods import CRectifiedFlow
from ds.methods.proofs.c_rectified_flow import OPTIMUM, Rotated
from ds.models.execution import Execution
from ds.nets import Potential, recompute_norms
from ds.training.parallel import shard
from tests.methods.test_methods import start

METHOD = CRectifiedFlow(nfe=2, cost="quartic")


@pytest.fixture(scope="module")
def result() -> ds.Teacher:
    return METHOD.result(start(METHOD)[1]["student"].eval())


def test_a_round_starts_from_the_potential_of_the_last_one():
    first, second, last = CRectifiedFlow(rounds=3, steps=7, nfe=1).stages()
    assert [s.feeds for s in (first, second, last)] == ["images", "pairs", "pairs"]
    assert [s.nfe for s in (first, second, last)] == [7, 7, 1]
    net = first.init(start(first)[0])["student"]
    again = second.init(first.result(net))["student"]
    assert isinstance(again, Potential) and not isinstance(again.net, Potential)
    assert all(map(torch.equal, again.parameters(), net.parameters()))


def test_the_result_is_saved_loaded_and_drawn(result, tmp_path):
    result.save_pretrained(tmp_path / "made")
    loaded = ds.load_teacher(tmp_path / "made")
    z = ds.noise(0, range(2), result.shape)
    drawn = result.sample(z)
    assert not drawn.requires_grad
    assert torch.equal(loaded.sample(z), drawn)
    torch.testing.assert_close(METHOD.sample(loaded.net, z, nfe=2), drawn)


def test_the_engine_which_has_no_derivatives_is_not_chosen_and_refused(result):
    assert Execution.default(result).mode == "eager"
    with pytest.raises(ValueError, match=r"mode engine is for .*, not for this Potential"):
        ds.Sampler(result, execution=Execution(mode="engine"))


def test_what_frees_weights_or_activations_that_the_derivative_needs_is_refused(result):
    with pytest.raises(ValueError, match=r"runtime\.shard frees weights .*; leave it out"):
        shard(nn.ModuleDict({"student": result.net}), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"recompute_norms: .*; leave it out"):
        recompute_norms(result.net)


def test_the_rotated_coupling_has_the_covariance_that_it_says():
    batch = Rotated(0, 4096).batch(range(4096))
    assert (batch.x0.T.cov() - torch.tensor([[1.0, 0.9], [0.9, 1.0]])).abs().max() < 0.06
    assert (batch.noise - batch.x0).square().sum(1).mean() > 5 > 1 > OPTIMUM > 0.6


def test_a_rotation_becomes_cheap_by_a_potential_and_stays_by_rectified_flow(monkeypatch):
    monkeypatch.setattr("ds.evaluation.verify._noise", lambda: even_noise(256, 2))
    found = {check.metric: check for check in verify(CRectifiedFlow(), steps=50).checks}
    cost, error = found["cost of the coupling"], found["error of the covariance"]
    assert OPTIMUM - 0.2 < cost.value < 1.5 < 4 < cost.control, cost
    assert error.value < 0.5 < error.control
