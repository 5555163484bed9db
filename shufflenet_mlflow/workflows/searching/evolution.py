"""The candidates of a search, generation by generation: evolution as in arXiv:1904.00420, algorithm 1, or NSGA-II.

The two differ in who a generation's parents are, and in how one of them is drawn. Candidates follow from the scores of
the generations before theirs. Each is drawn by a generator of its own, seeded with the search's seed, the generation
and the candidate's place in it, so that neither the order in which candidates are scored nor an interruption has a part
in it. None exceeds the limit, and none comes twice.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from shufflenet_mlflow.config.search import SearchPlan
from shufflenet_mlflow.data.sampler import derive_seed
from shufflenet_mlflow.models.paths import CostTable, MacsTable, uniform_genes
from shufflenet_mlflow.models.search_space import UNITS, Genes, options_of
from shufflenet_mlflow.workflows.searching import pareto

SEARCH_STREAM = -3
"""Tells the seeds of candidates from all others."""
TRIES = 500
"""Draws from parents until one is new and within the limit; then the candidate is a random one."""
RANDOM_TRIES = 100_000
"""Random draws until one is new and within the limit; then the generation has one candidate less."""


@dataclass(frozen=True)
class Candidate:
    """A network of the search space."""

    generation: int
    """0 is the random one."""
    index: int
    """Place in the generation."""
    genes: Genes
    macs: int

    @property
    def choices(self) -> tuple[int, ...]:
        """The branch of each unit."""
        return self.genes[:UNITS]

    @property
    def place(self) -> tuple[int, int]:
        """Generation and index, in whose order candidates are drawn."""
        return self.generation, self.index

    @property
    def options(self) -> dict[str, str]:
        """The options of training that name it."""
        return options_of(self.genes)

    @property
    def listed(self) -> str:
        """Its options in words."""
        return " with scales ".join(self.options.values())


@dataclass(frozen=True)
class Scored(Candidate):
    """A candidate with its score."""

    correct: int
    """Images that it classified correctly."""
    images: int
    """Images that it was scored on."""

    @property
    def score(self) -> float:
        """Accuracy, in 0..1."""
        return self.correct / self.images


def ranked(candidates: Iterable[Scored]) -> list[Scored]:
    """Return candidates from the best to the worst; of equal ones, the one that was drawn first comes first."""
    return sorted(candidates, key=lambda candidate: (-candidate.correct, candidate.place))


def point(candidate: Scored, latency: CostTable | None) -> pareto.Point:
    """Return a candidate's mistakes, and its cost.

    Args:
        latency: nanoseconds; None where multiply-accumulates are the cost.
    """
    cost = candidate.macs if latency is None else latency.of(candidate.genes)
    return candidate.images - candidate.correct, cost


def front(candidates: Sequence[Scored], latency: CostTable | None) -> list[Scored]:
    """Return the candidates to which no other one is superior, in accuracy or cost; the cheapest first."""
    return [candidates[number] for number in pareto.front([point(one, latency) for one in candidates])]


def parents(plan: SearchPlan, before: Sequence[Scored], latency: CostTable | None = None) -> list[Scored]:
    """Return a generation's parents, the best first.

    Args:
        before: all candidates of the generations before it.
        latency: nanoseconds; None where multiply-accumulates are the cost.
    """
    if not plan.pareto:
        return ranked(before)[: plan.top]
    population: list[Scored] = []
    for _, new in groupby(before, key=lambda candidate: candidate.generation):
        pool = [*sorted(population, key=lambda candidate: candidate.place), *new]
        order = pareto.best_first([point(candidate, latency) for candidate in pool])
        population = [pool[number] for number in order[: plan.top]]
    return population


def within(plan: SearchPlan, macs: MacsTable, latency: CostTable | None, genes_PG: Tensor) -> Tensor:
    """Return bool (P): which of P networks are within the limit.

    Args:
        latency: nanoseconds; None where multiply-accumulates are limited.
        genes_PG: int64 (P, 20 or 40).
    """
    if latency is not None and plan.latency_limit is not None:
        return latency.of_many(genes_PG) <= round(plan.latency_limit * 1e6)
    assert plan.macs_limit is not None  # noqa: S101 - there is one of the two
    return macs.of_many(genes_PG) <= plan.macs_limit


def propose(
    plan: SearchPlan,
    table: MacsTable,
    generation: int,
    before: Sequence[Scored],
    latency: CostTable | None = None,
) -> list[Candidate]:
    """Return the candidates of a generation; fewer than asked for where hardly any new ones are within the limit.

    Args:
        before: all candidates of the generations before it.
        latency: nanoseconds; None where multiply-accumulates are limited.
    """
    seen = {candidate.genes for candidate in before}
    chosen = [candidate.genes for candidate in parents(plan, before, latency)]
    found = []
    for index in range(plan.population):
        generator = torch.Generator().manual_seed(derive_seed(plan.seed, SEARCH_STREAM, generation, index))
        draw = partial(uniform_genes, generator=generator, widths=table.has_widths)
        genes = _draw(plan, index, chosen, seen, generator, draw, partial(within, plan, table, latency))
        if genes is not None:
            seen.add(genes)
            found.append(Candidate(generation, index, genes, table.macs(genes)))
    return found


def _draw(
    plan: SearchPlan,
    index: int,
    parents: list[Genes],
    seen: set[Genes],
    generator: torch.Generator,
    draw: Callable[[int], Tensor],
    are_within: Callable[[Tensor], Tensor],
) -> Genes | None:
    """Return a candidate that is new and within the limit; None if none was found."""

    def is_legal(genes: Genes) -> bool:
        return genes not in seen and bool(are_within(torch.tensor([genes])))

    parent = partial(_one_of, parents, generator, 2 if plan.pareto else 1)
    make: Callable[[], Tensor] | None = None
    if parents and index < plan.mutations:
        make = lambda: _mutated(parent, plan.mutation_probability, generator)  # noqa: E731
    elif parents and index < plan.mutations + plan.crossovers:
        make = lambda: _crossed(parent, generator)  # noqa: E731
    for _ in range(TRIES if make is not None else 0):
        genes = tuple(make().tolist())  # type: ignore[misc]  # there is one
        if is_legal(genes):
            return genes
    for _ in range(RANDOM_TRIES // TRIES):
        drawn_TG = draw(TRIES)
        for genes in map(tuple, drawn_TG[are_within(drawn_TG)].tolist()):
            if genes not in seen:
                return genes
    return None


def _one_of(parents: list[Genes], generator: torch.Generator, draws: int) -> Tensor:
    """Return the genes, int64 (G), of the best of so many random parents."""
    return torch.tensor(parents[int(torch.randint(len(parents), (draws,), generator=generator).min())])


def _mutated(parent: Callable[[], Tensor], probability: float, generator: torch.Generator) -> Tensor:
    """Return a parent's genes, int64 (G), each drawn anew with this probability."""
    parent_G = parent()
    is_drawn_G = torch.rand(len(parent_G), generator=generator) < probability
    [drawn_G] = uniform_genes(1, generator, widths=len(parent_G) > UNITS)
    return torch.where(is_drawn_G, drawn_G, parent_G)


def _crossed(parent: Callable[[], Tensor], generator: torch.Generator) -> Tensor:
    """Return genes, int64 (G), each of one of two parents."""
    first_G, second_G = parent(), parent()
    return torch.where(torch.rand(len(first_G), generator=generator) < 0.5, first_G, second_G)
