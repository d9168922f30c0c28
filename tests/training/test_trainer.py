"""The Trainer: it learns what it should, resumes to the bit, and loses nothing."""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

import ds
from ds.analytic import Gaussian
from ds.methods import AbstractMethod, Denoising, DenoisingStudent, Progress
from ds.models.images import save_png, tile, to_uint8
from ds.nets import UNetConfig
from ds.pairs.sources import Generated, Images, Pairs, digits
from ds.system.config import to_json
from ds.system.files import read_json, read_sealed
from ds.system.signals import Interrupted, Stop
from ds.system.staging import locked
from ds.training.config import RuntimeConfig, TrainConfig
from ds.training.ema import average, power_decay
from ds.training.log import MEASURED
from ds.training.trainer import COMPILE_STEPS, Trainer
from tests.training.test_loader import KINDS

DATA = Gaussian(mean=0.1, std=0.15, shape=(1, 8, 8))
TEACHER = DATA.teacher(ds.solvers.DDIM(), ds.grids.quadratic(100))
HELD_OUT = 256
TINY = UNetConfig(
    image_size=8,
    in_channels=1,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    norm_groups=4,
    dropout=0.2,
)
SHORT = TrainConfig(
    batch_size=32, epochs=12 / 8, lr=1e-2, warmup_steps=0, ema_decay=0.5, log_every=3, check_every=4
)


class Affine(nn.Module):
    """Two parameters: with x - net(x), the student is gain * x + shift."""

    shape = DATA.shape

    def __init__(self, gain: float = 0.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.shift = nn.Parameter(torch.tensor(0.0))

    def forward(self, x, t):
        return x - (self.gain * x + self.shift)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return ds.generate_pairs(TEACHER, folder, 4096 + HELD_OUT, batch_size=1024)


def started(net: nn.Module) -> ds.Teacher:
    """A teacher with a network of noise prediction, for a run to start from."""
    return ds.Teacher(ds.Denoiser(net, ds.schedule.LinearBeta()), TEACHER.solver, (999,))


def affine() -> ds.Teacher:
    return started(Affine())


def unet() -> ds.Teacher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = TINY.build()
        with torch.no_grad():
            for w in net.parameters():
                w.add_(0.05 * torch.randn_like(w))
    return started(net)


def steady() -> ds.Teacher:
    """The same without dropout, whose masks depend on how a batch is cut into parts."""
    init = unet()
    for module in init.net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return init


def trainer(store, out, config=SHORT, *, init=None, method=None, rows=256, **options) -> Trainer:
    """A run of 12 steps of 8 a epoch, unless the configuration says otherwise."""
    source, held_out = Pairs(store, range(HELD_OUT, HELD_OUT + rows)), Pairs(store, range(64))
    method = method or DenoisingStudent()
    return Trainer(method, init or affine(), source, held_out, out, config, **options)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(out: Path) -> list[dict]:
    """The lines without what is measured."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines(out)]


def state(run: Trainer) -> dict[str, torch.Tensor]:
    """Everything that a run has learnt."""
    kinds = {"now": run.state.modules, "ema": run.averages.ema, "best": run.averages.best}
    return {
        f"{kind} {name}": w
        for kind, module in kinds.items()
        for name, w in module.state_dict().items()
    }


def assert_same_bits(a: Trainer, b: Trainer) -> None:
    here, there = state(a), state(b)
    assert here.keys() == there.keys()
    for name, w in here.items():
        assert torch.equal(w, there[name]), name


def stop_at(monkeypatch, step: int) -> None:
    """Send the signal of Ctrl-C, in effect, while that step is taken."""
    asked = iter(range(1, 10**9))

    @contextlib.contextmanager
    def signals():
        stop = Stop()
        stop.__class__ = type("Asked", (Stop,), {"__call__": lambda _: int(next(asked) == step)})
        yield stop

    monkeypatch.setattr("ds.training.trainer.deferred_signals", signals)


# The bar with a closed form.


def test_two_parameters_reach_the_floor_that_rounding_to_uint8_sets(store, tmp_path):
    """DDIM on Gaussian data is an affine map, so the student can be exact.

    What is left to the stored pairs is their rounding, 2 / 255 / sqrt(12) = 0.00226; to the teacher
    itself, what averaging over 262,144 rounded elements leaves, about 0.00226 / 512 = 4e-6.
    """
    config = TrainConfig(
        batch_size=256,
        epochs=40,
        lr=5e-3,
        warmup_steps=20,
        betas=(0.9, 0.999),
        lr_schedule="cosine",
        ema_decay=0.98,
        check_every=160,
    )
    run = trainer(store, tmp_path, config, rows=4096)
    student = ds.Student(run.fit(), run.method)
    z = store.noise(range(HELD_OUT))
    to_pairs = (student.sample(z) - store.targets(range(HELD_OUT))).square().mean().sqrt().item()
    to_teacher = (student.sample(z) - TEACHER.sample(z)).double().square().mean().sqrt().item()
    print(f"RMS to the stored pairs {to_pairs:.6f}, to the unquantized teacher {to_teacher:.2e}")
    assert to_pairs == pytest.approx(2 / 255 / math.sqrt(12), rel=0.01)
    assert to_teacher < 1e-5


# Single parts.


def test_the_student_starts_as_noise_minus_the_teachers_network(store, tmp_path):
    init = unet()
    run = trainer(store, tmp_path, init=init)
    z = ds.noise(0, range(4), init.shape)
    init.net.eval()
    expected = z - init.net(z, torch.full((4,), 999))
    for net in (run.state.modules["student"].eval(), run.averages.ema, run.averages.best):
        assert torch.equal(run.method.sample(net, z), expected)


def test_training_leaves_the_teacher_as_it_is(store, tmp_path):
    init = unet()
    before = copy.deepcopy(init.net.state_dict())
    trainer(store, tmp_path, init=init).fit()
    assert all(torch.equal(w, before[name]) for name, w in init.net.state_dict().items())


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("none", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 11: 1.0}),
        # half a cosine over the 8 steps after the warm-up of 4
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 6: (1 + math.sqrt(0.5)) / 2, 8: 0.5, 12: 0.0}),
    ],
)
def test_the_learning_rate_rises_linearly_and_then_decays(store, tmp_path, decay, expected):
    run = trainer(store, tmp_path, replace(SHORT, warmup_steps=4, lr_schedule=decay))
    for step, share in expected.items():
        run.state.step = step
        assert run._lr() == pytest.approx(share * SHORT.lr)


def test_the_first_adam_step_moves_by_the_learning_rate(store, tmp_path):
    """The learning rate gets to the optimiser: Adam's first step is lr * sign(gradient)."""
    run = trainer(store, tmp_path, replace(SHORT, warmup_steps=4, epochs=1 / 8))
    run.fit()
    moved = [p.item() for p in run.state.modules["student"].parameters()]
    assert moved == pytest.approx([SHORT.lr / 4, SHORT.lr / 4], rel=1e-5)


def test_the_average_is_its_closed_form(store, tmp_path, monkeypatch):
    run = trainer(store, tmp_path)
    weights, advance = [0.0], run._advance

    def note():
        advance()
        weights.append(run.state.modules["student"].gain.item())

    monkeypatch.setattr(run, "_advance", note)
    run.fit()
    d, k = SHORT.ema_decay, len(weights) - 1
    expected = d**k * weights[0] + sum((1 - d) * d ** (k - i) * weights[i] for i in range(1, k + 1))
    assert k == 12
    assert run.averages.ema.gain.item() == pytest.approx(expected, rel=1e-6)


def test_the_average_is_float32_where_the_network_is_not(store, tmp_path):
    init = affine()
    init.net.to(torch.bfloat16)
    run = trainer(store, tmp_path, init=init)
    assert {p.dtype for p in run.averages.ema.parameters()} == {torch.float32}


def test_the_best_average_is_the_one_with_the_lowest_held_out_loss(store, tmp_path, monkeypatch):
    """A learning rate far too high makes a later average worse than an earlier one."""
    run = trainer(store, tmp_path, replace(SHORT, lr=0.1, epochs=4))
    seen, check = [], run._check

    def note():
        check()
        loss = lines(tmp_path)[-1]["held_out_loss"]
        seen.append((loss, copy.deepcopy(run.averages.ema.state_dict())))

    monkeypatch.setattr(run, "_check", note)
    net = run.fit()
    losses = [loss for loss, _ in seen]
    best = losses.index(min(losses))
    assert best < len(losses) - 1, "the last average must not be the best for this test to say much"
    assert all(torch.equal(w, seen[best][1][name]) for name, w in net.state_dict().items())
    assert run.best_loss == min(losses)


def test_the_held_out_loss_is_the_mean_over_all_held_out_rows(store, tmp_path):
    run = trainer(store, tmp_path, replace(SHORT, batch_size=48))  # 64 rows: a batch and a rest
    run.fit()
    z, x0 = store.noise(range(64)), store.targets(range(64))
    expected = (run.method.sample(run.averages.ema, z) - x0).square().mean().item()
    assert lines(tmp_path)[-1]["held_out_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_noted_loss_is_the_mean_since_the_last_note(store, tmp_path, monkeypatch):
    run, losses = trainer(store, tmp_path), []
    method = run.method

    class Noting:
        def __getattr__(self, name):
            return getattr(method, name)

        def loss(self, modules, batch, progress):
            out = method.loss(modules, batch, progress)
            if out.requires_grad and len(batch.x0) > 1:  # one row is there to count operations
                losses.append(out.item())
            return out

    monkeypatch.setattr(run, "method", Noting())
    run.fit()
    noted = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    expected = [sum(losses[i : i + 3]) / 3 for i in range(0, 12, 3)]
    assert noted == pytest.approx(expected, rel=1e-6)


def test_a_note_tells_the_arithmetic_of_the_images_in_it(store, tmp_path):
    """Against a count by hand: of a convolution forward, and backward for its weights alone."""
    net = nn.Conv2d(1, 1, 3, padding=1)
    net.shape, net.call = DATA.shape, net.forward
    net.forward = lambda x, t: net.call(x)
    run = trainer(store, tmp_path, init=started(net))
    run.fit()
    for line in lines(tmp_path):
        if "tflops" in line:
            expected = line["images_per_second"] * 2 * (2 * 9 * 64) / 1e12
            assert line["tflops"] == pytest.approx(expected, rel=1e-3)


def test_the_trainer_notes_what_an_evaluation_finds(store, tmp_path):
    seen = []

    def evaluate(net):
        seen.append(net.gain.item())
        return {"distance": net.gain.item()}

    run = trainer(store, tmp_path, runtime=RuntimeConfig(evaluate_every=5), evaluate=evaluate)
    run.fit()
    found = {line["step"]: line["distance"] for line in lines(tmp_path) if "distance" in line}
    assert list(found) == [5, 10, 12]
    assert list(found.values()) == seen
    assert seen[-1] == run.averages.ema.gain.item()
    with pytest.raises(ValueError, match=r"runtime\.evaluate_every needs an `evaluate`"):
        trainer(store, tmp_path, runtime=RuntimeConfig(evaluate_every=5))


def test_the_sample_grid_is_what_the_average_makes_of_fixed_noise(store, tmp_path, monkeypatch):
    drawn = []

    def draw(sheet, path, scale):
        drawn.append(sheet)
        save_png(sheet, path, scale=scale)

    monkeypatch.setattr("ds.training.trainer.save_png", draw)
    run = trainer(store, tmp_path)
    run.fit()
    made = run.method.sample(run.averages.ema, ds.noise(SHORT.seed, range(64), DATA.shape))
    assert torch.equal(drawn[-1], tile(to_uint8(made), columns=8))
    sheets = sorted(f.name for f in (tmp_path / "samples").iterdir())
    assert sheets == [f"step-{step:07d}.png" for step in (4, 8, 12)]


@pytest.mark.parametrize(
    ("device", "capability", "asked", "found"),
    [
        ("cpu", None, "auto", "float32"),
        ("cuda", (7, 5), "auto", "float32"),
        ("cuda", (9, 0), "auto", "bfloat16"),
        ("cuda", (9, 0), "float32", "float32"),
    ],
)
def test_the_usual_precision_is_that_of_the_device(device, capability, asked, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert replace(SHORT, precision=asked).on(torch.device(device)).precision == found


def test_a_run_records_the_precision_that_it_has(store, tmp_path):
    run = trainer(store, tmp_path, replace(SHORT, precision="auto"))
    run.fit()
    assert read_json(tmp_path / "run.json")["train"]["precision"] == "float32"
    trainer(store, tmp_path, replace(SHORT, precision="float32")).fit()  # is the same run


@pytest.mark.parametrize(
    ("device", "net", "steps", "asked", "found"),
    [
        ("cuda", "unet", COMPILE_STEPS, "auto", True),
        ("cuda", "unet", COMPILE_STEPS - 1, "auto", False),
        ("cpu", "unet", COMPILE_STEPS, "auto", False),
        ("cuda", "other", COMPILE_STEPS, "auto", False),
        ("cuda", "unet", COMPILE_STEPS, "no", False),
        ("cpu", "other", 1, "yes", True),
    ],
)
def test_a_long_run_of_a_unet_on_a_gpu_is_compiled_unasked(
    store, tmp_path, caplog, device, net, steps, asked, found
):
    init = {"init": unet()} if net == "unet" else {}
    run = trainer(store, tmp_path, runtime=RuntimeConfig(compile=asked), **init)
    run.device, run.steps = torch.device(device), steps
    with caplog.at_level("INFO", "ds"):
        assert run._compiles() == found
    said = f"train: compiled, which pays in {steps} steps"
    assert caplog.messages == [said] * (found and asked == "auto")


def test_bfloat16_trains(store, tmp_path):
    config = replace(SHORT, precision="bfloat16", epochs=4, lr=3e-3, ema_decay=0.8)
    run = trainer(store, tmp_path, config, init=unet())
    run.fit()
    losses = [line["held_out_loss"] for line in lines(tmp_path) if "held_out_loss" in line]
    assert losses[-1] < 0.6 * losses[0]
    assert {w.dtype for w in state(run).values()} == {torch.float32}


def test_float16_trains_and_scales_its_gradients(store, tmp_path):
    run = trainer(store, tmp_path, replace(SHORT, precision="float16", lr=3e-3), init=unet())
    run.fit()
    losses = [line["held_out_loss"] for line in lines(tmp_path) if "held_out_loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert {w.dtype for w in state(run).values()} == {torch.float32}
    assert run.state.scaler.get_scale() > 1


def test_a_step_that_overflows_is_left_out(store, tmp_path):
    """The scale starts at 65,536, which a loss a thousand times as large takes beyond float32."""

    class Large(DenoisingStudent):
        def loss(self, modules, batch, progress):
            return super().loss(modules, batch, progress) * (1e38 if progress.step == 2 else 1)

    config = replace(SHORT, precision="float16", log_every=1000, check_every=1000)
    run, seen = trainer(store, tmp_path, config, method=Large()), []
    run.method = _after_every_step(run.method, lambda modules: seen.append(_flat(modules)))
    run.fit()
    same = [torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert [step for step, equal in enumerate(same, 1) if equal] == [2]
    assert run.state.scaler.get_scale() == 32_768


def _flat(modules: nn.ModuleDict) -> torch.Tensor:
    return torch.stack([p.detach().clone() for p in modules["student"].parameters()])


def _after_every_step(method: AbstractMethod, act):
    """The method, which also acts on its modules after every step."""

    class Acting:
        def __getattr__(self, name):
            return getattr(method, name)

        def after_step(self, modules, progress):
            act(modules)

    return Acting()


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "apex_adamw"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_step_is_clipping_then_torch_optim_then_the_average(
    store, tmp_path, monkeypatch, optimizer, precision
):
    """Also with gradients that were scaled; with a stand-in for apex, which needs a GPU."""

    def stand_in(params, adam_w_mode, **options):
        assert adam_w_mode
        return torch.optim.AdamW(params, **options)

    monkeypatch.setattr("ds.system.apex.status", lambda: "NVIDIA's, a stand-in")
    monkeypatch.setitem(sys.modules, "apex", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "apex.optimizers", SimpleNamespace(FusedAdam=stand_in))
    c = replace(
        SHORT,
        grad_clip_norm=1e-2,
        weight_decay=0.1,
        precision=precision,
        optimizer=optimizer,
        lr_schedule="cosine",
        ema_gamma=2.0,
    )
    run = trainer(store, tmp_path / "run", c, init=unet())
    theirs = copy.deepcopy(run.state.modules["student"])
    ema = copy.deepcopy(theirs)
    cls = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
    expected = cls(theirs.parameters(), betas=c.betas, weight_decay=c.weight_decay)
    norms = []

    def follow(modules):
        for p, other in zip(modules["student"].parameters(), theirs.parameters(), strict=True):
            other.grad = p.grad.clone()
        norms.append(nn.utils.clip_grad_norm_(theirs.parameters(), c.grad_clip_norm))
        expected.param_groups[0]["lr"] = run._lr()
        expected.step()
        weights = [p.detach() for p in theirs.parameters()]
        average(list(ema.parameters()), weights, power_decay(run.state.step, c.ema_gamma))

    run.method = _after_every_step(run.method, follow)
    run.fit()
    assert len(norms) == 12
    for a, b in ((run.state.modules["student"], theirs), (run.averages.ema, ema)):
        for p, other in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, other, rtol=1e-5, atol=1e-6)


def test_a_weight_without_a_gradient_is_stepped_with_zeros(store, tmp_path):
    """As the decay of AdamW asks for, and without an error."""

    class Half(DenoisingStudent):
        def loss(self, modules, batch, progress):
            return modules["student"].gain

    init = started(Affine(0.5))
    init.net.shift.data.fill_(0.5)
    config = replace(SHORT, optimizer="adamw", weight_decay=0.3, epochs=1 / 8)
    run = trainer(store, tmp_path, config, init=init, method=Half())
    run.fit()
    assert run.state.modules["student"].shift.item() == pytest.approx(0.5 * (1 - 1e-2 * 0.3))


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    # a first step of Adam is the sign of the gradient, to which the decay adds; or not
    [("adam", 0.5 - 1e-2), ("adamw", 0.5 * (1 - 1e-2 * 0.3) - 1e-2)],
)
def test_weight_decay_is_that_of_the_optimiser(store, tmp_path, optimizer, expected):
    class Flat(DenoisingStudent):
        def loss(self, modules, batch, progress):
            return modules["student"].gain + 0 * modules["student"].shift

    init = started(Affine(0.5))
    config = replace(SHORT, optimizer=optimizer, weight_decay=0.3, epochs=1 / 8)
    run = trainer(store, tmp_path, config, init=init, method=Flat())
    run.fit()
    assert run.state.modules["student"].gain.item() == pytest.approx(expected, rel=1e-6)


def test_apex_that_is_not_nvidias_is_named(store, tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="optimizer apex_adam: apex is another project of the sam"):
        trainer(store, tmp_path / "run", replace(SHORT, optimizer="apex_adam"))


def test_the_power_function_average_is_its_closed_form():
    """Of weights that grow as t, the average with weights t**gamma is (gamma + 1) / (gamma + 2)."""
    net, ema, gamma = Affine(), Affine(), 6.94
    for step in range(2000):
        net.gain.data.fill_(step + 1)
        average([ema.gain.data], [net.gain.data], power_decay(step, gamma))
        assert step or ema.gain.item() == 1
    assert ema.gain.item() / 2000 == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)


def test_the_trainer_takes_the_power_function_average(store, tmp_path):
    run = trainer(store, tmp_path, replace(SHORT, ema_gamma=3.0, epochs=2 / 8))
    gains = []
    run.method = _after_every_step(run.method, lambda m: gains.append(m["student"].gain.item()))
    run.fit()
    expected = gains[0] / 16 + gains[1] * 15 / 16
    assert run.averages.ema.gain.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [2, 8])
def test_parts_of_a_batch_add_up_to_it(store, tmp_path, count):
    runs = [
        trainer(
            store,
            tmp_path / str(n),
            replace(SHORT, grad_clip_norm=0.1),
            runtime=RuntimeConfig(**options),
        )
        for n, options in enumerate(({}, {"accumulate": count}))
    ]
    for run in runs:
        run.fit()
    for name, w in state(runs[0]).items():
        assert torch.allclose(w, state(runs[1])[name], rtol=1e-4, atol=1e-6), name


def test_pairs_of_the_step_train_as_those_of_a_store(tmp_path):
    fresh = Generated(TEACHER, 256, seed=7)
    run = Trainer(
        DenoisingStudent(),
        affine(),
        fresh,
        Generated(TEACHER, 64, seed=8),
        tmp_path,
        replace(SHORT, epochs=4),
    )
    run.fit()
    losses = [line["held_out_loss"] for line in lines(tmp_path) if "held_out_loss" in line]
    assert losses[-1] < 0.2 * losses[0]


def test_every_loader_trains_to_the_same_bits(store, tmp_path):
    runs = [trainer(store, tmp_path / kind, runtime=RuntimeConfig(loader=kind)) for kind in KINDS]
    for run in runs:
        run.fit()
        assert_same_bits(runs[0], run)


def test_parts_of_a_batch_have_dropout_of_their_own(store, tmp_path):
    run = trainer(store, tmp_path)
    draws = []
    for part in (0, 1, 0):
        with run._seeded(0, part):
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


def test_a_shuffle_within_windows_trains_on_it(store, tmp_path):
    run = trainer(store, tmp_path, replace(SHORT, shuffle_window=64))
    assert run.batches.window == 64


# Resuming.


def test_a_compiled_run_resumes_to_the_same_bits(store, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # to be as it was afterwards
    options = RuntimeConfig(compile="yes", compile_cache=str(tmp_path / "cache"))

    def compiled(folder: str) -> Trainer:
        return trainer(store, tmp_path / folder, runtime=options)

    whole = compiled("whole")
    whole.fit()
    assert whole.losses["student"]._compiled_call_impl is not None
    assert list((tmp_path / "cache" / "fxgraph").rglob("*")), "the cache is where it was asked for"
    plain = trainer(store, tmp_path / "plain")
    plain.fit()
    for name, w in state(whole).items():
        assert torch.allclose(w, state(plain)[name], rtol=1e-4, atol=1e-5), name
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Interrupted):
            compiled("cut").fit()
    resumed = compiled("cut")
    resumed.fit()
    assert_same_bits(whole, resumed)


@pytest.mark.parametrize("make", [affine, unet], ids=["affine", "unet with dropout"])
@pytest.mark.parametrize("step", [4, 7])
def test_a_run_interrupted_at_a_step_resumes_to_the_same_bits(
    store, tmp_path, monkeypatch, make, step
):
    whole = trainer(store, tmp_path / "whole", init=make())
    whole.fit()
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted, match=f"interrupted at step {step} of 12, which is saved"):
            trainer(store, tmp_path / "cut", init=make()).fit()
    resumed = trainer(store, tmp_path / "cut", init=make())
    resumed.fit()
    assert_same_bits(whole, resumed)
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut")


@pytest.mark.parametrize("call", [1, 2, 6, 7, 12])
def test_a_signal_cuts_a_step_or_a_check_short_and_no_bit_is_another(
    store, tmp_path, monkeypatch, call
):
    """The losses of a run: one to count operations, 4 of steps, 2 of a check, 4 of steps, ..."""
    whole = trainer(store, tmp_path / "whole")
    whole.fit()
    loss, calls = DenoisingStudent.loss, []

    def cut(*args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGUSR1)
        return loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(DenoisingStudent, "loss", cut)
        with pytest.raises(Interrupted, match="which is saved; run the same command") as found:
            trainer(store, tmp_path / "cut").fit()
    assert (len(calls), found.value.number) == (call, signal.SIGUSR1)
    resumed = trainer(store, tmp_path / "cut")
    resumed.fit()
    assert_same_bits(whole, resumed)
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut")


def test_recomputed_norms_train_to_the_same_bits(store, tmp_path):
    runs = [
        trainer(store, tmp_path / str(again), replace(SHORT, recompute_norms=again), init=unet())
        for again in (False, True)
    ]
    for run in runs:
        run.fit()
    assert_same_bits(*runs)


def test_norms_that_are_not_there_cannot_be_recomputed(store, tmp_path):
    with pytest.raises(ValueError, match="Affine has no ResBlock"):
        trainer(store, tmp_path, replace(SHORT, recompute_norms=True))


def test_dropout_is_on_while_training(store, tmp_path):
    """Without it the resumption with dropout above would say nothing."""
    run = trainer(store, tmp_path, init=unet())
    batch = run.batches.at(0)
    losses = {run.method.loss(run.state.modules, batch, Progress(0, 12)).item() for _ in range(3)}
    assert len(losses) == 3


def test_steps_after_the_last_checkpoint_are_taken_again(store, tmp_path, monkeypatch):
    """As after kill -9 at step 7: the last checkpoint is that of step 4, the last line is torn."""
    whole = trainer(store, tmp_path / "whole")
    whole.fit()
    cut = trainer(store, tmp_path / "cut")
    advance = cut._advance

    def die_at_seven():
        if cut.state.step == 7:
            raise MemoryError
        advance()

    monkeypatch.setattr(cut, "_advance", die_at_seven)
    with pytest.raises(MemoryError):
        cut.fit()
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    resumed = trainer(store, tmp_path / "cut")
    resumed.fit()
    assert_same_bits(whole, resumed)
    assert [line["step"] for line in lines(tmp_path / "cut")] == [3, 4, 6, 8, 9, 12, 12]


def test_a_finished_run_is_not_trained_again(store, tmp_path, monkeypatch):
    first = trainer(store, tmp_path)
    first.fit()
    again = trainer(store, tmp_path)
    monkeypatch.setattr(again, "_advance", None)
    again.fit()
    assert_same_bits(first, again)


def test_training_leaves_the_global_random_state_alone(store, tmp_path):
    torch.manual_seed(123)
    expected = torch.rand(4)
    torch.manual_seed(123)
    trainer(store, tmp_path, init=unet()).fit()
    assert torch.equal(torch.rand(4), expected)


# A run that goes on otherwise.


@pytest.mark.parametrize("cut", [None, 7], ids=["finished", "interrupted"])
@pytest.mark.parametrize("change", [{}, {"log_every": 5, "check_every": 6}, {"ema_gamma": 6.94}])
def test_a_run_that_is_made_longer_is_the_one_that_was_as_long_from_its_start(
    store, tmp_path, monkeypatch, change, cut
):
    """To the bit, from its last checkpoint; and every log is of the steps since the one before."""
    longer = replace(SHORT, epochs=3, **change)
    first = replace(longer, epochs=SHORT.epochs, log_every=3, check_every=4)
    whole = trainer(store, tmp_path / "whole", longer)
    whole.fit()
    with monkeypatch.context() as patch:
        if cut:
            stop_at(patch, cut)
        with pytest.raises(Interrupted) if cut else contextlib.nullcontext():
            trainer(store, tmp_path / "cut", first).fit()
    resumed, steps = trainer(store, tmp_path / "cut", longer), []
    advance = resumed._advance
    monkeypatch.setattr(resumed, "_advance", lambda: (steps.append(resumed.state.step), advance()))
    resumed.fit()
    assert steps == [*range(cut or 12, 24)]
    assert_same_bits(whole, resumed)
    assert read_sealed(tmp_path / "cut" / "run.json") == whole.run.fields
    losses = [
        [(m["step"], m["loss"]) for m in lines(tmp_path / out) if "loss" in m and m["step"] > 15]
        for out in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


def test_a_log_at_another_interval_is_the_mean_since_the_last_one(store, tmp_path):
    """The short run ends, and logs, at step 12; the next log, of every fifth, has three steps."""
    trainer(store, tmp_path, replace(SHORT, lr=1e-12)).fit()
    run = trainer(store, tmp_path, replace(SHORT, lr=1e-12, epochs=2, log_every=5))
    run.fit()
    losses = {m["step"]: m["loss"] for m in lines(tmp_path) if "loss" in m}
    assert losses[15] == pytest.approx(losses[12], rel=0.2)


def test_a_cosine_follows_the_new_length_and_says_so(store, tmp_path, caplog):
    config = replace(SHORT, lr_schedule="cosine")
    trainer(store, tmp_path, config).fit()
    run = trainer(store, tmp_path, replace(config, epochs=3))
    with caplog.at_level("INFO", logger="ds"):
        run.fit()
    assert "(train.epochs: 3, not 1.5); the learning rate falls along the new length" in caplog.text
    rates = {m["step"]: m["lr"] for m in lines(tmp_path) if "lr" in m}
    assert rates[18] == pytest.approx(SHORT.lr * (1 + math.cos(math.pi * 18 / 24)) / 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epochs": 1}, r"at step 12 already, train\.epochs 1 ends it at step 8; give more epochs"),
        ({"snapshot_every": 4}, r"train\.snapshot_every was 0 when this run began"),
    ],
)
def test_what_a_run_cannot_go_on_with_is_refused_and_changes_nothing(
    store, tmp_path, change, named
):
    trainer(store, tmp_path).fit()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(ValueError, match=named):
        trainer(store, tmp_path, replace(SHORT, **change)).fit()
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}


def test_a_run_that_ended_before_its_first_checkpoint_stands_in_no_way(store, tmp_path):
    with pytest.raises(RuntimeError, match="the loss is nan at step 9"):
        trainer(store, tmp_path, replace(SHORT, check_every=10), method=Exploding()).fit()
    run = trainer(store, tmp_path)
    run.fit()
    assert read_sealed(tmp_path / "run.json") == run.run.fields
    assert [line["step"] for line in lines(tmp_path)] == [3, 4, 6, 8, 9, 12, 12]


@pytest.mark.parametrize("runtime", [{"prefetch": 10**12}, {"wandb": "x"}])
def test_a_runtime_that_cannot_be_had_is_refused_before_anything_is_made(store, tmp_path, runtime):
    with pytest.raises(ValueError, match=next(iter(runtime))):
        trainer(store, tmp_path / "new", runtime=RuntimeConfig(**runtime)).fit()
    assert not [*tmp_path.iterdir()]


def test_a_run_made_shorter_to_where_it_was_interrupted_is_checked_there(
    store, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Interrupted):
            trainer(store, tmp_path).fit()
    trainer(store, tmp_path, replace(SHORT, epochs=7 / 8)).fit()
    assert [m["step"] for m in lines(tmp_path) if "best" in m] == [4, 7]


def test_snapshots_can_be_given_up(store, tmp_path):
    trainer(store, tmp_path, replace(SHORT, snapshot_every=4)).fit()
    run = trainer(store, tmp_path, replace(SHORT, epochs=2))
    run.fit()
    assert run.state.step == 16


def test_the_identity_of_a_run_is_what_makes_it_another_one(store, tmp_path):
    def identity(**change):
        return trainer(store, tmp_path, replace(SHORT, **change)).identity

    same = {"epochs": 3, "log_every": 7, "check_every": 9, "snapshot_every": 2}
    assert {identity(**{name: value}) for name, value in same.items()} == {identity()}
    other = {
        "batch_size": 64,
        "lr": 2e-2,
        "warmup_steps": 1,
        "lr_schedule": "cosine",
        "betas": (0.9, 0.9),
        "eps": 1e-7,
        "optimizer": "adamw",
        "weight_decay": 0.1,
        "grad_clip_norm": 1.0,
        "ema_decay": 0.6,
        "ema_gamma": 1.0,
        "shuffle_window": 64,
        "precision": "bfloat16",
        "seed": 1,
    }
    assert len({identity(), *(identity(**{n: v}) for n, v in other.items())}) == 1 + len(other)
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert fields == {*same, *other, "recompute_norms"}


# What is refused, and what is kept.


class Exploding(DenoisingStudent):
    """Not finite from step 6 on."""

    def loss(self, modules, batch, progress):
        loss = super().loss(modules, batch, progress)
        return loss * (math.nan if progress.step >= 6 and loss.requires_grad else 1)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(store, tmp_path):
    with pytest.raises(RuntimeError, match="the loss is nan at step 9; the last checkpoint is"):
        trainer(store, tmp_path, replace(SHORT, check_every=5), method=Exploding()).fit()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 5
    assert all(w.isfinite().all() for w in saved["modules"].values())


def test_weights_that_are_not_finite_are_not_saved(store, tmp_path):
    """A check can come between the step that went wrong and the line that would tell."""
    with pytest.raises((RuntimeError, ValueError), match="not finite"):
        config = replace(SHORT, check_every=4, log_every=1000)
        trainer(store, tmp_path, config, method=Exploding()).fit()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": replace(SHORT, lr=2e-2)}, r"train\.lr: 0\.01, not 0\.02"),
        ({"method": DenoisingStudent(loss_type="l1")}, r"method\.loss_type: l2, not l1"),
        ({"init": started(Affine(0.5))}, r"start\.sha256: "),
        ({"rows": 320}, "source: "),
    ],
    ids=["configuration", "method", "initial weights", "rows"],
)
def test_a_directory_with_another_run_refuses_and_names_the_difference(
    store, tmp_path, change, named
):
    trainer(store, tmp_path).fit()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=rf"holds another run \({named}"):
        trainer(store, tmp_path, **change).fit()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 not a checkpoint",
        pickle.dumps(Bomb(), protocol=2),
        pickle.dumps({"step": 3}, protocol=2),
    ],
    ids=["empty", "garbage", "code", "another pickle"],
)
def test_a_damaged_checkpoint_is_named_and_runs_no_code(store, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    trainer(store, tmp_path).fit()
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: damaged"):
        trainer(store, tmp_path).fit()
    assert not Path("exploded").exists()


@pytest.mark.parametrize("change", ["truncate", "other network", "no dictionary"])
def test_a_checkpoint_of_something_else_is_named(store, tmp_path, change):
    trainer(store, tmp_path).fit()
    file = tmp_path / "checkpoint.pt"
    if change == "truncate":
        file.write_bytes(file.read_bytes()[:-100])
    elif change == "other network":
        saved = torch.load(file, weights_only=True)
        torch.save({**saved, "modules": {"student.gain": torch.zeros(2)}}, file)
    else:
        torch.save([1, 2], file)
    said = "damaged" if change == "truncate" else "not of this run"
    with pytest.raises(ValueError, match=rf"checkpoint\.pt: {said}"):
        trainer(store, tmp_path).fit()


@pytest.mark.parametrize(
    ("name", "value"),
    [("prefetch", -1), ("accumulate", 0), ("evaluate_every", -1), ("stall_minutes", math.nan)],
)
def test_a_runtime_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"runtime\.{name} must be at least"):
        RuntimeConfig(**{name: value})


def test_cuda_graphs_and_accumulation_are_refused_together():
    with pytest.raises(ValueError, match=r"runtime\.accumulate must be 1 with compile cuda_graphs"):
        RuntimeConfig(compile="cuda_graphs", accumulate=2)


def test_a_run_that_stalls_ends_and_shows_where(store, tmp_path):
    """In a process of its own, which ends with 1, and with the stack on standard error."""
    code = (
        "import time\nfrom ds.training.trainer import _watchdog\n"
        "def stuck():\n    time.sleep(60)\n"
        "with _watchdog(0.3 / 60) as alive:\n    alive()\n    stuck()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in stuck" in done.stderr


def test_a_run_that_goes_on_is_left_alone(store, tmp_path):
    trainer(store, tmp_path, runtime=RuntimeConfig(stall_minutes=1)).fit()


def test_a_method_for_pairs_refuses_images(store, tmp_path):
    images = Images(digits()[0])
    with pytest.raises(ValueError, match="DenoisingStudent needs pairs, the source has images"):
        Trainer(DenoisingStudent(), affine(), images, images, tmp_path / "run", SHORT)
    assert not (tmp_path / "run").exists()


def test_a_method_for_images_refuses_pairs(store, tmp_path):
    with pytest.raises(ValueError, match="Denoising needs images, the source has pairs"):
        trainer(store, tmp_path, method=Denoising())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("epochs", 0),
        ("lr", -1e-3),
        ("log_every", 0),
        ("check_every", -1),
        ("ema_decay", 1.0),
        ("lr", math.nan),
        ("warmup_steps", -1),
        ("grad_clip_norm", -1.0),
        ("weight_decay", math.inf),
        ("shuffle_window", -1),
        ("ema_gamma", -0.1),
        ("snapshot_every", -1),
    ],
)
def test_a_configuration_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"train.{name} must"):
        replace(SHORT, **{name: value})


def test_two_trainers_do_not_share_a_directory(store, tmp_path):
    tmp_path.mkdir(exist_ok=True)
    with locked(tmp_path), pytest.raises(RuntimeError, match="another process is writing here"):
        trainer(store, tmp_path).fit()


# The Trainer does not know what it trains.


@dataclass(frozen=True)
class Anchored(AbstractMethod):
    """The student chases a slow copy of itself that only after_step moves, and a frozen teacher."""

    feeds: ClassVar = "pairs"
    speed: float = 0.25

    def init(self, teacher):
        student, target, frozen = (copy.deepcopy(teacher.net) for _ in range(3))
        student.requires_grad_(True)
        return nn.ModuleDict(
            {
                "student": student,
                "target": target.requires_grad_(False),
                "teacher": frozen.requires_grad_(False),
            }
        )

    def loss(self, modules, batch, progress):
        z, t = batch.noise, torch.zeros(len(batch.noise))
        away = modules["student"](z, t) - (modules["target"](z, t) + modules["teacher"](z, t)) / 2
        return away.square().mean() + (self.sample(modules["student"], z) - batch.x0).abs().mean()

    def after_step(self, modules, progress):
        with torch.no_grad():
            modules["target"].gain.lerp_(modules["student"].gain, self.speed)

    def times(self, nfe):
        return (0,)

    def sample(self, net, z, *, nfe=1, cond=None, draws=None):
        return z - net(z, torch.zeros(len(z)))


def test_a_method_with_a_moving_target_and_a_frozen_teacher_trains_and_resumes(
    store, tmp_path, monkeypatch
):
    whole = trainer(store, tmp_path / "whole", method=Anchored())
    whole.fit()
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Interrupted):
            trainer(store, tmp_path / "cut", method=Anchored()).fit()
    resumed = trainer(store, tmp_path / "cut", method=Anchored())
    resumed.fit()
    assert_same_bits(whole, resumed)
    student, target, teacher = (whole.state.modules[n] for n in ("student", "target", "teacher"))
    assert teacher.gain == 0
    assert 0 < target.gain < student.gain
    assert target.shift == 0


def test_the_run_file_says_what_is_trained(store, tmp_path):
    run = trainer(store, tmp_path)
    run.fit()
    saved = json.loads((tmp_path / "run.json").read_text())
    assert saved["method"] == to_json(DenoisingStudent())
    assert saved["train"] == to_json(replace(SHORT, precision="float32"))
    assert saved["source"] == Pairs(store, range(HELD_OUT, HELD_OUT + 256)).fingerprint()
