"""Every method keeps the contract of its base class; a new file in ds/methods is tested unasked."""

import copy
import dataclasses
import importlib
import inspect
import json
import pkgutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import ds
from ds.methods import AbstractMethod, Denoising, DenoisingStudent
from ds.nets import UNetConfig
from ds.pairs.sources import Images, digits
from ds.system.config import from_json, to_json
from ds.training.trainer import TrainConfig, Trainer, _Loss

SHAPE = (1, 8, 8)
NET = UNetConfig(
    image_size=8, in_channels=1, channels=8, channel_mult=(1, 2), num_res_blocks=1,
    attention_resolutions=(4,), norm_groups=4,
)  # fmt: skip


def found() -> list[type[AbstractMethod]]:
    """The concrete classes that the files of ds/methods define."""
    classes = []
    for info in pkgutil.iter_modules(ds.methods.__path__):
        module = importlib.import_module(f"ds.methods.{info.name}")
        classes += [
            c
            for c in vars(module).values()
            if inspect.isclass(c) and issubclass(c, AbstractMethod) and not inspect.isabstract(c)
            if c.__module__ == module.__name__
        ]
    return classes


every_method = pytest.mark.parametrize(
    "method", [c() for c in found()], ids=lambda m: type(m).__name__
)


class Counting(nn.Module):
    """A network that counts its calls."""

    def __init__(self, net):
        super().__init__()
        self.net, self.shape, self.calls = net, net.shape, 0

    def forward(self, x, t):
        self.calls += 1
        assert ((t >= 0) & (t < 1000)).all()
        assert len(t) == len(x)
        return self.net(x, t)


def teacher() -> ds.Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = NET.build()
        with torch.no_grad():
            for w in net.parameters():
                w.add_(0.05 * torch.randn_like(w))
    return ds.Denoiser(net.eval().requires_grad_(False), ds.schedule.LinearBeta())


def batch(first: int = 0, count: int = 16) -> dict[str, torch.Tensor]:
    rows = range(first, first + count)
    return Images(digits()[0]).batch(rows, rows)


def test_the_folder_holds_the_methods_of_the_package():
    assert {Denoising, DenoisingStudent} <= set(found())
    assert {c.__name__ for c in found()} <= set(ds.methods.__all__)


@every_method
def test_a_method_is_a_frozen_value(method):
    assert dataclasses.is_dataclass(method)
    assert method == type(method)()
    assert hash(method) == hash(type(method)())
    assert method.feeds in ("pairs", "images")
    for field in dataclasses.fields(method):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, None)


@every_method
def test_a_method_comes_back_from_json(method):
    assert from_json(json.loads(json.dumps(to_json(method)))) == method


@every_method
def test_the_student_starts_at_the_teachers_weights_and_learns_apart_from_it(method):
    start = teacher()
    before = copy.deepcopy(start.net.state_dict())
    student = method.init(start)["student"]
    assert all(torch.equal(w, before[name]) for name, w in student.state_dict().items())
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in start.net.parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    assert all(torch.equal(w, before[name]) for name, w in start.net.state_dict().items())


@every_method
def test_the_loss_is_a_function_of_weights_batch_and_step(method):
    modules = method.init(teacher()).eval()
    first = method.loss(modules, batch(), 3)
    torch.manual_seed(99)
    again = method.loss(modules, batch(), 3)
    assert first.shape == ()
    assert first.isfinite()
    assert torch.equal(first, again)
    assert not torch.equal(first, method.loss(modules, batch(100), 3))


@every_method
@torch.no_grad()
def test_a_batch_has_the_loss_of_its_parts(method):
    """So that a run does not depend on accumulation, nor on the number of processes."""
    modules = method.init(teacher()).eval()
    whole = method.loss(modules, batch(0, 16), 3)
    parts = [method.loss(modules, batch(first, 4), 3) for first in range(0, 16, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-6, atol=0)


@every_method
def test_the_loss_leaves_the_global_random_state_alone(method):
    modules = method.init(teacher()).eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    method.loss(modules, batch(), 0)
    assert torch.equal(torch.rand(3), expected)


@every_method
def test_the_loss_is_one_graph_for_all_steps(method):
    """Network, target, randomness and all, under autocast and in training."""
    modules = method.init(teacher()).train()
    graphs = CompileCounter()
    loss = torch.compile(_Loss(method, modules), fullgraph=True, backend=graphs)
    with torch.autocast("cpu", torch.bfloat16):
        for step in range(3):
            expected = method.loss(modules, batch(step), step)
            assert torch.equal(loss(batch(step), step), expected)
    assert graphs.frame_count == 1


@every_method
def test_the_loss_reaches_every_weight_of_the_student(method):
    modules = method.init(teacher()).train()
    method.loss(modules, batch(), 0).backward()
    for name, p in modules["student"].named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


@every_method
def test_the_loss_falls_in_forty_steps(method):
    modules = method.init(teacher()).train()
    optimizer = torch.optim.Adam(modules["student"].parameters(), lr=3e-3)

    @torch.no_grad()
    def mean_loss():
        return sum(method.loss(modules, batch(), step).item() for step in range(10)) / 10

    before = mean_loss()
    for step in range(40):
        loss = method.loss(modules, batch(), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(modules, step)
    assert mean_loss() < 0.6 * before


@every_method
@torch.no_grad()
def test_a_sample_costs_the_network_calls_it_says_and_leaves_the_noise(method):
    net = Counting(teacher().net)
    z = ds.noise(0, range(4), SHAPE)
    before = z.clone()
    x = method.sample(net, z)
    assert net.calls == inspect.signature(method.sample).parameters["nfe"].default
    assert x.dtype == z.dtype
    assert x.shape == z.shape
    assert x.isfinite().all()
    assert not torch.equal(x, z)
    assert torch.equal(z, before)


@every_method
@torch.no_grad()
def test_the_samples_of_a_batch_do_not_see_each_other(method):
    net, z = teacher().net, ds.noise(0, range(4), SHAPE)
    together = method.sample(net, z)
    alone = torch.cat([method.sample(net, z[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@every_method
@pytest.mark.parametrize("nfe", [0, -1])
def test_less_than_one_network_call_is_refused(method, nfe):
    with pytest.raises(ValueError, match=str(nfe)):
        method.sample(teacher().net, ds.noise(0, range(2), SHAPE), nfe)


@every_method
def test_a_method_runs_in_the_trainer_as_it_is(method, tmp_path):
    class Source(Images):
        feeds = method.feeds

    source = Source(digits()[0][:64])
    config = TrainConfig(batch_size=16, epochs=1, warmup_steps=0, log_every=2, check_every=2)
    trainer = Trainer(method, teacher(), source, source, tmp_path, config)
    student = trainer.fit()
    again = Trainer(method, teacher(), source, source, tmp_path, config)
    resumed = again.fit()
    assert all(torch.equal(w, resumed.state_dict()[n]) for n, w in student.state_dict().items())


def test_denoising_student_makes_an_image_in_one_call_only():
    with pytest.raises(ValueError, match="in 1 network call, not 2"):
        DenoisingStudent().sample(teacher().net, ds.noise(0, range(2), SHAPE), 2)


@pytest.mark.parametrize("t", [1000, 5000])
def test_denoising_student_refuses_a_time_that_the_schedule_lacks(t):
    with pytest.raises(ValueError, match=f"t = {t}"):
        DenoisingStudent(t=t).init(teacher())


@pytest.mark.parametrize("t", [-1, -2])
def test_denoising_student_refuses_a_time_that_is_none_of_noise(t):
    with pytest.raises(ValueError, match=f"t must be at least 0, not {t}"):
        DenoisingStudent(t=t)


def test_denoising_student_sees_its_time_and_nothing_else():
    class Time(nn.Module):
        def forward(self, x, t):
            return x - t.reshape(-1, 1, 1, 1) / 1000

    z = ds.noise(0, range(3), SHAPE)
    torch.testing.assert_close(DenoisingStudent(t=640).sample(Time(), z), torch.full_like(z, 0.64))


@pytest.mark.parametrize(("loss_type", "expected"), [("l1", 0.5), ("l2", 0.25)])
def test_denoising_student_loss_is_the_mean_over_elements(loss_type, expected):
    class Half(nn.Module):
        def forward(self, x, t):
            return x - 0.5

    pairs = {"noise": ds.noise(0, range(3), SHAPE), "x0": torch.zeros(3, *SHAPE)}
    loss = DenoisingStudent(loss_type=loss_type).loss({"student": Half()}, pairs, 0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_denoising_is_zero_for_the_network_that_knows_the_answer(prediction):
    pairs = batch()
    method = Denoising(prediction=prediction)

    class Oracle(nn.Module):
        def forward(self, x, t):
            return method.denoiser(self).target(pairs["x0"], pairs["noise"], t)

    assert method.loss({"student": Oracle()}, pairs, 0).item() == 0


def test_denoising_draws_every_time_equally_often():
    """10,000 draws in ten bins of 100 times: chi-squared with 9 degrees of freedom."""

    class Noting(nn.Module):
        def forward(self, x, t):
            self.t = t
            return x

    net, index = Noting(), torch.arange(10_000)
    zeros = torch.zeros(len(index), 1, 1, 1)
    Denoising().loss({"student": net}, {"x0": zeros, "noise": zeros, "index": index}, 0)
    counts = torch.bincount(net.t // 100, minlength=10).double()
    assert len(counts) == 10 and net.t.min() == 0 and net.t.max() == 999
    assert (counts - 1000).square().sum() / 1000 < 27.9  # exceeded once in a thousand


@torch.no_grad()
def test_denoising_samples_with_as_many_calls_as_asked():
    net = Counting(teacher().net)
    Denoising().sample(net, ds.noise(0, range(2), SHAPE), 7)
    assert net.calls == 7
