"""The state of a run on disk: to the bit, at the moment it was saved, whole or not at all.

Shards are those of a single process here; tests/training/test_fsdp.py has more of them.
"""

import json
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ds.training import checkpoint
from ds.training.checkpoint import Checkpoint
from tests.system.test_reading import NO_FILES, no_file

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def group():
    """A group of one process, which is enough to have shards."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Run:
    """What has a state: all that a training has in its own, sharded or not."""

    def __init__(self, *, sharded: bool, value: float = 0.0, step: int = 0):
        weights = {"a.w": torch.full((5, 3), value), "a.b": torch.full((1,), value / 3)}
        moments = [torch.full((5, 3), -value), torch.full((0, 2), value)]
        if sharded:
            mesh = init_device_mesh("cpu", (1,))
            weights = {n: distribute_tensor(w, mesh, [Shard(0)]) for n, w in weights.items()}
            moments = [distribute_tensor(w, mesh, [Shard(0)]) for w in moments]
        self.state = {
            "weights": weights,
            "low": torch.full((4,), value).bfloat16(),
            "counts": torch.full((2,), step),
            "best_loss": value or math.inf,
            "step": step,
            "running": torch.tensor(value / 7),
            "optimizer": {
                "state": dict(enumerate(moments)),
                "groups": [{"betas": (0.9, 0.98), "step": torch.tensor(float(step)), "on": True}],
            },
        }

    def state_dict(self):
        return self.state

    def load_state_dict(self, saved):
        self.state = saved


def flat(run: Run) -> dict:
    """The leaves of a state, whole and out of the reach of what is done to it in place."""
    leaves = checkpoint._named(run.state)
    full = {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in leaves.items()}
    return {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in full.items()}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert type(x) is type(b[name]), name
        if isinstance(x, torch.Tensor):
            assert x.dtype == b[name].dtype and torch.equal(x, b[name]), name
        else:
            assert x == b[name], name


def saved(out: Path, run: Run, *, sharded: bool) -> Checkpoint:
    checkpoint = Checkpoint(out, CPU, sharded=sharded)
    checkpoint.save(run.state_dict())
    checkpoint.close()
    return checkpoint


def loaded(out: Path, *, sharded: bool) -> Run:
    run = Run(sharded=sharded)
    Checkpoint(out, CPU, sharded=sharded).load(run)
    return run


either = pytest.mark.parametrize("sharded", [False, True], ids=["file", "shards"])


@either
@pytest.mark.parametrize("then", [False, True], ids=["into whole", "into shards"])
def test_a_state_comes_back_to_the_bit(tmp_path, sharded, then):
    run = Run(sharded=sharded, value=0.1, step=7)
    saved(tmp_path, run, sharded=sharded)
    back = loaded(tmp_path, sharded=then)
    assert_same(flat(back), flat(run))
    assert all(isinstance(w, DTensor) == then for w in back.state["weights"].values())


@either
def test_numbers_may_be_infinite(tmp_path, sharded):
    saved(tmp_path, Run(sharded=sharded, step=3), sharded=sharded)
    assert loaded(tmp_path, sharded=sharded).state["best_loss"] == math.inf


@either
def test_where_nothing_was_saved_a_run_is_left_as_it_is(tmp_path, sharded):
    run = Run(sharded=sharded, value=2.0)
    before = flat(run)
    Checkpoint(tmp_path, CPU, sharded=sharded).load(run)
    assert_same(flat(run), before)


@either
def test_a_state_is_that_of_the_moment_it_was_saved(tmp_path, sharded):
    run = Run(sharded=sharded, value=0.1, step=7)
    expected = flat(run)
    checkpoint = Checkpoint(tmp_path, CPU, sharded=sharded)
    checkpoint.save(run.state_dict())
    for tensor in (*run.state["weights"].values(), run.state["low"], run.state["running"]):
        tensor.zero_()
    checkpoint.close()
    assert_same(flat(loaded(tmp_path, sharded=sharded)), expected)


def fail(*_, **__):
    raise OSError(28, "No space left on device")


@either
def test_what_could_not_be_written_is_told_and_the_last_one_stays(tmp_path, monkeypatch, sharded):
    run = Run(sharded=sharded, value=0.1, step=7)
    checkpoint = saved(tmp_path, run, sharded=sharded)
    expected = flat(run)
    with monkeypatch.context() as patch:
        patch.setattr("torch.save", fail)
        patch.setattr("ds.training.checkpoint._Writer.write_data", fail)
        checkpoint.save(Run(sharded=sharded, value=9.0, step=8).state_dict())
        with pytest.raises((OSError, RuntimeError), match="No space left on device"):
            checkpoint.save(run.state_dict())
    assert_same(flat(loaded(tmp_path, sharded=sharded)), expected)
    later = Run(sharded=sharded, value=0.2, step=9)
    checkpoint.save(later.state_dict())
    checkpoint.close()
    assert_same(flat(loaded(tmp_path, sharded=sharded)), flat(later))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_has_one_checkpoint_of_either_kind(tmp_path):
    for step, sharded in enumerate((False, True, False, True)):
        saved(tmp_path, Run(sharded=sharded, step=step), sharded=sharded)
        (only,) = tmp_path.iterdir()
        assert only.name == (checkpoint.FOLDER if sharded else checkpoint.FILE)


@pytest.mark.parametrize("newer", [False, True], ids=["file", "shards"])
def test_of_both_kinds_the_newer_one_counts(tmp_path, newer):
    """As after a kill between the end of the one and that of the other."""
    file, aside = tmp_path / checkpoint.FILE, tmp_path / "aside"
    saved(tmp_path, Run(sharded=False, step=1), sharded=False)
    file.rename(aside)
    saved(tmp_path, Run(sharded=True, step=2), sharded=True)
    aside.rename(file)
    os.utime(file, (1000, 1000))
    os.utime(
        tmp_path / checkpoint.FOLDER / checkpoint.NUMBERS, (2000, 2000) if newer else (500, 500)
    )
    assert loaded(tmp_path, sharded=False).state["step"] == 1 + newer


def test_what_somebody_put_beside_shards_stays(tmp_path):
    saved(tmp_path, Run(sharded=True, step=5), sharded=True)
    (tmp_path / checkpoint.FOLDER / "notes").touch()
    for step, sharded in ((6, True), (7, False)):
        saved(tmp_path, Run(sharded=sharded, step=step), sharded=sharded)
        assert loaded(tmp_path, sharded=sharded).state["step"] == step
    assert [f.name for f in (tmp_path / checkpoint.FOLDER).iterdir()] == ["notes"]


def damage(out: Path, how: str) -> None:
    folder = out / checkpoint.FOLDER
    (shard,) = folder.glob("*.safetensors")
    numbers = folder / checkpoint.NUMBERS
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif how == "missing":
        shard.unlink()
    elif how == "numbers":
        numbers.write_text("{")
    elif how == "no numbers":
        numbers.unlink()
    elif how == "other numbers":
        numbers.write_text(json.dumps({"step": 3}))
    else:
        (folder / "another.safetensors").write_bytes(shard.read_bytes())


class Other(Run):
    """A run of another network."""

    def __init__(self, *, sharded: bool):
        super().__init__(sharded=sharded)
        self.state["weights"]["a.w"] = self.state["weights"]["a.w"][:, :2].clone()


@either
@pytest.mark.parametrize(
    "how", ["truncated", "missing", "numbers", "no numbers", "other numbers", "another shard"]
)
def test_damaged_shards_are_named(tmp_path, how, sharded):
    saved(tmp_path, Run(sharded=True, step=5), sharded=True)
    damage(tmp_path, how)
    with pytest.raises(ValueError, match=r"checkpoint: damaged \(.+\); delete it to start over"):
        loaded(tmp_path, sharded=sharded)


@pytest.mark.parametrize(("sharded", "then"), [(False, True), (True, False), (True, True)])
def test_what_another_network_left_is_named(tmp_path, sharded, then):
    saved(tmp_path, Other(sharded=sharded), sharded=sharded)
    with pytest.raises(
        ValueError, match=r"checkpoint(\.pt)?: not of this run \(.+\); move it away"
    ):
        loaded(tmp_path, sharded=then)


@either
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        OSError(5, "Input/output error"),
    ],
    ids=repr,
)
def test_what_the_machine_cannot_do_is_no_damage(tmp_path, monkeypatch, sharded, error):
    saved(tmp_path, Run(sharded=sharded, value=0.1, step=5), sharded=sharded)

    def fail(*_, **__):
        raise error

    for place in ("torch.load", "ds.training.checkpoint.dcp.load"):
        monkeypatch.setattr(place, fail)
    with pytest.raises(RuntimeError, match=r"could not be read .* nothing was found wrong with it"):
        loaded(tmp_path, sharded=sharded)
    monkeypatch.undo()
    assert loaded(tmp_path, sharded=sharded).state["step"] == 5


@no_file
@pytest.mark.parametrize("name", [checkpoint.FILE, f"{checkpoint.FOLDER}/{checkpoint.NUMBERS}"])
def test_a_checkpoint_that_is_no_file_is_said(tmp_path, kind, name):
    (tmp_path / checkpoint.FOLDER).mkdir()
    NO_FILES[kind](tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: {kind}"):
        loaded(tmp_path, sharded=False)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_nothing_that_was_pickled_is_read_from_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, Run(sharded=True, step=5), sharded=True)
    assert {f.suffix for f in (tmp_path / checkpoint.FOLDER).iterdir()} == {".json", ".safetensors"}
    (tmp_path / checkpoint.FOLDER / ".metadata").write_bytes(pickle.dumps(Bomb()))
    assert loaded(tmp_path, sharded=True).state["step"] == 5
    assert not Path("exploded").exists()
