"""One writer per run: the tag `writer` says which process trains it, in which term.

Whoever begins to train a run adds 1 to the term and writes a token of its own. Before it sends anything, it reads the
tag again: a higher term, or the same with a higher token, means that another process has taken the run over. So the
order of the writers depends on no clock. The tag is renewed in a thread of its own, and kept, as released, at the end.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import psutil

from shufflenet_mlflow.checkpoints.manifest import LATEST_TAG
from shufflenet_mlflow.errors import LostLeaseError, TrackingError
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.messages import now_ms
from shufflenet_mlflow.tracking.names import WRITER_TAG
from shufflenet_mlflow.tracking.target import manifest_in_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

RENEW_SECONDS = 20.0
"""Seconds between two renewals."""
LEASE_SECONDS = 60.0
"""A writer on another machine that has not renewed its lease for this long is gone."""
WATCH_SECONDS = 30.0
"""Enough, longer than `RENEW_SECONDS`, if the clock says that the last renewal is older than a lease."""
LONGEST_WAIT = 180.0
"""Most seconds that an automatic restart waits for the writer before it."""
SETTLE_SECONDS = 1.0
"""Seconds after taking a lease before it is relied on: of two that take it at once, one has overwritten the other."""
TRUST_SECONDS = 2.0
"""Seconds for which the tag is not read again before metrics are sent."""

_held: set[str] = set()
"""Tokens of the leases that this process holds."""


def _machine() -> str:
    """Return an ID of this boot of this machine and, in a container, of its process IDs; process IDs mean it alone."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            text = f"{file.read()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        import uuid

        text = str(uuid.getnode())
    return sha256(text.encode()).hexdigest()[:12]


def _seconds() -> float:
    """Return a time that also runs while this process, or its machine, is suspended."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


@dataclass(frozen=True)
class Writer:
    """The process that writes to a run, as the tag `writer` names it."""

    host: str
    pid: int
    started: int
    """Milliseconds since the epoch, by the writer's clock, as in `renewed`."""
    renewed: int
    term: int = 0
    """Number of the writer: each has a higher one than the one before it."""
    token: str = ""
    machine: str = ""
    """See `_machine`."""
    born: float = 0.0
    """When the process started, since process IDs are used again."""
    released: bool = False

    @classmethod
    def here(cls, token: str, term: int) -> "Writer":
        """Return this process as a writer."""
        now = now_ms()
        born = psutil.Process().create_time()
        return cls(socket.gethostname(), os.getpid(), now, now, term, token, _machine(), born)

    def to_tag(self) -> dict[str, str]:
        """Return the tag."""
        return {WRITER_TAG: json.dumps(asdict(self))}

    @property
    def rank(self) -> tuple[int, str]:
        """Order of writers: the one with the highest rank has the run."""
        return self.term, self.token

    @property
    def age(self) -> float:
        """Seconds since the last renewal, as far as the clocks of both machines agree; negative if they do not."""
        milliseconds = self.renewed * (1000 if self.renewed < 10**11 else 1)
        return (now_ms() - milliseconds) / 1000

    @property
    def is_here(self) -> bool:
        """Whether its process ID means a process of this machine."""
        return self.host == socket.gethostname() and self.machine in ("", _machine())

    @property
    def is_alive(self) -> bool:
        """Whether its process, if it is one of this machine, still runs."""
        if self.pid == os.getpid() and self.token:
            return self.token in _held
        try:
            process = psutil.Process(self.pid)
            again = bool(self.born) and abs(process.create_time() - self.born) > 5
            return not again and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return True

    @property
    def is_free(self) -> bool:
        """Whether it is certain that it writes no more."""
        return self.released or (self.is_here and not self.is_alive)

    @property
    def is_another(self) -> bool:
        """Whether it seems to be at work, and is not this process."""
        is_this = self.is_here and self.pid == os.getpid()
        return not self.is_free and not is_this and (self.is_here or abs(self.age) <= LEASE_SECONDS)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def writer_in(tags: Mapping[str, str]) -> Writer | None:
    """Return the writer that the tag names; None without one, or if someone has edited the tag."""
    try:
        values = json.loads(tags.get(WRITER_TAG, ""))
        known = {name: values[name] for name in Writer.__dataclass_fields__ if name in values}
        writer = Writer(**known)
        numbers = (writer.pid, writer.started, writer.renewed, writer.term)
        return writer if isinstance(writer.host, str) and all(isinstance(n, int | float) for n in numbers) else None
    except (ValueError, TypeError):
        return None


def wait_until_free(
    read: Callable[[], Writer | None], *, is_patient: bool, note: Callable[[str], None], pause: Callable[[], bool]
) -> tuple[Writer | None, bool]:
    """Wait until a run's writer is gone, or it is certain that it is not; its clock is not relied on.

    Args:
        read: read the tag.
        is_patient: wait for a writer that seems to be alive, for at most `LONGEST_WAIT`.
        note: told of a longer wait.
        pause: waits before the tag is read again; returns False to give up.

    Returns:
        The last writer, and whether the run is free.

    Raises:
        TrackingError: the store does not answer.
    """
    began = since = _seconds()
    seen: Writer | None = None
    while True:
        writer = read()
        if writer is None or writer.is_free:
            return writer, True
        now = _seconds()
        if seen is None or (writer.token, writer.renewed) != (seen.token, seen.renewed):
            has_changed, since = seen is not None, now
            if seen is None:
                _announce(writer, is_patient=is_patient, note=note)
            seen = writer
            seems_alive = has_changed or writer.is_here or abs(writer.age) <= LEASE_SECONDS
            if seems_alive and not is_patient:
                return writer, False
        enough = WATCH_SECONDS if writer.age > LEASE_SECONDS else LEASE_SECONDS
        if not writer.is_here and now - since >= enough:
            return writer, True
        if now - began >= LONGEST_WAIT or not pause():
            return writer, False


def _announce(writer: Writer, *, is_patient: bool, note: Callable[[str], None]) -> None:
    if is_patient or (not writer.is_here and abs(writer.age) > LEASE_SECONDS):
        most = LONGEST_WAIT if is_patient else LEASE_SECONDS
        note(f"the run's last writer, {writer}, may still be at work: waiting for up to {most:.0f} s to see")


def pause_for_a_second() -> bool:
    """Wait before the tag is read again."""
    time.sleep(1.0)
    return True


class Lease:
    """This process's right to write to one run; safe to use from several threads.

    Args:
        iters: iteration from which this process continues.
        takes_over: take the run from any other writer.
        after: token of the run's writer when this process began to continue the run; None if that is not known.
    """

    def __init__(self, *, iters: int = 0, takes_over: bool = False, after: str | None = None) -> None:
        self.token = secrets.token_hex(8)
        self.own_tokens: Collection[str] = ()
        """Tokens of this process and of earlier ones in the same folder."""
        self.directory = Path()
        self.iters = iters
        self.takes_over = takes_over
        self.after = after
        self._mutex = threading.RLock()
        self._mine: Writer | None = None
        self._taken = self._checked = 0.0
        self._is_confirmed = False
        self.lost: LostLeaseError | None = None
        """Another process has the run."""

    @property
    def is_taken(self) -> bool:
        """Whether this process has, or had, the run; otherwise the store has not answered yet."""
        return self._mine is not None

    def unclaim(self) -> None:
        """Forget a claim that has not reached the run."""
        with self._mutex:
            self._mine = None
            _held.discard(self.token)

    def claim(self, after: Writer | None) -> dict[str, str]:
        """Return the tag with which this process takes the run.

        Args:
            after: the writer before it.
        """
        with self._mutex:
            self._mine = Writer.here(self.token, 1 if after is None else int(after.term) + 1)
            self._taken, self._is_confirmed = _seconds(), after is None
            _held.add(self.token)
            return self._mine.to_tag()

    def require(self, client: "MlflowClient", run_id: str, *, fresh: bool) -> None:
        """Make sure that this process may write to the run; take it, if the store has not answered before.

        Args:
            fresh: read the tag in any case.

        Raises:
            LostLeaseError: another process has the run.
            TrackingError: the store does not answer.
        """
        with self._mutex:
            if self.lost is not None:
                raise self.lost
            if self._mine is None:
                self._take(client, run_id)
            if not self._is_confirmed:
                time.sleep(max(0.0, self._taken + SETTLE_SECONDS - _seconds()))
            if fresh or not self._is_confirmed or _seconds() - self._checked > TRUST_SECONDS:
                asked = _seconds()
                self.check(client, run_id, _read(client, run_id).data.tags)
                # As old as the question: this process may have been suspended before it looked at the answer.
                self._checked, self._is_confirmed = asked, True

    def check(self, client: "MlflowClient", run_id: str, tags: Mapping[str, str]) -> None:
        """Compare with the run's tags, which were just read.

        Raises:
            LostLeaseError: another process has the run.
            TrackingError: the store does not answer.
        """
        with self._mutex:
            if self.lost is not None:
                raise self.lost
            assert self._mine is not None  # noqa: S101 - `require` takes it
            writer = writer_in(tags)
            if writer is None or writer.token != self.token:
                if writer is not None and writer.rank > self._mine.rank:
                    self._lose(run_id, writer)
                _set(client, run_id, self._mine)  # a late renewal of an earlier writer

    def _take(self, client: "MlflowClient", run_id: str) -> None:
        """Take a run that this process has begun to train without the store's answer."""

        def read() -> Writer | None:
            return writer_in(_read(client, run_id).data.tags)

        writer = read()
        if writer is not None and writer.token not in self.own_tokens and not self.takes_over:
            self._require_no_other(run_id, writer)
            writer, is_free = wait_until_free(read, is_patient=False, note=logger.info, pause=pause_for_a_second)
            self._require_no_other(run_id, writer)
            latest = manifest_in_tag(_read(client, run_id).data.tags, LATEST_TAG)
            if writer is not None and (not is_free or (latest is not None and latest.iters > self.iters)):
                self._lose(run_id, writer)
        self.claim(writer)
        assert self._mine is not None  # noqa: S101 - claimed
        _set(client, run_id, self._mine)
        self._is_confirmed = False

    def _require_no_other(self, run_id: str, writer: Writer | None) -> None:
        """Lose the run if another process has taken it since this one began, even if that one has ended, too."""
        if writer is not None and self.after is not None and writer.token not in (self.after, *self.own_tokens):
            self._lose(run_id, writer)

    def _lose(self, run_id: str, writer: Writer) -> None:
        _held.discard(self.token)
        self.lost = lost_lease(run_id, writer, self.directory)
        raise self.lost

    def renew(self, client: "MlflowClient", run_id: str) -> None:
        """Say that this process is still at work.

        Raises:
            LostLeaseError, TrackingError: as for `check`.
        """
        with self._mutex:
            if self._mine is None:
                return
            self.check(client, run_id, _read(client, run_id).data.tags)
            self._mine = replace(self._mine, renewed=now_ms())
            _set(client, run_id, self._mine)

    def release(self, client: "MlflowClient", run_id: str) -> None:
        """Leave the run to any other process, unless one has taken it.

        Raises:
            TrackingError: the store does not answer.
        """
        with self._mutex:
            self.forget()
            if self._mine is None or self.lost is not None:
                return
            writer = writer_in(_read(client, run_id).data.tags)
            if writer is not None and writer.token == self.token:
                self._mine = replace(self._mine, renewed=now_ms(), released=True)
                _set(client, run_id, self._mine)

    def forget(self) -> None:
        """Let other parts of this process take the run."""
        _held.discard(self.token)


def lost_lease(run_id: str, writer: Writer, directory: Path) -> LostLeaseError:
    """Return the error of a process, or of a folder, whose run has another writer."""
    return LostLeaseError(
        f"run {run_id} has been taken over by {writer}; nothing more is sent to it, and what was trained here, if "
        f"anything, is kept in {str(directory)!r}: `shufflenet train --resume {quote(str(directory))} --new-run "
        "--save-dir OTHER` goes on with it as a run of its own",
        code="run-taken-over",
    )


def _read(client: "MlflowClient", run_id: str) -> "Run":
    with mlflow_errors(f"read run {run_id}"):
        return client.get_run(run_id)


def _set(client: "MlflowClient", run_id: str, writer: Writer) -> None:
    with mlflow_errors(f"set the tag {WRITER_TAG} of run {run_id}"):
        client.set_tag(run_id, WRITER_TAG, writer.to_tag()[WRITER_TAG])


class Renewal:
    """A thread that renews a lease, and says when it is lost.

    Args:
        run_id: returns the run's ID; None until MLflow has created it.
        on_loss: called with the error, in the thread.
    """

    def __init__(
        self,
        client: "MlflowClient",
        lease: Lease,
        run_id: Callable[[], str | None],
        on_loss: Callable[[LostLeaseError], Any],
    ) -> None:
        self._client, self._lease, self._run_id, self._on_loss = client, lease, run_id, on_loss
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="writer lease", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            run_id = self._run_id()
            if run_id is None:
                continue
            try:
                self._lease.renew(self._client, run_id)
            except LostLeaseError as error:
                self._on_loss(error)
                return
            except TrackingError as error:
                logger.debug("%s", error)
            except Exception as error:  # noqa: BLE001 - a renewal that fails is one that is missing, no more
                logger.debug("the lease could not be renewed: %s", type(error).__name__)

    def close(self) -> None:
        """End the thread; a hanging request ends with the process."""
        self._ended.set()
        self._thread.join(timeout=1.0)
