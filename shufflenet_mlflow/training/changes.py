"""Options that may change, and options that may not, when a training is continued."""

from collections.abc import Mapping
from typing import Any

from shufflenet_mlflow.config import DEFAULTS, RunConfig, option
from shufflenet_mlflow.errors import ResumeError

FORK_MAY_NOT_CHANGE = (
    *("model", "choices", "scales", "init_from", "qat", "pretrained", "num_classes", "seed", "batch_size"),
    *("recipe", "optimizer", "head_lr_factor", "layer_decay"),  # the optimizer's state is another
)
"""A checkpoint cannot be continued, not even as a run of its own, with one of these changed."""

RESUME_MAY_CHANGE = (
    "train_dir",
    "val_dir",
    "mean_image",
    "teacher",
    "workers",
    "threads",
    "device",
    "display_interval",
    "val_interval",
    "save_interval",
    "on_bad_image",
    "keep_last",
    "keep_best",
    "keep_every",
    "on_save_error",
)
"""These may change when a run is resumed; data, mean image and teacher are compared by their content."""


def drift(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs, name -> (before, now). A field that is new in `now` counts only if it is set."""
    return {
        name: (before.get(name), value)
        for name, value in now.items()
        if before.get(name) != value and (name in before or value)
    }


def check_resumable(
    before: Mapping[str, Any],
    now: RunConfig,
    *,
    new_run: bool,
    else_way_out: str = "pass --new-run to continue as a run of its own",
) -> None:
    """Raise ResumeError for changed options that would make the resumed run a different one.

    Args:
        before: the configuration of the run, or of its checkpoint.
        new_run: the continuation is a run of its own, in which all but `FORK_MAY_NOT_CHANGE` may change.
        else_way_out: what to do instead of leaving options as they were.

    Raises:
        ResumeError: the message names the option, both values and the way out.
    """
    changes = drift({**DEFAULTS, **before}, now.to_dict())
    may_change = {*RESUME_MAY_CHANGE} - ({"val_interval"} if now.patience else set())  # patience counts validations
    changed = {name: pair for name, pair in changes.items() if name not in may_change}
    if (before.get("val_dir") is None) != (
        now.val_dir is None
    ):  # another way to give images: their content is compared
        changed = {name: pair for name, pair in changed.items() if name not in ("val_fraction", "group_by")}
    breaking = {name: pair for name, pair in changed.items() if name in FORK_MAY_NOT_CHANGE}
    refused = breaking or ({} if new_run else changed)
    if refused:
        listed = ", ".join(f"{option(name)} ({was} -> {is_})" for name, (was, is_) in refused.items())
        way_out = (
            "leave them out, or start a new run with --resume none and another --save-dir"
            if breaking
            else f"leave them as they were, or {else_way_out}"
        )
        raise ResumeError(
            f"the run cannot be continued with changed {listed}; {way_out}", code="resume-options-changed"
        )
