"""uint8 images, the float tensors networks see, and pictures."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ds import ops
from ds.ops.quantize import Rounding
from ds.system import targets
from ds.system.staging import replacing, replacing_directory

SUFFIXES = (".png", ".gif", ".npy", ".npz", "")
ARRAYS = (".npy", ".npz")
GREY_OR_RGB = (1, 3)  # the channels of a picture


def is_picture(shape: Sequence[int]) -> bool:
    """Return whether a sample of this shape can be a picture: [C, H, W], grey or RGB."""
    return len(shape) == 3 and shape[0] in GREY_OR_RGB


def to_uint8(x: Tensor, rounding: Rounding = "round") -> Tensor:
    """Convert floats [N, C, H, W], clipped to [-1, 1], to uint8 [N, H, W, C].

    "round" is unbiased. "floor" is what the 2021 implementation did: it darkens by half a grey
    level and doubles the root-mean-square error, and exists for comparison with its data.
    Raises ValueError for another rounding.
    """
    return ops.quantize(x, rounding)


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 [N, H, W, C] to float32 in [-1, 1], [N, C, H, W] in channels_last memory."""
    return ops.dequantize(images)


def shown(x: Tensor, decoder: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return pictures, uint8 [N, H, W, 1 or 3], of samples [N, C, H, W], about [-1, 1].

    They are the decoder's, if there is one; the samples, if they are grey or RGB; and else those of
    `grey_channels`.
    """
    x = decoder(x) if decoder else x
    return to_uint8(x) if is_picture(x.shape[1:]) else grey_channels(x)


def grey_channels(x: Tensor) -> Tensor:
    """Show samples [N, C, H, W] that are no pictures: their channels side by side, in grey.

    Returns uint8 [N, H, C * W, 1]. Black and white are the least and the largest number that the
    channel has in any of the samples.
    """
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    span = (high - low).clamp_min(torch.finfo(x.dtype).tiny)
    return to_uint8(2 * (x - low) / span - 1).movedim(-1, 2).flatten(2)[..., None]


def tile(images: Tensor, columns: int, gap: int = 1) -> Tensor:
    """Lay uint8 images [N, H, W, C] out as one image, row by row, on white, `gap` pixels apart."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    sheet = images.new_full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        sheet[top : top + h, left : left + w] = image
    return sheet


def save_png(image: Tensor, path: Path | BinaryIO, *, scale: int = 1) -> None:
    """Write one uint8 image [H, W, 1 or 3], each pixel enlarged to scale x scale.

    Raises ValueError for another number of channels, or another dtype.
    """
    _check_pictures(image[None])
    _picture(image, scale).save(path, format="PNG")


def save(
    images: Tensor, path: str | Path, *, columns: int | None = None, scale: int = 1,
    force: bool = False,
) -> None:  # fmt: skip
    """Write uint8 images [N, H, W, C] in the form that the suffix names.

    .png is one sheet with `columns` (by default as square as possible), .gif an animation forth and
    back, .npy an array, .npz an array called "images". A name without a suffix becomes a directory
    of PNGs: 000000.png and so on. `scale` enlarges the pixels of pictures. Arrays may hold other
    numbers in any shape, which an .npz calls "samples". Raises ValueError as `target` does, and for
    pictures that are neither grey nor RGB.
    """
    suffix = Path(path).suffix
    if suffix not in ARRAYS:
        _check_pictures(images)
    where, old = target(path, force=force)
    if not suffix:
        with replacing_directory(where, old) as folder:
            for i, image in enumerate(images):
                save_png(image, folder / f"{i:06d}.png", scale=scale)
            targets.mark(folder, "images", count=len(images))
        return
    with replacing(where, force=force) as temporary, open(temporary, "wb") as file:
        if suffix == ".npy":
            np.save(file, images.numpy())
        elif suffix == ".npz":
            name = "images" if images.dtype == torch.uint8 else "samples"
            arrays: dict[str, Any] = {name: images.numpy()}
            np.savez_compressed(file, **arrays)
        elif suffix == ".png":
            sheet = tile(images, columns or math.ceil(len(images) ** 0.5))
            _picture(sheet, scale).save(file, format="PNG")
        else:
            frames = [_picture(image, scale) for image in (*images, *images[1:-1].flip(0))]
            frames[0].save(
                file, format="GIF", save_all=True, append_images=frames[1:], duration=80, loop=0
            )


def target(
    path: str | Path, *, force: bool = False, apart: targets.Inputs = ()
) -> tuple[Path, list[str]]:
    """Return where `save` writes, and the names it replaces there; see ds.system.targets.

    Raises ValueError for an unknown suffix, and for a path that exists; with `force`, only if
    `save` did not make it.
    """
    if Path(path).suffix not in SUFFIXES:
        known = ", ".join(s for s in SUFFIXES if s)
        raise ValueError(f"{path}: the name must end in one of {known}, or in none for a directory")
    if Path(path).suffix:
        return targets.file(path, force=force, apart=apart), []
    return targets.directory(path, "directory of images", _ours, force=force, apart=apart)


def _ours(folder: Path) -> targets.Ours | None:
    about = targets.marked(folder, "images")
    count = about and about.get("count")
    if not isinstance(count, int):
        return None
    return lambda name: name == targets.MARK or targets.numbered(name, ".png", count)


def _check_pictures(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] not in GREY_OR_RGB:
        raise ValueError(
            f"pictures are uint8 [N, H, W, 1 or 3], not {images.dtype} {list(images.shape)}; "
            f"write .npy or .npz, or make pictures of the channels first"
        )


def _picture(image: Tensor, scale: int) -> Any:
    from PIL import Image

    pixels = image.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return Image.fromarray(pixels.squeeze(-1).cpu().numpy())
