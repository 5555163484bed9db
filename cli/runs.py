"""`shufflenet runs`."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shufflenet_mlflow.evaluation.top5 import is_trivial
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.tracking.names import STUDY_TAG, SYSTEM_SECTION

from .commands import Group
from .completing import RUN
from .option import similar
from .options import common_options, config_option, json_option, option, options, run_argument, tracking_uri_option
from .recent import remember
from .say import say

if TYPE_CHECKING:
    from shufflenet_mlflow.workflows.runs import RunDetails

LIMIT = 50
SPARE = ("started", "minutes", "status", "val/top1")
"""Columns that a narrow terminal drops, in this order."""


@click.group(cls=Group, invoke_without_command=True)
@options(
    option(
        "--filter",
        "filter_string",
        metavar="EXPR",
        help="Filter in the syntax of MLflow's search.  [default: all runs]",
    ),
    option("--study", metavar="NAME", help="Only a study and its trials.  [default: all runs]"),
    option("--sort", metavar="COLUMN", help="Column to sort by, highest first.  [default: started]"),
    click.option("--ascending", is_flag=True, help="Lowest first."),
    option(
        "--columns",
        metavar="LIST",
        is_list=True,
        help="Columns, such as name,lr,best/val_top1,tags.job.  [default: the main ones]",
    ),
    option("--limit", type=int, metavar="N", help=f"Most rows.  [default: {LIMIT}]"),
    section="Rows and columns",
)
@option("--experiment", metavar="NAME", section="MLflow", help="MLflow experiment.  [default: shufflenet]")
@tracking_uri_option
@config_option
@json_option
@common_options
@click.pass_context
def runs(ctx: click.Context, /, as_json: bool, ascending: bool, **values: Any) -> None:
    """List runs, show one of them, or mend their status.

    Columns are run_id, name, status, started, minutes, data, and every metric, option of training and tags.NAME.

    \b
    Examples:
      shufflenet runs --sort best/val_top1
      shufflenet runs --filter 'metrics.`val/top1` > 0.9 and params.seed = "1"'
      shufflenet runs --columns run_id,data,lr,batch_size,best/val_top1 --json
      shufflenet runs show 01234567
      shufflenet runs mend 01234567
    """
    if ctx.invoked_subcommand is not None:
        return
    from shufflenet_mlflow.workflows.runs import DEFAULT_COLUMNS, list_runs, require_study

    from .console import next_steps
    from .tables import cell, print_json, print_table

    columns, filter_string = values["columns"], values["filter_string"] or ""
    if values["study"] is not None:
        of_study = f"tags.`{STUDY_TAG}` = '{values['study']}'"
        filter_string = f"{filter_string} and {of_study}" if filter_string else of_study
    table = list_runs(
        experiment=values["experiment"],
        filter_string=filter_string,
        sort=values["sort"] or "started",
        ascending=ascending,
        columns=columns.split(",") if columns else DEFAULT_COLUMNS,
        limit=values["limit"] or LIMIT,
        tracking_uri=values["tracking_uri"],
    )
    if values["study"] is not None and not table.runs and values["filter_string"] is None:
        require_study(values["study"], table.experiment, values["tracking_uri"])
    remember(values["tracking_uri"], runs={run.info.run_id: run.info.run_name for run in table.runs})
    if as_json:
        print_json(table.to_dicts())
        return
    if table.elsewhere:
        listed = ", ".join(f"{name} ({counted(count, 'run')})" for name, count in islice(table.elsewhere.items(), 5))
        say(f"other experiments hold runs, too: {listed}; --experiment NAME lists them", err=True)
    if not table.runs:
        say(f"experiment {table.experiment}: no runs" + (" that match" if filter_string else ""))
        next_steps("shufflenet train    makes one", "shufflenet runs --experiment NAME    lists another experiment")
        return
    titles = [column.title for column in table.columns]
    print_table(titles, [[cell(value) for value in row] for row in table.rows_in_words()], spare=SPARE)
    for title in table.unknown(values["sort"]):
        meant = similar(title, table.names())
        say(f"no run here has {title!r}" + (f"; did you mean {' or '.join(meant)}?" if meant else ""), err=True)
    if table.has_more:
        say(f"the first {len(table.runs)}; --limit shows more", err=True)
    if abandoned := table.abandoned():
        next_steps(_mending(*abandoned))
    next_steps("shufflenet runs show RUN    one in full", "shufflenet compare RUN RUN    their differences")


@runs.command()
@run_argument
@tracking_uri_option
@config_option
@json_option
@common_options
def show(run: str, tracking_uri: str | None, as_json: bool) -> None:
    """Show the run RUN in full: data, code, versions, hardware, results, and the command that repeats it.

    \b
    Examples:
      shufflenet runs show 01234567
      shufflenet runs show 0123456789abcdef0123456789abcdef --json
    """
    from shufflenet_mlflow.workflows.runs import show_run

    from .console import next_steps
    from .tables import print_json

    details = show_run(run, tracking_uri=tracking_uri)
    remember(tracking_uri, runs={details.run.info.run_id: details.run.info.run_name})
    if as_json:
        print_json(details.to_dict())
        return
    say(*_lines(details))
    run_id = details.run.info.run_id
    if details.is_abandoned:
        next_steps(_mending(run_id))
    if details.latest is not None:
        next_steps(f"shufflenet checkpoints ls {run_id}")


@runs.command()
@click.argument("refs", metavar="RUN...", nargs=-1, required=True, type=RUN)
@tracking_uri_option
@config_option
@json_option
@common_options
def mend(refs: tuple[str, ...], tracking_uri: str | None, as_json: bool) -> None:
    """Set RUNs to KILLED that are RUNNING although the process that trained them is gone.

    Refused while that process is at work; on another machine, that may take up to half a minute to find out. Runs that
    have ended are left as they are. Checkpoints and metrics stay, and the runs can be resumed as before.

    \b
    Examples:
      shufflenet runs mend 01234567
      shufflenet runs mend 01234567 89abcdef --json
    """
    from shufflenet_mlflow.workflows.runs import mend_runs

    from .console import ConsoleReporter, next_steps
    from .tables import print_json

    mended = mend_runs(refs, tracking_uri=tracking_uri, reporter=ConsoleReporter())
    remember(tracking_uri, runs={run.run_id: run.name for run in mended})
    if as_json:
        print_json([run.to_dict() for run in mended])
        return
    for run in mended:
        say(f"run {run.run_id}  {run.before}" + ("" if run.before == run.status else f" -> {run.status}"))
    next_steps("shufflenet train --resume RUN    goes on with one")


@runs.command("log-bench")
@run_argument
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@tracking_uri_option
@config_option
@json_option
@common_options
def log_bench(run: str, file: Path, tracking_uri: str | None, as_json: bool) -> None:
    """Log what bench_device.py measured on a device to RUN.

    FILE is the script's JSON. It becomes an artifact of the run, and its figures metrics in the section deploy/.

    \b
    Examples:
      shufflenet runs log-bench 01234567 pets.json
    """
    from shufflenet_mlflow.workflows.bench_deploy import log_bench as log

    from .console import next_steps
    from .tables import SHORT_ID, print_json

    run_id, kinds = log(run, file, tracking_uri=tracking_uri)
    remember(tracking_uri, runs={run_id: ""})
    if as_json:
        print_json({"run_id": run_id, "kinds": kinds})
        return
    say(f"logged to run {run_id}: {', '.join(kinds)}")
    next_steps(f"shufflenet runs show {run_id[:SHORT_ID]}")


def _mending(*run_ids: str) -> str:
    return f"shufflenet runs mend {' '.join(run_ids)}    ends runs whose process is gone"


def _counted(data: dict[str, Any], noun: str, plural: str | None = None) -> str:
    """Return a count of a data set; its profile may come from another program."""
    number = data.get(plural or f"{noun}s")
    return counted(number, noun, plural) if isinstance(number, int) else f"{number} {plural or f'{noun}s'}"


def _lines(details: "RunDetails") -> list[str]:
    from shufflenet_mlflow.tracking.abandoned import status_in_words

    document = details.to_dict()
    lines = [
        f"run ID      {document['run_id']}",
        f"name        {document['name']}",
        f"experiment  {document['experiment']}",
        f"status      {status_in_words(details.run)}{', deleted' * document['deleted']}",
        f"time        {document['started']} to {document['ended'] or 'now'}",
    ]
    if document["command"]:
        lines.append(f"command     {document['command']}")
    if document["commit"]:
        lines.append(
            f"commit      {document['commit']}" + ("  (with uncommitted changes)" if document["dirty"] else "")
        )
    for title in ("versions", "hardware"):
        if document[title]:
            lines.append(f"{title:<10}  " + ", ".join(f"{name} {value}" for name, value in document[title].items()))
    for data in document["data"]:
        lines.append(
            f"{data['context']:<10}  {data['name']}, {_counted(data, 'image')} of "
            f"{_counted(data, 'class', 'classes')} in {data['source']}  (digest {data['digest'][:12]})"
        )
    for title in ("latest", "best"):
        manifest = document[title]
        if manifest is not None:
            lines.append(f"{title:<10}  {manifest['path']}  sha256 {manifest['sha256'][:12]}")
    for model in document["models"]:
        lines.append(f"model       models:/{model['model_id']}  ({model['name']})")
    metrics = {
        name: value
        for name, value in document["metrics"].items()
        if not name.startswith(SYSTEM_SECTION) and not is_trivial(name, value, document["params"])
    }
    if metrics:
        lines += ["", "last values"]
        width = max(map(len, metrics))
        lines += [f"  {name:<{width}}  {value:.6g}" for name, value in sorted(metrics.items())]
    if again := details.reproduce_lines():
        lines += ["", "to repeat it", *(f"  {line}" for line in again)]
    return lines
