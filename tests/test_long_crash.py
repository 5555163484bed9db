"""Guarantee 1: a process killed at any instant loses nothing that was saved, and the next one puts all in order.

300 real SIGKILLs: at every phase of save, upload, commit, prune, sync and resume, and at random instants. One run is
killed and continued a dozen times before it is laid to rest, so that what one crash left meets the next.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from crash import PHASES, Workplace, fork, kill_after, make_workplace, offline, pull_the_plug

pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]

RUNS = 25
KILLS_PER_RUN = 12

met: Counter[str] = Counter()
"""How many processes were killed where."""

Tell = Callable[[str], None]


def expect_sound(place: Workplace, completed: int) -> None:
    status, told = fork(lambda _tell: place.check_after_kill(completed)).wait()
    assert status == 0, "\n".join(told)


def killed(place: Workplace, trial: int, generator: random.Random) -> tuple[bool, int]:
    """One process that is to be killed; whether it was, and the last iteration it said was saved."""
    way = trial % 4
    if way == 3:  # something must wait before a sync can be killed

        def gather(_tell: Tell) -> None:
            with offline():
                place.train(lambda _text: None, 3)

        status, told = fork(gather).wait()
        assert status == 0, "\n".join(told)
    phase = list(PHASES)[trial // 2 % len(PHASES)]
    nth, after = 1 + min(int(generator.expovariate(0.35)), 12), generator.random() < 0.5

    def work(tell: Tell) -> None:
        if way != 1:
            pull_the_plug(phase, nth, after=after)
        if way == 3:
            place.sync(tell)
        else:
            place.train(tell, 5)

    child = fork(work)
    if way == 1:
        kill_after(child, generator.uniform(0.0, 1.2))
    status, told = child.wait()
    assert status in (0, 9), f"{phase}, call {nth}: " + "\n".join(told)
    if status:
        met["at random" if way == 1 else f"{phase} {'sync' if way == 3 else 'train'}"] += 1
    return status == 9, max([int(line) for line in told if line.isdecimal()], default=0)


@pytest.mark.parametrize("seed", range(RUNS))
def test_kills_lose_nothing(seed: int, workplace: Path) -> None:
    place = make_workplace(workplace)
    generator = random.Random(seed)
    completed = kills = 0
    for trial in itertools.count(seed * KILLS_PER_RUN):
        was_killed, saved = killed(place, trial, generator)
        completed, kills = max(completed, saved), kills + was_killed
        expect_sound(place, completed)
        if kills == KILLS_PER_RUN:
            break
        assert trial < (seed + 6) * KILLS_PER_RUN, "the plug is hardly ever pulled"
    status, told = fork(lambda tell: place.train(tell, 1)).wait()
    assert status == 0, "\n".join(told)
    status, told = fork(lambda _tell: place.check_at_rest()).wait()
    assert status == 0, "\n".join(told)


def test_every_phase_was_met() -> None:
    if not met["at random"]:
        pytest.skip("the trials did not run")
    print(dict(sorted(met.items())))  # noqa: T201
    assert sum(met.values()) >= RUNS * KILLS_PER_RUN
    assert not {phase for phase in PHASES if not any(name.startswith(phase) for name in met)}


def test_the_check_notices_a_lost_checkpoint(workplace: Path) -> None:
    """A negative control: what the trials check can fail."""
    place = make_workplace(workplace)
    status, told = fork(lambda tell: place.train(tell, 4)).wait()
    assert (status, told[-1]) == (0, "4")
    expect_sound(place, 4)
    for path in place.directory.glob("checkpoint-000004*"):
        path.unlink()
    with pytest.raises(AssertionError, match="completed 4, found 3"):
        expect_sound(place, 4)
    status, told = fork(lambda _tell: place.check_at_rest()).wait()
    assert status != 0
