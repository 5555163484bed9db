"""A classifier without the package: an exported program in, labels and probabilities of images out.

A logged model carries this file together with `data.decode` and `evaluation.ranking`, joined by `export.bundle`, so a
served model answers as `shufflenet predict` does.
"""

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from shufflenet_mlflow.data.decode import CentreCrop, UnreadableImageError, decode
from shufflenet_mlflow.evaluation.ranking import Ranked, rank

PROGRAM = "program"
SETTINGS = "settings"
"""Names of the two artifacts of a logged model."""

SERVED_BATCH_SIZE = 64
"""Images computed at once when a request holds more."""


@dataclass(frozen=True)
class Classifier:
    """A program from uint8 (N, 3, crop, crop) to logits (N, classes), with its labels and preprocessing."""

    program: Callable[[Tensor], Tensor]
    labels: Sequence[str]
    prepare: CentreCrop

    @classmethod
    def load(cls, program: str | Path, settings: str | Path) -> "Classifier":
        """Load an exported program and its settings, the JSON file of `settings_of`."""
        values: dict[str, Any] = json.loads(Path(settings).read_text("utf-8"))
        module = torch.export.load(program).module()
        return cls(module, values["labels"], CentreCrop(**values["prepare"]))

    def classify(self, images: Iterable[BinaryIO], top: int = 1) -> list[Ranked]:
        """Return the most probable labels of each image.

        Raises:
            UnreadableImageError: one cannot be read; the message says which.
        """
        found: list[Ranked] = []
        waiting: list[Tensor] = []

        def flush() -> None:
            with torch.inference_mode():
                found.extend(rank(self.program(torch.stack(waiting)), self.labels, top))
            waiting.clear()

        for number, source in enumerate(images):
            try:
                waiting.append(self.prepare(decode(source)))
            except UnreadableImageError as error:
                raise UnreadableImageError(f"image {number} is not a readable image ({error})") from error
            if len(waiting) == SERVED_BATCH_SIZE:
                flush()
        if waiting:
            flush()
        return found


def image_bytes(value: bytes | str) -> BinaryIO:
    """Return an encoded image from a request: bytes, or bytes in base64.

    Raises:
        UnreadableImageError: it is neither.
    """
    if isinstance(value, str):
        try:
            value = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UnreadableImageError(f"{value[:20]!r} is not base64") from error
    if not isinstance(value, (bytes, bytearray)):
        raise UnreadableImageError(f"a {type(value).__name__} is not the bytes of a JPEG or PNG")
    return BytesIO(value)


if __package__ != "shufflenet_mlflow.export":  # MLflow runs the bundle as the code of a logged model
    import pandas as pd
    from mlflow.exceptions import MlflowException
    from mlflow.models import set_model
    from mlflow.pyfunc import PythonModel

    class LoggedClassifier(PythonModel):
        """A column `image` of JPEG or PNG bytes in; columns `label` and `probability` out."""

        def load_context(self, context: Any) -> None:
            """See `mlflow.pyfunc.PythonModel`."""
            self.classifier = Classifier.load(context.artifacts[PROGRAM], context.artifacts[SETTINGS])

        def predict(self, context, model_input: pd.DataFrame, params=None):  # type: ignore[no-untyped-def]
            """See `mlflow.pyfunc.PythonModel`.

            Raises:
                MlflowException: an image cannot be read; the answer to a request is then status 400.
            """
            try:
                found = self.classifier.classify(image_bytes(value) for value in model_input["image"])
            except UnreadableImageError as error:
                raise MlflowException.invalid_parameter_value(str(error)) from error
            rows = [ranked[0] for ranked in found]
            return pd.DataFrame(rows, columns=["label", "probability"])

    set_model(LoggedClassifier())
