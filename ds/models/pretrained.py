"""A directory for a network: config.json, model.safetensors and a README.md for people.

config.json holds the configuration, the provenance, the SHA-256 of the weights and a checksum of
itself, so damaged or mixed-up directories are noticed. To edit it, remove that checksum. Nothing in
it can run code.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

import ds
from ds.diffusion.denoiser import Denoiser
from ds.nets.base import AbstractNetConfig, Undrawn
from ds.system import targets
from ds.system.ambient import without_ambient
from ds.system.config import Count, Sha256, checked, from_json, to_json
from ds.system.files import by_name, present, read_json, read_sealed, regular, sealed, sha256, whole
from ds.system.staging import recover, replacing_directory, write_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
METRICS = "metrics.json"
DECODER = "decoder"  # a directory within that of a model of latents, written as diffusers does
DECODER_CONFIG = "config.json"
DECODER_WEIGHTS = "diffusion_pytorch_model.safetensors"
Card = Callable[[str, dict[str, Any]], str]  # the text for a name and a provenance
T = TypeVar("T")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Config(TypedDict, total=False):
    """The fields of config.json; `entry` reports those that are missing."""

    format: str
    version: str
    net: Any
    sha256: Sha256
    schedule: Any
    prediction: Any
    guidance: Any
    solver: Any
    grid: list[float]
    method: Any
    nfe: Count
    provenance: dict[str, Any]
    card: Sha256
    decoder: dict[str, Sha256]  # the hashes of its files


def write(
    path: str | Path,
    kind: str,
    config: dict[str, Any],
    net: nn.Module,
    card: Card,
    decoder: Mapping[str, bytes],
    *,
    force: bool = False,
) -> None:
    """Write a network, its configuration, and the card made from the name and the provenance.

    `decoder` holds the content of a decoder's files by name. A model of the same run is replaced;
    what other commands noted on the same weights stays. Raises ValueError for a network without a
    configuration to rebuild it from, for weights that are not finite, and as `target` does.
    """
    weights = {name: w.detach().cpu().contiguous() for name, w in _state(net).items()}
    check_finite(weights, str(path))
    head: dict[str, Any] = {"format": f"denoising-student/{kind}/1", "version": ds.__version__}
    head["net"] = to_json(rebuildable(net))
    where, old = target(path, force=force, run=config["provenance"].get("run"))
    old = [name for name in old if force or name != METRICS]
    content = save(weights)
    head["sha256"] = hashlib.sha256(content).hexdigest()
    if decoder:
        head["decoder"] = {n: hashlib.sha256(part).hexdigest() for n, part in decoder.items()}
    if old and not force and (before := _read_config(where))["sha256"] == head["sha256"]:
        config = {**config, "provenance": before["provenance"] | config["provenance"]}
    with replacing_directory(where, old) as folder:
        (folder / WEIGHTS).write_bytes(content)
        for name, part in decoder.items():
            (folder / DECODER).mkdir(exist_ok=True)
            (folder / DECODER / name).write_bytes(part)
        _describe(folder, {**head, **config}, card, where)


def target(
    path: str | Path, *, force: bool = False, run: str | None = None, apart: targets.Inputs = ()
) -> tuple[Path, list[str]]:
    """Return where `write` writes, and the names it replaces there; see ds.system.targets.

    Raises ValueError if the directory is not empty, unless it holds a model of the same run or,
    with `force`, a model and nothing else.
    """
    where = Path(os.path.realpath(path))
    again = run is not None and is_ours(where) and run_of(where) == run
    return targets.directory(path, "model", _ours, force=force, again=again, apart=apart)


def annotate(path: str | Path, provenance: dict[str, Any], card: Card, result: Any) -> None:
    """Replace the provenance, the figures and the card of a directory, and leave the rest."""
    where, old = annotated(path)
    with replacing_directory(where, old) as folder:
        write_json(folder / METRICS, result)
        _describe(folder, {**_read_config(where), "provenance": provenance}, card, where)


def annotated(path: str | Path) -> tuple[Path, list[str]]:
    """Return the directory that `annotate` writes to, and the names it replaces there.

    Raises ValueError if it cannot be written to, or holds figures that we did not write.
    """
    where, old = targets.directory(path, "model", _ours, again=True)
    if METRICS not in old and (where / METRICS).exists():
        raise ValueError(f"{where / METRICS}: was not written by `evaluate`; move it")
    return where, [n for n in old if n != WEIGHTS and not n.startswith(f"{DECODER}/")]


def _describe(folder: Path, config: dict[str, Any], card: Card, where: Path) -> None:
    """Write the configuration of a directory, and its card unless people have edited it."""
    text = card(where.name, config["provenance"]).encode(errors="backslashreplace")
    ours = _ours(where)
    if not (where / CARD).exists() or (ours and ours(CARD)):
        (folder / CARD).write_bytes(text)
        config = {**config, "card": hashlib.sha256(text).hexdigest()}
    write_json(folder / CONFIG, sealed(config))


def _ours(folder: Path) -> targets.Ours | None:
    """Return a test for names that we wrote in a model's directory: an edited card is not ours."""
    if not is_ours(folder):
        return None
    config = _read_config(folder)
    names = {CONFIG, WEIGHTS, METRICS, CARD, *decoder_files(config)}
    written, found = config.get("card"), folder / CARD
    if written and found.exists() and sha256(found) != written:
        names -= {CARD}
    if not _holds_figures(folder / METRICS):
        names -= {METRICS}
    return names.__contains__


def decoder_files(config: dict[str, Any]) -> dict[str, Any]:
    """Return the files of the decoder that a configuration tells of, by relative name: hashes."""
    if not isinstance(hashes := config.get("decoder"), dict):
        return {}
    names = (DECODER_CONFIG, DECODER_WEIGHTS)
    return {f"{DECODER}/{name}": hashes.get(name) for name in names}


def _holds_figures(file: Path) -> bool:
    try:
        return "protocol" in by_name(read_json(file), file)
    except (ValueError, FileNotFoundError):
        return False


def run_of(path: Path) -> str | None:
    """Return the identity of the run that made a model's directory."""
    return _read_config(path).get("provenance", {}).get("run")


@without_ambient()
def read(
    path: str | Path, kind: str, types: Iterable[type] = ()
) -> tuple[dict[str, Any], nn.Module]:
    """Read what `write` wrote; return the configuration and the network, on the CPU, in eval mode.

    `types` are classes of the caller's that the configuration may name. Raises ValueError, naming
    the file, if something is missing, damaged, of another kind, of the wrong shape or not finite.
    """
    path = Path(path)
    config = _read_config(path)
    _check_kind(path, config, (kind,))
    checked(config, _Config, path / CONFIG)
    weights = _read_weights(path / WEIGHTS, config.get("sha256"))
    with naming(path), Undrawn():
        net = entry(config, "net", AbstractNetConfig, types=types).build().to(torch.float32)
    load_strictly(net, weights, str(path / WEIGHTS))
    return config, net.eval()


def is_ours(path: str | Path) -> bool:
    """Return whether `write` wrote a directory's config.json, whatever its kind."""
    recover(Path(path))
    file = Path(path) / CONFIG
    if not present(file):
        return False
    config = read_json(file)
    return isinstance(config, dict) and str(config.get("format")).startswith("denoising-student/")


def kind(path: str | Path, expected: tuple[str, ...]) -> str:
    """Return which of the expected kinds a directory is; ValueError if it is none of them."""
    return _check_kind(Path(path), _read_config(Path(path)), expected)


def entry(config: dict[str, Any], name: str, kind: type[T], *, types: Iterable[type] = ()) -> T:
    """Return the value of a name in the configuration; ValueError if it is no `kind`."""
    value = from_json(config.get(name), types)
    if not isinstance(value, kind):
        raise ValueError(f"{name!r} must be of the kind {kind.__name__}, not {value!r}")
    return value


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Prefix the message of a ValueError with the directory's config.json."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{Path(path) / CONFIG}: {error}") from None


def load_strictly(net: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Copy weights into a network; ValueError as `check_weights` raises it."""
    check_weights(net, weights, where)
    net.load_state_dict(weights)


def check_weights(net: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Check that every weight is used once, has its shape, and is finite.

    Raises ValueError naming the first wrong key, both shapes if they differ, or a dtype that is not
    floating where the network's is.
    """
    expected = net.state_dict()
    for name, w in expected.items():
        if name not in weights:
            raise ValueError(f"{where}: the weight {name} {list(w.shape)} is missing")
        if weights[name].shape != w.shape:
            raise ValueError(
                f"{where}: the weight {name} has the shape {list(weights[name].shape)}, "
                f"the network needs {list(w.shape)}"
            )
        if weights[name].dtype not in (FLOATS if w.is_floating_point() else (w.dtype,)):
            raise ValueError(
                f"{where}: the weight {name} is {weights[name].dtype}, the network needs {w.dtype}"
            )
    for name in weights:
        if name not in expected:
            raise ValueError(f"{where}: the network has no weight {name}")
    check_finite(weights, where)


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError naming the first weight that holds an infinity or not-a-number."""
    for name, w in weights.items():
        # One number that is not finite makes the sum so, which is much faster to look at. Large
        # numbers may, too.
        if not (w.sum().isfinite() or w.isfinite().all()):
            raise ValueError(f"{where}: the weight {name} is not finite; it cannot be used")


def rebuildable(net: nn.Module) -> AbstractNetConfig:
    """Return the network's configuration; ValueError if ds could not rebuild it from that."""
    config = getattr(net, "config", None)
    if not isinstance(config, AbstractNetConfig):
        raise ValueError(
            f"{type(net).__name__} cannot be saved: its `config` is no AbstractNetConfig; "
            f"save its state_dict yourself"
        )
    return config


def describe(net: nn.Module) -> Any:
    """Return the JSON of a network's configuration, or its type's name where it has none."""
    config = getattr(net, "config", None)
    return type(net).__qualname__ if config is None else to_json(config)


def fingerprint(denoiser: Denoiser) -> str:
    """Return the SHA-256, in hex, of a denoiser: network, weights, schedule and prediction.

    Guidance is part of it, with a classifier's weights; of a classifier that is a function the name
    is.
    """
    digest = hashlib.sha256()
    about = (describe(denoiser.net), to_json(denoiser.schedule), to_json(denoiser.prediction))
    nets = [denoiser.net]
    if (guidance := denoiser.guidance) is not None:
        about = (*about, guidance.about())
        nets += [guidance.net] if guidance.net is not None else []
    digest.update(repr(about).encode())
    for net in nets:
        for name, w in sorted(_state(net).items()):
            hash_weight(digest, name, w)
    return digest.hexdigest()


def hash_weight(digest: Any, name: str, w: Tensor) -> None:
    """Add a weight to a hash: its name, dtype, shape and bits."""
    bits = w.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(f"{name} {w.dtype} {list(w.shape)}".encode())
    digest.update(bits.numpy().tobytes())


def _state(net: nn.Module) -> dict[str, Tensor]:
    """Return the weights under the names they have before torch.compile wraps the network."""
    return {name.removeprefix("_orig_mod."): w for name, w in net.state_dict().items()}


def _read_config(path: Path) -> dict[str, Any]:
    if not present(path / CONFIG):
        raise ValueError(f"{path}: no model here, it has no {CONFIG}")
    return read_sealed(path / CONFIG)


def _check_kind(path: Path, config: dict[str, Any], expected: tuple[str, ...]) -> str:
    found = config.get("format")
    for kind in expected:
        if found == f"denoising-student/{kind}/1":
            return kind
    raise ValueError(
        f"{path / CONFIG}: expected a {' or a '.join(expected)}, found the format {found!r}"
    )


def _read_weights(path: Path, digest: Any) -> dict[str, Tensor]:
    if not present(path):
        raise ValueError(f"{path}: the weights are missing")
    regular(path)
    found = sha256(path)  # which also shows that it can be read
    with whole(path, "safetensors file"):
        weights = load_file(path)
    check_hash(path, found, digest)
    return weights


def check_hash(path: Path, found: str, digest: Any) -> None:
    """Raise ValueError if a file's SHA-256 is not the one that its directory gives."""
    if found != digest:
        raise ValueError(
            f"{path}: its SHA-256 is not the one in {CONFIG}; the file is damaged or from "
            f"elsewhere, copy the directory again"
        )
