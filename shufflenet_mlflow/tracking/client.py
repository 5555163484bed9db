"""Connect to MLflow, and turn its failures into errors of one line.

Everything else that talks to MLflow takes a client from here. `mlflow` takes 1.6 s to import, so it is imported
when a client is asked for, not before.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from shufflenet_mlflow.errors import RefusedError, TrackingError
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.uris import _check_database_file, uri_in_force

if TYPE_CHECKING:
    from mlflow import MlflowClient as MlflowClient
    from mlflow.entities import LoggedModel as LoggedModel
    from mlflow.entities import Run as Run


# MLflow's own defaults make one call to a dead server block for four minutes.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # It prints the run's address on stdout, which belongs to our own output.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

_SHORT_REASONS = (
    "Connection refused",
    "Read timed out",
    "timed out",
    "Name or service not known",
    "Temporary failure in name resolution",
    "No route to host",
    "Connection reset by peer",
    "Remote end closed connection",
    "Invalid username or password",
    "not authenticated",
)

_LONGEST = 300

_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")

IMPATIENT_SECONDS = 10
"""Seconds that a server may take to answer before a run starts without it."""


def _reason(error: BaseException) -> str:
    text = str(error)
    if "filesystem tracking backend" in text:
        return "MLflow keeps no runs in a plain folder any more; use sqlite:///FOLDER/mlflow.db"
    for reason in _SHORT_REASONS:
        if reason in text:
            return reason[0].lower() + reason[1:]
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return redact(first)[:_LONGEST]


@contextmanager
def mlflow_errors(doing: str) -> Iterator[None]:
    """Turn whatever MLflow and its transport raise into an error of one line.

    Args:
        doing: completes "cannot …", such as "read run 1f…".

    Raises:
        RefusedError: MLflow says that the request itself is wrong.
        TrackingError: instead of any other MLflow, HTTP or operating system error.
    """
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError, ImportError, OSError) as error:
        code = getattr(error, "error_code", None)
        # A run that was deleted can be brought back: what is meant for it waits.
        refused = code in _REFUSALS and "must be in the 'active' state" not in str(error)
        # Not chained: what these say holds addresses with their credentials.
        raise (RefusedError if refused else TrackingError)(
            f"cannot {doing}: {_reason(error)}", code, code="mlflow"
        ) from None


def prepare_environment() -> None:
    """Set MLflow's environment variables in a process of our own; what the user has set is kept.

    Library functions leave their caller's environment alone.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def impatient() -> Iterator[None]:
    """Try requests in the block once, and briefly; for a process that has no other thread yet."""
    names = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(zip(names, ("0", str(IMPATIENT_SECONDS)), strict=True))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def connect(tracking_uri: str | None = None) -> "MlflowClient":
    """Return a client of the store at `tracking_uri`.

    Args:
        tracking_uri: by default what MLflow itself would use: `MLFLOW_TRACKING_URI`, or the embedded store
            `sqlite:///mlflow.db` below the working directory.

    Raises:
        TrackingError: MLflow does not take that URI.
    """
    uri = uri_in_force(tracking_uri)
    _check_database_file(uri)
    # The embedded store's first use reports every step of its schema.
    for name in ("mlflow.store.db.utils", "mlflow.tracking.fluent", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient as MlflowClient

    with mlflow_errors(f"open the tracking store {redact(uri)}"):
        return MlflowClient(tracking_uri=tracking_uri)


def active_run_id() -> str | None:
    """Return the run that `mlflow.start_run()` opened; there can be none before `mlflow` is imported."""
    if "mlflow" not in sys.modules:
        return None
    import mlflow

    active = mlflow.active_run()
    return active.info.run_id if active else None
