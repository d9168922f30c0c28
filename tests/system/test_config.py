"""Configurations as JSON, and what a file may not name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ds.config import difference, from_json, to_json
from ds.nets import UNetConfig
from ds.presets import PRESETS
from ds.schedule import LinearBeta
from ds.solvers import DDIM


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_the_round_trip_through_text(name):
    preset = PRESETS[name]()
    assert from_json(json.loads(json.dumps(to_json(preset)))) == preset


def test_a_value_carries_the_name_of_its_type():
    assert to_json(LinearBeta(10)) == {
        "type": "ds.schedule.LinearBeta",
        "num_steps": 10,
        "beta_start": 1e-4,
        "beta_end": 0.02,
    }


def test_a_value_without_fields_is_its_type_alone():
    assert from_json({"type": "ds.solvers.ddim.DDIM"}) == DDIM()


def test_paths_become_text():
    assert to_json(Path("a/b")) == "a/b"


@pytest.mark.parametrize("value", [torch.zeros(1), {1, 2}, object()])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(TypeError, match="which JSON cannot"):
        to_json([value])


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "dsomething.Config",
        "ds",
        "ds.",
        "ds.nothing.Config",
        "ds.schedule.Nothing",
        "ds.files.sha256",
        "ds.files.os.system",
        "ds.solvers.base.AbstractSolver",
        "ds.schedule.DATA",
        "",
        None,
        ["ds.schedule.LinearBeta"],
    ],
)
def test_only_dataclasses_of_ds_are_built(name):
    with pytest.raises(ValueError, match="no dataclass of ds"):
        from_json({"type": name})


def test_a_value_without_a_type_is_refused():
    with pytest.raises(ValueError, match="no dataclass of ds"):
        from_json({"num_steps": 3})


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match=r"ds\.schedule\.LinearBeta.*'steps'"):
        from_json({"type": "ds.schedule.LinearBeta", "steps": 3})


def test_a_value_its_class_refuses_is_refused():
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        from_json({**to_json(LinearBeta()), "num_steps": 0})


def test_difference_names_the_first_place():
    a = to_json(UNetConfig())
    b = to_json(replace(UNetConfig(), channels=64))
    assert difference({"net": a}, {"net": b}) == "net.channels: 128, not 64"


def test_equal_configurations_have_no_difference():
    assert difference(to_json(UNetConfig()), to_json(UNetConfig())) is None
