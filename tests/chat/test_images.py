"""Every kind of image comes out as a viewer would show it, and what is not an image is named."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from PIL import Image, ImageCms

from vlm_sft.chat.images import MAX_DATA_URL, MAX_DECODED_PIXELS, looks_like_image, open_image, repairs_of, to_rgb

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8))
RAMP = np.linspace(0, 1, 48).reshape(6, 8)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(image: Any) -> np.ndarray[Any, Any]:
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    return np.asarray(rgb).astype(int)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_modes_without_transparency_look_as_pillow_shows_them(mode: str) -> None:
    image = RGB.convert(mode)
    np.testing.assert_array_equal(pixels(image), np.asarray(image.convert("RGB")))


def test_lab_is_shown_in_colour() -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.new("RGB", (4, 4), (200, 30, 30)), srgb, lab, outputMode="LAB")
    assert np.abs(pixels(image) - (200, 30, 30)).max() <= 3


def see_through(mode: str) -> Image.Image:
    """Left half opaque (200), right half fully transparent black."""
    image = Image.new("RGBA", (4, 2), (200, 200, 200, 255))
    image.paste((0, 0, 0, 0), (2, 0, 4, 2))
    if mode in ("La", "RGBa"):
        return image.convert({"La": "LA"}.get(mode, "RGBA")).convert(mode)
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa"])
def test_transparent_pixels_are_white(mode: str) -> None:
    np.testing.assert_array_equal(pixels(see_through(mode))[0, :, 0], [200, 200, 255, 255])


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_transparent_colour_is_white(mode: str) -> None:
    image = Image.new("L", (2, 1), 0)
    image.putpixel((1, 0), 255)
    transparent = (0, 0, 0) if mode == "RGB" else 0
    data = encoded(image.convert(mode), transparency=transparent)
    np.testing.assert_array_equal(pixels(data).ravel(), [255] * 6)


def test_half_transparency_is_mixed_with_white() -> None:
    assert pixels(Image.new("RGBA", (1, 1), (0, 100, 200, 128)))[0, 0].tolist() == [127, 177, 227]


@pytest.mark.parametrize(
    ("mode", "dtype", "white"),
    [
        *(("I;16", "<u2", 65_535), ("I;16B", ">u2", 65_535)),
        *(("I", "i4", white) for white in (255, 65_535, 2**31 - 1)),
        *(("F", "f4", white) for white in (1, 255, 65_535)),
    ],
)
def test_deep_images_are_scaled_not_clipped(mode: str, dtype: str, white: int) -> None:
    image = Image.fromarray((RAMP * white).astype(dtype))
    assert image.mode == mode
    assert np.abs(pixels(image)[..., 0] - RAMP * 255).max() <= 1
    assert pixels(image).std() > 70


@pytest.mark.parametrize(
    ("dtype", "white", "said"),
    [
        *((np.uint16, 2**bits - 1, f"of {bits} bits") for bits in (8, 10, 12, 14, 16)),
        (np.int32, 2**12 - 1, "of 12 bits"),
        *((np.float32, white, "of floats up to 1") for white in (1.0, 1.0001)),
        (np.float32, 255.0, "of 8 bits"),
    ],
)
def test_more_than_8_bits_are_scaled_by_their_range_and_it_is_said(dtype: Any, white: float, said: str) -> None:
    ramp = np.linspace(-0.0001 if dtype is np.float32 and white < 2 else 0, white, 256).reshape(16, 16)
    data = encoded(Image.fromarray(ramp.astype(dtype)), "TIFF")
    expected = (ramp / white * 255).clip(0, 255)
    assert abs(pixels(data)[..., 0].astype(float) - expected).max() <= 1
    assert repairs_of(Image.open(io.BytesIO(data))) == [f"{said} (by their largest value), scaled to 8"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_image_upright(orientation: int) -> None:
    upright = Image.new("RGB", (40, 24), "blue")
    upright.paste("red", (0, 0, 20, 12))
    undo = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]  # from upright to how the camera stored it
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "JPEG", exif=exif, quality=100, subsampling=0)
    shown = to_rgb(data)
    assert shown.size == (40, 24)
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(upright)).max() < 60
    assert to_rgb(shown).tobytes() == shown.tobytes()  # and turns it once


def test_exif_that_cannot_be_read_is_not_a_reason_to_refuse() -> None:
    data = encoded(RGB, "JPEG", exif=b"Exif\0\0XX*\0 nonsense")
    assert to_rgb(data).size == (20, 12)


def test_of_an_animation_the_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_the_formats_that_are_read(format: str) -> None:
    assert to_rgb(encoded(RGB, format)).size == (20, 12)


def test_a_postscript_file_is_not_run_through_ghostscript() -> None:
    with pytest.raises(ValueError, match=r"is not an image that can be read: it begins with b'%!PS"):
        to_rgb(encoded(RGB, "EPS"))


def test_bytes_path_dicts() -> None:
    data = encoded(RGB)
    for image in ({"bytes": data, "path": None}, {"bytes": data, "path": "a.png"}, {"bytes": data}, bytearray(data)):
        np.testing.assert_array_equal(pixels(image), np.asarray(RGB))


def test_the_argument_is_left_as_it_is() -> None:
    image = see_through("RGBA")
    before = image.copy()
    to_rgb(image)
    assert (image.mode, image.size, image.tobytes()) == (before.mode, before.size, before.tobytes())


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.98])
def test_a_truncated_image_is_named(format: str, kept: float) -> None:
    data = encoded(RGB.resize((200, 200)), format)
    with pytest.raises(ValueError, match=r"^image 'a.x' is (damaged|not an image)") as raised:
        to_rgb({"bytes": data[: int(kept * len(data))], "path": "a.x"})
    assert "object at 0x" not in str(raised.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF"])
@pytest.mark.filterwarnings("ignore")  # Pillow's own, about metadata
def test_any_flipped_bytes_give_an_image_or_a_named_fault(format: str) -> None:
    random = np.random.default_rng(0)
    good = encoded(RGB, format)
    faults = []
    for _ in range(150):
        data = bytearray(good)
        for at in random.integers(0, len(data), 3):
            data[at] = random.integers(0, 256)
        try:
            assert to_rgb(bytes(data)).mode == "RGB"
        except ValueError as error:
            faults.append(str(error))
    assert faults
    for fault in faults:
        assert fault.startswith("the image ")
        assert "object at 0x" not in fault


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "the image is None"),
        ({"bytes": None, "path": None}, "the image is None"),
        (b"", r"the image is empty \(0 bytes\)"),
        ({"bytes": b"", "path": "a.jpg"}, r"image 'a.jpg' is empty \(0 bytes\)"),
        (
            b"<!DOCTYPE html><html>",
            r"is not an image that can be read: it begins with b'<!DOCTYPE ht'; expected JPEG, PNG",
        ),
        (7, "the image is a int"),
        ({"what": "x"}, "the image is a dict with 'what'; expected"),
        ({"url": "https://example.org/a.png"}, r"image 'https://example.org/a.png' is a URL, and nothing is fetched"),
        ("a.png", "image 'a.png' is a path, and no folder was named"),
        (Path("a.png"), "image 'a.png' is a path"),
        ({"path": "/etc/passwd"}, "is a path, and no folder was named"),
        ("https://example.org/a.png", "is a URL, and nothing is fetched"),
        ("s3://bucket/a.png", "is a URL"),
        ("data:image/png;base64,AAAA", "^the image is not an image that can be read: it begins with b"),
        ("data:image/png;base64,AAA", "^a data URL that is not base64"),
        ({"base64": "A" * 5}, "^a data URL that is not base64"),
        ("data:image/png;base64," + "A" * (MAX_DATA_URL + 1), "^a data URL of 200,000,001 characters; at most"),
        (np.zeros((2, 2)), "the image is a ndarray; expected a PIL image"),
        (Image.fromarray(np.full((2, 2), np.nan, dtype="f4")), "holds values from nan to nan"),
        (Image.fromarray(np.full((2, 2), -1, dtype="i4")), "holds values from -1 to -1"),
    ],
)
def test_what_is_not_an_image_is_named(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_rgb(image)


def bomb(side: int) -> bytes:
    return encoded(Image.new("1", (side, side)))


@pytest.mark.parametrize("side", [10_000, 14_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_from_its_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bomb(side)
    assert len(data) < 60_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("the bomb was decoded"))
    with pytest.raises(ValueError, match=r"50,000,000"):
        to_rgb(data)


def test_just_below_the_limit_is_decoded() -> None:
    side = int(MAX_DECODED_PIXELS**0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_rgb(bomb(side)).size == (side, side)


def test_files_open_inside_their_folder_only(tmp_path: Path) -> None:
    folder, outside = tmp_path / "inside", tmp_path / "out.png"
    (folder / "sub").mkdir(parents=True)
    RGB.save(folder / "sub" / "a.png")
    RGB.save(outside)
    (tmp_path / "inside-not").mkdir()
    RGB.save(tmp_path / "inside-not" / "a.png")
    (folder / "link.png").symlink_to(outside)
    (folder / "inner.png").symlink_to(folder / "sub" / "a.png")
    for name in ("sub/a.png", "./sub/../sub/a.png", str(folder / "sub" / "a.png"), "inner.png"):
        assert open_image(name, folder=folder).size == (20, 12)
    for name in ("../out.png", str(outside), "link.png", "/etc/passwd", "sub/../../out.png", "../inside-not/a.png"):
        with pytest.raises(ValueError, match="outside the image folder"):
            open_image(name, folder=folder)
    for name in ("../out.png", str(outside), "link.png"):
        assert open_image({"path": name}, folder=folder, allow_outside=True).size == (20, 12)
    for name in (f"file://{folder}/sub/a.png", {"url": f"file://{folder}/sub/a.png"}, {"path": "sub/a.png"}):
        assert open_image(name, folder=folder).size == (20, 12)
    with pytest.raises(ValueError, match=r"lies outside the image folder .*--image_folder, or .*--allow_outside"):
        open_image("file:///etc/passwd", folder=folder)
    for name, message in (
        ("sub", "is a directory"),
        ("b.png", "does not exist"),
        ("a\0.png", "NUL"),
        ("", "directory"),
    ):
        with pytest.raises(ValueError, match=message):
            open_image(name, folder=folder)


def test_an_image_written_into_a_row_is_decoded() -> None:
    """As the formats of OpenAI, Anthropic, Axolotl, transformers and XTuner wrap it."""
    for data in (encoded(RGB), encoded(RGB, "JPEG"), encoded(RGB, "WEBP")):
        text = base64.b64encode(data).decode()
        url = f"data:image/png;base64,{text}"
        for image in (
            *(url, text, {"url": url}, {"base64": text}, {"base64": url}, {"bytes": data, "path": "a.png"}),
            *({"image_url": {"url": url, "detail": "high"}}, {"url": url, "image_wh": [20, 12]}),
            {"source": {"type": "base64", "media_type": "image/png", "data": text}},
            f"data:image/png,{quote_from_bytes(data)}",
        ):
            assert looks_like_image(image) or image is not url
            assert to_rgb(image).tobytes() == to_rgb(data).tobytes()
    assert not any(map(looks_like_image, ("A sentence about a.png files.", 5, None, {"a": 1}, [], "a.txt")))
    assert all(map(looks_like_image, ("a/b c.JPG", [{"bytes": b"x"}], ["a.png"], RGB, b"x", {"path": "x.webp"})))
