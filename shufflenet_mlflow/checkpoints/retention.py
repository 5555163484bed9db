"""Retention: which checkpoints may be deleted, as a pure function of their manifests."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from shufflenet_mlflow.checkpoints.manifest import CheckpointManifest
from shufflenet_mlflow.checkpoints.names import newest_first
from shufflenet_mlflow.config import check_options


@dataclass(frozen=True)
class Retention:
    """How many checkpoints to keep; with nothing set, all of them.

    A checkpoint is kept if any rule keeps it. The newest and the best are always kept.
    """

    keep_last: int | None = None
    """Number of the newest checkpoints to keep."""
    keep_best: int | None = None
    """Number of checkpoints with the highest validation accuracy to keep."""
    keep_every: int | None = None
    """Keep checkpoints whose iteration is a multiple of this."""

    def __post_init__(self) -> None:
        check_options(vars(self))

    @property
    def is_set(self) -> bool:
        """Whether there is any rule."""
        return (self.keep_last, self.keep_best, self.keep_every) != (None, None, None)

    def drop(
        self, checkpoints: Sequence[CheckpointManifest], protected: Collection[str] = ()
    ) -> list[CheckpointManifest]:
        """Return the checkpoints that may be deleted, oldest first.

        Args:
            protected: file names to keep, whatever the rules say.
        """
        if not self.is_set:
            return []
        by_name = {manifest.file_name: manifest for manifest in checkpoints}
        newest = newest_first(by_name)
        kept = {*newest[: self.keep_last or 1], *protected}
        kept |= {manifest.file_name for manifest in best_first(checkpoints)[: self.keep_best or 1]}
        if self.keep_every is not None:
            kept |= {
                name for name, manifest in by_name.items() if manifest.iters and manifest.iters % self.keep_every == 0
            }
        return [by_name[name] for name in reversed(newest) if name not in kept]


def best_first(checkpoints: Sequence[CheckpointManifest]) -> list[CheckpointManifest]:
    """Return the validated checkpoints, best first, equal ones earliest first. NaN is not an accuracy."""
    scored = [(manifest.score, manifest) for manifest in checkpoints]
    validated = [(score, manifest) for score, manifest in scored if score is not None and not math.isnan(score)]
    return [manifest for _, manifest in sorted(validated, key=lambda pair: (-pair[0], pair[1].iters))]
