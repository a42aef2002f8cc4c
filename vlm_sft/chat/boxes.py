"""Boxes in texts: from a dataset's coordinates to those of the model's family, on the image as the model sees it."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from vlm_sft.chat.images import upright_size
from vlm_sft.upstream import BOX_SCALES

Scale: TypeAlias = Literal["pixels", "0-1", "0-1000"]
_MOST: dict[str, float] = {"0-1": 1, "0-1000": 1000}
_NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"[\[(]{_NUMBER},{_NUMBER}(?:\)\s*,\s*\(|\]\s*,\s*\[|,){_NUMBER},{_NUMBER}[\])]")


class View(NamedTuple):
    """What a processor makes of an image of some size: the size of what the model sees, and `x * scale + shift` of a
    pixel of the image, each as (horizontal, vertical)."""

    size: tuple[int, int]
    scale: tuple[float, float]
    shift: tuple[float, float]


def scale_boxes(
    boxes: Sequence[Sequence[float]], image: Any, processor: Any, *, given: Scale, to: Scale | None = None
) -> list[list[float]]:
    """Boxes [x1, y1, x2, y2] in the coordinates that the processor's family writes: `"pixels"` of the image as the
    model sees it (whole numbers), shares of it from `"0-1"`, or `"0-1000"` (whole numbers). `to` names those of a
    family that is not known, `given` those of the boxes, of the upright image (PIL, or its (width, height)).

    Raises `ValueError` for boxes that are none, or lie outside of the image or of what the model sees of it (CLIP's
    crop), and for pixels of an image that is cut into tiles."""
    size: tuple[int, int] = upright_size(image) if isinstance(image, Image.Image) else tuple(image)
    kind = type(processor).__name__
    chosen: str | None = to or BOX_SCALES.get(kind)
    if chosen is None:
        raise ValueError(f"{kind}: it is not known what coordinates the family writes; name them by to='pixels' or so")
    if given not in ("pixels", *_MOST) or chosen not in ("pixels", *_MOST):
        raise ValueError(f"given={given!r}, to={chosen!r}; expected 'pixels', '0-1' or '0-1000'")
    view, scaled = view_of(processor, size), list[list[float]]()
    if view is None and chosen == "pixels":
        raise ValueError(f"{kind} cuts this image into tiles, which have no pixels of the whole; take to='0-1000'")
    view = view or View(size, (1, 1), (0, 0))
    for box in boxes:
        most = [_MOST.get(given, side) for side in size] * 2
        if len(box) != 4 or not (0 <= box[0] < box[2] <= most[0] and 0 <= box[1] < box[3] <= most[1]):
            expected = f"x1 < x2 and y1 < y2 from 0 to {most[0]:g} and {most[1]:g} ({given})"
            raise ValueError(f"box {[*box]}; expected {expected}")
        inside = [each / most[n] * size[n % 2] * view.scale[n % 2] + view.shift[n % 2] for n, each in enumerate(box)]
        inside = [min(max(each, 0), view.size[n % 2]) for n, each in enumerate(inside)]
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            told = f"which crops {size[0]} x {size[1]} pixels"
            raise ValueError(f"box {[*box]} lies outside of what the model sees, {told}")
        wide = [_MOST.get(chosen, side) for side in view.size]
        digits = 3 if chosen == "0-1" else None
        scaled.append([round(each / view.size[n % 2] * wide[n % 2], digits) for n, each in enumerate(inside)])
    return scaled


def boxes_in(text: str) -> list[list[float]]:
    """All `[x1, y1, x2, y2]` and `(x1, y1), (x2, y2)` in a text."""
    found = ([float(each) for each in match.groups()] for match in _BOX.finditer(text))
    return [box for box in found if box[0] < box[2] and box[1] < box[3]]


def draw_boxes(image: Image.Image, boxes: Sequence[Sequence[float]], processor: Any) -> tuple[Image.Image, str]:
    """The image as the model sees it, the boxes in red, and how their coordinates were read: as the family's, or of a
    family that is not known from 0 to 1 or 0 to 1000."""
    scale = BOX_SCALES.get(type(processor).__name__) or ("0-1" if max(map(max, boxes)) <= 1 else "0-1000")
    view = view_of(processor, image.size) or View(image.size, (1, 1), (0, 0))
    (width, height), (left, top) = view.size, (-view.shift[0] / view.scale[0], -view.shift[1] / view.scale[1])
    seen = (left, top, left + width / view.scale[0], top + height / view.scale[1])
    drawn = image.transform(view.size, Image.Transform.EXTENT, seen, Image.Resampling.BILINEAR)
    enlarge = -(-256 // max(view.size))  # lines cover what is smaller
    drawn = drawn.resize((width * enlarge, height * enlarge), Image.Resampling.NEAREST)
    for box in boxes:
        most = [_MOST.get(scale, side) for side in view.size] * 2
        edges = [each / most[n] * drawn.size[n % 2] for n, each in enumerate(box)]
        ImageDraw.Draw(drawn).rectangle(edges, outline="red", width=2)
    return drawn, scale


@functools.lru_cache(1024)
def view_of(processor: Any, size: tuple[int, int]) -> View | None:
    """What the processor makes of images of this size, found by processing one whose colours are coordinates; None
    where it cuts them into tiles."""
    ramps = np.meshgrid(*(np.linspace(0, 255, side).round().astype(np.uint8) for side in size))
    probe = Image.fromarray(np.stack([*ramps, ramps[0]], -1))
    images = [probe, Image.new("RGB", size), Image.new("RGB", size, "white")]
    outputs = [processor.image_processor(images=[image], return_tensors="np") for image in images]
    if "image_grid_thw" in outputs[0]:
        _, *grid = np.asarray(outputs[0]["image_grid_thw"])[0].tolist()
        width, height = (side * processor.image_processor.patch_size for side in reversed(grid))
        return View((width, height), (width / size[0], height / size[1]), (0, 0))
    seen, black, white = (np.asarray(output["pixel_values"]) for output in outputs)
    if seen.ndim != 4 or len(seen) != 1:
        return None
    _, _, height, width = seen.shape
    lines = []
    for channel, side in enumerate(size):  # along the middle, where nothing is padded
        place = (0, channel, height // 2) if channel == 0 else (0, channel, slice(None), width // 2)
        share = (seen[place] - black[place]) / (white[place] - black[place])
        inner = (share > 0.05) & (share < 0.95)
        if inner.sum() < 2:  # of an image that is a line
            return None
        lines.append(np.polyfit(share[inner] * (side - 1) + 0.5, np.flatnonzero(inner) + 0.5, 1))
    return View((width, height), (lines[0][0], lines[1][0]), (lines[0][1], lines[1][1]))
