"""Training in this process, as the command line asks for it, with a plug to pull at any moment."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import assert_equal_payloads, small_options, steps
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.cli.train import REQUEST_OPTIONS, train
from shufflenet_mlflow.runtime.progress import LoggingReporter, Phase
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking.system_metrics import PREFIX
from shufflenet_mlflow.workflows.train import TrainSummary, run_training
from shufflenet_mlflow.workflows.training.request import TrainRequest


class Reporter(LoggingReporter):
    """Calls `at(phase, done)` after each unit of each phase: where tests pull the plug."""

    def __init__(self, at: Callable[[str, int], None] = lambda *_: None) -> None:
        self.at = at
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
                reporter.at(name, self.done)

        reporter.at(name, done)
        yield Counting()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def waiting(self, count: int) -> None:
        self.waited.append(count)


def request(images: Path, *arguments: object) -> TrainRequest:
    """What the command line makes of its arguments."""
    words = [str(argument) for argument in (*small_options(images), *arguments)]
    with train.make_context("train", words) as context:
        given = {name: value for name, value in context.params.items() if value is not None}
    given.pop("as_json")
    chosen = {name: given.pop(name) for name in REQUEST_OPTIONS if name in given}
    return TrainRequest(options=given, **chosen)


def run(
    images: Path, *arguments: object, reporter: Reporter | None = None, stop: StopFlag | None = None
) -> TrainSummary:
    return run_training(request(images, *arguments), reporter=reporter or Reporter(), stop=stop or StopFlag())


def run_until(
    images: Path,
    phase: str,
    done: int,
    *arguments: object,
    by: int = signal.SIGTERM,
    at: Callable[[str, int], None] = lambda *_: None,
) -> TrainSummary:
    """Train, and receive a real signal after `done` units of `phase`; `at` as for `Reporter`."""

    def pull(name: str, count: int) -> None:
        at(name, count)
        if (name, count) == (phase, done):
            signal.raise_signal(by)

    with StopFlag() as stop:
        return run(images, *arguments, reporter=Reporter(pull), stop=stop)


def history(client: MlflowClient, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Every metric's points in logged order, but for those that measure time, or the machine on a slow day."""
    return {
        name: [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
        for name in client.get_run(run_id).data.metrics
        if name != "train/images_per_second" and not name.startswith(PREFIX)
    }


def assert_same_end(client: MlflowClient, summary: TrainSummary, uninterrupted: Any) -> None:
    """Bit for bit the same weights, momentum and BN; point for point the same metrics."""
    payload, metrics = uninterrupted
    assert summary.result.checkpoint is not None
    ended = read_checkpoint(summary.result.checkpoint)
    varying = ("run_id", "created_at", "config")
    assert_equal_payloads(
        {key: value for key, value in ended.items() if key not in varying},
        {key: value for key, value in payload.items() if key not in varying},
    )
    found = history(client, summary.run_id)
    # An extra checkpoint at the moment of the interruption has points of its own.
    for name in ("epoch", "loss"):
        of_reference = {step for step, _ in metrics[name]}
        assert len({step for step, _ in found[name]}) == len(found[name])
        found[name] = [point for point in found[name] if point[0] in of_reference]
    assert found == metrics
    throughput = steps(client, summary.run_id, "train/images_per_second")
    assert throughput == [2, 4, 6, 8, 10, 12]
