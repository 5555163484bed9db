"""Decoding of image files to RGB pixels, the right way up, and what evaluation makes of them.

Training, evaluation and prediction decode with this module, and logged models carry a copy of it (`export.bundle`), so
all of them see the same pixels.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import simplejpeg
from torch import Tensor

from shufflenet_mlflow.data.formats import (
    LARGEST_BUFFERED_JPEG,
    LARGEST_JPEG,
    UnreadableImageError,
    check_header,
    check_size,
    open_image,
    opened,
    reasons,
)
from shufflenet_mlflow.data.reading import Reading
from shufflenet_mlflow.data.resize import Pixels, resize, resized_shape, to_tensor
from shufflenet_mlflow.data.rgb import to_rgb


def decode(source: str | BinaryIO, reading: Reading = Reading()) -> Pixels:  # noqa: B008 - immutable
    """Decode an image of one of the `FORMATS` in full.

    Intact JPEG files are decoded by simplejpeg, which yields the same pixels as Pillow, faster.

    Returns:
        uint8 (height, width, 3), RGB.

    Raises:
        UnreadableImageError: it cannot be opened or decoded, or is too large.
    """
    return open_picture(source, reading).pixels()


def has_sound_header(path: str) -> bool:
    """Whether `decode` takes the file, as far as its header shows; if not, only decoding tells for sure."""
    with suppress(UnreadableImageError), reasons(), opened(path) as file, open_image(file) as image:
        check_header(image)
        if image.format == "JPEG":
            return bool(image.width * image.height <= LARGEST_BUFFERED_JPEG)
        return bool(image.mode != "F")
    return False


def open_picture(source: str | BinaryIO, reading: Reading) -> "Picture":
    """Open an image of one of the `FORMATS`, and decode it unless its decoding can wait for the size that is needed.

    Raises:
        UnreadableImageError: it cannot be opened or decoded, or is too large.
    """
    with reasons(), opened(source) as file:
        if file.read(len(_JPEG)) == _JPEG:
            encoded = bytearray(file.seek(0, os.SEEK_END))
            file.seek(0)
            file.readinto(encoded)  # type: ignore[attr-defined]
            picture = _open_jpeg(encoded, reading)
            if picture is not None:
                return picture
        return Picture(*_decode_by_pillow(file, reading))


class _Turn(NamedTuple):
    """How stored pixels are brought upright: rows and columns swapped first, then either of them reversed."""

    swaps: bool = False
    reverses_rows: bool = False
    reverses_columns: bool = False

    def __call__(self, pixels_HWC: Pixels) -> Pixels:
        upright_HWC = pixels_HWC.transpose(1, 0, 2) if self.swaps else pixels_HWC
        return upright_HWC[:: -1 if self.reverses_rows else 1, :: -1 if self.reverses_columns else 1]

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width after turning; or, as turning does the same to them twice, before it."""
        return (width, height) if self.swaps else (height, width)


_TURNS = {
    2: _Turn(False, False, True),
    3: _Turn(False, True, True),
    4: _Turn(False, True, False),
    5: _Turn(True, False, False),
    6: _Turn(True, False, True),
    7: _Turn(True, True, True),
    8: _Turn(True, True, False),
}
"""By the value of EXIF's tag."""


class Box(NamedTuple):
    """A part of an upright picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Picture:
    """A picture the right way up.

    Args:
        pixels_HWC: as they are stored.
        turn: what brings them upright.
    """

    def __init__(self, pixels_HWC: Pixels, turn: _Turn = _Turn()) -> None:  # noqa: B008 - immutable
        self._pixels_HWC, self._turn = pixels_HWC, turn
        self.height, self.width = turn.shape(*pixels_HWC.shape[:2])

    def pixels(self) -> Pixels:
        """Return all pixels."""
        return np.ascontiguousarray(self._turn(self._decoded(1)[0]))

    def resized(self, height: int, width: int, *, antialias: bool, box: Box | None = None) -> Pixels:
        """Resize the picture, or the part of it in `box`; see `resize`.

        Pixels are turned last, when they are few.

        Raises:
            UnreadableImageError: it cannot be decoded.
        """
        top, left, box_height, box_width = box or (0, 0, self.height, self.width)
        if self._turn.reverses_rows:
            top = self.height - top - box_height
        if self._turn.reverses_columns:
            left = self.width - left - box_width
        rows, columns = (top, top + box_height), (left, left + box_width)
        if self._turn.swaps:
            rows, columns = columns, rows
        pixels_HWC, shrunk = self._decoded(_shrinking(box_height / height, box_width / width), rows[1])
        part_HWC = pixels_HWC[_shrunk(rows, shrunk), _shrunk(columns, shrunk)]
        resized_HWC = resize(part_HWC, *self._turn.shape(height, width), antialias=antialias)
        return np.ascontiguousarray(self._turn(resized_HWC))

    def thumbnail(self, longest: int) -> Pixels:
        """Return a small copy, whose longer side has at most `longest` pixels.

        Raises:
            UnreadableImageError: it cannot be decoded.
        """
        scale = min(1, longest / max(self.height, self.width))
        height, width = (max(1, round(size * scale)) for size in (self.height, self.width))
        return self.resized(height, width, antialias=False)

    def _decoded(self, shrinking: int, last_row: int | None = None) -> tuple[Pixels, int]:
        """Return pixels as they are stored, and by what they are smaller than the picture.

        Args:
            shrinking: by what they may be.
            last_row: of the picture; those behind it may be missing.
        """
        return self._pixels_HWC, 1


def _shrunk(part: tuple[int, int], shrunk: int) -> slice:
    return slice(*(round(end / shrunk) for end in part))


def _shrinking(*factors: float) -> int:
    """Return by which of 8, 4, 2 and 1 a JPEG is shrunk while it is decoded, if it is then resized by 1 / `factors`."""
    return next((shrinking for shrinking in (8, 4, 2) if min(factors) >= 2 * shrinking), 1)


class _JpegPicture(Picture):
    """A JPEG that is decoded once it is known at what size.

    Args:
        height, width: as it is stored.
    """

    def __init__(self, encoded: bytearray, height: int, width: int, turn: _Turn, reading: Reading) -> None:
        self._encoded, self._stored, self._turn, self._reading = encoded, (height, width), turn, reading
        self.height, self.width = turn.shape(height, width)

    def _decoded(self, shrinking: int, last_row: int | None = None) -> tuple[Pixels, int]:
        height, width = self._stored
        frame = _sequential_frame(self._encoded)
        if last_row is not None and last_row + _MARGIN < height and frame is not None:
            # Undoing the compression takes most of the time, for all rows up to the last; so claim to have fewer.
            rows = last_row + _MARGIN
            pixels_HWC = np.empty((-(-rows // shrinking), -(-width // shrinking), 3), np.uint8)
            claimed = slice(frame + 1, frame + 3)
            self._encoded[claimed] = rows.to_bytes(2, "big")
            try:
                return _decode_by_turbo(self._encoded, rows, width, shrinking, pixels_HWC), shrinking
            except ValueError as error:
                if _MORE_DATA.search(str(error)) and self._encoded.rfind(_END) > frame:
                    return pixels_HWC, shrinking
            finally:
                self._encoded[claimed] = height.to_bytes(2, "big")
        try:
            return _decode_by_turbo(self._encoded, height, width, shrinking), shrinking
        except ValueError:  # it has flaws, which Pillow bears or names
            with reasons():
                pixels_HWC, _ = _decode_by_pillow(BytesIO(self._encoded), self._reading)
        return pixels_HWC, round(height / pixels_HWC.shape[0])


def _decode_by_turbo(
    encoded: bytearray, height: int, width: int, shrinking: int, buffer: Pixels | None = None
) -> Pixels:
    """Decode a JPEG at 1 / `shrinking` of its height and width.

    Args:
        buffer: filled even if the JPEG has flaws.

    Raises:
        ValueError: it has flaws; the message names the last.
    """
    if shrinking == 1 and buffer is None:
        decoded: Pixels = simplejpeg.decode_jpeg(encoded, "RGB")
    else:
        least = {"min_height": -(-height // shrinking), "min_width": -(-width // shrinking)} if shrinking > 1 else {}
        decoded = simplejpeg.decode_jpeg(encoded, "RGB", buffer=buffer, **least)  # type: ignore[arg-type]
    return decoded


_MARGIN = 32
"""Rows whose colours can depend on those behind them: the most of a block."""
_MORE_DATA = re.compile(r"extraneous bytes before marker 0xd[0-79]$")
"""libjpeg-turbo's warning, if it is the first, of a file without flaws that goes on where it ends."""
_END = b"\xff\xd9"

_JPEG = b"\xff\xd8"


def _open_jpeg(encoded: bytearray, reading: Reading) -> Picture | None:
    """Open a JPEG, or return None if Pillow has to decode it: it has flaws, or another colour space.

    Raises:
        UnreadableImageError: it is too large.
    """
    try:
        found_height, found_width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return None
    height, width = int(found_height), int(found_width)
    check_size(width, height, LARGEST_JPEG, "a JPEG")
    if width * height > LARGEST_BUFFERED_JPEG and _sequential_frame(encoded) is None:
        check_size(width, height, LARGEST_BUFFERED_JPEG, "a progressive JPEG")
    if colours not in ("YCbCr", "RGB", "Gray"):
        return None
    if reading.decoding == "scaled":
        return _JpegPicture(encoded, height, width, _turn_of(_exif_in(encoded), reading), reading)
    try:
        pixels_HWC = simplejpeg.decode_jpeg(encoded, "RGB")
    except ValueError:
        return None
    return Picture(pixels_HWC, _turn_of(_exif_in(encoded), reading))


def _segments(encoded: bytearray) -> Iterator[tuple[int, int, int]]:
    """Yield marker, beginning and end of each segment of a JPEG, up to its first scan."""
    position = len(_JPEG)
    while position + 10 <= len(encoded) and encoded[position] == 0xFF:
        marker, length = encoded[position + 1], int.from_bytes(encoded[position + 2 : position + 4], "big")
        if marker == 0xFF:  # filling
            position += 1
            continue
        yield marker, position + 4, position + 2 + length
        if marker == _SCAN:
            return
        position += 2 + length


_SCAN, _EXIF = 0xDA, 0xE1


def _sequential_frame(encoded: bytearray) -> int | None:
    """Return where the frame of a JPEG begins if it is sequential and has its colours in one scan.

    Others cannot be decoded in passing: they are held as coefficients until the end.
    """
    frame = None
    for marker, begin, _ in _segments(encoded):
        if marker in (0xC0, 0xC1):
            frame = begin
        if marker == _SCAN and frame is not None:
            return frame if encoded[begin] == encoded[frame + 5] else None
    return None


def _exif_in(encoded: bytearray) -> bytes:
    """Return the EXIF data of a JPEG, or nothing."""
    for marker, begin, end in _segments(encoded):
        if marker == _EXIF and encoded[begin : begin + 6] == b"Exif\0\0":
            return bytes(encoded[begin:end])
    return b""


def _turn_of(exif: bytes, reading: Reading) -> _Turn:
    """Return what brings an image with this EXIF data upright; damaged data say nothing."""
    if reading.orientation == "stored":
        return _Turn()
    tiff = exif.removeprefix(b"Exif\0\0")
    order: Any = {b"II*\0": "little", b"MM\0*": "big"}.get(tiff[:4])
    if order is None:
        return _Turn()
    position = int.from_bytes(tiff[4:8], order)
    tags = int.from_bytes(tiff[position : position + 2], order)
    for at in range(position + 2, min(position + 2 + 12 * tags, len(tiff) - 11), 12):
        if int.from_bytes(tiff[at : at + 2], order) == _ORIENTATION:
            size = _SIZES.get(int.from_bytes(tiff[at + 2 : at + 4], order), 0)
            return _TURNS.get(int.from_bytes(tiff[at + 8 : at + 8 + size], order), _Turn())
    return _Turn()


_ORIENTATION = 0x0112
_SIZES = {1: 1, 3: 2, 4: 4}
"""Bytes of a number, by its type in a tag."""


def _decode_by_pillow(file: BinaryIO, reading: Reading) -> tuple[Pixels, _Turn]:
    """Return an image's pixels as they are stored, and what brings them upright."""
    with open_image(file) as image:
        check_header(image)
        return _loaded(image, reading)


def _loaded(image: Any, reading: Reading) -> tuple[Pixels, _Turn]:
    image.load()
    is_upright = image.format in ("TIFF", "HEIF")  # by what has decoded them
    return to_rgb(image, reading), _Turn() if is_upright else _turn_of(image.info.get("exif", b""), reading)


def picture_of(image: Any, reading: Reading) -> Picture:
    """Return the picture in an image that Pillow has opened or made.

    Raises:
        UnreadableImageError: it cannot be decoded.
    """
    with reasons():
        return Picture(*_loaded(image, reading))


@dataclass(frozen=True)
class CentreCrop:
    """A picture -> uint8 (3, crop, crop): resize the shorter side, crop the centre."""

    crop: int
    """Height and width of the result."""
    resize: int
    """Length of the shorter side before the crop."""
    channels: str
    """BGR or RGB."""
    antialias: bool
    """Whether resizing antialiases."""
    reading: Reading = Reading()  # noqa: RUF009 - immutable
    """How files are read."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "CentreCrop":
        """Build from the settings of a logged model."""
        return cls(**{**values, "reading": Reading.of(values.get("reading", {}))})

    def __call__(self, picture: Picture) -> Tensor:
        height, width = resized_shape(picture.height, picture.width, self.resize, antialias=self.antialias)
        pixels_HWC = picture.resized(height, width, antialias=self.antialias)
        top, left = round((height - self.crop) / 2), round((width - self.crop) / 2)
        return to_tensor(pixels_HWC[top : top + self.crop, left : left + self.crop], self.channels)
