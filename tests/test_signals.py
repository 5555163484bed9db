"""The stop flag: a signal that arrives at an awkward moment."""

import os
import signal
import time
import weakref
from concurrent.futures import Future

import pytest

from shufflenet_mlflow.runtime.signals import StopFlag, StopRequested


def test_a_signal_within_a_finalizer_still_stops(capfd: pytest.CaptureFixture[str]) -> None:
    """Python drops what is raised there, and prints its traceback."""
    announced: list[str] = []
    stop = StopFlag(announced.append)

    def finalizer(_reference: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)  # the handler runs here

    with stop, pytest.raises(StopRequested) as raised, stop.at_once():
        thing: Future[None] = Future()
        reference = weakref.ref(thing, finalizer)
        del thing
        for _ in range(100):  # until the signal is raised again
            time.sleep(0.01)
        pytest.fail(f"{reference} did not stop it")
    assert raised.value.signum == signal.SIGTERM
    assert raised.traceback[-1].name != "finalizer"
    time.sleep(0.2)  # a second signal would have ended the process
    assert announced == ["SIGTERM"]
    assert capfd.readouterr().err == ""
