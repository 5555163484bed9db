"""`shufflenet search`."""

import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from shufflenet_mlflow.config.search import PUBLISHED
from shufflenet_mlflow.runtime.signals import exit_status
from shufflenet_mlflow.runtime.text import counted

from .commands import SearchCommand
from .completing import Folder, ImageSet
from .options import (
    cache_dir_option,
    common_options,
    config_option,
    device_option,
    flag,
    json_option,
    option,
    options,
    ref_argument,
    tracking_uri_option,
)
from .recent import remember
from .say import say
from .streams import OutputError

if TYPE_CHECKING:
    from shufflenet_mlflow.workflows.search import SearchSummary

OF_PLAN = (*PUBLISHED, "macs_limit", "latency_limit", "pareto", "mutations", "crossovers", "score_images")
"""Options that say what a search does; the others say where."""


@click.command(cls=SearchCommand)
@ref_argument
@options(
    option(
        "--macs-limit",
        type=float,
        metavar="X",
        help="The most multiply-accumulates, at the supernet's input size and classes.  [default: what 330e6 is at 224 "
        "px with 1000 classes]",
    ),
    option(
        "--latency-limit",
        type=float,
        metavar="MS",
        help="In its place, the longest latency on this machine, milliseconds for one image, by a table that is "
        "measured unit by unit before the search begins.  [default: none]",
    ),
    flag(
        "--pareto",
        help="Search the front of accuracy and cost within the limit, instead of the highest accuracy: against "
        "latency with --latency-limit, otherwise against multiply-accumulates.",
    ),
    option("--population", type=int, metavar="N", help="Candidates of a generation.  [default: 50]"),
    option("--generations", type=int, metavar="N", help="Generations after the first, random one.  [default: 20]"),
    option("--top", type=int, metavar="N", help="The best so far, which are a generation's parents.  [default: 10]"),
    option(
        "--mutations",
        type=int,
        metavar="N",
        help="Candidates of a generation that are changed copies of a parent.  [default: half of --population]",
    ),
    option(
        "--crossovers",
        type=int,
        metavar="N",
        help="Candidates of a generation that are mixed from two parents.  [default: half of --population]",
    ),
    option("--mutation-probability", type=float, metavar="P", help="For each branch of a copy.  [default: 0.1]"),
    option("--seed", type=int, metavar="N", help="Random seed of candidates and images.  [default: 0]"),
    section="Search",
)
@options(
    option(
        "--trust",
        type=int,
        metavar="N",
        help="Also train so many random networks within the limit, and say how far that agrees with inherited scores: "
        "Kendall's tau with an interval.  [default: none]",
    ),
    option("--trust-epochs", type=int, metavar="N", help="Length of each of these trainings.  [default: 5]"),
    section="How far to trust it",
)
@options(
    option(
        "--train-dir",
        metavar="DIR",
        type=ImageSet(),
        help="The supernet's training images, if they lie elsewhere now.  [default: where they were]",
    ),
    option(
        "--bn-images",
        type=int,
        metavar="N",
        help="Training images for each candidate's statistics of batch normalisation.  [default: 25600]",
    ),
    option(
        "--score-images",
        type=int,
        metavar="N",
        help="Images for scores, of those that the supernet's training held out.  [default: all of them]",
    ),
    section="Data",
)
@options(
    device_option,
    option("--batch-size", type=int, metavar="N", help="Images per batch.  [default: 128]"),
    option(
        "--workers",
        type=int,
        metavar="N",
        help="Processes that score candidates, on a CPU with one thread each.  [default: one per core, at most 8; GPU: "
        "1]",
    ),
    section="Machine",
)
@options(
    option(
        "--save-dir",
        type=Folder(path_type=Path),
        metavar="DIR",
        help="Folder of the search.  [default: models/search-CHECKPOINT]",
    ),
    option("--grace", type=float, metavar="SECONDS", help="Time to finish uploads after a signal.  [default: 20]"),
    section="Stop and resume",
)
@options(
    tracking_uri_option,
    option("--experiment", metavar="NAME", help="MLflow experiment.  [default: shufflenet]"),
    option("--run-name", metavar="NAME", help="Name of the run.  [default: search and its folder]"),
    cache_dir_option,
    section="MLflow",
)
@config_option
@json_option
@common_options
def search(ref: str, as_json: bool, **values: Any) -> None:
    """Search the best network on a supernet, within a limit of multiply-accumulates.

    REF is a checkpoint of shufflenet_oneshot_supernet, or of one with widths; a run ID alone means the latest.
    Candidates evolve from generation to generation; each is scored with the supernet's weights and BN statistics of its
    own, on images that the supernet's training held out. Every score is written down: after any interruption the same
    command goes on, and ends with the same candidates and scores.

    \b
    Examples:
      shufflenet train --model shufflenet_oneshot_supernet --train-dir photos
      shufflenet search 01234567
      shufflenet search 01234567 --macs-limit 300e6 --save-dir models/small
      shufflenet search 01234567 --pareto --macs-limit 600e6 --save-dir front
    """
    from .stopping import say_how_a_study_goes_on, stop_flag

    with stop_flag("stopping; the same command goes on; again to stop at once") as stop:
        with stop.at_once():
            from shufflenet_mlflow.workflows.search import run_search
            from shufflenet_mlflow.workflows.searching.request import SearchRequest

            from .console import ConsoleReporter, as_typed
            from .tables import print_json

            stop.last_words = partial(say_how_a_study_goes_on, as_typed(f"shufflenet search {quote(ref)}"))
        given = {name: values.pop(name) for name in OF_PLAN}
        plan = {name: value for name, value in given.items() if value is not None}
        request = SearchRequest(ref, plan, **{**values, "device": values["device"] or "auto"})
        summary = run_search(request, reporter=ConsoleReporter(), stop=stop)
    if summary.run_id is not None:
        remember(request.tracking_uri, runs={summary.run_id: ""})
    if as_json:
        print_json(summary.to_dict())
    else:
        with suppress(OutputError):
            show_result(summary)
    _next_steps(summary, ref)
    if summary.stopped_by is not None:
        sys.exit(exit_status(summary.stopped_by))


def show_result(summary: "SearchSummary") -> None:
    """Print the best candidates, or the front, and where they are."""
    report = summary.report
    _print_candidates(summary)
    say(f"search    {report.progress()}", f"folder    {summary.folder}")
    if report.front:
        each = "; `train --search` takes the folder or the run of each" if report.is_complete else ""
        say(f"front     {report.front_in_words()}{each}")
    if report.measured is not None:
        say(f"latency   {report.latency_in_words()}")
    if report.trust is not None:
        say(f"trust     {report.trust.in_words(report.plan.seed)}")
    say(f"run ID    {summary.run_id or 'none yet: MLflow did not answer'}")
    if summary.pending:
        say(f"not in MLflow yet: {counted(summary.pending, 'entry', 'entries')}, kept in {summary.folder}")
    if report.best is not None:
        say(f"train it  {_how_to_train(summary)}")


def _print_candidates(summary: "SearchSummary") -> None:
    from shufflenet_mlflow.workflows.searching.request import SHOWN

    from .tables import cell, print_table

    report = summary.report
    latencies, is_front = report.latencies(), bool(report.front)
    rows = [
        [
            str(rank),
            f"{one.score:.4f}",
            f"{one.macs / 1e6:,.2f}",
            *latencies[one.genes],
            str(one.generation),
            *([cell(summary.front_run_ids[rank - 1])] if is_front else []),
            *one.options.values(),
        ]
        for rank, one in enumerate(report.chosen(SHOWN), 1)
    ]
    if rows:
        of_latency = [] if report.latency is None else ["table, ms", "measured, ms"]
        titles = [
            "score",
            "MACs, M",
            *of_latency,
            "generation",
            *(["run_id"] if is_front else []),
            *report.candidates[0].options,
        ]
        print_table(["front" if is_front else "rank", *titles], rows, spare=["generation"] if is_front else [])


def _how_to_train(summary: "SearchSummary") -> str:
    """Return the command that trains the best network; of a front, the most accurate by its folder."""
    from shufflenet_mlflow.workflows.searching.report import train_command

    report = summary.report
    if report.front and report.is_complete:
        return f"shufflenet train --search {quote(str(summary.front_folder(len(report.front))))}"
    return train_command(report.best) if report.best is not None else ""


def _next_steps(summary: "SearchSummary", ref: str) -> None:
    from shufflenet_mlflow.workflows.searching.request import best_folder

    from .console import next_steps

    steps = []
    if summary.pending:
        steps.append(f"shufflenet sync {quote(str(summary.folder))}    sends what MLflow does not have")
    if summary.report.is_complete:
        place = len(summary.report.front)
        folder = summary.front_folder(place) if place else best_folder(summary.folder, 1)
        which = "the most accurate" if place else "the best"
        steps.append(f"shufflenet eval {quote(str(folder))}    {which}, with inherited weights")
    else:
        steps.append(f"shufflenet search {quote(ref)}    with the same options goes on")
    next_steps(*steps)
