"""How far inherited scores can be trusted: random networks, each trained briefly, compared with what they inherit.

The networks follow from the search's seed and their number. Each comparison stands in `trust.jsonl`, on the disk before
the next; one that a killed process was at is trained again, with the same result.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shufflenet_mlflow.config.search import SearchPlan
from shufflenet_mlflow.data.sampler import derive_seed
from shufflenet_mlflow.errors import ConfigError, ModelError, SearchError
from shufflenet_mlflow.models.paths import CostTable, MacsTable, uniform_genes
from shufflenet_mlflow.models.search_space import Genes, genes_in, options_of
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.tracking.names import TRUST_FILE
from shufflenet_mlflow.workflows.searching.evolution import Candidate, within
from shufflenet_mlflow.workflows.searching.record import append_line, complete_lines

TRUST_STREAM = -4
"""Tells the seeds of these networks, and of the interval, from all others."""
TRIES = 100_000
"""Random draws until one is within the limit."""
RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Compared:
    """A random network with both of its accuracies, on the same held-out images."""

    index: int
    epochs: int
    """Length of its training."""
    genes: Genes
    macs: int
    inherited: int
    """Images that it classifies correctly with the supernet's weights."""
    trained: int
    """Images that it classifies correctly after a training of its own."""
    images: int

    @property
    def line(self) -> dict[str, Any]:
        """Return its line of the record."""
        values = asdict(self)
        return {"index": self.index, "epochs": self.epochs, **options_of(values.pop("genes")), **values}

    @classmethod
    def of(cls, line: Any) -> "Compared":
        """Build from `line`."""
        names = ("index", "epochs", "macs", "inherited", "trained", "images")
        return cls(**{name: int(line[name]) for name in names}, genes=genes_in(line))


@dataclass(frozen=True)
class Trust:
    """The result of the comparisons."""

    compared: tuple[Compared, ...]

    @property
    def epochs(self) -> int:
        """Length of the trainings."""
        return self.compared[0].epochs

    def tau(self) -> float | None:
        """Return Kendall's tau (b, which allows for ties); None where all accuracies of one kind are equal."""
        return _tau(*self._accuracies())

    def interval(self, seed: int) -> tuple[float, float] | None:
        """Return the limits of the bootstrap interval: percentiles over networks drawn again; None as for `tau`."""
        if self.tau() is None:
            return None
        inherited_N, trained_N = self._accuracies()
        generator = np.random.Generator(np.random.PCG64(derive_seed(seed, TRUST_STREAM)))
        draws_RN = generator.integers(len(inherited_N), size=(RESAMPLES, len(inherited_N)))
        taus = [tau for draw_N in draws_RN if (tau := _tau(inherited_N[draw_N], trained_N[draw_N])) is not None]
        low, high = np.quantile(taus, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    def to_dict(self, seed: int) -> dict[str, Any]:
        """Return what `search --json` says of it.

        Args:
            seed: of the search.
        """
        interval = self.interval(seed)
        return {
            "tau": self.tau(),
            "interval": None if interval is None else list(interval),
            "level": LEVEL,
            "epochs": self.epochs,
            "networks": [
                {**one.line, "inherited": one.inherited / one.images, "trained": one.trained / one.images}
                for one in self.compared
            ],
        }

    def metrics(self, seed: int) -> dict[str, float]:
        """Return tau and the limits of its interval by name; none of them where tau is undefined."""
        tau, interval = self.tau(), self.interval(seed)
        if tau is None or interval is None:
            return {}
        return {"trust_tau": tau, "trust_tau_low": interval[0], "trust_tau_high": interval[1]}

    def in_words(self, seed: int) -> str:
        """Return the result in words."""
        of = f"{counted(len(self.compared), 'random network')}, {counted(self.epochs, 'epoch')} of training each"
        tau, interval = self.tau(), self.interval(seed)
        if tau is None or interval is None:
            return f"Kendall's tau is undefined, since all inherited or all trained accuracies are equal ({of})"
        low, high = interval
        return f"Kendall's tau {tau:.2f}, {LEVEL:.0%} interval {low:.2f} to {high:.2f} ({of})"

    def lines(self) -> str:
        """Return all comparisons, one JSON object a line."""
        return "".join(f"{json.dumps(one.line)}\n" for one in self.compared)

    def _accuracies(self) -> tuple["np.typing.NDArray[np.float64]", "np.typing.NDArray[np.float64]"]:
        inherited = [one.inherited / one.images for one in self.compared]
        return np.array(inherited), np.array([one.trained / one.images for one in self.compared])


def _tau(first_N: "np.typing.NDArray[np.float64]", second_N: "np.typing.NDArray[np.float64]") -> float | None:
    from scipy.stats import kendalltau

    if len(set(first_N)) < 2 or len(set(second_N)) < 2:
        return None
    return float(kendalltau(first_N, second_N).statistic)


def random_networks(
    plan: SearchPlan, table: MacsTable, count: int, latency: CostTable | None = None
) -> list[Candidate]:
    """Return so many networks within the limit, each drawn from seed and number; none comes twice.

    Raises:
        SearchError: hardly any are within the limit.
    """
    found: list[Candidate] = []
    for index in range(count):
        generator = torch.Generator().manual_seed(derive_seed(plan.seed, TRUST_STREAM, index))
        seen = {one.genes for one in found}
        for _ in range(100):
            drawn_TG = uniform_genes(TRIES // 100, generator, widths=table.has_widths)
            legal = map(tuple, drawn_TG[within(plan, table, latency, drawn_TG)].tolist())
            new = next((genes for genes in legal if genes not in seen), None)
            if new is not None:
                break
        else:
            raise SearchError(
                f"fewer than --trust (={count}) networks within {plan.limit} were found; raise "
                "the limit, or lower --trust",
                code="trust-too-few",
            )
        found.append(Candidate(0, index, new, table.macs(new)))
    return found


class TrustRecord:
    """The comparisons in a search's folder. The caller holds the lock of the folder.

    Raises:
        ConfigError: they are of trainings of another length.
        SearchError: they cannot be read.
    """

    def __init__(self, folder: Path, epochs: int | None = None) -> None:
        self._path = folder / TRUST_FILE
        try:
            self.compared = [Compared.of(json.loads(line)) for line in complete_lines(self._path)]
        except (ValueError, TypeError, KeyError, AttributeError, ModelError) as error:
            raise SearchError(
                f"{str(self._path)!r} is damaged ({type(error).__name__}: {error}); remove it, and the same command "
                "trains anew",
                code="trust-record-damaged",
            ) from error
        before = next((one.epochs for one in self.compared if epochs not in (None, one.epochs)), None)
        if before is not None:
            raise ConfigError(
                f"--trust-epochs (={epochs}) is not that of the networks in {str(self._path)!r} (={before}); leave it "
                "as it was, or remove the file",
                code="trust-differs",
            )

    def require_same(self, networks: Sequence[Candidate]) -> None:
        """Raise SearchError if the networks of the record are not these."""
        for one, network in zip(self.compared, networks, strict=False):
            if one.genes != network.genes:
                raise SearchError(
                    f"{str(self._path)!r} has other networks than this version of the package draws; remove it, or go "
                    "on with the version that began it",
                    code="trust-record-differs",
                )

    def append(self, compared: Compared) -> None:
        """Write a comparison down; it is on the disk on return.

        Raises:
            SearchError: it cannot be written.
        """
        append_line(self._path, compared.line)
        self.compared.append(compared)
