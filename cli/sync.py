"""`shufflenet sync`."""

from pathlib import Path

import click

from .options import debug_option, json_option, tracking_uri_option


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Only say what waits.")
@tracking_uri_option
@json_option
@debug_option
def sync(directory: Path, dry_run: bool, tracking_uri: str | None, as_json: bool) -> None:
    """Bring to MLflow what training could not deliver, from DIR, the folder of its checkpoints.

    Nothing arrives twice, however often this is interrupted. The store is the one that training used, unless
    --tracking-uri names another address of it.
    """
    from shufflenet_mlflow.jobs.sync import describe_entries, run_sync

    from .console import ConsoleReporter, print_json
    from .stopping import stop_flag

    with stop_flag("what is not sent yet stays where it is") as stop:
        summary = run_sync(directory, dry_run=dry_run, tracking_uri=tracking_uri, reporter=ConsoleReporter(), stop=stop)
    if as_json:
        print_json(summary.to_dict())
        return
    run = summary.run_id or "a run that is yet to be made"
    if not dry_run:
        click.echo(f"sent {summary.sent} entries to {run}")
    if not summary.pending:
        click.echo(f"nothing waits in {directory}")
        return
    click.echo(
        f"{len(summary.pending)} entries wait for {run} in {summary.tracking_uri}: {describe_entries(summary.pending)}"
    )
    for record in summary.uploads():
        click.echo(f"  {record['path'].rpartition('/')[2]}  {record['bytes'] / 1e6:.1f} MB")
