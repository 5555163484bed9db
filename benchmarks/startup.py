"""Time a run from its start to its first step: new, and resumed early and late in a large data set.

The data set lists 1,300,000 images, which are 64 files over and over. One network has a checkpoint of about 20 MB, the
other of about 1 GB; each starts new, resumed after 10 iterations, and resumed after 1,000,000. Each measurement is a
process of its own. For comparison: skipping the batches that were already trained on, as loaders without a position do.
Prints JSON:

    python benchmarks/startup.py            # ten minutes, 8 GB of memory, 6 GB of disk
    python benchmarks/startup.py --small    # without the 1 GB network
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

FILES = 1_300_000
CLASSES = 1000
REAL = 64
PLACES = (10, 1_000_000)
SKIPPED = (10, 100, 400)
"""Batches that the loader without a position skips."""

NETWORKS = {"20 MB": "shufflenet_v2_x1_0", "1 GB": "shufflenet_v2_large"}
BATCH_SIZE = 8
INPUT_SIZE = 32


def make_images(root: Path) -> None:
    """Write the files."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    root.mkdir(parents=True)
    for number in range(REAL):
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(root / f"{number}.jpg")


def listing(root: Path) -> Any:
    """Return a listing as `list_images` would, without the files."""
    from shufflenet_mlflow.data.listing import ImageListing, Samples

    samples = Samples.of((f"{n % REAL}.jpg", n * CLASSES // FILES, 1000) for n in range(FILES))
    return ImageListing(root, tuple(f"{n:04}" for n in range(CLASSES)), samples)


class FirstStep(BaseException):
    """The measurement is complete."""


def after(steps: int, act: Callable[[], None]) -> Any:
    """Return a reporter that calls `act` after this many training steps."""
    from shufflenet_mlflow.runtime.progress import LoggingReporter, SilentPhase

    class Counting(SilentPhase):
        count = 0

        def advance(self) -> None:
            self.count += 1
            if self.count == steps:
                act()

    class Reporter(LoggingReporter):
        def phase(self, name: str, total: int, done: int = 0) -> Any:
            return Counting() if name == "training" else SilentPhase()

    return Reporter()


def reached() -> None:
    """End the measurement."""
    raise FirstStep


def measure(folder: Path, model: str, resume: str) -> dict[str, float]:
    """Return the seconds to the first step from the start of this process, and from the call of the job."""
    import psutil

    from shufflenet_mlflow.runtime.signals import StopFlag
    from shufflenet_mlflow.workflows.train import run_training
    from shufflenet_mlflow.workflows.training import data
    from shufflenet_mlflow.workflows.training.request import TrainRequest

    images = listing(folder / "images")
    data.list_folder = lambda *_arguments, **_named: images  # type: ignore[assignment]
    options = {
        "model": model,
        "train_dir": str(folder),
        "val_dir": str(folder),
        "input_size": INPUT_SIZE,
        "batch_size": BATCH_SIZE,
        "num_classes": CLASSES,
        "seed": 1,
        "workers": 0,
        "lr": 0.001,
        "total_iters": 2_000_000,
        "save_interval": 10,
        "val_interval": 2_000_000,
        "display_interval": 1000,
    }
    fresh = resume in ("make", "none")
    request = TrainRequest(
        options if fresh else {},
        resume="none" if fresh else resume,
        save_dir=folder / ("made" if resume == "make" else f"save-{time.time_ns()}") if fresh else None,
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
    )
    began = time.time()
    stop = StopFlag()
    if resume == "make":
        make_checkpoint(folder, request, stop)
        return {}
    try:
        run_training(request, reporter=after(1, reached), stop=stop)
    except FirstStep:
        now = time.time()
    return {"process_s": now - psutil.Process().create_time(), "job_s": now - began}


def make_checkpoint(folder: Path, request: Any, stop: Any) -> None:
    """Write the checkpoint of iteration 10, and a copy that says iteration 1,000,000."""
    import torch

    from shufflenet_mlflow.checkpoints.names import checkpoint_name
    from shufflenet_mlflow.checkpoints.verification import read_checkpoint
    from shufflenet_mlflow.data.sampler import SampleOrder
    from shufflenet_mlflow.workflows.train import run_training

    run_training(request, reporter=after(PLACES[0], lambda: stop.set(15)), stop=stop)
    payload = dict(read_checkpoint(request.save_dir / checkpoint_name(PLACES[0])))
    order = SampleOrder(FILES, BATCH_SIZE, 1)
    payload |= {
        "iters": PLACES[1],
        "epoch": order.epoch_of(PLACES[1]),
        "sampler_state": order.state_dict(PLACES[1]),
    }
    payload["lr_scheduler_state_dict"] |= {"last_epoch": PLACES[1], "_step_count": PLACES[1] + 1}
    torch.save(payload, folder / checkpoint_name(PLACES[1]))


def skip(folder: Path) -> dict[str, float]:
    """Return the seconds that a loader without a position takes to skip batches."""
    from shufflenet_mlflow.data.augment import AUGMENTATIONS
    from shufflenet_mlflow.data.loader import ImageDataset, make_loader
    from shufflenet_mlflow.data.preprocess import Preprocess
    from shufflenet_mlflow.data.sampler import SampleOrder, TrainBatches

    transform = AUGMENTATIONS["release"].transform(Preprocess("bgr255", INPUT_SIZE))
    images = ImageDataset(listing(folder / "images"), transform, seed=1, replace_bad=True)
    found = {}
    for count in SKIPPED:
        began = time.perf_counter()
        loader = make_loader(
            images, TrainBatches(SampleOrder(FILES, BATCH_SIZE, 1), 0, count), workers=0, pin_memory=False
        )
        for _ in islice(loader, count):
            pass
        found[str(count)] = time.perf_counter() - began
    return found


def in_process(folder: Path, *words: str) -> Any:
    """Run this script with these words; return the JSON that it prints."""
    out = subprocess.run(
        [sys.executable, __file__, "--folder", str(folder), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "SHUFFLENET_CACHE_DIR": str(folder / "cache")},
        check=True,
        text=True,
    ).stdout
    return json.loads(out.splitlines()[-1])


def median(folder: Path, model: str, resume: str, repeats: int) -> dict[str, float]:
    """Return the median of each time."""
    rows = [in_process(folder, "--model", model, "--resume", resume) for _ in range(repeats)]
    return {key: round(statistics.median(row[key] for row in rows), 2) for key in rows[0]}


def main() -> None:
    """Measure everything or, with a hidden option, one thing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--resume", help=argparse.SUPPRESS)
    parser.add_argument("--skip", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.skip:
        print(json.dumps(skip(given.folder)))
        return
    if given.model:
        print(json.dumps(measure(given.folder, given.model, given.resume)))
        return
    from shufflenet_mlflow.checkpoints.names import checkpoint_name

    report: dict[str, Any] = {"files": FILES, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_images(root / "images")
        report["seconds to skip batches"] = {
            count: round(seconds, 2) for count, seconds in in_process(root, "--skip").items()
        }
        for size, model in NETWORKS.items():
            if given.small and size != "20 MB":
                continue
            folder = root / model
            folder.mkdir()
            (folder / "images").symlink_to(root / "images")
            in_process(folder, "--model", model, "--resume", "make")
            early, late = folder / "made" / checkpoint_name(PLACES[0]), folder / checkpoint_name(PLACES[1])
            report[size] = {
                "network": model,
                "checkpoint_MB": round(early.stat().st_size / 1e6),
                "fresh": median(folder, model, "none", given.repeats),
                f"resumed at {PLACES[0]}": median(folder, model, str(early), given.repeats),
                f"resumed at {PLACES[1]}": median(folder, model, str(late), given.repeats),
            }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
