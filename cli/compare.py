"""`shufflenet compare`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .commands import Command
from .completing import RUN, Folder
from .options import common_options, config_option, json_option, option, tracking_uri_option
from .recent import remember

if TYPE_CHECKING:
    from shufflenet_mlflow.compare import Comparison, PairedTest

SHOWN_CHANGES = 5


@click.command(cls=Command)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=RUN)
@option(
    "--out",
    type=Folder(path_type=Path),
    metavar="DIR",
    help="Folder for compare.html and the curves as PNG.  [default: none]",
)
@tracking_uri_option
@config_option
@json_option
@common_options
def compare(runs: tuple[str, ...], out: Path | None, tracking_uri: str | None, as_json: bool) -> None:
    """Compare RUNs: options, results, curves, significance.

    Shows the options that differ, and the results with the best marked; with --out the curves, too.

    If the first run and another one were evaluated on the same images, it lists those that only one of them gets right,
    and says whether the difference is more than chance (McNemar's exact test).

    \b
    Examples:
      shufflenet compare 01234567 89abcdef
      shufflenet compare 01234567 89abcdef fedcba98 --out comparison
    """
    from shufflenet_mlflow.workflows.compare import run_comparison

    from .console import next_steps
    from .tables import print_json

    summary = run_comparison(runs, out=out, tracking_uri=tracking_uri)
    remember(tracking_uri, runs={run.run_id: run.name for run in summary.comparison.runs})
    if as_json:
        print_json({**summary.comparison.to_dict(), "written": [str(path) for path in summary.written]})
        return
    _show(summary.comparison)
    for path in summary.written:
        click.echo(f"written  {path}")
    next_steps(*_next_steps(summary.comparison))


def _show(comparison: "Comparison") -> None:
    from .tables import cell, print_table

    print_table(("run", "name", "status"), [(run.short_id, cell(run.name), run.status) for run in comparison.runs])
    ids = [run.short_id for run in comparison.runs]
    if comparison.differing:
        click.echo()
        print_table(("differing", *ids), [(name, *map(cell, values)) for name, values in comparison.differing.items()])
    if comparison.results:
        click.echo()
        rows = [
            (
                row.metric,
                *(f"{cell(value)}{' *' if number in row.best else '  '}" for number, value in enumerate(row.values)),
            )
            for row in comparison.results
        ]
        print_table(("last value", *ids), rows)
        click.echo("* best")
        for section in sorted({row.metric.rpartition("/")[0] for row in comparison.results if not row.is_comparable}):
            click.echo(f"{section} was measured on different images in these runs: no value is marked as best")
    for test in comparison.tests:
        click.echo()
        _show_test(test)


def _next_steps(comparison: "Comparison") -> list[str]:
    steps = []
    if not comparison.tests:
        listed = " and ".join(run.short_id for run in comparison.runs)
        steps.append(f"shufflenet eval RUN    for {listed}: is the difference more than chance?")
    accuracies = [row for row in comparison.results if row.metric == "best/val_top1" and row.best]
    if accuracies:
        best = comparison.runs[accuracies[0].best[0]]
        steps.append(f"shufflenet checkpoints promote {best.short_id}@best --name NAME")
    return steps


def _show_test(test: "PairedTest") -> None:
    first, second = test.first, test.second
    click.echo(
        f"{first.data}, the same {test.images} images: {first.run_id[:8]} {first.top1:.4f}, "
        f"{second.run_id[:8]} {second.top1:.4f}"
    )
    for run_id, changes in ((first.run_id, test.only_first), (second.run_id, test.only_second)):
        click.echo(f"  {len(changes)} images only {run_id[:8]} gets right")
        for change in changes[:SHOWN_CHANGES]:
            click.echo(f"    {change.path}: {change.label}, predicted as {change.first} / {change.second}")
        if len(changes) > SHOWN_CHANGES:
            click.echo(f"    and {len(changes) - SHOWN_CHANGES} more; --json lists them all")
    click.echo(f"  {test.verdict}")
