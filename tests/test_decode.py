"""Decoding: every picture the right way up, in its real range, and no larger than needed."""

import builtins
import struct
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from shufflenet_mlflow.data.augment import AUGMENTATIONS, seeded
from shufflenet_mlflow.data.decode import Box, Picture, decode, has_sound_header, open_picture
from shufflenet_mlflow.data.folder import list_images
from shufflenet_mlflow.data.formats import UnreadableImageError
from shufflenet_mlflow.data.loader import BadImageLog, ImageDataset, batches_of, make_loader
from shufflenet_mlflow.data.preprocess import Preprocess, eval_transform
from shufflenet_mlflow.data.reading import READING_0_1, Reading
from shufflenet_mlflow.data.resize import resized_shape
from shufflenet_mlflow.data.sampler import EvalBatches
from shufflenet_mlflow.errors import CheckpointError

Image.init()
from_11_3 = pytest.mark.skipif("AVIF" not in Image.SAVE, reason="Pillow writes AVIF from 11.3 on")


def photograph(mode: str = "RGB") -> Image.Image:
    smooth = cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8), (120, 90))
    return Image.fromarray(smooth).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "JPEG", {"quality": 90}),
        ("RGB", "JPEG", {"quality": 30, "progressive": True}),
        ("RGB", "JPEG", {"subsampling": 0}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "MPO", {}),
        ("P", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("RGB", "BMP", {}),
    ],
)
def test_pixels_are_those_that_pillow_decodes(mode: str, kind: str, options: dict[str, object]) -> None:
    content = encoded(photograph(mode), kind, **options)
    with Image.open(BytesIO(content)) as image:
        expected = np.asarray(image.convert("RGB"))
    found = decode(BytesIO(content))
    assert np.array_equal(found, expected)
    assert found.std() > 10
    assert found.flags.writeable
    assert found.flags.c_contiguous


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_the_upper_eight(kind: str) -> None:
    """Pillow's own conversion would turn nearly all of the image white."""
    deep = np.random.default_rng(0).integers(0, 1 << 16, (20, 30), dtype=np.uint16)
    found = decode(BytesIO(encoded(Image.fromarray(deep), kind)))
    assert np.array_equal(found, np.repeat((deep >> 8)[:, :, None], 3, axis=2))


def test_the_first_frame_of_an_animation_is_used() -> None:
    first, second = photograph(), Image.new("RGB", (120, 90))
    content = encoded(first, "WEBP", save_all=True, append_images=[second], lossless=True)
    assert np.array_equal(decode(BytesIO(content)), np.asarray(first))


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.999])
def test_a_jpeg_that_was_cut_short_is_refused(kept: float) -> None:
    content = encoded(photograph(), "JPEG", quality=90)
    with pytest.raises(UnreadableImageError):
        decode(BytesIO(content[: int(len(content) * kept)]))


def test_a_jpeg_that_claims_an_enormous_size_is_refused_before_it_is_decoded() -> None:
    content = bytearray(encoded(photograph(), "JPEG"))
    size = content.index(b"\xff\xc0") + 5
    content[size : size + 4] = b"\xff\xdc\xff\xdc"  # 65,500 x 65,500
    with pytest.raises(UnreadableImageError, match="65500x65500 pixels, more than the 201326592"):
        decode(BytesIO(bytes(content)))


# ---------------------------------------------------------------- orientation


def turned_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def turned(kind: str, orientation: int, width: int = 120, height: int = 90) -> bytes:
    """Return an image file, as exact as its format is, that claims an orientation."""
    image = photograph().resize((width, height))
    if kind == "HEIF":
        pillow_heif = pytest.importorskip("pillow_heif")
        pillow_heif.register_heif_opener()
    options: dict[str, Any] = {"TIFF": {"tiffinfo": {0x0112: orientation}}}.get(
        kind, {"exif": turned_exif(orientation), "quality": 95, "lossless": True}
    )
    return encoded(image, kind, **options)


def by_pillow(content: bytes) -> np.ndarray:
    """Decode and turn with Pillow alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.array(ImageOps.exif_transpose(Image.open(BytesIO(content))).convert("RGB"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", pytest.param("AVIF", marks=from_11_3), "HEIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(kind: str, orientation: int) -> None:
    content = turned(kind, orientation)
    expected = by_pillow(content)
    assert expected.shape == ((90, 120, 3) if orientation < 5 else (120, 90, 3))
    found = decode(BytesIO(content))
    assert np.array_equal(found, expected)
    assert found.flags.c_contiguous
    assert found.flags.writeable


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_version_0_1_left_them_as_they_are_stored(kind: str, orientation: int) -> None:
    content = turned(kind, orientation)
    stored = np.asarray(Image.open(BytesIO(content)).convert("RGB"))
    assert np.array_equal(decode(BytesIO(content), READING_0_1), stored)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_part_of_a_turned_picture_is_that_of_the_upright_one(orientation: int, antialias: bool) -> None:
    """Up to rounding: pixels are resized before they are turned."""
    content = turned("PNG", orientation)
    picture, upright = open_picture(BytesIO(content), Reading()), Picture(by_pillow(content))
    assert (picture.height, picture.width) == (upright.height, upright.width)
    for box in (None, Box(5, 10, 60, 50)):
        found = picture.resized(40, 30, antialias=antialias, box=box)
        expected = upright.resized(40, 30, antialias=antialias, box=box)
        assert np.abs(found.astype(int) - expected).max() <= 3
        assert expected.std() > 10


def exif_data(count: int, *tags: tuple[int, int, int, int], order: str = "<") -> bytes:
    """Return EXIF data that claim `count` tags (number, type, count, value)."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entries = b"".join(struct.pack(f"{order}HHIHxx", *tag) for tag in tags)
    return b"Exif\0\0" + mark + struct.pack(f"{order}IH", 8, count) + entries


EXIF_DATA = {
    "little-endian": (exif_data(1, (0x0112, 3, 1, 6)), 6),
    "big-endian": (exif_data(1, (0x0112, 3, 1, 6), order=">"), 6),
    "after others": (exif_data(2, (0x010F, 2, 1, 0), (0x0112, 3, 1, 8)), 8),
    "zero": (exif_data(1, (0x0112, 3, 1, 0)), 1),
    "nine": (exif_data(1, (0x0112, 3, 1, 9)), 1),
    "text": (exif_data(1, (0x0112, 2, 2, 0x36)), 1),
    "more tags than there are": (exif_data(60_000, (0x010F, 2, 1, 0), (0x0112, 3, 1, 3)), 3),
    "cut in the tag": (exif_data(1, (0x0112, 3, 1, 6))[:-4], 1),
    "cut in the head": (b"Exif\0\0II*", 1),
    "no tags": (exif_data(0), 1),
    "beginning beyond the end": (b"Exif\0\0II*\0\xff\xff\xff\xff", 1),
    "another order": (b"Exif\0\0XX*\0" + exif_data(1, (0x0112, 3, 1, 6))[10:], 1),
    "nothing": (b"Exif\0\0", 1),
}


@pytest.mark.parametrize("name", EXIF_DATA)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_says_nothing(kind: str, name: str) -> None:
    exif, orientation = EXIF_DATA[name]
    plain, with_exif = (encoded(photograph(), kind, lossless=True, **options) for options in ({}, {"exif": exif}))
    expected = np.asarray(ImageOps.exif_transpose(with_orientation(plain, orientation)).convert("RGB"))
    assert np.array_equal(decode(BytesIO(with_exif)), expected)


def with_orientation(content: bytes, orientation: int) -> Image.Image:
    image = Image.open(BytesIO(content))
    image.getexif()[0x0112] = orientation
    return image


def test_exif_of_other_segments_is_not_taken() -> None:
    """Adobe's XMP stands in a segment of the same number."""
    content = encoded(photograph(), "JPEG", exif=turned_exif(6))
    head, rest = content[:2], content[2:]
    xmp = b"http://ns.adobe.com/xap/1.0/\0" + turned_exif(8)
    before = head + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + rest
    assert np.array_equal(decode(BytesIO(before)), by_pillow(content))


@pytest.mark.parametrize("name", ["shift", "release", "none"])
def test_turned_copies_are_augmented_alike(name: str) -> None:
    """The draws are those of the upright picture."""
    preprocess = Preprocess("rgb_256", 64)
    transform = AUGMENTATIONS[name].transform(preprocess)
    upright = encoded(photograph().resize((160, 120)), "PNG")
    stored = photograph().resize((160, 120)).transpose(Image.Transpose.ROTATE_90)
    for number in range(10):
        with seeded(number):
            expected = transform(open_picture(BytesIO(upright), Reading()))
        with seeded(number):
            found = transform(open_picture(BytesIO(encoded(stored, "PNG", exif=turned_exif(6))), Reading()))
        assert (found.int() - expected.int()).abs().max() <= 4


# ---------------------------------------------------------------- transparency


def see_through(mode: str) -> Image.Image:
    """Return a red square on green, which does not show."""
    alpha = np.zeros((20, 20), np.uint8)
    alpha[5:15, 5:15] = 255
    alpha[0, 0] = 128
    colours = np.full((20, 20, 3), (0, 255, 0), np.uint8)
    colours[5:15, 5:15] = (255, 0, 0)
    image = Image.fromarray(np.dstack([colours, alpha]))
    if mode != "P":
        return image.convert(mode)
    image.putalpha(image.getchannel("A").point(lambda value: 255 if value > 128 else 0))
    return image.quantize(4)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        pytest.param("RGBA", "AVIF", marks=from_11_3),
        ("RGBA", "TIFF"),
        ("LA", "PNG"),
        ("LA", "TIFF"),
        ("P", "PNG"),
        ("RGBA", "GIF"),
    ],
)
def test_transparency_is_laid_over_white(mode: str, kind: str) -> None:
    content = encoded(see_through(mode), kind, lossless=True, quality=100)
    found = decode(BytesIO(content))
    assert (found[2, 10] > 250).all()
    shown = (255, 0, 0) if "L" not in mode else (76, 76, 76)
    np.testing.assert_allclose(found[10, 10], shown, atol=12 if kind == "AVIF" else 2)
    if mode == "RGBA" and kind not in ("AVIF", "GIF"):
        np.testing.assert_allclose(found[0, 0], (127, 255, 127), atol=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of what is dropped
        dropped = decode(BytesIO(content), READING_0_1)
        assert np.array_equal(dropped, np.asarray(Image.open(BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize("transparent", [(0, 255, 0), 4000])
def test_a_colour_that_does_not_show(transparent: Any) -> None:
    """PNG can name one, in coloured and in grey images."""
    if transparent == 4000:
        image = Image.fromarray(np.array([[4000, 40_000]], np.uint16))
    else:
        image = Image.fromarray(np.array([[(0, 255, 0), (255, 0, 0)]], np.uint8))
    found = decode(BytesIO(encoded(image, "PNG", transparency=transparent)))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 1].tolist() == ([40_000 >> 8] * 3 if transparent == 4000 else [255, 0, 0])


def test_large_pictures_are_laid_over_white_strip_by_strip() -> None:
    image = see_through("RGBA").resize((2400, 2400), Image.Resampling.NEAREST)
    found = decode(BytesIO(encoded(image, "PNG", compress_level=1)))
    assert (found[240, 1200] == 255).all()
    assert found[1200, 1200].tolist() == [255, 0, 0]


# ---------------------------------------------------------------- range


def tiff_of(values: np.ndarray, bits: int, sample_format: int = 1, order: str = "<") -> bytes:
    """Return an uncompressed grey TIFF, whose rows of 12 bits are packed."""
    height, width = values.shape
    if bits == 12:
        pairs = values.reshape(-1, 2)
        data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs.tolist())
    else:
        data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    tags[339] = sample_format
    entries = b""
    for number, value in sorted(tags.items()):
        kind = 4 if number in (273, 279) else 3
        entries += struct.pack(f"{order}HHI", number, kind, 1)
        entries += struct.pack(f"{order}I", value) if kind == 4 else struct.pack(f"{order}HH", value, 0)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return mark + struct.pack(f"{order}I", 8 + len(data)) + data + directory


RAMP = np.linspace(0, 1, 12)
RANGES: dict[str, Callable[[], bytes]] = {
    "16 bits": lambda: tiff_of((RAMP * 65_535).astype(np.uint16).reshape(3, 4), 16),
    "16 bits, big-endian": lambda: tiff_of((RAMP * 65_535).astype(np.uint16).reshape(3, 4), 16, order=">"),
    "12 bits": lambda: tiff_of((RAMP * 4095).astype(np.uint16).reshape(3, 4), 12),
    "32 bits": lambda: tiff_of((RAMP * (2**32 - 1)).astype(np.uint32).reshape(3, 4), 32),
    "8 bits, signed": lambda: tiff_of((RAMP * 255 - 128).astype(np.int8).reshape(3, 4), 8, 2),
    "16 bits, signed": lambda: tiff_of((RAMP * 65_535 - 32_768).astype(np.int16).reshape(3, 4), 16, 2),
    "16 bits, signed, big-endian": lambda: tiff_of(
        (RAMP * 65_535 - 32_768).astype(np.int16).reshape(3, 4), 16, 2, order=">"
    ),
    "32 bits, signed": lambda: tiff_of((RAMP * (2**32 - 1) - 2**31).astype(np.int32).reshape(3, 4), 32, 2),
    "PGM of 12 bits": lambda: b"P5 4 3 4095\n" + (RAMP * 4095).astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", RANGES)
def test_the_range_of_the_type_becomes_0_to_255(name: str) -> None:
    found = decode(BytesIO(RANGES[name]()))
    np.testing.assert_allclose(found[:, :, 1].ravel(), RAMP * 255, atol=1)
    assert (found == found[:, :, :1]).all()


@pytest.mark.parametrize("name", RANGES)
def test_version_0_1_clipped(name: str) -> None:
    """As its code did: the upper byte of 16 bits, and Pillow's conversion of the rest."""
    content = RANGES[name]()
    warnings.simplefilter("ignore")  # of the 12 bits, which were nearly black
    with Image.open(BytesIO(content)) as image:
        image.load()
        if image.mode.startswith("I;16") or image.format == "PPM":
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(decode(BytesIO(content), READING_0_1), expected)


@pytest.mark.parametrize("kind", ["TIFF", "PFM"])
def test_numbers_without_a_range_are_refused(kind: str, tmp_path: Any) -> None:
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    content = tiff_of(values, 32, 3) if kind == "TIFF" else b"Pf\n4 3\n-1.0\n" + values.tobytes()
    with pytest.raises(UnreadableImageError, match="its values are floating-point numbers"):
        decode(BytesIO(content))
    assert decode(BytesIO(content), READING_0_1).max() <= 1  # black, as it was
    path = tmp_path / "image.tif"
    path.write_bytes(content)
    assert not has_sound_header(str(path))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_twelve_bits_in_sixteen_are_told(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file does not say that there are no larger values; its pixels are the upper eight bits all the same."""
    values = np.linspace(0, 4095, 1200, dtype=np.uint16).reshape(30, 40)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.{kind.lower()}").write_bytes(encoded(Image.fromarray(values), kind))
    listing = list_images(tmp_path)
    dataset = ImageDataset(listing, eval_transform(Preprocess("bgr255", 32)), replace_bad=False)
    batches = batches_of(make_loader(dataset, EvalBatches(len(listing), 2), workers=0, pin_memory=False))
    with caplog.at_level("WARNING", "shufflenet_mlflow"):
        log = BadImageLog(skip=False)
        for batch in batches:
            assert log.new_in(batch) == []
            assert batch.images_NCHW.max() <= 4095 >> 8
    [record] = caplog.records
    assert record.getMessage().endswith(
        f"0.{kind.lower()}: its values use less than a sixteenth of the range of their type, so it is nearly blank; "
        "scale them to that range"
    )


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("kind", [pytest.param("AVIF", marks=from_11_3), "HEIF", "GIF", "JPEG"])
def test_other_formats_are_read(kind: str) -> None:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    content = encoded(photograph(), kind, quality=90)
    found = decode(BytesIO(content))
    assert np.abs(found.astype(int) - np.asarray(photograph())).mean() < 8


def test_what_reads_heic_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "pillow_heif":
            raise ImportError(name)
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    for brands in (b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heix", b"msf1\0\0\0\0hevc"):
        content = struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(100)
        with pytest.raises(UnreadableImageError, match=r"it is a HEIC, .*pip install 'shufflenet-mlflow\[heic\]'"):
            decode(BytesIO(content))


@pytest.mark.parametrize("brand", [b"heic", b"avif", b"mif1"])
@pytest.mark.parametrize("size", [4, 24, 2**31])
def test_damaged_containers_are_refused(brand: bytes, size: int) -> None:
    content = struct.pack(">I", size) + b"ftyp" + brand + b"\0\0\0\0" + brand * 2 + bytes(200)
    with pytest.raises(UnreadableImageError):
        decode(BytesIO(content))


def test_other_containers_are_not_pictures() -> None:
    """A film has a container of the same kind."""
    with pytest.raises(UnreadableImageError, match="cannot identify the format, which has to be one of AVIF, BMP"):
        decode(BytesIO(b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(100)))


# ---------------------------------------------------------------- large photographs


def large(width: int, height: int, **options: Any) -> bytes:
    """Return a large photograph as a JPEG."""
    smooth = cv2.resize(np.random.default_rng(1).integers(0, 256, (15, 20, 3), dtype=np.uint8), (width, height))
    return encoded(Image.fromarray(smooth), "JPEG", quality=92, **options)


def asked_sizes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """Return a list that fills with the sizes that JPEG files are decoded at."""
    asked: list[dict[str, int]] = []
    real = decode_jpeg_of()

    def decode_jpeg(encoded: bytes, colours: str, **options: Any) -> np.ndarray:
        buffer = options.get("buffer")
        if buffer is not None:
            asked.append({"height": buffer.shape[0], "width": buffer.shape[1]})
        pixels = real(encoded, colours, **options)
        if buffer is None:
            asked.append({"height": pixels.shape[0], "width": pixels.shape[1]})
        return pixels

    monkeypatch.setattr("simplejpeg.decode_jpeg", decode_jpeg)
    return asked


def decode_jpeg_of() -> Any:
    import simplejpeg

    return simplejpeg.decode_jpeg


@pytest.mark.parametrize(
    ("size", "needed", "shrinking"),
    [
        ((500, 375), 256, 1),
        ((1365, 1023), 256, 1),  # half of it would be less than twice 256
        ((1366, 1024), 256, 2),
        ((2047, 2047), 256, 2),
        ((2731, 2048), 256, 4),
        ((2731, 2048), 128, 8),
        ((1001, 803), 50, 8),
        ((1001, 803), 500, 1),
    ],
)
def test_a_photograph_is_decoded_no_larger_than_needed(
    size: tuple[int, int], needed: int, shrinking: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_sizes(monkeypatch)
    content = large(*size)
    width, height = size
    shape = resized_shape(height, width, needed, antialias=True)
    found = open_picture(BytesIO(content), Reading()).resized(*shape, antialias=True)
    assert asked == [{"height": -(-height // shrinking), "width": -(-width // shrinking)}]
    full = open_picture(BytesIO(content), READING_0_1).resized(*shape, antialias=True)
    if shrinking == 1:
        assert np.array_equal(found, full)
    else:
        assert 0 < np.abs(found.astype(int) - full).mean() < 3
    assert full.std() > 20


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_part_of_a_large_photograph(orientation: int) -> None:
    """It lies where it lies in the full one, turned or not."""
    content = large(1603, 1205, exif=turned_exif(orientation))
    picture, full = open_picture(BytesIO(content), Reading()), Picture(by_pillow(content))
    assert (picture.height, picture.width) == (full.height, full.width)
    box = Box(301, 203, 640, 577)
    found, expected = (one.resized(80, 72, antialias=True, box=box) for one in (picture, full))
    difference = np.abs(found.astype(int) - expected).mean()
    for direction in ("top", "left"):  # by half a pixel of the result
        moved = full.resized(80, 72, antialias=True, box=box._replace(**{direction: getattr(box, direction) + 4}))
        assert np.abs(moved.astype(int) - expected).mean() > 1.5 * difference


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("shrinking", [1, 2, 8])
def test_rows_below_the_part_are_left_out(
    options: dict[str, Any], shrinking: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part has the pixels that it has in the whole, to its last row."""
    content = large(1001, 803, **options)
    whole = Picture(decode_jpeg_of()(content, "RGB", min_height=-(-803 // shrinking), min_width=-(-1001 // shrinking)))
    asked = asked_sizes(monkeypatch)
    for bottom in (320, 328, 333, 700, 780, 803):
        box = Box(bottom - 320, 100, 320, 320)
        part = open_picture(BytesIO(content), Reading()).resized(*[160 // shrinking] * 2, antialias=True, box=box)
        ends = [round(end / shrinking) for end in (box.top, box.top + 320, 100, 420)]
        cut = Box(ends[0], ends[2], ends[1] - ends[0], ends[3] - ends[2])
        expected = whole.resized(*[160 // shrinking] * 2, antialias=True, box=cut)
        assert np.array_equal(part, expected)
        rows = min(803, bottom + 32) if bottom + 32 < 803 else 803
        assert asked.pop() == {"height": -(-rows // shrinking), "width": -(-1001 // shrinking)}
    assert not asked


@pytest.mark.parametrize("options", [{}, {"restart_marker_rows": 1}])
def test_a_photograph_that_was_cut_short_is_refused_whatever_is_needed_of_it(options: dict[str, Any]) -> None:
    content = large(1600, 1200, exif=b"Exif\0\0" + large(16, 16), **options)  # a small copy, which is whole
    box = Box(0, 0, 300, 300)
    for kept in (0.9, 0.999):
        picture = open_picture(BytesIO(content[: int(len(content) * kept)]), Reading())
        with pytest.raises(UnreadableImageError):
            picture.resized(100, 100, antialias=True, box=box)


def test_progressive_photographs_are_decoded_to_the_end() -> None:
    content = large(1001, 803, progressive=True)
    box = Box(0, 0, 320, 320)
    found = open_picture(BytesIO(content), Reading()).resized(320, 320, antialias=True, box=box)
    assert np.array_equal(found, np.asarray(Image.open(BytesIO(content)))[:320, :320])


def test_pictures_of_a_few_pixels() -> None:
    for size in ((1, 1), (2, 1), (1, 40), (40, 2)):
        for kind in ("JPEG", "PNG"):
            picture = open_picture(BytesIO(encoded(photograph().resize(size), kind)), Reading())
            assert (picture.width, picture.height) == size
            assert picture.resized(8, 9, antialias=True).shape == (8, 9, 3)
            assert picture.resized(8, 9, antialias=False, box=Box(0, 0, 1, 1)).shape == (8, 9, 3)


def test_the_crop_is_drawn_before_decoding() -> None:
    """So that draws, and all that follow, are the same whatever is decoded."""
    content, after = large(1600, 1200), []
    for reading in (Reading(), READING_0_1):
        transform = AUGMENTATIONS["release"].transform(Preprocess("bgr255", 64, reading=reading))
        with seeded(3):
            image = transform(open_picture(BytesIO(content), transform.reading))
            after.append((image, torch.rand(1)))
    (one, next_one), (other, next_other) = after
    assert torch.equal(next_one, next_other)
    assert not torch.equal(one, other)
    assert (one.float() - other.float()).abs().mean() < 3


def test_photographs_of_ordinary_size_keep_their_pixels() -> None:
    content = large(500, 375)
    for name in ("release", "shift", "none"):
        images = []
        for reading in (Reading(), READING_0_1):
            transform = AUGMENTATIONS[name].transform(Preprocess("rgb_256", 224, reading=reading))
            with seeded(5):
                images.append(transform(open_picture(BytesIO(content), reading)))
        assert torch.equal(*images)


def test_a_large_photograph_with_flaws_is_decoded_by_pillow() -> None:
    """In full; what Pillow does not bear is refused."""
    content = large(1600, 1200)
    flawed = content[:-2] + bytes(20) + content[-2:]  # extraneous bytes before the end
    expected = open_picture(BytesIO(content), READING_0_1).resized(60, 80, antialias=True)
    found = open_picture(BytesIO(flawed), Reading()).resized(60, 80, antialias=True)
    assert np.abs(found.astype(int) - expected).mean() < 1.5
    cut = open_picture(BytesIO(content[: len(content) // 2]), Reading())
    with pytest.raises(UnreadableImageError):
        cut.resized(60, 80, antialias=True)


# ---------------------------------------------------------------- what a checkpoint says


def test_a_checkpoint_says_how_files_are_read() -> None:
    preprocess = Preprocess("bgr255", 64)
    entry = preprocess.to_dict()
    assert entry == {
        "mode": "bgr255",
        "input_size": 64,
        "orientation": "exif",
        "transparency": "white",
        "range": "type",
        "decoding": "scaled",
    }
    assert Preprocess.from_dict(entry) == preprocess
    assert eval_transform(preprocess).reading == Reading()
    old = Preprocess.from_dict({"mode": "bgr255", "input_size": 64})
    assert old.reading == READING_0_1 == Reading("stored", "dropped", "clipped", "full")
    assert Preprocess.from_dict(old.to_dict()) == old


def test_a_checkpoint_with_an_unknown_way_is_refused() -> None:
    with pytest.raises(CheckpointError, match="orientation must be exif or stored, not 'sideways'"):
        Preprocess.from_dict({"mode": "bgr255", "input_size": 64, "orientation": "sideways"})
