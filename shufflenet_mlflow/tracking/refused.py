"""Entries that MLflow has refused for good, kept in a file beside the journal."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shufflenet_mlflow.errors import JournalError, TrackingError
from shufflenet_mlflow.runtime.files import open_regular
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import LONGEST_LINE

REFUSED_NAME = "spool.refused.jsonl"
"""File beside the journal with the entries that MLflow has refused for good."""


def keep_refused(directory: Path, line: Mapping[str, Any]) -> None:
    """Set an entry aside.

    Raises:
        TrackingError: it cannot be written.
    """
    try:
        with open(
            open_regular(directory / REFUSED_NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a", encoding="utf-8"
        ) as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise TrackingError(
            f"{line['reason']}, and it cannot be set aside: {error.strerror}", code="refused-entry-not-kept"
        ) from error


def read_refused(directory: Path) -> list[dict[str, Any]]:
    """Return the entries in `REFUSED_NAME` of a folder, oldest first; lines that cannot be read are left out."""
    entries = []
    for line in _lines(directory / REFUSED_NAME):
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and {"run", "kind", "body"} <= entry.keys():
                entries.append(entry)
    return entries


def _lines(path: Path) -> Iterator[str]:
    with contextlib.suppress(OSError), open(open_regular(path, os.O_RDONLY), "rb") as file:
        while (line := file.readline(LONGEST_LINE + 1)) and len(line) <= LONGEST_LINE:
            yield line.decode("utf-8", "replace")


def take_refused_again(journal: Journal) -> int:
    """Put the entries that MLflow has refused back into the journal; return their number.

    Raises:
        JournalError: the journal cannot be written.
    """
    entries = read_refused(journal.directory)
    for entry in entries:
        journal.append(entry["run"], entry["kind"], entry["body"])
    journal.sync()
    if journal.failure:
        raise JournalError(journal.failure, code="refused-not-taken")
    if entries:  # a process that is killed here sends them twice, harmlessly
        (journal.directory / REFUSED_NAME).unlink()
    return len(entries)
