"""Guarantee 1: a process killed at any instant loses nothing that was saved, and the next one repairs what it left.

Real SIGKILLs at every step of save, upload, commit, prune, sync and resume, and at random instants: 300 in the full
run, 72 in CI. Each run is killed and resumed a dozen times, so that what one crash left meets the next.
"""

import itertools
import random
import signal
from collections import Counter
from pathlib import Path

import pytest

from shufflenet_mlflow.checkpoints.folders import list_checkpoints
from shufflenet_mlflow.checkpoints.manifest import manifest_path
from tests.support.crash_points import CRASH_POINTS, kill_at
from tests.support.crash_trials import TrialRun, create_trial_run, store_unreachable
from tests.support.effort import repetitions
from tests.support.forked import Report, fork

pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]

RUNS = repetitions(full=25, ci=6)
KILLS_PER_RUN = 12

kills_by_point: Counter[str] = Counter()


def kills_at(point: str) -> int:
    return sum(kills for name, kills in kills_by_point.items() if name.startswith(point))


def check_after_kill(run: TrialRun, completed: int) -> None:
    fork(lambda _report: run.check_after_kill(completed)).expect_success()


def try_to_kill(run: TrialRun, trial: int, generator: random.Random) -> tuple[bool, int]:
    """Start one process that may be killed; return whether it was, and the last iteration that it reported saved."""
    at_random, syncs = trial % 4 == 1, trial % 4 == 3
    if syncs:  # something must be pending before a sync can be killed

        def train_offline(_report: Report) -> None:
            with store_unreachable():
                run.train(lambda _text: None, 3)

        fork(train_offline).expect_success()
    point = list(CRASH_POINTS)[trial // 2 % len(CRASH_POINTS)]
    nth, after = 1 + min(int(generator.expovariate(0.35)), 12), generator.random() < 0.5
    if not kills_at(point):
        nth = 1  # some are called only once in a process

    def work(report: Report) -> None:
        if not at_random:
            kill_at(point, nth, after=after)
        if syncs:
            run.sync(report)
        else:
            run.train(report, 5)

    child = fork(work)
    if at_random:
        child.kill_after(generator.uniform(0.0, 1.2))
    status, lines = child.wait()
    assert status in (0, signal.SIGKILL), f"{point}, call {nth}: " + "\n".join(lines)
    if status:
        kills_by_point["at random" if at_random else f"{point} {'sync' if syncs else 'train'}"] += 1
    return status == signal.SIGKILL, max([int(line) for line in lines if line.isdecimal()], default=0)


@pytest.mark.parametrize("seed", range(RUNS))
def test_kills_lose_nothing(seed: int, workplace: Path) -> None:
    run = create_trial_run(workplace)
    generator = random.Random(seed)
    completed = kills = 0
    for trial in itertools.count(seed * KILLS_PER_RUN):
        was_killed, saved = try_to_kill(run, trial, generator)
        completed, kills = max(completed, saved), kills + was_killed
        check_after_kill(run, completed)
        if kills == KILLS_PER_RUN:
            break
        assert trial < (seed + 6) * KILLS_PER_RUN, "hardly any process is killed"
    fork(lambda report: run.train(report, 1)).expect_success()
    fork(lambda _report: run.check_after_exit()).expect_success()


def rewind(run: TrialRun) -> None:
    """Delete the newest checkpoint from the disk, so that the run trains the iteration again, with other bytes."""
    newest = list_checkpoints(run.directory)[0]
    newest.unlink()
    manifest_path(newest).unlink()


def test_an_iteration_that_is_repeated_leaves_what_the_tags_name(workplace: Path) -> None:
    run = create_trial_run(workplace)
    fork(lambda report: run.train(report, 3)).expect_success()
    kills = 0
    for point, after in itertools.product(CRASH_POINTS, (False, True)):
        rewind(run)

        def work(report: Report, point: str = point, after: bool = after) -> None:
            kill_at(point, 1, after=after)
            run.train(report, 1)

        status, lines = fork(work).wait()
        assert status in (0, signal.SIGKILL), f"{point}: " + "\n".join(lines)
        kills += status == signal.SIGKILL
        check_after_kill(run, 1)
        fork(lambda report: run.train(report, 1)).expect_success()  # delivers what is pending
        fork(lambda _report: run.check_after_exit()).expect_success()
    assert kills > len(CRASH_POINTS)


def test_every_crash_point_killed_a_process() -> None:
    if not kills_by_point["at random"]:
        pytest.skip("the trials did not run")
    print(dict(sorted(kills_by_point.items())))  # noqa: T201
    assert sum(kills_by_point.values()) >= RUNS * KILLS_PER_RUN
    assert not {point for point in CRASH_POINTS if not kills_at(point)}


def test_the_check_notices_a_lost_checkpoint(workplace: Path) -> None:
    """Negative control: the checks of the trials can fail."""
    run = create_trial_run(workplace)
    assert fork(lambda report: run.train(report, 4)).expect_success()[-1] == "4"
    check_after_kill(run, 4)
    for path in run.directory.glob("checkpoint-000004*"):
        path.unlink()
    with pytest.raises(AssertionError, match="completed 4, found 3"):
        check_after_kill(run, 4)
    status, _ = fork(lambda _report: run.check_after_exit()).wait()
    assert status != 0
