"""The record of a study: every decision stands here, durably, before it is acted on.

Each trial is a trial in Optuna's storage: its options, its value at each rung as an intermediate value, and its
decisions as user attributes. The number that counts is our own, since two workers may draw the same trial.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shufflenet_mlflow.config.study import StudyPlan
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.workflows.tuning.halving import PROMOTED, PRUNED, Trial
from shufflenet_mlflow.workflows.tuning.sampling import distributions, optuna
from shufflenet_mlflow.workflows.tuning.storage import create_study, open_storage, storage_errors, study_id

PLAN, STOP, BEGUN_ANEW, PARENT, EXPERIMENT = "plan", "stop", "begun_anew", "parent", "experiment"
"""Attributes of the study: its plan; that it is to stop; that it was in no other place before; its run in MLflow, and
the experiment of that."""
NUMBER, FAILED, RUN, BEGUN, DRAWN = "number", "failed", "run", "begun", "drawn"
"""Attributes of a trial: its number; why it failed; its run; that a process has begun to train it; of an asynchronous
study, the place of the decision to draw it, and the values known then."""
RUNG = "rung "

MOVABLE = ("train_dir", "val_dir", "workers")
"""Options of training that may be others when a study goes on; the images' content is compared."""


class Board:
    """The record of one study.

    Args:
        storage: Optuna's.
        address: its address, for messages.
    """

    def __init__(self, storage: Any, study: int, name: str, address: str) -> None:
        self.storage, self.name = storage, name
        self._study, self._address = study, address
        self.plan = self._read_plan()

    @classmethod
    def find(cls, name: str, address: str | None, save_dir: Path) -> "Board | None":
        """Return the record of a study that has begun; None if the storage does not know it.

        Raises:
            StudyError: the storage cannot be read.
        """
        storage = open_storage(address, save_dir, create=False)
        if storage is None:
            return None
        where = address or str(save_dir)
        with storage_errors("look for the study", where):
            number = study_id(storage, name)
            if number is None or PLAN not in storage.get_study_user_attrs(number):
                return None
        return cls(storage, number, name, where)

    @classmethod
    def create(
        cls,
        name: str,
        address: str | None,
        save_dir: Path,
        plan: StudyPlan,
        known: Mapping[str, Any] | None = None,
        *,
        anew: bool,
    ) -> "Board":
        """Begin a study, unless another process just has.

        Args:
            known: further attributes.
            anew: nothing of it is elsewhere, such as in MLflow.

        Raises:
            StudyError: the storage cannot be written.
        """
        storage, where = open_storage(address, save_dir), address or str(save_dir)
        attributes = {**(known or {}), BEGUN_ANEW: anew, PLAN: plan.to_json()}  # the plan last: with it, it has begun
        with storage_errors("begin the study", where):
            number = create_study(storage, name, plan.direction, attributes)
        return cls(storage, number, name, where)

    def _read_plan(self) -> StudyPlan:
        return StudyPlan.from_json(str(self.attributes()[PLAN]))

    def attributes(self) -> dict[str, Any]:
        """Return the study's attributes."""
        with storage_errors("read the study", self._address):
            return dict(self.storage.get_study_user_attrs(self._study))

    def set_attribute(self, key: str, value: Any) -> None:
        """Set one of the study's attributes."""
        with storage_errors("write the study", self._address):
            self.storage.set_study_user_attr(self._study, key, value)

    def move(self, asked: StudyPlan | None) -> None:
        """Go on as a command asks for, which may name other folders of the same images; see `MOVABLE`.

        Args:
            asked: None goes on as before.

        Raises:
            ConfigError: it asks for another study.
        """
        if asked is None:
            return
        kept = {name: value for name, value in self.plan.options.items() if name in MOVABLE and name in asked.options}
        require_same_plan(replace(asked, options={**asked.options, **kept}), self.plan, self.name)
        moved = {name: asked.options[name] for name in kept}
        if moved != kept:
            self.plan = replace(self.plan, options={**self.plan.options, **moved})
            self.set_attribute(PLAN, self.plan.to_json())

    # ---------------------------------------------------------------- trials

    def trials(self) -> list[Trial]:
        """Return what is recorded of each trial, in order of number."""
        return [_trial(found) for _, found in sorted(self._found().items())]

    def begun(self, number: int) -> bool:
        """Whether a process has begun to train a trial."""
        return bool(self._found()[number].user_attrs.get(BEGUN))

    def _found(self) -> dict[int, Any]:
        with storage_errors("read the trials", self._address):
            trials = self.storage.get_all_trials(self._study, deepcopy=False)
        found: dict[int, Any] = {}
        for trial in sorted(trials, key=lambda trial: trial.number):
            number = trial.user_attrs.get(NUMBER)
            if isinstance(number, int):
                found.setdefault(number, trial)
        return found

    def add(self, number: int, params: Mapping[str, Any], place: tuple[int, int] | None = None) -> None:
        """Record the options of a new trial, in one step.

        Args:
            place: of the decision, in an asynchronous study, and the number of values it rests on.
        """
        of = optuna().trial
        template = of.create_trial(
            state=of.TrialState.RUNNING,
            params=dict(params),
            distributions=distributions(self.plan),
            user_attrs={NUMBER: number, **({} if place is None else {DRAWN: list(place)})},
        )
        with storage_errors(f"record trial {number}", self._address):
            self.storage.create_new_trial(self._study, template_trial=template)

    def note(self, number: int, key: str, value: Any) -> None:
        """Note an attribute of a trial that no decision rests on."""
        trial = self._found()[number]
        if trial.user_attrs.get(key) != value and not trial.state.is_finished():
            self._set(trial, key, value)

    def _set(self, trial: Any, key: str, value: Any) -> None:
        with storage_errors(f"record trial {trial.user_attrs[NUMBER]}", self._address):
            self.storage.set_trial_user_attr(trial._trial_id, key, value)

    def report(self, number: int, rung: int, iters: int, value: float) -> None:
        """Record the value at a rung, which is the same in every process."""
        trial = self._found()[number]
        if f"{RUNG}{rung} iters" in trial.user_attrs or trial.state.is_finished():
            return
        with storage_errors(f"record the value of trial {number}", self._address):
            self.storage.set_trial_intermediate_value(trial._trial_id, iters, value)
        self._set(trial, f"{RUNG}{rung} iters", iters)

    def decide(self, number: int, rung: int, decision: str) -> None:
        """Record who goes on from a rung, or does not."""
        trial = self._found()[number]
        if trial.state.is_finished():
            return
        if f"{RUNG}{rung}" not in trial.user_attrs:
            self._set(trial, f"{RUNG}{rung}", decision)
        if decision == PRUNED:
            self._close(trial, "PRUNED")

    def promote(self, number: int, rung: int, place: tuple[int, int]) -> None:
        """Record, in one step, that a trial of an asynchronous study goes on from a rung, and when that was decided."""
        trial = self._found()[number]
        if not trial.state.is_finished() and f"{RUNG}{rung}" not in trial.user_attrs:
            self._set(trial, f"{RUNG}{rung}", [PROMOTED, *place])

    def fail(self, number: int, reason: str) -> None:
        """Record that a trial cannot be trained."""
        trial = self._found()[number]
        if not trial.state.is_finished():
            self._set(trial, FAILED, redact(reason)[:1000])
            self._close(trial, "FAIL")

    def complete(self, number: int) -> None:
        """Record that a trial is complete."""
        trial = self._found()[number]
        if not trial.state.is_finished():
            self._close(trial, "COMPLETE")

    def _close(self, trial: Any, state: str) -> None:
        of = optuna().trial.TrialState
        values = trial.intermediate_values
        value = values[max(values)] if values and state != "FAIL" else None
        with storage_errors(f"record the end of trial {trial.user_attrs[NUMBER]}", self._address):
            try:
                self.storage.set_trial_state_values(
                    trial._trial_id, state=of[state], values=None if value is None else [value]
                )
            except optuna().exceptions.UpdateFinishedTrialError:
                return  # another worker has recorded the same


def _trial(found: Any) -> Trial:
    """Return a trial of Optuna's as ours."""
    attributes, values, iters, decided = found.user_attrs, {}, {}, {}
    steps = {0: tuple(attributes[DRAWN])} if DRAWN in attributes else {}
    for key, value in attributes.items():
        words = key.removeprefix(RUNG).split()
        if not key.startswith(RUNG) or not words[0].isdecimal():
            continue
        rung = int(words[0])
        if words[1:] == ["iters"]:
            at = found.intermediate_values.get(value)
            if at is not None and math.isfinite(at):
                values[rung], iters[rung] = float(at), int(value)
        elif value in (PROMOTED, PRUNED):
            decided[rung] = str(value)
        elif isinstance(value, list | tuple):
            decided[rung], steps[rung + 1] = PROMOTED, (int(value[1]), int(value[2]))
    return Trial(
        attributes[NUMBER],
        dict(found.params),
        dict(sorted(values.items())),
        dict(sorted(decided.items())),
        attributes.get(FAILED),
        found.state.is_finished(),
        dict(sorted(iters.items())),
        attributes.get(RUN),
        dict(sorted(steps.items())),
    )


def require_same_plan(asked: StudyPlan | None, known: StudyPlan, name: str) -> None:
    """Raise ConfigError if a command asks for another study than the one of that name."""
    if asked is None:
        return
    differing = [
        field
        for field in (
            "space",
            "options",
            "trials",
            "rungs",
            "reduction",
            "sampler",
            "generation",
            "asynchronous",
            "metric",
            "direction",
        )
        if getattr(asked, field) != getattr(known, field)
    ]
    if differing:
        shown = {"space": "--param", "options": "options of training"}
        listed = ", ".join(shown.get(field, f"--{field}") for field in differing)
        raise ConfigError(
            f"study {name!r} was begun otherwise ({listed}); `--study {name}` alone goes on with it, another name "
            "begins another",
            code="study-differs",
        )
