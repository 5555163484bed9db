"""A data set of the user's own in the place of an image folder."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shufflenet_mlflow.data.augment import seeded
from shufflenet_mlflow.data.listing import ImageListing, Samples
from shufflenet_mlflow.data.loader import Item
from shufflenet_mlflow.data.sampler import Key, derive_seed
from shufflenet_mlflow.errors import DataError


class LabelledImages(Protocol):
    """A data set by index, such as a `torch.utils.data.Dataset`: images with labels.

    Its random draws with torch, numpy and `random` follow from the seed of the training, the epoch and the index.
    """

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image, float (C, H, W), as the network takes it, and its label from 0 on."""


@dataclass(frozen=True)
class OwnImages(ImageListing):
    """A data set of the user's own, as far as it can be listed."""

    dataset: LabelledImages | None = None

    @classmethod
    def of(cls, dataset: LabelledImages, classes: Sequence[str], name: str) -> "OwnImages":
        """List a data set.

        Args:
            name: what to call it in messages.

        Raises:
            DataError: its length is not known, or it has no images.
        """
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DataError(
                f"{name} is a {type(dataset).__name__} without __len__ and __getitem__; samples are drawn by index, so "
                "that a resumed training sees the same ones",
                code="dataset-not-indexed",
            )
        if not len(dataset):
            raise DataError(f"{name} has no images", code="dataset-empty")
        labels = getattr(dataset, "targets", None)
        known = labels is not None and len(labels) == len(dataset)
        return cls(
            Path(name),
            tuple(map(str, classes)),
            Samples(
                np.zeros(0, np.uint8),
                np.zeros(len(dataset), np.int64),
                np.array(labels if known else np.full(len(dataset), -1), np.int32),
                np.zeros(len(dataset), np.int64),
            ),
            dataset=dataset,
        )

    @property
    def knows_labels(self) -> bool:
        """Whether the data set has all labels as `targets`."""
        return int(self.samples.labels.min()) >= 0


class OwnItems(Dataset[Item]):
    """The images of a data set, as `ImageDataset` yields them; its keys are those of `SampleOrder`."""

    def __init__(self, images: OwnImages, seed: int) -> None:
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Item:
        assert self.images.dataset is not None  # noqa: S101 - `OwnImages.of` has set it
        with _all_seeded(derive_seed(self.seed, *key)):
            item: Any = self.images.dataset[key[1]]
        image_CHW, label = item
        if not isinstance(image_CHW, Tensor) or image_CHW.dim() != 3:
            found = f"shape {tuple(image_CHW.shape)}" if hasattr(image_CHW, "shape") else type(image_CHW).__name__
            raise DataError(
                f"{self.images.source}[{key[1]}] is an image of {found}; it must be a tensor (channels, height, width)",
                code="dataset-item-invalid",
            )
        return Item(image_CHW, int(label), key[1], None, ())


def items_of(listing: ImageListing, otherwise: Callable[[], Dataset[Item]], *, seed: int = 0) -> Dataset[Item]:
    """Return the items of a data set of the user's own, or those of any other listing.

    Args:
        otherwise: makes those.
    """
    return OwnItems(listing, seed) if isinstance(listing, OwnImages) else otherwise()


@contextmanager
def _all_seeded(seed: int) -> Iterator[None]:
    """Seed the generators of torch's CPU, numpy and Python within the block, and restore them afterwards."""
    numpys, pythons = np.random.get_state(), random.getstate()
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        with seeded(seed), torch.no_grad():
            yield
    finally:
        np.random.set_state(numpys)
        random.setstate(pythons)
