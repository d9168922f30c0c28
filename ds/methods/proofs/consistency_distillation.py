"""The proof of ConsistencyDistillation."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.noise import Draws
from ds.diffusion.schedules import EDM
from ds.methods.networks import Frozen
from ds.methods.proof import NOISE, NORMAL, Check, Formula, exact
from ds.pairs.sources import Batch


def identity(method: Any) -> tuple[Check, ...]:
    """With the ODE's own map as f, only the error of the teacher's step remains.

    It falls with the third power of the step for Heun, with the second for Euler.
    """
    prediction = method.denoiser(nn.Identity()).prediction
    nearest, most = (1, method.sigma_min), (1, method.sigma_max)

    def network(x: Tensor, told: Tensor) -> Tensor:  # with it, f follows the ODE
        sigma = (told / method.noise_scale).exp()[:, None]
        x = x * (sigma**2 + method.sigma_data**2).sqrt()
        end = NORMAL.flow(x, (1, sigma), nearest)
        out = prediction.target(end, (x - end) / sigma, 1.0, sigma)
        return torch.where(sigma > method.sigma_min * (1 + 1e-12), out, 0.0)

    def slope(solver: str, gain: float = 1.0) -> float:
        """Return the power of the step size with which the error falls."""
        teacher = Formula(lambda x, t: x + gain * (NORMAL.x0(x, 1, t[:, None]) - x))
        return math.log2(error(80, solver, teacher) / error(160, solver, teacher))

    def error(steps: int, solver: str, teacher: Any) -> Tensor:
        coarse = replace(method, num_levels=steps + 1, solver=solver, target_decay=0.0)
        denoiser = Denoiser(teacher, EDM(method.sigma_max), "x0")
        modules = {"student": Formula(network), "teacher": Frozen(denoiser, method.path)}
        i = torch.arange(steps, dtype=torch.int64, device="cpu").repeat_interleave(len(NOISE))
        z = NOISE.repeat(steps, 1)
        batch = Batch(NORMAL.endpoint(z, 0, 1), z.flip(0), i, Draws(0, i))
        return coarse.error(nn.ModuleDict(modules), batch, i).square().mean().sqrt()

    end = NORMAL.flow(method.sigma_max * NOISE, most, nearest)
    controls = {
        "step left out": slope(method.solver, 0.0),
        "x0 off by 5%": slope(method.solver, 0.95),
    }
    if method.solver == "heun":
        controls["Euler's step"] = slope("euler")
    order = 3 if method.solver == "heun" else 2
    return (
        exact(
            "end of 1 call",
            method.sample(Formula(network), NOISE) - end,
            x0_of_teacher=NORMAL.x0(method.sigma_max * NOISE, *most) - end,
        ),
        Check(
            "order of the step", slope(method.solver), order - 0.1, controls, order, at_least=True
        ),
    )
