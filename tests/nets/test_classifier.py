"""ADM's noisy classifier: its gradient guides a denoiser, and what it refuses."""

import copy
import json
from dataclasses import replace

import pytest
import torch

import ds
from ds.nets import ClassifierConfig, UNetConfig, adm_classifier
from ds.system.config import from_json, to_json
from tests.nets.peers import randomized

TINY = ClassifierConfig(
    image_size=8,
    in_channels=1,
    channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    norm_groups=8,
    head_channels=8,
    num_classes=5,
)
TIMES = torch.tensor([900.0, 3.0])
LABELS = torch.tensor([4, 1])


@pytest.fixture(scope="module")
def net():
    return randomized(TINY.build())


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def log_share(net, x):
    """log p(label | x), added over the images."""
    return net(x, TIMES).log_softmax(1).gather(1, LABELS[:, None]).sum()


def test_its_gradient_is_that_of_finite_differences(net, x):
    wide, x = copy.deepcopy(net).double(), x.double()
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(log_share(wide, leaf), leaf)
    with torch.no_grad():
        ahead, behind = (log_share(wide, x + s * 1e-5 * v) for s in (1, -1))
    torch.testing.assert_close((slope * v).sum(), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-9)
    assert slope.abs().max() > 1e-3


@torch.no_grad()
def test_a_denoiser_guided_by_it_moves_along_its_gradient(net, x):
    unet = UNetConfig(
        image_size=8,
        in_channels=1,
        channels=16,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        norm_groups=8,
    )
    plain = ds.Denoiser(randomized(unet.build()), ds.schedule.LinearBeta())
    t = 500
    guided = ds.ClassifierGuided(plain, net, 2.0).given(label=LABELS)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        logits = net(leaf, torch.full((2,), float(t)))
        share = logits.log_softmax(1).gather(1, LABELS[:, None]).sum()
        (slope,) = torch.autograd.grad(share, leaf)
    _, sigma = plain.schedule.at(t)
    torch.testing.assert_close(guided(x, t).eps, plain(x, t).eps - sigma * 2.0 * slope)


@torch.no_grad()
def test_it_is_told_the_time_and_keeps_images_apart(net, x):
    out = net(x, TIMES)
    assert out.shape == (2, 5) and net.shape == (1, 8, 8)
    moved = net(x, TIMES - torch.tensor([0, 1]))
    torch.testing.assert_close(moved[0], out[0])
    assert (moved[1] - out[1]).abs().max() > 1e-3


@torch.no_grad()
def test_it_computes_in_the_dtype_of_its_weights(net, x):
    low = copy.deepcopy(net).bfloat16()(x, TIMES)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, net(x, TIMES), rtol=0.1, atol=0.1)


def test_every_weight_of_it_learns(x):
    net = randomized(TINY.build()).requires_grad_().train()
    log_share(net, x).backward()
    idle = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert not {name for name in idle if not name.endswith("k.bias")}  # a softmax sees none of it


def test_a_configuration_survives_the_round_trip_through_text():
    config = adm_classifier(512)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert (config.takes, config.classes) == ((), 0)  # it takes no label


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_channels": 5}, r"channels \(32\) must be a multiple of head_channels \(5\)"),
        ({"norm_groups": 3}, r"channels \(16\) must be a multiple of norm_groups \(3\)"),
        ({"num_classes": 0}, "num_classes must be at least 1, not 0"),
        ({"image_size": 9}, r"image_size \(9\) must be a multiple of 2"),
    ],
)
def test_an_impossible_configuration_is_one_clear_error(change, message):
    with pytest.raises(ValueError, match=f"^ClassifierConfig: .*{message}"):
        replace(TINY, **change)


def test_a_size_that_was_not_published_is_one_clear_error():
    with pytest.raises(ValueError, match="image_size must be 64, 128, 256 or 512, not 32"):
        adm_classifier(32)
