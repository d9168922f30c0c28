"""Execution: its default, what it refuses, and that each way draws the images of the network."""

from dataclasses import dataclass, replace

import pytest
import torch

import ds
from ds import analytic
from ds.diffusion import grids
from ds.diffusion.solvers import DDIM, Heun
from ds.engine import Engine
from ds.models.execution import Execution
from ds.models.pretrained import fingerprint
from tests.nets.test_unet import TINY, build, relative_rms

TEACHER = analytic.GaussianField(size=4).teacher(DDIM(), grids.quadratic(5))
ENGINE, GRAPH = Execution(mode="engine"), Execution(mode="cuda_graph")


@pytest.fixture
def unet() -> ds.Teacher:
    return ds.Teacher(ds.Denoiser(build(), ds.schedule.LinearBeta()), DDIM(), grids.quadratic(5))


@pytest.fixture
def no_check(monkeypatch):
    """Let a CPU run what is for GPUs: a step is replayed there, not captured."""
    monkeypatch.setattr(Execution, "check", lambda *_: None)


@pytest.fixture
def gate(monkeypatch):
    """Allow the experimental precision."""
    monkeypatch.setenv("DS_EXPERIMENTAL", "fp8")


def drawn(model, execution=None) -> torch.Tensor:
    sampler = ds.Sampler(model, batch_size=4, execution=execution)
    return torch.cat([*sampler.batches(7, range(6))])


@dataclass(frozen=True)
class Clipped(DDIM):
    """A solver that is no recurrence."""

    def step(self, *args):
        x, state = super().step(*args)
        return x.clamp(-1, 1), state


# The default.


@pytest.mark.parametrize(
    ("device", "dtype", "asked", "expected"),
    [
        ("cuda", torch.float32, {}, Execution("bfloat16", "cuda_graph")),
        ("cuda", torch.float64, {}, Execution("float32", "cuda_graph")),
        ("cuda", torch.bfloat16, {}, Execution("float32", "cuda_graph")),
        ("cuda", torch.float32, {"mode": "eager"}, Execution("bfloat16", "eager")),
        ("cuda", torch.float32, {"precision": "tf32"}, Execution("tf32", "cuda_graph")),
        ("cuda", torch.float32, {"latency": True}, Execution("bfloat16", "cuda_graph")),
        ("cpu", torch.float32, {}, Execution("float32", "engine")),
        ("cpu", torch.float32, {"precision": "bfloat16"}, Execution("bfloat16", "engine")),
        ("cpu", torch.float32, {"precision": "fp8"}, Execution("fp8", "engine")),
        ("cpu", torch.bfloat16, {}, Execution("float32", "eager")),
        ("cpu", torch.bfloat16, {"precision": "fp8"}, Execution("fp8", "engine")),
        ("cpu", torch.float32, {"mode": "compile"}, Execution("float32", "compile")),
    ],
)
def test_the_default_is_that_of_the_device_and_the_weights(
    unet, device, dtype, asked, expected, monkeypatch
):
    unet.net.to(dtype)
    monkeypatch.setattr("ds.models.execution.device_of", lambda _: torch.device(device))
    assert Execution.default(unet, **asked) == expected
    assert Execution.default(TEACHER) == Execution()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_network_with_conditions_is_run_as_one_without_but_for_guidance(
    unet, device, monkeypatch, caplog
):
    monkeypatch.setattr("ds.models.execution.device_of", lambda _: torch.device(device))
    plain = Execution.default(unet)
    told = ds.Denoiser(build(replace(TINY, classes=3)), ds.schedule.LinearBeta())
    assert Execution.default(replace(unet, denoiser=told)) == plain
    assert not caplog.records
    guided = Execution.default(replace(unet, denoiser=ds.Guided(told, 2.0)))
    assert guided == replace(plain, mode="engine")
    assert ("slower: a loop needs one network call" in caplog.text) == (device == "cuda")


@pytest.mark.parametrize("mode", ["engine", "cuda_graph"])
@pytest.mark.parametrize("labels", [[2, 0, 1, 1, 0, 2], 1])
def test_the_engine_and_a_graph_draw_the_classes_that_are_asked_for(unet, no_check, mode, labels):
    net = build(replace(TINY, classes=3))
    model = replace(unet, denoiser=replace(unet.denoiser, net=net))
    images = []
    for execution in (Execution(), Execution(mode=mode)):
        sampler = ds.Sampler(model, batch_size=4, execution=execution)
        images.append(torch.cat([*sampler.batches(7, range(6), labels=labels)]))
    assert relative_rms(images[1], images[0]) < 1e-5


def test_every_model_whose_step_can_be_captured_is_on_a_gpu(unet, caplog, monkeypatch):
    monkeypatch.setattr("ds.models.execution.device_of", lambda _: torch.device("cuda"))
    student = ds.Student(unet.net, ds.methods.DenoisingStudent())
    for model in (unet, replace(unet, solver=Heun()), student):
        assert Execution.default(model).mode == "cuda_graph"
    assert not caplog.records
    assert Execution.default(replace(unet, solver=Clipped())).mode == "engine"
    assert "steps are launched one by one, which is slower: a loop needs" in caplog.text


def test_for_latency_the_fastest_way_is_taken(unet, monkeypatch):
    ways = []

    def timed(work, most):
        ways.append(work)
        return 1.0 if len(ways) == 2 else 2.0

    monkeypatch.setattr("ds.models.execution.seconds_each", timed)
    sampler = ds.Sampler(unet, latency=True)
    assert sampler.batch_size == 1 and len(ways) == 3
    assert sampler.execution == replace(ENGINE, winograd=False)
    assert not sampler.model.net.rewrites.winograd
    assert relative_rms(next(sampler.batches(7, [0])), drawn(unet)[:1]) < 1e-5


# What is refused.


@pytest.mark.parametrize("field", [{"precision": "fp4"}, {"mode": "loop"}, {"tune": 1}], ids=repr)
def test_a_field_that_cannot_be_is_refused(field):
    with pytest.raises(ValueError, match=rf"^Execution: {next(iter(field))} must be "):
        Execution(**field)


@pytest.mark.parametrize(
    ("network", "execution", "message"),
    [
        ("unet", Execution("tf32"), "precision tf32 is for CUDA GPUs, not for cpu"),
        ("unet", GRAPH, "mode cuda_graph is for CUDA GPUs, not for cpu; use engine"),
        (
            "exact",
            ENGINE,
            "mode engine is for U-Nets without .*, not for this ExactNet",
        ),
        ("exact", Execution("fp8", "engine"), "precision fp8 is for U-Nets in the mode engine"),
        ("unet", Execution("fp8", "eager"), "precision fp8 is for U-Nets in the mode engine"),
        ("unet", Execution("fp8", "compile"), "precision fp8 is for U-Nets in the mode engine"),
    ],
)
def test_an_execution_that_cannot_be_here_is_refused(unet, gate, network, execution, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ds.Sampler(unet if network == "unet" else TEACHER, execution=execution)


@pytest.mark.parametrize("value", [None, "", "1", "fp4"])
def test_fp8_is_refused_unless_the_environment_names_it(unet, monkeypatch, value):
    monkeypatch.delenv("DS_EXPERIMENTAL", raising=False)
    if value is not None:
        monkeypatch.setenv("DS_EXPERIMENTAL", value)
    with pytest.raises(ValueError, match=r"^precision fp8 is an experiment: .* to use it$"):
        ds.Sampler(unet, execution=Execution("fp8", "engine"))


def test_a_model_that_is_no_recurrence_is_not_captured(unet, no_check):
    with pytest.raises(ValueError, match="linear in the noise"):
        ds.Sampler(replace(unet, solver=Clipped()), execution=GRAPH)


# What each way draws.


def test_a_compiled_teacher_draws_the_same_images(compiler):
    expected = ds.Sampler(TEACHER)(indices=range(4))
    sampler = ds.Sampler(TEACHER, execution=Execution(mode="compile"), batch_size=4)
    assert sampler.cold_start["compile"] > sampler.cold_start["capture"] == 0
    made = sampler(indices=range(4))
    assert (made.int() - expected.int()).abs().max() <= 1  # a pixel may round the other way


def test_the_network_itself_is_run_where_eager_is_asked_for(unet):
    sampler = ds.Sampler(unet, execution=Execution())
    assert sampler.model is unet and isinstance(ds.Sampler(unet).model.net, Engine)


def test_a_replayed_step_draws_what_the_solver_does(unet, no_check):
    """The last batch is not full. On a GPU the same step is captured."""
    expected, made = drawn(unet, ENGINE), drawn(unet, GRAPH)
    assert relative_rms(made, expected) < 1e-6
    assert torch.equal(made, drawn(unet, GRAPH))


def test_a_student_of_several_calls_draws_what_its_method_does(unet, no_check):
    """And its engine knows every time that the method calls it at."""
    student = ds.Student(unet.net, ds.methods.Denoising(), nfe=3)
    z = ds.noise(7, range(6), student.shape)
    expected = student.sample(z)
    assert relative_rms(expected, replace(student, nfe=2).sample(z)) > 0.01
    assert (
        relative_rms(expected, replace(student, nfe=2).sample(ds.noise(7, range(6), student.shape)))
        > 0.01
    )
    for execution in (ENGINE, GRAPH):
        assert relative_rms(drawn(student, execution), expected) < 1e-5
    engine = student.engine(4).net
    assert engine._times.tolist() == [0, 333, 666]


@pytest.mark.parametrize("mode", ["eager", "engine"])
def test_bfloat16_runs_in_a_copy_and_is_near(unet, mode):
    before = fingerprint(unet.denoiser)
    expected, made = drawn(unet), drawn(unet, Execution("bfloat16", mode))
    assert made.dtype == torch.float32
    assert 1e-4 < relative_rms(made, expected) < 5e-2
    assert fingerprint(unet.denoiser) == before


@pytest.mark.parametrize("mode", ["engine", "cuda_graph"])
def test_fp8_runs_in_the_engine_and_is_further_than_bfloat16(unet, gate, no_check, mode):
    before = fingerprint(unet.denoiser)
    expected, near = drawn(unet), drawn(unet, Execution("bfloat16", "engine"))
    made = drawn(unet, Execution("fp8", mode))
    assert made.dtype == torch.float32
    assert 2 * relative_rms(near, expected) < relative_rms(made, expected) < 0.3
    assert fingerprint(unet.denoiser) == before


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_tf32_is_allowed_while_it_is_asked_for_and_not_longer(precision, no_check, monkeypatch):
    seen = []

    def look(_, z, **options):
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return z

    monkeypatch.setattr(ds.Teacher, "sample", look)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    ds.Sampler(TEACHER, execution=Execution(precision))(indices=[0])
    assert seen == [(precision == "tf32",) * 2]
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)


def test_a_cold_start_says_what_took_how_long(unet, no_check):
    cold = ds.Sampler(unet, execution=GRAPH).cold_start
    assert cold["plan"] > 0 and cold["capture"] > 0 and cold["compile"] == 0
