"""What is read: regular files alone, JSON that is plain, and values of the types they must have."""

import errno
import json
import os
import socket
from dataclasses import replace
from typing import Annotated, Any, Literal, TypedDict

import pytest

from ds.diffusion.schedules import LinearBeta
from ds.nets import UNetConfig
from ds.system import files
from ds.system.config import Between, Matching, Sha256, from_json, mismatch, to_json
from ds.training.presets import PRESETS

# Kinds of things that are no files, which tests of single readers use too.


def _socket(path):
    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket is a short one
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


NO_FILES = {
    "a directory": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "a socket": _socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}
no_file = pytest.mark.parametrize("kind", NO_FILES)


@no_file
@pytest.mark.parametrize("read", [files.read_json, files.sha256, files.read_bytes])
def test_what_is_no_file_is_said_and_not_read(tmp_path, kind, read):
    path = tmp_path / "file"
    NO_FILES[kind](path)
    with pytest.raises(ValueError, match=f"file: {kind}; a "):
        read(path)


def test_a_link_to_a_file_is_read(tmp_path):
    (tmp_path / "a").write_text("[1]")
    (tmp_path / "b").symlink_to("a")
    assert files.read_json(tmp_path / "b") == [1]


def test_what_takes_the_place_of_a_file_meanwhile_is_not_read(tmp_path, monkeypatch):
    path, real = tmp_path / "file", os.open
    path.write_text("[]")

    def swapped(name, flags):
        path.unlink()
        os.mkfifo(path)
        return real(name, flags)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(ValueError, match="file: a FIFO"):
        files.read_json(path)


def test_a_file_of_any_size_is_not_taken_into_memory(tmp_path, monkeypatch):
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="file: larger than 67,108,864 bytes"):
        files.read_json(path)


def test_an_error_while_reading_names_the_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(OSError, match="file"), files.opened(path):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("error", "is_the_machine"),
    [
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc] . DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError("file signature not found"), False),
        (RuntimeError("unexpected EOF"), False),
        (KeyError("weights"), False),
        (RecursionError("maximum depth"), False),
    ],
    ids=repr,
)
def test_what_failed_in_the_machine_is_no_damage(error, is_the_machine):
    kind = RuntimeError if is_the_machine else ValueError
    said = "nothing was found wrong with it" if is_the_machine else "not a whole thing"
    with pytest.raises(kind, match=f"here: .*{said}"), files.whole("here", "thing"):
        raise error


# JSON.

NOT_PLAIN = {
    "empty": b"",
    "cut": b'{"a": 1',
    "binary": b"\xff\x00",
    "BOM": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "NaN": b"[NaN]",
    "infinity": b"[-Infinity]",
    "too large a number": b"[1e999]",
    "more than 64 bits": b"[18446744073709551616]",
    "100,000 digits": b"[" + b"9" * 100_000 + b"]",
    "half of a pair": rb'["\ud800"]',
    "half of a pair as a name": rb'{"\udc00": 1}',
    "a name twice": b'{"a": 1, "a": 1}',
    "33 levels": b"[" * 33 + b"]" * 33,
    "100,000 levels": b"[" * 100_000,
    "100,000 closed levels": b"[" * 100_000 + b"]" * 100_000,
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_json_that_is_not_plain_is_one_line(kind):
    with pytest.raises(ValueError, match=r"\Aplace: not valid JSON \(.*\)\Z") as error:
        files.parse_json(NOT_PLAIN[kind], "place")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "value", [2**64 - 1, -(2**63), 1e308, "ä🙂", [[[[]]]], {"a": None, "b": True}, 0.1, -0.0]
)
def test_plain_json_comes_back(value):
    content = json.dumps(value).encode()
    assert json.dumps(files.parse_json(content, "place")).encode() == content


def test_numbers_need_not_be_finite_where_that_is_said():
    assert files.parse_json(b"[Infinity]", "place", finite=False) == [float("inf")]


FIELDS = {"a": [1, 2.5, "x"], "b": {"c": None}}


def test_a_seal_holds_for_the_same_fields_in_any_order():
    again = json.loads(json.dumps(files.sealed(FIELDS)))
    assert files.unsealed(dict(reversed(again.items())), "place", required=True) == FIELDS
    assert files.unsealed(FIELDS, "place") == FIELDS


@pytest.mark.parametrize("change", [{"a": []}, {"b": {"c": 0}}, {"d": 1}, {"checksum": "x"}])
def test_a_change_breaks_the_seal_and_is_told_how_to_stay(change):
    with pytest.raises(ValueError, match=r'place: damaged, or changed .* remove "checksum"'):
        files.unsealed(files.sealed(FIELDS) | change, "place")


def test_a_seal_may_be_required():
    with pytest.raises(ValueError, match="place: damaged, or changed by hand"):
        files.unsealed(FIELDS, "place", required=True)


# Types.


class Inner(TypedDict):
    name: Annotated[str, Matching(r"[a-z0-9][a-z0-9.-]*", "a plain file name")]


class Optional(TypedDict, total=False):
    note: str | None


class Thing(Optional):
    count: Annotated[int, Between(1)]
    share: float
    way: Literal["a", "b"]
    on: bool
    rows: Annotated[list[int], Between(1)]
    pair: tuple[float, float]
    inner: Inner
    rest: dict[str, Any]
    hashes: list[Sha256 | None]


GOOD = {
    "count": 3, "share": 1, "way": "a", "on": False, "rows": [0], "pair": [1, 2.5],
    "inner": {"name": "images-00000.npy"}, "rest": {"x": []}, "hashes": [None, "0" * 64],
}  # fmt: skip
MISMATCHES = {
    "count must be a whole number, not 256.0": {"count": 256.0},
    "count must be a whole number, not True": {"count": True},
    "count must be a whole number, not None": {"count": None},
    "count must be at least 1, not 0": {"count": 0},
    "share must be a number, not '1'": {"share": "1"},
    "way must be one of a, b, not 'c'": {"way": "c"},
    "way must be one of a, b, not []": {"way": []},
    "on must be true or false, not 0": {"on": 0},
    "rows must be at least 1, not []": {"rows": []},
    "rows[1] must be a whole number, not 1.5": {"rows": [1, 1.5]},
    "rows must be a list, not 'x'": {"rows": "x"},
    "pair must be a list of 2, not [1]": {"pair": [1]},
    "inner.name must be a plain file name, not '../x'": {"inner": {"name": "../x"}},
    "inner.name must be a plain file name, not '/etc/passwd'": {"inner": {"name": "/etc/passwd"}},
    "inner must be fields by name, not []": {"inner": []},
    "inner.name is missing": {"inner": {}},
    "rest must be fields by name, not 1": {"rest": 1},
    "note must be text or null, not 1": {"note": 1},
    "'more' is no field of it": {"more": 1},
    "hashes[0] must be a SHA-256 in hexadecimal, not 'x'": {"hashes": ["x"]},
    "hashes[0] must be a SHA-256 in hexadecimal, not 'ABCD": {"hashes": ["ABCD" * 16]},
}


def test_what_is_of_a_type_is_taken():
    assert mismatch(GOOD, Thing) is None
    assert mismatch({**GOOD, "note": None}, Thing) is None


@pytest.mark.parametrize("said", MISMATCHES)
def test_the_first_thing_of_another_type_is_named(said):
    assert mismatch(GOOD | MISMATCHES[said], Thing).startswith(said)


@pytest.mark.parametrize("name", sorted(GOOD))
def test_what_is_missing_is_named(name):
    assert mismatch({k: v for k, v in GOOD.items() if k != name}, Thing) == f"{name} is missing"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_steps": 1000.0}, "num_steps must be a whole number, not 1000.0"),
        ({"num_steps": True}, "num_steps must be a whole number, not True"),
        ({"beta_end": "0.02"}, "beta_end must be a number, not '0.02'"),
        ({"beta_end": None}, "beta_end must be a number, not None"),
        ({"beta_end": [0.02]}, r"beta_end must be a number, not \(0.02,\)"),
    ],
)
def test_a_field_of_another_type_is_named(change, said):
    with pytest.raises(ValueError, match=f"configuration of linear_beta: {said}"):
        from_json(to_json(LinearBeta()) | change)


@pytest.mark.parametrize(
    "change",
    [
        {"loss_type": "l7"},
        {"loss_type": None},
        {"t": -1},
        {"residual": 1},
        {"gain": "-1"},
        {"t": "999"},
    ],
    ids=repr,
)
def test_a_method_of_no_meaning_is_refused(change):
    method = to_json(PRESETS["digits"]().method)
    with pytest.raises(ValueError, match=next(iter(change))):
        from_json(method | change)


def test_lists_are_looked_into():
    config = to_json(replace(UNetConfig(), channels=64))
    with pytest.raises(
        ValueError, match=r"attention_resolutions\[1\] must be a whole number, not 1.5"
    ):
        from_json(config | {"attention_resolutions": [1, 1.5]})
