"""One full pass over a set of images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.loader import BadImageLog, Batch, ImageDataset, batches_of, make_loader
from shufflenet_mlflow.data.preprocess import Preprocess, ToInput, eval_transform
from shufflenet_mlflow.data.sampler import EvalBatches
from shufflenet_mlflow.errors import DataError
from shufflenet_mlflow.evaluation.metrics import count_correct
from shufflenet_mlflow.models.fuse_bn import fuse_bn
from shufflenet_mlflow.runtime.context import JobContext


@dataclass(frozen=True)
class EvalResult:
    """Accuracies in 0..1 and the mean cross-entropy over `n` images."""

    top1: float
    top5: float
    """Equal to 1 with five classes or fewer."""
    loss: float
    n: int
    skipped: int
    """Unreadable files that were left out."""


@dataclass(frozen=True)
class EvalSettings:
    """How images reach the network; none of it changes a result but for rounding."""

    batch_size: int
    workers: int
    device: torch.device


def evaluate(
    model: nn.Module,
    listing: ImageListing,
    preprocess: Preprocess,
    settings: EvalSettings,
    *,
    bad_images: BadImageLog,
    context: JobContext,
    observe: Callable[[Batch, Tensor], None] | None = None,
) -> EvalResult:
    """Evaluate `model`, which is on `settings.device`, on every image of `listing`, once.

    The model stays as it is: a copy does the work, in evaluation mode and with batch normalisation folded into its
    convolutions. Every image counts the same, whatever the size of the last batch.

    Args:
        context: its processes share the work; each gets the same result.
        observe: is given each of this process's batches with its logits (N, classes).

    Raises:
        StopRequested: a signal arrived.
        DataError: a file could not be read and is not to be skipped, or none could be read.
    """
    world, reporter = context.world, context.reporter
    dataset = ImageDataset(listing, eval_transform(preprocess), replace_bad=False)
    batches = EvalBatches(len(listing), settings.batch_size, world.rank, world.size)
    loader = make_loader(dataset, batches, workers=settings.workers, pin_memory=settings.device.type == "cuda")
    fetched = batches_of(loader)
    loss_function = nn.CrossEntropyLoss()
    device = settings.device
    to_input = ToInput(preprocess, device)
    correct = torch.zeros(2, dtype=torch.int64, device=device)
    loss_sum = torch.zeros((), device=device)
    n = skipped = 0
    network = fuse_bn(model)

    def fetch() -> Batch | None:
        batch = next(fetched, None)
        for bad in bad_images.new_in(batch) if batch is not None else ():
            reporter.warn(f"left out: {bad}")
        return batch

    with torch.inference_mode(), reporter.phase("validating", batches.max_batches) as phase:
        for batch in world.synced_batches(batches.max_batches, fetch):
            if batch is not None:
                skipped += len(batch.bad)
                size = len(batch.labels_N)
                if size:
                    labels = batch.labels_N.to(device, non_blocking=True)
                    logits = network(to_input(batch.images_NCHW))
                    correct += torch.stack(count_correct(logits, labels))
                    loss_sum += loss_function(logits, labels) * size
                    n += size
                    if observe is not None:
                        observe(batch, logits)
            phase.advance()
    counts = torch.tensor([*correct.tolist(), n, skipped])
    top1, top5, n, skipped = world.sum(counts).tolist()
    loss = world.sum(loss_sum.cpu().double()).item()
    if not n:
        raise DataError(
            f"none of the {skipped} files in {str(listing.root)!r} is a readable image", code="eval-no-readable-image"
        )
    return EvalResult(top1=top1 / n, top5=top5 / n, loss=loss / n, n=n, skipped=skipped)
