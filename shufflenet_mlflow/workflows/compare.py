"""`shufflenet compare`: run IDs in, tables, curves and a page out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
        ConfigError: there are fewer than two.
        UnresolvedError: there is no such run.
        ExportError: the folder cannot be written.
        TrackingError: MLflow did not answer.
    """
    from shufflenet_mlflow.compare import compare_runs, write_page

    prepare_environment()
    store = Connection(tracking_uri)
    comparison = compare_runs(store.client, [find_run(store, ref) for ref in refs], curves=out is not None)
    return CompareSummary(comparison, tuple(write_page(comparison, out)) if out is not None else ())
