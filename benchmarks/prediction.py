"""Time the prediction of thousands of files, against a plain loop with Pillow and torchvision.

    python benchmarks/prediction.py [--folder DIR] [--images 2000] [--input-size 224] [--rounds 3] [--device auto]

Without `--folder`, photographs are generated first. The plain loop is torchvision's network with its usual transforms,
in PyTorch's default memory format, 64 images at a time, with no worker processes and with two; ours is `shufflenet
predict` on a checkpoint with the same weights. Both write a CSV line with five labels per image. Prints JSON with the
seconds from the sorted list of files to the last line, images per second, processor time, seconds of whole processes
for all images and for one, and the number of images on which both agree.
"""

import argparse
import csv
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import add_device, apart, choose_device, describe, report

MODEL = "torchvision/shufflenet_v2_x1_0"
BATCH, TOP, CLASSES = 64, 5, 8
SIDES = {"plain, no workers": 0, "plain, 2 workers": 2, "ours": None}


def network() -> torch.nn.Module:
    """Return the network with the same weights in every process, spread out so that predictions differ."""
    from torchvision.models import shufflenet_v2_x1_0

    torch.manual_seed(0)
    model = shufflenet_v2_x1_0(num_classes=CLASSES)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            torch.nn.init.kaiming_normal_(parameter)
    return model


class Files(torch.utils.data.Dataset):
    """Image files through torchvision's usual transforms."""

    def __init__(self, paths: list[str], size: int) -> None:
        from torchvision import transforms

        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.Resize(size * 256 // 224),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), self.paths[index]


def plain(paths: list[str], size: int, workers: int, device: torch.device) -> tuple[float, str]:
    """Predict with the plain loop; return the seconds and the CSV lines."""
    model = network().to(device).eval()
    began = time.perf_counter()
    out = io.StringIO()
    lines = csv.writer(out)
    with torch.no_grad():
        for images, names in torch.utils.data.DataLoader(Files(paths, size), BATCH, num_workers=workers):
            found = torch.softmax(model(images.to(device)), 1).topk(TOP)
            for name, labels, values in zip(names, found.indices.tolist(), found.values.tolist(), strict=True):
                lines.writerow([name, *(cell for entry in zip(labels, values, strict=True) for cell in entry)])
    return time.perf_counter() - began, out.getvalue()


def ours(checkpoint: str, folder: str, size: int, device: torch.device) -> tuple[float, str]:
    """Predict with the job of `shufflenet predict`; return the seconds and the CSV lines."""
    from shufflenet_mlflow.cli.predictions import csv_rows
    from shufflenet_mlflow.data.pictures import find_pictures
    from shufflenet_mlflow.runtime.progress import LoggingReporter
    from shufflenet_mlflow.runtime.signals import StopFlag
    from shufflenet_mlflow.workflows.predict import PredictRequest, run_prediction

    request = PredictRequest(checkpoint, model=MODEL, input_size=size, top=TOP, device=device.type)
    pictures = find_pictures([folder], lambda: io.BytesIO())
    found = run_prediction(request, pictures, reporter=LoggingReporter(), stop=StopFlag())
    began = time.perf_counter()
    lines = "".join(csv_rows(batch) for batch in found.batches)
    return time.perf_counter() - began, lines


def measure(side: str, checkpoint: str, folder: str, size: int, device: torch.device, kept: str) -> dict[str, float]:
    """Predict in this process, write the lines to `kept`, and return the times."""
    workers, before = SIDES[side], processor()
    if workers is None:
        seconds, lines = ours(checkpoint, folder, size, device)
    else:
        paths = sorted(str(path) for path in Path(folder).rglob("*.jpg"))
        seconds, lines = plain(paths, size, workers, device)
    Path(kept).write_text(lines)
    return {"seconds": seconds, "processor": processor() - before}


def processor() -> float:
    """Return the processor time of this process and of its finished children, in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def whole(checkpoint: str, images: str, size: int, device: torch.device) -> float:
    """Return the seconds of the whole command."""
    words = ["predict", checkpoint, "--model", MODEL, "--input-size", size, "--device", device.type, "--format", "csv"]
    command = [sys.executable, "-m", "shufflenet_mlflow", *map(str, words), images]
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def labels_in(path: Path) -> dict[str, str]:
    """Return path -> first label from the CSV lines."""
    return {row[0]: row[1] for row in csv.reader(path.read_text().splitlines())}


def main() -> None:
    """Measure all sides."""
    parser = argparse.ArgumentParser()
    add_device(parser)
    parser.add_argument("--folder")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        side, checkpoint, folder, size, device_name, kept = arguments.measure
        print(json.dumps(measure(side, checkpoint, folder, int(size), torch.device(device_name), kept)))
        return
    from photographs import write_photographs

    from shufflenet_mlflow import save_checkpoint

    device, size = choose_device(arguments.device), arguments.input_size
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or os.path.join(scratch, "photographs")
        if arguments.folder is None:
            write_photographs(Path(folder), CLASSES, arguments.images // CLASSES)
        one = os.path.join(scratch, "one")
        os.mkdir(one)
        first = min(Path(folder).rglob("*.jpg"))
        Path(one, first.name).write_bytes(first.read_bytes())
        state = network().state_dict()
        checkpoint = str(save_checkpoint({"state_dict": state}, 1, directory=os.path.join(scratch, "saved")))
        passes: dict[str, list[float]] = {side: [] for side in SIDES}
        computed: dict[str, list[float]] = {side: [] for side in SIDES}
        processes: dict[str, dict[str, list[float]]] = {"all": {side: [] for side in SIDES}}
        processes["one"] = {side: [] for side in SIDES if side != "plain, 2 workers"}
        for _ in range(arguments.rounds):
            for side in SIDES:
                kept = os.path.join(scratch, f"{side}.csv")
                words = (side, checkpoint, folder, size, device.type, kept)
                began = time.perf_counter()
                measured = apart(__file__, *words)
                passes[side].append(measured["seconds"])
                computed[side].append(measured["processor"])
                processes["all"][side].append(time.perf_counter() - began)
            for side in processes["one"]:
                began = time.perf_counter()
                if side == "ours":
                    processes["one"][side].append(whole(checkpoint, one, size, device))
                else:
                    apart(__file__, side, checkpoint, one, size, device.type, os.path.join(scratch, "one.csv"))
                    processes["one"][side].append(time.perf_counter() - began)
            processes["all"]["ours"][-1] = whole(checkpoint, folder, size, device)
        answers = {side: labels_in(Path(scratch, f"{side}.csv")) for side in SIDES}
    count = len(answers["ours"])
    medians = {side: statistics.median(seconds) for side, seconds in passes.items()}
    results: dict[str, Any] = {
        "images": count,
        "input_size": size,
        "batch": BATCH,
        "seconds": {side: round(value, 2) for side, value in medians.items()},
        "images_per_second": {side: round(count / value, 1) for side, value in medians.items()},
        "ratio": {side: round(medians[side] / medians["ours"], 2) for side in SIDES if side != "ours"},
        "processor_seconds": {side: round(statistics.median(seconds), 2) for side, seconds in computed.items()},
        "whole_process": {
            of: {side: round(statistics.median(seconds), 2) for side, seconds in sides.items()}
            for of, sides in processes.items()
        },
        "same_label": sum(answers["plain, 2 workers"][path] == label for path, label in answers["ours"].items()),
    }
    report({**describe(device), **results})


if __name__ == "__main__":
    main()
