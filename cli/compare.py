"""`shufflenet compare`."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import click

from shufflenet_mlflow.checkpoints.references import is_exported
from shufflenet_mlflow.runtime.text import counted

from .commands import Command
from .completing import RUN
from .errors import UsageError
from .options import common_options, config_option, json_option, option, tracking_uri_option
from .recent import remember
from .say import say

if TYPE_CHECKING:
    from shufflenet_mlflow.compare import Comparison, GroupComparison, PairedTest

SHOWN_CHANGES = 5


@click.command(cls=Command)
@click.argument("runs", metavar="RUN...", nargs=-1, type=RUN)
@option("--study", metavar="NAME", help="The best trials of a study, in place of RUNs.  [default: none]")
@option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="PAGE|DIR",
    help="A page to send, such as page.html; or a folder for compare.html and compare.json.  [default: none]",
)
@tracking_uri_option
@config_option
@json_option
@common_options
def compare(
    runs: tuple[str, ...], study: str | None, out: Path | None, tracking_uri: str | None, as_json: bool
) -> None:
    """Compare RUNs: options, results, curves, significance; or exported files with their checkpoints.

    Shows the options that differ, and the results with the best marked. --out writes a page that begins with the
    verdict and has curves and images; it is one file that loads nothing.

    If the first run and another one were evaluated on the same images, it lists those that only one of them gets right,
    and says whether the difference is more than chance (McNemar's exact test).

    The runs of two or more `train --repeat` are compared as groups, too: paired by seed, with a bootstrap interval.

    Exported files (.onnx, .xml, .pt2) in place of RUNs are each compared with the checkpoint that they were made from:
    how many images changed sides, and whether that is more than chance. `shufflenet eval` of both comes first.

    \b
    Examples:
      shufflenet compare 01234567 89abcdef
      shufflenet compare 01234567 89abcdef fedcba98 --out page.html
      shufflenet compare pets.int8.onnx
    """
    if not runs and study is None:
        raise UsageError("Missing argument 'RUN...'.", click.get_current_context(), code="compare-nothing")
    if any(map(is_exported, runs)):
        _compare_exports(runs, out, tracking_uri, as_json=as_json)
        return
    from shufflenet_mlflow.workflows.compare import run_comparison

    from .console import next_steps
    from .tables import print_json

    summary = run_comparison(runs, out=out, tracking_uri=tracking_uri, study=study)
    remember(tracking_uri, runs={run.run_id: run.name for run in summary.comparison.runs})
    if as_json:
        print_json({**summary.comparison.to_dict(), "written": [str(path) for path in summary.written]})
        return
    _show(summary.comparison)
    for path in summary.written:
        say(f"written  {path}")
    next_steps(*_next_steps(summary.comparison))


def _compare_exports(files: tuple[str, ...], out: Path | None, tracking_uri: str | None, *, as_json: bool) -> None:
    if out is not None:
        raise UsageError("--out is for runs, not for exported files; --json has everything.", code="out-with-exports")
    from shufflenet_mlflow.workflows.compare import run_export_comparison

    from .console import next_steps
    from .tables import print_json

    comparisons = run_export_comparison(files, tracking_uri=tracking_uri)
    remember(tracking_uri, runs={comparison.run_id: "" for comparison in comparisons})
    if as_json:
        print_json([comparison.to_dict() for comparison in comparisons])
        return
    for comparison in comparisons:
        say(f"{comparison.file} (sha256 {comparison.sha256[:12]}) of {comparison.checkpoint}, run {comparison.run_id}")
        for test in comparison.tests:
            differing = counted(test.different_labels, "label differs", "labels differ")
            say(
                f"{test.first.data}, {counted(test.images, 'image')}: checkpoint {test.first.top1:.4f}, "
                f"file {test.second.top1:.4f}; {differing}"
            )
            say(
                f"  {len(test.only_first) + len(test.only_second)} changed sides: {len(test.only_first)} only the "
                f"checkpoint gets right, {len(test.only_second)} only the file"
            )
            say(f"  {test.verdict.replace('second', 'file').replace('first', 'checkpoint')}")
    next_steps(f"shufflenet bench --deploy {quote(files[0])}    its size and latency")


def _show(comparison: "Comparison") -> None:
    from .tables import cell, print_table

    print_table(("run", "name", "status"), [(run.short_id, cell(run.name), run.status) for run in comparison.runs])
    ids = [run.short_id for run in comparison.runs]
    if comparison.differing:
        say()
        print_table(("differing", *ids), [(name, *map(cell, values)) for name, values in comparison.differing.items()])
    results = comparison.shown_results
    if results:
        say()
        rows = [
            (
                row.metric,
                *(f"{cell(value)}{' *' if number in row.best else '  '}" for number, value in enumerate(row.values)),
            )
            for row in results
        ]
        print_table(("last value", *ids), rows)
        say("* best")
        for section in sorted({row.metric.rpartition("/")[0] for row in results if not row.is_comparable}):
            say(f"{section} was measured on different images in these runs: no value is marked as best")
    if comparison.groups is not None:
        _show_groups(comparison.groups)
    for test in comparison.tests:
        say()
        _show_test(test)


def _show_groups(compared: "GroupComparison") -> None:
    from .tables import print_table

    say()
    rows = [
        (
            group.run_id[:8],
            metric,
            str(len(values)),
            f"{group.mean(metric):.4f}{' *' if group in compared.best(metric) else '  '}",
            f"{group.std(metric):.4f}",
        )
        for group in compared.groups
        for metric, values in group.values.items()
    ]
    print_table(("group", "metric", "seeds", "mean", "std"), rows)
    say("* best mean")
    for difference in compared.differences:
        say(f"{difference.metric}, {difference.second[:8]} beside {difference.first[:8]}: {difference.verdict}")


def _next_steps(comparison: "Comparison") -> list[str]:
    from shufflenet_mlflow.evaluation.significance import SIGNIFICANT

    steps = []
    if not comparison.tests:
        listed = " and ".join(run.short_id for run in comparison.runs)
        steps.append(f"shufflenet eval RUN    for {listed}: is the difference more than chance?")
    accuracies = [row for row in comparison.results if row.metric == "best/val_top1" and row.best]
    if accuracies and not any(test.p_value >= SIGNIFICANT for test in comparison.tests):
        best = comparison.runs[accuracies[0].best[0]]
        steps.append(f"shufflenet checkpoints promote {best.short_id}@best --name NAME")
    return steps


def _show_test(test: "PairedTest") -> None:
    from shufflenet_mlflow.compare.paired import mixed

    first, second = test.first, test.second
    say(
        f"{first.data}, the same {counted(test.images, 'image')}: {first.run_id[:8]} {first.top1:.4f}, "
        f"{second.run_id[:8]} {second.top1:.4f}"
    )
    for run_id, changes in ((first.run_id, test.only_first), (second.run_id, test.only_second)):
        say(f"  {counted(len(changes), 'image')} only {run_id[:8]} gets right")
        for change in mixed(changes)[:SHOWN_CHANGES]:
            say(f"    {change.path}: {change.label}, predicted as {change.first} / {change.second}")
        if len(changes) > SHOWN_CHANGES:
            say(f"    and {len(changes) - SHOWN_CHANGES} more; --json lists them all")
    say(f"  {test.verdict}")
