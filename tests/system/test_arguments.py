"""What is asked for is looked at before any work: every field of a configuration, every size."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
import shutil
from types import SimpleNamespace
from typing import Annotated, Any, get_args, get_origin

import numpy as np
import pytest
import torch

import ds
from ds.cli.distill import Distill
from ds.cli.pairs import MakePairs, Maker
from ds.cli.teach import Teach
from ds.evaluation.features import Pixels
from ds.evaluation.references import Moments
from ds.models.interpolate import great_circle
from ds.nets import UNetConfig
from ds.pairs.sources import Generated, Images
from ds.system import cost
from ds.system.config import Between, _hints
from ds.training import presets
from ds.training.batches import Batches
from ds.training.config import RuntimeConfig, TrainConfig
from ds.training.loader import load
from ds.training.trainer import Trainer

DATA = ds.analytic.Gaussian()
TEACHER = DATA.teacher(ds.solvers.DDIM(), ds.grids.quadratic(4))
HUGE = (10**9, 10**12, 2**62)


def dataclasses_of_ds() -> set[type]:
    """Every dataclass that is set by people: of presets, methods, schedules, solvers, verbs."""
    found = set()
    parts = "diffusion", "diffusion.schedules", "diffusion.solvers"
    for name in ("training", *parts, "methods", "nets", "cli"):
        module = importlib.import_module(f"ds.{name}")
        parts = [module] if not hasattr(module, "__path__") else [
            importlib.import_module(f"{module.__name__}.{part.name}")
            for part in pkgutil.iter_modules(module.__path__)
        ]  # fmt: skip
        for part in parts:
            for _, cls in inspect.getmembers(part, inspect.isclass):
                if cls.__module__ == part.__name__ and dataclasses.is_dataclass(cls):
                    found.add(cls)
    return found - {presets.Preset, Maker}  # which are made of checked ones


def usual(cls: type) -> Any:
    """Return an instance of a dataclass, with what it must be given."""
    digits = presets.digits()
    if cls in (Distill, MakePairs, Teach):
        return cls.of("digits", digits)
    paths = {"source": "x", "out": "y"} if cls.__name__ == "Convert" else {}
    given = {"model": "x", "store": "x", "out": "y", "values": (0.1, 0.2)} | paths
    given |= {"scale": 1.0, "classifier": torch.sin}
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory]
    return cls(**{name: given[name] for name in needed})


def numbers(kind: Any, rules: tuple = ()) -> tuple[type, tuple] | None:
    """Return int or float and the bounds of a field, if it is a number at all."""
    if get_origin(kind) is Annotated:
        return numbers(get_args(kind)[0], get_args(kind)[1:])
    if kind in (int, float):
        return kind, tuple(rule for rule in rules if isinstance(rule, Between))
    every = [found for one in get_args(kind) if (found := numbers(one))]
    return next((found for found in every if found[0] is float), *every[:1] or [None])


NUMBERS = [
    pytest.param(cls, name, *found, id=f"{cls.__name__}.{name}")
    for cls in sorted(dataclasses_of_ds(), key=lambda cls: cls.__name__)
    for name, kind in _hints(cls).items()
    if (found := numbers(kind)) and not name.startswith("attention")
]


def test_the_table_has_the_configurations_that_people_set():
    names = {p.values[0].__name__ for p in NUMBERS}
    assert names >= {
        "TrainConfig", "RuntimeConfig", "Machine", "SolveConfig", "PairsConfig", "UNetConfig",
        "LinearBeta", "DenoisingStudent", "DPMSolverPP", "UniPC", "Teach", "Distill", "MakePairs",
        "Sample", "Evaluate", "EvalConfig", "Convert", "Doctor", "PairsVerify", "PairsExport",
    }  # fmt: skip


@pytest.mark.parametrize(("cls", "name", "kind", "bounds"), NUMBERS)
def test_a_number_of_another_kind_or_out_of_its_bounds_is_refused_by_name(cls, name, kind, bounds):
    bad = [math.nan, math.inf, -math.inf, 1e300, 2**2000, True, "1", [1], np.float32(1), -(2**70)]
    if kind is int:
        bad += [1.5, 1.0, 2**63 if name != "seed" else 2**64, 2**70]
    bad += [-0.5 if kind is float and b.least >= 0 else b.least - 1 for b in bounds]
    before, hint = getattr(usual(cls), name), _hints(cls)[name]
    if before is None and tuple in map(get_origin, get_args(hint)):
        before = ()
    for value in bad:
        set_to = (value,) * max(1, len(before)) if isinstance(before, tuple) else value
        with pytest.raises(ValueError, match=rf"{name}|order") as found:
            dataclasses.replace(usual(cls), **{name: set_to})
        assert "\n" not in str(found.value), value


# Sizes that no machine has: known at once, whatever they are of.


def sampler(**options):
    return ds.Sampler(TEACHER, **options)


def images(count: int = 64) -> Images:
    return Images(torch.zeros(count, 8, 8, 1, dtype=torch.uint8))


def trainer(tmp_path, runtime=None, **config) -> Trainer:
    config = TrainConfig(**{"batch_size": 8, "warmup_steps": 0, **config})
    rows = images()
    return Trainer(
        ds.methods.Denoising(), TEACHER, rows, rows, tmp_path / "new", config,
        runtime=runtime,
    )  # fmt: skip


ABSURD = {
    "a batch to sample": lambda n, _: sampler(batch_size=n),
    "images": lambda n, _: sampler()(0, range(n)),
    "images, one in two": lambda n, _: sampler()(0, range(0, 2 * n, 2)),
    "a path between two": lambda n, _: great_circle(torch.ones(2, 3), n),
    "pairs": lambda n, p: ds.generate_pairs(TEACHER, p / "new", n),
    "pairs of a batch": lambda n, p: ds.generate_pairs(
        TEACHER, p / "new", n, batch_size=n, shard_size=n
    ),
    "images to evaluate": lambda n, _: ds.evaluate(TEACHER, images().images, Pixels(), n=n),
    "a batch to evaluate": lambda n, _: ds.evaluate(
        TEACHER, images().images, Pixels(), batch_size=n
    ),
    "rows of a batch": lambda n, _: Batches(images(), n, 0),
    "steps read ahead": lambda n, _: load(
        Batches(images(), 8, 0), 0, torch.device("cpu"), "memory_map", n
    ),
    "a pool": lambda n, _: Generated(TEACHER, n, seed=0),
    "a batch to train on": lambda n, p: trainer(p, batch_size=n),
    "parts of a batch": lambda n, p: trainer(p, runtime=RuntimeConfig(accumulate=n)),
    "times of a grid": lambda n, _: ds.grids.quadratic(n),
    "times of a uniform grid": lambda n, _: ds.grids.uniform(n),
    "times even in log(alpha / sigma)": lambda n, _: ds.grids.log_snr(n, ds.schedule.LinearBeta()),
    "a first time": lambda n, _: ds.grids.quadratic(4, top=n),
    "a schedule": lambda n, _: ds.schedule.LinearBeta(n),
    "blocks": lambda n, _: UNetConfig(num_res_blocks=n),
    "channels": lambda n, _: UNetConfig(channels=32 * n).build(),
    "a level's channels": lambda n, _: UNetConfig(channel_mult=(1, n)).build(),
    "a large image": lambda n, _: UNetConfig(image_size=16 * n, attention_resolutions=()).build(),
    "threads": lambda n, _: presets.Machine(threads=n),
}


@pytest.mark.parametrize("size", HUGE)
@pytest.mark.parametrize("ask", ABSURD.values(), ids=ABSURD)
def test_an_absurd_size_is_one_line_and_no_work(ask, size, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "free_memory", lambda device="cpu": 8e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2e10))
    with pytest.raises((ValueError, RuntimeError)) as found:
        ask(size, tmp_path)
    assert "\n" not in str(found.value)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("seed", [-1, 2**64, 2**70, 1.5, True, None])
@pytest.mark.parametrize(
    "ask",
    [
        lambda seed, _: sampler()(seed),
        lambda seed, p: ds.generate_pairs(TEACHER, p / "new", 8, seed=seed),
        lambda seed, _: ds.evaluate(TEACHER, images().images, Pixels(), seed=seed),
        lambda seed, _: Batches(images(), 8, seed),
        lambda seed, _: Generated(TEACHER, 8, seed=seed),
        lambda seed, p: trainer(p, seed=seed),
    ],
    ids=["Sampler", "generate_pairs", "evaluate", "Batches", "Generated", "Trainer"],
)
def test_a_seed_that_is_none_is_refused_before_anything_is_made(ask, seed, tmp_path):
    with pytest.raises(ValueError, match=r"seed must be"):
        ask(seed, tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"execution": "eager"}, "execution must be a Execution or null, not 'eager'"),
        ({"quantizer": "int4"}, "quantizer must be one of"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"shard_size": 2.0}, "shard_size must be a whole number, not 2.0"),
    ],
)
def test_a_store_is_not_begun_with_arguments_that_are_wrong(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        ds.generate_pairs(TEACHER, tmp_path / "new", 8, **change)
    assert not [*tmp_path.iterdir()]


def test_an_evaluation_needs_as_many_images_as_its_figures():
    class Scored(Pixels):
        def logits(self, features):
            return features

    reference = images().images
    for extractor, least in ((Pixels(), 4), (Scored(), 10)):
        with pytest.raises(ValueError, match=f"n must be at least {least}, not {least - 1}"):
            ds.evaluate(TEACHER, reference, extractor, n=least - 1)
    moments = Moments(torch.zeros(64, dtype=torch.float64), torch.eye(64).double(), "")
    with pytest.raises(ValueError, match="n must be at least 2, not 1"):
        ds.evaluate(TEACHER, moments, Pixels(), n=1)


def test_free_memory_is_what_the_machine_has_at_most():
    assert 0 < cost.free_memory() < 1e15


def test_a_student_of_another_shape_than_its_rows_is_refused(tmp_path):
    rows = Images(torch.zeros(64, 4, 4, 1, dtype=torch.uint8))
    with pytest.raises(
        ValueError, match=r"shape \[1, 8, 8\], the rows to train on are \[1, 4, 4\]"
    ):
        Trainer(
            ds.methods.Denoising(), TEACHER, rows, rows, tmp_path / "new",
            TrainConfig(batch_size=8),
        )  # fmt: skip
