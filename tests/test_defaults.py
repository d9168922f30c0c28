"""The defaults of methods, solvers, schedules and training: they move only on purpose."""

import inspect
import json
from dataclasses import is_dataclass
from itertools import chain

import pytest

from ds.diffusion import predictions, schedules, solvers
from ds.methods import defined_in, files
from ds.system.config import to_json
from ds.training.config import TrainConfig
from tests.golden import FOLDER


def classes() -> dict[str, type]:
    """Return what can be made without an argument, by its name."""
    public = (vars(module).values() for module in (schedules, solvers, predictions))
    return {
        cls.__name__: cls
        for cls in [*chain(*public, *map(defined_in, files())), TrainConfig]
        if is_dataclass(cls) and not inspect.isabstract(cls)
        if all(p.default is not p.empty for p in inspect.signature(cls).parameters.values())
    }


CLASSES, BEFORE = classes(), json.loads((FOLDER / "defaults.json").read_text())


@pytest.mark.parametrize("name", BEFORE)
def test_a_default_moves_only_on_purpose(name):
    """If it was: change it in tests/golden/defaults.json, and say so in the CHANGELOG."""
    assert to_json(CLASSES[name]()) == BEFORE[name]
