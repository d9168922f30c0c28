"""Find the weights of one network in what a file holds, whatever training code wrote it.

State dicts lie about in containers: {"model": ..., "ema": ..., "epoch": 3}, the checkpoints of
Lightning, the list of the DDIM code. Wrappers put prefixes before the names: "module.", "model.",
"_orig_mod.". So a network is known by the names of its own weights, wherever it lies.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ds.models.convert.imported import HALVES, named

# The first weight of a network and one of its time embedding: DDPM's, diffusers', and ADM's.
DDPM = ("conv_in.weight", "temb.dense.0.weight")
DIFFUSERS = ("conv_in.weight", "time_embedding.linear_1.weight")
ADM = ("input_blocks.0.0.weight", "time_embed.0.weight")
_CODES = (DDPM, DIFFUSERS, ADM)
_SIGNS = ("conv_in.weight", "conv_in.bias", "conv_out.weight", DDPM[1], DIFFUSERS[1], *ADM)
# What wrappers put between the parts of a name: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_EMA = re.compile(r"(^|[._])ema([._]|$)", re.IGNORECASE)
_OTHER_PARTS = re.compile(
    r"(^|\.)(vae|vqvae|movq|autoencoder|first_stage_model|cond_stage_model|text_encoder"
    r"|image_encoder|quant_conv|post_quant_conv)\."
)


class Weights(NamedTuple):
    """The weights of one network under the names they have there, without their common prefix."""

    tensors: dict[str, Tensor]
    which: str  # of the networks in the file
    said: tuple[str, ...] = ()  # sentences on what was chosen
    betas: Tensor | None = None  # the schedule, if it lies beside the weights


class _Group(NamedTuple):
    """The entries of one dict, under names without wrappers; `at` is its place in the file."""

    at: str
    entries: dict[Any, Any]


def choose(saved: Any, where: Path) -> Weights:
    """Return the one network in what a file holds; of several, the only average (EMA).

    Raises ValueError if there is none, if several could be meant, if a part of a larger model lies
    beside it, or if a tensor beside it belongs to no network.
    """
    saved = _by_position(saved, where) if isinstance(saved, list | tuple) else saved
    groups = [*_groups(saved, where)]
    _check_parts(groups, where)
    found = _networks(groups)
    if not found:
        return Weights(_nothing(saved, groups, where), _words(""))
    name = _one_of([*found], where)
    group, prefix = found[name]
    own = {_after(k, prefix): v for k, v in group.entries.items() if _starts(k, prefix)}
    betas = _betas(group, prefix)
    _check_beside(group, [p for g, p in found.values() if g is group], betas, where)
    own = {k: v for k, v in own.items() if "." in str(k) or not _is_aside(v, betas)}
    which = _words(name if len(found) > 1 else group.at)
    tensors = named(own, where)
    said = (*_said(name, found, groups, _lists(saved), where), *_cast(tensors, where))
    return Weights(tensors, which, said, betas)


def _by_position(saved: list | tuple, where: Path) -> dict[str, Any]:
    """Name what lies in the list of the DDIM code."""
    if len(saved) not in (4, 5):
        raise ValueError(
            f"{where}: holds a list of {len(saved)}; accepted are a state dict and "
            f"[model, optimizer, epoch, step, ema], the last or not"
        )
    if len(saved) == 4:
        return {"model, without EMA": saved[0], "optimizer": saved[1]}
    if not isinstance(saved[4], Mapping):
        named(saved[4], where)
    return {"model": saved[0], "optimizer": saved[1], "EMA": saved[4]}


def _dicts(saved: Any) -> Iterator[tuple[str, Mapping]]:
    """Yield every dict in what a file holds, with its place, once: a dict may hold itself."""
    seen, left = set(), deque([("", saved)])
    while left:
        at, value = left.popleft()
        if isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            yield at, value
            left.extend((f"{at}{key}.", entry) for key, entry in value.items())


def _groups(saved: Any, where: Path) -> Iterator[_Group]:
    """Yield every dict that has tensors of its own."""
    for at, value in _dicts(saved):
        entries: dict[Any, Any] = {}
        for key, entry in value.items():
            name = _WRAPPERS.sub("", key) if isinstance(key, str) else key
            if name in entries:
                raise ValueError(f"{where}: holds {at}{name} twice, as {key} and without a wrapper")
            entries[name] = entry
        if any(isinstance(entry, Tensor) for entry in entries.values()):
            yield _Group(at, _dotted(entries))


def _dotted(entries: dict[Any, Any]) -> dict[Any, Any]:
    """Give the averages of latent diffusion's code their dots back.

    Its LitEma registers the average of a.b.c as model_ema.abc.
    """
    names = [key.split(".") for key in entries if isinstance(key, str)]
    own = [parts for parts in names if not _EMA.search(parts[0])]
    if len(own) == len(names):
        return entries
    ends = {"".join(parts[i:]): ".".join(parts[i:]) for parts in own for i in range(len(parts))}

    def name(key: Any) -> Any:
        head, _, rest = key.partition(".") if isinstance(key, str) else ("", "", "")
        return f"{head}.{ends[rest]}" if _EMA.search(head) and rest in ends else key

    return {name(key): entry for key, entry in entries.items()}


def _check_parts(groups: list[_Group], where: Path) -> None:
    """Raise ValueError if a file holds a part of a model that draws latents or follows a text."""
    for group in groups:
        for key in group.entries:
            if match := _OTHER_PARTS.search(f"{group.at}{key}."):
                raise ValueError(
                    f"{where}: holds {group.at}{key}, of a part ({match[2]}) without which the "
                    f"network is half a model; give a diffusers pipeline that holds both"
                )


def _networks(groups: list[_Group]) -> dict[str, tuple[_Group, str]]:
    """Return the networks by name: the dict that each lies in, and its prefix there.

    A damaged one, of which a sign is left, counts if there is no whole one.
    """

    def has(group: _Group, prefix: str) -> bool:
        return any(all(prefix + name in group.entries for name in code) for code in _CODES)

    found = {g.at + prefix: (g, prefix) for g in groups for prefix in _prefixes(g)}
    whole = {name: (g, prefix) for name, (g, prefix) in found.items() if has(g, prefix)}
    return whole or found


def _prefixes(group: _Group) -> list[str]:
    """Return what stands before the signs of a network in a dict, in the order it is found."""
    signs = ((key, sign) for key in group.entries for sign in _SIGNS if _ends(key, sign))
    return list(dict.fromkeys(key.removesuffix(sign) for key, sign in signs))


def _ends(key: Any, sign: str) -> bool:
    return isinstance(key, str) and (key == sign or key.endswith(f".{sign}"))


def _starts(key: Any, prefix: str) -> bool:
    return not prefix or (isinstance(key, str) and key.startswith(prefix))


def _after(key: Any, prefix: str) -> Any:
    return key[len(prefix) :] if prefix else key


def _one_of(names: list[str], where: Path) -> str:
    """Return the only network, or the only average of several. Raise ValueError otherwise."""
    averages = [name for name in names if _EMA.search(name)]
    for few in (names, averages):
        if len(few) == 1:
            return few[0]
    several = ", ".join(_words(name) for name in averages or names)
    raise ValueError(
        f"{where}: holds several networks, {several}; save the state dict of one in a file of "
        f"its own"
    )


def _betas(group: _Group, prefix: str) -> Tensor | None:
    """Return the betas that lie beside a network, or as far up its prefix as they are."""
    parts = prefix.split(".")
    for i in reversed(range(len(parts))):
        betas = group.entries.get(".".join([*parts[:i], "betas"]))
        if isinstance(betas, Tensor) and betas.dim() == 1 and betas.numel() > 1:
            return betas
    return None


def _is_aside(value: Any, betas: Tensor | None) -> bool:
    """Return whether a value is no weight: a number, or a table that follows from the betas."""
    if not isinstance(value, Tensor):
        return not isinstance(value, Mapping)
    return value.numel() == 1 or (betas is not None and value.shape == betas.shape)


def _check_beside(group: _Group, prefixes: list[str], betas: Tensor | None, where: Path) -> None:
    """Raise ValueError for a tensor beside the networks of a dict that is no number or table."""
    for key, w in group.entries.items():
        if any(_starts(key, p) for p in prefixes) or isinstance(w, Mapping) or _is_aside(w, betas):
            continue
        raise ValueError(
            f"{where}: holds {key} {list(w.shape)} beside the network {_words(prefixes[0])}, to "
            f"which it does not belong; save the state dict of the network in a file of its own"
        )


def _lists(saved: Any) -> Iterator[str]:
    """Yield the places of lists of tensors: some averages have no names."""
    for at, value in _dicts(saved):
        for key, entry in value.items():
            if isinstance(entry, list | tuple) and any(isinstance(w, Tensor) for w in entry):
                yield f"{at}{key}."


def _said(
    name: str, found: Mapping[str, Any], groups: list[_Group], lists: Iterable[str], where: Path
) -> tuple[str, ...]:
    said = []
    if others := [_words(other) for other in found if other != name]:
        said.append(f"{where}: the average is read, {_words(name)}, and not {', '.join(others)}")
    used = {group.at for group, _ in found.values()}
    left = [at for at in (*(g.at for g in groups), *lists) if at not in used]
    if left := dict.fromkeys(_words(at) for at in left if not at.startswith("opt")):
        said.append(f"{where}: not read are the tensors of {', '.join(left)}")
    return tuple(said)


def _cast(tensors: Mapping[str, Tensor], where: Path) -> list[str]:
    halves = {str(w.dtype).removeprefix("torch.") for w in tensors.values() if w.dtype in HALVES}
    return [f"{where}: its {kind} weights are read as float32" for kind in sorted(halves)]


def _words(name: str) -> str:
    return name.removesuffix(".") or "the only ones in the file"


def _nothing(saved: Any, groups: list[_Group], where: Path) -> dict[str, Tensor]:
    """Return weights of another network, or raise ValueError for what is no state dict."""
    if not groups and (nameless := next(_lists(saved), None)):
        raise ValueError(
            f"{where}: the tensors of {_words(nameless)} have no names, as in averages of "
            f"diffusers; copy them into the network and save its state dict"
        )
    if groups and isinstance(saved, Mapping) and groups[0].at:
        at, entries = groups[0]
        raise ValueError(
            f"{where}: not a U-Net of DDPM, ADM or diffusers; it holds {at}{next(iter(entries))}"
        )
    return named(saved, where)
