"""List, read, upload and delete the checkpoints among a run's artifacts."""

import contextlib
import errno
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.checkpoints.manifest import ARTIFACT_FOLDER, CheckpointManifest
from shufflenet_mlflow.checkpoints.names import attempt_prefix, local_name, newest_first, parse_name
from shufflenet_mlflow.errors import CheckpointError, RefusedError, TrackingError
from shufflenet_mlflow.runtime.files import sha256_of
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.exchanges import TimedArtifacts
from shufflenet_mlflow.tracking.guarded import Guarded
from shufflenet_mlflow.tracking.names import DELETING_TAG
from shufflenet_mlflow.tracking.trust import check_artifact_address

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
    names = names if isinstance(names, list) else []
    return [name for name in names if isinstance(name, str) and parse_name(name) is not None]


_ERRNO = re.compile(r"\[Errno (\d+)\]")
_STATUS = re.compile(r"too many (\d+) error responses")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of writing: they are always about the folder that an artifact is fetched into."""


def _download_failure(error: Exception) -> Exception:
    """Return what went wrong with a download.

    MLflow puts it, as text, below a line that says where from, and gives an error of the disk no number.
    """
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("##### File")]
        number = _ERRNO.search(str(error))
        if number is not None and int(number[1]) in _NO_ROOM:
            return OSError(int(number[1]), os.strerror(int(number[1])))
        status = _STATUS.search(str(error))
        if status is not None:
            return MlflowException(f"the server answered {status[1]}")
        if len(lines) > 1 and "failures occurred while downloading" in lines[0]:
            return MlflowException(lines[1], error_code=_code_number(error.error_code))
        return error
    if isinstance(error, OSError) and error.errno not in _NO_ROOM:
        return MlflowException(str(error))
    return error


def _code_number(code: str) -> int:
    from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, ErrorCode

    return int(ErrorCode.Value(code)) if code in ErrorCode.keys() else int(INTERNAL_ERROR)  # noqa: SIM118 - no dict


@contextlib.contextmanager
def _called(path: Path, name: str) -> Iterator[Path]:
    """Yield a path of the same file that ends in `name`: a store takes over the name of the file that it is given."""
    if path.name == name:
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        link = Path(scratch) / name
        link.symlink_to(path.absolute())
        yield link


class RunArtifacts:
    """The artifact folder `checkpoints` of a run."""

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self.client = client
        self.run_id = run_id
        self._manifests: dict[str, CheckpointManifest] = {}
        self._repository: Any = None
        self._folder: Path | None = None
        self._check: Callable[[], object] | None = None

    def guard(self, check: Callable[[], object]) -> None:
        """See `RunTarget.guard`."""
        self._check = check

    def sizes(self) -> dict[str, int | None]:
        """Return file name -> bytes, if the store knows them; manifests included."""
        with mlflow_errors(f"list the checkpoints of run {self.run_id}"):
            artifacts = self._artifact_repository().list_artifacts(ARTIFACT_FOLDER)
        return {artifact.path.rpartition("/")[2]: artifact.file_size for artifact in artifacts}

    def manifest_of(self, name: str) -> CheckpointManifest | None:
        """Return the manifest beside the artifact `name`, or None if it has none.

        Raises:
            TrackingError: MLflow did not answer, or there is no room for the manifest.
        """
        try:
            with tempfile.TemporaryDirectory() as scratch:
                path = self.download(f"{ARTIFACT_FOLDER}/{name}.json", Path(scratch))
                return CheckpointManifest.from_json(path.read_text("utf-8"))
        except TrackingError:
            if f"{name}.json" in self.sizes():  # raises if MLflow does not answer
                raise
            return None
        except OSError as error:
            raise TrackingError(
                f"cannot read the manifest of {name}: {error.strerror or error}; TMPDIR names another folder for "
                "temporary files",
                code="manifest-not-downloaded",
            ) from error
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

    def find(self, name: str, sha256: str | None) -> CheckpointManifest | None:
        """Return the manifest of the attempt at the checkpoint `name` that has these bytes; None if there is none.

        Args:
            name: its name on the disk or among the artifacts.
            sha256: None for the last attempt.
        """
        attempts = [found for found in newest_first(self.sizes()) if local_name(found) == local_name(name)]
        manifests = (self.manifest_of(attempt) for attempt in attempts)
        return next((found for found in manifests if found is not None and sha256 in (None, found.sha256)), None)

    def has_attempts(self) -> bool:
        """Whether any checkpoint was committed more than once."""
        return any(map(attempt_prefix, self.sizes()))

    def half_uploads(self) -> list[str]:
        """Return the names of attempts without a manifest: their upload was interrupted, and nothing names them."""
        names = self.sizes()
        return [name for name in newest_first(names) if attempt_prefix(name) and f"{name}.json" not in names]

    def orphaned_manifests(self) -> list[str]:
        """Return the names of checkpoints that are gone while their manifests remain, after an interrupted deletion."""
        names = self.sizes()
        ends = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        return [name for name in ends if name not in names and newest_first([name])]

    def download(self, artifact: str, folder: Path) -> Path:
        """Download one artifact into `folder`, unverified.

        The client's own call reads the run first, each time.

        Raises:
            OSError: there is no room in `folder`, or it cannot be written.
            TrackingError: the store did not give the artifact, or its path leads out of the run's artifacts.
        """
        self._check_inside(artifact)
        with mlflow_errors(f"download {artifact} of run {self.run_id}"):
            repository = self._artifact_repository()
            try:
                return Path(repository.download_artifacts(artifact, str(folder)))
            except Exception as error:  # noqa: BLE001 - any store raises its own kinds
                failure = _download_failure(error)
            if not isinstance(failure, OSError):
                raise failure
        raise failure

    def has(self, artifact: str) -> bool:
        """Whether MLflow lists the artifact.

        Raises:
            TrackingError: MLflow did not answer.
        """
        with mlflow_errors(f"list the artifacts of run {self.run_id}"):
            listed = self._artifact_repository().list_artifacts(artifact.rpartition("/")[0])
        return any(entry.path == artifact for entry in listed)

    def is_blocked(self, artifact: str) -> bool:
        """Whether the run has a folder in place of the file, or a file in place of one of its folders.

        Raises:
            TrackingError: MLflow did not answer.
        """
        parts = artifact.split("/")
        for depth in range(len(parts)):
            path = "/".join(parts[: depth + 1])
            with mlflow_errors(f"list the artifacts of run {self.run_id}"):
                listed = self._artifact_repository().list_artifacts("/".join(parts[:depth]) or None)
            found = next((entry for entry in listed if entry.path == path), None)
            if found is None:
                return False
            if found.is_dir == (depth == len(parts) - 1):
                return True
        return False

    def upload(self, path: Path, manifest: CheckpointManifest) -> None:
        """Upload a checkpoint and confirm what arrived: its content if the store is a folder, otherwise its size.

        Raises:
            TrackingError: something else arrived.
        """
        name = manifest.file_name
        with _called(path, name) as source:
            self.put_file(source)
        folder = self._local_folder()
        if folder is not None:
            with open(folder / ARTIFACT_FOLDER / name, "rb") as file:
                arrived = sha256_of(file)
            if arrived != manifest.sha256:
                raise TrackingError(
                    f"{name} did not arrive intact: its SHA-256 there is {arrived[:12]}…",
                    code="upload-sha256-differs",
                )
            return
        sizes = self.sizes()
        if name not in sizes:
            raise TrackingError(f"{name} did not arrive: run {self.run_id} does not list it", code="upload-not-listed")
        if sizes[name] not in (None, manifest.bytes):
            raise TrackingError(
                f"{name} did not arrive intact: {sizes[name]} of {manifest.bytes} bytes are in run {self.run_id}",
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

    def put_text(self, text: str, artifact: str) -> None:
        """Upload a small text file."""
        self._check_inside(artifact)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / artifact.rpartition("/")[2]
            path.write_bytes(text.encode())
            self.put(path, artifact)

    def put(self, path: Path, artifact: str) -> None:
        """Upload a file as `artifact`, which ends in the file's own name; unconfirmed."""
        self._check_inside(artifact)
        self._artifact_repository().log_artifact(str(path), artifact.rpartition("/")[0] or None)

    def check_arrived(self, folder: str, files: Mapping[str, int]) -> None:
        """Look whether artifacts are there: any server, and any portal, says that it has stored what it was sent.

        Args:
            folder: their folder in the run; may be empty.
            files: file name -> bytes.

        Raises:
            TrackingError: one is not there, or not whole, or MLflow did not answer.
        """
        with mlflow_errors(f"list the artifacts of run {self.run_id}"):
            listed = self._artifact_repository().list_artifacts(folder or None)
        sizes = {found.path: found.file_size for found in listed}
        for name, size in files.items():
            path = f"{folder}/{name}" if folder else name
            if path not in sizes or sizes[path] not in (None, size):
                raise TrackingError(f"{path} did not arrive in run {self.run_id}", code="artifact-not-arrived")

    def put_folder(self, local: str, folder: str) -> None:
        """Upload the files of a local folder."""
        self._artifact_repository().log_artifacts(local, folder)

    def folders(self, folder: str) -> list[str]:
        """Return the paths of the folders in a folder of the run."""
        return [found.path for found in self._artifact_repository().list_artifacts(folder) if found.is_dir]

    def _check_inside(self, artifact: str) -> None:
        if not all(part not in ("", ".", "..") and "\0" not in part for part in artifact.split("/")):
            raise RefusedError(
                f"{artifact!r} is not the path of a file among the artifacts of run {self.run_id}",
                code="artifact-outside",
            )

    def _artifact_repository(self) -> Any:
        """Return MLflow's own access to the artifacts, once their address is known to be harmless.

        Everything goes this way: the client's own calls follow any address. It also has no call that deletes.
        """
        if self._repository is None:
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
            from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

            uri = self.client.get_run(self.run_id).info.artifact_uri
            check_artifact_address(uri, self.run_id, self.client.tracking_uri)
            repository: Any = get_artifact_repository(uri, tracking_uri=self.client.tracking_uri)
            if isinstance(repository, LocalArtifactRepository):
                self._folder = Path(repository.artifact_dir)
            else:
                repository = TimedArtifacts(repository)
            self._repository = repository if self._check is None else Guarded(repository, self._check)
        return self._repository

    def _local_folder(self) -> Path | None:
        """Return the folder that is the artifact store; None for any other store."""
        with contextlib.suppress(ImportError):
            self._artifact_repository()
        return self._folder
