"""Fidelity against speed: solvers, numbers of network calls, and precision, on one teacher.

The teacher learns the scanned digits for a few epochs first. The exact answer is the end of its ODE
by a third-order solver on a grid of 400; a row's `error` is the root mean square distance to that,
as a share of the images' own. Nothing is refused here for its error.
"""

import functools
import logging
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Side, Size
from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.noise import noise
from ds.diffusion.solvers import AbstractSolver, DPMSolverPP, integrate
from ds.engine import Engine
from ds.evaluation.solver_search import candidates
from ds.methods import Denoising
from ds.models.teacher import Teacher
from ds.pairs.sources import Images, digits
from ds.training import presets
from ds.training.trainer import Trainer

TOP, IMAGES = 800, 16


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Yield a case for each solver and number of calls, on quadratic grids."""
    small = size != "full"
    teacher = taught(1 if small else 8, device)
    z = noise(0, range(IMAGES), teacher.shape, device=device)
    fine = grids.quadratic(100 if small else 400, top=TOP)
    truth = _run(teacher, DPMSolverPP(order=3), fine, z, None)
    solves = [s for s in candidates(teacher.schedule, TOP) if s.grid == "quadratic"]
    chosen = [s for s in solves if s.solver != "dpmpp_3m" and s.steps in (4, 8, 12, 24)]
    for solve in chosen[::3] if small else chosen:
        solver, grid = solve.build(teacher.schedule)
        denoisers = {
            "network": teacher,
            "engine, bfloat16": _engine(teacher, grid, torch.bfloat16),
            "engine": _engine(teacher, grid, torch.float32),
        }
        if device.type == "cuda":  # a CPU only imitates it
            denoisers["engine, float8"] = _engine(teacher, grid, torch.float8_e4m3fn)
        yield Case(
            f"{solve.solver} {solver.nfe(grid)} calls, digits {list(z.shape)}",
            {
                name: Side(functools.partial(_run, denoiser, solver, grid, z))
                for name, denoiser in denoisers.items()
            },
            lambda: truth,
            images=IMAGES,
            factor=math.inf,
            bound=math.inf,
        )


def taught(epochs: int, device: torch.device) -> Denoiser:
    """Return a denoiser of digits after a few epochs."""
    preset = presets.digits()
    config = replace(
        preset.teach, epochs=epochs, warmup_steps=20, check_every=10**6, precision="float32"
    )
    method, (images, _) = Denoising(), digits()
    torch.manual_seed(0)
    denoiser = method.denoiser(preset.net.build())
    teacher = Teacher(denoiser, *preset.solve.build(denoiser.schedule))
    logging.getLogger("ds").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            method,
            teacher,
            Images(images),
            Images(images[:64]),
            folder,
            config,
            device=device,
        )
        return method.denoiser(trainer.fit().requires_grad_(False))


def _engine(teacher: Denoiser, grid: Grid, dtype: torch.dtype) -> Denoiser:
    # Heun's times are those of its grid.
    return replace(teacher, net=Engine(teacher.net, grid, images=IMAGES, dtype=dtype))


@torch.no_grad()
def _run(denoiser: Denoiser, solver: AbstractSolver, grid: Grid, z: Tensor, _: Any) -> Tensor:
    return integrate(denoiser, solver, grid, z)
