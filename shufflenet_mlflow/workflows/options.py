"""The rules for options that need neither data nor a checkpoint nor a connection.

Nothing heavy is imported: the command line applies them before it imports torch and MLflow.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from shufflenet_mlflow.checkpoints.references import EXPORT_SUFFIXES, is_exported, is_run_id, parse_reference
from shufflenet_mlflow.config import (
    DEFAULT_MODEL,
    FIELDS,
    check_batch_to_train,
    check_options,
    check_rule,
    option,
    weights_ref,
)
from shufflenet_mlflow.config.search import check_trust, completed
from shufflenet_mlflow.config.study import plan_of
from shufflenet_mlflow.errors import ConfigError, ModelError, TrackingError, UnresolvedError
from shufflenet_mlflow.models.catalog import check_network
from shufflenet_mlflow.tracking.route import check_proxy, check_store
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
        TrackingError: the store's address is not one, or that of the proxy on the way to it.
    """
    check_options(options)
    for alias in options.get("aliases") or ():
        check_rule("alias", alias)
    for run in (options.get("run"), *(options.get("runs") or ())):
        if run is not None and not is_exported(run):
            run_id_of(run)
    for file in options.get("deploy") or ():
        if not is_exported(file):
            raise ConfigError(
                f"--deploy (={file}) must be an exported file that exists: {', '.join(EXPORT_SUFFIXES)}",
                code="deploy-file",
            )
    if options.get("ref") is not None:
        parse_reference(options["ref"])
    for name in ("search", "resume", "init_from", "qat", "teacher", "if_better"):
        if options.get(name) is not None:
            with _naming(name):
                parse_reference(options[name])
    if options.get("tracking_uri"):
        with _naming("tracking_uri"):
            check_address(options["tracking_uri"])
        check_proxy(options["tracking_uri"])
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
    if not may_inherit and options.get("model") is None and weights_ref(options) is None:
        check_network({**options, "model": DEFAULT_MODEL})
    if "val_dir" in options:  # `bench` has no such option
        if not may_inherit:
            check_folders(options)
        check_store(options.get("tracking_uri"))


def check_tuning(options: Mapping[str, Any]) -> None:
    """Check the options of a study; see `check_request`.

    Raises:
        ConfigError: an option of training is given, and no `--param`: it would change a study that has begun.
    """
    check_request(options, may_inherit=True)
    check_store(options.get("tracking_uri"))
    if options.get("batch_size") is not None:
        check_batch_to_train(options["batch_size"])
    if not options.get("param"):
        decided = (
            *(*FIELDS, "epochs", "trials", "rungs", "reduction", "generation", "sampler", "asynchronous"),
            *("metric", "direction"),
        )
        given = [name for name in decided if options.get(name) is not None]
        if given:
            raise ConfigError(
                f"{option(given[0])} (={options[given[0]]}) is given without --param, which begins a study; "
                "`--study NAME` alone goes on with one",
                code="study-without-space",
            )
        return
    training = {name: value for name, value in options.items() if name in (*FIELDS, "epochs") and value is not None}
    plan = plan_of(options, training)
    check_folders(options)
    for param in plan.space:
        for model in param.choices if param.name == "model" else ():
            try:
                check_network({**options, "model": model})
            except ModelError as error:
                raise ModelError(f"--param (=model={param.spec}): {error}", code="param-model") from error
    if options.get("model") is None and weights_ref(options) is None and "model" not in {p.name for p in plan.space}:
        check_network({**options, "model": DEFAULT_MODEL})


def check_searching(options: Mapping[str, Any]) -> None:
    """Check the options of a search; see `check_request`.

    Raises:
        ConfigError: more candidates are to be changed ones than a generation has, or a length is given of trainings of
            which there are none.
    """
    check_request(options)
    check_store(options.get("tracking_uri"))
    completed(options)
    check_trust(options)


def check_folders(options: Mapping[str, Any]) -> None:
    """Raise ConfigError if there are no training images for what is said of the validation images."""
    if options.get("train_dir") is not None:
        return
    if options.get("val_dir") is not None:
        raise ConfigError(
            "--train-dir is missing; give it, or neither folder for the bundled digits", code="train-dir-missing"
        )
    for name in ("val_fraction", "group_by"):
        if options.get(name) is not None:
            raise ConfigError(
                f"{option(name)} (={options[name]}) divides --train-dir, which is missing", code="nothing-to-divide"
            )


def _may_inherit(options: Mapping[str, Any]) -> bool:
    """Whether the run may continue another one, from which it takes the options that are not given."""
    resume = options.get("resume") or "auto"
    if resume != "auto":
        return bool(resume != "none")
    found_by = (options.get("save_dir"), options.get("job"), *map(os.environ.get, LAUNCHERS))
    return any(value is not None for value in found_by)
