"""Sampler: images by seed and index, its batch size, what it falls back to, and pickling."""

import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ds
from ds import analytic
from ds.diffusion import grids
from ds.diffusion.solvers import DDIM
from ds.models.execution import Execution
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
