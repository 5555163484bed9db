"""The mean image that Large subtracts from its input: computing it, and its two file formats.

A file holds float32 (height, width, 3), BGR, on the 0-255 scale: OpenCV's XML under the name `MeanImg`, as in the
original release, or `.npy`.
"""

import contextlib
import os
import tokenize
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shufflenet_mlflow.config import DEFAULT_BATCH_SIZE, check_options, check_rule
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.loader import BadImageLog, ImageDataset, batches_of, make_loader
from shufflenet_mlflow.data.preprocess import Preprocess, eval_transform
from shufflenet_mlflow.data.sampler import EvalBatches
from shufflenet_mlflow.errors import DataError
from shufflenet_mlflow.runtime.files import temporary_beside
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag

XML_NAME = "MeanImg"
_MOST_TAGS = 1000
"""The most XML tags of a file; a mean image has about fifteen."""


def mean_image(
    listing: ImageListing, input_size: int, *, workers: int, bad_images: BadImageLog, reporter: Reporter, stop: StopFlag
) -> NDArray[np.float32]:
    """Compute the mean of all images, each resized and cropped as for evaluation.

    Returns:
        float32 (input_size, input_size, 3), BGR, 0-255.

    Raises:
        BadImageError: a file could not be read and is not to be skipped.
        DataError: no file could be read.
        StopRequested: a signal arrived.
    """
    dataset = ImageDataset(listing, eval_transform(Preprocess("bgr255", input_size)), replace_bad=False)
    batches = EvalBatches(len(listing), DEFAULT_BATCH_SIZE)
    loader = make_loader(dataset, batches, workers=workers, pin_memory=False)
    total = torch.zeros(3, input_size, input_size, dtype=torch.float64)
    n = 0
    with reporter.phase("averaging", len(batches)) as phase:
        for batch in batches_of(loader, stop):
            stop.check()
            for bad in bad_images.new_in(batch):
                reporter.warn(f"skipped: {bad}")
            if len(batch.labels_N):
                total += batch.images_NCHW.sum(0, dtype=torch.float64)
                n += len(batch.labels_N)
            phase.advance()
    if not n:
        raise DataError(
            f"none of the files in {str(listing.source)!r} is a readable image", code="mean-no-readable-image"
        )
    return (total / n).permute(1, 2, 0).numpy().astype(np.float32)


def check_output(path: Path) -> None:
    """Check that a mean image can be written to `path`, before it is computed.

    Raises:
        ConfigError: its suffix is that of neither format.
        DataError: it is a folder, or its parent folder cannot be created.
    """
    check_rule("mean_image", path, field="output")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write the mean image {str(path)!r}: {_reason(error)}", code="mean-image-output"
        ) from error
    if path.is_dir():
        raise DataError(
            f"cannot write the mean image {str(path)!r}: it is a folder", code="mean-image-output-is-folder"
        )


def _check_scale(path: Path, mean_HWC: NDArray[Any]) -> None:
    low, high = float(mean_HWC.min()), float(mean_HWC.max())
    if not (low >= 0 and 1 < high <= 255):  # NaN fails as well
        raise DataError(
            f"the mean image {str(path)!r} spans {low:g} to {high:g}; it must be on the 0-255 scale",
            code="mean-image-scale",
        )


def write_mean_image(path: Path, mean_HWC: NDArray[np.float32]) -> None:
    """Write a mean image in the format of the file's suffix; the file appears whole or not at all.

    Raises:
        ConfigError: the suffix is that of neither format.
        DataError: the file cannot be written, or the mean image is not on the 0-255 scale.
    """
    check_output(path)
    _check_scale(path, mean_HWC)
    aside = temporary_beside(path)
    aside = aside.with_name(f"{aside.name}{path.suffix.lower()}")  # both writers need the suffix
    try:
        if path.suffix.lower() == ".npy":
            np.save(aside, mean_HWC)
        else:
            storage = cv2.FileStorage(str(aside), cv2.FILE_STORAGE_WRITE)
            storage.write(XML_NAME, mean_HWC)
            storage.release()
        read_mean_image(aside)  # OpenCV does not report a full disk
        os.replace(aside, path)
    except (OSError, cv2.error, SystemError) as error:
        raise DataError(
            f"cannot write the mean image {str(path)!r}: {_reason(error)}", code="mean-image-unwritable"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def read_mean_image(path: Path) -> Tensor:
    """Read a mean image.

    Returns:
        float32 (3, height, width), BGR, 0-255.

    Raises:
        ConfigError: its suffix is that of neither format.
        DataError: it is missing, unreadable, in another format, of another shape or not on the 0-255 scale.
    """
    check_options({"mean_image": path})
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise DataError(
            f"the mean image {str(path)!r} {problem}; `shufflenet data mean DIR` makes one", code="mean-image-invalid"
        )
    try:
        mean_HWC = _read_npy(path) if path.suffix.lower() == ".npy" else _read_xml(path)
    except OSError as error:
        raise DataError(
            f"the mean image {str(path)!r} cannot be read: {_reason(error)}", code="mean-image-unreadable"
        ) from error
    if mean_HWC is None:
        content = "an array of numbers" if path.suffix.lower() == ".npy" else f"OpenCV XML with a matrix {XML_NAME!r}"
        raise DataError(f"the mean image {str(path)!r} does not hold {content}", code="mean-image-entry-missing")
    if mean_HWC.ndim != 3 or mean_HWC.shape[2] != 3 or not mean_HWC.size or mean_HWC.dtype.kind not in "fiu":
        raise DataError(
            f"the mean image {str(path)!r} is {mean_HWC.dtype} of shape {mean_HWC.shape}, not numbers of shape "
            "(height, width, 3)",
            code="mean-image-shape",
        )
    mean_HWC = mean_HWC.astype(np.float32)
    _check_scale(path, mean_HWC)
    return torch.from_numpy(np.ascontiguousarray(mean_HWC.transpose(2, 0, 1)))


def _read_npy(path: Path) -> NDArray[Any] | None:
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped, as a header can claim any size
    except (ValueError, EOFError, OverflowError, MemoryError, SyntaxError, tokenize.TokenError):
        return None
    return loaded if isinstance(loaded, np.ndarray) else None


def _read_xml(path: Path) -> NDArray[Any] | None:
    if path.read_bytes().count(b"<") > _MOST_TAGS:  # nested deeply, they overflow OpenCV's stack
        return None
    try:
        storage = cv2.FileStorage(str(path), cv2.FILE_STORAGE_READ)
        matrix: NDArray[Any] | None = storage.getNode(XML_NAME).mat()
        storage.release()
    except (cv2.error, SystemError):  # not XML, truncated, or another kind of node
        return None
    return matrix


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
