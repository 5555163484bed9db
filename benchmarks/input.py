"""Measure images per second and core from JPEG files, against torchvision's ImageFolder with Pillow.

    python benchmarks/input.py [--images 400] [--rounds 5]

Both decode, crop, augment, collate and convert to float in one thread, each in a process of its own, in turn. Prints
JSON with medians over the rounds, and the largest difference of evaluation pixels from the reference preprocessing.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import torch
from machine import apart, describe, report
from photographs import write_photographs
from PIL import Image
from plain import eval_loader, train_loader
from torchvision import transforms

from shufflenet_mlflow.data.augment import AUGMENTATIONS
from shufflenet_mlflow.data.folder import list_images
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.loader import Batch, ImageDataset, batches_of, make_loader
from shufflenet_mlflow.data.preprocess import Preprocess, ToInput, eval_transform
from shufflenet_mlflow.data.sampler import EvalBatches, SampleOrder, TrainBatches
from shufflenet_mlflow.runtime.devices import keep_freed_memory

CPU = torch.device("cpu")
SIZE, BATCH = 224, 50


def ours(listing: ImageListing, mode: str, training: bool) -> Iterable[torch.Tensor]:
    """Return float batches as the network gets them."""
    preprocess = Preprocess(mode, SIZE)
    if training:
        dataset = ImageDataset(listing, AUGMENTATIONS["release"].transform(preprocess), replace_bad=True)
        batches = TrainBatches(SampleOrder(len(listing), BATCH, 0), 0, len(listing) // BATCH)
    else:
        dataset = ImageDataset(listing, eval_transform(preprocess), replace_bad=False)
        batches = EvalBatches(len(listing), BATCH)
    to_input = ToInput(preprocess, CPU)
    loaded: Iterable[Batch] = batches_of(make_loader(dataset, batches, workers=0, pin_memory=False))
    return (to_input(batch.images_NCHW) for batch in loaded)


def rate(loader: Iterable[object], images: int) -> float:
    """Return images per second."""
    began = time.perf_counter()
    for _ in loader:
        pass
    return images / (time.perf_counter() - began)


def furthest(listing: ImageListing, mode: str, reference: Callable[[Image.Image], np.ndarray]) -> int:
    """Return the largest difference between our pixels and the reference's, on the 0-255 scale."""
    dataset = ImageDataset(listing, eval_transform(Preprocess(mode, SIZE)), replace_bad=False)
    largest = 0
    for index, sample in enumerate(listing.samples):
        found = dataset[(0, index)].image_CHW
        assert found is not None
        expected_HWC = reference(Image.open(listing.root / sample.path).convert("RGB"))
        largest = max(largest, int(np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected_HWC).max()))
    return largest


def of_torchvision(image: Image.Image) -> np.ndarray:
    """Apply the preprocessing of torchvision's weights, before the conversion to float."""
    return np.asarray(transforms.CenterCrop(SIZE)(transforms.Resize(256)(image)))


def of_the_release(image: Image.Image) -> np.ndarray:
    """Apply the original release's preprocessing, with OpenCV's bilinear resize; BGR."""
    scale = 256 / min(image.size)
    size = (int(scale * image.width + 0.5), int(scale * image.height + 0.5))
    resized = cv2.resize(np.asarray(image), size, interpolation=cv2.INTER_LINEAR)
    return np.asarray(transforms.CenterCrop(SIZE)(Image.fromarray(resized)))[:, :, ::-1]


SIDES: dict[str, Callable[[Path], Iterable[object]]] = {
    "train, plain": lambda root: train_loader(root, SIZE, BATCH, 0),
    "train, bgr255": lambda root: ours(list_images(root), "bgr255", True),
    "eval, plain": lambda root: eval_loader(root, SIZE, BATCH, 0),
    "eval, bgr255": lambda root: ours(list_images(root), "bgr255", False),
    "eval, rgb_256": lambda root: ours(list_images(root), "rgb_256", False),
}


def measure(side: str, root: Path, images: int) -> float:
    """Return images per second of the second pass in this process."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    if not side.endswith("plain"):
        keep_freed_memory(CPU)  # as our commands do
    rate(SIDES[side](root), images)
    return rate(SIDES[side](root), images)


def main() -> None:
    """Measure all sides in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    count = arguments.images // BATCH * BATCH
    if arguments.measure:
        side, folder, images = arguments.measure
        print(measure(side, Path(folder), int(images)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        mean_bytes = write_photographs(root, 4, count // 4)
        rates: dict[str, list[float]] = {name: [] for name in SIDES}
        for _ in range(arguments.rounds):
            for side, values in rates.items():
                values.append(apart(__file__, side, scratch, count))
        medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
        listing = list_images(root)
        report(
            {
                **describe(),
                "images": count,
                "mean_bytes": mean_bytes,
                "images_per_second_and_core": medians,
                "train_ratio": round(medians["train, bgr255"] / medians["train, plain"], 2),
                "eval_ratio": {
                    mode: round(medians[f"eval, {mode}"] / medians["eval, plain"], 2) for mode in ("bgr255", "rgb_256")
                },
                "furthest_pixel_of_255": {
                    "bgr255": furthest(listing, "bgr255", of_the_release),
                    "rgb_256": furthest(listing, "rgb_256", of_torchvision),
                },
            }
        )


if __name__ == "__main__":
    main()
