"""One worker of a study: it looks at the record, does what comes next, and looks again.

All workers are alike, on one machine or on several. What one of them must do alone, such as drawing options or
deciding who goes on, it claims first; so does the one that writes to the study's run.
"""

import signal
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

from shufflenet_mlflow.errors import StudyError
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking.client import ActiveRun, mlflow_errors
from shufflenet_mlflow.tracking.later import send_or_keep
from shufflenet_mlflow.tracking.messages import Tags
from shufflenet_mlflow.tracking.names import STUDY_STATE_TAG
from shufflenet_mlflow.workflows.tuning.asynchronous import next_asynchronous_step, place_of, remembered_step
from shufflenet_mlflow.workflows.tuning.board import BEGUN, BEGUN_ANEW, PARENT, RUN, STOP, Board
from shufflenet_mlflow.workflows.tuning.claims import Claims, beating
from shufflenet_mlflow.workflows.tuning.endings import Endings
from shufflenet_mlflow.workflows.tuning.halving import (
    PROMOTED,
    PRUNED,
    Close,
    Decide,
    Done,
    Promote,
    Sample,
    Step,
    Train,
    Trial,
    next_step,
)
from shufflenet_mlflow.workflows.tuning.parent import ParentRun
from shufflenet_mlflow.workflows.tuning.report import StudyReport
from shufflenet_mlflow.workflows.tuning.request import TuneRequest
from shufflenet_mlflow.workflows.tuning.restoring import Remains
from shufflenet_mlflow.workflows.tuning.sampling import sample
from shufflenet_mlflow.workflows.tuning.trial import Outcome, Trials

LOOK_SECONDS = 0.5
"""Seconds between two looks at the record while the others are at work."""
LEADER = "leader"


@dataclass
class Worker:
    """Works on a study until nothing is left to do, or it is stopped."""

    request: TuneRequest
    board: Board
    trials: Trials
    reporter: Reporter
    stop: StopFlag
    remains: Remains | None = None
    parent: ParentRun | None = None
    stopped_by_command: bool = False
    out_of_time: bool = False

    def __post_init__(self) -> None:
        self.plan = self.board.plan
        self.claims = Claims(self.board.storage, self.board.name, self.board.name)
        self._ends = None if self.request.time_budget is None else time.monotonic() + self.request.time_budget
        self._endings = Endings()
        self._leading: int | None = None
        self._waiting = False

    def work(self) -> None:
        """Work until the study is complete, or this process has to stop.

        Raises:
            ShuffleNetError: something that is no matter of a single trial; the study can be gone on with.
        """
        with ExitStack() as closing:
            closing.enter_context(beating(self.claims, self._look_for_stop))
            try:
                while not self._must_stop():
                    self._lead(closing)
                    if self._active() is None:  # another worker is opening the study's run
                        self._wait()
                        continue
                    trials, step = self._look()
                    if isinstance(step, Done):
                        break
                    if self._do(step, trials):
                        self._waiting = False
                        self._tell()
                    else:
                        self._wait()
                self._endings.join_all()
                if self.parent is not None:
                    self._tell(figures=True)
                    if not self.report().is_complete:
                        self.parent.stopped()
            finally:
                self._endings.settle()
                if self._leading is not None:
                    closing.callback(self._give_up, self._leading)  # after the run has ended

    def _give_up(self, claim: int) -> None:
        with suppress(StudyError):
            self.claims.give_up(claim)

    def _must_stop(self) -> bool:
        return self.stop.signum is not None

    def _look_for_stop(self) -> None:
        """Stop as after a signal if somebody has asked for it, or the time is over; called in a thread."""
        if self._ends is not None and time.monotonic() > self._ends:
            self.out_of_time = True
        elif self.board.attributes().get(STOP):
            self.stopped_by_command = True
        else:
            return
        self.stop.set(signal.SIGTERM)

    def _wait(self) -> None:
        """Wait for other workers."""
        if not self._waiting:
            self._waiting = True
            self.reporter.note("waiting for other workers of the study")
        time.sleep(LOOK_SECONDS)

    # ---------------------------------------------------------------- the study's run

    def _lead(self, closing: ExitStack) -> None:
        """Open the study's run if no other worker writes to it."""
        if self.parent is not None or self.request.is_helper:
            return
        claim = self.claims.take(LEADER)
        if claim is None:
            return
        self._leading = claim
        context = JobContext.alone(self.reporter, self.stop)
        self.parent = closing.enter_context(ParentRun(self.request, self.board, self.trials.store, context))

    def _active(self) -> ActiveRun | None:
        """Return the run below which a trial's is created; it may be provisional."""
        known = self.board.attributes().get(PARENT)
        if known is None:
            return None
        run_id = self.parent.run_id if self.parent is not None else None
        return ActiveRun(run_id or str(known), "")

    def report(self) -> StudyReport:
        """Return the study as it stands."""
        run_id = self.parent.run_id if self.parent is not None else self.board.attributes().get(PARENT)
        return StudyReport(self.board.name, self.plan, tuple(self.board.trials()), run_id)

    def _tell(self, *, figures: bool = False) -> None:
        if self.parent is not None:
            self.parent.tell(self.report(), figures=figures)

    # ---------------------------------------------------------------- steps

    def _look(self) -> tuple[list[Trial], Step]:
        """Return what is recorded of the trials, and what comes next.

        In an asynchronous study a decision rests on every value of this worker's: all are recorded by now.
        """
        if not self.plan.asynchronous:
            trials = self.board.trials()
            return trials, next_step(self.plan, trials)
        busy = self._with_others()
        trials = self.board.trials()  # after the claims: a trial that has just been ended is not taken for busy
        step = next_asynchronous_step(self.plan, trials, busy)
        if self.remains is None or isinstance(step, Train | Close):
            return trials, step
        at_place = isinstance(step, Sample | Promote)
        return trials, remembered_step(trials, self.remains.steps, at_place=at_place) or step

    def _do(self, step: Step, trials: list[Trial]) -> bool:
        """Do a step, or a part of it; return False if other workers do all of it."""
        if isinstance(step, Train):
            return self._train_one(step)
        if isinstance(step, Decide | Close):  # which tell runs how they end: not before their journals are free
            self._endings.join_all()
            ending = step.pruned if isinstance(step, Decide) else step.numbers
            if self._with_others() & {*ending}:
                return False
        claim = self.claims.take("decide")
        if claim is None:
            return False
        try:
            trials, now = self._look()  # another worker may just have done it
            if isinstance(now, Decide | Close) and now != step:
                return True  # others than those that were waited for
            if isinstance(now, Sample):
                self._sample(now, trials)
            elif isinstance(now, Promote):
                place = self._place(trials, now.number, now.rung + 1)
                self.board.promote(now.number, now.rung, place)
            elif isinstance(now, Decide):
                self._decide(now)
            elif isinstance(now, Close):
                for number in now.numbers:
                    self.board.complete(number)
                self._say_completed(now.numbers)
        finally:
            self.claims.give_up(claim)
        return True

    def _sample(self, step: Sample, trials: list[Trial]) -> None:
        known = self.remains.params if self.remains is not None else {}
        drawn = (
            {}
            if all(number in known for number in step.numbers)
            else dict(zip(step.numbers, sample(self.plan, trials, step.numbers), strict=True))
        )
        for number in step.numbers:
            place = self._place(trials, number, 0) if self.plan.asynchronous else None
            self.board.add(number, known.get(number) or drawn[number], place)
            if self.remains is not None and number in self.remains.run_ids:
                self.board.note(number, RUN, self.remains.run_ids[number])

    def _with_others(self) -> set[int]:
        """Return the trials that other workers train, or whose runs they end."""
        tasks = self.claims.tasks(of_others=True)
        return {int(words[0]) for task in tasks if (words := task.split()) and words[0].isdecimal()}

    def _place(self, trials: list[Trial], number: int, rung: int) -> tuple[int, int]:
        """Return the place of the decision that sends a trial to a rung, and how many values it rests on."""
        place, known = place_of(trials, max(0, rung - 1))
        remembered = {} if self.remains is None else self.remains.steps.get(number, {})
        return place, remembered.get(rung, (place, known))[1]

    def _decide(self, step: Decide) -> None:
        for number in step.promoted:
            self.board.decide(number, step.rung, PROMOTED)
        for number in step.pruned:
            self.board.decide(number, step.rung, PRUNED)
        report = self.report()
        for trial in report.trials:
            if trial.number in step.pruned:
                self._say_how_it_ends(trial, str(report.why_pruned(trial)))

    def _say_completed(self, numbers: tuple[int, ...]) -> None:
        for trial in self.board.trials():
            if trial.number in numbers:
                value = trial.values[self.plan.rungs - 1]
                self._say_how_it_ends(trial, f"complete: {self.plan.metric} {value:.4g}")

    def _say_how_it_ends(self, trial: Trial, text: str) -> None:
        """Tag a trial's run with why and where it ends; while MLflow is away, its journal keeps that."""
        self.reporter.note(f"trial {trial.number} {text}")
        if self.request.trial_folder(trial.number).is_dir() or trial.run_id is not None:
            message = Tags({STUDY_STATE_TAG: text})
            send_or_keep(
                self.trials.store, trial.run_id, self.request.trial_folder(trial.number), message, self.reporter
            )

    def _train_one(self, step: Train) -> bool:
        """Train the first trial that no other worker trains, or still ends; return False if there is none."""
        others = self._with_others()
        for number in step.numbers:
            if number in others:
                continue
            claim = self.claims.take(f"{number} {step.rung}")
            if claim is None:
                continue
            handed_over = False
            try:
                current = {trial.number: trial for trial in self.board.trials()}[number]
                if step.rung not in current.values and current.failure is None:
                    self._endings.join(number)
                    handed_over = self._train(current, step.rung, claim)
            finally:
                if not handed_over:
                    self._give_up(claim)
            return True
        return self._endings.join_one()

    def _train(self, trial: Trial, rung: int, claim: int) -> bool:
        """Train a trial to a rung; return whether another thread ends its run.

        Where the study's record and the run's journal are in one folder, the value is recorded as soon as the run's
        end is in the journal: what MLflow has yet to hear survives as long as the record does. With a storage
        elsewhere it is recorded once it has arrived, since the record may outlive the folder.
        """
        if self._restore_value(trial, rung):
            return False
        anew = bool(self.board.attributes().get(BEGUN_ANEW))
        has_folder = self.request.trial_folder(trial.number).is_dir()  # whatever the record says
        is_new = anew and not has_folder and not self.board.begun(trial.number)
        self.board.note(trial.number, BEGUN, True)
        self.reporter.note(
            f"trial {trial.number} of {self.plan.trials}, to rung {rung + 1} of {self.plan.rungs}: "
            + ", ".join(f"{name} {value}" for name, value in trial.params.items())
        )
        outcome = self.trials.train_to(trial, rung, self._active(), is_new=is_new)
        at_once = outcome.is_kept and outcome.value is not None and self.request.storage is None
        try:
            if at_once:
                self._record(trial.number, rung, outcome)
        finally:
            self._endings.add(trial.number, partial(self._conclude, trial.number, rung, outcome, claim, at_once))
        if self.plan.asynchronous and not at_once:
            self._endings.join_all()
        return True

    def _conclude(self, number: int, rung: int, outcome: Outcome, claim: int, is_recorded: bool) -> None:
        """End a trial's run, wait until it has arrived in MLflow, and record its value unless that is done."""
        try:
            with outcome.closing:
                pass
            if not is_recorded:
                self._record(number, rung, outcome)
        finally:
            self._give_up(claim)

    def _record(self, number: int, rung: int, outcome: Outcome) -> None:
        value = self._known_value(number, outcome) if outcome.beyond else outcome.value
        if outcome.run_id is not None:
            self.board.note(number, RUN, outcome.run_id)
        if outcome.failure is not None:
            self.reporter.warn(f"trial {number} failed: {outcome.failure}")
            self.board.fail(number, outcome.failure)
        elif value is not None:
            self.board.report(number, rung, outcome.iters, value)
        elif outcome.beyond:
            raise StudyError(
                f"trial {number} has gone beyond iteration {outcome.iters}, and its value there is not known; "
                "begin the study anew under another name",
                code="trial-beyond-rung",
            )

    def _restore_value(self, trial: Trial, rung: int) -> bool:
        """Record a value that MLflow knows, unless the run was killed there and has yet to be ended as it should."""
        if self.remains is None or trial.number not in self.remains.points:
            return False
        status, points = self.remains.statuses[trial.number], self.remains.points[trial.number]
        if rung == self.plan.rungs - 1 and status != "FINISHED":
            return False
        iters = self.trials.rungs_of(trial.params)[rung]
        value = points.get(iters)
        if value is None or (status == "RUNNING" and max(points) <= iters):
            return False
        self.board.report(trial.number, rung, iters, value)
        return True

    def _known_value(self, number: int, outcome: Outcome) -> float | None:
        """Return the value that MLflow has of a trial at a rung that it has passed; None if it has none."""
        if self.remains is not None and number in self.remains.points:
            return self.remains.points[number].get(outcome.iters)
        if outcome.run_id is None:
            return None
        with mlflow_errors(f"read the metrics of run {outcome.run_id}"):
            history = self.trials.store.client.get_metric_history(outcome.run_id, self.plan.metric)
        return next((point.value for point in history if point.step == outcome.iters), None)
