"""dstudent distill: the whole recipe, pairs included."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import ds
from ds.cli import environment
from ds.cli.evaluate import Judge
from ds.cli.pairs import MakePairs
from ds.cli.verb import (
    Here,
    Price,
    Verb,
    check_outputs,
    home_of,
    per_preset,
    run_folder,
    say,
    solve_idle,
    train_idle,
    watched,
)
from ds.diffusion.noise import Draws, noise
from ds.evaluation.evaluate import evaluate, figures
from ds.methods import DenoisingStudent, Progress
from ds.models import pretrained
from ds.models.load import load_teacher
from ds.models.pretrained import fingerprint
from ds.models.student import Student
from ds.models.teacher import Teacher
from ds.pairs.sources import Batch, Generated, Images, Pairs
from ds.pairs.store import PairStore, info, is_finished, to_make
from ds.system import cost, distributed
from ds.system.config import Count
from ds.system.distributed import is_first
from ds.training.batches import check_rows
from ds.training.config import Runtime, TrainConfig
from ds.training.presets import Machine, PairsConfig, Preset, SolveConfig
from ds.training.trainer import Trainer

log = logging.getLogger("ds")


class _Unmade(Images):
    """Pairs that are not made yet, for what is looked at before they are."""

    feeds: ClassVar = "pairs"

    def __init__(self, shape: tuple[int, ...], count: int):
        c, *rest = shape
        dtype = torch.uint8 if len(shape) == 3 else torch.float32
        row = torch.zeros(1, *rest, c, dtype=dtype, device="cpu")
        super().__init__(row.expand(count, *rest, c))

    def fingerprint(self) -> str:
        return "not made yet"


@dataclass(frozen=True, kw_only=True)
class Distill(Verb):
    """Train a student that makes in one network call what the teacher makes in many.

    This is the whole recipe: where the store is not finished, its pairs are made first, as
    `dstudent pairs` makes them. What all of it takes is said before it starts.
    """

    shared: ClassVar = True

    teacher: Path
    store: str  # a directory, or a URL such as s3://bucket/folder
    out: Path
    pairs: PairsConfig
    solve: SolveConfig
    method: DenoisingStudent
    train: TrainConfig
    check_store: bool = True  # hash every shard when it is first read
    online: bool = False  # keep the held-out pairs only; make the others while training
    reuse: Count = 4  # epochs that an online pair serves
    pool: Count = 64  # batches of online pairs that are made, and kept, at a time
    force: bool = False  # replace a student of another run
    price: Price = 0.0
    runtime: Runtime = field(default_factory=Runtime)
    judge: Judge = field(default_factory=Judge)  # of --runtime.evaluate-every
    machine: Here = field(default_factory=Machine)

    @classmethod
    def of(cls, name: str, p: Preset) -> "Distill":
        home = home_of(name)
        return cls(
            teacher=home / "teacher", store=str(home / "pairs"), out=home / "student",
            pairs=p.pairs, solve=p.solve, method=p.method, train=p.train, machine=p.machine,
        )  # fmt: skip

    @classmethod
    def choices(cls) -> dict[str, Any]:
        return per_preset(cls)

    def idle(self) -> dict[str, str]:
        r, idle = self.runtime, solve_idle(self.solve) | train_idle(self.train)
        if not self.online:
            idle |= dict.fromkeys(("reuse", "pool"), "without --online")
        judge = self.judge.idle()
        if not r.evaluate_every:
            names = (name.replace("_", "-") for name in vars(self.judge))
            judge = dict.fromkeys(names, "without --runtime.evaluate-every")
        idle |= {f"judge.{name}": reason for name, reason in judge.items()}
        if r.loader == "resident":
            idle["runtime.prefetch"] = "with --runtime.loader resident, which reads nothing ahead"
        if r.compile == "no":
            idle["runtime.compile-cache"] = "with --runtime.compile no"
        return idle | self._made_otherwise()

    def _made_otherwise(self) -> dict[str, str]:
        """Return the options that say of a finished store what it is not."""
        if not is_finished(self.store):
            return {}
        p, store = self.pairs, PairStore(self.store)
        there = store.manifest
        wanted = {
            "pairs.count": (p.count, there.count - p.held_out),
            "pairs.seed": (p.seed, there.seed),
            "pairs.shard-size": (p.shard_size, there.shard_size),
            "pairs.quantizer": (p.quantizer, there.quantizer),
            "pairs.precision": (p.precision, there.execution.precision),
            "pairs.mode": (p.mode, there.execution.mode),
        }
        if self.online:  # those that are not kept are made with these
            wanted = {n: v for n, v in wanted.items() if n in ("pairs.seed", "pairs.quantizer")}
        found = {
            name: there for name, (asked, there) in wanted.items() if asked not in (None, there)
        }
        where = f"on {self.store}, which is finished and has"
        idle = {name: f"{where} {value}" for name, value in found.items()}
        solver, grid = self.solve.build(load_teacher(self.teacher).denoiser.schedule)
        if solver != store.solver:
            idle["solve.solver"] = f"{where} {store.solver}"
        if grid != store.grid:
            times = f"{len(store.grid)} times from {store.grid[0]} to {store.grid[-1]}"
            idle |= dict.fromkeys(("solve.grid", "solve.steps", "solve.top"), f"{where} {times}")
        return idle | ({"precision": idle["pairs.precision"]} if "pairs.precision" in idle else {})

    def prepare(self) -> Callable[[], None]:
        if is_first():
            check_outputs(
                self.out, force=self.force, apart=[self.teacher, self.store, *self.judge.files()]
            )
        device = self.machine.use()
        teacher = load_teacher(self.teacher)
        teacher.denoiser.schedule.check(self.method.t)
        judge = self._judge(device) if self.runtime.evaluate_every else None
        if is_finished(self.store):
            trainer = self._trainer(teacher, device, judge, self._opened())
            trainer.check()
            if is_first():
                pretrained.target(self.out, force=self.force, run=trainer.identity)
            return partial(self._work, lambda: trainer)
        check_rows(self.pairs.count, self.train.batch_size)
        making = self._maker().making(self._kept())
        self._trainer(teacher, device, judge, None)  # which finds what is wrong with a run

        def made() -> Trainer:
            making()
            return self._trainer(teacher, device, judge, self._opened())

        return partial(self._work, made)

    def _work(self, made: Callable[[], Trainer]) -> None:
        if is_first():
            log.info(self.budget())
        trainer = made()
        if is_first():
            pretrained.target(self.out, force=self.force, run=trainer.identity)
        student = Student(trainer.fit(), self.method)
        if not is_first():
            return
        store = trainer.held_out.store
        student.save_pretrained(
            self.out,
            force=self.force,
            teacher_sha256=store.teacher_sha256,
            pairs_sha256=store.sha256,
            pairs=self._pairs_seen(store, trainer.steps),
            teacher_nfe=store.solver.nfe(store.grid),
            steps=trainer.steps,
            held_out_loss=trainer.best_loss,
            version=ds.__version__,
            commit=environment.commit(),
            run=trainer.identity,
        )
        say(f"student: {self.out}, held-out loss {trainer.best_loss:.4g}")

    def _trainer(
        self, teacher: Teacher, device: torch.device, judge: Callable[[nn.Module], Any] | None,
        store: PairStore | None,
    ) -> Trainer:  # fmt: skip
        """Return the run on the pairs of the finished store; without one it cannot be fit."""
        if store and fingerprint(teacher.denoiser) != store.teacher_sha256:
            raise ValueError(
                f"{self.store}: was made by another teacher than {self.teacher}; give that one"
            )
        p, train = self.pairs, self.train
        held_out = Pairs(store, range(p.held_out)) if store else _Unmade(teacher.shape, p.held_out)
        if self.online:  # for as many steps
            epochs = train.epochs * (p.count // train.batch_size) / self.pool
            source, train = self._generated(store), replace(train, epochs=epochs)
        elif store:
            source = Pairs(store, range(p.held_out, len(store)))
        else:
            source = _Unmade(teacher.shape, p.count)
        return Trainer(
            self.method, teacher, source, held_out, run_folder(self.out), train,
            device=device, runtime=self.runtime, evaluate=judge, progress=watched(),
        )  # fmt: skip

    def _opened(self) -> PairStore:
        return PairStore(self.store, check=self.check_store)

    def _maker(self) -> MakePairs:
        return MakePairs(
            teacher=self.teacher, out=self.store, pairs=self.pairs, solve=self.solve,
            price=self.price, machine=self.machine,
        )  # fmt: skip

    def _kept(self) -> int:
        """Return how many pairs the store must have."""
        return self.pairs.held_out + (0 if self.online else self.pairs.count)

    def _generated(self, store: PairStore | None) -> Generated:
        p, maker, seed = self.pairs, self._maker(), self.pairs.seed
        teacher = maker.solver()
        if store:
            teacher, seed = replace(teacher, solver=store.solver, grid=store.grid), store.seed
        return Generated(
            teacher, self.pool * self.train.batch_size, seed=seed, first=p.held_out,
            reuse=self.reuse, batch_size=p.batch_size, execution=maker.execution(teacher),
        )  # fmt: skip

    def _pairs_seen(self, store: PairStore, steps: int) -> int:
        if not self.online:
            return len(store) - self.pairs.held_out
        return -(-steps // (self.pool * self.reuse)) * self.pool * self.train.batch_size

    def budget(self) -> str:
        """Say what the run will cost, from short measurements on this device."""
        t, p = self.train, self.pairs
        finished = is_finished(self.store)
        stored = finished and not self.online
        count = info(self.store)["pairs"] - p.held_out if stored else p.count
        steps = max(1, round(t.epochs * (count // t.batch_size)))
        kept = 0 if finished else to_make(self.store, self._kept())
        passing = -(-steps // self.reuse) * t.batch_size if self.online else 0
        lines, making = [], 0.0
        if kept + passing:
            line, making = self._maker().estimate(kept + passing)
            lines.append(f"pairs: {line}" + (f"; {kept:,} are kept" if self.online else ""))
        teacher = load_teacher(self.teacher, device=self.machine.use())
        learning = steps * t.batch_size * _training_seconds_each(teacher, self.method, t)
        lines.append(f"train: {steps:,} steps of {t.batch_size}, about {cost.duration(learning)}")
        total = (making + learning) / distributed.world()
        saved = 5 * sum(w.nbytes for w in teacher.net.parameters())
        return "\n".join([
            *lines,
            f"disk:  {cost.size(saved)} for the checkpoint, beside the pairs",
            f"total: about {cost.cost(total, self.price)}, on {distributed.world()} of this device",
        ])  # fmt: skip

    def _judge(self, device: torch.device) -> Callable[[nn.Module], dict[str, float]]:
        """Return what makes figures of a network; it knows how the student samples with it."""
        reference, extractor = self.judge.build(device)

        def judge(net: nn.Module) -> dict[str, float]:
            student = Student(net, self.method)
            return figures(evaluate(student, reference, extractor, n=self.judge.count))

        return judge


def _training_seconds_each(teacher: Teacher, method: DenoisingStudent, train: TrainConfig) -> float:
    """Measure how long training takes for an image: forward and backward, without the optimiser."""
    device = next(teacher.net.parameters()).device
    modules = method.init(teacher)
    most = max(1, train.batch_size // distributed.world())
    z = noise(0, range(most), teacher.shape, device=device)
    index = torch.arange(most, dtype=torch.int64, device=device)

    def work(n: int) -> None:
        with train.on(device).autocast(device):
            batch = Batch(z[:n], z[:n], index[:n], Draws(0, index[:n]))
            loss = method.loss(modules, batch, Progress(0, 1))
        loss.backward()
        loss.item()  # waits for the device

    return cost.seconds_each(work, most)
