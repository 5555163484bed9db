"""The prediction job: a checkpoint reference and image files in, labels out."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shufflenet_mlflow.client import prepare_environment
from shufflenet_mlflow.data.folder import image_files
from shufflenet_mlflow.data.loader import BadImageLog, worker_deaths_reported
from shufflenet_mlflow.devices import choose_device, keep_freed_memory
from shufflenet_mlflow.errors import DataError
from shufflenet_mlflow.evaluate import EvalSettings
from shufflenet_mlflow.jobs.loading import NetworkRequest
from shufflenet_mlflow.planning import BATCH_SIZE, default_workers
from shufflenet_mlflow.predict import Prediction, predict
from shufflenet_mlflow.reporting import Reporter
from shufflenet_mlflow.stopping import StopFlag


@dataclass(frozen=True)
class PredictRequest(NetworkRequest):
    """What to predict, and with what; None means as the checkpoint says."""

    images: Sequence[str] = ()
    """Image files, and folders of them."""
    top: int = 5
    batch_size: int | None = None
    workers: int | None = None
    device: str = "auto"
    on_bad_image: str = "fail"


def run_prediction(request: PredictRequest, *, reporter: Reporter, stop: StopFlag) -> Iterator[Prediction]:
    """What the checkpoint takes each image for, in the order of `request.images`, as they come.

    Raises:
        ShuffleNetError: see `shufflenet_mlflow.errors`; before the first prediction but for unreadable images.
    """
    prepare_environment()
    paths = [path for given in request.images for path in _files(given)]
    loaded = request.load(reporter)
    device = choose_device(request.device)
    keep_freed_memory(device)
    batch_size = request.batch_size or BATCH_SIZE
    workers = default_workers(len(paths), batch_size, loaded.network.preprocess.input_size)
    settings = EvalSettings(
        batch_size=batch_size,
        workers=workers if request.workers is None else request.workers,
        device=device,
    )
    with worker_deaths_reported():
        yield from predict(
            loaded.network,
            paths,
            settings,
            top=min(request.top, loaded.network.num_classes),
            bad_images=BadImageLog(skip=request.on_bad_image == "skip"),
            reporter=reporter,
            stop=stop,
        )


def _files(given: str) -> list[str]:
    """The file, or the images below the folder.

    Raises:
        DataError: it does not exist, or there is no image in it.
    """
    if os.path.isdir(given):
        found = image_files(given)
        if not found:
            raise DataError(f"the folder {given!r} holds no images")
        return found
    if not os.path.exists(given):
        raise DataError(f"the image {given!r} does not exist")
    return [given]
