"""Where a store's files are: a directory, or a bucket that an fsspec URL names (s3://, gs://).

Both hold whole files under names. They differ in how writers avoid each other:

    directory    a file gets its name by a rename; a claim is a lock, released with its process
    bucket       an object is put whole; a claim is an object that its process renews, and that
                 others take over if it stops

A bucket has no locks, so a claim there only saves work: the first put of a file wins (with
If-None-Match: *), and later ones leave it as it is.
"""

import hashlib
import json
import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

from ds.system import targets
from ds.system.files import MOST_JSON, parse_json, read_bytes, redacted, regular, sha256, small
from ds.system.staging import is_at, locked, open_own, recover, replacing, take

RENEW = 30.0  # seconds between two renewals of a claim in a bucket
STALE = 300.0  # seconds without a renewal, after which others take a claim over
Put = Callable[[bytes], bool]  # writes; returns whether the file now has this content


def place(where: str | Path) -> "AbstractPlace":
    """Return the place of a path or a URL.

    Raises ValueError for a URL whose protocol is unknown, or needs a package that is missing.
    """
    return Bucket(str(where)) if "://" in str(where) else Directory(Path(where))


class AbstractPlace(ABC):
    """Files under plain names, each of them whole or absent."""

    path: Path | str
    pause: ClassVar[float]  # seconds between looks at what others have written
    caches: ClassVar[bool]  # whether files are read from copies on this machine

    def __str__(self) -> str:
        return redacted(self.path)

    @abstractmethod
    def check(self, kind: str, sign: str, *, apart: targets.Inputs = ()) -> None:
        """Raise ValueError where it cannot be written to; see ds.system.targets.kept."""

    @abstractmethod
    def prepare(self) -> None:
        """Make it ready to be written to."""

    @abstractmethod
    def names(self) -> set[str]:
        """Return the names of all files; none if nothing was written yet."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the bytes of a file."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of a file, of no more than MOST_JSON bytes.

        Raises ValueError if it is larger, FileNotFoundError if it is absent.
        """

    @abstractmethod
    def write(self, name: str, content: bytes, *, once: bool = False) -> bool:
        """Write a file, replacing an older one; with `once`, only if there is none.

        Return whether it was written. In a directory, writers of a name hold the place's lock.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file if it is there."""

    @abstractmethod
    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a stored file, in hexadecimal."""

    @abstractmethod
    def local(self, hashes: dict[str, str]) -> list[Path]:
        """Return local paths of the named files with these hashes, downloading if needed."""

    @abstractmethod
    def restore(self, name: str, digest: str) -> None:
        """Fetch a damaged file of `local` again; ValueError if that is not possible."""

    def wrong(self, name: str) -> str:
        """Return the message about a file with the wrong hash."""
        return (
            f"{self}/{name}: wrong checksum; delete it and run the same `dstudent pairs` to write "
            f"it again"
        )

    @abstractmethod
    def locked(self) -> AbstractContextManager[None]:
        """Hold the place exclusively, as far as it can be locked."""

    @abstractmethod
    def claim(self, name: str) -> AbstractContextManager[Put | None]:
        """Yield a function that writes a file; None if it exists or another process makes it."""

    @abstractmethod
    def free(self) -> float:
        """Return how many bytes can still be written."""

    def read_json(self, name: str) -> Any:
        """Read JSON as ds.system.files.parse_json does."""
        return parse_json(self.read(name), f"{self}/{name}")

    def write_json(self, name: str, data: Any, *, once: bool = False) -> None:
        """Write JSON as `write` writes bytes."""
        self.write(name, (json.dumps(data, indent=2) + "\n").encode(), once=once)


def claim_of(name: str) -> str:
    """Return the name of a file's claim."""
    return f"{name}.tmp"


class Directory(AbstractPlace):
    """A directory of a file system with locks: a local disk, or NFS from version 4."""

    path: Path
    pause: ClassVar = 0.1
    caches: ClassVar = False

    def __init__(self, path: Path):
        self.path = path

    def check(self, kind: str, sign: str, *, apart: targets.Inputs = ()) -> None:
        targets.kept(self.path, kind, sign, apart=apart)

    def prepare(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        recover(self.path)

    def names(self) -> set[str]:
        return {*os.listdir(self.path)} if self.path.is_dir() else set()

    def size(self, name: str) -> int:
        return regular(self.path / name).st_size

    def read(self, name: str) -> bytes:
        return read_bytes(self.path / name)

    def write(self, name: str, content: bytes, *, once: bool = False) -> bool:
        if once and (self.path / name).exists():
            return False
        with replacing(self.path / name, sweep=False) as temporary:
            temporary.write_bytes(content)
        return True

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def sha256(self, name: str) -> str:
        return sha256(self.path / name)

    def local(self, hashes: dict[str, str]) -> list[Path]:
        return [self.path.absolute() / name for name in hashes]

    def restore(self, name: str, digest: str) -> None:
        raise ValueError(self.wrong(name))

    def locked(self) -> AbstractContextManager[None]:
        return locked(self.path, wait=True)

    @contextmanager
    def claim(self, name: str) -> Iterator[Put | None]:
        """Yield a function that writes a file; None if it exists or another process makes it.

        The claim is a lock on an empty file beside it. If another process removes that file between
        our opening and locking it, the lock is worthless and None is yielded.
        """
        claim = self.path / claim_of(name)
        with open(open_own(claim, os.O_RDWR | os.O_CREAT), "rb") as file:
            try:
                take(file.fileno(), self.path)
            except BlockingIOError:
                yield None
                return
            if not is_at(file.fileno(), claim):
                yield None
                return
            try:
                there = os.path.lexists(self.path / name)
                yield None if there else lambda content: self.write(name, content)
            finally:
                claim.unlink(missing_ok=True)

    def free(self) -> float:
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        return shutil.disk_usage(there).free


class Bucket(AbstractPlace):
    """A folder in object storage. Files that are read are cached on this machine by their hash.

    The cache is $DS_CACHE, by default ~/.cache/denoising-student. fsspec finds credentials and
    endpoints in the provider's own configuration files and variables.
    """

    path: str
    pause: ClassVar = 5.0
    caches: ClassVar = True

    def __init__(self, url: str):
        self.path = url.rstrip("/")
        try:
            import fsspec

            self._fs, self._root = fsspec.core.url_to_fs(self.path, use_listings_cache=False)
        except ImportError as error:
            raise ValueError(
                f"{self}: {error}; pip install 'denoising-student[remote]' brings s3fs and gcsfs"
            ) from None
        except Exception as error:  # every protocol has its own
            raise ValueError(f"{self}: {self._said(error)}") from None

    def _do(self, call: str, name: str, *args: Any, **options: Any) -> Any:
        """Call the file system; turn other errors, such as missing credentials, into OSError."""
        try:
            return getattr(self._fs, call)(f"{self._root}/{name}".rstrip("/"), *args, **options)
        except OSError as error:
            said = self._said(error)
            raise type(error)(said if str(self) in said else f"{self}: {said}") from None
        except Exception as error:
            raise OSError(f"{self}: {self._said(error)}") from None

    def _said(self, error: Exception) -> str:
        """Return an error's message without the secrets of the URL."""
        return redacted(str(error).replace(self.path, str(self)))

    def check(self, kind: str, sign: str, *, apart: targets.Inputs = ()) -> None:
        """Raise ValueError for a folder that holds something else."""
        names = self.names()
        if names and sign not in names:
            raise ValueError(
                f"{self}: holds {min(names)}, and is no {kind} of ours; use another name"
            )

    def prepare(self) -> None:
        """Do nothing: a folder is there when something is in it."""

    def names(self) -> set[str]:
        try:
            found = self._do("ls", "", detail=False, refresh=True)
        except FileNotFoundError:
            return set()
        return {path.rsplit("/", 1)[-1] for path in found}

    def size(self, name: str) -> int:
        return self._do("size", name)

    def read(self, name: str) -> bytes:
        return small(self._do("cat_file", name, start=0, end=MOST_JSON + 1), f"{self}/{name}")

    def write(self, name: str, content: bytes, *, once: bool = False) -> bool:
        try:
            self._do("pipe_file", name, content, mode="create" if once else "overwrite")
        except FileExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._do("rm_file", name)

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self._do("open", name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def local(self, hashes: dict[str, str]) -> list[Path]:
        kept = {name: self._kept(digest) for name, digest in hashes.items()}
        with locked(_cache(), wait=True):
            for name, path in kept.items():
                if not path.exists():
                    self._fetch(name, hashes[name], path)
        return [*kept.values()]

    def restore(self, name: str, digest: str) -> None:
        with locked(_cache(), wait=True):
            self._fetch(name, digest, self._kept(digest))

    def _kept(self, digest: str) -> Path:
        return _cache() / f"{digest}.npy"

    def _fetch(self, name: str, digest: str, path: Path) -> None:
        with replacing(path) as temporary:
            self._do("get_file", name, str(temporary))
            if sha256(temporary) != digest:
                raise ValueError(self.wrong(name))

    def locked(self) -> AbstractContextManager[None]:
        """Hold nothing: work under this lock must be harmless if done twice."""
        return nullcontext()

    @contextmanager
    def claim(self, name: str) -> Iterator[Put | None]:
        claim, over = claim_of(name), threading.Event()
        if not self._claimed(claim):
            yield None
            return
        renewing = threading.Thread(target=self._renew, args=(claim, over), daemon=True)
        renewing.start()
        try:
            there = self._do("exists", name)
            yield None if there else lambda content: self.write(name, content, once=True)
        finally:
            over.set()
            renewing.join()
            self.remove(claim)

    def _claimed(self, claim: str) -> bool:
        """Put a claim if there is none or it is stale; return whether it is ours now."""
        if self.write(claim, b"", once=True):
            return True
        try:
            age = datetime.now(timezone.utc) - self._do("modified", claim)
        except FileNotFoundError:  # given up meanwhile; the next look is soon
            return False
        return age.total_seconds() > STALE and self.write(claim, b"")

    def _renew(self, claim: str, over: threading.Event) -> None:
        while not over.wait(RENEW):
            with suppress(OSError):  # there is time for another try
                self.write(claim, b"")

    def free(self) -> float:
        return float("inf")


def _cache() -> Path:
    """Return the directory on this machine that caches files of buckets."""
    try:
        path = os.environ.get("DS_CACHE") or Path.home() / ".cache" / "denoising-student"
    except RuntimeError:  # no home, as that of a user without a name
        raise ValueError("there is no home directory; set DS_CACHE to a directory") from None
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    return path
