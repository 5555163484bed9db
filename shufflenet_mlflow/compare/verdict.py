"""The verdict of a comparison in a sentence or two, for somebody who reads nothing else."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shufflenet_mlflow.compare.comparison import Comparison, RunColumn
from shufflenet_mlflow.compare.groups import GroupComparison
from shufflenet_mlflow.compare.paired import PairedTest
from shufflenet_mlflow.compare.results import UNBROKEN, shown
from shufflenet_mlflow.evaluation.significance import SIGNIFICANT
from shufflenet_mlflow.runtime.text import counted

_LEAST_P = 0.001


@dataclass(frozen=True)
class Verdict:
    """The conclusion, in one sentence."""

    headline: str
    reasons: tuple[str, ...]
    """The evidence, in sentences."""
    is_open: bool = False
    """Nothing says yet whether the difference is more than chance."""


def names_of(runs: Sequence[RunColumn]) -> tuple[str, ...]:
    """Return a name for each run by which it can be told from the others."""
    times = Counter(run.name for run in runs)
    return tuple(run.name if times[run.name] == 1 else f"{run.name} ({run.short_id})" for run in runs)


def _quoted(names: Sequence[str]) -> list[str]:
    return [f"“{name}”" for name in names]


def verdict_of(comparison: Comparison) -> Verdict:
    """Return what is better, by the best evidence there is: groups of seeds, the same images, or validation alone."""
    names = dict(zip((run.run_id for run in comparison.runs), _quoted(names_of(comparison.runs)), strict=True))
    if comparison.groups is not None and comparison.groups.differences:
        return _of_groups(comparison.groups, names)
    if comparison.tests:
        return _of_tests(comparison.tests, names)
    return _of_validation(comparison, list(names.values()))


def _of_groups(groups: GroupComparison, names: Mapping[str, str]) -> Verdict:
    """Each group beside the first, over the seeds that both have; the headline is of the first metric."""
    main = groups.differences[0]
    first, second = names[main.first], names[main.second]
    if len(main.seeds) > 1 and main.interval.excludes_zero:
        lower_is_better = main.metric.endswith("loss")
        better, worse = (second, first) if (main.interval.mean > 0) != lower_is_better else (first, second)
        headline = f"{better} is better than {worse} over {counted(len(main.seeds), 'seed')}"
    else:
        headline = f"No clear winner between {first} and {second} over {counted(len(main.seeds), 'seed')}"
    reasons = tuple(
        f"{difference.metric}, {names[difference.second]} beside {names[difference.first]}: {difference.verdict}."
        for difference in groups.differences
    )
    return Verdict(headline, reasons)


def _of_tests(tests: Sequence[PairedTest], names: Mapping[str, str]) -> Verdict:
    """The headline is of the largest set of images; the reasons are of every set."""
    largest = max(tests, key=lambda test: test.images)
    same = [test for test in tests if test.first.digest == largest.first.digest]
    images = f"the same {counted(largest.images, 'image')} of {largest.first.data}"
    if len(same) == 1:
        headline = _headline(largest, names, images)
    else:
        scores = {same[0].first.run_id: same[0].first.top1, **{test.second.run_id: test.second.top1 for test in same}}
        best = max(scores, key=lambda run_id: scores[run_id])
        headline = f"{names[best]} gets the most of {images} right: {shown('top1', [scores[best]])[0]}"
    return Verdict(headline, tuple(_reason(test, names, say_data=len(tests) > len(same)) for test in tests))


def _headline(test: PairedTest, names: Mapping[str, str], images: str) -> str:
    first, second = shown("top1", (test.first.top1, test.second.top1))
    sides = [(names[test.first.run_id], first), (names[test.second.run_id], second)]
    if len(test.only_second) > len(test.only_first):
        sides.reverse()
    (better, high), (worse, low) = sides
    if test.p_value >= SIGNIFICANT:
        return f"No clear winner: {better} gets {high} of {images} right, {worse} {low}"
    return f"{better} is better than {worse}: it gets {high} of {images} right, not {low}"


def _reason(test: PairedTest, names: Mapping[str, str], *, say_data: bool) -> str:
    first, second = names[test.first.run_id], names[test.second.run_id]
    sides = f"{counted(len(test.only_first), 'image')} only {first} gets right, {len(test.only_second):,} only {second}"
    chance = "may be chance" if test.p_value >= SIGNIFICANT else "is more than chance"
    p = f"p = {test.p_value:.2g}" if test.p_value >= _LEAST_P else f"p < {_LEAST_P}"
    p = p.replace(" ", UNBROKEN)
    data = f"{test.first.data}: " if say_data else ""
    return f"{data}{sides}. The difference {chance} (McNemar's exact test, {p})."


def _of_validation(comparison: Comparison, names: Sequence[str]) -> Verdict:
    """Validation accuracy says who is ahead, not whether that is more than chance."""
    rows = {row.metric: row for row in comparison.results}
    row = rows.get("best/val_top1") or rows.get("val/top1")
    known = (
        []
        if row is None
        else [(value, name) for value, name in zip(row.values, names, strict=True) if value is not None]
    )
    if len(known) < 2:
        return Verdict("Nothing to rank yet: fewer than two runs have a validation accuracy", ())
    known.sort(key=lambda pair: -pair[0])
    values = shown("top1", [value for value, _ in known])
    rest = ", ".join(f"{name} {value}" for (_, name), value in zip(known[1:], values[1:], strict=True))
    highest = [name for value, name in known if value == known[0][0]]
    headline = (
        f"{highest[0]} has the highest validation accuracy: {values[0]} ({rest})"
        if len(highest) == 1
        else f"{' and '.join(highest)} have the same highest validation accuracy: {values[0]}"
    )
    return Verdict(headline, (), is_open=True)
