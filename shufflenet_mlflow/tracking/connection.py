"""A tracking store that is connected to when it is first needed, once, and read once per run."""

from functools import cached_property
from typing import TYPE_CHECKING, Union

from shufflenet_mlflow.tracking.client import connect, mlflow_errors
from shufflenet_mlflow.tracking.exchanges import impatient
from shufflenet_mlflow.tracking.paths import store_file
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.uris import uri_in_force

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from mlflow import MlflowClient
    from mlflow.entities import Run


class Connection:
    """A tracking store. Nothing is imported, opened or created before `client` is used.

    Args:
        tracking_uri: by default the store that MLflow itself would use.
    """

    def __init__(self, tracking_uri: str | None = None) -> None:
        self._given = tracking_uri
        self._runs: dict[str, Run] = {}

    @classmethod
    def to(cls, store: Union[str, "Connection", None]) -> "Connection":
        """Return a connection to a store that is named by its address, or is a connection already."""
        return store if isinstance(store, Connection) else cls(store)

    @property
    def uri(self) -> str:
        """Address of the store."""
        return uri_in_force(self._given)

    @cached_property
    def client(self) -> "MlflowClient":
        """MLflow's client of the store.

        Raises:
            TrackingError: MLflow does not accept the address.
        """
        return connect(self._given)

    def exists(self) -> bool:
        """Whether using the store would not create it."""
        file = store_file(self.uri)
        return file is None or file.exists()

    def run(self, run_id: str) -> "Run":
        """Return a run as it was when it was first read over this connection.

        Raises:
            TrackingError: the store has no such run, or MLflow did not answer.
        """
        if run_id not in self._runs:
            with mlflow_errors(f"read run {run_id} in {redact(self.uri)}"):
                self._runs[run_id] = self.client.get_run(run_id)
        return self._runs[run_id]

    def impatient(self) -> "AbstractContextManager[None]":
        """Make exchanges in the block once, and briefly; see `exchanges.impatient`."""
        return impatient()
