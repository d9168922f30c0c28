"""Solvers of the probability-flow ODE and SDE, one file each."""

from ds.diffusion.solvers.ancestral import Ancestral
from ds.diffusion.solvers.base import AbstractSolver, evaluations, integrate
from ds.diffusion.solvers.clipped import Clipped
from ds.diffusion.solvers.dcw import DCW, bare
from ds.diffusion.solvers.ddim import DDIM, DDIMToFirst
from ds.diffusion.solvers.dpm_solver_pp import DPMSolverPP, DPMSolverPPSinglestep
from ds.diffusion.solvers.heun import Heun
from ds.diffusion.solvers.renoise import Renoise
from ds.diffusion.solvers.same_noise import SameNoise
from ds.diffusion.solvers.unipc import UniPC

__all__ = [
    "DCW",
    "DDIM",
    "AbstractSolver",
    "Ancestral",
    "Clipped",
    "DDIMToFirst",
    "DPMSolverPP",
    "DPMSolverPPSinglestep",
    "Heun",
    "Renoise",
    "SameNoise",
    "UniPC",
    "bare",
    "evaluations",
    "integrate",
]
