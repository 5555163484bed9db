"""Augmentations of training images.

`release` follows the original ShuffleNet release: RandomResizedCrop, ColorJitter(0.4, 0.4, 0.4) and a horizontal flip.
torchvision draws the parameters. The pixels are changed as Pillow would, up to rounding, but on arrays of bytes, which
takes less than half the time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import torch
from torch import Tensor

from shufflenet_mlflow.data.decode import Pixels, resize_antialiased, resize_shorter_side, to_tensor
from shufflenet_mlflow.data.preprocess import MODES, Mode, Preprocess, Transform, eval_transform


@dataclass(frozen=True)
class ShiftTransform:
    """The resize of evaluation, then a random crop: for images whose orientation or colour has meaning."""

    preprocess: Preprocess

    def __call__(self, pixels_HWC: Pixels) -> Tensor:
        size, mode = self.preprocess.input_size, MODES[self.preprocess.mode]
        pixels_HWC = resize_shorter_side(pixels_HWC, self.preprocess.resize_size, antialias=mode.antialias)
        top = int(torch.randint(pixels_HWC.shape[0] - size + 1, ()))
        left = int(torch.randint(pixels_HWC.shape[1] - size + 1, ()))
        return to_tensor(pixels_HWC[top : top + size, left : left + size], mode.channels)


class ReleaseTransform:
    """The release's training augmentation."""

    FLIPPED = 0.5
    """Probability of a horizontal flip."""

    def __init__(self, preprocess: Preprocess) -> None:
        from torchvision.transforms import v2  # takes a second to import, and only this needs it

        self.preprocess = preprocess
        self._crop = v2.RandomResizedCrop(preprocess.input_size)
        self._jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)

    def __call__(self, pixels_HWC: Pixels) -> Tensor:
        size, channels = self.preprocess.input_size, MODES[self.preprocess.mode].channels
        crop = self._crop.make_params([torch.from_numpy(pixels_HWC).permute(2, 0, 1)])
        rows = slice(crop["top"], crop["top"] + crop["height"])
        columns = slice(crop["left"], crop["left"] + crop["width"])
        pixels_HWC = resize_antialiased(pixels_HWC[rows, columns], [size, size])
        pixels_HWC = change_colours(pixels_HWC, self._jitter.make_params([]))
        if float(torch.rand(1)) < self.FLIPPED:
            pixels_HWC = cv2.flip(pixels_HWC, 1)  # type: ignore[assignment]
        return to_tensor(pixels_HWC, channels)


def change_colours(pixels_HWC: Pixels, jitter: dict[str, object]) -> Pixels:
    """Change brightness, contrast and saturation as Pillow's `ImageEnhance` does.

    Args:
        jitter: the result of `v2.ColorJitter.make_params`: the order of the changes, and the factor of each.
    """
    changes = (
        (_brightness, jitter["brightness_factor"]),
        (_contrast, jitter["contrast_factor"]),
        (_saturation, jitter["saturation_factor"]),
    )
    for index in jitter["fn_idx"]:  # type: ignore[attr-defined]
        if int(index) < len(changes):  # the last index is the hue's, which stays
            change, factor = changes[int(index)]
            pixels_HWC = change(pixels_HWC, float(factor))  # type: ignore[arg-type]
    return pixels_HWC


_CUT_OFF = -0.499
"""Turns OpenCV's rounding into Pillow's truncation."""


def _brightness(pixels_HWC: Pixels, factor: float) -> Pixels:
    return _blend_with(pixels_HWC, 0.0, factor)


def _contrast(pixels_HWC: Pixels, factor: float) -> Pixels:
    mean = int(cv2.mean(cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _blend_with(pixels_HWC, mean, factor)


def _blend_with(pixels_HWC: Pixels, value: float, factor: float) -> Pixels:
    """Interpolate from a constant image (factor 0) to the image (factor 1), or extrapolate."""
    return cv2.addWeighted(pixels_HWC, factor, pixels_HWC, 0, (1 - factor) * value + _CUT_OFF)  # type: ignore[return-value]


def _saturation(pixels_HWC: Pixels, factor: float) -> Pixels:
    grey_HWC = cv2.cvtColor(cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(pixels_HWC, factor, grey_HWC, 1 - factor, _CUT_OFF)  # type: ignore[return-value]


@dataclass(frozen=True)
class Augmentation:
    """A transform, and whether lighting noise is added."""

    transform: Callable[[Preprocess], Transform]
    lighting: bool = False
    """Add `draw_lighting` to each image."""


AUGMENTATIONS: dict[str, Augmentation] = {
    "release": Augmentation(ReleaseTransform),
    "lighting": Augmentation(ReleaseTransform, lighting=True),
    "shift": Augmentation(ShiftTransform),
    "none": Augmentation(eval_transform),
}

# Principal components of ImageNet's colours on a 0-1 scale: Krizhevsky et al., 2012; the values are the release's.
LIGHTING_STD = 0.1
_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS_RGB = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def draw_lighting(mode: Mode) -> Tensor:
    """Draw AlexNet's colour noise for one image: (3,) float32 on the 0-255 scale, in the channel order of `mode`."""
    weights = torch.randn(3) * LIGHTING_STD * torch.tensor(_EIGENVALUES)
    shift_RGB = torch.tensor(_EIGENVECTORS_RGB) @ weights * 255
    return shift_RGB.flip(0) if mode.channels == "BGR" else shift_RGB


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generator within the block, and restore its state afterwards.

    `torch.manual_seed` would reseed the devices' generators too.
    """
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
