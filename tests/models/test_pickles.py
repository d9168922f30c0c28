"""EDM's pickles, and what may be hidden in one: it is refused in one line, and nothing runs."""

import builtins
import copyreg
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from ds.models.convert import pickles
from tests import golden
from tests.models.snapshots import Call, written

_armed: list[str] | None = None
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _hook(event: str, args: tuple) -> None:
    if _armed is not None and not (event == "open" and not args[2] & _WRITES):
        _armed.append(f"{event} {args!r:.80}")


sys.addaudithook(_hook)


@contextmanager
def watched():
    """Collect what the interpreter reports, but for opening to read: imports, calls, writes."""
    global _armed
    events = _armed = []
    try:
        yield events
    finally:
        _armed = None


def raw(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"\x8c" + struct.pack("<B", len(value)) + value.encode()


def saved(value, **options) -> bytes:
    """The bytes of a storage, as torch.save writes them in a pickle."""
    content = io.BytesIO()
    torch.save(value, content, **{"_use_new_zipfile_serialization": False, **options})
    return content.getvalue()


def claimed(count: int) -> bytes:
    """The bytes of a storage of 3 numbers that says that it has another count."""
    content = saved(torch.zeros(3)._typed_storage())
    short, long = b"K\x03", b"\x8a\x08" + struct.pack("<q", count)
    assert content.count(short) == 1
    return content.replace(short, long)[:-20] + struct.pack("<q", count) + bytes(12)


def storage(content) -> Call:
    return Call(torch.storage._load_from_bytes, content)


def tensor(offset, size, stride, numbers: int = 4) -> bytes:
    held = torch.zeros(numbers)._typed_storage()
    return written(Call(torch._utils._rebuild_tensor_v2, held, offset, size, stride, False, {}))


ACT = "touch acted"
ACTS = Call(os.system, ACT)
EXEC = "open('acted', 'w')"
# A tuple of two times the tuple before it, sixty times over: 2**60 parts.
LAUGHS = b")" + b"".join(b"q%ch%ch%c\x86" % (i, i, i) for i in range(60)) + b"q\xff"
LAUGH = b"h\xff"
ONE_BY_ONE = saved(torch.zeros(1 << 16)._typed_storage())
HOSTILE = {
    "a call": (written(ACTS), "asks for 'posix.system'"),
    "a call of protocol 2": (written(ACTS, 2), "asks for 'posix.system'"),
    "a call in the bytes of a storage": (written(storage(saved(ACTS))), "asks for 'posix.system'"),
    "a call among the arguments of a name that is accepted": (
        written(Call(torch._utils._rebuild_parameter, ACTS, False, {})), "asks for 'posix.system'",
    ),
    "a call of what a call returns": (
        raw(name("builtins", "getattr"), name("os", "system"), text("__call__"), b"\x86R"),
        "asks for 'builtins.getattr'",
    ),
    "eval": (written(Call(eval, EXEC)), "asks for 'builtins.eval'"),
    "exec": (written(Call(exec, EXEC)), "asks for 'builtins.exec'"),
    "__import__": (written(Call(builtins.__import__, "this")), "asks for 'builtins.__import__'"),
    "a process": (written(Call(subprocess.Popen, ["touch", "acted"])), "'subprocess.Popen'"),
    "copyreg": (written(Call(copyreg._reconstructor, object, object, None)), "'copyreg._recon"),
    "a name with dots": (
        raw(text("torch.storage"), text("_load_from_bytes.__globals__"), b"\x93"),
        "_load_from_bytes.__globals__'",
    ),
    "a function of torch that unpickles": (raw(name("torch", "load")), "asks for 'torch.load'"),
    "a function of NumPy that reads": (written(Call(np.fromfile, "x")), "asks for 'numpy"),
    "a name that is a number": (raw(b"K\1K\2\x93"), "asks for what is no name"),
    "a name of two lines": (raw(text("os\nsys"), text("x\ny"), b"\x93"), r"asks for 'os\\nsys"),
    "half a surrogate pair": (raw(b"\x8c\3\xed\xa0\x80", text("x"), b"\x93"), r"for '\\ud800.x'"),
    "a text that is called": (raw(text("os.system"), text(ACT), b"\x85R"), "calls what is no name"),
    "arguments in a list": (raw(name("numpy", "dtype"), b"]R"), "calls what is no name"),
    "a persistent id in text": (raw(b"Pos.system\n"), "opcode PERSID is refused"),
    "a persistent id": (raw(text("x"), b"Q"), "opcode BINPERSID is refused"),
    "INST": (raw(b"(", text(ACT), b"ios\nsystem\n"), "opcode INST is refused"),
    "OBJ": (raw(b"(", name("collections", "OrderedDict"), b"o"), "opcode OBJ is refused"),
    "an extension of copyreg": (raw(b"\x82\1"), "opcode EXT1 is refused"),
    "a wide extension of copyreg": (raw(b"\x84\1\0\0\0"), "opcode EXT4 is refused"),
    "NEWOBJ_EX": (raw(name("dnnlib.util", "EasyDict"), b")}\x92"), "opcode NEWOBJ_EX is refused"),
    "a buffer out of band": (raw(b"\x97"), "opcode NEXT_BUFFER is refused"),
    "a state of a dict": (raw(b"}}", text("__setstate__"), text("x"), b"sb"), "sets the state"),
    "a state of a name": (
        raw(name("collections", "OrderedDict"), b"}", text("__class__"), text("x"), b"sb"),
        "sets the state",
    ),
    "slots of a module": (
        raw(name("torch.nn.modules.container", "ModuleList"), b")RN}\x86b"), "sets the state",
    ),
    "a module with arguments": (
        raw(name("torch.nn.modules.container", "ModuleList"), text("x"), b"\x85R"), "argument",
    ),
    "an object that is a number": (
        raw(name("torch_utils.persistence", "_reconstruct_persistent_obj"), b"K\1\x85R"),
        "an object without a class name",
    ),
    "a key that takes for ever to hash": (raw(LAUGHS, b"}", LAUGH, b"Ns"), "a key that is"),
    "a member that takes for ever to hash": (raw(LAUGHS, b"\x8f(", LAUGH, b"\x90"), "a member"),
    "a dtype that takes for ever to hash": (
        raw(LAUGHS, name("numpy.core.multiarray", "scalar"), name("numpy", "dtype"), LAUGH,
            b"\x85R", b"C\0\x86R"), "a number of an unknown kind",
    ),
    "bytes of a claimed size": (raw(b"\x8e" + struct.pack("<Q", 1 << 40)), "expected 10995116"),
    "bytes beyond all sizes": (raw(b"\x8e" + b"\xff" * 8), "not a whole"),
    "a text of a claimed size": (raw(b"X" + struct.pack("<I", 1 << 31)), "expected 2147483648"),
    "a name without an end": (raw(b"c" + b"a" * 5000), "not a whole"),
    "what was never noted": (raw(b"h\5"), "recalls what it has not noted"),
    "an empty stack": (raw(b"R"), "takes from an empty stack"),
    "a mark that is missing": (raw(b"t"), "a mark is missing"),
    "too many opcodes": (raw(b"N" * 1_000_001), "more than 1,000,000 opcodes"),
    "no end": (raw(b"K\1")[:-1], "not a whole"),
    "nothing but the protocol": (b"\x80\x04", "not a whole"),
    "an unknown opcode": (raw(b"\xff"), "not a whole"),
    "a storage that is a number": (written(storage(7)), "a storage that is no bytes"),
    "a storage of a claimed count": (written(storage(claimed(1 << 40))), "a storage holds 12"),
    "a storage of a negative count": (written(storage(claimed(-3))), "a storage holds 12 bytes"),
    "a storage cut short": (written(storage(ONE_BY_ONE[:-4])), "not those that it claims"),
    "a storage in a zip": (
        written(storage(saved([1], _use_new_zipfile_serialization=True))), "not a whole",
    ),
    "a storage that is a list": (written(storage(saved([torch.zeros(2)]))), "asks for|described"),
    "a storage of many opcodes": (
        written(storage(b"\x80\2" + b"N0" * 600 + b".")), "more than 1,000|refused",
    ),
    "a storage many times": (
        raw(name("torch.storage", "_load_from_bytes"), b"q\1", b"B",
            struct.pack("<I", len(ONE_BY_ONE)), ONE_BY_ONE, b"\x85q\2", b"R", b"h\1h\2R" * 9),
        "its storages are larger than the file",
    ),
    "a tensor larger than its storage": (tensor(0, (5,), (1,)), "larger than what is stored"),
    "a tensor beyond its storage": (tensor(3, (2,), (1,)), "larger than what is stored"),
    "a tensor of one number many times": (tensor(0, (1 << 40,), (0,)), "larger than what is"),
    "a tensor with a negative stride": (tensor(3, (2,), (-1,)), "whose size or stride is none"),
    "a tensor of a size in words": (tensor(0, ("2",), (1,)), "whose size or stride is none"),
    "a tensor of many dimensions": (tensor(0, (1,) * 9, (1,) * 9), "whose size or stride is none"),
    "a tensor of no storage": (
        written(Call(torch._utils._rebuild_tensor_v2, [1.0], 0, (1,), (1,), False, {})),
        "a tensor without a storage",
    ),
    "a number of objects": (
        raw(name("numpy.core.multiarray", "scalar"), name("numpy", "dtype"), text("O8"), b"\x85R",
            b"C\0\x86R"), "a number of the kind 'O8'",
    ),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def warm():
    """Read a sound one first: what reading imports is imported once, before anything is watched."""
    content, _ = golden.teachers("edm_ddpmpp")
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        pickles.load(Path(file.name))


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_one_line_and_nothing_of_it_runs(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    content, message = HOSTILE[kind]
    path = tmp_path / "net.pkl"
    path.write_bytes(content)
    text = ""
    with watched() as events:
        try:
            pickles.load(path)
        except ValueError as error:
            text = str(error)
    assert events == [] and os.listdir(tmp_path) == ["net.pkl"]
    assert text.startswith(f"{path}: not a whole pickle of EDM's networks (")
    assert text.endswith("; nothing in it was run") and text.isprintable()
    assert re.search(message, text), text


@pytest.mark.parametrize(
    "content",
    [
        raw(b"K\1r\xff\xff\xff\x7f"),  # a note at a far place: C's unpickler makes room for it
        raw(b"\x95" + struct.pack("<Q", 1 << 60), b"K\1"),  # a frame
        raw(LAUGHS, b"K\1"),  # of which nobody reads the parts
        raw(b"]q\1h\1a", b"K\1"),  # a list that holds itself
    ],
)
def test_a_pickle_that_only_claims_to_be_large_costs_nothing(tmp_path, content):
    path = tmp_path / "net.pkl"
    path.write_bytes(content)
    assert pickles.load(path) == 1


def test_the_hook_sees_what_python_s_unpickler_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with watched() as events:
        pickle.loads(written(ACTS))
    assert any("os.system" in event for event in events) and (tmp_path / "acted").exists()


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "net.pkl")
    with pytest.raises(ValueError, match="a FIFO; a regular file is needed"):
        pickles.load(tmp_path / "net.pkl")
