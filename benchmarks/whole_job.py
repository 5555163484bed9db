"""Time whole jobs, from the command to the end of its process: two epochs over 800 photographs, tracked.

    python benchmarks/whole_job.py [--timm DIR] [--rounds 3] [--epochs 2] [--images 800]

The network is torchvision's x1.0 at 224 pixels in batches of 64 with two loader processes; 160 photographs validate it
after each epoch. `ours` is `shufflenet train` with its defaults: checkpoints verified and in the run, BN statistics
re-estimated, two logged models. `parts` is one more run of ours, by its callbacks: seconds until the training is set
up, of steps, of validations, and of what follows. `lightning` is a script with MLFlowLogger and ModelCheckpoint.
`timm` is the `train.py` of a checkout of timm, which tracks nothing; without `--timm` it is left out. The sides take
turns; medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe, report
from photographs import write_photographs

CLASSES, VALIDATION, BATCH, SIZE, WORKERS = 10, 16, 64, 224, 2

LIGHTNING = f"""
import sys
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.models import shufflenet_v2_x1_0

class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = shufflenet_v2_x1_0(weights=None, num_classes={CLASSES})
    def training_step(self, batch, _index):
        logits = self.net(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1], label_smoothing=0.1)
        self.log_dict({{"train_loss": loss, "train_top1": (logits.argmax(1) == batch[1]).float().mean()}})
        return loss
    def validation_step(self, batch, _index):
        logits = self.net(batch[0])
        self.log_dict({{"val_loss": nn.functional.cross_entropy(logits, batch[1]),
                       "val_top1": (logits.argmax(1) == batch[1]).float().mean()}})
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, 0.9, weight_decay=4e-5)

root, epochs = sys.argv[1:]
normal = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
jitter = transforms.ColorJitter(0.4, 0.4, 0.4)
train = transforms.Compose([transforms.RandomResizedCrop({SIZE}), jitter, transforms.RandomHorizontalFlip(), *normal])
val = transforms.Compose([transforms.Resize(256), transforms.CenterCrop({SIZE}), *normal])
sets = datasets.ImageFolder(root + "/train", train), datasets.ImageFolder(root + "/val", val)
loaders = [DataLoader(images, {BATCH}, shuffle=images is sets[0], num_workers={WORKERS}) for images in sets]
trainer = pl.Trainer(
    max_epochs=int(epochs), accelerator="cpu", log_every_n_steps=5, enable_progress_bar=False, num_sanity_val_steps=0,
    logger=MLFlowLogger(tracking_uri="sqlite:///mlflow.db", log_model=True),
    callbacks=[ModelCheckpoint(save_last=True)],
)
trainer.fit(Classifier(), *loaders)
"""

TIMM = f"""
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
from timm.models import register_model
from torchvision.models import shufflenet_v2_x1_0

@register_model
def torchvision_shufflenet(pretrained=False, num_classes=1000, **_options):
    model = shufflenet_v2_x1_0(weights=None, num_classes=num_classes)
    model.num_classes = num_classes
    model.default_cfg = model.pretrained_cfg = {{"input_size": (3, {SIZE}, {SIZE}), "crop_pct": 0.875}}
    return model

script = sys.path[0] + "/train.py"
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""

PARTS = """
import json, sys, time
import psutil
from shufflenet_mlflow import Callback, train

marks = []

class Clock(Callback):
    def on_start(self, trainer):
        self.last = psutil.Process().create_time()
        self.mark("until the first step begins")
    def on_step(self, trainer):
        self.mark("steps, decoding included")
    def on_validation(self, trainer, metrics):
        self.mark("BN statistics and validation")
    def on_end(self, trainer, result):
        self.mark("after the last validation, in the loop")
    def mark(self, name):
        now = time.time()
        marks.append((name, now - self.last))
        self.last = now

options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
whole = ("epochs", "batch_size", "workers", "input_size", "display_interval")
options |= {name: int(options[name]) for name in whole}
clock = Clock()
train(**options | {"lr": float(options["lr"])}, callbacks=[clock], progress=False)
clock.mark("logged models, and delivery to the end")
sums = {}
for name, seconds in marks:
    sums[name] = sums.get(name, 0.0) + seconds
print(json.dumps({name: round(seconds, 2) for name, seconds in sums.items()}))
"""


def commands(root: Path, epochs: int, timm: Path | None) -> dict[str, list[str]]:
    """Return the command of each side."""
    ours = [
        *("-m", "shufflenet_mlflow", "train", "--model", "torchvision/shufflenet_v2_x1_0"),
        *("--train-dir", f"{root}/train", "--val-dir", f"{root}/val", "--epochs", str(epochs)),
        *("--batch-size", str(BATCH), "--lr", "0.01", "--workers", str(WORKERS), "--input-size", str(SIZE)),
        *("--display-interval", "5", "--quiet"),
    ]
    found = {"ours": ours, "lightning": ["-c", LIGHTNING, str(root), str(epochs)]}
    if timm is not None:
        words = [
            *("--data-dir", str(root), "--train-split", "train", "--val-split", "val", "--model"),
            *("torchvision_shufflenet", "--num-classes", str(CLASSES), "--img-size", str(SIZE)),
            *("--batch-size", str(BATCH), "--epochs", str(epochs), "--lr", "0.01", "--weight-decay", "4e-5"),
            *("--workers", str(WORKERS), "--device", "cpu", "--output", "timm", "--log-interval", "5"),
            *("--warmup-epochs", "0", "--cooldown-epochs", "0"),
        ]
        found["timm"] = ["-c", TIMM, str(timm.resolve()), *words]
    return found


def run(command: list[str], **variables: str) -> tuple[float, str]:
    """Run a job in an empty folder; return the seconds until its process has ended, and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "SHUFFLENET_CACHE_DIR": f"{folder}/cache",
            "GIT_PYTHON_REFRESH": "quiet",
            **variables,
        }
        began = time.perf_counter()
        ran = subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        ended = time.perf_counter()
    if ran.returncode:
        sys.exit(ran.stderr)
    return ended - began, ran.stdout


def parts(ours: list[str]) -> dict[str, float]:
    """Run our job once more, and return where its seconds go."""
    words = [word.removeprefix("--").replace("-", "_") if word.startswith("--") else word for word in ours[3:-1]]
    took, printed = run(["-c", PARTS, *words], OMP_WAIT_POLICY="PASSIVE")  # as the command sets it
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    return {**found, "leaving": round(took - sum(found.values()), 2)}


def main() -> None:
    """Measure all sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm", type=Path, help="a checkout of timm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=800)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photographs(root / "train", CLASSES, given.images // CLASSES)
        write_photographs(root / "val", CLASSES, VALIDATION, seed=1)
        sides = commands(root, given.epochs, given.timm)
        rounds: list[dict[str, float]] = []
        for _ in range(given.rounds):
            rounds.append({side: run(command)[0] for side, command in sides.items()})
        where = parts(sides["ours"])
    medians = {side: statistics.median(times[side] for times in rounds) for side in sides}
    fastest = min(medians[side] for side in sides if side != "ours")
    results: dict[str, Any] = {
        **describe(),
        "images": given.images,
        "epochs": given.epochs,
        "seconds": {side: round(median, 1) for side, median in medians.items()},
        "all_rounds": [{side: round(time, 1) for side, time in times.items()} for times in rounds],
        "ours_to_fastest_peer": round(medians["ours"] / fastest, 2),
        "parts": where,
    }
    if given.timm is None:
        results["left_out"] = "timm: no --timm DIR"
    report(results)


if __name__ == "__main__":
    main()
