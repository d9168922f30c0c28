"""Losses and networks over several processes: gradients that are averaged, weights that are shared.

Replicated networks are wrapped in PyTorch's DistributedDataParallel. Sharded ones use FSDP2: each
process keeps a part of every weight. A sharded network is an ordinary module whose parameters are
DTensors, cut along their first dimension. It is copied, averaged and saved like any other, but it
is not called: a twin with the same parameters is called, and gathers them as it goes.
"""

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ds.methods import AbstractMethod, Progress
from ds.nets.blocks import ResBlock
from ds.nets.potential import Potential
from ds.pairs.sources import Batch
from ds.system import distributed
from ds.system.files import first_line
from ds.training.config import RuntimeConfig


class Loss(nn.Module):
    """The loss of a method as a module, which can be compiled and wrapped."""

    def __init__(self, method: AbstractMethod, modules: nn.ModuleDict):
        super().__init__()
        self.method, self.modules_ = method, modules

    def forward(self, batch: Batch, progress: Progress) -> Tensor:
        return self.method.loss(self.modules_, batch, progress)


M = TypeVar("M", bound=nn.Module)


def compiled(loss: Loss, runtime: RuntimeConfig) -> None:
    """Compile a loss with its networks as one graph, or sharded networks a block at a time.

    With runtime.compile "auto", a graph may break where it cannot be compiled.
    """
    if runtime.compile_cache:  # the compiler reads it from the environment alone
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(runtime.compile_cache).resolve())
    mode = "reduce-overhead" if runtime.compile == "cuda_graphs" else None
    for part in blocks(loss) if runtime.shard else [loss]:
        part.compile(fullgraph=runtime.compile != "auto", mode=mode)


@contextmanager
def as_one_graph(runtime: RuntimeConfig) -> Iterator[None]:
    """Raise ValueError in one line where a loss cannot be the one graph that a run asks for."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "Unsupported":  # of torch._dynamo, which is slow to import
            raise
        raise ValueError(
            f"runtime.compile {runtime.compile}: the loss cannot be one graph, as where two "
            f"forwards share their dropout; use auto or no, or train.dropout 0 "
            f"({first_line(error)})"
        ) from None


def replicated(loss: Loss, learns: Iterable[nn.Parameter], runtime: RuntimeConfig) -> nn.Module:
    """Return a loss whose gradients of the weights that learn are averaged over the processes.

    Sharded networks average theirs without this, and a process that is alone has nothing to do.
    """
    if distributed.world_size() == 1 or runtime.shard:
        return loss
    learning = {id(p) for p in learns}
    others = [p for p in loss.parameters() if p.requires_grad and id(p) not in learning]
    # DistributedDataParallel waits for the gradients of all weights that learn when it is made.
    for p in others:
        p.requires_grad_(False)
    shared = DistributedDataParallel(
        loss,
        gradient_as_bucket_view=True,
        # It reduces nothing where other wrappers share the weights, or in no_sync at first.
        static_graph=not others and runtime.accumulate == 1,
    )
    for p in others:
        p.requires_grad_(True)
    if runtime.reduce == "bfloat16":
        shared.register_comm_hook(None, bf16_compress_hook)
    return shared


@contextmanager
def unreduced(loss: nn.Module, wanted: bool) -> Iterator[None]:
    """Keep gradients in this process for a while, if that is wanted."""
    reduce_gradients(loss, not wanted)
    shared = isinstance(loss, DistributedDataParallel)
    with loss.no_sync() if shared and wanted else nullcontext():
        yield


def shard(
    modules: nn.ModuleDict, device: torch.device, reduce: torch.dtype | None = None
) -> nn.ModuleDict:
    """Shard networks over all processes, in place; return their twins, to be called.

    A twin gathers each residual block when the block is called, and everything else when the
    network is called. Every weight is that of the first process, in contiguous memory. Gradients
    travel as `reduce`, if that is given, and end in the dtype of the weights. Buffers are not
    sharded.

    Raises ValueError for a weight of no dimensions, and for a network that differentiates another.
    """
    if any(isinstance(module, Potential) for module in modules.modules()):
        raise ValueError(
            "runtime.shard frees weights that the second derivative of a Potential still needs; "
            "leave it out, and torchrun shares the rows of a batch"
        )
    kept = {id(w): w for w in (*modules.parameters(), *modules.buffers())}
    for w in kept.values():
        w.data = w.data.contiguous()  # FSDP asks for it
        dist.broadcast(w.data, 0)
    called = copy.deepcopy(modules, kept)
    options = {
        "mesh": init_device_mesh(device.type, (distributed.world_size(),)),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=reduce),
        # Else a network without a backward would never free the weights it gathered first.
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
    """Return the residual blocks of a network, which are gathered and compiled one by one."""
    return [module for module in net.modules() if isinstance(module, ResBlock)]


def reduce_gradients(net: nn.Module, wanted: bool) -> None:
    """Let backward average the gradients of sharded weights, or only add them up here."""
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(wanted, recurse=False)


@torch.no_grad()
def whole(net: M) -> M:
    """Return a copy of a sharded network with whole weights; return any other network itself.

    All processes must call this together, and all get the copy.
    """
    sharded = [w for w in net.parameters() if isinstance(w, DTensor)]
    gathered = {id(w): nn.Parameter(w.full_tensor(), w.requires_grad) for w in sharded}
    return copy.deepcopy(net, gathered) if sharded else net


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the parts of tensors that this process holds: shards, or whole tensors."""
    return [w.to_local() if isinstance(w, DTensor) else w for w in tensors]
