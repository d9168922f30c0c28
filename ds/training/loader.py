"""Loaders: the ways in which what is kept of a batch gets to the device, all to the same bits.

A loader yields, without end, (images, indices) of one step after the other: what `Batches.read`
returns for that step, on the device. It keeps no state of its own, so a run goes on at any step.

    memory_map    a thread reads ahead; on CUDA into pinned memory
    dali          an NVIDIA DALI pipeline around the same reads, with or without a GPU
    resident      all rows are on the device, and only their numbers go there
"""

import itertools
import logging
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ds.system.config import Natural, require
from ds.system.cost import check_memory
from ds.training.batches import Batches

LoaderKind = Literal["auto", "memory_map", "dali", "resident"]
Rows = tuple[Tensor, Tensor]  # images, and the indices of their noise
Loader = Generator[Rows, None, None]
RESIDENT_SHARE = 0.25  # of the free memory of a GPU that the rows may take
log = logging.getLogger("ds")


def load(
    batches: Batches, start: int, device: torch.device, kind: LoaderKind = "auto", prefetch: int = 2
) -> Loader:
    """Yield (images, indices) on the device for the steps from `start` on; close it at the end.

    `prefetch` is how many steps are read ahead. "auto" is the memory map on a CPU. On CUDA it is
    "resident" for rows that fit into a quarter of the free memory, else "dali" if that is
    installed, else the memory map, and the log says which. Raises ValueError for DALI where it
    cannot be imported.
    """
    check(batches, kind, prefetch)
    if kind == "auto":
        kind = _choose(batches, device)
    if kind == "resident":
        return _resident(batches, start, device)
    if kind == "dali":
        return _dali(batches, start, device, prefetch)
    return _memory_map(batches, start, device, prefetch)


def check(batches: Batches, kind: LoaderKind, prefetch: int) -> None:
    """Raise ValueError for a loader that there is not, and a prefetch that the memory cannot hold.

    So is DALI where it cannot be imported.
    """
    require("loader", Natural, prefetch=prefetch)
    if kind not in get_args(LoaderKind):
        raise ValueError(f"loader must be one of {', '.join(get_args(LoaderKind))}, not {kind!r}")
    if kind == "dali":
        _dali_modules()
    row = batches.source.read([0]).nbytes + 8  # with its index
    waits = 500  # bytes of what waits for a step, at least
    check_memory(f"loader: a prefetch of {prefetch}", prefetch * (waits + len(batches.part) * row))


def _choose(batches: Batches, device: torch.device) -> LoaderKind:
    if device.type != "cuda":
        return "memory_map"
    size = len(batches.source) * batches.source.read([0]).nbytes
    if size <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
        log.info("loader: resident, %.2f GB of rows stay on the GPU", size / 1e9)
        return "resident"
    if find_spec("nvidia") and find_spec("nvidia.dali"):
        log.info("loader: dali")
        return "dali"
    log.info("loader: memory_map; pip install 'denoising-student[dali]' would bring another")
    return "memory_map"


def _memory_map(batches: Batches, start: int, device: torch.device, prefetch: int) -> Loader:
    def read(step: int) -> tuple[Tensor, Tensor]:
        return _pinned(batches.read(step), device)

    with ThreadPoolExecutor(1, "loader") as reader:
        ahead = deque(reader.submit(read, step) for step in range(start, start + prefetch))
        for step in itertools.count(start + prefetch):
            ahead.append(reader.submit(read, step))
            yield _sent(ahead.popleft().result(), device)


def _pinned(kept: Rows, device: torch.device) -> Rows:
    """Return tensors in memory from which a GPU copies while the host goes on."""
    images, indices = kept
    return (images.pin_memory(), indices.pin_memory()) if device.type == "cuda" else kept


def _sent(kept: Rows, device: torch.device) -> Rows:
    """Return tensors on the device, without waiting for it."""
    images, indices = (x.to(device, non_blocking=True) for x in kept)
    return images, indices


def _resident(batches: Batches, start: int, device: torch.device) -> Loader:
    source = batches.source
    everything = source.read(range(len(source))).to(device)
    for step in itertools.count(start):
        rows, draws = batches.rows(step)
        rows, indices = _sent(
            _pinned((torch.from_numpy(rows), source.indices(rows, draws)), device), device
        )
        yield everything[rows], indices


def _dali(batches: Batches, start: int, device: torch.device, prefetch: int) -> Loader:
    """Let DALI ask for steps by number: nothing ends, so nothing has to be reset or padded.

    A run costs it some 200 us of a CPU and a sample one: so a sample is a whole step, and a run
    makes as many steps as are to be read ahead. The next run is at work when one is handed out.
    """
    Pipeline, fn = _dali_modules()

    def read(info: Any) -> tuple[Any, Any]:
        images, indices = batches.read(start + info.idx_in_epoch)
        return images.numpy(), indices.numpy()

    cuda = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=max(prefetch, 1),
        num_threads=1,
        device_id=torch.empty(0, dtype=torch.uint8, device=device).device.index if cuda else None,
    )
    with pipeline:
        kept = fn.external_source(read, num_outputs=2, batch=False)
        pipeline.set_outputs(*(x.gpu() if cuda else x for x in kept))
    pipeline.build()
    return _outputs(pipeline, torch.cuda.Stream(device) if cuda else None)


def _dali_modules() -> tuple[Any, Any]:
    try:
        from nvidia.dali import Pipeline, fn
    except ImportError as error:
        raise ValueError(
            f"loader dali: {error}; pip install 'denoising-student[dali]', of CUDA 12 "
            "'[dali-cuda12]', or take memory_map"
        ) from None
    return Pipeline, fn


def _outputs(pipeline: Any, stream: torch.cuda.Stream | None) -> Loader:
    while True:
        images, indices = _run(pipeline) if stream is None else _run_and_copy(pipeline, stream)
        yield from zip(images, indices, strict=True)


def _run(pipeline: Any) -> list[Tensor]:
    """Return what a run makes, in memory of the pipeline that stays while a tensor refers to it."""
    return [torch.from_dlpack(x.as_tensor()) for x in pipeline.run()]


def _run_and_copy(pipeline: Any, stream: torch.cuda.Stream) -> list[Tensor]:
    """Return copies: memory of a GPU goes back to the pipeline before our streams are done."""
    with torch.cuda.stream(stream):
        copies = [x.clone() for x in _run(pipeline)]
    stream.synchronize()  # with the copies alone, not with the step in work
    for x in copies:
        x.record_stream(torch.cuda.current_stream(x.device))
    return copies
