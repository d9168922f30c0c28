"""Training shared by processes: the same run for any number of them, and `distill` in two.

The processes are started once; each job is a run of its own in a folder that names it.
"""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ds
from ds.cli.__main__ import main
from ds.methods import Denoising, DenoisingStudent
from ds.pairs.sources import Images, digits
from ds.system import distributed
from ds.system.signals import Interrupted
from ds.training.config import RuntimeConfig
from ds.training.trainer import Trainer
from tests.processes import Two
from tests.training.runs import HELD_OUT, SHORT, TEACHER, lines, steady, trainer, unet
from tests.training.test_turns import Contest

pytestmark = pytest.mark.slow
QUIET = replace(SHORT, lr=1e-3)  # at a rate where a rounding stays one for twelve steps
DISTILL = (
    "distill",
    "digits",
    "--held-out",
    "32",
    "--train.epochs",
    "2",
    "--train.batch-size",
    "32",
    "--train.log-every",
    "1",
)
ONLINE = (
    "--online",
    "--pool",
    "2",
    "--reuse",
    "2",
    "--pairs.count",
    "64",
    "--pairs.batch-size",
    "32",
)
JOBS = {
    "whole": (QUIET, RuntimeConfig()),
    "cut": (QUIET, RuntimeConfig()),
    "images": (QUIET, RuntimeConfig(accumulate=2)),
    "labelled": (QUIET, RuntimeConfig(accumulate=2)),
    "clipped": (
        replace(QUIET, grad_clip_norm=0.05),
        RuntimeConfig(accumulate=2, loader="resident"),
    ),
    "tangent": (QUIET, RuntimeConfig()),
    "turns": (replace(QUIET, epochs=3 * QUIET.epochs), RuntimeConfig()),
}


class Tangent(DenoisingStudent):
    """A loss with a derivative in forward mode, whose gradient is one of second order."""

    def loss(self, modules, batch, progress):
        def call(x):
            return self.sample(modules["student"], x)

        x, tangent = torch.func.jvp(call, (batch.noise,), (batch.x0,))
        return (x - batch.x0).square().mean() + (tangent - batch.x0).square().mean()


METHODS = {"tangent": Tangent(), "turns": Contest()}


def make(
    store: ds.PairStore, out: Path, name: str, runtime: RuntimeConfig | None = None
) -> Trainer:
    """The run of a job; "images" and "labelled" are some whose times are random."""
    config, own = JOBS[name]
    if name not in ("images", "labelled"):
        method = METHODS.get(name)
        return trainer(store, out, config, init=steady(), method=method, runtime=runtime or own)
    found, labels = (part[:256] for part in digits())
    told = name == "labelled"
    images = Images(found, labels if told else None)
    start = steady(classes=10 if told else 0)
    return Trainer(Denoising(), start, images, images, out, config, runtime=runtime or own)


def work(home: Path) -> None:
    """Do the verbs, and then the jobs, in one of two processes."""
    torch.set_num_threads(1)
    folders = ("--teacher", home / "teacher", "--store", home / "pairs", "--out", home / "student")
    with distributed.joined():
        assert main([*map(str, (*DISTILL, *folders))]) == 0
        assert main([*map(str, (*DISTILL, *folders, *ONLINE, "--out", home / "online"))]) == 0
        do_jobs(home)


def do_jobs(home: Path) -> None:
    """Do every job; while step 7 of the run to cut is taken, one process is told to stop."""
    for name in JOBS:
        run = make(ds.PairStore(home / "store"), home / name, name)
        if name == "cut":
            run.method = Telling(run, 7)
            with pytest.raises(Interrupted) as caught:
                run.fit()
            assert (caught.value.number, run.state.step) == (signal.SIGTERM, 7)
        else:
            run.fit()
            assert learnt(run) == 1
    run = make(ds.PairStore(home / "store"), home / "past", "tangent")
    wrapped = run._losses
    run._losses = lambda: {turn: Past(loss) for turn, loss in wrapped().items()}
    run.fit()
    assert learnt(run) == 2, "a call past the wrapper of DistributedDataParallel averages nothing"


def learnt(run: Trainer) -> int:
    """Return how many different networks the processes have."""
    weights = torch.cat([p.flatten() for p in run.state.modules.parameters()])
    return len(distributed.gather(weights[None]).unique(dim=0))


class Past(torch.nn.Module):
    """The wrong way to a derivative over processes: through the module inside the wrapper."""

    def __init__(self, loss: torch.nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, *args):
        return self.loss.module(*args)


class Telling:
    """The method of a run, which sends the second process a signal while a step is taken."""

    def __init__(self, run: Trainer, step: int):
        self.run, self.method, self.step = run, run.method, step

    def __getattr__(self, name: str):
        return getattr(self.method, name)

    def after_step(self, modules, progress):
        if progress.step + 1 == self.step and not distributed.is_first():
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The folder where two processes have done every job."""
    home = tmp_path_factory.mktemp("shared")
    ds.generate_pairs(TEACHER, home / "store", 512 + HELD_OUT, batch_size=1024)
    replace(unet(), grid=(999, 500)).save_pretrained(home / "teacher")
    ds.generate_pairs(ds.load_teacher(home / "teacher"), home / "pairs", 96)
    two = Two(work, home)
    _, said = two.communicate(timeout=240)
    assert two.returncode == 0, said
    return home


@pytest.fixture(scope="module")
def alone(home) -> dict[str, Path]:
    """The folders where one process did the same without interruption."""
    folders = {name: home / f"{name}-alone" for name in JOBS if name != "cut"}
    for name, out in folders.items():
        make(ds.PairStore(home / "store"), out, name, RuntimeConfig()).fit()
    return folders


def curve(out: Path) -> list[float]:
    return [v for m in lines(out) for k, v in m.items() if k.endswith("loss")]


def weights(out: Path) -> torch.Tensor:
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 12
    return torch.cat([w.flatten() for w in saved["modules"].values()])


def moved(home: Path) -> torch.Tensor:
    """How far the weights went, which a rounding is held against."""
    start = torch.cat([w.flatten() for w in unet().net.state_dict().values()])
    return (weights(home / "whole-alone") - start).abs().max()


@pytest.mark.parametrize("name", [name for name in JOBS if name != "cut"])
def test_two_processes_learn_what_one_does(home, alone, name):
    """With accumulation against without, clipping, labels, random times, forward mode and turns."""
    assert curve(home / name) == pytest.approx(curve(alone[name]), rel=1e-5)
    assert [m["step"] for m in lines(home / name)] == [3, 4, 6, 8, 9, 12, 12]
    away = (weights(home / name) - weights(alone[name])).abs().max()
    assert away < 0.02 * moved(home)


def test_clipping_changed_the_run(home, alone):
    """Else the comparison above would say nothing of it."""
    assert curve(home / "clipped") != pytest.approx(curve(home / "whole"), rel=1e-3)


def test_a_run_of_two_processes_goes_on_in_one(home, alone):
    out = home / "cut"
    assert lines(out)[-1]["step"] == 6
    run = make(ds.PairStore(home / "store"), out, "cut", RuntimeConfig(loader="resident"))
    run.fit()
    assert curve(out) == pytest.approx(curve(alone["whole"]), rel=1e-5)
    assert (weights(out) - weights(alone["whole"])).abs().max() < 0.02 * moved(home)


def test_parts_that_cannot_be_equal_are_refused(home, tmp_path):
    with pytest.raises(ValueError, match=r"batch_size \(32\) must be a multiple of 3: 1 processes"):
        make(ds.PairStore(home / "store"), tmp_path, "whole", RuntimeConfig(accumulate=3))


def test_gradients_in_bfloat16_are_refused_on_a_cpu(home, tmp_path):
    with pytest.raises(ValueError, match="reduce bfloat16 is for GPUs, not for cpu"):
        make(ds.PairStore(home / "store"), tmp_path, "whole", RuntimeConfig(reduce="bfloat16"))


def test_the_verb_distill_runs_in_two_processes(home):
    assert ds.load_student(home / "student").nfe == 1
    assert [m["step"] for m in lines(home / "student-run")] == [1, 2, 3, 4, 4]


def test_pairs_that_two_processes_make_while_training_are_those_of_the_store(home):
    """Two batches of them, one made by each, for as long as the store is trained on."""
    made, stored = (ds.load_student(home / name).net.state_dict() for name in ("online", "student"))
    assert all(torch.equal(w, stored[name]) for name, w in made.items())
