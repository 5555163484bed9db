"""Single exchanges with a real server through a proxy that answers some of them in the server's place."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.errors import TrackingError
from shufflenet_mlflow.export import log_model
from shufflenet_mlflow.tracking.client import connect
from shufflenet_mlflow.tracking.delivery import Deliverer
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import new_provisional_id, read_pending
from shufflenet_mlflow.tracking.kinds import TRACKING_KINDS
from shufflenet_mlflow.tracking.messages import DatasetInput, MetricPoints, Tags, TextArtifact, to_body
from shufflenet_mlflow.tracking.refused import REFUSED_NAME, take_refused_again
from shufflenet_mlflow.tracking.run import make_run, new_run
from shufflenet_mlflow.tracking.target import RunTarget, manifest_in_tag
from tests.support.delivering import deliver_now
from tests.support.metrics import steps
from tests.support.mlflow_server import Server
from tests.support.proxy import Proxy
from tests.support.training import run

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the settings of a process of our own."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal(tmp_path / "models")) as journal:
        yield journal


def make(client: MlflowClient, name: str) -> str:
    run_id, _ = make_run(client, new_run(experiment="answers", name=name, tags={}), mark=new_provisional_id())
    return run_id


@pytest.mark.parametrize("mode", ["html-400", "json-400"])
def test_ten_points_that_a_proxy_refuses_arrive_later(mode: str, proxy: Proxy, journal: Journal) -> None:
    client = connect(proxy.uri)
    run_id = make(client, mode)
    deliverer = Deliverer(client, journal, TRACKING_KINDS)
    step = 0
    proxy.choose = lambda _, path: mode if path.endswith("runs/log-batch") and 11 <= step <= 20 else "pass"
    for step in range(1, 31):
        point = MetricPoints({"a": float(step)}, step, 1000 + step)
        journal.append(run_id, point.kind, to_body(point))
        if 11 <= step <= 20:
            with pytest.raises(TrackingError):
                deliverer.send_some()
    proxy.choose = None
    deliver_now(client, journal, TRACKING_KINDS)
    assert steps(client, run_id, "a") == list(range(1, 31))
    assert not (journal.directory / REFUSED_NAME).exists()


@pytest.mark.parametrize("mode", ["html-400", "json-400"])
def test_a_creation_that_a_proxy_refuses_waits(mode: str, proxy: Proxy, journal: Journal) -> None:
    client, provisional = connect(proxy.uri), new_provisional_id()
    for message in (new_run(experiment="answers", name="offline", tags={}), MetricPoints({"a": 1.0}, 1, 1)):
        journal.append(provisional, message.kind, to_body(message))
    proxy.choose = lambda _method, path: mode if path.endswith("runs/create") else "pass"
    with pytest.raises(TrackingError):
        deliver_now(client, journal, TRACKING_KINDS)
    assert (proxy.modes[mode], journal.pending) == (1, 2)
    proxy.choose = None
    deliver_now(client, journal, TRACKING_KINDS)
    assert steps(client, journal.run_id_of(provisional), "a") == [1]


@pytest.mark.parametrize("mode", ["login", "other"])
def test_an_upload_that_a_portal_takes(mode: str, proxy: Proxy) -> None:
    """It answers with status 200, and has stored nothing."""
    client = connect(proxy.uri)
    target = RunTarget(client, make(client, mode), Path())
    message = TextArtifact("notes/hello.txt", "hello")
    proxy.choose = lambda method, _path: mode if method == "PUT" else "pass"
    with pytest.raises(TrackingError) as caught:
        message.send(target)
    assert caught.value.code == "artifact-not-arrived"
    proxy.choose = None
    message.send(target)
    assert target.artifacts.has("notes/hello.txt")


def test_a_logged_model_whose_files_a_portal_takes(
    proxy: Proxy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    ended = run(images, "--save-dir", tmp_path / "models")
    client = connect(proxy.uri)
    mlflow_run = client.get_run(ended.run_id)
    manifest = manifest_in_tag(mlflow_run.data.tags, "checkpoint.latest")
    assert manifest is not None
    path = tmp_path / "models" / manifest.file_name
    proxy.choose = lambda method, _path: "login" if method == "PUT" else "pass"
    with pytest.raises(TrackingError) as caught:
        log_model(client, mlflow_run, manifest, path)
    assert caught.value.code == "logged-model-not-arrived"
    proxy.choose = None
    model_id = log_model(client, client.get_run(ended.run_id), manifest, path)
    assert str(client.get_logged_model(model_id).status) == "READY"


@pytest.mark.parametrize("store", ["server", "embedded"])
def test_three_runs_that_log_one_data_set_at_once(store: str, server: Server, client: MlflowClient) -> None:
    client = client if store == "embedded" else connect(server.uri)
    runs = [make(client, f"run {number}") for number in range(3)]
    for attempt in range(5):
        message = DatasetInput("pets", f"digest-{store}-{attempt}", "/pets", 4, 2, "training")
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda run_id, m=message: m.send(RunTarget(client, run_id, Path())), runs))  # type: ignore[misc]
    for run_id in runs:
        inputs = client.get_run(run_id).inputs.dataset_inputs
        assert {entry.dataset.digest for entry in inputs} == {f"digest-{store}-{attempt}" for attempt in range(5)}
        assert len(inputs) == 5


def test_refused_entries_of_another_run_leave_the_folder_to_its_own(client: MlflowClient, journal: Journal) -> None:
    own, other = make(client, "own"), make(client, "other")
    journal.set_owner(own, client.tracking_uri)
    line = f'{{"run": "{other}", "kind": "tags", "body": {{"values": {{"a": "1"}}}}, "reason": "no"}}\n'
    (journal.directory / REFUSED_NAME).write_text(line)
    assert take_refused_again(journal) == 1
    assert read_pending(journal.directory).run_id == own
    message = Tags({"b": "2"})
    journal.append(own, message.kind, to_body(message))
    deliver_now(client, journal, TRACKING_KINDS)
    assert client.get_run(other).data.tags["a"] == "1"
    assert client.get_run(own).data.tags["b"] == "2"
