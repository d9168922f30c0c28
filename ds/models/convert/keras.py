"""The 2021 code's HDF5 files: teachers, and students with the U-Net nested in one group.

They list Keras' variables in the order in which its layers were created. There are two orders, of
the checkpoints the weights once came from: TensorFlow's (CIFAR-10, LSUN) is alphabetical in our
names, PyTorch's (CelebA) is the one in which our network defines its layers. The names in a file
count every layer ever made in the process that wrote it, so nothing is read from the numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from ds.diffusion.schedules import LinearBeta
from ds.models.convert.diffusers import scheduler
from ds.models.convert.imported import PUBLISHED, Imported, Options, checked, shapes
from ds.nets.unet import UNetConfig
from ds.system.arrays import check_unpacked
from ds.system.files import opened, sha256, whole

_EPS = 1e-3  # of tensorflow_addons' GroupNormalization, which made and ran all these files


class Variable(NamedTuple):
    """A variable of Keras, its kind ("kernel", "gamma", ...) and its shape there."""

    name: str  # ours in what a network expects, the file's in what a file lists
    kind: str
    shape: tuple[int, ...]


def read(path: Path, options: Options) -> Imported:
    """Read a weights file of Keras; its nesting tells a teacher from a student."""
    try:
        import h5py
    except ImportError:
        raise RuntimeError(
            f"{path}: an HDF5 file needs h5py: pip install 'denoising-student[hdf5]'"
        ) from None
    with whole(path, "HDF5 file"):
        file = h5py.File(path)
    with file:
        layers, datasets = _contents(file, h5py.Dataset, path)
        with opened(path) as stored:
            check_unpacked(sum(o.nbytes for o in datasets.values()), stored, path)
        found = _listed(layers, datasets, path)
        config, order = _architecture(found, path)
        if options.image_size not in (None, config.image_size):
            raise ValueError(
                f"{path}: its network draws {config.image_size} pixels, image_size is "
                f"{options.image_size}"
            )
        stored = {
            ours.name: _weight(datasets[v.name], v, path)
            for ours, v in zip(order, found, strict=True)
        }
    weights = {name: stored[name].reshape(shape) for name, shape in shapes(config).items()}
    kind = "student" if sum(map(bool, layers.values())) == 1 else "teacher"
    facts = {"format": "denoising-student-2021", "file": path.name, "sha256": sha256(path)}
    if kind == "student" and options.scheduler:
        raise ValueError(f"{path}: is a student, which has no scheduler; leave scheduler out")
    if kind == "student":
        method = {"type": "denoising_student", "t": LinearBeta().noise}
        return Imported(kind, config, weights, LinearBeta(), None, facts, method=method)
    teacher = Imported(kind, config, weights, LinearBeta(), "eps", facts)
    return scheduler.given(teacher, options.scheduler)


def _contents(
    file: Any, dataset: type, where: Path
) -> tuple[dict[str, list[str] | None], dict[str, Any]]:
    """Return the names that each layer lists, None if it is missing, and all datasets by name."""
    objects: dict[str, Any] = {}
    with whole(where, "HDF5 file"):
        file.visititems(objects.__setitem__)  # follows no link, so it stays in this file
        layers = {
            name: _strings(objects[name].attrs, "weight_names") if name in objects else None
            for name in _strings(file.attrs, "layer_names")
        }
    return layers, {name: o for name, o in objects.items() if isinstance(o, dataset)}


def _strings(attributes: Any, name: str) -> list[str]:
    """Return an attribute's strings; Keras cuts a long one into name0, name1, ..."""
    keys = [name] if name in attributes else _present(attributes, name)
    values = [value for key in keys for value in attributes[key]]
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _present(attributes: Any, name: str) -> Iterator[str]:
    return takewhile(lambda key: key in attributes, (f"{name}{i}" for i in count()))


def _listed(
    layers: dict[str, list[str] | None], datasets: dict[str, Any], where: Path
) -> list[Variable]:
    """Return the variables in the order of the file's lists; every dataset is listed once."""
    found, unused = [], dict(datasets)
    for layer, names in layers.items():
        if names is None:
            raise ValueError(f"{where}: the layer {layer} is listed and not there")
        for name in names:
            key = f"{layer}/{name}"
            if key not in unused:
                raise ValueError(f"{where}: the variable {key} is not there, or listed twice")
            kind = name.rpartition("/")[2].partition(":")[0]
            with whole(where, "HDF5 file"):
                found.append(Variable(key, kind, tuple(unused.pop(key).shape or ())))
    if not found:
        raise ValueError(f"{where}: not a weights file of Keras, it lists no variables")
    if unused:
        raise ValueError(f"{where}: the dataset {next(iter(unused))} is in no layer's list")
    return found


def _architecture(found: Sequence[Variable], where: Path) -> tuple[UNetConfig, list[Variable]]:
    """Return the published network that agrees longest with what a file lists, and its order.

    Raises ValueError naming the first variable at which even that one differs.
    """
    first = found[0].shape
    alphabetical = len(first) == 4
    channels = first[-1 if alphabetical else 0] if first else 0
    begins = (3, 3, 3, channels) if alphabetical else (channels, 4 * channels)
    if first != begins or channels % 32 or not channels:
        raise ValueError(
            f"{where}: begins with {_describe(found)}; a U-Net of 2021 begins with a kernel "
            f"[3, 3, 3, c] or [c, 4c], c a multiple of 32"
        )
    configs = [replace(c, channels=channels, norm_eps=_EPS) for c in PUBLISHED]
    orders = [(c, list(variables(c, alphabetical=alphabetical))) for c in configs]
    config, order = max(orders, key=lambda candidate: _agreement(candidate[1], found))
    at = _agreement(order, found)
    if at < max(len(order), len(found)):
        have, want = (_describe(listed[at:]) for listed in (found, order))
        raise ValueError(f"{where}: variable {at} is {have}; the network has {want} there")
    return config, order


def _describe(variables: Sequence[Variable]) -> str:
    if not variables:
        return "none"
    name, kind, shape = variables[0]
    return f"{name}, a {kind} {list(shape)}"


def variables(config: UNetConfig, *, alphabetical: bool) -> Iterator[Variable]:
    """Yield the weights of a U-Net as Keras variables, with our names, in one of the two orders."""
    table = shapes(config)
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in table))
    if alphabetical:
        layers.sort(key=lambda name: name.split("."))
    for layer in layers:
        weight, bias = table[f"{layer}.weight"], table[f"{layer}.bias"]
        kinds = ("gamma", "beta") if weight == bias else ("kernel", "bias")
        yield Variable(f"{layer}.weight", kinds[0], _transposed(weight))
        yield Variable(f"{layer}.bias", kinds[1], tuple(bias))


def _transposed(shape: Size) -> tuple[int, ...]:
    """Return Keras' shape of [out, in, height, width]; its 1x1 convolutions are dense layers."""
    pixels = shape[2:] if shape[2:] != (1, 1) else ()
    return (*pixels, *reversed(shape[:2]))


def _agreement(order: Sequence[Variable], found: Sequence[Variable]) -> int:
    pairs = zip(order, found, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0][1:] == pair[1][1:], pairs))


def _weight(dataset: Any, variable: Variable, where: Path) -> Tensor:
    """Return a variable in our layout: [out, in, ...] if it has more than one dimension."""
    with whole(where, "HDF5 file"):
        dtype, elsewhere = dataset.dtype, dataset.external or dataset.is_virtual
    if dtype not in ("float16", "float32") or elsewhere:
        raise ValueError(
            f"{where}: the variable {variable.name} is {dtype}, in "
            f"{'another' if elsewhere else 'this'} file; accepted are float16 and float32 in this"
        )
    with whole(where, "HDF5 file"):
        w = torch.from_numpy(dataset[()])
    w = checked(w, variable.name, Size(variable.shape), where)
    return w.movedim((-1, -2), (0, 1)).contiguous() if w.dim() > 1 else w
