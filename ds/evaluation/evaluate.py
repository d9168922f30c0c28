"""How good are the images? Distances to real ones, and the error on held-out pairs."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

import ds
from ds.diffusion.conditions import Conditions
from ds.diffusion.noise import as_bits, noise
from ds.evaluation.by_class import agreement, asked_of, by_class, of_classes
from ds.evaluation.features import AbstractExtractor, Inception
from ds.evaluation.metrics import (
    NEAREST,
    SPLITS,
    frechet_distance,
    frechet_distance_from_moments,
    kernel_distance,
    precision_recall,
)
from ds.evaluation.references import Moments, check_images
from ds.evaluation.statistics import PAIRWISE, Statistics
from ds.methods.flow.path import PATH, straightness
from ds.models import pretrained
from ds.models.execution import Execution
from ds.models.images import Rounding
from ds.models.model import Model, dtype_name
from ds.models.sampler import Sampler
from ds.models.teacher import Teacher
from ds.nets.base import NO_CLASS
from ds.pairs.pictures import Pictures
from ds.pairs.sources import Pairs
from ds.system import targets
from ds.system.ambient import without_ambient
from ds.system.config import Between, Count, Seed, require, to_json
from ds.system.cost import check_memory
from ds.system.distributed import broadcast, gather, is_first, share, world_size
from ds.system.machine import device_name
from ds.system.staging import write_json

log = logging.getLogger("ds")
PATHS, STEPS = 128, 32  # of a straightness: as many calls as 4,096 images in one
MOST = 10_000_000  # images: more of them move no figure
SECONDS, CLASSES = "seconds_per_1000_images", "classes"
Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How figures were obtained. The fields after `pairwise` are for images that a model draws."""

    version: str
    n: int  # images
    quantizer: Rounding
    extractor: dict[str, Any]
    reference: dict[str, Any]
    pairwise: dict[str, int] | None = None  # images whose distances to each other were taken
    nfe: int | None = None
    solver: Any = None
    grid: list[float] | None = None
    method: Any = None
    seed: int | None = None
    batch_size: int | None = None
    dtype: str | None = None  # of the network's weights
    execution: dict[str, Any] | None = None
    device: dict[str, str] | None = None
    decoder: dict[str, str] | None = None  # of latents
    classes: dict[str, Any] | None = None  # that images were asked for, and how often
    guidance: dict[str, Any] | None = None  # a teacher's, and the scale or the ends of its range
    held_out: dict[str, Any] | None = None

    @property
    def json(self) -> dict[str, Any]:
        """The fields that apply."""
        return {name: value for name, value in vars(self).items() if value is not None}


@without_ambient()
def evaluate(
    images_or_model: Tensor | Pictures | Model,
    reference: Tensor | Pictures | Moments,
    extractor: AbstractExtractor,
    *,
    n: int = 4096,
    seed: int = 1,
    batch_size: int = 256,
    execution: Execution | None = None,
    conditions: Conditions | None = None,
    rounding: Rounding = "round",
    held_out: Pairs | None = None,
    out: str | Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Compare generated images with real ones; return the figures and their "protocol".

    `images_or_model` is a model to draw n images from, with the noise of (seed, 0 .. n - 1), or
    uint8 images [N, H, W, C]. `reference` is uint8 images, or the moments of their features, which
    allow only a Frechet distance. Images of either side may be Pictures, which can have labels.
    `execution` says how the model is run, by default as a Sampler does; the protocol records it.
    With `held_out` pairs, the model's samples for their noise, and their conditions, are
    compared with the stored ones: "pair_rms" in units of [-1, 1], and "pair_r2". A teacher on the
    straight path, such as RectifiedFlow makes, has a "straightness", as in
    `ds.methods.flow.path.straightness`: 0 if its paths are straight. With `out`, the result is also
    written there as JSON. Processes that torchrun started share the work and return the same
    figures.

    A model with classes is asked for those of the reference, as often as they are there, and
    without its labels for all of its own equally often. `conditions` may name some of them, to
    which the reference is then cut, and a guidance scale or a range of it. Figures of each class
    are in "classes", as `ds.evaluation.by_class.by_class` says; "class_kernel_distance" is the mean
    of their kernel distances. "classifier_agreement" is the share of images that the classifier
    behind the features finds in the class they were drawn for, "reference_agreement" that of the
    real ones, which no generator can be expected to exceed.

    Images that are drawn are not kept, so memory does not grow with n. Kernel distance, precision
    and recall compare the first 16,384 of each side. The Frechet distance is called "fid" only on
    Inception features of 50,000 images or more, and "frechet_distance" otherwise.

    Raises ValueError before anything is drawn: for images that are not uint8 or have another size
    than the reference, an extractor that does not take them, moments of another width, an n that is
    too small for a figure, features too wide for the memory, held-out pairs without a model, and an
    `out` that cannot be written to or, without `force`, exists. Raises RuntimeError where the
    network's numbers are not finite.
    """
    if isinstance(images_or_model, Tensor):
        images_or_model = Pictures(images_or_model)
    real = Pictures(reference) if isinstance(reference, Tensor) else reference
    if isinstance(images_or_model, Pictures):
        check_images(images_or_model.images, real if isinstance(real, Moments) else real.images)
        n, shape = len(images_or_model.images), images_or_model.images.shape[1:]
        if held_out is not None or conditions is not None:
            raise ValueError(
                "evaluate: held_out pairs need a model, not images it has drawn; so do conditions"
            )
    else:
        shape = image_shape(images_or_model)
        conditions = images_or_model.conditions(conditions)
        real = told_apart(real, images_or_model, conditions)
    width = check_evaluation(shape, n, real, extractor)
    require("evaluate", Count, batch_size=batch_size)
    require("evaluate", Seed, seed=seed)
    if held_out is not None and len(held_out) < 2:
        raise ValueError(f"evaluate: held_out needs 2 pairs or more, not {len(held_out)}")
    if out is not None and is_first():  # before the work, not after it
        out = targets.file(out, force=force, apart=[held_out.store.path if held_out else None])

    keep = PAIRWISE if isinstance(real, Pictures) else 0
    statistics = partial(_statistics, extractor, width, keep, batch_size)
    found: Figures = {}
    drawn: dict[str, Any] = {}
    if isinstance(images_or_model, Pictures):
        made, labels = statistics(_slices(images_or_model.images), n), images_or_model.labels
    else:
        assert conditions is not None
        sampler = Sampler(
            images_or_model, batch_size=batch_size, execution=execution, conditions=conditions
        )
        asked = asked_of(conditions, real if isinstance(real, Pictures) else None, n, seed)
        labels = asked and asked.labels
        drawing = _Drawing(sampler, seed, n, rounding, labels)
        made = statistics(drawing, n)
        found[SECONDS] = drawing.seconds / n * 1000
        drawn = _about_drawing(sampler, images_or_model, seed)
        if asked:
            drawn["classes"] = {"of": [*conditions.classes], "drawn": asked.how}
        if held_out is not None:
            found |= _pair_error(sampler, held_out)
            drawn["held_out"] = {"n": len(held_out), "fingerprint": held_out.fingerprint()}
        found |= _straightness(sampler, images_or_model, seed)
    there: Statistics | Moments
    if isinstance(real, Pictures):
        count = len(real.images)
        there = statistics(_slices(real.images), count)
        drawn["pairwise"] = {"n": min(n, PAIRWISE), "reference": min(count, PAIRWISE)}
    else:
        there = real
    found |= broadcast(lambda: _distances(made, there, n, extractor))
    classes = broadcast(lambda: _of_classes(made, labels, there, real, extractor))
    protocol = Protocol(
        version=ds.__version__,
        n=n,
        quantizer=rounding,
        extractor={"name": extractor.name, "sha256": extractor.sha256, "dim": width},
        reference=_about_reference(real),
        **drawn,
    )
    result = {**found, **classes, "protocol": protocol.json}
    if out is not None and is_first():
        _write(out, result, force)
    return result


def told_apart(
    real: Pictures | Moments, model: Model, conditions: Conditions
) -> Pictures | Moments:
    """Return the reference with the labels of a model, and of the classes it is asked for only.

    Labels that mean nothing to the model are left out. Raises ValueError for folders of classes
    that the model was not taught, and for a reference without the classes that are asked for.
    """
    if isinstance(real, Moments) or real.labels is None:
        return real
    if not model.classes or NO_CLASS in conditions.classes:
        return Pictures(real.images)
    real = real.named(model.provenance.get("classes") or ())
    if real.classes > model.classes:
        log.warning(
            "evaluate: the reference has labels up to %d, the model classes 0 to %d; they are not "
            "the same classes, and its labels are not used",
            real.classes - 1,
            model.classes - 1,
        )
        return Pictures(real.images)
    return of_classes(real, conditions.classes)


def _of_classes(
    made: Statistics,
    labels: Tensor | None,
    there: Statistics | Moments,
    real: Pictures | Moments,
    extractor: AbstractExtractor,
) -> dict[str, Any]:
    """Return the figures of each class, and those that are means over classes."""
    if labels is None or not (labels >= 0).any():
        return {}
    known = real.labels if isinstance(real, Pictures) else None
    statistics = there if isinstance(there, Statistics) else None
    classified = int(labels.max()) < extractor.classes
    shares: dict[str, float | None] = {}
    if classified:
        shares["classifier_agreement"] = agreement(made.classes, labels)
        shares["reference_agreement"] = agreement(statistics and statistics.classes, known)
    each = by_class(made, labels, statistics, known, classified=classified)
    distances = [f["kernel_distance"] for f in each.values() if "kernel_distance" in f]
    if distances:
        shares["class_kernel_distance"] = math.fsum(distances) / len(distances)
    return {**{k: v for k, v in shares.items() if v is not None}, CLASSES: each}


def image_shape(model: Model) -> tuple[int, int, int]:
    """Return the shape (H, W, C) of a model's pictures; ValueError if it makes none."""
    c, h, w = model.require_images("evaluate")
    return h, w, c


def check_evaluation(
    shape: Sequence[int],
    n: int,
    reference: Tensor | Pictures | Moments,
    extractor: AbstractExtractor,
) -> int:
    """Check that n images of a shape (H, W, C) can be evaluated; return the width of the features.

    Raises ValueError for another size than the reference's, an extractor that does not take the
    images, moments of another width, fewer images than every figure needs, and features that do not
    fit the memory.
    """
    reference = reference.images if isinstance(reference, Pictures) else reference
    probe = torch.zeros(2, *shape, dtype=torch.uint8, device="cpu")
    check_images(probe, reference)
    scored = type(extractor).logits is not AbstractExtractor.logits
    least = SPLITS if scored else NEAREST + 1 if isinstance(reference, Tensor) else 2
    require("evaluate", Annotated[int, Between(least, MOST)], n=n)
    if isinstance(reference, Tensor):
        require("evaluate", Annotated[int, Between(least, 2**63 - 1)], reference=len(reference))
    width = _width(extractor, probe)
    kept = 0
    if isinstance(reference, Tensor):
        kept = min(n, PAIRWISE) + min(len(reference), PAIRWISE)
    elif width != len(reference.mean):
        raise ValueError(
            f"evaluate: the reference holds moments of {len(reference.mean):,} features, the "
            f"extractor {extractor.name} makes {width:,}; give the extractor that made them "
            f"(2,048 are Inception's: --inception-weights FILE)"
        )
    # Moments and their product and eigenvectors; features kept, centred, and put together.
    needed = 8 * width * (10 * width + 3 * kept)
    check_memory(f"evaluate: {width:,} features an image, of {extractor.name},", needed)
    return width


def _width(extractor: AbstractExtractor, images: Tensor) -> int:
    """Return how many features an extractor makes of an image; ValueError if it takes no such."""
    shape = list(images.shape[1:])
    refusal = ValueError(
        f"evaluate: the extractor {extractor.name} takes {extractor.takes}, and these are {shape}; "
        f"give another one (--extractor auto chooses by the images)"
    )
    if not extractor.fits(shape):
        raise refusal
    try:
        return extractor(images).shape[1]
    except RuntimeError:  # a layer of an extractor of the caller's does not take them
        raise refusal from None


def figures(result: dict[str, Any]) -> Figures:
    """Return the figures of an evaluation that depend on the model, without speed and protocol."""
    return {k: v for k, v in result.items() if k not in ("protocol", SECONDS, CLASSES)}


def way(result: dict[str, Any]) -> str:
    """Return how figures of a model were obtained, in a line: precision, mode, device, features."""
    about = result["protocol"]
    execution, device = about["execution"], about["device"]
    return (
        f"{execution['precision']}, mode {execution['mode']}, on {device['type']} "
        f"({device['name']}), {about['extractor']['name']} features of {about['n']:,} images"
    )


def record(path: str | Path, model: Model, result: dict[str, Any]) -> None:
    """Put the figures of an evaluation into a model directory: metrics.json and its card."""
    known = {k: f"{v:.4g}" for k, v in figures(result).items()}
    known["measured_on"] = way(result)
    pretrained.annotate(path, model.provenance | known, model.card, result)


def split_floor(
    images: Tensor, extractor: AbstractExtractor, *, first: int, splits: int = 5
) -> float:
    """Return the Frechet distance of real images to real images, the mean over random splits.

    `first` images are compared with the rest; no generator can be expected to do much better.
    """
    features = extractor(images)
    total = 0.0
    for seed in range(splits):
        order = np.random.default_rng(seed).permutation(len(images))
        total += frechet_distance(features[order[:first]], features[order[first:]])
    return total / splits


class _Drawing:
    """Draw images of a seed: drawing(rows) -> uint8; `seconds` is how long that has taken."""

    def __init__(
        self, sampler: Sampler, seed: int, n: int, rounding: Rounding, labels: Tensor | None
    ):
        self._sampler, self._seed, self._labels = sampler, seed, labels
        self._rounding: Rounding = rounding
        self.seconds = 0.0
        sampler(seed, range(min(n, sampler.batch_size)))  # warms up

    def __call__(self, rows: range) -> Tensor:
        start = time.perf_counter()
        labels = None if self._labels is None else self._labels[rows.start : rows.stop]
        images = self._sampler(self._seed, rows, labels, rounding=self._rounding)
        self.seconds += time.perf_counter() - start
        return images


def _statistics(
    extractor: AbstractExtractor,
    width: int,
    keep: int,
    batch_size: int,
    images: Callable[[range], Tensor],
    n: int,
) -> Statistics:
    """Return the statistics, in the first process, of the features of n images."""
    found = Statistics(n, width, extractor.logits, keep, extractor.classify)
    for rows in _rounds(n, batch_size):
        features = torch.empty(0, width, dtype=torch.float64, device="cpu")
        if rows:
            features = extractor(images(rows), batch_size=batch_size)
        features = gather(features)
        if is_first():  # which computes the figures
            found.add(features)
    found.finish()
    return found


def _slices(images: Tensor) -> Callable[[range], Tensor]:
    return lambda rows: images[rows.start : rows.stop]


def _rounds(n: int, batch_size: int) -> Iterator[range]:
    """Yield this process's part of every batch_size rows for each process."""
    for start in range(0, n, size := batch_size * world_size()):
        part = share(min(size, n - start))
        yield range(start + part.start, start + part.stop)


def _distances(
    made: Statistics, real: Statistics | Moments, n: int, extractor: AbstractExtractor
) -> Figures:
    """Return the figures that compare two sets of features."""
    name = "fid" if extractor.name == Inception.name and n >= 50_000 else "frechet_distance"
    moments = (real.mean, real.covariance) if isinstance(real, Moments) else real.moments
    found = {name: frechet_distance_from_moments(*made.moments, *moments)}
    if isinstance(real, Statistics):
        found["kernel_distance"] = kernel_distance(made.first, real.first)
        found |= precision_recall(real.first, made.first)._asdict()
    if (score := made.score) is not None:
        found["inception_score"], found["inception_score_std"] = score
    return found


def _pair_error(sampler: Sampler, pairs: Pairs) -> Figures:
    """Return the error on pairs, and the share of their variance that the model explains."""
    errors, spreads, offsets = [], [], []
    origin = pairs.batch([0], [0]).x0  # near the mean, so that sums lose no digits
    for start in range(0, len(pairs), sampler.batch_size):
        rows = range(start, min(start + sampler.batch_size, len(pairs)))
        batch = pairs.batch(rows, rows)
        cond = {name: value.to(sampler.device) for name, value in batch.cond.items()}
        output = sampler.sample(batch.noise.to(sampler.device), cond=cond or None).float().cpu()
        offset = (batch.x0 - origin).double()
        errors.append((output - batch.x0).double().square().flatten(1).sum(1))
        spreads.append(offset.square().flatten(1).sum(1))
        offsets.append(offset.sum(0))
    error, mean = torch.cat(errors).sum(), torch.stack(offsets).sum(0) / len(pairs)
    spread = torch.cat(spreads).sum() - len(pairs) * mean.square().sum()
    rms = math.sqrt(error / (len(pairs) * origin.numel()))
    return {"pair_rms": rms, "pair_r2": float(1 - error / spread)}


def _straightness(sampler: Sampler, model: Model, seed: int) -> Figures:
    """Return how straight the paths of a teacher are that learned the straight path."""
    if not isinstance(model, Teacher) or model.denoiser.schedule != PATH:
        return {}
    total = 0.0
    for index in as_bits(range(PATHS)).split(sampler.batch_size):
        drawn = sampler.conditions.draw(seed, index)
        cond = {name: value.to(sampler.device) for name, value in drawn.items()}
        z = noise(seed, index, model.shape, device=sampler.device)
        total += len(z) * straightness(model.denoiser.given(**cond), z, STEPS)
    return {"straightness": total / PATHS}


def _about_drawing(sampler: Sampler, model: Model, seed: int) -> dict[str, Any]:
    """Return what the protocol says of a model and of how it is run."""
    if isinstance(model, Teacher):
        way: dict[str, Any] = {
            "solver": _described(model.solver),
            "grid": [*map(float, model.grid)],
        }
    else:
        way = {"method": _described(getattr(model, "method", model))}
    if decoder := model.decoder:
        kind = type(decoder.net).__name__
        way["decoder"] = {"kind": kind, "sha256": decoder.fingerprint()}
    guided = model.denoiser.guidance if isinstance(model, Teacher) else None
    scale = sampler.conditions.guidance
    if guided is not None or scale is not None:
        way["guidance"] = {"by": guided and guided.about(), "scale": scale}
    execution = {**vars(sampler.execution), "precision": sampler.precision}
    name = device_name(sampler.device)
    return {
        **way,
        "nfe": model.nfe,
        "seed": seed,
        "batch_size": sampler.batch_size,
        "dtype": dtype_name(model.net),
        "execution": execution,
        "device": {"type": sampler.device.type, "name": name},
    }


def _described(value: Any) -> Any:
    """Return a solver or a method as JSON; of one that is no configuration, its name."""
    try:
        return to_json(value)
    except TypeError:
        return type(value).__qualname__


def _about_reference(reference: Pictures | Moments) -> dict[str, Any]:
    """Return what the protocol says of a reference."""
    if isinstance(reference, Moments):
        return {"moments": True, "sha256": reference.sha256}
    digest = hashlib.sha256(reference.images.contiguous().numpy().data).hexdigest()
    return {"n": len(reference.images), "sha256": digest}


def _write(out: str | Path, result: dict[str, Any], force: bool) -> None:
    try:
        write_json(Path(out), result, force=force)
    except OSError:  # the work is done, and must not be lost
        log.warning("%s: not written: %s", out, json.dumps(result))
        raise
