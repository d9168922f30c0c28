"""The batch preparation kernel: the integers of ds.noise, and its normals to a few roundings."""

import pytest
import torch

from ds import ops
from ds.diffusion.noise import noise
from ds.ops.dispatch.op import Unsupported
from ds.ops.noise import signed
from ds.ops.prepare_batch import _op
from tests.oracle import poison

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INDICES = [0, 1, 2**32 - 1, 2**32 + 7, 2**63 - 1, -1]  # the last has the bits of 2**64 - 1
# No image, one pixel, tiles that do not start on a block of four, several tiles, many channels.
SHAPES = [(0, 4, 4, 3), (6, 1, 1, 1), (6, 5, 7, 3), (2, 41, 53, 3), (2, 64, 64, 1), (1, 3, 3, 700)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def draw_images(shape, device):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(device)


@pytest.fixture(scope="module")
def run(device):
    """The kernel of the backend, as ds.ops calls it for a GPU; it returns [N, H, W, C]."""
    kernel = _op._load("cuda", "cuda")

    def launch(images, indices, seed, dtype):
        results = kernel(images, indices, signed("prepare_batch", "seed", seed), dtype)
        return tuple(result.permute(0, 2, 3, 1) for result in results)

    return launch


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
@every_dtype
def test_images_and_noise_are_those_of_the_reference(run, device, shape, seed, dtype):
    images = draw_images(shape, device)
    indices = torch.tensor(INDICES[: len(images)], dtype=torch.int64, device=device)
    x0, z = run(images, indices, seed, dtype)
    # On the CPU: a GPU divides by a number through its reciprocal.
    assert torch.equal(x0.cpu(), (images.cpu().float() / 127.5 - 1).to(dtype))
    assert torch.equal(x0, ops.dequantize(images).permute(0, 2, 3, 1).to(dtype))
    channels_first = (shape[3], shape[1], shape[2])
    exact = noise(seed, indices, channels_first, device=device, dtype=torch.float64)
    exact = exact.permute(0, 2, 3, 1)
    bound = 4 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2
    assert (
        (z.double() - exact).abs() <= bound * exact.abs() + 1e-7 * (dtype == torch.float16)
    ).all()


def test_a_million_normals_are_within_four_roundings(run, device):
    """Among so many are radii next to 0 and angles next to the axes, where digits could be lost."""
    images = draw_images((1, 512, 512, 4), device)
    indices = torch.tensor([12345], device=device)
    z = run(images, indices, 7, torch.float32)[1]
    exact = noise(7, indices, (4, 512, 512), device=device, dtype=torch.float64)
    relative = (z.double() / exact.permute(0, 2, 3, 1) - 1).abs().max()
    assert relative <= 4 * torch.finfo(torch.float32).eps


@every_dtype
def test_bits_depend_neither_on_the_batch_nor_on_the_order_of_threads(
    run, device, dtype, in_both_orders, monkeypatch
):
    poison(monkeypatch)
    images = draw_images((3, 17, 19, 3), device)
    indices = torch.tensor([4, 5, 6], device=device)
    first, second = in_both_orders(lambda: run(images, indices, 3, dtype))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    alone = run(images[1:2], indices[1:2], 3, dtype)
    for a, b in zip(first, alone, strict=True):
        assert torch.equal(a[1:2], b)


def test_what_it_does_not_take_it_leaves_to_others(run, device):
    indices = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(Unsupported, match="at most 4096 channels, not 4097"):
        run(draw_images((1, 1, 1, 4097), device), indices, 0, torch.float32)
    with pytest.raises(Unsupported, match=r"not torch\.float64"):
        run(draw_images((1, 2, 2, 3), device), indices, 0, torch.float64)
