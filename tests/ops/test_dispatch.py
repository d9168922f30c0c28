"""Which backend an op runs: by default, when forced, and when the forced one is missing."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import ds.ops
from ds.ops import _native
from ds.ops.dispatch import op as dispatch
from ds.ops.dispatch.op import Op, Unsupported


@pytest.fixture(scope="module")
def op() -> Iterator[Op]:
    """An op that says which backend ran: fast takes float32 only, and broken never loads."""
    op = Op(
        "test_dispatch(Tensor x) -> Tensor", "x [...] floating",
        lambda x: x + 1, lambda x: torch.empty_like(x),
    )  # fmt: skip

    @op.backend("broken", "cpu")
    def _():
        raise ImportError("its compiler is on holiday")

    @op.backend("fast", "cpu")
    def _():
        def kernel(x):
            if x.dtype != torch.float32:
                raise Unsupported(f"it takes float32, not {x.dtype}")
            return x + 2

        return kernel

    @op.backend("elsewhere", "cuda")
    def _():
        return lambda x: x + 3

    yield op
    dispatch._ops.remove(op)  # the table of later tests is the library's own


def ran(dtype=torch.float32) -> float:
    return torch.ops.ds.test_dispatch(torch.zeros((), dtype=dtype)).item()


def test_the_default_is_the_first_backend_that_loads(op):
    assert ran() == 2


@torch.no_grad()
def test_a_call_that_nobody_watches_goes_past_the_dispatcher(op, monkeypatch):
    monkeypatch.setattr(op, "_dispatched", None)
    assert op(torch.zeros(())).item() == 2
    with ds.ops.use_backend("reference"):
        assert op(torch.zeros(())).item() == 1


class Notes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


class Subclass(torch.Tensor):
    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


@torch.no_grad()
def test_whoever_watches_sees_the_call(op):
    x = torch.zeros(2)
    with Notes() as notes:
        op(x)
    assert "ds.test_dispatch.default" in notes.seen
    op(x.as_subclass(Subclass))
    assert any("test_dispatch" in name for name in Subclass.seen)
    graph = make_fx(lambda x: op(x))(x).graph
    assert torch.ops.ds.test_dispatch.default in {node.target for node in graph.nodes}
    assert torch.equal(torch.func.vmap(op)(x), torch.full((2,), 1.0))  # the reference


def test_the_default_falls_back_for_arguments_a_kernel_does_not_take(op):
    assert ran(torch.float64) == 1


def test_a_backend_can_be_forced_and_the_former_choice_returns(op):
    with ds.ops.use_backend("reference"):
        assert ran() == 1
        with ds.ops.use_backend("fast"):
            assert ran() == 2
        assert ran() == 1
    assert ran() == 2


def test_the_choice_returns_after_an_error(op):
    with pytest.raises(KeyError), ds.ops.use_backend("reference"):
        raise KeyError
    assert ran() == 2


def test_an_op_without_the_forced_backend_keeps_its_default(op):
    with ds.ops.use_backend("sdpa"):
        assert ran() == 2


def test_a_forced_backend_that_is_missing_says_why(op):
    message = "test_dispatch: backend 'broken' was asked for on cpu, but its compiler is on holiday"
    with ds.ops.use_backend("broken"), pytest.raises(RuntimeError, match=message):
        ran()


def test_a_forced_backend_of_another_device_says_so(op):
    with ds.ops.use_backend("elsewhere"), pytest.raises(RuntimeError, match="kind of device"):
        ran()


def test_a_forced_backend_does_not_fall_back_for_arguments_it_does_not_take(op):
    with (
        ds.ops.use_backend("fast"),
        pytest.raises(RuntimeError, match=r"'fast' was asked for, but it takes float32"),
    ):
        ran(torch.float64)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with (
        pytest.raises(ValueError, match=r"one of .*reference.*, not 'tritn'"),
        ds.ops.use_backend("tritn"),
    ):
        pass


def test_the_table_shows_the_choice_and_the_reasons(op):
    def statuses():
        rows = [row for row in ds.ops.table() if row.op == "test_dispatch" and row.device == "cpu"]
        return {row.backend: (row.status, row.reason) for row in rows}

    expected = {
        "broken": ("missing", "its compiler is on holiday"),
        "fast": ("chosen", ""),
        "reference": ("ready", ""),
    }
    assert statuses() == expected
    with ds.ops.use_backend("reference"):
        assert statuses() == expected | {"fast": ("ready", ""), "reference": ("chosen", "")}
    with ds.ops.use_backend("broken"):
        assert "chosen" not in {status for status, _ in statuses().values()}


def test_every_op_is_in_the_table_with_one_choice_a_device():
    rows = ds.ops.table()
    assert {"group_norm_silu", "group_norm_silu_backward", "attention"} <= {row.op for row in rows}
    for name, device in {(row.op, row.device) for row in rows}:
        mine = [row.status for row in rows if (row.op, row.device) == (name, device)]
        assert mine.count("chosen") == 1


def test_a_library_that_was_not_built_gives_the_recorded_reason(tmp_path, monkeypatch):
    recorded = {name: {"reason": f"no compiler for {name}"} for name in ("cpu", "cuda")}
    (tmp_path / "build.json").write_text(json.dumps(recorded))
    monkeypatch.setattr(_native, "_DIRECTORY", tmp_path)
    with pytest.raises(ImportError, match=r"libds_cpu.so was not built: no compiler for cpu"):
        _native.cpu_library.__wrapped__()
    with pytest.raises(ImportError, match=r"libds_cuda.so was not built: no compiler for cuda"):
        _native.cuda_library.__wrapped__()


@pytest.mark.parametrize("found", [SimpleNamespace(), SimpleNamespace(ds_cpu_interface=lambda: 1)])
def test_a_library_of_another_version_is_not_used(found, tmp_path, monkeypatch):
    """Its functions would read other arguments than they are given, without a word."""
    (tmp_path / "libds_cpu.so").touch()
    monkeypatch.setattr(_native, "_DIRECTORY", tmp_path)
    monkeypatch.setattr(_native.ctypes, "CDLL", lambda _: found)
    with pytest.raises(ImportError, match=r"libds_cpu.so belongs to another version of this code"):
        _native.cpu_library.__wrapped__()


def test_the_code_and_the_build_agree_on_the_version_of_the_libraries():
    build = (Path(__file__).parents[2] / "CMakeLists.txt").read_text()
    assert f"DS_INTERFACE={_native.INTERFACE})" in build


def test_a_library_that_does_not_load_gives_the_loaders_reason(tmp_path, monkeypatch):
    (tmp_path / "libds_cpu.so").write_text("not a library")
    monkeypatch.setattr(_native, "_DIRECTORY", tmp_path)
    with pytest.raises(ImportError, match=r"libds_cpu.so does not load: .*libds_cpu.so"):
        _native.cpu_library.__wrapped__()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_ds_backend_forces_a_backend_and_rejects_a_wrong_name():
    code = """
import torch, ds.ops
print({r.backend for r in ds.ops.table() if r.status == "chosen"})
ds.ops.attention(*torch.zeros(3, 1, 1, 2, 4))
"""
    assert python(code, DS_BACKEND="reference").stdout == "{'reference'}\n"
    wrong = python(code, DS_BACKEND="refrence")
    assert wrong.returncode == 1
    assert "backend must be one of " in wrong.stderr
    assert "reference, sdpa" in wrong.stderr
    assert "not 'refrence'" in wrong.stderr


def test_importing_the_ops_imports_no_optional_package():
    code = """
import sys, torch
before = set(sys.modules)
import ds.ops
print(*set(sys.modules) - before)
"""
    loaded = python(code).stdout.split()
    outside = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert outside == {"ds"}
