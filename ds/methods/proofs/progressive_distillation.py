"""The proof of ProgressiveDistillation."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ds.diffusion.predictions import X0
from ds.diffusion.schedules import LinearBeta
from ds.diffusion.solvers import DDIM
from ds.methods.networks import Frozen
from ds.methods.proof import NOISE, NORMAL, Check, Formula, exact
from ds.models.teacher import Teacher

_STEPS = 4  # of the student


def identity(method: Any) -> tuple[Check, ...]:
    """With the target for x0, a step of the student ends where two of its teacher do.

    A teacher that is off by 5 % has a student that is: it learns from the teacher, not the data.
    """
    small = replace(method, start_steps=2 * _STEPS, nfe=_STEPS, prediction=X0(), student=None)
    table = replace(small, schedule=LinearBeta())
    return *_checks(small, ""), *_checks(table, ", on a table")


def _checks(method: Any, where: str) -> Iterator[Check]:
    x, i = NOISE, 1 + torch.arange(len(NOISE), dtype=torch.int64, device="cpu") % _STEPS
    exactly, biased = _teacher(method), _teacher(method, 0.95)
    frozen, off = (Frozen(teacher.denoiser, method.schedule) for teacher in (exactly, biased))
    start, middle = method.time(i, _STEPS), method.time(2 * i - 1, 2 * _STEPS)

    def error(x0: Tensor, teacher: Teacher = exactly) -> Tensor:
        """Return the student's step of DDIM with this x0, minus two of the teacher."""
        (a, b), (c, d) = (method.schedule.gather(method.time(k, _STEPS), x) for k in (i, i - 1))
        return c * x0 + d * (x - a * x0) / b - _steps(method, teacher, x, i, 2)

    def target(teacher: Any, steps: Tensor = i) -> Tensor:
        return method.target(teacher, x, steps, {})

    own = frozen(x, start, {}).x0
    yield exact(
        f"step minus two of the teacher{where}",
        error(target(frozen)),
        x0_of_the_teacher=error(own),
        index_moved_by_one=error(target(frozen, i % _STEPS + 1)),
        time_not_advanced=error(target(lambda y, _, cond: frozen(y, start, cond))),
    )
    yield exact(
        f"the same, the teacher 5% off{where}",
        error(target(off), biased),
        target_of_the_exact_one=error(target(frozen), biased),
    )
    half, last = _steps(method, exactly, x, i, 1), i == 1
    yield exact(
        f"target of the last step{where}",
        (target(frozen) - frozen(half, middle, {}).x0)[last],
        state_in_its_middle=(target(frozen) - half)[last],
        x0_at_its_start=(target(frozen) - own)[last],
    )

    def student(y: Tensor, told: Tensor) -> Tensor:
        share = (told - method.schedule.data) / (method.schedule.noise - method.schedule.data)
        return method.target(frozen, y, (share * _STEPS).round().long(), {})

    end = exactly.sample(x)
    yield exact(
        f"end of {_STEPS} steps{where}",
        method.sample(Formula(student), x, nfe=_STEPS) - end,
        not_distilled=method.sample(exactly.net, x, nfe=_STEPS) - end,
    )


def _teacher(method: Any, gain: float = 1.0) -> Teacher:
    """Return a teacher in twice the steps of a method, whose x0 is `gain` times the exact one."""

    def x0(x: Tensor, t: Tensor) -> Tensor:
        return gain * NORMAL.x0(x, *method.schedule.gather(t, x))

    twice = replace(method, start_steps=4 * _STEPS, nfe=2 * _STEPS)
    return twice.result(Formula(x0))


def _steps(method: Any, teacher: Teacher, x: Tensor, i: Tensor, count: int) -> Tensor:
    """Take `count` of the teacher's steps, from where the i-th [N] of the student starts."""
    times = (*teacher.grid, method.schedule.data)
    rows = []
    for row, k in zip(x, i.tolist(), strict=True):
        y, first = row[None], 2 * (_STEPS - k)
        for t, s in pairwise(times[first : first + count + 1]):
            y, _ = DDIM().step(teacher.denoiser, y, t, s, None)
        rows.append(y)
    return torch.cat(rows)
