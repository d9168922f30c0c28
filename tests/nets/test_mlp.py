"""The MLP, what it is told, and the embedding of numbers as sines and cosines."""

import math

import pytest
import torch

from ds.nets import MLPConfig, UNetConfig
from ds.nets.base import NO_CLASS
from ds.nets.embedding import sinusoids
from ds.system.config import from_json, to_json

TOLD = MLPConfig(dim=3, width=16, depth=2, conditions=("h",), classes=4)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.linspace(0, 1, 5, dtype=dtype), torch.tensor([0, 1, 2, 3, 0])


def build(config=TOLD):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return config.build()


@pytest.mark.parametrize("t", [0, 1, 37, 999])
def test_the_embedding_is_sines_then_cosines(t):
    frequencies = [math.exp(-math.log(10000) * k / 63) for k in range(64)]
    expected = [f(t * w) for f in (math.sin, math.cos) for w in frequencies]
    found = sinusoids(torch.tensor([t]), 128)[0].double()
    # float32 holds an angle below 1000 to 3e-5, and a frequency near 1 to 6e-8 of it
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=2e-4)


def test_the_derivative_of_an_embedding_is_at_most_its_highest_frequency():
    t = torch.linspace(0, 1, 100, dtype=torch.float64)
    embedded, slope = torch.func.jvp(
        lambda t: sinusoids(t, 16, (6.0, 0.5)), (t,), (torch.ones_like(t),)
    )
    assert embedded.dtype == torch.float64
    assert slope.abs().max() == pytest.approx(6, rel=1e-3)
    # the lowest frequency: a cosine of t / 2
    torch.testing.assert_close(embedded[:, -1], (t / 2).cos(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_mlp_makes_points_of_its_own_dtype(dtype):
    x, t, y = inputs(dtype)
    out = build().to(dtype)(x, t, h=t, label=y)
    assert out.shape == x.shape and out.dtype == dtype and build().shape == (3,)


def test_what_is_told_once_is_told_of_every_point():
    net, (x, t, y) = build(), inputs()
    once = net(x, t[:1], h=t[1:2], label=y[:1])
    assert torch.equal(once, net(x, t[:1].expand(5), h=t[1:2].expand(5), label=y[:1].expand(5)))


def test_an_mlp_sees_everything_it_is_told():
    net, (x, t, y) = build(), inputs()
    out = net(x, t, h=t, label=y)
    for other in (
        net(x + 1, t, h=t, label=y),
        net(x, t + 1, h=t, label=y),
        net(x, t, h=t + 1, label=y),
        net(x, t, h=t, label=(y + 1) % 4),
    ):
        assert (other - out).abs().amin(1).min() > 1e-6


def test_no_class_adds_nothing_to_an_mlp():
    net, deaf, (x, t, label) = build(), build(), inputs()
    with torch.no_grad():
        deaf.layers[0].weight[:, -4:] = 0  # of the classes
    told = net(x, t, h=t, label=torch.full_like(label, NO_CLASS))
    assert torch.equal(told, deaf(x, t, h=t, label=label))
    assert not torch.equal(told, net(x, t, h=t, label=label))


def test_time_may_be_an_index():
    net, (x, *_) = build(MLPConfig(dim=3)), inputs()
    t = torch.arange(5)
    assert torch.equal(net(x, t), net(x, t.float()))


@pytest.mark.parametrize("config", [MLPConfig(), TOLD])
def test_a_network_has_the_size_of_its_configuration(config):
    c = config
    told = c.dim + (1 + len(c.conditions)) * c.embedding + c.classes
    weights = told * c.width + (c.depth - 1) * c.width**2 + c.width * c.dim
    biases = c.depth * c.width + c.dim
    assert sum(p.numel() for p in build(c).parameters()) == weights + biases


def test_a_configuration_survives_json():
    for config in (TOLD, UNetConfig(conditions=("h",), frequencies=(6.0, 0.5))):
        assert from_json(to_json(config)) == config


UNET = UNetConfig(
    image_size=4, channels=4, channel_mult=(1,), norm_groups=4, attention_resolutions=()
)


@pytest.mark.parametrize(
    ("config", "cond", "words"),
    [
        (TOLD, {}, "MLP: takes the conditions h, label, not \\(none\\)"),
        (TOLD, {"h": 1, "label": 1, "z": 1}, "h, label, not h, label, z"),
        (MLPConfig(), {"h": 1}, "takes the conditions \\(none\\), not h; .*denoiser.given"),
        (UNET, {"h": 1}, "UNet: takes the conditions \\(none\\), not h"),
    ],
)
def test_a_condition_that_is_missing_or_unknown_is_named(config, cond, words):
    with pytest.raises(ValueError, match=words):
        config.build()(torch.zeros(2, *config.build().shape), torch.zeros(2), **cond)


@pytest.mark.parametrize("cls", [MLPConfig, UNetConfig])
@pytest.mark.parametrize("frequencies", [(0.5, 6.0), (1.0, 0.0), (math.inf, 1.0), (1.0,)])
def test_frequencies_fall_from_the_highest_to_the_lowest(cls, frequencies):
    with pytest.raises(ValueError, match=rf"{cls.__name__}: frequencies"):
        cls(frequencies=frequencies)
