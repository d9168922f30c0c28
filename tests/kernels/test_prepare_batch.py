"""The Triton kernel of prepare_batch: x0 and, in channels_last memory, noise to the bit.

The interpreter cuts float32 off to bfloat16 where a GPU rounds: one unit in the last place.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs Triton (pip install --no-deps triton)")

from ds import ops
from ds.ops import noise
from ds.ops.dispatch.op import Unsupported
from ds.ops.kernels import prepare_batch as kernels
from ds.ops.noise import _op as noise_op
from ds.ops.prepare_batch import _op
from tests.kernels import DEVICE, DTYPES, NHWC
from tests.ops.test_noise import INDICES
from tests.ops.test_prepare_batch import levels
from tests.oracle import poison


def run(images, indices, seed, dtype):
    launch = _op._load("cuda", "triton")
    x0, noise = launch(images.to(DEVICE), indices.to(DEVICE), seed, dtype)
    return x0.cpu(), noise.cpu()


def check(images, indices, seed, dtype) -> None:
    x0, noise = run(images, indices, seed, dtype)
    assert x0.is_contiguous(memory_format=NHWC) and noise.stride() == x0.stride()
    exact = images.movedim(-1, 1).float() / 127.5 - 1
    unit = torch.finfo(dtype).eps if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.0
    assert ((x0.float() - exact.to(dtype).float()).abs() <= unit * exact.abs()).all()
    alone = noise_op._load("cuda", "triton")(indices.to(DEVICE), seed, x0[0].numel(), dtype)
    assert torch.equal(noise.flatten(1), alone.cpu())


@settings(max_examples=12, deadline=None)
@given(
    size=st.tuples(st.sampled_from([1, 3, 8, 37]), st.integers(1, 33)),
    channels=st.integers(1, 5),
    seed=st.integers(-(2**63), 2**63 - 1),
    dtype=st.sampled_from(DTYPES),
    planes=st.booleans(),
)
def test_any_shape_and_strides(size, channels, seed, dtype, planes):
    images = levels((2, channels, *size)).movedim(1, -1) if planes else levels((2, *size, channels))
    check(images, INDICES[1:6:3], seed, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_every_level_becomes_its_float(dtype):
    check(torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1), INDICES[:1], 0, dtype)


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (2, 0, 4, 3)], ids=str)
def test_nothing_asked_is_nothing_made(shape):
    x0, noise = run(levels(shape), INDICES[: shape[0]], 0, torch.float32)
    assert x0.shape == noise.shape == (shape[0], shape[3], *shape[1:3])


def test_bits_depend_on_neither_batch_order_nor_repetition(monkeypatch):
    images, indices = levels((3, 23, 19, 3)), INDICES[:3]
    whole = run(images, indices, 5, torch.float32)
    turned = run(images.flip(0), indices.flip(0), 5, torch.float32)
    poison(monkeypatch)
    again = run(images, indices, 5, torch.float32)
    alone = run(images[1:2], indices[1:2], 5, torch.float32)
    for a, b, c, d in zip(whole, again, turned, alone, strict=True):
        assert torch.equal(a, b)  # so every element is written, too
        assert torch.equal(a, c.flip(0))
        assert torch.equal(a[1:2], d)


def test_a_program_writes_its_own_tiles_and_nothing_else():
    """The interpreter runs programs in turn and would hide that one writes into the next one's."""
    images = levels((1, 5, 7, 3)).to(DEVICE)
    x0, z = (torch.full((1, 5, 7, 3), torch.nan, device=DEVICE) for _ in range(2))
    kernels._prepare_batch_kernel[(1,)](
        images, INDICES.to(DEVICE), x0, z, 105, 35, 2, 1, 0, CHANNELS=3, BLOCKS=16
    )
    expected = noise(1, INDICES[:1], (3, 5, 7)).flatten()[:64]
    assert torch.equal(x0.flatten().isnan().cpu(), torch.arange(105) >= 64)
    made = z.movedim(-1, 1).flatten().cpu()
    assert torch.equal(made.isnan(), torch.arange(105) >= 64)
    torch.testing.assert_close(made[:64], expected)


def test_what_it_does_not_take_it_leaves_to_others():
    with pytest.raises(Unsupported, match=r"not torch.float64"):
        run(levels((1, 2, 2, 1)), INDICES[:1], 0, torch.float64)


@pytest.mark.gpu
def test_the_op_runs_it_on_a_gpu():
    images = levels((7, 5, 7, 3)).cuda()
    expected = run(images, INDICES, 5, torch.bfloat16)
    found = ops.prepare_batch(images, INDICES.cuda(), 5, torch.bfloat16)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
