"""Directories of diffusers: a UNet2DModel, in a pipeline or alone, and its scheduler.

Reading compares the fields with those that writing would give the same network. So the two cannot
disagree, and an export reads back to the bit.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Size, Tensor

from ds.diffusion.predictions import AbstractPrediction, as_prediction
from ds.diffusion.schedules import AbstractSchedule, LinearBeta
from ds.models.convert.imported import Imported, fit, named, naming, tensors
from ds.nets.unet import UNetConfig
from ds.system import targets
from ds.system.config import short
from ds.system.files import by_name, present, read_json, sha256
from ds.system.staging import replacing_directory, write_json

_CONFIG = "config.json"
_SCHEDULER = "scheduler_config.json"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_INDEX = "model_index.json"
_WRITTEN = {
    _INDEX, f"scheduler/{_SCHEDULER}", f"unet/{_CONFIG}", f"unet/{_WEIGHTS[0]}", targets.MARK,
}  # fmt: skip

# The fields of a UNet2DModel that all our networks share.
_SHARED = {
    "_class_name": "UNet2DModel",
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 0,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "attention_head_dim": None,
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
# diffusers' defaults for fields that a file leaves out, where they differ from the values above.
_DEFAULTS = {
    "_class_name": None,
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "block_out_channels": None,
    "down_block_types": None,
    "up_block_types": None,
    "layers_per_block": 2,
    "downsample_padding": 1,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
}
_IGNORED = ("num_train_timesteps",)  # of learned time embeddings

_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# Fields of a scheduler about sampling only: they go into the facts.
_SAMPLING = ("timestep_spacing", "steps_offset", "set_alpha_to_one", "clip_sample")

# Parts of our names, and diffusers' for them.
_NAMES = (
    (r"^temb\.dense\.0\.", "time_embedding.linear_1."),
    (r"^temb\.dense\.1\.", "time_embedding.linear_2."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^mid\.block_1\.", "mid_block.resnets.0."),
    (r"^mid\.attn_1\.", "mid_block.attentions.0."),
    (r"^mid\.block_2\.", "mid_block.resnets.1."),
    (r"^(down|up)\.", r"\1_blocks."),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.temb_proj\.", ".time_emb_proj."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
_ATTENTION = {  # ours, theirs, theirs before 2023
    "norm": ("group_norm",),
    "q": ("to_q", "query"),
    "k": ("to_k", "key"),
    "v": ("to_v", "value"),
    "proj_out": ("to_out.0", "proj_attn"),
}


def read(path: Path, image_size: int | None) -> Imported:
    """Read a pipeline directory, its unet/, or a bare UNet2DModel, with or without a scheduler."""
    folder = path / "unet" if present(path / "unet" / _CONFIG) else path
    if not present(folder / _CONFIG):
        raise ValueError(f"{path}: no network here, neither {_CONFIG} nor unet/{_CONFIG}")
    config = _config(folder / _CONFIG, image_size)
    file = next((folder / name for name in _WEIGHTS if present(folder / name)), None)
    if file is None:
        raise ValueError(f"{folder}: the weights are missing, {' or '.join(_WEIGHTS)}")
    weights = fit(config, named(tensors(file), file), partial(_spelling, config), file)
    facts = {"format": "diffusers", "file": file.name, "sha256": sha256(file)}
    schedule, prediction, sampling = _schedule(folder)
    return Imported("teacher", config, weights, schedule, prediction, facts | sampling)


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
        f"scheduler/{_SCHEDULER}": _scheduler_fields(schedule, prediction, path),
        f"unet/{_CONFIG}": _fields(config),
    }
    spelled = {}
    for name, w in weights.items():
        keys, shape = _spelling(config, name, w.shape)
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


def _fields(config: UNetConfig) -> dict[str, Any]:
    """Return the fields of the UNet2DModel that computes the same as our network."""
    levels = range(len(config.channel_mult))
    attend = ["Attn" * (config.image_size >> i in config.attention_resolutions) for i in levels]
    return {
        **_SHARED,
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "block_out_channels": [config.channels * mult for mult in config.channel_mult],
        "down_block_types": [f"{attn}DownBlock2D" for attn in attend],
        "up_block_types": [f"{attn}UpBlock2D" for attn in reversed(attend)],
        "layers_per_block": config.num_res_blocks,
        "dropout": config.dropout,
        "norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
    }


def _config(file: Path, image_size: int | None) -> UNetConfig:
    """Return our network for the fields in a file; ValueError names the first unsupported one."""
    fields = {**_SHARED, **_DEFAULTS, **_json(file)}
    if image_size is not None and fields["sample_size"] is None:
        fields["sample_size"] = image_size
    _check(fields, "_class_name", ["UNet2DModel"].__contains__, "'UNet2DModel'", file)
    for field in ("sample_size", "in_channels", "layers_per_block", "norm_num_groups"):
        _check(fields, field, _whole, "a whole number", file)
    for field in ("dropout", "norm_eps"):
        _check(fields, field, _number, "a number", file)
    _check(fields, "block_out_channels", _list_of(_whole), "a list of whole numbers", file)
    _check(fields, "down_block_types", _list_of(_text), "a list of names", file)

    widths, types = fields["block_out_channels"], fields["down_block_types"]
    size = fields["sample_size"]
    if image_size not in (None, size):
        raise ValueError(f"{file}: its network draws {size} pixels, image_size is {image_size}")
    with naming(file):
        config = UNetConfig(
            image_size=size,
            in_channels=fields["in_channels"],
            channels=widths[0],
            channel_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=fields["layers_per_block"],
            attention_resolutions=tuple(size >> i for i, t in enumerate(types) if "Attn" in t),
            dropout=fields["dropout"],
            norm_groups=fields["norm_num_groups"],
            norm_eps=fields["norm_eps"],
        )
    attended = {width for width, t in zip(widths, types, strict=False) if "Attn" in t}
    ours = _fields(config)
    alike = {  # other values that say the same
        "time_embedding_dim": [config.temb_channels],
        "attn_norm_num_groups": [config.norm_groups],
        "attention_head_dim": widths[-1:] if attended <= {widths[-1]} else [],
    }
    for field in fields:
        if field in _IGNORED or field.startswith("_"):
            continue
        accepted = [ours.get(field), *alike.get(field, [])]
        words = " or ".join(map(repr, accepted))
        _check(fields, field, accepted.__contains__, words, file)
    return config


def _schedule(folder: Path) -> tuple[LinearBeta, Any, dict[str, Any]]:
    """Return a network's schedule, prediction and facts on sampling, from its scheduler."""
    places = (folder / _SCHEDULER, folder.parent / "scheduler" / _SCHEDULER)
    file = next((place for place in places if present(place)), None)
    if file is None:
        return LinearBeta(), "eps", {"schedule": f"assumed, there is no {_SCHEDULER}"}
    fields = {"prediction_type": "epsilon", **_json(file)}
    _check(fields, "beta_schedule", ["linear"].__contains__, "'linear'", file)
    _check(fields, "num_train_timesteps", _whole, "a whole number", file)
    for field in ("beta_start", "beta_end"):
        _check(fields, field, _number, "a number", file)
    for field in ("trained_betas", "rescale_betas_zero_snr"):
        _check(fields, field, lambda value: not value, "null or false", file)
    known = list(_PREDICTIONS)
    _check(fields, "prediction_type", known.__contains__, " or ".join(map(repr, known)), file)
    with naming(file):
        betas = (float(fields["beta_start"]), float(fields["beta_end"]))
        schedule = LinearBeta(fields["num_train_timesteps"], *betas)
    facts = {"scheduler": fields.get("_class_name")}
    facts |= {field: fields[field] for field in _SAMPLING if field in fields}
    return schedule, _PREDICTIONS[fields["prediction_type"]], facts


def _scheduler_fields(
    schedule: AbstractSchedule, prediction: AbstractPrediction | str, where: Path
) -> dict[str, Any]:
    """Return the fields of a DDIMScheduler with our schedule, stepping to the data at last."""
    types = {as_prediction(ours): theirs for theirs, ours in _PREDICTIONS.items()}
    prediction = as_prediction(prediction)
    if not isinstance(schedule, LinearBeta) or prediction not in types:
        raise ValueError(
            f"{where}: cannot write {schedule} with the prediction {prediction}; accepted are "
            f"LinearBeta and {', '.join(map(str, types))}"
        )
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.num_steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": "linear",
        "trained_betas": None,
        "prediction_type": types[prediction],
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
    }


def _spelling(config: UNetConfig, name: str, shape: Size) -> tuple[tuple[str, ...], Size]:
    """Return diffusers' keys for a weight of ours, the current one first, and its shape there."""
    last = len(config.channel_mult) - 1  # diffusers counts the way up from the smallest images
    name = re.sub(r"^up\.(\d+)", lambda level: f"up.{last - int(level[1])}", name)
    for ours, theirs in _NAMES:
        name = re.sub(ours, theirs, name)
    if ".attentions." not in name:
        return (name,), shape
    place, part, end = name.rsplit(".", 2)
    # [:2]: dense layers where ours are 1x1 convolutions
    return tuple(f"{place}.{theirs}.{end}" for theirs in _ATTENTION[part]), shape[:2]


def _json(file: Path) -> dict[str, Any]:
    return by_name(read_json(file), file)


def _check(
    fields: Mapping[str, Any], field: str, accept: Callable[[Any], bool], words: str, file: Path
) -> None:
    """Raise ValueError unless a field is accepted; `words` describe what is."""
    value = fields.get(field)
    if not accept(value):
        raise ValueError(f"{file}: {field} is {short(repr(value))}; accepted is {words}")


def _whole(value: Any) -> bool:
    return type(value) is int and value > 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(accept: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(accept, value))
