"""The rules for options that need neither data nor a checkpoint nor a connection.

Nothing heavy is imported: the command line applies them before it imports torch and MLflow.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from shufflenet_mlflow.checkpoints.references import is_run_id, parse_reference
from shufflenet_mlflow.config import DEFAULT_MODEL, check_batch_to_train, check_options, check_rule, option
from shufflenet_mlflow.errors import ConfigError, TrackingError, UnresolvedError
from shufflenet_mlflow.models.catalog import check_network
from shufflenet_mlflow.tracking.uris import check_address

LAUNCHERS = ("MLFLOW_RUN_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
"""Set for a process that a launcher started; with them, training may continue an earlier attempt."""


def check_request(options: Mapping[str, Any], *, may_inherit: bool = False) -> None:
    """Check the options of a command or a request.

    Args:
        options: by name; None means not given, names without a rule are ignored.
        may_inherit: a checkpoint may supply what is not given.

    Raises:
        ConfigError, ModelError: a value or a combination cannot work; the message names the option.
        UnresolvedError: a checkpoint reference has none of the known forms.
        TrackingError: the store's address is not one.
    """
    check_options(options)
    for alias in options.get("aliases") or ():
        check_rule("alias", alias)
    for run in (options.get("run"), *(options.get("runs") or ())):
        if run is not None:
            run_id_of(run)
    if options.get("ref") is not None:
        parse_reference(options["ref"])
    for name in ("resume", "init_from"):
        if options.get(name) is not None:
            with _naming(name):
                parse_reference(options[name])
    if options.get("tracking_uri"):
        with _naming("tracking_uri"):
            check_address(options["tracking_uri"])
    check_network(options, may_be_inherited=may_inherit)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the option's name before the message of an error."""
    try:
        yield
    except (UnresolvedError, TrackingError) as error:
        raise type(error)(f"{option(name)}: {error}", code=error.code) from error


def run_id_of(ref: str) -> str:
    """Return the run ID, or the first characters of one, in `ref`: an ID or `runs:/ID`.

    Raises:
        UnresolvedError: it is neither.
    """
    named = ref.removeprefix("runs:/").rstrip("/")
    if not is_run_id(named, whole=False):
        raise UnresolvedError(f"{ref!r} is not a run ID; `shufflenet runs` lists them", code="not-a-run-id")
    return named


def check_training(options: Mapping[str, Any]) -> None:
    """Check the options of a training run; see `check_request`."""
    if options.get("batch_size") is not None:
        check_batch_to_train(options["batch_size"])
    may_inherit = _may_inherit(options)
    check_request(options, may_inherit=may_inherit)
    if not may_inherit and options.get("model") is None and options.get("init_from") is None:
        check_network({**options, "model": DEFAULT_MODEL})
    if not may_inherit and "val_dir" in options:  # `bench` has no such option
        check_folders(options)


def check_folders(options: Mapping[str, Any]) -> None:
    """Raise ConfigError if only one of the two image folders is given."""
    missing = [name for name in ("train_dir", "val_dir") if options.get(name) is None]
    if len(missing) == 1:
        raise ConfigError(
            f"{option(missing[0])} is missing; give both folders, or neither for the bundled digits",
            code="one-folder-missing",
        )


def _may_inherit(options: Mapping[str, Any]) -> bool:
    """Whether the run may continue another one, from which it takes the options that are not given."""
    resume = options.get("resume") or "auto"
    if resume != "auto":
        return bool(resume != "none")
    found_by = (options.get("save_dir"), options.get("job"), *map(os.environ.get, LAUNCHERS))
    return any(value is not None for value in found_by)
