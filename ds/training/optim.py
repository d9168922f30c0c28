"""Adam in its variants, and the networks and optimisers of a run."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ds import ops
from ds.system import apex
from ds.training.config import TrainConfig
from ds.training.ema import Averages, average
from ds.training.parallel import local

MOMENTS = "exp_avg", "exp_avg_sq"  # the names that torch.optim.Adam gives them


class Adam(torch.optim.Optimizer):
    """Adam or AdamW that clips the gradient and moves the average of the weights in the same pass.

    A step is one call of ds.ops.adam_step. averages[i] tracks params[i] and moves towards it by
    1 - group["ema_decay"]; there may be fewer averages than params. `params` are one group. A
    weight without a gradient is stepped with zeros. With sharded weights, all processes clip
    together, and then each steps its part.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        averages: Sequence[Tensor] = (),
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        max_norm: float = math.inf,
    ):
        self.averages, self.decoupled, self.max_norm = list(averages), decoupled, max_norm
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options | {"ema_decay": 0.0})
        (group,) = self.param_groups
        weights = group["params"]
        group["step"] = torch.zeros((), dtype=torch.float32, device=weights[0].device)
        for param in group["params"]:
            self.state[param] = {name: torch.zeros_like(param) for name in MOMENTS}
        if max_norm < math.inf and _sharded(group["params"]):
            self.max_norm = math.inf
            self.register_step_pre_hook(_clip(group["params"], max_norm))

    @torch.no_grad()
    def step(self) -> Tensor:
        """Step once; return the norm of the gradient, of no dimensions, before it was clipped.

        With sharded weights: the norm of this process's part, after clipping.
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
    config: TrainConfig, params: Iterable[nn.Parameter], averages: Sequence[Tensor]
) -> torch.optim.Optimizer:
    """Return Adam in a variant, whose steps clip and move the averages too.

    Kingma & Ba 2015, arXiv:1412.6980; AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101; RAdam, by
    PyTorch: Liu et al. 2020, arXiv:1908.03265. Raises ValueError if weights are sharded, for all
    but our Adam and AdamW, and for those of apex if it is missing or not NVIDIA's.
    """
    c, kind, max_norm = config, config.optimizer, config.grad_clip_norm or math.inf
    options = {"lr": c.lr, "betas": c.betas, "eps": c.eps, "weight_decay": c.weight_decay}
    params = list(params)
    if kind in ("adam", "adamw"):
        return Adam(params, averages, decoupled=kind == "adamw", max_norm=max_norm, **options)
    if _sharded(params):
        raise ValueError(f"optimizer {kind}: takes no sharded weights; train.optimizer adam does")
    make = torch.optim.RAdam if kind == "radam" else _apex(kind)
    optimizer = make(params, **options)

    def follow(*_) -> None:
        average(averages, params, optimizer.param_groups[0]["ema_decay"])

    if max_norm < math.inf:
        optimizer.register_step_pre_hook(_clip(params, max_norm))
    if averages:
        optimizer.register_step_post_hook(follow)
    return optimizer


def _apex(kind: str) -> Callable[..., torch.optim.Optimizer]:
    """Return what makes NVIDIA apex's Adam or AdamW."""
    if not (status := apex.status()).startswith("NVIDIA's"):
        raise ValueError(f"optimizer {kind}: apex is {status}; train.optimizer adam needs none")
    from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]

    return partial(FusedAdam, adam_w_mode=kind == "apex_adamw")


def _sharded(params: Sequence[Tensor]) -> bool:
    return any(isinstance(p, DTensor) for p in params)


def _clip(params: Sequence[Tensor], max_norm: float) -> Callable[..., None]:
    """Return the hook of a step that clips the gradient before it."""

    def clip(*_) -> None:
        nn.utils.clip_grad_norm_(params, max_norm)

    return clip


class TrainState:
    """The networks of a run, an optimiser for each that takes turns, and the steps taken.

    The step of the student's optimiser moves the student's average as well.
    """

    def __init__(
        self, modules: nn.ModuleDict, turns: Sequence[str], averages: Averages, config: TrainConfig
    ):
        self.modules, self.turns, self.step = modules, turns, 0
        if missing := {*turns} - {*modules}:
            raise ValueError(f"turns name {missing.pop()}; `init` made {', '.join(modules)}")
        student = modules["student"].parameters()
        both = zip(student, averages.ema.parameters(), strict=True)
        averaged = {p: mean for p, mean in both if p.requires_grad}
        self.learns = {turn: self._learns(turn, averaged) for turn in dict.fromkeys(turns)}
        self.optimizers = {
            turn: build(config, params, [*averaged.values()] if turn == "student" else [])
            for turn, params in self.learns.items()
        }
        device = next(self.modules.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        # By turn, the sum of the losses since the last log.
        self.losses = {
            turn: torch.zeros((), dtype=torch.float32, device=device) for turn in self.optimizers
        }

    def _learns(self, turn: str, averaged: Mapping[nn.Parameter, Any]) -> list[nn.Parameter]:
        """Return the weights that learn in a turn; those of no turn learn with the student."""
        if turn != "student":
            return [p for p in self.modules[turn].parameters() if p.requires_grad]
        others = {p for name in {*self.turns} - {turn} for p in self.modules[name].parameters()}
        rest = (p for p in self.modules.parameters() if p.requires_grad and p not in others)
        return [*averaged, *(p for p in rest if p not in averaged)]

    def update(self, turn: str, lr: float, ema_decay: float) -> None:
        """Take the optimiser step of a turn."""
        optimizer = self.optimizers[turn]
        for group in optimizer.param_groups:
            group["lr"], group["ema_decay"] = lr, ema_decay
        self.scaler.step(optimizer)
        self.scaler.update()

    def zero_grad(self) -> None:
        """Forget all gradients: a loss may reach weights whose turn it is not."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return what a run goes on from; the tensors are those in use."""
        return {
            "step": self.step,
            "modules": self.modules.state_dict(),
            "optimizers": {turn: o.state_dict() for turn, o in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "losses": self.losses,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.step = saved["step"]
        self.modules.load_state_dict(saved["modules"])
        for turn, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][turn])
            self.losses[turn].copy_(saved["losses"][turn])
        self.scaler.load_state_dict(saved["scaler"])
