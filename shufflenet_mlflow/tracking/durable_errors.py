"""Errors as MLflow's clients expect them: what is said is this package's, the class and the code are MLflow's."""

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, TEMPORARILY_UNAVAILABLE, ErrorCode

from shufflenet_mlflow.errors import ShuffleNetError
from shufflenet_mlflow.tracking.durable_runs import FOLDER_VARIABLE


class NoAnswerError(MlflowException):
    """The server is away."""

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=TEMPORARILY_UNAVAILABLE)


def mlflow_error(text: str, code: str | None) -> MlflowException:
    """Return an error with one of MLflow's codes, such as `INVALID_PARAMETER_VALUE`."""
    number = ErrorCode.Value(code) if code in ErrorCode.keys() else INTERNAL_ERROR  # noqa: SIM118 - no dict
    return MlflowException(text, error_code=number)


def unusable(error: ShuffleNetError) -> MlflowException:
    """Return the error of a journal that cannot be kept."""
    text = str(error).replace("choose another folder with --save-dir", f"{FOLDER_VARIABLE} names another folder")
    return mlflow_error(text, None)
