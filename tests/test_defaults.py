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


def values() -> dict[str, object]:
    """Every value that can be made without an argument, by its name."""
    public = (vars(module).values() for module in (schedules, solvers, predictions))
    classes = [*chain(*public, *map(defined_in, files())), TrainConfig]
    made = {}
    for cls in classes:
        if inspect.isclass(cls) and is_dataclass(cls) and not inspect.isabstract(cls):
            needed = [p for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
            if not needed:
                made[cls.__name__] = to_json(cls())
    return made


NOW, BEFORE = values(), json.loads((FOLDER / "defaults.json").read_text())


@pytest.mark.parametrize("name", BEFORE)
def test_a_default_moves_only_on_purpose(name):
    """If it was: change it in tests/golden/defaults.json, and say so in the CHANGELOG."""
    assert NOW.get(name) == BEFORE[name]
