"""`bench --deploy`, `bench_device.py` by itself, and what runs keep of both."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.export import export_file
from shufflenet_mlflow.export.bench_device import FORMAT, UNSTEADY, measure
from shufflenet_mlflow.workflows.bench_deploy import DeployBench, _values
from tests.support.command_line import Invoke
from tests.support.effort import only_in_full_run
from tests.support.training import run
from tests.test_export import network, short_networks

SHORT = ("--seconds", "0.03")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "net.onnx"
    with short_networks():
        export_file(network(), path, "onnx")
    return path


def test_latencies_say_whether_they_are_steady(file: Path) -> None:
    found = measure(str(file), [1, 3], 1, 0.03)
    assert [row["batch"] for row in found["latency"]] == [1, 3]
    for row in found["latency"]:
        assert 0 < row["median_ms"] <= row["p95_ms"]
        assert len(row["medians_ms"]) == 3
        assert row["spread"] == max(row["medians_ms"]) / min(row["medians_ms"]) - 1 or row["spread"] >= 0
        assert row["steady"] == (row["spread"] <= UNSTEADY)
    assert found["load_ms"] > 0


def entry(*spreads: float) -> dict[str, Any]:
    rows = [
        {"batch": 1, "median_ms": 2.0, "p95_ms": 3.0, "spread": spread, "steady": spread <= UNSTEADY}
        for spread in spreads
    ]
    measured = {"threads": 1, "load_ms": 5.0, "memory_mb": 7.0, "latency": rows}
    return {"file": "net.onnx", "bytes": 9, "sha256": "0" * 64, "measurements": [measured]}


def test_unsteady_figures_are_named() -> None:
    bench = DeployBench({"files": [entry(0.04, 0.2)]}, ("onnx",), (None,))
    assert bench.unsteady() == ["net.onnx, batch 1, 1 threads: repeated medians differ by 20%"]
    assert _values(entry(0.0))["latency_ms_batch_1_1_thread"] == 2.0


def test_the_script_needs_nothing_of_this_package(
    client: MlflowClient, images: Path, tmp_path: Path, shufflenet: Invoke
) -> None:
    """It lies beside the export, runs alone, and its figures get into the run."""
    summary = run(images)
    folder = tmp_path / "device"
    folder.mkdir()
    result = shufflenet("export", summary.run_id, "--output", folder / "net.pt2")
    assert result.exit_code == 0, result.output
    hidden = "import sys; sys.modules['shufflenet_mlflow'] = None; import runpy; sys.argv = sys.argv[1:]; "
    words = [sys.executable, "-c", hidden + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    done = subprocess.run([*words, "bench_device.py", "net.pt2", *SHORT], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["format"] == FORMAT
    [measured] = document["files"]
    assert measured["sha256"] == hashlib.sha256((folder / "net.pt2").read_bytes()).hexdigest()
    (folder / "net.json").write_text(done.stdout)
    result = shufflenet("runs", "log-bench", summary.run_id, folder / "net.json", "--json")
    assert json.loads(result.stdout) == {"run_id": summary.run_id, "kinds": ["pt2"]}
    stored = client.get_run(summary.run_id).data
    assert stored.metrics["deploy/pt2/bytes"] == (folder / "net.pt2").stat().st_size
    assert stored.metrics["deploy/pt2/latency_ms_batch_8_1_thread"] > 0
    assert [artifact.path for artifact in client.list_artifacts(summary.run_id, "deploy")]
    result = shufflenet("runs", "--columns", "run_id,deploy/pt2/bytes,deploy/pt2/latency_ms_batch_1_1_thread", "--json")
    assert json.loads(result.stdout)[0]["deploy/pt2/bytes"] == stored.metrics["deploy/pt2/bytes"]


@pytest.mark.long
def test_bench_deploy(client: MlflowClient, images: Path, tmp_path: Path, shufflenet: Invoke) -> None:
    """Side by side, into the run; and the page of `compare --out` shows them."""
    summary, other = run(images), run(images, "--seed", 1)
    target = tmp_path / "net.onnx"
    assert shufflenet("export", summary.run_id, "--format", "onnx", "--output", target).exit_code == 0
    assert shufflenet("eval", target, "--val-dir", images / "val").exit_code == 0
    result = shufflenet("bench", "--deploy", target, target, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [entry["kind"] for entry in document["files"]] == ["onnx", "onnx"]
    assert [entry["logged_to"] for entry in document["files"]] == [summary.run_id] * 2
    metrics = client.get_run(summary.run_id).data.metrics
    assert metrics["deploy/onnx/macs"] > 0
    assert metrics["deploy/onnx/latency_ms_batch_1_1_thread"] > 0
    result = shufflenet("compare", summary.run_id, other.run_id, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.index("Exported files") < page.index("ms for one image")
    result = shufflenet("bench", "--deploy", target, "--log-to", "none")
    assert "logged to" not in result.output
    assert "median ms" in result.output


def test_figures_that_are_none(client: MlflowClient, tmp_path: Path, shufflenet: Invoke) -> None:
    path = tmp_path / "x.json"
    strange = [
        (None, "cannot read"),
        ("{", "it is not JSON"),
        ("[]", "does not hold figures"),
        ('{"format": "other"}', "its format is 'other'"),
        (json.dumps({"format": FORMAT, "files": [{"file": "a"}]}), "does not hold figures"),
        (json.dumps({"format": FORMAT, "files": [{**entry(0.0), "sha256": "../../../x"}]}), "sha256 is not one"),
    ]
    for text, expected in strange:
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        result = shufflenet("runs", "log-bench", "0" * 32, path)
        assert (result.exit_code, expected in result.output) == (1, True), result.output
        assert result.output.count("\n") == 1


def test_a_file_that_no_runtime_takes(file: Path, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shufflenet_mlflow.export.bench_device.__file__", "/nowhere/bench_device.py")
    result = shufflenet("bench", "--deploy", file)
    assert (result.exit_code, "cannot measure" in result.output) == (1, True), result.output


@only_in_full_run
@pytest.mark.long
def test_the_script_cannot_be_written(images: Path, tmp_path: Path, shufflenet: Invoke) -> None:
    summary = run(images)
    (tmp_path / "bench_device.py").mkdir()
    result = shufflenet("export", summary.run_id, "--output", tmp_path / "net.pt2")
    assert (result.exit_code, "bench_device.py" in result.output) == (1, True), result.output
