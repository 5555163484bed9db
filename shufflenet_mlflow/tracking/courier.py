"""Deliver what scripts save: a journal that is open, and a thread that empties it, while something is pending.

A call waits for MLflow for a moment. What has not arrived by then arrives later: with a later call, at the end of the
process, or with `shufflenet sync`.
"""

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.checkpoints.manifest import CheckpointManifest
from shufflenet_mlflow.errors import BusyError, JournalError, TrackingError
from shufflenet_mlflow.runtime.deadlines import call_in_flight
from shufflenet_mlflow.runtime.progress import LoggingReporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking.client import connect, uri_of_caller
from shufflenet_mlflow.tracking.delivery import Deliverer, Delivery, tell_what_is_left
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.messages import to_body
from shufflenet_mlflow.tracking.refused import REFUSED_NAME
from shufflenet_mlflow.tracking.target import Message
from shufflenet_mlflow.tracking.trust import remember_store
from shufflenet_mlflow.tracking.uris import is_server, stored_uri, uri_in_force

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from mlflow import MlflowClient

SERVER_SECONDS, STORE_SECONDS = 1.5, 20.0
"""Seconds after which a call no longer waits for a tracking server, or for an embedded store, which is never away.

They count from the beginning of the call, so that writing the file is among them.
"""

LEAST_SECONDS, TELLING_SECONDS = 0.1, 1.0
"""Seconds that a server is waited for if the disk was slow, and after how many its silence is worth a warning."""

END_SECONDS = 10.0
"""Seconds that the end of the process waits for a server that does not answer."""


class Courier:
    """The journal of one folder, and the thread that empties it.

    Args:
        kinds: the messages that may be in the journal, by kind.

    Raises:
        BusyError: another process has the journal open.
        JournalError: it cannot be read or written.
    """

    def __init__(self, directory: Path, client: "MlflowClient", kinds: Mapping[str, type[Any]]) -> None:
        self.uri: str = client.tracking_uri
        self._client = client
        self._patience = SERVER_SECONDS if is_server(self.uri) else STORE_SECONDS
        self.journal = Journal(directory)
        self._deliverer = Deliverer(client, self.journal, kinds)
        self._reporter = LoggingReporter()
        try:
            self.delivery = Delivery(self._deliverer, self._reporter)
        except RuntimeError:  # see `_bring`
            self.journal.close()
            raise
        self._is_slow = False
        """A call has waited in vain, and what it waited for is still pending."""
        self._seen_refusals = 0

    def bring(self, run_id: str, messages: Sequence[Message], manifest: CheckpointManifest, began: float) -> bool:
        """Put messages into the journal, and wait a moment for their delivery.

        Args:
            manifest: of the file that they are about, which was just written.
            began: when the call began that waits, by `time.monotonic`.

        Returns:
            Whether everything has arrived.

        Raises:
            JournalError: it cannot be noted.
            TrackingError: MLflow has refused it.
        """
        if self.journal.pending == 0:
            self._is_slow = False
        _note(self.journal, self.uri, run_id, messages)
        self._deliverer.just_written[manifest.file_name] = (manifest.sha256, time.monotonic())
        refused = self._seen_refusals
        if not self.delivery.reason:  # otherwise the thread is trying already, and has said so
            self.delivery.wake()
            if not self._is_slow:
                left = max(LEAST_SECONDS, began + self._patience - time.monotonic())
                has_ended = self.delivery.wait_briefly(left)
                if not has_ended and left >= TELLING_SECONDS:
                    self._warn_if_slow(left)
        error = self.delivery.error
        if error is not None and _is_definite(error):
            raise error
        self._seen_refusals = len(self._deliverer.refusals)
        for reason in self._deliverer.refusals[refused:]:
            raise TrackingError(
                f"{reason}; kept in {self.journal.directory / REFUSED_NAME}",
                "INVALID_PARAMETER_VALUE",
                code="save-refused",
            )
        return self.journal.pending == 0

    def _warn_if_slow(self, waited: float) -> None:
        if getattr(self._client, "seconds_open", waited) < TELLING_SECONDS:
            return  # MLflow was being imported until now
        call = call_in_flight(self.delivery.thread_id)
        is_upload = call is not None and call[1] > 0  # which may take its time
        if not is_upload:
            self._is_slow = True
            self._reporter.warn(
                f"MLflow has not answered within {waited:.1f} s; training goes on, and it is sent later"
            )

    def finish(self) -> None:
        """Deliver what is left at the end of the process, and say what stays."""
        if self.delivery.error is None or not _is_definite(self.delivery.error):
            with contextlib.suppress(KeyboardInterrupt):
                self.delivery.wait(StopFlag(), give_up=END_SECONDS)
        tell_what_is_left(self.delivery, self._reporter)
        self.close()

    def close(self) -> None:
        """End the thread and close the journal."""
        self.delivery.close()
        self.journal.close()


def _note(journal: Journal, uri: str, run_id: str, messages: Sequence[Message]) -> None:
    """Put messages into a journal.

    Raises:
        JournalError: it cannot be written.
    """
    journal.set_owner(run_id, stored_uri(uri))
    remember_store(uri)
    for message in messages:
        journal.append(run_id, message.kind, to_body(message))
    journal.sync()
    if journal.failure:
        raise JournalError(journal.failure, code="save-not-noted")


def _note_at_the_end(directory: Path, uri: str, run_id: str, messages: Sequence[Message]) -> None:
    """Put messages into the journal when the interpreter ends, and no thread can start that would deliver them."""
    with contextlib.closing(Journal(directory)) as journal:
        _note(journal, uri, run_id, messages)
    logger.warning(
        "the process ends: what was saved last is on the disk, and `shufflenet sync %s` brings it to the run",
        quote(str(directory)),
    )


def _is_definite(error: TrackingError) -> bool:
    """Whether trying again will not help."""
    return error.answered or error.code in ("artifact-folder", "artifact-server-unknown")


_couriers: dict[str, Courier] = {}
"""Folder -> the courier that has something to deliver from there."""
_mutex = threading.RLock()


def _bring(
    directory: Path,
    run_id: str,
    messages: Sequence[Message],
    manifest: CheckpointManifest,
    uri: str | None,
    kinds: Mapping[str, type[Any]],
    began: float,
) -> None:
    """Bring messages as `bring` does.

    Raises:
        RuntimeError: the interpreter ends, and starts no thread any more, as Python does from 3.12 on.
    """
    client = connect(uri, at_once=False)  # what imports MLflow is the thread, which a call need not wait for
    folder = os.path.realpath(directory)
    courier = _couriers.get(folder)
    if courier is not None and courier.uri != client.tracking_uri:
        let_go(directory)
        courier = None
    if courier is None:
        courier = _couriers[folder] = Courier(directory, client, kinds)
    if courier.bring(run_id, messages, manifest, began):
        let_go(directory)


def bring(
    directory: Path,
    run_id: str,
    messages: Sequence[Message],
    manifest: CheckpointManifest,
    *,
    tracking_uri: str | None,
    kinds: Mapping[str, type[Any]],
    began: float | None = None,
) -> None:
    """Bring messages about a file that was just written to its run, now or later.

    Args:
        began: when the call began that waits for it, by `time.monotonic`; None: now.

    Raises:
        TrackingError: MLflow has refused it; or the journal of `directory` cannot be used.
    """
    uri = tracking_uri or uri_of_caller()
    with _mutex:
        try:
            try:
                _bring(directory, run_id, messages, manifest, uri, kinds, time.monotonic() if began is None else began)
            except RuntimeError as error:
                if "interpreter shutdown" not in str(error):
                    raise
                let_go(directory)
                _note_at_the_end(directory, uri_in_force(uri), run_id, messages)
        except (BusyError, JournalError) as error:
            let_go(directory)
            raise TrackingError(
                f"{error}; the checkpoint {manifest.file_name} is on the disk", code="save-not-journaled"
            ) from error
        except TrackingError as error:
            let_go(directory)
            raise TrackingError(
                f"{error}; the checkpoint {manifest.file_name} is on the disk; once that is mended, "
                f"`shufflenet sync {quote(str(directory))}` brings it to the run",
                error.mlflow_code,
                code="save-not-delivered",
            ) from error


def let_go(directory: Path) -> None:
    """Close the journal of a folder, so that something else can deliver it."""
    with _mutex:
        courier = _couriers.pop(os.path.realpath(directory), None)
        if courier is not None:
            courier.close()


def finish_all() -> None:
    """Deliver what is left everywhere."""
    with _mutex:
        while _couriers:
            _couriers.popitem()[1].finish()


# Earlier than `atexit`, whose functions run when thread pools, which uploads use, have ended. What is registered
# later runs before: writers in the background, which import this module, still hand something over.
getattr(threading, "_register_atexit", atexit.register)(finish_all)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_couriers.clear)  # the threads are the parent's
