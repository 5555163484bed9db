"""Two evaluations on the same images: which images changed sides, and whether that is more than chance."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from shufflenet_mlflow.evaluation.significance import SIGNIFICANT
from shufflenet_mlflow.runtime.serialization import from_csv_cell


@dataclass(frozen=True)
class Outcome:
    """One line of `predictions.csv`."""

    path: str
    label: str
    predicted: str
    probability: float

    @property
    def correct(self) -> bool:
        """Whether the predicted class is the true one."""
        return self.label == self.predicted


@dataclass(frozen=True)
class Evaluation:
    """An evaluation among a run's artifacts."""

    run_id: str
    data: str
    digest: str
    root: str | None
    """Folder that the images were in."""
    checkpoint: str
    iters: int
    top1: float
    folder: str
    """Artifact path of its folder."""
    export_sha256: str | None = None
    """SHA-256 of the exported file that was evaluated in the place of the checkpoint."""


@dataclass(frozen=True)
class Change:
    """An image that one evaluation gets right and the other wrong."""

    path: str
    label: str
    first: str
    """Class that the first evaluation predicts."""
    second: str


@dataclass(frozen=True)
class PairedTest:
    """McNemar's exact test (McNemar, 1947) of two evaluations on the same images."""

    first: Evaluation
    second: Evaluation
    images: int
    only_first: tuple[Change, ...]
    """Images that only the first evaluation gets right."""
    only_second: tuple[Change, ...]
    different_labels: int = 0
    """Images with different predictions, whether or not one of them is right."""

    @property
    def p_value(self) -> float:
        """Two-sided probability of so uneven a split if both are equally good."""
        changed = len(self.only_first) + len(self.only_second)
        if not changed:
            return 1.0
        from scipy.stats import binomtest  # takes as long to import as a run to read

        return float(binomtest(len(self.only_first), changed, 0.5).pvalue)

    @property
    def verdict(self) -> str:
        """Return the result in words."""
        difference = (len(self.only_second) - len(self.only_first)) / max(1, self.images)
        if not difference:
            return f"both have the same accuracy (p = {self.p_value:.3g})"
        better = f"the {'second' if difference > 0 else 'first'} is better by {abs(difference):.4f} in accuracy"
        chance = ", which may be chance" if self.p_value >= SIGNIFICANT else ""
        return f"{better}{chance} (p = {self.p_value:.3g})"

    def to_dict(self) -> dict[str, Any]:
        """Return one entry of `compare --json`."""
        return {
            "data": self.first.data,
            "digest": self.first.digest,
            "images": self.images,
            "first": self.first.run_id,
            "second": self.second.run_id,
            "first_checkpoint": self.first.checkpoint,
            "second_checkpoint": self.second.checkpoint,
            "first_top1": self.first.top1,
            "second_top1": self.second.top1,
            "only_first_right": [vars(change) for change in self.only_first],
            "only_second_right": [vars(change) for change in self.only_second],
            "different_labels": self.different_labels,
            "p_value": self.p_value,
            "test": "McNemar, exact, two-sided",
        }


def mixed(changes: Sequence[Change]) -> list[Change]:
    """Return the images with their classes taking turns: the first few are of many classes, whatever the paths."""
    by_class: dict[str, list[Change]] = {}
    for change in changes:
        by_class.setdefault(change.label, []).append(change)
    rounds = zip_longest(*by_class.values())
    return [change for turn in rounds for change in turn if change is not None]


def read_outcomes(text: str) -> dict[str, Outcome]:
    """Return the lines of `predictions.csv` by path."""
    rows = csv.DictReader(io.StringIO(text))
    outcomes = (
        Outcome(
            from_csv_cell(row["path"]),
            from_csv_cell(row["label"]),
            from_csv_cell(row["predicted"]),
            float(row["probability"]),
        )
        for row in rows
    )
    return {outcome.path: outcome for outcome in outcomes}


def paired_test(first: Evaluation, second: Evaluation, outcomes: Sequence[dict[str, Outcome]]) -> PairedTest:
    """Compare two evaluations image by image, without images that only one of them could read."""
    first_by_path, second_by_path = outcomes
    common = [path for path in first_by_path if path in second_by_path]
    only_first: list[Change] = []
    only_second: list[Change] = []
    for path in common:
        one, other = first_by_path[path], second_by_path[path]
        if one.correct != other.correct:
            right_in = only_first if one.correct else only_second
            right_in.append(Change(path, one.label, one.predicted, other.predicted))
    different = sum(first_by_path[path].predicted != second_by_path[path].predicted for path in common)
    return PairedTest(first, second, len(common), tuple(only_first), tuple(only_second), different)
