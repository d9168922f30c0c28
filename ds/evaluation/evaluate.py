"""How good are the images? Distances to real ones, and the error on held-out pairs."""

import hashlib
import json
import logging
import math
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, NamedTuple

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
from ds.models import pretrained
from ds.models.images import Rounding
from ds.models.sampler import Sampler
from ds.models.student import Student
from ds.models.teacher import Teacher
from ds.pairs.sources import Pairs, digits
from ds.system import targets
from ds.system.ambient import without_ambient
from ds.system.arrays import read_arrays
from ds.system.config import Between, Count, Seed, require
from ds.system.cost import check_memory
from ds.system.distributed import from_first, gather, is_first, share
from ds.system.files import opened, sha256, whole
from ds.system.staging import write_json

log = logging.getLogger("ds")
SECONDS = "seconds_per_1000_images"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Moments(NamedTuple):
    """The mean [D] and covariance [D, D] of the features of a reference set, and their hash."""

    mean: Tensor
    covariance: Tensor
    sha256: str


@without_ambient()
def evaluate(
    images_or_model: Tensor | Teacher | Student,
    reference: Tensor | Moments,
    extractor: AbstractExtractor,
    *,
    n: int = 4096,
    seed: int = 1,
    batch_size: int = 256,
    rounding: Rounding = "round",
    held_out: Pairs | None = None,
    out: str | Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Compare generated images with real ones; return the figures and how they were obtained.

    `images_or_model` is a model to draw n images from, with the noise of (seed, 0 .. n - 1), or
    uint8 images [N, H, W, C]; `reference` is uint8 images, or the moments of their features, which
    allow a Frechet distance and nothing else. With `held_out` pairs the model's images for their
    noise are compared with the stored ones: "pair_rms" in units of [-1, 1] and "pair_r2". With
    `out` the result is also written there as JSON. Processes that torchrun started share the work
    and return the same figures.

    The Frechet distance is called "fid" only on Inception features of 50,000 images or more, and
    "frechet_distance" otherwise. Raises ValueError for images that are not uint8 or of another
    size, for an n that a figure cannot be made of or the memory cannot hold, for held-out pairs
    without a model, and for an `out` that cannot be written to or, without `force`, is taken.
    """
    model = not isinstance(images_or_model, Tensor)
    check_count(n if model else len(images_or_model), reference, extractor)
    require("evaluate", Count, batch_size=batch_size)
    require("evaluate", Seed, seed=seed)
    if out is not None and is_first():  # what cannot be written is better known before the work
        store = held_out and held_out.store.path
        out = targets.file(out, force=force, apart=[store])
    figures, protocol = {}, {"version": ds.__version__, "quantizer": rounding}
    if isinstance(images_or_model, Tensor):
        if held_out is not None:
            raise ValueError("evaluate: held_out pairs need a model, not images it has drawn")
        n, mine = len(images_or_model), images_or_model[_slice(len(images_or_model))]
    else:
        sampler = Sampler(images_or_model, batch_size=batch_size)
        # What is done once is not part of the speed, and a wrong reference is found at once.
        _check_images(sampler(seed, range(min(n, batch_size))), reference)
        start = time.perf_counter()
        mine = sampler(seed, share(n), rounding=rounding)
        figures[SECONDS] = (time.perf_counter() - start) / n * 1000
        protocol |= {"nfe": images_or_model.nfe, "seed": seed, "batch_size": batch_size}
        if held_out is not None:
            figures |= _pair_error(sampler, held_out)
            protocol["held_out"] = held_out.fingerprint()
    _check_images(mine, reference)
    made = gather(extractor(mine, batch_size=batch_size))
    if isinstance(reference, Tensor):
        real = gather(extractor(reference[_slice(len(reference))], batch_size=batch_size))
        protocol["reference"] = {"n": len(reference), "sha256": _hash(reference)}
    else:
        real = reference
        protocol["reference"] = {"moments": True, "sha256": reference.sha256}
    figures |= from_first(lambda: _distances(made, real, extractor))
    about = {"name": extractor.name, "sha256": extractor.sha256, "dim": made.shape[1]}
    result = {**figures, "protocol": {**protocol, "n": n, "extractor": about}}
    if out is not None and is_first():
        try:
            write_json(out, result, force=force)
        except OSError:  # the work is done, and shall not be lost
            log.warning("%s: not written: %s", out, json.dumps(result))
            raise
    return result


def check_count(n: int, reference: Tensor | Moments, extractor: AbstractExtractor) -> None:
    """Raise ValueError for fewer images than every figure needs, or more than the memory holds."""
    scored = type(extractor).logits is not AbstractExtractor.logits
    least = SPLITS if scored else NEAREST + 1 if isinstance(reference, Tensor) else 2
    require("evaluate", Annotated[int, Between(least, 2**63 - 1)], n=n)
    if isinstance(reference, Tensor):
        _check_images(reference, reference)
        require("evaluate", Annotated[int, Between(least, 2**63 - 1)], reference=len(reference))
        width, image = extractor(reference[:2]).shape[1], reference[0].numel()
    else:
        width, image = len(reference.mean), 1
    # Images, once more while they are put together, and their features in float64.
    check_memory(f"evaluate: {n} images", n * (2 * image + 8 * width))


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Return what an evaluation says about the model, not about the machine or the protocol."""
    return {k: v for k, v in result.items() if k not in ("protocol", SECONDS)}


def record(path: str | Path, model: Teacher | Student, result: dict[str, Any]) -> None:
    """Put the figures of an evaluation into a model directory: metrics.json and its card."""
    about = result["protocol"]
    known = {k: f"{v:.4g}" for k, v in figures(result).items()}
    known["measured_on"] = f"{about['n']:,} images, {about['extractor']['name']}"
    pretrained.annotate(path, model.provenance | known, model.card, result)


def _slice(n: int) -> slice:
    mine = share(n)
    return slice(mine.start, mine.stop)


def _distances(
    made: Tensor, real: Tensor | Moments, extractor: AbstractExtractor
) -> dict[str, float]:
    """Return what can be said about two sets of features."""
    fid = extractor.name == Inception.name and len(made) >= 50_000
    name = "fid" if fid else "frechet_distance"
    if isinstance(real, Moments):
        moments = (made.mean(0), made.T.cov(), real.mean, real.covariance)
        figures = {name: frechet_distance_from_moments(*moments)}
    else:
        figures = {name: frechet_distance(made, real)}
        figures["kernel_distance"] = kernel_distance(made, real)
        figures |= precision_recall(real, made)._asdict()
    logits = extractor.logits(made)
    if logits is not None:
        figures["inception_score"], figures["inception_score_std"] = inception_score(logits)
    return figures


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


def read_reference(name: str) -> Tensor | Moments:
    """Return a reference set: uint8 images [N, H, W, C], or the moments of its features.

    `name` is "digits", a directory of image files of one size, an .npy or .npz of uint8 images (an
    .npz holds one array, or one called "images"), or an .npz with "mu" and "sigma" as the FID codes
    write it. Raises ValueError for anything else.
    """
    if name == "digits":
        return digits()[0]
    path = Path(name)
    try:
        if path.is_dir():
            return _read_folder(path)
        arrays = read_arrays(path, "images", "mu", "sigma")
        if arrays.keys() >= {"mu", "sigma"}:
            return _moments(arrays["mu"], arrays["sigma"], sha256(path))
        if len(arrays) != 1 and "images" not in arrays:
            raise ValueError(f"it holds {len(arrays)} arrays, none of them called images")
        array = arrays["images"] if "images" in arrays else next(iter(arrays.values()))
        images = torch.from_numpy(array)
        _check_images(images, images)
    except (ValueError, TypeError, FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{name}: no reference; give `digits`, a directory of images, an .npy or .npz of uint8 "
            f"images, or an .npz with mu and sigma ({error})"
        ) from None
    return images


def _moments(mu: np.ndarray, sigma: np.ndarray, digest: str) -> Moments:
    floats = mu.dtype.kind == sigma.dtype.kind == "f"
    if not floats or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(
            f"mu is {mu.dtype} {list(mu.shape)}, sigma {sigma.dtype} {list(sigma.shape)}; needed "
            f"are floats [D] and [D, D]"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError("mu or sigma is not finite")
    return Moments(*(torch.from_numpy(x.astype(np.float64)) for x in (mu, sigma)), digest)


def _read_folder(path: Path) -> Tensor:
    """Return the images of a directory and those below it, in the order of their names."""
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"no {' or '.join(IMAGE_SUFFIXES)} file is there")
    images = []
    for file in files:
        images.append(_read_image(file))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"{file.name} is {list(images[-1].shape)}, {files[0].name} is "
                f"{list(images[0].shape)}; bring all to one size first"
            )
    return torch.stack(images)


def _read_image(path: Path) -> Tensor:
    """Return an image, uint8 [H, W, 1 or 3]; ValueError for one of absurdly many pixels."""
    from PIL import Image

    # Which is an error, and which a warning, is a matter of how many.
    with opened(path) as file, whole(path, "image"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            pixels = np.array(image if image.mode == "L" else image.convert("RGB"))
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1)


def _pair_error(sampler: Sampler, pairs: Pairs) -> dict[str, float]:
    made, stored = [], []
    for start in range(0, len(pairs), sampler.batch_size):
        rows = range(start, min(start + sampler.batch_size, len(pairs)))
        batch = pairs.batch(rows, rows)
        made.append(sampler.model.sample(batch.noise.to(sampler.device)).float().cpu())
        stored.append(batch.x0)
    output, target = torch.cat(made), torch.cat(stored)
    rms = math.sqrt((output - target).double().square().mean())
    return {"pair_rms": rms, "pair_r2": r2(output, target)}


def _check_images(images: Tensor, reference: Tensor | Moments) -> None:
    if isinstance(reference, Moments):
        reference = images
    for what, x in (("reference", reference), ("images", images)):
        if x.dtype != torch.uint8 or x.dim() != 4:
            raise ValueError(
                f"evaluate: {what} must be uint8 [N, H, W, C], not {x.dtype} {list(x.shape)}"
            )
    if images.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"evaluate: images are {list(images.shape[1:])}, the reference is "
            f"{list(reference.shape[1:])}; bring them to one size first"
        )


def _hash(images: Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
