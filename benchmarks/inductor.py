"""Count what Inductor would move and launch on a GPU for the CIFAR-10 network, without a GPU.

    python -m benchmarks.inductor [images]

diffusers' UNet2DModel in bfloat16 and channels_last is traced on the CPU, moved to tensors that
only claim to be on an H100, and lowered and fused as torch.compile would, down to the list of its
kernels, whose inputs and outputs are added up. Nothing is compiled or run. Beside it the same of
the engine's plan (`dstudent doctor --plan cifar10 --device cuda`).
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode, Scheduler
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from benchmarks.peers import diffusers_twin
from ds.engine import Plan, Target
from ds.training import presets

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    type="cuda",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block_optin=232448,
    gcnArchName="",
)
GPU = torch.device("cuda", 0)


def main(images: int = 264) -> None:
    """Print launches and gigabytes of both."""
    net = presets.cifar10().net.build().eval().requires_grad_(False)
    kernels = inductor_kernels(traced(diffusers_twin(net), images))
    target = Target(GPU, torch.bfloat16, images)
    plan = Plan.of(net, target)
    launches = sum(len(plan.launches(step)) for step in plan.steps)
    moved = sum(plan.moved(step, target) for step in plan.steps)
    print(f"Inductor: {len(kernels)} launches, {sum(size for _, size in kernels) / 1e9:.1f} GB")
    for kind, count in Counter(kind for kind, _ in kernels).items():
        size = sum(size for k, size in kernels if k == kind) / 1e9
        print(f"    {kind:45}{count:5}{size:8.2f} GB")
    print(f"engine:   {launches} launches, {moved / 1e9:.1f} GB")


def traced(net: torch.nn.Module, images: int) -> fx.GraphModule:
    """Return the graph of a call, whose devices are a GPU's."""
    net = net.to(torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_(False)
    x = torch.zeros(images, 3, 32, 32, dtype=torch.bfloat16)
    x, t = x.contiguous(memory_format=torch.channels_last), torch.zeros(images)
    trace = make_fx(
        lambda weights, x, t: functional_call(net, weights, (x, t)),
        tracing_mode="fake",
        decomposition_table=select_decomp_table(),
    )
    graph = trace(dict(net.named_parameters()), x, t)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": GPU}
    return graph


def inductor_kernels(graph: fx.GraphModule) -> list[tuple[str, int]]:
    """Return the kind and the bytes of each kernel that Inductor makes of a graph."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _as_if_on_an_h100(), fake:
        inputs = [_like(n.meta["val"]) for n in graph.graph.nodes if n.op == "placeholder"]
    with _as_if_on_an_h100(), V.set_fake_mode(fake), V.set_debug_handler(DebugContext()):
        FakeTensorProp(graph, fake).propagate_dont_convert_inputs(*inputs)
        post_grad_passes(graph, is_inference=True)
        channels_last = GraphLowering.decide_layout_opt(graph, is_inference=True)
        lowered = GraphLowering(
            graph, example_inputs=inputs, is_inference=True, layout_opt=channels_last
        )
        with V.set_graph_handler(lowered):
            lowered.run(*inputs)
            lowered.init_wrapper_code()
            nodes = Scheduler(lowered.operations).nodes
            kernels = ((_kind(node), node.get_read_write_buffers_sizes()) for node in nodes)
            return [(kind, size) for kind, size in kernels if kind]


def _like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)


def _kind(node: BaseSchedulerNode) -> str:
    """Return what runs a node: a library's function, a kernel of Inductor's own, or nothing."""
    if isinstance(node, NopKernelSchedulerNode):
        return ""
    return (getattr(node.node, "python_kernel_name", None) or "") if node.is_extern() else "Triton"


@contextmanager
def _as_if_on_an_h100() -> Iterator[None]:
    """Let PyTorch take an H100 to be here, as far as lowering asks."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "is_initialized": True,
        "get_device_capability": (9, 0),
        "get_device_name": H100.name,
        "_lazy_init": None,
        "_get_device_properties": H100,
        "is_bf16_supported": True,
    }
    raw = {"_cuda_getDevice": 0, "_cuda_getCurrentRawStream": 0}
    with ExitStack() as stack:
        for module, names in ((torch.cuda, answers), (torch._C, raw)):
            for name, answer in names.items():
                patch = mock.patch.object(module, name, _always(answer), create=True)
                stack.enter_context(patch)
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", _always(None)))
        yield


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
