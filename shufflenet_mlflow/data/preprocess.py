"""Preprocessing: from a decoded image to a network's input.

It has two steps. On the CPU a picture becomes a uint8 tensor of the right size and channel order, which is sent between
processes and to the device. On the device it becomes float and is normalised.

The `bgr255` modes follow the original ShuffleNet release: BGR, 0-255; for evaluation the shorter side is resized to 256
(at 224 px input) with OpenCV's INTER_LINEAR and the centre is cropped. The `rgb` modes are those of torchvision's
weights.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from shufflenet_mlflow.checkpoints.plain import is_plain_tensor
from shufflenet_mlflow.config import check_options
from shufflenet_mlflow.data.decode import CentreCrop, Picture
from shufflenet_mlflow.data.formats import UnreadableImageError
from shufflenet_mlflow.data.inputs import listed, open_any
from shufflenet_mlflow.data.modes import MODE_KEYS
from shufflenet_mlflow.data.modes import MODES as MODES
from shufflenet_mlflow.data.modes import REFERENCE_SIZE as REFERENCE_SIZE
from shufflenet_mlflow.data.modes import Mode as Mode
from shufflenet_mlflow.data.reading import Reading
from shufflenet_mlflow.errors import BadImageError, CheckpointError, ConfigError
from shufflenet_mlflow.runtime.devices import move_images


@dataclass(frozen=True)
class Preprocess:
    """A mode at an input size; stored in every checkpoint, so that evaluation repeats it.

    Args:
        mode: a key of `MODES`, or a mode of one's own.
        input_size: pixels; a multiple of `STRIDE`.
        mean_image: float32 (3, input_size, input_size) on the 0-255 scale, in the mode's channel order; subtracted
            instead of the mode's mean.
        reading: how files are read; in a checkpoint its entries stand beside the others.

    Raises:
        ConfigError: there is no such mode, or input size or mean image do not suit it.
    """

    mode: str | Mode
    input_size: int
    mean_image: Tensor | None = field(default=None, repr=False, compare=False)
    reading: Reading = Reading()  # noqa: RUF009 - immutable

    def __post_init__(self) -> None:
        if isinstance(self.mode, str) and self.mode not in MODES:
            raise ConfigError(
                f"there is no preprocessing mode {self.mode!r}; there is {', '.join(MODES)}",
                code="preprocess-mode-unknown",
            )
        size = self.input_size
        check_options({"input_size": size})
        if self.mean_image is None:
            return
        if not self.settings.takes_mean_image:
            raise ConfigError(
                f"a mean image is for networks with bgr255_mean input, not {self.mode}", code="mean-image-not-taken"
            )
        if tuple(self.mean_image.shape) != (3, size, size):
            _, height, width = self.mean_image.shape
            raise ConfigError(
                f"the mean image has {width}x{height} pixels, the input {size}x{size}; "
                f"`shufflenet data mean DIR --input-size {size}` makes a fitting one",
                code="mean-image-size",
            )

    @property
    def settings(self) -> Mode:
        """The mode's settings."""
        return MODES[self.mode] if isinstance(self.mode, str) else self.mode

    @property
    def resize_size(self) -> int:
        """Length of the shorter side before the centre crop."""
        return int(self.input_size * self.settings.resize / REFERENCE_SIZE + 0.5)

    def __call__(self, images: Any) -> Tensor:
        """Return images as the network takes them in evaluation: resized, cropped and normalised.

        Args:
            images: one or several; see `LoadedModel.predict`.

        Returns:
            float32 (3, input_size, input_size); for a list or a batch (N, 3, input_size, input_size). On the CPU.

        Raises:
            BadImageError: one cannot be read.
        """
        several, is_one = listed(images)
        transform = eval_transform(self)
        pixels = torch.empty(len(several), 3, self.input_size, self.input_size, dtype=torch.uint8)
        for number, image in enumerate(several):
            try:
                pixels[number] = transform(open_any(image, self.reading))
            except UnreadableImageError as error:
                name = repr(str(image)) if isinstance(image, (str, os.PathLike)) else f"image {number}"
                raise BadImageError(f"{name} is not a readable image ({error})", code="input-unreadable") from error
        inputs = ToInput(self, torch.device("cpu"))(pixels)
        return inputs[0] if is_one else inputs

    def has_mean_of(self, other: "Preprocess") -> bool:
        """Whether both subtract the same mean image, or none."""
        if self.mean_image is None or other.mean_image is None:
            return self.mean_image is other.mean_image
        return torch.equal(self.mean_image, other.mean_image)

    def to_dict(self) -> dict[str, Any]:
        """Return the checkpoint's entry: plain values, and the mean image if there is one."""
        mode = {"mode": self.mode} if isinstance(self.mode, str) else self.mode.to_dict(self.input_size)
        values: dict[str, Any] = {**mode, "input_size": self.input_size, **asdict(self.reading)}
        return values if self.mean_image is None else {**values, "mean_image": self.mean_image}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "the checkpoint") -> "Preprocess":
        """Build from the output of `to_dict`; version 0.1's, without the entries of `Reading`, means `READING_0_1`.

        Args:
            source: what to call the checkpoint in messages.

        Raises:
            CheckpointError: a value is missing or invalid.
        """
        try:
            return cls._parse(values)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{source}: its preprocessing {_without_tensors(values)!r} is not understood: {error}",
                code="preprocess-entry-invalid",
            ) from error

    @classmethod
    def _parse(cls, values: Mapping[str, Any]) -> "Preprocess":
        input_size, mean_image = values["input_size"], values.get("mean_image")
        if type(input_size) is not int:
            raise TypeError("input_size must be a whole number")
        check_options({"input_size": input_size})
        if mean_image is not None and not (
            is_plain_tensor(mean_image)
            and mean_image.dim() == 3
            and mean_image.dtype == torch.float32
            and bool(mean_image.isfinite().all())
        ):
            raise ValueError("its mean image does not hold finite float32 numbers in three dimensions")
        return cls(Mode.from_dict(values, input_size), input_size, mean_image, Reading.of(values))


def _without_tensors(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not isinstance(value, Tensor)}


def preprocess_from(value: object, what: str = "preprocess") -> Preprocess:
    """Return the preprocessing that a script names.

    Args:
        value: the name of a mode; or a dict: `mode`, or `mean`, `std` and `channels` (see `Mode.from_dict`), with
            `input_size`, by default 224 pixels, `resize`, `antialias`, and how files are read, by default as
            torchvision's `ImageFolder` does.
        what: what to call it in messages.

    Raises:
        ConfigError: it is something else.
    """
    values = {"mode": value} if isinstance(value, str) else value
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{what} is a {type(value).__name__}; give the name of a mode ({', '.join(MODES)}) or a dict with 'mean' "
            "and 'std'",
            code="preprocess-type",
        )
    known = (*MODE_KEYS, "input_size", "mean_image", *(entry.name for entry in fields(Reading)))
    if unknown := [key for key in values if key not in known]:
        raise ConfigError(
            f"{what} has the unknown key {unknown[0]!r}; there is {', '.join(known)}", code="preprocess-key-unknown"
        )
    try:
        return Preprocess._parse({"input_size": REFERENCE_SIZE, **values})
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{what} (={_without_tensors(values)}) is not understood: {error}", code="preprocess-invalid"
        ) from error


class Transform(Protocol):
    """A picture -> uint8 (3, input_size, input_size) in the mode's channel order."""

    @property
    def reading(self) -> Reading:
        """How the pictures have to be opened."""

    def __call__(self, picture: Picture) -> Tensor: ...


def eval_transform(preprocess: Preprocess) -> CentreCrop:
    """Return the transform of evaluation: resize the shorter side, crop the centre."""
    mode = preprocess.settings
    return CentreCrop(preprocess.input_size, preprocess.resize_size, mode.channels, mode.antialias, preprocess.reading)


class ToInput:
    """The second step: from uint8 images on the CPU to a network's input on `device`."""

    def __init__(self, preprocess: Preprocess, device: torch.device) -> None:
        mode = preprocess.settings
        self._device = device
        self._mean = self._std = None
        if preprocess.mean_image is not None:
            self._mean = preprocess.mean_image.to(device)
        elif mode.mean is not None:
            self._mean = torch.tensor(mode.mean, device=device).view(3, 1, 1)
        if mode.std is not None:
            self._std = torch.tensor(mode.std, device=device).view(3, 1, 1)

    def __call__(self, images_NCHW: Tensor, shift_NC: Tensor | None = None) -> Tensor:
        """Convert uint8 (N, 3, H, W) to normalised float32 (N, 3, H, W), in the memory format that suits the device.

        Args:
            shift_NC: lighting noise on the 0-255 scale, added to all pixels of an image before normalisation.
        """
        return self.normalise(self.pixels(images_NCHW, shift_NC))

    def pixels(self, images_NCHW: Tensor, shift_NC: Tensor | None = None) -> Tensor:
        """Return float32 pixels on the 0-255 scale on the device, with lighting noise."""
        x_NCHW = move_images(images_NCHW, self._device).float()
        if shift_NC is not None:
            x_NCHW = x_NCHW + shift_NC.to(self._device, non_blocking=True)[:, :, None, None]
        return x_NCHW

    def normalise(self, x_NCHW: Tensor) -> Tensor:
        """Return what `pixels` returns as the network's input."""
        if self._mean is not None:
            x_NCHW = x_NCHW - self._mean
        if self._std is not None:
            x_NCHW = x_NCHW / self._std
        return x_NCHW
