"""Guidance against closed forms: classes of a mixture, whose scores and classifier are exact."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import ds
from ds import analytic, grids, predictions, solvers
from ds.cli.__main__ import main
from ds.diffusion.guidance import ClassifierFree, ClassifierGuidance
from ds.diffusion.schedules import EDM, Linear, LinearBeta, Trig
from ds.evaluation.metrics import sliced_wasserstein
from ds.models.execution import Execution
from ds.models.pretrained import fingerprint
from ds.nets import ClassifierConfig, MLPConfig
from ds.nets.base import NO_CLASS
from ds.system.config import from_json, to_json
from tests.nets.test_unet import TINY as NET
from tests.nets.test_unet import build

DATA = analytic.GaussianMixture()
GRID = grids.quadratic(16)
PATHS = [(LinearBeta(), 300), (EDM(), 0.7), (Linear(), 0.4), (Trig(0.5), 0.9)]
every_path = pytest.mark.parametrize(("schedule", "t"), PATHS, ids=repr)


def classifier(schedule):
    """The exact classifier of noisy points."""
    return lambda x, t: DATA.class_logits(x, *schedule.gather(t, x))


def by_label(schedule=None, scale=1.0, prediction=None, **options):
    net = DATA.teacher(solvers.DDIM(), (1e-3,), schedule, prediction, conditional=True)
    return ds.Guided(net.denoiser, scale, **options)


def by_classifier(schedule=None, scale=1.0, **options):
    plain = DATA.teacher(solvers.DDIM(), (1e-3,), schedule).denoiser
    return ds.ClassifierGuided(plain, classifier(plain.schedule), scale, **options)


def points(n=6):
    return ds.noise(3, range(n), DATA.shape, dtype=torch.float64), torch.arange(n) % 3


class Spy(nn.Module):
    """A network that counts its calls and rows."""

    def __init__(self, net):
        super().__init__()
        self.net, self.shape, self.rows = net, net.shape, []

    def forward(self, x, t, **cond):
        self.rows.append(len(x))
        return self.net(x, t, **cond)


def spied(denoiser):
    return replace(denoiser, net=Spy(denoiser.net))


@pytest.mark.parametrize("guided", [by_label, by_classifier])
def test_only_scale_1_reproduces_the_class(guided):
    def distance(scale, n):
        z, label = ds.noise(0, range(n), DATA.shape), torch.zeros(n, dtype=torch.int64)
        exact = DATA.sample(1, range(n), label)
        denoiser = guided(scale=scale).given(label=label)
        x = ds.Teacher(denoiser, solvers.UniPC(), GRID).sample(z)
        return sliced_wasserstein(x, exact)

    assert distance(1, 8192) <= 0.05  # two exact samples of that size are about 0.03 apart
    assert distance(0, 1024) > 0.8 and distance(3, 1024) > 0.15


@pytest.mark.parametrize("guided", [by_label, by_classifier])
@pytest.mark.parametrize("scale", [-0.5, 0, 1, 3.5])
@every_path
def test_guidance_is_the_score_of_p_times_the_classifier_s_power(guided, scale, schedule, t):
    (x, label), (alpha, sigma) = points(), schedule.at(t)
    x.requires_grad_()
    share = DATA.class_logits(x, alpha, sigma).gather(1, label[:, None]).sum()
    variance = alpha**2 * DATA.std**2 + sigma**2
    away = (x[:, None] - alpha * DATA.centres(x)).square().sum(-1)
    density = (
        (torch.tensor(DATA.weights, dtype=torch.float64).log() - away / (2 * variance))
        .logsumexp(1)
        .sum()
    )
    (score,) = torch.autograd.grad(density + scale * share, x)
    x = x.detach()
    found = guided(schedule, scale).given(label=label)(x, t)
    torch.testing.assert_close(found.eps, -sigma * score, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.x0, (x + sigma**2 * score) / alpha, rtol=0, atol=1e-10)
    each = guided(schedule, scale).given(label=label)(x, torch.full((6,), float(t)))
    torch.testing.assert_close(each, found, rtol=0, atol=1e-6)  # times are float32


@pytest.mark.parametrize(
    "prediction", ["x0", "v", predictions.Velocity(), predictions.TrigFlow(0.5), "preconditioned"]
)
def test_every_prediction_is_guided_alike(prediction):
    x, label = points()
    eps, other = (
        by_label(LinearBeta(), 2.5, p).given(label=label)(x, 400) for p in ("eps", prediction)
    )
    torch.testing.assert_close(other, eps, rtol=0, atol=1e-6)  # c_noise is float64, times float32


@pytest.mark.parametrize("guided", [by_label, by_classifier])
def test_the_interval_leaves_its_lower_end_out_and_has_its_upper_end(guided):
    x, label = points()
    plain = DATA.teacher(solvers.DDIM(), (1e-3,), EDM()).denoiser
    if guided is by_label:
        plain = replace(plain, cond={"label": label})
    denoiser = guided(EDM(), 3.0, interval=(0.5, 2.0)).given(label=label)
    always = guided(EDM(), 3.0).given(label=label)
    levels = [0.4, 0.5, 0.501, 2.0, 2.001]
    for sigma, inside in zip(levels, [False, False, True, True, False], strict=True):
        expected = (always if inside else plain)(x, sigma)
        torch.testing.assert_close(denoiser(x, sigma), expected, rtol=0, atol=1e-12)
    # rows at levels of their own
    t, x, label = torch.tensor(levels).double(), x[:5], label[:5]
    each = denoiser.given(label=label)(x, t)
    for i, sigma in enumerate(t.tolist()):
        one = denoiser.given(label=label[i : i + 1])(x[i : i + 1], sigma)
        torch.testing.assert_close(each.x0[i : i + 1], one.x0, rtol=0, atol=1e-12)


def test_each_row_may_have_a_scale_of_its_own_and_no_class_is_not_guided():
    x, label = points()
    scales = torch.tensor([0.0, 1.0, 2.0, 5.0, -1.0, 7.0])
    label[5] = NO_CLASS
    found = by_label(scale=None).given(label=label, guidance=scales)(x, 200).x0
    for i in range(6):
        row = slice(i, i + 1)
        one = by_label(scale=float(scales[i])).given(label=label[row])(x[row], 200).x0
        torch.testing.assert_close(found[row], one, rtol=0, atol=1e-12)
    free = DATA.teacher(solvers.DDIM(), GRID).denoiser(x, 200).x0
    torch.testing.assert_close(found[5], free[5], rtol=0, atol=1e-12)
    assert not torch.allclose(found[3], free[3])


@pytest.mark.parametrize(
    ("scale", "interval", "rows"),
    [(3.0, None, [8]), (None, None, [8]), (1, None, [4]), (0, None, [4]), (3.0, (0.1, 0.2), [4])],
)
def test_a_guided_call_is_one_batch_of_both_halves_where_both_are_needed(scale, interval, rows):
    x, label = points(4)
    denoiser = spied(by_label(LinearBeta(), scale, interval=interval))
    denoiser.given(label=label, **({"guidance": torch.ones(4)} if scale is None else {}))(x, 500)
    assert denoiser.net.rows == rows


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_guided_network_keeps_its_learned_variance_whatever_the_number_of_rows(count):
    x, label = points(count)
    cond = {"label": label}

    def net(x, t, label):
        return torch.cat([x * (label[:, None] + 2), x + label[:, None]], 1)

    out = ClassifierFree(3.0).out(net, x, torch.zeros(count), cond, 1.0)
    mean = x + 3 * ((label[:, None] + 2) * x - x)  # without a label, -1, the network returns x
    torch.testing.assert_close(out, torch.cat([mean, x + label[:, None]], 1))


@pytest.mark.parametrize("solver", [solvers.DDIM(), solvers.Heun(), solvers.UniPC()], ids=repr)
def test_the_cost_of_a_sample_counts_both_halves(solver):
    z, label = points(1)
    for interval in (None, (0.5, 2.0)):
        teacher = ds.Teacher(by_label(None, 3.0, interval=interval), solver, grids.uniform(10))
        net = Spy(teacher.net)
        found = replace(teacher, denoiser=teacher.using(net).denoiser.given(label=label))
        found.sample(z)
        assert teacher.nfe == sum(net.rows)
        assert (teacher.nfe == 2 * solver.nfe(teacher.grid)) == (interval is None)
    net.rows.clear()
    found.call(z)
    assert net.rows == [1]  # so that its time, times nfe, is that of a sample


def test_a_row_costs_a_second_evaluation_where_a_scale_moves_it_and_never_for_a_classifier():
    inside = 0.5, 2.0
    costs = {scale: ClassifierFree(scale, inside).evaluations(1.0) for scale in (0.0, 1.0, 1.5)}
    assert costs == {0.0: 1, 1.0: 1, 1.5: 2}
    assert ClassifierFree(None, inside).evaluations(1.0) == 2
    assert [ClassifierFree(3.0, inside).evaluations(r) for r in (0.4, 2.1)] == [1, 1]
    assert ClassifierGuidance(len, 3.0, inside, 3).evaluations(1.0) == 1


@pytest.mark.parametrize("schedule", [Linear(), EDM()], ids=repr)
def test_the_first_call_costs_what_the_interval_says_even_without_any_signal(schedule):
    denoiser = by_label(schedule, 3.0, interval=(0.0, 1e9))
    grid = schedule.noise, schedule.time(0.0)
    found = solvers.evaluations(denoiser, solvers.DDIM(), grid)
    assert found == (3 if schedule.at(schedule.noise)[0] == 0 else 4)


def test_a_classifier_on_another_device_is_named():
    x, label = points()
    plain = DATA.teacher(solvers.DDIM(), (9, 0)).denoiser
    elsewhere = ds.ClassifierGuided(plain, nn.Linear(2, 3, device="meta"), 2.0)
    words = "the classifier is on meta, the samples are on cpu; move it with classifier.to"
    with pytest.raises(ValueError, match=words):
        elsewhere.given(label=label)(x, 10)


def test_a_classifier_s_gradient_follows_the_clipping_and_is_not_clipped_again():
    x, label = points()
    denoiser = by_classifier(None, 4.0).given(label=label)
    seen = []

    class Seen(solvers.AbstractSolver):
        order = 1

        def step(self, denoiser, x, t, s, state, draws=None):
            seen.append(denoiser(x, t))
            return x, None

    solvers.Clipped(Seen(), limit=0.3, rederive=True).step(denoiser, x, 400, 300, None)
    alpha, sigma = LinearBeta().at(400)
    parts = denoiser.parts(x, 400)
    x0 = parts.x0.clamp(-0.3, 0.3)
    eps = (x - alpha * x0) / sigma - sigma * parts.gradient  # Algorithm 2
    torch.testing.assert_close(seen[0].eps, eps, rtol=0, atol=1e-12)
    torch.testing.assert_close(seen[0].x0, (x - sigma * eps) / alpha, rtol=0, atol=1e-12)
    assert seen[0].x0.abs().max() > 0.4


def test_a_classifier_that_is_a_network_is_told_the_label_s_row_and_trains_nothing():
    torch.manual_seed(0)
    judge = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 3)).double()
    net = MLPConfig(dim=2, width=8, depth=1, classes=3).build().double()
    x, label = points()
    ours = ds.Denoiser(net, LinearBeta())
    denoiser = ds.ClassifierGuided(ours, lambda x, t: judge(x * (t / 100)[:, None]), 2.0)
    with torch.inference_mode():
        inferred = denoiser.given(label=label)(x.clone(), 100)
    assert not inferred.x0.requires_grad
    at = x.clone().requires_grad_()
    judge(at).log_softmax(1)[torch.arange(6), label].sum().backward()
    plain = net(x, torch.full((6,), 100), label=label)
    expected = plain - 2.0 * LinearBeta().at(100)[1] * at.grad
    torch.testing.assert_close(inferred.eps, expected.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("guided", [by_label, by_classifier])
def test_guidance_without_labels_is_one_clear_line(guided):
    with pytest.raises(ValueError, match=r"needs a label .*denoiser\.given\(label="):
        guided(scale=2.0)(points()[0], 10)


@pytest.mark.parametrize("guided", [by_label, by_classifier])
def test_labels_of_other_samples_are_one_clear_line(guided):
    x, label = points()
    with pytest.raises(ValueError, match=r"a label for each of 6 samples, not \[5\]"):
        guided(scale=2.0).given(label=label[:5])(x, 10)


def test_a_classifier_is_asked_for_classes_that_it_has_and_guides_no_row_without_one():
    x, label = points()
    free = by_classifier(scale=2.0).given(label=torch.full((6,), NO_CLASS))(x, 10)
    assert torch.equal(free.x0, DATA.teacher(solvers.DDIM(), (9, 0)).denoiser(x, 10).x0)
    with pytest.raises(ValueError, match="label 3 does not exist; the model has classes 0 to 2"):
        by_classifier(scale=2.0).given(label=label + 1)(x, 10)
    strange = ds.ClassifierGuided(DATA.teacher(solvers.DDIM(), (9, 0)).denoiser, torch.sin, 2.0)
    with pytest.raises(ValueError, match=r"must return logits \[6, K\], not \[5, 2\]"):
        guidance = replace(strange.guidance, classifier=lambda x, t: x[:5])
        replace(strange, guidance=guidance).given(label=label)(x, 10)


def test_a_network_without_classes_is_not_guided_by_labels():
    with pytest.raises(ValueError, match=r"needs a network with classes.*ds\.ClassifierGuided"):
        ds.Guided(ds.Denoiser(MLPConfig(dim=2).build(), LinearBeta()), 2.0)


def test_a_scale_that_nobody_gives_is_one_clear_line():
    x, label = points()
    with pytest.raises(ValueError, match=r"no scale.*given\(guidance="):
        by_label(scale=None).given(label=label)(x, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "3"}, "scale must be a number"),
        ({"scale": float("nan")}, "scale must be"),
        ({"interval": (2.0, 1.0)}, "interval must rise"),
        ({"interval": (1.0, 1.0)}, "interval must rise"),
        ({"interval": (1.0,)}, "interval must be"),
        ({"interval": (-1.0, 1.0)}, "interval must rise"),
    ],
)
def test_what_is_no_guidance_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ClassifierFree(**{"scale": 2.0, **change})
    with pytest.raises(ValueError, match=message):
        ClassifierGuidance(**{"classifier": torch.sin, "scale": 2.0, **change})


def test_guidance_is_given_once():
    with pytest.raises(ValueError, match="guided already"):
        ds.Guided(by_label(), 2.0)


def test_classifier_guidance_from_where_there_is_no_signal_is_refused():
    x, label = points()
    with pytest.raises(ValueError, match="alpha is 0"):
        by_classifier(Linear()).given(label=label)(x, 1.0)


def guided_teacher(**options):
    net = MLPConfig(dim=2, width=8, depth=1, classes=3).build()
    denoiser = ds.Guided(ds.Denoiser(net, LinearBeta()), **{"scale": 2.0, **options})
    return ds.Teacher(denoiser, solvers.DDIM(), grids.uniform(4))


def test_a_guided_teacher_is_saved_and_loaded(tmp_path):
    teacher = guided_teacher(interval=(0.5, 3.0))
    teacher.save_pretrained(tmp_path / "t")
    there = ds.load_teacher(tmp_path / "t")
    assert there.denoiser.guidance == teacher.denoiser.guidance
    assert fingerprint(there.denoiser) == fingerprint(teacher.denoiser)
    assert there.nfe == teacher.nfe
    value = teacher.denoiser.guidance
    assert from_json(json.loads(json.dumps(to_json(value)))) == value


def test_a_teacher_guided_by_a_classifier_is_not_saved(tmp_path):
    net = MLPConfig(dim=2, width=8, depth=1).build()
    denoiser = ds.ClassifierGuided(ds.Denoiser(net, LinearBeta()), torch.sin, 2.0)
    with pytest.raises(ValueError, match="guided by a classifier cannot be saved"):
        ds.Teacher(denoiser, solvers.DDIM(), (10, 0)).save_pretrained(tmp_path / "t")


def test_fingerprints_tell_guidance_apart():
    teacher, judge = guided_teacher(), nn.Linear(2, 3)
    plain = replace(teacher.denoiser, guidance=None)
    found = {
        fingerprint(plain),
        fingerprint(teacher.denoiser),
        fingerprint(ds.Guided(plain, 3.0)),
        fingerprint(ds.Guided(plain, 2.0, (0.1, 1.0))),
        fingerprint(ds.ClassifierGuided(plain, judge, 2.0)),
        fingerprint(ds.ClassifierGuided(plain, nn.Linear(2, 3), 2.0)),
    }
    assert len(found) == 6
    assert fingerprint(ds.ClassifierGuided(plain, judge, 2.0)) in found


TINY = replace(NET, classes=3)


def guided_pictures(scale=2.5, **options):
    denoiser = ds.Guided(ds.Denoiser(build(TINY), LinearBeta()), scale, **options)
    return ds.Teacher(denoiser, solvers.UniPC(), grids.uniform(4))


@pytest.mark.parametrize("options", [{}, {"scale": None}, {"interval": (0.1, 1.0)}], ids=str)
def test_every_way_to_run_a_network_runs_a_guided_one(options):
    teacher = guided_pictures(**options)
    asked = ds.Conditions((0, 2), (1.0, 4.0) if options.get("scale", 1) is None else None)
    z, index = ds.noise(7, range(5), teacher.shape), torch.arange(5)
    expected = teacher.sample(z, cond=asked.draw(7, index))
    for mode in ("eager", "engine"):
        options = {"execution": ds.Execution(mode=mode), "conditions": asked}
        sampler = ds.Sampler(teacher, batch_size=3, **options)
        found = torch.cat([*sampler.batches(7, range(5))])
        assert (found - expected).norm() < 1e-4 * expected.norm()
    assert Execution.default(teacher).mode == "engine"


def test_a_classifier_guides_pictures_of_an_unlabelled_network_in_the_engine():
    judge = build(
        ClassifierConfig(
            image_size=8,
            in_channels=2,
            num_classes=3,
            channels=8,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(4,),
            norm_groups=4,
            head_channels=8,
        )
    )
    plain = ds.Denoiser(build(NET), LinearBeta())
    guided = ds.ClassifierGuided(plain, judge, 100.0)
    teacher, free = (ds.Teacher(d, solvers.DDIM(), grids.uniform(4)) for d in (guided, plain))
    assert (teacher.takes, teacher.classes) == (("label",), 3)
    engine = ds.Execution(mode="engine")
    found, expected = (
        torch.cat([*ds.Sampler(teacher, batch_size=4, execution=e).batches(0, range(4))])
        for e in (engine, ds.Execution())
    )
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (found - free.sample(ds.noise(0, range(4), free.shape))).norm() > 0.01 * found.norm()


def test_pairs_of_a_guided_teacher_are_its_samples_and_say_so(tmp_path):
    teacher = guided_teacher(interval=(0.1, 3.0))
    store = ds.generate_pairs(teacher, tmp_path / "p", 8, conditions=ds.Conditions((1, 2)))
    z, label = ds.noise(0, range(8), (2,)), store.labels(range(8))
    expected = teacher.sample(z, cond={"label": label})
    torch.testing.assert_close(store.images(torch.arange(8)), expected)
    about = json.loads((tmp_path / "p" / "manifest.json").read_text())["teacher"]
    assert about["guidance"]["scale"] == 2.0 and about["sha256"] == fingerprint(teacher.denoiser)
    plain = replace(teacher, denoiser=replace(teacher.denoiser, guidance=None))
    with pytest.raises(ValueError, match="holds a store made otherwise"):
        ds.generate_pairs(plain, tmp_path / "p", 8, conditions=ds.Conditions((1, 2)))


def test_a_student_of_a_guided_teacher_asks_for_the_label_and_where_it_varies_the_scale():
    from ds.methods import RectifiedFlow

    for scale, takes in ((2.0, {"label"}), (None, {"label", "guidance"})):
        modules = RectifiedFlow().init(guided_teacher(scale=scale))
        assert {*modules["student"].config.takes} == takes


def test_a_guided_teacher_is_not_written_for_diffusers_which_keeps_no_guidance(tmp_path, capsys):
    guided_pictures().save_pretrained(tmp_path / "t")
    command = ["convert", str(tmp_path / "t"), str(tmp_path / "d"), "--to", "diffusers"]
    assert main(command) == 2 and not (tmp_path / "d").exists()
    assert "diffusers keeps no guidance" in capsys.readouterr().err
