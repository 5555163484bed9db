"""Train, evaluate, resume and compare ShuffleNet-series image classifiers with MLflow.

The names below are the public interface. They are imported when they are first used: importing this package costs
next to nothing, importing torch and MLflow does not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.runtime.logs import make_package_logger
from shufflenet_mlflow.version import __version__

make_package_logger()

if TYPE_CHECKING:
    from shufflenet_mlflow.checkpoints.loading import LoadReport
    from shufflenet_mlflow.config import TrainConfig
    from shufflenet_mlflow.errors import ShuffleNetError
    from shufflenet_mlflow.models.catalog import create_model, list_models
    from shufflenet_mlflow.tracking.resolve import get_latest_model
    from shufflenet_mlflow.tracking.resolve import get_latest_model as get_lastest_model
    from shufflenet_mlflow.training.trainer import Callback, Trainer
    from shufflenet_mlflow.workflows.library import load_checkpoint, read_checkpoint
    from shufflenet_mlflow.workflows.library_models import LoadedModel, evaluate, load_model, predict
    from shufflenet_mlflow.workflows.library_training import train
    from shufflenet_mlflow.workflows.save_checkpoint import CheckpointWriter, save_checkpoint

__all__ = [
    "Callback",
    "CheckpointWriter",
    "LoadReport",
    "LoadedModel",
    "ShuffleNetError",
    "TrainConfig",
    "Trainer",
    "__version__",
    "create_model",
    "evaluate",
    "get_lastest_model",
    "get_latest_model",
    "list_models",
    "load_checkpoint",
    "load_model",
    "predict",
    "read_checkpoint",
    "save_checkpoint",
    "train",
]

_HOMES = {
    "Callback": "training.trainer",
    "CheckpointWriter": "workflows.save_checkpoint",
    "LoadReport": "checkpoints.loading",
    "LoadedModel": "workflows.library_models",
    "ShuffleNetError": "errors",
    "TrainConfig": "config",
    "Trainer": "training.trainer",
    "create_model": "models.catalog",
    "evaluate": "workflows.library_models",
    "get_lastest_model": "tracking.resolve:get_latest_model",  # so the original release spelled it
    "get_latest_model": "tracking.resolve",
    "list_models": "models.catalog",
    "load_checkpoint": "workflows.library",
    "load_model": "workflows.library_models",
    "predict": "workflows.library_models",
    "read_checkpoint": "workflows.library",
    "save_checkpoint": "workflows.save_checkpoint",
    "train": "workflows.library_training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, name_there = _HOMES[name].partition(":")
    value = getattr(import_module(f"{__name__}.{module}"), name_there or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
