"""Small runs of every method on points, and what kills them.

A process that is to be killed carries the runs of all methods. Each goes as far as the moment of
its death, and the next one begins there; the last one kills the process. So a kill at one moment
costs one process, however many methods there are.
"""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

import ds
from ds.analytic import GaussianMixture
from ds.methods import AbstractMethod, Progress, defined_in, files
from ds.methods.base import built
from ds.models.teacher import Teacher
from ds.nets import MLPConfig
from ds.pairs.sources import Images, Noise
from ds.system import distributed
from ds.training.config import RuntimeConfig, TrainConfig
from ds.training.trainer import Trainer

DATA, SAVE = GaussianMixture(), torch.save
# Three steps, each with a checkpoint, at a rate where a rounding stays one.
SHORT = TrainConfig(
    batch_size=32, epochs=3, lr=1e-3, warmup_steps=0, ema_decay=0.5, log_every=3, check_every=1
)


def found() -> list[type[AbstractMethod]]:
    """The methods that the files of ds/methods define."""
    return [cls for module in files() for cls in defined_in(module)]


def named(cls: type[AbstractMethod]) -> dict[str, AbstractMethod]:
    """The stages of a method that differ in more than their numbers: the first, and the last."""
    stages = cls().stages()
    return {f"{cls.__name__}-{i % len(stages)}": stages[i] for i in (0, -1)}


RUNS = dict(chain.from_iterable(named(cls).items() for cls in found()))
# A Potential needs its weights once more than shards are gathered, so the Trainer refuses.
SHARDED = [name for name in RUNS if not name.startswith("CRectifiedFlow")]


def start() -> Teacher:
    net = built(MLPConfig(width=16, depth=2)).requires_grad_(False)
    denoiser = ds.Denoiser(net, ds.schedule.LinearBeta())
    return Teacher(denoiser, ds.solvers.DDIM(), ds.grids.quadratic(4))


def source(method: AbstractMethod, count: int) -> Images | Noise:
    """Rows of the kind that a method feeds on; data stand in for what a teacher makes."""
    if method.feeds == "noise":
        return Noise(count, DATA.shape)
    rows = Images(DATA.sample(0, range(count)))
    rows.feeds = method.feeds
    return rows


def make(out: Path, name: str, config: TrainConfig = SHORT, **runtime) -> Trainer:
    teacher = start()
    method = RUNS[name].on(teacher)
    # As many as a step has turns, so that every method takes three steps.
    rows = source(method, 32 * len(method.turns)), source(method, 32)
    runtime = RuntimeConfig(**runtime)
    run = Trainer(method, teacher, *rows, out / name, config, runtime=runtime)
    run._flops = lambda: 0.0  # to count them takes as long as the three steps
    return run


# The moments of death. Each lets a run call `then` when it gets there.


def with_gradients(run: Trainer, then: Callable[[], None]) -> None:
    """In the second step, after the backward of the last turn and before its optimiser's step."""
    update = run.state.update

    def hooked(turn: str, *args: float) -> None:
        if run.state.step == 1 and turn == run.method.turns[-1]:
            run.checkpoint.close()
            then()
        update(turn, *args)

    run.state.update = hooked


def while_saving(run: Trainer, then: Callable[[], None]) -> None:
    """With half of the second checkpoint written."""
    begin, halfway = run.checkpoint.save, threading.Event()

    def save_half(state, path) -> None:
        SAVE(state, path)
        if state["step"] == 2:
            os.truncate(path, path.stat().st_size // 2)
            halfway.set()
            threading.Event().wait()

    def hooked(state) -> None:
        torch.save = save_half
        begin(state)
        if state["step"] == 2:
            assert not distributed.is_first() or halfway.wait(60)
            then()

    run.checkpoint.save = hooked


def before_the_end_of_a_step(run: Trainer, then: Callable[[], None]) -> None:
    """In the third step, between the turns of a method that has several."""
    method = run.method

    class Hooked:
        def __getattr__(self, name: str):
            return getattr(method, name)

        def after_step(self, modules, progress: Progress) -> None:
            method.after_step(modules, progress)
            if progress.step == 2:
                run.checkpoint.close()
                then()

    run.method = Hooked()


# With the step of the checkpoint that each leaves.
MOMENTS = {with_gradients: 1, while_saving: 1, before_the_end_of_a_step: 2}


def die(out: Path, moment: Callable[[Trainer, Callable[[], None]], None]) -> None:
    """Take every run to a moment, all within each other, and kill the process there."""
    torch.set_num_threads(1)
    left = iter(RUNS)

    def go_on() -> None:
        if (name := next(left, None)) is None:
            try:
                distributed.gather(torch.zeros(1))  # the others are there too
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        run = make(out, name)
        moment(run, go_on)
        run.fit()

    with distributed.joined():
        go_on()


def finish(home: Path) -> None:
    """Take every run to its end: those that were killed, others undisturbed, and sharded ones."""
    torch.set_num_threads(1)
    with distributed.joined():
        for name in RUNS:
            make(home / "killed", name).fit()
            make(home / "whole", name).fit()
            if distributed.world_size() > 1 and name in SHARDED:
                make(home / "sharded", name, replace(SHORT, check_every=3), shard=True).fit()
