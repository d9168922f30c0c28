"""What losses and hooks do with networks: targets that follow, and dropout that is shared."""

import copy

import torch
from torch import Tensor, nn

from ds.nets.base import NO_CLASS
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
