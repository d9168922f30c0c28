"""LPIPS against its formula written out, and the files that it is read from."""

import pytest
import torch
import torch.nn.functional as F

from ds.nets import lpips
from ds.nets.lpips import LPIPS

# The convolutions of torchvision's vgg16 that follow each pooling.
CONVS = [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]
WIDTHS = [3, 64, 128, 256, 512, 512]


@pytest.fixture(scope="module")
def weights():
    """Random weights under the names of the package lpips 0.1.4, with all that lies beside them."""
    generator = torch.Generator().manual_seed(0)
    state = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    for k, convs in enumerate(CONVS):
        for i, n in enumerate(convs):
            width = WIDTHS[k] if i == 0 else WIDTHS[k + 1]
            w = torch.randn(WIDTHS[k + 1], width, 3, 3, generator=generator)
            state[f"net.slice{k + 1}.{n}.weight"] = w * (2 / w[0].numel()) ** 0.5
            state[f"net.slice{k + 1}.{n}.bias"] = 0.1 * torch.randn(len(w), generator=generator)
        last = torch.rand(1, WIDTHS[k + 1], 1, 1, generator=generator)
        state |= {f"lin{k}.model.1.weight": last, f"lins.{k}.model.1.weight": last}
    return state


@pytest.fixture(scope="module")
def path(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips.pth"
    torch.save(weights, path)
    return path


@pytest.fixture
def small(path, monkeypatch):
    """The network with sizes that a test has time for: below 40 pixels images become 32 x 32."""
    assert (lpips.SIDE, lpips.LEAST) == (224, 256)
    monkeypatch.setattr(lpips, "SIDE", 32)
    monkeypatch.setattr(lpips, "LEAST", 40)
    return LPIPS.load(path)


def images(*shape):
    return 2 * torch.rand(2, *shape, generator=torch.Generator().manual_seed(1)) - 1


def written_out(weights, a, b):
    """Zhang et al. 2018, Eq. 1, pixel for pixel, on RGB images of the size that VGG16 sees."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    x, total = (torch.cat([a, b]) - shift) / scale, 0
    for k, convs in enumerate(CONVS):
        x = F.max_pool2d(x, 2) if k else x
        for n in convs:
            name = f"net.slice{k + 1}.{n}"
            x = F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1).relu()
        f, g = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
        by_pixel = torch.einsum(
            "nchw,c->nhw", (f - g) ** 2, weights[f"lin{k}.model.1.weight"][0, :, 0, 0]
        )
        total = total + by_pixel.flatten(1).mean(1)
    return total


@pytest.mark.parametrize("side", [48, 16])
def test_lpips_is_its_formula_on_images_resized_where_they_are_small(small, weights, side):
    a, b = images(3, side, side).split(1)
    seen = [F.interpolate(x, (32, 32), mode="bilinear") if side < 40 else x for x in (a, b)]
    torch.testing.assert_close(small(a, b), written_out(weights, *seen))
    assert small(a, a).item() == 0


def test_lpips_of_grey_images_is_that_of_three_equal_channels(small):
    a, b = images(1, 40, 40).split(1)
    assert torch.equal(small(a, b), small(*(x.expand(1, 3, 40, 40).clone() for x in (a, b))))


def test_lpips_has_a_gradient_in_the_images_and_none_in_its_weights(small):
    a, b = (x.requires_grad_() for x in images(3, 16, 16).split(1))
    slopes = torch.autograd.grad(small(a, b).sum(), [a, b])
    assert all(slope.isfinite().all() and slope.any() for slope in slopes)
    assert not any(w.requires_grad for w in small.parameters())


@pytest.mark.parametrize("shapes", [((2, 16, 16),) * 2, ((3, 16, 16), (3, 16, 8)), ((3, 16),) * 2])
def test_lpips_refuses_other_images(shapes):
    with pytest.raises(ValueError, match=r"images must be \[N, 1 or 3, H, W\], .* not \[2, "):
        LPIPS()(*(images(*shape) for shape in shapes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lin4.model.1.weight": torch.zeros(1, 256, 1, 1)}, r"is \[1, 256, 1, 1\] in the file"),
        ({"net.slice6.30.weight": torch.zeros(1)}, "and must be absent"),
    ],
)
def test_lpips_refuses_a_file_of_another_network(weights, tmp_path, change, message):
    torch.save(weights | change, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"other.pth is not the state dict of lpips.*{message}"):
        LPIPS.load(tmp_path / "other.pth")
