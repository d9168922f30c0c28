"""The proof of ConsistencyDistillation."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ds.analytic import Gaussian
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.noise import Draws
from ds.methods.consistency.levels import RHO
from ds.methods.networks import Frozen
from ds.methods.proof import NOISE, NORMAL, WRONG, Check, Formula, exact
from ds.pairs.sources import Batch

STEPS = 160


def identity(method: Any) -> tuple[Check, ...]:
    """With the ODE's own map as f, only the error of the teacher's step remains.

    It falls with the third power of the step for Heun, with the second for Euler.
    """

    def slope(solver: str, gain: float = 1.0) -> float:
        """Return the power of the step size with which the error falls."""
        half = STEPS // 2
        return math.log2(error(half, solver, gain) / error(STEPS, solver, gain))

    def error(steps: int, solver: str, gain: float = 1.0, late: int = 0) -> float:
        """Return the error with a gain on the teacher's slope and `late` steps in the target."""
        coarse: Any = replace(method, num_levels=steps + 1, solver=solver, target_decay=0.5)
        teacher = Formula(lambda x, t: x + gain * (NORMAL.x0(x, 1, t[:, None]) - x))
        i = torch.arange(steps, dtype=torch.int64, device="cpu").repeat_interleave(len(NOISE))
        z = NOISE.repeat(steps, 1)
        batch = Batch(NORMAL.endpoint(z, 0, 1), z.flip(0), i, Draws(0, i))
        modules = {
            "student": follows(method),
            "target": follows(method, late / steps),
            "teacher": Frozen(Denoiser(teacher, method.path, "x0"), method.path),
        }
        f, target = coarse.ends(nn.ModuleDict(modules), batch, i)
        return float((f - target).square().mean().sqrt())

    order, others = (3, {"Euler's step": "euler"}) if method.solver == "heun" else (2, {})
    mistakes = {"step left out": 0.0, "step backwards": -1.0, "x0 off by 5%": 0.95}
    own = method.solver
    return (
        end_of_a_call(method),
        Check(
            "order of the step",
            slope(own),
            order - 0.1,
            {name: slope(own, gain) for name, gain in mistakes.items()}
            | {name: slope(solver) for name, solver in others.items()},
            order,
            at_least=True,
        ),
        Check(
            f"error in {STEPS} steps",
            error(STEPS, own),
            1e-4 if order == 3 else 1e-3,
            {
                "step left out": error(STEPS, own, 0.0),
                "step backwards": error(STEPS, own, -1.0),
                "target of the next level": error(STEPS, own, late=1),
            },
            miss=WRONG,
        ),
    )


def end_of_a_call(method: Any) -> Check:
    """With the ODE's own map as f, a sample is where the ODE ends."""
    start, levels = method.sigma_max * NOISE, ((1, method.sigma_max), (1, method.sigma_min))
    end = NORMAL.flow(start, *levels)
    return exact(
        "end of 1 call",
        method.sample(follows(method), NOISE) - end,
        x0_of_teacher=NORMAL.x0(start, *levels[0]) - end,
    )


def follows(method: Any, late: float = 0.0, data: Gaussian = NORMAL) -> nn.Module:
    """Return a network with which f follows the ODE of normal data to sigma_min.

    It takes a level for one that is later by `late`, a share of all steps.
    """
    prediction, least = method.denoiser(nn.Identity()).prediction, method.sigma_min
    step = late * (method.sigma_max ** (1 / RHO) - least ** (1 / RHO))

    def network(x: Tensor, told: Tensor) -> Tensor:
        sigma = (told / method.noise_scale).exp()[:, None]
        x = x * (sigma**2 + method.sigma_data**2).sqrt()
        taken = (sigma ** (1 / RHO) - step).clamp(min=0) ** RHO
        end = data.flow(x, (1, taken.clamp(min=least)), (1, least))
        out = prediction.target(end, (x - end) / sigma, 1.0, sigma)
        return torch.where(sigma > least * (1 + 1e-12), out, 0.0)  # any at the smallest level

    return Formula(network)
