"""`shufflenet export`."""

from pathlib import Path
from typing import Any

import click

from shufflenet_mlflow.config import EXPORT_FORMATS

from .commands import Command
from .options import (
    cache_dir_option,
    common_options,
    config_option,
    json_option,
    network_options,
    option,
    ref_argument,
    tracking_uri_option,
)

USES = {
    "pt2": "in Python: torch.export.load('{path}').module()",
    "onnx": "in Python: onnxruntime.InferenceSession('{path}')",
    "mlflow": "mlflow models serve -m {path} --env-manager local --port 5001",
}
"""Format -> how to use the file."""


@click.command(cls=Command)
@ref_argument
@click.option("--format", type=click.Choice(EXPORT_FORMATS), help="Format.  [default: pt2]")
@option(
    "--output",
    type=click.Path(path_type=Path),
    help="File, or folder for mlflow.  [default: named like the checkpoint]",
)
@network_options
@tracking_uri_option
@cache_dir_option
@config_option
@json_option
@common_options
def export(ref: str, as_json: bool, **values: Any) -> None:
    """Write a checkpoint as pt2, ONNX or an MLflow model.

    The result does not need this package: torch.export.load reads pt2, ONNX Runtime and others read onnx; mlflow is a
    folder for `mlflow models serve -m`.

    pt2 and onnx map uint8 images (N, 3, S, S), resized and cropped, to logits; the file holds the classes and the
    preprocessing as classifier.json. Before the file appears, its logits are compared with the checkpoint's: they may
    differ by 1e-4 of the largest one.

    \b
    Examples:
      shufflenet export 01234567@best --format onnx --output pets.onnx
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
    click.echo(f"{summary.path}  ({summary.loaded.network.spec.name}, iteration {summary.loaded.iters})")
    click.echo(f"largest difference from the checkpoint's logits: {summary.difference:.1e} of the largest")
    next_steps(USES[summary.format].format(path=summary.path))
