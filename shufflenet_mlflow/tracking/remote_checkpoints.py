"""Fetch checkpoints from MLflow into a cache folder.

`checkpoint.latest` and `checkpoint.best` each name one artifact, so nothing is listed on the usual path. A file
gets its name in the cache only after it was verified against its manifest, and is not fetched again.
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from shufflenet_mlflow.checkpoints.folders import Resolved
from shufflenet_mlflow.checkpoints.manifest import (
    ARTIFACT_FOLDER,
    BEST_TAG,
    LATEST_TAG,
    CheckpointManifest,
    manifest_path,
    read_manifest,
    write_manifest,
)
from shufflenet_mlflow.checkpoints.names import attempt_prefix, local_name, newest_first, parse_name
from shufflenet_mlflow.checkpoints.references import ModelReference, RunReference, is_run_id, run_folder
from shufflenet_mlflow.checkpoints.verification import VerifiedCheckpoint, open_checkpoint, verify_checkpoint
from shufflenet_mlflow.errors import (
    CheckpointError,
    CorruptCheckpointError,
    NoCheckpointError,
    TrackingError,
    UnreadableCheckpointError,
    UnresolvedError,
    UnsafeCheckpointError,
)
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.tracking.artifacts import RunArtifacts, being_deleted
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.downloads import scratch_folder, shown
from shufflenet_mlflow.tracking.lease import writer_in
from shufflenet_mlflow.tracking.names import CONTINUES_TAG, MODEL_VERSION_TAG
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.run_ids import is_missing, read_run
from shufflenet_mlflow.tracking.target import manifest_in_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)


_NAMED = 8

_ATTEMPTS = 3
"""Attempts at a download that breaks off."""


class RemoteCheckpoints:
    """The checkpoints of one run, fetched into a cache folder."""

    def __init__(self, store: Connection, run_id: str, cache_dir: Path, reporter: Reporter | None = None) -> None:
        self.folder = run_folder(cache_dir / "runs", run_id)  # what is no run's ID is not asked for
        run = read_run(store, run_id)
        if CONTINUES_TAG in run.data.tags:  # made by `mlflow run`, whose training is in another run
            run_id = run.data.tags[CONTINUES_TAG]
            self.folder = run_folder(cache_dir / "runs", run_id)
            run = read_run(store, run_id)
        self.client = store.client
        self._reporter = reporter
        self.run_id = run_id
        self.artifacts = RunArtifacts(self.client, run_id)
        self.name = run.info.run_name
        self.tags: dict[str, str] = run.data.tags

    def tagged(self, tag: str) -> CheckpointManifest:
        """Return the manifest in `checkpoint.latest` or `checkpoint.best`.

        Raises:
            UnresolvedError: the run has no such tag.
        """
        if tag not in self.tags:
            raise self._without(tag)
        try:
            return CheckpointManifest.from_json(self.tags[tag])
        except CheckpointError as error:
            raise UnresolvedError(f"run {self.run_id}: its tag {tag} is {error}", code="tag-invalid-in-run") from error

    def _without(self, tag: str) -> UnresolvedError:
        found = self.list_names()
        text = f"run {self.run_id} ({self.name}) has no {tag}; among its artifacts are " + (
            f"the checkpoints {', '.join(found[:_NAMED])}" if found else "no checkpoints"
        )
        return (
            NoCheckpointError(text, self.run_id, code="run-without-checkpoint")
            if tag == LATEST_TAG
            else UnresolvedError(text, code="run-without-tag")
        )

    def list_names(self) -> list[str]:
        """Return the names of the run's checkpoints, newest first, without half uploads and those being deleted."""
        doomed, listed = being_deleted(self.tags), self.artifacts.sizes()
        return [
            name
            for name in newest_first(listed)
            if name not in doomed and (not attempt_prefix(name) or f"{name}.json" in listed)
        ]

    def at(self, iters: int) -> str:
        """Return the name of the checkpoint after `iters` iterations; of several attempts, the latest or the last.

        Raises:
            UnresolvedError: the run has none; the message lists those it has.
        """
        latest = manifest_in_tag(self.tags, LATEST_TAG)
        if latest is not None and latest.iters == iters:
            return latest.file_name
        names = self.list_names()
        for name in names:
            parsed = parse_name(name)
            if parsed is not None and parsed.iters == iters:
                return name
        steps = sorted({parsed.iters for name in names if (parsed := parse_name(name))})
        listed = ", ".join(map(str, steps[-_NAMED:])) or "none"
        raise UnresolvedError(
            f"run {self.run_id} has no checkpoint at iteration {iters}; it has: "
            + ("…, " if len(steps) > _NAMED else "")
            + listed,
            code="iteration-not-in-run",
        )

    def manifest_of(self, name: str) -> CheckpointManifest | None:
        """Return the manifest of the artifact `name`, or None if it has none."""
        for tag in (LATEST_TAG, BEST_TAG):
            with contextlib.suppress(CheckpointError):
                manifest = CheckpointManifest.from_json(self.tags.get(tag, ""))
                if manifest.file_name == name:
                    return manifest
        return self.artifacts.manifest_of(name)

    def fetch(self, artifact: str, manifest: CheckpointManifest | None) -> VerifiedCheckpoint:
        """Return an artifact from the cache, verified; download it unless it is there already.

        A download that breaks off, or does not verify, is repeated; a file in the cache was whole once.

        Raises:
            UnresolvedError: the artifact is not named like a checkpoint, or the cache folder cannot be used.
            CorruptCheckpointError: what arrived is not what was recorded.
            TrackingError: it could not be downloaded.
        """
        name = artifact.rpartition("/")[2]
        if parse_name(name) is None:
            raise UnresolvedError(
                f"run {self.run_id}: {artifact!r} is not named like a checkpoint, {{tag}}checkpoint-{{iters}}.pth.tar",
                code="artifact-name",
            )
        target = self.folder / attempt_prefix(name).removesuffix("~") / local_name(name)
        if manifest is not None and read_manifest(target) == manifest.as_local():
            try:
                cached = open_checkpoint(target, manifest)
            except CheckpointError as error:
                logger.warning("fetching again: %s", error)
            else:
                logger.debug("%s of run %s is in the cache, and verified: %s", name, self.run_id, target)
                return cached
        logger.info("fetching %s of run %s", name, self.run_id)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._fetch_once(artifact, manifest, target)
            except OSError as error:
                raise self._unusable_cache(name, error) from error
            except UnreadableCheckpointError as error:
                raise self._unusable_cache(name, error.__cause__) from error
            except (TrackingError, CorruptCheckpointError) as error:
                if attempt == _ATTEMPTS or (isinstance(error, TrackingError) and is_missing(error)):
                    raise
                logger.info("fetching %s again: %s", name, error)
        raise AssertionError("the last attempt raises or returns")

    def _fetch_once(self, artifact: str, manifest: CheckpointManifest | None, target: Path) -> VerifiedCheckpoint:
        self.folder.mkdir(parents=True, exist_ok=True)
        with scratch_folder(self.folder) as scratch:
            with shown(self._reporter, scratch, artifact, manifest):
                arrived = self.artifacts.download(artifact, scratch)
            fetched = open_checkpoint(arrived, manifest)
            with open(arrived, "rb") as file:
                os.fsync(file.fileno())
            manifest_path(target).unlink(missing_ok=True)
            target.parent.mkdir(exist_ok=True)
            fetched.rename(target)
        if manifest is not None:
            write_manifest(target, manifest.as_local())
        return fetched

    def verify(self, name: str) -> None:
        """Fetch one checkpoint, verify it, and do not keep it.

        Raises:
            CorruptCheckpointError: it is not what was recorded.
            TrackingError: it could not be downloaded.
            UnresolvedError: the cache folder cannot be used.
        """
        manifest = self.manifest_of(name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with scratch_folder(self.folder) as scratch:
                verify_checkpoint(self.artifacts.download(f"{ARTIFACT_FOLDER}/{name}", scratch), manifest)
        except OSError as error:
            raise self._unusable_cache(name, error) from error
        except UnreadableCheckpointError as error:
            raise self._unusable_cache(name, error.__cause__) from error

    def _unusable_cache(self, name: str, error: BaseException | None) -> UnresolvedError:
        return UnresolvedError(
            f"cannot keep {name} in the cache folder {str(self.folder)!r}: "
            f"{getattr(error, 'strerror', None) or error}; --cache-dir or "
            "SHUFFLENET_CACHE_DIR names another",
            code="cache-unusable",
        )

    def newest_valid(self) -> Resolved:
        """Return the checkpoint that `checkpoint.latest` names or, if it does not verify, the newest that does.

        Only what fails verification, or what MLflow says is gone, is passed over. A download that fails for another
        reason ends the search: the checkpoint may be intact, and an older one would rewind the run.

        Raises:
            UnresolvedError: none of the run's checkpoints verifies, or the cache folder cannot be used;
                NoCheckpointError: the run has none.
            TrackingError: the newest could not be downloaded.
        """
        return self._first_valid(self._newest_first())

    def best_valid(self) -> Resolved:
        """Return the checkpoint that `checkpoint.best` names; if there is none, or it does not verify, `newest_valid`.

        Raises:
            UnresolvedError, TrackingError: as `newest_valid` does.
        """
        best = manifest_in_tag(self.tags, BEST_TAG)
        if best is not None:
            return self._first_valid(chain([(best.path, best)], self._newest_first()))
        newest = self.newest_valid()
        logger.info("run %s has no best checkpoint, so its latest is taken: %s", self.run_id, newest.path.name)
        return newest

    def _first_valid(self, candidates: Iterable[tuple[str, CheckpointManifest | None]]) -> Resolved:
        failures: list[str] = []
        for artifact, manifest in candidates:
            try:
                checkpoint = self.fetch(artifact, manifest)
            except (CorruptCheckpointError, UnsafeCheckpointError, TrackingError) as error:
                if isinstance(error, TrackingError) and self.artifacts.has(artifact):
                    raise TrackingError(
                        f"{error}; no older checkpoint takes its place: try again once MLflow gives it",
                        error.mlflow_code,
                        code="newest-not-downloaded",
                    ) from error
                logger.warning("skipped: %s", error)
                failures.append(str(error))
                continue
            return self._resolved(checkpoint)
        if not failures:
            raise self._without(LATEST_TAG)
        raise UnresolvedError(
            f"run {self.run_id}: no checkpoint verifies ({len(failures)} tried); the newest: {failures[0]}",
            code="none-verifies-in-run",
        )

    def _newest_first(self) -> Iterator[tuple[str, CheckpointManifest | None]]:
        """Yield the checkpoint that the tag names, without listing any; then the others."""
        if LATEST_TAG not in self.tags:
            raise self._without(LATEST_TAG)
        latest: CheckpointManifest | None = None
        try:
            latest = self.tagged(LATEST_TAG)
            yield latest.path, latest
        except UnresolvedError as error:
            logger.warning("skipped: %s", error)
        for name in self.list_names():
            if latest is None or name != latest.file_name:
                yield f"{ARTIFACT_FOLDER}/{name}", self.manifest_of(name)

    def resolve(self, reference: RunReference) -> Resolved:
        """Return the checkpoint that `reference` names.

        Raises:
            UnresolvedError: there is none such; the message says what there is.
            CorruptCheckpointError: a checkpoint that was named exactly does not verify.
        """
        artifact, manifest = self.locate(reference)
        if artifact is None:
            return self.newest_valid()
        return self._resolved(self.fetch(artifact, manifest))

    def _resolved(self, checkpoint: VerifiedCheckpoint) -> Resolved:
        writer = writer_in(self.tags)
        return Resolved(checkpoint, self.run_id, None if writer is None else writer.token)

    def locate(self, reference: RunReference) -> tuple[str | None, CheckpointManifest | None]:
        """Return artifact path and manifest of an exact reference; (None, None) for the latest, which may fall back.

        Raises:
            UnresolvedError: there is none such.
        """
        if reference.artifact is not None:
            return reference.artifact, self.manifest_of(reference.artifact.rpartition("/")[2])
        if reference.is_latest:
            return None, None
        if reference.which == "best":
            manifest = self.tagged(BEST_TAG)
            return manifest.path, manifest
        assert isinstance(reference.which, int)  # noqa: S101 - nothing else is left
        name = self.at(reference.which)
        return f"{ARTIFACT_FOLDER}/{name}", self.manifest_of(name)


def promoted_names(client: "MlflowClient", run_id: str) -> set[str]:
    """Return file names of the run's checkpoints that versions of registered models were made from.

    Raises:
        TrackingError: MLflow did not answer.
    """
    with mlflow_errors(f"look for registered models of run {run_id}"):
        versions = list(client.search_model_versions(f"run_id = '{run_id}'"))
    names = set()
    for version in versions:
        _, manifest = _checkpoint_of(client, version)
        if manifest is not None:
            names.add(manifest.file_name)
        names.add(str(version.source).rpartition("/")[2])
    return names


def resolve_run(
    reference: RunReference,
    store: Connection,
    *,
    cache_dir: Path,
    reporter: Reporter | None = None,
    prefer_best: bool = False,
) -> Resolved:
    """Fetch the checkpoint of a run; see `RemoteCheckpoints.resolve`.

    Args:
        prefer_best: of a run ID alone, the best.
    """
    run = RemoteCheckpoints(store, reference.run_id, cache_dir, reporter)
    return run.best_valid() if prefer_best and reference.is_bare else run.resolve(reference)


def resolve_model(
    reference: ModelReference, store: Connection, *, cache_dir: Path, reporter: Reporter | None = None
) -> Resolved:
    """Fetch the checkpoint that a registered model's version was made from.

    Raises:
        UnresolvedError: there is no such model, version or alias, or it was not made from a checkpoint.
    """
    client = store.client
    asked = f"models:/{reference.name}" + (f"@{reference.alias}" if reference.alias else f"/{reference.version}")
    try:
        with mlflow_errors(f"read {asked} in {redact(client.tracking_uri)}"):
            version = (
                client.get_model_version_by_alias(reference.name, reference.alias)
                if reference.alias
                else client.get_model_version(reference.name, reference.version)
            )
    except TrackingError as error:
        if not is_missing(error):
            raise
        raise UnresolvedError(_registry_hint(client, reference, asked), code="registered-model-missing") from error
    run_id, manifest = _checkpoint_of(client, version)
    if manifest is not None and run_id:
        run = RemoteCheckpoints(store, run_id, cache_dir, reporter)
        return Resolved(run.fetch(manifest.path, manifest), run_id)
    source = str(version.source).removeprefix("runs:/")
    run_id, _, artifact = source.partition("/")
    if is_run_id(run_id) and parse_name(artifact.rpartition("/")[2]):
        run = RemoteCheckpoints(store, run_id, cache_dir, reporter)
        return run.resolve(RunReference(run_id, artifact=artifact))
    raise UnresolvedError(
        f"{asked} is version {version.version} from {redact(str(version.source))!r}, which is not a checkpoint",
        code="registered-model-no-checkpoint",
    )


def _checkpoint_of(client: "MlflowClient", version: "ModelVersion") -> tuple[str | None, CheckpointManifest | None]:
    """Return run and manifest of a version's checkpoint, from its own tag or that of its logged model."""
    with contextlib.suppress(CheckpointError):
        return version.run_id, CheckpointManifest.from_json(version.tags.get(MODEL_VERSION_TAG, ""))
    model_id = getattr(version, "model_id", None) or str(version.source).removeprefix("models:/")
    if not str(model_id).startswith("m-"):
        return None, None
    try:
        with mlflow_errors(f"read the logged model {model_id}"):
            model = client.get_logged_model(model_id)
        return model.source_run_id, CheckpointManifest.from_json(model.tags.get(MODEL_VERSION_TAG, ""))
    except CheckpointError:
        return None, None
    except TrackingError as error:
        if not error.answered:
            raise
        return None, None


def _registry_hint(client: "MlflowClient", reference: ModelReference, asked: str) -> str:
    try:
        with mlflow_errors(f"read the registered model {reference.name}"):
            model = client.get_registered_model(reference.name)
    except TrackingError as error:
        if not error.answered:
            raise
        with mlflow_errors("search the model registry"):
            models = client.search_registered_models(max_results=_NAMED)
        listed = ", ".join(model.name for model in models) or "none"
        return f"there is no {asked} in {redact(client.tracking_uri)}; registered models: {listed}"
    aliases = ", ".join(f"@{alias}" for alias in model.aliases) or "none"
    return f"there is no {asked}; {reference.name} has the aliases: {aliases}"
