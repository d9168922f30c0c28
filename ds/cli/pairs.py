"""dstudent pairs: the pairs of a teacher, and what can be done with a store of them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from ds.cli.verb import (
    Here,
    Price,
    Store,
    Verb,
    home_of,
    per_preset,
    say,
    solve_idle,
    watched,
)
from ds.diffusion.noise import noise
from ds.evaluation.solver_search import fidelity, fidelity_table, frontier, plan_table
from ds.models.execution import Execution
from ds.models.load import load_teacher
from ds.models.sampler import Sampler, least_memory
from ds.models.teacher import Teacher
from ds.pairs import archives
from ds.pairs.generate import estimate, generate_pairs, prepare
from ds.pairs.storage import place
from ds.pairs.store import PairStore, check_target, info, to_make
from ds.system.config import Count
from ds.system.cost import check_memory
from ds.system.distributed import is_first
from ds.training.presets import Machine, PairsConfig, Preset, SolveConfig


@dataclass(frozen=True, kw_only=True)
class MakePairs(Verb):
    """Run the teacher on noise and keep what it makes: the pairs a student learns from.

    Interrupt it when you like, and run it again to go on. Several processes may share one store,
    and come and go. With a larger --store.count a store grows. `dstudent pairs info STORE` says
    what is there, `pairs verify STORE` checks it, `pairs export STORE OUT` writes archives.
    """

    teacher: Path
    out: str  # a directory, or a URL such as s3://bucket/folder
    pairs: PairsConfig
    solve: SolveConfig
    plan: bool = False  # make no pairs; measure how many network calls they need
    plan_noises: Count = 16  # to measure it on
    price: Price = 0.0
    machine: Here = field(default_factory=Machine)

    @classmethod
    def of(cls, name: str, p: Preset) -> "MakePairs":
        home = home_of(name)
        return cls(
            teacher=home / "teacher", out=str(home / "pairs"), pairs=p.pairs, solve=p.solve,
            machine=p.machine,
        )  # fmt: skip

    @classmethod
    def choices(cls) -> dict[str, Any]:
        stores = {"info": PairsInfo, "verify": PairsVerify, "export": PairsExport}
        return per_preset(cls) | {
            name: Annotated[verb, tyro.conf.subcommand(name)] for name, verb in stores.items()
        }

    def idle(self) -> dict[str, str]:
        return solve_idle(self.solve) | ({} if self.plan else {"plan-noises": "without --plan"})

    def prepare(self) -> Callable[[], None]:
        if self.plan:
            teacher = self.solver()
            needed = self.plan_noises * least_memory(teacher)
            check_memory(f"a plan on {self.plan_noises} noises", needed, self.machine.use())
            return partial(self._plan, teacher)
        return self.making(self.pairs.count + self.pairs.held_out)

    def making(self, count: int) -> Callable[[], None]:
        """Find what can be wrong with the first so many of the pairs; return what makes them."""
        check_target(self.out, apart=[self.teacher])
        p, teacher = self.pairs, self.solver()
        options = {
            "seed": p.seed, "batch_size": p.batch_size, "shard_size": p.shard_size,
            "quantizer": p.quantizer, "execution": self.execution(teacher),
        }  # fmt: skip
        prepare(teacher, place(self.out), count, **options)
        return partial(self._make, teacher, count, options)

    def _make(self, teacher: Teacher, count: int, options: dict[str, Any]) -> None:
        store = generate_pairs(
            teacher, self.out, count, price=self.price, progress=watched(), **options
        )
        if is_first():
            say(f"pairs: {self.out}, {len(store):,} of them")

    def solver(self) -> Teacher:
        """Return the teacher with the solver that is asked for, on the device."""
        teacher = load_teacher(self.teacher, device=self.machine.use())
        solver, grid = self.solve.build(teacher.denoiser.schedule)
        return replace(teacher, solver=solver, grid=grid)

    def execution(self, teacher: Teacher) -> Execution:
        """Return how the teacher is run."""
        return Execution.default(teacher, precision=self.pairs.precision, mode=self.pairs.mode)

    def budget(self) -> str:
        """Say what the pairs that are missing will cost."""
        if self.plan:
            return ""
        count = self.pairs.count + self.pairs.held_out
        return f"pairs: {self.estimate(to_make(self.out, count))[0]}"

    def estimate(self, count: int) -> tuple[str, float]:
        """Say what so many pairs will cost, and how many seconds they take."""
        p, teacher = self.pairs, self.solver()
        sampler = Sampler(teacher, batch_size=p.batch_size, execution=self.execution(teacher))
        return estimate(sampler, count, p.quantizer, self.price)

    def _plan(self, teacher: Teacher) -> None:
        p = self.pairs
        options = {"batch_size": p.batch_size, "execution": self.execution(teacher)}
        seconds = Sampler(teacher, **options).seconds_each() / teacher.nfe
        z = noise(p.seed, range(self.plan_noises), teacher.shape, device=self.machine.use())
        found = frontier(teacher.denoiser, z, self.solve, progress=watched())
        say(plan_table(found, seconds, p.count + p.held_out))
        say(fidelity_table(fidelity(teacher, p.seed, self.plan_noises), found))


@dataclass(frozen=True, kw_only=True)
class PairsInfo(Verb):
    """Say what a store holds and how much of it is written."""

    store: Store

    def prepare(self) -> Callable[[], None]:
        return partial(say, json.dumps(info(self.store), indent=2))


@dataclass(frozen=True, kw_only=True)
class PairsVerify(Verb):
    """Hash every shard of a store; with its teacher, also make some of the pairs again."""

    store: Store
    teacher: Path | None = None
    recompute: Count = 4  # pairs to make again, spread over the store
    machine: Here = field(default_factory=Machine)

    def idle(self) -> dict[str, str]:
        alone = dict.fromkeys(("recompute", "device", "threads"), "without --teacher")
        return alone if self.teacher is None else {}

    def prepare(self) -> Callable[[], None]:
        store, teacher = PairStore(self.store), None
        if self.teacher is not None:
            teacher = load_teacher(self.teacher, device=self.machine.use())
            teacher = replace(teacher, solver=store.solver, grid=store.grid)
        return partial(self._verify, store, teacher)

    def _verify(self, store: PairStore, teacher: Teacher | None) -> None:
        store.verify(teacher, self.recompute)
        say(f"pairs: {self.store}, {len(store):,} of them as they were written")


@dataclass(frozen=True, kw_only=True)
class PairsExport(Verb):
    """Write a store, noise and all, as archives for the loaders of other codes."""

    store: Store
    out: Annotated[Path, tyro.conf.Positional]
    to: archives.Form = "webdataset"
    per_archive: Count = 4096
    force: bool = False  # replace archives of something else

    def prepare(self) -> Callable[[], None]:
        store = PairStore(self.store)
        archives.check(store, self.out, self.to, self.per_archive, force=self.force)
        return partial(self._export, store)

    def _export(self, store: PairStore) -> None:
        paths = archives.export(
            store, self.out, self.to, per_archive=self.per_archive, force=self.force,
            progress=watched(),
        )  # fmt: skip
        say(f"archives: {self.out}, {len(paths)} of them")
