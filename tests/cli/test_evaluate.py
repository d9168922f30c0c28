"""What an evaluation compares a model on: chosen by its pictures, said, or refused in one line."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ds
from ds.analytic import GaussianField
from ds.cli.distill import Distill
from ds.cli.evaluate import EvalConfig
from ds.evaluation.features import AveragedPixels
from ds.training.presets import PRESETS


class Net(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape


def judged(shape, *, reference="a.npy", **fields):
    """Return what a model with samples of a shape (C, H, W) is judged by."""
    model = ds.Student(Net(shape), ds.methods.DenoisingStudent())
    return EvalConfig(reference=reference, count=16, **fields).build(model, torch.device("cpu"))


@pytest.fixture
def real(tmp_path, monkeypatch):
    """Return a function that writes real images [16, H, W, C] as a.npy in the working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda c, h, w: np.save("a.npy", np.zeros((16, h, w, c), np.uint8))


@pytest.mark.parametrize(
    ("shape", "asked", "chosen", "width"),
    [
        ((3, 32, 32), "auto", "pixels-averaged-to-16", 3 * 16 * 16),
        ((1, 28, 20), "auto", "pixels-averaged-to-16", 16 * 16),
        ((3, 8, 64), "auto", "pixels-averaged-to-16", 3 * 8 * 16),
        ((3, 16, 16), "auto", "pixels", 3 * 16 * 16),
        ((1, 8, 8), "auto", "pixels", 64),  # grey, but not the digits
        ((3, 32, 32), "pixels", "pixels", 3 * 32 * 32),
    ],
)
def test_the_features_are_chosen_by_the_pictures_and_said(
    real, caplog, shape, asked, chosen, width
):
    caplog.set_level("INFO", "ds")
    real(*shape)
    _, extractor = judged(shape, extractor=asked)
    c, h, w = shape
    assert extractor.name == chosen
    assert extractor(torch.zeros(2, h, w, c, dtype=torch.uint8)).shape == (2, width)
    said = [f"evaluate: features are {chosen}; --extractor takes others"]
    assert caplog.messages[1:] == (said if asked == "auto" else [])  # after what was read


def test_the_digits_are_compared_on_their_classifier_and_with_weights_on_inception(
    real, monkeypatch
):
    monkeypatch.setattr("ds.cli.evaluate.check_evaluation", lambda *_: None)
    monkeypatch.setattr("ds.cli.evaluate.Digits", lambda: SimpleNamespace(name="d"))
    monkeypatch.setattr(
        "ds.cli.evaluate.Inception", lambda path, device: SimpleNamespace(name=path)
    )
    assert judged((1, 8, 8), reference="digits")[1].name == "d"
    real(3, 32, 32)
    weights = Path("weights.pth")
    assert judged((3, 32, 32), inception_weights=weights)[1].name == weights
    assert judged((1, 8, 8), reference="digits", inception_weights=weights)[1].name == weights
    np.savez("moments.npz", mu=np.zeros(64), sigma=np.eye(64))
    assert judged((1, 8, 8), reference="moments.npz", extractor="pixels")[1].name == "pixels"
    with pytest.raises(ValueError, match=r"^moments\.npz: moments do not say of what features"):
        judged((1, 8, 8), reference="moments.npz")
    with pytest.raises(ValueError, match="extractor inception needs --inception-weights FILE"):
        judged((3, 32, 32), extractor="inception")


def test_the_digits_are_no_reference_for_pictures_of_another_shape():
    for shape in ((3, 32, 32), (1, 28, 28), (3, 8, 8)):
        with pytest.raises(ValueError, match=r"reference is digits, \[8, 8, 1\]; .*--reference "):
            judged(shape, reference="digits")


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 32, 30), r"images are \[32, 30, 3\], the reference is \[32, 32, 3\]; bring them")],
)
def test_a_judge_that_does_not_fit_is_refused_before_the_training(real, shape, message):
    real(3, 32, 32)
    with pytest.raises(ValueError, match=message):
        judged(shape)


def test_the_judge_of_a_training_says_how_it_ran(real, caplog):
    caplog.set_level("INFO", "ds")
    real(1, 4, 4)
    teacher = GaussianField(size=4).teacher(ds.solvers.DDIM(), ds.grids.quadratic(2))
    task = replace(
        Distill.of("digits", PRESETS["digits"]()), judge=EvalConfig(reference="a.npy", count=4)
    )
    task.__dict__["_asked"] = teacher, ds.Conditions()
    assert task._judge()(teacher)["frechet_distance"] > 0
    assert caplog.messages[-1].startswith("evaluate: float32, mode eager, on cpu (")


def test_averaged_pixels_are_means_of_the_pixels():
    images = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
    made = AveragedPixels()(images).reshape(2, 3, 16, 16)
    blocks = images.movedim(-1, 1).double().reshape(2, 3, 16, 2, 16, 3).mean((3, 5))
    assert torch.allclose(made, blocks / 127.5 - 1, atol=1e-6)
