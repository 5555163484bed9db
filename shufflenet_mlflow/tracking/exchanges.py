"""Exchanges with MLflow: each has a deadline on wall time, and its answer must be MLflow's own.

A server that sends a byte now and then, a locked database and a hung file system are waited for no longer than a
dead server. Answers of portals and of other servers raise, also those that MLflow's client would take for its own.
"""

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shufflenet_mlflow.errors import BusyError
from shufflenet_mlflow.runtime.deadlines import within
from shufflenet_mlflow.runtime.locks import FileLock
from shufflenet_mlflow.tracking.paths import artifact_root, for_mlflow, read_only_uri, store_file
from shufflenet_mlflow.tracking.route import Route
from shufflenet_mlflow.tracking.uris import is_server, uri_in_force

if TYPE_CHECKING:
    from mlflow import MlflowClient

_T = TypeVar("_T")

EXCHANGE_SECONDS = 30.0
"""Seconds that an exchange may take, unless `MLFLOW_HTTP_REQUEST_TIMEOUT` says otherwise."""

OPENING_SECONDS = 120.0
"""Seconds that opening an embedded store may take, which may have to be created or migrated."""

IMPATIENT_SECONDS = 10
"""Seconds that an exchange may take before a run starts without its server."""

UPLOAD_RATE, DOWNLOAD_RATE = 256 * 1024, 16 * 1024
"""Bytes a second below which a transfer is given up."""

_HISTORY_FACTOR = 4
"""A metric's history comes in several answers."""

_PAUSE_SECONDS = 1.0
"""Pause before a reading request is repeated that failed at once."""

_READING = ("get_", "search_", "list_")

_RUN_ID, _ID = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9A-Za-z][\w-]*")

_REQUEST_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 0,
    "MLFLOW_HTTP_REQUEST_TIMEOUT": int(EXCHANGE_SECONDS),
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": True,
}
"""Values of MLflow's variables in an exchange, unless they are set.

With its defaults one upload to a server that has died would go on for minutes, and repeat what may have arrived.
Whether to repeat is for the caller to decide.
"""

LARGEST_ANSWER = 1 << 26
"""Bytes of an answer, other than an artifact; a page of metrics or runs has a few million at most."""

_limit: ContextVar[float | None] = ContextVar("seconds per exchange", default=None)
_is_exchange: ContextVar[bool] = ContextVar("request of an exchange", default=False)


class ForeignAnswerError(ConnectionError):
    """An answer that is not MLflow's."""

    def __init__(self) -> None:
        super().__init__("the answer is not MLflow's")


@contextlib.contextmanager
def impatient(seconds: float = IMPATIENT_SECONDS) -> Iterator[None]:
    """Make exchanges in the block once, and briefly."""
    token = _limit.set(seconds)
    try:
        yield
    finally:
        _limit.reset(token)


def is_impatient() -> bool:
    """Whether exchanges are made once, and briefly."""
    return _limit.get() is not None


def exchange_seconds() -> float:
    """Return the seconds that an exchange may take here and now."""
    limit = _limit.get()
    if limit is not None:
        return limit
    with contextlib.suppress(KeyError, ValueError):
        return float(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
    return EXCHANGE_SECONDS


def exchange(call: Callable[[], _T]) -> _T:
    """Make one request to a tracking server, by whatever part of MLflow.

    Raises:
        Exception: whatever MLflow raises, TimeoutError or ForeignAnswerError.
    """
    return _exchange("exchange", call, True)  # type: ignore[no-any-return]


class TimedClient:
    """MLflow's client, with a deadline for each of its calls; opened when it is first used.

    Args:
        tracking_uri: by default what MLflow itself would use.
    """

    def __init__(self, tracking_uri: str | None) -> None:
        self._given = tracking_uri
        self._opened: MlflowClient | None = None
        self._failure: Exception | None = None
        self._failed_at = self._opened_at = 0.0

    @property
    def tracking_uri(self) -> str:
        """Address of the store."""
        return uri_in_force(self._given)

    @property
    def seconds_open(self) -> float:
        """Seconds since the store was opened; 0 before."""
        return time.monotonic() - self._opened_at if self._opened is not None else 0.0

    def open(self) -> "MlflowClient":
        """Open the store, creating or migrating an embedded one.

        Raises:
            Exception: whatever MLflow raises, or TimeoutError.
        """
        if self._opened is not None:
            return self._opened
        if self._failure is not None and time.monotonic() - self._failed_at < _PAUSE_SECONDS:
            raise self._failure  # its time-out is long
        try:
            with self._noting_route():
                opened = within(OPENING_SECONDS, partial(_open, self.tracking_uri))
                self._opened_at, self._opened, self._failure = time.monotonic(), opened, None
        except Exception as error:
            self._failure, self._failed_at = error, time.monotonic()
            raise
        return self._opened

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self.open(), name)
        if not callable(found):
            return found
        return partial(self._call, name, found)

    def _call(self, name: str, method: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Any:
        with self._noting_route():
            return _exchange(name, method, is_server(self.tracking_uri), *arguments, **keywords)

    @contextlib.contextmanager
    def _noting_route(self) -> Iterator[None]:
        """Note in an error how its store was chosen."""
        try:
            yield
        except Exception as error:
            error.route = Route.to(self._given)  # type: ignore[attr-defined]
            raise


def _open(tracking_uri: str) -> "MlflowClient":
    """Open a store; an embedded one under a lock, since two processes that migrate it at once can destroy it."""
    from mlflow import MlflowClient

    file, tracking_uri = store_file(tracking_uri), for_mlflow(tracking_uri)
    if file is None or _has_current_schema(file):
        return MlflowClient(tracking_uri=tracking_uri)
    lock = file.with_name(f".{file.name}.lock")
    with _locked(lock):
        try:
            if (root := artifact_root()) is not None:
                _create(tracking_uri, root)
            return MlflowClient(tracking_uri=tracking_uri)
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()  # those who still wait for it find a complete store


def _create(tracking_uri: str, artifact_root: str) -> None:
    """Create an embedded store with another folder for artifacts than MLflow's own; its client cannot be told one."""
    from mlflow.tracking._tracking_service import utils

    get_store: Any = utils._get_store
    get_store(tracking_uri, artifact_root)


def _has_current_schema(file: Path) -> bool:
    """Whether a database has nothing left to be created or migrated."""
    from mlflow.store.db import utils

    latest: Any = utils._get_latest_schema_revision
    try:
        with contextlib.closing(sqlite3.connect(read_only_uri(file), uri=True, timeout=1.0)) as store:
            return store.execute("SELECT version_num FROM alembic_version").fetchall() == [(latest(),)]
    except sqlite3.Error:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock within the block; without it if the file system has no locks or cannot be written to."""
    lock = None
    ends = time.monotonic() + OPENING_SECONDS
    while lock is None:
        try:
            lock = FileLock(path, "the tracking store")
        except BusyError:
            if time.monotonic() > ends:
                raise TimeoutError("another process is creating the store") from None
            time.sleep(0.05)
        except OSError:
            break
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


class TimedArtifacts:
    """MLflow's access to the artifacts of a run, with a deadline for each of its calls."""

    def __init__(self, repository: Any) -> None:
        self._repository = repository
        self._patience = 1.0

    def __getattr__(self, name: str) -> Any:
        return partial(self._call, name)

    def _call(self, name: str, /, *arguments: Any, **keywords: Any) -> Any:
        """Make a call; an upload that took too long may take twice as long the next time, on a slow line."""
        method = getattr(self._repository, name)
        try:
            result = _exchange(name, method, True, *arguments, upload_patience=self._patience, **keywords)
        except TimeoutError:
            self._patience *= 2
            raise
        self._patience = 1.0
        return result


def _exchange(
    name: str,
    method: Callable[..., Any],
    over_network: bool,
    /,
    *arguments: Any,
    upload_patience: float = 1.0,
    **keywords: Any,
) -> Any:
    """Call one of MLflow's methods.

    Only what reads is repeated here, and only if it failed at once: a request whose answer was lost may have arrived.
    """
    seconds, extra, gained = exchange_seconds(), 0.0, None
    if name == "get_metric_history" and _limit.get() is None:
        extra = (_HISTORY_FACTOR - 1) * seconds
    elif name in ("log_artifact", "log_artifacts", "log_model_artifacts"):
        extra = upload_patience * _size(next((one for one in arguments if _exists(one)), None)) / UPLOAD_RATE
    elif name == "download_artifacts":
        folder = keywords.get("dst_path") or arguments[-1]
        gained = partial(_seconds_gained, folder)
    call = partial(_understood, over_network, partial(method, *arguments, **keywords))
    began = time.monotonic()
    try:
        return within(seconds, call, extra=extra, gained=gained)
    except Exception as error:
        repeatable = over_network and name.startswith(_READING) and _limit.get() is None
        if not repeatable or is_own_answer(error) or time.monotonic() - began > _PAUSE_SECONDS:
            raise
        time.sleep(_PAUSE_SECONDS)
    return within(seconds, call, extra=extra)


def _understood(over_network: bool, call: Callable[[], Any]) -> Any:
    """Make a call over the network, whose answer may be anything.

    Raises:
        ForeignAnswerError: MLflow's client cannot make sense of it.
    """
    if not over_network:
        return call()
    from google.protobuf.json_format import ParseError  # type: ignore[import-untyped]

    _use_request_settings()
    _is_exchange.set(True)  # in a copy of the caller's context, which ends with the call
    try:
        result = call()
    except (ParseError, ValueError, TypeError, KeyError, AttributeError) as error:
        if str(error).startswith("Failed to convert"):  # one of MLflow's variables
            raise ConnectionError(str(error)) from None
        raise ForeignAnswerError from None
    info = getattr(result, "info", None)
    for named, field, form in ((info, "run_id", _RUN_ID), (result, "experiment_id", _ID), (result, "model_id", _ID)):
        value = getattr(named, field, None)
        if isinstance(value, str) and not form.fullmatch(value):
            raise ForeignAnswerError
    return result


def _use_request_settings() -> None:
    """Let the requests of exchanges have `_REQUEST_SETTINGS`; those of a script that calls us have MLflow's."""
    from mlflow import environment_variables

    for name, setting in _REQUEST_SETTINGS.items():
        variable = getattr(environment_variables, name)
        if "get" not in vars(variable):
            variable.get = partial(_setting, variable, variable.get, setting)


def _setting(variable: Any, get: Callable[[], Any], setting: int | bool) -> Any:
    return setting if _is_exchange.get() and not variable.is_set() else get()


def is_own_answer(error: Exception) -> bool:
    """Whether a server answered with an error that says which, as MLflow's do."""
    return isinstance(getattr(error, "json", None), dict) and "error_code" in error.json  # type: ignore[attr-defined]


def _exists(path: Any) -> bool:
    return isinstance(path, str | Path) and os.path.exists(path)


def _size(path: Any) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    total = 0
    with contextlib.suppress(OSError, TypeError):
        paths = [path] if os.path.isfile(path) else [entry for entry in Path(path).rglob("*") if entry.is_file()]
        for entry in paths:
            total += os.path.getsize(entry)
    return total


def _seconds_gained(folder: Any) -> float:
    return _size(folder) / DOWNLOAD_RATE


def refuse_foreign_answers() -> None:
    """Let MLflow's client raise for JSON that has nothing of the expected answer; for a process of our own.

    It ignores what it does not know, and would take any server's `{"status": "ok"}` for the arrival of what it sent.
    """
    from mlflow.utils import rest_utils

    parse: Any = rest_utils.parse_dict
    if getattr(parse, "refuses_foreign", False):
        return

    def checked(js_dict: Any, message: Any) -> None:
        known = {name for field in message.DESCRIPTOR.fields for name in (field.name, field.json_name)}
        if js_dict and not known.intersection(js_dict):
            raise ForeignAnswerError
        parse(js_dict=js_dict, message=message)

    checked.refuses_foreign = True  # type: ignore[attr-defined]
    rest_utils.parse_dict = checked
    _bound_answers()


def _bound_answers() -> None:
    """Let `requests` give up an answer that is larger than `LARGEST_ANSWER`, also in a thread that was abandoned.

    Artifacts are read in chunks of another size, and written to a file.
    """
    from requests.models import CONTENT_CHUNK_SIZE, Response

    read = Response.iter_content

    def iter_content(self: Response, chunk_size: int | None = 1, decode_unicode: bool = False) -> Iterator[Any]:
        chunks: Iterator[Any] = read(self, chunk_size, decode_unicode)  # type: ignore[call-overload]
        return _bounded(chunks) if chunk_size == CONTENT_CHUNK_SIZE else chunks

    Response.iter_content = iter_content  # type: ignore[method-assign]


def _bounded(chunks: Iterator[Any]) -> Iterator[Any]:
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > LARGEST_ANSWER:
            raise ForeignAnswerError
        yield chunk
