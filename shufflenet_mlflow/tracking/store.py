"""Keep checkpoints and metrics of a training run, on the disk and in MLflow, without delaying the loop."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.folders import list_manifests
from shufflenet_mlflow.checkpoints.manifest import read_manifest, update_manifest
from shufflenet_mlflow.checkpoints.retention import Retention
from shufflenet_mlflow.checkpoints.staging import StagingBuffer
from shufflenet_mlflow.checkpoints.writing import PreparedCheckpoint, prepare_checkpoint, write_prepared
from shufflenet_mlflow.errors import CheckpointError
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.tracking.commit import Checkpoint, pending_checkpoints
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import is_created, read_pending
from shufflenet_mlflow.tracking.messages import MetricPoints, now_ms
from shufflenet_mlflow.tracking.prune import Prune
from shufflenet_mlflow.tracking.recorder import Recorder


class TrackedMetrics:
    """Sends metric points to the run; a point that the run already has is dropped on delivery.

    Args:
        afterwards: values without steps that follow the first ones, because the UI's page for comparing runs opens on
            the metric that was logged first.
    """

    def __init__(self, recorder: Recorder, afterwards: Mapping[str, float] | None = None) -> None:
        self._recorder = recorder
        self._afterwards = dict(afterwards or {})
        self.has_logged = False

    def log(self, values: Mapping[str, float], iters: int) -> None:
        """See `shufflenet_mlflow.training.keeping.MetricSink`."""
        self._record(values, iters)
        if not self.has_logged and self._afterwards:
            self._record(self._afterwards, 0)
        self.has_logged = True

    def _record(self, values: Mapping[str, float], iters: int) -> None:
        plain = {name: float(value) for name, value in values.items()}
        self._recorder.record(MetricPoints(plain, iters, now_ms()))


class TrackedStore:
    """Keeps each checkpoint in `directory` first, then in the run.

    The loop only waits for a copy of the state. Writing, syncing, hashing and sending happen in the background, in
    order. There is memory for one copy: a checkpoint waits until the one before it is on the disk.

    Args:
        continue_on_error: report a checkpoint that cannot be written, and go on without it; otherwise the next
            `save`, or `finish`, raises.
    """

    def __init__(
        self,
        directory: Path,
        recorder: Recorder,
        *,
        retention: Retention,
        continue_on_error: bool,
        reporter: Reporter,
    ) -> None:
        self.directory = directory
        self._recorder = recorder
        self._retention = retention
        self._continue_on_error = continue_on_error
        self._reporter = reporter
        self._buffer = StagingBuffer()
        self._submitted: set[Path] = set()
        self._newest: Path | None = None
        self._failure: CheckpointError | None = None
        self._may_repeat = False

    def save(self, state: Mapping[str, Any], iters: int, tag: str, *, val_top1: float | None) -> Path:
        """See `shufflenet_mlflow.training.keeping.CheckpointStore`.

        Raises:
            CheckpointError: the state is not plain data, or an earlier checkpoint could not be written.
        """
        self._raise_failure()
        run_id = self._recorder.run_id
        prepared = prepare_checkpoint(
            state,
            iters,
            tag,
            val_top1=val_top1,
            run_id=run_id if is_created(run_id) else None,
            as_plain=self._buffer.take,
        )
        self._recorder.do(lambda: self._write(prepared))
        path = self.directory / prepared.file_name
        self._submitted.add(path)
        return path

    def _write(self, prepared: PreparedCheckpoint) -> None:
        try:
            self._buffer.wait_until_copied()
            self._recorder.journal.sync()  # metrics before a checkpoint must be as durable as it is
            path, manifest = write_prepared(prepared, self.directory)
        except CheckpointError as error:
            self._fails(error)
            return
        finally:
            self._buffer.release()
        self._newest, self._failure = path, None
        self._recorder.just_written[path.name] = (manifest.sha256, time.monotonic())
        self._recorder.append(Checkpoint.of(manifest), durable=True)
        if self._retention.is_set:
            rules = self._retention
            self._recorder.append(Prune(rules.keep_last, rules.keep_best, rules.keep_every))

    def _fails(self, error: CheckpointError) -> None:
        self._failure = error
        if self._continue_on_error:
            self._reporter.warn(f"{error}; training goes on")

    def mark_best(self, checkpoint: Path, val_top1: float) -> bool:
        """See `shufflenet_mlflow.training.keeping.CheckpointStore`."""
        if checkpoint not in self._submitted and read_manifest(checkpoint) is None:
            return False

        def mark() -> None:
            try:
                manifest = update_manifest(checkpoint, val_top1=val_top1)
            except CheckpointError as error:
                self._fails(error)
                return
            if manifest is not None:
                self._recorder.append(Checkpoint.of(manifest, again=True), durable=True)

        self._recorder.do(mark)
        return True

    def newest(self) -> Path | None:
        """See `shufflenet_mlflow.training.keeping.CheckpointStore`."""
        self._recorder.drain()
        return self._newest

    def finish(self) -> Path | None:
        """See `shufflenet_mlflow.training.keeping.CheckpointStore`.

        Raises:
            CheckpointError: the last checkpoint could not be written or, unless `continue_on_error`, any of them.
        """
        self._recorder.drain()
        if self._may_repeat and not self._retention.is_set:
            self._may_repeat = False
            self._recorder.append(Prune(None, None, None))
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return self._newest

    def _raise_failure(self) -> None:
        if self._failure is not None and not self._continue_on_error:
            failure, self._failure = self._failure, None
            raise failure

    def deliver_again(self) -> None:
        """Deliver what the journal may not know of; see `lost_checkpoints`.

        From here on, checkpoints may be written that the run already has. `finish` has the earlier ones deleted.
        """
        self._may_repeat = True
        for message in lost_checkpoints(self._recorder.journal):
            self._recorder.record(message)


def lost_checkpoints(journal: Journal) -> list[Checkpoint]:
    """Return messages for checkpoints in a folder that its journal may not know of, oldest first.

    The process may have been killed after writing the newest one, or its accuracy, and before noting it, and a journal
    can lose its end.
    Older ones are sent unless the run has gone past them, and always if lines of the journal were damaged.
    """
    waiting = {found.file_name: found for found in pending_checkpoints(read_pending(journal.directory).entries)}
    manifests = list_manifests(journal.directory)
    return [
        Checkpoint.of(manifest, again=True, unless_passed=manifest != manifests[0] and not journal.was_damaged)
        for manifest in reversed(manifests)
        if waiting.get(manifest.file_name) != manifest
    ]
