"""Images that claim or take too much: refused from their header, in one line, in little memory."""

import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shufflenet_mlflow.data import formats
from shufflenet_mlflow.data.decode import decode
from shufflenet_mlflow.data.formats import UnreadableImageError
from tests.support.command_line import Invoke
from tests.support.images import write_images

MEMORY = 100 << 20
"""Bytes that refusing an image takes at most."""

_PEAK = """
import resource, sys, warnings
from shufflenet_mlflow.data.decode import decode
from shufflenet_mlflow.data.formats import UnreadableImageError
from PIL import Image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        print(decode(path).shape)
    except UnreadableImageError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


def decoded_apart(*paths: Path) -> tuple[str, int]:
    """Decode in a process of its own; return the shapes or refusals, and the bytes of memory that it took."""
    done = subprocess.run([sys.executable, "-c", _PEAK, *paths], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    *said, peak = done.stdout.splitlines()
    return "\n".join(said), int(peak)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *more: bytes) -> bytes:
    """Return a black PNG of a few kilobytes, with more chunks before its pixels."""
    compress = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join(compress.compress(row) for _ in range(height)) + compress.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def tiff(*tags: tuple[int, int, int, int], size: int = 0) -> bytes:
    """Return a TIFF of 8 x 8 pixels with more tags (number, type, count, value), padded to `size`."""
    basic = {256: (3, 1, 8), 257: (3, 1, 8), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1)}
    basic |= {278: (3, 1, 8), 273: (4, 1, 8), 279: (4, 1, 64)}
    basic |= {number: (kind, count, value) for number, kind, count, value in tags}
    entries = b"".join(struct.pack("<HHII", number, *rest) for number, rest in sorted(basic.items()))
    content = b"II*\0" + struct.pack("<I", 72) + bytes(64) + struct.pack("<H", len(basic)) + entries + bytes(4)
    return content.ljust(size, b"\0")


def jpeg_header(width: int, height: int, frame: int, scanned: int) -> bytes:
    """Return the header of a JPEG of three colours.

    Args:
        frame: 0xC0 for a sequential one, 0xC2 for a progressive one.
        scanned: colours in the first scan.
    """
    colours = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    scan = bytes([scanned]) + b"".join(bytes([number, 0]) for number in (1, 2, 3)[:scanned]) + b"\0\x3f\0"
    return (
        b"\xff\xd8"
        + struct.pack(">BBHBHHB", 0xFF, frame, 17, 8, height, width, 3)
        + colours
        + struct.pack(">BBH", 0xFF, 0xDA, 2 + len(scan))
        + scan
        + bytes(100)
    )


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


BOMBS = {
    "png": (lambda: png(13_000, 13_000), "13000x13000 pixels, more than the 67108864 of a PNG"),
    "bmp": (lambda: bmp(60_000, 60_000), "60000x60000 pixels, more than the 67108864 of a BMP"),
    "gif": (
        lambda: b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
        "60000x60000 pixels, more than the 67108864 of a GIF",
    ),
    "ppm": (lambda: b"P6 60000 60000 255\n", "60000x60000 pixels, more than the 67108864 of a PPM"),
    "tiff": (lambda: tiff((256, 4, 1, 60_000), (257, 4, 1, 60_000)), "60000x60000 pixels, more than the 67108864"),
    "tile": (
        lambda: tiff((322, 4, 1, 40_000), (323, 4, 1, 40_000)),
        "40000x40000 pixels, more than the 67108864 of a tile of a TIFF",
    ),
    "sequential": (
        lambda: jpeg_header(20_000, 20_000, 0xC0, 3),
        "20000x20000 pixels, more than the 201326592 of a JPEG",
    ),
    "progressive": (
        lambda: jpeg_header(12_000, 12_000, 0xC2, 3),
        "12000x12000 pixels, more than the 117440512 of a progressive JPEG",
    ),
    "scans": (
        lambda: jpeg_header(12_000, 12_000, 0xC0, 1),
        "12000x12000 pixels, more than the 117440512 of a progressive JPEG",
    ),
    "webp": (lambda: saved(Image.new("1", (8000, 7000)), "WEBP", lossless=True, method=0), "8000x7000 pixels, more"),
    "text": (
        lambda: png(8, 8, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 28), 9))]),
        "Decompressed data too large",
    ),
    "profile": (
        lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 28), 9))),
        "Decompressed data too large",
    ),
    "eps": (
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n",
        "cannot identify the format, which has to be one of AVIF, BMP, GIF, HEIC, JPEG, PNG, PPM, TIFF, WEBP",
    ),
    "icon": (lambda: saved(Image.new("RGB", (16, 16)), "ICO"), "cannot identify the format"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_from_their_header(name: str, tmp_path: Path) -> None:
    make, reason = BOMBS[name]
    path = tmp_path / "bomb.png"
    path.write_bytes(make())
    with pytest.raises(UnreadableImageError) as caught:
        decode(str(path))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bombs_take_no_memory_and_print_nothing(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in BOMBS]
    for path, (make, _) in zip(paths, BOMBS.values(), strict=True):
        path.write_bytes(make())
    said, peak = decoded_apart(*paths)
    for line, (_, reason) in zip(said.splitlines(), BOMBS.values(), strict=True):
        assert reason in line
    assert peak < MEMORY


def test_tags_that_name_the_same_bytes_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New versions of Pillow leave such tags out; the bound is for the others, and for what else reads repeatedly."""
    path = tmp_path / "tags.tif"
    path.write_bytes(tiff(*((50_000 + number, 1, 9_000_000, 0) for number in range(100)), size=10_000_000))
    said, peak = decoded_apart(path)
    assert said == "(8, 8, 3)" or "its metadata claims more" in said
    assert peak < MEMORY
    monkeypatch.setattr(formats, "MOST_METADATA", -9_000_000)
    with pytest.raises(UnreadableImageError, match="its metadata claims more than the size of the file"):
        decode(str(path))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    paths = [tmp_path / "sparse.jpg", tmp_path / "sparse.png"]
    for path, beginning in zip(paths, (b"\xff\xd8", b"\x89PNG\r\n\x1a\n"), strict=True):
        with path.open("wb") as file:
            file.write(beginning)
            file.truncate((1 << 29) + 1)
    said, peak = decoded_apart(*paths)
    assert said.splitlines() == ["536870913 bytes, more than the 536870912 that are read"] * 2
    assert peak < MEMORY


@pytest.mark.long
def test_animations_cost_one_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (600, 600), (number, 0, 0)) for number in range(100)]
    paths = [tmp_path / kind for kind in ("GIF", "WEBP", "PNG", "TIFF")]
    for path in paths:
        path.write_bytes(saved(frames[0], path.name, save_all=True, append_images=frames[1:]))
    said, peak = decoded_apart(*paths)
    assert said.splitlines() == ["(600, 600, 3)"] * 4
    assert peak < MEMORY


@pytest.mark.parametrize("size", [(16_320, 12_240), (12_000, 9_000), (8160, 6144)])
def test_the_largest_cameras_are_read(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs of 200, 108 and 50 megapixels; what decodes them is not called, which would take seconds."""
    asked: list[str] = []
    monkeypatch.setattr(
        "simplejpeg.decode_jpeg", lambda _encoded, colours: asked.append(colours) or np.zeros((1, 1, 3))
    )
    monkeypatch.setattr("simplejpeg.decode_jpeg_header", lambda _encoded: (size[1], size[0], "YCbCr", "420"))
    assert decode(BytesIO(jpeg_header(*size, 0xC0, 3))).shape == (1, 1, 3)
    assert asked == ["RGB"]


def test_a_damaged_photograph_is_decoded_in_less_memory(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.new("L", (9000, 9000)).convert("CMYK").save(path)
    said, peak = decoded_apart(path)
    assert said == "(4500, 4500, 3)"
    assert peak < 400 << 20


@pytest.mark.long
def test_pillow_does_not_warn_in_between(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png(9_500, 9_500)[:-100])
    said, _ = decoded_apart(path)  # above Pillow's threshold of 89 million, and cut short
    assert "9500x9500 pixels" in said
    exif = tmp_path / "exif.tif"
    exif.write_bytes(tiff((256, 3, 2, 8 | 8 << 16)))  # two widths
    assert decoded_apart(exif)[0] == "(8, 8, 3)"


@pytest.mark.parametrize("workers", [0, 1])
def test_training_names_the_bomb_or_skips_it(workers: int, shufflenet: Invoke, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", per_class=4)
    path = images / "red" / "bomb.png"
    path.write_bytes(png(13_000, 13_000))
    options = ["data", "mean", images, "--output", "mean.npy", "--input-size", 32, "--workers", workers]
    result = shufflenet(*options)
    line = (
        f"{str(path)!r} is not a readable image (13000x13000 pixels, more than the 67108864 of a PNG that are decoded)"
    )
    assert result.exit_code == 1
    assert f"Error: {line}; remove it or pass --on-bad-image skip\n" in result.stderr
    result = shufflenet(*options, "--on-bad-image", "skip")
    assert result.exit_code == 0, result.stderr
    assert f"skipped: {line}" in result.stderr


def test_the_limits_are_those_of_the_documentation() -> None:
    text = (Path(__file__).parent.parent / "docs" / "own-images.md").read_text("utf-8").replace(",", "")
    for limit in (
        formats.LARGEST_JPEG,
        formats.LARGEST_BUFFERED_JPEG,
        formats.LARGEST_IMAGE,
        formats.LARGEST_VIDEO_FRAME,
        formats.LARGEST_FILE >> 20,
    ):
        assert str(limit) in text
