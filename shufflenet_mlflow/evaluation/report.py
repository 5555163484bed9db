"""The report of an evaluation: the outcome of every image, and results by class and by probability."""

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
"""Bins of equal width, as in Guo et al., 2017, arXiv:1706.04599."""

MATRIX_UP_TO = 2000
"""The most classes for a confusion matrix; with 20,000 it would take 3 GB."""


@dataclass(frozen=True)
class Outcomes:
    """The prediction for each image, in the order in which they were evaluated."""

    paths: tuple[str, ...]
    """Relative to the folder of images."""
    labels_N: NDArray[np.int64]
    predicted_N: NDArray[np.int64]
    probability_N: NDArray[np.float64]
    """Probability of the predicted class, in 0..1."""
    label_probability_N: NDArray[np.float64]
    """Probability of the true class, in 0..1."""

    @property
    def is_correct(self) -> NDArray[np.bool_]:
        """bool (N): whether the predicted class is the true one."""
        equal: NDArray[np.bool_] = self.labels_N == self.predicted_N
        return equal

    def to_csv(self, classes: Sequence[str]) -> str:
        """Return a CSV with a line per image: path, label, predicted, probability, label_probability."""
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
        self._indices: list[Tensor] = []
        self._columns: list[Tensor] = []

    def __call__(self, batch: Batch, logits_NC: Tensor) -> None:
        probabilities_NC = torch.softmax(logits_NC.float(), 1)
        probability_N, predicted_N = probabilities_NC.max(1)
        labels_N = batch.labels_N.to(logits_NC.device)
        label_probability_N = probabilities_NC.gather(1, labels_N[:, None])[:, 0]
        self._indices.append(batch.indices_N)
        columns = (labels_N.double(), predicted_N.double(), probability_N.double(), label_probability_N.double())
        self._columns.append(torch.stack(columns))

    def outcomes(self) -> Outcomes:
        """Return the outcomes of the images so far."""
        indices = torch.cat(self._indices).tolist()
        labels_N, predicted_N, probability_N, label_probability_N = torch.cat(self._columns, 1).cpu().numpy()
        return Outcomes(
            tuple(self._listing.samples[index].path for index in indices),
            labels_N.astype(np.int64),
            predicted_N.astype(np.int64),
            probability_N,
            label_probability_N,
        )


@dataclass(frozen=True)
class ClassRow:
    """Results of one class."""

    name: str
    images: int
    accuracy: float | None
    """Fraction of its images that were predicted as it (recall), in 0..1; None if it has no image."""
    precision: float | None
    """Fraction of the images predicted as it that are of it, in 0..1; None if there are none."""


@dataclass(frozen=True)
class CalibrationBin:
    """The images whose predicted class has a probability in (low, high]; in the first bin, in [low, high]."""

    low: float
    high: float
    images: int
    confidence: float
    """Mean probability of the predicted class."""
    accuracy: float


@dataclass(frozen=True)
class Report:
    """Results by class and by probability."""

    outcomes: Outcomes
    classes: tuple[str, ...]
    """Names by label, including classes that only the network has."""

    @property
    def has_matrix(self) -> bool:
        """Whether there are few enough classes for a confusion matrix."""
        return len(self.classes) <= MATRIX_UP_TO

    @cached_property
    def confusion_CC(self) -> NDArray[np.int64]:  # noqa: N802 - shape letters
        """Number of images by true class (rows) and predicted class (columns)."""
        count = len(self.classes)
        pairs_N = self.outcomes.labels_N * count + self.outcomes.predicted_N
        return np.bincount(pairs_N, minlength=count * count).reshape(count, count)

    def class_rows(self) -> list[ClassRow]:
        """Return the results of each class, in the order of the labels."""
        labels_N, correct_N = self.outcomes.labels_N, self.outcomes.is_correct
        correct_C, true_C, predicted_C = (
            np.bincount(labels, minlength=len(self.classes))
            for labels in (labels_N[correct_N], labels_N, self.outcomes.predicted_N)
        )
        return [
            ClassRow(
                name,
                int(true),
                float(correct / true) if true else None,
                float(correct / predicted) if predicted else None,
            )
            for name, correct, true, predicted in zip(self.classes, correct_C, true_C, predicted_C, strict=True)
        ]

    @property
    def mean_class_accuracy(self) -> float:
        """Mean of the classes' accuracies, without classes that have no images."""
        accuracies = [row.accuracy for row in self.class_rows() if row.accuracy is not None]
        return float(np.mean(accuracies))

    @property
    def accuracy(self) -> float:
        """Fraction of the images whose predicted class is the true one."""
        return float(self.outcomes.is_correct.mean())

    @property
    def majority(self) -> float:
        """Share of the largest class: the accuracy of always answering with it."""
        return max(row.images for row in self.class_rows()) / len(self.outcomes.paths)

    def calibration_error(self) -> float:
        """Return the expected calibration error, in 0..1 (Guo et al., 2017, arXiv:1706.04599, eq. 3).

        It is the mean over all images of |accuracy - confidence| of their bins.
        """
        bins = self.calibration_bins()
        gaps = sum(entry.images * abs(entry.accuracy - entry.confidence) for entry in bins)
        return gaps / sum(entry.images for entry in bins)

    def calibration_bins(self) -> list[CalibrationBin]:
        """Return the bins that hold images, lowest first."""
        edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
        bin_N = np.clip(np.digitize(self.outcomes.probability_N, edges[1:-1], right=True), 0, CALIBRATION_BINS - 1)
        bins = []
        for index in range(CALIBRATION_BINS):
            inside_N = bin_N == index
            if inside_N.any():
                bins.append(
                    CalibrationBin(
                        float(edges[index]),
                        float(edges[index + 1]),
                        int(inside_N.sum()),
                        float(self.outcomes.probability_N[inside_N].mean()),
                        float(self.outcomes.is_correct[inside_N].mean()),
                    )
                )
        return bins

    def worst_mistakes(self, most: int) -> list[int]:
        """Return the indices in `outcomes` of wrong predictions, highest probability first."""
        wrong = np.flatnonzero(~self.outcomes.is_correct)
        order = np.argsort(-self.outcomes.probability_N[wrong], kind="stable")[:most]
        return [int(index) for index in wrong[order]]

    def classes_csv(self) -> str:
        """Return a CSV with a line per class: class, images, accuracy, precision."""
        rows = [(row.name, row.images, _decimal(row.accuracy), _decimal(row.precision)) for row in self.class_rows()]
        return to_csv([("class", "images", "accuracy", "precision"), *rows])

    def confusion_csv(self) -> str:
        """Return a CSV of the confusion matrix or, without `has_matrix`, with a line per pair that occurs."""
        if not self.has_matrix:
            pairs, counts = np.unique([self.outcomes.labels_N, self.outcomes.predicted_N], axis=1, return_counts=True)
            rows = zip(*pairs.tolist(), counts.tolist(), strict=True)
            named = [(self.classes[true], self.classes[predicted], count) for true, predicted, count in rows]
            return to_csv([("true", "predicted", "images"), *named])
        matrix = [(name, *counts.tolist()) for name, counts in zip(self.classes, self.confusion_CC, strict=True)]
        return to_csv([("true \\ predicted", *self.classes), *matrix])


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
