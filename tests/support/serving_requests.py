"""Requests to a served model: in every form, and malformed in every way."""

import base64
import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

FORMS: dict[str, Callable[[Sequence[Any]], dict[str, Any]]] = {
    "dataframe_split": lambda values: {"dataframe_split": {"columns": ["image"], "data": [[v] for v in values]}},
    "dataframe_records": lambda values: {"dataframe_records": [{"image": value} for value in values]},
    "instances": lambda values: {"instances": list(values)},
    "instances, rows": lambda values: {"instances": [[value] for value in values]},
    "instances, named": lambda values: {"instances": [{"image": value} for value in values]},
    "inputs": lambda values: {"inputs": list(values)},
    "inputs, named": lambda values: {"inputs": {"image": list(values)}},
}
"""Form -> function that makes a request of images."""

_JSON_VALUES: tuple[Any, ...] = (None, True, 7, -1.5, "", "x" * 30_000, [], {}, [[]], [{}], [None], {"image": {}})


def malformed(picture: bytes, number: int, seed: int = 0) -> Iterator[bytes]:
    """Yield requests that a server must refuse: broken JSON, base64 and images in turn.

    Args:
        picture: a PNG.
    """
    source = random.Random(seed)
    for index in range(number):
        form = FORMS[source.choice(list(FORMS))]
        if index % 3 == 0:
            yield _broken_json(source, form, picture)
        else:
            broken = (_broken_base64 if index % 3 == 1 else _broken_image)(source, picture)
            good = base64.b64encode(picture).decode()
            yield json.dumps(form([good, broken][source.randrange(2) :])).encode()


def _broken_json(source: random.Random, form: Callable[[Sequence[Any]], dict[str, Any]], picture: bytes) -> bytes:
    document = form([base64.b64encode(picture).decode()])
    whole = json.dumps(document).encode()
    [name] = document
    match source.randrange(7):
        case 0:
            return whole[: source.randrange(len(whole))]
        case 1:
            return bytes(source.randrange(256) for _ in range(source.randrange(200)))
        case 2:
            return b'{"%s": %s' % (name.encode(), source.choice((b"[", b'{"a":')) * source.choice((900, 100_000)))
        case 3:
            value = source.choice([value for value in _JSON_VALUES if value != []])
            return json.dumps({name: source.choice((value, [value, 3]))}).encode()
        case 4:
            return json.dumps(source.choice(_JSON_VALUES)).encode()
        case 5:
            return json.dumps({**document, "inputs": [], "instances": []}).encode()
        case _:
            return whole.replace(b'"', source.choice((b"'", b"", b"\x00", b'"\\ud800')), 1)


def _broken_base64(source: random.Random, picture: bytes) -> Any:
    good = base64.b64encode(picture).decode()
    cut = source.randrange(1, len(good))
    return source.choice(
        (
            good[:cut] + source.choice("!?*ä\x00-_") + good[cut:],
            good.rstrip("=")[: 4 * (cut // 4) + 1],
            f"data:image/png,{good}",
            f"data:image/png;base64{good}",
            "data:",
            f"/home/{good[:10]}.png",
            {"b64": good, "a": 1},
            [good, good],
            7,
            None,
        )
    )


def _broken_image(source: random.Random, picture: bytes) -> str:
    file = io.BytesIO()
    Image.open(io.BytesIO(picture)).save(file, "JPEG")
    jpeg = file.getvalue()
    huge = bytearray(picture)
    huge[16:24] = b"\x00\x0f\xff\xff" * 2  # a PNG that claims a million pixels each way
    broken = source.choice(
        (
            picture[: source.randrange(len(picture) // 2)],
            jpeg[: source.randrange(len(jpeg) // 4)],
            bytes(huge),
            picture[:8] + bytes(source.randrange(256) for _ in range(300)),
            bytes(source.randrange(256) for _ in range(source.randrange(2000))),
            b"RIFF\x00\x00\x00\x00WEBPVP8 ",
            b"<svg></svg>",
        )
    )
    return base64.b64encode(broken).decode()
