"""Compile every Triton kernel for GPUs that need not be there, and report what the code is like.

    python benchmarks/aot.py > benchmarks/results/aot.json
    python benchmarks/aot.py --brief > benchmarks/results/aot-3.6.json      under Triton 3.6
    python benchmarks/aot.py --seconds > benchmarks/results/compile-3.6.json          likewise

The kernels are those that the launchers would launch for each GroupNorm, each attention and each
convolution of the paper's networks and of the engine's plans of them, in bfloat16 and, where a plan
has it, in float8, for attention with heads of 64 channels, for norms with an affine of each image,
and for the noise, batches, solver steps and levels of the images: networks and launchers run on
meta tensors, and the launches are noted, not done.

`--brief` has the kernels of sm_90 alone, in the same order, without what they are for: to compare
the Triton of GPU machines. `--seconds` is the time it takes to compile for sm_90 what the CIFAR-10
network needs: a run that finds no cache waits for it.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds import ops
from ds.engine import Plan, Rewrites, Target, calls, convolutions
from ds.nets import fold_attention
from ds.ops.kernels import (
    attention,
    conv,
    conv_hopper,
    group_norm_silu,
    group_norm_silu_backward,
    noise,
    prepare_batch,
    quantize,
    solver_update,
)
from ds.training import presets

NETWORKS = (presets.cifar10, presets.celeba, presets.lsun_bedroom, presets.lsun_church)
# Pixels, heads, channels of a head, and channels of the projection or 0: heads of 64, which other
# networks have. Those of several heads that are refused are not here.
HEADS_OF_64 = [
    *((pixels, heads, 64, 0) for pixels in (64, 256) for heads in (4, 8)),
    (64, 4, 64, 256),
    (64, 8, 64, 512),
    (256, 4, 64, 256),
]
# Channels and pixels of scale-shift norms, in 32 groups: those of ADM's network for ImageNet 64.
BY_IMAGE = (192, 4096), (384, 1024), (576, 256), (768, 64)
ARCHITECTURES = (80, 90)
FLOAT8, ARCHITECTURES_OF_FLOAT8 = torch.float8_e4m3fn, (89, 90)
OPTIONS = "num_warps", "num_stages", "enable_fp_fusion"  # of a launch, for the compiler
BATCH = 32
MANY = 528  # images: at 4 x 4 pixels, 4 for each multiprocessor
HALF: dict = {"dtype": torch.bfloat16, "device": "meta"}
DEFAULTS = False, None, None, None  # of the op's keep, shift, residual and skip
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int64: "*i64",
    FLOAT8: "*fp8e4nv",
    int: "i32",
    float: "fp32",
}

Launch = tuple[tuple, JITFunction, dict]  # for what shape, the kernel, its arguments by name
Networks = Sequence[Callable[[], presets.Preset]]


class Norm(NamedTuple):
    """A GroupNorm of x and skip, by their channels, and what it takes in beside them."""

    channels: int
    skip: int
    pixels: int
    groups: int
    silu: bool
    shift: bool
    residual: bool
    keep: bool


class GroupNorms(TorchDispatchMode):
    """Note every GroupNorm that runs."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.ds.group_norm_silu.default:
            x, _, _, groups, _, silu, *rest = args
            keep, shift, residual, skip = [*rest, *DEFAULTS[len(rest) :]]
            size = x.shape[1], 0 if skip is None else skip.shape[1], x[0, 0].numel(), groups
            self.found.add(Norm(*size, silu, shift is not None, residual is not None, keep))
        return func(*args, **kwargs or {})


@functools.cache
def plans(preset: Callable[[], presets.Preset]) -> list[Plan]:
    """Return the engine's plans of a network for GPUs, in bfloat16 and, the last, in float8.

    With our own convolutions where they are expected to pay, everywhere, and with norms in them.
    """
    with torch.device("meta"):
        net = preset().net.build()
    found = []
    for own, norms, float8 in (
        (None, None, False),
        (True, False, False),
        (True, True, False),
        (True, False, True),
    ):
        target = Target(torch.device("cuda"), torch.bfloat16, BATCH, float8)
        forced = replace(Rewrites.good_for(target), implicit_gemm=own, norm_into_conv=norms)
        found.append(Plan.of(net, target, forced))
    return found


def norms(networks: Networks) -> list[Norm]:
    """Return the distinct GroupNorms of networks, as they are trained and as they are planned."""
    with torch.device("meta"), torch.no_grad(), GroupNorms() as noted:
        for preset in networks:
            net = preset().net.build().bfloat16()
            net(torch.empty(1, *net.shape), torch.zeros(1))
    found = noted.found
    for plan in itertools.chain(*map(plans, networks)):
        for call, inputs, _ in plan.steps:
            if isinstance(call, calls.Norm):
                (channels, *size), *others = (plan.shapes[name] for name in inputs)
                skip = others[-1][0] if len(others) > call.residual else 0
                parts = call.shift is not None, call.residual, call.keep
                found.add(
                    Norm(channels, skip, math.prod(size), call.layer.groups, call.silu, *parts)
                )
    return sorted(found)


@contextlib.contextmanager
def noting() -> Iterator[list[tuple[JITFunction, dict]]]:
    """Yield a list that fills with kernels and their arguments by name, in place of launches."""
    noted = []

    def note(kernel, *args, grid, warmup, **kwargs):
        noted.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))

    with mock.patch.object(JITFunction, "run", note):
        yield noted


def norm_launches(networks: Networks) -> Iterator[Launch]:
    """Yield each kernel of a forward and a backward pass of the networks' GroupNorms."""
    for norm in norms(networks):
        yield from _norm_launches(norm, torch.empty(norm.channels + norm.skip, **HALF))


def by_image_launches() -> Iterator[Launch]:
    """Yield the kernels of norms with an affine of each image: their shape ends in "by image"."""
    for channels, pixels in BY_IMAGE:
        norm = Norm(channels, 0, pixels, 32, silu=True, shift=False, residual=False, keep=False)
        affine = torch.empty(BATCH, channels, device="meta")
        yield from _norm_launches(norm, affine, "by image")


def _norm_launches(norm: Norm, affine: Tensor, *label: str) -> Iterator[Launch]:
    """Yield the kernels of one norm, and those that end in float8, as does their shape."""
    empty = functools.partial(torch.empty, **HALF)
    x = empty(BATCH, norm.pixels, norm.channels)
    shift = empty(BATCH, norm.channels) if norm.shift else None
    residual = x if norm.residual else None
    skip = empty(BATCH, norm.pixels, norm.skip) if norm.skip else None
    layer = group_norm_silu.Norm(affine, affine, norm.groups, 1e-6, norm.silu)
    with noting() as noted:
        y, mean, rstd, merged = group_norm_silu.group_norm_silu(
            x, layer, norm.keep, shift, residual, skip
        )
        settings = mean, rstd, norm.groups, norm.silu, norm.channels, merged
        group_norm_silu_backward.group_norm_silu_backward(
            y, merged if norm.keep else x, affine, affine, *settings, shift, residual, skip
        )
    yield from (((*norm, *label), *launch) for launch in noted)
    if norm.silu and not norm.residual:
        with noting() as noted:
            group_norm_silu.group_norm_silu(x, layer, norm.keep, shift, None, skip, FLOAT8)
        narrow = (launch for launch in noted if "y_ptr" in launch[1])  # not the sums
        yield from (((*norm, *label, "float8"), *launch) for launch in narrow)


def image_launches(networks: Networks) -> Iterator[Launch]:
    """Yield each kernel that makes noise, a batch, a solver's step or levels of images."""
    with torch.device("meta"):
        shapes = sorted({tuple(preset().net.build().shape) for preset in networks})
    for shape in shapes:
        with noting() as noted, torch.device("meta"):
            indices = torch.empty(BATCH, dtype=torch.int64)
            noise.noise(indices, 0, math.prod(shape), torch.float32)
            x = torch.empty(BATCH, *shape).contiguous(memory_format=torch.channels_last)
            images = torch.empty(BATCH, *shape[1:], shape[0], dtype=torch.uint8)
            prepare_batch.prepare_batch(images, indices, 0, x, x)
            prepare_batch.prepare_batch(images, indices, 0, x.bfloat16(), x.bfloat16())
            table, step = torch.empty(100, 2), torch.empty(1, dtype=torch.int64)
            solver_update.solver_update(x, [x.bfloat16()], table, step, x.bfloat16())
            quantize.quantize(x, False)
            quantize.quantize(x.contiguous(), False)
        yield from ((shape, *launch) for launch in noted)


def attention_launches(networks: Networks) -> Iterator[Launch]:
    """Yield the kernel of each attention of the networks, plain and folded, and of heads of 64.

    A shape is pixels, heads, channels of a head, and of the projection, 0 where it is folded.
    """
    found = set(HEADS_OF_64)

    def note(q, k, v, weight, bias, residual):
        found.add((q.shape[2], q.shape[1], q.shape[3], 0 if weight is None else len(weight)))
        return torch.empty_like(residual)

    with torch.device("meta"), torch.no_grad(), mock.patch.object(ops, "attention_residual", note):
        for preset in networks:
            net = preset().net.build().bfloat16()
            for variant in (net, fold_attention(net)):
                variant(torch.empty(1, *net.shape), torch.zeros(1))

    empty = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    for pixels, heads, width, channels in sorted(found):
        q = empty(BATCH, pixels, heads, width).transpose(1, 2)
        weight = empty(channels, heads * width) if channels else None
        out = channels or heads * width
        assert attention.refusal(q, weight) is None
        with noting() as noted:
            attention.attention_residual(q, q, q, weight, empty(out), empty(BATCH, pixels, out))
        yield from (((pixels, heads, width, channels), *launch) for launch in noted)


class Conv(NamedTuple):
    """A convolution as the engine's plan has it, and the norm that it makes; groups 0 are none."""

    kind: str
    channels: int
    out: int
    height: int  # of what it reads
    bias: bool
    residual: bool
    groups: int
    silu: bool
    keep: bool


def convs(networks: Networks) -> list[Conv]:
    """Return the distinct convolutions of the plans of networks that are our own."""
    found = set()
    for plan in itertools.chain(*map(plans, networks)):
        for call, inputs, _ in plan.steps:
            if not isinstance(call, convolutions.ImplicitGemm):
                continue
            (channels, height, _), norm = plan.shapes[inputs[0]], call.norm
            given = call.conv.bias is not None or (norm is not None and norm.shift is not None)
            groups, silu = (norm.layer.groups, norm.silu) if norm else (0, False)
            parts = given, len(inputs) > 1, groups, silu, call.keep
            kind, out = call.kind.removeprefix("gemm "), len(call.conv.weight)
            found.add(Conv(kind, channels, out, height, *parts))
    return sorted(found)


def conv_arguments(case: Conv, images: int) -> tuple[Tensor | int | None, ...]:
    """Return x, weight, bias, residual and stride of a convolution, as the kernels take them."""
    empty = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    kernel, stride = int(case.kind[0]), 2 if "/2" in case.kind else 1
    dtype = FLOAT8 if "float8" in case.kind else torch.bfloat16
    x = empty(images, case.height, case.height, case.channels, dtype=dtype)
    rows = case.out * (4 if kernel == 2 else 1)
    weight = empty(rows, kernel, kernel, case.channels, dtype=dtype)
    height = case.height * 2 if kernel == 2 else case.height // stride
    bias = torch.empty(case.out, device="meta") if case.bias else None
    residual = empty(images, height, height, case.out) if case.residual else None
    return x, weight, bias, residual, stride


def conv_launches(networks: Networks) -> Iterator[Launch]:
    """Yield each kernel of the networks' convolutions."""
    for case in convs(networks):
        given, wide = conv_arguments(case, BATCH), torch.empty(case.out, device="meta")
        with noting() as noted:
            if case.groups:
                norm = group_norm_silu.Norm(wide, wide, case.groups, 1e-6, case.silu)
                conv.conv_group_norm_silu(*given, norm, case.keep)
            else:
                conv.conv(*given, wide if "float8" in case.kind else None)
        yield from ((case, *launch) for launch in noted)


def hopper_launches(networks: Networks) -> Iterator[Launch]:
    """Yield each kernel of those that the convolution for sm_90 takes, at two numbers of images.

    And with a bias of each image, which calls at several times have. A shape is a Conv and images.
    """
    for case, images in itertools.product(convs(networks), (BATCH, MANY)):
        x, weight, bias, residual, stride = conv_arguments(case, images)
        if conv_hopper.refusal(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), stride):
            continue
        wide = torch.empty(case.out, device="meta")
        with noting() as noted:
            if case.groups:
                norm = group_norm_silu.Norm(wide, wide, case.groups, 1e-6, case.silu)
                conv_hopper.conv_group_norm_silu(x, weight, bias, residual, norm, case.keep)
            else:
                conv_hopper.conv(x, weight, bias, residual)
                if case.bias:
                    conv_hopper.conv(x, weight, bias.expand(images, -1), residual)
        own = (launch for launch in noted if launch[0] is conv_hopper._conv_hopper_kernel)
        yield from (((*case, images), *launch) for launch in own)  # not the norms


def source(kernel: JITFunction, arguments: dict) -> ASTSource:
    """Specialize a kernel as its launch would: on None, the number 1, and multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, tuple):
            signature[parameter.name] = tuple(TYPES[tensor.dtype] for tensor in value)
            attributes |= {(i, k): [["tt.divisibility", 16]] for k in range(len(value))}
            continue
        if isinstance(value, TensorDescriptor):
            element = TYPES[value.base.dtype].removeprefix("*")
            signature[parameter.name] = f"tensordesc<{element}{value.block_shape}>"
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = TYPES[value.dtype if tensor else type(value)]
        if tensor or (special and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


def configurations(launches: Iterable[Launch], only: int | None = None) -> list[dict]:
    """Return the distinct things to compile: source, options, architecture, and who needs it.

    For every architecture that a kernel is for, or for one only.
    """
    found = {}
    for shape, kernel, arguments in launches:
        src = source(kernel, arguments)
        options = {name: arguments[name] for name in OPTIONS if name in arguments}
        key = kernel.__name__, *map(str, (src.signature, src.constants, src.attrs, options))
        found.setdefault(key, (src, options, []))[2].append(shape)
    return [
        {"source": src, "options": options, "shapes": needed, "arch": arch}
        for src, options, needed in found.values()
        for arch in architectures(src)
        if only in (None, arch)
    ]


def architectures(src: ASTSource) -> tuple[int, ...]:
    """Return what a kernel is for."""
    types = src.signature.values()
    if any(isinstance(t, str) and t.startswith("tensordesc") for t in types):
        return (90,)
    return ARCHITECTURES_OF_FLOAT8 if TYPES[FLOAT8] in types else ARCHITECTURES


def description(configuration: dict) -> dict:
    """Name a configuration; a shape is the fields of a Norm or Conv, an image, or an attention."""
    src = configuration["source"]
    names = [parameter.name for parameter in src.fn.params]
    return {
        "kernel": src.fn.__name__.strip("_"),
        "arch": f"sm_{configuration['arch']}",
        "warps": configuration["options"].get("num_warps", 4),
        "constants": {names[path[0]]: value for path, value in src.constants.items()},
        "shapes": [list(shape) for shape in configuration["shapes"]],
    }


def compiled(configuration: dict) -> triton.compiler.CompiledKernel:
    """Compile a configuration."""
    target = GPUTarget("cuda", configuration["arch"], 32)
    return triton.compile(configuration["source"], target=target, options=configuration["options"])


def figures(configuration: dict) -> dict:
    """Compile, and read the figures off the machine code.

    Loads and stores count instructions by width in bits; stack is bytes a thread, shared bytes. Of
    kernels with matrix products, mma counts the instructions of tensor cores, and copies those from
    global to shared memory. Of kernels that move boxes, boxes counts the instructions that do
    (UTMALDG loads, UTMASTG stores) and those that share registers out among specialized warps.
    """
    code = compiled(configuration)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage = disassemble(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        text = disassemble(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text)
    names = collections.Counter(name.partition(".")[0] for name in instructions)
    products = {name: names[name] for name in ("HGMMA", "QGMMA", "HMMA", "QMMA") if names[name]}
    boxes = {name: names[name] for name in ("UTMALDG", "UTMASTG", "USETMAXREG")}
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": names["LDL"] + names["STL"],
        "shared": code.metadata.shared,
        "loads": widths(instructions, "LDG"),
        "stores": widths(instructions, "STG"),
        "instructions": len(instructions) - names["NOP"],
        **({"copies": widths(instructions, "LDGSTS"), "mma": products} if products else {}),
        **({"boxes": boxes, "stages": code.metadata.num_stages} if boxes["UTMALDG"] else {}),
    }


def disassemble(tool: str, *arguments: str) -> str:
    """Run one of the tools that come with Triton; the figures may be on either stream."""
    result = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def widths(instructions: list[str], operation: str) -> dict[str, int]:
    """Count the instructions of global memory by their width in bits."""
    suffixes = [name.split(".")[1:] for name in instructions if name.startswith(f"{operation}.")]
    sizes = collections.Counter(
        next((int(size) for s in suffix if (size := s.lstrip("US")).isdecimal()), 32)
        for suffix in suffixes
    )
    return {str(size): sizes[size] for size in sorted(sizes, reverse=True)}


BRIEF = "kernel", "arch", "warps", "registers", "stack", "spills", "shared", "mma", "boxes"
KINDS = {
    "norms": norm_launches,
    "images": image_launches,
    "attention": attention_launches,
    "convolutions": conv_launches,
    "convolutions for sm_90": hopper_launches,
}


def seconds(configurations: list[dict]) -> float:
    """Return the seconds of processor time that it takes to compile configurations afresh.

    That of the assembler, a process of its own, is in it; that of other work on the machine is not.
    """
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        before = os.times()
        for configuration in configurations:
            compiled(configuration)
        return sum(os.times()[:4]) - sum(before[:4])


def seconds_of(networks: Networks) -> dict[str, dict]:
    """Return, by kind of kernel, how many networks need on sm_90, and the seconds for them."""
    found = {}
    for kind, launches in KINDS.items():
        needed = configurations(launches(networks), only=90)
        found[kind] = {"kernels": len(needed), "seconds": round(seconds(needed), 1)}
    return found


def main() -> None:
    """Write a report; with --every K, figures for one configuration in K only."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, metavar="K", help="skip figures but K-th")
    parser.add_argument("--brief", action="store_true", help="sm_90, without what code is for")
    parser.add_argument("--seconds", action="store_true", help="time compiling for CIFAR-10 only")
    options = parser.parse_args()
    report = {"triton": triton.__version__}
    if options.seconds:
        print(json.dumps(report | seconds_of([presets.cifar10]), indent=1))
        return
    rows = []
    needed = itertools.chain(*(launches(NETWORKS) for launches in KINDS.values()))
    needed = itertools.chain(needed, by_image_launches())
    only = 90 if options.brief else None
    for i, configuration in enumerate(configurations(needed, only)):
        row = description(configuration)
        row |= figures(configuration) if i % options.every == 0 else {}
        rows.append({name: row[name] for name in BRIEF if name in row} if options.brief else row)
    lines = ",\n".join(json.dumps(row) for row in rows)
    sys.stdout.write(f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
