"""Compile every Triton kernel for GPUs that need not be there, and report what the code is like.

    python benchmarks/aot.py > benchmarks/results/aot.json

The kernels are those that the launchers would launch for each GroupNorm, each attention and each
convolution of the paper's networks, in bfloat16 and, where a plan has it, in float8, for attention
with heads of 64 channels, and for the noise, batches, solver steps and levels of the images:
networks and launchers run on meta tensors, and the launches are noted, not done.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds import ops, presets
from ds.engine import Place, Plan, Rewrites
from ds.engine.calls import ImplicitGemm
from ds.kernels import (
    attention,
    conv,
    group_norm_silu,
    noise,
    prepare_batch,
    quantize,
    solver_update,
)
from ds.nets import fold_attention

NETWORKS = (presets.cifar10, presets.celeba, presets.lsun_bedroom, presets.lsun_church)
# Pixels, heads, channels of a head, and channels of the projection or 0: heads of 64, which other
# networks have. Those of several heads that are refused are not here.
HEADS_OF_64 = [
    *((pixels, heads, 64, 0) for pixels in (64, 256) for heads in (4, 8)),
    (64, 4, 64, 256), (64, 8, 64, 512), (256, 4, 64, 256),
]  # fmt: skip
ARCHITECTURES = (80, 90)
FLOAT8, ARCHITECTURES_OF_FLOAT8 = torch.float8_e4m3fn, (89, 90)
OPTIONS = "num_warps", "num_stages", "enable_fp_fusion"  # of a launch, for the compiler
BATCH = 32
DEFAULTS = None, None, None, False  # of the op's shift, residual, skip and keep
TYPES = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int64: "*i64",
    FLOAT8: "*fp8e4nv", int: "i32", float: "fp32",
}  # fmt: skip

Launch = tuple[tuple, JITFunction, dict]  # for what shape, the kernel, its arguments by name


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
            x, _, _, groups, _, silu, *parts = args
            shift, residual, skip, keep = [*parts, *DEFAULTS[len(parts) :]]
            size = x.shape[1], 0 if skip is None else skip.shape[1], x[0, 0].numel(), groups
            self.found.add(Norm(*size, silu, shift is not None, residual is not None, keep))
        return func(*args, **kwargs or {})


def norms() -> list[Norm]:
    """Return the distinct GroupNorms of the paper's networks.

    And each after a residual block once more, as it would be if the addition that ends the block,
    and the bias of the convolution before that, were left to it.
    """
    with torch.device("meta"), torch.no_grad(), GroupNorms() as noted:
        for preset in NETWORKS:
            net = preset().net.build().bfloat16()
            net(torch.empty(1, *net.shape), torch.zeros(1))
    after_blocks = {
        norm._replace(shift=True, residual=True, keep=True)
        for norm in noted.found
        if norm.silu and not norm.shift and not norm.skip
    }
    return sorted(noted.found | after_blocks)


@contextlib.contextmanager
def noting() -> Iterator[list[tuple[JITFunction, dict]]]:
    """Yield a list that fills with kernels and their arguments by name, in place of launches."""
    noted = []

    def note(kernel, *args, grid, warmup, **kwargs):
        noted.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))

    with mock.patch.object(JITFunction, "run", note):
        yield noted


def norm_launches() -> Iterator[Launch]:
    """Yield each kernel of a forward and a backward pass of the networks' GroupNorms.

    And those that end in float8, whose shape is a Norm and "float8".
    """
    empty = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    for norm in norms():
        x = empty(BATCH, norm.pixels, norm.channels)
        shift = empty(BATCH, norm.channels) if norm.shift else None
        residual = x if norm.residual else None
        skip = empty(BATCH, norm.pixels, norm.skip) if norm.skip else None
        affine = [empty(norm.channels + norm.skip)] * 2
        with noting() as noted:
            y, mean, rstd, merged = group_norm_silu.group_norm_silu(
                x, *affine, norm.groups, 1e-6, norm.silu, shift, residual, skip, norm.keep
            )
            group_norm_silu.group_norm_silu_backward(
                y, merged if norm.keep else x, *affine, mean, rstd, norm.groups, norm.silu,
                norm.channels, shift, residual, skip, merged,
            )  # fmt: skip
        yield from ((norm, *launch) for launch in noted)
        if norm.silu and not norm.residual:
            with noting() as noted:
                group_norm_silu.group_norm_silu(
                    x, *affine, norm.groups, 1e-6, True, shift, None, skip, norm.keep, FLOAT8
                )
            narrow = (launch for launch in noted if "y_ptr" in launch[1])  # not the sums
            yield from (((*norm, "float8"), *launch) for launch in narrow)


def image_launches() -> Iterator[Launch]:
    """Yield each kernel that makes noise, a batch, a solver's step or levels of images."""
    with torch.device("meta"):
        shapes = sorted({tuple(preset().net.build().shape) for preset in NETWORKS})
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


def attention_launches() -> Iterator[Launch]:
    """Yield the kernel of each attention of the networks, plain and folded, and of heads of 64.

    A shape is pixels, heads, channels of a head, and of the projection, 0 where it is folded.
    """
    found = set(HEADS_OF_64)

    def note(q, k, v, weight, bias, residual):
        found.add((q.shape[2], q.shape[1], q.shape[3], 0 if weight is None else len(weight)))
        return torch.empty_like(residual)

    with torch.device("meta"), torch.no_grad(), mock.patch.object(ops, "attention_residual", note):
        for preset in NETWORKS:
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


def convs() -> list[Conv]:
    """Return the distinct convolutions of the paper's networks, with and without norms."""
    found = set()
    for preset in NETWORKS:
        with torch.device("meta"):
            net = preset().net.build()
        for norms, float8 in ((False, False), (True, False), (False, True)):
            place = Place(torch.device("meta"), torch.bfloat16, BATCH, float8)
            own = Rewrites(shift_into_conv=False, winograd=False, norm_into_conv=norms)
            plan = Plan.of(net, place, own)
            for call, inputs, outputs in plan.steps:
                if not isinstance(call, ImplicitGemm):
                    continue
                (channels, height, _), (out, *_) = (plan.shapes[n[0]] for n in (inputs, outputs))
                layer = call.norm and call.norm.layer
                given = call.conv.bias is not None or bool(call.norm and call.norm.shift)
                groups, silu = (
                    (layer.groups, layer.op is ops.group_norm_silu) if layer else (0, False)
                )
                parts = given, len(inputs) > 1, groups, silu, call.keep
                found.add(Conv(call.kind.removeprefix("gemm "), channels, out, height, *parts))
    return sorted(found)


def conv_launches() -> Iterator[Launch]:
    """Yield each kernel of the networks' convolutions."""
    empty = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    for case in convs():
        kernel, stride = int(case.kind[0]), 2 if "/2" in case.kind else 1
        dtype = FLOAT8 if "float8" in case.kind else torch.bfloat16
        x = empty(BATCH, case.height, case.height, case.channels, dtype=dtype)
        rows = case.out * (4 if kernel == 2 else 1)
        weight = empty(rows, kernel, kernel, case.channels, dtype=dtype)
        height = case.height * 2 if kernel == 2 else case.height // stride
        wide = torch.empty(case.out, device="meta")
        bias = wide if case.bias else None
        residual = empty(BATCH, height, height, case.out) if case.residual else None
        arguments = x, weight, bias, residual, stride
        with noting() as noted:
            if case.groups:
                conv.conv_group_norm_silu(
                    *arguments, wide, wide, case.groups, 1e-6, case.silu, case.keep
                )
            else:
                conv.conv(*arguments, wide if dtype == FLOAT8 else None)
        yield from ((case, *launch) for launch in noted)


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
        tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = TYPES[value.dtype if tensor else type(value)]
        if tensor or (special and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


def configurations() -> list[dict]:
    """Return the distinct things to compile: source, options, architecture, and who needs it."""
    found = {}
    launches = norm_launches(), image_launches(), attention_launches(), conv_launches()
    for shape, kernel, arguments in itertools.chain(*launches):
        src = source(kernel, arguments)
        options = {name: arguments[name] for name in OPTIONS if name in arguments}
        key = kernel.__name__, *map(str, (src.signature, src.constants, src.attrs, options))
        found.setdefault(key, (src, options, []))[2].append(shape)
    float8 = TYPES[FLOAT8]
    return [
        {"source": src, "options": options, "shapes": needed, "arch": arch}
        for src, options, needed in found.values()
        for arch in (ARCHITECTURES_OF_FLOAT8 if float8 in src.signature.values() else ARCHITECTURES)
    ]


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


def figures(configuration: dict) -> dict:
    """Compile, and read the figures off the machine code.

    Loads and stores count instructions by width in bits; stack is bytes a thread, shared bytes. Of
    kernels with matrix products, mma counts the instructions of tensor cores, and copies those from
    global to shared memory.
    """
    compiled = triton.compile(
        configuration["source"],
        target=GPUTarget("cuda", configuration["arch"], 32),
        options=configuration["options"],
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = disassemble(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = disassemble(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code)
    products = collections.Counter(re.findall(r"\b[HQ]G?MMA\b", " ".join(instructions)))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": sum(name.startswith(("LDL", "STL")) for name in instructions),
        "shared": compiled.metadata.shared,
        "loads": widths(instructions, "LDG"),
        "stores": widths(instructions, "STG"),
        "instructions": sum(name != "NOP" for name in instructions),
    } | ({"copies": widths(instructions, "LDGSTS"), "mma": dict(products)} if products else {})


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


def main() -> None:
    """Write the report; with --every K, figures for one configuration in K only."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, metavar="K", help="skip figures but K-th")
    every = parser.parse_args().every
    rows = [
        description(configuration) | (figures(configuration) if i % every == 0 else {})
        for i, configuration in enumerate(configurations())
    ]
    lines = ",\n".join(json.dumps(row) for row in rows)
    sys.stdout.write(f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
