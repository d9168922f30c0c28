"""The convolutions of a plan: by PyTorch's libraries, in tiles, and by our own kernel."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds import ops
from ds.engine.calls import (
    IN_TILE_PIXELS,
    ONE_PASS_PIXELS,
    Bias,
    Call,
    Launch,
    Norm,
    Run,
    Shape,
    Target,
    values,
)
from ds.nets.blocks import doubled, pixels
from ds.ops.conv.winograd import tiles
from ds.ops.conv.winograd_int16 import runs_fast

Convolve = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]  # of x, bias [C], residual


@dataclass(frozen=True, eq=False)
class Conv(Call):
    """A convolution; a second input, if any, is added to its result.

    With stride 2 the image is padded on the right and below only, or with `pad_all_sides` on all:
    by 1 for 3 or 4 taps, by 2 for 6.
    The channels of the result are cut into `parts` of one size, each an output.
    """

    weight: Tensor
    bias: Bias
    stride: int = 1
    parts: int = 1
    pad_all_sides: bool = False

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        weight, halves = target.cast(self.weight), self._pads_before
        padding = [0 if halves else (self.weight.shape[2] + 1 - self.stride) // 2] * 2
        strides = [self.stride] * 2
        if _has_onednn(target):
            c, h, w = shapes[0]
            size = [target.images, c, h + halves, w + halves]
            weight = torch.ops.mkldnn._reorder_convolution_weight(
                weight, padding, strides, [1, 1], 1, size
            )

            def convolve(x: Tensor, bias: Tensor | None) -> Tensor:
                return torch.ops.mkldnn._convolution_pointwise(
                    x, weight, bias, padding, strides, [1, 1], 1, "none", [], ""
                )
        elif self._is_product and target.device.type == "cuda":
            matrix = weight.flatten(1)

            def convolve(x: Tensor, bias: Tensor | None) -> Tensor:
                y = F.linear(pixels(x).flatten(0, 1), matrix, bias)
                return y.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
        else:

            def convolve(x: Tensor, bias: Tensor | None) -> Tensor:
                return F.conv2d(x, weight, bias, strides, padding)

        def add(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
            y = convolve(F.pad(x, (0, 1, 0, 1)) if halves else x, bias)
            return y if residual is None else y.add_(residual)

        return _in_parts(self.parts, _biased(target.bias(self.bias), add))

    @property
    def _pads_before(self) -> bool:
        """Whether the image is padded before the convolution, which knows equal padding alone."""
        return self.stride == 2 and not self.pad_all_sides

    @property
    def _is_product(self) -> bool:
        """Whether it is a matrix product: a GPU's libraries fuse the bias into those only.

        For other convolutions they add it in a separate pass.
        """
        return self.weight.shape[2] == 1

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        _, h, w = shapes[0]
        return ((len(self.weight) // self.parts, h // self.stride, w // self.stride),) * self.parts

    def launches(self, *shapes: Shape) -> tuple[Launch, ...]:
        c, h, w = shapes[0]
        made, seen = values(self.shapes(*shapes)), c * h * w
        found = []
        if self._pads_before:
            seen = c * (h + 1) * (w + 1)
            found += [
                Launch("pad: zeros", seen, seen),
                Launch("pad: copy", 2 * c * h * w, 2 * c * h * w),
            ]
        found.append(Launch(self.kind, seen + made))
        if self.bias is not None and not self._is_product:
            found.append(Launch("bias", 2 * made, 2 * made))
        if len(shapes) > 1:
            found.append(Launch("add", 3 * made, 2 * made))
        return tuple(found)

    def flops(self, *shapes: Shape) -> int:
        _, h, w = self.shapes(*shapes)[0]
        return 2 * h * w * self.weight.numel()

    def weights(self) -> int:
        return self.weight.numel()

    @property
    def kind(self) -> str:
        return f"conv {self.weight.shape[2]}x{self.weight.shape[3]}" + "/2" * (self.stride == 2)


@dataclass(frozen=True, eq=False)
class UpsampleConv(Call):
    """Nearest upsampling and a 3x3 convolution, as a 2x2 convolution for each of four phases.

    The four run as one convolution with four times the channels, edge pixels included.
    """

    weight: Tensor
    bias: Bias

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        out = self.weight.shape[0]
        run = Conv(ops.phase_weight(self.weight), None).prepare(target, *shapes)
        bias = target.bias(self.bias)

        def phases(row: Tensor, x: Tensor) -> Tensor:
            _, _, h, w = x.shape
            parts = run(row, x)  # [N, 4 out, h + 1, w + 1]
            y = x.new_empty((len(x), 2 * h, 2 * w, out)).permute(0, 3, 1, 2)
            for phase in range(4):
                a, b = divmod(phase, 2)
                part = parts[:, phase * out : (phase + 1) * out, a : a + h, b : b + w]
                place = y[:, :, a::2, b::2]
                if self.bias is None:
                    place.copy_(part)
                else:
                    torch.add(part, bias(row)[..., None, None], out=place)
            return y

        return phases

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        _, h, w = shapes[0]
        return ((self.weight.shape[0], 2 * h, 2 * w),)

    def flops(self, *shapes: Shape) -> int:
        _, h, w = shapes[0]
        return 2 * (h + 1) * (w + 1) * self.weights()

    def weights(self) -> int:
        return self.weight.numel() * 16 // 9

    def launches(self, *shapes: Shape) -> tuple[Launch, ...]:
        (c, h, w), made = shapes[0], values(self.shapes(*shapes))
        apart = 4 * len(self.weight) * (h + 1) * (w + 1)
        scatter = Launch("phase", made // 2, made // 2)
        return (Launch(self.kind, c * h * w + apart, apart - made), *[scatter] * 4)

    @property
    def kind(self) -> str:
        return "phases 2x2"


@dataclass(frozen=True, eq=False)
class UpsamplePoints(Call):
    """Nearest upsampling and a 1x1 convolution, in the other order."""

    weight: Tensor
    bias: Bias

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        run = Conv(self.weight, self.bias).prepare(target, *shapes)
        return lambda row, x: doubled(run(row, x))

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        _, h, w = shapes[0]
        return ((len(self.weight), 2 * h, 2 * w),)

    def flops(self, *shapes: Shape) -> int:
        return Conv(self.weight, self.bias).flops(*shapes)

    def weights(self) -> int:
        return self.weight.numel()

    def launches(self, *shapes: Shape) -> tuple[Launch, ...]:
        made = values(self.shapes(*shapes))
        convolves = Launch("conv 1x1", values(shapes) + made // 4, made // 4)
        return convolves, Launch(self.kind, made + made // 4, made // 4)

    @property
    def kind(self) -> str:
        return "conv 1x1 x2"


@dataclass(frozen=True, eq=False)
class Winograd(Call):
    """A 3x3 convolution in 36 products for 16 pixels, after doubling the pixels if `doubled`.

    A second input, if any, is added to its result.
    """

    weight: Tensor
    bias: Bias
    doubled: bool = False

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        if target.dtype == torch.bfloat16 and runs_fast():
            weights, convolve = ops.winograd_int16_weight(self.weight), ops.winograd_int16_conv
        else:
            weights, convolve = (ops.winograd_weight(self.weight, target.wide),), ops.winograd_conv
        weights = tuple(weight.to(target.device) for weight in weights)
        return _biased(
            target.bias(self.bias, target.wide),
            lambda x, bias, residual: convolve(x, *weights, bias, residual, doubled=self.doubled),
        )

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        _, h, w = shapes[0]
        return ((self.weight.shape[0], h << self.doubled, w << self.doubled),)

    def flops(self, *shapes: Shape) -> int:
        ((_, h, w),) = self.shapes(*shapes)
        return 2 * tiles(h, w) * self.weights()

    def weights(self) -> int:
        return 4 * self.weight.numel()

    @property
    def kind(self) -> str:
        return "winograd" + " x2" * self.doubled


@dataclass(frozen=True, eq=False)
class ImplicitGemm(Call):
    """A convolution by our own kernel, ds.ops.conv, perhaps with the norm that follows.

    A second input, if any, is added to the convolution's result. With `keep`, that result is a
    second output, after the normalized one. With `float8`, input and weight are float8. A named
    `backend` of the op is forced.
    """

    conv: Conv | UpsampleConv
    norm: Norm | None = None
    keep: bool = False
    float8: bool = False
    backend: str = ""

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        doubled, stride = isinstance(self.conv, UpsampleConv), getattr(self.conv, "stride", 1)
        weight, scale = self.conv.weight, None
        if doubled:
            weight = ops.phase_weight(weight)
        if self.float8:
            weight, scale = ops.float8_weight(weight.to(target.device))
            weight = weight.contiguous(memory_format=torch.channels_last)
        else:
            weight = target.cast(weight)
        options = {"stride": stride, **({} if scale is None else {"scale": scale})}
        run = (self._alone if self.norm is None else self._normed)(target, weight, options)
        return _by(self.backend, run) if self.backend else run

    def _alone(self, target: Target, weight: Tensor, options: dict[str, Any]) -> Run:
        bias, parts = target.bias(self.conv.bias, target.wide), getattr(self.conv, "parts", 1)

        def run(row: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
            return ops.conv(x, weight, bias(row), residual, **options)

        return _in_parts(parts, run)

    def _normed(self, target: Target, weight: Tensor, options: dict[str, Any]) -> Run:
        shift = self.conv.bias if self.norm.shift is None else self.norm.shift
        bias, settings = target.bias(shift, target.wide), self.norm.settings(target)
        options = {**options, "silu": self.norm.silu, "keep": self.keep}

        def run(row: Tensor, x: Tensor, residual: Tensor | None = None):
            normed, y = ops.conv_group_norm_silu(
                x, weight, *settings(row), bias=bias(row), residual=residual, **options
            )
            return (normed, y) if self.keep else normed

        return run

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return self.conv.shapes(*shapes) * (1 + self.keep)

    def launches(self, *shapes: Shape) -> tuple[Launch, ...]:
        out, doubled = self.conv.shapes(*shapes), isinstance(self.conv, UpsampleConv)
        made, pixels = values(out), math.prod(out[0][1:])
        convolves = Launch(self.kind, values(shapes) + made)
        if self.norm is None:
            return (convolves,)
        if pixels <= IN_TILE_PIXELS and not doubled:
            return (Launch(self.kind, values(shapes) + made * (1 + self.keep)),)
        normalizes = Launch("norm", 2 * made)
        if pixels <= ONE_PASS_PIXELS:
            return convolves, normalizes
        sums = (Launch("norm: sums", made),) * doubled  # else our convolution leaves them
        return convolves, *sums, Launch("norm: groups", 0), normalizes

    def flops(self, *shapes: Shape) -> int:
        _, h, w = (shapes if isinstance(self.conv, UpsampleConv) else self.conv.shapes(*shapes))[0]
        return 2 * h * w * self.weights()

    def weights(self) -> int:
        return self.conv.weights()

    @property
    def kind(self) -> str:
        kind = f"gemm {self.conv.kind.split()[1]}"
        return kind + "+gn" * (self.norm is not None) + " float8" * self.float8


def _biased(bias: Callable[[Tensor], Tensor | None], convolve: Convolve) -> Run:
    """Return run(row, x, residual=None) for a convolution that knows one bias for all images.

    The biases of each image are added after it.
    """

    def run(row: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
        found = bias(row)
        if found is None or found.dim() == 1:
            return convolve(x, found, residual)
        return convolve(x, None, residual).add_(found[:, :, None, None])

    return run


def _in_parts(parts: int, run: Run) -> Run:
    """Return the same function with its result cut into parts."""
    return run if parts == 1 else lambda *args: run(*args).chunk(parts, 1)


def _has_onednn(target: Target) -> bool:
    """Return whether oneDNN computes convolutions here, with weights packed ahead."""
    known = target.dtype == torch.float32 or (
        target.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return target.device.type == "cpu" and torch.backends.mkldnn.is_available() and known


def _by(backend: str, run: Run) -> Run:
    """Return the same function with the op's backend forced."""

    def forced(*args: Tensor) -> Tensor | tuple[Tensor, ...]:
        with ops.use_backend(backend):
            return run(*args)

    return forced
