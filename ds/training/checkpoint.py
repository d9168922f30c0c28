"""Checkpoints: the state that a run goes on from, written whole or not at all.

An unsharded run writes one file. A sharded run writes a directory: each process its shards, in
safetensors by torch.distributed.checkpoint, and the first one JSON for the numbers. Either can be
read into a run of any number of processes, sharded or not. Reading runs no code.

Checksums are verified before anything is used: those in a file of torch.save, or the hashes of the
shards, which are in the JSON. So an error after that is not damage.
"""

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict

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
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import _pytree as pytree

from ds.system import distributed
from ds.system.arrays import load_tensors
from ds.system.config import Sha256, checked
from ds.system.files import (
    first_line,
    is_of_the_machine,
    present,
    read_sealed,
    regular,
    sealed,
    sha256,
    unjudged,
)
from ds.system.staging import recover, replacing, replacing_directory, write_json

FILE = "checkpoint.pt"
FOLDER = "checkpoint"
NUMBERS = "numbers.json"


class _Noted(TypedDict):
    """The JSON beside shards."""

    numbers: dict[str, Any]
    files: dict[str, Sha256]


class Checkpoint:
    """The state of a run in its directory: nested dicts of tensors and numbers.

    A kill at any moment leaves the last one that was written whole.
    """

    def __init__(self, out: Path, device: torch.device, *, sharded: bool):
        self.file, self.folder = out / FILE, out / FOLDER
        self.device = device
        self.sharded = sharded
        self.pending: Any = None  # the Future of what is being written
        self.thread = ThreadPoolExecutor(1)
        # The run uses the default group while this one writes.
        self.group: Any = dist.new_group(backend="gloo") if sharded else None

    def save(self, state: dict[str, Any]) -> None:
        """Copy a state to the memory of the CPU, and begin to write it once the last is written."""
        self.close()
        if self.sharded:
            tensors, numbers = _split(_named(state))
            self.writer = _Writer(self, numbers)
            self.pending = dcp.async_save(
                tensors, storage_writer=self.writer, process_group=self.group
            )
        elif distributed.is_first():
            self.pending = self.thread.submit(self._write, _copied(state))

    def _write(self, state: dict[str, Any]) -> None:
        with replacing(self.file) as path:
            torch.save(state, path)
        for name in sorted(self._files(), key=NUMBERS.__ne__):  # without NUMBERS none is read
            (self.folder / name).unlink()
        with suppress(OSError):  # it does not exist, or holds something that is not ours
            self.folder.rmdir()

    def _files(self) -> list[str]:
        """Return the names of our files in the directory of a sharded checkpoint."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return [name for name in names if name == NUMBERS or name.endswith(".safetensors")]

    def close(self) -> None:
        """Wait until the state is on the disk. Raise RuntimeError or OSError if it cannot be."""
        pending, self.pending = self.pending, None
        try:
            if pending:
                pending.result()
        except CheckpointException as error:
            with suppress(CheckpointException):
                self.writer.opened.__exit__(type(error), error, None)
            raise RuntimeError(f"{self.folder}: not written ({_reason(error)})") from None

    def load(self, run: Any) -> None:
        """Give a run the last state that was saved, if there is one.

        Raises ValueError if it is damaged or of another run, RuntimeError if it cannot be read.
        """
        distributed.broadcast(lambda: recover(self.folder))
        if not (found := self._found()):
            return
        # A kill between the first checkpoint of one kind and the end of the other leaves both.
        path = max(found, key=lambda path: regular(path).st_mtime_ns)
        state = run.state_dict()
        where = self.file if path == self.file else self.folder
        with _judged(where, "damaged ({}); delete it to start over"):
            if path == self.file:
                saved = load_tensors(path, "cpu" if self.sharded else self.device)
            else:
                saved = distributed.broadcast(self._vouched)
        with _judged(where, "not of this run ({}); move it away to start over"):
            if path != self.file:
                saved = self._filled(state, saved)
            elif self.sharded:
                saved = _shared_out(saved, state)
            run.load_state_dict(saved)

    def exists(self) -> bool:
        """Return whether a state was saved."""
        recover(self.folder)
        return bool(self._found())

    def _found(self) -> list[Path]:
        found = [path for path in (self.file, self.folder / NUMBERS) if present(path)]
        if not found and present(self.folder):
            raise ValueError(
                f"{self.folder}: damaged ({NUMBERS} is missing); delete it to start over"
            )
        return found

    def _filled(self, state: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
        """Fill the tensors of a state from a directory; return the state with saved numbers."""
        tensors, _ = _split(_named(state))
        with warnings.catch_warnings():  # a warning that one process alone reads
            warnings.simplefilter("ignore", UserWarning)
            reader = HuggingFaceStorageReader(str(self.folder))
            dcp.load(tensors, storage_reader=reader, process_group=self.group)
        return _with_numbers(state, numbers)

    def _vouched(self) -> dict[str, Any]:
        """Compare the shards with their hashes; return the numbers beside them."""
        noted = checked(read_sealed(self.folder / NUMBERS, finite=False), _Noted, NUMBERS)
        there = {file.name: file for file in self.folder.glob("*.safetensors")}
        if other := sorted(there.keys() ^ noted["files"].keys()):
            raise ValueError(f"{other[0]} is missing, or not one of its files")
        for name, file in there.items():
            if sha256(file) != noted["files"][name]:
                raise ValueError(f"{name} has a wrong checksum")
        return noted["numbers"]


@contextmanager
def _judged(where: Path, words: str) -> Iterator[None]:
    """Raise what is wrong with a checkpoint as ValueError in these words.

    A failure of the machine stays a RuntimeError.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:
        reason = _reason(error)
        if is_of_the_machine(reason):
            raise unjudged(where, reason) from None
        raise ValueError(f"{where}: {words.format(first_line(reason))}") from None


class _Writer(HuggingFaceStorageWriter):
    """Writes shards to a temporary directory, and gives it its name when all are written."""

    def __init__(self, checkpoint: Checkpoint, numbers: dict[str, Any]):
        self.checkpoint, self.numbers, self.opened = checkpoint, numbers, ExitStack()
        new = replacing_directory(checkpoint.folder, checkpoint._files())
        self.folder = distributed.broadcast(lambda: self.opened.enter_context(new))
        super().__init__(str(self.folder), save_distributed=True)

    def finish(self, metadata: Metadata, results: list) -> None:
        """Write the JSON and give the directory its name; the first process alone calls this."""
        super().finish(metadata, results)
        files = {file.name: sha256(file) for file in self.folder.glob("*.safetensors")}
        write_json(self.folder / NUMBERS, sealed({"numbers": self.numbers, "files": files}))
        self.opened.close()
        self.checkpoint.file.unlink(missing_ok=True)


def _named(state: dict[str, Any]) -> dict[str, Any]:
    """Return the leaves of nested dicts and lists under dotted names."""
    paths, _ = pytree.tree_flatten_with_path(state)
    return {".".join(str(_key(entry)) for entry in path): leaf for path, leaf in paths}


def _key(entry: Any) -> Any:
    return entry.idx if isinstance(entry, pytree.SequenceKey) else entry.key


def _split(leaves: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, and the numbers, among which are tensors of no dimensions."""
    tensors = {name: x for name, x in leaves.items() if isinstance(x, Tensor) and x.dim()}
    numbers = {name: x for name, x in leaves.items() if name not in tensors}
    return tensors, {n: x.item() if isinstance(x, Tensor) else x for n, x in numbers.items()}


def _with_numbers(state: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
    """Return a state with its own tensors and other numbers."""
    leaves = _named(state)
    tensors, _ = _split(leaves)
    new = [x if name in tensors else _like(x, numbers[name]) for name, x in leaves.items()]
    return pytree.tree_unflatten(new, pytree.tree_structure(state))


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return pytree.tree_map_only(Tensor, lambda x: x.to("cpu", copy=True), state)


def _like(old: Any, number: Any) -> Any:
    return torch.full_like(old, number) if isinstance(old, Tensor) else number


def _shared_out(saved: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Fill the tensors of a sharded state with whole ones; return it with saved numbers."""
    full, numbers = _split(_named(saved))
    for name, tensor in _split(_named(state))[0].items():
        tensor.copy_(_share(full[name], tensor))
    return _with_numbers(state, numbers)


def _share(full: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that every process has, sharded as another is."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(
        full.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def _reason(error: BaseException) -> Any:
    """Return the error of the first process that failed, or the error itself."""
    if not isinstance(error, CheckpointException):
        return error
    return next(cause for cause, _ in error.failures.values())
