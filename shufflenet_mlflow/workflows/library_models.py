"""Networks of checkpoints for scripts of your own: loaded, asked, evaluated."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from shufflenet_mlflow.data.inputs import ImageLike, listed
from shufflenet_mlflow.data.pictures import Pictures, find_pictures
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.evaluation.prediction import Prediction
from shufflenet_mlflow.models.loaded import LoadedModel as Network
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.devices import choose_device, move_model
from shufflenet_mlflow.runtime.progress import LoggingReporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.tracking.client import prepared_environment, uri_of_caller
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.workflows.eval import EvalRequest, EvalSummary, measure
from shufflenet_mlflow.workflows.loading import LoadedCheckpoint, ModelRequest
from shufflenet_mlflow.workflows.predict import PredictRequest, predict_pictures

Images = ImageLike | Iterable[ImageLike]


@dataclass(frozen=True, repr=False)
class LoadedModel(Network):
    """A checkpoint's network, with all that belongs to it; see `load_model`.

    `module` is the network, in evaluation mode: float32 (N, 3, S, S) -> logits (N, num_classes). `preprocess` makes its
    input: an image, as for `predict`, -> float32 (3, S, S), or a list of them -> (N, 3, S, S), where S is
    `preprocess.input_size`. Both in one: `model.module(model.preprocess(images))`.
    """

    checkpoint: Path
    """The file."""
    run_id: str | None
    """The run that it belongs to."""
    iters: int | None
    """Completed iterations."""
    config: Mapping[str, Any]
    """The `TrainConfig` that it was trained with, as plain values; empty if the file does not say."""
    device: torch.device
    """Where `module` is."""
    _payload: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<{self.spec.name} of {str(self.checkpoint)!r}: {counted(self.num_classes, 'class', 'classes')}>"

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each output; its number if the checkpoint gives it no name."""
        return tuple(self.labels)

    def predict(
        self,
        images: Images,
        *,
        top: int = 5,
        batch_size: int | None = None,
        workers: int | None = None,
        on_bad_image: str = "fail",
    ) -> list[Prediction]:
        """Predict the classes of images, as `shufflenet predict` does.

        Args:
            images: one or several, each a path; the content of an image file, as bytes or an open file; a PIL image;
                uint8 (H, W, 3) RGB or (H, W) grey; or a uint8 tensor (3, H, W). A path may also be a folder, with all
                images below it, a table (`.csv`, `.parquet`) with a column `path`, or a pattern such as `a/**/*.jpg`.
            top: labels per image.
            batch_size: images at a time; by default 64.
            workers: processes that decode files; by default one per core for many files, none for few.
            on_bad_image: `fail`, or `skip` to leave unreadable images out.

        Returns:
            A prediction for each image, in order. Its `path` is the file, or `image N` for what is none.

        Raises:
            BadImageError: an image cannot be read; the message names it.
            DataError: a path does not exist, or a folder holds no images.
            ConfigError: an option cannot work.
        """
        if type(top) is not int or top < 1:
            raise ConfigError(f"top (={top!r}) must be a whole number, at least 1", code="top-invalid")
        given = _gathered(images)
        request = PredictRequest(
            str(self.checkpoint),
            top=top,
            batch_size=batch_size,
            workers=workers if workers is not None or isinstance(given, Pictures) else 0,
            device=str(self.device),
            on_bad_image=on_bad_image,
        )
        batches = predict_pictures(self, given, request, JobContext.alone(LoggingReporter(), StopFlag()))
        return [prediction for batch in batches for prediction in batch] if len(given) else []


@dataclass(frozen=True)
class _Given:
    """Images of all kinds, in order."""

    images: Sequence[Any]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> str:
        return self.names[index]

    def source(self, index: int) -> Any:
        return self.images[index]


def _gathered(images: Any) -> Pictures | _Given:
    """Return the images that are named or given; a folder's images in its place."""
    several, _ = listed(images)
    if all(isinstance(image, (str, os.PathLike)) for image in several):
        return _found(several)
    found: list[Any] = []
    names: list[str] = []
    for number, image in enumerate(several):
        if isinstance(image, (str, os.PathLike)):
            paths = [*_found([image]).paths()]
            found, names = [*found, *paths], [*names, *paths]
        else:
            found.append(image)
            names.append(str(getattr(image, "filename", "") or f"image {number}"))
    return _Given(found, names)


def _found(paths: Sequence[Any]) -> Pictures:
    words = [os.fspath(path) for path in paths]
    return find_pictures([f".{os.sep}-" if word == "-" else word for word in words], _no_stdin)


def _no_stdin() -> Any:
    raise AssertionError("standard input is not named")


def load_model(
    ref: str | Path,
    *,
    device: str = "cpu",
    model: str | None = None,
    choices: str | None = None,
    scales: str | None = None,
    input_size: int | None = None,
    mean_image: str | Path | None = None,
    tracking_uri: str | None = None,
    cache_dir: str | Path | None = None,
) -> LoadedModel:
    """Load the network of a checkpoint, with its preprocessing and classes.

    Args:
        ref: as for `read_checkpoint`; a run ID, or `runs:/<id>`, means the run's best checkpoint.
        device: `cpu`, `cuda`, `cuda:N`, `mps`, or `auto` for the fastest there is.
        model: name of the network, for files that do not say it, such as those of the original release.
        choices: choices of `shufflenet_oneshot`, comma-separated, for files that do not say them.
        scales: scales of `shufflenet_oneshot`, comma-separated, for files that do not say them.
        input_size: pixels, a multiple of 32; by default as it was trained with, or 224.
        mean_image: file of a mean image; by default that of the checkpoint, if it has one.
        tracking_uri: where runs are looked up; by default as MLflow does.
        cache_dir: where remote files land; by default `SHUFFLENET_CACHE_DIR`, or the user's cache folder.

    Raises:
        UnresolvedError: nothing usable stands behind `ref`; the message says what was found instead.
        CheckpointError: a file that was named exactly does not verify, or is not of a network of the series.
        ConfigError: the file does not name its network, and `model` is missing; or an option cannot work.
        TrackingError: MLflow did not answer.
    """
    request = ModelRequest(
        str(ref),
        model=model,
        choices=choices,
        scales=scales,
        input_size=input_size,
        mean_image=None if mean_image is None else str(mean_image),
        tracking_uri=tracking_uri,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )
    where = choose_device(device)
    with prepared_environment():
        loaded = request.load(Connection(tracking_uri or uri_of_caller()))
    network = loaded.network
    move_model(network.module.eval(), where)
    return LoadedModel(
        **{entry.name: getattr(network, entry.name) for entry in fields(Network)},
        checkpoint=loaded.path,
        run_id=loaded.run_id,
        iters=loaded.iters,
        config=dict(loaded.payload.get("config") or {}),
        device=where,
        _payload=loaded.payload,
    )


def predict(
    model: LoadedModel | str | Path, images: Images, *, top: int = 5, on_bad_image: str = "fail", **loading: Any
) -> list[Prediction]:
    """Predict the classes of images; for several calls, load the network once with `load_model`.

    Args:
        model: a network, or a reference as for `load_model`.
        images: see `LoadedModel.predict`.
        top: labels per image.
        on_bad_image: `fail`, or `skip` to leave unreadable images out.
        loading: further arguments of `load_model`.

    Raises:
        ShuffleNetError: see `load_model` and `LoadedModel.predict`.
    """
    return _loaded(model, loading).predict(images, top=top, on_bad_image=on_bad_image)


def evaluate(
    model: LoadedModel | str | Path,
    val_dir: str | Path | None = None,
    *,
    split: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    on_bad_image: str | None = None,
    **loading: Any,
) -> EvalSummary:
    """Evaluate a checkpoint on labelled images, as `shufflenet eval` does; nothing is logged to MLflow.

    Args:
        model: a network, or a reference as for `load_model`.
        val_dir: folder with one folder per class, or table (`.csv`, `.parquet`) with `path,label`; by default the
            images that the run was validated on.
        split: `train`, `val` or `test`: of a table's column, or as the run divided its images.
        batch_size: images at a time; by default as in training.
        workers: processes that decode images; by default one per core, none for few images.
        on_bad_image: `fail` or `skip`; by default as in training.
        loading: further arguments of `load_model`.

    Returns:
        Accuracies in 0..1: `top1`, `top5`, `mean_class_accuracy`, `majority`, and `classes` by name; the mean
        cross-entropy `loss` over `n` images; `metrics()` for logging, and `report` with every image's outcome.

    Raises:
        DataError: the images cannot be used, or are of other classes.
        ConfigError: there are no images to evaluate on, or an option cannot work.
        ShuffleNetError: see `load_model`.
    """
    loaded = _loaded(model, loading)
    request = EvalRequest(
        str(loaded.checkpoint),
        val_dir=None if val_dir is None else str(val_dir),
        split=split,
        batch_size=batch_size,
        workers=workers,
        device=str(loaded.device),
        on_bad_image=on_bad_image,
        cache_dir=None if loading.get("cache_dir") is None else Path(loading["cache_dir"]),
    )
    checkpoint = LoadedCheckpoint(loaded, loaded._payload, loaded.checkpoint, loaded.run_id, loaded.iters or 0)
    return measure(request, checkpoint, JobContext.alone(LoggingReporter(), StopFlag()))[1]


def _loaded(model: LoadedModel | str | Path, loading: Mapping[str, Any]) -> LoadedModel:
    if not isinstance(model, LoadedModel):
        return load_model(model, **loading)
    if loading:
        raise TypeError(f"{', '.join(loading)} cannot be given for a network that is loaded; see load_model")
    return model
