"""Checkpoints for people without this package: exported programs, logged models, registered models."""

from shufflenet_mlflow.export.files import FORMATS, INT8_FORMATS, SUFFIXES, Exported, export_file
from shufflenet_mlflow.export.int8 import Calibration
from shufflenet_mlflow.export.logged import LogModels, log_model
from shufflenet_mlflow.export.registry import Promoted, promote

__all__ = [
    "FORMATS",
    "INT8_FORMATS",
    "SUFFIXES",
    "Calibration",
    "Exported",
    "LogModels",
    "Promoted",
    "export_file",
    "log_model",
    "promote",
]
