"""dstudent sample: what is no picture is shown in a form that fits, and that is said."""

import numpy as np
import pytest
import torch
from PIL import Image

import ds
from ds.cli.__main__ import main
from ds.methods import DenoisingStudent
from ds.nets import MLPConfig, UNetConfig


def unet(channels: int) -> UNetConfig:
    return UNetConfig(
        image_size=8, in_channels=channels, channels=8, channel_mult=(1,), num_res_blocks=1,
        attention_resolutions=(), norm_groups=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return where students of some shapes are."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    configs = {c: unet(c) for c in (1, 2, 3, 4, 5)} | {"points": MLPConfig(width=8)}
    for name, config in configs.items():
        torch.manual_seed(0)
        ds.Student(config.build(), DenoisingStudent(t=999)).save_pretrained(folder / str(name))
        found[name] = str(folder / str(name))
    return found


def draw(model, out, *more):
    return main(["sample", model, "--out", str(out), "--indices", "0-4", *more])


@pytest.mark.parametrize("channels", [2, 4, 5])
@pytest.mark.parametrize("name", ["a.png", "a.gif", "a"])
def test_a_latent_without_a_decoder_is_shown_channel_by_channel(
    models, channels, name, tmp_path, caplog
):
    assert draw(models[channels], tmp_path / name, "--scale", "1") == 0
    said = caplog.text
    assert f"[{channels}, 8, 8] are no pictures" in said and "grey, scaled to its own range" in said
    file = next((tmp_path / name).glob("*.png")) if name == "a" else tmp_path / name
    with Image.open(file) as picture:
        assert picture.convert("RGBA").getextrema()[3] == (255, 255), "no alpha"
        if name != "a.png":
            assert picture.size == (8 * channels, 8)
        pixels = np.asarray(picture.convert("L"))
    assert ((pixels > 5) & (pixels < 250)).mean() > 0.5, "nothing is clipped"


@pytest.mark.parametrize("which", [2, 4, 5, "points"])
@pytest.mark.parametrize("more", [(), ("--between", "2")], ids=["drawn", "path"])
def test_numbers_that_are_no_pictures_are_kept_in_arrays(models, which, more, tmp_path):
    shape = (2,) if which == "points" else (which, 8, 8)
    for name in ("a.npy", "a.npz"):
        assert draw(models[which], tmp_path / name, *more) == 0
    array = np.load(tmp_path / "a.npy")
    assert array.dtype == np.float32 and array.shape == (13 if more else 5, *shape)
    assert np.array_equal(np.load(tmp_path / "a.npz")["samples"], array)
    if not more:
        (expected,) = ds.Sampler(ds.load_student(models[which]), batch_size=5).batches(0, range(5))
        assert np.array_equal(array, expected.numpy())


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a"])
def test_points_are_refused_as_pictures_in_one_line(models, name, tmp_path, capsys):
    assert draw(models["points"], tmp_path / name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "samples of shape [2] are no pictures; write them as an array" in line
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_drawn_as_they_were(models, channels, tmp_path, caplog):
    assert draw(models[channels], tmp_path / "a.npy") == 0
    assert "no pictures" not in caplog.text
    assert np.load(tmp_path / "a.npy").shape == (5, 8, 8, channels)


@pytest.mark.parametrize("which", [2, 4, 5, "points"])
def test_what_is_no_picture_is_not_judged_as_one(models, which, capsys):
    assert main(["evaluate", models[which], "--count", "16"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "are no images" in line
