"""PosteriorMeanFlow: what its rows are told, its steps, and the noise that a sample takes."""

import pytest
import torch

import ds
from ds.analytic import GaussianMixture
from ds.diffusion.noise import Draws
from ds.methods import MeanFlow, PosteriorMeanFlow, Progress
from ds.methods.base import built
from ds.methods.proof import Formula
from ds.models.export import to_program
from ds.models.student import Student
from ds.models.teacher import Teacher
from ds.nets import MLPConfig, UNetConfig
from ds.pairs.sources import Batch

TOLD = ("h", "outer", "context")
METHOD, Z = PosteriorMeanFlow(), ds.noise(0, range(6), (2,))


def draws(seed=0, count=6):
    return Draws(seed, torch.arange(count))


@pytest.fixture(scope="module")
def net():
    return built(MLPConfig(conditions=TOLD, width=32, depth=2)).eval()


@torch.no_grad()
def test_a_row_is_told_a_noisy_x0_at_an_even_time_whose_noise_is_not_that_of_the_inner_flow():
    seen, index = {}, torch.arange(10_000)
    x0, z = ds.noise(1, index, (2,)), ds.noise(2, index, (2,))

    def spy(y, s, **told):
        seen.update(told, y=y, s=s)
        return y

    rows = Batch(x0, z, index, Draws(0, index))
    METHOD.loss({"student": Formula(spy)}, rows, Progress(0, 1))
    t, s = seen["outer"][:, None], seen["s"][:, None]
    torch.testing.assert_close(seen["y"], (1 - s) * x0 + s * z)
    assert torch.histc(t, 10, 0, 1).sub(1000).abs().max() < 150
    early = (t < 0.9)[:, 0]
    e = ((seen["context"] / (1 - t) - (1 - t) * x0) / t)[early]  # the noise of x_t
    assert (e.mean(0).abs() < 0.04).all() and (e.var(0) - 1).abs().max() < 0.05
    for other in (x0, z):
        assert (e * other[early]).mean(0).abs().max() < 0.04


@pytest.mark.parametrize(
    ("inner", "nfe", "steps"),
    [
        (2, 1, (1, 1)),
        (2, 2, (1, 2)),
        (2, 4, (2, 2)),
        (2, 8, (4, 2)),
        (1, 3, (3, 1)),
        (4, 3, (1, 3)),
    ],
)
def test_calls_are_split_into_outer_steps_and_calls_of_each(net, inner, nfe, steps):
    method, counted = PosteriorMeanFlow(inner=inner), []

    def count(y, s, h, outer, context):
        counted.append((outer[0].item(), s[0].item(), h[0].item()))
        return net(y, s, h=h, outer=outer, context=context)

    assert method.split(nfe) == steps
    method.sample(Formula(count), Z, nfe=nfe, draws=draws())
    outer, calls = steps
    expected = [
        (1 - i / outer, 1 - j / calls, 1 / calls) for i in range(outer) for j in range(calls)
    ]
    torch.testing.assert_close(torch.tensor(counted), torch.tensor(expected))


def test_calls_that_are_no_whole_number_of_draws_are_refused(net):
    with pytest.raises(
        ValueError, match=r"nfe is 5; accepted are up to 2 calls, and multiples of 2"
    ):
        METHOD.sample(net, Z, nfe=5, draws=draws())


@torch.no_grad()
def test_one_outer_step_is_mean_flow_and_takes_no_noise_but_z(net):
    blank = {"outer": torch.ones(6), "context": torch.zeros(6, 2)}
    for nfe in (1, 2):
        x = METHOD.sample(net, Z, nfe=nfe)
        assert torch.equal(x, METHOD.flow.sample(net, Z, nfe=nfe, cond=blank))


@torch.no_grad()
def test_more_outer_steps_are_stochastic_and_need_draws(net, tmp_path):
    with pytest.raises(ValueError, match="adds noise at each step; pass draws"):
        METHOD.sample(net, Z, nfe=4)
    a, again, b = (METHOD.sample(net, Z, nfe=4, draws=draws(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, again)
    assert (a - b).abs().amin(1).min() > 1e-3  # of the same z
    several = Student(net, METHOD, nfe=4)
    for run in (ds.Sampler(several).sample, lambda z: to_program(several, tmp_path / "x.pt2")):
        with pytest.raises(ValueError, match="adds noise at each step; pass draws"):
            run(Z)


@torch.no_grad()
def test_exact_draws_have_the_figures_of_the_posterior_and_others_have_not(net):
    data, z = GaussianMixture(), ds.noise(0, range(2000), (2,))

    def exact(y, s, h, outer, context):
        t = outer[0].item()
        truth = data.posterior(context[0] / (1 - t), 1 - t, t) if t < 1 else data
        return (y - truth.sample(0, range(len(y)))) / h[:, None]

    for check in METHOD.measure(Formula(exact), z):
        assert check.value < 0.03 and check.controls["x_t ignored"] > 0.1, check
    for check in METHOD.measure(net, z):
        assert check.value > 0.1 and check.controls["inner noise fixed"] > 0.1, check


def test_guidance_of_the_inner_flow_needs_classes(net):
    teacher = Teacher(ds.Denoiser(net, ds.schedule.LinearBeta()), ds.solvers.DDIM(), (800,))
    with pytest.raises(ValueError, match=r"guidance 2.0 .* need a network with classes"):
        PosteriorMeanFlow(flow=MeanFlow(guidance=2.0)).init(teacher)


def test_a_network_in_the_inner_flow_is_refused():
    with pytest.raises(ValueError, match=r"flow.student .* is not used; set `student` itself"):
        PosteriorMeanFlow(flow=MeanFlow(student=MLPConfig()))


@torch.no_grad()
def test_a_student_of_several_draws_runs_in_the_engine():
    config = UNetConfig(
        image_size=8,
        in_channels=1,
        channels=8,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        norm_groups=4,
        conditions=TOLD,
    )
    student = Student(built(config).eval(), METHOD, nfe=4)
    sampler = ds.Sampler(student, batch_size=2)
    assert sampler.execution.mode == "engine"
    (found,) = sampler.batches(3, range(2))
    expected = student.sample(ds.noise(3, range(2), (1, 8, 8)), draws=draws(3, 2))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_student_of_one_draw_is_exported(net, tmp_path):
    student = Student(net, METHOD, nfe=2)
    to_program(student, tmp_path / "once.pt2")
    program = torch.export.load(tmp_path / "once.pt2").module()
    torch.testing.assert_close(program(Z), student.sample(Z), rtol=0, atol=1e-5)
