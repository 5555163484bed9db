"""Pixels: the resize of evaluation, the augmentations of training, and what reaches the network."""

import itertools
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torchvision.transforms import v2

from shufflenet_mlflow.data.augment import AUGMENTATIONS, change_colours, draw_lighting, seeded
from shufflenet_mlflow.data.decode import Picture
from shufflenet_mlflow.data.draws import draw_colours, draw_crop
from shufflenet_mlflow.data.folder import (
    list_images,
)
from shufflenet_mlflow.data.loader import (
    Batch,
    ImageDataset,
    batches_of,
    make_loader,
)
from shufflenet_mlflow.data.preprocess import MODES, Preprocess, ToInput, eval_transform
from shufflenet_mlflow.data.resize import resize
from shufflenet_mlflow.data.sampler import (
    SampleOrder,
    TrainBatches,
)
from shufflenet_mlflow.errors import ConfigError


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (64, 48), (32, 32), (301, 1000)])
def test_evaluation_pixels_are_those_of_the_release(shape: tuple[int, int]) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    height, width = shape
    if height < width:
        size = (int(256 / height * width + 0.5), 256)
    else:
        size = (256, int(256 / width * height + 0.5))
    resized = cv2.resize(rgb, size, interpolation=cv2.INTER_LINEAR)
    expected_rgb = np.asarray(v2.CenterCrop(224)(Image.fromarray(resized)))
    tensor = eval_transform(Preprocess("bgr255", 224))(Picture(rgb))
    assert tensor.dtype == torch.uint8
    assert np.array_equal(tensor.numpy(), expected_rgb[:, :, ::-1].transpose(2, 0, 1))


def test_pixels_reach_the_network_as_bgr_0_255() -> None:
    red = np.full((40, 50, 3), (200, 10, 0), np.uint8)
    preprocess = Preprocess("bgr255", 32)
    image = eval_transform(preprocess)(Picture(red))
    x = ToInput(preprocess, torch.device("cpu"))(image[None])
    assert x.dtype == torch.float32
    assert x[0, :, 5, 5].tolist() == [0.0, 10.0, 200.0]


def test_large_gets_bgr_minus_the_mean() -> None:
    red = np.full((40, 50, 3), (200, 10, 0), np.uint8)
    plain = Preprocess("bgr255_mean", 32)
    x = ToInput(plain, torch.device("cpu"))(eval_transform(plain)(Picture(red))[None])
    torch.testing.assert_close(x[0, :, 5, 5], torch.tensor([0 - 103.53, 10 - 116.28, 200 - 123.675]))
    mean = torch.rand(3, 32, 32) * 255
    with_image = Preprocess("bgr255_mean", 32, mean)
    x = ToInput(with_image, torch.device("cpu"))(eval_transform(with_image)(Picture(red))[None])
    torch.testing.assert_close(x[0], torch.tensor([0.0, 10.0, 200.0]).view(3, 1, 1) - mean)


def test_lighting_is_alexnets() -> None:
    """The covariance of its shifts is that of Krizhevsky et al.: P diag((0.1 * eigenvalues)^2) P^T, times 255^2."""
    vectors = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    values = torch.tensor([0.2175, 0.0188, 0.0045])
    expected = vectors @ torch.diag((0.1 * 255 * values) ** 2) @ vectors.T
    with seeded(0):
        shifts_RGB = torch.stack([draw_lighting(MODES["rgb_256"]) for _ in range(20_000)])
    with seeded(0):
        shifts_BGR = torch.stack([draw_lighting(MODES["bgr255"]) for _ in range(20_000)])
    assert torch.equal(shifts_BGR, shifts_RGB.flip(1))
    assert shifts_RGB.mean(0).abs().max() < 0.1
    torch.testing.assert_close(shifts_RGB.T.cov(), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("workers", [0, 2])
def test_lighting_reaches_the_network_without_rounding(images: Path, workers: int) -> None:
    listing = list_images(images / "train")
    preprocess = Preprocess("bgr255_mean", 32)
    batches = TrainBatches(SampleOrder(len(listing), 8, 0), 0, 4)
    seen: dict[str, list[Batch]] = {}
    for name in ("release", "lighting"):
        augmentation = AUGMENTATIONS[name]
        dataset = ImageDataset(
            listing,
            augmentation.transform(preprocess),
            lighting=partial(draw_lighting, MODES[preprocess.mode]) if augmentation.lighting else None,
            replace_bad=True,
        )
        seen[name] = list(batches_of(make_loader(dataset, batches, workers=workers, pin_memory=False)))
    to_input = ToInput(preprocess, torch.device("cpu"))
    shifts = set()
    for plain, lit in zip(seen["release"], seen["lighting"], strict=True):
        assert plain.shift_NC is None
        assert lit.shift_NC is not None
        assert torch.equal(plain.images_NCHW, lit.images_NCHW)  # the same crops, flips and colours
        difference = to_input(lit.images_NCHW, lit.shift_NC) - to_input(plain.images_NCHW)
        torch.testing.assert_close(difference, lit.shift_NC[:, :, None, None].expand_as(difference), rtol=0, atol=1e-4)
        shifts |= {tuple(shift.tolist()) for shift in lit.shift_NC}
    assert len(shifts) == 32


def test_release_augmentation_is_torchvisions_with_the_releases_parameters() -> None:
    """The same crops, flips and factors; the pixels differ by rounding only, once for each of four steps."""
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    reference = v2.Compose([v2.RandomResizedCrop(32), v2.ColorJitter(0.4, 0.4, 0.4), v2.RandomHorizontalFlip(0.5)])
    transform = AUGMENTATIONS["release"].transform(Preprocess("bgr255", 32))
    for seed in range(40):
        with seeded(seed):
            expected = np.asarray(reference(Image.fromarray(pixels_HWC)))[:, :, ::-1].transpose(2, 0, 1)
        with seeded(seed):
            differences = np.abs(transform(Picture(pixels_HWC)).numpy().astype(int) - expected)
        assert differences.max() <= 4, seed
        assert differences.mean() < 0.5, seed


@pytest.mark.parametrize("shape", [(60, 80), (375, 500), (1, 40), (33, 7)])
@pytest.mark.parametrize("size", [(32, 32), (64, 85), (60, 80), (400, 3)])
def test_resizing_is_torchvisions(shape: tuple[int, int], size: tuple[int, int]) -> None:
    pixels_HWC = np.random.default_rng(2).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for given in (pixels_HWC, pixels_HWC[:, ::-1], pixels_HWC[: shape[0] // 2 + 1]):
        image_CHW = torch.from_numpy(np.ascontiguousarray(given)).permute(2, 0, 1)
        expected_CHW = v2.functional.resize(image_CHW, list(size), antialias=True)
        assert np.array_equal(resize(given, *size, antialias=True), expected_CHW.permute(1, 2, 0).numpy())


def test_draws_are_torchvisions() -> None:
    """To the bit, and as many: also of pictures so narrow that no draw fits."""
    crop, jitter = v2.RandomResizedCrop(32), v2.ColorJitter(0.4, 0.4, 0.4)
    sizes = [(60, 80), (375, 500), (4032, 3024), (1, 1), (2, 900), (900, 2), (3, 40), (7, 5)]
    for seed, (height, width) in itertools.product(range(50), sizes):
        with seeded(seed):
            drawn = crop.make_params([torch.empty(3, height, width)]), jitter.make_params([]), torch.rand(1)
        with seeded(seed):
            box, colours, following = draw_crop(height, width), draw_colours(), torch.rand(1)
        assert box._asdict() == drawn[0], (seed, height, width)
        names = ("brightness", "contrast", "saturation")
        assert colours == [
            (names[index], drawn[1][f"{names[index]}_factor"]) for index in drawn[1]["fn_idx"].tolist() if index < 3
        ]
        assert torch.equal(following, drawn[2])


@pytest.mark.parametrize("factor", [0.6, 0.93, 1.0, 1.4])
@pytest.mark.parametrize("change", ["brightness", "contrast", "saturation"])
def test_colours_are_changed_as_pillow_does(change: str, factor: float) -> None:
    pixels_HWC = np.random.default_rng(1).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    enhance = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }
    expected = np.asarray(enhance[change](Image.fromarray(pixels_HWC)).enhance(factor)).astype(int)
    found = change_colours(pixels_HWC, [(change, factor)])
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert factor == 1.0 or np.abs(found.astype(int) - pixels_HWC).mean() > 1


def test_shift_augmentation_only_moves_the_crop() -> None:
    preprocess = Preprocess("bgr255", 32)
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (37, 37, 3), dtype=np.uint8)
    pixels = pixels_HWC[:, :, ::-1].transpose(2, 0, 1)
    crops = {pixels[:, y : y + 32, x : x + 32].tobytes() for y in range(6) for x in range(6)}
    seen = {AUGMENTATIONS["shift"].transform(preprocess)(Picture(pixels_HWC)).numpy().tobytes() for _ in range(200)}
    assert seen <= crops
    assert len(seen) > 20


@pytest.mark.parametrize(("mode", "size"), [("bgr255", 50), ("bgr255", 0), ("hsv", 32)])
def test_unknown_mode_or_size(mode: str, size: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 32|no preprocessing mode 'hsv'"):
        Preprocess(mode, size)


def test_seeded_leaves_the_generator_as_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(99):
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)
