"""Potential: a velocity that is the gradient of a number, and the loss that it learns from."""

import pytest
import torch

import ds
from ds.nets import MLPConfig, Potential, PotentialConfig, UNetConfig
from ds.nets.potential import fenchel_young
from ds.system.config import from_json, to_json

COSTS = ("quadratic", "quartic")
UNET = UNetConfig(
    image_size=4,
    in_channels=1,
    channels=4,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(4,),
    norm_groups=2,
)


def made(config, cost="quadratic") -> Potential:
    """A potential in float64 whose weights all matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = PotentialConfig(net=config, cost=cost).build().double().eval()
        for w in net.parameters():
            w.data.add_(0.2 * torch.randn_like(w))
    return net


def rows(net: Potential) -> tuple[torch.Tensor, torch.Tensor]:
    return ds.noise(0, range(3), net.shape, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9])


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("config", [MLPConfig(width=8), UNET], ids=["mlp", "unet"])
def test_the_velocity_is_that_of_the_gradient_of_a_number(config, cost):
    net = made(config, cost)
    x, t = rows(net)
    x.requires_grad_()
    (p,) = torch.autograd.grad((x * net.net(x, t)).sum() / 2, x)
    v = net(x, t)
    torch.testing.assert_close(net(x, t, slope=True), p)
    size = v.flatten(1).square().mean(1).reshape(-1, *[1] * (x.dim() - 1))
    torch.testing.assert_close(v if cost == "quadratic" else v * size, p)  # grad c(v) = grad f


def test_a_potential_has_a_symmetric_jacobian_and_its_network_has_not():
    net = made(MLPConfig(width=8))
    x, t = (part[:1] for part in rows(net))

    def turn(function) -> torch.Tensor:
        jacobian = torch.autograd.functional.jacobian(lambda x: function(x, t)[0], x)[:, 0]
        return (jacobian - jacobian.T).abs().max()

    assert turn(net) < 1e-12 < 1e-3 < turn(net.net)


@pytest.mark.parametrize("cost", COSTS)
def test_the_fenchel_young_loss_is_0_at_the_velocity_and_above_it_elsewhere(cost):
    v = ds.noise(1, range(16), (3,), dtype=torch.float64)
    p = v if cost == "quadratic" else v * v.square().mean(1, keepdim=True)
    assert fenchel_young(p, v, cost).abs().max() < 1e-12
    assert fenchel_young(p.roll(1, 0), v, cost).min() > 1e-2


@pytest.mark.parametrize("cost", COSTS)
def test_a_potential_that_is_0_has_a_loss_to_learn_from(cost):
    """So starts a U-Net, whose last layer is 0. The root of the quartic cost has no slope there."""
    net = PotentialConfig(net=UNET, cost=cost).build()
    x, t = (part.float() for part in rows(net))
    assert not net(x, t).any()
    fenchel_young(net(x, t, slope=True), x, cost).mean().backward()
    slopes = [w.grad for w in net.parameters() if w.grad is not None]
    assert all(slope.isfinite().all() for slope in slopes) and any(s.any() for s in slopes)


def test_a_potential_needs_no_gradients_around_it_and_no_autocast_within():
    net = made(UNET).float()
    x, t = (part.float() for part in rows(net))
    expected = net(x, t).detach()
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            torch.testing.assert_close(net(x, t), expected)


def test_a_potential_takes_what_its_network_takes_and_comes_back_from_json():
    config = PotentialConfig(net=MLPConfig(classes=3, conditions=("h",)), cost="quartic")
    net = from_json(to_json(config)).build()
    assert (net.config, net.takes, net.classes) == (config, ("h", "label"), 3)
    label = torch.tensor([0, 1])
    assert net(torch.ones(2, 2), torch.ones(2), h=torch.ones(2), label=label).shape == (2, 2)
    with pytest.raises(ValueError, match="PotentialConfig: cost must be one of quadratic, quartic"):
        PotentialConfig(net=MLPConfig(), cost="cubic")  # type: ignore[arg-type]
