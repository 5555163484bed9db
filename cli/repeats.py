"""`shufflenet train --repeat`: the same training with several seeds."""

import hashlib
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from shlex import quote
from typing import Any

from shufflenet_mlflow.config import FIELDS, option
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.runtime.signals import exit_status

from .say import say
from .streams import OutputError

NOT_REPEATED = ("resume", "new_run", "changed_data", "take_over", "run_name", "requeue")
"""Options that mean one run."""


def train_repeatedly(params: Mapping[str, Any], *, as_json: bool) -> None:
    """Train several times, or go on with that: a study whose trials differ in nothing but the seed."""
    from .stopping import say_how_a_study_goes_on, stop_flag

    for name in NOT_REPEATED:
        if params.get(name):
            raise ConfigError(
                f"{option(name)} means one run, and --repeat several; `--job NAME` goes on with the same",
                code="repeat-of-one-run",
            )
    if params["search"] is not None:
        from shufflenet_mlflow.tracking.connection import Connection
        from shufflenet_mlflow.workflows.searching.found import found_network

        params = {**params, **found_network(params["search"], Connection(params["tracking_uri"]))}
    name = params["job"] or _name_of(params)
    with stop_flag("stopping once the checkpoint is saved; again to stop at once") as stop:
        with stop.at_once():
            from shufflenet_mlflow.config.study import plan_of_repeats
            from shufflenet_mlflow.workflows.tune import run_tune
            from shufflenet_mlflow.workflows.tuning.request import TuneRequest

            from .console import ConsoleReporter, as_typed, next_steps
            from .tables import cell, print_json, print_table

            stop.last_words = partial(say_how_a_study_goes_on, as_typed(f"shufflenet tune --study {quote(name)}"))
        training = {key: value for key, value in params.items() if key in (*FIELDS, "epochs") and value is not None}
        kept = {key: params[key] for key in ("save_dir", "tracking_uri", "experiment", "cache_dir", "grace")}
        plan = plan_of_repeats(params["repeat"], training)
        request = TuneRequest(name, plan, **kept, no_system_metrics=bool(params["no_system_metrics"]))
        summary = run_tune(request, reporter=ConsoleReporter(), stop=stop)
    report = summary.report
    if as_json:
        print_json(summary.to_dict())
    else:
        with suppress(OutputError):
            rows = [
                [str(trial.params["seed"]), cell(trial.values.get(0)), trial.state, trial.run_id or "-"]
                for trial in report.trials
            ]
            print_table(["seed", report.plan.metric, "state", "run_id"], rows)
            if spread := report.spread():
                say(f"{report.plan.metric}  {spread['mean']:.4f} ± {spread['std']:.4f} (mean, standard deviation)")
    steps = (
        [f"shufflenet sync {quote(str(request.folder))}    sends what MLflow does not have"] if summary.pending else []
    )
    if report.parent_run_id is not None:
        steps.append(f"shufflenet compare {report.parent_run_id} OTHER    beside another group, paired by seed")
    next_steps(*steps)
    if summary.stopped_by is not None:
        sys.exit(exit_status(summary.stopped_by))


def _name_of(params: Mapping[str, Any]) -> str:
    """Return a name that the same command has again."""
    given = {
        name: str(value)
        for name, value in params.items()
        if value is not None and name in (*FIELDS, "epochs", "repeat")
    }
    return f"repeat-{hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:10]}"
