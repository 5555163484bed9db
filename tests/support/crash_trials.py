"""One run that is trained, killed and resumed, and what must be true of it after each kill."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient

from shufflenet_mlflow import get_latest_model
from shufflenet_mlflow.checkpoints import folders
from shufflenet_mlflow.checkpoints.folders import list_checkpoints, list_manifests
from shufflenet_mlflow.checkpoints.manifest import BEST_TAG, LATEST_TAG
from shufflenet_mlflow.checkpoints.retention import Retention
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.runtime.progress import LoggingReporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking import delivery
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.client import connect
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import read_pending
from shufflenet_mlflow.tracking.refused import REFUSED_NAME
from shufflenet_mlflow.tracking.remote_checkpoints import RemoteCheckpoints
from shufflenet_mlflow.tracking.session import TrackingSession
from shufflenet_mlflow.tracking.store import TrackedMetrics, TrackedStore
from shufflenet_mlflow.workflows.message_kinds import MESSAGE_KINDS
from shufflenet_mlflow.workflows.sync import run_sync
from tests.support.forked import Report, fork
from tests.support.metrics import steps

RETENTION = Retention(keep_last=2, keep_best=1, keep_every=7)


def weights_at(iters: int) -> torch.Tensor:
    """Return the weights after so many iterations; large enough that writing them takes a moment."""
    return torch.full((40_000,), float(iters))


def top1_at(iters: int) -> float | None:
    """Return an accuracy that goes up and down, so that the best is not the latest; every third is not validated."""
    return None if iters % 3 == 0 else (iters * 37 % 101) / 101


@contextlib.contextmanager
def store_unreachable() -> Iterator[None]:
    """Refuse every connection to the store, for the rest of this process."""

    def refuse(*_arguments: Any, **_keywords: Any) -> Any:
        raise ConnectionError("Connection refused")

    for name in ("log_batch", "log_text", "set_tag", "set_terminated", "get_run"):
        setattr(MlflowClient, name, refuse)
    delivery.GIVE_UP_SECONDS = 0.0
    yield


@dataclass(frozen=True)
class TrialRun:
    """A run with a folder of checkpoints."""

    directory: Path
    uri: str
    run_id: str

    def train(self, report: Report, iterations: int) -> None:
        """Resume from the newest checkpoint that verifies, as training does; report each saved iteration."""
        _, done = get_latest_model(self.directory)
        journal = Journal(self.directory)
        session = TrackingSession(
            connect(self.uri),
            journal,
            self.run_id,
            kinds=MESSAGE_KINDS,
            is_new=False,
            reporter=LoggingReporter(),
            stop=StopFlag(),
        )
        folders.remove_leftovers(self.directory)
        with session:
            metrics = TrackedMetrics(session.recorder)
            checkpoints = TrackedStore(
                self.directory,
                session.recorder,
                retention=RETENTION,
                continue_on_error=False,
                reporter=LoggingReporter(),
            )
            checkpoints.deliver_again()
            report("started")
            for iters in range(done + 1, done + iterations + 1):
                metrics.log({"train/loss": 1 / iters}, iters)
                path = checkpoints.save(
                    {
                        "state_dict": {"w": weights_at(iters)},
                        "epoch": iters // 5,
                        "loss": 1 / iters,
                        "process": os.getpid(),  # an iteration that is repeated has other bytes
                    },
                    iters,
                    "",
                    val_top1=top1_at(iters),
                )
                if iters % 4 == 0 and top1_at(iters) is None:
                    checkpoints.mark_best(path, 0.5)
                if iters % 2:
                    checkpoints.finish()
                    report(str(iters))
            session.iters = done + iterations
            checkpoints.finish()
            report(str(done + iterations))

    def sync(self, report: Report) -> None:
        """Do the work of `shufflenet sync`."""
        report("started")
        run_sync(self.directory, dry_run=False, tracking_uri=self.uri, reporter=LoggingReporter(), stop=StopFlag())

    def check_after_kill(self, completed: int) -> None:
        """Check what a killed process left: nothing is lost up to iteration `completed`, and tags name valid files."""
        path, iters = get_latest_model(self.directory)
        assert iters >= completed, f"completed {completed}, found {iters}"
        if path is not None:
            assert torch.equal(read_checkpoint(path)["state_dict"]["w"], weights_at(iters))
        remote = RemoteCheckpoints(Connection(self.uri), self.run_id, self.directory / "cache")
        for tag in (LATEST_TAG, BEST_TAG):
            if tag in remote.tags:
                manifest = remote.tagged(tag)
                found = remote.fetch(manifest.path, manifest)  # no other takes its place
                assert torch.equal(found.read()["state_dict"]["w"], weights_at(manifest.iters))

    def check_after_exit(self) -> None:
        """Check what a process that ended by itself left: everything was delivered once, and nothing else remains."""
        assert not read_pending(self.directory).entries
        refused = self.directory / REFUSED_NAME
        assert not refused.exists(), refused.read_text()
        names = {entry.name for entry in self.directory.iterdir() if entry.is_file()}
        local = {path.name for path in list_checkpoints(self.directory)}
        assert names == local | {f"{name}.json" for name in local} | {"spool.jsonl", "spool.lock"}, names
        client = MlflowClient(self.uri)
        artifacts = RunArtifacts(client, self.run_id)
        uploaded = {manifest.file_name: manifest for manifest in artifacts.manifests()}
        assert set(artifacts.sizes()) == set(uploaded) | {f"{name}.json" for name in uploaded}
        local_manifests = [manifest.as_local() for manifest in uploaded.values()]
        assert sorted(local_manifests, key=str) == sorted(list_manifests(self.directory), key=str)
        for name, manifest in uploaded.items():
            data = Path(client.download_artifacts(self.run_id, f"checkpoints/{name}")).read_bytes()
            assert hashlib.sha256(data).hexdigest() == manifest.sha256
        _, newest = get_latest_model(self.directory)
        assert steps(client, self.run_id, "train/loss") == list(range(1, newest + 1))
        assert len(set(steps(client, self.run_id, "loss"))) == len(steps(client, self.run_id, "loss"))
        tags = client.get_run(self.run_id).data.tags
        assert f'"iters": {newest},' in tags["checkpoint.latest"]
        assert "checkpoint.deleting" not in tags
        assert client.get_run(self.run_id).info.status == "FINISHED"
        kept = {manifest.iters for manifest in uploaded.values()}
        assert {newest, newest - 1} <= kept
        assert set(range(7, newest + 1, 7)) <= kept


def create_trial_run(folder: Path) -> TrialRun:
    """Create a run in a folder's store; a child does it, because later children must not inherit connections."""
    uri = f"sqlite:///{folder}/mlflow.db"

    def create(report: Report) -> None:
        client = MlflowClient(uri)
        report(client.create_run(client.create_experiment("crash")).info.run_id)

    [run_id] = fork(create).expect_success()
    return TrialRun(folder / "models", uri, run_id)
