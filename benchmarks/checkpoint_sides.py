"""The training that `checkpoint_stall.py` measures, and the ways to save it to the disk and to MLflow."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from shufflenet_mlflow.models.catalog import create_model
from shufflenet_mlflow.training.loss import make_loss, training_loss
from shufflenet_mlflow.training.optimizer import make_optimizer

BATCH_SIZE, INPUT_SIZE, CLASSES = 8, 32, 1000
EXPERIMENT = "checkpoint_stall"
ARTIFACT_FOLDER = "checkpoints"

NEEDS = {"lightning": "pytorch_lightning", "mlflow_callback": "pytorch_lightning", "ignite": "ignite"}
"""Side -> module that it needs."""

FORMATS = {
    "ours": "a torch.save file of plain containers, with a JSON manifest of its size and SHA-256",
    "inline": "a torch.save file",
    "lightning": "a Lightning checkpoint, with two small files of aliases and metadata",
    "mlflow_callback": "a Lightning checkpoint, not a whole MLflow model, with a JSON file of metrics",
    "ignite": "a torch.save file",
}
"""Side -> form of a checkpoint among the run's artifacts."""


@dataclass(frozen=True)
class Job:
    """Settings for the process of one side."""

    side: str
    network: str
    uri: str
    directory: str
    """Folder that it may write to."""
    checkpoints: int
    interval: int
    """Iterations from one checkpoint to the next."""

    @property
    def iterations(self) -> int:
        """Iterations of training, some of them after the last checkpoint."""
        return self.interval * self.checkpoints + max(2, self.interval // 2)

    @property
    def local(self) -> Path:
        """Folder of the checkpoints."""
        return Path(self.directory) / "local"


@dataclass
class Training:
    """The network, its optimizer and the one batch that it is trained on."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    loss: nn.Module

    @classmethod
    def of(cls, network: str) -> "Training":
        torch.manual_seed(0)
        model = create_model(network, num_classes=CLASSES).train()
        optimizer = make_optimizer(model, lr=1e-3, momentum=0.9, weight_decay=4e-5)
        images = torch.randn(BATCH_SIZE, 3, INPUT_SIZE, INPUT_SIZE)
        return cls(model, optimizer, images, torch.randint(CLASSES, (BATCH_SIZE,)), make_loss(0.1))

    def forward(self) -> Tensor:
        """Return the loss."""
        return training_loss(self.model(self.images), self.labels, self.loss)[0]

    def step(self) -> None:
        """Run one iteration."""
        loss = self.forward()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """Return the content of a checkpoint, with the live tensors."""
        return {"state_dict": self.model.state_dict(), "optimizer_state_dict": self.optimizer.state_dict()}

    def tensors(self) -> list[Tensor]:
        """Return the tensors of `state`, each once."""
        state = self.optimizer.state_dict()["state"]
        every = [*self.model.state_dict().values(), *(entry["momentum_buffer"] for entry in state.values())]
        return list({tensor.data_ptr(): tensor.detach() for tensor in every}.values())

    def state_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


def loop(job: Job, training: Training, save: Callable[[int], object]) -> None:
    """Run a plain training loop.

    Args:
        save: called with the number of completed iterations.
    """
    for iters in range(1, job.iterations + 1):
        training.step()
        if iters % job.interval == 0 and iters // job.interval <= job.checkpoints:
            save(iters)


Side = Callable[[Job, Training], str]
"""Trains with checkpoints until everything has arrived; returns the run's ID."""


def new_run(job: Job) -> str:
    """Create a run; return its ID."""
    from mlflow import MlflowClient

    client = MlflowClient(job.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    return str(client.create_run(experiment.experiment_id, run_name=job.side).info.run_id)


def run_ours(job: Job, training: Training) -> str:
    from shufflenet_mlflow.checkpoints.retention import Retention
    from shufflenet_mlflow.runtime.progress import LoggingReporter
    from shufflenet_mlflow.runtime.signals import StopFlag
    from shufflenet_mlflow.tracking.client import connect
    from shufflenet_mlflow.tracking.journal import Journal
    from shufflenet_mlflow.tracking.kinds import TRACKING_KINDS
    from shufflenet_mlflow.tracking.session import TrackingSession
    from shufflenet_mlflow.tracking.store import TrackedStore

    client, run_id, reporter = connect(job.uri), new_run(job), LoggingReporter()
    session = TrackingSession(
        client, Journal(job.local), run_id, TRACKING_KINDS, is_new=True, reporter=reporter, stop=StopFlag()
    )
    with session:
        session.iters = job.iterations
        store = TrackedStore(
            job.local, session.recorder, retention=Retention(), continue_on_error=False, reporter=reporter
        )
        loop(job, training, lambda iters: store.save(training.state(), iters, "", val_top1=None))
        store.finish()
    return run_id


def run_inline(job: Job, training: Training) -> str:
    from mlflow import MlflowClient

    client, run_id = MlflowClient(job.uri), new_run(job)

    def save(iters: int) -> None:
        path = job.local / f"checkpoint-{iters:06}.pth"
        torch.save(training.state(), path)
        client.log_artifact(run_id, str(path), ARTIFACT_FOLDER)

    loop(job, training, save)
    client.set_terminated(run_id)
    return run_id


def fit_with_lightning(job: Job, training: Training, **options: Any) -> None:
    """Train with Lightning's loop, and only what the plain loop does switched on.

    Args:
        options: of the `Trainer`.
    """
    from pytorch_lightning import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = training.model

        def training_step(self, *_: Any) -> Tensor:
            return training.forward()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return training.optimizer

    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        default_root_dir=job.directory,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    batches: Any = [training.images] * job.iterations  # a plain list would be taken for a list of loaders
    trainer.fit(Module(), train_dataloaders=DataLoader(batches, batch_size=None))


def run_lightning(job: Job, training: Training) -> str:
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.loggers import MLFlowLogger

    logger = MLFlowLogger(EXPERIMENT, run_name=job.side, tracking_uri=job.uri, log_model="all")
    saving = ModelCheckpoint(job.local, every_n_train_steps=job.interval, save_top_k=-1)
    fit_with_lightning(job, training, logger=logger, callbacks=[saving])
    assert logger.run_id is not None
    return logger.run_id


def run_mlflow_callback(job: Job, training: Training) -> str:
    import mlflow
    from mlflow.pytorch import MlflowModelCheckpointCallback

    mlflow.set_tracking_uri(job.uri)
    mlflow.set_experiment(EXPERIMENT)
    with mlflow.start_run(run_name=job.side) as run:
        saving = MlflowModelCheckpointCallback(
            monitor=None, save_best_only=False, save_weights_only=False, save_freq=job.interval
        )
        fit_with_lightning(job, training, logger=False, enable_checkpointing=False, callbacks=[saving])
    return str(run.info.run_id)


def run_ignite(job: Job, training: Training) -> str:
    import mlflow
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver
    from ignite.handlers.mlflow_logger import MLflowLogger

    mlflow.set_tracking_uri(job.uri)
    mlflow.set_experiment(EXPERIMENT)
    logger = MLflowLogger(job.uri)
    run_id = str(logger.active_run.info.run_id)
    saving = Checkpoint(
        {"model": training.model, "optimizer": training.optimizer},
        DiskSaver(job.local),
        n_saved=None,
        global_step_transform=lambda engine, _event: engine.state.iteration,
    )
    trainer = Engine(lambda _engine, _batch: training.step())
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=job.interval), saving)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(every=job.interval),
        lambda _engine: logger.log_artifact(str(saving.last_checkpoint), ARTIFACT_FOLDER),
    )
    trainer.run([training.images] * job.iterations, max_epochs=1)
    logger.close()
    return run_id


SIDES: dict[str, Side] = {
    "ours": run_ours,
    "inline": run_inline,
    "lightning": run_lightning,
    "mlflow_callback": run_mlflow_callback,
    "ignite": run_ignite,
}


def artifact_files(job: Job, run_id: str) -> dict[str, int]:
    """Return path -> bytes of all artifacts of the run."""
    from mlflow import MlflowClient

    client, found, folders = MlflowClient(job.uri), {}, [""]
    while folders:
        for entry in client.list_artifacts(run_id, folders.pop() or None):
            if entry.is_dir:
                folders.append(entry.path)
            else:
                found[entry.path] = int(entry.file_size or 0)
    return found


def make_experiment(uri: str) -> None:
    from mlflow import MlflowClient

    MlflowClient(uri).create_experiment(EXPERIMENT)
