"""Solvers of the probability-flow ODE, one file each."""

from ds.solvers.base import AbstractSolver
from ds.solvers.ddim import DDIM
from ds.solvers.dpm_solver_pp import DPMSolverPP, DPMSolverPPSinglestep
from ds.solvers.heun import Heun
from ds.solvers.unipc import UniPC

__all__ = ["DDIM", "AbstractSolver", "DPMSolverPP", "DPMSolverPPSinglestep", "Heun", "UniPC"]
