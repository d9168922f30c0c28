"""The Trainer: it learns what it should, and each part does its own."""

import copy
import itertools
import json
import math
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ds
from ds.methods import AbstractMethod, Denoising, DenoisingStudent
from ds.models.images import save_png, tile, to_uint8
from ds.pairs.sources import Generated, Images, Pairs, digits
from ds.system.config import to_json
from ds.system.files import read_json
from ds.system.signals import Interrupted
from ds.training.config import RuntimeConfig, TrainConfig
from ds.training.ema import average, power_decay
from ds.training.trainer import COMPILE_STEPS, Trainer
from tests.training.runs import (
    DATA,
    HELD_OUT,
    SHORT,
    TEACHER,
    Affine,
    affine,
    assert_same_bits,
    lines,
    started,
    state,
    stop_at,
    trainer,
    unet,
)
from tests.training.runs import store as store
from tests.training.test_loader import every_kind

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
        ("linear", {0: 0.25, 3: 1.0, 4: 1.0, 6: 0.75, 8: 0.5, 11: 0.125, 12: 0.0}),
        ("inverse_sqrt", {0: 0.25, 3: 1.0, 4: math.sqrt(0.8), 7: math.sqrt(0.5), 15: 0.5}),
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


class Grey(nn.Module):
    """Every image of class k is the grey level k / 9, whatever its noise."""

    shape, classes, takes = (1, 8, 8), 10, ("label",)

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.zeros(()))

    def forward(self, x, t, label):
        level = 2 * label.clamp(min=0).view(-1, 1, 1, 1) / 9 - 1
        return level + self.rate * x


def test_every_check_shows_a_column_of_samples_for_each_class(tmp_path):
    """Of the classes that occur: 0 to 9 but 3."""
    method = Denoising(prediction="x0")
    images, labels = digits()
    rows = (labels != 3).nonzero()[:64, 0]
    source = Images(images, labels, rows=rows)
    start = ds.Teacher(method.denoiser(Grey()), ds.solvers.DDIM(), (999,))
    config = replace(SHORT, epochs=2, check_every=2, lr=1e-9)
    Trainer(method, start, source, source, tmp_path, config).fit()
    for step in (2, 4):
        with Image.open(tmp_path / "samples" / f"step-{step:07d}.png") as picture:
            sheet = np.asarray(picture)[2::4, 2::4]  # a pixel is shown 4 x 4
        assert sheet.shape == (64, 82)  # 7 rows, 9 columns
        columns = sheet[:, 1:].reshape(64, 9, 9)[..., :8]
        inside = columns[:63].reshape(7, 9, 9, 8)[:, 1:]  # but for the gaps
        expected = [round(255 * k / 9) for k in range(10) if k != 3]
        assert (inside == np.array(expected)[:, None]).all()


def test_samples_of_a_check_that_are_not_finite_are_an_error_and_no_black_sheet(store, tmp_path):
    class Loud(DenoisingStudent):
        def sample(self, net, z, **options):
            return super().sample(net, z, **options) * (math.inf if len(z) == 64 else 1)

    with pytest.raises(RuntimeError, match="the samples of step 4 are not finite"):
        trainer(store, tmp_path, method=Loud()).fit()
    assert not [*tmp_path.glob("samples/*")]


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


@pytest.mark.each_value
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "radam", "apex_adamw"])
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
    known = {"adam": torch.optim.Adam, "radam": torch.optim.RAdam}
    cls = known.get(optimizer, torch.optim.AdamW)
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


def test_radam_s_first_steps_are_its_formula(store, tmp_path):
    """With a constant gradient g: lr g while its variance is unknown, then r_t lr sign(g)."""

    class Steep(DenoisingStudent):
        def loss(self, modules, batch, progress):
            return 3 * modules["student"].gain + 0 * modules["student"].shift

    c = replace(SHORT, optimizer="radam")
    run = trainer(store, tmp_path, c, method=Steep())
    run.fit()
    most, expected = 2 / (1 - 0.98) - 1, 0.0
    for t in range(1, 13):
        rho = most - 2 * t * 0.98**t / (1 - 0.98**t)
        r = (rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho)
        expected -= c.lr * (math.sqrt(r) if rho > 5 else 3)
    assert run.state.modules["student"].gain.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "radam"])
def test_an_average_with_the_decay_zero_is_the_network_itself(store, tmp_path, optimizer):
    run = trainer(store, tmp_path, replace(SHORT, ema_decay=0.0, optimizer=optimizer), init=unet())
    run.fit()
    now, ema = (net.state_dict() for net in (run.state.modules["student"], run.averages.ema))
    assert all(torch.equal(w, ema[name]) for name, w in now.items())


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


@every_kind
def test_every_loader_trains_to_the_same_bits(store, tmp_path, kind):
    plain = trainer(store, tmp_path / "plain")
    other = trainer(store, tmp_path / "other", runtime=RuntimeConfig(loader=kind))
    for run in (plain, other):
        run.fit()
    assert_same_bits(plain, other)


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
