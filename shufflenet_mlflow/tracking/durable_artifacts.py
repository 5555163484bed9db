"""Artifacts behind a server at `durable+http://…`: files are copied into the run's journal, and uploaded from there."""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mlflow.store.artifact.artifact_repo import verify_artifact_path
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

from shufflenet_mlflow.errors import ShuffleNetError
from shufflenet_mlflow.tracking import durable_runs
from shufflenet_mlflow.tracking.durable_errors import mlflow_error, unusable
from shufflenet_mlflow.tracking.durable_runs import FOLDER_VARIABLE
from shufflenet_mlflow.tracking.logged import is_artifact_name

_OF_RUN = re.compile(r"/(?P<run_id>[0-9a-f]{32})/artifacts(/(?P<folder>.*))?$")

READ_SECONDS = 30.0
"""Seconds that reading waits for files that are being uploaded."""


class DurableArtifacts(MlflowArtifactsRepository):
    """MLflow's own access to the artifacts at `mlflow-artifacts:/…`, with a journal in front of what runs log.

    Artifacts of logged models, which only the server creates, are uploaded at once.

    Args:
        uri: address of the tracking server, beginning with `http`.
    """

    def __init__(self, artifact_uri: str, uri: str, registry_uri: str | None = None) -> None:
        super().__init__(artifact_uri, uri, registry_uri)
        found = _OF_RUN.search(artifact_uri)
        self._uri, self._run_id = uri, found["run_id"] if found else None
        self._folder = (found["folder"] or "") if found else ""

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        """Copy a file into the run's journal, and wait a moment for its upload."""
        if self._run_id is None:
            super().log_artifact(local_file, artifact_path)  # type: ignore[no-untyped-call]
            return
        verify_artifact_path(artifact_path)  # type: ignore[no-untyped-call]
        folder = posixpath.join(self._folder, artifact_path or "").strip("/")
        name = posixpath.join(folder, Path(local_file).name)
        if not is_artifact_name(name):
            raise mlflow_error(
                f"MLflow cannot keep an artifact called {name!r}: leave out '#', '?', what stands for another "
                "character, such as '%20', and what cannot be printed",
                "INVALID_PARAMETER_VALUE",
            )
        try:
            durable_runs.record_file(self._uri, self._run_id, Path(local_file), folder)
        except ShuffleNetError as error:
            raise unusable(error) from None
        except OSError as error:
            if not os.access(local_file, os.R_OK):
                raise  # MLflow's own error for a file that is not there
            raise mlflow_error(
                f"cannot keep a copy of {name!r} in {str(durable_runs.folder_of(self._run_id))!r}: {error.strerror}; "
                f"make room there, or let {FOLDER_VARIABLE} name another folder",
                None,
            ) from error
        durable_runs.wait(self._uri, self._run_id)

    def list_artifacts(self, path: str | None = None) -> list[Any]:
        """List artifacts, once those that are pending have arrived."""
        self._wait()
        return super().list_artifacts(path)  # type: ignore[no-any-return, no-untyped-call]

    def download_artifacts(self, artifact_path: str, dst_path: str | None = None) -> str:
        """Download artifacts, once those that are pending have arrived."""
        self._wait()
        return super().download_artifacts(artifact_path, dst_path)  # type: ignore[no-any-return, no-untyped-call]

    def delete_artifacts(self, artifact_path: str | None = None) -> None:
        """Delete artifacts, behind what was logged before."""
        self._wait()
        super().delete_artifacts(artifact_path)  # type: ignore[no-untyped-call]

    def _wait(self) -> None:
        if self._run_id is not None:
            durable_runs.wait(self._uri, self._run_id, READ_SECONDS)
