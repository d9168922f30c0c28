"""What moves the weights: Adam in its variants, and the average that follows."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ds import ops
from ds.system import apex
from ds.training.fsdp import local

Kind = Literal["adam", "adamw", "apex_adam", "apex_adamw"]
MOMENTS = "exp_avg", "exp_avg_sq"  # the names that torch.optim.Adam gives them


class Adam(torch.optim.Optimizer):
    """Adam or AdamW that clips the gradient and moves the average of the weights in the same pass.

    A step is one call of ds.ops.adam_step. `averages` belong to the first of `params`, which are
    one group, and move by 1 - group["ema_decay"] towards them. A weight that has no gradient is
    stepped with zeros. Of sharded weights a process steps its part, when all have clipped together.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], averages: Sequence[Tensor] = (), *, lr: float,
        betas: tuple[float, float], eps: float = 1e-8, weight_decay: float = 0.0,
        decoupled: bool = False, max_norm: float = math.inf,
    ):  # fmt: skip
        self.averages, self.decoupled, self.max_norm = list(averages), decoupled, max_norm
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options | {"ema_decay": 0.0})
        (group,) = self.param_groups
        params = group["params"]
        group["step"] = torch.zeros((), dtype=torch.float32, device=params[0].device)
        for param in group["params"]:
            self.state[param] = {name: torch.zeros_like(param) for name in MOMENTS}
        if max_norm < math.inf and _sharded(group["params"]):
            self.max_norm = math.inf
            self.register_step_pre_hook(_clip(group["params"], max_norm))

    @torch.no_grad()
    def step(self) -> Tensor:
        """Step once; return the norm of the gradient, of no dimensions, before it was clipped.

        Of sharded weights it is that of this process's part, after.
        """
        (group,) = self.param_groups
        params = group["params"]
        return ops.adam_step(
            local(params),
            local(torch.zeros_like(p) if p.grad is None else p.grad for p in params),
            *(local(self.state[p][name] for p in params) for name in MOMENTS),
            step=group["step"],
            lr=group["step"].new_full((), group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=self.decoupled,
            averages=local(self.averages),
            ema_decay=group["ema_decay"],
            max_norm=self.max_norm,
        )


def build(
    kind: Kind, params: Iterable[nn.Parameter], averages: Sequence[Tensor], *, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float, max_norm: float,
) -> torch.optim.Optimizer:  # fmt: skip
    """Return Adam or AdamW, ours or NVIDIA apex's; a step clips, and moves the averages as well.

    Kingma & Ba 2015, arXiv:1412.6980; AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101. Raises
    ValueError where an apex optimiser is asked for and weights are sharded, or apex is missing or
    not NVIDIA's.
    """
    params = list(params)
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if not kind.startswith("apex"):
        return Adam(params, averages, decoupled=kind == "adamw", max_norm=max_norm, **options)
    if _sharded(params):
        raise ValueError(f"optimizer {kind}: takes no sharded weights; train.optimizer adam does")
    if not (status := apex.status()).startswith("NVIDIA's"):
        raise ValueError(f"optimizer {kind}: apex is {status}; train.optimizer adam needs none")
    from apex.optimizers import FusedAdam

    optimizer = FusedAdam(params, adam_w_mode=kind == "apex_adamw", **options)

    def follow(*_) -> None:
        average(averages, params, optimizer.param_groups[0]["ema_decay"])

    if max_norm < math.inf:
        optimizer.register_step_pre_hook(_clip(params, max_norm))
    optimizer.register_step_post_hook(follow)
    return optimizer


def _sharded(params: Sequence[Tensor]) -> bool:
    return any(isinstance(p, DTensor) for p in params)


def _clip(params: Sequence[Tensor], max_norm: float) -> Callable[..., None]:
    """Return the hook of a step that clips the gradient before it."""

    def clip(*_) -> None:
        nn.utils.clip_grad_norm_(params, max_norm)

    return clip


@torch.no_grad()
def average(averages: Sequence[Tensor], params: Sequence[Tensor], decay: float) -> None:
    """Move averages by 1 - decay towards the first of params."""
    averages = local(averages)
    wide = [p.to(mean.dtype) for p, mean in zip(local(params), averages, strict=False)]
    torch._foreach_lerp_(averages, wide, 1 - decay)


def power_decay(step: int, gamma: float) -> float:
    """Return the decay at a step, from 0, of the average whose weights grow as step**gamma.

    Karras et al. 2024, arXiv:2312.02696, section 3.1: (1 - 1/t)**(gamma + 1). Its length is a share
    of the whole run, whatever that is: gamma = 6.94 averages over about 10 % of it.
    """
    return (1 - 1 / (step + 1)) ** (gamma + 1)
