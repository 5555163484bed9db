"""The file of a journal: its lines, and what they come to.

It is only appended to, one line per entry: the CRC-32 of the JSON that follows it, and that JSON. Entries are numbered.
A line of the kind `delivered` says that everything up to its number has arrived; `bound` says which MLflow run has
replaced a provisional run, one that started while the server was away; `lease` gives the token with which the folder's
process takes its run (see `tracking.lease`).
"""

import json
import os
import secrets
import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shufflenet_mlflow.errors import JournalError
from shufflenet_mlflow.runtime.files import open_regular

# The journal was first called spool; files, header and tags keep that name, so that old journals stay readable.
JOURNAL_NAME = "spool.jsonl"
JOURNAL_VERSION = 1

HEADER, DELIVERED, BOUND, LEASE = "spool", "delivered", "bound", "lease"
ABOUT_ITSELF = (HEADER, DELIVERED, BOUND, LEASE)
"""Kinds of lines about the journal itself, which are not sent."""
LONGEST_LINE = 1 << 26
"""Bytes of an entry; the longest hold the names of all classes."""
_MOST_DAMAGED = 10_000
"""Damaged lines that are kept; a journal that a disk has damaged has a few."""
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


def encode(seq: int, run: str, kind: str, body: Mapping[str, Any]) -> bytes:
    text = json.dumps({"seq": seq, "run": run, "kind": kind, "body": body}, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def encode_header(seq: int, run: str = "", uri: str | None = None) -> bytes:
    """Return the first line: the journal's format, its run and the address of its store.

    Args:
        seq: number of the last entry that is no longer in the file.
    """
    return encode(seq, run, HEADER, {"version": JOURNAL_VERSION, "uri": uri})


def decode(line: bytes) -> Entry | None:
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


@dataclass(frozen=True)
class FolderLease:
    """How the last process of a folder takes its run; see `shufflenet_mlflow.tracking.lease`."""

    token: str
    config: str | None = None
    """Digest of the run's options, by which a process that starts again knows the run before there is a checkpoint."""
    iters: int = 0
    """Iteration that it continues from."""
    taken: bool = True
    """It has reached the run; otherwise MLflow was away until it ended."""
    after: str | None = None
    """Token of the run's writer when it began to continue the run; None if that is not known."""

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> "FolderLease":
        """Read a line; a file can hold anything."""
        config, iters, after = body.get("config"), body.get("iters"), body.get("after")
        return cls(
            str(body.get("token")),
            config if isinstance(config, str) else None,
            iters if type(iters) is int else 0,
            body.get("taken") is not False,
            after if isinstance(after, str) else None,
        )


@dataclass
class Content:
    """The content of a journal."""

    uri: str | None = None
    run: str | None = None
    last_seq: int = 0
    delivered: int = 0
    bound: dict[str, str] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)
    lease: "FolderLease | None" = None
    waiting: deque[tuple[int, Entry | None]] = field(default_factory=deque)
    """Offsets of the pending entries, oldest first, with the entries themselves if asked for."""
    end: int = 0
    """Offset behind the last complete line."""
    damaged: list[bytes] = field(default_factory=list)
    missing: int = 0
    """Number of pending entries that no line holds."""


def scan(path: Path, *, keep_entries: bool = False) -> Content:
    """Read a whole journal.

    Raises:
        JournalError: another version of this project wrote it.
    """
    content = Content()
    numbers: deque[int] = deque()
    gaps: list[tuple[int, int]] = []
    has_owner = False
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        while line := file.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE or len(content.damaged) > _MOST_DAMAGED:
                raise JournalError(
                    f"{str(path)!r} is not a journal of this package: remove it, which loses what it holds for MLflow",
                    code="journal-not-ours",
                )
            offset, content.end = content.end, content.end + len(line)
            if not line.endswith(b"\n"):  # the writer was killed
                content.end = offset
                break
            entry = decode(line)
            if entry is None:
                content.damaged.append(line)
            elif entry.kind == HEADER:
                if entry.body.get("version") != JOURNAL_VERSION:
                    raise JournalError(
                        f"the journal {str(path)!r} has format {entry.body.get('version')!r}, and this version reads "
                        f"only format {JOURNAL_VERSION}; upgrade this package",
                        code="journal-format",
                    )
                uri = entry.body.get("uri")
                content.uri, content.run = uri if isinstance(uri, str) else None, entry.run or None
                has_owner = bool(entry.run)
                content.last_seq = content.delivered = max(content.last_seq, entry.seq)
            elif entry.kind == DELIVERED:
                content.delivered = max(content.delivered, entry.seq)
            elif entry.kind == BOUND:
                content.bound[entry.run] = str(entry.body.get("run_id"))
            elif entry.kind == LEASE:
                content.lease = FolderLease.from_body(entry.body)
                content.tokens.append(content.lease.token)
            else:
                if entry.seq > content.last_seq + 1:
                    gaps.append((content.last_seq + 1, entry.seq - 1))
                content.last_seq = max(content.last_seq, entry.seq)
                if not has_owner:  # as earlier versions wrote it
                    content.run = entry.run
                numbers.append(entry.seq)
                content.waiting.append((offset, entry if keep_entries else None))
            while numbers and numbers[0] <= content.delivered:
                numbers.popleft()
                content.waiting.popleft()
    content.missing = sum(max(0, last - max(first, content.delivered + 1) + 1) for first, last in gaps)
    return content


@dataclass(frozen=True)
class Pending:
    """The pending entries of a folder, as read without opening its journal."""

    run_id: str | None
    """The run of the folder; None if it has not been created, or there is no journal."""
    uri: str | None
    entries: tuple[Entry, ...]
    lease: FolderLease | None = None


def read_pending(directory: Path) -> Pending:
    """Return what is pending in a folder, also while another process works there; nothing without a journal.

    Raises:
        JournalError: the journal cannot be read.
    """
    path = directory / JOURNAL_NAME
    if not os.path.isfile(path):  # unlike Path.is_file, never raises
        return Pending(None, None, ())
    try:
        content = scan(path, keep_entries=True)
    except OSError as error:
        raise JournalError(
            f"cannot read the journal {str(path)!r}: {error.strerror}", code="journal-unreadable"
        ) from error
    run = content.bound.get(content.run, content.run) if content.run is not None else None
    run_id = run if run is not None and is_created(run) else None
    entries = tuple(entry for _, entry in content.waiting if entry is not None)
    return Pending(run_id, content.uri, entries, content.lease)
