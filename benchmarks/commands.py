"""Time commands: help, a usage error, listings, and `train` and `eval` up to the first image.

    python benchmarks/commands.py [--rounds 5]

Prints JSON with median seconds: of whole commands, and for `train` and `eval` from the start of the process until the
first images have been decoded. The embedded store has two runs. `store alone` is a script in which `MlflowClient` opens
it and reads them; `to_store_alone` are the commands that read it, as multiples of that.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe, report
from mlflow import MlflowClient

OURS = ["-m", "shufflenet_mlflow"]
COMMANDS = {
    "--help": ["--help"],
    "train --help": ["train", "--help"],
    "usage error": ["train", "--lr", "fast"],
    "models": ["models"],
    "runs": ["runs"],
    "compare": ["compare", "RUN", "OTHER"],
    "checkpoints ls": ["checkpoints", "ls", "RUN"],
}

STORE_ALONE = """
from mlflow import MlflowClient
client = MlflowClient()
print([client.get_run(run.info.run_id).data.metrics for run in client.search_runs(["0", "1"])])
"""

FIRST_IMAGE = """
import os, time, psutil
from shufflenet_mlflow.cli import main
from shufflenet_mlflow.data.preprocess import ToInput

def reached(*_arguments, **_named):
    print(time.time() - psutil.Process().create_time(), flush=True)
    os._exit(0)

ToInput.__call__ = reached
main({words!r})
"""


def whole(words: list[str], folder: str) -> float:
    """Return the seconds of a whole process; a usage error is one of those that are measured."""
    began = time.perf_counter()
    ran = subprocess.run([sys.executable, *words], capture_output=True, cwd=folder, check=False)
    took = time.perf_counter() - began
    if ran.returncode not in (0, 2):
        sys.exit(ran.stderr)
    return took


def to_first_image(words: list[str], folder: str) -> float:
    """Return the seconds from the start of the process to the first image."""
    command = [sys.executable, "-c", FIRST_IMAGE.format(words=words)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder, check=True)
    return float(ran.stdout.split()[-1])


def main() -> None:
    """Measure all commands."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = range(parser.parse_args().rounds)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{scratch}/mlflow.db"
        saved = Path(scratch, "saved")
        trained = [*OURS, "train", "--epochs", "1", "--no-log-models", "--save-dir"]
        whole([*trained, str(saved)], scratch)
        whole([*trained, f"{scratch}/other"], scratch)
        second, first = MlflowClient().search_runs(["0", "1"])
        named = {"RUN": first.info.run_id, "OTHER": second.info.run_id}
        sides = {name: [*OURS, *(named.get(word, word) for word in words)] for name, words in COMMANDS.items()}
        sides["store alone"] = ["-c", STORE_ALONE]
        times = [{name: whole(words, scratch) for name, words in sides.items()} for _ in rounds]
        seconds = {name: statistics.median(found[name] for found in times) for name in sides}
        for name, words in {
            "train to the first image": ["train", "--no-log-models"],
            "eval to the first image": ["eval", str(saved)],
        }.items():
            seconds[name] = statistics.median(to_first_image(words, scratch) for _ in rounds)
    alone = seconds["store alone"]
    reading = {name: round(seconds[name] / alone, 2) for name in ("runs", "compare", "checkpoints ls")}
    rounded = {name: round(value, 3) for name, value in seconds.items()}
    report({**describe(), "seconds": rounded, "to_store_alone": reading})


if __name__ == "__main__":
    main()
