"""The latency of networks on this machine: a table, measured unit by unit, and the best networks as wholes.

Each branch of each unit is measured alone, on an image of its own size, with batch normalisation fused; so are the
first and the last layers. Rounds go over all of them, so that a change of the machine's load meets all alike, and the
median over the rounds counts. On a CPU it is the thread's own time, without what other processes take from it, which
would lengthen long measurements more than short ones. Sums over the table leave out what units cost each other, such as
caches; `Measured` says how far they are from networks as wholes.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shufflenet_mlflow.errors import ModelError, SearchError
from shufflenet_mlflow.models.catalog import create_model
from shufflenet_mlflow.models.fuse_bn import fuse_bn
from shufflenet_mlflow.models.oneshot import ShuffleNetOneShot
from shufflenet_mlflow.models.paths import CostTable
from shufflenet_mlflow.models.search_space import (
    BRANCHES,
    NETWORK,
    UNITS,
    WIDTHS,
    Genes,
    genes_in,
    network_of,
    options_of,
)
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.devices import choose_device, finish, move_model, processor
from shufflenet_mlflow.runtime.files import write_atomically
from shufflenet_mlflow.runtime.serialization import to_json
from shufflenet_mlflow.runtime.threads import threads_used
from shufflenet_mlflow.tracking.names import LATENCY_FILE
from shufflenet_mlflow.workflows.searching.workers import THREADS

MEASURED_FILE = "latency-of-the-best.json"
FORMAT = 1
ROUNDS = 50
WARM_UP = 5
"""Rounds before those that count."""
NS = 1_000_000
"""Nanoseconds in a millisecond."""


class LatencyTable(CostTable):
    """The latency of every network for one image, nanoseconds."""

    def ms(self, genes: Sequence[int]) -> float:
        """Return a network's latency, milliseconds."""
        return self.of(genes) / NS


@dataclass(frozen=True)
class Timer:
    """The subject of a measurement: networks of these classes on images of this size, on this device."""

    num_classes: int
    input_size: int
    device: str
    widths: bool = False
    """Whether units have widths, too."""

    @property
    def conditions(self) -> dict[str, Any]:
        """Return all that latencies depend on; those of two tables with the same can be compared."""
        kind = choose_device(self.device)
        name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else processor()
        sizes = {"num_classes": self.num_classes, "input_size": self.input_size, "batch_size": 1}
        return {**sizes, "device": kind.type, "processor": name, "threads": THREADS}

    @property
    def options(self) -> int:
        """Number of what a unit can be."""
        return BRANCHES * (len(WIDTHS) if self.widths else 1)

    def network(self, genes: Genes) -> ShuffleNetOneShot:
        """Return a network with random weights, as it is measured."""
        choices, scales = network_of(genes)
        model = fuse_bn(create_model(NETWORK, self.num_classes, choices=choices, scales=scales))
        model = move_model(model, choose_device(self.device))
        assert isinstance(model, ShuffleNetOneShot)  # noqa: S101 - that is its name
        return model.eval()

    def image(self) -> Tensor:
        """Return an input, float (1, 3, H, W)."""
        return torch.zeros(1, 3, self.input_size, self.input_size, device=choose_device(self.device))

    def table(self, context: JobContext) -> LatencyTable:
        """Measure every branch of every unit, in every width.

        Raises:
            StopRequested: a signal has arrived.
        """
        kinds = product(range(BRANCHES), *([range(len(WIDTHS))] if self.widths else []))
        networks = [self.network(tuple(gene for gene in kind for _ in range(UNITS))) for kind in kinds]
        parts: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []
        with torch.inference_mode():
            one = networks[0]
            parts.append((one.first_conv, self.image()))
            x_NCHW = one.first_conv(self.image())
            for number in range(UNITS):
                parts += [(network.features[number], x_NCHW) for network in networks]
                x_NCHW = one.features[number](x_NCHW)
            parts.append((_last_layers(one), x_NCHW))
        first, *units, last = self._medians(parts, context)
        rows = tuple(tuple(units[self.options * number : self.options * (number + 1)]) for number in range(UNITS))
        return LatencyTable(first + last, rows)

    def whole(self, networks: Sequence[Genes], context: JobContext) -> list[int]:
        """Measure networks as wholes; nanoseconds.

        Raises:
            StopRequested: a signal has arrived.
        """
        return self._medians([(self.network(one), self.image()) for one in networks], context)

    def _clock(self) -> Callable[[], int]:
        """Return what tells the time, nanoseconds; where the thread's own is too coarse, it is the wall clock."""
        is_cpu = choose_device(self.device).type == "cpu"
        fine = time.get_clock_info("thread_time").resolution <= 1e-6
        return time.thread_time_ns if is_cpu and fine else time.perf_counter_ns

    def _medians(self, parts: Sequence[tuple[Callable[[Tensor], Tensor], Tensor]], context: JobContext) -> list[int]:
        device, clock = choose_device(self.device), self._clock()
        times: list[list[int]] = [[] for _ in parts]
        with (
            threads_used(THREADS),
            torch.inference_mode(),
            context.reporter.phase("measuring latency", ROUNDS) as phase,
        ):
            for number in range(-WARM_UP, ROUNDS):
                context.stop.check()
                for (run, x_NCHW), found in zip(parts, times, strict=True):
                    finish(device)
                    began = clock()
                    run(x_NCHW)
                    finish(device)
                    if number >= 0:
                        found.append(clock() - began)
                if number >= 0:
                    phase.advance()
        return [round(statistics.median(found)) for found in times]


def _last_layers(network: ShuffleNetOneShot) -> nn.Sequential:
    return nn.Sequential(network.conv_last, network.globalpool, nn.Flatten(1), network.classifier)


def kept_table(folder: Path, timer: Timer, context: JobContext) -> LatencyTable:
    """Return the table in the folder of a search, which is measured if there is none.

    Raises:
        SearchError: what is there is no table of this search.
    """
    path = folder / LATENCY_FILE
    if not path.exists():
        table = timer.table(context)
        content = {"format": FORMAT, "unit": "ns", **timer.conditions, "rest": table.rest, "units": table.units}
        write_atomically(path, lambda file: file.write(to_json(content).encode()))
    try:
        stored = json.loads(path.read_bytes())
        units = tuple(tuple(int(cost) for cost in unit) for unit in stored["units"])
        own = ("num_classes", "input_size", "device")
        differs = [name for name in own if stored[name] != timer.conditions[name]]
        if differs or stored["format"] != FORMAT or [len(unit) for unit in units] != [timer.options] * UNITS:
            raise ValueError(f"it is of another {', '.join(differs) or 'format'}")
        if stored["processor"] != timer.conditions["processor"]:
            context.reporter.note(f"latencies are those of {stored['processor']}, where the search began")
        return LatencyTable(int(stored["rest"]), units)
    except (ValueError, TypeError, KeyError) as error:
        raise SearchError(
            f"{str(path)!r} holds no latencies of this search ({error}); remove the folder {str(folder)!r}, which "
            "begins the search anew",
            code="latency-table-unusable",
        ) from error


@dataclass(frozen=True)
class Measured:
    """Latencies of networks as the table predicts and as they were measured, milliseconds."""

    networks: tuple[tuple[Genes, float, float], ...]
    """Network, predicted, measured; the best network first."""

    @classmethod
    def of(cls, table: LatencyTable, networks: Sequence[Genes], timer: Timer, context: JobContext) -> "Measured":
        """Measure networks."""
        found = timer.whole(networks, context)
        return cls(tuple((one, table.ms(one), ns / NS) for one, ns in zip(networks, found, strict=True)))

    @classmethod
    def read(cls, folder: Path) -> "Measured | None":
        """Return what has been measured in a search's folder; None if nothing has, or it cannot be read."""
        try:
            networks = json.loads((folder / MEASURED_FILE).read_bytes())["networks"]
            return cls(tuple((genes_in(one), one["predicted_ms"], one["measured_ms"]) for one in networks))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ModelError):
            return None

    def write(self, folder: Path) -> None:
        """Keep it in a search's folder."""
        write_atomically(folder / MEASURED_FILE, lambda file: file.write(to_json(self.to_dict()).encode()))

    @property
    def bias(self) -> float:
        """Mean of measured over predicted latency, less 1."""
        return statistics.fmean(measured / predicted for _, predicted, measured in self.networks) - 1

    @property
    def error(self) -> float:
        """Mean absolute difference of predicted from measured latency, as a share of the measured."""
        return statistics.fmean(abs(predicted - measured) / measured for _, predicted, measured in self.networks)

    def to_dict(self) -> dict[str, Any]:
        """Return what `search --json` says of it."""
        networks = [
            {**options_of(genes), "predicted_ms": predicted, "measured_ms": measured}
            for genes, predicted, measured in self.networks
        ]
        return {"networks": networks, "mean_error": self.error, "bias": self.bias}

    def in_words(self, which: str = "the best") -> str:
        """Return the table's error in words.

        Args:
            which: the networks that were measured.
        """
        return (
            f"as wholes, {which} ({len(self.networks)}) take {abs(self.bias):.0%} "
            f"{'less' if self.bias < 0 else 'more'} time than the table says; its mean error is {self.error:.0%}"
        )
