"""The proof of Denoising."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ds.analytic import ExactNet
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import as_prediction
from ds.diffusion.schedules import AbstractTable
from ds.methods.base import Progress
from ds.methods.proof import NORMAL, Check, Formula, exact
from ds.pairs.sources import Batch


def identity(method: Any) -> tuple[Check, ...]:
    """The loss has no slope at the best prediction of normal data, a linear map.

    Four rows with data and noise at plus and minus one deviation have the moments of all.
    """
    one = torch.tensor(
        [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64, device="cpu"
    )
    index = torch.arange(16, dtype=torch.int64, device="cpu").repeat_interleave(4)
    a, b = (one.repeat(16, 1)[:, i, None].expand(-1, 3) for i in (0, 1))
    rows = Batch(NORMAL.mean + NORMAL.std * a, b, index, Draws(0, index))

    best = ExactNet(NORMAL, method.schedule, as_prediction(method.prediction))
    table = isinstance(method.schedule, AbstractTable)

    def loss(off: Tensor, gain: float = 1.0, late: float = 0) -> Tensor:

        def near(x: Tensor, told: Tensor) -> Tensor:
            told = (told - late).clamp(min=0 if table else -math.inf)
            return gain * best(x, told) + off[0] * x + off[1]

        modules = nn.ModuleDict({"student": Formula(near)})
        return method.loss(modules, rows, Progress(0, 1))

    off = torch.zeros(2, 3, dtype=torch.float64, device="cpu", requires_grad=True)
    unit = loss(off.detach(), 0.9).clamp(min=1)  # a weight of the SNR makes all slopes large

    def slope(*mistake: float) -> Tensor:
        return torch.autograd.grad(loss(off, *mistake), off)[0] / unit

    wrong = {
        "prediction_too_small": slope(0.9),
        "time_told_too_late": slope(1.0, 100 if table else 1.0),
    }
    return (exact("slope of the loss at the best map", slope(), **wrong),)
