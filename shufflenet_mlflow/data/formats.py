"""The formats of image files: opening one, and how large it may be.

Logged models carry a copy of this module (`export.bundle`), so it imports nothing of the package, which they may
outlive.
"""

import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, BinaryIO

from PIL import Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401 - Pillow reads these formats once they are imported
from PIL.JpegImagePlugin import JpegImageFile

with suppress(ImportError):  # new in Pillow 11.3
    from PIL import AvifImagePlugin  # noqa: F401

warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata, in the middle of what a command prints

LARGEST_IMAGE = 1 << 26
"""The most pixels of an image, 8192 x 8192; a file of a few kilobytes can claim more than fits in memory."""

LARGEST_VIDEO_FRAME = 3 << 24
"""The most pixels of a WebP, AVIF or HEIC, stills of video codecs, which take more memory to decode."""

LARGEST_JPEG = 3 << 26
"""The most pixels of a JPEG, 16,384 x 12,288: the largest cameras have as many."""

LARGEST_BUFFERED_JPEG = 7 << 24
"""The most pixels of a progressive JPEG or one of several scans, which is in memory twice while it is decoded."""

LARGEST_FILE = 1 << 29
"""The most bytes of an image file: some formats are read into memory whole."""

MOST_METADATA = 1 << 26
"""The most bytes that are read beyond the size of the file: TIFF tags can name the same bytes again and again."""

FORMATS = ("AVIF", "BMP", "GIF", "HEIC", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read. Pillow knows others, and starts programs such as Ghostscript for some."""

_VIDEO_FORMATS = ("AVIF", "HEIF", "WEBP")


class UnreadableImageError(ValueError):
    """The file is not an image, is damaged, or is too large to use."""


@contextmanager
def reasons() -> Iterator[None]:
    """Turn whatever is raised by a damaged file into an UnreadableImageError that says why."""
    try:
        yield
    except (MemoryError, UnreadableImageError):
        raise
    except Exception as error:  # Pillow's readers raise all kinds
        # Without the object that Pillow may repeat.
        reason = getattr(error, "strerror", None) or str(error).split(" <")[0]
        raise UnreadableImageError(reason or type(error).__name__) from error


@contextmanager
def opened(source: str | BinaryIO) -> Iterator[BinaryIO]:
    """Yield a file of bearable size, at its beginning."""
    with _open_regular(source) if isinstance(source, str) else nullcontext(source) as file:
        size = file.seek(0, os.SEEK_END)
        if size > LARGEST_FILE:
            raise UnreadableImageError(f"{size} bytes, more than the {LARGEST_FILE} that are read")
        file.seek(0)
        yield file


def open_image(file: BinaryIO) -> Image.Image:
    """Open an image of one of the `FORMATS`, without decoding it.

    Unlike `Image.open` it neither warns of nor refuses large images: `check_header` has bounds of its own.

    Raises:
        UnreadableImageError: it is none, or what reads the format is not installed.
    """
    Image.preinit()  # the other formats; `Image.init` would import everything that Pillow knows
    metered: Any = _Metered(file)
    file.seek(0)
    prefix = file.read(_PREFIX_BYTES)
    if prefix[4:8] == b"ftyp" and _is_heic(prefix[: int.from_bytes(prefix[:4], "big")]):
        metered.seek(0)
        return _open_heic(metered)
    for name in FORMATS:
        factory, accepts = Image.OPEN.get(name, (None, None))
        if factory is not None and accepts is not None and accepts(prefix) is True:
            metered.seek(0)
            try:
                # Pillow's factory for JPEG would look for further images in the file.
                return JpegImageFile(metered, "") if name == "JPEG" else factory(metered, "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue
    raise UnreadableImageError(f"cannot identify the format, which has to be one of {', '.join(FORMATS)}")


_PREFIX_BYTES = 128


def _is_heic(beginning: bytes) -> bool:
    """Whether a container of pictures, by its brands, is a HEIC; an AVIF has a container of the same kind.

    Raises:
        UnreadableImageError: it is an AVIF, which this version of Pillow does not read.
    """
    brands = {beginning[8:12], *(beginning[at : at + 4] for at in range(16, len(beginning), 4))}
    if brands & {b"avif", b"avis"}:
        if "AVIF" not in Image.OPEN:
            raise UnreadableImageError("it is an AVIF, which Pillow reads from 11.3 on; pip install --upgrade pillow")
        return False
    return not brands.isdisjoint(_HEIC_BRANDS)


_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def _open_heic(file: BinaryIO) -> Image.Image:
    """Open a HEIC.

    Raises:
        UnreadableImageError: it is damaged, or the package that reads it is not installed.
    """
    try:
        import pillow_heif
    except ImportError:
        raise UnreadableImageError(
            "it is a HEIC, which pillow-heif reads; pip install 'shufflenet-mlflow[heic]'"
        ) from None
    for unneeded in ("THUMBNAILS", "DEPTH_IMAGES", "AUX_IMAGES"):
        setattr(pillow_heif.options, unneeded, False)
    pillow_heif.options.DECODE_THREADS = 1  # workers divide the cores
    try:
        image: Image.Image = pillow_heif.HeifImageFile(file, "")  # type: ignore[no-untyped-call, unused-ignore]
    except SyntaxError as error:
        raise UnreadableImageError(str(error)) from error
    return image


class _Metered:
    """A file that is not read without end.

    Args:
        file: its size, and `MOST_METADATA` more, are read at most.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = file.seek(0, os.SEEK_END) + MOST_METADATA

    def read(self, size: int | None = -1) -> bytes:
        content = self._file.read(-1 if size is None else size)
        self._left -= len(content)
        if self._left < 0:
            raise UnreadableImageError(
                f"its metadata claims more than the size of the file and {MOST_METADATA} bytes together"
            )
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _open_regular(path: str) -> BinaryIO:
    """Open a regular file; never block on a pipe of that name."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(descriptor, "rb")  # refuses a folder
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise UnreadableImageError("it is not a regular file")
    return file


def check_header(image: Image.Image) -> None:
    """Raise UnreadableImageError if an image is too large.

    A large JPEG that Pillow has to decode is decoded at half its width and height, which saves memory.
    """
    width, height = image.size
    if image.format != "JPEG":
        limit = LARGEST_VIDEO_FRAME if image.format in _VIDEO_FORMATS else LARGEST_IMAGE
        check_size(width, height, limit, f"a {'HEIC' if image.format == 'HEIF' else image.format}")
    elif width * height > LARGEST_IMAGE:
        image.draft(None, (width // 2, height // 2))
    if image.format == "TIFF":  # a tile can be larger than the image
        tags = image.tag_v2  # type: ignore[attr-defined]
        check_size(int(tags.get(_TILE_WIDTH, 0)), int(tags.get(_TILE_LENGTH, 0)), LARGEST_IMAGE, "a tile of a TIFF")


_TILE_WIDTH, _TILE_LENGTH = 322, 323


def check_size(width: int, height: int, limit: int, kind: str) -> None:
    """Raise UnreadableImageError if the size in an image's header is too large."""
    if width * height > limit:
        raise UnreadableImageError(f"{width}x{height} pixels, more than the {limit} of {kind} that are decoded")
