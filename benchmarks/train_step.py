"""A training step of the student: loss, backward, Adam, average; our network and plain modules.

The peer is the same U-Net in PyTorch's own modules, diffusers' UNet2DModel in channels_last, with
the loss of our trainer, PyTorch's fused Adam, and an average after it. Float32; on GPUs the
networks run in bfloat16 under autocast. What is compared first: the loss and a gradient of the
first step. On CPUs a step is split; a GPU would have to be waited for between its parts.
"""

import copy
import functools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Side, Size, batch
from benchmarks.network import SMALLER, about, random_net
from benchmarks.peers import diffusers_twin
from ds.diffusion.noise import Draws
from ds.methods import DenoisingStudent, Progress
from ds.nets import UNet
from ds.pairs.sources import Batch
from ds.training import ema, optim, presets
from ds.training.config import TrainConfig

METHOD, EMA = DenoisingStudent(), 0.995
PARTS = "forward", "backward", "optimizer"
FASTGEN = "not installed; its KD step (github.com/NVlabs/FastGen) is on no package index"
SLOW = "compiling it takes minutes on a CPU"
WRONG = "its first gradient is off by 12 % on a CPU with torch 2.13, which the gate refuses"


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Yield a case for the digits and for CIFAR-10."""
    cuda = device.type == "cuda"
    many = batch(device, size, gpu=256, cpu=4)
    nets = {"digits": (presets.digits().net, 64), "cifar10": (presets.cifar10().net, many)}
    if size == "tiny":
        nets = {"cifar10": (replace(presets.cifar10().net, **SMALLER[size]), many)}
    for name, (config, images) in nets.items():
        net = random_net(config, device)
        z, x0 = (torch.randn(images, *net.shape, device=device) for _ in range(2))
        modules, missing = contenders(net, compiles=cuda or size == "full")
        if not cuda and name == "cifar10" and modules.pop("modules, compiled", None):
            missing["modules, compiled"] = WRONG
        phases: dict[str, dict[str, list[float]]] = {}
        yield Case(
            f"training step, {name} {about(net, images)}",
            {
                name: Side(functools.partial(_step, m, z, x0, phases.setdefault(name, {})))
                for name, m in modules.items()
            },
            functools.partial(_exact, net, z, x0),
            images=images,
            dtype=torch.bfloat16 if cuda else torch.float32,
            missing=missing,
            phases=phases,
        )
        if size == "quick":
            return


class _Training:
    """A network with its optimiser, which moves an average: our trainer's, or PyTorch's."""

    def __init__(
        self, net: nn.Module, first: nn.Parameter, *, ours: bool = False, compiles: bool = False
    ):
        self.net = net.train().requires_grad_(True)
        self.first = first  # the weight whose gradient is compared
        weights = list(self.net.parameters())
        averages = [w.detach().clone() for w in weights]
        config = TrainConfig(lr=1e-6, betas=(0.9, 0.98))
        if ours:
            self.optimizer = optim.build(config, weights, averages)
            self.optimizer.param_groups[0]["ema_decay"] = EMA
        else:
            self.optimizer = torch.optim.Adam(weights, lr=config.lr, betas=config.betas, fused=True)
            self.optimizer.register_step_post_hook(lambda *_: ema.average(averages, weights, EMA))
        self.call = torch.compile(self.net, dynamic=False) if compiles else self.net


def contenders(net: UNet, *, compiles: bool) -> tuple[dict[str, _Training], dict[str, str]]:
    """Return what to compare, ours last, and what is missing."""
    sides, missing = {}, {"FastGen": FASTGEN}
    torch._dynamo.reset()
    kinds = (False, True) if compiles else (False,)
    if not compiles:
        missing |= {"modules, compiled": SLOW, "ours, compiled": SLOW}
    device = net.conv_in.weight.device
    for compiled in kinds:
        try:
            twin = diffusers_twin(net).to(device, memory_format=torch.channels_last)
        except ImportError as error:
            missing["modules"] = str(error)
            break
        first = twin.net.conv_in.weight
        sides["modules" + ", compiled" * compiled] = _Training(twin, first, compiles=compiled)
    for compiled in kinds[::-1]:
        ours = copy.deepcopy(net)
        first = ours.conv_in.weight
        sides["ours" + ", compiled" * compiled] = _Training(
            ours, first, ours=True, compiles=compiled
        )
    return sides, missing


def _step(
    training: _Training, z: Tensor, x0: Tensor, phases: dict[str, list[float]], _: Any
) -> tuple[Tensor, Tensor]:
    marks = [time.perf_counter()]
    training.optimizer.zero_grad()
    with torch.autocast(z.device.type, torch.bfloat16, enabled=z.is_cuda):
        loss = METHOD.loss({"student": training.call}, _rows(z, x0), Progress(0, 1))
    marks.append(time.perf_counter())
    loss.backward()
    marks.append(time.perf_counter())
    training.optimizer.step()
    marks.append(time.perf_counter())
    if not z.is_cuda:
        for part, begin, end in zip(PARTS, marks, marks[1:], strict=False):
            phases.setdefault(part, []).append(end - begin)
    return loss.detach(), training.first.grad


def _rows(z: Tensor, x0: Tensor) -> Batch:
    index = torch.arange(len(z), device=z.device)
    return Batch(x0, z, index, Draws(0, index))


def _exact(net: UNet, z: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    wide = copy.deepcopy(net).double().requires_grad_(True)
    loss = METHOD.loss({"student": wide}, _rows(z.double(), x0.double()), Progress(0, 1))
    return loss.detach(), torch.autograd.grad(loss, wide.conv_in.weight)[0]
