"""An evaluation in detail: every image's outcome, and what follows from them for classes and probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.loader import Batch
from shufflenet_mlflow.runtime.serialization import to_csv

CALIBRATION_BINS = 15
"""Of equal width, as Guo et al., 2017 (arXiv 1706.04599)."""


MATRIX_UP_TO = 2000
"""Classes; a matrix of 20,000 squared would take 3 GB."""


@dataclass(frozen=True)
class Outcomes:
    """What became of each image: arrays of one entry per image, in the order of the listing."""

    paths: tuple[str, ...]
    """Relative to the folder of images."""
    labels_N: NDArray[np.int64]
    predicted_N: NDArray[np.int64]
    probability_N: NDArray[np.float64]
    """Of the predicted class, in 0..1."""
    label_probability_N: NDArray[np.float64]
    """Of the true class."""

    @property
    def is_correct(self) -> NDArray[np.bool_]:
        """bool (N): whether the predicted class is the true one."""
        equal: NDArray[np.bool_] = self.labels_N == self.predicted_N
        return equal

    def to_csv(self, classes: Sequence[str]) -> str:
        """A line per image: path, label, predicted, probability, label_probability."""
        columns = zip(
            self.paths,
            (classes[index] for index in self.labels_N),
            (classes[index] for index in self.predicted_N),
            (f"{value:.6f}" for value in self.probability_N),
            (f"{value:.6f}" for value in self.label_probability_N),
            strict=True,
        )
        return to_csv([("path", "label", "predicted", "probability", "label_probability"), *columns])


class Observer:
    """Collects the outcomes of an evaluation; see `evaluate`."""

    def __init__(self, listing: ImageListing) -> None:
        self._listing = listing
        self._places: list[Tensor] = []
        self._columns: list[Tensor] = []

    def __call__(self, batch: Batch, logits_NC: Tensor) -> None:
        probabilities_NC = torch.softmax(logits_NC.float(), 1)
        probability_N, predicted_N = probabilities_NC.max(1)
        labels_N = batch.labels_N.to(logits_NC.device)
        of_label_N = probabilities_NC.gather(1, labels_N[:, None])[:, 0]
        self._places.append(batch.indices_N)
        columns = (labels_N.double(), predicted_N.double(), probability_N.double(), of_label_N.double())
        self._columns.append(torch.stack(columns))

    def outcomes(self) -> Outcomes:
        """Of the images so far."""
        places = torch.cat(self._places).tolist()
        labels, predicted, probability, of_label = torch.cat(self._columns, 1).cpu().numpy()
        return Outcomes(
            tuple(self._listing.samples[place].path for place in places),
            labels.astype(np.int64),
            predicted.astype(np.int64),
            probability,
            of_label,
        )


@dataclass(frozen=True)
class ClassRow:
    """How one class fared."""

    name: str
    images: int
    accuracy: float | None
    """Part of its images that were recognised (recall), in 0..1; None if it has no image."""
    precision: float | None
    """Part of the images taken for it that are of it; None if none was."""


@dataclass(frozen=True)
class CalibrationBin:
    """Images whose predicted class has a probability in one stretch."""

    low: float
    high: float
    images: int
    confidence: float
    """Mean probability of the predicted class."""
    accuracy: float


@dataclass(frozen=True)
class Report:
    """What follows from the outcomes."""

    outcomes: Outcomes
    classes: tuple[str, ...]
    """Names by label, also of those that only the network knows."""

    @property
    def has_matrix(self) -> bool:
        """Whether a table of all pairs of classes is of a size to be looked at, or to be kept."""
        return len(self.classes) <= MATRIX_UP_TO

    @cached_property
    def confusion_CC(self) -> NDArray[np.int64]:  # noqa: N802 - shape letters
        """Images by true class (rows) and predicted class (columns)."""
        count = len(self.classes)
        pairs_N = self.outcomes.labels_N * count + self.outcomes.predicted_N
        return np.bincount(pairs_N, minlength=count * count).reshape(count, count)

    def class_rows(self) -> list[ClassRow]:
        """One per class, in the order of the labels."""
        labels_N, right_N = self.outcomes.labels_N, self.outcomes.is_correct
        right_C, true_C, taken_C = (
            np.bincount(numbers, minlength=len(self.classes))
            for numbers in (labels_N[right_N], labels_N, self.outcomes.predicted_N)
        )
        return [
            ClassRow(
                name,
                int(true),
                float(right / true) if true else None,
                float(right / taken) if taken else None,
            )
            for name, right, true, taken in zip(self.classes, right_C, true_C, taken_C, strict=True)
        ]

    @property
    def mean_class_accuracy(self) -> float:
        """Every class counts the same, however many images it has; classes without images are left out."""
        known = [row.accuracy for row in self.class_rows() if row.accuracy is not None]
        return float(np.mean(known))

    def calibration_error(self) -> float:
        """Expected calibration error: how far probabilities are from the accuracy they announce, in 0..1."""
        from torchmetrics.functional.classification import binary_calibration_error

        # Whether the predicted class is right is a binary event that its probability announces.
        return float(
            binary_calibration_error(
                torch.from_numpy(self.outcomes.probability_N).float().clamp(0, 1),
                torch.from_numpy(self.outcomes.is_correct).long(),
                n_bins=CALIBRATION_BINS,
                norm="l1",
            )
        )

    def calibration_bins(self) -> list[CalibrationBin]:
        """The stretches that hold images."""
        edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
        bin_N = np.clip(np.digitize(self.outcomes.probability_N, edges[1:-1], right=True), 0, CALIBRATION_BINS - 1)
        bins = []
        for number in range(CALIBRATION_BINS):
            inside_N = bin_N == number
            if inside_N.any():
                bins.append(
                    CalibrationBin(
                        float(edges[number]),
                        float(edges[number + 1]),
                        int(inside_N.sum()),
                        float(self.outcomes.probability_N[inside_N].mean()),
                        float(self.outcomes.is_correct[inside_N].mean()),
                    )
                )
        return bins

    def worst_mistakes(self, most: int) -> list[int]:
        """Places in `outcomes` of the mistakes that were made with the highest probability."""
        wrong = np.flatnonzero(~self.outcomes.is_correct)
        order = np.argsort(-self.outcomes.probability_N[wrong], kind="stable")[:most]
        return [int(place) for place in wrong[order]]

    def classes_csv(self) -> str:
        """A line per class: class, images, accuracy, precision."""
        rows = [(row.name, row.images, _decimal(row.accuracy), _decimal(row.precision)) for row in self.class_rows()]
        return to_csv([("class", "images", "accuracy", "precision"), *rows])

    def confusion_csv(self) -> str:
        """A line per true class, a column per predicted class; of very many classes a line per pair that occurs."""
        if not self.has_matrix:
            pairs, counts = np.unique([self.outcomes.labels_N, self.outcomes.predicted_N], axis=1, return_counts=True)
            found = zip(*pairs.tolist(), counts.tolist(), strict=True)
            named = [(self.classes[true], self.classes[taken], count) for true, taken, count in found]
            return to_csv([("true", "predicted", "images"), *named])
        rows = [(name, *counts.tolist()) for name, counts in zip(self.classes, self.confusion_CC, strict=True)]
        return to_csv([("true \\ predicted", *self.classes), *rows])


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
