"""Every error this project raises on purpose.

    ShuffleNetError
    ├── ConfigError            an option or a combination of options that cannot work
    ├── DataError              an image folder that cannot be used
    │   └── BadImageError      one file in it that is not a readable image
    ├── ModelError             an unknown network, or arguments it does not take
    ├── CheckpointError        a checkpoint that cannot be used
    │   ├── CorruptCheckpointError   it failed verification
    │   ├── UnsafeCheckpointError    loading it would mean running code
    │   └── MismatchError            its tensors do not fit the network
    ├── UnresolvedError        nothing stands behind a checkpoint reference
    │   └── NoCheckpointError        the run is there, and has no checkpoint yet
    ├── ExportError            an exported network is not equal to its checkpoint, or cannot be written
    ├── ResumeError            a run that cannot be continued as asked
    ├── TrackingError          the MLflow store refused or did not answer
    │   └── RefusedError             and will refuse it again
    ├── SpoolError             the journal of what MLflow has not got yet cannot be kept
    ├── BusyError              another process works in the same folder
    ├── LostProcessError       another process of a distributed job is gone
    ├── ElsewhereError         another process of a distributed job has failed, and reports it
    └── NonFiniteLossError     training diverged

Each message is one line that names the value and the way out; the command line prints it and exits
with status 1, or 2 for `ConfigError` and `ModelError`, which mean wrong usage.
"""


class ShuffleNetError(Exception):
    """Base class: catch this to catch everything the project raises on purpose.

    Args:
        code: names the error in `--json` and in tests; it stays when the message changes.
    """

    exit_status = 1
    code = "error"

    def __init__(self, message: str = "", *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class ConfigError(ShuffleNetError, ValueError):
    """An option, or a combination of options, that cannot work."""

    exit_status = 2


class DataError(ShuffleNetError):
    """An image folder that cannot be used as it is."""


class BadImageError(DataError):
    """One file that is not a readable image."""


class ModelError(ShuffleNetError, ValueError):
    """An unknown network, or arguments it does not take."""

    exit_status = 2


class CheckpointError(ShuffleNetError):
    """A checkpoint that cannot be read, written or used."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint that failed verification: truncated, bit-flipped, or not the recorded file."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint that holds more than tensors and plain containers."""


class MismatchError(CheckpointError):
    """A checkpoint whose tensors do not fit the network.

    Args:
        report: the `LoadReport` that lists every tensor which was missing, unexpected or of another shape.
    """

    def __init__(self, message: str, report: object = None, *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.report = report


class UnresolvedError(ShuffleNetError):
    """A checkpoint reference behind which nothing usable was found."""


class NoCheckpointError(UnresolvedError):
    """A run that exists and has no checkpoint yet.

    Args:
        run_id: that run.
    """

    def __init__(self, message: str, run_id: str = "", *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.run_id = run_id


class ExportError(ShuffleNetError):
    """An exported network that cannot be written, or is not equal to its checkpoint."""


class ResumeError(ShuffleNetError):
    """A run that cannot be continued as it was asked to."""


class TrackingError(ShuffleNetError):
    """The MLflow store refused a request or did not answer.

    Args:
        mlflow_code: MLflow's own error code, such as `RESOURCE_DOES_NOT_EXIST`, if it answered.
    """

    def __init__(self, message: str, mlflow_code: str | None = None, *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.mlflow_code = mlflow_code

    @property
    def answered(self) -> bool:
        """Whether the store gave a definite answer: trying again will not help."""
        return self.mlflow_code in _DEFINITE


class RefusedError(TrackingError):
    """What was sent to the MLflow store will never be taken, or is not there any more to be sent."""


_DEFINITE = {
    *("RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "ENDPOINT_NOT_FOUND", "INVALID_STATE"),
    *("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "FEATURE_DISABLED"),
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"),
}


class JournalError(ShuffleNetError):
    """The journal of what has not reached MLflow yet cannot be read or written."""


class BusyError(ShuffleNetError):
    """Another process works in the same folder."""


class LostProcessError(ShuffleNetError):
    """A process of a distributed job is gone or does not answer."""


class PeerFailedError(ShuffleNetError):
    """A process of a distributed job has failed, and its first process says so.

    Args:
        exit_status: of that failure.
    """

    def __init__(self, message: str, exit_status: int = 1, *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.exit_status = exit_status


class NonFiniteLossError(ShuffleNetError):
    """The training loss became NaN or infinite."""
