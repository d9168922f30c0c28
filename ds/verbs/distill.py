"""dstudent distill: the whole recipe, pairs included."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

import ds
from ds import budget, doctor, pairs, ranks
from ds.checkpoint import fingerprint
from ds.config import from_json
from ds.data import AbstractSource, Generated, Pairs
from ds.evaluation import evaluate, figures
from ds.load import load_teacher
from ds.methods import DenoisingStudent
from ds.pairs import PairStore
from ds.philox import noise
from ds.presets import Machine, PairsConfig, Preset, SolveConfig
from ds.ranks import is_first, joined
from ds.sample import Student, Teacher
from ds.train import Runtime, TrainConfig, Trainer, autocast
from ds.verbs.evaluate import Judge
from ds.verbs.options import Here, Price, at_least, home_of, run_folder, say, watched
from ds.verbs.pairs import MakePairs

log = logging.getLogger("ds")


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Train a student that makes in one network call what the teacher makes in many.

    This is the whole recipe: where the store is not finished, its pairs are made first, as
    `dstudent pairs` makes them. What all of it takes is said before it starts.
    """

    teacher: Path
    store: str  # a directory, or a URL such as s3://bucket/folder
    out: Path
    pairs: PairsConfig
    solve: SolveConfig
    method: DenoisingStudent
    train: TrainConfig
    online: bool = False  # keep the held-out pairs only; make the others while training
    reuse: int = 4  # epochs that an online pair serves
    pool: int = 64  # batches of online pairs that are made, and kept, at a time
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

    def run(self) -> None:
        with joined():
            self._run()

    def _run(self) -> None:
        at_least(0, price=self.price)
        at_least(1, held_out=self.pairs.held_out, reuse=self.reuse, pool=self.pool)
        teacher = load_teacher(self.teacher)
        if is_first():
            log.info(self.budget())
        if not pairs.is_finished(self.store):
            self._maker().make(self._kept())
        store = PairStore(self.store)
        if fingerprint(teacher.denoiser) != store.manifest["teacher"]["sha256"]:
            raise ValueError(
                f"{self.store}: was made by another teacher than {self.teacher}; give that one"
            )
        source, train = self._source(store)
        device = self.machine.use()
        trainer = Trainer(
            self.method, teacher.denoiser, source, Pairs(store, range(self.pairs.held_out)),
            run_folder(self.out), train, device=device, runtime=self.runtime,
            evaluate=self._evaluate(device) if self.runtime.evaluate_every else None,
            progress=watched(),
        )  # fmt: skip
        student = Student(trainer.fit(), self.method)
        if not is_first():
            return
        student.save_pretrained(
            self.out,
            teacher_sha256=store.manifest["teacher"]["sha256"],
            pairs_sha256=store.sha256,
            pairs=self._pairs_seen(store, trainer.steps),
            teacher_nfe=from_json(store.manifest["solver"]).nfe(store.manifest["grid"]),
            steps=trainer.steps,
            held_out_loss=trainer.best_loss,
            version=ds.__version__,
            commit=doctor.commit(),
            run=trainer.identity,
        )
        say(f"student: {self.out}, held-out loss {trainer.best_loss:.4g}")

    def _maker(self) -> MakePairs:
        return MakePairs(
            teacher=self.teacher, out=self.store, pairs=self.pairs, solve=self.solve,
            price=self.price, machine=self.machine,
        )  # fmt: skip

    def _kept(self) -> int:
        """Return how many pairs the store must have."""
        return self.pairs.held_out + (0 if self.online else self.pairs.count)

    def _source(self, store: PairStore) -> tuple[AbstractSource, TrainConfig]:
        """Return what to train on and for how long: for as many steps either way."""
        p, t = self.pairs, self.train
        if not self.online:
            return Pairs(store, range(p.held_out, len(store))), t
        solver, grid = from_json(store.manifest["solver"]), tuple(store.manifest["grid"])
        rows = self.pool * t.batch_size
        source = Generated(
            replace(self._maker().solver(), solver=solver, grid=grid), rows, seed=store.seed,
            first=p.held_out, reuse=self.reuse, batch_size=p.batch_size, precision=p.precision,
            engine=p.engine,
        )  # fmt: skip
        return source, replace(t, epochs=t.epochs * (p.count // t.batch_size) / self.pool)

    def _pairs_seen(self, store: PairStore, steps: int) -> int:
        if not self.online:
            return len(store) - self.pairs.held_out
        return -(-steps // (self.pool * self.reuse)) * self.pool * self.train.batch_size

    def budget(self) -> str:
        """Say what the run will cost, from short measurements on this device."""
        t, p = self.train, self.pairs
        finished = pairs.is_finished(self.store)
        stored = finished and not self.online
        count = pairs.info(self.store)["pairs"] - p.held_out if stored else p.count
        steps = max(1, round(t.epochs * (count // t.batch_size)))
        kept = 0 if finished else pairs.to_make(self.store, self._kept())
        passing = -(-steps // self.reuse) * t.batch_size if self.online else 0
        lines, making = [], 0.0
        if kept + passing:
            line, making = self._maker().estimate(kept + passing)
            lines.append(f"pairs: {line}" + (f"; {kept:,} are kept" if self.online else ""))
        teacher = load_teacher(self.teacher, device=self.machine.use())
        learning = steps * t.batch_size * _training_seconds_each(teacher, self.method, t)
        lines.append(f"train: {steps:,} steps of {t.batch_size}, about {budget.duration(learning)}")
        total = (making + learning) / ranks.world()
        saved = 5 * sum(w.nbytes for w in teacher.net.parameters())
        return "\n".join([
            *lines,
            f"disk:  {budget.size(saved)} for the checkpoint, beside the pairs",
            f"total: about {budget.cost(total, self.price)}, on {ranks.world()} of this device",
        ])  # fmt: skip

    def _evaluate(self, device: torch.device) -> Callable[[nn.Module], dict[str, float]]:
        """Return what makes figures of a network; it knows how the student samples with it."""
        reference, extractor = self.judge.build(device)

        def judge(net: nn.Module) -> dict[str, float]:
            student = Student(net, self.method)
            return figures(evaluate(student, reference, extractor, n=self.judge.count))

        return judge


def _training_seconds_each(teacher: Teacher, method: DenoisingStudent, train: TrainConfig) -> float:
    """Measure how long training takes for an image: forward and backward, without the optimiser."""
    device = next(teacher.net.parameters()).device
    modules = method.init(teacher.denoiser)
    most = max(1, train.batch_size // ranks.world())
    z = noise(0, range(most), teacher.shape, device=device)
    batch = {"x0": z, "noise": z, "index": torch.arange(most, device=device)}

    def work(n: int) -> None:
        with autocast(device, train.on(device).precision):
            loss = method.loss(modules, {name: rows[:n] for name, rows in batch.items()}, 0)
        loss.backward()
        loss.item()  # waits for the device

    return budget.seconds_each(work, most)
