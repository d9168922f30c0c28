"""Every op but GroupNorm-SiLU, of which a call's overhead: eager, compiled, each backend, ours.

The sizes are those of the CIFAR-10 network and its images. Eager and compiled noise is Philox in
PyTorch's integers, since torch.randn draws other numbers. Bytes: inputs and outputs, each once.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Side, Size, batch
from ds import ops
from ds.ops.noise import reference as philox_normals
from ds.training import presets

SHAPE = (3, 32, 32)
ROW = 4 * 3 * 32 * 32  # bytes of an image in float32
Run = Callable[[Any], Any]


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Yield a case or two for each op."""
    images = batch(device, size, gpu=4096, cpu=64)
    yield overhead(device)
    for make in (attention, noise, prepare_batch, quantize, solver_update):
        torch._dynamo.reset()
        yield make(images, device)
    if device.type == "cpu":  # elsewhere it is PyTorch's
        for images, channels, pixels in ((8, 128, 32), (8, 256, 16), (4, 256, 8)):
            yield from conv3x3(images, channels, pixels)
    if size == "full":
        yield adam_step(device)


def sides(
    name: str, device: torch.device, eager: Run, ours: Run, prepare: Run, *, compiles: bool = True
) -> dict[str, Side]:
    """Return the sides of an op: eager, compiled, the backends that are not chosen, and ours."""
    rows = [row for row in ops.table() if (row.op, row.device) == (name, device.type)]
    found = {"eager": eager}
    if compiles:
        found["inductor"] = torch.compile(eager, dynamic=False)
    found |= {
        row.backend: functools.partial(_forced, row.backend, ours)
        for row in rows
        if row.status == "ready"
    }
    found["ours"] = ours
    return {name: Side(_quietly(run), prepare) for name, run in found.items()}


def _forced(backend: str, run: Run, state: Any) -> Any:
    with ops.use_backend(backend):
        return run(state)


def _quietly(run: Run) -> Run:
    """Return what runs without gradients, as sampling and optimisers do."""

    def quiet(state: Any) -> Any:
        with torch.no_grad():
            return run(state)

    return quiet


def overhead(device: torch.device) -> Case:
    """Call GroupNorm-SiLU on four values, with a gradient: what a call costs beside its work."""
    x, weight, bias = torch.randn(1, 4, 1, 1), torch.ones(4), torch.zeros(4)
    args = [t.to(device).requires_grad_() for t in (x, weight, bias)]

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(torch.group_norm(x, 1, weight, bias, 1e-6))

    def dispatched(_: Any) -> Tensor:
        return torch.ops.ds.group_norm_silu(*args, 1, 1e-6, True)[0]

    runs = {
        "eager": lambda _: eager(*args),
        "dispatcher": dispatched,
        "ours": lambda _: ops.group_norm_silu(*args, 1),
    }
    return Case(
        "overhead of a call with a gradient",
        {name: Side(run) for name, run in runs.items()},
        lambda: eager(*(t.detach().double() for t in args)),
    )


def attention(images: int, device: torch.device) -> Case:
    """Attend over 16 x 16 pixels of 256 channels, project, add."""
    randn = functools.partial(torch.randn, device=device)
    count, tokens, width = max(1, images // 8), 256, 256
    q, k, v = (randn(count, 1, tokens, width) for _ in range(3))
    weight, bias = randn(width, width) / 16, randn(width)
    residual = randn(count, tokens, width)
    parts = q, k, v, weight, bias, residual

    def eager(_: Any, q=q, k=k, v=v, weight=weight, bias=bias, residual=residual) -> Tensor:
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.linear(heads, weight, bias) + residual

    return Case(
        f"attention {[count, tokens, width]}",
        sides(
            "attention_residual", device, eager, lambda _: ops.attention_residual(*parts), _nothing
        ),
        lambda: eager(None, *(part.double() for part in parts)),
        bytes=5 * residual.nbytes,
        flops=count * (4 * width * tokens**2 + 2 * tokens * width**2),
    )


def conv3x3(images: int, channels: int, size: int) -> Iterator[Case]:
    """Convolve, and make its two gradients, each by itself; FLOPs are those of the sum."""
    shape = (images, channels, size, size)
    x, dy = (torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(2))
    weight = torch.randn(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    weight /= (9 * channels) ** 0.5

    def eager(_: Any, x: Tensor = x, weight: Tensor = weight, dy: Tensor = dy, part: int = 0):
        if part == 0:
            return F.conv2d(x, weight, padding=1)
        wanted = [part == 1, part == 2, False]
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
        )[part - 1]

    def ours(_: Any, part: int) -> Tensor:
        if part == 0:
            return ops.conv3x3(x, weight)
        wanted = [part == 1, part == 2]
        return torch.ops.ds.conv3x3_backward(dy, x, weight, wanted)[part - 1]

    for part, name in enumerate(("forward", "gradient of x", "gradient of the weight")):
        runs = {"eager": eager, "ours": ours}
        yield Case(
            f"conv3x3, {name} {list(shape)}",
            {side: Side(_quietly(functools.partial(run, part=part))) for side, run in runs.items()},
            functools.partial(eager, None, *(t.double() for t in (x, weight, dy)), part),
            flops=2 * 9 * images * (size * channels) ** 2,
            factor=8.0,  # the points of Winograd's tiles cost a digit at most
        )


def noise(images: int, device: torch.device) -> Case:
    """Draw the noise of images."""
    indices, size = torch.arange(images, device=device), 3 * 32 * 32
    exact = functools.partial(philox_normals, indices, 7, size)
    return Case(
        f"noise {[images, *SHAPE]}",
        sides(
            "noise",
            device,
            lambda _: philox_normals(indices, 7, size, torch.float32),
            lambda _: ops.noise(7, indices, (size,)),
            _nothing,
        ),
        lambda: exact(torch.float64),
        bytes=images * ROW,
        images=images,
    )


def prepare_batch(images: int, device: torch.device) -> Case:
    """Make a training batch of stored images."""
    indices = torch.arange(images, device=device)
    levels = torch.randint(256, (images, 32, 32, 3), device=device, dtype=torch.uint8)

    def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x0 = levels.movedim(-1, 1).to(dtype) / 127.5 - 1
        z = philox_normals(indices, 7, 3 * 32 * 32, dtype).view(images, *SHAPE)
        return x0, z.contiguous(memory_format=torch.channels_last)

    return Case(
        f"prepare_batch {list(levels.shape)}",
        sides(
            "prepare_batch",
            device,
            lambda _: batch(torch.float32),
            lambda _: ops.prepare_batch(levels, indices, 7),
            _nothing,
        ),
        lambda: batch(torch.float64),
        bytes=images * (2 * ROW + ROW // 4),
        images=images,
    )


def quantize(images: int, device: torch.device) -> Case:
    """Bring images into uint8; the exact answer is not rounded, so a side is off by half."""
    x = torch.randn(images, *SHAPE, device=device).contiguous(memory_format=torch.channels_last)

    def levels(x: Tensor) -> Tensor:
        return (x.clamp(-1, 1) * 127.5 + 127.5).movedim(1, -1)

    return Case(
        f"quantize {[images, *SHAPE]}",
        sides(
            "quantize",
            device,
            lambda _: levels(x).round().to(torch.uint8),
            lambda _: ops.quantize(x),
            _nothing,
        ),
        lambda: levels(x.double()),
        bytes=images * (ROW + ROW // 4),
        images=images,
    )


def solver_update(images: int, device: torch.device) -> Case:
    """Take a step of DDIM, with a copy in bfloat16 for the network."""
    x = torch.randn(images, *SHAPE, device=device)
    h, table = torch.randn_like(x), torch.tensor([[1.1, -0.3], [0.9, 0.2]], device=device)
    step = torch.ones(1, dtype=torch.int64, device=device)

    def eager(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, copy = state
        a, b = table.to(x.dtype).index_select(0, step)[0].unbind()
        x.mul_(a).add_(b * h)
        return x, copy.copy_(x)

    def ours(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, copy = state
        ops.solver_update(x, [h], table, step, copy)
        return x, copy

    return Case(
        f"solver_update {list(x.shape)}",
        sides(
            "solver_update",
            device,
            eager,
            ours,
            lambda: (x.clone(), torch.zeros_like(x).bfloat16()),
        ),
        lambda: [eager((x.double(), torch.zeros_like(x).double()))[0]] * 2,
        bytes=images * (3 * ROW + ROW // 2),
    )


def adam_step(device: torch.device) -> Case:
    """Move all weights of the CIFAR-10 network, and their average."""
    with torch.device("meta"):
        shapes = [weight.shape for weight in presets.cifar10().net.build().parameters()]
    state = [[torch.randn(s, device=device) for s in shapes] for _ in range(5)]
    for tensor in state[3]:
        tensor.abs_()
    size = sum(tensor.nbytes for tensor in state[0])
    settings = {"betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.0}

    def prepare() -> list[list[Tensor]]:
        return [[tensor.clone() for tensor in tensors] for tensors in state]

    def eager(state: Sequence[list[Tensor]]) -> list[Tensor]:
        params, grads, firsts, seconds, averages = state
        optimizer = torch.optim.Adam(params, lr=1e-3, fused=params[0].dtype == torch.float32)
        optimizer.param_groups[0] |= settings
        for param, grad, m, v in zip(params, grads, firsts, seconds, strict=True):
            param.grad = grad
            step = torch.ones((), dtype=torch.float32, device=device)
            optimizer.state[param] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
        optimizer.step()
        torch._foreach_lerp_(averages, params, 1 - 0.995)
        return [params[0], averages[0]]

    def ours(state: Sequence[list[Tensor]]) -> list[Tensor]:
        *parts, averages = state
        step, lr = torch.ones((), device=device), torch.tensor(1e-3, device=device)
        ops.adam_step(
            *parts, step=step, lr=lr, averages=averages, ema_decay=0.995, betas=(0.9, 0.98)
        )
        return [parts[0][0], averages[0]]

    wide = [[tensor.double() for tensor in tensors[:1]] for tensors in state]
    return Case(
        f"adam_step, {len(shapes)} tensors, {size // 4:,} weights",
        sides("adam_step", device, eager, ours, prepare, compiles=False),
        lambda: eager(wide),
        bytes=9 * size,
        missing={"inductor": "compiling lists of so many tensors takes minutes"},
    )


def _nothing() -> None:
    return None
