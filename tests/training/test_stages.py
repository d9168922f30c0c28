"""Stages: each run starts from the result of the last one, and all of them resume to the bit."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import ds
from ds.methods import DenoisingStudent
from ds.methods.networks import Frozen
from ds.pairs.sources import Pairs
from ds.system.config import to_json
from ds.system.files import read_sealed
from ds.system.signals import Interrupted
from ds.training.config import RuntimeConfig
from ds.training.stages import Stages
from ds.training.trainer import Trainer
from tests.training.runs import SHORT, affine, lines, started, stop_at, trainer
from tests.training.runs import store as store

COUNT, HELD_OUT = 128, 32


@dataclass(frozen=True)
class Rounds(DenoisingStudent):
    """Rounds of one method; each but the last hands on a teacher with its student's network."""

    then: tuple[str, ...] = ("pairs",)  # what the rounds after the first feed
    number: int = 0

    @property
    def feeds(self):
        return ("pairs", *self.then)[self.number]

    def stages(self):
        return tuple(replace(self, number=i) for i in range(1 + len(self.then)))

    def loss(self, modules, batch, progress):
        if self.feeds == "noise":
            return modules["student"](batch.noise, batch.index).square().mean()
        return super().loss(modules, batch, progress)

    def result(self, net: nn.Module):
        return super().result(net) if self.number == len(self.then) else started(net)


@dataclass(frozen=True)
class Ending(Rounds):
    """Rounds whose first one hands on a student."""

    def result(self, net: nn.Module):
        return ds.Student(net, self)


@dataclass(frozen=True)
class Set(Rounds):
    """Rounds of which the second sets a few things of its run, and takes half as long."""

    @property
    def train(self):
        return {"ema_decay": 0.0, "lr": 1e-3, "lr_schedule": "linear"} if self.number else {}

    @property
    def length(self):
        return 0.5 if self.number else 1.0


def run(store, out, method=Rounds(), **options) -> Stages:
    sources = Pairs(store, range(64, 320)), Pairs(store, range(HELD_OUT))
    return Stages(method, affine(), *sources, out, SHORT, pairs=COUNT, **options)


def bits(model) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.net.state_dict())


def test_a_method_of_one_stage_is_a_run(store, tmp_path):
    sources = Pairs(store, range(256, 512)), Pairs(store, range(64))
    stages = Stages(DenoisingStudent(), affine(), *sources, tmp_path / "stages", SHORT)
    plain = trainer(store, tmp_path / "run", method=DenoisingStudent().on(affine()))
    assert bits(stages.fit()) == {name: w for name, w in plain.fit().state_dict().items()}
    assert stages.identity == plain.identity
    assert not [*(tmp_path / "stages").glob("stage-*")]


def test_the_student_of_a_teacher_with_other_times_is_told_these(store, tmp_path):
    start = affine()
    schedule = ds.schedule.LinearBeta(50, 0.002, 0.4)
    start = replace(start, denoiser=replace(start.denoiser, schedule=schedule), grid=(49, 20))
    sources = Pairs(store, range(256, 512)), Pairs(store, range(64))
    student = Stages(DenoisingStudent(), start, *sources, tmp_path, SHORT).fit()
    assert student.method == DenoisingStudent(t=49, residual=True, gain=-1.0)


def test_a_later_stage_learns_the_pairs_of_the_result_before_it(store, tmp_path):
    """They are in a store of the run, with noise of their own."""
    stages = run(store, tmp_path)
    student = stages.fit()
    pairs = ds.PairStore(tmp_path / "stage-2-pairs")
    assert len(pairs) == COUNT + HELD_OUT
    assert pairs.seed not in (store.seed, SHORT.seed)
    there = Trainer(
        stages.stages[0], affine(), *stages.sources, tmp_path, SHORT
    ).fit()  # read again
    made = started(there).sample(pairs.noise(range(8)))
    assert torch.allclose(pairs.targets(range(8)), made.clamp(-1, 1), atol=1 / 255)
    assert stages.trainer.out == tmp_path / "stage-2"
    assert not torch.equal(student.net.gain, there.gain)
    assert stages.first.identity != stages.identity != stages.trainer.identity


@pytest.mark.parametrize("step", [7, 12 + 5])
def test_stages_that_are_interrupted_go_on_to_the_same_bits(store, tmp_path, monkeypatch, step):
    """In the first stage, of 12 steps, and in the second, of 6; a finished one is not repeated."""
    whole = bits(run(store, tmp_path / "whole").fit())
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted):
            run(store, tmp_path / "cut").fit()
    taken, advance = [], Trainer._advance

    def noted(self):
        taken.append(self.state.step)
        advance(self)

    monkeypatch.setattr(Trainer, "_advance", noted)
    assert bits(run(store, tmp_path / "cut").fit()) == whole
    assert taken == [*range(7, 12), *range(6)] if step == 7 else [5]


def test_a_stage_has_the_settings_and_the_length_that_it_sets(store, tmp_path):
    """Only there, and run.json says what was done; the run of the whole method is another one."""
    stages = run(store, tmp_path, Set())
    stages.fit()
    asked = to_json(SHORT.on(torch.device("cpu")))
    first, second = (read_sealed(tmp_path / part / "run.json") for part in ("", "stage-2"))
    assert first["train"] == asked
    own = {"ema_decay": 0.0, "lr": 1e-3, "lr_schedule": "linear", "epochs": SHORT.epochs / 2}
    assert second["train"] == asked | own
    assert (stages.first.steps, stages.trainer.steps) == (12, 3)
    rates = [line["lr"] for line in lines(tmp_path / "stage-2") if "lr" in line]
    assert rates == pytest.approx([1e-3 * (1 - 3 / 3)], abs=1e-12)
    now, ema = stages.trainer.state.modules["student"], stages.trainer.averages.ema
    assert torch.equal(now.get_parameter("gain"), ema.get_parameter("gain"))


def test_what_a_later_stage_sets_makes_another_run(store, tmp_path, monkeypatch):
    here = run(store, tmp_path, Set()).identity
    monkeypatch.setattr(Set, "train", property(lambda self: {}))
    assert run(store, tmp_path, Set()).identity != here


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"rate": 1.0}, "Set: `train` cannot set rate, only lr, "),
        ({"epochs": 9.0}, "Set: `train` cannot set epochs, only .*; `length` makes a run longer"),
        ({"lr": -1.0}, r"train\.lr must be"),
    ],
)
def test_a_setting_that_a_stage_cannot_have_is_named(store, tmp_path, monkeypatch, train, said):
    monkeypatch.setattr(Set, "train", property(lambda self: train))
    with pytest.raises(ValueError, match=said):
        run(store, tmp_path, Set())


def test_the_last_stage_is_a_target_that_stays(store, tmp_path):
    """A stage that keeps what it started from has the last one's result, to its end."""

    class Keeping(Rounds):
        def init(self, teacher):
            modules = super().init(teacher)
            modules["teacher"] = Frozen(teacher.denoiser, teacher.denoiser.schedule)
            return modules

    stages = run(store, tmp_path, Keeping())
    student = stages.fit()
    kept = stages.trainer.state.modules["teacher"].get_parameter("net.gain")
    assert torch.equal(kept, stages.results[0].net.get_parameter("gain"))
    assert not torch.equal(kept, student.net.get_parameter("gain"))


def test_a_stage_can_feed_on_noise(store, tmp_path):
    stages = run(store, tmp_path, Rounds(then=("noise",)))
    stages.fit()
    noise = stages.trainer.batches.source
    assert (noise.feeds, len(noise)) == ("noise", 256)
    assert noise.seed != stages.trainer.held_out.seed


def test_an_evaluation_gets_the_result_of_each_stage(store, tmp_path):
    seen = []

    def evaluate(model):
        seen.append(type(model))
        return {"found": 1.0}

    runtime = RuntimeConfig(evaluate_every=100)
    run(store, tmp_path, evaluate=evaluate, runtime=runtime).fit()
    assert seen == [ds.Teacher, ds.Student]


def test_what_a_stage_cannot_start_from_is_named(store, tmp_path):
    with pytest.raises(ValueError, match=r"stage 2 of Ending starts from a teacher; .* a Student"):
        run(store, tmp_path / "a", Ending()).fit()
    with pytest.raises(ValueError, match="stage 2 of Rounds needs images, the source has pairs"):
        run(store, tmp_path / "b", Rounds(then=("images",)))
