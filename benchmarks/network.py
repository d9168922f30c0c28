"""One call of the CIFAR-10 network: ours beside diffusers' with the same weights.

Random weights, channels_last. diffusers in float32 is what its pipeline does as published; the fair
peers are the same network in our precision and memory format, that compiled, on CPUs with frozen
weights, and on CPUs OpenVINO's and ONNX Runtime's of it. "net" is our network, "ours" the engine
that a Sampler runs. FLOPs: two for each multiplication of convolutions, linear layers and attention
of the plain network.
"""

import copy
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Side, Size, late
from benchmarks.peers import SLOW, Call, compiled, diffusers_twin
from benchmarks.runtimes import runtimes
from ds.engine import Engine
from ds.nets import UNet
from ds.nets.blocks import AbstractUNet, AbstractUNetConfig, GroupNorm
from ds.training import presets
from ds.training.throughput import flop_counter

TIME = 500


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Yield a case for each batch and precision."""
    net = random_cifar10(device, size)
    batches = (264,) if device.type == "cuda" else (1, 4, 8, 16)
    for images in {"full": batches, "quick": batches[-2:-1] or batches}.get(size, (2,)):
        x = torch.randn(images, *net.shape, device=device)
        t = torch.full((images,), TIME, device=device)
        exact, flops = exact_call(net, x, t), count_flops(net, x, t)
        for dtype in (torch.float32, torch.bfloat16):
            if dtype == torch.bfloat16 and (size == "quick" or not multiplies_narrow(device)):
                continue
            compiles = size == "full" and images in (8, 264)
            sides, missing = contenders(net, images, dtype, device, compiles=compiles)
            yield Case(
                f"forward {str(dtype)[6:]} {about(net, images)}",
                {name: Side(functools.partial(_call, f, x, t)) for name, f in sides.items()},
                lambda exact=exact: exact,
                flops=flops,
                dtype=dtype,
                images=images,
                missing=missing,
            )


# Of the CIFAR-10 network, what a smaller one has.
SMALLER: dict[Size, dict[str, Any]] = {
    "full": {},
    "quick": {"channels": 32},
    "tiny": {
        "channels": 32,
        "image_size": 8,
        "channel_mult": (1, 1),
        "num_res_blocks": 1,
        "attention_resolutions": (4,),
    },
}


def random_cifar10(device: torch.device, size: Size) -> UNet:
    """Return the network with random weights, or a smaller one for a smaller size of work."""
    return random_net(replace(presets.cifar10().net, **SMALLER[size]), device)


@torch.no_grad()
def exact_call(net: UNet, x: Tensor, t: Tensor) -> Tensor:
    """Return what the network makes of x and t, in float64."""
    y = net.double()(x.double(), t)
    net.float()
    return y


@torch.no_grad()
def exact_levels(net: UNet, sample: Call, z: Tensor) -> Tensor:
    """Return the levels of the images sample(net, z) in float64, before they are rounded.

    A side that rounds is off by half.
    """
    x = sample(net.double(), z.double())
    net.float()
    return (x.clamp(-1, 1) * 127.5 + 127.5).movedim(1, -1).cpu()


def about(net: AbstractUNet, images: int) -> str:
    """Say how large the work is, for the name of a case."""
    return f"{[images, *net.shape]}, {net.config.channels} channels"


def random_net(config: AbstractUNetConfig, device: torch.device) -> Any:
    """Return a network with weights that leave no branch at zero, where half of it is idle."""
    torch.manual_seed(0)
    net = config.build().to(device).eval().requires_grad_(False)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.02 if weight.dim() > 1 else 0.1)
    for layer in net.modules():
        if isinstance(layer, GroupNorm):
            nn.init.ones_(layer.weight)
    return net


def contenders(
    net: UNet, images: int, dtype: torch.dtype, device: torch.device, *, compiles: bool
) -> tuple[dict[str, Call], dict[str, str]]:
    """Return what to compare, ours last, and what is missing; each of x and t, float32."""
    sides, missing = peers(net, dtype, device, compiles=compiles)
    sides["net"] = copy.deepcopy(net).to(dtype)
    sides["ours"] = late(lambda: Engine(net, [TIME], images=images, dtype=dtype))
    return sides, missing


def peers(
    net: UNet, dtype: torch.dtype, device: torch.device, *, compiles: bool
) -> tuple[dict[str, Call], dict[str, str]]:
    """Return diffusers' networks and a CPU's runtimes of them, and what is missing.

    The first is one of the precision of ours.
    """
    sides, missing = {}, {}
    try:
        published = diffusers_twin(net).to(device)
        last = twin(net, dtype, device)
        sides = {"diffusers": published, "diffusers, channels_last": last}
        if dtype != torch.float32:
            sides = dict(reversed(sides.items()))
        if compiles:
            sides["diffusers, compiled"] = compiled(last, device)
        else:
            missing |= SLOW
    except ImportError as error:
        missing["diffusers"] = str(error)
    ready, absent = runtimes(net, dtype, device)
    return sides | ready, missing | absent


def twin(net: UNet, dtype: torch.dtype, device: torch.device) -> Call:
    """Return diffusers' network in a dtype and channels_last, called with float32."""
    narrow = diffusers_twin(net).to(device, dtype, memory_format=torch.channels_last)

    def call(x: Tensor, t: Tensor) -> Tensor:
        return narrow(x.to(dtype, memory_format=torch.channels_last), t).float()

    return call


def multiplies_narrow(device: torch.device) -> bool:
    """Say whether there are instructions for bfloat16; without, a call takes minutes."""
    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.no_grad()
def _call(function: Call, x: Tensor, t: Tensor, _: Any) -> Tensor:
    return function(x, t)


def count_flops(net: nn.Module, x: Tensor, t: Tensor, **cond: Tensor) -> int:
    """Count two for each multiplication of convolutions, linear layers and attention."""
    with torch.no_grad(), flop_counter() as counter:
        net(x, t, **cond)
    return counter.get_total_flops()
