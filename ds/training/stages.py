"""Stages: a method trained in several runs, each of which starts from the result of the last."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ds.methods import AbstractMethod
from ds.models.model import Model
from ds.models.teacher import Teacher
from ds.pairs.generate import generate_pairs
from ds.pairs.sources import AbstractSource, Noise, Pairs
from ds.system.config import Count, require, to_json
from ds.training.config import TrainConfig, fixed
from ds.training.trainer import Trainer

_SEED = 0x51E377A900000000  # of the pairs of later stages; no run is likely to use it elsewhere
log = logging.getLogger("ds")


class Stages:
    """Train the stages of a method one after the other, each in a directory that can be resumed.

    The first stage is an ordinary run in `out`. Stage k, from 2 on, is a run in `out`/stage-k with
    a fresh optimiser, and starts from the result of stage k - 1. Its config is the one that is
    given, with what the stage must have in its place (`stage.train`, `stage.length`). What it is
    trained on depends on what it feeds:

        pairs     pairs that this result makes, in the store `out`/stage-k-pairs: `pairs` of them,
                  by default as many as `source` has rows, and as many more as `held_out` has
        noise     fresh noise, as many rows as `source` has
        other     `source` and `held_out`

    Pairs and noise have the conditions of `source`: its classes, each equally often.

    Results have the decoder of `start`, if it draws latents. Call it again after an interruption:
    finished stages are read, the others go on to the same bits. `evaluate` makes figures of a
    model, and `options` go to each Trainer.

    Raises ValueError as Trainer does.
    """

    def __init__(
        self,
        method: AbstractMethod,
        start: Teacher,
        source: AbstractSource,
        held_out: AbstractSource,
        out: str | Path,
        config: TrainConfig,
        *,
        pairs: int | None = None,
        evaluate: Callable[[Model], dict[str, float]] | None = None,
        **options: Any,
    ):
        require("Stages", Count | None, pairs=pairs)
        self.method, self.out, self.config = method, Path(out), config
        self.stages = [*method.stages()]  # each as it is on its teacher, once that is known
        self.sources, self.pairs = (source, held_out), pairs or len(source)
        self.evaluate, self.options, self.decoder = evaluate, options, start.decoder
        for number, stage in enumerate(self.stages[1:], 2):
            if stage.feeds not in ("pairs", "noise", source.feeds):
                raise ValueError(
                    f"stage {number} of {type(method).__name__} needs {stage.feeds}, the source "
                    f"has {source.feeds}"
                )
        self.first = self._trainer(0, start, self.sources)
        self.trainer = self.first  # of the stage that was reached
        self.results: list[Model] = []  # of the stages that are finished

    @property
    def identity(self) -> str:
        """The SHA-256, in hexadecimal, of what makes these runs others than any."""
        if len(self.stages) == 1:
            return self.first.identity
        later = (self.config.of(stage).on(self.first.device) for stage in self.stages[1:])
        settings = [fixed(to_json(config)) for config in later]
        about = [to_json(self.method), self.first.identity, self.pairs, settings]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        """Raise ValueError if `out` holds another run, or one that cannot go on so."""
        self.first.check()

    def fit(self) -> Model:
        """Train every stage to its end; return the result of the last.

        Raises as Trainer.fit does.
        """
        self.trainer = self.first
        result = self._result()
        self.results = [result]
        for number, stage in enumerate(self.stages[1:], 1):
            log.info("stage %d of %d: %s", number + 1, len(self.stages), stage)
            if not isinstance(result, Teacher):
                raise ValueError(
                    f"stage {number + 1} of {type(self.method).__name__} starts from a teacher; "
                    f"the `result` of the stage before it is a {type(result).__name__}"
                )
            self.trainer = self._trainer(number, result, self._sources(number, result))
            result = self._result()
            self.results.append(result)
        return result

    def _result(self) -> Model:
        """Train the stage that was reached to its end; return its result."""
        return self._decoding(self.trainer.method.result(self.trainer.fit()))

    def _decoding(self, result: Model) -> Model:
        """Return a result with the decoder of the teacher whose latents it draws."""
        return replace(cast(Any, result), decoder=self.decoder)

    def _trainer(
        self, number: int, start: Teacher, sources: tuple[AbstractSource, AbstractSource]
    ) -> Trainer:
        """Return the run of a stage."""
        stage = self.stages[number] = self.stages[number].on(start)
        judge, options = self.evaluate, {**self.options}
        if judge:
            options["evaluate"] = lambda net: judge(self._decoding(stage.result(net)))
        out = self.out / f"stage-{number + 1}" if number else self.out
        return Trainer(stage, start, *sources, out, self.config, **options)

    def _sources(self, number: int, last: Teacher) -> tuple[AbstractSource, AbstractSource]:
        """Return the rows to train a later stage on, and those held out."""
        source, held_out = self.sources
        feeds, count, seed = self.stages[number].feeds, len(held_out), self._seed(number)
        if feeds == "noise":
            return (
                Noise(len(source), last.shape, seed=seed, conditions=source.conditions),
                Noise(count, last.shape, seed=seed + 1, conditions=source.conditions),
            )
        if feeds != "pairs":
            return source, held_out
        store = generate_pairs(
            last,
            self.out / f"stage-{number + 1}-pairs",
            count + self.pairs,
            seed=seed,
            conditions=source.conditions,
            progress=self.options.get("progress", False),
        )
        return Pairs(store, range(count, len(store))), Pairs(store, range(count))

    def _seed(self, number: int) -> int:
        return self.config.seed ^ (_SEED + 2 * number)
