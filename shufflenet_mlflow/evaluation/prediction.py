"""Prediction of labels for unlabelled images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from shufflenet_mlflow.data.decode import UnreadableImageError, decode
from shufflenet_mlflow.data.loader import BadImage, BadImageLog, Item, batches_of, make_loader
from shufflenet_mlflow.data.pictures import Pictures
from shufflenet_mlflow.data.preprocess import ToInput, Transform, eval_transform
from shufflenet_mlflow.data.sampler import EvalBatches, Key
from shufflenet_mlflow.evaluation.evaluate import EvalSettings
from shufflenet_mlflow.evaluation.ranking import rank
from shufflenet_mlflow.models.loaded import LoadedModel
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.devices import move_model


@dataclass(frozen=True)
class Prediction:
    """The predicted labels of one image."""

    path: str
    top: tuple[tuple[str, float], ...]
    """Labels with their probabilities in 0..1, the most probable first."""

    @property
    def label(self) -> str:
        """The most probable label."""
        return self.top[0][0]

    @property
    def probability(self) -> float:
        """Probability of `label`, in 0..1."""
        return self.top[0][1]

    def to_dict(self) -> dict[str, Any]:
        """Return the image's entry in the output of `predict --json`."""
        return {
            "path": self.path,
            "label": self.label,
            "probability": self.probability,
            "top": [{"label": label, "probability": probability} for label, probability in self.top],
        }


class PictureDataset(Dataset[Item]):
    """Pictures, decoded and transformed; its keys are (epoch, index), of which the epoch is ignored."""

    def __init__(self, pictures: Pictures, transform: Transform) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: Key) -> Item:
        _epoch, index = key
        try:
            return Item(self.transform(decode(self.pictures.source(index))), 0, index, None, ())
        except UnreadableImageError as error:
            return Item(None, -1, -1, None, (BadImage(self.pictures.path(index), str(error)),))


def predict(
    network: LoadedModel,
    pictures: Pictures,
    settings: EvalSettings,
    *,
    top: int,
    bad_images: BadImageLog,
    context: JobContext,
) -> Iterator[list[Prediction]]:
    """Yield the predictions for `pictures`, in order, a batch at a time; unreadable pictures are left out.

    Args:
        top: number of labels per picture.
        bad_images: decides whether unreadable pictures are skipped.

    Raises:
        StopRequested: a signal arrived.
        BadImageError: a picture could not be read and is not to be skipped.
        DataError: a worker died.
    """
    dataset = PictureDataset(pictures, eval_transform(network.preprocess))
    batches = EvalBatches(len(pictures), settings.batch_size)
    loader = make_loader(dataset, batches, workers=settings.workers, pin_memory=settings.device.type == "cuda")
    to_input, labels = ToInput(network.preprocess, settings.device), network.labels
    model = move_model(network.module, settings.device).eval()
    with context.reporter.phase("predicting", len(batches)) as phase:
        for batch in batches_of(loader):
            context.stop.check()
            for bad in bad_images.new_in(batch):
                context.reporter.warn(f"skipped: {bad}")
            if len(batch.indices_N):
                with torch.inference_mode():
                    ranked = rank(model(to_input(batch.images_NCHW)), labels, top)
                indices = batch.indices_N.tolist()
                yield [Prediction(pictures.path(index), tuple(row)) for index, row in zip(indices, ranked, strict=True)]
            phase.advance()
