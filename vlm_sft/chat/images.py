"""Decode any image of a dataset to upright RGB; what cannot be shown is refused and named."""

from __future__ import annotations

import base64
import functools
import math
import os
import re
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.Image import Image as PILImage

MAX_DECODED_PIXELS = 50_000_000
"""Images of more pixels are refused before they are decoded: 12 KB of PNG can hold 300 MB of pixels."""

# Pillow guesses among all it knows, EPS included, which runs Ghostscript. These are what datasets hold.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_DATA_URL = 200_000_000
"""Characters of an image written into a row, its bytes as base64; longer ones are refused before they are decoded."""

_TOLERANCE = 1.01  # of floats, which arithmetic has moved past black or white
_HOLDS = ("bytes", "path", "url", "image", "image_url", "source", "base64", "data")
_DESCRIBES = {"type", "media_type", "mime_type", "detail", "format", "width", "height", "image_wh"}
_IMAGE_FILE = re.compile(r"(?i)\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|ppm|jp2|avif)$")
_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|UklGR|R0lGOD|Qk[02])[A-Za-z0-9+/\s]{40,}=*\s*$")  # as their formats begin


def to_rgb(image: Any) -> PILImage:
    """What `open_image` takes in mode RGB, upright, on white where it is transparent; of an animation, the first frame.
    More than 8 bits per pixel and floats are scaled by the range that their values reach (8, 10, 12, 14 or 16 bits; 0
    to 1), not clipped. Raises `ValueError` saying what is wrong with the image."""
    opened = open_image(image)
    try:
        opened.load()
        if _orientation(opened) != 1:
            opened = ImageOps.exif_transpose(opened)
    except Exception as error:  # each of Pillow's decoders has exceptions of its own: struct.error, SyntaxError, ...
        raise _damaged(_name(image), error) from None
    if opened.mode[0] in "IF":
        return _to_8_bits(opened)[0].convert("RGB")
    if opened.has_transparency_data:
        straight = opened.convert({"La": "LA", "RGBa": "RGBA"}.get(opened.mode, opened.mode)).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", opened.size, "white"), straight).convert("RGB")
    return opened if opened.mode == "RGB" else opened.convert("RGB")


def source_of(image: Any) -> Any:
    """What holds the image: a PIL image, bytes, or a file name, whichever way a format wraps it: the dict of
    `datasets.Image(decode=False)`, `{"url": ...}`, `{"base64": ...}`, Anthropic's `source`, a data URL, `file://`.
    Anything else as it is. Raises `ValueError` for a data URL that is too long or is not base64."""
    if isinstance(image, Mapping):
        held = {name: value for name, value in image.items() if value is not None and name not in _DESCRIBES}
        if held.keys() == {"bytes", "path"}:
            del held["path"]
        if len(held) != 1 or (name := next(iter(held))) not in _HOLDS:
            return held or None
        is_base64 = name in ("base64", "data") and isinstance(held[name], str) and not held[name].startswith("data:")
        return source_of(f"data:;base64,{held[name]}" if is_base64 else held[name])
    if not isinstance(image, str):
        return image
    if image.startswith("file://"):
        return unquote(image.removeprefix("file://"))
    if image.startswith("data:"):
        head, _, data = image.partition(",")
    elif _BASE64.match(image):
        head, data = ";base64", image
    else:
        return image
    if len(data) > MAX_DATA_URL:
        raise ValueError(f"a data URL of {len(data):,} characters; at most {MAX_DATA_URL:,} are decoded: name a file")
    try:
        return base64.b64decode(data, validate=False) if head.endswith(";base64") else unquote_to_bytes(data)
    except ValueError as error:
        raise ValueError(f"a data URL that is not base64 ({error}); write it anew, or name a file") from None


def looks_like_image(value: Any) -> bool:
    """Whether a value of a row, or the first one of a list, is most likely an image: a file name that ends so, a data
    URL, encoded bytes, a PIL image, or a dict that holds one."""
    if isinstance(value, Mapping):
        value = [value[name] for name in _HOLDS if value.get(name) is not None]
    if isinstance(value, (list, tuple)):
        return bool(value) and looks_like_image(value[0])
    if isinstance(value, str):
        is_name = len(value) < 1000 and "\n" not in value and _IMAGE_FILE.search(value) is not None
        return is_name or value.startswith("data:image/") or _BASE64.match(value) is not None
    return isinstance(value, (bytes, bytearray, PILImage))


def open_image(image: Any, *, folder: Path | None = None, allow_outside: bool = False) -> PILImage:
    """The image, held in what `source_of` knows, with its header read and, unless it came decoded, its pixels not yet.
    A file path is relative to `folder`, without which none is opened, and which it must not leave, links followed,
    unless `allow_outside` is set. Nothing is fetched.

    Raises `ValueError` for what is not an image, more than `MAX_DECODED_PIXELS`, and every path that is not allowed."""
    match source := source_of(image):
        case PILImage():
            opened = source
        case bytes() | bytearray():
            opened = _from_file(BytesIO(source), _name(image))
        case str() | Path():
            opened = _from_file(_allowed(str(source), folder, allow_outside), _name(image))
        case _:
            found = "None" if source is None else f"a {type(source).__name__}"
            found += f" with {', '.join(map(repr, source))}" if isinstance(source, Mapping) else ""
            expected = "a PIL image, encoded bytes, a file name, a data URL, or a dict of one of them ('path', 'url')"
            raise ValueError(f"the image is {found}; expected {expected}, or no image part for it")
    if math.prod(opened.size) > MAX_DECODED_PIXELS:
        found = f"{_name(image)} has {opened.width} x {opened.height} pixels"
        raise ValueError(f"{found}; at most {MAX_DECODED_PIXELS:,} are decoded: make it smaller")
    return opened


def repairs_of(image: Any) -> list[str]:
    """What `to_rgb` changes about the image, in words that continue "images ..."."""
    opened = open_image(image)
    repairs = ["turned upright as their EXIF says"] if _orientation(opened) != 1 else []
    repairs += ["of several frames, the first taken"] if getattr(opened, "is_animated", False) else []
    if opened.mode[0] in "IF":
        return [*repairs, _to_8_bits(opened)[1]]
    if opened.has_transparency_data:
        return [*repairs, "with transparency, laid on white"]
    return repairs if opened.mode == "RGB" else [*repairs, f"of mode {opened.mode}, converted to RGB"]


def _orientation(image: PILImage) -> int:
    """1 to 8 as in EXIF; 1, upright, where the image says nothing or its EXIF cannot be read."""
    try:
        value = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # viewers show an image whose EXIF is broken, and so do we
        return 1
    return value if 1 <= value <= 8 else 1


def upright_size(image: PILImage) -> tuple[int, int]:
    """(width, height) of what `to_rgb` makes of it."""
    return image.size[::-1] if _orientation(image) > 4 else image.size  # 5 to 8 swap width and height


def _to_8_bits(image: PILImage) -> tuple[PILImage, str]:
    """Scaled to 8 bits by the narrowest range that holds all values, and words for it. Cameras and scanners store 10,
    12 or 14 bits in 16: by the whole range they would come out black."""
    values, is_float = np.asarray(image).astype(np.float64), image.mode == "F"
    low, high, slack = float(values.min()), float(values.max()), _TOLERANCE if is_float else 1
    ranges = {"floats up to 1": 1} if is_float else {}
    ranges |= {f"{bits} bits": 2**bits - 1 for bits in (8, 10, 12, 14, 16, 31)}
    found = next((name for name, white in ranges.items() if high <= white * slack and low >= white * (1 - slack)), None)
    if found is None:  # also for NaN
        raise ValueError(f"the image holds values from {low:g} to {high:g}; expected 0 to 1, 255 or 65535: scale it")
    scaled = (values * (255 / ranges[found])).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(scaled), f"of {found} (by their largest value), scaled to 8"


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
    reason = type(error).__name__ if " object at 0x" in str(error) else str(error) or type(error).__name__
    return ValueError(f"{name} is damaged ({reason}); replace the file or leave the row out")


_real = functools.cache(os.path.realpath)  # one folder for all rows, and a look at the disk for each of its parents


def _allowed(path: str, folder: Path | None, allow_outside: bool) -> str:
    """The path of a file in the folder. Raises for any other."""
    name = _name(path)
    if "://" in path:
        raise ValueError(f"{name} is a URL, and nothing is fetched; download it and give the file's path")
    if folder is None:
        raise ValueError(f"{name} is a path, and no folder was named to read from; name it by --image_folder")
    root = _real(os.path.abspath(folder))  # the working directory may change
    try:
        target = os.path.realpath(os.path.join(root, path))
    except ValueError:
        found = f"{name} is a path with a NUL character, or one which is not Unicode"
        raise ValueError(f"{found}; rename the file") from None
    if not (allow_outside or target == root or target.startswith(os.path.join(root, ""))):
        how = "name the folder by --image_folder, or read files from anywhere by --allow_outside if you trust the rows"
        raise ValueError(f"{name} lies outside the image folder {root!r}; {how}")
    if not os.path.isfile(target):
        found = f"{'is a directory' if os.path.isdir(target) else 'does not exist'} in the image folder {root!r}"
        raise ValueError(f"{name} {found}; fix the path, or name the folder by --image_folder")
    return target


def _name(image: Any) -> str:
    """How messages call the image: by its path as the row gives it, never by an object's address."""
    path = os.path.basename(str(getattr(image, "filename", ""))) or None if isinstance(image, PILImage) else image
    while isinstance(path, Mapping):
        path = next((path[name] for name in ("path", "url", "image", "image_url") if path.get(name) is not None), None)
    is_path = isinstance(path, (str, Path)) and not str(path).startswith("data:") and not _BASE64.match(str(path))
    return f"image {str(path)[:200]!r}" if is_path else "the image"
