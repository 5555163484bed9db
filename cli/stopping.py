"""The message that a signal prints; light, so that it is in place before torch is imported."""

import os

from shufflenet_mlflow.runtime.signals import StopFlag


def stop_flag(what_happens: str = "stopping; again to stop at once") -> StopFlag:
    """Return a flag that prints what the first signal leads to."""

    def announce(name: str) -> None:
        # In a signal handler: no buffered stream, which may be in the middle of a write.
        os.write(2, f"\n{name}: {what_happens}\n".encode())

    return StopFlag(announce)
