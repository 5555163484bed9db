"""Open exported files again: as networks that compute in their own runtime, with the checkpoint's preprocessing."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shufflenet_mlflow.data.decode import CentreCrop
from shufflenet_mlflow.data.preprocess import REFERENCE_SIZE, Mode, Preprocess
from shufflenet_mlflow.errors import ExportError, ShuffleNetError
from shufflenet_mlflow.export.files import SETTINGS_FILE, SUFFIXES, load_onnx, load_openvino
from shufflenet_mlflow.export.packages import import_extra
from shufflenet_mlflow.export.quiet import quiet
from shufflenet_mlflow.export.weights import (
    SETTINGS_KEY,
    WEIGHTS_KEY,
    sha256_of_export,
    sha256_of_onnx,
    sha256_of_program,
    sha256_of_settings,
    sha256_of_stored_weights,
    size_of_export,
)
from shufflenet_mlflow.models.loaded import LoadedModel
from shufflenet_mlflow.models.spec import ModelSpec
from shufflenet_mlflow.runtime.text import counted


@dataclass(frozen=True)
class ExportedFile:
    """An exported file, and what it says of itself."""

    path: Path
    form: str
    """A key of `files.FORMATS`."""
    settings: Mapping[str, Any]
    sha256: str
    """Digest of the file; of an `.xml`, with its weights; see `weights.sha256_of_export`."""
    bytes: int

    @property
    def origin(self) -> Mapping[str, Any]:
        """Run and checkpoint that it was made from; empty for a file of version 0.1."""
        origin = self.settings.get("origin")
        return origin if isinstance(origin, Mapping) else {}

    @property
    def is_int8(self) -> bool:
        """Whether it is quantised."""
        return "calibration" in self.settings

    @property
    def kind(self) -> str:
        """Name of the format in metrics and tags, such as `onnx-int8`."""
        return f"{self.form}-int8" if self.is_int8 else self.form

    @property
    def iters(self) -> int:
        """Iterations of the checkpoint; 0 if they are not known."""
        iters = self.origin.get("iters")
        return iters if isinstance(iters, int) else 0

    def text(self, key: str) -> str | None:
        """Return an entry of `origin` that is text."""
        value = self.origin.get(key)
        return value if isinstance(value, str) else None

    def to_dict(self) -> dict[str, Any]:
        """Return what a run keeps of it: both files' SHA-256."""
        return {
            "file": self.path.name,
            "format": self.form,
            "int8": self.is_int8,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "checkpoint": self.text("checkpoint"),
            "checkpoint_sha256": self.text("checkpoint_sha256"),
            "calibration": self.settings.get("calibration"),
            "iters": self.iters,
        }

    def fixed_metrics(self) -> dict[str, float]:
        """Return its size in bytes and, if it is known, its multiply-accumulates."""
        macs = self.origin.get("macs")
        return {"bytes": float(self.bytes), **({"macs": float(macs)} if isinstance(macs, int) else {})}


class ExportedModule(nn.Module):
    """A program of another runtime in the place of a network; on the CPU, and not copied."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._run = (run,)  # a program of PyTorch is a module, too, which cannot be set to evaluation

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return the logits (N, classes) of pixels, float (N, 3, S, S) on the 0-255 scale."""
        return self._run[0](x_NCHW.to(torch.uint8).contiguous())

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExportedModule":
        return self


def open_exported(path: Path) -> tuple[ExportedFile, LoadedModel]:
    """Load an exported file into its runtime.

    Raises:
        ExportError: it cannot be read, was changed since it was written, is none of this project's, or a package is
            missing.
    """
    form = {suffix: form for form, suffix in SUFFIXES.items()}[path.suffix.lower()]
    try:
        settings, weights, run = _READERS[form](path)
        sha256, size = sha256_of_export(path), size_of_export(path)
    except ShuffleNetError:
        raise
    except Exception as error:  # whatever a runtime raises at a strange file
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[-1 if lines[0].startswith("Exception from ") else 0][:200]  # OpenVINO's last line says it
        raise ExportError(
            f"{str(path)!r} cannot be read as {form}: {reason}; `shufflenet export` makes a new one",
            code="exported-unreadable",
        ) from error
    if not settings:
        raise ExportError(
            f"{str(path)!r} holds no {SETTINGS_FILE}, so its classes and preprocessing are not known; "
            "`shufflenet export` writes it",
            code="exported-without-settings",
        )
    if settings.get(WEIGHTS_KEY, weights) != weights:
        raise ExportError(
            f"{str(path)!r} holds other weights than it was written with, and cannot be trusted; `shufflenet export` "
            "makes a new one",
            code="exported-changed",
        )
    if settings.get(SETTINGS_KEY, sha256_of_settings(settings)) != sha256_of_settings(settings):
        raise ExportError(
            f"{str(path)!r}: its {SETTINGS_FILE}, with its classes and preprocessing, was changed since it was "
            "written; `shufflenet export` makes a new file",
            code="exported-settings-changed",
        )
    return ExportedFile(path, form, settings, sha256, size), _network_of(path, settings, run)


def _network_of(path: Path, settings: Mapping[str, Any], run: Callable[[Tensor], Tensor]) -> LoadedModel:
    try:
        prepare = CentreCrop.of(settings["prepare"])
        labels = [str(label) for label in settings["labels"]]
        known = (settings.get("origin") or {}).get("class_to_idx", {label: i for i, label in enumerate(labels)})
        if any(labels[index] != name for name, index in known.items()):
            raise ValueError("its labels are not its classes")
        mode = Mode(
            "BGR" if prepare.channels == "BGR" else "RGB",
            resize=prepare.resize * REFERENCE_SIZE / prepare.crop,
            antialias=prepare.antialias,
        )
        preprocess = Preprocess(mode, prepare.crop, None, prepare.reading)
        return LoadedModel(ExportedModule(run), ModelSpec(str(settings["network"])), len(labels), preprocess, known)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ShuffleNetError) as error:
        raise ExportError(
            f"{str(path)!r}: its {SETTINGS_FILE} is not understood ({type(error).__name__}: {error}); "
            "`shufflenet export` makes a new file",
            code="exported-settings-invalid",
        ) from error


Opened = tuple[dict[str, Any], str, Callable[[Tensor], Tensor]]
"""Settings, digest of the weights, and the program."""


def _parsed(text: str) -> dict[str, Any]:
    values = json.loads(text) if text else {}
    return values if isinstance(values, dict) else {}


def _open_pt2(path: Path) -> Opened:
    extra = {SETTINGS_FILE: ""}
    with quiet("torch.export"):  # which prints the traceback of what it then raises
        program = torch.export.load(path, extra_files=extra)
    return _parsed(extra[SETTINGS_FILE]), sha256_of_program(program), program.module()


def _open_onnx(path: Path) -> Opened:
    onnx = import_extra("onnx", "onnx")
    model = onnx.load(str(path), load_external_data=False)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    return _parsed(properties.get(SETTINGS_FILE, "")), sha256_of_onnx(model), load_onnx(path)


def _open_openvino(path: Path) -> Opened:
    openvino = import_extra("openvino", "openvino")
    weights = path.with_suffix(".bin")
    if not weights.exists():
        raise ExportError(
            f"{str(path)!r} needs its weights, {weights.name!r}, beside it; copy both files",
            code="exported-bin-missing",
        )
    try:
        model = openvino.Core().read_model(str(path))
    except RuntimeError as error:
        if "bin file" not in str(error):
            raise
        raise ExportError(
            f"{weights.name!r}, the weights of {str(path)!r}, is not whole "
            f"({counted(weights.stat().st_size, 'byte')}); copy both files again",
            code="exported-bin-broken",
        ) from error
    text = str(model.get_rt_info(SETTINGS_FILE).astype(str)) if model.has_rt_info(SETTINGS_FILE) else ""
    return _parsed(text), sha256_of_stored_weights(path), load_openvino(path)


_READERS: dict[str, Callable[[Path], Opened]] = {"pt2": _open_pt2, "onnx": _open_onnx, "openvino": _open_openvino}
