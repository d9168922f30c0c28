"""Decide whether a path may be written, before any work is done for it.

Paths work as with `cp`: links are followed, and missing parent directories are made later. Files of
others are never replaced; our own are replaced only on request. Every directory that we make holds
a file that says what the directory is, and so which names in it are ours.
"""

import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ds.system.files import kind_of, read_json
from ds.system.staging import check_plain, is_stage, recover, staging, write_json

MARK = ".denoising-student.json"  # in a directory whose kind no other file tells
MOUNTS = Path("/proc/self/mountinfo")
Ours = Callable[[str], bool]  # whether a relative name in a directory is one of ours
Inputs = Iterable[str | Path | None]


def file(path: str | Path, *, force: bool = False, apart: Inputs = ()) -> Path:
    """Return the path at which to write a file, with links followed.

    Raises ValueError if the path cannot be written, if it is, contains or lies inside one of the
    inputs `apart`, and if it exists. With `force` an existing file is accepted.
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
    path: str | Path,
    kind: str,
    ours: Callable[[Path], Ours | None],
    *,
    force: bool = False,
    again: bool = False,
    apart: Inputs = (),
) -> tuple[Path, list[str]]:
    """Return the path at which to write a directory, and the files there that it replaces.

    `ours` returns a test for our names in a directory, or None if it is of another kind. With
    `force` an existing directory is replaced if all its files are ours. With `again`, for repeated
    work, other files may lie beside ours. Raises ValueError as `file` does.
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
    """Return the path of a directory that grows in steps, such as a store or a run.

    It may exist if it holds the file `sign`; its other files stay. Raises ValueError as `directory`
    does.
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
    """Return whether a name is one of `count` numbered ones: 000000.png, ..."""
    number = name.removesuffix(suffix)
    return number.isdecimal() and int(number) < count and name == f"{int(number):06d}{suffix}"


def mark(folder: Path, kind: str, **about: Any) -> None:
    """Write a file into a directory that says what the directory is."""
    write_json(folder / MARK, {"format": f"denoising-student/{kind}/1", **about})


def marked(folder: Path, kind: str) -> dict[str, Any] | None:
    """Return what `mark` wrote into a directory, or None if it is not of this kind."""
    check_plain(folder / MARK)
    if not (folder / MARK).exists():
        return None
    about = read_json(folder / MARK)
    ours = isinstance(about, dict) and about.get("format") == f"denoising-student/{kind}/1"
    return about if ours else None


def _followed(path: str | Path) -> Path:
    """Return a path with every link followed. Raise ValueError for a broken link."""
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
    """Return whether a directory is there, after `recover`. Raise ValueError if it is a file."""
    about = _there(where)
    if about and not stat.S_ISDIR(about.st_mode):
        raise ValueError(f"{path}: is {kind_of(about.st_mode)}; give the name of a directory")
    recover(where)
    return about is not None


def _first(folder: Path) -> str | None:
    """Return the first name in a directory, other than a lock or a stage, or None."""
    names = sorted(os.listdir(folder))
    return next((n for n in names if n != ".lock" and not is_stage(n)), None)


def _names(folder: Path) -> list[str]:
    """Return the relative names of all files and empty directories below a directory."""
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
    """Return whether a path is `folder` or lies below it, under whatever name."""
    steps = (path, *path.parents)
    there = folder.exists()
    return folder in steps or (there and any(s.exists() and s.samefile(folder) for s in steps))


def _is_mounted(where: Path) -> bool:
    """Return whether a file is a mount point, as in a container."""
    named = "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in str(where))
    with suppress(FileNotFoundError):
        mounts = MOUNTS.read_text(errors="surrogateescape")
        return any(line.split(" ")[4] == named for line in mounts.splitlines())
    return False


def _may_replace(where: Path, about: os.stat_result) -> bool:
    above, me = os.stat(where.parent), os.geteuid()
    return not above.st_mode & stat.S_ISVTX or me in (0, about.st_uid, above.st_uid)


def _check_writable(path: str | Path, folder: Path) -> None:
    """Raise ValueError if nothing can be made in a directory, or in its nearest existing parent."""
    while not folder.exists():
        folder = folder.parent
    try:
        with staging(folder):
            pass
    except OSError as error:
        raise ValueError(f"{path}: {folder} cannot be written to ({error.strerror})") from None
