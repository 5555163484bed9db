"""`shufflenet checkpoints`: list, verify, fetch and prune the checkpoints of a folder and its run."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.checkpoints.folders import Resolved, list_checkpoints
from shufflenet_mlflow.checkpoints.glance import Glance, glance
from shufflenet_mlflow.checkpoints.manifest import (
    BEST_TAG,
    LATEST_TAG,
    CheckpointManifest,
    manifest_path,
    read_manifest,
    write_manifest,
)
from shufflenet_mlflow.checkpoints.names import local_name, newest_first, parse_name
from shufflenet_mlflow.checkpoints.references import RunReference, parse_reference
from shufflenet_mlflow.checkpoints.retention import Retention, best_first
from shufflenet_mlflow.checkpoints.verification import has_checksums, open_checkpoint, verify_checkpoint
from shufflenet_mlflow.config import default_cache_dir
from shufflenet_mlflow.errors import CheckpointError, ConfigError, ModelError, TrackingError, UnresolvedError
from shufflenet_mlflow.models.catalog import find_network
from shufflenet_mlflow.runtime.files import write_atomically
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.tracking.client import prepare_environment
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import JOURNAL_NAME, read_pending
from shufflenet_mlflow.tracking.lifecycle import require_active
from shufflenet_mlflow.tracking.names import NETWORK_TAG
from shufflenet_mlflow.tracking.prune import Dropped, choose_dropped, delete, pending_names
from shufflenet_mlflow.tracking.remote_checkpoints import RemoteCheckpoints, promoted_names
from shufflenet_mlflow.tracking.resolve import resolve
from shufflenet_mlflow.tracking.run_ids import complete, read_run
from shufflenet_mlflow.tracking.target import RunTarget, manifest_in_tag
from shufflenet_mlflow.tracking.trust import uri_of_journal

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointLocation:
    """Where checkpoints are: a folder, a run, or a folder with its run."""

    ref: str
    directory: Path | None
    run_id: str | None
    tracking_uri: str | None
    """The store that was asked for."""
    journal_uri: str | None = None
    """The store that the folder's journal names."""

    @cached_property
    def store(self) -> Connection:
        """The store that has the run.

        Raises:
            TrackingError: the user has never named it.
        """
        return Connection(uri_of_journal(self.journal_uri, self.tracking_uri))


def find_location(ref: str, tracking_uri: str | None) -> CheckpointLocation:
    """Return the folder or run that `ref` names.

    Raises:
        UnresolvedError: it names something else, or nothing.
    """
    prepare_environment()
    store = Connection(tracking_uri)
    reference = parse_reference(complete(ref, store))
    if isinstance(reference, RunReference):
        return CheckpointLocation(ref, None, reference.run_id, tracking_uri)
    if not isinstance(reference, Path) or not os.path.isdir(reference):
        raise UnresolvedError(f"{ref!r} is neither a folder of checkpoints nor a run ID", code="not-folder-or-run")
    pending = read_pending(reference)
    return CheckpointLocation(ref, reference, pending.run_id, tracking_uri, pending.uri)


@dataclass(frozen=True)
class CheckpointRow:
    """One checkpoint, on the disk or in the run."""

    file: str
    iters: int
    epoch: int | None
    loss: float | None
    val_top1: float | None
    monitor: str | None
    """The metric that decides which checkpoint is the best; None: `val_top1`."""
    value: float | None
    """That metric's value."""
    bytes: int | None
    sha256: str | None
    local: bool
    remote: bool | None
    """None if that is not known: there is no run, or MLflow does not answer."""
    pending: bool
    """Its upload is pending."""
    latest: bool
    best: bool
    promoted: bool
    """A version of a registered model was made from it."""
    run_id: str | None
    """The run that it belongs to; None without one, or if the file does not say."""
    network: str | None
    """The network that the file names, or the run; None if neither does, so that it can only be resumed from."""

    def to_dict(self) -> dict[str, Any]:
        """Return one entry of `checkpoints ls --json`."""
        return asdict(self)


@dataclass
class _InRun:
    manifests: dict[str, CheckpointManifest | None]
    sizes: Mapping[str, int | None]
    latest: str | None
    best: str | None
    promoted: set[str]
    network: str | None

    def name_of(self, name: str, manifest: CheckpointManifest | None) -> str | None:
        """Return the name in the run of a file on the disk; None if the run has other bytes, or nothing."""
        attempts = [found for found in self.manifests if local_name(found) == local_name(name)]
        for found in attempts:
            recorded = self.manifests[found]
            if recorded is None or manifest is None or recorded.sha256 == manifest.sha256:
                return found
        return None


def _read_from_run(location: CheckpointLocation) -> _InRun:
    assert location.run_id is not None  # noqa: S101 - the caller checks
    remote = RemoteCheckpoints(location.store, location.run_id, default_cache_dir())
    named = {tag: manifest_in_tag(remote.tags, tag) for tag in (LATEST_TAG, BEST_TAG)}
    latest, best = (manifest.file_name if manifest is not None else None for manifest in named.values())
    manifests = {manifest.file_name: manifest for manifest in remote.artifacts.manifests()}
    return _InRun(
        {name: manifests.get(name) for name in remote.list_names()},
        remote.artifacts.sizes(),
        latest,
        best,
        promoted_names(remote.client, location.run_id),
        remote.tags.get(NETWORK_TAG),
    )


def list_rows(ref: str, *, tracking_uri: str | None, reporter: Reporter) -> list[CheckpointRow]:
    """Return the checkpoints of a folder and its run, or of a run; newest first.

    A folder is also listed while its server is away.

    Raises:
        UnresolvedError: there is no such folder or run.
        TrackingError: a run was asked for, and MLflow did not answer.
    """
    location = find_location(ref, tracking_uri)
    in_run: _InRun | None = None
    if location.run_id is not None:
        try:
            in_run = _read_from_run(location)
        except (TrackingError, UnresolvedError) as error:
            if location.directory is None:
                raise
            reporter.warn(f"{error}; checkpoints in the run are not shown")
    paths = {path.name: path for path in list_checkpoints(location.directory)} if location.directory else {}
    manifests = {name: read_manifest(path) for name, path in paths.items()}
    waiting = pending_names(location.directory) if location.directory else set()
    latest, best = _latest_and_best(manifests, in_run)
    names_in_run = {name: in_run.name_of(name, manifests[name]) if in_run else None for name in paths}
    others = set(in_run.manifests if in_run else ()) - set(names_in_run.values())
    # On the disk or not, then the name: an attempt at what is on the disk has the same name without a prefix.
    entries = [*((True, name) for name in paths), *((False, name) for name in others)]
    order = {name: place for place, name in enumerate(newest_first({name for _, name in entries}))}
    rows = []
    for is_local, name in sorted(entries, key=lambda entry: (order[entry[1]], not entry[0])):
        in_run_as = names_in_run[name] if is_local else name
        manifest = manifests[name] if is_local else None
        if manifest is None and in_run is not None and in_run_as is not None:
            manifest = in_run.manifests[in_run_as]
        parsed = parse_name(name)
        known_as = in_run_as if in_run is not None else name
        said = glance(paths[name]) if is_local else Glance(location.run_id, in_run.network if in_run else None)
        size = paths[name].stat().st_size if is_local else in_run.sizes.get(name) if in_run else None
        rows.append(
            CheckpointRow(
                file=name,
                iters=parsed.iters if parsed else 0,
                epoch=manifest.epoch if manifest else None,
                loss=manifest.loss if manifest else None,
                val_top1=manifest.val_top1 if manifest else None,
                monitor=manifest.monitor if manifest else None,
                value=manifest.value if manifest else None,
                bytes=size,
                sha256=manifest.sha256 if manifest else None,
                local=is_local,
                remote=in_run_as is not None if in_run else None,
                pending=is_local and name in waiting,
                latest=known_as is not None and known_as == latest,
                best=known_as is not None and known_as == best,
                promoted=in_run is not None and in_run_as in in_run.promoted,
                run_id=said.run_id,
                network=said.network,
            )
        )
    return rows


def names_network(path: Path) -> bool:
    """Whether a file, or the newest one in a folder, names its network; see `is_known`."""
    newest = list_checkpoints(path)[:1] if os.path.isdir(path) else [path]
    return any(is_known(glance(file).network) for file in newest)


def is_known(network: str | None) -> bool:
    """Whether a network is named and is there, which `eval` and its like need."""
    if network is None:
        return False
    with suppress(ModelError):
        find_network(network)
        return True
    return False


def _latest_and_best(
    manifests: Mapping[str, CheckpointManifest | None], in_run: _InRun | None
) -> tuple[str | None, str | None]:
    """Return the names of the latest and the best checkpoint, from the run or else from the folder."""
    if in_run is not None:
        return in_run.latest, in_run.best
    ranked = best_first([manifest for manifest in manifests.values() if manifest is not None])
    return next(iter(newest_first(manifests)), None), ranked[0].file_name if ranked else None


@dataclass(frozen=True)
class Verdict:
    """Whether one checkpoint is intact."""

    file: str
    ok: bool
    reason: str | None
    """The defect; None if there is none."""
    note: str | None = None
    """Something that could not be checked."""

    def to_dict(self) -> dict[str, Any]:
        """Return one entry of `checkpoints verify --json`."""
        return asdict(self)


def verify_all(ref: str, *, tracking_uri: str | None, cache_dir: Path | None, reporter: Reporter) -> list[Verdict]:
    """Verify one checkpoint, or each one in a folder or a run; those of a run are downloaded for that.

    Raises:
        UnresolvedError: there is nothing to verify.
        TrackingError: MLflow did not answer.
    """
    reference = parse_reference(ref)
    whole_run = isinstance(reference, RunReference) and reference.artifact is None and "@" not in ref
    if not whole_run and not (isinstance(reference, Path) and os.path.isdir(reference)):
        return [_verify_one(ref, tracking_uri, cache_dir)]
    location = find_location(ref, tracking_uri)
    checks = (
        _checks_in_run(location, cache_dir) if location.directory is None else _checks_in_folder(location.directory)
    )
    if not checks:
        raise UnresolvedError(
            f"{ref!r} holds no checkpoints; name the folder that --save-dir named, or models/RUN_ID",
            code="nothing-to-verify",
        )
    verdicts = []
    with reporter.phase("verifying", len(checks)) as phase:
        for name, check in checks.items():
            verdicts.append(_verdict(name, check))
            phase.advance()
    return verdicts


def _verify_one(ref: str, tracking_uri: str | None, cache_dir: Path | None) -> Verdict:
    prepare_environment()
    try:
        path = resolve(ref, tracking_uri=tracking_uri, cache_dir=cache_dir).path
        note = None if has_checksums(path) else "it is readable, but PyTorch's old format has no checksums"
        return Verdict(path.name, True, None, note)
    except CheckpointError as error:
        return Verdict(ref, False, str(error))


def _checks_in_folder(directory: Path) -> dict[str, Callable[[], object]]:
    def check(path: Path) -> Callable[[], object]:
        return lambda: verify_checkpoint(path)

    return {path.name: check(path) for path in list_checkpoints(directory)}


def _checks_in_run(location: CheckpointLocation, cache_dir: Path | None) -> dict[str, Callable[[], object]]:
    assert location.run_id is not None  # noqa: S101 - a location without a folder is a run
    remote = RemoteCheckpoints(location.store, location.run_id, cache_dir or default_cache_dir())

    def check(name: str) -> Callable[[], object]:
        return lambda: remote.verify(name)

    named = (manifest_in_tag(remote.tags, tag) for tag in (LATEST_TAG, BEST_TAG))
    names = {*remote.list_names(), *(manifest.file_name for manifest in named if manifest is not None)}
    return {name: check(name) for name in newest_first(names)}


def _verdict(name: str, check: Callable[[], object]) -> Verdict:
    try:
        check()
    except CheckpointError as error:
        return Verdict(name, False, str(error))
    except TrackingError as error:
        if not error.answered:
            raise
        return Verdict(name, False, str(error))
    return Verdict(name, True, None)


def pull(
    ref: str, *, output: Path | None, tracking_uri: str | None, cache_dir: Path | None, reporter: Reporter
) -> Resolved:
    """Fetch a checkpoint, verified, into the cache folder, and from there into `output`.

    Raises:
        UnresolvedError: there is no such checkpoint, or `output` cannot be written.
        CheckpointError: it does not verify.
        TrackingError: MLflow did not answer.
    """
    prepare_environment()
    resolved = resolve(ref, tracking_uri=tracking_uri, cache_dir=cache_dir, reporter=reporter)
    if output is None:
        return resolved
    target = output / resolved.path.name
    if target.exists() and resolved.path.exists() and target.samefile(resolved.path):
        return resolved
    manifest = read_manifest(resolved.path)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with open(resolved.path, "rb") as source:
            manifest_path(target).unlink(missing_ok=True)
            write_atomically(target, lambda file: shutil.copyfileobj(source, file, 1 << 20))
        if manifest is not None:
            write_manifest(target, manifest)
    except OSError as error:
        raise UnresolvedError(
            f"cannot write {str(target)!r}: {error.strerror}; --output names another folder", code="pull-unwritable"
        ) from error
    return Resolved(open_checkpoint(target, manifest), resolved.run_id)


def prune(ref: str, retention: Retention, *, dry_run: bool, tracking_uri: str | None) -> list[Dropped]:
    """Delete the checkpoints that `retention` drops, in a folder and its run, or in a run; oldest first.

    Raises:
        ConfigError: no --keep option was given.
        UnresolvedError: there is no such folder or run.
        BusyError: a run is being trained in the folder.
        DeletedError: the run, or its experiment, was deleted.
        TrackingError: MLflow did not answer, and only it knows which are promoted.
    """
    if not retention.is_set:
        raise ConfigError(
            "nothing says what to keep; give --keep-last, --keep-best or --keep-every", code="no-keep-rule"
        )
    location = find_location(ref, tracking_uri)
    with _locked(location.directory) if not dry_run else nullcontext():
        target = None
        if location.run_id is not None:
            run = read_run(location.store, location.run_id)
            if not dry_run:
                require_active(location.store.client, run)
            target = RunTarget(location.store.client, location.run_id, location.directory or Path())
        waiting = pending_names(location.directory) if location.directory else ()
        dropped = choose_dropped(location.directory, retention, target=target, waiting=waiting)
        if not dry_run:
            delete(dropped, location.directory, target)
    return dropped


@contextmanager
def _locked(directory: Path | None) -> Iterator[None]:
    """Within the block, keep training runs out of the folder."""
    if directory is None or not (directory / JOURNAL_NAME).exists():
        yield
        return
    journal = Journal(directory)
    try:
        yield
    finally:
        journal.close()
