"""On what methods are compared: scanned digits, and a mixture of Gaussians in the plane."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.methods_entries import DEMO, Entry
from ds.analytic import GaussianMixture
from ds.diffusion import grids
from ds.diffusion.noise import Draws
from ds.diffusion.schedules import EDM, LinearBeta
from ds.diffusion.solvers import DPMSolverPP
from ds.evaluation.evaluate import evaluate, split_floor
from ds.evaluation.features import Digits
from ds.evaluation.metrics import sliced_wasserstein
from ds.evaluation.scores import even_noise
from ds.methods import RectifiedFlow
from ds.methods.base import built
from ds.models.model import Model
from ds.models.teacher import Teacher
from ds.pairs.sources import AbstractSource, Images, digits
from ds.training.trainer import Trainer

HELD_OUT = 64  # rows of the check at the end of a run, which chooses nothing
POINTS = 4096  # that are drawn and judged in the plane
DATA = GaussianMixture()
NEAR = 3.0  # deviations from the centre of a mode within which a point is in it
Figures = dict[str, float]
Sources = tuple[AbstractSource, AbstractSource]


class OnDigits:
    """8 x 8 scanned digits, and a U-Net. A teacher is trained, at the expense of the run."""

    def sources(self, seed: int, rows: int | None = None) -> Sources:
        """Return the first `rows` of the digits, by default all, and those held out."""
        images = digits()[0][:rows]
        return Images(images), Images(images[:HELD_OUT], seed=1)

    def teacher(
        self, entry: Entry, folder: Path, seed: int, sources: Sources
    ) -> tuple[Teacher, int]:
        """Return the teacher that a method starts from, and the rows of its training.

        It is a fresh network where the method needs no teacher.
        """
        if not entry.teach:
            return RectifiedFlow().result(built(entry.net, seed)), 0
        method, train = entry.teacher, replace(entry.teach, seed=seed)
        denoiser = method.denoiser(built(entry.net, seed))
        start = Teacher(denoiser, *DEMO.solve.build(method.schedule))
        run = Trainer(method, start, *sources, folder, train)
        return start.using(run.fit()), run.steps * train.batch_size

    def start(self, entry: Entry, teacher: Teacher, seed: int) -> Teacher:
        """Return what the first network is a copy of."""
        return teacher

    def figures(self, model: Model) -> Figures:
        """Return how far images are from digits on the features of a classifier, and recall."""
        result = evaluate(model, digits()[0], Digits())
        return {name: result[name] for name in ("frechet_distance", "recall")}

    def floor(self) -> Figures:
        """Return the figures of real digits beside other real ones."""
        return {"frechet_distance": split_floor(digits()[0], Digits(), first=1500)}


class InPlane:
    """A mixture of six Gaussians of unequal weight, and an MLP. The teacher is exact."""

    def sources(self, seed: int, rows: int | None = None) -> Sources:
        """Return points of the mixture, 30,000 by default, and others that are held out."""
        seeds = 2 * seed + 2, 2 * seed + 3
        train, held_out = (
            Images(DATA.sample(s, range(n)), seed=s)
            for s, n in zip(seeds, (rows or 30_000, HELD_OUT), strict=True)
        )
        return train, held_out

    def teacher(
        self, entry: Entry, folder: Path, seed: int, sources: Sources
    ) -> tuple[Teacher, int]:
        """Return the exact teacher, of 20 calls, and that no training was needed."""
        return DATA.teacher(DPMSolverPP(order=2), grids.quadratic(20, LinearBeta())), 0

    def start(self, entry: Entry, teacher: Teacher, seed: int) -> Teacher:
        """Return the exact teacher, or for a method that copies its network, one that can learn."""
        copies = getattr(entry.method, "student", None) is None
        return teacher.using(built(entry.net, seed)) if copies else teacher

    def figures(self, model: Model) -> Figures:
        """Return the distance to data, the modes that are found, and the error of the map.

        The distance is the sliced Wasserstein distance. A mode counts by the share of its weight
        that is found, at most 1, and all count alike. The error of the map is the root mean square
        distance, by element, to where the exact ODE ends from the same noise.
        """
        draws = Draws(0, torch.arange(POINTS, dtype=torch.int64, device="cpu"))
        return _judged(model.sample(even_noise(POINTS, *DATA.shape), draws=draws))

    def floor(self) -> Figures:
        """Return the figures of data beside other data, and of the exact map."""
        return _judged(_exact(0))


def in_calls(teacher: Teacher, calls: int) -> Teacher:
    """Return a teacher of another number of calls, on a quadratic grid of the same start."""
    if calls == 1:
        return replace(teacher, grid=teacher.grid[:1])
    return replace(teacher, grid=grids.quadratic(calls, teacher.denoiser.schedule))


def problem(entry: Entry) -> OnDigits | InPlane:
    """Return what an entry learns."""
    return InPlane() if entry.in_plane else OnDigits()


def _judged(points: Tensor) -> Figures:
    if not points.isfinite().all():
        return {"distance": math.inf, "modes": 0.0, "map": math.inf}
    there = _shares(_exact(1))
    return {
        "distance": sliced_wasserstein(points, _exact(1)),
        "modes": float((_shares(points) / there).clamp(max=1).mean()),
        "map": float((points - _exact(0)).square().mean().sqrt()),
    }


def _shares(points: Tensor) -> Tensor:
    """Return the share of points that are in each mode, [K]."""
    near = torch.cdist(points, DATA.centres(points)) < NEAR * DATA.std
    return near.double().mean(0)


@cache
def _exact(seed: int) -> Tensor:
    """Return where the exact ODE ends from even noise, as `dstudent verify` does: exact data."""
    path = EDM(1000.0)
    teacher = DATA.teacher(DPMSolverPP(order=3), grids.karras(128, path), path)
    return teacher.sample(even_noise(POINTS, *DATA.shape, seed))
