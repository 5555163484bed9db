"""Who does what among the workers of a study: claims in the storage that all of them share.

A claim is a trial of a second study, whose numbers the storage gives out in one order: of several claims to a task
the one with the lowest number holds. A claim is given up when its process is gone, which another process of the same
machine sees at once, and one elsewhere by a count that no longer rises. No two clocks are compared. A claim only saves
work: the lease of a run keeps two processes from writing to it, and values are the same in every process.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from shufflenet_mlflow.errors import StudyError
from shufflenet_mlflow.tracking.lease import Writer
from shufflenet_mlflow.workflows.tuning.sampling import optuna
from shufflenet_mlflow.workflows.tuning.storage import create_study, storage_errors

BEAT_SECONDS = 5.0
"""Seconds between two signs of life."""
STALE_SECONDS = 60.0
"""A claim from another machine that has given no sign of life for so long is given up."""


class Claims:
    """This process's view of the claims of a study; safe to use from several threads."""

    def __init__(self, storage: Any, study: str, address: str) -> None:
        self._storage, self._address = storage, address
        with storage_errors("open the claims", address):
            self._study = create_study(storage, f"{study} (claims)", "maximize", {})
        self._mine: dict[int, str] = {}
        self._seen: dict[int, tuple[int, float]] = {}
        """Claim of another machine -> its count, and when this process saw it first."""
        self._mutex = threading.RLock()
        self._beats = 0

    def take(self, task: str) -> int | None:
        """Claim a task; return the claim's number, or None if another process has it."""
        states = optuna().trial.TrialState
        if self._is_held(task, None):
            return None
        attributes = {"task": task, "beat": 0, "writer": json.dumps(asdict(Writer.here("", 0)))}
        template = optuna().trial.create_trial(state=states.RUNNING, user_attrs=attributes)
        with storage_errors("claim work", self._address):
            claim = int(self._storage.create_new_trial(self._study, template_trial=template))
        if self._is_held(task, claim):
            self._end(claim, "FAIL")
            return None
        with self._mutex:
            self._mine[claim] = task
        return claim

    def give_up(self, claim: int) -> None:
        """End a claim of this process."""
        with self._mutex:
            self._mine.pop(claim, None)
        self._end(claim, "COMPLETE")

    def _is_held(self, task: str, by: int | None) -> bool:
        """Whether an earlier claim to the task holds; claims whose process is gone are ended."""
        states = optuna().trial.TrialState
        with storage_errors("read the claims", self._address):
            claims = self._storage.get_all_trials(self._study, deepcopy=False, states=(states.RUNNING,))
        held = False
        for claim in sorted(claims, key=lambda claim: claim.number):
            if claim._trial_id == by:
                break
            if claim.user_attrs.get("task") != task:
                continue
            if self._is_gone(claim):
                self._end(claim._trial_id, "FAIL")
            else:
                held = True
        return held

    def _is_gone(self, claim: Any) -> bool:
        if claim._trial_id in self._mine:
            return False
        try:
            writer = Writer(**json.loads(claim.user_attrs["writer"]))
        except (KeyError, TypeError, ValueError):
            return True
        if writer.is_here:
            return not writer.is_alive
        beat, now = int(claim.user_attrs.get("beat", 0)), time.monotonic()
        seen = self._seen.get(claim._trial_id)
        if seen is None or seen[0] != beat:
            self._seen[claim._trial_id] = beat, now
            return False
        return now - seen[1] > STALE_SECONDS

    def tasks(self, *, of_others: bool = False) -> list[str]:
        """Return what living processes have claimed; one elsewhere counts as alive when it is first seen.

        Args:
            of_others: without the claims of this process.
        """
        running = (optuna().trial.TrialState.RUNNING,)
        with storage_errors("read the claims", self._address):
            claims = self._storage.get_all_trials(self._study, deepcopy=False, states=running)
        mine = self._mine if of_others else {}
        alive = [claim for claim in claims if claim._trial_id not in mine and not self._is_gone(claim)]
        return [str(claim.user_attrs.get("task", "")) for claim in alive]

    def _end(self, claim: int, state: str) -> None:
        of = optuna().trial.TrialState
        values = [0.0] if state == "COMPLETE" else None
        with (
            storage_errors("end a claim", self._address),
            suppress(optuna().exceptions.UpdateFinishedTrialError),
        ):
            self._storage.set_trial_state_values(claim, state=of[state], values=values)

    def beat(self) -> None:
        """Give a sign of life for every claim of this process."""
        with self._mutex:
            claims = list(self._mine)
            self._beats += 1
        for claim in claims:
            with (
                storage_errors("renew a claim", self._address),
                suppress(optuna().exceptions.UpdateFinishedTrialError),
            ):
                self._storage.set_trial_user_attr(claim, "beat", self._beats)


@contextmanager
def beating(claims: Claims, look: Callable[[], object]) -> Iterator[None]:
    """Within the block, renew the claims in a thread, and call `look` as often; errors of the storage may pass."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(BEAT_SECONDS):
            with suppress(StudyError):
                claims.beat()
                look()

    thread = threading.Thread(target=work, name="study", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=BEAT_SECONDS)
