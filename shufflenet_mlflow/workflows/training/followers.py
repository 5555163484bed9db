"""What the processes of a distributed job have, besides the first one, which writes and tracks for all."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from shufflenet_mlflow.runtime.progress import LoggingReporter, Phase, SilentPhase


class NoStore:
    """Keeps nothing; see `shufflenet_mlflow.training.loop.CheckpointStore`."""

    def save(self, _state: Mapping[str, Any], iters: int, tag: str, *, val_top1: float | None) -> Path:
        """The name of nothing."""
        return Path(f"{tag}{iters}")

    def mark_best(self, _checkpoint: Path, _val_top1: float) -> bool:
        """The leader's answer counts."""
        return True

    def newest(self) -> Path | None:
        """There is none."""
        return None

    def finish(self) -> Path | None:
        """There is none."""
        return None


class NoMetrics:
    """Keeps nothing; see `shufflenet_mlflow.training.loop.MetricSink`."""

    def log(self, values: Mapping[str, float], iters: int) -> None:
        """The leader logs them."""


class QuietReporter(LoggingReporter):
    """Says only what the leader cannot know: which files this process could not read.

    Args:
        rank: this process's number.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def phase(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Phase]:
        """The leader shows it."""
        return SilentPhase()

    def metrics(self, iters: int, values: Mapping[str, float]) -> None:
        """The leader shows them."""

    def note(self, text: str) -> None:
        """The leader says it."""

    def warn(self, text: str) -> None:
        super().warn(f"process {self._rank}: {text}")
