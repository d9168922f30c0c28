"""verify: what passes, what fails, and a method in a file that the library has never seen."""

import importlib.util
import json
import sys
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch

import ds
from ds.evaluation.scores import even_noise
from ds.evaluation.verify import DATA, POINTS, Verification, _exact, verify
from ds.methods import (
    AbstractMethod,
    ConsistencyDistillation,
    DenoisingStudent,
    MeanFlow,
    RectifiedFlow,
)
from ds.methods.proof import Check, Formula, Misuse, Trial
from ds.models.teacher import Teacher
from ds.nets import MLPConfig
from ds.pairs.sources import Images
from ds.system.config import from_json, to_json
from ds.training.trainer import Trainer
from tests.combinations import slow

SHORT = 250  # steps; the bars of the methods are made for 2000
MADE = {}


def figures(method: AbstractMethod) -> dict[str, Check]:
    """The checks of a method after a short training, made once for all tests."""
    if method not in MADE:
        MADE[method] = verify(method, steps=SHORT, controls=False)
    return {check.metric: check for check in MADE[method].checks}


@pytest.mark.parametrize(
    ("method", "metric", "bar"),
    [
        (DenoisingStudent(), "distance, 1 call", 0.13),
        slow(RectifiedFlow(), "stage 1: distance, 100 calls", 0.28),
        slow(RectifiedFlow(), "stage 2: distance, 1 call", 0.28),
        slow(RectifiedFlow(), "distance, 1 call", 0.28),
        slow(RectifiedFlow(), "agreement with the exact ODE", 0.88),
        slow(MeanFlow(), "agreement with the exact ODE", 0.85),
        slow(ConsistencyDistillation(), "distance, 1 call", 0.6),
        slow(ConsistencyDistillation(), "agreement with the exact ODE", 0.8),
    ],
)
def test_a_short_training_passes_bars_of_its_own_and_its_control_fails_them(method, metric, bar):
    check = figures(method)[metric]._replace(bar=bar)
    assert check.passed, check


@dataclass(frozen=True)
class Shuffled(AbstractMethod):
    """A method on pairs of noise and the end of another noise."""

    feeds = "pairs"
    inner: AbstractMethod = field(default_factory=DenoisingStudent)

    def init(self, teacher):
        return self.inner.init(teacher)

    def loss(self, modules, batch, progress):
        return self.inner.loss(modules, batch._replace(x0=batch.x0.roll(1, 0)), progress)

    def times(self, nfe):
        return self.inner.times(nfe)

    def sample(self, net, z, *, nfe=1, cond=None, draws=None):
        return self.inner.sample(net, z, nfe=nfe)

    def trial(self):
        return Trial(bars={1: 0.1})


REFLOW = RectifiedFlow(feeds="pairs", reflow=0, time_scale=1.0)


@pytest.mark.parametrize(
    ("right", "wrong", "bar"),
    [
        pytest.param(DenoisingStudent(), Shuffled(), 0.13, id="regression"),
        slow(RectifiedFlow(), Shuffled(REFLOW), 0.28, id="reflow"),
    ],
)
def test_a_method_on_shuffled_pairs_fails(right, wrong, bar):
    value, control = (figures(method)["distance, 1 call"].value for method in (right, wrong))
    assert value < bar < 0.8 < control


class SelfTaught(ConsistencyDistillation):
    """A consistency model that is its own target."""

    losses: ClassVar[list[float]] = []

    def loss(self, modules, batch, progress):
        loss = super().loss(modules, batch, progress)
        self.losses.append(loss.item())
        return loss

    def ends(self, modules, batch, i):
        f, _ = super().ends(modules, batch, i)
        return f, f.detach()

    def identity(self):
        return ()


@pytest.mark.slow
def test_a_consistency_model_that_is_its_own_target_has_no_loss_and_learns_nothing():
    check = figures(SelfTaught())["distance, 1 call"]
    assert {*SelfTaught.losses} == {0.0}
    assert check.value > 0.9 * check.control > 0.8


def test_the_reference_is_where_the_exact_ode_ends():
    some = slice(0, POINTS, 64)
    ends = DATA.flow(even_noise(POINTS, 2)[some], (0.0, 1.0), (1.0, 0.0))
    assert (_exact(0)[some] - ends).square().mean().sqrt() < 2e-3


def test_a_verification_passes_if_every_check_does_and_there_is_one():
    right, wrong = Check("right", 1.0, 2.0, {"off": 3.0}), Check("wrong", 3.0, 2.0)
    made = [Verification(MeanFlow(), checks, 1.0) for checks in ((right,), (right, wrong), ())]
    assert [one.passed for one in made] == [True, False, False]
    assert "pass" in made[0].table() and "FAIL" not in made[0].table()
    assert made[1].table().count("FAIL") == 1
    record = json.loads(json.dumps(made[1].record()))
    assert record["method"] == to_json(MeanFlow()) | {"type": "mean_flow"}
    assert [(c["metric"], c["controls"], c["passed"]) for c in record["checks"]] == [
        ("right", {"off": 3.0}, True),
        ("wrong", {}, False),
    ]


@pytest.mark.parametrize(("options", "said"), [({"steps": 0}, "steps"), ({"seed": -1}, "seed")])
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ValueError, match=f"verify: {said} must be at least"):
        verify(MeanFlow(), **options)


# The smallest method: one call, taught by data that the noise has nothing to do with.
OWN = '''
from dataclasses import dataclass

from torch import nn

from ds.methods import AbstractMethod
from ds.methods.base import student_net
from ds.methods.proof import NOISE, Check, Formula, Trial, exact


@dataclass(frozen=True)
class Halfway(AbstractMethod):
    """Go a part of the way that the network says."""

    feeds = "images"
    share: float = 0.5

    def init(self, teacher):
        return nn.ModuleDict({"student": student_net(teacher, None)})

    def loss(self, modules, batch, progress):
        return (self.sample(modules["student"], batch.noise) - batch.x0).square().mean()

    def times(self, nfe):
        if nfe != 1:
            raise ValueError(f"Halfway: 1 call, not {nfe}")
        return (0,)

    def sample(self, net, z, *, nfe=1, cond=None, draws=None):
        (t,) = self.times(nfe)
        return z - self.share * net(z, z.new_full((len(z),), t))

    def identity(self):
        stay = self.sample(Formula(lambda z, t: 0 * z), NOISE)
        return (exact("no way to go", stay - NOISE, some_way=stay - 2 * NOISE),)

    def trial(self):
        return Trial(bars={1: 10.0}, steps=20)
'''


@pytest.fixture
def own(tmp_path):
    """A method of a file that the library does not hold."""
    (tmp_path / "halfway.py").write_text(OWN)
    spec = importlib.util.spec_from_file_location("halfway", tmp_path / "halfway.py")
    module = sys.modules["halfway"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.Halfway
    del sys.modules["halfway"]


def test_a_method_in_a_file_is_trained_resumed_sampled_and_verified(own, tmp_path):
    method = own(share=0.25)
    assert from_json(to_json(method), [own]) == method
    denoiser = ds.Denoiser(MLPConfig(width=16).build(), ds.schedule.LinearBeta())
    teacher = Teacher(denoiser, ds.solvers.DDIM(), (800, 400, 0))
    rows = Images(DATA.sample(0, range(256)))
    config = ds.TrainConfig(batch_size=64, epochs=2, warmup_steps=0, lr=1e-2, check_every=4)

    whole = ds.Trainer(method, teacher, rows, rows, tmp_path / "whole", config).fit()
    half = replace(config, epochs=1)
    ds.Trainer(method, teacher, rows, rows, tmp_path / "run", half).fit()
    again = ds.Trainer(method, teacher, rows, rows, tmp_path / "run", config).fit()
    assert all(map(torch.equal, whole.parameters(), again.parameters()))

    student = method.result(again)
    student.save_pretrained(tmp_path / "student")
    loaded = ds.load_student(tmp_path / "student", types=[own])
    z = ds.noise(0, range(4), (2,))
    assert torch.equal(loaded.sample(z), student.sample(z))
    assert (loaded.method, loaded.sample(z).shape) == (method, z.shape)

    found = ds.verify(method, controls=False)
    assert [check.metric for check in found.checks] == ["no way to go", "distance, 1 call"]
    assert [check.passed for check in found.checks] == [True, False]  # 10 is a bar for nobody


@dataclass(frozen=True)
class Bare(Shuffled):
    def trial(self):
        return AbstractMethod.trial(self)


def test_a_method_that_declares_nothing_is_trained_all_the_same():
    (check,) = verify(Bare(), steps=20).checks
    assert (check.metric, check.bar) == ("distance, 1 call", Trial().bars[1])


SIZE = "mean square of the samples"


@dataclass(frozen=True)
class Still(Shuffled):
    """A method that leaves the noise as it is."""

    def sample(self, net, z, *, nfe=1, cond=None, draws=None):
        return z


@dataclass(frozen=True)
class Furnished(Shuffled):
    """A method with everything that a trial can ask for."""

    def trial(self):
        return Trial(
            bars={1: 10.0},
            controls={"own": {"inner": DenoisingStudent(gain=1.0)}, "another": Still()},
            shares={1: 0.5},
            misused={"not called": Misuse(lambda net: Formula(lambda z, t: 0 * z), 0.3)},
        )

    def measure(self, net, z):
        own = Check("with its own control", 0.0, 1.0, {"its own": 2.0})
        return Check(SIZE, float(self.sample(net, z).square().mean()), share=0.5), own


@pytest.fixture
def quick(monkeypatch):
    """Few points, and a distance that is not worth its name but takes no time."""
    monkeypatch.setattr("ds.evaluation.verify.POINTS", 64)
    monkeypatch.setattr("ds.evaluation.verify._noise", lambda: even_noise(64, 2))
    monkeypatch.setattr("ds.evaluation.verify._exact", lambda seed, _: even_noise(64, 2, seed))
    monkeypatch.setattr(
        "ds.evaluation.verify.sliced_wasserstein", lambda a, b: float((a - b).std())
    )


def test_a_control_may_be_another_method_and_a_bar_a_share_of_the_controls(quick):
    found = {check.metric: check for check in verify(Furnished(), steps=10).checks}
    assert [*found] == [
        "distance, 1 call",
        "beside controls: distance, 1 call",
        "not called: distance, 1 call",
        SIZE,
        "with its own control",
    ]
    first, share, misused, size, own = found.values()
    assert own.controls == {"its own": 2.0}
    assert [*first.controls] == ["untrained", "own", "another"]
    assert [*share.controls] == [*size.controls] == ["own", "another"]
    for check in (share, size):
        assert check.bar == 0.5 * min(check.controls.values())
    assert size.controls["another"] == pytest.approx(1.0, abs=0.1)  # measured with its own sample
    assert share.controls["another"] == misused.value  # nothing of the network in both
    assert misused.at_least and misused.bar == 0.3 < misused.value
    assert misused.controls == {"used well": first.value}


@dataclass(frozen=True)
class Rivalled(Shuffled):
    """A method with a rival that samples as well, on a mixture of its own."""

    def trial(self):
        own, data = {"inner": DenoisingStudent(gain=1.0)}, replace(DATA, std=0.5)
        return Trial(bars={1: 10.0}, controls={"own": own}, rivals={"rival": Still()}, data=data)

    def measure(self, net, z):
        size = float(self.sample(net, z).square().mean())
        about = {"all": (), "one": ("own",), "other": ("rival",)}
        return tuple(Check(name, size, 9.0, against=names) for name, names in about.items())


def test_a_rival_need_not_miss_the_bar_and_a_check_names_whom_it_is_held_against(quick):
    found = {check.metric: check for check in verify(Rivalled(), steps=5).checks}
    assert [*found["distance, 1 call"].controls] == ["untrained", "own"]
    controls = {name: [*found[name].controls] for name in ("all", "one", "other")}
    assert controls == {"all": ["own", "rival"], "one": ["own"], "other": ["rival"]}


def test_a_trial_may_have_a_mixture_of_its_own(quick, monkeypatch):
    seen = []

    def exact(seed, data):
        seen.append(data)
        return even_noise(64, 2, seed)

    monkeypatch.setattr("ds.evaluation.verify._exact", exact)
    verify(Rivalled(), steps=5, controls=False)
    assert {*seen} == {replace(DATA, std=0.5)}


@dataclass(frozen=True)
class Alternating(Shuffled):
    """A method that takes two turns in a step."""

    turns: ClassVar = ("student", "student")


def test_a_trial_takes_its_steps_however_many_turns_each_has(quick, monkeypatch):
    taken = []
    fit = Trainer.fit

    def counted(self):
        taken.append(self.steps)
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", counted)
    for method in (Shuffled(), Alternating()):
        verify(method, steps=7, controls=False)
    assert taken == [7, 7]


def test_earlier_stages_are_measured_too(quick):
    method = RectifiedFlow(reflow=2, steps=2)
    found = [check.metric for check in verify(method, steps=5, controls=False).checks]
    assert {"stage 2: straightness", "stage 3: straightness"} <= {*found}


def test_what_is_relative_to_controls_is_left_out_without_them(quick):
    found = verify(Furnished(), steps=10, controls=False).checks
    metrics = ["distance, 1 call", "not called: distance, 1 call", "with its own control"]
    assert [check.metric for check in found] == metrics


@pytest.mark.parametrize(
    ("value", "controls", "passed"),
    [(0.4, (1.0, 2.0), True), (0.6, (1.0, 2.0), False), (0.4, (), False), (-1.0, (0.0,), False)],
)
def test_a_share_holds_for_every_control_and_shows_nothing_without_one(value, controls, passed):
    check = Check("figure", value, share=0.5).beside(dict(zip("ab", controls, strict=False)))
    assert check.passed == passed


def rows_of_zeros(seed, count):
    rows = Images(torch.zeros(count, 2), seed=seed)
    rows.feeds = "pairs"
    return rows


@dataclass(frozen=True)
class OnItsOwnRows(Furnished):
    def trial(self):
        return Trial(rows=rows_of_zeros, train={"lr": 3e-2})

    def measure(self, net, z):
        return (Check(SIZE, float(self.sample(net, z).square().mean()), 0.1),)


def test_a_trial_may_bring_its_own_rows_which_measure_alone_judges():
    (check,) = verify(OnItsOwnRows(), steps=60).checks
    assert check.metric == SIZE and check.passed
