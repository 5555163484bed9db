"""Utilisation of the machine while it trains: MLflow's own monitors, delivered through the journal.

MLflow's own thread would talk to the server directly, and lose its points while the server is away.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from shufflenet_mlflow.tracking.messages import MetricPoints, now_ms
from shufflenet_mlflow.tracking.names import SYSTEM_SECTION
from shufflenet_mlflow.tracking.recorder import Recorder

logger = logging.getLogger(__name__)

INTERVAL_VARIABLE = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
INTERVAL = 10.0
"""Seconds between samples, unless the variable says otherwise."""

LONGEST_INTERVAL = 86_400.0


class SystemMetrics:
    """As a context manager, samples in a thread while the block runs.

    A point's step is the iteration at which it was taken, as in the training curves; samples within one iteration,
    such as those of a long validation, are averaged.

    Args:
        iters: returns the current iteration.
    """

    def __init__(self, recorder: Recorder, iters: Callable[[], int]) -> None:
        self._recorder, self._iters = recorder, iters
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "SystemMetrics":
        monitors = _monitors()
        if monitors:
            self._thread = threading.Thread(target=self._work, args=(monitors,), name="system metrics", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self, monitors: list[Any]) -> None:
        pause, iters = _interval(), self._iters()
        with contextlib.suppress(Exception):  # which the loop reports
            for monitor in monitors:
                monitor.collect_metrics()  # a processor's load counts from the look before
                monitor.clear_metrics()
        while not self._ended.wait(pause):
            try:
                for monitor in monitors:
                    monitor.collect_metrics()
                now = self._iters()
                if now == iters:
                    continue
                iters = now
                self._send(monitors, iters)
            except Exception as error:  # noqa: BLE001 - whatever a driver raises, training is worth more
                logger.warning("no system metrics from here on: %s", error)
                return

    def _send(self, monitors: list[Any], iters: int) -> None:
        values: dict[str, float] = {}
        for monitor in monitors:
            values |= {f"{SYSTEM_SECTION}{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        if values:
            self._recorder.record(MetricPoints(values, iters, now_ms()))


def _interval() -> float:
    try:
        seconds = float(os.environ.get(INTERVAL_VARIABLE) or INTERVAL)
    except ValueError:
        return INTERVAL
    return seconds if 0 < seconds < LONGEST_INTERVAL else INTERVAL


def _monitors() -> list[Any]:
    """Return the monitors that work here; none without psutil."""
    try:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    except ImportError:
        return []
    monitors: list[Any] = []
    kinds: list[Any] = [CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor]
    for kind in kinds:
        with contextlib.suppress(Exception):  # no NVIDIA GPU, no package that reads it, no network, …
            monitors.append(kind())
    return monitors
