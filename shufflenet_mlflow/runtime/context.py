"""The context that all parts of a job share."""

from dataclasses import dataclass, field

from shufflenet_mlflow.runtime.distributed import World
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag


@dataclass(frozen=True)
class JobContext:
    """Where a job reports its progress, and the processes that work on it, with their request to stop."""

    reporter: Reporter
    world: World = field(default_factory=World)

    @classmethod
    def alone(cls, reporter: Reporter, stop: StopFlag) -> "JobContext":
        """Return the context of a job of one process."""
        return cls(reporter, World(stop=stop))

    @property
    def stop(self) -> StopFlag:
        """Set when a signal has asked the job to stop."""
        return self.world.stop
