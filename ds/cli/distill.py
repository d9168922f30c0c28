"""dstudent distill: train a student by any method, after making the pairs that it lacks."""

import copy
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import torch
import tyro
from torch import Tensor

import ds
from ds.cli.evaluate import EvalConfig
from ds.cli.pairs import Maker
from ds.cli.teach import forget_pictures, training_images
from ds.cli.verb import (
    Here,
    Price,
    Source,
    Verb,
    asked,
    check_outputs,
    given,
    home_beside,
    home_of,
    initials,
    labels_in,
    method_named,
    methods,
    per_preset,
    preset_of,
    run_folder,
    say,
    solve_idle,
    train_idle,
    watched,
)
from ds.diffusion.conditions import Conditions
from ds.diffusion.noise import Draws
from ds.evaluation import environment
from ds.evaluation.evaluate import evaluate, figures, way
from ds.methods import AbstractMethod
from ds.models import pretrained
from ds.models.load import load_teacher
from ds.models.model import Model
from ds.models.pretrained import fingerprint
from ds.models.teacher import Teacher
from ds.pairs.quantizer import fitting, row_of
from ds.pairs.sources import AbstractSource, Batch, Generated, Images, Noise, Pairs
from ds.pairs.store import PairStore, info, is_finished, to_make
from ds.system import cost, distributed
from ds.system.config import Count, tag
from ds.system.distributed import is_first
from ds.training.batches import check_rows
from ds.training.config import RuntimeConfig, TrainConfig
from ds.training.presets import Machine, PairsConfig, Preset, SolveConfig
from ds.training.presets.recipes import settings
from ds.training.stages import Stages
from ds.training.throughput import price_of_rows

log = logging.getLogger("ds")
Judge = Callable[[Model], dict[str, float]]


class _Unmade(Images):
    """Stand in for pairs that are not made yet, so that a run can be checked without them."""

    feeds: ClassVar = "pairs"

    def __init__(self, teacher: Teacher, count: int, conditions: Conditions):
        shape, dtype = row_of(teacher.shape, fitting(teacher))
        super().__init__(torch.zeros(1, *shape, dtype=dtype, device="cpu").expand(count, *shape))
        self._conditions = conditions

    @property
    def conditions(self) -> Conditions:
        return self._conditions

    def prepare(self, images: Tensor, indices: Tensor, draws: Draws) -> Batch:
        batch = super().prepare(images, indices, draws)
        return batch._replace(cond=self.conditions.draw(0, indices))

    def fingerprint(self) -> str:
        return "not made yet"


def _default(name: str) -> AbstractMethod:
    """Return a method with its defaults. Raise ValueError if it has a field without one."""
    kind = method_named(name)
    try:
        return kind()
    except TypeError as error:
        raise ValueError(f"--method {name}: {error}; give every field a default") from None


@dataclass(frozen=True, kw_only=True)
class Distill(Verb):
    """Train a student that makes in a few network calls what the teacher makes in many.

    Missing pairs are made first, as `dstudent pairs` makes them. Before it starts, the command
    prints what the whole run will take. With a teacher of your own, give --teacher DIR and no
    preset.
    """

    shared: ClassVar = True
    instead: ClassVar = "give --teacher DIR for a teacher of your own"

    teacher: Source
    store: str  # of the pairs: a directory, or a URL such as s3://bucket/folder
    out: Path  # a directory for the student; its run goes beside it, into OUT-run
    # pictures to train on, if the method needs them: a folder, .npy, .npz or .tar, or "digits"
    images: str
    size: Count | None = None  # pixels a side: cut the middle square of each picture and scale it
    pairs: PairsConfig
    solve: SolveConfig
    named: Annotated[
        str,
        tyro.conf.arg(
            name="method",
            help="a name that `dstudent distill --help` lists, or a FILE.py with your own method",
        ),
    ]
    method: AbstractMethod
    train: TrainConfig
    check_store: bool = True  # hash every shard when it is first read
    online: bool = False  # store only the held-out pairs; make the others while training
    reuse: Count = 4  # epochs for which an online pair is used
    pool: Count = 64  # batches of online pairs that are made, and held in memory, at a time
    force: bool = False  # replace a student that another run made
    price: Price = 0.0
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    judge: EvalConfig = field(default_factory=EvalConfig)  # used by --runtime.evaluate-every
    machine: Here = field(default_factory=Machine)

    @classmethod
    def of(cls, name: str, p: Preset) -> "Distill":
        return cls._at(home_of(name) / "teacher", home_of(name), name, p)

    @classmethod
    def own(cls, args: list[str]) -> "Distill | None":
        teacher, name = given(args, "teacher", "method").values()
        if not teacher:
            return None
        p = preset_of(teacher)
        if name:
            p = settings("", p, _default(name))
        return cls._at(teacher, home_beside(teacher), "", p)

    @classmethod
    def _at(cls, teacher: str | Path, home: Path, images: str, p: Preset) -> "Distill":
        return cls(
            teacher=teacher,
            store=str(home / "pairs"),
            out=home / "student",
            images=images,
            pairs=p.pairs,
            solve=p.solve,
            named=tag(type(p.method)),
            method=p.method,
            train=p.train,
            machine=p.machine,
        )

    @classmethod
    def choices(cls, args: list[str]) -> dict[str, Any]:
        forget_pictures()
        if (name := given(args, "method")["method"]) is None:
            return per_preset(cls)
        method = _default(name)
        return per_preset(cls, lambda preset, p: settings(preset, p, method))

    @classmethod
    def about(cls) -> str:
        lines = (
            f"- {name}{f' ({short})' if (short := initials(name)) else ''}: "
            f"{(sys.modules[kind.__module__].__doc__ or '').partition(chr(10))[0]}"
            for name, kind in methods().items()
        )
        return "\n".join([super().about(), "", "Methods, for --method:", "", *lines])

    def idle(self) -> dict[str, str]:
        r, idle = self.runtime, solve_idle(self.solve) | train_idle(self.train)
        idle |= self._set_by_the_method()
        if not self.online:
            idle |= dict.fromkeys(("reuse", "pool"), "without --online")
        judge = self.judge.idle()
        if not r.evaluate_every:
            names = (f.name.replace("_", "-") for f in fields(self.judge))
            judge = dict.fromkeys(names, "without --runtime.evaluate-every")
        idle |= {f"judge.{name}": reason for name, reason in judge.items()}
        if r.loader == "resident":
            idle["runtime.prefetch"] = "with --runtime.loader resident, which reads nothing ahead"
        if self._feeds != "images":
            reason = f"with --method {self.named}, which is trained on {self._feeds}"
            idle |= dict.fromkeys(("images", "size"), reason)
        if r.compile == "no":
            idle["runtime.compile-cache"] = "with --runtime.compile no"
        return idle | (self._made_otherwise() if self._feeds == "pairs" else self._without_pairs())

    def _set_by_the_method(self) -> dict[str, str]:
        """Return the options of training that every stage of the method sets itself."""
        first, *rest = (stage.train for stage in self.method.stages())
        return {
            f"train.{name.replace('_', '-')}": f"with --method {self.named}, which sets it"
            for name in first
            if all(name in other for other in rest)
        }

    def _without_pairs(self) -> dict[str, str]:
        """Return the options of a teacher's pairs, for a method that is not trained on them."""
        of_stages = any(stage.feeds != "images" for stage in self.method.stages())
        used = {"count", "held_out", "seed"} if of_stages else set()
        used |= {"classes", "guidance"} if self._feeds == "noise" else {"guidance"}
        pairs = {f.name for f in fields(self.pairs)} - used
        names = [f"pairs.{name}" for name in pairs] + [
            f"solve.{f.name}" for f in fields(self.solve)
        ]
        names += [*({"held_out", "classes"} - used), "precision", "store", "check_store", "online"]
        reason = f"with --method {self.named}, which is trained on {self._feeds}"
        return {name.replace("_", "-"): reason for name in names}

    def _made_otherwise(self) -> dict[str, str]:
        """Return the options that differ from the pairs of a finished store."""
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
        if self.online:  # the pairs that are not stored are made with the other options
            wanted = {n: v for n, v in wanted.items() if n in ("pairs.seed", "pairs.quantizer")}
        found = {
            name: there for name, (asked, there) in wanted.items() if asked not in (None, there)
        }
        where = f"on {self.store}, which is finished and has"
        idle = {name: f"{where} {value}" for name, value in found.items()}
        if self.conditions.classes != store.conditions.classes:
            reason = f"{where} the classes {', '.join(map(str, store.conditions.classes))}"
            idle |= dict.fromkeys(("pairs.classes", "classes"), reason)
        solver, grid = self.solve.build(self.start.denoiser.schedule, self.start.solver)
        if solver != store.solver:
            idle |= dict.fromkeys(("solve.solver", "solve.clip"), f"{where} {store.solver}")
        if grid != store.grid:
            times = f"{len(store.grid)} times from {store.grid[0]} to {store.grid[-1]}"
            names = ("grid", "steps", "top", "spacing")
            idle |= {f"solve.{name}": f"{where} {times}" for name in names}
        return idle | ({"precision": idle["pairs.precision"]} if "pairs.precision" in idle else {})

    @cached_property
    def _asked(self) -> tuple[Teacher, Conditions]:
        teacher, p = load_teacher(self.teacher), self.pairs
        if p.guidance is not None or self._feeds != "pairs" or not is_finished(self.store):
            return asked(teacher, p.classes, p.guidance)
        store = PairStore(self.store)  # which knows how its pairs were guided
        teacher = replace(teacher, denoiser=store.made_by(teacher).denoiser)
        scale = store.conditions.guidance
        named = () if p.classes is None else tuple(labels_in("classes", p.classes, teacher))
        return teacher, teacher.conditions(Conditions(named, scale))

    @property
    def start(self) -> Teacher:
        """The teacher on the CPU as its file has it, but for the guidance that is asked for."""
        return self._asked[0]

    @property
    def conditions(self) -> Conditions:
        """The classes and guidance scales that the teacher is asked for."""
        return self._asked[1]

    @cached_property
    def maker(self) -> Maker:
        """What makes the pairs: the teacher on its device, with the solver that is asked for."""
        device, teacher = self.machine.use(), self.start
        if device.type != "cpu":
            teacher = teacher.using(copy.deepcopy(teacher.net).to(device))
        return Maker(self.solve.on(teacher), self.store, self.pairs, self.price, self.conditions)

    @property
    def _pictures(self) -> tuple[Images, Images]:
        """The pictures to train on and to score with, with the classes of the teacher."""
        names = tuple(self.start.provenance.get("classes", ()))
        return training_images(
            "distill", self.images, self.size, classes=self.start.classes, names=names
        )

    @property
    def _feeds(self) -> str:
        return self.method.stages()[0].feeds

    @property
    def _lacks_pairs(self) -> bool:
        return self._feeds == "pairs" and not is_finished(self.store)

    def prepare(self) -> Callable[[], None]:
        if is_first():
            read = [self.teacher, self.store, *self.judge.files()]
            check_outputs(self.out, force=self.force, apart=read)
        judge = self._judge() if self.runtime.evaluate_every else None
        if self._lacks_pairs:
            check_rows(self.pairs.count, self.train.batch_size)
            make = self.maker.prepare(self._stored)
            self._run(judge, None)  # checks the run before its pairs are made
            return partial(self._work, lambda: make() or self._run(judge, self._opened()))
        run = self._run(judge, self._opened() if self._feeds == "pairs" else None)
        run.check()
        if is_first():
            pretrained.target(self.out, force=self.force, run=run.identity)
        return partial(self._work, lambda: run)

    def _work(self, made: Callable[[], Stages]) -> None:
        if is_first():
            log.info(self.budget())
        run = made()
        if is_first():
            pretrained.target(self.out, force=self.force, run=run.identity)
        model = run.fit()
        if not is_first():
            return
        model.save_pretrained(
            self.out,
            force=self.force,
            teacher_sha256=fingerprint(self.start.denoiser),
            **self._about_pairs(run),
            **self._named(),
            steps=run.trainer.steps,
            held_out_loss=run.trainer.best_loss,
            version=ds.__version__,
            commit=environment.commit(),
            run=run.identity,
        )
        loss = run.trainer.best_loss
        say(
            f"{model.kind}: {self.out}"
            + (f", held-out loss {loss:.4g}" if loss is not None else "")
        )

    def _named(self) -> dict[str, Any]:
        """Return the names of the classes, and the guidance scales, if there are any."""
        names = {"classes": self.start.provenance.get("classes")}
        known = names | {"guidance": self.conditions.guidance}
        return {name: value for name, value in known.items() if value}

    def _about_pairs(self, run: Stages) -> dict[str, Any]:
        """Return what a student's provenance says of the pairs."""
        if self._feeds != "pairs":
            return {}
        store, seen = self._opened(), self.pool * self.reuse
        pairs = len(store) - self.pairs.held_out
        if self.online:
            pairs = -(-run.first.steps // seen) * self.pool * self.train.batch_size
        nfe = store.made_by(self.start).nfe
        return {"pairs_sha256": store.sha256, "pairs": pairs, "teacher_nfe": nfe}

    def _run(self, judge: Judge | None, store: PairStore | None) -> Stages:
        """Return the run. Without the store of its pairs it can be checked, but not trained."""
        source, held_out, train = self._data(store)
        return Stages(
            self.method,
            self.start,
            source,
            held_out,
            run_folder(self.out),
            train,
            pairs=self.pairs.count,
            evaluate=judge,
            device=self.machine.use(),
            runtime=self.runtime,
            progress=watched(),
        )

    def _data(self, store: PairStore | None) -> tuple[AbstractSource, AbstractSource, TrainConfig]:
        """Return the rows to train on, the rows held out, and the settings for as many steps."""
        p, train, shape = self.pairs, self.train, self.start.shape
        if self._feeds == "images":
            return *self._pictures, train
        if self._feeds == "noise":
            both = ((p.count, p.seed), (p.held_out, p.seed + 1))
            rows, held_out = (
                Noise(n, shape, seed=seed, conditions=self.conditions) for n, seed in both
            )
            return rows, held_out, train
        if self._feeds != "pairs":
            raise ValueError(
                f"distill: --method {self.named} needs {self._feeds}, which no verb makes"
            )
        if store and fingerprint(self.start.denoiser) != store.teacher_sha256:
            raise ValueError(
                f"{self.store}: was made by another teacher than {self.teacher}; give that one"
                + (", with the --guidance it had" if self.start.classes else "")
            )
        held_out = Pairs(store, range(p.held_out)) if store else self._unmade(p.held_out)
        if self.online:
            epochs = train.epochs * (p.count // train.batch_size) / self.pool
            return self._generated(store), held_out, replace(train, epochs=epochs)
        rest = range(p.held_out, len(store)) if store else range(p.count)
        return Pairs(store, rest) if store else self._unmade(p.count), held_out, train

    def _unmade(self, count: int) -> _Unmade:
        return _Unmade(self.start, count, self.conditions)

    def _opened(self) -> PairStore:
        return PairStore(self.store, check=self.check_store)

    @property
    def _stored(self) -> int:
        """The number of pairs that the store must have."""
        return self.pairs.held_out + (0 if self.online else self.pairs.count)

    def _generated(self, store: PairStore | None) -> Generated:
        p, teacher, seed = self.pairs, self.maker.teacher, self.pairs.seed
        conditions = self.conditions
        if store:
            teacher, seed, conditions = store.made_by(teacher), store.seed, store.conditions
        return Generated(
            teacher,
            self.pool * self.train.batch_size,
            seed=seed,
            first=p.held_out,
            reuse=self.reuse,
            batch_size=p.batch_size,
            execution=self.maker.execution,
            conditions=conditions,
        )

    def budget(self) -> str:
        """Return what the run will cost, from short measurements on this device."""
        t, stages, lines, making = self.train, self.method.stages(), [], 0.0
        each = self._rows // t.batch_size
        taken = [max(1, round(t.of(s).epochs * each / len(s.turns))) for s in stages]
        steps, every = taken[0], sum(taken)
        if self._feeds == "pairs":
            stored = to_make(self.store, self._stored) if self._lacks_pairs else 0
            passing = -(-steps // self.reuse) * t.batch_size if self.online else 0
            if stored + passing:
                line, making = self.maker.estimate(stored + passing)
                lines.append(f"pairs: {line}" + (f"; {stored:,} are kept" if self.online else ""))
        rows = self._unmade(1) if self._feeds == "pairs" else self._data(None)[1]
        each_row, weights = price_of_rows(stages[0], self.start, rows, t, self.machine.use())
        learning = every * t.batch_size * each_row
        many = f"{len(stages)} stages, " if len(stages) > 1 else ""
        about = f"{many}{every:,} steps of {t.batch_size}, about {cost.duration(learning)}"
        devices = distributed.world_size()
        total = (making + learning) / devices
        lines += [
            f"train: {about}",
            f"disk:  {cost.size(5 * weights)} for the checkpoint, beside the pairs",
            f"total: about {cost.cost(total, self.price)}, on {devices} of this device",
        ]
        return "\n".join(lines)

    @property
    def _rows(self) -> int:
        """The number of rows in an epoch."""
        if self._feeds == "images":
            return len(self._pictures[0])
        if self._feeds == "pairs" and not self._lacks_pairs and not self.online:
            return info(self.store)["pairs"] - self.pairs.held_out
        return self.pairs.count

    def _judge(self) -> Judge:
        """Return a function that evaluates a model during training."""
        reference, extractor = self.judge.build(self.start, self.machine.use())
        n, scale = self.judge.count, self.judge.guidance
        if scale is None and isinstance(g := self.conditions.guidance, tuple):
            scale = f"{g[0]:g}-{g[1]:g}"  # the student is told one

        def judge(model: Model) -> dict[str, float]:
            found, conditions = asked(cast(Any, model), self.judge.classes, scale)
            result = evaluate(found, reference, extractor, n=n, conditions=conditions)
            if is_first():
                log.info("evaluate: %s", way(result))
            return figures(result)

        return judge
