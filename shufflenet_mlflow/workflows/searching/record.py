"""The record of a search, in its folder: its plan, and every candidate's score, on the disk before it is acted on.

`search.json` holds the plan, and `candidates.jsonl` a line for each candidate, in the order in which they were drawn.
A process that is killed while it appends leaves half a line, which the next one cuts off; that candidate is scored
again, with the same result.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shufflenet_mlflow.config import option
from shufflenet_mlflow.config.search import SearchPlan
from shufflenet_mlflow.errors import ConfigError, ModelError, SearchError
from shufflenet_mlflow.models.search_space import genes_in
from shufflenet_mlflow.runtime.files import open_regular, write_atomically
from shufflenet_mlflow.tracking.names import CANDIDATES_FILE
from shufflenet_mlflow.workflows.searching.evolution import Candidate, Scored

PLAN_FILE = "search.json"
FORMAT = 1

_IMAGES = {"bn_digest": "training images", "score_digest": "held-out images"}


class Record:
    """The record of one search. The caller holds the lock of the folder.

    Args:
        folder: exists.

    Raises:
        ConfigError: the folder has a search of another plan.
        SearchError: what it holds cannot be read.
    """

    def __init__(self, folder: Path, plan: SearchPlan) -> None:
        self.folder = folder
        self._path = folder / CANDIDATES_FILE
        before = read_plan(folder)
        if before is None:
            content = json.dumps({"format": FORMAT, "plan": plan.to_dict()}, indent=2)
            write_atomically(folder / PLAN_FILE, lambda file: file.write(content.encode()))
        elif before != plan:
            raise _differs(folder, before, plan)
        self.scored = self._read()
        """All candidates so far, in the order in which they were drawn."""

    def _read(self) -> list[Scored]:
        try:
            return [scored_of(json.loads(line)) for line in complete_lines(self._path)]
        except (ValueError, TypeError, KeyError, AttributeError, ModelError) as error:
            raise SearchError(
                f"{str(self._path)!r} is damaged ({type(error).__name__}: {error}); remove the folder "
                f"{str(self.folder)!r}, which begins the search anew",
                code="search-record-damaged",
            ) from error

    def matches(self, number: int, candidate: Candidate) -> bool:
        """Whether the candidate with this number has been scored.

        Raises:
            SearchError: it was another one then.
        """
        if number >= len(self.scored):
            return False
        known = self.scored[number]
        if (known.place, known.genes) != (candidate.place, candidate.genes):
            raise SearchError(
                f"{str(self._path)!r} has another candidate in line {number + 1} than this version of the package "
                f"draws; remove the folder {str(self.folder)!r}, or go on with the version that began the search",
                code="search-record-differs",
            )
        return True

    def append(self, scored: Scored) -> None:
        """Write a score down; it is on the disk on return.

        Raises:
            SearchError: it cannot be written.
        """
        append_line(self._path, line_of(scored))
        self.scored.append(scored)


def complete_lines(path: Path) -> list[bytes]:
    """Return the lines of a record, without half a line at its end, which is cut off; none if there is no file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        os.truncate(path, len(complete))
    return complete.splitlines()


def append_line(path: Path, content: Mapping[str, Any]) -> None:
    """Append a line to a record; it is on the disk on return.

    Raises:
        SearchError: it cannot be written.
    """
    line = f"{json.dumps(content)}\n".encode()
    try:
        descriptor = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(28, "the disk is full")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SearchError(
            f"cannot write {str(path)!r}: {error.strerror}; the same command goes on",
            code="search-record-unwritable",
        ) from error


def read_plan(folder: Path) -> SearchPlan | None:
    """Return the plan of the search in a folder; None if there is none.

    Raises:
        SearchError: it cannot be read.
    """
    path = folder / PLAN_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        return SearchPlan.from_dict(content["plan"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SearchError(
            f"{str(path)!r} is no plan of a search that this version reads ({error}); --save-dir names another folder",
            code="search-plan-unreadable",
        ) from error


def line_of(scored: Scored) -> dict[str, Any]:
    """Return what the record says of a candidate."""
    return {
        "generation": scored.generation,
        "index": scored.index,
        **scored.options,
        "macs": scored.macs,
        "correct": scored.correct,
        "images": scored.images,
        "score": scored.score,
    }


def scored_of(line: Any) -> Scored:
    """Return the candidate that a line of the record describes; the inverse of `line_of`."""
    numbers = [int(line[name]) for name in ("macs", "correct", "images")]
    return Scored(int(line["generation"]), int(line["index"]), genes_in(line), *numbers)


def _differs(folder: Path, before: SearchPlan, now: SearchPlan) -> ConfigError:
    names = before.differences(now)
    if "supernet" in names:
        return ConfigError(
            f"--save-dir {str(folder)!r} has the search of another supernet; name another folder",
            code="search-supernet-differs",
        )
    if set(names) <= _IMAGES.keys():
        images = " and ".join(_IMAGES[name] for name in names)
        return ConfigError(
            f"the {images} are not those that the search in {str(folder)!r} began with; put them back, or name another "
            "--save-dir",
            code="search-images-changed",
        )
    changes = ", ".join(
        f"{option(name)} ({getattr(before, name)} -> {getattr(now, name)})" for name in names if name not in _IMAGES
    )
    return ConfigError(
        f"the search in {str(folder)!r} began with other options: {changes}; leave them as they were, or "
        "name another --save-dir",
        code="search-differs",
    )
