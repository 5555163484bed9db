"""What a person at the terminal is told when a signal arrives; light, to be in place before torch is imported."""

import os

from shufflenet_mlflow.runtime.signals import StopFlag


def stop_flag(what_happens: str = "leaving; once more leaves at once") -> StopFlag:
    """A flag that tells the person at the terminal what is going on."""

    def announce(name: str) -> None:
        # In a signal handler: no buffered stream, which may be in the middle of a write.
        os.write(2, f"\n{name}: {what_happens}\n".encode())

    return StopFlag(announce)
