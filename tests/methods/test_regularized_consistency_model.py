"""rCM: its turns, what is drawn and judged, and both forms of its warm-up."""

from dataclasses import replace

import pytest
import torch

import ds
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import Preconditioned
from ds.diffusion.schedules import EDM
from ds.methods import Progress
from ds.methods import RegularizedConsistencyModel as RCM
from ds.methods import SimplifiedConsistencyModel as SCM
from ds.methods.consistency import distribution_matching as matching
from ds.methods.proof import NORMAL, Formula
from ds.methods.proofs.consistency import simplified_consistency_model as first
from ds.nets import MLPConfig
from ds.pairs.sources import Batch

METHOD = RCM(student=MLPConfig(dim=3, width=16, depth=2))
DATA = ds.analytic.Gaussian(mean=0.3, std=0.5, shape=(3,))
LEVELS = (0.0, 1.6)
END = Progress(99, 100)


def teacher():
    return DATA.teacher(ds.solvers.DDIM(), (80.0,), EDM(), Preconditioned())


def batch(count=64):
    index = torch.arange(count)
    return Batch(DATA.sample(1, index), ds.noise(2, index, (3,)), index, Draws(0, index))


def student(net):
    return METHOD.consistency.denoiser(Formula(net))


def moves(method, modules, turn, step=99):
    """The modules that the loss of a turn gives a gradient."""
    modules.zero_grad()
    method.loss(modules, batch(), Progress(step, 100, turn)).backward()
    return {
        name for name, net in modules.items() if any(p.grad is not None for p in net.parameters())
    }


def test_the_critic_takes_four_turns_before_each_of_the_student():
    assert RCM().turns == ("critic",) * 4 + ("student",)
    modules = METHOD.init(teacher())
    assert {*modules} == {"student", "teacher", "critic"}
    assert moves(METHOD, modules, "critic") == {"critic"}
    assert moves(METHOD, modules, "student") == {"student"}


def test_without_the_score_it_is_sCM_alone():
    """Whose loss is a mean over elements and has a weight, which begins as 1."""
    sCM = replace(METHOD.consistency, normalize=False, student=METHOD.student)
    modules = sCM.init(teacher())
    consistency = replace(sCM, student=None)
    method = replace(METHOD, consistency=consistency, score_weight=0.0, consistency_weight=5.0)
    assert (method.turns, {*method.init(teacher())}) == (("student",), {"student", "teacher"})
    ours, alone = (one.loss(modules, batch(), END).item() for one in (method, sCM))
    assert ours == pytest.approx(5 * 3 * alone, rel=1e-5)


def test_the_tangent_is_normalized_by_its_size_over_all_elements():
    plain = replace(METHOD, consistency=replace(METHOD.consistency, normalize=False))
    modules, r = METHOD.init(teacher()), torch.ones(64)
    size = plain.inconsistency(modules, batch(), r).sqrt()
    found = METHOD.inconsistency(modules, batch(), r)
    torch.testing.assert_close(found, (size / (size + 0.1)) ** 2, rtol=1e-4, atol=1e-6)


def test_samples_are_judged_once_the_warm_up_is_over():
    method = replace(METHOD, consistency=replace(METHOD.consistency, warmup=40))
    alone = replace(method, score_weight=0.0)
    modules = method.init(teacher())
    for step, same in ((0, True), (39, True), (40, False), (99, False)):
        found = [m.loss(modules, batch(), Progress(step, 100)) for m in (method, alone)]
        assert torch.equal(*found) == same, step


@pytest.mark.parametrize(("ramp", "same"), [(0.0, False), (0.5, False), (1.0, True)])
def test_the_warm_up_of_the_code_is_that_of_the_paper_at_its_end_alone(ramp, same):
    forms = [replace(METHOD, warmup_form=form) for form in ("paper", "code")]
    t, x = first.angles(), NORMAL.endpoint(first.NOISE, 0, 1)
    told = x.cos(), x.sin(), x, t, x.flip(0), torch.full_like(t, ramp)
    away = (forms[0].tangent(*told) - forms[1].tangent(*told)).abs().max()
    assert away < 1e-12 if same else away > 1e-2


@pytest.mark.parametrize("most", [1, 2, 4])
def test_a_sample_to_judge_takes_one_to_most_calls_each_as_often_at_times_that_fall(most):
    seen = []

    def net(u, t):
        seen.append(t)
        return 0 * u

    matching.drawn(student(net), batch(4000), most, LEVELS)
    t = torch.stack(seen)
    assert len(t) == most and (t.diff(dim=0) <= 0).all()
    assert torch.equal(t[0], torch.full_like(t[0], torch.pi / 2))
    calls = 1 + (t.diff(dim=0) < 0).sum(0)  # a time that is drawn later than the last is the last
    alone = (t == t[0]).all(0).double().mean().item()
    assert calls.max() == most
    assert alone == pytest.approx(1 / most, abs=0.03)


def test_a_sample_to_judge_has_the_gradient_of_its_last_call_alone():
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)
    calls = []

    def net(u, t):
        calls.append(torch.is_grad_enabled())
        return gain * u

    x = matching.drawn(student(net), batch(8), 3, LEVELS)
    assert calls == [False, False, True]
    assert x.requires_grad


@pytest.mark.parametrize("most", [1, 4])
def test_the_exact_map_draws_samples_of_the_data_to_judge(most):
    exact = student(first.velocity(METHOD.consistency))
    rows = batch(20_000)
    x = matching.drawn(exact, rows._replace(x0=rows.x0.double()), most, LEVELS)
    torch.testing.assert_close(x.mean(0), torch.full((3,), 0.3).double(), rtol=0, atol=0.03)
    torch.testing.assert_close(x.std(0), NORMAL.std, rtol=0.02, atol=0)


def test_a_critic_that_begins_as_the_teacher_moves_nothing():
    """A student without a network of its own is converted; so is its critic."""
    net = replace(MLPConfig(dim=3, width=16, depth=2)).build().requires_grad_(False)
    start = teacher().using(net)
    method = RCM(consistency=SCM(converted=True), consistency_weight=0.0).on(start)
    modules = method.init(start)
    assert method.loss(modules, batch(), END) < 1e-6
    with torch.no_grad():
        modules["critic"].layers[-1].bias.add_(0.1)
    assert method.loss(modules, batch(), END) > 1e-3


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"consistency": SCM(student=MLPConfig())}, "set `student` itself"),
        ({"consistency": SCM(flow="data")}, "set it to 'teacher'"),
        ({"consistency_weight": 0.0, "score_weight": 0.0}, "set one of them above 0"),
        ({"rollout": 0}, "rollout"),
    ],
)
def test_what_has_no_meaning_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        RCM(**fields)


@pytest.mark.parametrize(("away", "off", "least"), [(0.0, 0.0, 0.0), (0.5, 1.0, 0.0)])
def test_samples_that_leave_the_modes_or_all_share_one_show_in_the_figures(away, off, least):
    """All samples are one point, near the first mode of six."""
    there = torch.tensor(ds.analytic.GaussianMixture().means[0]) + away

    def net(u, t):
        cos, sin = t.cos()[:, None], t.sin()[:, None]
        return (cos * u - there / 0.5) / sin

    found = RCM().measure(Formula(net), ds.noise(0, range(64), (2,)))
    assert [check.value for check in found] == pytest.approx([off, least])
    assert [check.against for check in found] == [("sCM alone",), ("DMD alone",)]
