"""MLflow's tracking store at `durable+http://…`: what is logged to a run goes into a journal, all else to the server.

Points, parameters, tags, inputs, files and the end of a run are on the disk when the call returns, and reach the run in
order, whatever becomes of the server or of this process; `tracking.durable_runs` delivers them. What MLflow would
refuse is refused at once where that can be known: names, values, a run that does not exist, a changed parameter.

What needs an answer waits for it, `ANSWER_SECONDS` at most instead of MLflow's four minutes. Reading a run first waits
a moment for what is pending; a run that this process knows is then returned as it was last read, if the server is away.
"""

import copy
import json
import logging
import operator
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from mlflow.entities import Metric, Param, Run, RunInfo, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.rest_store import RestStore
from mlflow.utils import validation
from mlflow.utils.async_logging.run_operations import RunOperations
from mlflow.utils.credentials import get_default_host_creds

from shufflenet_mlflow.errors import ShuffleNetError, TrackingError
from shufflenet_mlflow.tracking import durable_runs
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.durable_errors import NoAnswerError, mlflow_error, unusable
from shufflenet_mlflow.tracking.exchanges import exchange, impatient, is_impatient, is_own_answer
from shufflenet_mlflow.tracking.logged import LARGEST, SMALLEST, LoggedBatch, LoggedInputs, RunUpdate
from shufflenet_mlflow.tracking.messages import to_body
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.target import Message
from shufflenet_mlflow.tracking.uris import check_address

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, LoggedModelInput

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
"""Seconds to wait for a server that is away, where its answer is needed."""
KNOWN_SECONDS = 3.0
"""Seconds to wait for its answer about a run that is known."""
_PAUSE = 1.0

_READING = ("Get", "Search", "List", "BatchGet", "Query")
_NEVER_ARRIVED = ("connection refused", "name or service not known", "temporary failure in name resolution")
_PASSING = ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
"""Errors of a server that will answer otherwise."""
_INVALID = "INVALID_PARAMETER_VALUE"
_DOING = {
    "CreateRun": "create a run",
    "GetRun": "read a run",
    "SearchRuns": "search runs",
    "GetMetricHistory": "read the points of a metric",
    "CreateExperiment": "create an experiment",
    "GetExperimentByName": "read an experiment",
    "GetExperiment": "read an experiment",
    "CreateLoggedModel": "create a logged model",
}
"""Request -> what it does, for messages."""


class DurableStore(RestStore):
    """MLflow's own client of a server, with a journal in front of what is logged to runs.

    Args:
        uri: address of the server, beginning with `http`.

    Raises:
        MlflowException: the address cannot be valid.
    """

    def __init__(self, uri: str) -> None:
        try:
            check_address(uri)
        except TrackingError as error:
            raise mlflow_error(str(error), _INVALID) from None
        super().__init__(partial(get_default_host_creds, uri))  # type: ignore[no-untyped-call]
        self.uri = uri
        self._known: dict[str, Run | None] = {}
        """The runs that were created or read, as the server last returned them; None: it did not answer."""
        self._params: dict[str, dict[str, str]] = {}
        self._has_warned = False
        """It has been said that the server is away, and it has not answered since."""

    # ------------------------------------------------------------------ what is logged

    def log_batch(
        self, run_id: str, metrics: Sequence[Metric], params: Sequence[Param], tags: Sequence[RunTag]
    ) -> None:
        """Put points, parameters and tags into the run's journal."""
        check: Any = validation
        check._validate_run_id(run_id)
        metrics, params, tags = check._validate_batch_log_data([_checked(point) for point in metrics], params, tags)
        check._validate_batch_log_limits(metrics, params, tags)
        check._validate_param_keys_unique(params)
        self._require_run(run_id)
        known = self._params.setdefault(run_id, {})
        new = {param.key: param.value for param in params}
        for key, value in new.items():
            if known.get(key, value) != value:
                raise mlflow_error(
                    f"Changing param values is not allowed. Param with key='{key}' was already logged with value="
                    f"'{known[key]}' for run ID='{run_id}'. Attempted logging new value '{value}'.",
                    _INVALID,
                )
        self._record(run_id, LoggedBatch.of(metrics, new, {tag.key: tag.value for tag in tags}))
        known.update(new)

    def log_metric(self, run_id: str, metric: Metric) -> None:
        """Put a point into the run's journal."""
        self.log_batch(run_id, [metric], [], [])

    def log_param(self, run_id: str, param: Param) -> None:
        """Put a parameter into the run's journal."""
        self.log_batch(run_id, [], [param], [])

    def set_tag(self, run_id: str, tag: RunTag) -> None:
        """Put a tag into the run's journal."""
        self.log_batch(run_id, [], [], [tag])

    def log_batch_async(
        self, run_id: str, metrics: Sequence[Metric], params: Sequence[Param], tags: Sequence[RunTag]
    ) -> RunOperations:
        """Do what `log_batch` does, which does not wait anyway; the operation returned is complete."""
        self.log_batch(run_id, metrics, params, tags)
        return RunOperations([])  # type: ignore[no-untyped-call]

    def log_metric_async(self, run_id: str, metric: Metric) -> RunOperations:
        """See `log_batch_async`."""
        return self.log_batch_async(run_id, [metric], [], [])

    def log_param_async(self, run_id: str, param: Param) -> RunOperations:
        """See `log_batch_async`."""
        return self.log_batch_async(run_id, [], [param], [])

    def set_tag_async(self, run_id: str, tag: RunTag) -> RunOperations:
        """See `log_batch_async`."""
        return self.log_batch_async(run_id, [], [], [tag])

    def flush_async_logging(self) -> None:
        """Wait until what is pending has arrived, or the server is known to be away."""
        durable_runs.wait_for_all(self.uri, durable_runs.END_SECONDS)

    def log_inputs(
        self,
        run_id: str,
        datasets: "list[DatasetInput] | None" = None,
        models: "list[LoggedModelInput] | None" = None,
    ) -> None:
        """Put data sets and models that a run uses into its journal."""
        check: Any = validation
        check._validate_run_id(run_id)
        check._validate_dataset_inputs(datasets or [])
        self._require_run(run_id)
        self._record(run_id, LoggedInputs.of(datasets or [], models or []))

    def update_run_info(
        self, run_id: str, run_status: int | None, end_time: int | None, run_name: str | None
    ) -> RunInfo:
        """Put another status, end or name of a run into its journal.

        The end of a run waits a moment for all that is pending, so that what follows in the script finds it.
        """
        statuses: Any = RunStatus
        status = None if run_status is None else statuses.to_string(run_status)
        self._require_run(run_id)
        update = RunUpdate(status, None if end_time is None else _whole(end_time, "end time"), run_name)
        self._record(run_id, update)
        if update.is_end and durable_runs.wait(self.uri, run_id):
            durable_runs.let_go(self.uri, run_id)
        return self._updated(run_id, update)

    def _updated(self, run_id: str, update: RunUpdate) -> RunInfo:
        """Return the run's description with the update, and keep it so."""
        known = self._known.get(run_id)
        before: Any = known.info if known is not None else None
        info = RunInfo(
            run_id,
            before.experiment_id if before else "",
            before.user_id if before else "",
            update.status or (before.status if before else "RUNNING"),
            before.start_time if before else 0,
            update.end_time or (before.end_time if before else None),
            before.lifecycle_stage if before else "active",
            before.artifact_uri if before else None,
            update.name or (before.run_name if before else None),
        )
        if known is not None:
            self._known[run_id] = Run(info, known.data, known.inputs, known.outputs)
        return info

    def _record(self, run_id: str, message: Message) -> None:
        try:
            json.dumps(to_body(message), ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:  # such as half a character, which no request can hold
            raise mlflow_error(f"this cannot be logged: {error}", _INVALID) from None
        try:
            durable_runs.record(self.uri, run_id, message)
        except ShuffleNetError as error:
            raise unusable(error) from None

    def _require_run(self, run_id: str) -> None:
        """Refuse a run that the server does not have; it is asked once, and if it does not answer, that shows later."""
        if run_id in self._known:
            return
        try:
            self._read(run_id, KNOWN_SECONDS)
        except NoAnswerError:
            self._known[run_id] = None

    # ------------------------------------------------------------------ what is asked of the server

    def create_run(self, *arguments: Any, **keywords: Any) -> Run:
        """Create a run; only the server can, so it is waited for."""
        run: Run = super().create_run(*arguments, **keywords)  # type: ignore[no-untyped-call]
        self._known[run.info.run_id] = run
        return run

    def get_run(self, run_id: str) -> Run:
        """Read a run; one that is known is returned as it was last read if the server is away."""
        arrived = durable_runs.wait(self.uri, run_id)
        known = self._known.get(run_id)
        if known is None:
            return self._read(run_id, None)
        try:
            return self._read(run_id, KNOWN_SECONDS if arrived else _PAUSE)
        except NoAnswerError as error:
            if not self._has_warned:
                logger.warning("%s; run %s is taken to be as it was last read", error, run_id)
            self._has_warned = True
            return known

    def _read(self, run_id: str, seconds: float | None) -> Run:
        with _within(seconds):
            run: Run = super().get_run(run_id)  # type: ignore[no-untyped-call]
        self._known[run_id], self._has_warned = run, False
        self._params.setdefault(run_id, {}).update(run.data.params)
        return run

    def get_metric_history(self, run_id: str, *arguments: Any, **keywords: Any) -> Any:
        """Return a metric's points, once those that are pending have arrived or a moment has passed."""
        durable_runs.wait(self.uri, run_id)
        return super().get_metric_history(run_id, *arguments, **keywords)  # type: ignore[no-untyped-call]

    def _search_runs(self, *arguments: Any, **keywords: Any) -> Any:
        durable_runs.wait_for_all(self.uri)
        return super()._search_runs(*arguments, **keywords)  # type: ignore[no-untyped-call]

    def delete_tag(self, run_id: str, key: str) -> None:
        """Delete a tag, behind what was logged before."""
        durable_runs.wait(self.uri, run_id)
        super().delete_tag(run_id, key)  # type: ignore[no-untyped-call]

    def delete_run(self, run_id: str) -> None:
        """Delete a run, behind what was logged before."""
        durable_runs.wait(self.uri, run_id)
        super().delete_run(run_id)  # type: ignore[no-untyped-call]

    def _call_endpoint(self, api: Any, *arguments: Any, **keywords: Any) -> Any:
        call = partial(super()._call_endpoint, api, *arguments, **keywords)
        name = api.__name__
        return ask(call, _DOING.get(name, f"ask for {name}"), self.uri, may_repeat=name.startswith(_READING))


def _checked(metric: Metric) -> Metric:
    """Return a point with plain numbers, such as those of numpy are not.

    Raises:
        MlflowException: its step or its time is no whole number of 64 bits.
    """
    checked = copy.copy(metric)
    checked._step = _whole(metric.step, f"step of metric {metric.key!r}")
    checked._timestamp = _whole(metric.timestamp, f"time stamp of metric {metric.key!r}")
    return checked


def _whole(value: Any, what: str) -> int:
    try:
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # the last two for arrays and tensors of several numbers
        number = None
    if number is None or isinstance(value, bool) or not SMALLEST <= number <= LARGEST:
        raise mlflow_error(f"the {what} (={value!r}) must be a whole number of at most 64 bits", _INVALID)
    return number


def _within(seconds: float | None) -> AbstractContextManager[None]:
    return nullcontext() if seconds is None else impatient(seconds)


def ask(call: Callable[[], Any], doing: str, uri: str, *, may_repeat: bool) -> Any:
    """Make a request until the server answers; a server that is away is waited for `ANSWER_SECONDS`, if may be.

    Args:
        doing: completes "cannot …".
        may_repeat: it does no harm twice; any other one is repeated only if it cannot have arrived.

    Raises:
        MlflowException: what MLflow answered.
        NoAnswerError: the server is away.
    """
    ends = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            with mlflow_errors(f"{doing} at {redact(uri)}"):
                found, answer = _answer_of(call)
        except TrackingError as error:
            if error.answered:
                raise mlflow_error(str(error), error.mlflow_code) from None
            repeatable = may_repeat or any(text in str(error).lower() for text in _NEVER_ARRIVED)
            if not repeatable or is_impatient() or time.monotonic() + _PAUSE > ends:
                raise NoAnswerError(str(error)) from None
            time.sleep(_PAUSE)
            continue
        if answer is not None:
            raise answer
        return found


def _answer_of(call: Callable[[], Any]) -> tuple[Any, MlflowException | None]:
    """Make a request; return what MLflow's server answered, and the error that it answered with."""
    try:
        return exchange(call), None
    except MlflowException as error:
        if is_own_answer(error) and error.error_code not in _PASSING:
            return None, error
        raise
