"""Data with closed-form answers: teachers that are exact, and tests that cannot be fooled."""

from ds.analytic.data import (
    AbstractData,
    ExactNet,
    Gaussian,
    GaussianField,
    GaussianMixture,
)

__all__ = [
    "AbstractData",
    "ExactNet",
    "Gaussian",
    "GaussianField",
    "GaussianMixture",
]
