"""`shufflenet compare`: run IDs in, tables, curves and a page out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.tracking.client import prepare_environment
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.workflows.runs import find_run

if TYPE_CHECKING:
    from shufflenet_mlflow.compare import Comparison


@dataclass(frozen=True)
class CompareSummary:
    """A comparison, and the files that hold it."""

    comparison: "Comparison"
    written: tuple[Path, ...]


def run_comparison(refs: Sequence[str], *, out: Path | None, tracking_uri: str | None) -> CompareSummary:
    """Put runs side by side.

    Args:
        refs: their IDs.
        out: folder for the page and the curves; None for neither.

    Raises:
        ConfigError: there are fewer than two, or one twice.
        UnresolvedError: there is no such run.
        ExportError: the folder cannot be written.
        TrackingError: MLflow did not answer.
    """
    _require_several(refs)
    prepare_environment()
    from shufflenet_mlflow.compare import compare_runs, write_page

    store = Connection(tracking_uri)
    runs = [find_run(store, ref) for ref in refs]
    _require_several([run.info.run_id for run in runs])
    comparison = compare_runs(store.client, runs, curves=out is not None)
    return CompareSummary(comparison, tuple(write_page(comparison, out)) if out is not None else ())


def _require_several(ids: Sequence[str]) -> None:
    if len(ids) < 2:
        raise ConfigError(
            f"comparing {ids[0] if ids else 'none'} takes two runs or more; `shufflenet runs` lists them",
            code="compare-needs-two-runs",
        )
    if repeated := sorted({run_id for run_id in ids if ids.count(run_id) > 1}):
        raise ConfigError(
            f"run {repeated[0]} is given twice; name another one to compare it with", code="run-given-twice"
        )
