"""dstudent pairs: make the pairs of a teacher; describe, check and export a store of them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro
from torch import Tensor

from ds.cli.verb import (
    MODEL,
    Here,
    Price,
    Source,
    Store,
    Verb,
    asked,
    given,
    home_beside,
    home_of,
    log,
    per_preset,
    preset_of,
    say,
    solve_idle,
    watched,
)
from ds.diffusion.conditions import Conditions
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.noise import noise
from ds.diffusion.predictions import as_prediction
from ds.diffusion.solvers import DDIM, Clipped
from ds.evaluation.merging import Chain, merges_table
from ds.evaluation.references import Moments, read_reference
from ds.evaluation.solver_search import (
    corrected,
    endpoints,
    fidelity,
    fidelity_table,
    frontier,
    plan_table,
)
from ds.evaluation.spectrum import spectrum
from ds.models.execution import Execution
from ds.models.images import to_float
from ds.models.load import load_teacher
from ds.models.sampler import Sampler, least_memory
from ds.models.teacher import Teacher
from ds.pairs import archives
from ds.pairs.generate import estimate, generate_pairs, prepare
from ds.pairs.storage import place
from ds.pairs.store import PairStore, check_target, info, to_make
from ds.system.config import Count, Positive
from ds.system.cost import check_memory
from ds.system.distributed import is_first
from ds.training.presets import Machine, PairsConfig, Preset, SolveConfig


@dataclass(frozen=True)
class Maker:
    """A teacher, with its solver and on its device, and the store that its pairs go to."""

    teacher: Teacher
    out: str
    config: PairsConfig
    price: float
    conditions: Conditions

    @property
    def execution(self) -> Execution:
        """How the teacher is run."""
        c = self.config
        return Execution.default(self.teacher, precision=c.precision, mode=c.mode)

    def prepare(self, count: int) -> Callable[[], None]:
        """Check all that can be checked before making `count` pairs. Return what makes them."""
        c = self.config
        options = {
            "seed": c.seed,
            "batch_size": c.batch_size,
            "shard_size": c.shard_size,
            "quantizer": c.quantizer,
            "execution": self.execution,
            "conditions": self.conditions,
        }
        prepare(self.teacher, place(self.out), count, **options)
        return partial(self._make, count, options)

    def _make(self, count: int, options: dict[str, Any]) -> None:
        store = generate_pairs(
            self.teacher, self.out, count, price=self.price, progress=watched(), **options
        )
        if is_first():
            say(f"pairs: {self.out}, {len(store):,} of them")

    def estimate(self, count: int) -> tuple[str, float]:
        """Return the cost of `count` pairs, as a line and in seconds on this device."""
        size, execution = self.config.batch_size, self.execution
        sampler = Sampler(
            self.teacher, batch_size=size, execution=execution, conditions=self.conditions
        )
        return estimate(sampler, count, self.config.quantizer, self.price)


@dataclass(frozen=True, kw_only=True)
class MakePairs(Verb):
    """Run the teacher on noise and store its images: the pairs that a student learns from.

    You can interrupt it and run it again to continue. Several processes can fill one store, and
    may join and leave at any time. A store grows with a larger --pairs.count. For a teacher of your
    own, give --teacher DIR and no preset.
    """

    instead: ClassVar = "give --teacher DIR for a teacher of your own"

    teacher: Source
    out: str  # of the store: a directory, or a URL such as s3://bucket/folder
    pairs: PairsConfig
    solve: SolveConfig
    plan: bool = False  # make no pairs; measure how many network calls they need
    # make no pairs; say in which order a staged distillation should merge the solver's steps
    merges: bool = False
    # how long each merge is trained, for --merges: exp(-2 tau E x^2) of an error is left
    merge_tau: Positive = 1.0
    # whose spectrum --merges takes: digits, or a folder or file of pictures; None: the teacher's
    merge_pictures: str | None = None
    plan_noises: Count = 16  # number of noise tensors for --plan and --merges
    price: Price = 0.0
    machine: Here = field(default_factory=Machine)

    @classmethod
    def of(cls, name: str, p: Preset) -> "MakePairs":
        return cls._at(home_of(name) / "teacher", home_of(name), p)

    @classmethod
    def own(cls, args: list[str]) -> "MakePairs | None":
        teacher = given(args, "teacher")["teacher"]
        return cls._at(teacher, home_beside(teacher), preset_of(teacher)) if teacher else None

    @classmethod
    def _at(cls, teacher: str | Path, home: Path, p: Preset) -> "MakePairs":
        return cls(
            teacher=teacher,
            out=str(home / "pairs"),
            pairs=p.pairs,
            solve=p.solve,
            machine=p.machine,
        )

    @classmethod
    def choices(cls, args: list[str]) -> dict[str, Any]:
        stores = {"info": PairsInfo, "verify": PairsVerify, "export": PairsExport}
        return per_preset(cls) | {
            name: Annotated[verb, tyro.conf.subcommand(name)] for name, verb in stores.items()
        }

    def idle(self) -> dict[str, str]:
        idle = solve_idle(self.solve)
        if not self.merges:
            idle |= dict.fromkeys(["merge-tau", "merge-pictures"], "without --merges")
        if not self.plan and not self.merges:
            idle["plan-noises"] = "without --plan or --merges"
        elif self.merge_pictures is not None:
            idle["plan-noises"] = "with --merge-pictures, which need no samples"
        return idle | ({"merges": "with --plan"} if self.plan else {})

    @cached_property
    def maker(self) -> Maker:
        """The teacher on its device, with the solver that is asked for."""
        p, loaded = self.pairs, load_teacher(self.teacher, device=self.machine.use())
        teacher, conditions = asked(loaded, p.classes, p.guidance)
        return Maker(self.solve.on(teacher), self.out, p, self.price, conditions)

    @property
    def count(self) -> int:
        """The number of pairs, those held out included."""
        return self.pairs.count + self.pairs.held_out

    def prepare(self) -> Callable[[], None]:
        if self.plan or self.merges:
            needed = self.plan_noises * least_memory(self.maker.teacher)
            check_memory(f"a plan on {self.plan_noises} noises", needed, self.machine.use())
            return self._plan if self.plan else self._merges
        check_target(self.out, apart=[self.teacher])
        return self.maker.prepare(self.count)

    def budget(self) -> str:
        if self.plan or self.merges:
            return ""
        return f"pairs: {self.maker.estimate(to_make(self.out, self.count))[0]}"

    def _noises(self) -> tuple[Denoiser, Tensor]:
        """Return the teacher's denoiser, asked as for pairs, and the noise of a plan."""
        teacher, seed, indices = self.maker.teacher, self.pairs.seed, range(self.plan_noises)
        z = noise(seed, indices, teacher.shape).to(self.machine.use())
        cond = self.maker.conditions.draw(seed, indices)
        return teacher.denoiser.given(**{k: v.to(z.device) for k, v in cond.items()}), z

    def _examples(self, teacher: Teacher) -> Tensor:
        """Return what a plan of merges takes the spectrum of: pictures, or the teacher's samples.

        Raises ValueError for pictures of another shape.
        """
        if self.merge_pictures is None:
            return endpoints(*self._noises(), teacher.grid[0])
        found = read_reference(self.merge_pictures)
        if isinstance(found, Moments):
            raise ValueError(f"{self.merge_pictures}: moments have no spectrum; give pictures")
        if (samples := to_float(found.images)).shape[1:] != teacher.shape:
            raise ValueError(
                f"{self.merge_pictures}: pictures {list(samples.shape[1:])}, the teacher draws "
                f"{list(teacher.shape)}"
            )
        return samples

    def _merges(self) -> None:
        teacher, tau = self.maker.teacher, self.merge_tau
        if teacher.solver != DDIM():
            log.warning(
                "merges: the steps are taken for those of plain ddim, not of %s", teacher.solver
            )
        samples, denoiser = self._examples(teacher), teacher.denoiser
        variances, prediction = spectrum(samples), as_prediction(denoiser.prediction)
        chain = Chain.of(denoiser.schedule, teacher.grid, variances, tau, prediction)
        say(merges_table(chain, teacher.grid, tau, len(variances)))

    def _plan(self) -> None:
        p, teacher, execution = self.pairs, self.maker.teacher, self.maker.execution
        conditions = self.maker.conditions
        sampler = Sampler(
            teacher, batch_size=p.batch_size, execution=execution, conditions=conditions
        )
        seconds = sampler.seconds_each() / teacher.nfe
        denoiser, z = self._noises()
        if isinstance(teacher.solver, Clipped):
            log.warning("plan: solvers are compared without clipping, which has no ODE to be near")
        found = frontier(denoiser, z, self.solve, progress=watched())
        found = corrected(found, denoiser, z)
        say(plan_table(found, seconds, self.count))
        say(fidelity_table(fidelity(teacher, p.seed, self.plan_noises, conditions), found))


@dataclass(frozen=True, kw_only=True)
class PairsInfo(Verb):
    """Describe a store, and how much of it is written."""

    store: Store

    def prepare(self) -> Callable[[], None]:
        return partial(say, json.dumps(info(self.store), indent=2))


@dataclass(frozen=True, kw_only=True)
class PairsVerify(Verb):
    """Hash every shard of a store. With its teacher, also make some of the pairs again."""

    store: Store
    teacher: Annotated[str | Path | None, MODEL] = None
    recompute: Count = 4  # number of pairs to make again, spread over the store
    machine: Here = field(default_factory=Machine)

    def idle(self) -> dict[str, str]:
        if self.teacher is not None:
            return {}
        return dict.fromkeys(["recompute", "device", "threads"], "without --teacher")

    def prepare(self) -> Callable[[], None]:
        store, teacher = PairStore(self.store), None
        if self.teacher is not None:
            teacher = store.made_by(load_teacher(self.teacher, device=self.machine.use()))
        return partial(self._verify, store, teacher)

    def _verify(self, store: PairStore, teacher: Teacher | None) -> None:
        store.verify(teacher, self.recompute)
        say(f"pairs: {self.store}, {len(store):,} of them as they were written")


@dataclass(frozen=True, kw_only=True)
class PairsExport(Verb):
    """Write a store, with its noise, as tar archives for the loaders of other codes."""

    store: Store
    out: Annotated[Path, tyro.conf.Positional]
    to: archives.Form = "webdataset"
    per_archive: Count = 4096
    force: bool = False  # replace archives of another export

    def prepare(self) -> Callable[[], None]:
        store = PairStore(self.store)
        archives.check(store, self.out, self.to, self.per_archive, force=self.force)
        return partial(self._export, store)

    def _export(self, store: PairStore) -> None:
        paths = archives.export(
            store,
            self.out,
            self.to,
            per_archive=self.per_archive,
            force=self.force,
            progress=watched(),
        )
        say(f"archives: {self.out}, {len(paths)} of them")
