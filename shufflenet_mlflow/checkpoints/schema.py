"""Whether what a file holds has the form that this project writes: anything may be in a file that loads."""

from collections.abc import Mapping
from typing import Any

from shufflenet_mlflow.errors import CheckpointError

FORMAT_VERSION = 1

STATE_DICT = "state_dict"

EMA_STATE_DICT = "ema_state_dict"
"""The moving average of the weights, under the same names."""

_NONE = type(None)

_TYPES: dict[str, tuple[type, ...]] = {
    "state_dict": (dict,),
    "ema_state_dict": (dict,),
    "scaler_state_dict": (dict,),
    "optimizer_state_dict": (dict,),
    "lr_scheduler_state_dict": (dict,),
    "iters": (int,),
    "epoch": (int, _NONE),
    "loss": (float, int, _NONE),
    "metrics": (dict,),
    "meter_state": (list,),
    "best": (dict, _NONE),
    "rng_state": (dict,),
    "model": (dict,),
    "preprocess": (dict,),
    "class_to_idx": (dict,),
    "config": (dict,),
    "data": (dict,),
    "environment": (dict,),
    "run_id": (str, _NONE),
}

_OPTIONAL = ("ema_state_dict", "scaler_state_dict", "environment")

RESUME_KEYS = tuple(key for key in _TYPES if key not in _OPTIONAL)
"""What is needed to continue training."""

_NAMED = 3
"""Missing entries that a message names."""


def check_payload(payload: Mapping[str, Any], needed: tuple[str, ...], source: str) -> None:
    """Check presence and types of the entries of a checkpoint.

    Args:
        needed: the entries that must be there; others are checked only if they are.
        source: what to call the checkpoint in messages.

    Raises:
        CheckpointError: an entry is missing or of another type, or a later version of this project wrote it.
    """
    version = payload.get("format_version", FORMAT_VERSION)
    if not _is(version, (int,)) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{source} has format {version!r}, and {FORMAT_VERSION} is the latest known here; upgrade this package",
            code="format-unknown",
        )
    if missing := [key for key in needed if key not in payload]:
        listed = ", ".join(missing[:_NAMED]) + (f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else "")
        way_out = "; --init-from begins a training with its weights" if "state_dict" in payload else ""
        raise CheckpointError(
            f"{source} was not written by this project's training: it lacks {listed}{way_out}", code="entries-missing"
        )
    for key, types in _TYPES.items():
        if key in payload and not _is(payload[key], types):
            raise CheckpointError(
                f"{source}: its {key!r} is a {type(payload[key]).__name__}, which is not understood", code="entry-type"
            )
    for name, label in payload.get("class_to_idx", {}).items():
        if not (isinstance(name, str) and _is(label, (int,))):
            raise CheckpointError(
                f"{source}: its 'class_to_idx' holds {name!r}: {label!r}, which is not understood",
                code="class-names-invalid",
            )
    model = payload.get("model")
    if model is not None and not (isinstance(model.get("name"), str) and isinstance(model.get("kwargs"), dict)):
        raise CheckpointError(f"{source}: its 'model' does not name a network", code="model-entry-invalid")
    if payload.get("iters", 0) < 0:
        raise CheckpointError(
            f"{source}: its 'iters' is {payload['iters']}, which is not understood", code="iters-entry-invalid"
        )
    best = payload.get("best")
    if best is not None and not (_is(best.get("val_top1"), (float, int)) and _is(best.get("iters"), (int,))):
        raise CheckpointError(f"{source}: its 'best' is {best!r}, which is not understood", code="best-entry-invalid")


def is_own(payload: Mapping[str, Any]) -> bool:
    """Whether this project wrote the checkpoint: only then do its other entries mean what they are called."""
    return "format_version" in payload


def _is(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)
