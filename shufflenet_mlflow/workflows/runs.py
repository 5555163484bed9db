"""`shufflenet runs`: a table of runs, and one run in full with the command that repeats it."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.checkpoints.manifest import BEST_TAG, LATEST_TAG, CheckpointManifest
from shufflenet_mlflow.config import FIELDS, command_of
from shufflenet_mlflow.config.rules import MOST_ROWS
from shufflenet_mlflow.errors import ConfigError, UnresolvedError
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.text import name_some
from shufflenet_mlflow.tracking.abandoned import (
    RUNNING,
    end_abandoned,
    require_abandoned,
    status_in_words,
    writer_state,
)
from shufflenet_mlflow.tracking.client import connect, mlflow_errors, prepare_environment
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.lifecycle import is_active, require_active
from shufflenet_mlflow.tracking.messages import now_ms
from shufflenet_mlflow.tracking.names import (
    COMMAND_TAG,
    COMMIT_TAG,
    CONFIG_TAG,
    DATASET_CONTEXT_TAG,
    DIRTY_TAG,
    HARDWARE_TAG,
    NETWORK_TAG,
    STUDY_TAG,
    VERSION_TAG,
)
from shufflenet_mlflow.tracking.run import wanted_experiment
from shufflenet_mlflow.tracking.run_ids import complete, read_run
from shufflenet_mlflow.tracking.target import manifest_in_tag
from shufflenet_mlflow.tracking.uris import stored_uri
from shufflenet_mlflow.workflows.options import run_id_of

if TYPE_CHECKING:
    from shufflenet_mlflow.tracking.client import MlflowClient, Run

DEFAULT_COLUMNS = ("run_id", "name", "status", "started", "minutes", "model", "data", "val/top1", "best/val_top1")

_ATTRIBUTES = {"run_id": "run_id", "name": "run_name", "status": "status", "started": "start_time"}
"""Column -> MLflow's name for it, which runs can be sorted by."""

_COMPUTED = ("minutes", "data")
_KINDS = ("metrics", "params", "tags")
_PARAMS = {*FIELDS, "epochs"}


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    title: str
    kind: str
    """`attribute`, `metrics`, `params` or `tags`."""
    key: str

    @classmethod
    def parse(cls, text: str) -> "Column":
        """Parse a column: an attribute, a metric, an option of training, or `metrics.X`, `params.X`, `tags.X`.

        Raises:
            ConfigError: it is empty.
        """
        name = text.strip()
        if not name:
            raise ConfigError(
                "--columns and --sort take names such as started, best/val_top1, lr or tags.job", code="column-invalid"
            )
        kind, dot, key = name.partition(".")
        if dot and kind in _KINDS:
            return cls(name, kind, key)
        if name in _ATTRIBUTES or name in _COMPUTED:
            return cls(name, "attribute", name)
        return cls(name, "params" if name in _PARAMS else "metrics", name)

    def of(self, run: "Run") -> Any:
        """Return the run's value; None if it has none."""
        if self.kind != "attribute":
            return getattr(run.data, self.kind).get(self.key)
        info = run.info
        if self.key == "minutes":
            end = info.end_time or (now_ms() if info.status == RUNNING else None)
            return None if end is None else round((end - info.start_time) / 60_000, 1)
        if self.key == "started":
            return _time(info.start_time)
        if self.key == "data":
            from shufflenet_mlflow.data.datasets import data_name  # which imports numpy, as MLflow has by now

            trained_on = run.data.params.get("train_dir")
            return None if trained_on is None else data_name(trained_on)
        return {"run_id": info.run_id, "name": info.run_name, "status": info.status}[self.key]

    def order(self, *, ascending: bool) -> str:
        """Return the order for MLflow's search.

        Raises:
            ConfigError: MLflow does not sort by it.
        """
        if self.key in _COMPUTED and self.kind == "attribute":
            raise ConfigError(
                f"--sort {self.title} is not possible; sort by started, a metric or an option", code="sort-invalid"
            )
        name = f"attributes.{_ATTRIBUTES[self.key]}" if self.kind == "attribute" else f"{self.kind}.`{self.key}`"
        return f"{name} {'ASC' if ascending else 'DESC'}"


@dataclass(frozen=True)
class RunTable:
    """Runs of an experiment, one per row."""

    experiment: str
    columns: tuple[Column, ...]
    runs: tuple["Run", ...]
    has_more: bool
    elsewhere: Mapping[str, int]
    """Other experiments with runs of this project -> their number; empty if the user named the experiment."""

    def rows(self) -> list[list[Any]]:
        """One value per column; None for runs without it."""
        return [[column.of(run) for column in self.columns] for run in self.runs]

    def rows_in_words(self) -> list[list[Any]]:
        """One value per column; the status says whether the writer of a running run is gone."""
        return [
            [
                status_in_words(run) if (column.kind, column.key) == ("attribute", "status") else column.of(run)
                for column in self.columns
            ]
            for run in self.runs
        ]

    def unknown(self, sort: str | None) -> list[str]:
        """Return the columns, and the one to sort by, of which no run has a value, such as mistyped ones."""
        columns = (*self.columns, *([Column.parse(sort)] if sort else ()))
        asked = [column for column in columns if column.kind != "attribute"]
        return list(dict.fromkeys(one.title for one in asked if all(one.of(run) is None for run in self.runs)))

    def names(self) -> set[str]:
        """Return the names of columns of which some run has a value."""
        values = (name for run in self.runs for named in (run.data.metrics, run.data.params) for name in named)
        return {*_ATTRIBUTES, *_COMPUTED, *values}

    def abandoned(self) -> list[str]:
        """Return the IDs of running runs whose writer does not seem to be at work."""
        return [run.info.run_id for run in self.runs if writer_state(run) in ("silent", "gone")]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the document of `runs --json`: the columns, and all metrics and parameters."""
        return [
            {
                **{column.title: value for column, value in zip(self.columns, row, strict=True)},
                "run_id": run.info.run_id,
                "writer_state": writer_state(run),
                "metrics": dict(run.data.metrics),
                "params": dict(run.data.params),
            }
            for run, row in zip(self.runs, self.rows(), strict=True)
        ]


def require_study(study: str, experiment: str, tracking_uri: str | None) -> None:
    """Refuse the name of a study of which an experiment has no run.

    Raises:
        UnresolvedError: always; the message names the studies that are there.
        TrackingError: MLflow did not answer.
    """
    client = connect(tracking_uri)
    _, experiment_id = wanted_experiment(client, experiment)
    found: list[str] = []
    if experiment_id is not None:
        with mlflow_errors(f"look for the studies of {experiment!r}"):
            runs = client.search_runs([experiment_id], f"tags.`{STUDY_TAG}` LIKE '%'", max_results=MOST_ROWS)
        found = sorted({run.data.tags[STUDY_TAG] for run in runs})
    known = f"it holds {name_some(found)}" if found else "it holds none"
    raise UnresolvedError(
        f"experiment {experiment!r} has no run of a study {study!r} ({known}); --experiment NAME looks into another "
        "one",
        code="study-without-runs",
    )


def list_runs(
    *,
    experiment: str | None,
    filter_string: str,
    sort: str,
    ascending: bool,
    columns: Sequence[str],
    limit: int,
    tracking_uri: str | None,
) -> RunTable:
    """Return the runs of an experiment.

    Args:
        experiment: by default the one that `train` uses.
        filter_string: a filter of MLflow's search, such as "metrics.`val/top1` > 0.9 and params.model = 'detnas'".
        sort: a column; the highest first, unless `ascending`.

    Raises:
        ConfigError: a column or the filter is not understood.
        UnresolvedError: there is no such experiment.
        DeletedError: it was deleted.
        TrackingError: MLflow did not answer.
    """
    parsed = tuple(Column.parse(name) for name in columns)
    order = Column.parse(sort).order(ascending=ascending)
    prepare_environment()
    client = connect(tracking_uri)
    name, experiment_id = wanted_experiment(client, experiment)
    elsewhere = {} if experiment else _runs_elsewhere(client, experiment_id)
    if experiment_id is None and elsewhere:
        return RunTable(name, parsed, (), False, elsewhere)
    if experiment_id is None:
        with mlflow_errors("list the experiments"):
            names = ", ".join(known.name for known in client.search_experiments(max_results=8))
        raise UnresolvedError(
            f"there is no experiment {name!r} in {stored_uri(client.tracking_uri)}; experiments: {names}",
            code="experiment-missing",
        )
    with mlflow_errors(f"search the runs of {name!r}" + (f" for {filter_string!r}" if filter_string else "")):
        runs = client.search_runs([experiment_id], filter_string, max_results=limit, order_by=[order])
    return RunTable(name, parsed, tuple(runs), bool(runs.token), elsewhere)


def _runs_elsewhere(client: "MlflowClient", but: str | None) -> dict[str, int]:
    """Return the names of other experiments that hold runs of this project, and how many of the newest are theirs.

    `mlflow run` puts its runs into the experiment `Default`.
    """
    with mlflow_errors("look for runs in other experiments"):
        others = {
            found.experiment_id: found.name
            for found in client.search_experiments(max_results=_MOST_EXPERIMENTS)
            if found.experiment_id != but
        }
        filter_string = f"tags.`{NETWORK_TAG}` LIKE '%'"
        runs = client.search_runs([*others], filter_string, max_results=_MOST_ELSEWHERE) if others else []
    return dict(Counter(others[run.info.experiment_id] for run in runs).most_common())


_MOST_EXPERIMENTS = 100
_MOST_ELSEWHERE = 1000


@dataclass(frozen=True)
class RunDetails:
    """One run in full."""

    run: "Run"
    experiment: str
    latest: CheckpointManifest | None
    best: CheckpointManifest | None
    models: tuple[tuple[str, str], ...]
    """IDs and names of its logged models."""
    reproduce: tuple[str, ...] | None
    """Words of the command that repeats it; None if it was not a training run."""

    @property
    def commit(self) -> str | None:
        """Commit of the code."""
        return self.run.data.tags.get(COMMIT_TAG)

    @property
    def is_dirty(self) -> bool:
        """Whether the code differed from the commit."""
        return self.run.data.tags.get(DIRTY_TAG) == "true"

    @property
    def is_abandoned(self) -> bool:
        """Whether it is RUNNING and its writer does not seem to be at work."""
        return writer_state(self.run) in ("silent", "gone")

    def reproduce_lines(self) -> list[str]:
        """Return shell commands that repeat the run, with remarks on what they cannot restore."""
        tags, lines = self.run.data.tags, []
        if self.commit is not None:
            lines.append(f"git checkout {self.commit}" + ("   # and changes that were not committed" * self.is_dirty))
        versions = _with_prefix(tags, VERSION_TAG)
        pins = [f"{name}=={versions[name].partition('+')[0]}" for name in _PINNED if name in versions]
        if pins:
            lines.append(f"pip install {' '.join(pins)}")
        if self.reproduce is not None:
            return [*lines, shlex.join(("shufflenet", "train", *self.reproduce))]
        command = tags.get(COMMAND_TAG, "")
        return [*lines, command] if _BEGINS.match(command) else []  # a parent; no others are without options

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `runs show --json`."""
        info, data = self.run.info, self.run.data
        return {
            "run_id": info.run_id,
            "name": info.run_name,
            "experiment": self.experiment,
            "status": info.status,
            "writer_state": writer_state(self.run),
            "deleted": not is_active(self.run),
            "started": _time(info.start_time),
            "ended": _time(info.end_time),
            "command": data.tags.get(COMMAND_TAG),
            "commit": self.commit,
            "dirty": self.is_dirty,
            "versions": _with_prefix(data.tags, VERSION_TAG),
            "hardware": _with_prefix(data.tags, HARDWARE_TAG),
            "data": self.data(),
            "params": dict(data.params),
            "metrics": dict(data.metrics),
            "latest": None if self.latest is None else json.loads(self.latest.to_json()),
            "best": None if self.best is None else json.loads(self.best.to_json()),
            "models": [{"model_id": model_id, "name": name} for model_id, name in self.models],
            "reproduce": None if self.reproduce is None else ["shufflenet", "train", *self.reproduce],
        }

    def data(self) -> list[dict[str, Any]]:
        """Return the sets of images: name, digest, context, folder, number of images."""
        inputs = self.run.inputs.dataset_inputs if self.run.inputs is not None else []
        return [
            {
                "context": next((tag.value for tag in entry.tags if tag.key == DATASET_CONTEXT_TAG), ""),
                "name": entry.dataset.name,
                "digest": entry.dataset.digest,
                "source": _json(entry.dataset.source).get("uri"),
                **_json(entry.dataset.profile),
            }
            for entry in inputs
        ]


_BEGINS = re.compile(r"shufflenet (tune|search|train .*--repeat)\b")
"""Commands that make a parent run, and make the same one again."""
_PINNED = ("torch", "torchvision", "numpy", "opencv-python-headless", "pillow")


def show_run(ref: str, *, tracking_uri: str | None) -> RunDetails:
    """Return one run in full.

    Raises:
        UnresolvedError: `ref` is not a run ID, or there is no such run.
        TrackingError: MLflow did not answer.
    """
    prepare_environment()
    store = Connection(tracking_uri)
    client, run = store.client, find_run(store, ref)
    tags, run_id = run.data.tags, run.info.run_id
    with mlflow_errors(f"read the models of run {run_id}"):
        experiment = client.get_experiment(run.info.experiment_id).name
        models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
    config = _json(tags.get(CONFIG_TAG))
    return RunDetails(
        run,
        experiment,
        manifest_in_tag(tags, LATEST_TAG),
        manifest_in_tag(tags, BEST_TAG),
        tuple((str(model.model_id), str(model.name)) for model in models),
        tuple(command_of(config)) if "model" in config else None,
    )


@dataclass(frozen=True)
class MendedRun:
    """A run, and whether its status was mended."""

    run_id: str
    name: str
    before: str
    status: str

    def to_dict(self) -> dict[str, Any]:
        """Return its entry in the document of `runs mend --json`."""
        return {"run_id": self.run_id, "name": self.name, "before": self.before, "status": self.status}


def mend_runs(refs: Sequence[str], *, tracking_uri: str | None, reporter: Reporter) -> list[MendedRun]:
    """Set runs to KILLED that are RUNNING although their writer is gone; runs that have ended stay as they are.

    Nothing is changed unless all of them can be mended.

    Raises:
        UnresolvedError: a reference is not a run ID, or there is no such run.
        DeletedError: a run, or its experiment, was deleted.
        TrackingError: a writer is at work, or is not known, or MLflow did not answer.
    """
    prepare_environment()
    store = Connection(tracking_uri)
    runs = {run.info.run_id: run for run in (find_run(store, ref) for ref in refs)}
    for run in runs.values():
        require_active(store.client, run)
    writers = {run_id: require_abandoned(store.client, run_id, note=reporter.note) for run_id in runs}
    mended = []
    for run_id, run in runs.items():
        if (writer := writers[run_id]) is not None:
            end_abandoned(store.client, run_id, writer)
        status = run.info.status if writer is None else "KILLED"
        mended.append(MendedRun(run_id, run.info.run_name, run.info.status, status))
    return mended


def find_run(store: Connection, ref: str) -> "Run":
    """Return the run that `ref` names: its ID, the first characters of it, or `runs:/ID`.

    Raises:
        UnresolvedError: it is not a run ID, or there is no such run.
        TrackingError: MLflow did not answer.
    """
    return read_run(store, str(complete(f"runs:/{run_id_of(ref)}", store)).removeprefix("runs:/"))


def _with_prefix(tags: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): value for name, value in tags.items() if name.startswith(prefix)}


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _time(milliseconds: int | None) -> str | None:
    """Return local time to the second."""
    if milliseconds is None:
        return None
    moment = datetime.fromtimestamp(milliseconds / 1000, tz=timezone.utc)
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")
