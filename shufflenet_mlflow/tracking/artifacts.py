"""List, read, upload and delete the checkpoints among a run's artifacts."""

import contextlib
import json
import logging
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.checkpoints.manifest import ARTIFACT_FOLDER, CheckpointManifest
from shufflenet_mlflow.checkpoints.names import newest_first
from shufflenet_mlflow.errors import CheckpointError, TrackingError
from shufflenet_mlflow.runtime.files import sha256_of
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.names import DELETING_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_READERS = 8
"""Threads that fetch manifests; each one mostly waits for the store."""


def being_deleted(tags: Mapping[str, str]) -> list[str]:
    """Return the names in `checkpoint.deleting`."""
    try:
        names = json.loads(tags.get(DELETING_TAG, "[]"))
    except ValueError:
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


class RunArtifacts:
    """The artifact folder `checkpoints` of a run."""

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self.client = client
        self.run_id = run_id
        self._manifests: dict[str, CheckpointManifest] = {}
        self._repository: Any = None

    def sizes(self) -> dict[str, int | None]:
        """Return file name -> bytes, if the store knows them; manifests included."""
        with mlflow_errors(f"list the checkpoints of run {self.run_id}"):
            artifacts = self._artifact_repository().list_artifacts(ARTIFACT_FOLDER)
        return {artifact.path.rpartition("/")[2]: artifact.file_size for artifact in artifacts}

    def manifest_of(self, name: str) -> CheckpointManifest | None:
        """Return the manifest beside the artifact `name`, or None if it has none.

        Raises:
            TrackingError: MLflow did not answer.
        """
        with tempfile.TemporaryDirectory() as scratch:
            try:
                path = self.download(f"{ARTIFACT_FOLDER}/{name}.json", Path(scratch))
            except TrackingError:
                if f"{name}.json" in self.sizes():  # raises if MLflow does not answer
                    raise
                return None
            try:
                return CheckpointManifest.from_json(path.read_text("utf-8"))
            except (CheckpointError, UnicodeDecodeError) as error:
                logger.warning("run %s: the manifest of %s cannot be used: %s", self.run_id, name, error)
                return None

    def manifests(self) -> list[CheckpointManifest]:
        """Return the manifests of the run's checkpoints, newest first; each is read once."""
        names = newest_first(self.sizes())
        unread = [name for name in names if name not in self._manifests]
        if unread:
            self._artifact_repository()  # created before several threads need it
            with ThreadPoolExecutor(_READERS) as readers:
                for name, manifest in zip(unread, readers.map(self.manifest_of, unread), strict=True):
                    if manifest is not None:
                        self._manifests[name] = manifest
        return [self._manifests[name] for name in names if name in self._manifests]

    def orphaned_manifests(self) -> list[str]:
        """Return the names of checkpoints that are gone while their manifests remain, after an interrupted deletion."""
        names = self.sizes()
        ends = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        return [name for name in ends if name not in names and newest_first([name])]

    def download(self, artifact: str, folder: Path) -> Path:
        """Download one artifact into `folder`, unverified.

        The client's own call reads the run first, each time.
        """
        with mlflow_errors(f"download {artifact} of run {self.run_id}"):
            return Path(self._artifact_repository().download_artifacts(artifact, str(folder)))

    def upload(self, path: Path, manifest: CheckpointManifest) -> None:
        """Upload a checkpoint and confirm what arrived: its content if the store is a folder, otherwise its size.

        Raises:
            TrackingError: something else arrived.
        """
        self.put_file(path)
        folder = self._local_folder()
        if folder is not None:
            with open(folder / ARTIFACT_FOLDER / path.name, "rb") as file:
                arrived = sha256_of(file)
            if arrived != manifest.sha256:
                raise TrackingError(
                    f"{path.name} did not arrive intact: its SHA-256 there is {arrived[:12]}…",
                    code="upload-sha256-differs",
                )
            return
        sizes = self.sizes()
        if path.name not in sizes:
            raise TrackingError(
                f"{path.name} did not arrive: run {self.run_id} does not list it", code="upload-not-listed"
            )
        if sizes[path.name] not in (None, manifest.bytes):
            raise TrackingError(
                f"{path.name} did not arrive intact: {sizes[path.name]} of {manifest.bytes} bytes are in run "
                f"{self.run_id}",
                code="upload-size-differs",
            )

    def put_file(self, path: Path) -> None:
        """Upload one file, unconfirmed; not through the client, see `download`."""
        self._artifact_repository().log_artifact(str(path), ARTIFACT_FOLDER)

    def write_manifest(self, manifest: CheckpointManifest) -> None:
        """Upload the manifest beside its artifact."""
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / f"{manifest.file_name}.json"
            path.write_text(manifest.to_line(), "utf-8")
            self.put_file(path)
        self._manifests[manifest.file_name] = manifest

    def delete(self, name: str) -> None:
        """Delete a checkpoint, then its manifest; a missing one is not an error.

        Raises:
            TrackingError: the store refused, or did not answer.
        """
        for artifact in (name, f"{name}.json"):
            try:
                with mlflow_errors(f"delete {artifact} of run {self.run_id}"):
                    self._artifact_repository().delete_artifacts(f"{ARTIFACT_FOLDER}/{artifact}")
            except TrackingError:
                if artifact in self.sizes():
                    raise
        self._manifests.pop(name, None)

    def _artifact_repository(self) -> Any:
        """Return MLflow's own access to the artifacts; the client has no call that deletes."""
        if self._repository is None:
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            uri = self.client.get_run(self.run_id).info.artifact_uri
            self._repository = get_artifact_repository(uri, tracking_uri=self.client.tracking_uri)
        return self._repository

    def _local_folder(self) -> Path | None:
        """Return the folder that is the artifact store; None for any other store."""
        from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

        with contextlib.suppress(ImportError):
            repository = self._artifact_repository()
            if isinstance(repository, LocalArtifactRepository):
                return Path(repository.artifact_dir)
        return None
