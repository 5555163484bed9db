"""Groups of runs that differ in nothing but the seed, side by side: is the difference more than that of seeds?"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.evaluation.significance import Interval, bootstrap_interval
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.tracking.client import mlflow_errors
from shufflenet_mlflow.tracking.names import PARENT_RUN_TAG, STUDY_TRIAL_TAG

if TYPE_CHECKING:
    from shufflenet_mlflow.tracking.client import MlflowClient, Run

GROUP_METRICS = ("val/top1", "val/mean_class_accuracy", "val/loss")
LOWER_IS_BETTER = ("val/loss",)
_MOST_RUNS = 10_000


@dataclass(frozen=True)
class Group:
    """The runs below one parent, by seed."""

    run_id: str
    """The parent."""
    name: str
    values: Mapping[str, Mapping[int, float]]
    """Metric -> seed -> last value."""

    def mean(self, metric: str) -> float:
        """Return the mean over the seeds."""
        return statistics.fmean(self.values[metric].values())

    def std(self, metric: str) -> float:
        """Return the standard deviation over the seeds, as of a sample; 0 for one."""
        values = list(self.values[metric].values())
        return statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class GroupDifference:
    """A metric of two groups, paired by seed."""

    metric: str
    first: str
    second: str
    """Parents' run IDs."""
    seeds: tuple[int, ...]
    """Seeds that both have."""
    interval: Interval
    """Mean and confidence interval of second minus first."""

    @property
    def verdict(self) -> str:
        """Return the result in words."""
        if len(self.seeds) < 2:
            seeds = counted(len(self.seeds), "seed")
            return f"the difference of {self.interval.mean:+.4f} rests on {seeds}: nothing can be said"
        shown = f"{self.interval.mean:+.4f} [{self.interval.low:+.4f}, {self.interval.high:+.4f}]"
        chance = "is more than that of seeds" if self.interval.excludes_zero else "may be that of seeds"
        return f"the difference of {shown} over {len(self.seeds)} seeds {chance} (95 % bootstrap interval)"

    def to_dict(self) -> dict[str, Any]:
        """Return its entry in the document of `compare --json`."""
        return {
            "metric": self.metric,
            "first": self.first,
            "second": self.second,
            "seeds": list(self.seeds),
            "mean": self.interval.mean,
            "low": self.interval.low,
            "high": self.interval.high,
        }


@dataclass(frozen=True)
class GroupComparison:
    """Groups side by side, and the first beside each of the others."""

    groups: tuple[Group, ...]
    differences: tuple[GroupDifference, ...]

    def best(self, metric: str) -> list[Group]:
        """Return the groups with the best mean, of which nothing says that it is more than chance."""
        sign = -1 if metric in LOWER_IS_BETTER else 1
        means = [(group, sign * group.mean(metric)) for group in self.groups if group.values.get(metric)]
        highest = max((mean for _, mean in means), default=0.0)
        return [group for group, mean in means if mean == highest]

    def to_dict(self) -> dict[str, Any]:
        """Return the entry `groups` of `compare --json`."""
        return {
            "groups": [
                {
                    "run_id": group.run_id,
                    "name": group.name,
                    "metrics": {
                        metric: {"n": len(values), "mean": group.mean(metric), "std": group.std(metric)}
                        for metric, values in group.values.items()
                    },
                }
                for group in self.groups
            ],
            "differences": [difference.to_dict() for difference in self.differences],
        }


def trials_of(client: "MlflowClient", parent: "Run") -> "list[Run]":
    """Return the runs of a study's trials, in order of number.

    Raises:
        TrackingError: MLflow did not answer.
    """
    with mlflow_errors(f"look for the trials of run {parent.info.run_id}"):
        runs = client.search_runs(
            [parent.info.experiment_id],
            f"tags.`{PARENT_RUN_TAG}` = '{parent.info.run_id}'",
            max_results=_MOST_RUNS,
        )
    trials = [run for run in runs if run.data.tags.get(STUDY_TRIAL_TAG, "").isdecimal()]
    return sorted(trials, key=lambda run: int(run.data.tags[STUDY_TRIAL_TAG]))


def compare_groups(client: "MlflowClient", parents: "Sequence[Run]") -> GroupComparison:
    """Compare the first group with each of the others, paired by seed.

    Raises:
        TrackingError: MLflow did not answer.
    """
    groups = tuple(_group(client, parent) for parent in parents)
    first = groups[0]
    differences = []
    for other in groups[1:]:
        for metric in GROUP_METRICS:
            ours, theirs = first.values.get(metric, {}), other.values.get(metric, {})
            seeds = tuple(sorted(ours.keys() & theirs.keys()))
            if seeds:
                interval = bootstrap_interval([theirs[seed] - ours[seed] for seed in seeds])
                differences.append(GroupDifference(metric, first.run_id, other.run_id, seeds, interval))
    return GroupComparison(groups, tuple(differences))


def _group(client: "MlflowClient", parent: "Run") -> Group:
    values: dict[str, dict[int, float]] = {}
    for run in trials_of(client, parent):
        seed = run.data.params.get("seed", "")
        if run.info.status == "FINISHED" and seed.isdecimal():
            for metric in GROUP_METRICS:
                if metric in run.data.metrics:
                    values.setdefault(metric, {})[int(seed)] = run.data.metrics[metric]
    return Group(parent.info.run_id, parent.info.run_name, values)
