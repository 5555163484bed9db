"""Exported files: `.pt2` for PyTorch, `.onnx` and OpenVINO's `.xml` for everything else, each compared with the
checkpoint."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shufflenet_mlflow.errors import ExportError, ShuffleNetError
from shufflenet_mlflow.export.int8 import Calibration, compact, equal_labels, in_integers, quantized
from shufflenet_mlflow.export.packages import import_extra
from shufflenet_mlflow.export.program import (
    INPUT,
    OUTPUT,
    Export,
    check_equal,
    example_pixels,
    export_program,
    settings_of,
)
from shufflenet_mlflow.export.quiet import quiet
from shufflenet_mlflow.export.weights import (
    sealed,
    sha256_of_onnx,
    sha256_of_program,
    sha256_of_stored_weights,
    stored_weights,
)
from shufflenet_mlflow.models.loaded import LoadedModel

SETTINGS_FILE = "classifier.json"
"""Name of the extra file of a `.pt2`, of the metadata entry of an `.onnx`, and of the run-time information of an
`.xml`, that holds `settings_of`."""

Run = Callable[[Tensor], Tensor]
"""From uint8 pixels (N, 3, S, S) to float32 logits (N, classes)."""


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how it compares with the checkpoint."""

    difference: float
    """The largest difference between logits, as a fraction of the largest one; 0 if they are equal bit for bit."""
    equal_labels: float | None = None
    """Share of the calibration images with the checkpoint's label, in 0..1; None without quantisation."""


def export_file(
    network: LoadedModel,
    target: Path,
    form: str,
    *,
    origin: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
) -> Exported:
    """Write the network to `target`, in a format of `FORMATS`, and compare it with the checkpoint before renaming it.

    Args:
        origin: what the file says of the checkpoint that it is made from; see `program.settings_of`.
        calibration: images to quantise to int8 with; None for floating-point numbers.

    Raises:
        ExportError: it cannot be written, differs, or a package is missing.
    """
    write, load = FORMATS[form]
    temporary = target.with_name(f".{target.name}.part{target.suffix}")
    settings = settings_of(network, origin)
    try:
        if calibration is None:
            write(network, temporary, settings)
            exported = Exported(check_equal(network, load(temporary), f"the {form} program"))
        else:
            settings |= {"calibration": calibration.to_dict(), "qat": network.spec.fake_quantized}
            exported = _write_int8(network, temporary, settings, calibration, form)
        for part, final in ((stored_weights(temporary), stored_weights(target)), (temporary, target)):
            if part is not None and final is not None and part.exists():
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(part, final)
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
        for part in (temporary, stored_weights(temporary)):
            with contextlib.suppress(OSError):  # an earlier error is the one to report
                if part is not None:
                    part.unlink(missing_ok=True)
    return exported


# ---------------------------------------------------------------- PyTorch


def write_pt2(
    network: LoadedModel,
    path: Path,
    settings: dict[str, Any] | None = None,
    export: Export = export_program,
) -> None:
    """Write a file for `torch.export.load`."""
    program = export(network)
    stated = sealed(settings or settings_of(network), sha256_of_program(program))
    torch.export.save(program, path, extra_files={SETTINGS_FILE: stated})


def load_pt2(path: Path) -> Run:
    """Load the program from a file of `write_pt2`."""
    program: Run = torch.export.load(path).module()
    return program


# ---------------------------------------------------------------- ONNX


def write_onnx(network: LoadedModel, path: Path, settings: dict[str, Any]) -> None:
    """Write an ONNX model."""
    onnx = import_extra("onnx", "onnx")
    import_extra("onnxscript", "onnx")
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
    save_onnx(onnx, exported.model_proto, path, settings)


def save_onnx(onnx: Any, model: Any, path: Path, settings: Mapping[str, Any]) -> None:
    """Write a model with its settings, and without the exporter's notes on where each operation came from."""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for part in (*model.graph.node, *model.graph.initializer, *model.graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.helper.set_model_props(model, {SETTINGS_FILE: sealed(settings, sha256_of_onnx(model))})
    path.write_bytes(model.SerializeToString())


def load_onnx(path: Path) -> Run:
    """Load an ONNX model into ONNX Runtime."""
    session = import_extra("onnxruntime", "onnx").InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(pixels_NCHW: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: pixels_NCHW.contiguous().numpy()})[0])

    return run


# ---------------------------------------------------------------- OpenVINO


def write_openvino(network: LoadedModel, path: Path, settings: dict[str, Any]) -> None:
    """Write OpenVINO's intermediate representation: `path` and, beside it, the weights as `.bin`."""
    import_extra("openvino", "openvino")
    with _beside(path) as onnx_path:
        write_onnx(network, onnx_path, settings)
        _convert(onnx_path, path, settings)


def _convert(onnx_path: Path, path: Path, settings: dict[str, Any]) -> None:
    openvino = import_extra("openvino", "openvino")
    model = openvino.Core().read_model(str(onnx_path))
    openvino.save_model(model, str(path), compress_to_fp16=False)
    # The weights are written before their digest is known.
    model.set_rt_info(sealed(settings, sha256_of_stored_weights(path)), SETTINGS_FILE)
    openvino.save_model(model, str(path), compress_to_fp16=False)


def load_openvino(path: Path) -> Run:
    """Compile OpenVINO's intermediate representation for this processor, to compute as exactly as it was written."""
    openvino = import_extra("openvino", "openvino")
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(pixels_NCHW: Tensor) -> Tensor:
        return torch.from_numpy(compiled(pixels_NCHW.contiguous().numpy())[0].copy())

    return run


# ---------------------------------------------------------------- int8


def _write_int8(
    network: LoadedModel, path: Path, settings: dict[str, Any], calibration: Calibration, form: str
) -> Exported:
    """Write the network with integers, and compare its labels with the network's."""
    onnx = import_extra("onnx", "onnx")
    _, load = FORMATS[form]
    with _beside(path) as float_path, _beside(path) as int8_path:
        try:
            write_onnx(in_integers(quantized(network, calibration)), float_path, settings)
            model = compact(onnx, onnx.load(str(float_path)))
        except ShuffleNetError:
            raise
        except Exception as error:  # whatever the tools raise at an operation that they do not know
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ExportError(
                f"{network.spec.name} cannot be quantised: {reason}; leave --int8 out", code="export-int8-failed"
            ) from error
        if form == "onnx":
            save_onnx(onnx, model, path, settings)
        else:
            import_extra("openvino", "openvino")
            save_onnx(onnx, model, int8_path, settings)
            _convert(int8_path, path, settings)
    return Exported(*equal_labels(network, load(path), calibration.pixels_NCHW))


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary ONNX file."""
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch) / f"{path.stem}.onnx"


INT8_FORMATS = ("onnx", "openvino")
"""Formats that `calibration` is for."""

SUFFIXES = {"pt2": ".pt2", "onnx": ".onnx", "openvino": ".xml"}

FORMATS: dict[str, tuple[Callable[[LoadedModel, Path, dict[str, Any]], None], Callable[[Path], Run]]] = {
    "pt2": (write_pt2, load_pt2),
    "onnx": (write_onnx, load_onnx),
    "openvino": (write_openvino, load_openvino),
}
"""Name -> functions that write and read the format."""
