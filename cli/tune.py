"""`shufflenet tune`."""

import re
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from shufflenet_mlflow.config.study import DIRECTIONS, METRICS, SAMPLERS
from shufflenet_mlflow.runtime.signals import exit_status

from .commands import StudyGroup
from .completing import Folder
from .option import Option
from .options import common_options, config_option, flag, json_option, option, options, tracking_uri_option
from .recent import remember
from .say import say
from .streams import OutputError
from .train import train

if TYPE_CHECKING:
    from shufflenet_mlflow.workflows.tune import TuneSummary
    from shufflenet_mlflow.workflows.tuning.report import StudyReport

SPECS = re.compile(r"\s+(?=[\w-]+=)")
"""Between two of several KEY=SPEC in one text, as `mlflow run` passes them."""
OF_RUNS = (
    "channel_search",
    "search",
    "resume",
    "new_run",
    "changed_data",
    "take_over",
    "job",
    "run_name",
    "requeue",
    "no_log_models",
    "patience",
    "repeat",
)
"""Options of `train` that a study decides for its trials."""
OF_STUDIES = (
    *("study", "param", "trials", "rungs", "reduction", "generation", "sampler", "asynchronous", "metric", "direction"),
)
"""Options that say what a study is."""
OF_KEEPING = ("storage", "max_parallel", "time_budget", "save_dir", "tracking_uri", "experiment", "cache_dir", "grace")
"""Options that say how and where a study goes on."""


def _training_options(command: Any) -> Any:
    """Add the options of `train` that all trials share."""
    shared = [
        parameter
        for parameter in train.params
        if isinstance(parameter, Option)
        and parameter.name not in (*OF_RUNS, "save_dir")
        and parameter.section is not None
    ]
    command.__click_params__ = [*reversed(shared), *getattr(command, "__click_params__", ())]
    return command


study_option = option("--study", metavar="NAME", help="Name of the study; alone, it goes on with one.  [default: none]")
storage_option = option(
    "--storage",
    metavar="URI",
    help="Optuna storage, such as postgresql://host/db, which workers can share.  [default: a file in --save-dir]",
)
folder_option = option(
    "--save-dir",
    type=Folder(path_type=Path),
    metavar="DIR",
    help="Folder of the study and its trials.  [default: models/NAME]",
)


@click.group(
    cls=StudyGroup,
    invoke_without_command=True,
    usual=(
        *(
            "study",
            "param",
            "trials",
            "rungs",
            "metric",
            "max_parallel",
            "time_budget",
            "save_dir",
            "model",
            "init_from",
        ),
        *("train_dir", "val_dir", "recipe", "batch_size", "epochs", "lr", "device", "workers", "tracking_uri"),
    ),
)
@options(
    study_option,
    option(
        "--param",
        "param",
        multiple=True,
        is_list=True,
        metavar="KEY=SPEC",
        callback=lambda _, __, specs: tuple(part for spec in specs or () for part in SPECS.split(spec)),
        help="Option of training to vary: a,b,c or low:high or log:low:high or int:low:high; repeatable.  "
        "[default: none]",
    ),
    option("--trials", type=int, metavar="N", help="Trials.  [default: 16; grid: all combinations]"),
    option("--rungs", type=int, metavar="R", help="Stages, after each of which only the best go on.  [default: 3]"),
    option("--reduction", type=int, metavar="K", help="One of K trials goes on.  [default: 3]"),
    option("--sampler", type=click.Choice(SAMPLERS), help="How options are drawn.  [default: tpe]"),
    option(
        "--generation",
        type=int,
        metavar="N",
        help="Trials that are drawn together, from the values of those before; at most as many are trained at a time.  "
        "[default: 8]",
    ),
    flag(
        "--asynchronous",
        help="Workers that are free promote or draw at once, instead of waiting until a rung is complete.",
    ),
    option("--metric", type=click.Choice(METRICS), help="Metric of the validation at a rung.  [default: val/top1]"),
    option(
        "--direction", type=click.Choice(DIRECTIONS), help="What is better.  [default: maximize; val/loss: minimize]"
    ),
    option("--max-parallel", type=int, metavar="N", help="Trials at a time, in processes here.  [default: 1]"),
    option(
        "--time-budget", type=float, metavar="SECONDS", help="Stop after this time, to go on later.  [default: none]"
    ),
    storage_option,
    folder_option,
    section="Study",
)
@_training_options
@config_option
@json_option
@common_options
@click.pass_context
def tune(ctx: click.Context, /, as_json: bool, **values: Any) -> None:
    """Search for better options: many short trainings, of which the best go on.

    All trials have one length and schedule. They train to the first rung; the best of them go on from there, bit for
    bit as if they had never paused, and so on to the last. Every decision is written down before it is acted on: after
    any interruption the same command, or `--study NAME` alone, goes on, and ends with the same decisions.

    \b
    Examples:
      shufflenet tune --study lr --param lr=log:0.003:0.3 --epochs 9
      shufflenet tune --study lr
      shufflenet tune show lr
      shufflenet tune stop lr
    """
    if ctx.invoked_subcommand is not None:
        return
    from .stopping import say_how_a_study_goes_on, stop_flag

    with stop_flag("stopping once the checkpoint is saved; again to stop at once") as stop:
        with stop.at_once():
            from shufflenet_mlflow.workflows.tune import run_tune

            from .console import ConsoleReporter, as_typed
            from .tables import print_json

            stop.last_words = partial(
                say_how_a_study_goes_on, as_typed(f"shufflenet tune --study {quote(values['study'])}")
            )
        request = request_of(values)
        summary = run_tune(request, reporter=ConsoleReporter(), stop=stop)
    runs = {trial.run_id: f"{request.study} {trial.number}" for trial in summary.report.trials if trial.run_id}
    remember(request.tracking_uri, runs=runs)
    if as_json:
        print_json(summary.to_dict())
    else:
        with suppress(OutputError):
            show_report(summary.report, summary.reason)
    _next_steps(summary, str(request.folder))
    if summary.stopped_by is not None:
        sys.exit(exit_status(summary.stopped_by))


@tune.command()
@click.argument("study", metavar="STUDY")
@storage_option
@folder_option
@tracking_uri_option
@option("--experiment", metavar="NAME", section="MLflow", help="MLflow experiment.  [default: all]")
@config_option
@json_option
@common_options
def show(study: str, as_json: bool, **values: Any) -> None:
    """Show the study STUDY: its trials, their values at each rung, the best.

    \b
    Examples:
      shufflenet tune show lr
      shufflenet tune show lr --storage postgresql://host/studies --json
    """
    from shufflenet_mlflow.workflows.tune import show_study
    from shufflenet_mlflow.workflows.tuning.request import TuneRequest

    from .tables import print_json

    report = show_study(TuneRequest(study, **values))
    if as_json:
        print_json(report.to_dict())
        return
    show_report(report)


@tune.command()
@click.argument("study", metavar="STUDY")
@storage_option
@folder_option
@config_option
@json_option
@common_options
def stop(study: str, as_json: bool, **values: Any) -> None:
    """Stop the workers of the study STUDY, once their checkpoints are saved.

    They look every five seconds. The study can be gone on with: `shufflenet tune --study STUDY`.

    \b
    Examples:
      shufflenet tune stop lr
    """
    from shufflenet_mlflow.workflows.tune import stop_study
    from shufflenet_mlflow.workflows.tuning.request import TuneRequest

    from .console import next_steps
    from .tables import print_json

    report = stop_study(TuneRequest(study, **values))
    if as_json:
        print_json(report.to_dict())
        return
    if report.is_complete:
        say(f"study {study} is complete, so there is nothing to stop: {report.progress()}")
        next_steps(f"shufflenet tune show {quote(study)}    its trials")
        return
    say(f"study {study} stops: {report.progress()}")
    next_steps(f"shufflenet tune --study {quote(study)}    goes on")


def request_of(values: dict[str, Any]) -> Any:
    """Return the request that the options of the command mean."""
    from shufflenet_mlflow.config.study import plan_of
    from shufflenet_mlflow.workflows.tuning.request import TuneRequest

    training = {
        name: value
        for name, value in values.items()
        if value is not None and name not in (*OF_STUDIES, *OF_KEEPING, "no_system_metrics")
    }
    plan = plan_of(values, training) if values["param"] else None
    kept = {name: values[name] for name in OF_KEEPING}
    return TuneRequest(values["study"], plan, **kept, no_system_metrics=bool(values["no_system_metrics"]))


def show_report(report: "StudyReport", reason: str = "") -> None:
    """Print the trials and the best of them."""
    from .tables import cell, print_table

    names = [param.name for param in report.plan.space]
    rungs = [f"rung {rung + 1}" for rung in range(report.plan.rungs)]
    rows = [
        [
            str(trial.number),
            *(cell(trial.params.get(name)) for name in names),
            *(cell(trial.values.get(rung)) for rung in range(report.plan.rungs)),
            report.state_of(trial),
            trial.run_id or "-",
        ]
        for trial in report.trials
    ]
    if rows:
        print_table(["trial", *names, *rungs, "state", "run_id"], rows, spare=("state",))
    say(f"study     {report.name}: {report.progress()}" + (f"; {reason}" if reason else ""))
    if report.best is not None:
        value = report.best.values[max(report.best.values)]
        say(f"best      trial {report.best.number}, {report.plan.metric} {value:.4f}")
        say(f"repeat    {report.command()}")


def _next_steps(summary: "TuneSummary", folder: str) -> None:
    from .console import next_steps

    report, steps = summary.report, []
    if summary.pending:
        steps.append(f"shufflenet sync {quote(folder)}    sends what MLflow does not have")
    if report.best is not None and report.checkpoint is not None:
        steps.append(f"shufflenet eval {quote(report.checkpoint)}")
    if not report.is_complete:
        steps.append(f"shufflenet tune --study {quote(report.name)}    goes on")
    next_steps(*steps)
