"""Every error that this project raises on purpose.

    ShuffleNetError
    ├── ConfigError                  an option or a combination of options that cannot work (exit status 2)
    ├── ModelError                   an unknown network, or arguments it does not take (exit status 2)
    ├── DataError                    an image folder that cannot be used
    │   └── BadImageError            a file in it that is not a readable image
    ├── CheckpointError              a checkpoint that cannot be read, written or used
    │   ├── CorruptCheckpointError   it failed verification
    │   ├── UnreadableCheckpointError  the disk, not the file: no right to read it, an I/O error
    │   ├── UnsafeCheckpointError    loading it would run code
    │   └── MismatchError            its tensors do not fit the network
    ├── UnresolvedError              a checkpoint or run reference that leads to nothing
    │   └── NoCheckpointError        the run exists, and has no checkpoint yet
    ├── ExportError                  an exported network that cannot be written, or differs from its checkpoint
    ├── StudyError                   a study whose record cannot be found, read or written
    ├── SearchError                  a search whose record cannot be used, or that finds no candidate
    ├── NotBetterError               a network that is not better than another beyond chance
    ├── ResumeError                  a run that cannot be continued as asked
    ├── LostLeaseError               another process has taken over the run that this one was training
    ├── TrackingError                the MLflow store refused a request or did not answer
    │   ├── RefusedError             it will refuse the request again
    │   └── DeletedError             what was to be written to was deleted, and can be restored
    ├── JournalError                 the journal of entries for MLflow cannot be read or written
    ├── BusyError                    another process works in the same folder
    ├── LostProcessError             another process of a distributed job is gone
    ├── PeerFailedError              another process of a distributed job has failed, and reports the error
    └── NonFiniteLossError           the training loss became NaN or infinite

A message is one line that names the value and the way out. The command line prints it and exits with status 1, or 2
for wrong usage. An error's `code` names its kind for programs: it stays when the message is reworded.
"""


class ShuffleNetError(Exception):
    """Base class: catch this to catch everything the project raises on purpose.

    Args:
        code: names the error in `--json` and in tests; it stays when the message is reworded.
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
    """A file that is not a readable image."""


class ModelError(ShuffleNetError, ValueError):
    """An unknown network, or arguments it does not take."""

    exit_status = 2


class CheckpointError(ShuffleNetError):
    """A checkpoint that cannot be read, written or used."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint that failed verification: truncated, bit-flipped, or not the recorded file."""


class UnreadableCheckpointError(CheckpointError):
    """A checkpoint that could not be read, such as after an I/O error; whether it is intact is not known."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint that holds more than tensors and plain containers."""


class MismatchError(CheckpointError):
    """A checkpoint whose tensors do not fit the network.

    Args:
        report: the `LoadReport` with every tensor that was missing, unexpected or of another shape.
    """

    def __init__(self, message: str, report: object = None, *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.report = report


class UnresolvedError(ShuffleNetError):
    """A checkpoint or run reference that leads to nothing usable."""


class NoCheckpointError(UnresolvedError):
    """A run that exists and has no checkpoint yet.

    Args:
        run_id: the run.
    """

    def __init__(self, message: str, run_id: str = "", *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.run_id = run_id


class ExportError(ShuffleNetError):
    """An exported network that cannot be written, or differs from its checkpoint."""


class StudyError(ShuffleNetError):
    """A study whose record cannot be found, read or written."""


class SearchError(ShuffleNetError):
    """A search whose record cannot be used, or that finds no candidate."""


class NotBetterError(ShuffleNetError):
    """A network that is not better than another one beyond chance."""


class ResumeError(ShuffleNetError):
    """A run that cannot be continued as asked."""


class LostLeaseError(ShuffleNetError):
    """Another process has taken over the run that this one was training; nothing more is sent to it."""


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
        """Whether the answer is definite: trying again will not help."""
        return self.mlflow_code in _DEFINITE


class DeletedError(TrackingError):
    """A run or an experiment that was deleted, so that nothing can be written to it until it is restored.

    Args:
        command: restores it.
    """

    def __init__(self, message: str, command: str = "", *, code: str | None = None) -> None:
        super().__init__(message, "INVALID_STATE", code=code)
        self.command = command


class RefusedError(TrackingError):
    """A request that the MLflow store will never accept, or whose content no longer exists."""


_DEFINITE = {
    *("RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "ENDPOINT_NOT_FOUND", "INVALID_STATE"),
    *("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "FEATURE_DISABLED"),
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"),
}


class JournalError(ShuffleNetError):
    """The journal of entries that have not reached MLflow cannot be read or written."""


class BusyError(ShuffleNetError):
    """Another process works in the same folder."""


class LostProcessError(ShuffleNetError):
    """A process of a distributed job is gone or does not answer."""


class PeerFailedError(ShuffleNetError):
    """A process of a distributed job has failed; the job's first process reports the error.

    Args:
        exit_status: the exit status of that failure.
    """

    def __init__(self, message: str, exit_status: int = 1, *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.exit_status = exit_status


class NonFiniteLossError(ShuffleNetError):
    """The training loss became NaN or infinite."""
