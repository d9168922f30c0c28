"""What people do on a GPU, at sizes that take a second, on a real one or an emulated one.

Networks are as small as they can be and still reach every kernel.
"""

from dataclasses import replace

import ds
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.schedules import LinearBeta
from ds.methods import DenoisingStudent
from ds.training.presets import SOLVERS
from tests.nets.test_unet import TINY, build

# Grey pictures, both resolutions, attention in one, channels as tensor cores take them.
CONFIG = replace(TINY, in_channels=1, channels=16)
GRID = ds.grids.quadratic(2)


def teacher(solver: str = "ddim") -> ds.Teacher:
    return ds.Teacher(Denoiser(build(CONFIG), LinearBeta(), "x0"), SOLVERS[solver], GRID)


def student() -> ds.Student:
    return ds.Student(build(CONFIG), DenoisingStudent())
