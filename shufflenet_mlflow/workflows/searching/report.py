"""The report of a search: the document of `search --json`, its list of candidates, its description."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shufflenet_mlflow.config import option
from shufflenet_mlflow.config.search import SearchPlan
from shufflenet_mlflow.errors import ModelError
from shufflenet_mlflow.models.search_space import NETWORK, Genes, genes_in, options_of
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.tracking.note import Note, indented
from shufflenet_mlflow.workflows.searching.evolution import Scored, front, ranked
from shufflenet_mlflow.workflows.searching.latency import LatencyTable, Measured
from shufflenet_mlflow.workflows.searching.record import line_of
from shufflenet_mlflow.workflows.searching.trust import Trust


@dataclass(frozen=True)
class SearchReport:
    """A search as it stands."""

    plan: SearchPlan
    candidates: tuple[Scored, ...]
    """In the order in which they were drawn."""
    num_classes: int
    input_size: int
    is_complete: bool = False
    trust: Trust | None = None
    """How far scores agree with the accuracies of trained networks, if any were trained."""
    latency: LatencyTable | None = None
    """The cost of candidates, and what limits it; None where it is multiply-accumulates."""
    measured: Measured | None = None
    """The latencies of the best ones as wholes, once they have been measured."""

    @property
    def sizes(self) -> dict[str, int]:
        """Return the sizes of input and output."""
        return {"input_size": self.input_size, "num_classes": self.num_classes}

    @property
    def best(self) -> Scored | None:
        """The candidate with the highest score, of a front its last one; None before the first."""
        return self.front[-1] if self.front else next(iter(self.top(1)), None)

    @cached_property
    def front(self) -> list[Scored]:
        """The candidates to which no other one is superior, the cheapest first; none if no front is searched."""
        return front(self.candidates, self.latency) if self.plan.pareto else []

    def chosen(self, count: int) -> list[Scored]:
        """Return the candidates that the search is for: the front, or so many of the best, the best first."""
        return self.front if self.plan.pareto else self.top(count)

    def top(self, count: int) -> list[Scored]:
        """Return the best candidates, the best first."""
        return ranked(self.candidates)[:count]

    def to_dict(self) -> dict[str, Any]:
        """Return what `search --json` says of the search itself."""
        best = self.best
        return {
            "best": None if best is None else _entry(best),
            "front": self._front_entries() if self.plan.pareto else None,
            "candidates": [{**_entry(scored), "generation": scored.generation} for scored in self.candidates],
            "macs_limit": self.plan.macs_limit,
            "latency_limit": self.plan.latency_limit,
            "latency": None if self.measured is None else self.measured.to_dict(),
            "is_complete": self.is_complete,
            "trust": None if self.trust is None else self.trust.to_dict(self.plan.seed),
        }

    def _front_entries(self) -> list[dict[str, Any]]:
        return [
            {
                "place": place,
                **_entry(one),
                **({} if self.latency is None else {"latency_ms": self.latency.ms(one.genes)}),
                "generation": one.generation,
            }
            for place, one in enumerate(self.front, 1)
        ]

    def pareto(self) -> dict[str, Any]:
        """Return the content of `pareto.json`."""
        front = [
            {**entry, "correct": one.correct, "images": one.images, "command": train_command(one)}
            for entry, one in zip(self._front_entries(), self.front, strict=True)
        ]
        return {
            "model": NETWORK,
            "cost": "macs" if self.latency is None else "latency_ms",
            "limit": self.plan.macs_limit if self.latency is None else self.plan.latency_limit,
            "input_size": self.input_size,
            "num_classes": self.num_classes,
            "candidates": len(self.candidates),
            "front": front,
        }

    def cost_in_words(self, scored: Scored) -> str:
        """Return what decides beside accuracy, and is limited."""
        return _millions(scored) if self.latency is None else f"{self.latency.ms(scored.genes):.3f} ms"

    def front_in_words(self) -> str:
        """Return the ends of the front in words."""
        ends = [self.front[0], *self.front[1:][-1:]]
        span = " to ".join(f"accuracy {one.score:.4f} at {self.cost_in_words(one)}" for one in ends)
        return f"{counted(len(self.front), 'network')}, {'from ' if len(ends) > 1 else ''}{span}"

    def latencies(self) -> dict[Genes, list[str]]:
        """Return predicted and measured latency of candidates; empty lists without a table."""
        found = {} if self.measured is None else {genes: ms for genes, _, ms in self.measured.networks}
        return {
            one.genes: []
            if self.latency is None
            else [f"{self.latency.ms(one.genes):.3f}", f"{found[one.genes]:.3f}" if one.genes in found else "-"]
            for one in self.candidates
        }

    def lines(self) -> str:
        """Return all candidates with their scores, one JSON object a line."""
        return "".join(f"{json.dumps(line_of(scored))}\n" for scored in self.candidates)

    def architecture(self, scored: Scored) -> dict[str, Any]:
        """Return the content of `architecture.json`."""
        return {
            "model": NETWORK,
            **_entry(scored),
            "input_size": self.input_size,
            "num_classes": self.num_classes,
            "generation": scored.generation,
            "command": train_command(scored),
        }

    def best_by_generation(self) -> list[float]:
        """Return the best score so far, after each generation that is complete or has begun."""
        best: list[float] = []
        for generation in range(max((scored.generation for scored in self.candidates), default=-1) + 1):
            scores = [scored.score for scored in self.candidates if scored.generation <= generation]
            best.append(max(scores))
        return best

    def progress(self) -> str:
        """Return in words how far the search has come."""
        generations = max((scored.generation for scored in self.candidates), default=-1) + 1
        of_all = f"generation {generations} of {self.plan.generations + 1}"
        return f"{counted(len(self.candidates), 'candidate')}, " + ("complete" if self.is_complete else of_all)

    def latency_in_words(self) -> str:
        """Return the error of the table of latencies in words."""
        assert self.measured is not None  # noqa: S101 - the caller has looked
        return self.measured.in_words("those of the front" if self.plan.pareto else "the best")

    def _limit_in_words(self) -> str:
        if self.plan.macs_limit is None:
            return f"{self.plan.latency_limit:g} ms of latency"
        return f"{self.plan.macs_limit / 1e6:,.2f} M multiply-accumulates"

    def note(self) -> Note:
        """Return the description of the search's run."""
        plan, best = self.plan, self.best
        lines = [
            f"**Search** below {self._limit_in_words()} at {self.input_size} px with "
            f"{counted(self.num_classes, 'class', 'classes')}: {plan.generations + 1} generations of {plan.population}"
        ]
        if self.front:
            lines.append(f"**Front:** {self.front_in_words()}")
        if best is not None:
            lines.append(f"**{'Most accurate' if self.front else 'Best'}:** {in_words(best)}")
            lines.append(indented(train_command(best)))
        if self.measured is not None:
            lines.append(f"**Latency:** {self.latency_in_words()}")
        if self.trust is not None:
            lines.append(f"**Trust:** {self.trust.in_words(self.plan.seed)}")
        lines.append(f"**Progress:** {self.progress()}")
        return Note.of(*lines)


def _entry(scored: Scored) -> dict[str, Any]:
    return {**scored.options, "macs": scored.macs, "score": scored.score}


def in_words(scored: Scored) -> str:
    """Return a candidate in words."""
    share = f"{scored.correct:,} of {counted(scored.images, 'image')}"
    return f"{scored.listed}: accuracy {scored.score:.4f} ({share}), {_millions(scored)} multiply-accumulates"


def _millions(scored: Scored) -> str:
    return f"{scored.macs / 1e6:,.2f} M"


def train_command(scored: Scored) -> str:
    """Return the command that trains a candidate from the beginning."""
    named = (word for name, value in scored.options.items() for word in (option(name), value))
    return shlex.join(["shufflenet", "train", "--model", NETWORK, *named])


def best_tag(scored: Scored) -> str:
    """Return the value of the tag that names a candidate."""
    return json.dumps(_entry(scored))


def options_of_tag(text: str) -> dict[str, str] | None:
    """Return the options of training in such a tag, or in `architecture.json`; None if it names no network."""
    try:
        return options_of(genes_in(json.loads(text)))
    except (ValueError, TypeError, KeyError, AttributeError, ModelError):
        return None


def shares(networks: Sequence[Sequence[int]], options: int) -> list[list[float]]:
    """Return for each place the share of the networks that have each option there."""
    return [
        [sum(taken == option for taken in place) / len(networks) for option in range(options)]
        for place in zip(*networks, strict=True)
    ]
