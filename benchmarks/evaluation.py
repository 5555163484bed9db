"""Time a pass over a validation set, against the plain loop with torchvision's preprocessing.

    python benchmarks/evaluation.py [--device auto] [--images 640] [--rounds 3] [--models NAME ...]

The plain loop uses the network in PyTorch's default memory format with torchvision's usual transforms, and reads the
counts after each batch; ours is the pass of `shufflenet eval` with the same weights. Both have the same number of
workers. Prints JSON with the seconds of a pass, images per second, and both results. The release's networks have their
own preprocessing, which torchvision lacks; their results are compared with a pass of the plain loop over our
preprocessed images.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import add_device, apart, choose_device, describe, report
from photographs import write_photographs
from plain import eval_loader, evaluate

from shufflenet_mlflow import create_model
from shufflenet_mlflow.data.folder import list_images
from shufflenet_mlflow.data.loader import BadImageLog, ImageDataset, default_workers
from shufflenet_mlflow.data.preprocess import Preprocess, eval_transform
from shufflenet_mlflow.evaluation.evaluate import EvalSettings
from shufflenet_mlflow.evaluation.evaluate import evaluate as our_evaluate
from shufflenet_mlflow.models.catalog import get_variant
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.devices import keep_freed_memory, move_model
from shufflenet_mlflow.runtime.progress import LoggingReporter

MODELS = ("torchvision/shufflenet_v2_x1_0", "shufflenet_v2_x1_0", "shufflenet_oneshot")
SIZE, BATCH, CLASSES = 224, 64, 8


def network(name: str) -> torch.nn.Module:
    """Return the network with the same weights in every process, spread out so that predictions differ."""
    torch.manual_seed(0)
    model = create_model(name, CLASSES)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            torch.nn.init.kaiming_normal_(parameter)
    return model


class Prepared(torch.utils.data.Dataset):
    """Our preprocessed images as a plain data set: float, in PyTorch's default memory format."""

    def __init__(self, root: Path, mode: str) -> None:
        self.listing = list_images(root)
        self._ours = ImageDataset(self.listing, eval_transform(Preprocess(mode, SIZE)), replace_bad=False)

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        item = self._ours[(0, index)]
        assert item.image_CHW is not None
        return item.image_CHW.float().contiguous(), item.label


def measure(side: str, name: str, root: Path, device: torch.device) -> dict[str, Any]:
    """Return results and seconds of the second pass in this process."""
    listing = list_images(root)
    mode = get_variant(name).preprocess
    workers = default_workers(len(listing), BATCH, SIZE)
    model = network(name)
    if side == "plain":
        loader = eval_loader(root, SIZE, BATCH, workers)
        evaluate(model, loader, device)
        return evaluate(model, loader, device)
    if side == "reference":
        return evaluate(model, torch.utils.data.DataLoader(Prepared(root, mode), BATCH, num_workers=workers), device)
    keep_freed_memory(device)
    model = move_model(model, device)
    found: dict[str, Any] = {}
    for _ in range(2):
        began = time.perf_counter()
        result = our_evaluate(
            model,
            listing,
            Preprocess(mode, SIZE),
            EvalSettings(BATCH, workers, device),
            bad_images=BadImageLog(skip=False),
            context=JobContext(LoggingReporter()),
        )
        seconds = time.perf_counter() - began
        found = {"top1": result.top1, "top5": result.top5, "loss": result.loss, "seconds": seconds}
    return found


def main() -> None:
    """Measure all networks."""
    parser = argparse.ArgumentParser()
    add_device(parser)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        side, name, folder, device_name = arguments.measure
        print(json.dumps(measure(side, name, Path(folder), torch.device(device_name))))
        return
    device = choose_device(arguments.device)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_photographs(Path(scratch), CLASSES, arguments.images // CLASSES)
        for name in arguments.models:
            times: dict[str, list[float]] = {"plain": [], "ours": []}
            results: dict[str, dict[str, float]] = {}
            for _ in range(arguments.rounds):
                for side, seconds in times.items():
                    results[side] = apart(__file__, side, name, scratch, device.type)
                    seconds.append(results[side].pop("seconds"))
            if get_variant(name).preprocess == "bgr255":
                results["plain"] = apart(__file__, "reference", name, scratch, device.type)
                del results["plain"]["seconds"]
            medians = {side: statistics.median(seconds) for side, seconds in times.items()}
            rows[name] = {
                "seconds": {side: round(value, 2) for side, value in medians.items()},
                "images_per_second": {side: round(arguments.images / value, 1) for side, value in medians.items()},
                "ratio": round(medians["plain"] / medians["ours"], 2),
                "results": results,
            }
    report({**describe(device), "images": arguments.images, "batch": BATCH, "networks": rows})


if __name__ == "__main__":
    main()
