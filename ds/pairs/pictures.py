"""Sets of pictures, as people keep them: folders, NumPy arrays, WebDataset archives."""

import glob
import io
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ds.pairs.image_file import Picture, fitted, read_picture
from ds.system.arrays import Header, map_array, read_arrays, read_header, read_headers
from ds.system.cost import check_memory
from ds.system.files import opened, parse_json, read_bytes, small, whole

SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
)
# Pictures that are not read: to leave them out is worth a warning.
FOREIGN = {
    ".avif",
    ".heic",
    ".heif",
    ".jp2",
    ".jxl",
    ".svg",
    ".psd",
    ".tga",
    ".exr",
    ".dng",
    ".cr2",
    ".nef",
    ".arw",
}
SPLITS = {"train", "training", "val", "valid", "validation", "test"}  # no classes of pictures
LARGEST = 1 << 30  # bytes of a file with one picture
MAPPED = 1 << 28  # bytes from which an .npy stays on disk, and is read as it is needed
_HIDDEN = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}
_ARRAYS = {"npy", "image.npy", "img.npy"}  # suffixes of pictures in an archive
_LABELS = ("labels", "label", "y", "targets", "target", "classes")
log = logging.getLogger("ds")
Sides = tuple[int, int]


class Pictures(NamedTuple):
    """Pictures, uint8 [N, H, W, 1 or 3], and their classes, int64 [N], if they are known.

    `names` are those of class 0, 1 and so on, where folders tell them.
    """

    images: Tensor
    labels: Tensor | None = None
    names: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """The number of classes, the largest label and 1; 0 without labels."""
        return 0 if self.labels is None else max(0, int(self.labels.max()) + 1)

    def named(self, names: Sequence[str]) -> "Pictures":
        """Return the pictures with the numbers that classes of these names have.

        Without names on either side, numbers stay. Raises ValueError for a name that is not there.
        """
        if self.labels is None or not names or not self.names:
            return self
        if unknown := [name for name in self.names if name not in names]:
            raise ValueError(
                f"pictures of the class {unknown[0]!r}: it is not among the classes of the model, "
                f"{', '.join(names[:10])}{', ...' * (len(names) > 10)}"
            )
        numbers = [names.index(name) for name in self.names]
        known = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        return Pictures(self.images, known[self.labels], tuple(names))


class _Item(NamedTuple):
    """A picture that was found, and is not read yet."""

    name: str
    read: Callable[[], Picture]
    label: str | int | None = None


class _Found:
    """The pictures of a folder or of archives, and how many of what else is left out."""

    def __init__(self) -> None:
        self.items: list[_Item] = []
        self.hidden = self.twice = 0
        self.other: Counter[str] = Counter()

    def leave(self, name: str) -> None:
        """Count a name that is not read."""
        if _is_hidden(name):
            self.hidden += 1
        else:
            self.other[Path(name).suffix.lower() or "without a suffix"] += 1

    @property
    def left_out(self) -> str:
        """What was left out, as the end of a sentence."""
        said = [f"{self.hidden} hidden"] if self.hidden else []
        said += [f"{self.twice} that are links to what was read"] if self.twice else []
        said += [f"{n} {suffix}" for suffix, n in sorted(self.other.items())]
        return f"; left out: {', '.join(said)}" if said else ""


class _Notes:
    """What was done to pictures: how many, and to which first."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, name: str, *notes: str) -> None:
        self.count.update(notes)
        for note in notes:
            self.first.setdefault(note, name)

    def log(self, path: Any) -> None:
        for note, n in self.count.items():
            log.warning("%s: %s %s (first: %s)", path, _pictures(n), note, self.first[note])


class _Stack:
    """Pictures of one size, put together in memory one by one."""

    def __init__(self, count: int):
        self.count, self.images, self.first = count, np.empty((0, 0, 0, 0), np.uint8), ""
        self.grey = 0

    def put(self, i: int, name: str, pixels: np.ndarray) -> None:
        """Add picture i. Raise ValueError if its size is not that of the first one."""
        h, w, c = pixels.shape
        if i == 0:
            self.images, self.first = self._empty(h, w, c), name
        high, wide, channels = self.images.shape[1:]
        if (h, w) != (high, wide):
            raise ValueError(
                f"{name} is {w} x {h} pixels, {self.first} is {wide} x {high}; give one size to "
                f"cut and scale all of them to, such as --size 32"
            )
        if c > channels:
            grey, self.images = self.images, self._empty(h, w, c)
            self.images[:i] = grey[:i]
        self.grey += c == 1
        self.images[i] = pixels

    def _empty(self, h: int, w: int, c: int) -> np.ndarray:
        check_memory(f"{self.count:,} pictures of {w} x {h}", self.count * h * w * c)
        return np.empty((self.count, h, w, c), np.uint8)


def read_pictures(path: str | Path, *, size: int | Sides | None = None) -> Pictures:
    """Return the pictures of a folder, of an .npy or .npz, or of WebDataset archives.

    A folder is read with the folders in it, in the order of the names. If each picture lies in one
    of several folders, those are the classes. An array is uint8 [N, H, W] or [N, H, W, 1 or 3]; an
    .npz may have labels beside it. Archives are a .tar, a folder of them, or a pattern:
    data-{000..003}.tar or data-*.tar. Nothing is unpacked to disk.

    `size`, one side or (H, W), cuts the middle of that ratio out of every picture and scales it.
    Logs how many pictures were read, and what was converted or left out. Raises ValueError, naming
    the file, for what cannot be read, for several sizes without `size`, and for more pictures than
    the memory holds; FileNotFoundError if nothing is there.
    """
    sides = (size, size) if isinstance(size, int) else size
    if sides and not all(isinstance(s, int) and 1 <= s <= 4096 for s in sides):
        raise ValueError(f"size must be 1 to 4096 pixels, not {size}")
    places = _places(path)
    folder = places[0] if len(places) == 1 and places[0].is_dir() else None
    if folder is None and all(p.suffix.lower() == ".tar" for p in places):
        return _read(path, _members(places), sides)
    if folder is None and len(places) == 1:
        return _read_array(places[0], sides)
    if folder is None:
        raise ValueError(f"{path}: {len(places)} files; several must all be .tar archives")
    found = _walk(folder)
    tars = sorted(p for p in folder.glob("*.tar") if not _is_hidden(p.name))
    return _read(path, _members(tars) if tars and not found.items else found, sides)


def split(n: int, held_out: int | None = None) -> tuple[Tensor, Tensor]:
    """Return which of n pictures to train on, int64, and which others to hold out.

    By default a tenth is held out, 8 to 1024 of them. Which ones depends on n alone. Raises
    ValueError unless two or more are left to train on.
    """
    count = min(1024, max(8, n // 10)) if held_out is None else held_out
    if not 1 <= count <= n - 2:
        raise ValueError(
            f"{_pictures(n)} cannot be split into {count} to hold out and 2 or more to train on; "
            f"bring more pictures"
        )
    order = torch.randperm(
        n, generator=torch.Generator().manual_seed(n), dtype=torch.int64, device="cpu"
    )
    return order[count:].sort().values, order[:count].sort().values


def _is_hidden(name: str) -> bool:
    """Return whether a name, or a folder in it, is one that file managers and editors leave."""
    return any(part[:1] == "." or part.lower() in _HIDDEN for part in Path(name).parts)


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _places(path: str | Path) -> list[Path]:
    """Return the folder or the files that a path or a pattern names."""
    if os.path.lexists(path):
        return [Path(path)]
    found = [p for name in _braces(str(path)) for p in sorted(glob.glob(name)) or [name]]
    missing = next((p for p in found if not os.path.lexists(p)), None)
    if missing is not None:
        raise FileNotFoundError(f"{missing}: there is no such file or folder")
    return [Path(p) for p in found]


def _braces(text: str) -> list[str]:
    """Return the names of a pattern such as data-{000..003}.tar or {a,b}.tar."""
    found = re.search(r"\{([^{}]*)\}", text)
    if not found:
        return [text]
    choices = found[1].split(",")
    if ends := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", found[1]):
        first, last = int(ends[1]), int(ends[2])
        if not 0 <= last - first < 100_000:
            raise ValueError(f"{text}: from {first} to {last} are too many files, or none")
        choices = [f"{i:0{len(ends[1])}d}" for i in range(first, last + 1)]
    before, after = text[: found.start()], text[found.end() :]
    return [before + choice + rest for choice in choices for rest in _braces(after)]


def _walk(folder: Path) -> _Found:
    """Find the pictures in a folder and in those below it, each file and folder once."""
    found = _Found()
    seen: set[tuple[int, int]] = set()

    def known(path: Path | os.DirEntry) -> bool:
        try:
            about = os.stat(path)
        except FileNotFoundError:  # a link to nothing, which is refused when it is read
            return False
        key = about.st_dev, about.st_ino
        if key in seen:
            found.twice += 1
            return True
        seen.add(key)
        return False

    def walk(above: str | Path) -> None:
        for entry in sorted(os.scandir(above), key=lambda e: e.name):
            is_picture = _is_picture(entry.name)
            if _is_hidden(entry.name) or not (entry.is_dir() or is_picture):
                found.leave(entry.name)
            elif known(entry):
                continue
            elif not is_picture:
                walk(entry.path)
            else:
                inside = Path(entry.path).relative_to(folder)
                label = inside.parts[0] if len(inside.parts) > 1 else None
                found.items.append(_Item(entry.path, partial(_file, entry.path), label))

    known(folder)
    walk(folder)
    return found


def _file(path: str) -> Picture:
    return read_picture(read_bytes(Path(path), LARGEST), path)


def _members(paths: list[Path]) -> _Found:
    """Find the pictures in WebDataset archives, whose samples are files of one name."""
    found = _Found()
    for path in paths:
        labels: dict[str, int | None] = {}
        pictures: list[tuple[str, str, _Item]] = []  # key, suffixes, picture
        with (
            opened(path) as file,
            whole(path, "tar archive"),
            tarfile.open(None, "r:", file) as tar,
        ):
            for member in tar:
                if member.isdir():
                    continue
                key, _, suffixes = _split(member.name)
                regular = member.isreg() and not member.issparse()
                if not regular or _is_hidden(member.name):
                    found.leave(member.name)
                elif _is_picture(member.name) or suffixes.lower() in _ARRAYS:
                    read = partial(_member, path, member.name, member.offset_data, member.size)
                    pictures.append((key, suffixes, _Item(f"{path}: {member.name}", read)))
                elif suffixes in ("cls", "json") and member.size < 1 << 20:
                    content = tar.extractfile(member)
                    labels.setdefault(key, _label(content.read() if content else b"", suffixes))
                else:
                    found.leave(member.name)
        _check_one_each(path, pictures)
        found.items += [item._replace(label=labels.get(key)) for key, _, item in pictures]
    return found


def _split(name: str) -> tuple[str, str, str]:
    """Return the key of a file in a WebDataset archive, a dot, and its suffixes."""
    folder, slash, base = name.rpartition("/")
    key, dot, suffixes = base.partition(".")
    return f"{folder}{slash}{key}", dot, suffixes


def _label(content: bytes, kind: str) -> int | None:
    """Return the class that a .cls or .json of a sample tells; None if it tells none."""
    try:
        if kind == "cls":
            return int(content)
        about = parse_json(content, "")
    except ValueError:
        return None
    found = (about.get(name) for name in ("label", "cls", "class", "y") if isinstance(about, dict))
    return next((x for x in found if isinstance(x, int)), None)


def _check_one_each(path: Path, pictures: list[tuple[str, str, _Item]]) -> None:
    """Raise ValueError if samples have several pictures, such as an image and its mask."""
    keys = Counter(key for key, _, _ in pictures)
    kinds = Counter(suffixes for key, suffixes, _ in pictures if keys[key] > 1)
    if kinds and max(kinds.values()) > 1:
        raise ValueError(
            f"{path}: a sample has several pictures ({', '.join(sorted(kinds)[:3])}); keep one of "
            f"them in the archive"
        )


def _member(path: Path, name: str, start: int, size: int) -> Picture:
    """Read a picture in an archive, from where its header says that it is."""
    where = f"{path}: {name}"
    with opened(path) as file:
        file.seek(start)
        content = small(file.read(min(size, LARGEST + 1)), where, LARGEST)
    if not name.lower().endswith(".npy"):
        return read_picture(content, where)
    stream = io.BytesIO(content)
    shape, fortran, dtype = read_header(stream, len(content), where)
    if dtype != np.uint8 or len(shape) not in (2, 3) or shape[2:] not in ((), (1,), (3,)):
        raise ValueError(f"{where}: {dtype} {list(shape)}; a picture is uint8 [H, W, 1 or 3]")
    pixels = np.frombuffer(content[stream.tell() :], np.uint8)
    pixels = pixels.reshape(shape, order="F" if fortran else "C")
    return Picture(np.ascontiguousarray(pixels.reshape(*shape[:2], -1)))


def _read(path: Any, found: _Found, sides: Sides | None) -> Pictures:
    """Read what was found, and say how many pictures that is."""
    if not found.items:
        kinds = ", ".join(SUFFIXES)
        raise ValueError(f"{path}: no picture is there ({kinds}){found.left_out}")
    stack, notes = _Stack(len(found.items)), _Notes()
    for i, item in enumerate(found.items):
        picture = item.read()
        notes.add(item.name, *picture.notes)
        if sides:
            picture = fitted(picture.pixels, sides)
            notes.add(item.name, *picture.notes)
        stack.put(i, item.name, picture.pixels)
    labels, names, classes = _classes(found.items)
    _say(path, stack.images, classes + found.left_out)
    if 0 < stack.grey < len(found.items):
        log.warning("%s: %s grey, and made RGB", path, _pictures(stack.grey))
    if foreign := sorted(FOREIGN & found.other.keys()):
        log.warning("%s: pictures of the kinds %s are not read", path, ", ".join(foreign))
    notes.log(path)
    return Pictures(torch.from_numpy(stack.images), labels, names)


def _say(path: Any, images: Any, more: str) -> None:
    n, h, w, c = images.shape
    kind = "RGB" if c == 3 else "grey"
    log.info("%s: %s of %d x %d, %s%s", path, _pictures(n), w, h, kind, more)


def _pictures(n: int) -> str:
    return f"{n:,} picture{'s' if n != 1 else ''}"


def _classes(items: list[_Item]) -> tuple[Tensor | None, tuple[str, ...], str]:
    """Return the class of each picture, the names of the folders, and what to say about them.

    Folders that are numbers keep that order. An archive's classes are numbers as they stand.
    """
    labels = [item.label for item in items]
    names = sorted(
        {str(label) for label in labels}, key=lambda x: x.zfill(9) if x.isdecimal() else x
    )
    if None in labels or len(names) < 2 or {name.lower() for name in names} <= SPLITS:
        return None, (), ""
    numbers = [x if isinstance(x, int) else names.index(str(x)) for x in labels]
    said = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    found = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    folders = all(isinstance(label, str) for label in labels)
    return found, tuple(names) if folders else (), f"; {len(names)} classes ({said})"


def _read_array(path: Path, sides: Sides | None) -> Pictures:
    if path.suffix.lower() == ".zip" or _is_picture(path.name):
        what = "a zip file; unpack it" if path.suffix.lower() == ".zip" else "one picture"
        raise ValueError(f"{path}: {what}, and give the folder of the pictures")
    headers = read_headers(path)
    name = _images_in(path, headers)
    header = headers[name] or _unread(path, name)
    first = _is_channels_first(path, header)
    size = int(np.prod(header.shape, dtype=object))
    if name == "" and size >= MAPPED and not header.fortran:
        array = map_array(path, header)
    else:
        check_memory(f"{path}: {header.shape[0]:,} pictures", size)
        array = torch.from_numpy(read_arrays(path, name)[name])
    images = array[..., None] if array.dim() == 3 else array
    if first:
        log.warning("%s: channels come first in %s; they were turned", path, list(array.shape))
        images = array.movedim(1, -1).contiguous()
    notes = _Notes()
    if sides and tuple(images.shape[1:3]) != sides:
        images = _all_fitted(images, sides, notes)
    labels, said = _labels_in(path, headers, len(images))
    _say(path, images, said)
    notes.log(path)
    return Pictures(images, labels)


def _unread(path: Path, name: str) -> Header:
    """Raise what is wrong with an array."""
    array = read_arrays(path, name)[name]
    return Header(array.shape, False, array.dtype)


def _all_fitted(images: Tensor, sides: Sides, notes: _Notes) -> Tensor:
    stack = _Stack(len(images))
    for i, image in enumerate(images):
        picture = fitted(image.numpy(), sides)
        notes.add(f"number {i}", *picture.notes)
        stack.put(i, f"number {i}", picture.pixels)
    return torch.from_numpy(stack.images)


def _images_in(path: Path, headers: dict[str, Header | None]) -> str:
    """Return the name of the array of images."""
    if "images" in headers:
        return "images"
    like = [name for name, h in headers.items() if h and len(h.shape) in (3, 4)]
    if len(headers) == 1:
        return next(iter(headers))
    if len(like) != 1:
        names = ", ".join([*headers][:5]) or "no arrays"
        raise ValueError(f"{path}: holds {names}; which are the images? call that array images")
    return like[0]


def _is_channels_first(path: Path, header: Header) -> bool:
    """Return whether images are [N, C, H, W]. Raise ValueError if they are no pictures."""
    shape = list(header.shape)
    what = f"{path}: {header.dtype} {shape}"
    if header.dtype != np.uint8:
        raise ValueError(f"{what}; images are uint8, 0 to 255: scale, round and convert them first")
    front, back = len(shape) == 4 and shape[1] in (1, 3), len(shape) == 4 and shape[3] in (1, 3)
    flat = len(shape) == 3 and not {shape[0], shape[2]} & {1, 3, 4}
    if 0 in shape or (front and back and shape[1:] != [1, 1, 1]) or not (front or back or flat):
        raise ValueError(f"{what}; images are [N, H, W] or [N, H, W, 1 or 3]: bring them to that")
    return front and not back


def _labels_in(
    path: Path, headers: dict[str, Header | None], count: int
) -> tuple[Tensor | None, str]:
    """Return the labels that lie beside images, and what to say about them."""
    fit = [
        name
        for name, h in headers.items()
        if h and h.dtype.kind in "iu" and h.shape in ((count,), (count, 1))
    ]
    named = [name for known in _LABELS for name in fit if name.lower() == known]
    if not (chosen := named[:1] or (fit if len(fit) == 1 else [])):
        return None, ""
    labels = torch.from_numpy(read_arrays(path, chosen[0])[chosen[0]].astype(np.int64)).flatten()
    return labels, f"; classes from {chosen[0]}"
