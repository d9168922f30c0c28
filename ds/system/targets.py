"""What may be written where a person says, decided before any work is done for it.

A path is taken as `cp` takes it: links are followed, directories above it are made later. What is
there and was not made by us is left alone; what was is replaced only on request. Every directory
that we make has a file in it that says what it is, and so which names in it are ours.
"""

import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ds.system.files import kind_of, read_json
from ds.system.staging import check_plain, is_stage, recover, staging, write_json

MARK = ".denoising-student.json"  # in a directory that has no other file to say what it is
MOUNTS = Path("/proc/self/mountinfo")
Ours = Callable[[str], bool]  # whether a relative name in a directory is one of ours
Inputs = Iterable[str | Path | None]


def file(path: str | Path, *, force: bool = False, apart: Inputs = ()) -> Path:
    """Return where the file of this name is to be written, links followed.

    Raises ValueError for a place that cannot be written to, one that is, contains or lies in an
    input of the same work (`apart`), and where something is: with `force`, a file gives way.
    """
    where = _followed(path)
    about = _there(where)
    if about and not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{path}: is {kind_of(about.st_mode)}; give the name of a file")
    if about and not force:
        raise ValueError(f"{path}: is there already; use another name, or force (--force)")
    if about and _is_mounted(where):
        raise ValueError(f"{path}: is a mount point, which nothing can replace; use another name")
    if about and not _may_replace(where, about):
        raise ValueError(f"{path}: is another user's, in a directory where only they replace it")
    _check_apart(path, where, apart)
    _check_writable(path, where.parent)
    return where


def directory(
    path: str | Path, kind: str, ours: Callable[[Path], Ours | None], *,
    force: bool = False, again: bool = False, apart: Inputs = (),
) -> tuple[Path, list[str]]:  # fmt: skip
    """Return where a new directory of this kind is to be, and the files there that give way to it.

    `ours` says of a directory which names in it are ours, None if it is of another kind. `again`
    allows for what the same work made before, and leaves other files beside it. Raises ValueError
    as `file` does; with `force` an older one gives way, if all that is in it is ours.
    """
    where = _followed(path)
    old: list[str] = []
    if _is_directory(path, where) and (first := _first(where)):
        names = ours(where)
        if names is None:
            raise ValueError(f"{path}: holds {first}, and is no {kind} of ours; use another name")
        if not (force or again):
            raise ValueError(
                f"{path}: holds a {kind} already; use another name, or force (--force)"
            )
        there = _names(where)
        foreign = [name for name in there if not names(name)]
        if foreign and not again:
            raise ValueError(
                f"{path}: holds {foreign[0]}, which is not ours; move it, or use another name"
            )
        old = [name for name in there if names(name)]
        for name in old:
            check_plain(where / name)
    _check_apart(path, where, apart)
    _check_writable(path, where)
    return where, old


def kept(path: str | Path, kind: str, sign: str, *, apart: Inputs = ()) -> Path:
    """Return where a directory is to be that is made bit by bit: that of a store, of a run.

    It may be there already if it has the file `sign`; what else is in it stays. Raises ValueError
    as `directory` does.
    """
    where = _followed(path)
    if _is_directory(path, where) and (first := _first(where)):
        check_plain(where / sign)
        if not (where / sign).exists():
            raise ValueError(f"{path}: holds {first}, and is no {kind} of ours; use another name")
    _check_apart(path, where, apart)
    _check_writable(path, where)
    return where


def numbered(name: str, suffix: str, count: int) -> bool:
    """Say whether a name is one of so many that are counted: 000000.png, 000001.png, ..."""
    number = name.removesuffix(suffix)
    return number.isdecimal() and int(number) < count and name == f"{int(number):06d}{suffix}"


def mark(folder: Path, kind: str, **about: Any) -> None:
    """Say in a directory what it is."""
    write_json(folder / MARK, {"format": f"denoising-student/{kind}/1", **about})


def marked(folder: Path, kind: str) -> dict[str, Any] | None:
    """Return what `mark` has said in a directory, None if it did not say this kind."""
    check_plain(folder / MARK)
    if not (folder / MARK).exists():
        return None
    about = read_json(folder / MARK)
    ours = isinstance(about, dict) and about.get("format") == f"denoising-student/{kind}/1"
    return about if ours else None


def _followed(path: str | Path) -> Path:
    """Return where a path leads, every link in it followed; ValueError for one to nothing."""
    path = Path(path)
    for step in (path, *path.parents):
        if os.path.lexists(step):
            if not step.exists():
                raise ValueError(f"{path}: {step} is a link to nothing; remove it")
            if step != path and not step.is_dir():
                raise ValueError(f"{path}: {step} is no directory")
            break
    return Path(os.path.realpath(path))


def _there(where: Path) -> os.stat_result | None:
    try:
        return os.lstat(where)
    except FileNotFoundError:
        return None


def _is_directory(path: str | Path, where: Path) -> bool:
    """Say whether there is a directory, made good; ValueError if there is something else."""
    about = _there(where)
    if about and not stat.S_ISDIR(about.st_mode):
        raise ValueError(f"{path}: is {kind_of(about.st_mode)}; give the name of a directory")
    recover(where)
    return about is not None


def _first(folder: Path) -> str | None:
    """Name something in a directory; a lock, and what is just being made there, do not count."""
    names = sorted(os.listdir(folder))
    return next((n for n in names if n != ".lock" and not is_stage(n)), None)


def _names(folder: Path) -> list[str]:
    """Return the relative names of all files below a directory, and of those that hold none."""
    found: list[Path] = []
    for above, folders, files in os.walk(folder):
        inside = Path(above).relative_to(folder)
        folders[:] = [name for name in folders if not is_stage(name)]
        links = (name for name in folders if (folder / inside / name).is_symlink())
        found += [inside / name for name in (*files, *links)]
        if not (files or folders):
            found.append(inside)
    return sorted(str(name) for name in found if str(name) != ".lock")


def _check_apart(path: str | Path, where: Path, apart: Inputs) -> None:
    for given in apart:
        if given is None or "://" in str(given):
            continue
        source = Path(os.path.realpath(given))
        if _within(where, source) or _within(source, where):
            raise ValueError(
                f"{path}: is, holds or lies in {given}, which is read; use another name"
            )


def _within(path: Path, folder: Path) -> bool:
    """Say whether a path is a file or a directory, or below it, under whatever name."""
    steps = (path, *path.parents)
    there = folder.exists()
    return folder in steps or (there and any(s.exists() and s.samefile(folder) for s in steps))


def _is_mounted(where: Path) -> bool:
    """Say whether a file is mounted in its place, as containers do, be it from the same disk."""
    named = "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in str(where))
    with suppress(FileNotFoundError):
        mounts = MOUNTS.read_text(errors="surrogateescape")
        return any(line.split(" ")[4] == named for line in mounts.splitlines())
    return False


def _may_replace(where: Path, about: os.stat_result) -> bool:
    above, me = os.stat(where.parent), os.geteuid()
    return not above.st_mode & stat.S_ISVTX or me in (0, about.st_uid, above.st_uid)


def _check_writable(path: str | Path, folder: Path) -> None:
    """Try to make something in a directory, or in the nearest above it that is there."""
    while not folder.exists():
        folder = folder.parent
    try:
        with staging(folder):
            pass
    except OSError as error:
        raise ValueError(f"{path}: {folder} cannot be written to ({error.strerror})") from None
