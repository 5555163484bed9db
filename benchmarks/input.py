"""Measure images per second and core from JPEG files, against torchvision's ImageFolder with Pillow and NVIDIA DALI.

    pip install --target dali nvidia-dali-cuda120
    python benchmarks/input.py [--images 400] [--large 16] [--blur 5] [--rounds 5] [--dali dali]

All decode, crop, augment, collate and convert to float on one core, each in a process of its own, in turn. The seconds
are those of the processor, which other work on the machine changes little. DALI needs no GPU here; without `--dali` its
side is left out. Prints JSON with medians over the rounds, and the largest difference of evaluation pixels from the
reference preprocessing.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from machine import apart, describe, report
from photographs import BLUR, phone_photograph, write_photographs
from PIL import Image
from plain import JITTER, eval_loader, train_loader
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
    preprocess, batch = Preprocess(mode, SIZE), min(BATCH, len(listing))
    if training:
        dataset = ImageDataset(listing, AUGMENTATIONS["release"].transform(preprocess), replace_bad=True)
        batches = TrainBatches(SampleOrder(len(listing), batch, 0), 0, len(listing) // batch)
    else:
        dataset = ImageDataset(listing, eval_transform(preprocess), replace_bad=False)
        batches = EvalBatches(len(listing), batch)
    to_input = ToInput(preprocess, CPU)
    loaded: Iterable[Batch] = batches_of(make_loader(dataset, batches, workers=0, pin_memory=False))
    return (to_input(batch.images_NCHW) for batch in loaded)


def rate(loader: Iterable[object], images: int) -> float:
    """Return images per second of the processor."""
    began = time.process_time()
    for _ in loader:
        pass
    return images / (time.process_time() - began)


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


def dali(root: Path, images: int) -> Iterable[object]:
    """Return float batches from NVIDIA DALI on the CPU, with the same crop, changes of colour and flip."""
    from nvidia.dali import fn, pipeline_def, types

    batch = min(BATCH, images)

    @pipeline_def(batch_size=batch, num_threads=1, device_id=None, prefetch_queue_depth=1, seed=0)
    def pipeline() -> object:
        encoded, label = fn.readers.file(file_root=str(root), random_shuffle=True)
        image = fn.decoders.image_random_crop(encoded, random_area=(0.08, 1), random_aspect_ratio=(3 / 4, 4 / 3))
        image = fn.resize(image, size=(SIZE, SIZE))
        factors = {name: fn.random.uniform(range=(1 - width, 1 + width)) for name, width in JITTER.items()}
        image = fn.color_twist(image, **factors)
        image = fn.crop_mirror_normalize(
            image, dtype=types.FLOAT, output_layout="CHW", mirror=fn.random.coin_flip(), mean=[0.0], std=[255.0]
        )
        return image, label

    built = pipeline()
    return (built.run() for _ in range(images // batch))


Side = Callable[[Path, int], Iterable[object]]

SIDES: dict[str, Side] = {
    "train, plain": lambda root, images: train_loader(root, SIZE, min(BATCH, images), 0),
    "train, DALI": dali,
    "train, bgr255": lambda root, images: ours(list_images(root), "bgr255", True),
    "eval, plain": lambda root, images: eval_loader(root, SIZE, min(BATCH, images), 0),
    "eval, bgr255": lambda root, images: ours(list_images(root), "bgr255", False),
    "eval, rgb_256": lambda root, images: ours(list_images(root), "rgb_256", False),
}


def measure(side: str, root: Path, images: int, packages: str) -> float | None:
    """Return images per second of the second pass in this process, on one core; None without DALI."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    if side.endswith("DALI"):
        sys.path.append(packages)  # behind ours, so that only what is not here comes from there
        if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
            return None
    elif not side.endswith("plain"):
        keep_freed_memory(CPU)  # as our commands do
    rate(SIDES[side](root, images), images)
    return rate(SIDES[side](root, images), images)


def compare(root: Path, images: int, rounds: int, packages: str) -> dict[str, object]:
    """Return the medians of all sides, measured in turn, and their ratios."""
    rates: dict[str, list[float | None]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for side, values in rates.items():
            values.append(apart(__file__, side, root, images, packages))
    medians = {
        name: round(statistics.median(found), 1)
        for name, values in rates.items()
        if (found := [value for value in values if value is not None])
    }
    return {
        "images_per_second_and_core": medians,
        "ratios": {
            f"{name} / {other}": round(value / medians[other], 2)
            for name, value in medians.items()
            for other in ("train, plain", "train, DALI", "eval, plain")
            if other in medians and other[:5] == name[:5] and name.endswith(("bgr255", "rgb_256"))
        },
    }


def main() -> None:
    """Measure all sides in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=400, help="photographs of ImageNet's size")
    parser.add_argument("--large", type=int, default=16, help="photographs of 12 megapixels")
    parser.add_argument("--blur", type=float, default=BLUR, help="pixels that their smallest detail is wide")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dali", default="", metavar="DIR", help="where DALI is: pip install --target DIR ...")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    count = arguments.images // BATCH * BATCH
    if arguments.measure:
        side, folder, images, packages = arguments.measure
        print(json.dumps(measure(side, Path(folder), int(images), packages)))
        return
    if not arguments.dali:
        print("without DALI; see --help", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        small, large = Path(scratch) / "small", Path(scratch) / "large"
        listing_bytes = write_photographs(small, 4, count // 4)
        large_bytes = write_photographs(
            large, 2, arguments.large // 2, make=partial(phone_photograph, blur=arguments.blur)
        )
        found = {"500x375": compare(small, count, arguments.rounds, arguments.dali)}
        found["4032x3024"] = compare(large, arguments.large, arguments.rounds, arguments.dali)
        listing = list_images(small)
        report(
            {
                **describe(),
                "images": {"500x375": count, "4032x3024": arguments.large},
                "mean_bytes": {"500x375": listing_bytes, "4032x3024": large_bytes},
                **found,
                "furthest_pixel_of_255": {
                    "bgr255": furthest(listing, "bgr255", of_the_release),
                    "rgb_256": furthest(listing, "rgb_256", of_torchvision),
                },
            }
        )


if __name__ == "__main__":
    main()
