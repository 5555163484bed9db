"""Functions for scripts of your own that take any reference to a checkpoint."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from shufflenet_mlflow.checkpoints import loading
from shufflenet_mlflow.checkpoints.loading import LoadReport
from shufflenet_mlflow.checkpoints.references import parse_reference
from shufflenet_mlflow.tracking.resolve import resolve


def read_checkpoint(
    ref: str | Path, *, tracking_uri: str | None = None, cache_dir: str | Path | None = None
) -> dict[str, Any]:
    """Return the content of a checkpoint, verified, and read without running its code.

    Args:
        ref: a file, a folder, a run ID, `runs:/<id>`, `runs:/<id>@latest|@best|@<iters>`, or
            `models:/<name>@<alias>` or `models:/<name>/<version>`. A folder or a run means its newest checkpoint.
        tracking_uri: where runs are looked up; by default as MLflow does.
        cache_dir: where remote files land; by default `SHUFFLENET_CACHE_DIR`, or the user's cache folder.

    Returns:
        Plain containers with tensors on the CPU: what `save_checkpoint` was given, and `iters`, `epoch`, `loss`,
        `run_id`, `created_at` and `format_version`.

    Raises:
        UnresolvedError: nothing usable stands behind it; the message says what was found instead.
        CheckpointError: a file that was named exactly does not verify.
        TrackingError: MLflow did not answer.
    """
    return resolve(ref, tracking_uri=tracking_uri, cache_dir=cache_dir).checkpoint.read()


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | Path | Mapping[str, Any],
    *,
    strict: bool = True,
    reset_head: bool | Literal["always"] = False,
    ema: bool = True,
    tracking_uri: str | None = None,
) -> LoadReport:
    """Load the weights of `checkpoint` into `model`.

    Names match even if DataParallel, DDP or torch.compile wraps either side. If loading fails, the model is unchanged.

    Args:
        model: takes the weights; it may be wrapped.
        checkpoint: a file or any other reference that `read_checkpoint` takes; or the content of one: a dict with
            `state_dict`, or a bare state dict.
        strict: require every tensor to match. Otherwise the auxiliary `predict_*` heads may be missing or differ, and
            a network with `num_classes=0` leaves the checkpoint's classifier out.
        reset_head: with `strict=False`, leave a classifier of another width as it is in `model`; with "always", also
            one of the same width, such as for other classes of the same number.
        ema: prefer the moving average of the weights, as evaluation does.
        tracking_uri: where runs are looked up; by default as MLflow does.

    Returns:
        The names of all tensors, by what happened to them. Tensors that were not loaded are also logged.

    Raises:
        ValueError: `reset_head` is given with `strict=True`.
        MismatchError: tensors are missing, unexpected or of another shape; the message names the first of them, its
            `report` all.
        CheckpointError: the file cannot be used, or holds no state dict.
        UnresolvedError, TrackingError: see `read_checkpoint`.
    """
    content, source = checkpoint, None
    if not isinstance(checkpoint, Mapping) and _is_more_than_a_file(checkpoint):
        content, source = read_checkpoint(checkpoint, tracking_uri=tracking_uri), repr(str(checkpoint))
    return loading.load_checkpoint(model, content, strict=strict, reset_head=reset_head, ema=ema, source=source)


def _is_more_than_a_file(ref: str | Path) -> bool:
    reference = parse_reference(ref)
    return not isinstance(reference, Path) or os.path.isdir(reference)
