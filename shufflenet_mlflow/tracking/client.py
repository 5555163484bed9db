"""Connect to MLflow, and turn its failures into errors of one line.

Everything else that talks to MLflow takes a client from here. `mlflow` takes 1.6 s to import, so it is imported
when a client is asked for, not before.
"""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from shufflenet_mlflow.errors import RefusedError, TrackingError
from shufflenet_mlflow.tracking.exchanges import TimedClient, refuse_foreign_answers
from shufflenet_mlflow.tracking.paths import for_mlflow
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.route import check_store, explain, hint
from shufflenet_mlflow.tracking.uris import is_server, server_behind, uri_in_force

if TYPE_CHECKING:
    from mlflow import MlflowClient as MlflowClient
    from mlflow.entities import LoggedModel as LoggedModel
    from mlflow.entities import Run as Run


# MLflow's own defaults make one call to a dead server block for four minutes, and repeat what may have arrived.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
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
    "database is locked",
)

_FOREIGN = "the answer is not MLflow's"

_PACKAGES = {"MySQLdb": "mysqlclient", "psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary"}
"""Module of a database driver -> the package to install, where they differ."""

_LONGEST = 300

_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")

_STATUS = re.compile(
    r"failed with error code (\d{3})|too many (\d{3}) error responses|^(\d{3}) (?:Client|Server) Error"
)
_BROKEN_OFF = ("IncompleteRead", "ChunkedEncodingError", "Response ended prematurely", "InvalidChunkLength")
_NOT_MLFLOW = ("not in a valid JSON format", "Expecting value", "Response is not a valid JSON")
_LOST_RACES = ("UNIQUE constraint failed", "duplicate key value", "Duplicate entry", "database is locked")

_OF_DATABASES = (None, "BAD_REQUEST", "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")

NOT_ACTIVE = "must be in the 'active' state"
"""Part of what MLflow says of a deleted run or experiment."""

LOST_RACE = "LOST_RACE"
"""Code of an error for which another process is to blame that wrote the same at the same time: it is sent again."""

MAY_PASS = "TEMPORARILY_UNAVAILABLE"  # noqa: S105 - no password
"""Code of an error that an embedded store gives while it is locked."""


def _status(text: str) -> int | None:
    """Return the HTTP status in the text of an error, if that is all that is known."""
    found = _STATUS.search(text)
    return int(next(filter(None, found.groups()))) if found else None


def _reason(error: BaseException) -> str:
    if _is_own_json(error):
        return _what(error)
    if explained := explain(error):
        return explained
    reason = _what(error)
    is_foreign = reason == _FOREIGN or _status(str(error)) == 404
    return reason + hint(error, is_foreign=is_foreign)


def _what(error: BaseException) -> str:
    """Return what an error says, short and without the pages of proxies."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the Python package {_PACKAGES.get(error.name, error.name)} is missing; install it"
    if "filesystem tracking backend" in text:
        return "MLflow keeps no runs in a plain folder any more; use sqlite:///FOLDER/mlflow.db or http://HOST:5000"
    for reason in _SHORT_REASONS:
        if reason in text:
            return reason[0].lower() + reason[1:]
    if any(mark in text for mark in _BROKEN_OFF):
        return "the answer broke off"
    status = _status(text)
    if status is not None and not _is_own_json(error):
        return f"the server answered with status {status}"
    if any(mark in text for mark in _NOT_MLFLOW) or (_is_rest(error) and not _is_own_json(error)):
        return _FOREIGN
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return redact(_BEFORE_PAGE.split(first)[0])[:_LONGEST]


_BEFORE_PAGE = re.compile(r"<!doctype|<html", re.IGNORECASE)


def _is_rest(error: BaseException) -> bool:
    from mlflow.exceptions import RestException

    return isinstance(error, RestException)


def _is_own_json(error: BaseException) -> bool:
    """Whether a server answered with an error as MLflow writes it."""
    from mlflow.protos.databricks_pb2 import ErrorCode

    return _is_rest(error) and getattr(error, "json", {}).get("error_code") in set(ErrorCode.keys())


def _code(error: BaseException) -> str | None:
    """Return MLflow's error code; None for what a proxy, or the client in its place, has said."""
    code: str | None = getattr(error, "error_code", None)
    text = str(error)
    if isinstance(error, TimeoutError):
        return MAY_PASS
    if code in _OF_DATABASES and any(mark in text for mark in _LOST_RACES):
        return MAY_PASS if "database is locked" in text else LOST_RACE
    if _is_own_json(error):
        return code
    if _is_rest(error):
        return None
    status = _status(text)
    if status == 401 or (status == 403 and "Permission denied" in text):  # MLflow's own answers, in plain text
        return code
    return f"HTTP_{status}" if status is not None else code


@contextmanager
def mlflow_errors(doing: str) -> Iterator[None]:
    """Turn whatever MLflow and its transport raise into an error of one line.

    Args:
        doing: completes "cannot …", such as "read run 1f…".

    Raises:
        RefusedError: MLflow says that the request itself is wrong.
        TrackingError: instead of any other MLflow, HTTP, database or operating system error.
    """
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError, CommandError, ImportError, OSError) as error:
        code = _code(error)
        # A run that was deleted can be brought back: what is meant for it waits.
        refused = code in _REFUSALS and NOT_ACTIVE not in str(error)
        # Not chained: what these say holds addresses with their credentials.
        raise (RefusedError if refused else TrackingError)(
            f"cannot {doing}: {_reason(error)}", code, code="mlflow"
        ) from None


def prepare_environment() -> None:
    """Set MLflow's environment variables in a process of our own; what the user has set is kept, unless it is empty.

    Library functions leave their caller's environment alone.
    """
    global _own_process
    _own_process = True
    for name in [name for name, value in os.environ.items() if name.startswith("MLFLOW_") and not value]:
        del os.environ[name]
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ["MLFLOW_TRACKING_URI"] = server_behind(uri)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def prepared_environment() -> Iterator[None]:
    """Set MLflow's environment variables within the block, for a function in somebody else's process."""
    added = [name for name in _ENVIRONMENT if not os.environ.get(name)]
    os.environ.update({name: _ENVIRONMENT[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


_own_process = False
"""Whether MLflow serves nobody else in this process."""


def connect(tracking_uri: str | None = None, *, at_once: bool = True) -> "MlflowClient":
    """Return a client of the store at `tracking_uri`.

    Args:
        tracking_uri: by default what MLflow itself would use: `MLFLOW_TRACKING_URI`, or the embedded store
            `sqlite:///mlflow.db` below the working directory.
        at_once: import MLflow and open the store now; otherwise, with a server, the first call does.

    Raises:
        TrackingError: MLflow does not take that URI, or cannot open the store for another reason than a lock on it.
    """
    uri = uri_in_force(tracking_uri)
    check_store(tracking_uri)
    # The embedded store's first use reports every step of its schema, and its errors come with their tracebacks.
    for name in ("mlflow.tracking.fluent", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("store.db.utils", "exceptions", "utils.rest_utils", "utils.databricks_utils"):
        logging.getLogger(f"mlflow.{name}").setLevel(logging.CRITICAL)
    client = TimedClient(tracking_uri)
    if is_server(uri) and not (at_once or _own_process):
        return cast("MlflowClient", client)
    with mlflow_errors(f"open the tracking store {redact(uri)}"):
        if _own_process:
            refuse_foreign_answers()
        try:
            client.open()
        except Exception as error:
            if _code(error) != MAY_PASS:
                raise
            # A locked store is opened by the first call that succeeds, as a server that is away would be.
        return cast("MlflowClient", client)


@contextmanager
def used_by_mlflow(uri: str) -> Iterator[None]:
    """Within the block, have MLflow's own functions use a store: an embedded registry reads logged models with them."""
    from mlflow.tracking._tracking_service import utils

    use: Any = utils._use_tracking_uri
    before = os.environ.get("MLFLOW_TRACKING_URI")
    try:
        with use(for_mlflow(uri)):
            yield
    finally:  # MLflow forgets what the variable was
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def uri_of_caller() -> str | None:
    """Return the store that MLflow itself uses in a script that calls a function of the library; None without MLflow.

    In a folder such as `My Project`, MLflow's default can be another file than `sqlite:///mlflow.db`.
    """
    if _own_process or "mlflow" not in sys.modules:
        return None
    import mlflow

    return mlflow.get_tracking_uri()


@dataclass(frozen=True)
class ActiveRun:
    """The run that `mlflow.start_run()` opened in the caller's program."""

    run_id: str
    experiment_id: str

    @classmethod
    def in_store(cls, tracking_uri: str | None) -> "ActiveRun | None":
        """Return the active run if it is in that store; there can be none before `mlflow` is imported.

        Args:
            tracking_uri: by default the one that MLflow itself uses.
        """
        if "mlflow" not in sys.modules:
            return None
        import mlflow

        active, uri = mlflow.active_run(), mlflow.get_tracking_uri()
        if active is None or server_behind(tracking_uri or uri) != server_behind(uri):
            return None
        return cls(active.info.run_id, active.info.experiment_id)


def active_run_id() -> str | None:
    """Return the run that `mlflow.start_run()` opened; there can be none before `mlflow` is imported."""
    if "mlflow" not in sys.modules:
        return None
    import mlflow

    active = mlflow.active_run()
    return active.info.run_id if active else None
