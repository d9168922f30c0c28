"""The derivatives in losses: right in both ways, with one mask of dropout, whatever autocast is."""

import copy
from dataclasses import replace

import pytest
import torch

from ds.methods import MeanFlow, Progress
from ds.methods.derivatives import along
from ds.methods.proof import Formula
from ds.nets import MLPConfig, UNetConfig, recompute_norms
from ds.pairs.sources import Images
from ds.training.parallel import Loss

UNET = UNetConfig(
    image_size=8,
    in_channels=1,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    norm_groups=4,
    conditions=("h",),
)
MLP = MLPConfig(dim=3, conditions=("h",))


def drawn(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(config):
    torch.manual_seed(0)
    net = config.build()
    for w in net.parameters():
        w.data += 0.1 * torch.randn_like(w)
    return net.requires_grad_()


def derivative(
    net, dtype=torch.float32, moved: float = 0.0, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and derivative of a network along a velocity, in time and in h, once moved along it."""
    net = copy.deepcopy(net).to(dtype)
    x, v = (drawn(8, *net.shape, seed=i, dtype=dtype) for i in range(2))
    t = torch.linspace(0.1, 0.9, 8, dtype=dtype)
    one = torch.ones_like(t)
    inputs = x + moved * v, t + moved, t / 2 + moved
    torch.manual_seed(7)
    return along(lambda x, t, h: net(x, t, h=h), inputs, (v, one, one), net=net, **options)


def away(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("config", [MLP, UNET], ids=["mlp", "unet"])
@pytest.mark.parametrize(
    ("dtype", "way", "error"),
    [
        (torch.float32, "exact", 1e-5),
        (torch.float64, "central", 1e-4),
        (torch.float32, "central", 1e-3),
    ],
)
def test_both_ways_give_the_derivative_to_their_error(config, dtype, way, error):
    net = filled(config).eval()
    value, exact = derivative(net, torch.float64)
    found = derivative(net, dtype, way=way)
    assert away(found[0].double(), value) < 1e-6
    assert away(found[1].double(), exact) < error


def test_norms_are_recomputed_below_central_differences_alone():
    net = filled(UNET)
    recompute_norms(net)
    derivative(net, way="central")[0].sum().backward()
    with pytest.raises(ValueError, match=r"recompute_norms: .*leave it out"):
        derivative(net)


def test_central_differences_err_as_the_square_of_their_step():
    net = filled(MLP)
    exact = derivative(net, torch.float64)[1]
    errors = [
        away(derivative(net, torch.float64, way="central", step=s)[1], exact) for s in (2e-3, 4e-3)
    ]
    assert errors[1] / errors[0] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("way", ["exact", "central"])
def test_value_and_derivative_have_the_same_dropout(way):
    """With a mask of its own for each call, central differences would be off by 1 / step."""
    net = filled(replace(UNET, dropout=0.5)).train()
    far = 1e-4
    ahead, behind = (derivative(net, torch.float64, by, way=way)[0] for by in (far, -far))
    found = derivative(net, torch.float64, way=way)[1]
    assert away(found, (ahead - behind) / (2 * far)) < 1e-3
    assert away(found, derivative(net.eval(), torch.float64)[1]) > 0.1


@pytest.mark.parametrize("way", ["exact", "central"])
def test_autocast_is_off_inside(way):
    net = filled(UNET).eval()
    expected = derivative(net, way=way)
    with torch.autocast("cpu", torch.bfloat16):
        found = derivative(net, way=way)
    assert all(map(torch.equal, found, expected))


def test_tf32_is_off_in_differences_and_comes_back(monkeypatch):
    """It rounds by 1e-3, which is as much as a step changes."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []
    net = Formula(lambda x: seen.append(torch.backends.cudnn.allow_tf32) or x**2)
    _, found = along(net, (torch.ones(2, 3),), (torch.ones(2, 3),), net=net, way="central")
    assert (seen, torch.backends.cudnn.allow_tf32) == ([True, False, False], True)
    torch.testing.assert_close(found, torch.full((2, 3), 2.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("way", ["exact", "central"])
def test_the_gradient_is_that_of_the_value_alone(way):
    value, found = derivative(filled(MLP), way=way)
    assert value.requires_grad
    assert not found.requires_grad


def test_a_compiled_loss_of_central_differences_has_the_gradients_of_eager():
    """Traced, differentiated and decomposed in one graph, as every method is elsewhere."""
    method = MeanFlow(derivative="central", student=replace(MLP, width=8, depth=1))
    modules = torch.nn.ModuleDict({"student": filled(method.student)})
    rows = Images(drawn(32, 3, seed=0, dtype=torch.float32)).batch(range(32))
    eager = Loss(method, modules)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    found = []
    for loss in (eager, compiled):
        value = loss(rows, Progress(0, 1))
        found.append((value, *torch.autograd.grad(value, modules.parameters())))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
