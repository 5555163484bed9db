"""Labels for images that nobody has sorted into classes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shufflenet_mlflow.classifier import rank
from shufflenet_mlflow.data.listing import ImageListing, Samples
from shufflenet_mlflow.data.loader import BadImageLog, ImageDataset, batches_of, make_loader
from shufflenet_mlflow.data.preprocess import ToInput, eval_transform
from shufflenet_mlflow.data.sampler import EvalBatches
from shufflenet_mlflow.devices import place
from shufflenet_mlflow.evaluate import EvalSettings
from shufflenet_mlflow.network import Network
from shufflenet_mlflow.reporting import Reporter
from shufflenet_mlflow.stopping import StopFlag


@dataclass(frozen=True)
class Prediction:
    """What a network takes one image for."""

    path: str
    top: tuple[tuple[str, float], ...]
    """Labels with their probabilities in 0..1, the most probable first."""

    @property
    def label(self) -> str:
        """The most probable label."""
        return self.top[0][0]

    @property
    def probability(self) -> float:
        """Of `label`."""
        return self.top[0][1]

    def to_dict(self) -> dict[str, Any]:
        """One entry of `predict --json`."""
        return {
            "path": self.path,
            "label": self.label,
            "probability": self.probability,
            "top": [{"label": label, "probability": probability} for label, probability in self.top],
        }


def predict(
    network: Network,
    paths: Sequence[str],
    settings: EvalSettings,
    *,
    top: int,
    bad_images: BadImageLog,
    reporter: Reporter,
    stop: StopFlag,
) -> Iterator[Prediction]:
    """What `network` takes the image files for, in their order, a batch at a time.

    Args:
        top: how many labels each one gets.

    Raises:
        StopRequested: a signal arrived.
        BadImageError: a file could not be read and is not to be skipped.
    """
    listing = ImageListing(Path(), (), Samples.of((path, 0, 0) for path in paths))
    dataset = ImageDataset(listing, eval_transform(network.preprocess), replace_bad=False)
    batches = EvalBatches(len(listing), settings.batch_size)
    loader = make_loader(dataset, batches, workers=settings.workers, pin_memory=settings.device.type == "cuda")
    to_input, labels = ToInput(network.preprocess, settings.device), network.labels
    model = place(network.model, settings.device).eval()
    with reporter.phase("predicting", len(batches)) as phase:
        for batch in batches_of(loader):
            stop.check()
            for bad in bad_images.new_in(batch):
                reporter.warn(f"left out: {bad}")
            if len(batch.places_N):
                with torch.inference_mode():
                    ranked = rank(model(to_input(batch.images_NCHW)), labels, top)
                for number, row in zip(batch.places_N.tolist(), ranked, strict=True):
                    yield Prediction(paths[number], tuple(row))
            phase.advance()
