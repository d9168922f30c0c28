"""What losses and hooks do with networks: targets that follow or stay, dropout that is shared."""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.predictions import Estimate, Rescaled, as_prediction
from ds.diffusion.schedules import AbstractSchedule
from ds.nets.base import NO_CLASS
from ds.nets.embedding import sinusoids
from ds.pairs.sources import Batch


def target_of(net: nn.Module) -> nn.Module:
    """Return a copy of a network that does not learn, to be modules["target"]."""
    return copy.deepcopy(net).requires_grad_(False)


@torch.no_grad()
def follow(target: nn.Module, net: nn.Module, decay: float) -> None:
    """Move a target's weights by 1 - decay towards those of its network, and copy the buffers."""
    for slow, w in zip(target.parameters(), net.parameters(), strict=True):
        slow.lerp_(w, 1 - decay)
    for slow, w in zip(target.buffers(), net.buffers(), strict=True):
        slow.copy_(w)


class Frozen(nn.Module):
    """A copy of a teacher that does not learn, seen on a path that need not be its own.

    frozen(x_t [N, *shape], t [N], cond) -> Estimate, with the times and the levels of `path`.
    """

    def __init__(self, denoiser: Denoiser, path: AbstractSchedule):
        super().__init__()
        self.net = copy.deepcopy(denoiser.net).requires_grad_(False)
        self.denoiser, self.path = replace(denoiser, net=self.net), path

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Estimate:
        own = self.denoiser.schedule
        if own != self.path:
            rescaled = Rescaled(own, as_prediction(self.denoiser.prediction))
            x, t, *_ = rescaled.there(x, *self.path.gather(t, x))
        return self.denoiser.given(**cond)(x, t)


class Weight(nn.Module):
    """The learned weight of a loss by its time: weight(t [N]) -> w, float32 [N], at first 0.

    The loss exp(w) * error - w is least where exp(w) is 1 / error, so every time comes to count as
    much as any other. t is an angle of ds.schedule.Trig. Lu & Song 2024, arXiv:2410.11081, Eq. 8.
    """

    def __init__(self, channels: int = 32):
        super().__init__()
        self.gains = nn.Parameter(torch.zeros(channels, dtype=torch.float32, device="cpu"))

    def forward(self, t: Tensor) -> Tensor:
        told = (t.tan().log() / 4).float()
        return (sinusoids(told, len(self.gains), (6.0, 0.5)) * self.gains).sum(1)


def untold(
    batch: Batch, stream: int, share: float, where: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the conditions of a batch, a share of its labels left out; only `where` [N], if given.

    Ho & Salimans 2022, arXiv:2207.12598, Algorithm 1.
    """
    if "label" not in batch.cond or not share:
        return batch.cond
    out = batch.draws.uniform(stream) < share
    out = out if where is None else out & where
    return {**batch.cond, "label": batch.cond["label"].masked_fill(out, NO_CLASS)}


class SharedDropout:
    """A context for forwards that draw the same dropout masks, on a CPU and on a GPU alike.

        shared = SharedDropout(student, target, device=x.device)
        with shared:
            a = student(x)
        with shared:
            b = target(y)

    The first entry keeps the state of the random number generators, each later one restores it.
    Nothing happens where none of the networks has dropout at work. Where one has, torch.compile
    cannot make one graph of it.
    """

    def __init__(self, *nets: nn.Module, device: torch.device):
        self.device, self.states = device, None
        self.works = any(_drops(module) for net in nets for module in net.modules())

    def __enter__(self) -> None:
        if not self.works:
            return
        if self.states is None:
            self.states = self._get()
        else:
            self._set(*self.states)

    def __exit__(self, *_: object) -> None:
        return None

    def _get(self) -> list[Tensor]:
        gpu = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *gpu]

    def _set(self, cpu: Tensor, *gpu: Tensor) -> None:
        torch.set_rng_state(cpu)
        for state in gpu:
            torch.cuda.set_rng_state(state, self.device)


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
