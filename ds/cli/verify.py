"""dstudent verify: hold methods against the truth."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from ds.cli.verb import Verb, method_named, methods, say
from ds.evaluation.verify import verify
from ds.methods import AbstractMethod
from ds.system.config import Count, Natural


@dataclass(frozen=True, kw_only=True)
class Verify(Verb):
    """Hold methods against the truth, and print how each check ended.

    Identities hold in float64 with the exact map as the network. A small training on a mixture of
    Gaussians must come near its exact samples, where untrained networks, and some trained with a
    mistake, must not. METHOD is a name that `dstudent distill --help` lists, or a FILE.py with your
    own method; without any, every method is verified. The exit code is 1 if a check fails.
    """

    methods: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="METHOD")] = ()
    json: bool = False  # print JSON
    seed: Natural = 0  # of the data, the first weights and the training
    steps: Count | None = (
        None  # of training, for each stage; None: as many as the bars are made for
    )
    controls: bool = True  # train the controls too, which takes about as long again

    def prepare(self) -> Callable[[], None]:
        chosen = [method_named(name) for name in self.methods] or methods().values()
        made = [cls() for cls in chosen]
        return lambda: self._verify(made)

    def _verify(self, chosen: Sequence[AbstractMethod]) -> None:
        found = []
        for method in chosen:
            found.append(verify(method, seed=self.seed, steps=self.steps, controls=self.controls))
            if not self.json:
                say(f"{found[-1].table()}\n")
        if self.json:
            say(json.dumps([one.record() for one in found], indent=2))
        if not all(one.passed for one in found):
            raise SystemExit(1)
