"""Saving in the background: from a copy, in order, one at a time, with errors reported."""

import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.folders import list_checkpoints
from shufflenet_mlflow.checkpoints.manifest import read_manifest, update_manifest
from shufflenet_mlflow.checkpoints.retention import Retention
from shufflenet_mlflow.checkpoints.staging import StagingBuffer
from shufflenet_mlflow.checkpoints.verification import read_checkpoint, verify_checkpoint
from shufflenet_mlflow.errors import CheckpointError
from shufflenet_mlflow.tracking import store as store_module
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import read_pending
from shufflenet_mlflow.tracking.recorder import Recorder
from shufflenet_mlflow.tracking.store import TrackedMetrics, TrackedStore, lost_checkpoints
from tests.support.payloads import assert_equal_payloads
from tests.support.training import Reporter, run, run_until

# ---------------------------------------------------------------- the copy


def some_state(value: float = 1.0) -> dict[str, Any]:
    weight = torch.full((4, 5), value)
    return {
        "state_dict": {"w": weight, "tied": weight, "part": torch.arange(100.0)[10:20], "none": torch.empty(0)},
        "optimizer_state_dict": {"state": {0: {"momentum_buffer": torch.full((3,), value)}}, "lr": 0.1},
        "rng": torch.get_rng_state(),
    }


def test_the_copy_is_equal_and_stays_so() -> None:
    state = some_state()
    expected = some_state()
    copy = StagingBuffer().take(state)
    for tensor in (state["state_dict"]["w"], state["optimizer_state_dict"]["state"][0]["momentum_buffer"]):
        tensor.add_(1)
    assert_equal_payloads(copy, expected)
    assert copy["state_dict"]["w"] is copy["state_dict"]["tied"]
    assert copy["state_dict"]["part"].untyped_storage().nbytes() == 40


def test_memory_is_reused() -> None:
    buffer = StagingBuffer()
    first = buffer.take(some_state(1))
    address = first["state_dict"]["w"].data_ptr()
    buffer.release()
    second = buffer.take(some_state(2))
    assert second["state_dict"]["w"].data_ptr() == address
    assert_equal_payloads(second, some_state(2))
    buffer.release()
    other = {"state_dict": {"w": torch.ones(7, dtype=torch.int64), "v": torch.zeros(2, 2)}}  # another shape
    assert_equal_payloads(buffer.take(other), other)


def test_one_staged_checkpoint_at_a_time() -> None:
    buffer = StagingBuffer()
    buffer.take(some_state())
    taken = threading.Event()

    def take() -> None:
        buffer.take(some_state(2))
        taken.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert not taken.wait(0.1)
    buffer.release()
    assert taken.wait(5)
    thread.join()


def test_a_state_that_is_not_plain_leaves_the_buffer_free() -> None:
    buffer = StagingBuffer()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"state\['x'\] holds a builtins.object"):
            buffer.take({"w": torch.ones(2), "x": object()})
    buffer.take(some_state())


# ---------------------------------------------------------------- the store


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    journal = Journal(tmp_path / "models")
    recorder = Recorder(journal, "r" * 32, lambda: None)
    yield recorder
    recorder.close()
    journal.close()


def make_store(
    recorder: Recorder, *, continue_on_error: bool = False, reporter: Reporter | None = None
) -> TrackedStore:
    return TrackedStore(
        recorder.journal.directory,
        recorder,
        retention=Retention(),
        continue_on_error=continue_on_error,
        reporter=reporter or Reporter(),
    )


def save(store: TrackedStore, iters: int, size: int = 10) -> Path:
    return store.save({"state_dict": {"w": torch.full((size,), float(iters))}, "loss": 0.5}, iters, "", val_top1=None)


def test_saving_returns_before_the_file_is_there(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    original = store_module.write_prepared

    def slow(*arguments: Any) -> Any:
        gate.wait(5)
        return original(*arguments)

    monkeypatch.setattr(store_module, "write_prepared", slow)
    store = make_store(recorder)
    weights = torch.zeros(10)
    path = store.save({"state_dict": {"w": weights}}, 1, "", val_top1=None)
    weights.fill_(9)  # training goes on
    assert not path.exists()
    gate.set()
    assert store.finish() == path
    assert not read_checkpoint(path)["state_dict"]["w"].any()


def test_in_order_with_the_points_before(recorder: Recorder) -> None:
    store, metrics = make_store(recorder), TrackedMetrics(recorder)
    for iters in range(1, 6):
        metrics.log({"train/loss": iters}, iters)
        save(store, iters)
    store.finish()
    kinds = [
        (entry.kind, entry.body.get("step") or entry.body["record"]["iters"]) for entry in recorder.journal.oldest(99)
    ]
    assert kinds == [(kind, iters) for iters in range(1, 6) for kind in ("metrics", "checkpoint")]


def test_the_best_is_marked_after_it_is_written(recorder: Recorder, tmp_path: Path) -> None:
    store = make_store(recorder)
    path = save(store, 1)
    assert store.mark_best(path, 0.75)
    assert not store.mark_best(tmp_path / "checkpoint-000009.pth.tar", 0.5)
    store.finish()
    manifest = read_manifest(path)
    assert manifest is not None
    assert manifest.val_top1 == 0.75
    assert [entry.body["record"]["val_top1"] for entry in recorder.journal.oldest(9)] == [None, 0.75]


@pytest.mark.parametrize("noted", [None, 0.5])
def test_a_mark_that_was_written_but_not_noted(noted: float | None, recorder: Recorder) -> None:
    """The process was killed between the two, and the checkpoint itself had not been sent yet."""
    store = make_store(recorder)
    path = save(store, 5)
    if noted is not None:
        store.mark_best(path, noted)
    store.finish()
    update_manifest(path, val_top1=0.5)
    again = lost_checkpoints(recorder.journal)
    assert [message.manifest().val_top1 for message in again] == ([0.5] if noted is None else [])


@pytest.fixture
def full_disk() -> Iterator[Callable[[bool], None]]:
    """Return a switch: while it is on, files may not grow beyond 20 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def switch(on: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if on else soft, hard))

    yield switch
    switch(False)


def test_an_error_is_raised_at_the_next_save(recorder: Recorder, full_disk: Callable[[bool], None]) -> None:
    store = make_store(recorder)
    first = save(store, 1)
    recorder.drain()
    full_disk(True)
    save(store, 2, 100_000)
    recorder.drain()
    with pytest.raises(CheckpointError, match="cannot write .*000002.*File too large; earlier checkpoints are intact"):
        save(store, 3)
    assert store.finish() == first
    verify_checkpoint(first)


def test_an_error_is_raised_at_the_end(recorder: Recorder, full_disk: Callable[[bool], None]) -> None:
    store = make_store(recorder)
    full_disk(True)
    save(store, 1, 100_000)
    with pytest.raises(CheckpointError, match="File too large"):
        store.finish()


def test_training_goes_on_if_told_to(recorder: Recorder, full_disk: Callable[[bool], None]) -> None:
    reporter = Reporter()
    store = make_store(recorder, continue_on_error=True, reporter=reporter)
    full_disk(True)
    save(store, 1, 100_000)
    recorder.drain()
    full_disk(False)
    path = save(store, 2, 100_000)
    assert store.finish() == path
    assert [text for text in reporter.warnings if "File too large" in text and "training goes on" in text]
    full_disk(True)
    save(store, 3, 100_000)
    with pytest.raises(CheckpointError, match="File too large"):  # the last one is missing: that is no success
        store.finish()


@pytest.mark.parametrize("continue_on_error", [False, True])
def test_marking_the_best_fails(continue_on_error: bool, recorder: Recorder) -> None:
    reporter = Reporter()
    store = make_store(recorder, continue_on_error=continue_on_error, reporter=reporter)
    path = save(store, 1)
    recorder.drain()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        assert store.mark_best(path, 0.75)
        recorder.drain()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    verify_checkpoint(path)
    assert bool(reporter.warnings) == continue_on_error
    if continue_on_error:
        later = save(store, 2)
        assert store.finish() == later
    else:
        with pytest.raises(
            CheckpointError, match="cannot write the manifest .*File too large; earlier checkpoints are"
        ):
            save(store, 2)


def test_an_unforeseen_error_is_not_swallowed(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(store_module, "write_prepared", broken)
    store = make_store(recorder)
    save(store, 1)
    with pytest.raises(ZeroDivisionError):
        store.finish()


# ---------------------------------------------------------------- in training


def statuses(client: MlflowClient) -> list[str]:
    return [run.info.status for run in client.search_runs([e.experiment_id for e in client.search_experiments()])]


@pytest.mark.parametrize("choice", ["fail", "continue"])
def test_a_disk_that_fills_up_while_training(
    choice: str, images: Path, client: MlflowClient, full_disk: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full from iteration 4 to 9, and every iteration saves a checkpoint."""
    original = store_module.write_prepared

    def write(prepared: Any, directory: Path) -> Any:
        if 4 <= prepared.iters <= 9:
            raise CheckpointError(f"cannot write {prepared.file_name}: No space left on device")
        return original(prepared, directory)

    monkeypatch.setattr(store_module, "write_prepared", write)
    options = ("--save-dir", "models", "--save-interval", 1, "--on-save-error", choice)
    if choice == "fail":
        with pytest.raises(CheckpointError, match="No space left on device"):
            run(images, *options, reporter=Reporter(lambda *_: time.sleep(0.05)))
        assert statuses(client) == ["FAILED"]
        assert max(int(path.name[11:17]) for path in list_checkpoints(Path("models"))) == 3
        return
    reporter = Reporter()
    summary = run(images, *options, reporter=reporter)
    assert len([text for text in reporter.warnings if "No space left" in text]) == 6
    assert statuses(client) == ["FINISHED"]
    assert summary.result.checkpoint == Path("models/bnps-checkpoint-000012.pth.tar")
    assert not read_pending(Path("models")).entries


def test_retention_during_training(images: Path, client: MlflowClient) -> None:
    summary = run(images, "--save-dir", "models", "--save-interval", 1, "--keep-last", 2, "--keep-every", 5)
    left = sorted(path.name for path in list_checkpoints(Path("models")))
    best = client.get_run(str(summary.run_id)).data.tags["checkpoint.best"]
    assert {"bnps-checkpoint-000012.pth.tar", "checkpoint-000012.pth.tar"} < set(left)
    assert {"checkpoint-000005.pth.tar", "checkpoint-000010.pth.tar"} < set(left)
    assert any(name in best for name in left)
    assert len(left) <= 5
    uploaded = {item.path.rpartition("/")[2] for item in client.list_artifacts(str(summary.run_id), "checkpoints")}
    assert uploaded == {part for name in left for part in (name, f"{name}.json")}


@pytest.mark.long
def test_rules_are_inherited_and_can_be_changed_on_resuming(images: Path, client: MlflowClient) -> None:
    def newest() -> tuple[int, int]:
        payload = read_checkpoint(list_checkpoints(Path("models"))[0])
        return payload["iters"], payload["config"]["keep_last"]

    options = ["--save-dir", "models", "--save-interval", 1, "--val-interval", 12]
    stopped = run_until(images, "training", 3, *options, "--keep-last", 1)
    assert (newest(), len(list_checkpoints(Path("models")))) == ((3, 1), 1)
    run_until(images, "training", 5, *options)
    assert (newest(), len(list_checkpoints(Path("models")))) == ((5, 1), 1)
    run(images, *options, "--keep-last", 4)
    assert (newest(), len(list_checkpoints(Path("models")))) == ((12, 4), 4)
    assert "keep_last" in client.get_run(str(stopped.run_id)).data.tags["drift.5"]
