"""Stand-ins for checkpoints and metrics in the processes of a distributed job that neither write nor track."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class NoStore:
    """Keeps no checkpoints; see `shufflenet_mlflow.training.loop.CheckpointStore`."""

    def save(self, _state: Mapping[str, Any], iters: int, tag: str, *, val_top1: float | None) -> Path:
        """Return a name under which nothing is kept."""
        return Path(f"{tag}{iters}")

    def mark_best(self, _checkpoint: Path, _val_top1: float) -> bool:
        """Return True: the leader's answer counts."""
        return True

    def newest(self) -> Path | None:
        """Return None."""
        return None

    def finish(self) -> Path | None:
        """Return None."""
        return None


class NoMetrics:
    """Keeps no metrics; see `shufflenet_mlflow.training.loop.MetricSink`."""

    def log(self, values: Mapping[str, float], iters: int) -> None:
        """Do nothing: the leader logs them."""
