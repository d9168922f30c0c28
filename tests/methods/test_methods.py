"""Every method keeps the contract of its base class. A new file in ds/methods is tested unasked."""

import copy
import dataclasses
import json
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import ds
from ds.diffusion.noise import Draws
from ds.methods import AbstractMethod, Progress, defined_in, files, is_method
from ds.models.student import Student
from ds.models.teacher import Teacher
from ds.nets import UNetConfig
from ds.pairs.sources import Batch, Images, Noise, digits
from ds.system.config import from_json, to_json
from ds.training.config import TrainConfig
from ds.training.parallel import Loss
from ds.training.trainer import Trainer
from tests.methods.runs import RUNS
from tests.methods.runs import found as found

SHAPE = (1, 8, 8)
NET = UNetConfig(
    image_size=8,
    in_channels=1,
    channels=8,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    norm_groups=4,
)
TOTAL = 40  # steps


# Every stage is a method of its own.
every_method = pytest.mark.parametrize("method", RUNS.values(), ids=RUNS)


class Counting(nn.Module):
    """A network that notes the times of its calls."""

    def __init__(self, net):
        super().__init__()
        self.net, self.shape, self.times = net, net.shape, []

    def forward(self, x, t, **cond):
        assert len(t) == len(x)
        self.times += t.unique().tolist()
        return self.net(x, t, **cond)


def starts() -> list[Teacher]:
    """Teachers that a method may start from; it refuses those it cannot use."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = NET.build()
        with torch.no_grad():
            for w in net.parameters():
                w.add_(0.05 * torch.randn_like(w))
    denoiser = ds.Denoiser(net.eval().requires_grad_(False), ds.schedule.LinearBeta())
    return [Teacher(denoiser, ds.solvers.DDIM(), ds.grids.quadratic(4))]


def start(method: AbstractMethod) -> tuple[Teacher, nn.ModuleDict]:
    """The first teacher that a method takes, and what it makes of it."""
    refused = []
    for teacher in starts():
        try:
            return teacher, method.init(teacher)
        except ValueError as error:
            refused.append(error)
    raise AssertionError(refused)


def source(method: AbstractMethod, count: int = 64) -> Images | Noise:
    """Rows of the kind that a method feeds on; the digits stand in for what a teacher makes."""
    if method.feeds == "noise":
        return Noise(count, SHAPE)
    rows = Images(digits()[0][:count])
    rows.feeds = method.feeds
    return rows


def batch(method: AbstractMethod, first: int = 0, count: int = 16) -> Batch:
    return source(method, 128).batch(range(first, first + count))


def losses(method: AbstractMethod, modules: nn.ModuleDict, rows: Batch, step: int = 3) -> list:
    return [method.loss(modules, rows, Progress(step, TOTAL, turn)) for turn in method.turns]


@torch.no_grad()
def mean_score(method: AbstractMethod, modules: nn.ModuleDict) -> float | None:
    """The mean over a few draws of the rows."""
    draws = [source(method).batch(range(16), range(i, i + 16)) for i in range(0, 160, 16)]
    scores = [method.score(modules, rows, Progress(TOTAL, TOTAL)) for rows in draws]
    return None if None in scores else torch.stack(scores).mean().item()


def bits(modules: nn.ModuleDict) -> dict[str, torch.Tensor]:
    return copy.deepcopy(modules.state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(w, b[name]) for name, w in a.items())


def test_the_package_has_the_methods_of_its_folder():
    assert {"Denoising", "DenoisingStudent"} <= {cls.__name__ for cls in found()}
    assert all(getattr(ds.methods, cls.__name__) is cls for cls in found())
    with pytest.raises(AttributeError, match=r"has no Distilling; it has .*Denoising"):
        _ = ds.methods.Distilling


@pytest.mark.parametrize("module", files(), ids=lambda module: module.__name__)
def test_a_file_holds_one_method_at_most(module):
    assert len(defined_in(module)) <= 1


@pytest.mark.parametrize("value", [list[int], Sequence[int], AbstractMethod, "denoising"])
def test_only_a_final_method_is_taken_for_one(value):
    """Also in Python 3.10, which takes list[int] for a class."""
    assert not is_method(value)


@every_method
def test_a_method_is_a_frozen_value(method):
    assert dataclasses.is_dataclass(method)
    again = dataclasses.replace(method)
    assert (method, hash(method)) == (again, hash(again))
    assert method.feeds in ("pairs", "images", "noise", "trajectories")
    assert "student" in method.turns
    for field in dataclasses.fields(method):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, None)


@every_method
def test_a_method_comes_back_from_json(method):
    assert from_json(json.loads(json.dumps(to_json(method)))) == method


@every_method
def test_what_learns_shares_no_weights_with_the_teacher(method):
    teacher, modules = start(method)
    before = copy.deepcopy(teacher.net.state_dict())
    assert {"student", *method.turns} <= {*modules}
    assert all(p.requires_grad for p in modules["student"].parameters())
    assert not any(p.requires_grad for p in teacher.net.parameters())
    with torch.no_grad():
        for p in modules.parameters():
            if p.requires_grad:
                p.add_(1)
    assert same(teacher.net.state_dict(), before)


@every_method
def test_the_loss_is_a_function_of_weights_batch_and_progress(method):
    modules = start(method)[1].eval()
    first = losses(method, modules, batch(method))
    torch.manual_seed(99)
    again = losses(method, modules, batch(method))
    other = losses(method, modules, batch(method, 100))
    for a, b, c in zip(first, again, other, strict=True):
        assert a.shape == () and a.isfinite()
        assert torch.equal(a, b) and not torch.equal(a, c)


@every_method
@torch.no_grad()
def test_a_batch_has_the_loss_of_its_parts(method):
    """So that a run does not depend on accumulation, nor on the number of processes."""
    modules = start(method)[1].eval()
    whole = torch.stack(losses(method, modules, batch(method, 0, 16)))
    parts = [losses(method, modules, batch(method, i, 4)) for i in range(0, 16, 4)]
    mean = torch.tensor(parts).mean(0)
    assert torch.allclose(mean, whole, rtol=2e-6, atol=0) != method.coupled


@every_method
def test_the_loss_leaves_the_global_random_state_alone(method):
    modules = start(method)[1].eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    losses(method, modules, batch(method))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow  # of labelled points, test_conditions.py
@every_method
def test_the_loss_is_one_graph_for_all_steps(method):
    """Network, target, randomness and all, under autocast and in training."""
    torch._dynamo.reset()  # it compiles a function so often and no more
    modules = start(method)[1].train()
    graphs = CompileCounter()
    loss = torch.compile(Loss(method, modules), fullgraph=True, backend=graphs)
    with torch.autocast("cpu", torch.bfloat16):
        for step in range(3):
            rows, progress = batch(method, step), Progress(step, TOTAL, method.turns[-1])
            assert torch.equal(loss(rows, progress), method.loss(modules, rows, progress))
    assert graphs.frame_count <= 2  # a second one where the step is a number in the graph


@every_method
def test_the_losses_reach_every_weight_that_learns(method):
    modules = start(method)[1].train()
    for loss in losses(method, modules, batch(method)):
        loss.backward()
    for name, p in modules.named_parameters():
        assert not p.requires_grad or p.grad is not None, name
        assert p.grad is None or p.grad.isfinite().all(), name


@every_method
@torch.no_grad()
@pytest.mark.parametrize("nfe", [None, 1, 2, 5])
def test_a_sample_calls_the_network_at_its_times_and_leaves_the_noise(method, nfe):
    net = Counting(start(method)[1]["student"].eval())
    z, draws = ds.noise(0, range(4), SHAPE), Draws(0, torch.arange(4))
    before = z.clone()
    default = method.sample.__kwdefaults__["nfe"]
    options = {} if nfe is None else {"nfe": nfe}
    try:
        times = method.times(nfe or default)
    except ValueError:
        assert nfe, "the default number of calls can be had"
        with pytest.raises(ValueError, match=str(nfe)):
            method.sample(net, z, draws=draws, **options)
        return
    x = method.sample(net, z, draws=draws, **options)
    assert len(net.times) == (nfe or default)
    assert len({*net.times}) == len({*times})
    assert (x.dtype, x.shape) == (z.dtype, z.shape)
    assert x.isfinite().all()
    assert not torch.equal(x, z)
    assert torch.equal(z, before)


@every_method
@torch.no_grad()
def test_the_samples_of_a_batch_do_not_see_each_other(method):
    net, z = start(method)[1]["student"].eval(), ds.noise(0, range(4), SHAPE)
    index = torch.arange(4)
    together = method.sample(net, z, draws=Draws(0, index))
    alone = [method.sample(net, z[i : i + 1], draws=Draws(0, index[i : i + 1])) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@every_method
@pytest.mark.parametrize("nfe", [0, -1])
def test_less_than_one_network_call_is_refused(method, nfe):
    with pytest.raises(ValueError, match=str(nfe)):
        method.times(nfe)
    with pytest.raises(ValueError, match=str(nfe)):
        method.sample(start(method)[1]["student"], ds.noise(0, range(2), SHAPE), nfe=nfe)


@every_method
def test_the_result_of_a_stage_samples(method):
    result = method.result(start(method)[1]["student"].eval())
    assert isinstance(result, Student | Teacher)
    assert result.sample(ds.noise(0, range(2), SHAPE)).shape == (2, *SHAPE)


@every_method
def test_a_method_trains_and_its_run_is_resumed_to_the_same_bits(method, tmp_path):
    teacher, modules = start(method)
    before = mean_score(method, modules.eval())
    steps = 8 if before is None else TOTAL  # without a score no number tells what was learnt
    config = TrainConfig(
        batch_size=16,
        epochs=steps / 4,
        lr=3e-3,
        warmup_steps=0,
        log_every=steps // 4,
        check_every=steps // 2,
        betas=(0.9, 0.99),
        ema_decay=0.5,
    )
    run = Trainer(method, teacher, source(method), source(method), tmp_path, config)
    student = run.fit()
    moved = bits(run.state.modules["student"])
    assert not same(moved, bits(modules["student"]))
    if before is not None:
        assert mean_score(method, run.state.modules.eval()) < 0.9 * before
    again = Trainer(method, teacher, source(method), source(method), tmp_path, config)
    assert same(again.fit().state_dict(), student.state_dict())
    assert same(bits(again.state.modules["student"]), moved)
