"""Training in this process with the command line's options, interrupted at any moment."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.cli.train import REQUEST_OPTIONS, train
from shufflenet_mlflow.runtime.progress import LoggingReporter, Phase
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.workflows.train import run_training
from shufflenet_mlflow.workflows.training.request import TrainRequest
from shufflenet_mlflow.workflows.training.run import TrainSummary
from tests.support.command_line import small_options
from tests.support.metrics import history, steps
from tests.support.payloads import assert_equal_payloads


class Reporter(LoggingReporter):
    """A reporter that keeps what it is told, and calls `on_progress(phase, done)` after each unit of each phase."""

    def __init__(self, on_progress: Callable[[str, int], None] = lambda *_: None) -> None:
        self.on_progress = on_progress
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.waited: list[int] = []

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Phase]:
        reporter = self

        class Counting:
            def __init__(self) -> None:
                self.done = done

            def advance(self) -> None:
                self.done += 1
                reporter.on_progress(name, self.done)

        reporter.on_progress(name, done)
        yield Counting()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def waiting(self, count: int) -> None:
        self.waited.append(count)


def request(images: Path, *arguments: object) -> TrainRequest:
    """Return the request that the command line makes of these arguments."""
    words = [str(argument) for argument in (*small_options(images), *arguments)]
    with train.make_context("train", words) as context:
        given = {name: value for name, value in context.params.items() if value is not None}
    given.pop("as_json")
    chosen = {name: given.pop(name) for name in REQUEST_OPTIONS if name in given}
    return TrainRequest(options=given, **chosen)


def run(
    images: Path, *arguments: object, reporter: Reporter | None = None, stop: StopFlag | None = None
) -> TrainSummary:
    """Train on the small images, with these options of `shufflenet train` besides."""
    return run_training(request(images, *arguments), reporter=reporter or Reporter(), stop=stop or StopFlag())


def run_until(
    images: Path,
    phase: str,
    done: int,
    *arguments: object,
    by: int = signal.SIGTERM,
    on_progress: Callable[[str, int], None] = lambda *_: None,
) -> TrainSummary:
    """Train, and receive a real signal after `done` units of `phase`; `on_progress` as for `Reporter`."""

    def interrupt(name: str, count: int) -> None:
        on_progress(name, count)
        if (name, count) == (phase, done):
            signal.raise_signal(by)

    with StopFlag() as stop:
        return run(images, *arguments, reporter=Reporter(interrupt), stop=stop)


def assert_same_end(client: MlflowClient, summary: TrainSummary, uninterrupted: Any) -> None:
    """Compare a run's end with an undisturbed one: every bit of the state, every point of the metrics."""
    payload, metrics = uninterrupted
    assert summary.result.checkpoint is not None
    last = read_checkpoint(summary.result.checkpoint)
    varying = ("run_id", "created_at", "config")
    assert_equal_payloads(
        {key: value for key, value in last.items() if key not in varying},
        {key: value for key, value in payload.items() if key not in varying},
    )
    assert summary.run_id is not None
    found = history(client, summary.run_id)
    # An extra checkpoint at the moment of the interruption has points of its own.
    for name in ("epoch", "loss"):
        expected = {step for step, _ in metrics[name]}
        assert len({step for step, _ in found[name]}) == len(found[name])
        found[name] = [point for point in found[name] if point[0] in expected]
    assert found == metrics
    throughput = steps(client, summary.run_id, "train/images_per_second")
    assert throughput == [2, 4, 6, 8, 10, 12]
