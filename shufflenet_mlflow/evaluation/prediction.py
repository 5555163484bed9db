"""Prediction of labels for unlabelled images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from shufflenet_mlflow.data.formats import UnreadableImageError
from shufflenet_mlflow.data.inputs import open_any
from shufflenet_mlflow.data.loader import BadImage, BadImageLog, Item, Remark, batches_of, make_loader
from shufflenet_mlflow.data.preprocess import ToInput, Transform, eval_transform
from shufflenet_mlflow.data.remarks import remarks
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


class AnyPictures(Protocol):
    """Pictures in order, such as `Pictures`."""

    def __len__(self) -> int:
        """Return how many there are."""

    def path(self, index: int) -> str:
        """Return what to call one of them."""

    def source(self, index: int) -> Any:
        """Return what to open; see `data.inputs.ImageLike`."""


class PictureDataset(Dataset[Item]):
    """Pictures, decoded and transformed; its keys are (epoch, index), of which the epoch is ignored."""

    def __init__(self, pictures: AnyPictures, transform: Transform) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: Key) -> Item:
        _epoch, index = key
        try:
            with remarks() as found:
                image_CHW = self.transform(open_any(self.pictures.source(index), self.transform.reading))
            noted = tuple(Remark(self.pictures.path(index), text) for text in found)
            return Item(image_CHW, 0, index, None, (), noted)
        except UnreadableImageError as error:
            return Item(None, -1, -1, None, (BadImage(self.pictures.path(index), str(error)),))


def predict(
    network: LoadedModel,
    pictures: AnyPictures,
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
    first = 0
    with context.reporter.phase("predicting", len(batches)) as phase:
        for batch in batches_of(loader, context.stop):
            context.stop.check()
            found: list[Prediction] = []
            if len(batch.indices_N):
                with torch.inference_mode():
                    ranked = rank(model(to_input(batch.images_NCHW)), labels, top)
                indices = batch.indices_N.tolist()
                found = [Prediction(pictures.path(at), tuple(row)) for at, row in zip(indices, ranked, strict=True)]
                if batch.bad and not bad_images.skip:  # those before the first that ends it
                    before = [row for number, row in enumerate(found) if indices[number] == first + number]
                    if before:
                        yield before
                    found = []
            for bad in bad_images.new_in(batch):
                context.reporter.warn(f"skipped: {bad}")
            if found:
                yield found
            first += len(batch.indices_N) + len(batch.bad)
            phase.advance()
