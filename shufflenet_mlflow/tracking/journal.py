"""The journal: what has yet to reach MLflow, on the disk beside the checkpoints.

A process that is killed while it appends leaves half a line at the end, which the next process cuts off. Once all of it
has arrived, a large file is replaced by one with only the header. `tracking.journal_file` has the lines.

Nothing here knows MLflow; `shufflenet_mlflow.tracking.messages` has the meaning of the entries.
"""

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from shufflenet_mlflow.errors import JournalError
from shufflenet_mlflow.runtime.files import open_regular, sync_folder, write_atomically
from shufflenet_mlflow.runtime.locks import FileLock
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.tracking.journal_file import (
    ABOUT_ITSELF,
    BOUND,
    DELIVERED,
    JOURNAL_NAME,
    LEASE,
    Content,
    Entry,
    FolderLease,
    decode,
    encode,
    encode_header,
    scan,
)

logger = logging.getLogger(__name__)

DAMAGED_NAME = "spool.damaged.jsonl"
LOCK_NAME = "spool.lock"
_COMPACT_BYTES = 256 * 1024
_MOST_TOKENS = 20

_CLOSED = -1
"""Takes the place of a closed descriptor, whose number may belong to another file by then."""


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
            write_atomically(self.path, lambda file: file.write(encode_header(0)))
        content = scan(self.path)
        self.uri, self.run, self.bound = content.uri, content.run, content.bound
        self.tokens, self.lease = content.tokens, content.lease
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
        return open_regular(self.path, os.O_RDWR | os.O_APPEND)

    def _keep_damaged_lines(self, content: Content) -> None:
        with open(open_regular(self.directory / DAMAGED_NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
            file.writelines(content.damaged)
        logger.warning(
            "%s: %s damaged, %s missing; damaged lines are kept in %s, the rest is delivered",
            self.path,
            counted(len(content.damaged), "line"),
            counted(content.missing, "entry", "entries"),
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
        # Numbered like the last entry that has arrived, so that the next ones follow without a gap.
        header = encode_header(self._delivered, self.run or "", self.uri)
        bound = (encode(0, key, BOUND, {"run_id": run_id}) for key, run_id in self.bound.items())
        rest = asdict(self.lease) if self.lease is not None else {}
        tokens = (encode(0, "", LEASE, {**rest, "token": token}) for token in self.tokens[-_MOST_TOKENS:])
        return header + b"".join((*bound, *tokens))

    def _rewrite(self) -> None:
        """Replace the journal by one that holds only what is pending."""
        waiting = [entry for entry in self._read(self._cursor) if entry.seq > self._delivered]
        # Renumbered, so that a gap is reported only once.
        waiting = [
            Entry(number, entry.run, entry.kind, entry.body)
            for number, entry in enumerate(waiting, start=self._delivered + 1)
        ]
        lines = [encode(entry.seq, entry.run, entry.kind, entry.body) for entry in waiting]
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
                entry = decode(file.readline())
                if entry is not None and entry.kind not in ABOUT_ITSELF:
                    yield entry

    # ---------------------------------------------------------------- appending

    def append(self, run: str, kind: str, body: Mapping[str, Any]) -> None:
        """Append an entry; it survives this process and, after `sync`, a loss of power.

        On a full disk, nothing is lost while the process lives; see `failure`.

        Raises:
            TypeError, ValueError: the body is not plain data; nothing is appended.
        """
        with self._mutex:
            encode(self._last_seq + 1, run, kind, body)  # before it counts: what cannot be written would stay in front
            self._last_seq += 1
            self._pending += 1
            self._unwritten.append(Entry(self._last_seq, run, kind, body))
            self._write_out()

    def _write_out(self) -> None:
        if self._unwritten and self._noted < self._delivered and not self._note_delivered():
            return
        while self._unwritten:
            entry = self._unwritten[0]
            if not self._write_line(encode(entry.seq, entry.run, entry.kind, entry.body)):
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
        written = self._write_line(encode(self._delivered, "", DELIVERED, {}))
        if written:
            self._noted = self._delivered
        return written

    def _advance_cursor(self) -> None:
        with open(self.path, "rb") as file:
            file.seek(self._cursor)
            while self._cursor < self._end:
                line = file.readline()
                entry = decode(line)
                if entry is not None and entry.kind not in ABOUT_ITSELF and entry.seq > self._delivered:
                    return
                self._cursor += len(line)

    def bind(self, run: str, run_id: str) -> None:
        """Note that MLflow has created the run with the provisional ID `run` as `run_id`."""
        with self._mutex:
            self.bound[run] = run_id
            if self._descriptor == _CLOSED:  # as in `delivered`
                return
            self._write_line(encode(0, run, BOUND, {"run_id": run_id}))
            self.sync()

    def note_lease(self, lease: "FolderLease") -> None:
        """Note how this folder's process takes its run, or that it has taken it."""
        with self._mutex:
            if lease.token not in self.tokens:
                self.tokens.append(lease.token)
            self.lease = lease
            if self._descriptor != _CLOSED:
                self._write_line(encode(0, "", LEASE, asdict(lease)))

    def note_taken(self) -> None:
        """Note that the folder's process has reached its run, and taken it."""
        if self.lease is not None and not self.lease.taken:
            self.note_lease(replace(self.lease, taken=True))

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

    def remove(self) -> None:
        """Close a journal in which nothing is pending, and remove its files, and its folder if that is empty then."""
        with self._mutex:
            # Still locked: a process that has opened the lock's file meanwhile finds that it is gone, and begins again.
            for name in (JOURNAL_NAME, LOCK_NAME):
                (self.directory / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.directory.rmdir()
            os.close(self._descriptor)
            self._lock.release()
            self._descriptor = _CLOSED
