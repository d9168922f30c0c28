"""Every backend that an op has on a GPU, forward and backward, against the reference in float64."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import ds
from ds import ops
from tests.ops.test_takes import FIT, MISFITS

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 0.06}  # some roundings of each
INDICES = torch.tensor([0, 7, 2**40])


def drawn(*shape: int) -> Tensor:
    x = ds.noise(5, range(shape[0]), shape[1:] or (1,)).view(shape)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def merge(x, weight, bias, shift, skip):
    y, merged = ops.fused_add_group_norm_silu(x, weight, bias, 4, shift=shift, skip=skip)
    return torch.cat([y, merged], 1)


def conv_norm(x, weight, bias, *norm):
    normed, y = ops.conv_group_norm_silu(x, weight, *norm, 4, bias=bias, keep=True)
    return torch.cat([normed, y], 1)


def adam(param, grad, mean, square):
    one = torch.ones((), device=param.device)
    lists = [param], [grad], [mean], [square.square()]
    norm = ops.adam_step(*lists, step=one, lr=one / 8, max_norm=1.0)
    return torch.cat([param.flatten(), norm.view(1)])


def update(x, output, table):
    copy = torch.empty_like(x)
    ops.solver_update(x, [output], table, torch.ones(1, dtype=torch.int64, device=x.device), copy)
    return x + copy


def batch(images):
    levels = (images * 40 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return torch.cat(ops.prepare_batch(levels, INDICES.to(images.device), 3, images.dtype), 1)


def scaled(x, weight, bias, scale, shift):
    return ops.group_norm_silu(x, *ops.scale_shift(weight, bias, scale, shift), 4)


TILES = ops.winograd_weight(drawn(32, 16, 3, 3) / 12)
PAIRS, WORTH = ops.winograd_int16_weight(drawn(32, 16, 3, 3) / 12)
PROJECTED = [drawn(2, 1, 16, 32)] * 3 + [drawn(32, 32) / 6, drawn(32), drawn(2, 16, 32)]
CONVOLVED = [drawn(2, 16, 8, 8), drawn(32, 16, 3, 3) / 12, drawn(32)]
# As the kernel for sm_90 takes them, in half precision only.
WIDE = [drawn(2, 64, 8, 8), drawn(128, 64, 3, 3) / 24, drawn(128)]


def tiles_of_integers(x, worth, bias):
    return ops.winograd_int16_conv(x, PAIRS.to(x.device), worth, bias)


# Of each op a use of it, and what that takes.
LEARNING = {
    "group_norm_silu": (
        lambda *xs: ops.group_norm_silu(*xs, 4), [drawn(2, 16, 8, 8), drawn(16), drawn(16)],
    ),
    "group_norm_silu_backward": (
        merge, [drawn(2, 8, 8, 8), drawn(16), drawn(16), drawn(2, 8), drawn(2, 8, 8, 8)],
    ),
    "attention": (ops.attention, PROJECTED[:3]),
    "attention_residual": (ops.attention_residual, PROJECTED),
    "conv3x3": (ops.conv3x3, CONVOLVED),
    "conv3x3_backward": (ops.conv3x3, CONVOLVED),
}  # fmt: skip
FORWARD = {
    "attention_residual": LEARNING["attention_residual"],
    "conv": (ops.conv, [*WIDE, drawn(2, 128, 8, 8)]),
    "conv_group_norm_silu": (conv_norm, [*WIDE, drawn(128), drawn(128)]),
    "winograd_conv": (ops.winograd_conv, [drawn(2, 16, 8, 8), TILES, drawn(32)]),
    "winograd_int16_conv": (tiles_of_integers, [drawn(2, 16, 8, 8), WORTH, drawn(32)]),
    "noise": (lambda x: ops.noise(3, INDICES.to(x.device), (5, 7)).to(x), [drawn(1)]),
    "quantize": (lambda x: ops.quantize(x).to(x), [drawn(2, 3, 5, 7).round(decimals=1) + 0.01]),
    "prepare_batch": (batch, [drawn(3, 3, 5, 7)]),
    "solver_update": (update, [drawn(2, 3, 8, 8), drawn(2, 3, 8, 8), drawn(4, 2)]),
    "adam_step": (adam, [drawn(24, 7), drawn(24, 7), drawn(24, 7), drawn(24, 7)]),
}  # fmt: skip
ROWS = [row for row in ops.table() if row.device == "cuda"]


def results(function, arguments: list[Tensor], learns: bool) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_(learns) for x in arguments]
    y = function(*leaves)
    if not learns:
        return [y]
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


def check(row: ops.Row, kinds: dict, dtype: torch.dtype, *, learns: bool) -> None:
    """Compare with the reference in float64, allowing for a few roundings."""
    if row.status == "missing":
        pytest.skip(row.reason)
    function, arguments = kinds[row.op]
    arguments = [x.to(dtype) for x in arguments]
    with ops.use_backend("reference"):
        exact = results(function, [x.double() for x in arguments], learns)
    with ops.use_backend(row.backend):
        found = results(function, [x.cuda() for x in arguments], learns)
    for a, b in zip(found, exact, strict=True):
        assert a.is_cuda and a.dtype == dtype
        assert (a.cpu() - b).norm() <= TOLERANCE[dtype] * b.norm()


def rows(kinds: dict) -> list:
    chosen = [row for row in ROWS if row.op in kinds]
    return [pytest.param(row, id=f"{row.op}-{row.backend}") for row in chosen]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("row", [p for p in rows(LEARNING) if p.id != "attention_residual-triton"])
def test_an_op_and_its_gradients(row, dtype):
    check(row, LEARNING, dtype, learns=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("row", [p for p in rows(LEARNING) if p.id.startswith("group_norm_silu-")])
def test_a_norm_with_an_affine_of_each_image(row, dtype):
    arguments = [drawn(2, 16, 8, 8), drawn(16), drawn(16), drawn(2, 16), drawn(2, 16)]
    check(row, {row.op: (scaled, arguments)}, dtype, learns=True)


@pytest.mark.parametrize("row", rows(FORWARD))
def test_an_op_without_a_gradient(row):
    dtype = torch.bfloat16 if row.backend == "hopper" else torch.float32
    check(row, FORWARD, dtype, learns=False)


def test_levels_have_the_same_bits_wherever_they_are_made_floats():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    exact = ops.dequantize(images)
    assert torch.equal(exact, images.movedim(-1, 1).float() / 127.5 - 1)
    assert torch.equal(ops.dequantize(images.cuda()).cpu(), exact)
    x0, _ = ops.prepare_batch(images.cuda(), INDICES[:1].cuda(), 0)
    assert torch.equal(x0.cpu(), exact)


@pytest.mark.parametrize(("name", "change", "message"), MISFITS)
@torch.no_grad()
def test_no_kernel_of_a_gpu_sees_what_does_not_fit(name, change, message):
    arguments = tree_map_only(Tensor, Tensor.cuda, [*(FIT[name] | change).values()])
    if "is written" in message and type(arguments[0]) is not Tensor:
        return  # an emulated tensor has no memory to look at
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        getattr(torch.ops.ds, name)(*arguments)


def test_every_op_is_tried():
    elsewhere = {"gather_rows", "group_norm_silu_float8"}  # of the CPU; tests/kernels
    assert {row.op for row in ROWS} == {*LEARNING, *FORWARD, *elsewhere}


def test_peers_in_float32_compute_in_float32():
    assert not (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
