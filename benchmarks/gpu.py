"""Run every benchmark that a GPU matters to, one after another, into one document; `make bench-gpu`.

    python benchmarks/gpu.py [--device auto] [--out gpu.json] [--quick] [--timm DIR]

Steps and training from files in float32, bf16 and compiled, with their floors; evaluation; bookkeeping, checkpoints'
stalls and whole jobs, which take the device that training chooses. A part that fails is named in the document, and the
rest goes on; the status is then 1. `--quick` makes each part short, to try the command, on a CPU too. JSON is printed
and written to `--out` after each part, so that nothing is lost when the machine has to be given back.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import add_device, choose_device, describe

FOLDER = Path(__file__).parent


def parts(device: str, *, quick: bool, timm: Path | None) -> dict[str, list[str]]:
    """Return the words of each part's command."""
    network = ["--models", "shufflenet_v2_x0_5"] if quick else []
    rounds = ["--rounds", "1"] if quick else []
    beside = ["--timm", str(timm.resolve())] if timm is not None else []
    chosen = ["--device", device]
    stall = ["--megabytes", "20", "--checkpoints", "2", "--sides", "ours"] if quick else []
    return {
        "training": ["training.py", *chosen, *network, *rounds, "--variants", "bf16", "compile"],
        "evaluation": ["evaluation.py", *chosen, *network, *rounds, *(["--images", "64"] if quick else [])],
        "bookkeeping": ["bookkeeping.py", *chosen, *rounds, *(["--iterations", "20"] if quick else [])],
        "first_step": ["first_step.py", *rounds],
        "whole_job": ["whole_job.py", *beside, *rounds, *(["--images", "80", "--epochs", "1"] if quick else [])],
        "checkpoint_stall": ["checkpoint_stall.py", *stall],
    }


def run(words: list[str]) -> dict[str, Any]:
    """Run one benchmark; return its document, or what went wrong."""
    script, *options = words
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, str(FOLDER / script), *options]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    took = {"command": " ".join(words), "took_s": round(time.perf_counter() - began, 1)}
    try:
        if ran.returncode == 0:
            return {**took, "result": json.loads(ran.stdout)}
    except json.JSONDecodeError:
        pass
    lines = ran.stderr.strip().splitlines() or [f"status {ran.returncode}"]
    return {**took, "failed": lines[-1]}


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--timm", type=Path, help="a checkout of timm, for whole jobs")
    given = parser.parse_args()
    device = choose_device(given.device)
    document: dict[str, Any] = {**describe(device), "device": device.type, "quick": given.quick}
    for name, words in parts(device.type, quick=given.quick, timm=given.timm).items():
        print(f"{name} …", file=sys.stderr, flush=True)
        document[name] = run(words)
        given.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))
    sys.exit(any("failed" in part for part in document.values() if isinstance(part, dict)))


if __name__ == "__main__":
    main()
