"""Time commands: help, a usage error, listings, and `train` and `eval` up to the first image.

    python benchmarks/commands.py [--rounds 5]

Prints JSON with median seconds: of whole commands, and for `train` and `eval` from the start of the process until the
first images have been decoded. The embedded store has one run.
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

COMMANDS = {
    "--help": ["--help"],
    "train --help": ["train", "--help"],
    "usage error": ["train", "--lr", "fast"],
    "models": ["models"],
    "runs": ["runs"],
}

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
    """Return the seconds of a whole command."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "shufflenet_mlflow", *words], capture_output=True, cwd=folder)
    return time.perf_counter() - began


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
        trained = ["train", "--epochs", "1", "--save-dir", str(saved), "--no-log-models"]
        subprocess.run(
            [sys.executable, "-m", "shufflenet_mlflow", *trained], capture_output=True, cwd=scratch, check=True
        )
        seconds = {name: statistics.median(whole(words, scratch) for _ in rounds) for name, words in COMMANDS.items()}
        for name, words in {
            "train to the first image": ["train", "--no-log-models"],
            "eval to the first image": ["eval", str(saved)],
        }.items():
            seconds[name] = statistics.median(to_first_image(words, scratch) for _ in rounds)
    report({**describe(), "seconds": {name: round(value, 3) for name, value in seconds.items()}})


if __name__ == "__main__":
    main()
