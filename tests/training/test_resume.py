"""A run that is interrupted, made longer or found damaged: it loses nothing."""

import contextlib
import dataclasses
import math
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ds.methods import Denoising, DenoisingStudent, Progress
from ds.methods.networks import SharedDropout
from ds.pairs.sources import Images, digits
from ds.system.files import read_sealed
from ds.system.signals import Interrupted
from ds.system.staging import locked
from ds.training.config import RuntimeConfig, TrainConfig
from ds.training.trainer import Trainer
from tests.training.runs import (
    SHORT,
    Affine,
    Exploding,
    affine,
    assert_same_bits,
    lines,
    started,
    state,
    stop_at,
    timeless,
    trainer,
    unet,
)
from tests.training.runs import store as store

# Resuming.


def test_a_compiled_run_resumes_to_the_same_bits(store, tmp_path, monkeypatch, compiler):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # to be as it was afterwards
    options = RuntimeConfig(compile="yes", compile_cache=str(tmp_path / "cache"))

    def compiled(folder: str) -> Trainer:
        return trainer(store, tmp_path / folder, runtime=options)

    whole = compiled("whole")
    whole.fit()
    assert whole.losses["student"]._compiled_call_impl is not None
    if compiler == "inductor":
        cache = tmp_path / "cache" / "fxgraph"
        assert list(cache.rglob("*")), "the cache is where it was asked for"
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


def test_a_loss_that_shares_dropout_is_no_one_graph_and_says_so(store, tmp_path):
    class Sharing(DenoisingStudent):
        def loss(self, modules, batch, progress):
            with SharedDropout(modules["student"], device=batch.noise.device):
                return super().loss(modules, batch, progress)

    options = {"init": unet(), "method": Sharing(), "runtime": RuntimeConfig(compile="yes")}
    with pytest.raises(ValueError, match=r"compile yes: the loss .* share .* train\.dropout 0"):
        trainer(store, tmp_path / "run", **options).fit()


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


def test_dropout_is_that_of_the_run_where_it_sets_one(store, tmp_path):
    """A copy of a teacher learns with another dropout than its own, and the teacher keeps that."""
    start = unet()
    run = trainer(store, tmp_path / "run", replace(SHORT, dropout=0.4), init=start)
    student, teacher = (
        {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)}
        for net in (run.state.modules["student"], start.net)
    )
    assert (student, teacher) == ({0.4}, {0.2})
    with pytest.raises(ValueError, match=r"train\.dropout must be 0 .* Affine has no dropout"):
        trainer(store, tmp_path / "none", replace(SHORT, dropout=0.4))


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


@pytest.mark.parametrize(
    ("schedule", "share"), [("cosine", (1 + math.cos(math.pi * 18 / 24)) / 2), ("linear", 6 / 24)]
)
def test_a_falling_rate_follows_the_new_length_and_says_so(
    store, tmp_path, caplog, schedule, share
):
    config = replace(SHORT, lr_schedule=schedule)
    trainer(store, tmp_path, config).fit()
    run = trainer(store, tmp_path, replace(config, epochs=3))
    with caplog.at_level("INFO", logger="ds"):
        run.fit()
    assert "(train.epochs: 3, not 1.5); the learning rate falls along the new length" in caplog.text
    rates = {m["step"]: m["lr"] for m in lines(tmp_path) if "lr" in m}
    assert rates[18] == pytest.approx(SHORT.lr * share)


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
        "dropout": 0.0,
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
