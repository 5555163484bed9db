"""The request of a search, and where it is kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shufflenet_mlflow.config import DEFAULT_SAVE_ROOT

BEST_FOLDER = "best-"
"""The folder of one of the best candidates below that of its search: this, and its rank."""
FRONT_FOLDER = "front-"
"""The folder of a candidate of the front: this, and its place, from the cheapest on."""
SHOWN = 10
"""So many of the best candidates have a run, and a checkpoint with the weights they inherit."""


@dataclass(frozen=True)
class SearchRequest:
    """The user's request."""

    ref: str
    """The supernet's checkpoint; a run ID alone means its latest."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SearchPlan`; only those that were given."""
    train_dir: str | None = None
    """Where the supernet's training images are now; None for where they were."""
    workers: int | None = None
    """Processes that score candidates; None: one per core on a CPU, at most 8, and one on a GPU."""
    trust: int | None = None
    """Random networks that are trained briefly, to see how far scores can be trusted; None: no more than there are."""
    trust_epochs: int | None = None
    """Length of these trainings; None: that of those that there are, or else `TRUST_EPOCHS`."""
    device: str = "auto"
    save_dir: Path | None = None
    tracking_uri: str | None = None
    experiment: str | None = None
    run_name: str | None = None
    cache_dir: Path | None = None
    grace: float | None = None

    def folder(self, supernet: str) -> Path:
        """Return the folder of the search.

        Args:
            supernet: SHA-256 of its checkpoint, after which the folder is called by default.
        """
        return self.save_dir if self.save_dir is not None else Path(DEFAULT_SAVE_ROOT) / f"search-{supernet[:12]}"


def best_folder(folder: Path, rank: int, *, of_front: bool = False) -> Path:
    """Return the folder of the candidate with this rank, from 1 on; of a front, with this place in it."""
    return folder / f"{FRONT_FOLDER if of_front else BEST_FOLDER}{rank:02}"
