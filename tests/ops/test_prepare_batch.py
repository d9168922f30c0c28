"""prepare_batch: x0 to the bit, and the noise of ds.ops.noise to the bit, for every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ds.ops
from tests.ops.test_noise import INDICES
from tests.oracle import poison

BACKENDS = ["reference", "cpu"]
both_backends = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def levels(shape) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


def check(images: Tensor, indices: Tensor, seed: int, dtype: torch.dtype) -> None:
    x0, noise = ds.ops.prepare_batch(images, indices, seed, dtype)
    rows, height, width, channels = images.shape
    shape = channels, height, width
    assert x0.is_contiguous(memory_format=torch.channels_last)
    assert noise.stride() == x0.stride()
    assert torch.equal(x0, (images.movedim(-1, 1).float() / 127.5 - 1).to(dtype))
    assert torch.equal(noise, ds.ops.noise(seed, indices, shape, dtype))
    assert noise.shape == (rows, *shape)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 3),
    size=st.tuples(st.sampled_from([0, 1, 3, 8, 37]), st.integers(0, 33)),
    channels=st.integers(1, 5),
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(-(2**63), 2**63 - 10),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    view=st.sampled_from(["dense", "flipped", "planes"]),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_and_strides(backend, rows, size, channels, seed, first, dtype, view):
    images = levels((rows, *size, channels))
    images = {
        "dense": lambda: images,
        "flipped": lambda: images.transpose(1, 2),
        "planes": lambda: levels((rows, channels, *size)).movedim(1, -1),
    }[view]()
    indices = torch.arange(first, first + 2 * rows)[::2]
    with ds.ops.use_backend(backend):
        check(images, indices, seed, dtype)


@pytest.mark.parametrize("backend", ["cpu"])
@every_dtype
def test_every_instruction_set_gives_the_same_noise_as_alone(backend, dtype, instructions):
    with ds.ops.use_backend(backend):
        check(levels((7, 40, 33, 3)), INDICES, 11, dtype)


@both_backends
@every_dtype
def test_every_level_becomes_its_float(backend, dtype):
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    with ds.ops.use_backend(backend):
        check(images, INDICES[:1], 0, dtype)


@both_backends
@every_dtype
def test_bits_depend_on_neither_batch_order_repetition_nor_threads(backend, dtype):
    images = levels((7, 23, 19, 3))
    threads = torch.get_num_threads()
    try:
        with ds.ops.use_backend(backend):
            torch.set_num_threads(1)
            whole = ds.ops.prepare_batch(images, INDICES, 5, dtype)
            torch.set_num_threads(2)
            again = ds.ops.prepare_batch(images, INDICES, 5, dtype)
            turned = ds.ops.prepare_batch(images.flip(0), INDICES.flip(0), 5, dtype)
            alone = ds.ops.prepare_batch(images[3:4], INDICES[3:4], 5, dtype)
    finally:
        torch.set_num_threads(threads)
    for a, b, c, d in zip(whole, again, turned, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c.flip(0))
        assert torch.equal(a[3:4], d)


@both_backends
@every_dtype
def test_every_element_is_written(backend, dtype, monkeypatch):
    images = levels((7, 23, 19, 3))
    with ds.ops.use_backend(backend):
        expected = ds.ops.prepare_batch(images, INDICES, 5, dtype)
        poison(monkeypatch)
        found = ds.ops.prepare_batch(images, INDICES, 5, dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@both_backends
def test_opcheck(backend):
    arguments = levels((7, 4, 3, 2)), INDICES, -3, torch.float32
    with ds.ops.use_backend(backend):
        torch.library.opcheck(torch.ops.ds.prepare_batch.default, arguments)


@both_backends
def test_compiles_without_graph_breaks(backend):
    def mix(images):
        x0, noise = ds.ops.prepare_batch(images, INDICES, 3)
        return x0 + noise

    images = levels((7, 4, 3, 2))
    with ds.ops.use_backend(backend):
        compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(images), mix(images))


def test_errors_name_what_does_not_fit():
    images = levels((7, 4, 3, 2))
    with pytest.raises(ValueError, match=r"prepare_batch: images must be uint8, not torch.float32"):
        ds.ops.prepare_batch(images.float(), INDICES, 0)
    with pytest.raises(
        ValueError, match=r"prepare_batch: indices must be \[7\], not of shape \[3\]"
    ):
        ds.ops.prepare_batch(images, INDICES[:3], 0)
    with pytest.raises(ValueError, match=r"prepare_batch: indices must be int64, not torch.int32"):
        ds.ops.prepare_batch(images, INDICES.int(), 0)
    with pytest.raises(ValueError, match=r"prepare_batch: seed must lie in 0 .. 2\*\*64 - 1"):
        ds.ops.prepare_batch(images, INDICES, 2**64)
    with pytest.raises(ValueError, match=r"dtype must be floating point, not torch.uint8"):
        ds.ops.prepare_batch(images, INDICES, 0, torch.uint8)
