"""Take a run to train it, once the process that trained it before is gone."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shufflenet_mlflow.errors import ResumeError
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.lease import Lease, Writer, wait_until_free, writer_in

if TYPE_CHECKING:
    from shufflenet_mlflow.tracking.client import MlflowClient


@dataclass(frozen=True)
class Turn:
    """This attempt's turn at a run."""

    lease: Lease
    is_automatic: bool
    """A launcher, or the name of a job, has started it again: nobody is there to be asked."""
    context: JobContext

    def take(self, client: "MlflowClient", run_id: str) -> dict[str, str]:
        """Return the tag with which this process takes the run.

        Raises:
            ResumeError: another process is training it.
            StopRequested: a signal arrived while waiting.
            TrackingError: the store does not answer, or does not know the run.
        """

        def read() -> Writer | None:
            with mlflow_errors(f"read run {run_id}"):
                return writer_in(client.get_run(run_id).data.tags)

        if self.lease.takes_over:
            return self.lease.claim(read())
        writer, is_free = wait_until_free(
            read, is_patient=self.is_automatic, note=self.context.reporter.note, pause=self._pause
        )
        if writer is not None and is_free and not writer.released:
            self.context.reporter.note(f"the run's last writer, {writer}, is gone without having ended it")
        if writer is not None and not is_free:
            self.context.stop.check()
            raise ResumeError(
                f"run {run_id} is being trained by {writer}, last seen {max(0.0, writer.age):.0f} s ago; stop it "
                "there, or pass --take-over, or --new-run with another --save-dir for a fork",
                code="run-has-writer",
            )
        return self.lease.claim(writer)

    def _pause(self) -> bool:
        """Sleep a second; return False once a signal has arrived."""
        time.sleep(1.0)
        return self.context.stop.signum is None
