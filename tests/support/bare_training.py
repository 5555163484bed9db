"""The training loop without MLflow: killed and resumed many times within a second."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.training.loop import TrainingLoop
from shufflenet_mlflow.training.result import TrainResult
from shufflenet_mlflow.workflows.bench import bare_training
from tests.support.training import Reporter, request

Kill = int | tuple[str, int]
"""An iteration; or a phase, and how far it has come."""


class Killed(BaseException):
    """Ends a training as SIGKILL would: nothing is saved."""


@dataclass
class FolderStore:
    """Keeps checkpoints in a folder; see `shufflenet_mlflow.training.keeping.CheckpointStore`."""

    folder: Path

    def save(self, state: Mapping[str, Any], iters: int, tag: str, *, val_top1: float | None) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{iters:06}{tag}.pth.tar"
        torch.save({"format_version": 1, **state, "val_top1": val_top1}, path)
        return path

    def mark_best(self, _checkpoint: Path, _val_top1: float) -> bool:
        return True

    def newest(self) -> Path | None:
        return max(self.folder.glob("*"), default=None)

    def finish(self) -> Path | None:
        return self.newest()


def bare_trainer(
    images: Path, folder: Path, *options: object, on_progress: Callable[[str, int], None] = lambda *_: None
) -> TrainingLoop:
    """Return the loop that these options of `shufflenet train` describe, before its first iteration."""
    asked = dict(request(images, *options).options)
    _, trainer = bare_training(asked, None, JobContext.alone(Reporter(on_progress), StopFlag()))
    trainer.store = FolderStore(folder)
    return trainer


def train(images: Path, folder: Path, *options: object, kills: tuple[Kill, ...] = ()) -> tuple[TrainResult, Any]:
    """Train to the end, killed after each of these iterations and resumed; return the result and the last payload.

    Each time, the process's own generators are in another state.
    """
    for number, kill in enumerate((*kills, None)):
        for seeding in (torch.manual_seed, np.random.seed, random.seed):
            seeding(number)

        moment = kill if isinstance(kill, tuple) else ("training", kill)

        def on_progress(phase: str, done: int, moment: tuple[str, int | None] = moment) -> None:
            if (phase, done) == moment:
                raise Killed

        trainer = bare_trainer(images, folder, *options, on_progress=on_progress)
        newest = trainer.store.newest()
        if newest is not None:
            trainer.state.load_state_dict(read_checkpoint(newest))
        try:
            result = trainer.run(newest)
        except Killed:
            continue
    assert result.checkpoint is not None
    return result, read_checkpoint(result.checkpoint)
