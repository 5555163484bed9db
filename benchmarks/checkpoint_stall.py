"""Measure how long a checkpoint to the local disk and to MLflow blocks the training loop.

The same network is trained for the same number of iterations with each of these, one after the other, each in a
process of its own, with one local `mlflow server`:

- `ours`: `TrackedStore.save` of this project, which copies the state and does the rest in the background
- `inline`: `torch.save`, then `MlflowClient.log_artifact`, in the loop
- `lightning`: PyTorch Lightning's `ModelCheckpoint` with its `MLFlowLogger(log_model="all")`
- `mlflow_callback`: MLflow's own `MlflowModelCheckpointCallback` for Lightning, which keeps no file on the disk
- `ignite`: Ignite's `Checkpoint` with `DiskSaver`, then `log_artifact` through its `MLflowLogger`

`memory_copy` is the time of one copy of the same state into allocated memory, the least that any copy blocks.

Every checkpoint holds the network's state and SGD's momentum. On every side the same two hooks take the time: at the
start of the forward pass, and at the end of the optimizer's step. The gap from that end to the next start is what the
loop spends on anything other than training. A checkpoint blocks for the gap after it, minus the median gap without a
checkpoint. Work in the background takes processor time from the steps: compare `loop_s`, the time from the first step
to the last, and `total_s`, until everything has arrived and the run has ended. `cpu_of_others_s` is the processor time
of the server and everything else on the machine: if it is large, or differs between sides, the machine was too busy for
a comparison.

The sides do not do the same work: only `ours` syncs each file to the disk, hashes it, reads it back, and confirms what
arrived; `cpu_s` includes that.

Unless `--interval` is given, training between two checkpoints takes as long as a checkpoint of `inline`, and at least
20 iterations of the small network.

    pip install lightning pytorch-ignite    # sides whose package is missing are skipped
    PYTHONPATH=. python benchmarks/checkpoint_stall.py --megabytes 20 1000 --json stall.json

It prints one JSON document; progress goes to stderr. Times are in ms where a name ends in `_ms` and in seconds where
it ends in `_s`; memory, which needs Linux, is in MB of 10^6 bytes. The large network needs 10 GB below TMPDIR.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from checkpoint_sides import FORMATS, NEEDS, SIDES, Job, Training, artifact_files, make_experiment, new_run
from torch import nn

NETWORKS = {20: "shufflenet_v2_x1_0", 1000: "shufflenet_v2_large"}
"""Megabytes of state, roughly -> network."""

CHECKPOINTS = {20: 5, 1000: 3}
LEAST_INTERVAL = {20: 20, 1000: 3}
WARM_UP = 6
"""Iterations before the measurement: the first ones are slow, and momentum exists only after one."""

SIDE_WITHIN = 1800.0


def say(text: str) -> None:
    """Print progress to stderr; stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


# Measuring, in the process of one side


@dataclass
class Clock:
    """Records start and end of each step, by hooks on network and optimizer, and memory before the first save."""

    interval: int
    begins: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    cpu: tuple[float, float | None] = (0.0, None)
    before: dict[str, float] = field(default_factory=dict)

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Start the clock."""
        self.cpu = cpu_seconds()
        model.register_forward_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self.begins.append(time.perf_counter())

    def _end(self, *_: Any) -> None:
        if len(self.ends) + 1 == self.interval:
            self.before = memory()
        self.ends.append(time.perf_counter())

    def stop(self) -> dict[str, float | None]:
        """Return the time until everything arrived, and the processor time of this process and of all others."""
        total = time.perf_counter() - self.begins[0]
        (own_before, all_before), (own, every) = self.cpu, cpu_seconds()
        others = None if every is None or all_before is None else every - all_before - (own - own_before)
        return {"total_s": total, "cpu_s": own - own_before, "cpu_of_others_s": others}

    def gaps(self) -> tuple[list[float], list[float]]:
        """Return the gaps with a checkpoint and those without, in seconds."""
        gaps = [begin - end for end, begin in zip(self.ends, self.begins[1:], strict=False)]
        saved = range(self.interval - 1, len(gaps), self.interval)
        others = [gap for index, gap in enumerate(gaps) if index not in saved]
        return [gaps[index] for index in saved], others

    def figures(self) -> dict[str, Any]:
        """Return the times of the loop."""
        saved, others = self.gaps()
        ordinary = statistics.median(others)
        blocked = [1e3 * (gap - ordinary) for gap in saved]
        steps = [end - begin for begin, end in zip(self.begins, self.ends, strict=True)]
        return {
            "blocked_ms_median": statistics.median(blocked),
            "blocked_ms_max": max(blocked),
            "blocked_ms_all": blocked,
            "gap_without_checkpoint_ms": 1e3 * ordinary,
            "step_ms_median": 1e3 * statistics.median(steps),
            "step_ms_mean": 1e3 * statistics.fmean(steps),
            "step_ms_max": 1e3 * max(steps),
            "loop_s": self.ends[-1] - self.begins[0],
        }


def cpu_seconds() -> tuple[float, float | None]:
    """Return the processor time of this process and of the whole machine; None if the latter is unknown."""
    own = time.process_time()
    try:
        words = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    except OSError:
        return own, None
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, words)
    return own, (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")


def memory() -> dict[str, float]:
    """Return the process's current and peak memory in MB; empty if unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    rss, peak = (float(fields[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))
    return {"rss_mb": rss, "peak_mb": peak}


def measure(job: Job) -> dict[str, Any]:
    """Return the figures of one side."""
    from shufflenet_mlflow.tracking.client import prepare_environment

    prepare_environment()
    job.local.mkdir()
    training, clock = Training.of(job.network), Clock(job.interval)
    for _ in range(WARM_UP):
        training.step()
    clock.watch(training.model, training.optimizer)
    run_id = SIDES[job.side](job, training)
    total, after, state_bytes = clock.stop(), memory(), training.state_bytes()
    arrived = artifact_files(job, run_id)
    large = sorted(path for path, size in arrived.items() if size > state_bytes / 2)
    return {
        **clock.figures(),
        **total,
        **memory_figures(clock.before, after, state_bytes),
        "format": FORMATS[job.side],
        "checkpoint_bytes": max(arrived.values(), default=0),
        "checkpoints_arrived": len(large),
        "all_arrived": len(large) == job.checkpoints,
        "artifacts": len(arrived),
        "first_artifacts": sorted(arrived)[:3],
        "files_kept_on_disk": sum(path.stat().st_size > state_bytes / 2 for path in job.local.iterdir()),
    }


def memory_figures(before: Mapping[str, float], after: Mapping[str, float], state_bytes: int) -> dict[str, Any]:
    """Return the memory that saving took, in MB and in copies of the state."""
    if not before or not after:
        return {"peak_rss_mb": None}
    return {
        "peak_rss_mb": after["peak_mb"],
        "rss_before_mb": before["rss_mb"],
        "peak_before_mb": before["peak_mb"],
        "peak_over_rss_before_copies": (after["peak_mb"] - before["rss_mb"]) * 1e6 / state_bytes,
        "peak_over_peak_before_copies": (after["peak_mb"] - before["peak_mb"]) * 1e6 / state_bytes,
    }


def measure_reference(job: Job) -> dict[str, Any]:
    """Return the times of a copy of the state, a step, and a checkpoint of `inline`."""
    from mlflow import MlflowClient

    job.local.mkdir()
    training = Training.of(job.network)
    for _ in range(WARM_UP):
        training.step()
    steps = [seconds_of(training.step) for _ in range(WARM_UP)]
    sources = training.tensors()
    targets = [torch.zeros_like(tensor) for tensor in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    copies = [seconds_of(copy) for _ in range(5)]
    client, run_id, path = MlflowClient(job.uri), new_run(job), job.local / "checkpoint.pth"

    def save() -> None:
        torch.save(training.state(), path)
        client.log_artifact(run_id, str(path))

    return {
        "copy_ms_median": 1e3 * statistics.median(copies),
        "copy_ms_max": 1e3 * max(copies),
        "tensors": len(sources),
        "state_bytes": training.state_bytes(),
        "step_ms": 1e3 * statistics.median(steps),
        "inline_save_ms": 1e3 * min(seconds_of(save) for _ in range(2)),
    }


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def work_as_side(text: str, result: Path) -> None:
    """Measure one side and write its figures to `result`."""
    job = Job(**json.loads(text))
    figures = measure_reference(job) if job.side == "memory_copy" else measure(job)
    result.write_text(json.dumps(figures))


# Running the sides, each in a process of its own


@contextmanager
def process_group(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process, and kill it with its children at the end of the block; its stdout goes to stderr."""
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True, **options)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_side(job: Job) -> dict[str, Any]:
    """Return the figures of one side from a process of its own, and remove its files."""
    needs = NEEDS.get(job.side)
    if needs is not None and importlib.util.find_spec(needs) is None:
        return {"skipped": f"{needs} is not installed"}
    say(f"  {job.side} ...")
    folder = Path(job.directory)
    folder.mkdir()
    result = folder / "result.json"
    command = [sys.executable, __file__, "--side", json.dumps(asdict(job)), "--json", str(result)]
    environment = {**os.environ, "TMPDIR": str(folder), "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    try:
        with process_group(command, cwd=folder, env=environment) as process:
            try:
                code = process.wait(SIDE_WITHIN)
            except subprocess.TimeoutExpired:
                return {"error": f"did not end within {SIDE_WITHIN:.0f} s"}
        return json.loads(result.read_text()) if code == 0 else {"error": f"ended with status {code}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def choose_interval(megabytes: int, reference: Mapping[str, Any]) -> int:
    """Return as many iterations as a checkpoint of `inline` takes, and at least `LEAST_INTERVAL`."""
    return max(LEAST_INTERVAL[megabytes], math.ceil(reference["inline_save_ms"] / reference["step_ms"]))


def compare(megabytes: int, sides: Sequence[str], checkpoints: int | None, interval: int | None) -> dict[str, Any]:
    """Return the figures of all sides at one size."""
    from tests.support.mlflow_server import Server

    with tempfile.TemporaryDirectory(prefix="checkpoint_stall-") as name, ExitStack() as stack:
        folder, network = Path(name), NETWORKS[megabytes]
        server = Server(folder, env={"TMPDIR": name})
        stack.callback(server.kill)
        make_experiment(server.uri)
        say(f"{network}:")

        def run(side: str, interval: int) -> dict[str, Any]:
            job = Job(side, network, server.uri, str(folder / side), checkpoints or CHECKPOINTS[megabytes], interval)
            try:
                return run_side(job)
            finally:
                shutil.rmtree(folder / "artifacts", ignore_errors=True)
                os.sync()  # unwritten data of one side must not slow the next one down

        reference = run("memory_copy", 1)
        if "error" in reference:
            raise SystemExit(f"the reference cannot be measured: it {reference['error']}")
        interval = interval or choose_interval(megabytes, reference)
        figures = {side: run(side, interval) for side in sides}
    return {
        "network": network,
        "interval": interval,
        "checkpoints": checkpoints or CHECKPOINTS[megabytes],
        "memory_copy": reference,
        "sides": figures,
        "ours_to": ratios(figures, reference),
    }


def ratios(figures: Mapping[str, Mapping[str, Any]], reference: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return our figures divided by those of each other side."""
    ours = figures.get("ours", {})
    names = ("blocked_ms_median", "blocked_ms_max", "loop_s", "total_s")
    found = {
        side: {name: ours[name] / other[name] for name in names}
        for side, other in figures.items()
        if side != "ours" and "loop_s" in ours and "loop_s" in other
    }
    if "loop_s" in ours:
        found["memory_copy"] = {"blocked_ms_median": ours["blocked_ms_median"] / reference["copy_ms_median"]}
    return found


def machine() -> dict[str, Any]:
    """Return cores, threads, system and versions."""
    packages = ("torch", "mlflow", "lightning", "pytorch-lightning", "pytorch-ignite", "shufflenet-mlflow")
    return {
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version_of(package) for package in packages},
    }


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def rounded(value: Any) -> Any:
    """Round floats to four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--megabytes", type=int, nargs="+", choices=sorted(NETWORKS), default=sorted(NETWORKS))
    parser.add_argument("--checkpoints", type=int, help="on every side; by default 5 small or 3 large ones")
    parser.add_argument("--interval", type=int, help="iterations between checkpoints; by default see above")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--json", type=Path, help="write the document there too")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # a job: this is the process of one side
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.side is not None:
        work_as_side(arguments.side, arguments.json)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # everything is removed on the way out
    sizes = {
        f"{megabytes} MB": compare(megabytes, arguments.sides, arguments.checkpoints, arguments.interval)
        for megabytes in arguments.megabytes
    }
    text = json.dumps(rounded({"machine": machine(), "sizes": sizes}), indent=2)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
