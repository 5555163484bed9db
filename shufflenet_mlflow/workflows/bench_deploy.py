"""`shufflenet bench --deploy` and `runs log-bench`: size, latency and memory of exported files."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.errors import ExportError, UnresolvedError
from shufflenet_mlflow.export import bench_device
from shufflenet_mlflow.export.exported import ExportedFile, open_exported
from shufflenet_mlflow.runtime.files import write_atomically
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.tracking.client import prepare_environment
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.evaluation_metrics import log_results
from shufflenet_mlflow.tracking.lifecycle import require_active
from shufflenet_mlflow.tracking.messages import TextArtifact
from shufflenet_mlflow.tracking.names import DEPLOY_SECTION, DEPLOY_TAG
from shufflenet_mlflow.tracking.run_ids import read_run
from shufflenet_mlflow.tracking.target import RunTarget
from shufflenet_mlflow.workflows.options import check_request
from shufflenet_mlflow.workflows.runs import find_run

if TYPE_CHECKING:
    from shufflenet_mlflow.tracking.client import Run

SCRIPT = "bench_device.py"
"""The script that measures: written beside each exported file, it needs nothing of this package."""


@dataclass(frozen=True)
class DeployBench:
    """Figures of exported files on this machine."""

    document: Mapping[str, Any]
    """The document that `bench_device.py` prints."""
    kinds: tuple[str, ...]
    """Kind of each file, such as `onnx-int8`."""
    logged_to: tuple[str | None, ...]
    """For each file the run that has its figures; None if none has."""

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `bench --deploy --json`."""
        files = [
            {**entry, "kind": kind, "logged_to": run_id}
            for entry, kind, run_id in zip(self.document["files"], self.kinds, self.logged_to, strict=True)
        ]
        return {**self.document, "files": files}

    def rows(self) -> list[list[Any]]:
        """Return a row for each file, number of threads and size of batch."""
        return [
            [
                entry["file"],
                f"{entry['bytes'] / 1e6:.2f}",
                measured["threads"],
                row["batch"],
                f"{row['median_ms']:.2f}",
                f"{row['p95_ms']:.2f}",
                f"{row['spread']:.0%}",
                f"{measured['load_ms']:.0f}",
                f"{measured['memory_mb']:.0f}",
            ]
            for entry in self.document["files"]
            for measured in entry["measurements"]
            for row in measured["latency"]
        ]

    def unsteady(self) -> list[str]:
        """Return what to say of latencies that differed from one repetition to the next."""
        return [
            f"{entry['file']}, batch {row['batch']}, {measured['threads']} threads: repeated medians differ by "
            f"{row['spread']:.0%}"
            for entry in self.document["files"]
            for measured in entry["measurements"]
            for row in measured["latency"]
            if not row["steady"]
        ]


TITLES = ("file", "MB", "threads", "batch", "median ms", "p95 ms", "spread", "load ms", "memory MB")


def write_bench_script(folder: Path) -> None:
    """Write `bench_device.py` into the folder of an exported file, unless it is there already.

    Raises:
        ExportError: it cannot be written.
    """
    source, target = Path(bench_device.__file__).read_bytes(), folder / SCRIPT
    try:
        if not target.is_file() or target.read_bytes() != source:
            write_atomically(target, lambda file: file.write(source))
    except OSError as error:
        raise ExportError(
            f"cannot write {str(target)!r}: {error.strerror}; --output names another folder",
            code="bench-script-unwritable",
        ) from error


def run_deploy_bench(files: Sequence[str], *, log: bool, tracking_uri: str | None, reporter: Reporter) -> DeployBench:
    """Measure exported files, one after the other, each number of threads in a process of its own.

    Args:
        log: log the figures to the run that a file is from, if it is in the store.

    Raises:
        ConfigError: one of them is no exported file.
        ExportError: a file cannot be read or run.
    """
    check_request({"deploy": files})
    prepare_environment()
    exported = [open_exported(Path(file))[0] for file in files]
    entries: list[Any] = []
    document: dict[str, Any] = {}
    with reporter.phase("measuring", len(files)) as phase:
        for file in files:
            document = _measured(file)
            entries += document["files"]
            phase.advance()
    document = {**document, "files": entries}
    store = Connection(tracking_uri) if log and any(one.text("run_id") for one in exported) else None
    logged_to = [
        _log(store, one, {**document, "files": [entry]}, reporter) if store is not None else None
        for one, entry in zip(exported, entries, strict=True)
    ]
    return DeployBench(document, tuple(one.kind for one in exported), tuple(logged_to))


def _measured(file: str) -> dict[str, Any]:
    done = subprocess.run(  # noqa: S603 - the script of this package
        [sys.executable, bench_device.__file__, file], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise ExportError(f"cannot measure {lines[-1][:300]}", code="deploy-bench-failed")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def _log(store: Connection, exported: ExportedFile, document: Mapping[str, Any], reporter: Reporter) -> str | None:
    run_id = exported.text("run_id")
    if run_id is None:
        return None
    try:
        run = read_run(store, run_id)
    except UnresolvedError as error:
        reporter.note(f"{exported.path.name} is not logged: {error}")
        return None
    require_active(store.client, run)
    _record(store, run, document, [exported.kind], exported.fixed_metrics(), exported.iters)
    return run_id


def log_bench(run_ref: str, file: Path, *, tracking_uri: str | None) -> tuple[str, list[str]]:
    """Log what `bench_device.py` measured on a device to a run.

    Returns:
        The run's ID, and the kinds of the files, such as `onnx-int8`.

    Raises:
        ExportError: the file does not hold such figures.
        UnresolvedError: there is no such run.
        TrackingError: MLflow did not answer.
    """
    document = _read(file)
    prepare_environment()
    store = Connection(tracking_uri)
    run = find_run(store, run_ref)
    require_active(store.client, run)
    known = dict(_exports_of(run))
    kinds = [str(known.get(entry["sha256"], {}).get("kind", _kind(entry["file"]))) for entry in document["files"]]
    iters = [known.get(entry["sha256"], {}).get("iters", 0) for entry in document["files"]]
    for entry, kind, step in zip(document["files"], kinds, iters, strict=True):
        _record(store, run, {**document, "files": [entry]}, [kind], {"bytes": float(entry["bytes"])}, int(step))
    return run.info.run_id, kinds


def _read(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise ExportError(
            f"cannot read {str(file)!r}: {reason}; `python {SCRIPT} FILE > {file.name}` writes it",
            code="bench-json-unreadable",
        ) from error
    try:
        if document["format"] != bench_device.FORMAT:
            raise ValueError(f"its format is {document['format']!r}, not {bench_device.FORMAT!r}")
        for entry in document["files"]:
            if not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]):
                raise ValueError("sha256 is not one")
            _ = "" + entry["file"], int(entry["bytes"]), _values(entry)
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error)[:100] if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"[:100]
        raise ExportError(
            f"{str(file)!r} does not hold figures of {SCRIPT} ({reason}); write it with that script",
            code="bench-json-invalid",
        ) from error
    return dict(document)


def _exports_of(run: "Run") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the SHA-256 of each exported file that the run knows, and its entry."""
    for name, text in run.data.tags.items():
        if name.startswith(DEPLOY_TAG):
            try:
                entry = json.loads(text)
                yield entry["sha256"], {**entry, "kind": name.removeprefix(DEPLOY_TAG)}
            except (ValueError, KeyError, TypeError):
                continue


def _kind(file: str) -> str:
    """Return the kind of a file that the run does not know, by its name."""
    form = {".pt2": "pt2", ".onnx": "onnx", ".xml": "openvino"}.get(Path(file).suffix.lower(), "file")
    return f"{form}-int8" if ".int8." in file else form


def _values(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a file: latencies by batch and threads, and time to load and memory with all threads."""
    values: dict[str, float] = {}
    for number, measured in enumerate(entry["measurements"]):
        threads = "1_thread" if int(measured["threads"]) == 1 and not number else "all_threads"
        for row in measured["latency"]:
            of = f"ms_batch_{int(row['batch'])}_{threads}"
            values[f"latency_{of}"] = float(row["median_ms"])
            values[f"p95_{of}"] = float(row["p95_ms"])
        values["load_ms"], values["memory_mb"] = float(measured["load_ms"]), float(measured["memory_mb"])
    return values


def _record(
    store: Connection,
    run: "Run",
    document: Mapping[str, Any],
    kinds: Sequence[str],
    fixed: Mapping[str, float],
    step: int,
) -> None:
    target = RunTarget(store.client, run.info.run_id, Path())
    [entry], [kind] = document["files"], kinds
    machine = document.get("machine")
    device = re.sub(r"[^A-Za-z0-9]+", "-", str(machine.get("cpu", "") if isinstance(machine, Mapping) else ""))[:60]
    name = f"deploy/{kind}-{str(entry['sha256'])[:12]}-{device.strip('-').lower() or 'device'}.json"
    TextArtifact.of_json(name, dict(document)).send(target)
    values = {f"{DEPLOY_SECTION}{kind}/{key}": value for key, value in {**fixed, **_values(entry)}.items()}
    log_results(target, values, step, None)
