"""`shufflenet sync`."""

from pathlib import Path
from shlex import quote

import click

from shufflenet_mlflow.runtime.text import counted

from .commands import Command
from .completing import Folder
from .options import common_options, config_option, json_option, tracking_uri_option
from .say import say


@click.command(cls=Command)
@click.argument("directory", metavar="DIR", type=Folder(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Only list what would be sent.")
@click.option("--refused", is_flag=True, help="Also send again what MLflow has refused.")
@tracking_uri_option
@config_option
@json_option
@common_options
def sync(directory: Path, dry_run: bool, refused: bool, tracking_uri: str | None, as_json: bool) -> None:
    """Send MLflow what training could not deliver.

    DIR is the folder of its checkpoints, that of a study, or `mlflow-journal` with the runs of other programs, which
    durable+http:// has kept there.

    Nothing is sent twice, however often this is interrupted. The store is the one that training used; if it was
    not on this machine, name it with --tracking-uri.

    \b
    Examples:
      shufflenet sync models/0123456789abcdef0123456789abcdef --dry-run
      shufflenet sync pets/models
    """
    from shufflenet_mlflow.workflows.sync import describe_entries, run_sync_of_all

    from .console import ConsoleReporter, next_steps
    from .stopping import stop_flag
    from .tables import print_json

    with stop_flag("what is not sent yet is kept") as stop:
        summary = run_sync_of_all(
            directory,
            dry_run=dry_run,
            refused=refused,
            tracking_uri=tracking_uri,
            reporter=ConsoleReporter(),
            stop=stop,
        )
    if as_json:
        print_json(summary.to_dict())
        return
    run = summary.run_id or "a run that MLflow has not created yet"
    store = summary.tracking_uri
    if summary.run_id is None and summary.journals:
        run, store = counted(len(summary.journals), "run"), summary.journals[0].tracking_uri
    beside = f" and its {counted(len(summary.trials), 'trial')}" if summary.trials else ""
    if summary.all_sent:
        say(f"sent {counted(summary.all_sent, 'entry', 'entries')} to {run}{beside}")
    for folder, number in summary.all_refused().items():
        say(
            f"{counted(number, 'entry was', 'entries were')} refused by MLflow and kept in "
            f"{folder / 'spool.refused.jsonl'}; `shufflenet sync {quote(str(folder))} --refused` sends again"
        )
    if not summary.all_pending:
        say(f"nothing is pending in {directory}")
        if summary.run_id:
            named = "" if tracking_uri or not store else f" --tracking-uri {quote(store)}"
            next_steps(f"shufflenet runs show {summary.run_id}{named}")
        return
    say(
        counted(len(summary.all_pending), "entry is", "entries are")
        + f" pending for {run}{beside} in {store}: "
        + describe_entries(summary.all_pending)
    )
    for manifest in summary.uploads():
        say(f"  {manifest['path'].rpartition('/')[2]}  {manifest['bytes'] / 1e6:.1f} MB")
    next_steps(f"shufflenet sync {quote(str(directory))}    " + ("sends it" if dry_run else "again, once it answers"))
