"""`shufflenet sync`."""

from pathlib import Path
from shlex import quote

import click

from .commands import Command
from .completing import Folder
from .options import common_options, config_option, json_option, tracking_uri_option


@click.command(cls=Command)
@click.argument("directory", metavar="DIR", type=Folder(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Only list what would be sent.")
@tracking_uri_option
@config_option
@json_option
@common_options
def sync(directory: Path, dry_run: bool, tracking_uri: str | None, as_json: bool) -> None:
    """Send MLflow what training could not deliver.

    DIR is the folder of its checkpoints.

    Nothing is sent twice, however often this is interrupted. The store is the one that training used, unless
    --tracking-uri gives another address for it.

    \b
    Examples:
      shufflenet sync models/0123456789abcdef0123456789abcdef --dry-run
      shufflenet sync pets/models
    """
    from shufflenet_mlflow.workflows.sync import describe_entries, run_sync

    from .console import ConsoleReporter, next_steps
    from .stopping import stop_flag
    from .tables import print_json

    with stop_flag("what is not sent yet is kept") as stop:
        summary = run_sync(directory, dry_run=dry_run, tracking_uri=tracking_uri, reporter=ConsoleReporter(), stop=stop)
    if as_json:
        print_json(summary.to_dict())
        return
    run = summary.run_id or "a run that MLflow has not created yet"
    if summary.sent:
        click.echo(f"sent {summary.sent} entries to {run}")
    if not summary.pending:
        click.echo(f"nothing is pending in {directory}")
        if summary.run_id:
            next_steps(f"shufflenet runs show {summary.run_id}")
        return
    click.echo(
        f"{len(summary.pending)} entries are pending for {run} in {summary.tracking_uri}: "
        + describe_entries(summary.pending)
    )
    for manifest in summary.uploads():
        click.echo(f"  {manifest['path'].rpartition('/')[2]}  {manifest['bytes'] / 1e6:.1f} MB")
    next_steps(f"shufflenet sync {quote(str(directory))}    " + ("sends it" if dry_run else "again, once it answers"))
