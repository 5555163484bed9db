"""Evaluation: one full pass over a data set."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.loader import BadImageLog, Batch, ImageDataset, batches_of, make_loader
from shufflenet_mlflow.data.own import items_of
from shufflenet_mlflow.data.preprocess import Preprocess, ToInput, eval_transform
from shufflenet_mlflow.data.sampler import EvalBatches
from shufflenet_mlflow.errors import DataError
from shufflenet_mlflow.evaluation.metrics import count_by_class, count_correct
from shufflenet_mlflow.models.fuse_bn import fuse_bn
from shufflenet_mlflow.runtime.context import JobContext


@dataclass(frozen=True)
class EvalResult:
    """Accuracies in 0..1 and the mean cross-entropy over `n` images."""

    top1: float
    top5: float
    """1 with five classes or fewer."""
    loss: float
    n: int
    skipped: int
    """Number of unreadable files, which are not among the `n`."""
    mean_class_accuracy: float
    """Mean of the classes' accuracies, without classes that have no images."""
    majority: float
    """Share of the largest class: the accuracy of always answering with it."""
    only_answer: int | None = None
    """The label that was predicted for every image, if it was one only although there are images of several."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics of a validation, by the names that runs have them under."""
        names = ("loss", "top1", "top5", "mean_class_accuracy", "majority")
        return {f"val/{name}": getattr(self, name) for name in names}


@dataclass(frozen=True)
class EvalSettings:
    """How images are loaded and where the network runs; results do not depend on it, up to rounding."""

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

    The model is unchanged: a copy of it is evaluated, with batch normalisation fused into the convolutions. Every image
    has the same weight, whatever the size of the last batch.

    Args:
        bad_images: decides whether unreadable files are skipped.
        context: its processes share the work; each gets the same result.
        observe: called with each of this process's batches and its logits (N, num_classes).

    Raises:
        StopRequested: a signal arrived.
        BadImageError: a file could not be read and is not to be skipped.
        DataError: no file could be read, or a worker died.
    """
    world, reporter = context.world, context.reporter
    dataset = items_of(listing, lambda: ImageDataset(listing, eval_transform(preprocess), replace_bad=False))
    batches = EvalBatches(len(listing), settings.batch_size, world.rank, world.size)
    loader = make_loader(dataset, batches, workers=settings.workers, pin_memory=settings.device.type == "cuda")
    fetched = batches_of(loader, context.stop)
    loss_function = nn.CrossEntropyLoss()
    device = settings.device
    to_input = ToInput(preprocess, device)
    correct = torch.zeros(2, dtype=torch.int64, device=device)
    by_class_3C: Tensor | None = None
    loss_sum = torch.zeros((), device=device)
    n = skipped = 0
    fused = fuse_bn(model)

    def fetch() -> Batch | None:
        batch = next(fetched, None)
        for bad in bad_images.new_in(batch) if batch is not None else ():
            reporter.warn(f"skipped: {bad}")
        return batch

    with torch.inference_mode(), reporter.phase("validating", batches.max_batches) as phase:
        for batch in world.synced_batches(batches.max_batches, fetch):
            if batch is not None:
                skipped += len(batch.bad)
                size = len(batch.labels_N)
                if size:
                    labels = batch.labels_N.to(device, non_blocking=True)
                    logits = fused(to_input(batch.images_NCHW))
                    correct += torch.stack(count_correct(logits, labels))
                    counts_3C = count_by_class(logits, labels)
                    by_class_3C = counts_3C if by_class_3C is None else by_class_3C + counts_3C
                    loss_sum += loss_function(logits, labels) * size
                    n += size
                    if observe is not None:
                        observe(batch, logits)
            phase.advance()
    width = world.highest(0 if by_class_3C is None else by_class_3C.shape[1])  # a process may have had no image
    totals_3C = torch.zeros(3, width, dtype=torch.int64) if by_class_3C is None else by_class_3C.cpu()
    top1, top5, n, skipped = world.sum(torch.tensor([*correct.tolist(), n, skipped])).tolist()
    loss = world.sum(loss_sum.cpu().double()).item()
    images_C, correct_C, predicted_C = world.sum(totals_3C)
    if not n:
        raise DataError(
            f"no file in {str(listing.source)!r} is a readable image ({skipped} tried)", code="eval-no-readable-image"
        )
    present_C = images_C > 0
    answers = predicted_C.nonzero()
    return EvalResult(
        top1=top1 / n,
        top5=top5 / n,
        loss=loss / n,
        n=n,
        skipped=skipped,
        mean_class_accuracy=(correct_C[present_C].double() / images_C[present_C]).mean().item(),
        majority=int(images_C.max()) / n,
        only_answer=int(answers[0]) if len(answers) == 1 and present_C.sum() > 1 else None,
    )
