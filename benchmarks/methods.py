"""What the methods give for equal spending: digits, points in the plane, several seeds.

    python -m benchmarks methods [--seeds 5] [--only REGEX] [--runs FOLDER]

For each seed every method trains a network and spends a budget of evaluations of networks on that.
An evaluation is one call of any network on one row, and counts two where a derivative along the
flow comes with the value. The calls of targets, critics, predictors and teachers count, those for
pairs too, and the training of the teacher that a method needs; in the plane the teacher is exact.
Backward passes and the check at the end of a run do not count, for any method. All start from fresh
weights and learn in the same way. c-rectified flow is left out: it lowers a cost of transport, not
the number of calls, and both problems have parts that do not touch, where its claim has a gap.

Some methods are given other budgets too, and two what `make demo` spends, with its network.

Writes the figures in 1, 2 and 4 network calls to results/methods.json, after every run. What is
there is kept, and made anew where it is of other settings or of another file of the method. REGEX
is of names: "plane_", "_50k", "^mean_flow$". FOLDER keeps what was trained: a run that was stopped
goes on there, and methods share a teacher that is the same.
"""

import argparse
import ast
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, commit, environment
from benchmarks.methods_entries import CALLS, DEMO, ENTRIES, Entry
from benchmarks.methods_problems import HELD_OUT, InPlane, OnDigits, in_calls, problem
from ds.methods import (
    AbstractMethod,
    ConsistencyDistillation,
    ConsistencyTraining,
    DiscreteMeanFlow,
    EasyConsistencyTuning,
    ImprovedConsistencyTraining,
    MeanFlow,
    MixFlow,
    PosteriorMeanFlow,
    ProgressiveDistillation,
    RegularizedConsistencyModel,
    Shortcut,
    SimplifiedConsistencyModel,
)
from ds.methods.base import built
from ds.models.model import Model
from ds.models.student import Student
from ds.pairs.generate import generate_pairs
from ds.pairs.sources import AbstractSource, Pairs
from ds.system.config import to_json
from ds.system.files import read_json
from ds.system.staging import write_json
from ds.training.stages import Stages

PATH = RESULTS / "methods.json"


@dataclass(frozen=True)
class Spent:
    """What a run spends: evaluations of networks, and how many of them have a backward pass."""

    evaluations: float = 0.0
    backward: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.evaluations + other.evaluations, self.backward + other.backward)

    @property
    def passes(self) -> float:
        """Forward passes, of which a backward pass counts two."""
        return self.evaluations + 2 * self.backward


def main(arguments: Sequence[str]) -> int:
    """Make the runs that are missing, and write each when it is over."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=5, help="of each run (%(default)s)")
    parser.add_argument("--only", metavar="REGEX", default="", help="runs whose name has this")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", default=Path("runs/methods"))
    options = parser.parse_args(arguments)
    DEMO.machine.use()
    rows = kept()
    names = [name for name in ENTRIES if re.search(options.only, name)]
    asked = [(name, seed) for seed in range(options.seeds) for name in names]
    missing = [one for one in asked if one not in rows]
    print(f"{len(missing)} of {len(asked)} runs to make", flush=True)
    for name, seed in missing:
        entry = ENTRIES[name]
        models, spent = trained(entry, options.runs, seed)
        figures = {nfe: problem(entry).figures(model) for nfe, model in models.items()}
        print(name, seed, figures, flush=True)
        about = {"commit": commit(), "made_of": made_of(entry), **asdict(spent)}
        row = {"method": name, "seed": seed, **about, "figures": figures}
        write(kept() | {(name, seed): row})  # others may have written since
    return 0


def kept() -> dict[tuple[str, int], dict[str, Any]]:
    """Return the rows that are written, by method and seed: those of this code and settings."""
    rows = read_json(PATH)["rows"] if PATH.exists() else []
    return {
        (name, row["seed"]): row
        for row in rows
        if (name := row["method"]) in ENTRIES and row["made_of"] == made_of(ENTRIES[name])
    }


def write(rows: Mapping[tuple[str, int], dict[str, Any]]) -> None:
    """Write what is found of runs, and of real data beside other real data."""
    ordered = sorted(rows, key=lambda one: ([*ENTRIES].index(one[0]), one[1]))
    floor = read_json(PATH)["floor"] if PATH.exists() else None
    saved = {
        "environment": environment(DEMO.machine.use()),
        "floor": floor or {"digits": OnDigits().floor(), "plane": InPlane().floor()},
        "rows": [rows[one] for one in ordered],
    }
    write_json(PATH, saved, force=True)


def made_of(entry: Entry) -> str:
    """Return the SHA-256 of an entry's settings and of the file of its method, without its words.

    Settings that are the defaults do not count, so that a new field moves nothing.
    """
    settings = [
        entry.budget,
        entry.pairs,
        entry.control,
        _stated(entry.method),
        _stated(entry.train),
    ]
    tree = ast.parse(inspect.getsource(sys.modules[type(entry.method).__module__]))
    for node in ast.walk(tree):  # docstrings, and what proves a method
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [part for part in node.body if not _trains_nothing(part)]
    return sha256([settings, _teaching(entry), ast.unparse(tree)])


def sha256(value: Any) -> str:
    """Return the SHA-256, in hexadecimal, of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _teaching(entry: Entry) -> list[Any]:
    """Return what decides the teacher of an entry, beside the seed."""
    taught = [entry.teach, entry.teacher] if entry.teach else []
    return [*map(_stated, (entry.net, *taught))]


def _stated(value: Any) -> dict[str, Any]:
    """Return the fields of a value that are not the defaults."""
    found = {f.name: to_json(getattr(value, f.name)) for f in fields(value) if not _usual(value, f)}
    return {"type": type(value).__name__, **found}


def _usual(value: Any, field: Field) -> bool:
    made = field.default if field.default_factory is MISSING else field.default_factory()
    return made == getattr(value, field.name)


def _trains_nothing(part: ast.stmt) -> bool:
    text = isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
    return text or getattr(part, "name", None) in ("identity", "measure", "trial")


def trained(
    entry: Entry, folder: Path, seed: int, budget: float | None = None, rows: int | None = None
) -> tuple[dict[int, Model], Spent]:
    """Return what an entry's run makes, by the number of calls, and what it spent.

    It learns from the first `rows` of the data, by default from all.
    """
    on, run = problem(entry), folder / f"{made_of(entry)[:12]}-{seed}"
    taught_by = folder / f"teacher-{sha256(_teaching(entry))[:12]}-{seed}"
    sources: tuple[AbstractSource, AbstractSource] = on.sources(seed, rows)
    teacher, taught = on.teacher(entry, taught_by / "run", seed, sources)
    spent = Spent(taught, taught)
    if entry.control == "teacher":
        return {nfe: in_calls(teacher, nfe) for nfe in (*CALLS, teacher.nfe)}, spent
    if entry.control == "untrained":
        method = entry.method.on(teacher)
        return {1: Student(method.init(teacher)["student"].eval(), method)}, spent
    if entry.method.feeds == "pairs":
        count = entry.pairs + HELD_OUT
        store = generate_pairs(teacher, taught_by / f"pairs-{count}", count, seed=seed)
        spent += Spent(len(store) * teacher.nfe)
        kind = Shuffled if entry.control == "shuffled" else Pairs
        sources = kind(store, range(HELD_OUT, len(store))), Pairs(store, range(HELD_OUT))
    fixed, many = spends(entry, sources[0]), spends(entry, sources[0], epochs=1000)
    left = (budget or entry.budget) - (spent + fixed).evaluations
    epochs = left / (many.evaluations - fixed.evaluations) * 1000
    train = replace(entry.train, epochs=epochs, seed=seed)
    start = on.start(entry, teacher, seed)
    stages = Stages(entry.method, start, *sources, run, train, pairs=entry.pairs)
    stages.fit()
    return _by_calls(stages), spent + spends(entry, sources[0], epochs)


class Shuffled(Pairs):
    """Pairs in which every noise has the image of another."""

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        return super().read([(row + len(self) // 2) % len(self) for row in rows])

    def fingerprint(self) -> str:
        return f"{super().fingerprint()} shuffled"


def spends(entry: Entry, source: AbstractSource, epochs: float = 0) -> Spent:
    """Return what the stages of a run spend, and the pairs that are made between."""
    size, total, last = entry.train.batch_size, Spent(), None
    for stage in entry.method.stages():
        rows = len(source)
        if last and stage.feeds == "pairs":
            rows, calls = entry.pairs, last.result(built(entry.net)).nfe
            total += Spent((entry.pairs + HELD_OUT) * calls)
        turns = len(stage.turns)
        steps = round(epochs * stage.length / turns * (rows // size))
        # The gradient goes through two networks, or twice through one.
        learning = turns + isinstance(stage, MixFlow | RegularizedConsistencyModel)
        total += Spent(size * evaluations(stage, steps), size * steps * learning)
        last = stage
    return total


def evaluations(stage: AbstractMethod, steps: int) -> float:
    """Return how many evaluations a run of so many steps takes for each row of its batches."""
    match stage:
        case Shortcut():
            return steps * (1 + 2 / stage.bootstrap_every)
        case DiscreteMeanFlow():  # one in the first stage, then a step along the flow, or value
            return 2 * steps + -steps // stage.num_stages  # and derivative
        case MeanFlow() | MixFlow() | PosteriorMeanFlow():
            return 2 * steps
        case ProgressiveDistillation():  # two calls of the teacher
            return 3 * steps
        case ConsistencyDistillation():
            return (4 if stage.solver == "heun" else 3) * steps
        case ConsistencyTraining() | ImprovedConsistencyTraining() | EasyConsistencyTuning():
            return 2 * steps
        case SimplifiedConsistencyModel():
            return (3 if stage.flow == "teacher" else 2) * steps
        case RegularizedConsistencyModel(rollout=1):
            return (6 + 2 * stage.critic_turns) * steps
        case _:
            return steps


def _by_calls(run: Stages) -> dict[int, Model]:
    """Return a result as it is drawn in each number of calls that its method can do.

    Progressive distillation has a result of its own for each, those of the last stages.
    """
    halved = isinstance(run.method, ProgressiveDistillation)
    stages = [*zip(run.stages, run.results, strict=True)][0 if halved else -1 :]
    found: dict[int, Model] = {}
    for stage, result in stages:
        for nfe in CALLS:
            try:
                stage.times(nfe)
            except ValueError:
                continue
            found[nfe] = Student(result.net, stage, nfe)
    return dict(sorted(found.items()))
