"""The images in a request to a served model: all of MLflow's JSON forms, base64 and data URLs.

Logged models carry a copy of this module (`export.bundle`), so it imports nothing of the package but what reads images.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from typing import Any, BinaryIO

from shufflenet_mlflow.data.formats import UnreadableImageError

IMAGE_COLUMN = "image"
REQUEST_FORMS = ("dataframe_split", "dataframe_records", "instances", "inputs")
"""Keys of a request, of which it has one."""

SHOWN = 20
"""Characters of a request that an error repeats."""


class RequestError(ValueError):
    """A request that holds no images in a known form; the message is one short line."""


def images_in(body: bytes | str) -> list[Any]:
    """Return what a JSON request has in place of images, not yet decoded.

    Args:
        body: a JSON object with one of `REQUEST_FORMS`; other keys, such as `params`, are ignored.

    Raises:
        RequestError: it is not JSON, or has none of these forms.
    """
    try:
        document = json.loads(body)
    except RecursionError as error:
        raise RequestError("the request is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"the request is not JSON in UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise RequestError(f"the request is not JSON ({error.msg} at character {error.pos})") from error
    except ValueError as error:  # a number of thousands of digits
        raise RequestError("the request holds a number that is too long") from error
    if not isinstance(document, dict):
        raise RequestError(f"the request is {_kind(document)}, not a JSON object with {' or '.join(REQUEST_FORMS)}")
    given = [form for form in REQUEST_FORMS if form in document]
    if len(given) != 1:
        found = f"{' and '.join(given)} together" if given else "none of them"
        raise RequestError(f"the request needs one of {', '.join(REQUEST_FORMS)}, and has {found}")
    content = document[given[0]]
    if given[0] == "dataframe_split":
        return _of_split(content)
    if given[0] == "inputs" and isinstance(content, dict) and "b64" not in content:
        content = _named(content, "inputs")
    if given[0] == "inputs" and not isinstance(content, list):
        content = [content]
    if not isinstance(content, list):
        raise RequestError(f"{given[0]} is {_kind(content)}, not a list of images")
    if given[0] == "dataframe_records":
        return [_named(row, f"row {number}") for number, row in enumerate(content)]
    return [_entry(value, number) for number, value in enumerate(content)]


def _of_split(content: Any) -> list[Any]:
    if not isinstance(content, dict):
        raise RequestError(f"dataframe_split is {_kind(content)}, not an object with columns and data")
    columns, rows = content.get("columns"), content.get("data")
    if not isinstance(columns, list) or not isinstance(rows, list):
        raise RequestError("dataframe_split needs a list of columns and a list of data")
    if columns.count(IMAGE_COLUMN) != 1:
        raise RequestError(f"there is no column {IMAGE_COLUMN!r} in {shortened(columns)}")
    place = columns.index(IMAGE_COLUMN)
    for number, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(columns):
            raise RequestError(f"row {number} does not have one value for each column")
    return [row[place] for row in rows]


def _named(row: Any, what: str) -> Any:
    if not isinstance(row, dict):
        raise RequestError(f"{what} is {_kind(row)}, not an object with {IMAGE_COLUMN!r}")
    if IMAGE_COLUMN not in row:
        raise RequestError(f"{what} has no {IMAGE_COLUMN!r}, only {shortened(list(row))}")
    return row[IMAGE_COLUMN]


def _entry(value: Any, number: int) -> Any:
    """Return an image among others: itself, a row of one, or an object that names it."""
    if isinstance(value, dict) and "b64" not in value:
        return _named(value, f"image {number}")
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def shortened(value: Any) -> str:
    """Return the beginning of a value's text, in one line."""
    text = repr(value[:SHOWN] if isinstance(value, (str, bytes, list)) else value)
    return text if len(text) <= 2 * SHOWN else f"{text[: 2 * SHOWN]}…"


_KINDS = {type(None): "null", bool: "a truth value", str: "text", list: "a list", dict: "an object"}


def _kind(value: Any) -> str:
    """Return how JSON calls a value."""
    return _KINDS.get(type(value), "a number")


def image_bytes(value: Any) -> BinaryIO:
    """Return an encoded image from a request: bytes, base64, a data URL, or `{"b64": …}` as in TensorFlow Serving.

    Raises:
        UnreadableImageError: it is none of these.
    """
    if isinstance(value, dict) and list(value) == ["b64"]:
        value = value["b64"]
    if isinstance(value, str):
        text = value
        if value[:5].lower() == "data:":
            head, comma, text = value.partition(",")
            if not comma or not head.lower().endswith(";base64"):
                raise UnreadableImageError("a data URL needs ;base64, and the image behind the comma")
        try:
            value = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise UnreadableImageError(f"{shortened(text)} is not base64") from error
    if not isinstance(value, (bytes, bytearray)):
        raise UnreadableImageError(f"{_kind(value)} is not the bytes of a JPEG or PNG")
    return BytesIO(value)


def numbered_images(values: Iterable[Any]) -> Iterator[BinaryIO]:
    """Return the encoded images of a request.

    Raises:
        UnreadableImageError: one is not in a form of `image_bytes`; the message says which.
    """
    for number, value in enumerate(values):
        try:
            yield image_bytes(value)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"image {number} is not a readable image ({error})") from error


def rows_of(ranked: Sequence[Sequence[tuple[str, float]]]) -> list[dict[str, Any]]:
    """Return the rows of an answer: the most probable label of each image, and its probability."""
    return [{"label": row[0][0], "probability": row[0][1]} for row in ranked]
