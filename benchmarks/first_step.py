"""Time runs of one iteration: what every start, and every resumption, waits for.

Photographs of 500x375 pixels, torchvision's x1.0 at 224 px, batches of 16, tracking in SQLite. The other side is a
plain script that imports torch, torchvision and mlflow, opens the same kind of store, begins a run, makes one step and
logs the loss and the weights. Ours validates, saves and verifies its checkpoint besides. `to_first_step` ends with the
step, at the time of its loss in the store; `whole` with the process. Each measurement is a process of its own, the
sides take turns. Prints JSON:

    python benchmarks/first_step.py [--rounds N]
"""

import argparse
import contextlib
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe, report
from photographs import write_photographs

BATCH = 16

PLAIN = f"""
import sys
import mlflow, torch, torchvision
from torchvision.transforms import v2

torch.manual_seed(0)
to_float = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
transform = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), to_float])
data = torchvision.datasets.ImageFolder(sys.argv[1] + "/train", transform)
loader = torch.utils.data.DataLoader(data, batch_size={BATCH}, shuffle=True)
model = torchvision.models.shufflenet_v2_x1_0(num_classes=len(data.classes))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
mlflow.set_tracking_uri("sqlite:///mlflow.db")
mlflow.set_experiment("plain")
with mlflow.start_run():
    images, labels = next(iter(loader))
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    mlflow.log_metric("loss", loss.item(), step=1)
    torch.save({{"model": model.state_dict(), "optimizer": optimizer.state_dict()}}, "last.pt")
    mlflow.log_artifact("last.pt")
"""

STOPPED = """
import sys
from shufflenet_mlflow import Callback, train

class StopAt1(Callback):
    def on_step(self, trainer):
        trainer.stop(finish=False)

options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
options |= {name: int(options[name]) for name in ("total_iters", "batch_size", "input_size")}
train(**options, callbacks=[StopAt1()], progress=False)
"""


def options(root: Path, iters: int) -> dict[str, str]:
    """Return the options of our training."""
    return {
        "model": "torchvision/shufflenet_v2_x1_0",
        "train_dir": f"{root}/train",
        "val_dir": f"{root}/val",
        "total_iters": str(iters),
        "batch_size": str(BATCH),
        "input_size": "224",
    }


def seconds(command: list[str], folder: Path) -> float:
    """Run a process in a folder; return the seconds until it has ended."""
    environment = {**os.environ, "SHUFFLENET_CACHE_DIR": str(folder / "cache"), "GIT_PYTHON_REFRESH": "quiet"}
    began = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    ended = time.perf_counter()
    if ran.returncode not in (0, 143):
        sys.exit(ran.stderr)
    return ended - began


def words(given: dict[str, str]) -> list[str]:
    """Return options as the command line takes them."""
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]


def timed(command: list[str], folder: Path) -> dict[str, float]:
    """Run a process in a folder with a store; return the seconds until its first loss, and until its end."""
    began = time.time()
    whole = seconds(command, folder)
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store:
        losses = "key IN ('loss', 'train/loss') AND timestamp > ?"
        [[first]] = store.execute(f"SELECT MIN(timestamp) FROM metrics WHERE {losses}", [began * 1000])
    return {"to_first_step": first / 1000 - began, "whole": whole}


def measure(root: Path) -> dict[str, dict[str, float]]:
    """Measure each side once; stores exist already, as after the first run on a machine."""
    found = {}
    ours = ["-m", "shufflenet_mlflow", "train", "--no-log-models", "--quiet", "--display-interval", "1"]
    with tempfile.TemporaryDirectory() as scratch:
        seconds(["-c", PLAIN, str(root)], Path(scratch))
        found["plain"] = timed(["-c", PLAIN, str(root)], Path(scratch))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        seconds(["-c", STOPPED, *(part for pair in options(root, 2).items() for part in pair)], folder)
        [stopped] = [path.name for path in (folder / "models").iterdir()]
        found["resumed"] = timed([*ours, "--resume", stopped], folder)
        found["new"] = timed([*ours, *words(options(root, 1))], folder)
    return found


def main() -> None:
    """Measure all sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photographs(root / "train", 4, 64)
        write_photographs(root / "val", 4, 4, seed=1)
        rounds = [measure(root) for _ in range(given.rounds)]
    medians = {
        until: {side: statistics.median(times[side][until] for times in rounds) for side in rounds[0]}
        for until in ("to_first_step", "whole")
    }
    results: dict[str, Any] = {
        until: {
            "seconds": {side: round(median, 2) for side, median in sides.items()},
            "ours_to_plain": {side: round(sides[side] / sides["plain"], 2) for side in ("new", "resumed")},
        }
        for until, sides in medians.items()
    }
    report({**describe(), **results, "all_rounds": rounds})


if __name__ == "__main__":
    main()
