"""What draws on a GPU: the engine, its captured loop, Sampler, generate_pairs and evaluate."""

import logging
import os
from dataclasses import replace

import pytest
import torch

import ds
from ds.engine import Engine, Loop, Recurrence
from ds.evaluation.evaluate import evaluate
from ds.evaluation.features import Pixels
from ds.models.execution import Execution
from tests import emulated
from tests.gpu import CONFIG, GRID, student, teacher
from tests.nets.test_unet import build, relative_rms

pytestmark = pytest.mark.gpu
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03}
every_precision = pytest.mark.parametrize("precision", TOLERANCE)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Let an emulated GPU take the time of one call, where a real one is asked for the least."""
    if emulated.VARIABLE in os.environ:
        monkeypatch.setattr("ds.models.execution.seconds_each", lambda work, most: work(1) or 1.0)


def z(count: int = 2) -> torch.Tensor:
    return ds.noise(1, range(count), build(CONFIG).shape)


def exact(model, count: int = 2) -> torch.Tensor:
    """Draw in float64 on the CPU, with the network as it is."""
    return model.using(build(CONFIG).double()).sample(z(count).double())


@every_precision
def test_an_engine_is_its_network(precision):
    net, t = build(CONFIG), torch.full((2,), 37)
    reference = build(CONFIG).double()(z().double(), t)
    engine = Engine(net.cuda(), [5, 37], images=2, dtype=getattr(torch, precision))
    found = engine(z().cuda(), t.cuda())
    assert found.is_cuda and relative_rms(found.cpu(), reference) < TOLERANCE[precision]


@pytest.mark.parametrize(
    ("make", "precision"),
    [
        pytest.param(teacher, "float32", id="ddim"),
        pytest.param(lambda: teacher("heun"), "bfloat16", id="heun"),
        pytest.param(student, "bfloat16", id="student"),
    ],
)
def test_a_sampler_replays_a_captured_step(make, precision, caplog):
    with caplog.at_level(logging.WARNING):
        model = make()
        model.net.cuda()
        execution = Execution.default(model, precision=precision)
        sampler = ds.Sampler(model, batch_size=2, execution=execution)
    assert not caplog.messages, "what is not captured is announced"
    assert sampler.execution == Execution(precision, "cuda_graph")
    found = sampler.sample(z(1).cuda())  # and another image, which fills the batch
    assert found.is_cuda and relative_rms(found.cpu(), exact(make(), 1)) < TOLERANCE[precision]


@pytest.mark.parametrize(
    ("precision", "mode"), [("bfloat16", "engine"), ("fp8", "engine"), ("fp8", "cuda_graph")]
)
def test_the_engine_is_given_the_student_s_time(precision, mode, monkeypatch):
    monkeypatch.setenv("DS_EXPERIMENTAL", "fp8")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    model = ds.Student(build(CONFIG).cuda(), ds.methods.DenoisingStudent(t=357))
    sampler = ds.Sampler(model, batch_size=2, execution=Execution(precision, mode))
    error = relative_rms(sampler.sample(z().cuda()).cpu(), exact(model))
    assert error < TOLERANCE.get(precision, 0.1)


def test_a_sampler_runs_the_network_itself_if_it_is_told():
    sampler = ds.Sampler(teacher(), batch_size=2, device="cuda", execution=Execution("bfloat16"))
    assert not isinstance(sampler.model.net, Engine)
    assert relative_rms(sampler.sample(z().cuda()).cpu(), exact(teacher())) < 0.03


def test_a_pair_is_what_the_teacher_makes_of_the_noise(tmp_path):
    model = teacher()
    model.net.cuda()
    store = ds.generate_pairs(model, tmp_path / "store", 2, seed=1, batch_size=2)
    levels = ds.ops.quantize(exact(teacher()))
    # Bfloat16 moves values, of which the largest is about 5, by some hundredths.
    assert (store.images(range(2)).int() - levels.int()).abs().float().mean() < 8
    assert (store.images([1, 0]).int() - levels.int()).abs().float().mean() > 40


def test_a_model_on_a_gpu_is_judged_as_one_on_the_cpu():
    model = student()
    real = ds.Sampler(model)(seed=9, indices=range(8))
    on_cpu = evaluate(model, real, Pixels(), n=4)
    model.net.cuda()
    on_gpu = evaluate(model, real, Pixels(), n=4, batch_size=2)
    assert on_gpu["protocol"]["device"]["type"] == "cuda"
    assert on_gpu["protocol"]["execution"]["precision"] == "bfloat16"
    assert on_gpu["frechet_distance"] == pytest.approx(on_cpu["frechet_distance"], rel=0.02)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_captured_step_is_told_the_label_of_each_image(scale_shift):
    config, label = replace(CONFIG, classes=3, scale_shift=scale_shift), torch.tensor([2, 0])
    model = teacher()
    model = model.using(build(config))
    truth = model.using(build(config).double()).sample(z().double(), cond={"label": label})
    model.net.cuda()
    assert Execution.default(model, precision="float32").mode == "cuda_graph"
    sampler = ds.Sampler(model, batch_size=2, execution=Execution("float32", "cuda_graph"))
    for _ in range(2):
        found = sampler.sample(z().cuda(), cond={"label": label.cuda()})
        assert relative_rms(found.cpu(), truth) < TOLERANCE["float32"]
    other = sampler.sample(z().cuda(), cond={"label": label.flip(0).cuda()})
    assert relative_rms(other.cpu(), truth) > 1e-3


@pytest.mark.parametrize("images", [1, 2])
def test_a_step_launches_what_its_plan_says(images):
    """The row of its time, the plan, the solver's update, and the counter."""
    if emulated.VARIABLE not in os.environ:
        pytest.skip("a GPU does not tell how many kernels it was given")
    model = teacher()
    engine = Engine(model.net.cuda(), GRID, images=images, dtype=torch.bfloat16)
    loop = Loop(engine, Recurrence.of(model))
    planned = [launch.kernel for s in engine.plan.steps for launch in engine.plan.launches(s)]
    with emulated.launches() as launched:
        loop.start()
    assert launched.pop(0) == "zero_"  # of the counter, at the start
    assert len(launched) == len(planned) + 3
    assert sum("norm" in name or "+gn" in name for name in planned) > 3
    assert launched[0] == "index_select" and launched[-2:] == ["_solver_update_kernel", "add_"]


def test_an_overflow_of_a_captured_step_is_an_error():
    model = student()
    with torch.no_grad():
        model.net.conv_in.weight *= 3e5
        model.net.conv_in.bias += 3e5
    sampler = ds.Sampler(model, device="cuda", dtype=torch.float16, batch_size=2)
    batches = sampler.batches(3, range(4))
    assert len([next(batches), next(batches)]) == 2  # the device is not waited for
    with pytest.raises(RuntimeError, match=r"0 to 1 of seed 3 are not finite \(float16, mode cuda"):
        next(batches)
