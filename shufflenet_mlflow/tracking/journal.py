"""The journal: what has yet to reach MLflow, on the disk beside the checkpoints.

The file is only appended to, one line per entry: the CRC-32 of the JSON that follows it, and that JSON. Entries are
numbered. A line of the kind `delivered` says that everything up to its number has arrived; `bound` says which MLflow
run has replaced a provisional run, one that started while the server was away. A process that is killed while it
appends leaves half a line at the end, which the next process cuts off. Once everything has arrived, a large file is
replaced by one with only the header.

Nothing here knows MLflow; `shufflenet_mlflow.tracking.messages` has the meaning of the entries.
"""

import contextlib
import json
import logging
import os
import secrets
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shufflenet_mlflow.errors import JournalError
from shufflenet_mlflow.runtime.files import sync_folder, write_atomically
from shufflenet_mlflow.runtime.locks import FileLock

logger = logging.getLogger(__name__)

# The journal was first called spool; files, header and tags keep that name, so that old journals stay readable.
JOURNAL_NAME = "spool.jsonl"
DAMAGED_NAME = "spool.damaged.jsonl"
LOCK_NAME = "spool.lock"
JOURNAL_VERSION = 1

_HEADER, _DELIVERED, _BOUND = "spool", "delivered", "bound"
_ABOUT_ITSELF = (_HEADER, _DELIVERED, _BOUND)
"""Kinds of lines about the journal itself, which are not sent."""
_COMPACT_BYTES = 256 * 1024

_CLOSED = -1
"""Takes the place of a closed descriptor, whose number may belong to another file by then."""

_PROVISIONAL = "new-"


def new_provisional_id() -> str:
    """Return a provisional ID for a run that MLflow has not created yet."""
    return _PROVISIONAL + secrets.token_hex(16)


def is_created(run: str) -> bool:
    """Whether this is the ID of a run in MLflow, and not a provisional one."""
    return not run.startswith(_PROVISIONAL)


@dataclass(frozen=True)
class Entry:
    """One message that has to reach a run."""

    seq: int
    run: str
    """An MLflow run ID, or a provisional one."""
    kind: str
    body: Mapping[str, Any]


def _encode(seq: int, run: str, kind: str, body: Mapping[str, Any]) -> bytes:
    text = json.dumps({"seq": seq, "run": run, "kind": kind, "body": body}, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decode(line: bytes) -> Entry | None:
    """Return the entry of a line, or None if the line is damaged."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if len(checksum) != 8 or b"%08x" % zlib.crc32(text) != checksum:
        return None
    try:
        values = json.loads(text)
        entry = Entry(**values)
    except (ValueError, TypeError):
        return None
    sound = type(entry.seq) is int and isinstance(entry.body, dict)
    return entry if sound and isinstance(entry.run, str) and isinstance(entry.kind, str) else None


@dataclass
class _Content:
    """The content of a journal."""

    uri: str | None = None
    run: str | None = None
    last_seq: int = 0
    delivered: int = 0
    bound: dict[str, str] = field(default_factory=dict)
    waiting: deque[tuple[int, Entry | None]] = field(default_factory=deque)
    """Offsets of the pending entries, oldest first, with the entries themselves if asked for."""
    end: int = 0
    """Offset behind the last complete line."""
    damaged: list[bytes] = field(default_factory=list)
    missing: int = 0
    """Number of pending entries that no line holds."""


def _scan(path: Path, *, keep_entries: bool = False) -> _Content:
    """Read a whole journal.

    Raises:
        JournalError: another version of this project wrote it.
    """
    content = _Content()
    numbers: deque[int] = deque()
    gaps: list[tuple[int, int]] = []
    with open(path, "rb") as file:
        for line in file:
            offset, content.end = content.end, content.end + len(line)
            if not line.endswith(b"\n"):  # the writer was killed
                content.end = offset
                break
            entry = _decode(line)
            if entry is None:
                content.damaged.append(line)
            elif entry.kind == _HEADER:
                if entry.body.get("version") != JOURNAL_VERSION:
                    raise JournalError(
                        f"the journal {str(path)!r} has format {entry.body.get('version')!r}, and this version reads "
                        f"only format {JOURNAL_VERSION}; upgrade this package",
                        code="journal-format",
                    )
                content.uri, content.run = entry.body.get("uri"), entry.run or None
                content.last_seq = content.delivered = max(content.last_seq, entry.seq)
            elif entry.kind == _DELIVERED:
                content.delivered = max(content.delivered, entry.seq)
            elif entry.kind == _BOUND:
                content.bound[entry.run] = str(entry.body["run_id"])
            else:
                if entry.seq > content.last_seq + 1:
                    gaps.append((content.last_seq + 1, entry.seq - 1))
                content.last_seq = max(content.last_seq, entry.seq)
                content.run = entry.run
                numbers.append(entry.seq)
                content.waiting.append((offset, entry if keep_entries else None))
            while numbers and numbers[0] <= content.delivered:
                numbers.popleft()
                content.waiting.popleft()
    content.missing = sum(max(0, last - max(first, content.delivered + 1) + 1) for first, last in gaps)
    return content


class Journal:
    """The journal of one folder, open for appending and for delivery; safe to use from several threads.

    The folder is locked: one process at a time.

    Args:
        directory: folder of the checkpoints, created if necessary.

    Raises:
        BusyError: another process has it open.
        JournalError: it cannot be read or written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / JOURNAL_NAME
        self._mutex = threading.RLock()
        self._unwritten: deque[Entry] = deque()
        self.failure: str | None = None
        """Why the journal could not be written lately; newer entries are only in memory."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(directory / LOCK_NAME, f"the folder {str(directory)!r}")
            try:
                self._open()
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            raise self._unusable(error) from error

    def _open(self) -> None:
        if not self.path.exists():
            write_atomically(self.path, lambda file: file.write(_encode(0, "", _HEADER, {"version": JOURNAL_VERSION})))
        content = _scan(self.path)
        self.uri, self.run, self.bound = content.uri, content.run, content.bound
        self._last_seq, self._delivered = content.last_seq, content.delivered
        self._noted = content.delivered
        self._pending = len(content.waiting)
        self._end = content.end
        self._cursor = content.waiting[0][0] if content.waiting else content.end
        self._descriptor = self._open_to_append()
        os.ftruncate(self._descriptor, self._end)
        self.was_damaged = bool(content.damaged or content.missing)
        if self.was_damaged:
            self._keep_damaged_lines(content)

    def _open_to_append(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_APPEND | getattr(os, "O_CLOEXEC", 0))

    def _keep_damaged_lines(self, content: _Content) -> None:
        with open(self.directory / DAMAGED_NAME, "ab") as file:
            file.writelines(content.damaged)
        logger.warning(
            "%s: %d lines were damaged and %d entries are missing; damaged lines are kept in %s, the rest is delivered",
            self.path,
            len(content.damaged),
            content.missing,
            DAMAGED_NAME,
        )
        self._rewrite()

    def set_owner(self, run: str, uri: str) -> None:
        """Note the journal's run, by its ID or provisional ID, and the address of its store.

        Raises:
            JournalError: it cannot be written.
        """
        with self._mutex:
            if (self.run, self.uri) != (run, uri):
                self.run, self.uri = run, uri
                try:
                    self._rewrite()
                except OSError as error:
                    raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> JournalError:
        return JournalError(
            f"cannot keep a journal in {str(self.directory)!r}: {error.strerror}; "
            "choose another folder with --save-dir",
            code="journal-unwritable",
        )

    def _header(self) -> bytes:
        body = {"version": JOURNAL_VERSION, "uri": self.uri}
        # Numbered like the last entry that has arrived, so that the next ones follow without a gap.
        header = _encode(self._delivered, self.run or "", _HEADER, body)
        return header + b"".join(_encode(0, key, _BOUND, {"run_id": run_id}) for key, run_id in self.bound.items())

    def _rewrite(self) -> None:
        """Replace the journal by one that holds only what is pending."""
        waiting = [entry for entry in self._read(self._cursor) if entry.seq > self._delivered]
        # Renumbered, so that a gap is reported only once.
        waiting = [
            Entry(number, entry.run, entry.kind, entry.body)
            for number, entry in enumerate(waiting, start=self._delivered + 1)
        ]
        lines = [_encode(entry.seq, entry.run, entry.kind, entry.body) for entry in waiting]
        header = self._header()
        write_atomically(self.path, lambda file: file.writelines([header, *lines]))
        os.close(self._descriptor)
        self._descriptor = self._open_to_append()
        self._last_seq = self._delivered + len(waiting) + len(self._unwritten)
        self._pending = len(waiting) + len(self._unwritten)
        self._cursor, self._end = len(header), len(header) + sum(map(len, lines))

    def _read(self, offset: int) -> Iterator[Entry]:
        """Yield the entries from `offset` on."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            while file.tell() < self._end:
                entry = _decode(file.readline())
                if entry is not None and entry.kind not in _ABOUT_ITSELF:
                    yield entry

    # ---------------------------------------------------------------- appending

    def append(self, run: str, kind: str, body: Mapping[str, Any]) -> None:
        """Append an entry; it survives this process and, after `sync`, a loss of power.

        On a full disk, nothing is lost while the process lives; see `failure`.
        """
        with self._mutex:
            self._last_seq += 1
            self._pending += 1
            self._unwritten.append(Entry(self._last_seq, run, kind, body))
            self._write_out()

    def _write_out(self) -> None:
        if self._unwritten and self._noted < self._delivered and not self._note_delivered():
            return
        while self._unwritten:
            entry = self._unwritten[0]
            if not self._write_line(_encode(entry.seq, entry.run, entry.kind, entry.body)):
                return
            self._unwritten.popleft()

    def _write_line(self, line: bytes) -> bool:
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):
                os.write(self._descriptor, line[written:])
        except OSError as error:
            self._note_failure(error)
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            return False
        self._end += len(line)
        self.failure = None
        return True

    def sync(self) -> None:
        """Make everything appended so far safe from a loss of power."""
        with self._mutex:
            self._write_out()
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                self._note_failure(error)

    def _note_failure(self, error: OSError) -> None:
        self.failure = f"cannot write the journal {str(self.path)!r}: {error.strerror}"

    # ---------------------------------------------------------------- delivery

    @property
    def pending(self) -> int:
        """Number of entries that have not arrived."""
        with self._mutex:
            return self._pending

    def oldest(self, most: int = 1) -> list[Entry]:
        """Return up to `most` pending entries, oldest first."""
        with self._mutex:
            found: list[Entry] = []
            for entry in self._read(self._cursor):
                if len(found) == most:
                    break
                if entry.seq > self._delivered:
                    found.append(entry)
            room = most - len(found)
            return [*found, *list(self._unwritten)[:room]]

    def delivered(self, seq: int) -> None:
        """Note that the entries up to number `seq` have arrived.

        Does nothing once the journal is closed: a hanging request has returned too late, and the next process repeats
        it.
        """
        with self._mutex:
            if self._descriptor == _CLOSED:
                return
            before, self._delivered = self._delivered, seq
            self._pending -= seq - before
            while self._unwritten and self._unwritten[0].seq <= seq:
                self._unwritten.popleft()
            self._note_delivered()
            if self._pending == 0:
                self._cursor = self._end
                if self._end > _COMPACT_BYTES:
                    with contextlib.suppress(OSError):
                        self._rewrite()
            else:
                self._advance_cursor()

    def _note_delivered(self) -> bool:
        """Write the note; if that fails, a later one covers it, or the next process sends the entries again,
        harmlessly."""
        written = self._write_line(_encode(self._delivered, "", _DELIVERED, {}))
        if written:
            self._noted = self._delivered
        return written

    def _advance_cursor(self) -> None:
        with open(self.path, "rb") as file:
            file.seek(self._cursor)
            while self._cursor < self._end:
                line = file.readline()
                entry = _decode(line)
                if entry is not None and entry.kind not in _ABOUT_ITSELF and entry.seq > self._delivered:
                    return
                self._cursor += len(line)

    def bind(self, run: str, run_id: str) -> None:
        """Note that MLflow has created the run with the provisional ID `run` as `run_id`."""
        with self._mutex:
            self.bound[run] = run_id
            if self._descriptor == _CLOSED:  # as in `delivered`
                return
            self._write_line(_encode(0, run, _BOUND, {"run_id": run_id}))
            self.sync()

    def run_id_of(self, run: str) -> str:
        """Return the MLflow run of an entry, or its provisional ID if it has not been created yet."""
        return self.bound.get(run, run)

    def close(self) -> None:
        """Close the journal and unlock the folder."""
        with self._mutex:
            if self._pending == 0:
                with contextlib.suppress(OSError):
                    self._rewrite()
            else:
                self.sync()
            os.close(self._descriptor)
            self._lock.release()
            with contextlib.suppress(OSError):
                sync_folder(self.directory)
            self._descriptor = _CLOSED


@dataclass(frozen=True)
class Pending:
    """The pending entries of a folder, as read without opening its journal."""

    run_id: str | None
    """The run of the folder; None if it has not been created, or there is no journal."""
    uri: str | None
    entries: tuple[Entry, ...]


def read_pending(directory: Path) -> Pending:
    """Return what is pending in a folder, also while another process works there; nothing without a journal.

    Raises:
        JournalError: the journal cannot be read.
    """
    path = directory / JOURNAL_NAME
    if not os.path.isfile(path):  # unlike Path.is_file, never raises
        return Pending(None, None, ())
    try:
        content = _scan(path, keep_entries=True)
    except OSError as error:
        raise JournalError(
            f"cannot read the journal {str(path)!r}: {error.strerror}", code="journal-unreadable"
        ) from error
    run = content.bound.get(content.run, content.run) if content.run is not None else None
    run_id = run if run is not None and is_created(run) else None
    return Pending(run_id, content.uri, tuple(entry for _, entry in content.waiting if entry is not None))
