"""The request of a study, and where it is kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shufflenet_mlflow.config import DEFAULT_SAVE_ROOT
from shufflenet_mlflow.config.study import StudyPlan

TRIAL_FOLDER = "trial-"
"""The folder of a trial below that of its study: this, and its number."""


@dataclass(frozen=True)
class TuneRequest:
    """The user's request."""

    study: str
    plan: StudyPlan | None = None
    """None to go on with a study that has begun."""
    save_dir: Path | None = None
    storage: str | None = None
    """Address of an Optuna storage; None for a file in the study's folder."""
    max_parallel: int | None = None
    """Trials at a time on this machine; None: as the study began."""
    time_budget: float | None = None
    """Seconds after which this command ends; it can be given again."""
    tracking_uri: str | None = None
    experiment: str | None = None
    cache_dir: Path | None = None
    grace: float | None = None
    no_system_metrics: bool = False
    is_helper: bool = False
    """This process was started by the command, to train several trials at a time."""

    @property
    def folder(self) -> Path:
        """Folder of the study."""
        return self.save_dir if self.save_dir is not None else Path(DEFAULT_SAVE_ROOT) / self.study

    def trial_folder(self, number: int) -> Path:
        """Return the folder of a trial's checkpoints."""
        return self.folder / f"{TRIAL_FOLDER}{number:04}"

    def job(self, number: int) -> str:
        """Return the name by which a trial's run is found in MLflow, from any folder."""
        return f"{self.study}.{number}"


def trial_options(plan: StudyPlan, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of training of a trial."""
    return {**plan.options, **params}
