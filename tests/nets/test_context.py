"""Networks that are told an image: what they see of it, refuse, start from, and how they run."""

from dataclasses import replace

import pytest
import torch

import ds
from ds.engine import Engine, Recurrence
from ds.methods.base import student_net
from ds.models.execution import Execution
from ds.models.teacher import Teacher
from ds.nets import MLPConfig
from ds.system.config import from_json, to_json
from tests.nets.test_song import NCSNPP
from tests.nets.test_unet import GUIDED, TINY, build

CONFIGS = [
    MLPConfig(dim=3, width=16, depth=2, classes=4),
    TINY,
    GUIDED,
    replace(NCSNPP, augment_channels=0),  # whose encoder is told the image again
]
CONFIGS = [replace(config, conditions=("h", "context")) for config in CONFIGS]
every_net = pytest.mark.parametrize("config", CONFIGS, ids=["MLP", "UNet", "ADM", "NCSN++"])


def inputs(config, seed=0):
    """Three samples with times and everything a network takes."""
    x = ds.noise(seed, range(3), config.shape)
    cond = {
        "h": torch.tensor([0.1, 0.5, 0.9]),
        "context": ds.noise(seed + 1, range(3), x.shape[1:]),
    }
    if config.classes:
        cond["label"] = torch.tensor([0, 1, 3])
    return x, torch.full((3,), 0.25), cond


@every_net
@torch.no_grad()
def test_a_network_sees_the_image_it_is_told_beside_its_own(config):
    net, (x, t, cond) = build(config), inputs(config)
    out = net(x, t, **cond)
    assert net.shape == x.shape[1:] and out.shape[2:] == x.shape[2:]
    shifted = cond["context"].clone()
    shifted[0] += 1  # of the first sample alone
    moved = (net(x, t, **cond | {"context": shifted}) - out).flatten(1).abs().amax(1)
    assert moved[0] > 1e-3 and (moved[1:] == 0).all()
    assert (net(cond["context"], t, **cond | {"context": x}) - out).abs().max() > 1e-3
    same = cond["context"][:1]  # one image for all
    torch.testing.assert_close(
        net(x, t, **cond | {"context": same}), net(x, t, **cond | {"context": same.expand_as(x)})
    )
    assert from_json(to_json(config)) == config


@every_net
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": torch.zeros(3)}, r"context is \[3\] for 3 images; accepted is \[3, "),
        ({"context": None}, "context is None; accepted is a tensor"),
        ({"h": torch.zeros(3, 1)}, r"h is \[3, 1\] for 3 images; accepted is \[3\]"),
    ],
)
def test_a_context_of_another_shape_is_refused(config, change, message):
    x, t, cond = inputs(config)
    with pytest.raises(ValueError, match=message):
        build(config)(x, t, **cond | change)
    whole = torch.zeros(x.shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"context is torch\.int64; accepted is a floating dtype"):
        build(config)(x, t, **cond | {"context": whole})
    del cond["context"]
    with pytest.raises(ValueError, match=r"takes the conditions h, context.* not h"):
        build(config)(x, t, **cond)


@every_net
@torch.no_grad()
def test_a_student_that_is_told_an_image_makes_nothing_of_it_at_first(config):
    own, (x, t, cond) = build(replace(config, conditions=())), inputs(config)
    teacher = Teacher(ds.Denoiser(own, ds.schedule.LinearBeta()), ds.solvers.DDIM(), (800,))
    net = student_net(teacher, None, "h", "context")
    assert net.config == config
    own_cond = {name: value for name, value in cond.items() if name == "label"}
    torch.testing.assert_close(net(x, t, **cond), own(x, t, **own_cond), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS[1:], ids=["UNet", "ADM", "NCSN++"])
@torch.no_grad()
def test_the_engine_runs_a_network_that_is_told_an_image_and_a_loop_refuses(config):
    net, (x, t, cond) = build(config).double(), inputs(config)
    t = t.double()
    expected = net(x.double(), t, **cond)
    found = Engine(net, [0.25], images=2)(x.double(), t, **cond)  # in two parts
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    bound = ds.Denoiser(net.float(), ds.schedule.LinearBeta()).given(**cond)
    model = Teacher(bound, ds.solvers.DDIM(), (800,))
    with pytest.raises(ValueError, match="this one is told an image, context"):
        Recurrence.of(model)
    assert Execution.default(model) == Execution("float32", "engine")
