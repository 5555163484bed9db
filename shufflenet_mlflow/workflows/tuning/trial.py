"""Train one trial to a rung: a training run as any other, which pauses there and is resumed if it is promoted."""

import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from shufflenet_mlflow.config import RunConfig, weights_ref
from shufflenet_mlflow.config.study import StudyPlan
from shufflenet_mlflow.errors import (
    ConfigError,
    DeletedError,
    ModelError,
    NonFiniteLossError,
    ResumeError,
    ShuffleNetError,
    StudyError,
)
from shufflenet_mlflow.runtime.distributed import World
from shufflenet_mlflow.runtime.progress import Phase, Reporter
from shufflenet_mlflow.runtime.signals import StopFlag, StopRequested
from shufflenet_mlflow.tracking.client import ActiveRun
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.names import STUDY_PARAMS_TAG, STUDY_STEPS_TAG, STUDY_TAG, STUDY_TRIAL_TAG
from shufflenet_mlflow.training.trainer import Callback, Trainer
from shufflenet_mlflow.workflows.train import carry_out
from shufflenet_mlflow.workflows.training.attempts import Attempt
from shufflenet_mlflow.workflows.training.config import choose, complete_config
from shufflenet_mlflow.workflows.training.data import Listed, list_data
from shufflenet_mlflow.workflows.training.request import TrainRequest
from shufflenet_mlflow.workflows.training.resume import InitialWeights, find_initial_weights
from shufflenet_mlflow.workflows.training.run import TrainSummary
from shufflenet_mlflow.workflows.tuning.halving import Trial, rungs_of
from shufflenet_mlflow.workflows.tuning.request import TuneRequest, trial_options

KEEP = {"keep_last": 1, "keep_best": 1}
"""Checkpoints that a trial needs: the last one, to go on, and the best one."""


class PauseAt(Callback):
    """Pauses a training at an iteration, and notes the value that it was validated with there."""

    def __init__(self, iters: int, metric: str, reason: str) -> None:
        self._iters, self._metric, self._reason = iters, metric, reason
        self.value: float | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Note the value at once if the training has been paused here before."""
        if trainer.iters > self._iters:
            trainer.pause(self._reason)
        elif trainer.iters == self._iters and trainer.state.validated_iters == self._iters:
            self._note(trainer, trainer.validation)

    def on_validation(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Note the value at the rung."""
        if trainer.iters == self._iters:
            self._note(trainer, metrics)

    def _note(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        self.value = float(metrics[self._metric])
        trainer.pause(self._reason)


@dataclass(frozen=True)
class Outcome:
    """How a trial has come to a rung."""

    iters: int
    value: float | None
    """None if it was stopped before, or failed."""
    failure: str | None = None
    run_id: str | None = None
    stopped: bool = False
    beyond: bool = False
    """It has gone further before, so that nothing was validated there now."""
    is_kept: bool = False
    """Everything up to the run's end is in its journal on the disk."""
    closing: ExitStack = field(default_factory=ExitStack)
    """Ends the run, and waits until everything has arrived."""


@dataclass
class Trials:
    """Trains trials in this process, which share the listing of the images."""

    request: TuneRequest
    plan: StudyPlan
    reporter: Reporter
    stop: StopFlag
    listed: Listed = field(default_factory=Listed)

    def __post_init__(self) -> None:
        self.store = Connection(self.request.tracking_uri)
        self._weights: InitialWeights | None = None
        self._has_weights = False

    def resolved(self, params: Mapping[str, Any]) -> tuple[RunConfig, int]:
        """Return the whole configuration of a trial, and the iterations of an epoch.

        Raises:
            ConfigError, ModelError: an option, or a combination of options, cannot work.
            DataError: the images cannot be used.
        """
        options = trial_options(self.plan, params)
        world = World(stop=self.stop)
        if not self._has_weights:
            ref = weights_ref(options)
            self._weights = find_initial_weights(ref, options, self.store, self.request.cache_dir)
            self._has_weights = True
        attempt = Attempt("none", False, None, None, initial_weights=self._weights)
        choices = choose(TrainRequest(options), attempt, world)
        data = list_data(choices, self.request.cache_dir, self.reporter, self.listed)
        return complete_config(choices, data, world), data.order.iters_per_epoch

    def rungs_of(self, params: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the iterations of a trial's rungs.

        Raises:
            ConfigError: it is too short for so many; or as for `resolved`.
        """
        every = self.plan.options.get("val_interval")
        return rungs_of(self.plan, self.resolved(params)[0].total_iters, every)

    def train_to(self, trial: Trial, rung: int, parent: ActiveRun | None, *, is_new: bool) -> Outcome:
        """Train a trial to a rung, from wherever it has come to.

        Args:
            is_new: no process has begun to train it, so that there is no run to look for.

        Raises:
            ShuffleNetError: anything that is no matter of this trial's options.
        """
        try:
            rungs = self.rungs_of(trial.params)
        except (ConfigError, ModelError) as error:
            return Outcome(0, None, failure=str(error))
        closing = ExitStack()
        outcome = self._trained(trial, rung, rungs, parent, closing, is_new=is_new)
        return replace(outcome, closing=closing)

    def _trained(
        self,
        trial: Trial,
        rung: int,
        rungs: tuple[int, ...],
        parent: ActiveRun | None,
        closing: ExitStack,
        *,
        is_new: bool,
    ) -> Outcome:
        is_last = rung == self.plan.rungs - 1
        pause = PauseAt(
            rungs[rung], self.plan.metric, f"rung {rung + 1} of {self.plan.rungs} of study {self.request.study}"
        )
        try:
            summary = self._train(trial, rungs, [] if is_last else [pause], parent, closing, is_new=is_new)
        except (NonFiniteLossError, ConfigError, ModelError) as error:
            return Outcome(rungs[rung], None, failure=str(error))
        except StopRequested:
            return Outcome(rungs[rung], None, stopped=True)
        value = summary.validation.get(self.plan.metric) if is_last else pause.value
        result = summary.result
        if (is_last and result.stopped_by is not None) or (value is None and result.iters < rungs[rung]):
            return Outcome(rungs[rung], None, run_id=summary.run_id, stopped=True)
        if value is None:
            return Outcome(rungs[rung], None, run_id=summary.run_id, beyond=True)
        if not math.isfinite(value):
            return Outcome(rungs[rung], None, failure=f"{self.plan.metric} is {value}", run_id=summary.run_id)
        return Outcome(rungs[rung], value, run_id=summary.run_id, is_kept=summary.is_kept)

    def _train(
        self,
        trial: Trial,
        rungs: tuple[int, ...],
        callbacks: list[Callback],
        parent: ActiveRun | None,
        closing: ExitStack,
        *,
        is_new: bool,
    ) -> TrainSummary:
        request, plan = self.request, self.plan
        options = {
            **(KEEP if not plan.options.keys() & {"keep_last", "keep_best", "keep_every"} else {}),
            **({"val_interval": rungs[0]} if plan.rungs > 1 else {}),
            **trial_options(plan, trial.params),
        }
        training = TrainRequest(
            options,
            resume="none" if is_new else "auto",
            save_dir=request.trial_folder(trial.number),
            job=request.job(trial.number),
            tracking_uri=request.tracking_uri,
            experiment=request.experiment,
            run_name=f"{request.study} {trial.number}",
            cache_dir=request.cache_dir,
            grace=request.grace,
            no_log_models=True,
            no_system_metrics=request.no_system_metrics,
            parent=parent,
            tags={
                STUDY_TAG: request.study,
                STUDY_TRIAL_TAG: str(trial.number),
                STUDY_PARAMS_TAG: json.dumps(dict(trial.params), sort_keys=True),
                **({STUDY_STEPS_TAG: json.dumps([*trial.steps.values()])} if trial.steps else {}),
            },
        )
        reporter = TrialReporter(self.reporter, trial.number)
        try:
            return carry_out(
                training,
                reporter=reporter,
                stop=self.stop,
                callbacks=callbacks,
                listed=self.listed,
                close=closing.enter_context,
            )
        except DeletedError as error:
            raise StudyError(
                f"trial {trial.number}: {_reason(error)}; `{error.command}` restores it, or delete "
                f"{str(training.save_dir)!r}, and the trial is trained again",
                code="trial-deleted",
            ) from error
        except ResumeError as error:
            raise StudyError(
                f"trial {trial.number} cannot go on: {_reason(error)}; put that back, or begin a study under another "
                "name",
                code="trial-not-resumable",
            ) from error


def _reason(error: ShuffleNetError) -> str:
    """Return an error's message without its way out, which is a training's and not a study's."""
    return str(error).partition("; ")[0]


class TrialReporter:
    """Reports for one trial, by its number."""

    def __init__(self, reporter: Reporter, number: int) -> None:
        self._reporter, self._number = reporter, number

    def phase(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Phase]:
        """Begin work of the trial."""
        return self._reporter.phase(f"trial {self._number}: {name}", total, done)

    def metrics(self, iters: int, values: Mapping[str, float]) -> None:
        """Report metrics at an iteration."""
        self._reporter.metrics(iters, values)

    def note(self, text: str) -> None:
        """Report something worth knowing."""
        self._reporter.note(f"trial {self._number}: {text}")

    def warn(self, text: str) -> None:
        """Report something that needs attention."""
        self._reporter.warn(f"trial {self._number}: {text}")

    def waiting(self, count: int) -> None:
        """Report how many journal entries are overdue."""
        self._reporter.waiting(count)


def with_fixed_length(trials: Trials) -> StudyPlan:
    """Return the plan with one length for all trials, whatever the recipes of some would choose.

    Raises:
        ShuffleNetError: the options that the trials share cannot work.
    """
    plan = trials.plan
    first = {param.name: param.choices[0] if param.kind == "choices" else param.low for param in plan.space}
    config, iters_per_epoch = trials.resolved(first)
    rungs_of(plan, config.total_iters, plan.options.get("val_interval"))
    if plan.options.keys() & {"epochs", "total_iters"}:
        return plan
    return replace(plan, options={**plan.options, "epochs": config.total_iters // iters_per_epoch})
