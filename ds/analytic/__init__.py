"""Data with closed-form answers: teachers that are exact, and tests that cannot be fooled."""

from ds.analytic.base import AbstractData, ExactNet
from ds.analytic.gaussian import Gaussian, GaussianField
from ds.analytic.mixture import GaussianMixture

__all__ = [
    "AbstractData",
    "ExactNet",
    "Gaussian",
    "GaussianField",
    "GaussianMixture",
]
