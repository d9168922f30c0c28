"""The state that a run goes on from, written while it goes on, whole or not at all.

Processes that hold the same write one file; processes that hold shards write a directory, each its
own: safetensors by torch.distributed.checkpoint, and JSON for what is no more than a number. Either
can be read into a run of any number of processes, sharded or not, and runs no code.
"""

import pickle
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor, distribute_tensor

from ds import ranks
from ds.files import read_json, recover, replacing, replacing_directory, unfinished, write_json

FILE = "checkpoint.pt"
FOLDER = "checkpoint"
NUMBERS = "numbers.json"
# What reading, and load_state_dict, raise for what is not a whole checkpoint of this run.
_DAMAGE = (
    RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError, pickle.UnpicklingError,
    CheckpointException,
)  # fmt: skip


class Checkpoint:
    """The state of a run in its directory: nested dicts of tensors and numbers.

    A kill at any moment leaves the last one that was written, and the next one takes its place.
    """

    def __init__(self, out: Path, device: torch.device, *, sharded: bool):
        self.file, self.folder = out / FILE, out / FOLDER
        self.device = device
        self.sharded = sharded
        self.pending: Future | None = None
        self.thread = ThreadPoolExecutor(1)
        # Of its own, since the run speaks through the other one while this is written.
        self.group = dist.new_group(backend="gloo") if sharded else None

    def save(self, state: dict[str, Any]) -> None:
        """Copy a state to the memory of the CPU, and begin to write it once the last is written."""
        self.close()
        if self.sharded:
            tensors, numbers = _parts(state)
            self.pending = dcp.async_save(
                tensors, storage_writer=_Writer(self, numbers), process_group=self.group
            )
        elif ranks.is_first():
            self.pending = self.thread.submit(self._write, _mapped(_copied, state))

    def _write(self, state: dict[str, Any]) -> None:
        with replacing(self.file) as path:
            torch.save(state, path)
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Wait until what was saved is on the disk; RuntimeError or OSError if it could not be."""
        pending, self.pending = self.pending, None
        try:
            if pending:
                pending.result()
        except CheckpointException as error:
            raise RuntimeError(f"{self.folder}: not written ({_reason(error)})") from None

    def load(self, run: Stateful) -> None:
        """Give a run the state that was saved last, if any; ValueError if it is damaged."""
        ranks.from_first(lambda: recover(self.folder))
        found = self._found()
        if not found:
            return
        # A kill between the first checkpoint of one kind and the end of the other leaves both.
        path = max(found, key=lambda path: path.stat().st_mtime_ns)
        try:
            run.load_state_dict(self._read(path, run.state_dict()))
        except _DAMAGE as error:
            path = self.file if path == self.file else self.folder
            raise ValueError(
                f"{path}: damaged ({_reason(error)}); delete it to start over"
            ) from None

    def exists(self) -> bool:
        """Say whether anything was saved."""
        recover(self.folder)
        return bool(self._found())

    def _found(self) -> list[Path]:
        return [path for path in (self.file, self.folder / NUMBERS) if path.exists()]

    def _read(self, path: Path, state: dict[str, Any]) -> dict[str, Any]:
        """Return what is saved; the tensors of a sharded state, or from a directory, are filled."""
        tensors, _ = _parts(state)
        if path == self.file:
            device = "cpu" if self.sharded else self.device
            saved = torch.load(path, map_location=device, weights_only=True)
            if not self.sharded:
                return saved
            full, numbers = _parts(saved)
            for name, tensor in tensors.items():
                tensor.copy_(_share(full[name], tensor))
        else:
            with warnings.catch_warnings():  # that one process alone reads
                warnings.simplefilter("ignore", UserWarning)
                reader = HuggingFaceStorageReader(str(self.folder))
                dcp.load(tensors, storage_reader=reader, process_group=self.group)
            numbers = read_json(path)
        return _mapped(lambda name, x: x if name in tensors else _like(x, numbers[name]), state)


class _Writer(HuggingFaceStorageWriter):
    """Writes shards to a temporary directory, which gets its name when all have been written."""

    def __init__(self, checkpoint: Checkpoint, numbers: dict[str, Any]):
        super().__init__(str(unfinished(checkpoint.folder)), save_distributed=True)
        self.checkpoint, self.numbers, self.opened = checkpoint, numbers, ExitStack()

    def prepare_global_plan(self, plans: list) -> list:
        """In the first process, before any writes."""
        folder = self.opened.enter_context(replacing_directory(self.checkpoint.folder))
        write_json(folder / NUMBERS, self.numbers)
        return super().prepare_global_plan(plans)

    def finish(self, metadata: Metadata, results: list) -> None:
        """In the first process, after all have written."""
        super().finish(metadata, results)
        self.opened.close()
        self.checkpoint.file.unlink(missing_ok=True)


def _mapped(make: Callable[[str, Any], Any], tree: Any, name: str = "") -> Any:
    """Return nested dicts and lists with make(dotted name, leaf) for every leaf."""
    if isinstance(tree, dict):
        return {key: _mapped(make, value, f"{name}.{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(make, value, f"{name}.{i}") for i, value in enumerate(tree))
    return make(name.removeprefix("."), tree)


def _parts(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a state, and its numbers, each under its dotted name."""
    leaves: dict[str, Any] = {}
    _mapped(leaves.__setitem__, state)
    tensors = {name: x for name, x in leaves.items() if isinstance(x, Tensor) and x.dim()}
    numbers = {name: x for name, x in leaves.items() if name not in tensors}
    return tensors, {n: x.item() if isinstance(x, Tensor) else x for n, x in numbers.items()}


def _copied(_: str, leaf: Any) -> Any:
    return leaf.to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf


def _like(old: Any, number: Any) -> Any:
    return torch.full_like(old, number) if isinstance(old, Tensor) else number


def _share(full: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that every process has, shared out as another is."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(
        full.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def _reason(error: BaseException) -> BaseException:
    """Return the first of what went wrong in the processes."""
    if not isinstance(error, CheckpointException):
        return error
    return next(cause for cause, _ in error.failures.values())
