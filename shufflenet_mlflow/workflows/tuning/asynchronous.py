"""Asynchronous successive halving: nobody waits for a rung to be complete (Li et al., 2018, "A System for Massively
Parallel Hyperparameter Tuning", algorithm 2).

A worker that is free promotes the best paused trial that is among the best 1/reduction of what its rung has recorded
so far, looking at the highest rung first, and otherwise draws a new trial. A decision rests on the values that are
recorded when it is taken, so with several workers on who was faster. It is recorded with its place in the order of all
decisions before it is acted on, and is never taken back. With one worker nothing is under way when it is taken, and
the list is the same however often the worker was killed.

At the end, when all trials are drawn and none can be promoted, the best paused one goes on if none has come to the
last rung, as may be with few trials; then those that are still paused are pruned.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from shufflenet_mlflow.config.study import StudyPlan
from shufflenet_mlflow.workflows.tuning.halving import (
    PROMOTED,
    PRUNED,
    Close,
    Decide,
    Done,
    Job,
    Promote,
    Sample,
    Step,
    Train,
    Trial,
    value_entries,
)


def next_asynchronous_step(plan: StudyPlan, trials: Sequence[Trial], busy: Collection[int] = ()) -> Step:
    """Return what a free worker has to do next.

    Args:
        trials: everything recorded so far, in order of number.
        busy: numbers of the trials that other workers train.
    """
    waiting = [job for job in under_way(trials) if job.trial not in busy]
    if waiting:  # decided before, by a worker that was killed, say
        return Train(waiting[0].rung, (waiting[0].trial,))
    arrived = _at_the_end(plan, trials)
    if open_ones := tuple(trial.number for trial in arrived if not trial.is_closed):
        return Close(open_ones)
    for rung in reversed(range(plan.rungs - 1)):
        if promotable := best_paused(plan, trials, rung):
            return Promote(promotable[0], rung)
    if len(trials) < plan.trials:
        return Sample(range(len(trials), len(trials) + 1))
    if others := under_way(trials):
        return Train(others[0].rung, tuple(job.trial for job in others if job.rung == others[0].rung))
    return _last_steps(plan, trials, nobody_arrived=not arrived)


def under_way(trials: Sequence[Trial]) -> list[Job]:
    """Return the decisions whose value is still missing, in the order in which they were taken."""
    jobs = [Job(trial.number, max(trial.steps, default=0)) for trial in trials if trial.failure is None]
    missing = [job for job in jobs if job.rung not in trials[job.trial].values]
    return sorted(missing, key=lambda job: (trials[job.trial].steps.get(job.rung, (0, 0)), job.trial))


def best_paused(plan: StudyPlan, trials: Sequence[Trial], rung: int) -> list[int]:
    """Return the trials that can go on from a rung, the best first."""
    of_rung = ranked(plan, trials, rung)
    return [trial.number for trial in of_rung[: len(of_rung) // plan.reduction] if _is_paused(trial, rung)]


def ranked(plan: StudyPlan, trials: Sequence[Trial], rung: int) -> list[Trial]:
    """Return the trials with a value at a rung, the best first; of equal ones the earlier is better."""
    recorded = [trial for trial in trials if rung in trial.values]
    return sorted(recorded, key=lambda trial: (plan.rank(trial.values[rung]), trial.number))


def _is_paused(trial: Trial, rung: int) -> bool:
    return trial.failure is None and rung not in trial.decisions


def _at_the_end(plan: StudyPlan, trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.failure is None and plan.rungs - 1 in trial.values]


def _last_steps(plan: StudyPlan, trials: Sequence[Trial], *, nobody_arrived: bool) -> Step:
    """Return what is left to do when all trials are drawn, and none is under way or can be promoted."""
    for rung in reversed(range(plan.rungs - 1)):
        paused = [trial.number for trial in ranked(plan, trials, rung) if _is_paused(trial, rung)]
        if nobody_arrived and paused and not any(PRUNED in trial.decisions.values() for trial in trials):
            return Promote(paused[0], rung)
        unclosed = [trial.number for trial in trials if trial.decisions.get(rung) == PRUNED and not trial.is_closed]
        if pruned := tuple(sorted({*paused, *unclosed})):
            return Decide(rung, (), pruned)
    return Done()


def place_of(trials: Sequence[Trial], rung: int) -> tuple[int, int]:
    """Return the place of a decision that is taken now, from 0, and how many values it rests on.

    Args:
        rung: the one whose values count; 0 for the drawing of a new trial.
    """
    return sum(len(trial.steps) for trial in trials), sum(rung in trial.values for trial in trials)


def asynchronous_decisions(trials: Sequence[Trial]) -> Iterator[dict[str, Any]]:
    """Yield the decisions of a study in the order in which they were taken, each before the value that it led to.

    The key `known` says how many values of the rung had been recorded.
    """
    taken = [(*place, trial.number, rung) for trial in trials for rung, place in trial.steps.items()]
    for _, known, number, rung in sorted(taken):
        trial = trials[number]
        if rung == 0:
            yield {"decision": "sampled", "trial": number, "params": dict(trial.params), "known": known}
        else:
            yield {"decision": PROMOTED, "trial": number, "rung": rung - 1, "known": known}
        yield from value_entries([trial], rung)
    for trial in trials:
        if trial.pruned_at is not None:
            yield {"decision": PRUNED, "trial": trial.number, "rung": trial.pruned_at}
    for trial in trials:
        if trial.state == "complete":
            yield {"decision": "complete", "trial": trial.number}


def remembered_step(
    trials: Sequence[Trial], places: Mapping[int, Mapping[int, tuple[int, int]]], *, at_place: bool
) -> Sample | Promote | None:
    """Return a decision that MLflow knows of a study whose record is gone, and the record does not yet have.

    Args:
        trials: everything recorded so far, in order of number.
        places: trial -> rung -> place of the decision, as MLflow has them.
        at_place: only the one whose turn it is.
    """
    now = place_of(trials, 0)[0]
    known = sorted((place[0], number, rung) for number, rungs in places.items() for rung, place in rungs.items())
    for place, number, rung in known:
        if at_place and place != now:
            continue
        if rung == 0 and number == len(trials):
            return Sample(range(number, number + 1))
        came_to = trials[number] if number < len(trials) else None
        if rung and came_to is not None and rung - 1 in came_to.values and _is_paused(came_to, rung - 1):
            return Promote(number, rung - 1)
    return None
