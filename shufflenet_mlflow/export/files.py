"""Exported files: `.pt2` for PyTorch, `.onnx` for everything else, each compared with the checkpoint."""

import contextlib
import json
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shufflenet_mlflow.errors import ExportError
from shufflenet_mlflow.export.program import (
    INPUT,
    OUTPUT,
    check_equal,
    example_pixels,
    export_program,
    settings_of,
)
from shufflenet_mlflow.export.quiet import quiet
from shufflenet_mlflow.models.loaded import LoadedModel

SETTINGS_FILE = "classifier.json"
"""Name of the extra file of a `.pt2`, and of the metadata entry of an `.onnx`, that holds `settings_of`."""


def export_file(network: LoadedModel, target: Path, form: str) -> float:
    """Write the network to `target`, in a format of `FORMATS`, and compare it with the checkpoint before renaming it.

    Returns:
        The largest difference between logits, as a fraction of the largest one; 0 if they are equal bit for bit.

    Raises:
        ExportError: it cannot be written, differs, or a package is missing.
    """
    write, load = FORMATS[form]
    temporary = target.with_name(f".{target.name}.part{target.suffix}")
    try:
        write(network, temporary)
        difference = check_equal(network, load(temporary), f"the {form} program")
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise ExportError(
            f"cannot write {str(target)!r}: {error.strerror}; --output names another file", code="export-unwritable"
        ) from error
    except RuntimeError as error:  # from PyTorch's writer or exporter
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f"cannot write {str(target)!r}: {reason}; --output names another file", code="export-failed"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # an earlier error is the one to report
            temporary.unlink(missing_ok=True)
    return difference


def write_pt2(network: LoadedModel, path: Path) -> None:
    """Write a file for `torch.export.load`."""
    torch.export.save(export_program(network), path, extra_files={SETTINGS_FILE: json.dumps(settings_of(network))})


def load_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    """Load the program from a file of `write_pt2`."""
    program: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return program


def _write_onnx(network: LoadedModel, path: Path) -> None:
    onnx = _import_extra("onnx")
    _import_extra("onnxscript")
    with quiet("torch.onnx", "onnxscript", "onnx_ir"):  # the exporter warns of its own deprecations
        exported = torch.onnx.export(
            export_program(network),
            (example_pixels(network),),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamo=True,
            verbose=False,
        )
    assert exported is not None  # noqa: S101 - None is for the older exporter
    model = exported.model_proto
    onnx.helper.set_model_props(model, {SETTINGS_FILE: json.dumps(settings_of(network))})
    path.write_bytes(model.SerializeToString())


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    session = _import_extra("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(pixels_NCHW: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: pixels_NCHW.numpy()})[0])

    return run


def _import_extra(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ExportError(
            f"--format onnx needs the package {package}; pip install 'shufflenet-mlflow[export]'",
            code="export-package-missing",
        ) from error


FORMATS: dict[str, tuple[Callable[[LoadedModel, Path], None], Callable[[Path], Callable[[Tensor], Tensor]]]] = {
    "pt2": (write_pt2, load_pt2),
    "onnx": (_write_onnx, _load_onnx),
}
"""Name -> functions that write and read the format."""
