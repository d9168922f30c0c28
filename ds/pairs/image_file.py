"""One image file as uint8 pixels: what depth, palette, alpha, orientation and inks become."""

import io
import warnings
from typing import Any, NamedTuple

import numpy as np

from ds.system.files import whole

# By content, whatever the name says. Nothing else is tried: Pillow runs programs for some formats.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
POINTER = b"version https://git-lfs"  # the beginning of what Git LFS leaves in place of a file
DEEP = 65535
# How Pillow reads a file's modes as one of ours: L, LA, RGB or RGBA.
_AS = {
    "1": "L",
    "La": "LA",
    "P": "RGB",
    "PA": "RGBA",
    "RGBa": "RGBA",
    "RGBX": "RGB",
    "CMYK": "RGB",
    "YCbCr": "RGB",
}
_AS_KEYED = {"1": "LA", "L": "LA", "P": "RGBA", "RGB": "RGBA"}  # with a transparent colour
_GREY_WHERE_EQUAL = ("P", "PA")  # a palette has three channels, of greys as well
# Pillow keeps one byte of two. The other one comes from reading them in the opposite order.
_SWAPPED = {
    "RGB;16B": "RGB;16L",
    "RGB;16L": "RGB;16B",
    "RGB;16N": "RGB;16B",
    "RGBA;16B": "RGBA;16L",
    "RGBA;16L": "RGBA;16B",
    "RGBA;16N": "RGBA;16B",
}
_UPRIGHT = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


class Picture(NamedTuple):
    """Pixels, uint8 [H, W, 1 or 3], and what was done to have them, a phrase each."""

    pixels: np.ndarray
    notes: tuple[str, ...] = ()


def read_picture(content: bytes, where: Any) -> Picture:
    """Return the picture of an image file's content.

    16 bits are scaled to 8, real transparency is laid on white, the orientation of EXIF is applied,
    and inks become RGB. Raises ValueError naming `where` for a file that is damaged, animated or no
    image, of 32 bits a channel, or of absurdly many pixels.
    """
    if content.startswith(POINTER):
        raise _damaged(where, "a pointer of Git LFS; run `git lfs pull`")
    image = _opened(content, where)
    _check_still(image, where)
    raw = _rawmode(image)
    with whole(where, "image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tags that we do not use
        image.load()
        turn = image.getexif().get(0x0112)
    notes = [] if _is_srgb(image) else ["read without their colour profile"]
    if image.mode == "CMYK":
        notes.append("converted from CMYK")
    values, top = _values(image, content, raw, where)
    if top == DEEP or raw == "LA;16B":  # of which Pillow reads the upper 8 bits only
        notes.append("scaled from 16 bits to 8")
        if top == DEEP and values[..., :3].max() < (DEEP + 1) // 16:
            notes.append("dark, with less than a sixteenth of 16 bits in use")
    pixels, transparent = _on_white(values, top)
    if transparent:
        notes.append("transparent, and laid on white")
    from_grey = image.mode in _GREY_WHERE_EQUAL or raw.startswith("LA")
    if from_grey and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., :1]
    if turn in _UPRIGHT:
        pixels = _UPRIGHT[turn](pixels)
        notes.append("turned as EXIF says")
    return Picture(np.ascontiguousarray(pixels), tuple(notes))


def fitted(pixels: np.ndarray, size: tuple[int, int]) -> Picture:
    """Return the middle of a picture that has the side ratio of `size` (H, W), resized to it."""
    from PIL import Image

    (h, w), (height, width) = pixels.shape[:2], size
    if (h, w) == (height, width):
        return Picture(pixels)
    scale = min(h / height, w / width)
    high, wide = scale * height, scale * width
    left, top = (w - wide) / 2, (h - high) / 2
    box = (left, top, left + wide, top + high)
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    made = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    notes = ["cut to the middle"] if max(w - wide, h - high) >= 0.5 else []
    if scale != 1:
        notes.append("scaled down" if scale > 1 else "scaled up, which adds no detail")
    return Picture(np.asarray(made).reshape(height, width, -1), tuple(notes))


def _damaged(where: Any, why: object) -> ValueError:
    return ValueError(f"{where}: not a whole image ({why})")


def _opened(content: bytes, where: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    Image.init()  # formats are known by name only then
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Which is an error, and which a warning, is a matter of how many pixels there are.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError:
            kinds = "PNG, JPEG, WebP, BMP, GIF, TIFF, PPM"
            raise _damaged(where, f"it is none of {kinds}" if content else "empty") from None
        except Exception as error:
            with whole(where, "image"):
                raise error from None


def _check_still(image: Any, where: Any) -> None:
    with whole(where, "image"):
        frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photo of a phone, with a preview beside it
        what = "pages" if image.format == "TIFF" else "frames"
        raise ValueError(
            f"{where}: has {frames} {what}; save the one that you want as a picture of its own"
        )


def _rawmode(image: Any) -> str:
    """Return how the file keeps its pixels, as Pillow calls it."""
    args = image.tile[0].args if image.tile else ""
    return args if isinstance(args, str) else str(args[0] if args else "")


def _values(image: Any, content: bytes, raw: str, where: Any) -> tuple[np.ndarray, int]:
    """Return the values of a loaded image, [H, W, 1 to 4], alpha last, and the largest there are.

    Two and four channels have alpha.
    """
    mode = image.mode
    if mode == "I" or mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)[..., None]
        if values.min() < 0 or values.max() > DEEP:
            raise ValueError(f"{where}: 32-bit values; save it with 8 or 16 bits")
        white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0
        return _keyed(DEEP - values if white_is_zero else values, image), DEEP
    if raw in _SWAPPED and (values := _exact(image, content, raw)) is not None:
        return _keyed(values, image), DEEP
    if _inverted_by_mistake(image):
        from PIL import ImageChops

        image = ImageChops.invert(image)
    keyed = "transparency" in image.info and mode in _AS_KEYED
    wanted = _AS_KEYED[mode] if keyed else _AS.get(mode, mode)
    if wanted not in ("L", "LA", "RGB", "RGBA"):
        kind = {"F": "32-bit floats"}.get(mode, f"colours of the kind {mode}")
        raise ValueError(f"{where}: {kind}; save it as RGB or grey with 8 or 16 bits")
    with whole(where, "image"):
        values = np.asarray(image.convert(wanted))
    return values.reshape(*values.shape[:2], -1), 255


def _exact(image: Any, content: bytes, raw: str) -> np.ndarray | None:
    """Return all 16 bits of each value; None if that cannot be had, where 8 of them must do."""
    other = _opened(content, "")
    other.tile = [t._replace(args=_swap(t.args)) for t in other.tile]
    try:
        other.load()
    except Exception:  # the file was read once: it is another kind of file, not a damaged one
        return None
    return np.asarray(image).astype(np.int64) << 8 | np.asarray(other)


def _swap(args: Any) -> Any:
    if isinstance(args, str):
        return _SWAPPED.get(args, args)
    return (_SWAPPED.get(args[0], args[0]), *args[1:])


def _keyed(values: np.ndarray, image: Any) -> np.ndarray:
    """Give 16-bit values an alpha of zero where they are the file's transparent colour."""
    key = image.info.get("transparency")
    if key is None or values.shape[-1] not in (1, 3):
        return values
    shown = (values != np.array(key)).any(-1, keepdims=True)
    return np.concatenate([values, shown * DEEP], -1)


def _inverted_by_mistake(image: Any) -> bool:
    """Return whether Pillow inverted inks as Adobe writes them, in a JPEG that Adobe's did not."""
    return image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info


def _on_white(values: np.ndarray, top: int) -> tuple[np.ndarray, bool]:
    """Return uint8 [H, W, 1 or 3] and whether something shows through."""
    colours = values.shape[-1] - 1 + values.shape[-1] % 2
    x, alpha = values[..., :colours], values[..., colours:]
    transparent = bool(alpha.size) and bool((alpha < top).any())
    if transparent:
        x = x * (alpha / top) + (top - alpha)
    elif top == 255:
        return x, False
    return np.rint(x * (255 / top)).astype(np.uint8), transparent


def _is_srgb(image: Any) -> bool:
    profile = image.info.get("icc_profile") or b""
    names = (b"sRGB", b"s\0R\0G\0B", b"GRAY")
    return not profile or any(name in profile for name in names)
