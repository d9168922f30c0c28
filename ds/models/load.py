"""Read teachers and students: our own directories, and the files other codes wrote."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.guidance import AbstractGuidance
from ds.diffusion.predictions import AbstractPrediction
from ds.diffusion.schedules import AbstractSchedule
from ds.diffusion.solvers import AbstractSolver
from ds.models import pretrained
from ds.models.convert import Imported, read
from ds.models.convert.imported import naming
from ds.models.convert.remote import located
from ds.models.decoder import Decoder
from ds.models.student import Generator, Student
from ds.models.teacher import Teacher
from ds.system.ambient import without_ambient
from ds.system.config import from_json
from ds.system.files import present, sha256

log = logging.getLogger("ds")


def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    types: Iterable[type] = (),
    **overrides: Any,
) -> Teacher | Student:
    """Read a teacher or a student, whichever is there, whatever wrote it.

    Accepted are our own directories, diffusers directories, PyTorch checkpoints of the DDPM, DDIM
    and ADM codes, EDM's pickles, and the HDF5 files of 2021, recognised by their content, and the
    same on the Hugging Face hub, as hf://owner/name; see docs/teachers.md. What a file does not
    say, and is assumed, is logged as a warning. `types` are the caller's own classes that our
    directories may name: methods, networks, schedules, predictions and solvers. `overrides` are a
    teacher's `solver` and `grid`, a student's `nfe`, a `revision` on the hub, and for files of
    other codes `image_size`, `scheduler` (a scheduler_config.json, or its folder), `variant` (of
    the weights, such as "fp16"), and what state dicts of OpenAI's codes do not tell: `kind`
    ("teacher" or "student"), `head_channels`, `attention_order` ("legacy" or "new") and
    `rescale_timesteps`. Raises ValueError, naming the file, if something is missing, damaged or of
    another kind, and RuntimeError if the hub cannot be reached.
    """
    kind = overrides.pop("kind", None)
    if kind not in (None, *_OURS):
        raise ValueError(f"{path}: kind must be one of {', '.join(_OURS)}, not {kind!r}")
    given = {name: overrides.pop(name, None) for name in _FOREIGN}
    here = located(path, revision=overrides.pop("revision", None), variant=given["variant"])
    here = _directory(here)
    if not pretrained.is_ours(here):
        model = _adopt(read(here, kind=kind, **given), path, overrides.get("grid"))
    elif needless := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{path}: tells what it needs itself; leave {needless[0]} out")
    else:
        model = _OURS[pretrained.kind(here, tuple(_OURS))](here, types)
    if kind not in (None, model.kind):
        raise ValueError(f"{path}: expected a {kind}, found a {model.kind}")
    model.net.to(device, dtype)
    return replace(model, **overrides)


def _directory(path: Path) -> Path:
    """Return the directory for a file inside one of ours, and any other path as it is."""
    ours = path.name in (pretrained.CONFIG, pretrained.WEIGHTS) and path.is_file()
    return path.parent if ours and pretrained.is_ours(path.parent) else path


def load_teacher(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    types: Iterable[type] = (),
    **overrides: Any,
) -> Teacher:
    """Read a teacher; see `load`. Raises ValueError if a student is there."""
    overrides["kind"] = Teacher.kind
    return cast(Teacher, load(path, device=device, dtype=dtype, types=types, **overrides))


def load_student(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    types: Iterable[type] = (),
    **overrides: Any,
) -> Student:
    """Read a student; see `load`. Raises ValueError if a teacher is there."""
    overrides["kind"] = Student.kind
    return cast(Student, load(path, device=device, dtype=dtype, types=types, **overrides))


def _teacher(path: str | Path, types: Iterable[type]) -> Teacher:
    config, net = pretrained.read(path, Teacher.kind, types)
    decoder = _decoder(path, config)
    entry = partial(pretrained.entry, config, types=types)
    with pretrained.naming(path):
        prediction = entry("prediction", AbstractPrediction)
        denoiser = Denoiser(net, entry("schedule", AbstractSchedule), prediction)
        if "guidance" in config:
            denoiser = replace(denoiser, guidance=entry("guidance", AbstractGuidance))
        solver, grid = entry("solver", AbstractSolver), entry("grid", tuple)
        return Teacher(denoiser, solver, grid, config.get("provenance", {}), decoder)


def _student(path: str | Path, types: Iterable[type]) -> Student:
    config, net = pretrained.read(path, Student.kind, types)
    decoder = _decoder(path, config)
    with pretrained.naming(path):
        method = pretrained.entry(config, "method", Generator, types=types)
        about = config.get("provenance", {})
        return Student(net, method, config.get("nfe", 1), about, decoder)


def _decoder(path: str | Path, config: dict[str, Any]) -> Decoder | None:
    """Read the decoder in one of our directories, if its configuration tells of one."""
    for name, digest in (files := pretrained.decoder_files(config)).items():
        if not present(file := Path(path) / name):
            raise ValueError(f"{file}: is missing; copy the directory again")
        pretrained.check_hash(file, sha256(file), digest)
    return Decoder.read(Path(path) / pretrained.DECODER) if files else None


_FOREIGN = (
    "image_size", "scheduler", "variant", "head_channels", "attention_order", "rescale_timesteps",
)  # fmt: skip
_OURS = {Teacher.kind: _teacher, Student.kind: _student}


def _adopt(found: Imported, path: str | Path, grid: Grid | None) -> Teacher | Student:
    """Give an imported network its meaning, and say what of it is assumed.

    `grid` is what the caller wants instead of the network's own.
    """
    for sentence in found.said:
        log.info("%s", sentence)
    for sentence in found.assumed:
        log.warning("%s: %s", path, sentence)
    net, decoder = _built(found), found.decoder and Decoder.read(found.decoder)
    if found.decoder and decoder:
        with pretrained.naming(found.decoder):
            decoder.image_shape(tuple(net.shape))  # pyright: ignore[reportArgumentType]
    if found.kind == Student.kind:
        return Student(net, from_json(found.method), provenance=found.facts)
    grid = grid or found.grid or _paper_grid(found)
    grids.warn_of_signal(found.schedule, grid, str(path))
    with naming(Path(path)):
        denoiser = Denoiser(net, found.schedule, found.prediction or "eps")
        return Teacher(denoiser, found.solver, grid, found.facts, decoder)


@without_ambient()
def _built(found: Imported) -> nn.Module:
    with torch.device("meta"):
        net = found.config.build().to(torch.float32)
    net = net.to_empty(device="cpu")
    net.load_state_dict(found.weights)
    return net.to(memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]


def _paper_grid(found: Imported) -> Grid:
    """Return the paper's grid for a network of this size, on the schedule's own steps."""
    if max(found.config.size) > 64:
        steps = getattr(found.schedule, "num_steps", 50)
        return grids.uniform(min(50, steps), found.schedule)
    return grids.quadratic(100, found.schedule)
