"""`shufflenet export`."""

from pathlib import Path
from shlex import quote
from typing import Any

import click

from shufflenet_mlflow.config import EXPORT_FORMATS
from shufflenet_mlflow.runtime.text import counted

from .commands import Command
from .completing import ImageSet
from .options import (
    cache_dir_option,
    common_options,
    config_option,
    flag,
    json_option,
    network_options,
    option,
    options,
    ref_argument,
    tracking_uri_option,
)
from .say import say

USES = {
    "pt2": "in Python: torch.export.load({literal}).module()",
    "onnx": "in Python: onnxruntime.InferenceSession({literal})",
    "openvino": "in Python: openvino.Core().compile_model({literal})",
    "mlflow": "mlflow models serve -m {word} --env-manager local --port 5001",
}
"""Format -> how to use the file."""


@click.command(cls=Command, usual=("int8", "calibration_dir", "input_size", "format", "output", "tracking_uri"))
@ref_argument
@click.option("--format", type=click.Choice(EXPORT_FORMATS), help="Format.  [default: pt2]")
@option(
    "--output",
    type=click.Path(path_type=Path),
    help="File, or folder for mlflow.  [default: named like the checkpoint]",
)
@options(
    flag("--int8", help="Quantise to 8-bit integers; for onnx and openvino."),
    option(
        "--calibration-dir",
        metavar="DIR",
        type=ImageSet(),
        help="Images to quantise with: a folder or a table.  [default: the run's training images]",
    ),
    option("--calibration-images", type=int, metavar="N", help="Number of them.  [default: 300]"),
    section="Quantisation",
)
@network_options
@tracking_uri_option
@cache_dir_option
@config_option
@json_option
@common_options
def export(ref: str, as_json: bool, **values: Any) -> None:
    """Write a checkpoint as pt2, ONNX, OpenVINO or MLflow model.

    REF is a checkpoint as for `shufflenet eval`; a run ID alone means the run's best.

    The result does not need this package: torch.export.load reads pt2, ONNX Runtime and others read onnx, OpenVINO
    reads openvino (an .xml, with its weights in a .bin beside it); mlflow is a folder for `mlflow models serve -m`.

    Files map uint8 images (N, 3, S, S), resized and cropped, to logits, and hold the classes and the preprocessing as
    classifier.json. Before a file appears, its logits are compared with the checkpoint's: they may differ by 1e-4 of
    the largest one. With --int8 the labels of the images that it was calibrated on are compared, and the share of equal
    ones is printed; `shufflenet eval FILE` measures what it costs in accuracy. A checkpoint of `train --qat` keeps the
    scales that it was trained with.

    \b
    Examples:
      shufflenet export 01234567 --format onnx --output pets.onnx
      shufflenet export 01234567 --format onnx --int8 --input-size 192
      shufflenet export weights.pth.tar --model shufflenet_v2_x1_0 --format mlflow
    """
    from shufflenet_mlflow.workflows.export import ExportRequest, run_export

    from .console import ConsoleReporter, next_steps
    from .tables import print_json

    given = {name: value for name, value in values.items() if value is not None}
    summary = run_export(ExportRequest(ref, **given), reporter=ConsoleReporter())
    if as_json:
        print_json(summary.to_dict())
        return
    say(f"{summary.path}  ({summary.loaded.network.spec.name}, iteration {summary.loaded.iters})")
    say(f"largest difference from the checkpoint's logits: {summary.difference:.1e} of the largest")
    if summary.calibration is not None and summary.equal_labels is not None:
        compared = "compared" if summary.loaded.network.spec.fake_quantized else "calibrated"
        say(
            f"{compared} on {counted(len(summary.calibration.pixels_NCHW), 'image')} of {summary.calibration.source} "
            f"(digest {summary.calibration.digest[:12]}), {summary.equal_labels:.2%} of them with the same label"
        )
    next_steps(USES[summary.format].format(literal=repr(str(summary.path)), word=quote(str(summary.path))))
