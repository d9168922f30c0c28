"""The parts of a diffusers pipeline: which of its folders is read, and what must be beside it.

A pipeline's model_index.json names its parts. Training scripts also write folders without one, such
as run/checkpoint-500/unet_ema, whose scheduler is run/scheduler. A network whose pipeline has a
part that is not run is half a model, and is refused however its path is given.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from ds.models.convert.diffusers.fields import load
from ds.models.convert.diffusers.scheduler import FILE
from ds.system.files import present

CONFIG = "config.json"
INDEX = "model_index.json"
_NETWORKS = ("unet_ema", "unet")  # as training scripts call them; the average first
_NETWORK = "UNet2DModel"
_DECODERS = ("AutoencoderKL", "VQModel")
DECODERS = ("vae", "vqvae")  # the folders in which pipelines keep one
# Folders that are parts of a pipeline even where no index names them.
_PARTS = (
    *DECODERS, "movq", "text_encoder", "image_encoder", "class_embedder", "bert", "prior",
    "controlnet", "transformer",
)  # fmt: skip


class Place(NamedTuple):
    """A network's folder, and the pipeline that it belongs to; None for what is not there."""

    network: Path
    pipeline: Path | None
    decoder: Path | None  # the folder of a vae or vqvae
    said: tuple[str, ...]  # sentences on what was chosen


def locate(path: Path) -> Place:
    """Return what a path stands for: a pipeline, its network, or a checkpoint of a training run.

    Raises ValueError, naming the part, for a part that is missing or is not run.
    """
    if present(path / INDEX):
        _check(path, "unet")
    network, said = _network(path)
    pipeline = _pipeline(network)
    decoder = _check(pipeline, network.name) if pipeline else None
    return Place(network, pipeline, decoder, said)


def scheduler_of(place: Place) -> Path | None:
    """Return the file of a network's scheduler, or None. ValueError if a named one is missing."""
    network, pipeline = place.network, place.pipeline
    if present(network / FILE):
        return network / FILE
    if pipeline is None:
        return None
    named = [name for name, kind in _index(pipeline).items() if _schedules(kind)]
    places = [pipeline / name / FILE for name in named or ["scheduler"]]
    file = next(filter(present, places), None)
    if named and file is None:
        raise ValueError(f"{places[0]}: is missing, and {INDEX} names it; pass scheduler=FILE")
    return file


def scheduler_file(path: Path) -> Path:
    """Return the scheduler's file that a path names, or that its folder or pipeline holds."""
    places = (path / FILE, path / "scheduler" / FILE) if path.is_dir() else (path,)
    file = next(filter(present, places), None)
    if file is None:
        raise ValueError(f"{path}: no scheduler here; give a {FILE}, or the folder that holds it")
    return file


def _network(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the folder of the network that a path stands for, and what is to be said of it."""
    if present(path / CONFIG):
        return path, ()
    there = [name for name in _NETWORKS if present(path / name / CONFIG)]
    if present(path / INDEX) and "unet" in there:
        there.reverse()  # the pipeline names its unet
    if there:
        name, *others = there
        words = [f"{path}: {name} is read; for {other} give {path / other}" for other in others]
        return path / name, tuple(words)
    runs = sorted(p.name for p in path.glob("checkpoint-*") if p.is_dir())
    hint = f"; it holds checkpoints of a run, such as {runs[-1]}: give one" if runs else ""
    raise ValueError(f"{path}: no network here, neither {CONFIG} nor unet/{CONFIG}{hint}")


def _pipeline(network: Path) -> Path | None:
    """Return the folder, one or two levels up, whose parts are a network's; None if there is none.

    It has a scheduler, or a decoder, or other parts and a network of this name.
    """
    places = (Path(where(network)) for where in (os.path.abspath, os.path.realpath))
    for folder in (above for place in places for above in place.parents[:2]):
        parts = _index(folder)
        if parts and network.name in (*_NETWORKS, *parts):
            return folder
        beside = (f"scheduler/{FILE}", *(f"{name}/{CONFIG}" for name in DECODERS))
        if any(present(folder / name) for name in beside):
            return folder
    return None


def _check(pipeline: Path, network: str) -> Path | None:
    """Check the parts beside a pipeline's network. Return the folder of its decoder, if any."""
    decoder = None
    for name, kind in _index(pipeline).items():
        if name == network:
            continue
        if name in DECODERS and kind in _DECODERS:
            decoder = _there(pipeline / name)
        elif not (_schedules(kind) or (name, kind) == ("unet", _NETWORK)):
            raise ValueError(
                f"{_naming(pipeline, name)}: the part {name} is a {kind}, which is not run, and "
                f"without it the network is half a model; accepted are a unet ({_NETWORK}), a "
                f"scheduler, and a vae or vqvae ({' or '.join(_DECODERS)})"
            )
    return decoder


def _index(pipeline: Path) -> dict[str, str]:
    """Return the class of each part of a pipeline by name; parts that are null are absent.

    Without an index, as where only some folders were copied, the parts are the folders that are
    called like one.
    """
    file, found = pipeline / INDEX, {}
    if not present(file):
        there = (name for name in _PARTS if present(pipeline / name / CONFIG))
        return {name: _kind(pipeline / name / CONFIG) for name in there}
    parts: dict[str, Any] = load(file)
    for name, value in parts.items():
        if name.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        if len(value) != 2 or not isinstance(value[1], str) or Path(name).name != name:
            raise ValueError(f"{file}: the part {name!r} is no library and class, but {value}")
        found[name] = value[1]
    return found


def _naming(pipeline: Path, part: str) -> Path:
    """Return the file that tells of a part."""
    index = pipeline / INDEX
    return index if present(index) else pipeline / part / CONFIG


def _kind(config: Path) -> str:
    """Return the class that a part's own configuration names: diffusers', or transformers'."""
    fields = load(config)
    return str(fields.get("_class_name") or fields.get("architectures"))


def _schedules(kind: str) -> bool:
    return kind.endswith("Scheduler")


def _there(folder: Path) -> Path:
    if not present(folder / CONFIG):
        raise ValueError(f"{folder / CONFIG}: is missing, and {INDEX} names this part")
    return folder
