"""Write files so that a kill at any moment cannot damage them.

Everything is written into a stage, a directory beside its destination, flushed to disk, and then
renamed. So a name holds either all of the old content or all of the new:

    .ds-k3x8w_1f.tmp/lock     locked by the writing process while it lives
    .ds-k3x8w_1f.tmp/new      the file or directory being written
    .ds-commit.tmp/           the same stage while its files move to their places around it
    .ds-commit.tmp/gone       names of our old files that have no new version and are removed
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
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)  # errors of a rename to a taken name
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def replacing(path: Path, *, force: bool = True, sweep: bool = True) -> Iterator[Path]:
    """Yield a temporary path. A file written there is renamed to `path` if the block succeeds.

    Its permissions follow the umask. Without `force`, raise ValueError if `path` exists by then.
    Without `sweep`, stages of dead processes are left for another call.
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
    """Yield a temporary directory. If the block succeeds, all its files move to `path`, or none.

    If `path` does not exist, the directory is renamed. Otherwise the files move one by one, and
    `recover` finishes after a kill. `old` names our files in `path`, by relative name: they are
    replaced or, without a new version, removed. Nothing else is touched. Raises ValueError if
    another file has the name of a new one.
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
    """Make an OSError about the stage name the destination instead."""
    try:
        yield
    except OSError as error:
        if error.errno and (not error.filename or ".ds-" in str(error.filename)):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextmanager
def staging(parent: Path, *, sweep: bool = True) -> Iterator[Path]:
    """Yield a stage: a new directory in `parent` with a random name, removed at the end.

    The process locks it while it lives, so that others can tell an abandoned stage. With `sweep`,
    `recover` first cleans up `parent`.
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
    """Create a stage and lock it. Try again if another process removed it before the lock."""
    while True:
        stage = Path(tempfile.mkdtemp(".tmp", ".ds-", parent))
        try:
            lock = open_own(stage / LOCK, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            continue
        except OSError:
            stage.rmdir()
            raise
        with suppress(OSError):  # a file system without locks; nothing is swept there
            fcntl.flock(lock, fcntl.LOCK_EX)
        if is_at(lock, stage / LOCK):
            return stage, lock
        os.close(lock)


def recover(folder: Path) -> None:
    """Clean up after killed processes: finish stages that were committed, remove all others.

    The stage of a living process is left alone; a commit of its, which is short, is waited for. A
    directory that cannot be changed stays as it is.
    """
    with suppress(OSError):
        for name in os.listdir(folder):
            if is_stage(name):
                with suppress(OSError, ValueError):
                    _recover(folder / name)


def is_stage(name: str) -> bool:
    """Return whether a name is that of a stage."""
    return name == COMMIT or _STAGE.fullmatch(name) is not None


def _recover(stage: Path) -> None:
    about = os.lstat(stage)
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
        return
    inside = {*os.listdir(stage)}
    if not inside <= {LOCK, NEW, GONE} or (inside and LOCK not in inside):  # not a stage of ours
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
    """Remove a stage, its lock last: the lock is what marks it as ours."""
    with suppress(OSError):
        for name in sorted(os.listdir(stage), key=LOCK.__eq__):
            path = stage / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        stage.rmdir()


def _settle(stage: Path) -> None:
    """Give the new files the permissions of the umask, as the lock has them, and flush them."""
    mode = stat.S_IMODE(os.lstat(stage / LOCK).st_mode)
    for name in _files(stage / NEW) or [""]:
        if (file := stage / NEW / name).is_file():
            file.chmod(mode)
            sync(file)
    for folder, _, _ in os.walk(stage / NEW):
        sync(Path(folder))


def _commit(stage: Path, old: Collection[str]) -> None:
    """Move the files of a stage to their places in the directory around it.

    Once the stage has the name COMMIT the move will happen, by this process or the next.
    """
    folder, names = stage.parent, _files(stage / NEW)
    for name in {*old} - {*names}:
        (stage / GONE / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / GONE / name).touch()
    commit = folder / COMMIT
    for _ in range(100):
        recover(folder)  # waits for the commit of another process
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
    """Move the files of a commit to their places. Files already moved are no longer in it."""
    folder = commit.parent
    for name in _files(commit / NEW):
        for above in reversed(Path(name).parents[:-1]):
            subfolder(folder / above)
        os.replace(commit / NEW / name, folder / name)
    for name in _files(commit / GONE):
        above = (folder / name).parent
        if above.resolve() == folder.resolve() / Path(name).parent:  # not through a link
            check_plain(folder / name)
            (folder / name).unlink(missing_ok=True)
    sync(folder)


def _files(folder: Path) -> list[str]:
    """Return the relative names of all files below a directory, without following links."""
    return sorted(
        str(Path(above, name).relative_to(folder))
        for above, _, names in (() if folder.is_symlink() else os.walk(folder))
        for name in names
    )


def _place(new: Path, path: Path) -> None:
    """Rename a file. Raise ValueError if the new name is taken."""
    try:
        os.link(new, path)
    except FileExistsError:
        raise _meanwhile(path) from None
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise _meanwhile(path) from None
        os.rename(new, path)


def _meanwhile(path: Path) -> ValueError:
    return ValueError(f"{path}: another process has written it meanwhile; it is left as it is")


def subfolder(path: Path) -> Path:
    """Make a directory inside one of ours if needed. Raise ValueError for a link or a file."""
    try:
        path.mkdir()
    except FileExistsError:
        if not stat.S_ISDIR(mode := os.lstat(path).st_mode):
            raise ValueError(
                f"{path}: is {kind_of(mode)} where we keep a directory; remove it"
            ) from None
    return path


def check_plain(path: Path) -> None:
    """Raise ValueError if the name of one of our files belongs to anything but a file.

    A directory may come from anyone, and a link in it may lead anywhere. We write no links, follow
    none, and replace only files.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(mode := os.lstat(path).st_mode):
            raise ValueError(f"{path}: is {kind_of(mode)} where we keep a file; remove it")


def open_own(path: Path, flags: int) -> int:
    """Open one of our files, never through a link, and return its descriptor.

    Raises ValueError if it is not a regular file.
    """
    check_plain(path)
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)


def is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a directory. The kernel releases it if the process dies.

    Raise RuntimeError if the file system has no locks or, without `wait`, another process holds it.
    """
    with open(open_own(folder / ".lock", os.O_RDWR | os.O_CREAT), "rb") as file:
        try:
            take(file.fileno(), folder, wait=wait)
        except BlockingIOError:
            raise RuntimeError(f"{folder}: another process is writing here; wait for it") from None
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a forked child shares the lock


def take(descriptor: int, folder: Path, *, wait: bool = False) -> None:
    """Lock an open file of a folder.

    Raise RuntimeError if the file system has no locks, BlockingIOError if another process has it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise RuntimeError(
            f"{folder}: its file system has no locks ({error.strerror}); use one that has, such as "
            f"a local disk"
        ) from None


def sync(path: Path) -> None:
    """Flush a file's content, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any, *, force: bool = True) -> None:
    """Write JSON so that readers see the old file or the new one, never a part."""
    with replacing(path, force=force) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n")
