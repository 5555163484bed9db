"""Exchanges with MLflow: deadlines, answers that are not MLflow's, and requests whose answer is lost."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import BAD_REQUEST

from shufflenet_mlflow.errors import JournalError, RefusedError, TrackingError
from shufflenet_mlflow.runtime.deadlines import within
from shufflenet_mlflow.runtime.progress import LoggingReporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking.client import LOST_RACE, MAY_PASS, connect, mlflow_errors, prepare_environment
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import new_provisional_id
from shufflenet_mlflow.tracking.kinds import TRACKING_KINDS
from shufflenet_mlflow.tracking.messages import DatasetInput, MetricPoints, to_body
from shufflenet_mlflow.tracking.refused import REFUSED_NAME, take_refused_again
from shufflenet_mlflow.tracking.run import end_surplus_runs, make_run, new_run
from shufflenet_mlflow.tracking.target import RunTarget
from shufflenet_mlflow.workflows.sync import run_sync
from tests.support.delivering import deliver_now
from tests.support.metrics import steps


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal(tmp_path / "models")) as journal:
        yield journal


def test_a_call_that_takes_too_long_is_abandoned() -> None:
    ended = threading.Event()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no complete answer within"):
        within(0.2, lambda: ended.wait(60))
    assert time.monotonic() - began < 30
    ended.set()
    assert within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)


PAGE = "<!DOCTYPE html><html><body>400 Bad Request</body></html>"


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (RestException({"error_code": "BAD_REQUEST", "message": "no"}), RefusedError, "BAD_REQUEST"),
        (RestException({"detail": "no such host"}), TrackingError, None),
        (RestException({"error_code": 400, "message": "no"}), TrackingError, None),
        (
            MlflowException(
                f"API request to endpoint /x failed with error code 400 != 200. Response body: '{PAGE}'", BAD_REQUEST
            ),
            TrackingError,
            "HTTP_400",
        ),
        (
            MlflowException(
                f"API request to endpoint was successful but the response body was not in a valid JSON format. "
                f"Response body: '{PAGE}'"
            ),
            TrackingError,
            "INTERNAL_ERROR",
        ),
        (
            RestException({"error_code": "BAD_REQUEST", "message": "(IntegrityError) UNIQUE constraint failed: x"}),
            TrackingError,
            LOST_RACE,
        ),
        (MlflowException("(sqlite3.OperationalError) database is locked"), TrackingError, MAY_PASS),
    ],
)
def test_only_errors_of_mlflow_are_refusals(error: Exception, kind: type[TrackingError], code: str | None) -> None:
    with pytest.raises(TrackingError) as caught, mlflow_errors("do this"):
        raise error
    assert (type(caught.value), caught.value.mlflow_code) == (kind, code)
    assert "<" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def refusing(*_arguments: Any, **_keywords: Any) -> Any:
    raise RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "no"})


def test_a_creation_is_never_dropped(client: MlflowClient, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    provisional = new_provisional_id()
    create = new_run(experiment=None, name="late", tags={})
    for message in (create, MetricPoints({"a": 1.0}, 1, 1)):
        journal.append(provisional, message.kind, to_body(message))
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "create_run", refusing)
        with pytest.raises(TrackingError) as caught:
            deliver_now(client, journal, TRACKING_KINDS)
    assert caught.value.code == "run-not-created"
    assert journal.pending == 2
    deliver_now(client, journal, TRACKING_KINDS)
    assert steps(client, journal.run_id_of(provisional), "a") == [1]


def test_what_was_refused_is_counted_and_sent_again(
    client: MlflowClient, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, _ = make_run(client, new_run(experiment=None, name="r", tags={}), mark=new_provisional_id())
    points = MetricPoints({"a": 1.0}, 1, 1)
    journal.append(run_id, points.kind, to_body(points))
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_batch", refusing)
        deliver_now(client, journal, TRACKING_KINDS)
    journal.close()

    def sync(**options: bool) -> Any:
        rest = {"tracking_uri": client.tracking_uri, "reporter": LoggingReporter(), "stop": StopFlag()}
        return run_sync(journal.directory, **{"dry_run": False, **options}, **rest).to_dict()  # type: ignore[arg-type]

    try:
        assert sync(dry_run=True)["refused"] == sync()["refused"] == 1
        assert (sync(refused=True)["refused"], steps(client, run_id, "a")) == (0, [1])
        assert not (journal.directory / REFUSED_NAME).exists()
    finally:
        journal.__init__(journal.directory)  # type: ignore[misc]


def test_refused_entries_stay_if_the_journal_cannot_be_written(journal: Journal) -> None:
    line = json.dumps({"run": "r", "kind": "tags", "body": {}, "reason": "no"})
    (journal.directory / REFUSED_NAME).write_text(f"damaged\n{line}\n")
    journal._write_line = lambda _line: False  # type: ignore[method-assign]
    journal.failure = "cannot write the journal"
    with pytest.raises(JournalError):
        take_refused_again(journal)
    assert (journal.directory / REFUSED_NAME).exists()


def test_a_run_whose_creation_was_answered_to_nobody_is_found(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, mark = MlflowClient.create_run, new_provisional_id()

    def lose(*arguments: Any, **keywords: Any) -> Any:
        original(*arguments, **keywords)
        raise ConnectionError("Remote end closed connection without response")

    monkeypatch.setattr(MlflowClient, "create_run", lose)
    create = new_run(experiment=None, name="r", tags={})
    run_id, _ = make_run(client, create, mark=mark)
    assert make_run(client, create, mark=mark, is_first=False) == (run_id, False)
    monkeypatch.undo()
    other, _ = make_run(client, create, mark=mark)  # a request that took its time
    end_surplus_runs(client, run_id, mark)
    assert client.get_run(other).info.lifecycle_stage == "deleted"
    assert client.get_run(run_id).info.lifecycle_stage == "active"


def test_a_lost_race_for_a_data_set_is_run_again(client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id, _ = make_run(client, new_run(experiment=None, name="r", tags={}), mark=new_provisional_id())
    original, failures = MlflowClient.log_inputs, [1, 2]

    def race(*arguments: Any, **keywords: Any) -> Any:
        if failures:
            failures.pop()
            raise MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name", BAD_REQUEST)
        return original(*arguments, **keywords)

    monkeypatch.setattr(MlflowClient, "log_inputs", race)
    DatasetInput("pets", "d1", "/pets", 4, 2, "training").send(RunTarget(client, run_id, Path()))
    assert [entry.dataset.name for entry in client.get_run(run_id).inputs.dataset_inputs] == ["pets"]


class LosesAnswers(BaseHTTPRequestHandler):
    """Takes each request, and closes the connection."""

    def do_POST(self) -> None:
        self.server.received.append(self.path)  # type: ignore[attr-defined]
        self.close_connection = True


@pytest.fixture
def loses_answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "")  # counts as not set
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    with HTTPServer(("127.0.0.1", 0), LosesAnswers) as server:
        server.received = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def test_no_request_is_repeated_by_the_http_layer(loses_answers: Any) -> None:
    """A request whose answer is lost may have arrived: the caller, not the HTTP library, decides what to do."""
    prepare_environment()
    client = connect(f"http://127.0.0.1:{loses_answers.server_port}")
    with pytest.raises(TrackingError), mlflow_errors("create a run"):
        client.create_run("0")
    assert loses_answers.received == ["/api/2.0/mlflow/runs/create"]


def test_requests_of_a_script_keep_their_settings(loses_answers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a script of one's own, our requests are not repeated, and the script's are as before."""
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    uri = f"http://127.0.0.1:{loses_answers.server_port}"
    with pytest.raises(TrackingError), mlflow_errors("create a run"):
        connect(uri).create_run("0")
    assert len(loses_answers.received) == 1
    with pytest.raises(MlflowException):
        MlflowClient(uri).create_run("0")
    assert len(loses_answers.received) > 2
