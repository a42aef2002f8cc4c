"""Decode any image of a dataset to upright RGB; what cannot be shown is refused and named."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PILImage = Image.Image

MAX_DECODED_PIXELS = 50_000_000
"""Images of more pixels are refused before they are decoded: 12 KB of PNG can hold 300 MB of pixels."""

# Pillow guesses among all it knows, EPS included, which runs Ghostscript. These are what datasets hold.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 swap width and height
_WHITES = (1, 255, 65_535, 2**31 - 1)


def to_rgb(image: Any) -> PILImage:
    """The image in mode RGB, upright, on white where it is transparent.

    Takes a PIL image, encoded bytes, or the `{"bytes", "path"}` dict of `datasets.Image(decode=False)`. More than 8
    bits per pixel and floats are scaled, not clipped. Of an animation, the first frame.
    Raises `ValueError` saying what is wrong with the image.
    """
    opened = open_image(image)
    try:
        opened.load()
        if _orientation(opened) != 1:
            opened = ImageOps.exif_transpose(opened)
    except Exception as error:  # each of Pillow's decoders has exceptions of its own: struct.error, SyntaxError, ...
        raise _damaged(_name(image), error) from None
    if opened.mode[0] in "IF":
        return _to_8_bits(opened).convert("RGB")
    if opened.has_transparency_data:
        straight = opened.convert({"La": "LA", "RGBa": "RGBA"}.get(opened.mode, opened.mode)).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", opened.size, "white"), straight).convert("RGB")
    return opened if opened.mode == "RGB" else opened.convert("RGB")


def open_image(image: Any, *, folder: Path | None = None, allow_outside: bool = False) -> PILImage:
    """The image with its header read and, unless it came decoded, its pixels not yet.

    A file path (or a dict with a path and no bytes) is relative to `folder`, without which none is opened, and which it
    must not leave, links followed, unless `allow_outside` is set.

    Raises `ValueError` for what is not an image, more than `MAX_DECODED_PIXELS`, and every path that is not allowed.
    """
    source = image
    if isinstance(image, Mapping) and {"bytes", "path"} & image.keys():
        source = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    match source:
        case PILImage():
            opened = source
        case bytes() | bytearray():
            opened = _from_file(BytesIO(source), _name(image))
        case str() | Path():
            opened = _from_file(_allowed(str(source), folder, allow_outside), _name(image))
        case _:
            found = "None" if source is None else f"a {type(source).__name__}"
            expected = "a PIL image, encoded bytes or a {'bytes', 'path'} dict"
            raise ValueError(f"the image is {found}; expected {expected}, or no image part for it")
    if math.prod(opened.size) > MAX_DECODED_PIXELS:
        found = f"{_name(image)} has {opened.width} x {opened.height} pixels"
        raise ValueError(f"{found}; at most {MAX_DECODED_PIXELS:,} are decoded: make it smaller")
    return opened


def repairs_of(image: Any) -> list[str]:
    """What `to_rgb` changes about the image, in words that continue "images ..."."""
    opened = open_image(image)
    repairs = []
    if _orientation(opened) != 1:
        repairs.append("turned upright as their EXIF says")
    if getattr(opened, "is_animated", False):
        repairs.append("of several frames, the first taken")
    if opened.mode[0] in "IF":
        repairs.append("of more than 8 bits, scaled to 8")
    elif opened.has_transparency_data:
        repairs.append("with transparency, laid on white")
    elif opened.mode != "RGB":
        repairs.append(f"of mode {opened.mode}, converted to RGB")
    return repairs


def _orientation(image: PILImage) -> int:
    """1 to 8 as in EXIF; 1, upright, where the image says nothing or its EXIF cannot be read."""
    try:
        value = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # viewers show an image whose EXIF is broken, and so do we
        return 1
    return value if 1 <= value <= 8 else 1


def _to_8_bits(image: PILImage) -> PILImage:
    """Scaled to 8 bits; white is 65,535 of 16 bits, else the first of `_WHITES` that no value exceeds (1: floats)."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= _WHITES[-1]):  # also false for NaN
        raise ValueError(f"the image holds values from {low:g} to {high:g}; expected 0 to 1, 255 or 65535: scale it")
    whites = {"F": _WHITES, "I": _WHITES[1:]}.get(image.mode, (65_535,))
    white = next(white for white in whites if white >= high)
    return Image.fromarray((values.astype(np.float64) * (255 / white)).round().astype(np.uint8))


def _from_file(file: BytesIO | str, name: str) -> PILImage:
    try:
        return Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{name} has far more than {MAX_DECODED_PIXELS:,} pixels; make it smaller") from None
    except UnidentifiedImageError:
        with BytesIO(file.getvalue()) if isinstance(file, BytesIO) else open(file, "rb") as again:
            start = again.read(12)
        what = f"not an image that can be read: it begins with {start!r}" if start else "empty (0 bytes)"
        raise ValueError(f"{name} is {what}; expected {', '.join(FORMATS)}: replace the file") from None
    except Exception as error:
        raise _damaged(name, error) from None


def _damaged(name: str, error: Exception) -> ValueError:
    reason = str(error)
    if not reason or " object at 0x" in reason:
        reason = type(error).__name__
    return ValueError(f"{name} is damaged ({reason}); replace the file or leave the row out")


_real = functools.cache(os.path.realpath)  # one folder for all rows, and a look at the disk for each of its parents


def _allowed(path: str, folder: Path | None, allow_outside: bool) -> str:
    """The path of a file in the folder. Raises for any other."""
    name = _name(path)
    if "://" in path or path.startswith("data:"):
        raise ValueError(f"{name} is a URL, and nothing is fetched; download it and give the file's path")
    if folder is None:
        raise ValueError(f"{name} is a path, and no folder was named to read from; load with image_folder=...")
    if "\0" in path:
        raise ValueError(f"{name} is a path with a NUL character; fix it")
    root = _real(os.path.abspath(folder))  # the working directory may change
    target = os.path.realpath(os.path.join(root, path))
    if not (allow_outside or target == root or target.startswith(os.path.join(root, ""))):
        raise ValueError(
            f"{name} lies outside the image folder; move it there, or set allow_outside=True if you trust the rows"
        )
    if not os.path.isfile(target):
        found = f"{'is a directory' if os.path.isdir(target) else 'does not exist'} in the image folder {root!r}"
        raise ValueError(f"{name} {found}; fix the path, or name the folder by --image_folder")
    return target


def _name(image: Any) -> str:
    """How messages call the image: by its path as the row gives it, shortened, never by an object's address."""
    if isinstance(image, PILImage):
        path = os.path.basename(str(getattr(image, "filename", ""))) or None
    else:
        path = image.get("path") if isinstance(image, Mapping) else image
    return f"image {str(path)[:200]!r}" if isinstance(path, (str, Path)) else "the image"
