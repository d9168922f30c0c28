"""CUDA graphs: what is launched while one is captured is done by its replays only."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.emulated import launches


class CUDAGraph:
    """The work of a capture, in order."""

    captured: "CUDAGraph | None" = None  # the one that is being captured

    def __init__(self, keep_graph: bool = False):
        self.work: list[tuple[Callable[[], list[str]], Callable[[], None]]] = []
        self.memory: list = []  # that was taken in the capture, and belongs to the graph
        self.place = torch.device("cuda", 0)

    def capture_begin(self, pool=None, capture_error_mode: str = "global") -> None:
        from tests.emulated.tensor import gpu

        wait("a second capture")
        self.place, CUDAGraph.captured = gpu("cuda"), self

    def capture_end(self) -> None:
        CUDAGraph.captured = None

    def replay(self) -> None:
        wait("replay of a graph")
        with _disable_current_modes(), torch.no_grad():
            for names, again in self.work:
                launches.add(names)
                again()

    def reset(self) -> None:
        self.work.clear()

    def pool(self) -> tuple[int, int]:
        return (0, id(self))


class graph:
    """torch.cuda.graph."""

    def __init__(
        self, cuda_graph: CUDAGraph, pool=None, stream=None, capture_error_mode: str = "global"
    ):
        self.graph = cuda_graph

    def __enter__(self) -> None:
        wait("synchronize")
        gc.collect()
        self.graph.capture_begin()

    def __exit__(self, *error) -> None:
        self.graph.capture_end()


def wait(what: str) -> None:
    """Raise if a graph is captured: nothing may wait for a GPU that does nothing yet."""
    if CUDAGraph.captured is not None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")


def check_place(place: torch.device) -> None:
    """Raise if a graph is captured on another GPU, which would not get this work."""
    captured = CUDAGraph.captured
    if captured is not None and captured.place != place:
        raise RuntimeError(
            f"CUDA error: work on {place} while a graph is captured on {captured.place}, which "
            f"will not hold it (torch.cuda.set_device)"
        )


def launch(place: torch.device, names: Callable[[], list[str]], work: Callable[[], None]) -> None:
    """Do the work of kernels, or keep it for the replays of a graph that is being captured."""
    if (graph := _captured(place)) is None:
        launches.add(names)
        work()
    else:
        graph.work.append((names, work))


def operate(place: torch.device, func: OpOverload, args: tuple, kwargs: dict):
    """Do an operation of PyTorch, or keep what it writes for the replays of a graph."""
    graph = _captured(place)
    if graph is None or launches.is_free(func):
        result = func(*args, **kwargs)
    elif func._schema.is_mutable:
        result = _written(func, args, kwargs)
    else:
        result = func(*args, **kwargs)  # in memory of its own, where replays will write

    def again() -> None:
        new = func(*args, **kwargs)
        if not func._schema.is_mutable:
            for old, x in zip(_tensors(result), _tensors(new), strict=True):
                old.copy_(x)

    names = lambda: launches.kernels(func, args, result)  # noqa: E731
    if graph is None:
        launches.add(names)
    elif launches.is_free(func):
        graph.memory.append(result)
    else:
        graph.work.append((names, again))
    return result


def _captured(place: torch.device) -> CUDAGraph | None:
    """Return the graph that is being captured, which must be one of this GPU."""
    graph = CUDAGraph.captured
    if graph is not None and graph.place != place:
        raise RuntimeError(
            f"CUDA error: work on {place} while a graph is captured on {graph.place}, which will "
            f"not hold it (torch.cuda.set_device)"
        )
    return graph


def _written(func: OpOverload, args: tuple, kwargs: dict):
    """Return what an operation that writes to its arguments would: these arguments."""
    arguments = func._schema.arguments
    given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    written = [given[a.name] for a in arguments if a.alias_info and a.alias_info.is_write]
    results = written[: len(func._schema.returns)]
    return results[0] if len(results) == 1 else tuple(results)


def _tensors(result) -> list[Tensor]:
    return [x for x in tree_leaves(result) if isinstance(x, Tensor)]
