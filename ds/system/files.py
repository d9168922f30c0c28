"""Read files safely: only regular ones, of a bounded size, and only plain JSON.

A file that is damaged, or not a regular file, raises ValueError. One that the machine failed to
read raises OSError or RuntimeError: its content may well be right.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def kind_of(mode: int) -> str:
    """Return the kind of a file from its mode, as "a directory"."""
    return _KINDS.get(stat.S_IFMT(mode), "no file")


def read_json(path: Path, *, finite: bool = True) -> Any:
    """Read JSON as `parse_json` does. Raise FileNotFoundError if the file is absent."""
    return parse_json(read_bytes(path), path, finite=finite)


def parse_json(content: bytes, where: Any, *, finite: bool = True) -> Any:
    """Parse UTF-8 JSON. Raise ValueError naming `where` unless it is plain.

    In plain JSON names are unique, text fits UTF-8, whole numbers fit 64 bits, nesting is at most
    32 levels deep and, with `finite`, all numbers are finite.
    """
    try:
        data = json.loads(
            content.decode(),
            object_pairs_hook=_once,
            parse_int=_whole,
            parse_float=_real,
            parse_constant=_refused if finite else None,
        )
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
    """Return the fields with one more, a checksum, which `unsealed` checks."""
    return {**fields, SEAL: _checksum(fields)}


def unsealed(data: Any, where: Any, *, required: bool = False) -> dict[str, Any]:
    """Return the fields without their checksum.

    Raises ValueError naming `where` if `data` is not a dict or the checksum does not match. A
    missing checksum is accepted unless `required`: a person who edits a file removes it.
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
    """Read the fields of a JSON file and check their checksum; see `unsealed`."""
    return unsealed(read_json(path, finite=finite), path)


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def by_name(data: Any, where: Any) -> dict[str, Any]:
    """Return `data` if it is a dict. Raise ValueError otherwise."""
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
    """Return whether a name is taken, even by a broken link."""
    return os.path.lexists(path)


def regular(path: Path | str) -> os.stat_result:
    """Return the stat of a regular file, following links.

    Raises ValueError with the kind of anything else, and FileNotFoundError if nothing is there.
    """
    try:
        return _regular(path, os.stat(path))
    except FileNotFoundError:
        if os.path.islink(path):
            raise ValueError(f"{path}: a link to nothing; a file is needed") from None
        raise


def _regular(path: Path | str, found: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: {kind_of(found.st_mode)}; a regular file is needed")
    return found


@contextmanager
def opened(path: Path | str) -> Iterator[BinaryIO]:
    """Open a regular file for reading; see `regular`. An OSError in the block names the file."""
    regular(path)  # before it is opened: opening a device can have effects
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        _regular(path, os.fstat(descriptor))  # another file may have taken its place
        try:
            yield file
        except OSError as error:
            if error.errno and error.filename is None:
                error.filename = str(path)
            raise


def read_bytes(path: Path, most: int = MOST_JSON) -> bytes:
    """Read a regular file of at most `most` bytes. Raise ValueError for any other."""
    with opened(path) as file:
        content = file.read(most + 1)
    return small(content, path, most)


def small(content: bytes, where: Any, most: int = MOST_JSON) -> bytes:
    """Return content of at most `most` bytes. Raise ValueError if it is longer."""
    if len(content) > most:
        raise ValueError(f"{where}: larger than {most:,} bytes; no valid file is")
    return content


def sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with opened(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def whole(where: Any, kind: str) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into one ValueError: not a whole `kind`.

    A failure of the machine, such as a lack of memory, becomes a RuntimeError: it is no sign of
    damage.
    """
    try:
        yield
    except Exception as error:
        if is_of_the_machine(error):
            raise unjudged(where, error) from None
        raise ValueError(f"{where}: not a whole {kind} ({first_line(error)})") from None


class Unread(RuntimeError):
    """A file could not be read; its content may be right."""


def is_of_the_machine(error: Exception) -> bool:
    """Return whether the machine failed, rather than the file."""
    if isinstance(error, Unread):
        return True
    if isinstance(error, OSError):
        return bool(error.errno)  # libraries raise one without errno for content they reject
    text = str(error).lower()
    lacks = ("out of memory", "allocate memory", "cuda error")
    return isinstance(error, MemoryError) or any(words in text for words in lacks)


def unjudged(where: Any, error: Exception) -> Unread:
    """Return the error for a file that the machine failed to read."""
    if isinstance(error, Unread):
        return error
    return Unread(
        f"{where}: could not be read ({first_line(error)}); nothing was found wrong with it, try "
        f"again"
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, cut short, or its type if it has none."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def redacted(text: object) -> str:
    """Return text with the passwords and tokens of its URLs, before @ and after ?, hidden."""
    hidden = re.sub(r"(://)[^/\s]*@", r"\1***@", str(text))
    return re.sub(r"(://[^\s?]*\?)[^\s'\")]+", r"\1***", hidden)
