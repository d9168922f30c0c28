"""How good are the images? Distances to real ones, and the error on held-out pairs."""

import hashlib
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

import ds
from ds.evaluation.features import AbstractExtractor, Inception
from ds.evaluation.metrics import (
    NEAREST,
    SPLITS,
    frechet_distance,
    frechet_distance_from_moments,
    inception_score,
    kernel_distance,
    precision_recall,
    r2,
)
from ds.evaluation.references import Moments, check_images
from ds.models import pretrained
from ds.models.execution import Execution
from ds.models.images import Rounding
from ds.models.model import Model
from ds.models.sampler import Sampler
from ds.pairs.sources import Pairs
from ds.system import targets
from ds.system.ambient import without_ambient
from ds.system.config import Between, Count, Seed, require
from ds.system.cost import check_memory
from ds.system.distributed import broadcast, gather, is_first, share
from ds.system.staging import write_json

log = logging.getLogger("ds")
SECONDS = "seconds_per_1000_images"
Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How figures were obtained. The last fields are for images that a model has drawn."""

    version: str
    n: int
    quantizer: Rounding
    extractor: dict[str, Any]
    reference: dict[str, Any]
    nfe: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    execution: dict[str, Any] | None = None
    device: str | None = None
    held_out: str | None = None

    @property
    def json(self) -> dict[str, Any]:
        """The fields that apply."""
        return {name: value for name, value in vars(self).items() if value is not None}


@without_ambient()
def evaluate(
    images_or_model: Tensor | Model,
    reference: Tensor | Moments,
    extractor: AbstractExtractor,
    *,
    n: int = 4096,
    seed: int = 1,
    batch_size: int = 256,
    execution: Execution | None = None,
    rounding: Rounding = "round",
    held_out: Pairs | None = None,
    out: str | Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Compare generated images with real ones; return the figures and their "protocol".

    `images_or_model` is a model to draw n images from, with the noise of (seed, 0 .. n - 1), or
    uint8 images [N, H, W, C]. `reference` is uint8 images, or the moments of their features, which
    allow only a Frechet distance. `execution` says how the model is run, by default as a Sampler
    does; the protocol records it. With `held_out` pairs, the model's images for their noise are
    compared with the stored ones: "pair_rms" in units of [-1, 1], and "pair_r2". With `out`, the
    result is also written there as JSON. Processes that torchrun started share the work and return
    the same figures.

    The Frechet distance is called "fid" only on Inception features of 50,000 images or more, and
    "frechet_distance" otherwise. Raises ValueError for images that are not uint8 or have another
    size, for an n that is too small for a figure or too large for the memory, for held-out pairs
    without a model, and for an `out` that cannot be written to or, without `force`, exists.
    """
    n = len(images_or_model) if isinstance(images_or_model, Tensor) else n
    check_count(n, reference, extractor)
    require("evaluate", Count, batch_size=batch_size)
    require("evaluate", Seed, seed=seed)
    if out is not None and is_first():  # before the work, not after it
        out = targets.file(out, force=force, apart=[held_out.store.path if held_out else None])
    if isinstance(images_or_model, Tensor):
        if held_out is not None:
            raise ValueError("evaluate: held_out pairs need a model, not images it has drawn")
        images, found, drawn = _mine(images_or_model), {}, {}
    else:
        sampler = Sampler(images_or_model, batch_size=batch_size, execution=execution)
        images, found, drawn = _draw(sampler, reference, seed, n, rounding)
        if held_out is not None:
            found |= _pair_error(sampler, held_out)
            drawn["held_out"] = held_out.fingerprint()
    check_images(images, reference)
    made = gather(extractor(images, batch_size=batch_size))
    real = reference
    if isinstance(reference, Tensor):
        real = gather(extractor(_mine(reference), batch_size=batch_size))
    found |= broadcast(lambda: _distances(made, real, extractor))
    protocol = Protocol(
        version=ds.__version__,
        n=n,
        quantizer=rounding,
        extractor={"name": extractor.name, "sha256": extractor.sha256, "dim": made.shape[1]},
        reference=_about(reference),
        **drawn,
    )
    result = {**found, "protocol": protocol.json}
    if out is not None and is_first():
        _write(out, result, force)
    return result


def check_count(n: int, reference: Tensor | Moments, extractor: AbstractExtractor) -> None:
    """Raise ValueError for fewer images than every figure needs, or more than the memory holds."""
    scored = type(extractor).logits is not AbstractExtractor.logits
    least = SPLITS if scored else NEAREST + 1 if isinstance(reference, Tensor) else 2
    require("evaluate", Annotated[int, Between(least, 2**63 - 1)], n=n)
    if isinstance(reference, Tensor):
        check_images(reference, reference)
        require("evaluate", Annotated[int, Between(least, 2**63 - 1)], reference=len(reference))
        width, image = extractor(reference[:2]).shape[1], reference[0].numel()
    else:
        width, image = len(reference.mean), 1
    # Images, once more while they are put together, and their features in float64.
    check_memory(f"evaluate: {n} images", n * (2 * image + 8 * width))


def figures(result: dict[str, Any]) -> Figures:
    """Return the figures of an evaluation that depend on the model, without speed and protocol."""
    return {k: v for k, v in result.items() if k not in ("protocol", SECONDS)}


def record(path: str | Path, model: Model, result: dict[str, Any]) -> None:
    """Put the figures of an evaluation into a model directory: metrics.json and its card."""
    about = result["protocol"]
    known = {k: f"{v:.4g}" for k, v in figures(result).items()}
    known["measured_on"] = f"{about['n']:,} images, {about['extractor']['name']}"
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


def _draw(
    sampler: Sampler, reference: Tensor | Moments, seed: int, n: int, rounding: Rounding
) -> tuple[Tensor, Figures, dict[str, Any]]:
    """Draw this process's share of n images; return them, the speed, and facts for the protocol."""
    # The first batch warms up, so that the speed is that of the others; it also checks the sizes.
    check_images(sampler(seed, range(min(n, sampler.batch_size))), reference)
    start = time.perf_counter()
    images = sampler(seed, share(n), rounding=rounding)
    speed = {SECONDS: (time.perf_counter() - start) / n * 1000}
    return (
        images,
        speed,
        {
            "nfe": sampler.model.nfe,
            "seed": seed,
            "batch_size": sampler.batch_size,
            "execution": dict(vars(sampler.execution)),
            "device": sampler.device.type,
        },
    )


def _mine(images: Tensor) -> Tensor:
    """Return this process's share of images."""
    mine = share(len(images))
    return images[mine.start : mine.stop]


def _distances(made: Tensor, real: Tensor | Moments, extractor: AbstractExtractor) -> Figures:
    """Return the figures that compare two sets of features."""
    fid = extractor.name == Inception.name and len(made) >= 50_000
    name = "fid" if fid else "frechet_distance"
    if isinstance(real, Moments):
        moments = (made.mean(0), made.T.cov(), real.mean, real.covariance)
        found = {name: frechet_distance_from_moments(*moments)}
    else:
        found = {name: frechet_distance(made, real)}
        found["kernel_distance"] = kernel_distance(made, real)
        found |= precision_recall(real, made)._asdict()
    logits = extractor.logits(made)
    if logits is not None:
        found["inception_score"], found["inception_score_std"] = inception_score(logits)
    return found


def _pair_error(sampler: Sampler, pairs: Pairs) -> Figures:
    made, stored = [], []
    for start in range(0, len(pairs), sampler.batch_size):
        rows = range(start, min(start + sampler.batch_size, len(pairs)))
        batch = pairs.batch(rows, rows)
        made.append(sampler.sample(batch.noise.to(sampler.device)).float().cpu())
        stored.append(batch.x0)
    output, target = torch.cat(made), torch.cat(stored)
    rms = math.sqrt((output - target).double().square().mean())
    return {"pair_rms": rms, "pair_r2": r2(output, target)}


def _about(reference: Tensor | Moments) -> dict[str, Any]:
    """Return what the protocol says of a reference."""
    if isinstance(reference, Moments):
        return {"moments": True, "sha256": reference.sha256}
    digest = hashlib.sha256(reference.contiguous().numpy().tobytes()).hexdigest()
    return {"n": len(reference), "sha256": digest}


def _write(out: str | Path, result: dict[str, Any], force: bool) -> None:
    try:
        write_json(Path(out), result, force=force)
    except OSError:  # the work is done, and must not be lost
        log.warning("%s: not written: %s", out, json.dumps(result))
        raise
