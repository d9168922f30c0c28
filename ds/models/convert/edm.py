"""Network snapshots of EDM's code (.pkl): SongUNet and DhariwalUNet in their preconditioners.

ds.models.convert.pickles reads the file. Settings lie beside the weights, so nothing is assumed.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Size, Tensor

from ds.diffusion import grids
from ds.diffusion.predictions import AbstractPrediction, Eps, LearnedVariance, Preconditioned, Score
from ds.diffusion.schedules import EDM, VP, AbstractSchedule, AbstractTable, Cosine
from ds.diffusion.solvers import Heun
from ds.models.convert import pickles
from ds.models.convert.imported import Imported, fit, multiples, naming, separated, spelled
from ds.models.convert.pickles import Stub
from ds.nets import SongConfig, UNetConfig
from ds.system.config import short
from ds.system.files import sha256

_PARTS = {
    "norm1": "norm0",
    "conv1": "conv0",
    "temb_proj": "affine",
    "norm2": "norm1",
    "conv2": "conv1",
    "nin_shortcut": "skip",
    "norm": "norm2",
    "q": "q",
    "k": "k",
    "v": "v",
    "proj_out": "proj",
}
_MOST = 64  # numbers in a setting, levels of modules, and letters in a text
# What the constructors fill in; None: a snapshot has it.
_SHARED = {
    "img_resolution": None, "in_channels": None, "out_channels": None, "label_dim": 0,
    "augment_dim": 0, "channel_mult_emb": 4, "dropout": 0.1, "label_dropout": 0,
}  # fmt: skip
_NETWORKS = {
    "SongUNet": _SHARED | {
        "model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4,
        "attn_resolutions": [16], "embedding_type": "positional", "channel_mult_noise": 1,
        "encoder_type": "standard", "decoder_type": "standard", "resample_filter": [1, 1],
    },
    "DhariwalUNet": _SHARED | {
        "model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
    },
}  # fmt: skip


def read(path: Path) -> Imported:
    """Return the network of a snapshot, its moving average, on the path that it was trained on.

    Raises ValueError, naming the file, for what is no such snapshot.
    """
    outer, said = _outer(pickles.load(path), path), ()
    inner = _dict(outer, "_modules", path).get("model")
    if type(inner) is not Stub or inner.name not in _NETWORKS:
        name = inner.name if type(inner) is Stub else inner
        raise ValueError(
            f"{path}: its network is {_short(name)}; accepted are {' and '.join(_NETWORKS)}"
        )
    settings = _settings(inner, path)
    found = _tensors(inner, path)
    if sum(w.nbytes for w in found.values()) > path.stat().st_size:
        raise ValueError(f"{path}: its weights share what is stored of them")
    with naming(path):
        config = _CONFIGS[inner.name](settings)
        schedule, prediction = _PATHS[outer.name](outer.state)
        grid = _grid(schedule, config, outer.state)
    if isinstance(config, UNetConfig) and found.pop("map_augment.weight", None) is not None:
        said = (f"{path}: its input for augmentations, which sampling leaves out, is left out",)
    found = separated(found, "edm", lambda width: width // (_head(config) or width), path)
    spelling = partial(_spelling, _places(config))
    return Imported(
        kind="teacher",
        config=config,
        weights=fit(config, found, spelling, path),
        schedule=schedule,
        prediction=prediction,
        facts={
            "format": "edm", "file": path.name, "sha256": sha256(path), "network": inner.name,
            "preconditioner": outer.name,
        },
        said=said,
        solver=Heun(),
        grid=grid,
    )  # fmt: skip


def _outer(root: Any, where: Path) -> Stub:
    """Return the preconditioner in what a pickle holds: the average, or the only network."""
    root = root.get("ema", root) if type(root) is dict else root
    if type(root) is not Stub or root.name not in _PATHS:
        name = _short(root.name if type(root) is Stub else root)
        raise ValueError(
            f"{where}: holds {name}, not a network of EDM's code; accepted are "
            f"{', '.join(_PATHS)}, alone or under 'ema'"
        )
    return root


def _short(value: Any) -> str:
    """Return a text in quotes, cut short, or the type of anything else, which may hold itself."""
    return short(repr(value)) if type(value) is str else type(value).__name__


def _dict(stub: Stub, name: str, where: Path) -> dict[str, Any]:
    value = stub.state.get(name)
    if type(value) is not dict:
        raise ValueError(f"{where}: {_short(stub.name)} has no {name}")
    return value


def _settings(stub: Stub, where: Path) -> dict[str, Any]:
    """Return the arguments that a network was made with, each of the type of its default."""
    given, known = _dict(stub, "_init_kwargs", where), _NETWORKS[stub.name]
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{where}: {stub.name} has the setting {_short(name)}, not read")
        if not _is_like(value, known[name]):
            like = "a whole number" if known[name] is None else f"a value like {known[name]!r}"
            raise ValueError(
                f"{where}: {stub.name} has a setting {name} of {_short(value)}; accepted is {like}"
            )
    settings = {**known, **given}
    for name, value in settings.items():
        if value is None:
            raise ValueError(f"{where}: {stub.name} lacks the setting {name}")
    return settings


def _is_like(value: Any, default: Any) -> bool:
    """Return whether a value is plain, small and of the kind of a default."""
    if type(default) is list:
        whole = type(value) in (list, tuple) and 0 < len(value) <= _MOST
        return whole and all(_is_like(entry, 0) for entry in value)
    if type(default) is str:
        return type(value) is str and len(value) <= _MOST
    if type(default) is float:
        return type(value) in (int, float) and 0 <= value < math.inf
    return type(value) is int and 0 <= value < 1 << 31


def _tensors(net: Stub, where: Path) -> dict[str, Tensor]:
    """Return the parameters and buffers of a network by their names. Each module is there once."""
    found, seen, left = {}, set(), [("", net)]
    while left:
        at, module = left.pop()
        if id(module) in seen or at.count(".") > _MOST:
            raise ValueError(f"{where}: the module {_short(at)} holds itself, or is at two places")
        seen.add(id(module))
        for name, value in _entries(module, where):
            if type(value) is Stub:
                left.append((f"{at}{name}.", value))
            elif isinstance(value, Tensor):
                found[f"{at}{name}"] = value
            elif value is not None:
                raise ValueError(f"{where}: {_short(at + name)} is a {type(value).__name__}")
    return {key: w for key, w in found.items() if not key.endswith(".resample_filter")}


def _entries(module: Stub, where: Path) -> Iterator[tuple[str, Any]]:
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in _dict(module, kind, where).items():
            if type(name) is not str or len(name) > _MOST:
                raise ValueError(f"{where}: {kind} of {_short(module.name)} has no name")
            yield name, value


def _shared(s: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that both configurations have."""
    return {
        "image_size": s["img_resolution"],
        "in_channels": s["in_channels"],
        "num_res_blocks": s["num_blocks"],
        "attention_resolutions": tuple(s["attn_resolutions"]),
        "dropout": float(s["dropout"]),
        "classes": s["label_dim"],
    }


def _dhariwal(s: Mapping[str, Any]) -> UNetConfig:
    """Return the network of ADM. Its norms have min(32, C / 4) groups, which are to be alike."""
    channels, mult, last = s["model_channels"], s["channel_mult"], len(s["channel_mult"]) - 1
    if channels * min(mult) < 128:
        raise ValueError(
            f"DhariwalUNet has {channels} * {mult} channels; accepted are 128 and more, where all "
            f"norms have 32 groups"
        )
    first, both = channels * mult[0], s["out_channels"] != s["in_channels"]
    return UNetConfig(
        **_shared(s),
        time_channels=_unless(4 * first, s["channel_mult_emb"] * channels),
        channels=first,
        channel_mult=multiples([channels * m for m in mult], first),
        embed_channels=_unless(first, channels),
        out_channels=s["out_channels"] if both else None,
        norm_eps=1e-5,
        open_frequencies=True,
        cosine_first=True,
        head_channels=64,
        scale_shift=True,
        resnet_down=tuple(range(last)),
        resnet_up=tuple(range(1, last + 1)),
    )


def _unless(default: int, value: int) -> int | None:
    return None if value == default else value


def _song(s: Mapping[str, Any]) -> SongConfig:
    same = ("decoder_type", "standard"), ("channel_mult_emb", 4), ("out_channels", s["in_channels"])
    for name, value in same:
        if s[name] != value:
            raise ValueError(f"SongUNet has {name} {s[name]!r}; accepted is {value!r}")
    channels = s["model_channels"]
    return SongConfig(
        **_shared(s),
        channels=channels,
        channel_mult=tuple(s["channel_mult"]),
        augment_channels=s["augment_dim"],
        embedding=s["embedding_type"],
        embed_channels=_unless(channels, s["channel_mult_noise"] * channels),
        encoder=s["encoder_type"],
        resample_filter=tuple(s["resample_filter"]),
    )


def _edm(state: Mapping[str, Any]) -> tuple[AbstractSchedule, AbstractPrediction]:
    return EDM(), Preconditioned(_number(state, "sigma_data"))


def _vp(state: Mapping[str, Any]) -> tuple[AbstractSchedule, AbstractPrediction]:
    last = _number(state, "M") - 1
    return VP(_number(state, "beta_min"), _number(state, "beta_d"), last), Eps()


def _ve(state: Mapping[str, Any]) -> tuple[AbstractSchedule, AbstractPrediction]:
    return EDM(_number(state, "sigma_max")), Score()


def _iddpm(state: Mapping[str, Any]) -> tuple[AbstractSchedule, AbstractPrediction]:
    """Return the cosine schedule, which the code's table of noise levels follows."""
    steps, offset, least = (_number(state, name) for name in ("M", "C_2", "C_1"))
    return Cosine(int(steps), offset, 1 - least), LearnedVariance()


def _number(state: Mapping[str, Any], name: str) -> float:
    value = state.get(name)
    if not isinstance(value, int | float) or value is True or value is False:
        raise ValueError(f"{name} is {_short(value)}; accepted is a number")
    return value


def _grid(
    schedule: AbstractSchedule, config: UNetConfig | SongConfig, state: Mapping[str, Any]
) -> grids.Grid:
    """Return the noise levels of EDM's sampler: 18 of them for small images, 40 for others."""
    n = 18 if max(config.size) <= 32 else 40
    high = min(grids.LARGEST, _number(state, "sigma_max"))
    low = max(grids.SMALLEST, _number(state, "sigma_min"))
    if isinstance(schedule, EDM):
        top, bottom = high if high < schedule.noise else None, low if low > grids.SMALLEST else None
        return grids.karras(n, schedule, top=top, bottom=bottom)
    lams = -np.log([high, low])
    if isinstance(schedule, AbstractTable):
        top, bottom = schedule.nearest(lams)
    else:
        top, bottom = map(schedule.time, lams.tolist())
    return grids.karras(n, schedule, top=top, bottom=bottom)


def _spelling(places: Mapping[str, str], name: str, shape: Size) -> tuple[tuple[str, ...], Size]:
    if name == "temb.fourier.frequencies":
        return ("map_noise.freqs",), shape
    return spelled(name, shape, places, _PARTS)


def _head(config: UNetConfig | SongConfig) -> int | None:
    """Return the channels of a head of attention, None for one head of all."""
    return config.head_channels if isinstance(config, UNetConfig) else None


def _places(config: UNetConfig | SongConfig) -> dict[str, str]:
    """Return the names that EDM's code gives the blocks of our networks."""
    levels = range(len(config.channel_mult))
    at = [f"{config.size[0] >> i}x{config.size[0] >> i}" for i in levels]
    found = {
        "temb.dense.0": "map_layer0",
        "temb.dense.1": "map_layer1",
        "temb.label": "map_label",
        "temb.augment": "map_augment",
        "conv_in": f"enc.{at[0]}_conv",
        "mid.block_1": f"dec.{at[-1]}_in0",
        "mid.attn_1": f"dec.{at[-1]}_in0",
        "mid.block_2": f"dec.{at[-1]}_in1",
    }
    dhariwal = isinstance(config, UNetConfig)
    found["norm_out"] = "out_norm" if dhariwal else f"dec.{at[0]}_aux_norm"
    found["conv_out"] = "out_conv" if dhariwal else f"dec.{at[0]}_aux_conv"
    for i in levels:
        for way, coder, count in (("down", "enc", 0), ("up", "dec", 1)):
            for j in range(config.num_res_blocks + count):
                found[f"{way}.{i}.block.{j}"] = f"{coder}.{at[i]}_block{j}"
                found[f"{way}.{i}.attn.{j}"] = f"{coder}.{at[i]}_block{j}"
        if i:
            found[f"up.{i}.upsample"] = f"dec.{at[i - 1]}_up"
            found[f"down.{i - 1}.downsample"] = f"enc.{at[i]}_down"
            found[f"down.{i - 1}.residual"] = f"enc.{at[i]}_aux_residual"
    return found


_CONFIGS: dict[str, Callable[[Mapping[str, Any]], UNetConfig | SongConfig]] = {
    "SongUNet": _song,
    "DhariwalUNet": _dhariwal,
}
_PATHS: dict[str, Callable] = {
    "EDMPrecond": _edm,
    "VPPrecond": _vp,
    "VEPrecond": _ve,
    "iDDPMPrecond": _iddpm,
}
