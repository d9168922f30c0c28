"""Networks shared out over processes, each with a part of every weight: PyTorch's FSDP2.

A sharded network is an ordinary module whose parameters are DTensors, cut along their first
dimension. It is copied, averaged and saved as any other, but not called: what is called has the
same parameters, and gathers them as it goes.
"""

import copy
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ds.nets.unet import ResBlock
from ds.system import distributed


def shard(
    modules: nn.ModuleDict, device: torch.device, reduce: torch.dtype | None = None
) -> nn.ModuleDict:
    """Shard networks over all processes, in place; return those to call.

    Each residual block is gathered when it is called, what lies outside of them when the network
    is. Every weight is that of the first process, in contiguous memory. Gradients travel as
    `reduce`, if that is given, and end in the dtype of the weights. Buffers are not sharded.

    Raises ValueError for a weight of no dimensions.
    """
    kept = {id(w): w for w in (*modules.parameters(), *modules.buffers())}
    for w in kept.values():
        w.data = w.data.contiguous()  # which FSDP asks for
        dist.broadcast(w.data, 0)
    called = copy.deepcopy(modules, kept)
    options = {
        "mesh": init_device_mesh(device.type, (distributed.world(),)),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=reduce),
        # Else a network without a backward would keep for ever what it gathered first.
        "reshard_after_forward": True,
    }
    for net in called.values():
        for unit in (*blocks(net), net):
            fully_shard(unit, **options)
    for module, twin in zip(modules.modules(), called.modules(), strict=True):
        for name, w in twin.named_parameters(recurse=False):
            module.register_parameter(name, w)
    return called


def blocks(net: nn.Module) -> list[nn.Module]:
    """Return the parts of a network that are gathered one after the other, and may be compiled."""
    return [module for module in net.modules() if isinstance(module, ResBlock)]


def reduce_gradients(net: nn.Module, wanted: bool) -> None:
    """Let backward share gradients out, or add them up whole in this process until it may."""
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(wanted, recurse=False)


@torch.no_grad()
def whole(net: nn.Module) -> nn.Module:
    """Return a copy of a sharded network with whole weights, in all processes; others as they are.

    All processes must call this together.
    """
    sharded = [w for w in net.parameters() if isinstance(w, DTensor)]
    gathered = {id(w): nn.Parameter(w.full_tensor(), w.requires_grad) for w in sharded}
    return copy.deepcopy(net, gathered) if sharded else net


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return what this process holds of tensors: a shard, or all of one that is not sharded."""
    return [w.to_local() if isinstance(w, DTensor) else w for w in tensors]
