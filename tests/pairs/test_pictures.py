"""Pictures as they lie about: each is read right, or refused in one line that names the file."""

import io
import json
import logging
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from ds.pairs import pictures
from ds.pairs.image_file import fitted, read_picture
from ds.pairs.pictures import read_pictures

GREY = np.array([[0, 100, 200], [255, 1, 50]], np.uint8)
RGB = np.stack([GREY, 255 - GREY, GREY // 2], -1)
DEEP = np.array([[0, 257, 25700], [65535, 1000, 12850]], np.uint16)
# By hand: 1000 / 257 = 3.89, and white paper shows through as 255 - alpha.
DEEP_AS_8 = np.array([[0, 1, 100], [255, 4, 50]], np.uint8)


def content(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def of(array: np.ndarray, mode: str | None = None, form: str = "PNG", **options) -> bytes:
    image = Image.fromarray(array)
    return content(image.convert(mode) if mode else image, form, **options)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def deep_png(values: np.ndarray, kind: int, key: bytes = b"") -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write for colours."""
    h, w = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, kind, 0, 0, 0))
    key = chunk(b"tRNS", key) if key else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + key
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def deep_tiff(values: np.ndarray, order: str = "<", photometric: int = 2) -> bytes:
    """A TIFF of 16 bits a channel, which Pillow does not write for colours."""
    h, w, c = values.shape
    data = values.astype(f"{order}u2").tobytes()
    bits_at = 8 + len(data)
    bits = (3, c, bits_at) if c > 2 else (3, 1, 16)
    fields = [
        (256, 3, 1, w),
        (257, 3, 1, h),
        (258, *bits),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 8),
        (277, 3, 1, c),
        (278, 3, 1, h),
        (279, 4, 1, len(data)),
    ]

    def entry(tag, kind, count, value):
        short = kind == 3 and count == 1
        last = struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
        return struct.pack(f"{order}HHI", tag, kind, count) + last

    mark = b"II*\0" if order == "<" else b"MM\0*"
    extra = struct.pack(f"{order}{c}H", *[16] * c)
    ifd = struct.pack(f"{order}H", len(fields)) + b"".join(entry(*f) for f in fields) + bytes(4)
    return mark + struct.pack(f"{order}I", bits_at + len(extra)) + data + extra + ifd


def palette(colours: list[int], indices: np.ndarray, **options) -> bytes:
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette(colours)
    return content(image, **options)


def with_alpha(array: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.concatenate([array.reshape(*alpha.shape, -1), alpha[..., None]], -1)


OPAQUE = np.full((2, 3), 255, np.uint8)
HALF = np.full((2, 3), 51, np.uint8)  # a fifth
ON_WHITE = np.rint(GREY / 5 + 204).astype(np.uint8)
RGB_ON_WHITE = np.rint(RGB / 5 + 204).astype(np.uint8)
INDEX = np.array([[0, 1, 2], [2, 1, 0]])
DEEP_RGB = np.stack([DEEP, 65535 - DEEP, DEEP // 2], -1)
DEEP_RGB_AS_8 = np.rint(DEEP_RGB / 257).astype(np.uint8)
ONE_BIT = np.array([[0, 255, 0], [255, 255, 0]], np.uint8)
INK = (
    np.array([[[0, 255, 255, 0], [0, 0, 0, 255], [0, 0, 0, 0]]], np.uint8).repeat(8, 0).repeat(8, 1)
)
INKED = np.array([[[255, 0, 0], [0, 0, 0], [255, 255, 255]]], np.uint8).repeat(8, 0).repeat(8, 1)


def plain_cmyk_jpeg() -> bytes:
    """A CMYK JPEG without Adobe's mark, whose inks are not inverted."""
    adobe = content(Image.fromarray(255 - INK, "CMYK"), "JPEG", quality=100, subsampling=0)
    start = adobe.index(b"\xff\xee")
    (length,) = struct.unpack(">H", adobe[start + 2 : start + 4])
    return adobe[:start] + adobe[start + 2 + length :]


# name: content, what is read, what is said
READ = {
    "grey": (of(GREY), GREY, ""),
    "RGB": (of(RGB), RGB, ""),
    "1 bit": (of(ONE_BIT, "1"), ONE_BIT, ""),
    "16-bit grey PNG": (of(DEEP), DEEP_AS_8, "scaled from 16 bits"),
    "16-bit grey TIFF": (of(DEEP, form="TIFF"), DEEP_AS_8, "scaled from 16 bits"),
    "16-bit grey TIFF, white is zero": (
        deep_tiff(65535 - DEEP[..., None], photometric=0),
        DEEP_AS_8,
        "scaled from 16 bits",
    ),
    "16-bit PGM": (
        b"P5 3 2 65535\n" + DEEP.astype(">u2").tobytes(),
        DEEP_AS_8,
        "scaled from 16 bits",
    ),
    "16-bit values of 32 bits": (
        of(DEEP.astype(np.int32), form="TIFF"),
        DEEP_AS_8,
        "scaled from 16 bits",
    ),
    "16-bit RGB PNG": (deep_png(DEEP_RGB, 2), DEEP_RGB_AS_8, "scaled from 16 bits"),
    "16-bit RGB TIFF": (deep_tiff(DEEP_RGB), DEEP_RGB_AS_8, "scaled from 16 bits"),
    "16-bit RGB TIFF of another byte order": (
        deep_tiff(DEEP_RGB, ">"),
        DEEP_RGB_AS_8,
        "scaled from 16 bits",
    ),
    "16-bit RGBA PNG, opaque": (
        deep_png(with_alpha(DEEP_RGB, np.full((2, 3), 65535)), 6),
        DEEP_RGB_AS_8,
        "16 bits",
    ),
    "16-bit grey PNG with a transparent value": (
        deep_png(DEEP, 0, struct.pack(">H", 257)),
        np.where(DEEP == 257, 255, DEEP_AS_8),
        "laid on white",
    ),
    "16-bit RGB TIFF, opaque": (
        deep_tiff(with_alpha(DEEP_RGB, np.full((2, 3), 65535))),
        DEEP_RGB_AS_8,
        "16 bits",
    ),
    "16-bit grey PNG with alpha, within a level": (
        deep_png(with_alpha(DEEP, np.full((2, 3), 65535)), 4),
        DEEP_AS_8,
        "16 bits",
    ),
    "16-bit grey of 12": (of(DEEP // 32), np.rint(DEEP // 32 / 257), "dark"),
    "16-bit grey up to 4095": (
        of(np.minimum(DEEP, 4095)),
        np.rint(np.minimum(DEEP, 4095) / 257),
        "dark",
    ),
    "palette": (
        palette([9, 8, 7, 200, 0, 0, 0, 0, 99], INDEX),
        np.array([[9, 8, 7], [200, 0, 0], [0, 0, 99]], np.uint8)[INDEX],
        "",
    ),
    "palette of greys": (
        palette([9] * 3 + [200] * 3 + [7] * 3, INDEX),
        np.array([9, 200, 7], np.uint8)[INDEX],
        "",
    ),
    "palette with a transparent colour": (
        palette([9, 8, 7, 200, 0, 0, 0, 0, 99], INDEX, transparency=1),
        np.array([[9, 8, 7], [255, 255, 255], [0, 0, 99]], np.uint8)[INDEX],
        "laid on white",
    ),
    "RGB with a transparent colour": (
        of(RGB, transparency=tuple(map(int, RGB[0, 1]))),
        np.where((RGB[0, 1] == RGB).all(-1, keepdims=True), 255, RGB),
        "laid on white",
    ),
    "opaque alpha": (of(with_alpha(RGB, OPAQUE)), RGB, ""),
    "alpha": (of(with_alpha(RGB, HALF)), RGB_ON_WHITE, "laid on white"),
    "grey with opaque alpha": (of(with_alpha(GREY, OPAQUE)), GREY, ""),
    "grey with alpha": (of(with_alpha(GREY, HALF)), ON_WHITE, "laid on white"),
    "CMYK JPEG of Adobe": (
        content(Image.fromarray(INK, "CMYK"), "JPEG", quality=100, subsampling=0),
        INKED,
        "from CMYK",
    ),
    "CMYK JPEG without Adobe's mark": (plain_cmyk_jpeg(), INKED, "from CMYK"),
    "CMYK TIFF": (content(Image.fromarray(INK, "CMYK"), "TIFF"), INKED, "from CMYK"),
    "GIF of one frame": (of(GREY, form="GIF"), GREY, ""),
    "lossless WebP": (of(RGB, form="WEBP", lossless=True), RGB, ""),
    "BMP": (of(RGB, form="BMP"), RGB, ""),
    "PPM": (of(RGB, form="PPM"), RGB, ""),
    "with a profile of another colour space": (
        of(RGB, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()),
        RGB,
        "colour profile",
    ),
}


@pytest.mark.parametrize("case", READ)
def test_a_picture_is_read_right_or_says_what_was_done(case):
    data, expected, said = READ[case]
    found = read_picture(data, "a")
    expected = np.asarray(expected).reshape(*expected.shape[:2], -1)
    assert found.pixels.dtype == np.uint8 and found.pixels.shape == expected.shape
    most = 3 if "JPEG" in case else 1 if "within a level" in case else 0
    assert np.abs(found.pixels.astype(int) - expected).max() <= most
    assert said in "; ".join(found.notes)
    assert said or not found.notes


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_a_photo_is_upright_as_exif_says(turn, form):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = of(RGB, form=form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(read_picture(data, "a").pixels, expected)


def frames(form: str) -> bytes:
    images = [Image.fromarray(x) for x in (RGB, 255 - RGB)]
    return content(images[0], form, save_all=True, append_images=images[1:])


REFUSED = {
    "animated GIF": (frames("GIF"), "has 2 frames"),
    "animated WebP": (frames("WEBP"), "has 2 frames"),
    "animated PNG": (frames("PNG"), "has 2 frames"),
    "TIFF of two pages": (frames("TIFF"), "has 2 pages"),
    "floats": (of(GREY.astype(np.float32), form="TIFF"), "32-bit floats"),
    "32 bits": (of(DEEP.astype(np.int32) * 9, form="TIFF"), "32-bit values"),
    "cut PNG": (of(RGB.repeat(99, 0))[:70], "not a whole image"),
    "cut JPEG": (of(RGB.repeat(99, 0), form="JPEG")[:-20], "not a whole image"),
    "cut TIFF": (of(RGB.repeat(99, 0), form="TIFF")[:-200], "not a whole image"),
    "empty": (b"", "not a whole image (empty)"),
    "a page of HTML": (b"<!doctype html><title>404</title>", "it is none of PNG"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is none of PNG"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_picture_that_cannot_be_read_is_named_in_one_line(case, tmp_path):
    data, said = REFUSED[case]
    (tmp_path / "a.png").write_bytes(of(RGB))
    (tmp_path / "b.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"\A[^\n]*/b\.png: [^\n]*\Z") as error:
        read_pictures(tmp_path)
    assert said in str(error.value)


def folder(at: Path, **files: bytes) -> Path:
    """Write files; `__` in a name is a folder's end, and a name without a suffix is a PNG."""
    for name, data in files.items():
        path = at / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        (path if path.suffix else path.with_suffix(".png")).write_bytes(data)
    return at


def read_and_heard(caplog, path, **options) -> tuple[pictures.Pictures, str]:
    with caplog.at_level(logging.INFO, "ds"):
        found = read_pictures(path, **options)
    return found, "\n".join(caplog.messages)


def test_a_folder_says_how_many_pictures_it_holds_and_what_is_left_out(tmp_path, caplog):
    folder(tmp_path, b=of(RGB), A=of(RGB // 2), **{"c__d.JPG": of(RGB, form="PNG")})
    folder(tmp_path, **{"._b.png": b"", ".ipynb_checkpoints/b.png": of(RGB), "Thumbs.db": b""})
    folder(tmp_path, **{"@eaDir__b": b"", "notes.txt": b"", "e.heic": b""})
    found, heard = read_and_heard(caplog, tmp_path)
    assert np.array_equal(found.images, np.stack([RGB // 2, RGB, RGB])) and found.labels is None
    line = "3 pictures of 3 x 2, RGB; left out: 4 hidden, 1 .heic, 1 .txt"
    assert f"{tmp_path}: {line}" in heard
    assert "pictures of the kinds .heic are not read" in heard


def test_links_in_a_circle_end_and_links_to_what_was_read_are_said(tmp_path, caplog):
    folder(tmp_path, a=of(RGB), x__b=of(RGB))
    (tmp_path / "x" / "round").symlink_to(tmp_path)
    (tmp_path / "z.png").symlink_to(tmp_path / "a.png")
    found, heard = read_and_heard(caplog, tmp_path)
    assert len(found.images) == 2 and "left out: 2 that are links to what was read" in heard


def test_folders_of_classes_give_the_labels(tmp_path, caplog):
    folder(tmp_path, dog__1=of(RGB), dog__2=of(RGB), cat__deep__1=of(RGB))
    found, heard = read_and_heard(caplog, tmp_path)
    assert found.labels is not None and found.labels.tolist() == [0, 1, 1]
    assert (found.names, found.classes) == (("cat", "dog"), 2)
    assert "2 classes (cat, dog)" in heard


def test_classes_that_are_numbers_keep_their_order(tmp_path):
    folder(tmp_path, **{f"{n}__a": of(RGB) for n in (10, 9, 2)})
    found = read_pictures(tmp_path)
    assert found.labels is not None and found.names == ("2", "9", "10")
    assert found.labels.tolist() == [2, 0, 1]  # the files are in order of names


def test_train_and_test_are_no_classes(tmp_path):
    assert read_pictures(folder(tmp_path, train__a=of(RGB), test__a=of(RGB))).labels is None


def test_grey_among_rgb_becomes_rgb_and_is_said(tmp_path, caplog):
    found, heard = read_and_heard(caplog, folder(tmp_path, a=of(GREY), b=of(RGB), c=of(GREY)))
    assert np.array_equal(
        found.images, np.stack([GREY[..., None].repeat(3, -1), RGB, GREY[..., None].repeat(3, -1)])
    )
    assert "2 pictures grey, and made RGB" in heard


def test_pictures_of_several_sizes_name_two_and_the_way_out(tmp_path):
    folder(tmp_path, a=of(RGB), b=of(RGB.repeat(2, 0)))
    with pytest.raises(ValueError, match=r"b\.png is 3 x 4 pixels, .*a\.png is 3 x 2.*--size"):
        read_pictures(tmp_path)


def test_a_size_cuts_the_middle_and_scales_it(tmp_path, caplog):
    tall = np.zeros((12, 4), np.uint8)
    tall[:4], tall[4:8, :2] = 90, 200
    found, heard = read_and_heard(caplog, folder(tmp_path, a=of(tall), b=of(GREY[:2, :2])), size=2)
    middle = np.array([[200, 0], [200, 0]])
    assert (
        np.abs(found.images[0, ..., 0].numpy().astype(int) - middle).max() <= 30
    )  # a bicubic filter is wide
    assert np.array_equal(found.images[1, ..., 0], GREY[:2, :2])
    assert "1 picture cut to the middle" in heard and "scaled down" in heard


def test_a_picture_is_averaged_when_it_is_scaled_down_and_said_to_gain_nothing_when_up():
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
    assert np.abs(fitted(board, (8, 8)).pixels.astype(int) - 127).max() <= 2
    assert "no detail" in fitted(board, (128, 128)).notes[0]
    assert fitted(board[:48], (6, 8)).notes == ("scaled down",)


@pytest.mark.parametrize("size", [0, 5000, (8, 0)])
def test_a_size_that_is_none_is_refused(size, tmp_path):
    with pytest.raises(ValueError, match="size must be 1 to 4096"):
        read_pictures(tmp_path, size=size)


BATCH = torch.arange(5 * 4 * 6 * 3).view(5, 4, 6, 3).byte().numpy()
ARRAYS = {
    "RGB": (BATCH, BATCH),
    "grey": (BATCH[..., 0], BATCH[..., :1]),
    "channels first": (BATCH.transpose(0, 3, 1, 2), BATCH),
    "one grey channel first": (BATCH[..., :1].transpose(0, 3, 1, 2), BATCH[..., :1]),
    "columns first in memory": (np.asfortranarray(BATCH), BATCH),
}


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("case", ARRAYS)
def test_an_array_of_pictures_is_read_in_its_layout(case, suffix, tmp_path, monkeypatch):
    array, expected = ARRAYS[case]
    monkeypatch.setattr(pictures, "MAPPED", 0)  # an .npy of any size stays on disk
    np.save(tmp_path / "a.npy", array) if suffix == "npy" else np.savez(tmp_path / "a.npz", array)
    assert np.array_equal(read_pictures(tmp_path / f"a.{suffix}").images, expected)


@pytest.mark.parametrize("columns", [1, 2])
def test_labels_of_an_npz_may_be_a_column_and_no_table(columns, tmp_path):
    labels = np.arange(5 * columns).reshape(5, columns)
    np.savez(tmp_path / "a.npz", x_train=BATCH, y=labels)
    found = read_pictures(tmp_path / "a.npz").labels
    assert (found.tolist() if found is not None else None) == (
        [*range(5)] if columns == 1 else None
    )


@pytest.mark.parametrize("name", ["labels", "y", "any_name"])
def test_an_npz_keeps_the_labels_beside_its_images(name, tmp_path, caplog):
    labels = np.array([3, 1, 4, 1, 5], np.uint8)
    np.savez(tmp_path / "a.npz", x_train=BATCH, **{name: labels}, names=np.array(["one", "two"]))
    found, heard = read_and_heard(caplog, tmp_path / "a.npz")
    assert found.labels is not None and found.labels.tolist() == labels.tolist()
    assert f"5 pictures of 6 x 4, RGB; classes from {name}" in heard


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"a": BATCH.astype(np.float32)}, "float32 .* images are uint8"),
        ({"a": BATCH.astype(np.uint16)}, "uint16 .* images are uint8"),
        ({"a": np.zeros((5, 3, 4, 3), np.uint8)}, r"\[5, 3, 4, 3\]; images are"),
        ({"a": np.zeros((4, 6, 3), np.uint8)}, r"\[4, 6, 3\]; images are"),
        ({"a": np.zeros((5, 784), np.uint8)}, r"\[5, 784\]; images are"),
        ({"a": np.zeros((5, 4, 6, 4), np.uint8)}, r"\[5, 4, 6, 4\]; images are"),
        ({"a": np.zeros((0, 4, 6, 3), np.uint8)}, r"\[0, 4, 6, 3\]; images are"),
        ({"x_train": BATCH, "x_test": BATCH}, "holds x_train, x_test; which are the images"),
    ],
    ids=lambda x: "" if isinstance(x, dict) else x,
)
def test_an_array_that_may_be_something_else_is_refused_in_one_line(arrays, said, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"\A[^\n]*a\.npz[^\n]*{said}[^\n]*\Z"):
        read_pictures(tmp_path / "a.npz")


def archive(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
        link = tarfile.TarInfo("away.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path


def shard(path: Path, *keys: int) -> Path:
    members = {}
    for key in keys:
        members |= {f"{key:03}.png": of(RGB // (key + 1)), f"{key:03}.cls": str(key % 2).encode()}
    return archive(path, **members, **{"._000.png": b""})


def test_a_webdataset_is_read_with_its_labels_and_no_link_is_followed(tmp_path, caplog):
    shard(tmp_path / "data-000.tar", 0, 1)
    shard(tmp_path / "data-001.tar", 2)
    expected = np.stack([RGB, RGB // 2, RGB // 3])
    for name in ("", "data-{000..001}.tar", "data-*.tar", "{data-000,data-001}.tar"):
        caplog.clear()
        found, heard = read_and_heard(caplog, f"{tmp_path}/{name}".rstrip("/"))
        assert np.array_equal(found.images, expected)
        assert found.labels is not None and found.labels.tolist() == [0, 1, 0]
        assert "3 pictures of 3 x 2, RGB; 2 classes (0, 1); left out: 2 hidden, 2 .png" in heard


def test_what_a_webdataset_holds_beside_pictures_and_labels_is_counted(tmp_path, caplog):
    members = {"0.png": of(RGB), "0.txt": b"a cat", "1.png": of(RGB), "1.txt": b"a dog"}
    found, heard = read_and_heard(caplog, archive(tmp_path / "data.tar", **members))
    assert len(found.images) == 2 and "left out: 1 .png, 2 .txt" in heard


@pytest.mark.parametrize(("first", "last"), [(5, 4), (0, 100_000)])
def test_a_range_of_archives_that_is_empty_or_endless_is_refused(tmp_path, first, last):
    with pytest.raises(ValueError, match=f"from {first} to {last} are too many files, or none"):
        read_pictures(f"{tmp_path}/data-{{{first}..{last}}}.tar")


def test_a_webdataset_tells_its_labels_in_json(tmp_path):
    members = {f"{i}.json": json.dumps({"label": i, "text": "a"}).encode() for i in (4, 7)}
    found = read_pictures(
        archive(tmp_path / "a.tar", **{"4.jpg": of(GREY), "7.jpg": of(GREY)}, **members)
    )
    assert found.labels is not None and found.labels.tolist() == [4, 7]


def test_arrays_in_an_archive_are_pictures(tmp_path):
    file = io.BytesIO()
    np.save(file, RGB)
    noise = io.BytesIO()
    np.save(noise, RGB.astype(np.float32))
    members = {"0.image.npy": file.getvalue(), "0.noise.npy": noise.getvalue()}
    assert np.array_equal(read_pictures(archive(tmp_path / "a.tar", **members)).images[0], RGB)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tar: tar[:900], "a.tar"),
        (lambda tar: b"", "not a whole tar archive"),
        (lambda tar: b"text" * 500, "not a whole tar archive"),
    ],
    ids=["cut", "empty", "text"],
)
def test_an_archive_that_is_damaged_is_named(change, said, tmp_path):
    path = shard(tmp_path / "a.tar", 0, 1)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"\A[^\n]*{said}[^\n]*\Z"):
        read_pictures(path)


def test_samples_of_an_image_and_its_mask_are_refused(tmp_path):
    members = {f"{i}.{name}.png": of(GREY) for i in (0, 1) for name in ("image", "mask")}
    with pytest.raises(ValueError, match=r"several pictures \(image.png, mask.png\)"):
        read_pictures(archive(tmp_path / "a.tar", **members))


@pytest.mark.parametrize("name", ["nowhere", "no-{0..1}.tar", "no-*.npz"])
def test_pictures_that_are_not_there_are_named(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        read_pictures(tmp_path / name)


def test_more_pictures_than_the_memory_holds_are_refused_before_they_are_read(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("ds.system.cost.free_memory", lambda device: 30.0)
    with pytest.raises(ValueError, match="2 pictures of 3 x 2 needs 36 bytes of memory"):
        read_pictures(folder(tmp_path, a=of(RGB), b=of(RGB)))
