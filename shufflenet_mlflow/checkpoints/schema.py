"""The schema of a checkpoint file: its version, its entries and their types, and the check of a loaded file."""

from collections.abc import Mapping
from typing import Any

from shufflenet_mlflow.errors import CheckpointError
from shufflenet_mlflow.runtime.text import name_some

FORMAT_VERSION = 1
"""The entry `format_version`, an integer. Its presence tells this project's files from all others."""

STATE_DICT = "state_dict"
"""The weights: bare parameter names -> tensors."""

EMA_STATE_DICT = "ema_state_dict"
"""The moving average of the weights, under the same names."""

_NONE = type(None)

_REQUIRED: dict[str, tuple[type, ...]] = {
    STATE_DICT: (dict,),
    "optimizer_state_dict": (dict,),
    "lr_scheduler_state_dict": (dict,),
    "iters": (int,),  # completed iterations, at least 0
    "epoch": (int, _NONE),  # completed epochs
    "loss": (float, int, _NONE),  # mean training loss
    "metrics": (dict,),  # of the last validation, and its iteration as `validated_iters`
    "meter_state": (list,),  # training loss and accuracy since the last report
    "best": (dict, _NONE),  # of the best validation: {"val_top1": float, "iters": int}
    "rng_state": (dict,),  # {"cpu": generator state}
    "model": (dict,),  # of `create_model`: {"name": str, "kwargs": dict}, and perhaps {"package": str}
    "preprocess": (dict,),  # see `Preprocess.to_dict`
    "class_to_idx": (dict,),  # class name -> label
    "config": (dict,),  # the `RunConfig`
    "data": (dict,),  # {"train_digest": str, "val_digest": str}
    "run_id": (str, _NONE),  # the MLflow run
}
"""The entries that a checkpoint needs to be resumed from."""

_OPTIONAL: dict[str, tuple[type, ...]] = {
    EMA_STATE_DICT: (dict,),
    "scaler_state_dict": (dict,),  # of the loss scaler, with --amp fp16
    "validations_since_best": (int,),  # validations after the best one
    "teacher": (str,),  # digest of the weights that training distils from
    "environment": (dict,),  # versions of libraries, device, threads, processes
}
"""Further entries. Only for the reader, and unchecked: `sampler_state`, `created_at`."""

RESUME_KEYS = tuple(_REQUIRED)

_DESCRIBING = (STATE_DICT, EMA_STATE_DICT, "iters", "model", "preprocess", "class_to_idx", "run_id")
"""The entries with a meaning in any file; the others are the script's own, unless they are all there."""


def is_own(payload: Mapping[str, Any]) -> bool:
    """Whether this project wrote the checkpoint; in other files, entries of these names may mean anything."""
    return "format_version" in payload


def check_payload(payload: Mapping[str, Any], needed: tuple[str, ...], source: str) -> None:
    """Check that a checkpoint of this project follows the schema.

    Args:
        needed: the entries that must be present; the others are checked if they are, but in a file that a script has
            saved, most of them can be anything.
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
        hint = "; --init-from starts a training run from its weights" if STATE_DICT in payload else ""
        raise CheckpointError(
            f"{source} was not written by this project's training: it lacks {name_some(missing)}{hint}",
            code="entries-missing",
        )
    is_of_training = all(key in payload for key in RESUME_KEYS)
    for key, types in {**_REQUIRED, **_OPTIONAL}.items():
        if not (is_of_training or key in _DESCRIBING):
            continue
        if key in payload and not _is(payload[key], types):
            expected = " or ".join("None" if kind is _NONE else kind.__name__ for kind in types)
            raise CheckpointError(
                f"{source}: its {key!r} is a {type(payload[key]).__name__}, not {expected}", code="entry-type"
            )
    _check_contents(payload, source)
    best = payload.get("best")
    if not is_of_training or best is None:
        return
    if not (_is(best.get("val_top1"), (float, int)) and _is(best.get("iters"), (int,))):
        raise CheckpointError(
            f"{source}: its 'best' is {best!r}, without the numbers 'val_top1' and 'iters'", code="best-entry-invalid"
        )


def check_class_names(class_to_idx: Mapping[Any, Any], source: str) -> None:
    """Raise CheckpointError unless classes are names, each with a label of its own."""
    labels = set()
    for name, label in class_to_idx.items():
        if not (isinstance(name, str) and _is(label, (int,)) and label >= 0 and label not in labels):
            raise CheckpointError(
                f"{source}: its 'class_to_idx' holds {name!r}: {label!r}, not a name and a label of its own",
                code="class-names-invalid",
            )
        labels.add(label)


def _check_contents(payload: Mapping[str, Any], source: str) -> None:
    check_class_names(payload.get("class_to_idx", {}), source)
    model = payload.get("model")
    if model is not None and not (isinstance(model.get("name"), str) and isinstance(model.get("kwargs"), dict)):
        raise CheckpointError(f"{source}: its 'model' does not name a network", code="model-entry-invalid")
    if payload.get("iters", 0) < 0:
        raise CheckpointError(f"{source}: its 'iters' is {payload['iters']}, below 0", code="iters-entry-invalid")


def _is(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)
