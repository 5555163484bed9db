"""Successive halving in fixed steps: what comes next is a function of what is known, and of nothing else.

All trials train to the first rung, generation by generation; the best of all go on to the next rung, and so on
(Jamieson and Talwalkar, 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization"). The options of
a generation are drawn from the values at the first rung of whole generations before it. So neither the number of
workers nor their speed, nor how often they were killed, changes a decision.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from shufflenet_mlflow.config.study import StudyPlan
from shufflenet_mlflow.errors import ConfigError

PROMOTED, PRUNED = "promoted", "pruned"


@dataclass(frozen=True)
class Trial:
    """The record of a trial."""

    number: int
    params: Mapping[str, Any]
    values: Mapping[int, float] = field(default_factory=dict)
    """Rung -> value there."""
    decisions: Mapping[int, str] = field(default_factory=dict)
    """Rung -> `promoted` or `pruned`."""
    failure: str | None = None
    """Why it cannot be trained."""
    is_closed: bool = False
    """Nothing more will be recorded of it."""
    iters: Mapping[int, int] = field(default_factory=dict)
    """Rung -> iteration there."""
    run_id: str | None = None
    steps: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """In an asynchronous study: rung -> place of the decision that sent it there, and how many values that rests on."""

    def is_at(self, rung: int) -> bool:
        """Whether it takes part in a rung."""
        return self.failure is None and (rung == 0 or self.decisions.get(rung - 1) == PROMOTED)

    @property
    def pruned_at(self) -> int | None:
        """The rung that was its last; None if it was not pruned."""
        return next((rung for rung, decision in self.decisions.items() if decision == PRUNED), None)

    @property
    def state(self) -> str:
        """`complete`, `pruned`, `failed` or `running`."""
        if self.failure is not None:
            return "failed"
        if self.pruned_at is not None:
            return "pruned"
        return "complete" if self.is_closed else "running"


@dataclass(frozen=True)
class Sample:
    """Draw the options of these trials."""

    numbers: range


@dataclass(frozen=True)
class Train:
    """Train these trials to a rung, each of them in any process."""

    rung: int
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Decide:
    """Record who goes on from a rung, and who does not."""

    rung: int
    promoted: tuple[int, ...]
    pruned: tuple[int, ...]


@dataclass(frozen=True)
class Promote:
    """Record that one trial goes on from a rung."""

    number: int
    rung: int


@dataclass(frozen=True)
class Close:
    """Record that these trials are complete."""

    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Done:
    """Nothing is left to do."""


Step = Sample | Train | Decide | Promote | Close | Done


class Job(NamedTuple):
    """The training of a trial to a rung."""

    trial: int
    rung: int


def next_step(plan: StudyPlan, trials: Sequence[Trial]) -> Step:
    """Return what a study has to do next.

    Args:
        trials: everything recorded so far, in order of number.
    """
    size, last = plan.effective_generation, plan.rungs - 1
    waiting = tuple(trial.number for trial in trials if trial.is_at(0) and 0 not in trial.values)
    known = len(trials)
    if known < plan.trials and (known % size or not waiting):
        return Sample(range(known, min(plan.trials, (known // size + 1) * size)))
    for rung in range(plan.rungs):
        contenders = [trial for trial in trials if trial.is_at(rung)]
        if waiting := tuple(trial.number for trial in contenders if rung not in trial.values):
            return Train(rung, waiting)
        if rung == last:
            still_open = tuple(trial.number for trial in contenders if not trial.is_closed)
            return Close(still_open) if still_open else Done()
        promoted, pruned = divided(plan, contenders, rung)
        if any(
            rung not in trial.decisions or not (trial.is_closed or trial.number in promoted) for trial in contenders
        ):
            return Decide(rung, promoted, pruned)
    return Done()


def divided(plan: StudyPlan, contenders: Sequence[Trial], rung: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the trials that go on from a rung, and those that do not; of equal ones the earlier goes on."""
    ranked = sorted(contenders, key=lambda trial: (plan.rank(trial.values[rung]), trial.number))
    count = max(1, len(ranked) // plan.reduction) if ranked else 0
    numbers = [trial.number for trial in ranked]
    return tuple(sorted(numbers[:count])), tuple(sorted(numbers[count:]))


def rungs_of(plan: StudyPlan, total_iters: int, every: int | None = None) -> tuple[int, ...]:
    """Return the iteration of each rung; the last is the end.

    Args:
        total_iters: length of a trial, iterations.
        every: a validation follows every so many iterations; None if it can be chosen: the first rung's.

    Raises:
        ConfigError: the trials are too short for so many rungs.
    """
    first = total_iters // plan.reduction ** (plan.rungs - 1)
    rungs = [max(1, first) * plan.reduction**rung for rung in range(plan.rungs - 1)]
    if every is not None and rungs:
        rungs = [max(every, rung // every * every) for rung in rungs]
    rungs.append(total_iters)
    if any(rung >= following for rung, following in pairwise(rungs)):
        interval = "" if every is None else f" with a validation every {every}"
        raise ConfigError(
            f"--rungs (={plan.rungs}) and --reduction (={plan.reduction}) are too many for trials of {total_iters} "
            f"iterations{interval}; lower them, or train longer",
            code="study-too-short",
        )
    return tuple(rungs)


def decisions(plan: StudyPlan, trials: Sequence[Trial]) -> Iterator[dict[str, Any]]:
    """Yield the decisions of a study, and the values that they rest on, in their logical order.

    The order says nothing of which trial was faster.
    """
    size = plan.effective_generation
    for first in range(0, len(trials), size):
        generation = trials[first : first + size]
        for trial in generation:
            yield {"decision": "sampled", "trial": trial.number, "params": dict(trial.params)}
        yield from value_entries(generation, 0)
    for rung in range(plan.rungs):
        contenders = [trial for trial in trials if rung in trial.values]
        if rung:
            yield from value_entries([trial for trial in trials if trial.decisions.get(rung - 1) == PROMOTED], rung)
        for trial in contenders:
            if rung in trial.decisions:
                yield {"decision": trial.decisions[rung], "trial": trial.number, "rung": rung}
    for trial in trials:
        if trial.state == "complete":
            yield {"decision": "complete", "trial": trial.number}


def value_entries(trials: Sequence[Trial], rung: int) -> Iterator[dict[str, Any]]:
    """Yield the entries of what has come of trials at a rung: a value, or a failure."""
    for trial in trials:
        if rung in trial.values:
            yield {
                "decision": "value",
                "trial": trial.number,
                "rung": rung,
                "iters": trial.iters.get(rung),
                "value": trial.values[rung],
            }
        elif trial.failure is not None and rung == len(trial.values):
            yield {"decision": "failed", "trial": trial.number, "rung": rung, "reason": trial.failure}


def best_of(plan: StudyPlan, trials: Sequence[Trial]) -> Trial | None:
    """Return the trial with the best value at the highest rung that any has reached; None without a value."""
    valued = [trial for trial in trials if trial.values]
    if not valued:
        return None
    top = max(max(trial.values) for trial in valued)
    at_top = [trial for trial in valued if top in trial.values]
    return min(at_top, key=lambda trial: (plan.rank(trial.values[top]), trial.number))


def last_value(trial: Trial) -> float | None:
    """Return a trial's value at its highest rung; None without one."""
    return trial.values[max(trial.values)] if trial.values else None
