"""verify: hold a method against the truth, by identities, a small training, and controls."""

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ds.analytic import GaussianMixture
from ds.diffusion import grids
from ds.diffusion.noise import Draws
from ds.diffusion.schedules import EDM
from ds.diffusion.solvers import DDIM, DPMSolverPP
from ds.evaluation.metrics import mode_agreement, sliced_wasserstein
from ds.evaluation.scores import even_noise
from ds.methods import AbstractMethod
from ds.methods.base import built
from ds.methods.proof import Check, Trial
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig, MLPConfig
from ds.pairs.generate import generate_pairs
from ds.pairs.sources import AbstractSource, Images, Noise, Pairs
from ds.system.config import Count, Natural, require, to_json
from ds.training.config import TrainConfig
from ds.training.stages import Stages

DATA = GaussianMixture()
POINTS = 4096  # on which a trained network is judged
ROWS, HELD_OUT = 30_000, 1024  # of data or pairs, where training is not very short
# How a trial trains, unless it says otherwise. The one check is the last step's.
TRAIN = {
    "batch_size": 512,
    "lr": 4e-3,
    "lr_schedule": "cosine",
    "betas": (0.9, 0.999),
    "check_every": 1_000_000,
    "log_every": 500,
}
log = logging.getLogger("ds")


@dataclass(frozen=True)
class Verification:
    """The checks that verify made of one method."""

    method: AbstractMethod
    checks: tuple[Check, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every check passed, and there was one."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def record(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        checks = [
            {**check._asdict(), "controls": {**check.controls}, "passed": check.passed}
            for check in self.checks
        ]
        return {
            "method": to_json(self.method),
            "passed": self.passed,
            "seconds": round(self.seconds, 1),
            "checks": checks,
        }

    def table(self) -> str:
        """Return a line for each check: its figures, and whether it passed.

        The control is the one that comes nearest to passing.
        """
        head = "".join(f"{word:>10}" for word in ("value", "floor", "control", "bar"))
        lines = [f"{type(self.method).__name__:38}{head}  verdict"]
        for c in self.checks:
            shown = (f"{x:.2g}" for x in (c.value, c.floor, c.control))
            figures = "".join(f"{text.replace('nan', '-'):>10}" for text in shown)
            bar = f"{'>' if c.at_least else '<'} {c.bar:.2g}"
            verdict = "pass" if c.passed else "FAIL"
            lines.append(f"  {c.metric:36}{figures}{bar:>10}  {verdict}")
        return "\n".join(lines)


def verify(
    method: AbstractMethod, *, seed: int = 0, steps: int | None = None, controls: bool = True
) -> Verification:
    """Run a method's identities in float64, then train it on a mixture of Gaussians in the plane.

    The identities, `method.identity()`, take milliseconds. The training is that of
    `method.trial()`, by default `Trial()`: each stage, through the Trainer, for `steps` steps if
    given. The networks are held to the bars of their stages, beside an untrained network and,
    unless `controls` is off, beside networks that are trained with a mistake or by another method.
    The trial sets some fields of the method, to fit points in the plane; the others are verified as
    they are.
    """
    require("verify", Count | None, steps=steps)
    require("verify", Natural, seed=seed)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trial = method.trial()
        bed = _Bed(method, trial, seed, steps or trial.steps, Path(folder))
        checks = *method.identity(), *bed.checks(controls)
    return Verification(method, checks, time.perf_counter() - begin)


class _Made(NamedTuple):
    """A method, or a stage of one, and a network that it made."""

    method: AbstractMethod
    net: nn.Module


@dataclass(frozen=True)
class _Bed:
    """The small training of a method, in a folder that is thrown away."""

    method: AbstractMethod
    trial: Trial
    seed: int
    steps: int
    out: Path

    @property
    def _count(self) -> int:
        """How many rows there are to train on."""
        return min(ROWS, max(2048, 16 * self.steps))

    def checks(self, controls: bool) -> Iterator[Check]:
        """Train, and yield what the networks of the stages are held to."""
        if not self.trial.bars and not self.trial.rows:
            return
        *earlier, last = self._trained(self._changed({}))
        wrong, rivals = (
            {name: self._trained(self._changed(c))[-1] for name, c in wanted.items() if controls}
            for wanted in (self.trial.controls, self.trial.rivals)
        )
        if not self.trial.rows:
            yield from self._distances(earlier, last, wrong)
        for number, made in enumerate(earlier, 1):
            yield from self._measures(f"stage {number}: ", made, wrong | rivals)
        yield from self._measures("", last, wrong | rivals)

    def _measures(self, where: str, made: _Made, wrong: Mapping[str, _Made]) -> Iterator[Check]:
        """Yield a stage's own figures, with those of the controls unless they bring their own."""
        right, *others = (self._measured(made, one) for one in (made, *wrong.values()))
        for check, *mistaken in zip(right, *others, strict=True):
            found = zip(wrong, (other.value for other in mistaken), strict=True)
            figures = {k: value for k, value in found if k in (check.against or wrong)}
            if check.controls or check.share is None or wrong:
                full = check if check.controls else check.beside(figures)
                yield full._replace(metric=f"{where}{check.metric}")

    @staticmethod
    @torch.no_grad()
    def _measured(stage: _Made, made: _Made) -> tuple[Check, ...]:
        """Measure a network as a stage does; that of a method of another kind by its method."""
        kind = type(stage.method)
        method = stage.method if isinstance(made.method, kind) else made.method
        return kind.measure(method, made.net, _noise())

    def _distances(
        self, earlier: list[_Made], last: _Made, wrong: dict[str, _Made]
    ) -> Iterator[Check]:
        """Yield what compares samples with the mixture."""
        trial, untrained = self.trial, {"untrained": self._untrained()}
        for number, made in enumerate(earlier, 1):
            for nfe, bar in made.method.trial().bars.items():
                yield self._distance(f"stage {number}: ", made, nfe, bar, untrained)
        fewest = min(trial.bars)
        for nfe, bar in trial.bars.items():
            beside = untrained | (wrong if nfe == fewest else {})
            yield self._distance("", last, nfe, bar, beside)
        for nfe, share in trial.shares.items() if wrong else ():
            yield self._distance("beside controls: ", last, nfe, share, wrong, share=share)
        if trial.agreement:
            yield self._agreement(last, fewest, untrained | wrong)
        for name, (wrap, least) in trial.misused.items():
            made = last._replace(net=wrap(last.net))
            right = {"used well": last}
            yield self._distance(f"{name}: ", made, fewest, least, right, at_least=True)

    def _distance(
        self,
        where: str,
        made: _Made,
        nfe: int,
        bar: float,
        beside: Mapping[str, _Made],
        **kind: Any,
    ) -> Check:
        """Hold the distance between samples and data to a bar; `kind` is more of the Check."""
        value, *others = (self._far(self._sample(one, nfe)) for one in (made, *beside.values()))
        metric = f"{where}distance, {nfe} call{'s' * (nfe > 1)}"
        check = Check(metric, value, bar, floor=self._far(_exact(0, self.trial.data)), **kind)
        return check.beside(dict(zip(beside, others, strict=True)))

    def _far(self, x: Tensor) -> float:
        exact = _exact(1, self.trial.data)
        return sliced_wasserstein(x, exact) if x.isfinite().all() else float("inf")

    def _agreement(self, made: _Made, nfe: int, beside: Mapping[str, _Made]) -> Check:
        """Hold the share of samples in the mode where the exact ODE ends to a bar."""
        ends = _exact(0, self.trial.data)
        value, *others = (
            mode_agreement(self._sample(one, nfe).nan_to_num(), ends, self.trial.data.centres(ends))
            for one in (made, *beside.values())
        )
        controls = dict(zip(beside, others, strict=True))
        metric = "agreement with the exact ODE"
        return Check(metric, value, self.trial.agreement, controls, 1.0, at_least=True)

    @torch.no_grad()
    def _sample(self, made: _Made, nfe: int) -> Tensor:
        draws = Draws(self.seed, torch.arange(POINTS, dtype=torch.int64, device="cpu"))
        return made.method.sample(made.net, _noise(), nfe=nfe, draws=draws)

    def _changed(self, control: Any) -> AbstractMethod:
        """Return what is trained: the method with the trial's changes and a control's.

        A control may also be another method. A method with a field `student` trains the trial's
        network, unless the control names one.
        """
        other = isinstance(control, AbstractMethod)
        method: Any = control if other else self.method  # a dataclass, which the abstract is not
        changes = {} if other else {**self.trial.changes, **control}
        if hasattr(method, "student"):
            own = method.student if other else None
            changes = {"student": own or self._net, **changes}
        return replace(method, **changes)

    @property
    def _net(self) -> AbstractNetConfig:
        return self.trial.net or MLPConfig()

    @property
    def _teacher(self) -> Teacher:
        """The exact teacher."""
        return self.trial.data.teacher(DDIM(), grids.quadratic(100))

    def _start(self, method: AbstractMethod) -> Teacher:
        """Return the teacher that a method starts from.

        A method with a field `student` distils the exact teacher. Any other one starts from a fresh
        network in the exact one's place.
        """
        teacher = self._teacher
        if hasattr(method, "student"):
            return teacher
        fresh = built(self._net, self.seed).requires_grad_(False)
        made = method.result(fresh)  # a teacher that starts from itself, or a student
        return made if isinstance(made, Teacher) else teacher.using(fresh)

    def _untrained(self) -> _Made:
        method = self._changed({})
        teacher = self._start(method)
        first = method.stages()[0].on(teacher)
        return _Made(method, first.init(teacher)["student"].eval())

    def _trained(self, method: AbstractMethod) -> list[_Made]:
        """Train a method; return what each stage made."""
        # Controls that begin with the same stage find it finished.
        name = hashlib.sha256(json.dumps(to_json(method.stages()[0])).encode()).hexdigest()[:16]
        own = {"ema_decay": max(0.0, 1 - 10 / self.steps), "warmup_steps": self.steps // 20}
        train = {**TRAIN, **own, **self.trial.train}
        # A step takes a batch for every turn.
        batches = self.steps * len(method.stages()[0].turns)
        epochs = batches / (self._count // train["batch_size"])
        config = TrainConfig(**train, seed=self.seed, epochs=epochs)
        start, rows = self._start(method), self._rows(method)
        stages = Stages(method, start, *rows, self.out / name, config)
        stages.fit()
        return [
            _Made(stage, result.net)
            for stage, result in zip(stages.stages, stages.results, strict=True)
        ]

    def _rows(self, method: AbstractMethod) -> tuple[AbstractSource, AbstractSource]:
        """Return the rows to train the first stage on, and those held out."""
        feeds, seeds = method.stages()[0].feeds, (2 * self.seed + 2, 2 * self.seed + 3)
        data = self.trial.data
        sizes = dict(zip(seeds, (self._count, HELD_OUT), strict=True))
        if self.trial.rows:
            train, held_out = (self.trial.rows(s, n) for s, n in sizes.items())
            return train, held_out
        if feeds == "images":
            train, held_out = (Images(data.sample(s, range(n)), seed=s) for s, n in sizes.items())
            return train, held_out
        if feeds == "noise":
            train, held_out = (Noise(n, data.shape, seed=s) for s, n in sizes.items())
            return train, held_out
        if feeds != "pairs":
            raise ValueError(f"verify: has no {feeds}, on which {type(method).__name__} feeds")
        store = generate_pairs(
            self._teacher,
            self.out / "pairs",
            sum(sizes.values()),
            seed=seeds[0],
            quantizer="float32",
        )
        return Pairs(store, range(HELD_OUT, len(store))), Pairs(store, range(HELD_OUT))


@cache
def _noise() -> Tensor:
    return even_noise(POINTS, *DATA.shape)


@cache
def _exact(seed: int, data: GaussianMixture = DATA) -> Tensor:
    """Return where the exact ODE ends from evenly spread noise: an exact sample of the data.

    Seed 0 is that of _noise. The ends are within 0.001 of GaussianMixture.flow, in a thirtieth of
    its time.
    """
    path = EDM(1000.0)
    teacher = data.teacher(DPMSolverPP(order=3), grids.karras(128, path), path)
    return teacher.sample(even_noise(POINTS, *DATA.shape, seed))
