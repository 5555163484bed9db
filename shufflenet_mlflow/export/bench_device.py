#!/usr/bin/env python
"""Measure an exported network on this device: size, time to load, latency, memory.

Needs numpy and the runtime of the file, nothing else: onnxruntime for .onnx, openvino for .xml, torch for .pt2.

    python bench_device.py pets.int8.onnx > pets.json

`shufflenet runs log-bench RUN pets.json` puts the figures into the run. Copy this file, the network and, for .xml, the
.bin beside it to the device.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from typing import Any, Callable

import numpy as np

Loaded = Any
"""A function from pixels to logits, and the input size; or the runtime's version."""

FORMAT = "shufflenet bench-device 1"
UNSTEADY = 0.05
"""Repetitions whose medians differ by more than this share of the smallest are reported."""
REPETITIONS = 3


def main(arguments: list[str] | None = None) -> None:
    """Measure each file in processes of its own, and print one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", help="exported networks")
    parser.add_argument("--batches", default="1,8", help="batch sizes [1,8]")
    parser.add_argument("--threads", default="1,0", help="numbers of threads, 0 for all [1,0]")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each measurement [2]")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    batches = [int(word) for word in options.batches.split(",")]
    threads = [int(word) or cores() for word in options.threads.split(",")]
    if options.worker:
        print(json.dumps(measure(options.files[0], batches, threads[0], options.seconds)))
        return
    results = [measured(file, batches, sorted(set(threads)), options.seconds) for file in options.files]
    print(json.dumps({"format": FORMAT, "machine": machine(), "files": results}, indent=1))


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    model = platform.processor()
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith(("model name", "Model"))]
        model = names[0] if names else model
    except OSError:
        pass
    return {"cpu": model, "cores": cores(), "system": platform.platform(), "python": platform.python_version()}


def measured(path: str, batches: list[int], threads: list[int], seconds: float) -> dict[str, Any]:
    """Return the figures of one file: each number of threads in a process of its own."""
    document: dict[str, Any] = {
        "file": os.path.basename(path),
        "bytes": size(path),
        "sha256": digest(path),
        "measurements": [],
    }
    for number in threads:
        words = ["--worker", path, "--batches", ",".join(map(str, batches))]
        words += ["--threads", str(number), "--seconds", str(seconds)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(number)}
        done = subprocess.run(  # noqa: S603 - this program again
            [sys.executable, os.path.abspath(__file__), *words], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it ended without a word"]
            sys.exit(f"{path}: {lines[-1]}")
        document["measurements"].append(json.loads(done.stdout.splitlines()[-1]))
    return document


def parts(path: str) -> list[str]:
    """Return the files that belong to a network."""
    return [path, os.path.splitext(path)[0] + ".bin"] if path.lower().endswith(".xml") else [path]


def size(path: str) -> int:
    """Return the bytes of a network."""
    return sum(os.path.getsize(part) for part in parts(path))


def digest(path: str) -> str:
    """Return the SHA-256 of a network."""
    found = hashlib.sha256()
    for part in parts(path):
        with open(part, "rb") as file:
            found.update(file.read())
    return found.hexdigest()


def measure(path: str, batches: list[int], threads: int, seconds: float) -> dict[str, Any]:
    """Return the figures of one file with a number of threads."""
    imported = time.perf_counter()
    load = LOADERS[os.path.splitext(path)[1].lower()]
    runtime = load(path, threads, import_only=True)
    before, began = memory(), time.perf_counter()
    run, input_size = load(path, threads)
    loaded = time.perf_counter() - began
    rows = []
    for batch in batches:
        pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, input_size, input_size), dtype=np.uint8)
        repeated = [latencies(run, pixels, seconds / REPETITIONS) for _ in range(REPETITIONS)]
        medians = [float(np.median(times)) for times in repeated]
        times = np.concatenate(repeated)
        spread = (max(medians) - min(medians)) / min(medians)
        rows.append(
            {
                "batch": batch,
                "median_ms": 1e3 * float(np.median(times)),
                "p95_ms": 1e3 * float(np.percentile(times, 95)),
                "runs": len(times),
                "medians_ms": [1e3 * median for median in medians],
                "spread": spread,
                "steady": spread <= UNSTEADY,
            }
        )
    return {
        "threads": threads,
        "runtime": runtime,
        "input_size": input_size,
        "load_ms": 1e3 * loaded,
        "import_ms": 1e3 * (began - imported),
        "memory_mb": max(0.0, memory() - before) / 1e6,
        "latency": rows,
    }


def latencies(run: Callable[[Any], Any], pixels: Any, seconds: float) -> Any:
    """Return the seconds of single runs, after a warm-up of a fifth of the time."""
    end = time.perf_counter() + seconds / 5
    while True:
        run(pixels)
        if time.perf_counter() > end:
            break
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        run(pixels)
        times.append(time.perf_counter() - began)
    return np.array(times)


def memory() -> float:
    """Return the bytes that this process occupies; the most so far, where nothing else is known."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most


def load_onnx(path: str, threads: int, import_only: bool = False) -> Loaded:
    """Return a function from pixels to logits, and the input size."""
    import onnxruntime

    if import_only:
        return f"onnxruntime {onnxruntime.__version__}"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    taken = session.get_inputs()[0]
    return lambda pixels: session.run(None, {taken.name: pixels}), taken.shape[-1]


def load_openvino(path: str, threads: int, import_only: bool = False) -> Loaded:
    """Return a function from pixels to logits, and the input size."""
    import openvino

    if import_only:
        return f"openvino {openvino.__version__.partition('-')[0]}"
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads})
    return (lambda pixels: compiled(pixels)), compiled.input(0).partial_shape[3].get_length()


def load_pt2(path: str, threads: int, import_only: bool = False) -> Loaded:
    """Return a function from pixels to logits, and the input size."""
    import torch

    if import_only:
        return f"torch {torch.__version__}"
    torch.set_num_threads(threads)
    extra = {"classifier.json": ""}
    module = torch.export.load(path, extra_files=extra).module()
    crop = json.loads(extra["classifier.json"])["prepare"]["crop"]

    def run(pixels: Any) -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(pixels))

    return run, crop


LOADERS: dict[str, Callable[..., Loaded]] = {".onnx": load_onnx, ".xml": load_openvino, ".pt2": load_pt2}

if __name__ == "__main__":
    main()
