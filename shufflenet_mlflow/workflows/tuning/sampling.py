"""Draw the options of trials with Optuna's samplers, as a pure function of plan, number and earlier values.

Each trial has a sampler of its own, seeded from the study's seed and the trial's number, and a study in memory that
holds the earlier trials: nothing depends on a process that has lived since the study began.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from shufflenet_mlflow.config.study import Param, StudyPlan
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.workflows.tuning.halving import Trial

RANDOM_AT_FIRST = 10
"""Values that TPE has to know before they play a part; as in Optuna. A generation that is smaller is enough, too."""


def optuna() -> ModuleType:
    """Import Optuna, which is an extra.

    Raises:
        ConfigError: it is missing.
    """
    try:
        import optuna as package
    except ImportError as error:
        raise ConfigError(
            f"studies need the package optuna ({error}); pip install 'shufflenet-mlflow[tune]'",
            code="tune-package-missing",
        ) from error
    logging.getLogger("optuna").setLevel(logging.ERROR)
    return package


def distribution(param: Param) -> Any:
    """Return Optuna's distribution of an option."""
    of = optuna().distributions
    if param.kind == "choices":
        return of.CategoricalDistribution(param.choices)
    if param.kind == "int":
        return of.IntDistribution(int(param.low), int(param.high))
    return of.FloatDistribution(param.low, param.high, log=param.kind == "log")


def distributions(plan: StudyPlan) -> dict[str, Any]:
    """Return Optuna's distributions of a space, by option."""
    return {param.name: distribution(param) for param in plan.space}


def seed_of(plan: StudyPlan, number: int) -> int:
    """Return the seed of a trial's sampler: of `--seed` and the trial's number only."""
    digest = hashlib.sha256(f"{plan.seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def sample(plan: StudyPlan, trials: Sequence[Trial], numbers: range) -> list[dict[str, Any]]:
    """Return the options of the trials with these numbers, which follow the known ones.

    Args:
        trials: in order of number; those of the generation that is drawn count without their values. In an
            asynchronous study every value counts that is there.
    """
    space = distributions(plan)
    if plan.repeats:
        return [{param.name: int(param.low) + number for param in plan.space} for number in numbers]
    if plan.sampler in ("cmaes", "grid"):  # what they know of a trial is more than its options
        return _replayed(plan, trials, numbers, space)
    study = _study(plan)
    size = plan.effective_generation
    history = numbers.start // size * size
    for trial in trials:
        study.add_trial(_recorded(plan, trial, space, with_value=plan.asynchronous or trial.number < history))
    drawn = []
    for number in numbers:
        study.sampler = _sampler(plan, number, space)
        drawn.append(dict(study.ask(space).params))
    return drawn


def _study(plan: StudyPlan) -> Any:
    return optuna().create_study(direction=plan.direction, sampler=_sampler(plan, 0, distributions(plan)))


def _recorded(plan: StudyPlan, trial: Trial, space: Mapping[str, Any], *, with_value: bool) -> Any:
    states = optuna().trial.TrialState
    value = trial.values.get(0) if with_value else None
    has_ended = trial.failure is not None if plan.asynchronous else with_value
    state = states.COMPLETE if value is not None else states.FAIL if has_ended else states.RUNNING
    return optuna().trial.create_trial(state=state, value=value, params=dict(trial.params), distributions=space)


def _replayed(
    plan: StudyPlan, trials: Sequence[Trial], numbers: range, space: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Draw all trials again from the first on, with the values that they had."""
    states = optuna().trial.TrialState
    study, size, known = _study(plan), plan.effective_generation, {trial.number: trial for trial in trials}
    drawn: list[dict[str, Any]] = []
    asked: list[Any] = []
    for number in range(numbers.stop):
        if number % size == 0:
            for earlier in asked:
                value = known[earlier.number].values.get(0)
                study.tell(earlier, value, state=states.FAIL if value is None else states.COMPLETE)
            asked = []
        study.sampler = _sampler(plan, number, space)
        asked.append(study.ask(dict(space)))
        if number >= numbers.start:
            drawn.append(dict(asked[-1].params))
    return drawn


def _sampler(plan: StudyPlan, number: int, space: Mapping[str, Any]) -> Any:
    samplers, seed = optuna().samplers, seed_of(plan, number)
    if plan.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if plan.sampler == "grid":
        grid = {
            param.name: list(param.choices)
            if param.kind == "choices"
            else list(range(int(param.low), int(param.high) + 1))
            for param in plan.space
        }
        return samplers.GridSampler(grid, seed=seed_of(plan, 0))  # which shuffles the grid: the same way for all
    if plan.sampler == "cmaes":
        _require_cmaes()
        return samplers.CmaEsSampler(
            seed=seed,
            popsize=max(4, plan.effective_generation),
            independent_sampler=samplers.RandomSampler(seed=seed),
            warn_independent_sampling=False,
        )
    startup = RANDOM_AT_FIRST if plan.asynchronous else min(plan.effective_generation, RANDOM_AT_FIRST)
    return samplers.TPESampler(seed=seed, n_startup_trials=startup)


def _require_cmaes() -> None:
    try:
        import cmaes  # noqa: F401 - Optuna imports it later, inside a trial
    except ImportError as error:
        raise ConfigError(
            "--sampler cmaes needs the package cmaes; pip install 'shufflenet-mlflow[tune]'",
            code="cmaes-package-missing",
        ) from error
