"""The wrong way to the server: the error names what led there, and what to change."""

import json
import os
from contextlib import closing
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from shufflenet_mlflow.errors import TrackingError
from shufflenet_mlflow.tracking.client import connect, mlflow_errors
from shufflenet_mlflow.tracking.exchanges import impatient
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.route import check_proxy
from tests.support.command_line import Invoke, small_options
from tests.support.network import free_port
from tests.support.small_server import PAGE, small_server, write_certificate

ABROAD = "http://mlflow.example:5000"
"""A server that only a proxy could reach; its name is never looked up here."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name no proxy, and do not repeat requests, as our commands do not."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    path = tmp_path / "certificate.pem"
    write_certificate(path)
    return path


def failure(uri: str | None) -> str:
    """Return the error of a request to a server: one line, without pages and secrets."""
    with pytest.raises(TrackingError) as caught, impatient(), mlflow_errors("ask"):
        connect(uri).get_experiment("0")
    text = str(caught.value)
    assert not caught.value.answered, "training would not go on without it"
    assert len(text.splitlines()) == 1
    assert "<" not in text
    assert "secret" not in text
    assert "API request" not in text
    return text


@pytest.mark.parametrize("uri", [ABROAD, "https://mlflow.example"])
@pytest.mark.parametrize("status", [407, 502, 403])
def test_a_proxy_that_refuses_is_named(uri: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "HTTPS_PROXY" if uri.startswith("https") else "HTTP_PROXY"
    with small_server(status) as proxy:
        monkeypatch.setenv(variable, f"http://me:secret@{proxy}")
        text = failure(uri)
    assert f"the proxy {proxy} ({variable})" in text
    assert f"status {status}" in text
    assert "set NO_PROXY=mlflow.example" in text
    assert ("wants a user and a password" in text) == (status == 407)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_a_dead_proxy_is_not_taken_for_a_dead_server(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv(variable, dead)
    monkeypatch.setenv("NO_PROXY", "other.example")
    assert failure(ABROAD) == (
        f"cannot ask: the proxy {dead} ({variable}) cannot be reached: connection refused; "
        "if mlflow.example is reachable without it, add mlflow.example to NO_PROXY"
    )


def test_the_advised_way_around_a_proxy_works(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("HTTP_PROXY", dead)
    with small_server(body=json.dumps({"experiment": {"experiment_id": "0", "name": "there"}})) as server:
        assert "set NO_PROXY=127.0.0.1" in failure(f"http://{server}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert connect(f"http://{server}").get_experiment("0").name == "there"


def test_the_page_of_a_proxy_is_not_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    with small_server() as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://{proxy}")
        text = failure(ABROAD)
    assert f"the answer is not MLflow's; the proxy {proxy} (HTTP_PROXY) is in between" in text


@pytest.mark.parametrize("address", ["ftp://127.0.0.1:3128", "http://127.0.0.1:99999", "http://", "http://me:secret@"])
def test_no_address_of_a_proxy(
    address: str, monkeypatch: pytest.MonkeyPatch, shufflenet: Invoke, images: Path, workplace: Path
) -> None:
    monkeypatch.setenv("HTTP_PROXY", address)
    before = sorted(workplace.iterdir())
    result = shufflenet("train", *small_options(images), "--tracking-uri", ABROAD)
    assert result.exit_code == 1
    assert "is not the address of a proxy; give one such as http://HOST:3128" in result.stderr
    assert "HTTP_PROXY=" in result.stderr
    assert "set NO_PROXY=mlflow.example" in result.stderr
    assert "secret" not in result.stderr
    assert sorted(workplace.iterdir()) == before
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ABROAD)
    assert shufflenet("train", *small_options(images)).stderr == result.stderr
    monkeypatch.setenv("NO_PROXY", "mlflow.example")
    check_proxy(ABROAD)


@pytest.mark.parametrize(
    ("status", "body"), [(404, PAGE), (404, ""), (404, '{"detail": "Not Found"}'), (200, PAGE), (200, '{"ok": 1}')]
)
@pytest.mark.parametrize("named_by", ["--tracking-uri", "MLFLOW_TRACKING_URI"])
def test_a_missing_path_is_asked_for(status: int, body: str, named_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_server(status, body) as server:
        address = f"http://{server}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        text = failure(address if named_by == "--tracking-uri" else None)
    mark = " " if named_by == "--tracking-uri" else "="
    assert text.endswith(f"; if MLflow is behind a path there (--static-prefix): {named_by}{mark}{address}/PATH")


def test_a_wrong_path() -> None:
    with small_server(404) as server:
        text = failure(f"http://me:secret@{server}/team/mlflow/")
    assert text == (
        "cannot ask: the server answered with status 404; if the path is wrong: --tracking-uri http://" + server
    )


def test_https_and_http_are_not_confused(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_server(404) as server:
        assert failure(f"https://{server}/p") == (
            f"cannot ask: {server} does not speak https; if it speaks http: --tracking-uri http://{server}/p"
        )
    with small_server(400, "<p>The plain HTTP request was sent to HTTPS port</p>") as server:
        assert failure(f"http://{server}") == f"cannot ask: {server} expects https: --tracking-uri https://{server}"
    with small_server(certificate=certificate) as server:
        assert failure(f"http://{server}").endswith(f"; if it expects https: --tracking-uri https://{server}")
        text = failure(f"https://{server}")
        assert f"the certificate of {server} is not accepted (self-signed certificate)" in text
        assert "MLFLOW_TRACKING_SERVER_CERT_PATH=FILE" in text
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
        assert "the answer is not MLflow's" in failure(f"https://{server}")


@pytest.mark.parametrize(
    "variable", ["MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_CLIENT_CERT_PATH", "REQUESTS_CA_BUNDLE"]
)
def test_a_missing_file_of_certificates(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "/nowhere/ca.pem")
    assert f"{variable}=/nowhere/ca.pem is not a file" in failure(f"https://127.0.0.1:{free_port()}")


@pytest.mark.parametrize("token", ["secret\n", "secret\u4e00"])
def test_a_token_that_cannot_be_sent_is_not_shown(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
    assert "MLFLOW_TRACKING_TOKEN cannot be sent" in failure(f"http://127.0.0.1:{free_port()}")


def test_a_variable_of_the_wrong_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon")
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT='soon' cannot be used" in failure(f"http://127.0.0.1:{free_port()}")


def test_a_server_that_refuses_the_name() -> None:
    with small_server(403, "Invalid Host header - possible DNS rebinding attack detected") as server:
        assert failure(f"http://{server}").endswith(f"start it with --allowed-hosts {server}")


def test_a_circle_of_redirects() -> None:
    with small_server(302, "", headers={"Location": "/portal"}) as server:
        assert "redirects in a circle" in failure(f"http://{server}")


def test_a_missing_driver_is_named() -> None:
    with pytest.raises(TrackingError, match="the Python package mysqlclient is missing; install it"):
        connect("mysql://me:secret@127.0.0.1/runs")


def test_databricks_needs_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("DATABRICKS_")]:
        monkeypatch.delenv(name)
    error = MlflowException("Reading Databricks credential configuration failed with MLflow tracking URI 'databricks'.")
    with pytest.raises(TrackingError, match="DATABRICKS_HOST and DATABRICKS_TOKEN"), mlflow_errors("ask"):
        raise error


NOT_A_STORE = {
    "ftp://127.0.0.1/x": "MLflow has no tracking store of the kind ftp://127.0.0.1/x",
    "s3://bucket/x": "such as sqlite:///FOLDER/mlflow.db",
    "oracle://me:secret@db/x": "oracle://db/x",
    "databricks-uc": "is a model registry",
    "uc:http://127.0.0.1": "is a model registry",
    "http:/127.0.0.1:5000": "is not an address",
    "HTTPS:127.0.0.1:5000": "is not an address",
    " http://127.0.0.1:5000": "has blanks or quotes around it; write http://127.0.0.1:5000",
    "'http://127.0.0.1:5000'": "has blanks or quotes around it; write http://127.0.0.1:5000",
    "http://127.0.0.1:5000/m/#/experiments/1": "is a page, not the address of a server; write http://127.0.0.1:5000/m",
    "http://127.0.0.1:5000/?o=1": "write http://127.0.0.1:5000",
}


@pytest.mark.parametrize("uri", NOT_A_STORE)
def test_what_is_not_the_address_of_a_store(
    uri: str, shufflenet: Invoke, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = shufflenet("train", *small_options(images), "--tracking-uri", uri)
    assert typed.exit_code == 1
    assert typed.stderr.startswith("Error: --tracking-uri: ")
    assert NOT_A_STORE[uri] in typed.stderr
    assert "secret" not in typed.stderr
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for command in (["train", *small_options(images)], ["runs"]):
        assert shufflenet(*command).stderr == typed.stderr.replace("--tracking-uri", "MLFLOW_TRACKING_URI", 1)


def test_training_goes_on_behind_a_wrong_proxy(
    shufflenet: Invoke, images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shufflenet_mlflow.tracking.delivery.GIVE_UP_SECONDS", 0.5)
    with small_server(502) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://{proxy}")
        away = ("--tracking-uri", ABROAD, "--save-dir", tmp_path / "models")
        result = shufflenet("train", *small_options(images), *away)
    assert result.exit_code == 0, result.stderr
    warning = next(line for line in result.stderr.splitlines() if "training goes on" in line)
    assert f"the proxy {proxy} (HTTP_PROXY) is in between" in warning
    with closing(Journal(tmp_path / "models")) as journal:
        assert journal.pending
