"""Augmentations of training images.

`release` follows the original ShuffleNet release: RandomResizedCrop, ColorJitter(0.4, 0.4, 0.4) and a horizontal flip,
with the parameters that torchvision would draw. The pixels are changed as Pillow would, up to rounding, but on arrays
of bytes, which takes less than half the time.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shufflenet_mlflow.data.decode import Picture
from shufflenet_mlflow.data.draws import draw_colours, draw_crop
from shufflenet_mlflow.data.modes import IMAGENET_MEAN
from shufflenet_mlflow.data.preprocess import Mode, Preprocess, Transform, eval_transform
from shufflenet_mlflow.data.reading import Reading
from shufflenet_mlflow.data.resize import Pixels, resized_shape, to_tensor


@dataclass(frozen=True)
class ShiftTransform:
    """The resize of evaluation, then a random crop: for images whose orientation or colour has meaning."""

    preprocess: Preprocess

    @property
    def reading(self) -> Reading:
        """How files are read."""
        return self.preprocess.reading

    def __call__(self, picture: Picture) -> Tensor:
        size, mode = self.preprocess.input_size, self.preprocess.settings
        height, width = resized_shape(
            picture.height, picture.width, self.preprocess.resize_size, antialias=mode.antialias
        )
        pixels_HWC = picture.resized(height, width, antialias=mode.antialias)
        top = int(torch.randint(height - size + 1, ()))
        left = int(torch.randint(width - size + 1, ()))
        return to_tensor(pixels_HWC[top : top + size, left : left + size], mode.channels)


class ReleaseTransform:
    """The release's training augmentation."""

    FLIPPED = 0.5
    """Probability of a horizontal flip."""

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess

    @property
    def reading(self) -> Reading:
        """How files are read."""
        return self.preprocess.reading

    def __call__(self, picture: Picture) -> Tensor:
        size, channels = self.preprocess.input_size, self.preprocess.settings.channels
        # Drawn from the full size, of which a large photograph may not be decoded.
        box = draw_crop(picture.height, picture.width)
        pixels_HWC = picture.resized(size, size, antialias=True, box=box)
        pixels_HWC = self.vary(pixels_HWC)
        if float(torch.rand(1)) < self.FLIPPED:
            pixels_HWC = cv2.flip(pixels_HWC, 1)  # type: ignore[assignment]
        return to_tensor(pixels_HWC, channels)

    def vary(self, pixels_HWC: Pixels) -> Pixels:
        """Return the crop with other colours."""
        return change_colours(pixels_HWC, draw_colours())


class PolicyTransform(ReleaseTransform):
    """The release's crop and flip, with changes that torchvision draws from a list in place of the colours'.

    Args:
        policy: `TrivialAugmentWide` (Mueller and Hutter, 2021) or `RandAugment` (Cubuk et al., 2019) of torchvision,
            with its defaults.
    """

    def __init__(self, preprocess: Preprocess, *, policy: str) -> None:
        from torchvision.transforms import v2  # takes a second to import, and only this and `Erasing` need it

        super().__init__(preprocess)
        self._policy = getattr(v2, policy)()

    def vary(self, pixels_HWC: Pixels) -> Pixels:
        """Return the crop with what the policy draws; on Pillow's images, where it takes a third of the time."""
        return np.asarray(self._policy(Image.fromarray(pixels_HWC)))


class Erasing:
    """Another transform, then with some probability a rectangle of the mean colour; Zhong et al., 2017.

    Area and shape are torchvision's: 2 to 33 % of the image.
    """

    def __init__(self, transform: Transform, preprocess: Preprocess, probability: float) -> None:
        from torchvision.transforms import v2

        mean_RGB = IMAGENET_MEAN
        mean = mean_RGB if preprocess.settings.channels == "RGB" else mean_RGB[::-1]
        self.transform = transform
        self._erase = v2.RandomErasing(probability, value=[round(value) for value in mean])  # type: ignore[arg-type]

    @property
    def reading(self) -> Reading:
        """How files are read."""
        return self.transform.reading

    def __call__(self, picture: Picture) -> Tensor:
        image_CHW: Tensor = self._erase(self.transform(picture))
        return image_CHW


def change_colours(pixels_HWC: Pixels, changes: Iterable[tuple[str, float]]) -> Pixels:
    """Change brightness, contrast and saturation as Pillow's `ImageEnhance` does.

    Args:
        changes: the result of `draw_colours`.
    """
    for name, factor in changes:
        pixels_HWC = _CHANGES[name](pixels_HWC, factor)
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


_CHANGES = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation}


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
    "trivial": Augmentation(partial(PolicyTransform, policy="TrivialAugmentWide")),
    "rand": Augmentation(partial(PolicyTransform, policy="RandAugment")),
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
