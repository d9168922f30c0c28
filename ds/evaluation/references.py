"""Reference sets: real images, or the moments of their features, read from what people have."""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ds.pairs.sources import digits
from ds.system.arrays import read_arrays
from ds.system.files import opened, sha256, whole

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Moments(NamedTuple):
    """The mean [D] and covariance [D, D] of the features of a reference set, and their hash."""

    mean: Tensor
    covariance: Tensor
    sha256: str


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
        return _read_arrays(path)
    except (ValueError, TypeError, FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{name}: no reference; give `digits`, a directory of images, an .npy or .npz of uint8 "
            f"images, or an .npz with mu and sigma ({error})"
        ) from None


def check_images(images: Tensor, reference: Tensor | Moments) -> None:
    """Raise ValueError unless both are uint8 [N, H, W, C] of one size; moments fit any images."""
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


def _read_arrays(path: Path) -> Tensor | Moments:
    arrays = read_arrays(path, "images", "mu", "sigma")
    if arrays.keys() >= {"mu", "sigma"}:
        return _moments(arrays["mu"], arrays["sigma"], sha256(path))
    if len(arrays) != 1 and "images" not in arrays:
        raise ValueError(f"it holds {len(arrays)} arrays, none of them called images")
    array = arrays["images"] if "images" in arrays else next(iter(arrays.values()))
    images = torch.from_numpy(array)
    check_images(images, images)
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
    as_tensor = (torch.from_numpy(x.astype(np.float64)) for x in (mu, sigma))
    return Moments(next(as_tensor), next(as_tensor), digest)


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
