"""Checkpoints for people without this package: exported programs, logged models, registered models."""

from shufflenet_mlflow.export.files import FORMATS, export_file
from shufflenet_mlflow.export.logged import LogModels, log_model
from shufflenet_mlflow.export.registry import Promoted, promote

__all__ = ["FORMATS", "LogModels", "Promoted", "export_file", "log_model", "promote"]
