"""Noise schedules: alpha(t) and sigma(t), as tables of steps or as paths in continuous time."""

from ds.diffusion.schedules.base import AbstractSchedule
from ds.diffusion.schedules.paths import EDM, VP, Linear, Trig
from ds.diffusion.schedules.tables import (
    MOST,
    AbstractTable,
    Cosine,
    LinearBeta,
    ScaledLinear,
    Sigmoid,
    Table,
    zero_terminal_snr,
)

__all__ = [
    "EDM",
    "MOST",
    "VP",
    "AbstractSchedule",
    "AbstractTable",
    "Cosine",
    "Linear",
    "LinearBeta",
    "ScaledLinear",
    "Sigmoid",
    "Table",
    "Trig",
    "zero_terminal_snr",
]
