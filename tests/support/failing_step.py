"""The `shufflenet` command, in which one step of a training run fails in one process: `FAIL="step rank"`."""

import os
from collections.abc import Callable
from typing import Any

from shufflenet_mlflow.cli import main
from shufflenet_mlflow.errors import DataError
from shufflenet_mlflow.runtime.distributed import World
from shufflenet_mlflow.training.loop import TrainingLoop
from shufflenet_mlflow.workflows import train
from shufflenet_mlflow.workflows.training.run import TrackedRun

STEPS: dict[str, tuple[Any, str]] = {
    "request": (train, "Connection"),
    "resume-point": (World, "on_leader"),
    "config": (train, "choose"),
    "data": (train, "list_data"),
    "state": (train, "prepare_state"),
    "run": (TrackedRun, "__enter__"),
    "loop": (TrainingLoop, "fetch"),
    "mid-step": (TrainingLoop, "step"),
    "end": (TrackedRun, "end"),
}


def fail_in(step: str, rank: str) -> None:
    """Let the step fail in that process."""
    owner, name = STEPS[step]
    original: Callable[..., Any] = getattr(owner, name)

    def failing(*arguments: Any, **named: Any) -> Any:
        if os.environ["RANK"] == rank:
            raise DataError(f"injected into {step}", code="injected")
        return original(*arguments, **named)

    setattr(owner, name, failing)


if __name__ == "__main__":
    fail_in(*os.environ["FAIL"].split())
    main()
