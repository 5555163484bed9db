"""Moments of a training run at which a process can be made to kill itself."""

import fnmatch
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from shufflenet_mlflow.checkpoints import folders, writing
from shufflenet_mlflow.tracking import prune, store
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import JOURNAL_NAME
from shufflenet_mlflow.tracking.store import TrackedStore

CHECKPOINT = "*checkpoint-*.pth.tar*"
"""Pattern of a checkpoint file's name, and of its temporary name."""


@dataclass(frozen=True)
class CrashPoint:
    """Calls of the function `name` of `owner`."""

    owner: Any
    name: str
    file: str = "*"
    """Pattern of the names of the files that count, for functions of `os` whose last path or first descriptor it is."""

    def counts(self, arguments: tuple[Any, ...]) -> bool:
        """Whether a call with these arguments is one of the point's."""
        if self.owner is not os:
            return True
        target = arguments[1] if self.name == "replace" else os.readlink(f"/proc/self/fd/{arguments[0]}")
        return fnmatch.fnmatch(Path(target).name, self.file)


CRASH_POINTS = {
    "save: half written": CrashPoint(torch, "save"),
    "save: read back": CrashPoint(writing, "sha256_of"),
    "save: synced": CrashPoint(os, "fsync", CHECKPOINT),
    "save: renamed": CrashPoint(os, "replace", CHECKPOINT),
    "save: manifest written": CrashPoint(writing, "write_manifest"),
    "save: written": CrashPoint(store, "write_prepared"),
    "journal: appended": CrashPoint(os, "write", JOURNAL_NAME),
    "journal: synced": CrashPoint(os, "fsync", JOURNAL_NAME),
    "journal: delivered": CrashPoint(Journal, "delivered"),
    "journal: rewritten": CrashPoint(os, "replace", JOURNAL_NAME),
    "upload: file": CrashPoint(RunArtifacts, "put_file"),
    "upload: confirmed": CrashPoint(RunArtifacts, "upload"),
    "upload: manifest": CrashPoint(RunArtifacts, "write_manifest"),
    "tag: committed, with metrics": CrashPoint(MlflowClient, "log_batch"),
    "tag: set": CrashPoint(MlflowClient, "set_tag"),
    "tag: cleared": CrashPoint(MlflowClient, "delete_tag"),
    "prune: chosen": CrashPoint(prune, "choose_dropped"),
    "prune: in the run": CrashPoint(RunArtifacts, "delete"),
    "prune: one artifact": CrashPoint(LocalArtifactRepository, "delete_artifacts"),
    "prune: on the disk": CrashPoint(prune, "delete_checkpoint"),
    "prune: unlinked": CrashPoint(Path, "unlink"),
    "resume: opened": CrashPoint(Journal, "set_owner"),
    "resume: leftovers removed": CrashPoint(folders, "remove_leftovers"),
    "resume: newest delivered again": CrashPoint(TrackedStore, "deliver_again"),
    "end: run": CrashPoint(MlflowClient, "set_terminated"),
    "end: journal": CrashPoint(Journal, "close"),
}


class _CountedWrites:
    """A file for `torch.save`, each of whose writes is counted."""

    def __init__(self, file: Any, count: Callable[..., Any]) -> None:
        self._file, self._count = file, count

    def write(self, data: bytes) -> Any:
        return self._count(self._file.write, data)

    def flush(self) -> None:
        self._file.flush()


def kill_at(point: str, nth: int, *, after: bool) -> None:
    """From now on, kill this process at the `nth` call of a crash point, before or after the call."""
    crash_point = CRASH_POINTS[point]
    original = getattr(crash_point.owner, crash_point.name)
    calls = 0

    def count(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        kills = calls == nth
        if kills and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **keywords)
        if kills and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def call(*arguments: Any, **keywords: Any) -> Any:
        if crash_point.owner is torch:  # the writes of one call count, not the call
            payload, file = arguments
            return original(payload, _CountedWrites(file, count))
        if not crash_point.counts(arguments):
            return original(*arguments, **keywords)
        return count(original, *arguments, **keywords)

    setattr(crash_point.owner, crash_point.name, call)
