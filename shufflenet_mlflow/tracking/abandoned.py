"""Runs that MLflow shows as RUNNING although the process that trained them is gone."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from shufflenet_mlflow.errors import TrackingError
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.lease import LEASE_SECONDS, Writer, pause_for_a_second, wait_until_free, writer_in

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUNNING = "RUNNING"
WriterState = Literal["alive", "silent", "gone"]


def writer_state(run: "Run") -> WriterState | None:
    """Return what a running run's tag says of its writer; None if the run has ended, or names no writer.

    `gone`: it has released the run, or was a process of this machine that has ended. `silent`: it is on another
    machine, and by this machine's clock its last renewal is older than a lease.
    """
    writer = writer_in(run.data.tags)
    if run.info.status != RUNNING or writer is None:
        return None
    if writer.is_free:
        return "gone"
    return "silent" if not writer.is_here and abs(writer.age) > LEASE_SECONDS else "alive"


def status_in_words(run: "Run") -> str:
    """Return the run's status, with a remark if it is RUNNING and its writer does not seem to be at work."""
    state = writer_state(run)
    return str(run.info.status) + (f" (writer {state})" if state in ("silent", "gone") else "")


def require_abandoned(client: "MlflowClient", run_id: str, *, note: Callable[[str], None]) -> Writer | None:
    """Return the writer of a running run once it is certain to be gone; None if the run has ended.

    Args:
        note: told if that takes a while.

    Raises:
        TrackingError: the writer is at work, or is not known, or the store does not answer.
    """
    run = _read(client, run_id)
    if run.info.status != RUNNING:
        return None
    if writer_in(run.data.tags) is None:
        raise TrackingError(
            f"run {run_id} does not say which process trains it, so it may still be at work; "
            f"`MlflowClient().set_terminated({run_id!r}, 'KILLED')` in Python ends it all the same",
            code="run-without-writer",
        )
    writer, is_free = wait_until_free(
        lambda: writer_in(_read(client, run_id).data.tags), is_patient=False, note=note, pause=pause_for_a_second
    )
    if writer is not None and not is_free:
        raise TrackingError(
            f"run {run_id} is being trained by {writer}, last seen {max(0.0, writer.age):.0f} s ago; stop it there, or "
            "wait until it has been silent for a minute",
            code="run-still-trained",
        )
    return writer


def end_abandoned(client: "MlflowClient", run_id: str, writer: Writer) -> None:
    """Set the run's status to KILLED, as of the last sign of its writer.

    The tag stays as it is: what the writer's folder holds can still be sent.

    Raises:
        TrackingError: another process has begun to train it, or the store does not answer.
    """
    run = _read(client, run_id)
    if run.info.status != RUNNING:
        return
    if not _is_writer(run, writer):
        raise _taken(run_id)
    with mlflow_errors(f"end run {run_id}"):
        client.set_terminated(run_id, "KILLED", max(writer.renewed, run.info.start_time))
        if not _is_writer(client.get_run(run_id), writer):  # it was resumed at this very moment
            client.update_run(run_id, RUNNING)
            raise _taken(run_id)


def _is_writer(run: "Run", writer: Writer) -> bool:
    current = writer_in(run.data.tags)
    return current is not None and (current.token, current.renewed) == (writer.token, writer.renewed)


def _taken(run_id: str) -> TrackingError:
    return TrackingError(
        f"run {run_id} was taken up by another process just now; it is left as it is", code="run-resumed-meanwhile"
    )


def _read(client: "MlflowClient", run_id: str) -> "Run":
    with mlflow_errors(f"read run {run_id}"):
        return client.get_run(run_id)
