"""Sampler: images by seed and index, its batch size, what it falls back to, and pickling."""

import pickle
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ds
from ds import analytic
from ds.diffusion import grids
from ds.diffusion.solvers import DDIM
from ds.models.execution import Execution
from ds.models.interpolate import great_circle
from ds.models.sampler import default_batch_size
from ds.nets import UNetConfig
from ds.training import presets

FIELD = analytic.GaussianField(size=4)
TEACHER = FIELD.teacher(DDIM(), grids.quadratic(5))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_an_image_depends_on_its_seed_and_index_only(batch_size):
    expected = ds.Sampler(TEACHER)(seed=5, indices=range(10))
    made = ds.Sampler(TEACHER, batch_size=batch_size)(seed=5, indices=[9, 3, 3, 0, 2, 8])
    assert torch.equal(made, expected[[9, 3, 3, 0, 2, 8]])


def test_given_noise_gives_the_images_of_its_indices():
    z = ds.noise(5, range(10), FIELD.shape)
    sampler = ds.Sampler(TEACHER, batch_size=4)
    assert torch.equal(sampler.draw(z), sampler(seed=5, indices=range(10)))


def test_no_indices_give_no_images():
    assert ds.Sampler(TEACHER)(indices=[]).shape == (0, 4, 4, 1)


def test_points_are_no_images():
    points = analytic.GaussianMixture().teacher(DDIM(), grids.quadratic(5))
    with pytest.raises(ValueError, match=r"shape \[2\] are no images"):
        ds.Sampler(points)()


@pytest.mark.parametrize(
    ("preset", "memory", "batch"),
    [("cifar10", 80, 528), ("celeba", 80, 528), ("lsun_bedroom", 80, 66), ("cifar10", 1, 528)],
)
def test_a_batch_fills_a_gpu_and_fits_it(preset, memory, batch, monkeypatch):
    """Of an H100's 132 multiprocessors: the least that fills them where the memory is small."""
    gpu = SimpleNamespace(total_memory=memory * 2**30, multi_processor_count=132)
    monkeypatch.setattr("ds.models.sampler.device_of", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    with torch.device("meta"):
        net = presets.PRESETS[preset]().net.build()
    assert default_batch_size(SimpleNamespace(net=net)) == batch
    assert default_batch_size(SimpleNamespace(net=nn.Linear(1, 1))) == 256


def tiny() -> ds.Student:
    config = UNetConfig(
        image_size=8,
        in_channels=1,
        channels=8,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        norm_groups=4,
    )
    return ds.Student(config.build().eval(), ds.methods.DenoisingStudent())


@pytest.mark.parametrize(
    "execution", [None, Execution(), Execution("bfloat16", "engine", winograd=False)], ids=repr
)
def test_a_sampler_is_pickled_as_its_model_and_options(execution):
    """So the workers of a loader draw from it, to the same bits."""
    sampler = ds.Sampler(tiny(), batch_size=3, execution=execution)
    again = pickle.loads(pickle.dumps(sampler))
    assert (again.batch_size, again.execution) == (3, sampler.execution)
    assert type(again.model.net) is type(sampler.model.net)
    assert torch.equal(again(0, range(5)), sampler(0, range(5)))


def test_what_a_stochastic_solver_adds_depends_on_seed_and_index_only():
    teacher = replace(TEACHER, solver=DDIM(eta=1.0))
    expected = ds.Sampler(teacher)(seed=5, indices=range(10))
    assert not torch.equal(expected, ds.Sampler(TEACHER)(seed=5, indices=range(10)))
    made = ds.Sampler(teacher, batch_size=3)(seed=5, indices=[9, 3, 3, 0, 2, 8])
    assert torch.equal(made, expected[[9, 3, 3, 0, 2, 8]])
    with pytest.raises(ValueError, match="adds noise at each step"):
        ds.Sampler(teacher).draw(ds.noise(5, range(2), FIELD.shape))


def broken(*_, **__):
    raise RuntimeError("no kernel image\nis available")


def test_a_default_that_fails_gives_way_with_a_warning(monkeypatch, caplog):
    model = tiny()
    expected = ds.Sampler(model, execution=Execution())(0, range(3))
    monkeypatch.setattr("ds.engine.Engine.__init__", broken)
    sampler = ds.Sampler(model)
    assert sampler.execution == Execution() and torch.equal(sampler(0, range(3)), expected)
    assert [record.getMessage() for record in caplog.records] == [
        "Sampler: mode engine failed, eager is used instead, which is slower: no kernel image"
    ]


def test_an_execution_that_was_asked_for_raises_where_it_fails(monkeypatch):
    monkeypatch.setattr("ds.engine.Engine.__init__", broken)
    with pytest.raises(RuntimeError, match=r"'engine'.* cannot run here: no kernel image; mode"):
        ds.Sampler(tiny(), execution=Execution(mode="engine"))


def test_a_captured_step_that_fails_leaves_the_engine(monkeypatch, caplog):
    graph, engine = Execution(mode="cuda_graph"), Execution(mode="engine")
    monkeypatch.setattr(Execution, "default", lambda *_, **__: graph)  # as on CUDA
    monkeypatch.setattr("ds.models.execution.Loop.__init__", broken)
    sampler = ds.Sampler(model := tiny())
    assert sampler.execution == engine
    assert torch.equal(sampler(0, range(3)), ds.Sampler(model, execution=engine)(0, range(3)))
    assert "mode cuda_graph failed, engine is used instead" in caplog.text


# Overflow.


def loud(dtype: torch.dtype) -> ds.Student:
    """Return a student whose first convolution overflows float16, in a dtype."""
    student = tiny()
    with torch.no_grad():
        student.net.conv_in.weight *= 3e5
        student.net.conv_in.bias += 3e5
    return student.using(student.net.to(dtype))


WAYS = {
    "call": lambda sampler: sampler(5, range(2, 9)),
    "draw": lambda sampler: sampler.draw(ds.noise(5, range(7), (1, 8, 8))),
    "batches": lambda sampler: [*sampler.batches(5, range(2, 9))],
    "sample": lambda sampler: sampler.sample(ds.noise(5, range(3), (1, 8, 8))),
    "path": lambda sampler: sampler.draw(great_circle(ds.noise(5, [0, 1], (1, 8, 8)), 2)),
}
RANGES = dict(zip(WAYS, ["2 to 4 of seed 5", *["0 to 2 of the noise given"] * 4], strict=True))
RANGES["batches"] = RANGES["call"]


@pytest.mark.parametrize("way", WAYS)
def test_float16_that_overflows_is_an_error_and_no_black_picture(way):
    message = (
        rf"^Sampler: the network's numbers for samples {RANGES[way]} are not finite \("
        r"float16, mode eager\); float16 is too narrow for it, use float32 or bfloat16$"
    )
    with pytest.raises(RuntimeError, match=message):
        WAYS[way](ds.Sampler(loud(torch.float16), batch_size=3))
    for dtype in (torch.float32, torch.bfloat16):
        WAYS[way](ds.Sampler(loud(dtype), batch_size=3))


class Spoiled(nn.Module):
    """A network with one bad number for the image of index 4 of seed 0, in batches of 3."""

    shape = (1, 4, 4)

    def __init__(self, bad: float):
        super().__init__()
        self.bad, self.image = bad, ds.noise(0, [4], self.shape)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        bad = (x == self.image).flatten(1).all(1)
        return torch.zeros_like(x).masked_fill(bad[:, None, None, None], self.bad)


@dataclass(frozen=True)
class Hidden:
    """A method that hides what its network returns behind a clip."""

    def sample(self, net, z, *, nfe=1, cond=None, draws=None):
        return net(z, z[:, 0, 0, 0]).nan_to_num().clamp(-1, 1)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_a_clip_would_hide_is_an_error_that_names_the_batch(bad):
    sampler = ds.Sampler(ds.Student(Spoiled(bad), Hidden()), batch_size=3)
    batches = sampler.batches(0, range(9))
    assert next(batches).shape == (3, 1, 4, 4)
    with pytest.raises(RuntimeError, match=r"3 to 5 of seed 0 are not finite .*look at its weigh"):
        next(batches)


def test_a_gpu_is_not_waited_for_before_the_last_batch(monkeypatch):
    sampler = ds.Sampler(ds.Student(Spoiled(float("inf")), Hidden()), batch_size=3)
    sampler.device = SimpleNamespace(type="cuda")
    monkeypatch.setattr("ds.models.sampler.noise", lambda *args, device: ds.noise(*args))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: self)
    batches = sampler.batches(0, range(9))
    assert len([next(batches) for _ in range(3)]) == 3
    with pytest.raises(RuntimeError, match="3 to 5 of seed 0 are not finite"):
        next(batches)


def test_an_overflow_in_a_replayed_step_is_an_error(monkeypatch):
    monkeypatch.setattr(Execution, "check", lambda *_: None)  # a CPU replays it, uncaptured
    sampler = ds.Sampler(loud(torch.float16), execution=Execution(mode="cuda_graph"))
    with pytest.raises(RuntimeError, match=r"float16, mode cuda_graph"):
        sampler(0, range(3))


def test_a_method_sees_the_attributes_of_its_network():
    class Asks(Hidden):
        def sample(self, net, z, *, nfe=1, cond=None, draws=None):
            return z * net.bad + net.image

    x = next(ds.Sampler(ds.Student(Spoiled(0.0), Asks())).batches(0, range(3)))
    assert torch.equal(x, ds.noise(0, [4], (1, 4, 4)).expand(3, 1, 4, 4))
