"""Turns: modules that take optimiser steps one after the other, each with its own state."""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from ds.methods import DenoisingStudent
from ds.system.signals import Interrupted
from ds.training.config import RuntimeConfig
from tests.training.runs import SHORT, assert_same_bits, lines, stop_at, trainer
from tests.training.runs import store as store


@dataclass(frozen=True)
class Contest(DenoisingStudent):
    """The student chases a critic, which learns twice as often; a helper learns with the student.

    The loss of a turn reaches the weights of the others, whose gradients are not theirs.
    """

    turns: ClassVar = ("critic", "critic", "student")

    def init(self, teacher):
        modules = super().init(teacher)
        modules["critic"], modules["helper"] = (
            copy.deepcopy(teacher.net).requires_grad_(True) for _ in range(2)
        )
        return modules

    def loss(self, modules, batch, progress):
        student, critic, helper = (
            self.sample(modules[name], batch.noise) for name in ("student", "critic", "helper")
        )
        if progress.turn == "critic":
            return (critic - batch.x0).square().mean() + 0.1 * (critic - student).square().mean()
        return (student - critic).square().mean() + (helper - critic).square().mean()


def noting(run, seen: list):
    """Let a run note what every turn got and moved."""
    take = run._take

    def _take(turn, number):
        before = {name: copy.deepcopy(m.state_dict()) for name, m in run.state.modules.items()}
        take(turn, number)
        after = {name: m.state_dict() for name, m in run.state.modules.items()}
        moved = {n for n, w in after.items() if any(not w[k].equal(before[n][k]) for k in w)}
        seen.append((run.state.step, turn, moved))

    run._take = _take
    return run


def test_a_step_takes_the_turns_in_order_and_each_moves_its_own(store, tmp_path):
    seen = []
    run = noting(trainer(store, tmp_path, method=Contest()), seen)
    run.fit()
    critic, student = ("critic", {"critic"}), ("student", {"student", "helper"})
    assert run.steps == 4  # 12 batches, 3 turns a step
    assert seen == [(step, *turn) for step in range(4) for turn in (critic, critic, student)]


def test_every_turn_has_a_batch_of_its_own_and_the_log_its_mean_loss(store, tmp_path, monkeypatch):
    loss, seen = Contest.loss, []

    def noted(self, modules, batch, progress):
        found = loss(self, modules, batch, progress)
        if len(batch.x0) > 1 and found.requires_grad:
            seen.append((progress.turn, found.item(), batch.draws.index.tolist()))
        return found

    monkeypatch.setattr(Contest, "loss", noted)
    trainer(store, tmp_path, method=Contest()).fit()
    assert [i for _, _, index in seen for i in index] == [*range(12 * SHORT.batch_size)]
    line = next(line for line in lines(tmp_path) if "loss" in line)
    for turn, name in (("critic", "critic_loss"), ("student", "loss")):
        losses = [value for t, value, _ in seen[: 3 * 3] if t == turn]
        assert line[name] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "radam"])
def test_a_run_with_turns_resumes_to_the_same_bits(store, tmp_path, monkeypatch, optimizer):
    config = replace(SHORT, optimizer=optimizer)
    whole = trainer(store, tmp_path / "whole", config, method=Contest())
    whole.fit()
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Interrupted, match="at step 2 of 4"):
            trainer(store, tmp_path / "cut", config, method=Contest()).fit()
    resumed = trainer(store, tmp_path / "cut", config, method=Contest())
    resumed.fit()
    assert_same_bits(whole, resumed)
    for turn, optimizer in whole.state.optimizers.items():
        other = resumed.state.optimizers[turn].state_dict()
        for i, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(w, other["state"][i][name]) for name, w in state.items())


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ((), r"include the student, not \(\) alone"),
        (("critic",), "include the student"),
        (("student", "judge"), "turns name judge; `init` made student, critic, helper"),
    ],
)
def test_turns_without_the_student_or_a_module_are_refused(
    store, tmp_path, monkeypatch, turns, said
):
    monkeypatch.setattr(Contest, "turns", turns)
    with pytest.raises(ValueError, match=said):
        trainer(store, tmp_path, method=Contest())


def test_a_target_has_dropout_in_training_and_nothing_has_it_where_a_run_is_scored(
    store, tmp_path, monkeypatch
):
    class Followed(DenoisingStudent):
        def init(self, teacher):
            modules = super().init(teacher)
            for name in ("target", "teacher"):
                modules[name] = copy.deepcopy(teacher.net).requires_grad_(False)
            return modules

        def loss(self, modules, batch, progress):
            seen.add((torch.is_grad_enabled(), *(modules[n].training for n in modules)))
            return super().loss(modules, batch, progress)

    seen: set = set()
    trainer(store, tmp_path, method=Followed()).fit()
    assert seen == {(True, True, True, False), (False, False, False, False)}


def test_a_method_that_does_not_score_keeps_the_last_average(store, tmp_path):
    class Silent(DenoisingStudent):
        def score(self, modules, batch, progress):
            return None

    run = trainer(store, tmp_path, method=Silent())
    best = run.fit()
    assert run.best_loss is None
    assert all(
        torch.equal(w, run.averages.ema.state_dict()[n]) for n, w in best.state_dict().items()
    )
    assert not [line for line in lines(tmp_path) if "best" in line]


def test_held_out_scoring_gets_the_training_step_and_not_the_number_of_the_batch(store, tmp_path):
    class Noting(DenoisingStudent):
        def score(self, modules, batch, progress):
            seen.append(tuple(progress))
            return super().score(modules, batch, progress)

    seen = []
    trainer(store, tmp_path, method=Noting()).fit()  # 2 held-out batches in each of 3 checks
    assert seen == [(step, 12, "student") for step in (4, 4, 8, 8, 12, 12)]


def test_a_coupled_loss_refuses_to_be_cut(store, tmp_path):
    class Coupled(DenoisingStudent):
        coupled = True

    trainer(store, tmp_path / "whole", method=Coupled()).fit()
    with pytest.raises(ValueError, match=r"mixes the rows of a batch, .* cut into 2 parts"):
        trainer(store, tmp_path / "cut", method=Coupled(), runtime=RuntimeConfig(accumulate=2))
