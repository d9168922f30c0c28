"""Configurations as JSON, and what a file may not name."""

import dataclasses
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ds.diffusion.schedules import LinearBeta
from ds.diffusion.solvers import DDIM
from ds.nets import UNetConfig
from ds.system.config import BY_CONTENT, difference, from_json, known, to_json
from ds.training.config import TrainConfig
from ds.training.presets import PRESETS, Machine, PairsConfig, Preset, SolveConfig


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_the_round_trip_through_text(name):
    preset = PRESETS[name]()
    types = (Preset, SolveConfig, PairsConfig, TrainConfig, Machine)
    assert from_json(json.loads(json.dumps(to_json(preset))), types) == preset


def test_a_value_carries_the_name_of_its_type():
    assert to_json(LinearBeta(10)) == {
        "type": "linear_beta",
        "num_steps": 10,
        "beta_start": 1e-4,
        "beta_end": 0.02,
    }


def test_a_value_without_fields_is_its_type_alone():
    assert from_json({"type": "ddim"}) == DDIM()


def test_paths_become_text():
    assert to_json(Path("a/b")) == "a/b"


@dataclasses.dataclass(frozen=True)
class Read:
    file: Path | None = dataclasses.field(default=None, metadata=BY_CONTENT)


def test_a_file_that_is_named_by_content_becomes_its_sha256_on_every_machine(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).write_bytes(b"weights")
        found = to_json(Read(tmp_path / name))
        assert found == {"type": "read", "file": hashlib.sha256(b"weights").hexdigest()}
    assert to_json(from_json(found, [Read])) == found  # without the file
    assert to_json(Read()) == {"type": "read", "file": None}


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
        "ds.diffusion.schedules.LinearBeta",
        "LinearBeta",
        "abstract_solver",
        "train_config",
        "",
        None,
        ["linear_beta"],
    ],
)
def test_only_the_types_of_the_table_are_built(name):
    with pytest.raises(ValueError, match=r"which is none of .*linear_beta"):
        from_json({"type": name})


def test_a_value_without_a_type_is_refused():
    with pytest.raises(ValueError, match=r"which is none of .*linear_beta"):
        from_json({"num_steps": 3})


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match=r"linear_beta.*'steps'"):
        from_json({"type": "linear_beta", "steps": 3})


def test_a_value_its_class_refuses_is_refused():
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        from_json({**to_json(LinearBeta()), "num_steps": 0})


def test_difference_names_the_first_place():
    a = to_json(UNetConfig())
    b = to_json(replace(UNetConfig(), channels=64))
    assert difference({"net": a}, {"net": b}) == "net.channels: 128, not 64"


def test_equal_configurations_have_no_difference():
    assert difference(to_json(UNetConfig()), to_json(UNetConfig())) is None


# Files name types so: a tag that changes orphans them. A new type adds a line.
TAGS = {
    "linear_beta",
    "scaled_linear",
    "cosine",
    "sigmoid",
    "table",
    "edm",
    "vp",
    "linear",
    "trig",
    "eps",
    "score",
    "x0",
    "v",
    "velocity",
    "preconditioned",
    "bounded",
    "trig_flow",
    "rescaled",
    "learned_variance",
    "classifier_free",
    "classifier_guidance",
    "ancestral",
    "clipped",
    "dcw",
    "ddim",
    "ddim_to_first",
    "heun",
    "same_noise",
    "renoise",
    "dpm_solver_pp",
    "dpm_solver_pp_singlestep",
    "unipc",
    "unet",
    "song",
    "classifier",
    "mlp",
    "potential",
    "denoising",
    "denoising_student",
    "mean_flow",
    "discrete_mean_flow",
    "mix_flow",
    "posterior_mean_flow",
    "progressive_distillation",
    "drifting",
    "rectified_flow",
    "c_rectified_flow",
    "shortcut",
    "consistency_distillation",
    "consistency_training",
    "improved_consistency_training",
    "easy_consistency_tuning",
    "regularized_consistency_model",
    "simplified_consistency_model",
}


def test_tags_stay_as_they_are():
    assert known().keys() == TAGS


@dataclasses.dataclass(frozen=True)
class Mine:
    width: int = 3


def test_a_type_of_the_callers_own_is_built_where_it_is_given():
    with pytest.raises(ValueError, match="the type 'mine'"):
        from_json(to_json(Mine(4)))
    assert from_json(to_json([Mine(4), DDIM()]), [Mine]) == (Mine(4), DDIM())
