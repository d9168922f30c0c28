"""Guided-diffusion's classifiers of noisy images, from files."""

from dataclasses import replace

import pytest
import torch

import ds
from ds.models.convert import classifier
from ds.nets import ClassifierConfig, adm_classifier
from tests import golden

CONFIG = ClassifierConfig(
    image_size=16,
    channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
    head_channels=16,
    num_classes=10,
)


@pytest.fixture(scope="module")
def told():
    return golden.openai("classifier", "openai_classifier")


@pytest.fixture
def written(told, tmp_path):
    """A function that writes the state dict, edited, and returns the file."""

    def write(edit=lambda state: state):
        torch.save(edit(dict(told[0])), tmp_path / "file")
        return tmp_path / "file"

    return write


@torch.no_grad()
def test_a_classifier_computes_what_its_code_does(told, written):
    net, data = ds.load_classifier(written(), config=CONFIG), told[1]
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    found = net(data["z"], data["t"])
    assert (found - data["y"]).norm() < 1e-5 * data["y"].norm()
    # Both images have nearly the same logits, so what tells them apart is held to it as well.
    found, expected = (y[0] - y[1] for y in (found, data["y"]))
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_a_published_classifier_is_known_by_its_blocks(size, tmp_path):
    blocks = range({64: 20, 128: 15, 256: 18, 512: 21}[size])
    names = {f"input_blocks.{i}.0.weight": torch.zeros(1) for i in blocks}
    assert classifier._published(names, tmp_path) == adm_classifier(size)


def without(key):
    return lambda state: {name: w for name, w in state.items() if name != key}


@pytest.mark.parametrize(
    ("edit", "config", "message"),
    [
        (without("out.2.qkv_proj.weight"), CONFIG, "the weight out.2.qkv_proj.weight is missing"),
        (without("out.2.c_proj.bias"), CONFIG, r"the weight out.2.c_proj.bias \[10\] is missing"),
        (without("out.0.weight"), CONFIG, r"the weight out.0.weight \[64\] is missing"),
        (dict, replace(CONFIG, num_classes=9), r"out.2.c_proj.weight has the shape"),
        (dict, replace(CONFIG, image_size=8, attention_resolutions=(4,)), "positional_embedding"),
        (dict, None, r"has 4 input_blocks, .*pass config=ds.nets.ClassifierConfig"),
        (lambda state: {**state, "more": torch.ones(1)}, CONFIG, "the network has no weight more"),
        (lambda state: {**state, "more": [1]}, CONFIG, "'more' of the type list"),
        (
            lambda state: {**state, "out.0.bias": state["out.0.bias"] * torch.nan},
            CONFIG,
            "the weight out.0.bias is not finite",
        ),
    ],
    ids=["qkv", "c_proj", "norm", "classes", "size", "unknown", "more", "list", "nan"],
)
def test_what_does_not_fit_is_one_clear_error(written, edit, config, message):
    path = written(edit)
    with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
        ds.load_classifier(path, config=config)


def test_a_file_that_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        ds.load_classifier(tmp_path / "file")
