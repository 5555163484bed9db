"""Preprocessing: from a decoded image to a network's input.

It has two steps. On the CPU an image becomes a uint8 tensor of the right size and channel order, which is sent between
processes and to the device. On the device it becomes float and is normalised.

The `bgr255` modes follow the original ShuffleNet release: BGR, 0-255; for evaluation the shorter side is resized to 256
(at 224 px input) with OpenCV's INTER_LINEAR and the centre is cropped. The `rgb` modes are those of torchvision's
weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shufflenet_mlflow.checkpoints.plain import is_plain_tensor
from shufflenet_mlflow.config import check_options
from shufflenet_mlflow.data.decode import CentreCrop, Pixels
from shufflenet_mlflow.data.modes import MODES as MODES
from shufflenet_mlflow.data.modes import REFERENCE_SIZE as REFERENCE_SIZE
from shufflenet_mlflow.data.modes import Mode as Mode
from shufflenet_mlflow.errors import CheckpointError, ConfigError
from shufflenet_mlflow.runtime.devices import move_images


@dataclass(frozen=True)
class Preprocess:
    """A mode at an input size; stored in every checkpoint, so that evaluation repeats it.

    Args:
        mode: a key of `MODES`.
        input_size: pixels; a multiple of `STRIDE`.
        mean_image: float32 (3, input_size, input_size) on the 0-255 scale, in the mode's channel order; subtracted
            instead of the mode's mean.

    Raises:
        ConfigError: there is no such mode, or input size or mean image do not suit it.
    """

    mode: str
    input_size: int
    mean_image: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(
                f"there is no preprocessing mode {self.mode!r}; there is {', '.join(MODES)}",
                code="preprocess-mode-unknown",
            )
        size = self.input_size
        check_options({"input_size": size})
        if self.mean_image is None:
            return
        if not MODES[self.mode].takes_mean_image:
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
    def resize_size(self) -> int:
        """Length of the shorter side before the centre crop."""
        return int(self.input_size * MODES[self.mode].resize / REFERENCE_SIZE + 0.5)

    def has_mean_of(self, other: "Preprocess") -> bool:
        """Whether both subtract the same mean image, or none."""
        if self.mean_image is None or other.mean_image is None:
            return self.mean_image is other.mean_image
        return torch.equal(self.mean_image, other.mean_image)

    def to_dict(self) -> dict[str, Any]:
        """Return the checkpoint's entry: plain values, and the mean image if there is one."""
        values: dict[str, Any] = {"mode": self.mode, "input_size": self.input_size}
        return values if self.mean_image is None else {**values, "mean_image": self.mean_image}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "the checkpoint") -> "Preprocess":
        """Build from the output of `to_dict`.

        Args:
            source: what to call the checkpoint in messages.

        Raises:
            CheckpointError: a value is missing or invalid.
        """
        try:
            mode, input_size, mean_image = values["mode"], values["input_size"], values.get("mean_image")
            if not isinstance(mode, str) or type(input_size) is not int:
                raise TypeError("mode must be text, input_size a whole number")
            if mean_image is not None and not (
                is_plain_tensor(mean_image)
                and mean_image.dim() == 3
                and mean_image.dtype == torch.float32
                and bool(mean_image.isfinite().all())
            ):
                raise ValueError("its mean image does not hold finite float32 numbers in three dimensions")
            return cls(mode, input_size, mean_image)
        except (KeyError, TypeError, ValueError) as error:
            plain = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
            raise CheckpointError(
                f"{source}: its preprocessing {plain!r} is not understood: {error}", code="preprocess-entry-invalid"
            ) from error


Transform = Callable[[Pixels], Tensor]
"""RGB pixels -> uint8 (3, input_size, input_size) in the mode's channel order."""


def eval_transform(preprocess: Preprocess) -> CentreCrop:
    """Return the transform of evaluation: resize the shorter side, crop the centre."""
    mode = MODES[preprocess.mode]
    return CentreCrop(preprocess.input_size, preprocess.resize_size, mode.channels, mode.antialias)


class ToInput:
    """The second step: from uint8 images on the CPU to a network's input on `device`."""

    def __init__(self, preprocess: Preprocess, device: torch.device) -> None:
        mode = MODES[preprocess.mode]
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
        x_NCHW = move_images(images_NCHW, self._device).float()
        if shift_NC is not None:
            x_NCHW = x_NCHW + shift_NC.to(self._device, non_blocking=True)[:, :, None, None]
        if self._mean is not None:
            x_NCHW = x_NCHW - self._mean
        if self._std is not None:
            x_NCHW = x_NCHW / self._std
        return x_NCHW
