"""How training images are varied.

`release` follows the original ShuffleNet release: RandomResizedCrop, ColorJitter(0.4, 0.4, 0.4) and a horizontal flip.
torchvision draws the parameters; the pixels are changed on arrays of bytes, as Pillow would change them but for
rounding, in less than half of the time.
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
    """The evaluation resize, then a crop at a random place: for images whose orientation has meaning."""

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
    """Share of the images that are mirrored."""

    def __init__(self, preprocess: Preprocess) -> None:
        from torchvision.transforms import v2  # a second to import, and not needed for the other augmentations

        self.preprocess = preprocess
        self._crop = v2.RandomResizedCrop(preprocess.input_size)
        self._jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)

    def __call__(self, pixels_HWC: Pixels) -> Tensor:
        size, channels = self.preprocess.input_size, MODES[self.preprocess.mode].channels
        drawn = self._crop.make_params([torch.from_numpy(pixels_HWC).permute(2, 0, 1)])
        rows = slice(drawn["top"], drawn["top"] + drawn["height"])
        columns = slice(drawn["left"], drawn["left"] + drawn["width"])
        pixels_HWC = resize_antialiased(pixels_HWC[rows, columns], [size, size])
        pixels_HWC = change_colours(pixels_HWC, self._jitter.make_params([]))
        if float(torch.rand(1)) < self.FLIPPED:
            pixels_HWC = cv2.flip(pixels_HWC, 1)  # type: ignore[assignment]
        return to_tensor(pixels_HWC, channels)


def change_colours(pixels_HWC: Pixels, drawn: dict[str, object]) -> Pixels:
    """Change brightness, contrast and saturation as Pillow's `ImageEnhance` does.

    Args:
        drawn: what `v2.ColorJitter.make_params` has drawn: the order of the changes, and the factor of each.
    """
    changes = (
        (_brightness, drawn["brightness_factor"]),
        (_contrast, drawn["contrast_factor"]),
        (_saturation, drawn["saturation_factor"]),
    )
    for number in drawn["fn_idx"]:  # type: ignore[attr-defined]
        if int(number) < len(changes):  # the last would be the hue's
            change, factor = changes[int(number)]
            pixels_HWC = change(pixels_HWC, float(factor))  # type: ignore[arg-type]
    return pixels_HWC


_CUT_OFF = -0.499
"""Pillow cuts off what OpenCV would round."""


def _brightness(pixels_HWC: Pixels, factor: float) -> Pixels:
    return _blend_with(pixels_HWC, 0.0, factor)


def _contrast(pixels_HWC: Pixels, factor: float) -> Pixels:
    mean = int(cv2.mean(cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _blend_with(pixels_HWC, mean, factor)


def _blend_with(pixels_HWC: Pixels, value: float, factor: float) -> Pixels:
    """From `value` everywhere at factor 0 to the image at 1, and beyond."""
    return cv2.addWeighted(pixels_HWC, factor, pixels_HWC, 0, (1 - factor) * value + _CUT_OFF)  # type: ignore[return-value]


def _saturation(pixels_HWC: Pixels, factor: float) -> Pixels:
    grey_HWC = cv2.cvtColor(cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(pixels_HWC, factor, grey_HWC, 1 - factor, _CUT_OFF)  # type: ignore[return-value]


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied."""

    transform: Callable[[Preprocess], Transform]
    lighting: bool = False
    """Shift each image's colour by `draw_lighting`."""


AUGMENTATIONS: dict[str, Augmentation] = {
    "release": Augmentation(ReleaseTransform),
    "lighting": Augmentation(ReleaseTransform, lighting=True),
    "shift": Augmentation(ShiftTransform),
    "none": Augmentation(eval_transform),
}

# Principal components of ImageNet's colours on a 0-1 scale: Krizhevsky et al., 2012, as the release has them.
LIGHTING_STD = 0.1
_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS_RGB = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def draw_lighting(mode: Mode) -> Tensor:
    """AlexNet's colour noise: what to add to all pixels of one image, (3,) on the 0-255 scale, in `mode`'s order."""
    weights = torch.randn(3) * LIGHTING_STD * torch.tensor(_EIGENVALUES)
    shift_RGB = torch.tensor(_EIGENVECTORS_RGB) @ weights * 255
    return shift_RGB.flip(0) if mode.channels == "BGR" else shift_RGB


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
