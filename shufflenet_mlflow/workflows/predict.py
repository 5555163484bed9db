"""`shufflenet predict`: a checkpoint and images in, labels out."""

from collections.abc import Generator
from dataclasses import dataclass, replace

from shufflenet_mlflow.config import DEFAULT_BATCH_SIZE
from shufflenet_mlflow.data.loader import WORKERS_FROM, BadImageLog, default_workers
from shufflenet_mlflow.data.pictures import Pictures
from shufflenet_mlflow.evaluation.evaluate import EvalSettings
from shufflenet_mlflow.evaluation.prediction import AnyPictures, Prediction, predict
from shufflenet_mlflow.models.fuse_bn import fuse_bn
from shufflenet_mlflow.models.loaded import LoadedModel
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.devices import choose_device, keep_freed_memory
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking.client import prepare_environment
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.workflows.loading import ModelRequest


@dataclass(frozen=True)
class PredictRequest(ModelRequest):
    """A checkpoint to predict with; None means the checkpoint's own setting."""

    top: int = 5
    batch_size: int | None = None
    workers: int | None = None
    device: str = "auto"
    on_bad_image: str = "fail"


@dataclass(frozen=True)
class Predictions:
    """Predictions, computed as they are consumed."""

    labels: tuple[str, ...]
    """All labels of the network."""
    top: int
    """Labels per image."""
    batches: Generator[list[Prediction], None, None]
    """Batches of predictions, in the order of the images.

    Raises:
        StopRequested: a signal arrived.
        DataError: an image could not be read and is not to be skipped, or a process that reads them died.
    """


def run_prediction(request: PredictRequest, pictures: Pictures, *, reporter: Reporter, stop: StopFlag) -> Predictions:
    """Load the checkpoint, and start to predict.

    Raises:
        ShuffleNetError: see `shufflenet_mlflow.errors`.
    """
    prepare_environment()
    loaded = request.load(Connection(request.tracking_uri), reporter)
    network, request = loaded.network, replace(request, device=loaded.device(request.device))
    top = min(request.top, network.num_classes)
    context = JobContext.alone(reporter, stop)
    return Predictions(tuple(network.labels), top, predict_pictures(network, pictures, request, context))


def predict_pictures(
    network: LoadedModel, pictures: AnyPictures, request: PredictRequest, context: JobContext
) -> Generator[list[Prediction], None, None]:
    """Yield the predictions for pictures, a batch at a time, as `predict` of `evaluation` does.

    Args:
        request: how; its `ref` has been loaded as `network`.
    """
    device = choose_device(request.device)
    keep_freed_memory(device)
    if len(pictures) >= WORKERS_FROM:
        # As in an evaluation, with the same bits. For fewer images folding takes longer than it saves; and one alone
        # is then answered with the bits of a served model.
        network = replace(network, module=fuse_bn(network.module))
    batch_size = request.batch_size or DEFAULT_BATCH_SIZE
    workers = default_workers(len(pictures), batch_size, network.preprocess.input_size)
    settings = EvalSettings(
        batch_size=batch_size,
        workers=workers if request.workers is None else request.workers,
        device=device,
    )
    yield from predict(
        network,
        pictures,
        settings,
        top=min(request.top, network.num_classes),
        bad_images=BadImageLog(skip=request.on_bad_image == "skip"),
        context=context,
    )
