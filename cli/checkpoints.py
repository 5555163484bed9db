"""`shufflenet checkpoints`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import click

from shufflenet_mlflow.runtime.text import counted

from .commands import Group
from .completing import REFERENCE, Folder, ImageSet
from .options import (
    cache_dir_option,
    common_options,
    config_option,
    json_option,
    keep_options,
    option,
    ref_argument,
    tracking_uri_option,
)
from .recent import remember
from .say import say

if TYPE_CHECKING:
    from shufflenet_mlflow.workflows.checkpoints import CheckpointRow


@click.group(cls=Group)
def checkpoints() -> None:
    """List, verify, fetch, prune and promote checkpoints.

    \b
    Examples:
      shufflenet checkpoints ls pets/models
      shufflenet checkpoints prune 01234567 --keep-last 3 --dry-run
      shufflenet checkpoints promote 01234567@best --name pets --alias champion
    """


@checkpoints.command("ls")
@ref_argument
@tracking_uri_option
@config_option
@json_option
@common_options
def ls(ref: str, tracking_uri: str | None, as_json: bool) -> None:
    """List the checkpoints of REF, a folder or a run ID, newest first.

    For a folder, the list includes those of its run. If its files are of several runs, it says whose each one is.

    \b
    Examples:
      shufflenet checkpoints ls pets/models
      shufflenet checkpoints ls 01234567 --json
    """
    from shufflenet_mlflow.workflows.checkpoints import is_known, list_rows

    from .console import ConsoleReporter, next_steps
    from .tables import SHORT_ID, print_json, print_table

    rows = list_rows(ref, tracking_uri=tracking_uri, reporter=ConsoleReporter())
    if as_json:
        print_json([row.to_dict() for row in rows])
        return
    if not rows:
        say(f"{ref}: no checkpoints")
        return
    titles = ["iters", "epoch", "loss", _score_title(rows), "size", "sha256", "where", "marks", "file"]
    cells = [_cells(row, titles[3]) for row in rows]
    if len({row.run_id for row in rows}) > 1:
        titles.insert(-1, "run")
        for line, row in zip(cells, rows, strict=True):
            line.insert(-1, (row.run_id or "-")[:SHORT_ID])
    print_table(titles, cells, spare=("sha256", "epoch", "size"))
    waits = any(row.pending for row in rows)
    next_steps(
        *([f"shufflenet sync {quote(ref)}    uploads what is pending"] if waits else []),
        *([f"shufflenet eval {quote(ref)}"] if is_known(rows[0].network) else []),
        f"shufflenet checkpoints verify {quote(ref)}",
    )


SEVERAL = "score"
"""Title of the column if different metrics decide; its cells then name them."""


def _score_title(rows: "Sequence[CheckpointRow]") -> str:
    from shufflenet_mlflow.runtime.text import visible

    names = {_score(row)[0] for row in rows if _score(row)[1] is not None}
    return visible(names.pop()) if len(names) == 1 else SEVERAL if names else "val_top1"


def _score(row: "CheckpointRow") -> tuple[str, float | None]:
    """Return the metric that decides which checkpoint is the best, and its value."""
    return ("val_top1", row.val_top1) if row.monitor is None else (row.monitor, row.value)


def _cells(row: "CheckpointRow", score_title: str) -> list[str]:
    from shufflenet_mlflow.runtime.text import visible

    from .tables import cell

    where = [word for word, holds in (("local", row.local), ("remote", row.remote), ("pending", row.pending)) if holds]
    marks = [word for word in ("latest", "best", "promoted") if getattr(row, word)]
    name, value = _score(row)
    score = _decimal(value) if value is None or score_title != SEVERAL else visible(f"{name}={_decimal(value)}")
    return [
        *(str(row.iters), cell(row.epoch), _decimal(row.loss), score, _megabytes(row.bytes)),
        *((row.sha256 or "-")[:12], "+".join(where), " ".join(marks), visible(row.file)),
    ]


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f} MB"


@checkpoints.command()
@ref_argument
@tracking_uri_option
@cache_dir_option
@config_option
@json_option
@common_options
def verify(ref: str, tracking_uri: str | None, cache_dir: Path | None, as_json: bool) -> None:
    """Verify REF: one checkpoint, or all in a folder or a run. The exit status is 1 if one is invalid.

    Checks every CRC in the file, and its size and SHA-256 if it has a manifest. A run's checkpoints are fetched first.

    \b
    Examples:
      shufflenet checkpoints verify pets/models
      shufflenet checkpoints verify runs:/01234567@best
    """
    from shufflenet_mlflow.workflows.checkpoints import names_network, verify_all

    from .console import ConsoleReporter, next_steps
    from .tables import print_json

    verdicts = verify_all(ref, tracking_uri=tracking_uri, cache_dir=cache_dir, reporter=ConsoleReporter())
    if as_json:
        print_json([verdict.to_dict() for verdict in verdicts])
    else:
        for verdict in verdicts:
            say(
                f"{'ok     ' if verdict.ok else 'INVALID'}  {verdict.reason or verdict.file}"
                + (f"  ({verdict.note})" if verdict.note else "")
            )
    unsound = sum(not verdict.ok for verdict in verdicts)
    if unsound:
        if not as_json:
            next_steps("resuming and eval skip invalid checkpoints and take the newest valid one")
        sys.exit(1)
    if not as_json and Path(ref).is_dir() and names_network(Path(ref)):
        next_steps(f"shufflenet eval {quote(ref)}")


@checkpoints.command()
@ref_argument
@option(
    "--output", type=Folder(path_type=Path), metavar="DIR", help="Folder for the file.  [default: the cache folder]"
)
@tracking_uri_option
@cache_dir_option
@config_option
@json_option
@common_options
def pull(ref: str, output: Path | None, tracking_uri: str | None, cache_dir: Path | None, as_json: bool) -> None:
    """Fetch the checkpoint REF and print its path. The file appears there once it is verified.

    \b
    Examples:
      shufflenet checkpoints pull runs:/01234567@best --output .
      shufflenet checkpoints pull models:/pets@champion
    """
    from shufflenet_mlflow.workflows import checkpoints as job

    from .console import ConsoleReporter, next_steps
    from .tables import print_json

    found = job.pull(ref, output=output, tracking_uri=tracking_uri, cache_dir=cache_dir, reporter=ConsoleReporter())
    if as_json:
        print_json({"path": str(found.path), "iters": found.iters, "run_id": found.run_id})
        return
    say(str(found.path))
    if job.names_network(found.path):
        next_steps(f"shufflenet eval {quote(str(found.path))} --val-dir DIR")


@checkpoints.command()
@ref_argument
@keep_options
@click.option("--dry-run", is_flag=True, help="Only list what would be deleted.")
@tracking_uri_option
@config_option
@json_option
@common_options
def prune(
    ref: str,
    keep_last: int | None,
    keep_best: int | None,
    keep_every: int | None,
    dry_run: bool,
    tracking_uri: str | None,
    as_json: bool,
) -> None:
    """Delete the checkpoints of REF, a folder and its run or a run, that no --keep rule keeps.

    Never deleted: the newest valid one, the best, promoted ones, those that are not uploaded yet, and files that this
    project did not write.

    \b
    Examples:
      shufflenet checkpoints prune pets/models --keep-last 3 --dry-run
      shufflenet checkpoints prune 01234567 --keep-every 10000
    """
    from shufflenet_mlflow.checkpoints.retention import Retention
    from shufflenet_mlflow.workflows import checkpoints as job

    from .console import next_steps
    from .tables import print_json

    rules = Retention(keep_last, keep_best, keep_every)
    dropped = job.prune(ref, rules, dry_run=dry_run, tracking_uri=tracking_uri)
    if as_json:
        print_json({"dry_run": dry_run, "dropped": [item.to_dict() for item in dropped]})
        return
    verb = "would delete" if dry_run else "deleted"
    for item in dropped:
        where = " and ".join(word for word, holds in (("disk", item.on_disk), ("run", item.in_run)) if holds)
        say(f"{verb}  {item.manifest.file_name}  {_megabytes(item.manifest.bytes)}  ({where})")
    say(
        f"{verb} {counted(len(dropped), 'checkpoint')}, "
        f"{_megabytes(sum(item.manifest.bytes for item in dropped))} in each place"
    )
    next_steps("the same without --dry-run deletes them" if dry_run else f"shufflenet checkpoints ls {quote(ref)}")


@checkpoints.command()
@ref_argument
@click.option("--name", required=True, help="Registered model; created if it does not exist.")
@click.option(
    "--alias",
    "aliases",
    multiple=True,
    metavar="ALIAS",
    help="Alias of the version, such as champion; may be repeated.",
)
@option(
    "--if-better",
    metavar="REF",
    type=REFERENCE,
    help="Only if better beyond chance than this one, on the same images.  [default: in any case]",
)
@option(
    "--val-dir",
    metavar="DIR",
    type=ImageSet(),
    help="Images for --if-better.  [default: the validation images of REF's run]",
)
@tracking_uri_option
@cache_dir_option
@config_option
@json_option
@common_options
def promote(
    ref: str,
    name: str,
    aliases: tuple[str, ...],
    if_better: str | None,
    val_dir: str | None,
    tracking_uri: str | None,
    cache_dir: Path | None,
    as_json: bool,
) -> None:
    """Register the checkpoint REF of a run as a version of a model.

    A run ID alone means the run's best. models:/NAME@ALIAS then names it, for every command that takes a checkpoint,
    and for MLflow, which can serve it. A promoted checkpoint is never pruned.

    REF may also be an exported .onnx: MLflow then loads and serves that file, and the version has its size, and the
    accuracy and latency that its run knows, as tags. In this program the version still means the checkpoint.

    With --if-better both are evaluated on the same images, and REF is refused, with exit status 1, unless it is better
    by more than chance (McNemar's exact test, one-sided, at 5 %).

    \b
    Examples:
      shufflenet checkpoints promote 01234567 --name pets --alias champion
      shufflenet checkpoints promote 0123 --name pets --if-better models:/pets/1
      shufflenet predict models:/pets@champion cat.jpg
      mlflow models serve -m models:/pets@champion --env-manager local
    """
    from shufflenet_mlflow.workflows.export import run_promotion

    from .console import ConsoleReporter, next_steps
    from .stopping import stop_flag
    from .tables import print_json

    gate = None
    if if_better is not None:
        from shufflenet_mlflow.workflows.gate import require_better

        with stop_flag() as stop:
            gate = require_better(
                ref,
                if_better,
                val_dir=val_dir,
                tracking_uri=tracking_uri,
                cache_dir=cache_dir,
                reporter=ConsoleReporter(),
                stop=stop,
            )
    promoted = run_promotion(
        ref,
        name=name,
        aliases=aliases,
        tracking_uri=tracking_uri,
        cache_dir=cache_dir,
        reporter=ConsoleReporter(),
    )
    remember(
        tracking_uri, aliases={f"{promoted.name}@{alias}": f"version {promoted.version}" for alias in promoted.aliases}
    )
    if as_json:
        print_json({**promoted.to_dict(), **({} if gate is None else {"gate": gate.to_dict()})})
        return
    if gate is not None:
        say(gate.in_words())
    say(f"{promoted.uri} is version {promoted.version} of {promoted.name}: {promoted.checkpoint}")
    next_steps(
        f"shufflenet predict {promoted.uri} IMAGE",
        f"mlflow models serve -m {promoted.uri} --env-manager local --port 5001",
    )
