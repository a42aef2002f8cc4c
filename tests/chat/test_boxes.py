"""Boxes lie where their objects are on the image as the model sees it, whatever the processor does to its size."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vlm_sft import ChatCollator, scale_boxes
from vlm_sft.chat.audit import audit
from vlm_sft.chat.boxes import boxes_in, draw_boxes, view_of
from vlm_sft.evaluation.pages import write_audit_html

SIZE, BOX = (200, 120), [60, 30, 110, 90]


def drawing(size: tuple[int, int] = SIZE, box: list[int] = BOX) -> Image.Image:
    image = Image.new("RGB", size, "black")
    ImageDraw.Draw(image).rectangle([box[0], box[1], box[2] - 1, box[3] - 1], fill="white")
    return image


def seen_by(processor: Any, image: Image.Image) -> np.ndarray[Any, Any]:
    """Brightness [H, W] of what the model is given, from 0 to 1, put together again where it is cut into patches."""
    images = [image, Image.new("RGB", image.size), Image.new("RGB", image.size, "white")]
    outputs = [processor.image_processor(images=[each], return_tensors="np") for each in images]
    arrays = []
    for output in outputs:
        pixels = np.asarray(output["pixel_values"], dtype=float)
        if "image_grid_thw" in output:
            part, merge = processor.image_processor.patch_size, processor.image_processor.merge_size
            _, rows, columns = np.asarray(output["image_grid_thw"])[0]
            patches = pixels.reshape(rows // merge, columns // merge, merge, merge, 3, -1, part, part)[..., 0, 0, :, :]
            pixels = patches.transpose(0, 2, 4, 1, 3, 5).reshape(rows * part, columns * part)
        else:
            pixels = pixels[0, 0]
        arrays.append(pixels)
    return (arrays[0] - arrays[1]) / (arrays[2] - arrays[1])


@pytest.mark.parametrize("family", ["llava15", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("size", [SIZE, (120, 200), (333, 97)])
def test_a_box_lies_on_its_object(family: str, size: tuple[int, int], tiny_processor: Callable[..., Any]) -> None:
    """CLIP crops the middle, SigLIP squeezes to a square, the Qwens round to their patches."""
    processor = tiny_processor(family)
    width, height = size
    box = [int(width * 0.4), int(height * 0.25), int(width * 0.55), int(height * 0.75)]
    [found] = scale_boxes([box], size, processor, given="pixels", to="pixels")
    seen = seen_by(processor, drawing(size, box))
    inside = np.zeros_like(seen, dtype=bool)
    inside[found[1] : found[3], found[0] : found[2]] = True
    assert seen[inside].mean() > 0.85
    assert seen[~inside].mean() < 0.06
    rows, columns = np.where(seen > 0.5)
    edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert max(abs(a - b) for a, b in zip(found, edges, strict=True)) <= 1


def test_what_a_family_writes(tiny_processor: Callable[..., Any]) -> None:
    image = Image.new("RGB", (448, 224))
    qwen, squash = tiny_processor("qwen2_5_vl"), tiny_processor("qwen3_vl")
    seen = view_of(qwen, image.size).size
    for given, box in (
        ("pixels", [112, 56, 224, 112]),
        ("0-1", [0.25, 0.25, 0.5, 0.5]),
        ("0-1000", [250, 250, 500, 500]),
    ):
        assert scale_boxes([box], image, squash, given=given) == [[250, 250, 500, 500]]
        expected = [round(share * side) for share, side in zip((0.25, 0.25, 0.5, 0.5), seen * 2, strict=True)]
        assert scale_boxes([box], image.size, qwen, given=given) == [expected]
        assert scale_boxes([box], image, squash, given=given, to="0-1") == [[0.25, 0.25, 0.5, 0.5]]
    turned, exif = Image.new("RGB", (224, 448)), Image.Exif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    assert scale_boxes([[112, 56, 224, 112]], turned, squash, given="pixels") == [[250, 250, 500, 500]]
    tiles = tiny_processor("internvl")
    assert scale_boxes([[10, 10, 20, 20]], (100, 50), tiles, given="pixels") == [[100, 200, 200, 400]]


@pytest.mark.parametrize(
    ("family", "box", "options", "told"),
    [
        (
            "llava15",
            [1, 2, 3, 4],
            {},
            "LlavaProcessor: it is not known what coordinates the family writes; name them by",
        ),
        ("qwen3_vl", [1, 2, 201, 4], {}, r"box \[1, 2, 201, 4\]; expected x1 < x2 and y1 < y2 from 0 to 200 and 120"),
        ("qwen3_vl", [3, 2, 1, 4], {}, "expected x1 < x2"),
        ("qwen3_vl", [1, 2, 3], {}, "expected x1 < x2"),
        ("qwen3_vl", [0.1, 0.2, 1.5, 0.4], {"given": "0-1"}, "from 0 to 1 and 1"),
        (
            "qwen3_vl",
            [0, 0, 1, 1],
            {"given": "yolo"},
            "given='yolo', to='0-1000'; expected 'pixels', '0-1' or '0-1000'",
        ),
        ("llava15", [0, 0, 9, 9], {"to": "0-1"}, "lies outside of what the model sees, which crops 200 x 120 pixels"),
        ("internvl", [0, 0, 9, 9], {"to": "pixels"}, "InternVLProcessor cuts this image into tiles"),
    ],
)
def test_boxes_that_cannot_be_meant(family: str, box: Any, options: Any, told: str, tiny_processor: Any) -> None:
    with pytest.raises(ValueError, match=told):
        scale_boxes([box], SIZE, tiny_processor(family), **{"given": "pixels", **options})


def test_boxes_are_found_in_texts() -> None:
    for text, count in (
        ('[{"bbox_2d": [10, 20, 30, 40], "label": "cat"}, {"bbox_2d": [1, 2, 3.5, 4]}]', 2),
        ("<|box_start|>(10,20),(30,40)<|box_end|>", 1),
        ("<box>[[10, 20, 30, 40]]</box> and [0.1, 0.2, 0.3, 0.4]", 2),
        ("[[10, 20], [30, 40]]", 1),
        ("[1, 2, 3], (4, 5), [9, 8, 7, 6], 1, 2, 3, 4", 0),
    ):
        assert len(boxes_in(text)) == count, text
    assert boxes_in("(10,20),(30,40)") == [[10, 20, 30, 40]]


@pytest.mark.parametrize("family", ["llava15", "qwen2_5_vl"])
def test_the_page_draws_boxes_on_what_the_model_sees(
    family: str, tiny_processor: Callable[..., Any], tmp_path: Path
) -> None:
    processor, image = tiny_processor(family), drawing()
    boxes = scale_boxes([BOX], image, processor, given="pixels", to="0-1000" if family == "llava15" else None)
    drawn, scale = draw_boxes(image, boxes, processor)
    assert scale == ("0-1000" if family == "llava15" else "pixels")
    colours = np.asarray(drawn).astype(int)
    red = (colours[..., 0] > 200) & (colours[..., 1] < 60)
    rows, columns = np.where(red)
    inner = colours[rows.min() + 4 : rows.max() - 3, columns.min() + 4 : columns.max() - 3]
    assert inner.mean() > 230  # the object, and nothing but it
    outside = np.ones_like(red)
    outside[rows.min() - 2 : rows.max() + 3, columns.min() - 2 : columns.max() + 3] = False
    assert colours[outside].mean() < 10
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]},
        {"role": "assistant", "content": f"Here: {boxes[0]}"},
    ]
    plain = [messages[0], {"role": "assistant", "content": "There."}]
    report = audit(ChatCollator(processor), [{"messages": m, "images": [image]} for m in (messages, plain)])
    write_audit_html(report, tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text()
    assert re.findall(r"<small>(\d boxes, read as [^<]*)</small>", page) == [f"1 boxes, read as {scale}"]
