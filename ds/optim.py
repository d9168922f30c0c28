"""What moves the weights: Adam in its variants, and the average that follows."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from ds import apex

Kind = Literal["adam", "adamw", "apex_adam", "apex_adamw"]


def build(
    kind: Kind, parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float],
    eps: float, weight_decay: float,
) -> torch.optim.Optimizer:  # fmt: skip
    """Return Adam or AdamW, PyTorch's or NVIDIA apex's.

    Kingma & Ba 2015, arXiv:1412.6980; AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101. Raises
    ValueError where an apex optimiser is asked for and apex is missing or not NVIDIA's.
    """
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if not kind.startswith("apex"):
        cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
        return cls(parameters, fused=True, **options)
    if not (status := apex.status()).startswith("NVIDIA's"):
        raise ValueError(f"optimizer {kind}: apex is {status}; train.optimizer adam needs none")
    from apex.optimizers import FusedAdam

    return FusedAdam(parameters, adam_w_mode=kind == "apex_adamw", **options)


@torch.no_grad()
def average(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """Move the average by 1 - decay towards the network; its buffers are those of the network."""
    weights = [p.float() for p in net.parameters()]
    torch._foreach_lerp_(list(ema.parameters()), weights, 1 - decay)
    for mean, buffer in zip(ema.buffers(), net.buffers(), strict=True):
        mean.copy_(buffer)


def power_decay(step: int, gamma: float) -> float:
    """Return the decay at a step, from 0, of the average whose weights grow as step**gamma.

    Karras et al. 2024, arXiv:2312.02696, section 3.1: (1 - 1/t)**(gamma + 1). Its length is a share
    of the whole run, whatever that is: gamma = 6.94 averages over about 10 % of it.
    """
    return (1 - 1 / (step + 1)) ** (gamma + 1)
