"""`durable+http://` and `durable+https://` as MLflow sees them: the entry points of this package.

MLflow loads this module whenever it is imported itself, so everything else is imported when such an address is used.
"""

import atexit
import sys
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.tracking.uris import DURABLE_SCHEMES, server_behind

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from mlflow.store.model_registry.abstract_store import AbstractStore as RegistryStore
    from mlflow.store.tracking.abstract_store import AbstractStore


def open_store(store_uri: str, artifact_uri: str | None = None) -> "AbstractStore":
    """Return the tracking store at `durable+http://…`; for `mlflow.tracking_store`."""
    from shufflenet_mlflow.tracking.durable_store import DurableStore

    return DurableStore(server_behind(store_uri))


def open_registry(store_uri: str, tracking_uri: str | None = None) -> "RegistryStore":
    """Return the model registry behind `durable+http://…`, without a journal; for `mlflow.model_registry_store`."""
    from functools import partial

    from mlflow.store.model_registry.rest_store import RestStore
    from mlflow.utils.credentials import get_default_host_creds

    store: Any = RestStore
    return store(partial(get_default_host_creds, server_behind(store_uri)))  # type: ignore[no-any-return]


def open_artifacts(
    artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
) -> "ArtifactRepository":
    """Return the access to `mlflow-artifacts:/…`; for `mlflow.artifact_repository`.

    It is MLflow's own unless the tracking server is at `durable+http://…`, which MLflow's own does not understand.
    """
    from mlflow import get_tracking_uri
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

    uri = tracking_uri or get_tracking_uri()
    if not uri.lower().startswith(tuple(f"{scheme}:" for scheme in DURABLE_SCHEMES)):
        repository: Any = MlflowArtifactsRepository
        return repository(artifact_uri, tracking_uri, registry_uri)  # type: ignore[no-any-return]
    from shufflenet_mlflow.tracking.durable_artifacts import DurableArtifacts

    return DurableArtifacts(artifact_uri, server_behind(uri), registry_uri)


def _finish() -> None:
    """Deliver what is left, if anything was journaled."""
    runs = sys.modules.get("shufflenet_mlflow.tracking.durable_runs")
    if runs is not None:
        runs.finish_all()


# MLflow ends the active run in such a function, too, which it registers after it has loaded this module: this one
# therefore runs later.
atexit.register(_finish)
