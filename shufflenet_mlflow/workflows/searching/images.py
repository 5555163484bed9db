"""The two sets of images of a search, decoded once: training images for BN statistics, held-out ones for scores.

The pixels of both follow from the seed alone. They are kept in a file that all processes of the search map into their
memory, 150 kB for each image of 224 pixels.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shufflenet_mlflow.config.search import SearchPlan
from shufflenet_mlflow.data.augment import AUGMENTATIONS, draw_lighting
from shufflenet_mlflow.data.holding_out import HeldOut
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.loader import BadImageLog, Batch, ImageDataset, batches_of, default_workers, make_loader
from shufflenet_mlflow.data.preprocess import Preprocess, eval_transform
from shufflenet_mlflow.data.sampler import EvalBatches, ReestimationBatches, SampleOrder
from shufflenet_mlflow.errors import SearchError
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.files import remove_temporaries, temporary_beside

PIXELS_FILE = "pixels"


@dataclass(frozen=True)
class SearchImages:
    """Where a search's images are, and what is done with them."""

    held: HeldOut
    """Training images, and those for scores."""
    preprocess: Preprocess
    augment: str
    """How training images are varied; a name in `AUGMENTATIONS`."""
    skip_bad: bool

    def decode(self, plan: SearchPlan, context: JobContext) -> dict[str, list[Tensor]]:
        """Return the batches of both sets: `bn` and `scoring`, uint8 (N, 3, H, W), `shift` (N, 3), `labels` (N).

        Raises:
            BadImageError: an image cannot be read, and is not to be skipped.
            SearchError: too few can be read.
            StopRequested: a signal has arrived.
        """
        found: dict[str, list[Tensor]] = {"bn": [], "shift": [], "scoring": [], "labels": []}
        for batch in self._batches(self._varied(plan.seed), self._bn_batches(plan), "reading training images", context):
            found["bn"].append(batch.images_NCHW)
            if batch.shift_NC is not None:
                found["shift"].append(batch.shift_NC)
        plain = ImageDataset(self.held.scoring, eval_transform(self.preprocess), replace_bad=False)
        order = EvalBatches(len(self.held.scoring), plan.batch_size)
        for batch in self._batches(plain, order, "reading held-out images", context):
            if len(batch.labels_N):
                found["scoring"].append(batch.images_NCHW)
                found["labels"].append(batch.labels_N)
        if not found["scoring"] or any(len(images) < 2 for images in found["bn"]):
            raise SearchError(
                f"too few of the images in {str(self.held.train.source)!r} are readable for a search",
                code="search-no-images",
            )
        return found

    def _bn_batches(self, plan: SearchPlan) -> ReestimationBatches:
        size = min(plan.batch_size, plan.bn_images, len(self.held.train))
        return ReestimationBatches(SampleOrder(len(self.held.train), size, plan.seed), plan.bn_images // size)

    def _varied(self, seed: int) -> ImageDataset:
        augmentation = AUGMENTATIONS[self.augment]
        return ImageDataset(
            self.held.train,
            augmentation.transform(self.preprocess),
            lighting=partial(draw_lighting, self.preprocess.settings) if augmentation.lighting else None,
            seed=seed,
            replace_bad=True,
        )

    def _batches(
        self, dataset: ImageDataset, batches: ReestimationBatches | EvalBatches, what: str, context: JobContext
    ) -> Iterator[Batch]:
        bad_images = BadImageLog(skip=self.skip_bad)
        workers = default_workers(len(dataset), 128, self.preprocess.input_size)
        loader = make_loader(dataset, batches, workers=workers, pin_memory=False)
        with context.reporter.phase(what, len(batches)) as phase:
            for batch in batches_of(loader, context.stop):
                for bad in bad_images.new_in(batch):
                    context.reporter.warn(f"left out: {bad}")
                yield batch
                phase.advance()


def identity(listing: ImageListing) -> str:
    """Return what tells a set of images from others: a digest of its content, or of paths and sizes of a large one."""
    return listing.content_digest


@contextlib.contextmanager
def pixels_file(folder: Path, batches: dict[str, list[Tensor]]) -> Iterator[Path]:
    """Write the batches to a file, for as long as the block lasts; those of killed processes are removed.

    Raises:
        SearchError: it cannot be written.
    """
    remove_temporaries(folder)
    path = temporary_beside(folder / PIXELS_FILE)
    try:
        try:
            torch.save(batches, path)
        except (OSError, RuntimeError) as error:
            raise SearchError(
                f"cannot keep the images of the search in {str(folder)!r} ({error}); make room, or lower --bn-images "
                "or --score-images",
                code="search-pixels-unwritable",
            ) from error
        yield path
    finally:
        path.unlink(missing_ok=True)
