"""Work on a run in a process of its own, killed at a chosen phase or a random instant, and what must hold afterwards.

Processes are forked from one that has imported everything, so that a trial costs milliseconds.
"""

import contextlib
import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import steps
from mlflow import MlflowClient
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

import shufflenet_mlflow.checkpoints.writing as write_module
from shufflenet_mlflow import get_latest_model
from shufflenet_mlflow.checkpoints.folders import list_checkpoints, list_manifests, remove_leftovers
from shufflenet_mlflow.checkpoints.retention import Retention
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.runtime.progress import LoggingReporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking import delivery, prune, store
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.client import connect
from shufflenet_mlflow.tracking.journal import Journal, read_pending
from shufflenet_mlflow.tracking.resolve import resolve
from shufflenet_mlflow.tracking.session import TrackingSession
from shufflenet_mlflow.tracking.store import TrackedMetrics, TrackedStore
from shufflenet_mlflow.workflows.sync import run_sync

RULES = Retention(keep_last=2, keep_best=1, keep_every=7)

PHASES: dict[str, tuple[Any, str]] = {
    "save: half written": (write_module._HashingWriter, "write"),
    "save: read back": (write_module, "sha256_of"),
    "save: synced": (os, "fsync"),
    "save: renamed": (os, "replace"),
    "save: manifest written": (write_module, "write_manifest"),
    "save: written": (store, "write_prepared"),
    "journal: a line": (Journal, "_write_line"),
    "journal: delivered": (Journal, "delivered"),
    "journal: written anew": (Journal, "_rewrite"),
    "upload: file": (RunArtifacts, "put_file"),
    "upload: confirmed": (RunArtifacts, "upload"),
    "upload: manifest": (RunArtifacts, "write_manifest"),
    "tag: committed, with metrics": (MlflowClient, "log_batch"),
    "tag: set": (MlflowClient, "set_tag"),
    "tag: cleared": (MlflowClient, "delete_tag"),
    "prune: chosen": (prune, "choose_dropped"),
    "prune: in the run": (RunArtifacts, "delete"),
    "prune: one artifact": (LocalArtifactRepository, "delete_artifacts"),
    "prune: on the disk": (prune, "delete_checkpoint"),
    "prune: unlinked": (Path, "unlink"),
    "resume: opened": (Journal, "set_owner"),
    "resume: tidied": (sys.modules[__name__], "remove_leftovers"),
    "resume: newest again": (TrackedStore, "deliver_again"),
    "end: run": (MlflowClient, "set_terminated"),
    "end: journal": (Journal, "close"),
}


def pull_the_plug(phase: str, nth: int, *, after: bool) -> None:
    """From now on this process is killed at the `nth` call of that phase, before or after it."""
    owner, name = PHASES[phase]
    original = getattr(owner, name)
    count = 0

    def call(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        if count == nth and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **keywords)
        if count == nth and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)


@dataclass
class Child:
    """A forked process; what it writes to `tell` can be read here."""

    pid: int
    pipe: int

    def wait(self) -> tuple[int, list[str]]:
        """Its status as `os.waitpid` has it, and the lines it told."""
        chunks = []
        while chunk := os.read(self.pipe, 65536):
            chunks.append(chunk)
        os.close(self.pipe)
        _, status = os.waitpid(self.pid, 0)
        return status, b"".join(chunks).decode().splitlines()


def fork(work: Callable[[Callable[[str], None]], None]) -> Child:
    """Do `work(tell)` in a child; status 0 if it returns, 1 if it raises, and then its lines are the traceback."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Child(pid, reading)
    status = 1
    try:
        os.close(reading)

        def tell(text: str) -> None:
            os.write(writing, text.encode() + b"\n")

        try:
            work(tell)
            status = 0
        except Exception:  # noqa: BLE001 - the parent shows it
            tell(traceback.format_exc())
    finally:
        os._exit(status)


def value_at(iters: int) -> torch.Tensor:
    """What the state holds after so many iterations: of some size, so that writing it takes a moment."""
    return torch.full((40_000,), float(iters))


def top1_at(iters: int) -> float | None:
    """Goes up and down, so that the best is not the latest; some states are not validated."""
    return None if iters % 3 == 0 else (iters * 37 % 101) / 101


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Nothing reaches the store."""

    def away(*_arguments: Any, **_keywords: Any) -> Any:
        raise ConnectionError("Connection refused")

    for name in ("log_batch", "log_text", "set_tag", "set_terminated", "get_run"):
        setattr(MlflowClient, name, away)
    delivery.GIVE_UP_SECONDS = 0.0
    yield


def make_workplace(folder: Path) -> "Workplace":
    """A new run in a folder's store. A child makes it: connections to the store must not pass to later children."""
    uri = f"sqlite:///{folder}/mlflow.db"

    def make(tell: Callable[[str], None]) -> None:
        client = MlflowClient(uri)
        tell(client.create_run(client.create_experiment("crash")).info.run_id)

    _, [run_id] = fork(make).wait()
    return Workplace(folder / "models", uri, run_id)


@dataclass(frozen=True)
class Workplace:
    """One run that is trained, killed and continued again and again."""

    directory: Path
    uri: str
    run_id: str

    def train(self, tell: Callable[[str], None], iterations: int) -> None:
        """Continue the run as training does: from the newest checkpoint that verifies."""
        _, done = get_latest_model(self.directory)
        journal = Journal(self.directory)
        session = TrackingSession(
            connect(self.uri), journal, self.run_id, is_new=False, reporter=LoggingReporter(), stop=StopFlag()
        )
        remove_leftovers(self.directory)
        with session:
            metrics = TrackedMetrics(session.recorder)
            kept = TrackedStore(
                self.directory, session.recorder, retention=RULES, continue_on_error=False, reporter=LoggingReporter()
            )
            kept.deliver_again()
            tell("started")
            for iters in range(done + 1, done + iterations + 1):
                metrics.log({"train/loss": 1 / iters}, iters)
                path = kept.save(
                    {"state_dict": {"w": value_at(iters)}, "epoch": iters // 5, "loss": 1 / iters},
                    iters,
                    "",
                    val_top1=top1_at(iters),
                )
                if iters % 4 == 0 and top1_at(iters) is None:
                    kept.mark_best(path, 0.5)
                if iters % 2:
                    kept.finish()
                    tell(str(iters))
            session.iters = done + iterations
            kept.finish()
            tell(str(done + iterations))

    def sync(self, tell: Callable[[str], None]) -> None:
        """What `shufflenet sync` does."""
        tell("started")
        run_sync(self.directory, dry_run=False, tracking_uri=self.uri, reporter=LoggingReporter(), stop=StopFlag())

    # ---------------------------------------------------------------- what must hold

    def check_after_kill(self, completed: int) -> None:
        """At once, with everything as the killed process left it."""
        path, iters = get_latest_model(self.directory)
        assert iters >= completed, f"completed {completed}, found {iters}"
        if path is not None:
            assert torch.equal(read_checkpoint(path)["state_dict"]["w"], value_at(iters))
        client = MlflowClient(self.uri)
        tags = client.get_run(self.run_id).data.tags
        for which in ("latest", "best"):
            if f"checkpoint.{which}" in tags:
                found = resolve(
                    f"runs:/{self.run_id}@{which}", tracking_uri=self.uri, cache_dir=self.directory / "cache"
                )
                assert torch.equal(read_checkpoint(found.path)["state_dict"]["w"], value_at(found.iters))

    def check_at_rest(self) -> None:
        """After a process that ended by itself: all is delivered, once, and nothing is left lying about."""
        assert not read_pending(self.directory).entries
        refused = self.directory / delivery.REFUSED_NAME
        assert not refused.exists(), refused.read_text()
        names = {entry.name for entry in self.directory.iterdir() if entry.is_file()}
        local = {path.name for path in list_checkpoints(self.directory)}
        assert names == local | {f"{name}.json" for name in local} | {"spool.jsonl", "spool.lock"}, names
        client = MlflowClient(self.uri)
        artifacts = RunArtifacts(client, self.run_id)
        there = {manifest.file_name: manifest for manifest in artifacts.manifests()}
        assert set(artifacts.sizes()) == set(there) | {f"{name}.json" for name in there}
        assert there == {manifest.file_name: manifest for manifest in list_manifests(self.directory)}
        for name, manifest in there.items():
            data = (Path(artifacts._local_folder() or "") / "checkpoints" / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == manifest.sha256
        _, newest = get_latest_model(self.directory)
        assert steps(client, self.run_id, "train/loss") == list(range(1, newest + 1))
        assert len(set(steps(client, self.run_id, "loss"))) == len(steps(client, self.run_id, "loss"))
        tags = client.get_run(self.run_id).data.tags
        assert f'"iters": {newest},' in tags["checkpoint.latest"]
        assert "checkpoint.deleting" not in tags
        assert client.get_run(self.run_id).info.status == "FINISHED"
        kept = {manifest.iters for manifest in there.values()}
        assert {newest, newest - 1} <= kept
        assert set(range(7, newest + 1, 7)) <= kept


def kill_after(child: Child, seconds: float) -> None:
    """From outside, at an instant that nobody chose."""
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)
