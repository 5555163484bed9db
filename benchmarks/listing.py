"""Time the listing of a large image folder, ours and that of torchvision's ImageFolder.

    python benchmarks/listing.py [--files 1300000] [--classes 1000]

Prints JSON: the seconds and the memory that each listing takes. The files are empty, since none is read.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import apart, describe, report

HOW = ("ours", "torchvision")


def make_files(root: Path, files: int, classes: int) -> None:
    """Create empty files with names as long as ImageNet's."""
    for label in range(classes):
        folder = root / f"n{label:08}"
        folder.mkdir(parents=True)
        for number in range(label, files, classes):
            os.close(os.open(folder / f"n{label:08}_{number:07}.JPEG", os.O_CREAT | os.O_WRONLY))


def measure(how: str, root: Path) -> dict[str, float]:
    """Return the seconds, and the growth of this process's memory in MB."""
    from torchvision.datasets import ImageFolder

    from shufflenet_mlflow.data.folder import list_images

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    if how == "torchvision":
        count = len(ImageFolder(os.fspath(root)))
    else:
        listing = list_images(root)
        count = len(listing)
        assert listing.digest
    seconds = time.perf_counter() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"files": count, "seconds": round(seconds, 3), "peak_mb": round(grown / 1024)}


def main() -> None:
    """Measure both in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=1_300_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        how, root = arguments.measure
        print(json.dumps(measure(how, Path(root))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "images"
        make_files(root, arguments.files, arguments.classes)
        results: dict[str, Any] = {}
        for how in HOW:
            results[how] = apart(__file__, how, root)
    report({**describe(), **results})


if __name__ == "__main__":
    main()
