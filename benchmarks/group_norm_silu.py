"""GroupNorm-SiLU, forward and backward: ours, eager PyTorch, torch.compile, and peers on GPUs.

Of the GroupNorms of the CIFAR-10 network every other size, channels_last; on a GPU all, and those
of the other networks, in batches that exceed its L2 cache. Bytes: x and y, or grad, x and dx,
each once.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import Case, Side, Size, batch
from benchmarks.peers import PEERS
from ds import ops
from ds.training import presets

Function = Callable[..., Tensor]
DTYPES = (torch.float32, torch.bfloat16)
GPU_ELEMENTS = 2**26  # of a tensor: 128 MB of bfloat16


class GroupNorms(TorchDispatchMode):
    """Note the channels and the size of every GroupNorm that runs."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **kwargs or {})
        if func is torch.ops.ds.group_norm_silu.default:
            self.found.add(tuple(outputs[0].shape[1:3]))
        return outputs


def shapes(networks: Iterable[Callable]) -> list[tuple[int, int]]:
    """Return the distinct (channels, size) that the GroupNorms of networks see, largest first."""
    with torch.device("meta"), GroupNorms() as norms:
        for preset in networks:
            net = preset().net.build()
            net(torch.empty(1, *net.shape), torch.zeros(1))
    return sorted(norms.found, key=lambda shape: (-shape[1], shape[0]))


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Yield a case for each shape, dtype and direction."""
    cuda = device.type == "cuda"
    large = [presets.celeba, presets.lsun_bedroom] if cuda and size != "tiny" else []
    found = shapes([presets.cifar10, *large])
    if size == "tiny":
        found = found[-1:]
    elif size == "quick":
        found = found[:: max(1, len(found) // 3)]
    elif not cuda:  # where compiling is what takes long
        found = found[::2]
    net = presets.cifar10().net
    for dtype, (channels, pixels) in itertools.product(DTYPES, found):
        many = max(16, GPU_ELEMENTS // (channels * pixels * pixels))
        images = batch(device, size, gpu=many, cpu=16)
        functions, gone = contenders(channels, net.norm_groups, net.norm_eps, dtype, device)
        leaves, grad = draw(images, channels, pixels, dtype, device)
        yield from both_directions(functions, leaves, grad, gone)


def both_directions(
    functions: dict[str, Function],
    leaves: tuple[Tensor, ...],
    grad: Tensor,
    missing: dict[str, str],
    factor: float = 3.0,
) -> Iterator[Case]:
    """Yield a case for the forward and one for the backward pass of functions of the leaves."""
    shape = f"{str(grad.dtype)[6:]} {list(grad.shape)}"
    yield Case(
        f"forward {shape}",
        {name: Side(functools.partial(_forward, f, leaves)) for name, f in functions.items()},
        functools.partial(_exact, functions["eager"], leaves, grad, backward=False),
        bytes=2 * grad.nbytes,
        dtype=grad.dtype,
        missing=missing,
        factor=factor,
    )
    yield Case(
        f"backward {shape}",
        {
            name: Side(functools.partial(_backward, leaves, grad), functools.partial(f, *leaves))
            for name, f in functions.items()
        },
        functools.partial(_exact, functions["eager"], leaves, grad, backward=True),
        bytes=3 * grad.nbytes,
        dtype=grad.dtype,
        missing=missing,
        factor=factor,
    )


def contenders(
    channels: int, groups: int, eps: float, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Function], dict[str, str]]:
    """Return what to compare, each of x, weight and bias, ours last; and the peers that lack."""

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, groups, weight, bias, eps))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.group_norm_silu(x, weight, bias, groups, eps)

    torch._dynamo.reset()  # one shape at a time, or it would compile for any shape
    found, missing = {"eager": eager, "inductor": torch.compile(eager, dynamic=False)}, {}
    for name, peer in PEERS.items() if device.type == "cuda" else ():
        try:
            found[name] = peer(channels, groups, eps, dtype)
        except ImportError as error:
            missing[name] = str(error)
    return {**found, "ours": ours}, missing


def draw(
    images: int, channels: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Draw x, weight and bias, and a gradient."""
    generator = torch.Generator(device).manual_seed(0)
    randn = functools.partial(torch.randn, generator=generator, device=device)
    x, grad = (
        randn(images, channels, size, size).to(dtype, memory_format=torch.channels_last)
        for _ in range(2)
    )
    weight, bias = 1 + 0.3 * randn(channels), 0.3 * randn(channels)
    leaves = (x, weight.to(dtype), bias.to(dtype))
    return tuple(leaf.requires_grad_() for leaf in leaves), grad


@torch.no_grad()
def _forward(function: Function, leaves: tuple[Tensor, ...], _: Any) -> Tensor:
    return function(*leaves)


def _backward(leaves: tuple[Tensor, ...], grad: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, leaves, grad)


def _exact(eager: Function, leaves: tuple[Tensor, ...], grad: Tensor, *, backward: bool) -> Any:
    wide = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    y = eager(*wide)
    return torch.autograd.grad(y, wide, grad.double()) if backward else y.detach()
