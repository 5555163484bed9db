"""The plan of a search: everything that decides its candidates and their scores."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from shufflenet_mlflow.config.rules import check_batch_to_train, check_options, option
from shufflenet_mlflow.errors import ConfigError

PUBLISHED: dict[str, Any] = {
    "population": 50,
    "generations": 20,
    "top": 10,
    "mutation_probability": 0.1,
    "bn_images": 25_600,
    "batch_size": 128,
    "seed": 0,
}
"""Option -> its default: the release's, whose statistics are of 200 batches of 128."""


TRUST_EPOCHS = 5
"""Length of the trainings that inherited scores are compared with."""


@dataclass(frozen=True)
class SearchPlan:
    """Options that decide a search: two searches of one plan have the same candidates with the same scores."""

    macs_limit: int | None
    """The most multiply-accumulates of a candidate, at the supernet's input size and number of classes; None where
    latency decides."""
    population: int
    """Candidates of a generation."""
    generations: int
    """Generations after the first, which is random."""
    top: int
    """Parents of a generation: the best candidates so far; for a front, as many as a generation has."""
    mutations: int
    """Candidates of a generation that are changed copies of a parent."""
    crossovers: int
    """Candidates of a generation that take each branch from one of two parents; the rest are random."""
    mutation_probability: float
    """Probability of another branch, for each unit."""
    bn_images: int
    """Training images for BN statistics."""
    score_images: int
    """Held-out images that candidates are scored on."""
    batch_size: int
    """Images of a forward pass, over which batch normalisation averages."""
    seed: int
    supernet: str = ""
    """SHA-256 of the supernet's checkpoint."""
    bn_digest: str = ""
    """Identity of the images for BN statistics; that of those for scores is `score_digest`."""
    score_digest: str = ""
    latency_limit: float | None = None
    """The longest latency of a candidate, milliseconds, by the table in the search's folder."""
    pareto: bool = False
    """Whether a front is searched, of accuracy and cost; otherwise the highest accuracy."""
    device: str = "cpu"
    """Kind of the device that computes: scores differ between kinds."""

    @property
    def candidates(self) -> int:
        """The most candidates of the search."""
        return self.population * (self.generations + 1)

    @property
    def limit(self) -> str:
        """The limit as the command line takes it."""
        if self.latency_limit is not None:
            return f"{option('latency_limit')} (={self.latency_limit:g})"
        return f"{option('macs_limit')} (={self.macs_limit:,})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by field."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SearchPlan":
        """Build from the output of `to_dict`.

        Raises:
            TypeError: a field is missing, or there is one too many.
        """
        return cls(**values)

    def differences(self, other: "SearchPlan") -> list[str]:
        """Return the fields that differ."""
        return [entry.name for entry in fields(self) if getattr(self, entry.name) != getattr(other, entry.name)]


def completed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a search that depend on neither supernet nor images, each with a value.

    Raises:
        ConfigError: a value cannot work, or more candidates are to be changed ones than a generation has.
    """
    given = {name: value for name, value in options.items() if value is not None}
    check_options(given)
    values = {**PUBLISHED, **{name: given[name] for name in PUBLISHED if name in given}}
    check_batch_to_train(values["batch_size"])
    values["pareto"] = bool(given.get("pareto"))
    if values["pareto"]:
        values["top"] = values["population"]
    for name in ("mutations", "crossovers"):
        values[name] = given.get(name, values["population"] // 2)
    changed = values["mutations"] + values["crossovers"]
    if changed > values["population"]:
        raise ConfigError(
            f"{option('mutations')} (={values['mutations']}) and {option('crossovers')} (={values['crossovers']}) are "
            f"together more than a generation has, {option('population')} (={values['population']}); lower one of them",
            code="search-population",
        )
    return values


def check_trust(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for a length of trainings of which there are none."""
    if options.get("trust_epochs") is not None and options.get("trust") is None:
        raise ConfigError(
            f"{option('trust_epochs')} (={options['trust_epochs']}) is the length of the trainings of "
            f"{option('trust')}, which is missing; give it, or leave out {option('trust_epochs')}",
            code="trust-epochs-alone",
        )
