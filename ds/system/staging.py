"""Files that a kill at any moment cannot damage.

Everything is made in a directory of its own beside its place, flushed to the disk and renamed, so a
name either holds the whole of the new content or the whole of the old:

    .ds-k3x8w_1f.tmp/lock     held by the process that makes it, while it lives
    .ds-k3x8w_1f.tmp/new      a file or a directory, until it is whole
    .ds-commit.tmp/           the same, while the files of `new` take their places around it
    .ds-commit.tmp/gone       what then goes: files of ours without a new one, by their names
"""

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ds.system.files import kind_of

LOCK, NEW, GONE, COMMIT = "lock", "new", "gone", ".ds-commit.tmp"
_STAGE = re.compile(r"\.ds-[a-z0-9_]{8}\.tmp")
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)  # what a rename says of a name that is


@contextmanager
def replacing(path: Path, *, force: bool = True, sweep: bool = True) -> Iterator[Path]:
    """Yield a temporary path; what is written there gets the name `path` if the block succeeds.

    It has the permissions of the umask, whoever wrote it. Without `force`, ValueError if something
    has the name by then. Without `sweep`, what the dead left beside it is left to another call.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming(path), staging(path.parent, sweep=sweep) as stage:
        yield stage / NEW
        _settle(stage)
        check_plain(path)
        if force:
            os.replace(stage / NEW, path)
        else:
            _place(stage / NEW, path)
        sync(path.parent)


@contextmanager
def replacing_directory(path: Path, old: Collection[str] = ()) -> Iterator[Path]:
    """Yield a new directory whose files are at `path`, all or none, if the block succeeds.

    One that is not there yet gets its name by a rename. In one that is there, files take their
    places one after another, and a kill in between is made good by `recover`. `old` are the files
    there that are ours, by their relative names: they give way to the new ones or, where there is
    no new one, go. Nothing else is touched: ValueError if it has the name of a new file.
    """
    there = path.is_dir()
    if not there:
        path.parent.mkdir(parents=True, exist_ok=True)
    with _naming(path), staging(path if there else path.parent) as stage:
        (stage / NEW).mkdir()
        yield stage / NEW
        _settle(stage)
        if there:
            _commit(stage, old)
        else:
            try:
                os.rename(stage / NEW, path)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                raise _meanwhile(path) from None
            sync(path.parent)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Make what the system says of a place in the making, or of none, name what is made."""
    try:
        yield
    except OSError as error:
        if error.errno and (not error.filename or ".ds-" in str(error.filename)):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextmanager
def staging(parent: Path, *, sweep: bool = True) -> Iterator[Path]:
    """Yield a directory in `parent`, to make things in that are then renamed out of it.

    It is new, has a name that nobody could know, and is gone at the end. It is locked, so that a
    second process tells the dead's from the living's: first of all, `recover` sweeps `parent`.
    """
    if sweep:
        recover(parent)
    stage, lock = _stage(parent)
    try:
        yield stage
    finally:
        _drop(stage)
        os.close(lock)


def _stage(parent: Path) -> tuple[Path, int]:
    """Make a directory and lock it; again, where it was swept away before it was locked."""
    while True:
        stage = Path(tempfile.mkdtemp(".tmp", ".ds-", parent))
        try:
            lock = open_own(stage / LOCK, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            continue
        except OSError:
            stage.rmdir()
            raise
        with suppress(OSError):  # of a file system without locks, where nothing is ever swept
            fcntl.flock(lock, fcntl.LOCK_EX)
        if is_at(lock, stage / LOCK):
            return stage, lock
        os.close(lock)


def recover(folder: Path) -> None:
    """Make good what a kill left in a directory: end what was being placed, drop what was not.

    What a living process makes is left to it, but what it places, in a moment, is waited for. Where
    nothing can be changed, nothing is.
    """
    with suppress(OSError):
        for name in os.listdir(folder):
            if is_stage(name):
                with suppress(OSError, ValueError):
                    _recover(folder / name)


def is_stage(name: str) -> bool:
    """Say whether a name is one of those under which things are made."""
    return name == COMMIT or _STAGE.fullmatch(name) is not None


def _recover(stage: Path) -> None:
    about = os.lstat(stage)
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
        return
    inside = {*os.listdir(stage)}
    if not inside <= {LOCK, NEW, GONE} or (inside and LOCK not in inside):  # not what we make
        return
    lock = open_own(stage / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if stage.name == COMMIT else fcntl.LOCK_NB))
        if is_at(lock, stage / LOCK):
            if stage.name == COMMIT:
                _roll_forward(stage)
            _drop(stage)
    finally:
        os.close(lock)


def _drop(stage: Path) -> None:
    """Remove what was made or not made, the lock last: without it nobody knows that it is ours."""
    with suppress(OSError):
        for name in sorted(os.listdir(stage), key=LOCK.__eq__):
            path = stage / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        stage.rmdir()


def _settle(stage: Path) -> None:
    """Give what was made the permissions of the umask, as the lock has them, and flush it."""
    mode = stat.S_IMODE(os.lstat(stage / LOCK).st_mode)
    for name in _files(stage / NEW) or [""]:
        if (file := stage / NEW / name).is_file():
            file.chmod(mode)
            sync(file)
    for folder, _, _ in os.walk(stage / NEW):
        sync(Path(folder))


def _commit(stage: Path, old: Collection[str]) -> None:
    """Let files take their places in the directory that they were made in.

    From the moment when the stage has the one name COMMIT they will, whoever does it.
    """
    folder, names = stage.parent, _files(stage / NEW)
    for name in {*old} - {*names}:
        (stage / GONE / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / GONE / name).touch()
    commit = folder / COMMIT
    for _ in range(100):
        recover(folder)  # which waits for that of another process
        try:
            os.rename(stage, commit)
            break
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
    else:
        raise RuntimeError(f"{commit}: is in the way; remove it, it is not ours")
    try:
        for name in names:
            check_plain(folder / name)
            if name not in old and (folder / name).exists():
                raise _meanwhile(folder / name)
    except BaseException:
        os.rename(commit, stage)
        raise
    _roll_forward(commit)
    _drop(commit)


def _roll_forward(commit: Path) -> None:
    """Bring committed files to their places; those that are there already are no longer here."""
    folder = commit.parent
    for name in _files(commit / NEW):
        for above in reversed(Path(name).parents[:-1]):
            subfolder(folder / above)
        os.replace(commit / NEW / name, folder / name)
    for name in _files(commit / GONE):
        above = (folder / name).parent
        if above.resolve() == folder.resolve() / Path(name).parent:  # by no link
            check_plain(folder / name)
            (folder / name).unlink(missing_ok=True)
    sync(folder)


def _files(folder: Path) -> list[str]:
    """Return the relative names of the files below a directory; links are not followed."""
    return sorted(
        str(Path(above, name).relative_to(folder))
        for above, _, names in (() if folder.is_symlink() else os.walk(folder))
        for name in names
    )


def _place(new: Path, path: Path) -> None:
    """Give a file a name that is free; ValueError if it is not."""
    try:
        os.link(new, path)
    except FileExistsError:
        raise _meanwhile(path) from None
    except OSError:  # of a file system without hard links
        if os.path.lexists(path):
            raise _meanwhile(path) from None
        os.rename(new, path)


def _meanwhile(path: Path) -> ValueError:
    return ValueError(f"{path}: another process has written it meanwhile; it is left as it is")


def subfolder(path: Path) -> Path:
    """Make a directory in one of ours if it is not there; ValueError for a link to another."""
    try:
        path.mkdir()
    except FileExistsError:
        if not stat.S_ISDIR(mode := os.lstat(path).st_mode):
            raise ValueError(
                f"{path}: is {kind_of(mode)} where we keep a directory; remove it"
            ) from None
    return path


def check_plain(path: Path) -> None:
    """Raise ValueError if something else than a file has the name of one of ours.

    A directory may have come from anywhere, and a link in it lead anywhere: nothing of ours is a
    link, none is followed, and nothing that is no file is replaced.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(mode := os.lstat(path).st_mode):
            raise ValueError(f"{path}: is {kind_of(mode)} where we keep a file; remove it")


def open_own(path: Path, flags: int) -> int:
    """Open one of our files, never through a link, and return its descriptor.

    Raises ValueError for what is no file.
    """
    check_plain(path)
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)


def is_at(descriptor: int, path: Path) -> bool:
    """Say whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the only lock on a directory; the kernel drops it when the process dies.

    Without `wait`, RuntimeError if another process holds it.
    """
    descriptor = open_own(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise RuntimeError(f"{folder}: another process is writing here; wait for it") from None
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # which a child that was forked meanwhile has too
        os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any, *, force: bool = True) -> None:
    """Write JSON so that readers see the old file or the new one, never a part."""
    with replacing(path, force=force) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n")
