"""Files that a kill at any moment cannot damage, and signals that wait for a safe moment.

Everything is written under a temporary name, flushed to the disk and renamed, so a name either
holds the whole of the new content or the whole of the old.
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds.

    One writer at a time: callers that share a directory hold its `locked`.
    """
    temporary = unfinished(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path` that takes its place if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    temporary, old = unfinished(path), _old(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unfinished(path: Path) -> Path:
    """Return the name that a file or a directory has until it is whole."""
    return path.with_name(f".{path.name}.tmp")


def recover(path: Path) -> None:
    """Give a directory its name back if a kill came between the two renames that replace it."""
    if _old(path).exists() and not path.exists():
        os.rename(_old(path), path)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the only lock on a directory; the kernel drops it when the process dies.

    Without `wait`, RuntimeError if another process holds it.
    """
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RuntimeError(f"{folder}: another process is writing here; wait for it") from None
        yield


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that readers see the old file or the new one, never a part."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; ValueError names the file if it is not JSON, FileNotFoundError if it is absent."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Interrupted(Exception):
    """A signal asked the work to stop; what was finished is saved."""

    def __init__(self, message: str, number: int = 0):
        super().__init__(message)
        self.number = number  # of the signal, where that makes a difference


@contextmanager
def deferred_signals() -> Iterator[Callable[[], int]]:
    """Turn SIGINT and SIGTERM into a question: yields a function that says which came, 0 for none.

    Work between two questions is never cut in half. Outside the main thread, where Python installs
    no handlers, the answer is always 0.
    """
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    wanted = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {s: signal.signal(s, lambda number, _: came.append(number)) for s in wanted}
    try:
        yield lambda: came[-1] if came else 0
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
