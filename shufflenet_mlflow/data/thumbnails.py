"""Small pictures inside HTML pages."""

import base64
import io

from PIL import Image

from shufflenet_mlflow.data.decode import open_picture
from shufflenet_mlflow.data.formats import UnreadableImageError
from shufflenet_mlflow.data.reading import Reading
from shufflenet_mlflow.data.remarks import remarks

SIDE = 96


def thumbnail(path: str) -> str | None:
    """Return an image as a data URI, at most `SIDE` pixels wide and high; None if it cannot be decoded."""
    try:
        with remarks():
            image = Image.fromarray(open_picture(path, Reading()).thumbnail(SIDE))
    except UnreadableImageError:
        return None
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
