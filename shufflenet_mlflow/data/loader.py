"""Loading of image batches, decoded in worker processes."""

import logging
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from shufflenet_mlflow.data.augment import seeded
from shufflenet_mlflow.data.decode import open_picture
from shufflenet_mlflow.data.formats import UnreadableImageError
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.preprocess import Transform
from shufflenet_mlflow.data.remarks import remarks
from shufflenet_mlflow.data.rgb import NEARLY_BLANK
from shufflenet_mlflow.data.sampler import Key, derive_seed
from shufflenet_mlflow.data.workers import LoadedBatches, start_worker
from shufflenet_mlflow.errors import BadImageError, DataError
from shufflenet_mlflow.runtime.devices import local_processes, usable_cores
from shufflenet_mlflow.runtime.signals import StopFlag

logger = logging.getLogger(__name__)

PREFETCHED = 2
"""Batches that each worker loads in advance."""

DEFAULT_WORKERS_LIMIT = 16
"""The most workers by default; more have not been measured."""
WORKERS_FROM = 256
"""With fewer images, starting workers takes longer than decoding."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - asked for its size only
"""Linux's shared memory, through which batches come from the workers."""


class BadImage(NamedTuple):
    """A file that could not be decoded."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path!r} is not a readable image ({self.reason})"


class Remark(NamedTuple):
    """A warning about a file that was decoded all the same."""

    path: str
    text: str


class Batch(NamedTuple):
    """One batch, still on the CPU."""

    images_NCHW: Tensor
    """uint8, in channels-last format."""
    labels_N: Tensor
    """int64."""
    indices_N: Tensor
    """int64, index of each image in the listing."""
    shift_NC: Tensor | None
    """float32, lighting noise on the 0-255 scale, to be added to all pixels of an image; None without it."""
    bad: tuple[BadImage, ...]
    """The files of this batch that could not be decoded."""
    remarks: tuple[Remark, ...] = ()
    """Warnings about files of this batch, which were decoded all the same."""


class Item(NamedTuple):
    """One element of a batch; without an image if none could be decoded."""

    image_CHW: Tensor | None
    """uint8."""
    label: int
    position: int
    """Index in the listing."""
    shift_C: Tensor | None
    bad: tuple[BadImage, ...]
    remarks: tuple[Remark, ...] = ()


class ImageDataset(Dataset[Item]):
    """The images of a listing, decoded and transformed; its keys are those of `SampleOrder`.

    Every random draw of the transform is a function of seed and key, so it does not matter which process loads an
    image.

    Args:
        lighting: draws each image's lighting noise, (3,), if any.
        replace_bad: replace an unreadable image by the next readable one of the listing, so that a batch keeps its
            size; otherwise the batch is smaller.
    """

    def __init__(
        self,
        listing: ImageListing,
        transform: Transform,
        *,
        lighting: Callable[[], Tensor] | None = None,
        seed: int = 0,
        replace_bad: bool,
    ) -> None:
        self.listing = listing
        self.transform = transform
        self.lighting = lighting
        self.seed = seed
        self.replace_bad = replace_bad

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, key: Key) -> Item:
        requested = key[1]
        bad: list[BadImage] = []
        for offset in range(len(self) if self.replace_bad else 1):
            index = (requested + offset) % len(self)
            sample = self.listing.samples[index]
            path = str(self.listing.root / sample.path)
            try:
                with remarks() as found, seeded(derive_seed(self.seed, *key)):
                    image_CHW = self.transform(open_picture(path, self.transform.reading))
                    shift_C = self.lighting() if self.lighting else None
                noted = tuple(Remark(path, text) for text in found)
                return Item(image_CHW, sample.label, index, shift_C, tuple(bad), noted)
            except UnreadableImageError as error:
                bad.append(BadImage(path, str(error)))
        return Item(None, -1, -1, None, tuple(bad))


def collate(items: list[Item]) -> Batch:
    """Stack the images that could be decoded; in a worker, into shared memory."""
    bad = tuple(entry for item in items for entry in item.bad)
    images_HWC = [item.image_CHW.permute(1, 2, 0) for item in items if item.image_CHW is not None]
    labels = [item.label for item in items if item.image_CHW is not None]
    indices = [item.position for item in items if item.image_CHW is not None]
    shifts = [item.shift_C for item in items if item.shift_C is not None]
    images_NHWC = default_collate(images_HWC) if images_HWC else torch.empty(0, 0, 0, 3, dtype=torch.uint8)
    return Batch(
        images_NHWC.permute(0, 3, 1, 2),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(indices, dtype=torch.int64),
        torch.stack(shifts) if shifts else None,
        bad,
        tuple(remark for item in items for remark in item.remarks),
    )


def _start_worker(_worker_id: int, *, parent: int, dies_with_parent: bool) -> None:
    start_worker(parent, dies_with_parent)
    cv2.setNumThreads(0)
    warnings.simplefilter("ignore")  # those about files come with the batch


def make_loader(
    dataset: Dataset[Item], batches: Sampler[list[Key]], *, workers: int, pin_memory: bool
) -> DataLoader[Item]:
    """Return a loader that yields a `Batch` for each list of keys in `batches`, in order.

    It does not draw from the global random generator, which belongs to the training state.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        prefetch_factor=PREFETCHED if workers else None,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=partial(
            _start_worker,
            parent=os.getpid(),
            dies_with_parent=threading.current_thread() is threading.main_thread(),
        ),
        generator=torch.Generator(),
    )


class BadImageLog:
    """The unreadable files met so far: the first is an error unless they are to be skipped.

    Args:
        skip: collect them instead of raising.
    """

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip
        self.seen: dict[str, str] = {}
        self._remarked: set[Remark] = set()

    def new_in(self, batch: Batch) -> list[BadImage]:
        """Return the unreadable files of this batch that were not met before.

        Raises:
            BadImageError: there is one, and `skip` is False.
        """
        for remark in batch.remarks:
            if remark not in self._remarked:
                is_first = remark.text not in {before.text for before in self._remarked}
                self._remarked.add(remark)
                level = logging.WARNING if remark.text == NEARLY_BLANK and is_first else logging.DEBUG
                logger.log(level, "%s: %s", *remark)
        new = [bad for bad in dict.fromkeys(batch.bad) if bad.path not in self.seen]
        if new and not self.skip:
            raise BadImageError(f"{new[0]}; remove it or pass --on-bad-image skip", code="image-unreadable")
        self.seen.update(new)
        return new


def batches_of(loader: DataLoader[Item], stop: StopFlag | None = None) -> Iterator[Batch]:
    """Yield the loader's batches; its workers end with the iteration, however it ends.

    Args:
        stop: a signal ends the wait for a batch.

    Raises:
        DataError: a worker died, or could not be started.
        StopRequested: a signal has arrived.
    """
    batches: LoadedBatches[Batch] = LoadedBatches(loader, stop or StopFlag())
    try:
        while (batch := batches.next()) is not None:
            yield batch
    except DataError:
        batches.close(at_once=True)
        raise
    finally:
        batches.close()


def default_workers(images: int, batch_size: int, input_size: int) -> int:
    """Return the default number of workers: one per core available to this process, none for few images.

    Fewer if shared memory, which is often small in containers, cannot hold their batches.
    """
    if images < WORKERS_FROM:
        return 0
    processes = local_processes()
    batch_bytes = batch_size * 3 * input_size**2
    try:
        memory_limit = shutil.disk_usage(SHARED_MEMORY).free // (2 * PREFETCHED * batch_bytes * processes)
    except OSError:  # not Linux
        memory_limit = DEFAULT_WORKERS_LIMIT
    return min(DEFAULT_WORKERS_LIMIT, max(1, usable_cores() // processes), memory_limit)
