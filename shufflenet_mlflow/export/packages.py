"""Packages of the extras that exporting needs."""

from importlib import import_module
from typing import Any

from shufflenet_mlflow.errors import ExportError

EXTRAS = {"onnx": "export", "openvino": "openvino"}
"""Format -> extra of this package."""


def import_extra(package: str, form: str) -> Any:
    """Import a package that a format needs.

    Raises:
        ExportError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ExportError(
            f"the format {form} needs the package {package.partition('.')[0]}; "
            f"pip install 'shufflenet-mlflow[{EXTRAS[form]}]'",
            code="export-package-missing",
        ) from error
