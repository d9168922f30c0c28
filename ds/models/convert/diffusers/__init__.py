"""Directories of diffusers: a UNet2DModel, in a pipeline or alone, and its scheduler."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from ds.diffusion.schedules import AbstractSchedule
from ds.models.convert.diffusers import scheduler
from ds.models.convert.diffusers.network import config_of, fields_of, spelling
from ds.models.convert.imported import Imported, fit, named, tensors
from ds.nets.unet import UNetConfig
from ds.system import targets
from ds.system.files import present, sha256
from ds.system.staging import replacing_directory, write_json

_CONFIG = "config.json"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_INDEX = "model_index.json"
_DECODERS = ("vae", "vqvae")
_WRITTEN = {
    _INDEX, f"scheduler/{scheduler.FILE}", f"unet/{_CONFIG}", f"unet/{_WEIGHTS[0]}", targets.MARK,
}  # fmt: skip


def read(path: Path, image_size: int | None) -> Imported:
    """Read a pipeline directory, its unet/, or a bare UNet2DModel, with or without a scheduler."""
    folder = path / "unet" if present(path / "unet" / _CONFIG) else path
    if not present(folder / _CONFIG):
        raise ValueError(f"{path}: no network here, neither {_CONFIG} nor unet/{_CONFIG}")
    config = config_of(folder / _CONFIG, image_size)
    file = next((folder / name for name in _WEIGHTS if present(folder / name)), None)
    if file is None:
        raise ValueError(f"{folder}: the weights are missing, {' or '.join(_WEIGHTS)}")
    weights = fit(config, named(tensors(file), file), partial(spelling, config), file)
    facts = {"format": "diffusers", "file": file.name, "sha256": sha256(file)}
    schedule, prediction, sampling = scheduler.read(folder)
    places = (folder.parent / name for name in _DECODERS)
    decoder = next((place for place in places if present(place / _CONFIG)), None)
    if folder == path:  # no pipeline
        decoder = None
    about = facts | sampling
    return Imported("teacher", config, weights, schedule, prediction, about, decoder)


def write(
    path: str | Path,
    config: UNetConfig,
    weights: Mapping[str, Tensor],
    schedule: AbstractSchedule,
    prediction: str = "eps",
    *,
    force: bool = False,
) -> None:
    """Write a pipeline directory that diffusers' DDIMPipeline loads.

    `weights` have our names and are saved as float32. The scheduler visits the times of
    ds.grids.uniform and does not clip, like ds.solvers.DDIM. Raises ValueError for what diffusers
    has no words for: 3x3 shortcuts, another schedule than LinearBeta, another prediction. It also
    does for a place that cannot be written to or is taken; `force` replaces what `write` has made.
    """
    path = Path(path)
    where, old = target(path, force=force)
    if config.conv_shortcut:
        raise ValueError(f"{path}: a UNet2DModel has 1x1 shortcuts, and conv_shortcut is True")
    if config.conditions or config.frequencies != UNetConfig.frequencies:
        raise ValueError(
            f"{path}: a UNet2DModel is told an index in time alone, and this network has "
            f"conditions {config.conditions} and frequencies {config.frequencies}"
        )
    weights = fit(config, weights, lambda name, shape: ((name,), shape), path)
    files = {
        _INDEX: {
            "_class_name": "DDIMPipeline",
            "scheduler": ["diffusers", "DDIMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
        f"scheduler/{scheduler.FILE}": scheduler.fields(schedule, prediction, path),
        f"unet/{_CONFIG}": fields_of(config),
    }
    spelled = {}
    for name, w in weights.items():
        keys, shape = spelling(config, name, w.shape)
        spelled[keys[0]] = w.reshape(shape)
    with replacing_directory(where, old) as folder:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_json(folder / name, content)
        content = save(spelled, metadata={"format": "pt"})
        (folder / "unet" / _WEIGHTS[0]).write_bytes(content)
        targets.mark(folder, "diffusers")


def target(
    path: str | Path, *, force: bool = False, apart: targets.Inputs = ()
) -> tuple[Path, list[str]]:
    """Return where `write` writes, and the names it replaces there; see ds.system.targets."""
    return targets.directory(path, "diffusers export", _ours, force=force, apart=apart)


def _ours(folder: Path) -> targets.Ours | None:
    return _WRITTEN.__contains__ if targets.marked(folder, "diffusers") else None
