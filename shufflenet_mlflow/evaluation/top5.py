"""Where top-5 accuracy says something: it is always 1 with five classes or fewer."""

from collections.abc import Mapping

LARGEST_TRIVIAL = 5
"""The most classes with which it is always 1."""


def has_top5(num_classes: int) -> bool:
    """Whether top-5 accuracy of a network with so many outputs is worth showing; it is logged in any case."""
    return num_classes > LARGEST_TRIVIAL


def shown_metrics(values: Mapping[str, float], num_classes: int) -> dict[str, float]:
    """Return the metrics that are worth showing."""
    return {name: value for name, value in values.items() if has_top5(num_classes) or not name.endswith("/top5")}


def is_trivial(metric: str, value: float | None, params: Mapping[str, str]) -> bool:
    """Whether a metric of a run is a top-5 accuracy that says nothing.

    Args:
        params: of the run; where `num_classes` is missing, as in the run of an evaluation, the value decides.
    """
    if metric.rpartition("/")[2] != "top5":
        return False
    classes = params.get("num_classes", "")
    return not has_top5(int(classes)) if classes.isdecimal() else value == 1
