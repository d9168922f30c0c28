"""Derivatives of a whole U-Net, whatever it runs on: by its ops, compiled, under autocast."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp

from ds import ops
from ds.nets import SongConfig, UNet, UNetConfig
from ds.ops.dispatch.transforms import tangents_are_lost
from tests.combinations import slow

TIMES = torch.tensor([3.0, 100.0, 500.0, 900.0])


def drawn(size: int, channel_mult: tuple[int, ...], **fields) -> UNet:
    config = UNetConfig(
        image_size=size,
        in_channels=1,
        channels=16,
        channel_mult=channel_mult,
        num_res_blocks=1,
        attention_resolutions=(4,),
        norm_groups=8,
        **fields,
    )
    return filled(config)


def filled(config):
    torch.manual_seed(0)
    net = config.build()
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return net


@pytest.fixture(scope="module")
def net():
    return drawn(8, (1, 2))


@pytest.fixture(scope="module")
def x():
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def v():
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def exact(net, x, v):
    return differences(net, x, v)


def differences(net, x, v):
    """The derivative along v in float64, by central differences."""
    wide, h = copy.deepcopy(net).double(), 1e-4
    with torch.no_grad():
        ahead, behind = (wide(x.double() + s * v, TIMES) for s in (h, -h))
    return (ahead - behind) / (2 * h)


def tangent(net, x, v):
    return jvp(lambda x: net(x, TIMES), (x,), (v,))[1]


def close(found, exact, tolerance=1e-3):
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", [None, "reference", "aten", "sdpa"])
def test_jvp(net, x, v, exact, backend):
    if backend is None:
        close(tangent(net, x, v), exact)
        return
    with ops.use_backend(backend):
        close(tangent(net, x, v), exact)


@pytest.mark.parametrize(
    "fields",
    [
        {"scale_shift": True, "resnet_down": (0,), "resnet_up": (1,)},
        {"head_channels": 8, "mid_norm_groups": 0, "pad_all_sides": True},
        {"mid_attention": False},
    ],
    ids=repr,
)
def test_derivatives_of_what_diffusers_trains(x, v, fields):
    net = drawn(8, (1, 2), **fields)
    exact = differences(net, x, v)
    close(tangent(net, x, v), exact)
    found = grad(lambda x: (net(x, TIMES) * v).sum())(x)
    close((found * v).sum(), (exact * v).sum(), tolerance=1e-2)


SONG = SongConfig(
    image_size=8,
    in_channels=1,
    channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    dropout=0.0,
)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"embedding": "fourier", "encoder": "residual", "resample_filter": (1, 3, 3, 1)},
    ],
    ids=["ddpmpp", "ncsnpp"],
)
def test_derivatives_of_edm_s_networks(x, v, fields):
    net = filled(replace(SONG, **fields))
    exact = differences(net, x, v)
    close(tangent(net, x, v), exact)
    found = grad(lambda x: (net(x, TIMES) * v).sum())(x)
    close((found * v).sum(), (exact * v).sum(), tolerance=1e-2)

    def along(x):
        return (grad(lambda x: net(x, TIMES).square().sum())(x) * v).sum()

    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(net(leaf, TIMES).square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * v).sum(), leaf)
    close((second * v).sum(), jvp(along, (x,), (v,))[1].double(), tolerance=1e-2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_jvp_where_no_gradient_is_recorded(net, x, v, exact, mode):
    with mode():
        if tangents_are_lost():  # by PyTorch itself, before 2.13
            with pytest.raises(ValueError, match="every tangent 0 in inference mode"):
                tangent(net, x, v)
        else:
            close(tangent(net, x, v), exact)


def test_jvp_under_autocast(net, x, v, exact):
    with torch.autocast("cpu"):
        close(tangent(net, x, v), exact, tolerance=0.1)


def test_jvp_in_bfloat16(net, x, v, exact):
    close(tangent(copy.deepcopy(net).bfloat16(), x, v), exact, tolerance=0.1)


def test_dual_numbers(net, x, v, exact):
    with forward_ad.dual_level():
        y = net(forward_ad.make_dual(x, v), TIMES)
        close(forward_ad.unpack_dual(y).tangent, exact)


def test_grad(net, x, v, exact):
    found = grad(lambda x: (net(x, TIMES) * v).sum())(x)
    close((found * v).sum(), (exact * v).sum(), tolerance=1e-2)


def test_a_gradient_of_a_gradient(net, x, v):
    """Reverse over reverse agrees with forward over reverse, which takes other rules."""

    def along(x):
        return (grad(lambda x: net(x, TIMES).square().sum())(x) * v).sum()

    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(net(leaf, TIMES).square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * v).sum(), leaf)
    expected = jvp(along, (x,), (v,))[1]
    close((second * v).sum(), expected.double(), tolerance=1e-2)


def test_gradients_of_weights_through_primal_and_tangent(net, x, v):
    """As MeanFlow takes them, and through the tangent as well: by rules as by references."""

    def gradients():
        y, dy = jvp(lambda x: net(x, TIMES), (x,), (v,))
        return torch.autograd.grad((y + dy).square().sum(), list(net.parameters()))

    with ops.use_backend("reference"):
        expected = gradients()
    # The bias of the keys has none, but for rounding.
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(
            found, wanted, rtol=1e-2, atol=1e-3 * wanted.abs().max().item() + 1e-8
        )


@pytest.mark.parametrize("order", ["jvp of compiled", slow("compiled jvp")])
@torch.no_grad()
def test_compiled(x, v, order):
    torch._dynamo.reset()
    net, x, v = drawn(4, (1,)), x[..., :4, :4], v[..., :4, :4]
    exact = tangent(net, x, v)
    if order == "jvp of compiled":
        compiled = torch.compile(net, backend="aot_eager")
        compiled(x, TIMES)  # compiled without a tangent
        found = tangent(compiled, x, v)
    else:
        found = torch.compile(tangent, backend="aot_eager", fullgraph=True)(net, x, v)
    assert exact.abs().max() > 1e-3
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-6)
