"""Two objectives, both minimised: the order in which NSGA-II prefers points, and the front of a set of points.

Deb et al., 2002, https://doi.org/10.1109/4235.996017. Sorting into fronts and crowding distances are pymoo's. Its
survival breaks ties at random, from a generator of the process; here they go to the point that comes first.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from shufflenet_mlflow.errors import ConfigError

Point = tuple[int, int]
"""Two values, the lower the better."""


class Pieces(NamedTuple):
    """The two functions of pymoo that a search uses."""

    sort: Callable[..., Any]
    """Takes float (N, 2), with `return_rank` set; returns fronts, and int (N): each point's front, from 0 on."""
    crowding: Callable[[Any], Any]
    """Takes float (N, 2), the points of one front; returns float (N), infinite at the ends."""


def pymoo() -> Pieces:
    """Import pymoo, which is an extra.

    Raises:
        ConfigError: it is missing.
    """
    try:
        from pymoo.config import Config

        Config.warnings["not_compiled"] = False  # which would be printed on stdout
        from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function
        from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
    except ImportError as error:
        raise ConfigError(
            f"--pareto needs the package pymoo ({error}); pip install 'shufflenet-mlflow[pareto]'",
            code="pareto-package-missing",
        ) from error
    return Pieces(NonDominatedSorting().do, get_crowding_function("cd").do)


def best_first(points: Sequence[Point]) -> list[int]:
    """Return the numbers of all points: by front, within a front the loneliest first, then in their own order.

    Of several points that are equal, only the first counts as lonely.
    """
    if not points:
        return []
    sort, crowding = pymoo()
    points_N2 = np.array(points, dtype=float)
    _, ranks_N = sort(points_N2, return_rank=True)
    distances_N = np.zeros(len(points))
    for rank in range(int(ranks_N.max()) + 1):
        members = np.flatnonzero(ranks_N == rank)
        _, numbers = np.unique(points_N2[members], axis=0, return_index=True)
        different = members[np.sort(numbers)]
        distances_N[different] = crowding(points_N2[different])
    return [int(number) for number in np.lexsort((np.arange(len(points)), -distances_N, ranks_N))]


def front(points: Sequence[Point]) -> list[int]:
    """Return the numbers of the points that no other one dominates, by their second value.

    Of several points that are equal, only the first is among them.
    """
    found: list[int] = []
    for number in sorted(range(len(points)), key=lambda number: (points[number][1], points[number][0], number)):
        if not found or points[number][0] < points[found[-1]][0]:
            found.append(number)
    return found
