"""Directories of diffusers: a UNet2DModel, in a pipeline or alone, and its scheduler."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ds.diffusion.grids import Grid
from ds.diffusion.predictions import AbstractPrediction
from ds.diffusion.schedules import AbstractSchedule, LinearBeta
from ds.diffusion.solvers import AbstractSolver
from ds.models.convert.diffusers import files, network, scheduler
from ds.models.convert.diffusers.fields import load
from ds.models.convert.diffusers.names import LABEL, spelling
from ds.models.convert.diffusers.parts import CONFIG, INDEX, Place, locate, scheduler_of
from ds.models.convert.imported import Imported, Options, consistency, fit
from ds.models.convert.weights import Weights, choose
from ds.nets.base import AbstractNetConfig
from ds.nets.unet import UNetConfig
from ds.system import targets
from ds.system.files import present, sha256
from ds.system.staging import replacing_directory, write_json

log = logging.getLogger("ds")
_WEIGHTS = f"unet/{files.STEM}.safetensors"
_DECODER = "vqvae"  # where an LDMPipeline has it, of whichever kind it is
_WRITTEN = {
    INDEX, f"scheduler/{scheduler.FILE}", f"unet/{CONFIG}", _WEIGHTS, targets.MARK,
    f"{_DECODER}/{CONFIG}", f"{_DECODER}/{files.STEM}.safetensors",
}  # fmt: skip


def read(path: Path, options: Options) -> Imported:
    """Read a pipeline, its unet/, a checkpoint of a training run, or a bare UNet2DModel.

    A path of a file is the index of a UNet2DModel's shards.
    """
    folder = path if path.is_dir() else path.parent
    place = locate(folder)
    load(place.network / CONFIG)  # a damaged one is told before weights that are missing
    file, said = (path, ()) if folder != path else files.find(place.network, options.variant)
    return _network(place, file, options, said=said)


def read_file(path: Path, weights: Weights, options: Options) -> Imported:
    """Return the network with the weights of a file, which lies beside its configuration."""
    if not present(path.parent / CONFIG):
        raise ValueError(
            f"{path}: weights of diffusers, which need their {CONFIG}; put it beside them, and "
            f"the scheduler's {scheduler.FILE} too"
        )
    return _network(locate(path.parent), path, options, weights)


def _network(
    place: Place,
    file: Path,
    options: Options,
    weights: Weights | None = None,
    said: tuple[str, ...] = (),
) -> Imported:
    """Return a network with the weights of a file, which is read if they are not given."""
    net = network.read(place.network / CONFIG, options.image_size)
    weights = weights or choose(files.read(file), file)
    schedule = options.scheduler or scheduler_of(place)
    if schedule and not options.scheduler and _is_far(schedule, place.network):
        said += (f"{place.network}: its scheduler is {schedule}",)
    found = Imported(
        kind="teacher",
        config=net.config,
        weights=net.weights(weights.tensors, file),
        schedule=LinearBeta(),
        prediction="eps",
        facts={"format": "diffusers", "file": file.name, "sha256": sha256(file)},
        said=(*place.said, *said, *weights.said),
        decoder=place.decoder,
    )
    if schedule and scheduler.is_of_consistency(schedule):
        return consistency(found, **scheduler.levels(schedule))
    return scheduler.given(found, schedule, weights.betas)


def _is_far(scheduler: Path, network: Path) -> bool:
    """Return whether a scheduler's file lies outside of a network's own pipeline."""
    above = Path(os.path.abspath(network)).parent
    return above not in Path(os.path.abspath(scheduler)).parents[:2]


def write(
    path: str | Path,
    config: AbstractNetConfig,
    weights: Mapping[str, Tensor],
    schedule: AbstractSchedule,
    prediction: AbstractPrediction | str = "eps",
    *,
    solver: AbstractSolver | None = None,
    grid: Grid | None = None,
    decoder: Mapping[str, bytes] | None = None,
    force: bool = False,
) -> None:
    """Write a pipeline directory that diffusers' DDIMPipeline loads, or its LDMPipeline.

    With a learned variance it is a DDPMPipeline. An LDMPipeline has a decoder, whose files
    `decoder` holds by name. `weights` have our names and are saved as float32. The scheduler clips
    as `solver` does, and spaces its times as `grid` if that is a grid of ds.grids.uniform. By
    default it is DDIM with leading times. Raises ValueError for what diffusers has no words for: a
    network that is no UNet2DModel, a schedule in continuous time, another prediction. It also does
    for a place that cannot be written to or is taken; `force` replaces what `write` has made.
    """
    path = Path(path)
    steps = scheduler.fields(schedule, prediction, path, solver, grid)
    pipeline = "LDMPipeline" if decoder else f"{steps['_class_name'][:4]}Pipeline"
    config = network.sayable(config, path)
    put(path, config, weights, steps, pipeline, decoder or {}, force=force)


def put(
    path: Path,
    config: UNetConfig,
    weights: Mapping[str, Tensor],
    steps: dict[str, Any],
    pipeline: str,
    decoder: Mapping[str, bytes],
    *,
    force: bool,
) -> None:
    """Write a pipeline with the fields `steps` of its scheduler; see `write`."""
    where, old = target(path, force=force)
    fields = network.fields_of(config, path)
    weights = fit(config, weights, lambda name, shape: ((name,), shape), path)
    parts = {
        "scheduler": ["diffusers", steps["_class_name"]],
        "unet": ["diffusers", "UNet2DModel"],
    }
    if fields["num_class_embeds"]:
        log.info("%s: diffusers' pipelines tell no label; give class_labels to its unet", path)
    if decoder:
        parts[_DECODER] = ["diffusers", json.loads(decoder[CONFIG])["_class_name"]]
    described = {
        INDEX: {"_class_name": pipeline, **parts},
        f"scheduler/{scheduler.FILE}": steps,
        f"unet/{CONFIG}": fields,
    }
    spelled = {}
    for name, w in weights.items():
        keys, shape = spelling(config, name, w.shape)
        spelled[keys[0]] = w.T.contiguous() if keys[0] == LABEL else w.reshape(shape)
    with replacing_directory(where, old) as folder:
        for name, fields in described.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_json(folder / name, fields)
        for name, content in decoder.items():
            (folder / _DECODER).mkdir(exist_ok=True)
            (folder / _DECODER / name).write_bytes(content)
        content = save(spelled, metadata={"format": "pt"})
        (folder / _WEIGHTS).write_bytes(content)
        targets.mark(folder, "diffusers")


def target(
    path: str | Path, *, force: bool = False, apart: targets.Inputs = ()
) -> tuple[Path, list[str]]:
    """Return where `write` writes, and the names it replaces there; see ds.system.targets."""
    return targets.directory(path, "diffusers export", _ours, force=force, apart=apart)


def _ours(folder: Path) -> targets.Ours | None:
    return _WRITTEN.__contains__ if targets.marked(folder, "diffusers") else None
