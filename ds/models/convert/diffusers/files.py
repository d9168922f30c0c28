"""The files in which diffusers keeps the weights of a part: whole or in shards, in variants.

The names are diffusion_pytorch_model.safetensors or .bin, with a variant such as .fp16 before the
suffix. Weights in shards have an index, a JSON file that tells the shard of each weight.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ds.models.convert.diffusers.fields import load
from ds.models.convert.imported import named, tensors
from ds.system.files import by_name, present

STEM = "diffusion_pytorch_model"
SUFFIXES = ("safetensors", "bin")
_NAME = re.compile(
    rf"{STEM}(\.(?P<a>[^.]+))?\.(?P<suffix>safetensors|bin)"
    r"(?P<index>\.index(\.(?P<b>[^.]+))?\.json)?"
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


def is_shard(file: Path) -> bool:
    """Return whether a file's name is that of one of several shards."""
    return bool(_SHARD.search(file.name))


def is_index(file: Path) -> bool:
    """Return whether a file's name is that of an index of shards."""
    match = _NAME.fullmatch(file.name)
    return bool(match and match["index"])


def find(folder: Path, variant: str | None = None) -> tuple[Path, tuple[str, ...]]:
    """Return the weights in a folder, a file or an index of shards, and what is to be said.

    They are those of the variant or, for None, the full ones. If one variant is all there is, it
    is taken, and said. Raises ValueError if there are none, or several that could be meant.
    """
    found = _by_variant(folder)
    variants = sorted(name for name in found if name is not None)
    there = f"there are the variants {', '.join(variants)}" if variants else "there are none"
    if variant is not None and variant not in found:
        raise ValueError(f"{folder}: no weights of the variant {variant!r}; {there}")
    if variant in found:
        return _preferred(found[variant]), ()
    if len(variants) == 1:
        said = f"{folder}: its weights are those of the variant {variants[0]}, all there is"
        return _preferred(found[variants[0]]), (said,)
    if variants:
        raise ValueError(f"{folder}: {there}, and no full weights; pass variant={variants[0]!r}")
    names = " or ".join(f"{STEM}.{suffix}" for suffix in SUFFIXES)
    raise ValueError(f"{folder}: the weights are missing, {names}")


def _by_variant(folder: Path) -> dict[str | None, list[Path]]:
    """Return the files and indices of weights in a folder, by their variant, in their order."""
    found: dict[str | None, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        match = _NAME.fullmatch(file.name)
        if match and not is_shard(file):
            found.setdefault(match["a"] or match["b"], []).append(file)
    return found


def _preferred(files: list[Path]) -> Path:
    """Return the safetensors of several files, whole or in shards. ValueError if there are both."""
    kinds = {suffix: [f for f in files if f".{suffix}" in f.name] for suffix in SUFFIXES}
    first, *others = next(filter(None, kinds.values()))
    if others:
        raise ValueError(
            f"{first.parent}: holds both {first.name} and {others[0].name}; give the path of one"
        )
    return first


def read(file: Path) -> Any:
    """Return what a file holds, or the weights of all shards that an index lists."""
    return tensors(file) if file.suffix != ".json" else _joined(_shards(file), file)


def _shards(index: Path) -> dict[str, set[str]]:
    """Return the names of the weights in each shard that an index lists; all shards are there."""
    shards: dict[str, set[str]] = {}
    for key, name in by_name(load(index).get("weight_map"), f"{index}: weight_map").items():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise ValueError(f"{index}: the weight {key} is in {name!r}, no file of this folder")
        shards.setdefault(name, set()).add(key)
    for name in shards:
        if not present(index.parent / name):
            raise ValueError(f"{index}: the shard {name} is listed and is not there")
    for file in sorted(index.parent.iterdir()):
        whole = _SHARD.sub("", file.name)
        if file.name not in shards and whole != file.name and whole in _wholes(shards):
            raise ValueError(f"{index}: the shard {file.name} is there and is not listed")
    return shards


def _wholes(shards: dict[str, set[str]]) -> set[str]:
    return {_SHARD.sub("", name) for name in shards}


def _joined(shards: dict[str, set[str]], index: Path) -> dict[str, Tensor]:
    """Return the weights of all shards; each is where the index has it, and nowhere else."""
    weights: dict[str, Tensor] = {}
    for name, keys in shards.items():
        file = index.parent / name
        found = named(tensors(file), file)
        if wrong := sorted(keys ^ found.keys()):
            lack = "lacks" if wrong[0] in keys else "holds"
            raise ValueError(f"{file}: {lack} the weight {wrong[0]}, against {index.name}")
        weights |= found
    return weights
