"""Reference sets: real images, or the moments of their features, read from what people have."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ds.pairs.pictures import Pictures, read_pictures
from ds.pairs.sources import digits
from ds.system.arrays import read_arrays, read_headers
from ds.system.files import sha256


class Moments(NamedTuple):
    """The mean [D] and covariance [D, D] of the features of a reference set, and their hash."""

    mean: Tensor
    covariance: Tensor
    sha256: str


def read_reference(name: str, *, size: int | None = None) -> Pictures | Moments:
    """Return a reference set: pictures, with their labels if there are any, or its moments.

    `name` is "digits", pictures in any form that `read_pictures` takes, which are cut and scaled to
    `size` if it is given, or an .npz with "mu" and "sigma" as the FID codes write it. Raises
    ValueError for anything else.
    """
    if name == "digits":
        return Pictures(*digits())
    try:
        is_array = Path(name).is_file() and not name.endswith(".tar")
        moments = _read_moments(Path(name)) if is_array else None
        return moments or read_pictures(name, size=size)
    except (ValueError, TypeError, FileNotFoundError, NotADirectoryError) as error:
        if Path(name).is_dir():  # the error names a file in it
            raise ValueError(str(error)) from None
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
            f"{list(reference.shape[1:])}; bring them to one form (--size scales a reference)"
        )


def _read_moments(path: Path) -> Moments | None:
    """Return the moments of an .npz, if it holds any."""
    if not read_headers(path).keys() >= {"mu", "sigma"}:
        return None
    arrays = read_arrays(path, "mu", "sigma")
    return _moments(arrays["mu"], arrays["sigma"], sha256(path))


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
