"""`shufflenet runs`."""

from typing import TYPE_CHECKING, Any

import click

from shufflenet_mlflow.tracking.names import SYSTEM_SECTION

from .commands import Group
from .options import common_options, config_option, json_option, option, options, run_argument, tracking_uri_option
from .recent import remember

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
    """List runs, or show one of them.

    Columns are run_id, name, status, started, minutes, and every metric, option of training and tags.NAME.

    \b
    Examples:
      shufflenet runs --sort best/val_top1
      shufflenet runs --filter "metrics.`val/top1` > 0.9 and params.seed = '1'"
      shufflenet runs --columns run_id,lr,batch_size,best/val_top1 --json
      shufflenet runs show 01234567
    """
    if ctx.invoked_subcommand is not None:
        return
    from shufflenet_mlflow.workflows.runs import DEFAULT_COLUMNS, list_runs

    from .console import next_steps
    from .tables import cell, print_json, print_table

    columns, filter_string = values["columns"], values["filter_string"] or ""
    table = list_runs(
        experiment=values["experiment"],
        filter_string=filter_string,
        sort=values["sort"] or "started",
        ascending=ascending,
        columns=columns.split(",") if columns else DEFAULT_COLUMNS,
        limit=values["limit"] or LIMIT,
        tracking_uri=values["tracking_uri"],
    )
    remember(values["tracking_uri"], runs={run.info.run_id: run.info.run_name for run in table.runs})
    if as_json:
        print_json(table.to_dicts())
        return
    if not table.runs:
        click.echo(f"experiment {table.experiment}: no runs" + (" that match" if filter_string else ""))
        next_steps("shufflenet train    makes one", "shufflenet runs --experiment NAME    lists another experiment")
        return
    titles = [column.title for column in table.columns]
    print_table(titles, [[cell(value) for value in row] for row in table.rows()], spare=SPARE)
    if table.has_more:
        click.echo(f"the first {len(table.runs)}; --limit shows more", err=True)
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
    click.echo("\n".join(_lines(details)))
    next_steps(f"shufflenet checkpoints ls {details.to_dict()['run_id']}")


def _lines(details: "RunDetails") -> list[str]:
    document = details.to_dict()
    lines = [
        f"run ID      {document['run_id']}",
        f"name        {document['name']}",
        f"experiment  {document['experiment']}",
        f"status      {document['status']}{', deleted' * document['deleted']}",
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
            f"{data['context']:<10}  {data['name']}, {data.get('images')} images of {data.get('classes')} classes "
            f"in {data['source']}  (digest {data['digest'][:12]})"
        )
    for title in ("latest", "best"):
        manifest = document[title]
        if manifest is not None:
            lines.append(f"{title:<10}  {manifest['path']}  sha256 {manifest['sha256'][:12]}")
    for model in document["models"]:
        lines.append(f"model       models:/{model['model_id']}  ({model['name']})")
    metrics = {name: value for name, value in document["metrics"].items() if not name.startswith(SYSTEM_SECTION)}
    if metrics:
        lines += ["", "last values"]
        width = max(map(len, metrics))
        lines += [f"  {name:<{width}}  {value:.6g}" for name, value in sorted(metrics.items())]
    if again := details.reproduce_lines():
        lines += ["", "to repeat it", *(f"  {line}" for line in again)]
    return lines
