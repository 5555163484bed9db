"""From a decoded image to the tensor a network takes.

Two halves. On the CPU, an image becomes a uint8 tensor of the right size and channel order: that is what
travels between processes and to the device. On the device, it becomes float and is normalised.

`bgr255` and the `release` augmentation follow the original ShuffleNet release: BGR, 0-255, no
normalisation; for evaluation the shorter side goes to 256 (at 224 px input) with OpenCV's INTER_LINEAR and
the centre is cropped; for training RandomResizedCrop, ColorJitter(0.4, 0.4, 0.4) and a horizontal flip.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from shufflenet_mlflow.errors import BadImageError, CheckpointError, ConfigError

RESIZE_RATIO = 256 / 224
"""The evaluation resize over the crop, as in the release."""

LARGEST_RESIZED = 1 << 26
"""Pixels of a resized image: a file of a few bytes can be 1 pixel high and 60,000 wide."""

STRIDE = 32
"""Every network of the series halves its input five times."""


@dataclass(frozen=True)
class Mode:
    """How pixels are presented to a network: channel order, and (x - mean) / std on the 0-255 scale."""

    channels: Literal["BGR", "RGB"]
    mean: tuple[float, float, float] | None = None
    """Per channel, in the order of `channels`."""
    std: tuple[float, float, float] | None = None


MODES: dict[str, Mode] = {"bgr255": Mode("BGR")}


@dataclass(frozen=True)
class Preprocess:
    """A mode at an input size; stored in every checkpoint, so that evaluation repeats it."""

    mode: str
    input_size: int

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"there is no preprocessing mode {self.mode!r}; there is {', '.join(MODES)}")
        if self.input_size < STRIDE or self.input_size % STRIDE:
            raise ConfigError(f"input_size (={self.input_size}) must be a multiple of {STRIDE}, at least {STRIDE}")

    @property
    def resize_size(self) -> int:
        """Length of the shorter side before the centre crop."""
        return int(self.input_size * RESIZE_RATIO + 0.5)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocess":
        """The inverse of `to_dict`.

        Raises:
            CheckpointError: a value is missing or not of this version.
        """
        try:
            return cls(mode=str(values["mode"]), input_size=int(values["input_size"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's preprocessing {dict(values)!r} is not understood: {error}"
            ) from error


Transform = Callable[[Image.Image], Tensor]
"""An RGB image -> uint8 (3, input_size, input_size) in the mode's channel order."""


def resize_shorter_side(pixels_HWC: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Scale so that the shorter side is `size`: bilinear, half-pixel centres, no antialiasing.

    Raises:
        BadImageError: the longer side would become enormous.
    """
    height, width = pixels_HWC.shape[:2]
    shorter = min(height, width)
    target = (int(size / shorter * width + 0.5), int(size / shorter * height + 0.5))
    if target[0] * target[1] > LARGEST_RESIZED:
        raise BadImageError(f"{width}x{height} pixels are too long and thin to be resized")
    if target == (width, height):
        return pixels_HWC
    return cv2.resize(pixels_HWC, target, interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)


def _to_tensor(pixels_HWC: NDArray[np.uint8], mode: Mode) -> Tensor:
    ordered = pixels_HWC[:, :, ::-1] if mode.channels == "BGR" else pixels_HWC
    return torch.from_numpy(np.ascontiguousarray(ordered.transpose(2, 0, 1)))


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side, crop the centre."""

    preprocess: Preprocess

    def __call__(self, image: Image.Image) -> Tensor:
        size = self.preprocess.input_size
        pixels_HWC = resize_shorter_side(np.asarray(image), self.preprocess.resize_size)
        top = round((pixels_HWC.shape[0] - size) / 2)
        left = round((pixels_HWC.shape[1] - size) / 2)
        crop = pixels_HWC[top : top + size, left : left + size]
        return _to_tensor(crop, MODES[self.preprocess.mode])


@dataclass(frozen=True)
class ShiftTransform:
    """The evaluation resize, then a crop at a random place: for images whose orientation has meaning."""

    preprocess: Preprocess

    def __call__(self, image: Image.Image) -> Tensor:
        size = self.preprocess.input_size
        pixels_HWC = resize_shorter_side(np.asarray(image), self.preprocess.resize_size)
        top = int(torch.randint(pixels_HWC.shape[0] - size + 1, ()))
        left = int(torch.randint(pixels_HWC.shape[1] - size + 1, ()))
        crop = pixels_HWC[top : top + size, left : left + size]
        return _to_tensor(crop, MODES[self.preprocess.mode])


class ReleaseTransform:
    """The release's training augmentation."""

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess
        self._augment = v2.Compose(
            [
                v2.RandomResizedCrop(preprocess.input_size),
                v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
                v2.RandomHorizontalFlip(0.5),
            ]
        )

    def __call__(self, image: Image.Image) -> Tensor:
        return _to_tensor(np.asarray(self._augment(image)), MODES[self.preprocess.mode])


AUGMENTATIONS: dict[str, Callable[[Preprocess], Transform]] = {
    "release": ReleaseTransform,
    "shift": ShiftTransform,
    "none": EvalTransform,
}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from the CPU generator as if it had just been seeded, and put it back afterwards.

    Only the CPU generator is touched: `torch.manual_seed` would reseed the devices' too.
    """
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def to_input(images_NCHW: Tensor, preprocess: Preprocess, device: torch.device) -> Tensor:
    """uint8 (N, 3, H, W) on the CPU -> float32 (N, 3, H, W) on `device`, normalised as the mode says."""
    mode = MODES[preprocess.mode]
    x_NCHW = images_NCHW.to(device, non_blocking=True).float()
    if mode.mean is not None:
        x_NCHW = x_NCHW - x_NCHW.new_tensor(mode.mean).view(1, 3, 1, 1)
    if mode.std is not None:
        x_NCHW = x_NCHW / x_NCHW.new_tensor(mode.std).view(1, 3, 1, 1)
    return x_NCHW
