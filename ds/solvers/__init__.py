"""Solvers of the probability-flow ODE, one file each."""

from ds.solvers.base import AbstractSolver
from ds.solvers.ddim import DDIM

__all__ = ["DDIM", "AbstractSolver"]
