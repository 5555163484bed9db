"""A classifier without the package: an exported program in, labels and probabilities of images out.

A logged model carries this file together with `evaluation.ranking` and the modules that decode, joined by
`export.bundle`, so a served model answers as `shufflenet predict` does.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from shufflenet_mlflow.data.decode import CentreCrop, open_picture
from shufflenet_mlflow.data.formats import UnreadableImageError
from shufflenet_mlflow.evaluation.ranking import Ranked, rank
from shufflenet_mlflow.export.requests import (
    IMAGE_COLUMN,
    RequestError,
    images_in,
    numbered_images,
    rows_of,
    shortened,
)

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
        if Path(program).suffix == ".onnx":
            return cls(_onnx_program(str(program)), values["labels"], CentreCrop.of(values["prepare"]))
        module = torch.export.load(program).module()
        return cls(module, values["labels"], CentreCrop.of(values["prepare"]))

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
                waiting.append(self.prepare(open_picture(source, self.prepare.reading)))
            except UnreadableImageError as error:
                raise UnreadableImageError(f"image {number} is not a readable image ({error})") from error
            if len(waiting) == SERVED_BATCH_SIZE:
                flush()
        if waiting:
            flush()
        return found


def _onnx_program(path: str) -> Callable[[Tensor], Tensor]:
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    [taken] = session.get_inputs()

    def run(pixels_NCHW: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {taken.name: pixels_NCHW.contiguous().numpy()})[0])

    return run


if __package__ != "shufflenet_mlflow.export":  # MLflow runs the bundle as the code of a logged model
    import pandas as pd
    from mlflow.exceptions import MlflowException
    from mlflow.models import set_model
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
    from mlflow.pyfunc import PythonModel

    SERVER = "mlflow.pyfunc.scoring_server"

    class BadRequestError(MlflowException):
        """Status 400 and one line: MLflow's server puts the whole request before the message of any other error."""

        def __init__(self, line: str) -> None:
            super().__init__(line, error_code=INVALID_PARAMETER_VALUE)

        @property
        def message(self) -> str:
            """The line."""
            return str(self)

        @message.setter
        def message(self, _value: str) -> None:
            pass

    class LoggedClassifier(PythonModel):
        """A column `image` of JPEG or PNG bytes in; columns `label` and `probability` out."""

        def load_context(self, context: Any) -> None:
            """See `mlflow.pyfunc.PythonModel`."""
            self.classifier = Classifier.load(context.artifacts[PROGRAM], context.artifacts[SETTINGS])
            if f"{SERVER}.app" in sys.modules:  # this process is `mlflow models serve`
                answer_requests(sys.modules[SERVER], self.answers)

        def answers(self, images: Iterable[Any]) -> list[dict[str, Any]]:
            """Return the rows of an answer.

            Raises:
                BadRequestError: an image cannot be read.
            """
            try:
                return rows_of(self.classifier.classify(numbered_images(images)))
            except UnreadableImageError as error:
                raise BadRequestError(str(error)) from error

        def predict(self, context, model_input: pd.DataFrame, params=None):  # type: ignore[no-untyped-def]
            """See `mlflow.pyfunc.PythonModel`.

            Raises:
                BadRequestError: an image cannot be read; the answer to a request is then status 400.
            """
            if IMAGE_COLUMN not in model_input:
                raise BadRequestError(f"there is no column {IMAGE_COLUMN!r} in {shortened(list(model_input))}")
            return pd.DataFrame(self.answers(model_input[IMAGE_COLUMN]), columns=["label", "probability"])

    def answer_requests(server: Any, answers: Callable[[Iterable[Any]], list[dict[str, Any]]]) -> None:
        """Let MLflow's server read JSON requests with `images_in`, and answer what it cannot read with one line.

        By itself the server takes base64 in two of its four forms, and repeats whole requests, with the paths of this
        machine, in its errors. A server without the function that this replaces stays as it is.
        """
        mlflows = getattr(server, "invocations", None)
        if mlflows is None:
            return

        def invocations(data: Any, content_type: str | None, *args: Any, **kwargs: Any) -> Any:
            kind = (content_type or "").partition(";")[0].strip().lower()
            if not kind:
                raise BadRequestError("the request has no Content-Type; application/json is one")
            try:
                if kind != server.CONTENT_TYPE_JSON:
                    return mlflows(data, content_type, *args, **kwargs)
                rows = answers(images_in(data))
            except BadRequestError:
                raise
            except RequestError as error:
                raise BadRequestError(str(error)) from error
            except Exception as error:
                if kind == server.CONTENT_TYPE_JSON:
                    raise
                raise BadRequestError(f"the request is not {kind[:40]} with a column {IMAGE_COLUMN!r}") from error
            return server.InvocationsResponse(json.dumps({"predictions": rows}), 200, server.CONTENT_TYPE_JSON)

        server.invocations = invocations

    set_model(LoggedClassifier())
