"""How a training run ended."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainResult:
    """How a training run ended."""

    iters: int
    epoch: int
    loss: float
    validation: Mapping[str, float]
    """Metrics of the last validation; empty if there was none."""
    best: Mapping[str, Any] | None
    """`val_top1` and `iters` of the best validation."""
    checkpoint: Path | None
    """The last checkpoint; None if it was stopped before the first iteration."""
    stopped_by: int | None = None
    """The signal that ended the run early."""
    ended_by_patience: bool = False
    """It ended early because validation did not get better; see `TrainConfig.patience`."""
    stop_reason: str = ""
    """Reason that a callback gave for ending it early; see `Trainer.stop`."""
    pause_reason: str = ""
    """Reason for stopping it here, to go on another time; see `Trainer.pause`."""

    @property
    def val_top1(self) -> float | None:
        """Accuracy of the last validation; None if there was none."""
        return self.validation.get("val/top1")

    @property
    def val_majority(self) -> float | None:
        """Share of the largest class in the last validation; None if there was none, or version 0.1 computed it."""
        return self.validation.get("val/majority")

    def validation_fields(self) -> dict[str, float | None]:
        """Return the last validation's fields of a JSON document."""
        names = ("top1", "top5", "mean_class_accuracy", "majority")
        return {f"val_{name}": self.validation.get(f"val/{name}") for name in names}


def best_metrics(best: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that a run ends with, from its best validation; its iteration is in `checkpoint.best`."""
    return {"best/val_top1": best["val_top1"]}
