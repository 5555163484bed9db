"""The network that a search has found, for `train --search`."""

from pathlib import Path

from shufflenet_mlflow.checkpoints.references import is_run_id
from shufflenet_mlflow.errors import UnresolvedError
from shufflenet_mlflow.models.search_space import NETWORK
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.names import ARCHITECTURE_FILE, SEARCH_BEST_TAG
from shufflenet_mlflow.tracking.run_ids import complete, read_run
from shufflenet_mlflow.workflows.searching.report import options_of_tag

FORMS = "the run of a search or of one of its networks, a folder of one, or its architecture.json"


def found_network(search: str, store: Connection) -> dict[str, str]:
    """Return the options of training that name the network that a search has found.

    Args:
        search: a run ID, a search's folder or that of one of its best candidates or of its front, or an
            `architecture.json`.

    Raises:
        UnresolvedError: it is none of these, or the search has not found anything yet.
        TrackingError: MLflow does not answer.
    """
    path = Path(search)
    if path.exists():
        file = path / ARCHITECTURE_FILE if path.is_dir() else path
        text = file.read_text(errors="replace") if file.is_file() else ""
    elif is_run_id(search.removeprefix("runs:/").rstrip("/"), whole=False):
        run_id = str(complete(search, store)).removeprefix("runs:/").rstrip("/")
        text = read_run(store, run_id).data.tags.get(SEARCH_BEST_TAG, "")
    else:
        raise UnresolvedError(f"--search (={search}) must be {FORMS}", code="search-reference")
    options = options_of_tag(text)
    if options is None:
        raise UnresolvedError(
            f"--search (={search}) holds no network that a search has found; it must be {FORMS}, once the search has "
            "scored its first candidate or, for a folder, is complete",
            code="search-nothing-found",
        )
    return {"model": NETWORK, **options}
