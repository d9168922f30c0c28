"""One call of EDM's and ADM's networks: plain PyTorch, ours, and the engine, with the same weights.

Random weights, in float32. "plain" is the network as anyone would write it, in channels_last,
contiguous, and compiled in the better of these formats, on CPUs with frozen weights. The first of
them comes first, since PyTorch's convolutions of it round most. "net" is our network, "engine" the
engine. FLOPs are those of the plain network.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Side, Size, batch, late
from benchmarks.network import SMALLER, about, count_flops, random_net
from benchmarks.peers import SLOW, compiled
from benchmarks.plain import Plain
from ds.engine import Engine
from ds.nets.adm import adm_imagenet64
from ds.nets.blocks import AbstractUNet, AbstractUNetConfig
from ds.nets.song import ddpmpp

TIME = 0.7  # that of an EDM network, log(sigma) / 4, and of ADM's near the start


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Yield a case for EDM's CIFAR-10 network and, for work of full size, for ADM's."""
    edm = replace(ddpmpp(), **SMALLER[size])
    networks: list[tuple[str, AbstractUNetConfig, int]] = []
    networks.append(("EDM CIFAR-10", edm, batch(device, size, gpu=264, cpu=8)))
    if size == "full":
        networks.append(("ADM ImageNet-64", adm_imagenet64(), batch(device, size, gpu=64, cpu=1)))
    for name, config, images in networks:
        net = random_net(config, device)
        x = torch.randn(images, *net.shape, device=device)
        t = torch.full((images,), TIME, device=device)
        cond = {}
        if config.classes:
            cond["label"] = torch.arange(images, device=device) % config.classes
        yield Case(
            f"{name} float32 {about(net, images)}",
            {
                side: Side(functools.partial(_call, f, x, t, cond))
                for side, f in _sides(net, images, device, size).items()
            },
            functools.partial(_exact, net, x, t, cond),
            flops=count_flops(net, x, t, **cond),
            images=images,
            missing={} if size == "full" else {"plain, compiled": SLOW["diffusers, compiled"]},
        )


def _sides(net: AbstractUNet, images: int, device: torch.device, size: Size) -> dict[str, Any]:
    formats = {"plain, channels_last": torch.channels_last, "plain": torch.contiguous_format}
    sides: dict[str, Any] = {name: Plain(net, format) for name, format in formats.items()}
    if size == "full":
        last = sides["plain, channels_last"]
        sides["plain, compiled"] = late(lambda: compiled(last, device))
    sides["net"] = net
    sides["engine"] = late(lambda: Engine(net, [TIME], images=images, dtype=torch.float32))
    return sides


@torch.no_grad()
def _call(f: Any, x: Tensor, t: Tensor, cond: Mapping[str, Tensor], _: Any) -> Tensor:
    return f(x, t, **cond)


@torch.no_grad()
def _exact(net: nn.Module, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    y = net.double()(x.double(), t, **cond)
    net.float()
    return y
