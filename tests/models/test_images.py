"""The one conversion between levels and floats, and pictures of many images."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ds.models.images import (
    grey_channels,
    is_picture,
    save,
    save_png,
    tile,
    to_float,
    to_uint8,
)

LEVELS = torch.arange(256, dtype=torch.uint8)
IMAGES = torch.randint(0, 256, (5, 4, 6, 3), generator=torch.Generator().manual_seed(0)).byte()


def test_every_level_survives_the_round_trip():
    images = LEVELS.reshape(1, 16, 16, 1)
    assert torch.equal(to_uint8(to_float(images)), images)


def test_levels_are_spread_over_minus_one_to_one():
    floats = to_float(LEVELS.reshape(1, 16, 16, 1)).flatten()
    expected = (np.arange(256) / 127.5 - 1).astype(np.float32)
    np.testing.assert_allclose(floats, expected, rtol=0, atol=6e-8)  # half an ulp at 1


def test_channels_move_from_last_to_first_and_back():
    images = torch.arange(2 * 3 * 4 * 3).reshape(2, 3, 4, 3).to(torch.uint8)
    floats = to_float(images)
    assert floats[1, 2, 0, 3] == images[1, 0, 3, 2] / 127.5 - 1
    assert torch.equal(to_uint8(floats), images)


@pytest.mark.parametrize(
    ("rounding", "bias", "rms"),
    # Uniform error within half a level, 1/127.5 / sqrt(12), or below one: -1/255 and / sqrt(3)
    [("round", 0.0, 0.00227), ("floor", -0.0039, 0.00453)],
)
def test_floor_darkens_by_half_a_level_and_doubles_the_error(rounding, bias, rms):
    x = torch.linspace(-1, 1, 1_000_001).reshape(1, 1, 1, -1)
    error = (to_float(to_uint8(x, rounding)) - x).double()
    assert float(error.mean()) == pytest.approx(bias, abs=5e-5)
    assert float(error.square().mean().sqrt()) == pytest.approx(rms, abs=1e-5)


@pytest.mark.parametrize("rounding", ["round", "floor"])
def test_what_lies_outside_is_clipped(rounding):
    x = torch.tensor([-7.0, -1.0, 1.0, 7.0, float("inf")]).reshape(1, 1, 1, 5)
    assert to_uint8(x, rounding).flatten().tolist() == [0, 0, 255, 255, 255]


def test_an_unknown_rounding_is_refused():
    with pytest.raises(ValueError, match="one of round, floor, not 'truncate'"):
        to_uint8(torch.zeros(1, 1, 1, 1), "truncate")


def test_floats_are_laid_out_as_networks_want_them():
    floats = to_float(torch.zeros(2, 4, 4, 3, dtype=torch.uint8))
    assert floats.is_contiguous(memory_format=torch.channels_last)


def test_tiles_go_row_by_row_on_white():
    images = torch.tensor([1, 2, 3], dtype=torch.uint8).reshape(3, 1, 1, 1)
    w = 255
    expected = [
        [w, w, w, w, w],
        [w, 1, w, 2, w],
        [w, w, w, w, w],
        [w, 3, w, w, w],
        [w, w, w, w, w],
    ]
    assert tile(images, columns=2).squeeze(-1).tolist() == expected


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_each_pixel_enlarged(tmp_path, channels):
    image = torch.arange(2 * 3 * channels, dtype=torch.uint8).reshape(2, 3, channels)
    save_png(image, tmp_path / "image.png", scale=4)
    read = np.asarray(Image.open(tmp_path / "image.png")).reshape(8, 12, channels)
    np.testing.assert_array_equal(read, image.numpy().repeat(4, 0).repeat(4, 1))


@pytest.mark.parametrize("columns", [None, 2])
def test_a_sheet_is_a_png_with_enlarged_pixels(tmp_path, columns):
    save(IMAGES, tmp_path / "sheet.png", columns=columns, scale=3)
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "sheet.png")))
    expected = tile(IMAGES, columns or math.ceil(math.sqrt(5)))
    assert torch.equal(sheet[1::3, 1::3], expected)
    assert torch.equal(sheet[::3, 2::3], expected)


def test_a_directory_has_a_png_for_each_image(tmp_path):
    save(IMAGES, tmp_path / "folder")
    for i, image in enumerate(IMAGES):
        stored = np.array(Image.open(tmp_path / "folder" / f"{i:06d}.png"))
        assert torch.equal(torch.from_numpy(stored), image)


def test_arrays_hold_the_images_as_they_are(tmp_path):
    save(IMAGES, tmp_path / "a.npy")
    save(IMAGES, tmp_path / "a.npz")
    assert (np.load(tmp_path / "a.npy") == IMAGES.numpy()).all()
    assert (np.load(tmp_path / "a.npz")["images"] == IMAGES.numpy()).all()


def test_an_animation_goes_there_and_back(tmp_path):
    grey = (torch.arange(5) * 60).byte().reshape(-1, 1, 1, 1).expand(-1, 4, 4, 1)
    save(grey, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as animation:
        shades = []
        for frame in range(animation.n_frames):
            animation.seek(frame)
            shades.append(animation.convert("L").getpixel((0, 0)))
    assert shades == [0, 60, 120, 180, 240, 180, 120, 60]


@pytest.mark.parametrize("channels", [2, 4, 5])
@pytest.mark.parametrize("name", ["a.png", "a.gif", "a"])
def test_an_array_that_is_no_picture_does_not_become_one(tmp_path, channels, name):
    """Four channels were written as RGBA."""
    images = torch.zeros(3, 4, 6, channels, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"uint8 \[N, H, W, 1 or 3\], not .*, {channels}\]"):
        save(images, tmp_path / name)
    with pytest.raises(ValueError, match=r"1 or 3\]"):
        save_png(images[0], tmp_path / name)
    assert not list(tmp_path.iterdir())
    save(images, tmp_path / "a.npy")
    assert np.load(tmp_path / "a.npy").shape == (3, 4, 6, channels)


def test_floats_are_no_picture(tmp_path):
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        save(IMAGES.float(), tmp_path / "a.png")


def test_channels_are_grey_from_their_least_to_their_largest_number():
    x = torch.tensor([[[[0.0, 1]], [[-50, 50]]], [[[4, 2]], [[0, 0]]]])  # [2, 2, 1, 2]
    expected = [[0, 64, 0, 255], [255, 128, 128, 128]]
    assert grey_channels(x).shape == (2, 1, 4, 1)
    assert grey_channels(x).flatten(1).tolist() == expected


@pytest.mark.parametrize(
    ("shape", "picture"),
    [((1, 8, 8), True), ((3, 8, 16), True), ((2, 8, 8), False), ((4, 8, 8), False),
     ((2,), False), ((3, 8), False), ((3, 1, 8, 8), False)],
)  # fmt: skip
def test_pictures_are_grey_or_rgb(shape, picture):
    assert is_picture(shape) == picture


def test_another_name_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"a\.bmp: the name must end in one of \.png, \.gif"):
        save(IMAGES, tmp_path / "new" / "a.bmp")
    assert not list(tmp_path.iterdir())
