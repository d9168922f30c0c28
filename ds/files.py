"""Files that a kill at any moment cannot damage, and signals that wait for a safe moment.

Everything is made in a directory of its own beside its place, flushed to the disk and renamed, so a
name either holds the whole of the new content or the whole of the old:

    .ds-k3x8w_1f.tmp/lock     held by the process that makes it, while it lives
    .ds-k3x8w_1f.tmp/new      a file or a directory, until it is whole
    .ds-commit.tmp/           the same, while the files of `new` take their places around it
    .ds-commit.tmp/gone       what then goes: files of ours without a new one, by their names

Only regular files are read, and none before its size was looked at. Three things can be wrong with
one, and each is told as what it is: it is another kind of thing or damaged (ValueError), or it
could not be read, which says nothing about it (OSError or RuntimeError).
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

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


def kind_of(mode: int) -> str:
    """Say what the mode of a file makes it."""
    return _KINDS.get(stat.S_IFMT(mode), "no file")


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


def read_json(path: Path, *, finite: bool = True) -> Any:
    """Read JSON as `parse_json` does; FileNotFoundError if the file is absent."""
    return parse_json(read_bytes(path), path, finite=finite)


def parse_json(content: bytes, where: Any, *, finite: bool = True) -> Any:
    """Return what JSON says, in UTF-8; ValueError names its place if it is not plain JSON.

    Plain are names that occur once, text that UTF-8 can hold, whole numbers of 64 bits, nesting of
    32 levels at most, and numbers that are finite, unless they need not be.
    """
    try:
        data = json.loads(
            content.decode(), object_pairs_hook=_once, parse_int=_whole, parse_float=_real,
            parse_constant=_refused if finite else None,
        )  # fmt: skip
        _check_plain(data)
    except RecursionError:
        raise ValueError(f"{where}: not valid JSON (too deeply nested)") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return fields


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
        raise ValueError(f"{digits[:20]}... is a number of more than 64 bits")
    return int(digits)


def _real(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise ValueError(f"{digits[:20]} is too large a number")
    return float(digits)


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_plain(data: Any, depth: int = 0) -> None:
    if isinstance(data, str) and not data.isascii():
        data.encode()  # UnicodeEncodeError, a ValueError, for half of a surrogate pair
    elif isinstance(data, list | dict):
        if depth == 32:
            raise ValueError("too deeply nested")
        for part in data if isinstance(data, list) else (*data, *data.values()):
            _check_plain(part, depth + 1)


SEAL = "checksum"


def sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields for JSON with one more, by which `unsealed` knows that none has changed."""
    return {**fields, SEAL: _checksum(fields)}


def unsealed(data: Any, where: Any, *, required: bool = False) -> dict[str, Any]:
    """Return the fields that were sealed, without the seal.

    Raises ValueError naming the place if they are no fields, or not those that were sealed. Fields
    without a seal are taken as they are, unless it is required: who changes a file by hand removes
    it.
    """
    fields = {**by_name(data, where)}
    seal = fields.pop(SEAL, None)
    if seal is None and not required:
        return fields
    if seal != _checksum(fields):
        instead = "" if required else f'; if that was meant, remove "{SEAL}" from it'
        raise ValueError(
            f"{where}: damaged, or changed by hand: its {SEAL} is not that of its content; put a "
            f"copy of it back{instead}"
        )
    return fields


def read_sealed(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """Read the fields of a JSON file that was sealed; see `unsealed`."""
    return unsealed(read_json(path, finite=finite), path)


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def by_name(data: Any, where: Any) -> dict[str, Any]:
    """Return JSON that is fields by name; ValueError if it is anything else."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: holds a {type(data).__name__}, not fields by name")
    return data


MOST_JSON = 64 << 20  # bytes: the manifest of 800,000 shards
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def present(path: Path) -> bool:
    """Say whether a name is taken, be it by a link to nothing."""
    return os.path.lexists(path)


def regular(path: Path) -> os.stat_result:
    """Return the facts of a regular file, or of one that a link leads to.

    Raises ValueError that says what is there instead, FileNotFoundError if it is nothing.
    """
    try:
        return _regular(path, os.stat(path))
    except FileNotFoundError:
        if os.path.islink(path):
            raise ValueError(f"{path}: a link to nothing; a file is needed") from None
        raise


def _regular(path: Path, found: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: {kind_of(found.st_mode)}; a regular file is needed")
    return found


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file to read its bytes; see `regular`. An OSError in the block names it."""
    regular(path)  # before it is opened, which a device may take for an order
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        _regular(path, os.fstat(descriptor))  # not what took its place meanwhile
        try:
            yield file
        except OSError as error:
            if error.errno and error.filename is None:
                error.filename = str(path)
            raise


def read_bytes(path: Path, most: int = MOST_JSON) -> bytes:
    """Read a file of so many bytes at most; ValueError if it is larger, or no regular file."""
    with opened(path) as file:
        content = file.read(most + 1)
    return small(content, path, most)


def small(content: bytes, where: Any, most: int = MOST_JSON) -> bytes:
    """Return the content of a file, of which one byte more than allowed was read at most."""
    if len(content) > most:
        raise ValueError(f"{where}: larger than {most:,} bytes, which what belongs here never is")
    return content


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with opened(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def whole(where: Any, kind: str) -> Iterator[None]:
    """Make whatever a library raises on a damaged file one ValueError: it is no whole `kind`.

    What failed in the machine, such as a lack of memory, is no sign of damage: RuntimeError.
    """
    try:
        yield
    except Exception as error:
        if is_of_the_machine(error):
            raise unjudged(where, error) from None
        raise ValueError(f"{where}: not a whole {kind} ({first_line(error)})") from None


class Unread(RuntimeError):
    """What could not be read, which says nothing about what is there."""


def is_of_the_machine(error: Exception) -> bool:
    """Say whether it is the machine that failed, and not what it was given."""
    if isinstance(error, Unread):
        return True
    if isinstance(error, OSError):
        return bool(error.errno)  # libraries raise others for what they cannot read
    text = str(error).lower()
    lacks = ("out of memory", "allocate memory", "cuda error")
    return isinstance(error, MemoryError) or any(words in text for words in lacks)


def unjudged(where: Any, error: Exception) -> Unread:
    """Return the error for what the machine could not read."""
    if isinstance(error, Unread):
        return error
    return Unread(
        f"{where}: could not be read ({first_line(error)}); nothing was found wrong with it, try "
        f"again"
    )


def first_line(error: Exception) -> str:
    """Return what an error says, or what it is where it says nothing, in one short line."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def redacted(text: object) -> str:
    """Return text without what its URLs have before an @ or after a ?, passwords and tokens."""
    hidden = re.sub(r"(://)[^/\s]*@", r"\1***@", str(text))
    return re.sub(r"(://[^\s?]*\?)[^\s'\")]+", r"\1***", hidden)
