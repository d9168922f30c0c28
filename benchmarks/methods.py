"""What the methods give for equal spending: digits, several seeds.

    python -m benchmarks.methods [--seeds 5] [--only mean_flow ...] [--runs FOLDER]

For each seed every method trains a network and spends its budget, BUDGET evaluations of networks,
on that. An evaluation is one call of any network on one row, and counts two where a derivative
along the flow comes with the value. The calls of targets, critics, predictors and teachers count,
those for pairs too, and the training of the teacher that a method needs. Backward passes and the
check at the end of a run do not count, for any method. All start from fresh weights and learn in
the same way. c-rectified flow is left out: it lowers a cost of transport, not the number of calls,
and digits come in parts that do not touch, where its claim has a gap.

Some methods have a second entry, with what `make demo` spends on Denoising Student and with its
network.

Writes the Frechet distance and the recall in 1, 2 and 4 network calls, and the seconds to draw, to
results/methods.json, after every run. What is there already is kept, and made anew where it is of
other code of the method, or of other settings. FOLDER keeps what was trained, and a run that was
stopped goes on there.
"""

import argparse
import ast
import hashlib
import inspect
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, Case, Pace, Side, commit, environment, measure
from ds.diffusion.schedules import EDM, Trig
from ds.evaluation.evaluate import evaluate, split_floor
from ds.evaluation.features import Digits
from ds.methods import (
    AbstractMethod,
    ConsistencyDistillation,
    ConsistencyTraining,
    Denoising,
    DiscreteMeanFlow,
    Drifting,
    EasyConsistencyTuning,
    ImprovedConsistencyTraining,
    MeanFlow,
    MixFlow,
    PosteriorMeanFlow,
    ProgressiveDistillation,
    RectifiedFlow,
    RegularizedConsistencyModel,
    Shortcut,
    SimplifiedConsistencyModel,
)
from ds.methods.base import built
from ds.models.model import Model
from ds.models.sampler import Sampler
from ds.models.student import Student
from ds.models.teacher import Teacher
from ds.nets import SongConfig, UNetConfig
from ds.pairs.generate import generate_pairs
from ds.pairs.sources import AbstractSource, Images, Pairs, digits
from ds.system.config import to_json
from ds.system.files import read_json
from ds.system.staging import write_json
from ds.training import presets
from ds.training.config import TrainConfig
from ds.training.stages import Stages
from ds.training.trainer import Trainer

PATH, CALLS, BUDGET = RESULTS / "methods.json", (1, 2, 4), 100_000
# `make demo`: 40 epochs of a teacher, 12 calls for each of 12,800 pairs, and 7 epochs of a student.
DEMO_BUDGET = 40 * 28 * 64 + 12 * 12_800 + 7 * 12_288
MINUTES = 2.0  # of a run of BUDGET whose time is not known
# Whose code decides whether a run is of the same method, where the method uses it.
FAMILIES = ("ds.methods.flow.", "ds.methods.consistency.")
DRAWN = 256  # images at a time, where the time to draw is measured
HELD_OUT = 64  # rows of the check at the end of a run, which chooses nothing
DEMO = presets.digits()
TRAIN = replace(DEMO.train, lr=2e-3, check_every=10**9)  # a check at the end
NET = replace(DEMO.net, channels=16)
SLOW = replace(NET, frequencies=(6.0, 0.5))  # as methods need that differentiate in time
FAST = replace(NET, frequencies=(40.0, 0.5))  # for the times of an arc, which are up to pi / 2
TEACH = replace(TRAIN, epochs=16)
SPREAD = 0.75  # deviation of the digits
LEVELS = Denoising(EDM(), "preconditioned")  # a teacher of EDM's noise levels
SCD = SimplifiedConsistencyModel(sigma_data=SPREAD, warmup=100, converted=True)
FLOW = RectifiedFlow(reflow=0, steps=8)


@dataclass(frozen=True)
class Entry:
    """A method, the network that it trains, and how; `pairs` for each stage that needs them."""

    words: str
    method: AbstractMethod
    net: UNetConfig | SongConfig = NET
    train: TrainConfig = TRAIN
    pairs: int = 2048
    teach: TrainConfig | None = None  # of the teacher in many calls that the method needs
    teacher: Denoising = DEMO.denoising  # which it is
    budget: int = BUDGET


ENTRIES: Mapping[str, Entry] = {
    "denoising_student": Entry("Denoising Student", DEMO.method, pairs=3072, teach=TEACH),
    "rectified_flow": Entry("rectified flow", FLOW),
    "reflow": Entry("... and a reflow", replace(FLOW, reflow=1)),
    "distil": Entry("... and distilled", replace(FLOW, reflow=1, distil=True), pairs=1536),
    # The weight of a sum over 64 elements; CIFAR-10 has 3072, and 1e-5.
    "mix_flow": Entry("MixFlow", MixFlow(2e-3, predictor=replace(NET, channels=8, out_channels=2))),
    # As in its trial: a run is too short for more sizes of steps, and for a slower target.
    "shortcut": Entry(
        "shortcut model",
        Shortcut(steps=32, bootstrap_every=4, target_decay=0.98),
        replace(NET, conditions=("level",)),
    ),
    "mean_flow": Entry("MeanFlow", MeanFlow(), replace(SLOW, conditions=("h",))),
    "discrete_mean_flow": Entry(
        "discrete MeanFlow", DiscreteMeanFlow(), replace(SLOW, conditions=("h",))
    ),
    "posterior_mean_flow": Entry(
        "posterior MeanFlow",
        PosteriorMeanFlow(),
        replace(SLOW, conditions=("h", "outer", "context")),
    ),
    # A velocity, since the loss of the paper's teachers, of x0 weighted by the SNR, needs longer.
    "progressive_distillation": Entry(
        "progressive distillation",
        ProgressiveDistillation(start_steps=8),
        FAST,
        replace(TRAIN, lr=1e-3, warmup_steps=0),
        teach=TEACH,
        teacher=Denoising(Trig(), "v"),
    ),
    "consistency_distillation": Entry(
        "consistency distillation",
        ConsistencyDistillation(),
        SLOW,
        teach=TEACH,
        teacher=LEVELS,
    ),
    "consistency_training": Entry(
        "consistency training", ConsistencyTraining(sigma_data=SPREAD, end_steps=20), SLOW
    ),
    "improved_consistency_training": Entry(
        "improved consistency training (iCT)",
        ImprovedConsistencyTraining(end_steps=80, sigma_data=SPREAD, huber=0.03),
        SLOW,
    ),
    "easy_consistency_tuning": Entry(
        "easy consistency tuning (ECT)",
        EasyConsistencyTuning(num_stages=4),
        SLOW,
        teach=TEACH,
        teacher=LEVELS,
    ),
    "scd": Entry(
        "sCM, of a teacher (sCD)",
        SCD,
        SLOW,
        teach=TEACH,
        teacher=LEVELS,
    ),
    "sct": Entry(
        "sCM, of data (sCT)",
        SimplifiedConsistencyModel(flow="data", sigma_data=SPREAD, warmup=100),
        SLOW,
    ),
    "regularized_consistency_model": Entry(
        "rCM",
        RegularizedConsistencyModel(
            SCD, consistency_weight=10.0, rollout=1, critic_turns=1, critic_log_sigma=(-1.0, 1.4)
        ),
        SLOW,
        teach=TEACH,
        teacher=LEVELS,
    ),
    # As many rows at once as leave enough steps.
    "drifting": Entry("drifting", Drifting(), train=replace(TRAIN, batch_size=256)),
    "denoising_student_demo": Entry(
        "Denoising Student",
        DEMO.method,
        DEMO.net,
        DEMO.train,
        pairs=DEMO.pairs.count,
        teach=DEMO.teach,
        budget=DEMO_BUDGET,
    ),
    "mean_flow_demo": Entry(
        "MeanFlow", MeanFlow(), replace(SLOW, channels=32, conditions=("h",)), budget=DEMO_BUDGET
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=ENTRIES, default=[*ENTRIES])
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    options = parser.parse_args()
    DEMO.machine.use()
    rows = kept()
    asked = [(name, seed) for seed in range(options.seeds) for name in options.only]
    missing = [one for one in asked if one not in rows]
    known = {row["method"]: row["minutes"] for row in rows.values() if "minutes" in row}
    guess = {name: MINUTES * entry.budget / BUDGET for name, entry in ENTRIES.items()}
    about = sum((guess | known)[name] for name, _ in missing)
    print(f"{len(missing)} of {len(asked)} runs to make, about {about:.0f} minutes", flush=True)
    for name, seed in missing:
        row = judged(name, options.runs / f"{name}-{seed}", seed)
        print(name, seed, f"{row['minutes']:.1f} minutes", row["figures"], flush=True)
        write(kept() | {(name, seed): row}, options.runs)  # others may have written since


def kept() -> dict[tuple[str, int], dict[str, Any]]:
    """Return the rows that are written, by method and seed: those of this code and settings."""
    rows = read_json(PATH)["rows"] if PATH.exists() else []
    known = [row for row in rows if row["method"] in ENTRIES]
    return {
        (row["method"], row["seed"]): row
        for row in known
        if row.items() >= made_of(ENTRIES[row["method"]]).items()
    }


def write(rows: Mapping[tuple[str, int], dict[str, Any]], runs: Path) -> None:
    """Write what is found of runs, and how long it takes to draw with those of the seed 0."""
    ordered = sorted(rows, key=lambda one: ([*ENTRIES].index(one[0]), one[1]))
    before = read_json(PATH)["seconds"] if PATH.exists() else {}
    drawn = {name: runs / f"{name}-0" for name, seed in ordered if not seed}
    new = {name: folder for name, folder in drawn.items() if name not in before and folder.exists()}
    saved = {
        "environment": environment(DEMO.machine.use()),
        "real": split_floor(digits()[0], Digits(), first=1500),
        "seconds": {**before, **seconds(new)},
        "rows": [rows[one] for one in ordered],
    }
    write_json(PATH, saved, force=True)


def seconds(folders: Mapping[str, Path]) -> dict[str, dict[int, float]]:
    """Return how long 1,000 images of finished runs take, by the number of calls, the median."""
    if not folders:
        return {}
    draw = {
        f"{name} {nfe}": partial(Sampler(model, batch_size=DRAWN), 0, range(DRAWN))
        for name, folder in folders.items()
        for nfe, model in trained(ENTRIES[name], folder, 0)[0].items()
    }
    sides = {name: Side(lambda _, draw=draw: draw()) for name, draw in draw.items()}
    for side in sides.values():
        side.run(None)  # warms up
    case = Case("draw", sides, lambda: None)
    found: dict[str, dict[int, float]] = {name: {} for name in folders}
    pace = Pace(rounds=9, seconds=0.0, most=300.0)
    for side, times in measure(case, sides, DEMO.machine.use(), pace).items():
        name, nfe = side.split()
        found[name][int(nfe)] = times["median"] / 1e3 / DRAWN
    return found


def judged(name: str, folder: Path, seed: int) -> dict[str, Any]:
    """Return the figures of a run; train and judge it if its folder has none of this code."""
    entry, done, begun = ENTRIES[name], folder / "figures.json", folder / "made.json"
    made = made_of(entry)
    if folder.exists() and not (begun.exists() and read_json(begun) == made):
        shutil.rmtree(folder)
    write_json(begun, made, force=True)
    if not done.exists():
        begin = time.process_time()
        models, spent = trained(entry, folder, seed)
        minutes = (time.process_time() - begin) / 60
        figures = {nfe: _figures(model) for nfe, model in models.items()}
        about = {"commit": commit(), "evaluations": spent, "minutes": round(minutes, 2)}
        row = {"method": name, "seed": seed, **about, **made}
        write_json(done, {**row, "figures": figures})
    return read_json(done)


def _figures(model: Model) -> dict[str, float]:
    result = evaluate(model, digits()[0], Digits())
    return {name: result[name] for name in ("frechet_distance", "recall")}


def made_of(entry: Entry) -> dict[str, str]:
    """Return the SHA-256 of the code of a method, and of what is trained, how and for how long."""
    taught = [entry.teach, entry.teacher] if entry.teach else []
    parts = (entry.method, entry.net, entry.train, *taught)
    settings = json.dumps([entry.budget, entry.pairs, *map(stated, parts)], sort_keys=True)
    texts = {"code": code_of(type(entry.method)), "settings": settings}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def stated(value: Any) -> dict[str, Any]:
    """Return the fields of a value that are not the defaults, so that a new field moves nothing."""
    found = {f.name: to_json(getattr(value, f.name)) for f in fields(value) if not _usual(value, f)}
    return {"type": type(value).__name__, **found}


def _usual(value: Any, field: Field) -> bool:
    made = field.default if field.default_factory is MISSING else field.default_factory()
    return made == getattr(value, field.name)


def code_of(method: type) -> str:
    """Return the code of a method's file, and of what it uses of other files in FAMILIES."""
    found: dict[tuple[str, str], str] = {}
    _gather(method.__module__, None, found)
    return "".join(found[name] for name in sorted(found))


def _gather(module: str, names: set[str] | None, found: dict[tuple[str, str], str]) -> None:
    """Add the code of what a module defines under `names`, or of all, and of what these use."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    for node in ast.walk(tree):  # without what trains nothing: docstrings, proofs
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [part for part in node.body if not _trains_nothing(part)]
    others = {
        alias.asname or alias.name: (str(node.module), alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(FAMILIES)
        for alias in node.names
    }
    defined = {name: node for node in tree.body for name in _defines(node)}
    for name in defined if names is None else names & defined.keys():
        if (module, name) in found:
            continue
        found[module, name] = ast.dump(defined[name])
        used = {part.id for part in ast.walk(defined[name]) if isinstance(part, ast.Name)}
        _gather(module, used, found)
        for other in used & others.keys():
            origin, there = others[other]
            _gather(origin, {there}, found)


def _defines(node: ast.stmt) -> list[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [
                part.id for to in targets for part in ast.walk(to) if isinstance(part, ast.Name)
            ]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def _trains_nothing(part: ast.stmt) -> bool:
    text = isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
    return text or getattr(part, "name", None) in ("identity", "measure", "trial")


def trained(
    entry: Entry, folder: Path, seed: int, budget: float | None = None, rows: int | None = None
) -> tuple[dict[int, Model], float]:
    """Return what an entry's run makes, by the number of calls, and the evaluations it spent.

    It learns from the first `rows` of the digits, by default from all.
    """
    images = digits()[0][:rows]
    held_out = Images(images[:HELD_OUT], seed=1)
    sources: tuple[AbstractSource, AbstractSource] = Images(images), held_out
    start, spent = RectifiedFlow().result(built(entry.net, seed)), 0.0
    if entry.teach:
        start, spent = _taught(entry, folder / "teacher", seed, sources)
    if entry.method.feeds == "pairs":
        store = generate_pairs(start, folder / "pairs", entry.pairs + HELD_OUT, seed=seed)
        spent += len(store) * start.nfe
        sources = Pairs(store, range(HELD_OUT, len(store))), Pairs(store, range(HELD_OUT))
    fixed, many = spends(entry, sources[0]), spends(entry, sources[0], epochs=1000)
    epochs = ((budget or entry.budget) - spent - fixed) / (many - fixed) * 1000
    train = replace(entry.train, epochs=epochs, seed=seed)
    run = Stages(entry.method, start, *sources, folder / "run", train, pairs=entry.pairs)
    run.fit()
    models = _by_calls(run)
    return models, spent + spends(entry, sources[0], epochs)


def _taught(
    entry: Entry, folder: Path, seed: int, sources: tuple[AbstractSource, AbstractSource]
) -> tuple[Teacher, float]:
    """Return a teacher in many calls of the demo's kind, and the evaluations of its training."""
    method, train = entry.teacher, replace(entry.teach or TRAIN, seed=seed)
    denoiser = method.denoiser(built(entry.net, seed))
    start = Teacher(denoiser, *DEMO.solve.build(method.schedule))
    run = Trainer(method, start, *sources, folder, train)
    return start.using(run.fit()), run.steps * train.batch_size


def spends(entry: Entry, source: AbstractSource, epochs: float = 0) -> float:
    """Return the evaluations that the stages of a run spend, and pairs that are made between."""
    size, total, last = entry.train.batch_size, 0.0, None
    for stage in entry.method.stages():
        rows = len(source)
        if last and stage.feeds == "pairs":
            rows, calls = entry.pairs, last.result(built(entry.net)).nfe
            total += (entry.pairs + HELD_OUT) * calls
        passes = epochs * stage.length / len(stage.turns)
        total += size * evaluations(stage, round(passes * (rows // size)))
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


if __name__ == "__main__":
    main()
