"""Batches of images, decoded in worker processes."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from shufflenet_mlflow.data.augment import seeded
from shufflenet_mlflow.data.decode import UnreadableImageError, decode
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.preprocess import Transform
from shufflenet_mlflow.data.sampler import Key, derive_seed
from shufflenet_mlflow.errors import BadImageError, DataError
from shufflenet_mlflow.runtime.devices import usable_cores
from shufflenet_mlflow.runtime.signals import StopFlag

PREFETCHED = 2
"""Batches that each process loads in advance."""

DEFAULT_WORKERS_LIMIT = 16
"""More have not been tried."""
WORKERS_FROM = 256
"""With fewer images, starting processes takes longer than decoding."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - asked for its size only
"""Where Linux keeps what processes share."""


class BadImage(NamedTuple):
    """A file that could not be decoded."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path!r} is not a readable image ({self.reason})"


class Batch(NamedTuple):
    """One batch, still on the CPU."""

    images_NCHW: Tensor
    """uint8, in channels-last format."""
    labels_N: Tensor
    """int64."""
    indices_N: Tensor
    """int64, where in the listing each image stands."""
    shift_NC: Tensor | None
    """float32, what the augmentation adds to all pixels of an image; None if it adds nothing."""
    bad: tuple[BadImage, ...]
    """The files of this batch that could not be decoded."""


class Item(NamedTuple):
    """One image, or that it could not be decoded."""

    image_CHW: Tensor | None
    label: int
    position: int
    shift_C: Tensor | None
    bad: tuple[BadImage, ...]


class ImageDataset(Dataset[Item]):
    """The images of a listing, through a transform.

    Every random draw of the transform is a function of (seed, epoch, index of the sample), so an image looks
    the same whichever process loads it.

    Args:
        lighting: draws each image's colour shift, (3,); None for none.
        replace_bad: put the next readable image of the listing in the place of one that cannot be read, so
            that a training batch keeps its size; otherwise the batch is smaller.
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
        epoch, first = key
        bad: list[BadImage] = []
        for offset in range(len(self) if self.replace_bad else 1):
            index = (first + offset) % len(self)
            sample = self.listing.samples[index]
            path = str(self.listing.root / sample.path)
            try:
                pixels_HWC = decode(path)
                with seeded(derive_seed(self.seed, epoch, first)):
                    image_CHW = self.transform(pixels_HWC)
                    shift_C = self.lighting() if self.lighting else None
                return Item(image_CHW, sample.label, index, shift_C, tuple(bad))
            except UnreadableImageError as error:
                bad.append(BadImage(path, str(error)))
        return Item(None, -1, -1, None, tuple(bad))


def collate(items: list[Item]) -> Batch:
    """Stack the images that could be read, where the training process can see them if this is a worker."""
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
    )


def _start_worker(_worker_id: int) -> None:
    """Leave Ctrl-C and the like, which reach the whole process group, to the main process.

    The loader ends its workers through a queue, and they end by themselves once their parent is gone.
    """
    for number in StopFlag.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)


def make_loader(
    dataset: Dataset[Item], batches: Sampler[list[Key]], *, workers: int, pin_memory: bool
) -> DataLoader[Item]:
    """A loader that yields a `Batch` for each list of keys in `batches`, in order.

    It never draws from the global random generator, which belongs to the training state.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        prefetch_factor=PREFETCHED if workers else None,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )


class BadImageLog:
    """Decides what a batch's unreadable files mean: an error, or a count.

    Args:
        skip: count them instead of raising.
    """

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip
        self.seen: dict[str, str] = {}

    def new_in(self, batch: Batch) -> list[BadImage]:
        """The files of this batch that were not known to be unreadable.

        Raises:
            BadImageError: there is one, and it is not to be skipped.
        """
        new = [bad for bad in dict.fromkeys(batch.bad) if bad.path not in self.seen]
        if new and not self.skip:
            raise BadImageError(f"{new[0]}; remove it or pass --on-bad-image skip", code="image-unreadable")
        self.seen.update(new)
        return new


def batches_of(loader: DataLoader[Item]) -> Iterator[Batch]:
    """The loader's batches, with their type.

    Raises:
        DataError: a process that reads them died.
    """
    with worker_deaths_reported():
        yield from loader


@contextmanager
def worker_deaths_reported() -> Iterator[None]:
    """Raise DataError where PyTorch raises its own error for a process that died while loading images."""
    try:
        yield
    except RuntimeError as error:
        death = worker_death(error)
        if death is None:
            raise
        raise death from error


def worker_death(error: RuntimeError) -> DataError | None:
    """What to say if `error` is PyTorch's report of a dead worker process; None for any other error.

    PyTorch raises it from a signal handler, so it can come up anywhere in the main process.
    """
    if "DataLoader worker" not in str(error):
        return None
    return DataError(
        f"a data loading process died ({str(error).splitlines()[0]}); if memory ran out, lower --workers or "
        "--batch-size",
        code="worker-died",
    )


def default_workers(images: int, batch_size: int, input_size: int) -> int:
    """Processes that decode images, unless told: one per core that is there for this process.

    Fewer where the memory through which their batches come does not hold so many: in containers it is often small.
    """
    if images < WORKERS_FROM:
        return 0
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    processes = max(1, int(local)) if local.isdecimal() else 1
    batch = batch_size * 3 * input_size**2
    try:
        in_memory = shutil.disk_usage(SHARED_MEMORY).free // (2 * PREFETCHED * batch * processes)
    except OSError:  # not Linux
        in_memory = DEFAULT_WORKERS_LIMIT
    return min(DEFAULT_WORKERS_LIMIT, max(1, usable_cores() // processes), in_memory)
