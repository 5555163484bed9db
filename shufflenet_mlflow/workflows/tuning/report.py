"""The report of a study: the document of `tune --json`, its decisions, its description and its figures."""

import io
import json
import shlex
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shufflenet_mlflow.config import option
from shufflenet_mlflow.config.study import StudyPlan
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.workflows.tuning.asynchronous import asynchronous_decisions, ranked
from shufflenet_mlflow.workflows.tuning.halving import Trial, best_of, decisions, last_value
from shufflenet_mlflow.workflows.tuning.request import trial_options
from shufflenet_mlflow.workflows.tuning.sampling import distributions, optuna

MOST_EVALUATED = 400
"""Trees that the importance of options is computed with take minutes for more trials."""


@dataclass(frozen=True)
class StudyReport:
    """A study as it stands."""

    name: str
    plan: StudyPlan
    trials: tuple[Trial, ...]
    parent_run_id: str | None = None
    checkpoint: str | None = None
    """Reference of the best trial's checkpoint."""
    training: frozenset[int] | None = None
    """Numbers of the trials that a worker trains now; None if that is not known."""

    @property
    def best(self) -> Trial | None:
        """The best trial at the highest rung that any has reached."""
        return best_of(self.plan, self.trials)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return len(self.trials) == self.plan.trials and all(trial.is_closed for trial in self.trials)

    def state_of(self, trial: Trial) -> str:
        """Return a trial's state; of one that is not at its end, as far as it is known, also `paused` or `waiting`."""
        if trial.state != "running" or self.training is None or trial.number in self.training:
            return trial.state
        return "paused" if trial.values else "waiting"

    def spread(self) -> dict[str, float]:
        """Return mean and standard deviation (of a sample) of the values of repeated trainings; empty for a search."""
        values = [value for trial in self.trials if (value := last_value(trial)) is not None]
        if not self.plan.repeats or not values:
            return {}
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return {"mean": statistics.fmean(values), "std": deviation}

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `tune --json`."""
        best = self.best
        return {
            **self.spread(),
            "study": self.name,
            "parent_run_id": self.parent_run_id,
            "best": None
            if best is None
            else {
                "number": best.number,
                "params": dict(best.params),
                "value": last_value(best),
                "run_id": best.run_id,
                "checkpoint": self.checkpoint,
            },
            "trials": [
                {
                    "number": trial.number,
                    "params": dict(trial.params),
                    "rungs": [{"iters": trial.iters.get(rung), "value": value} for rung, value in trial.values.items()],
                    "state": self.state_of(trial),
                    "run_id": trial.run_id,
                }
                for trial in self.trials
            ],
            "is_complete": self.is_complete,
        }

    def decisions(self) -> str:
        """Return the decisions, one JSON object a line, in their logical order; of an asynchronous study as taken."""
        plan, trials = self.plan, self.trials
        entries = asynchronous_decisions(trials) if plan.asynchronous else decisions(plan, trials)
        return "".join(f"{json.dumps(entry, sort_keys=True)}\n" for entry in entries)

    def progress(self) -> str:
        """Return in words how far the study has come."""
        closed = [self.state_of(trial) for trial in self.trials]
        parts = [f"{counted(closed.count(state), 'trial')} {state}" for state in ("complete", "pruned", "failed")]
        to_come = self.plan.trials - len(self.trials)
        parts += [f"{closed.count('running')} under way"]
        parts += [f"{closed.count(state)} {state}" for state in ("paused", "waiting")]
        parts += [f"{to_come} to come"]
        return ", ".join(part for part in parts if not part.startswith("0 "))

    def command(self) -> str | None:
        """Return the command that repeats the best trial; None without one."""
        best = self.best
        if best is None:
            return None
        words = ["shufflenet", "train"]
        for name, value in sorted(trial_options(self.plan, best.params).items()):
            if value is True:
                words.append(option(name))
            elif value is not None and value is not False:
                words += [option(name), str(value)]
        return shlex.join(words)

    def history(self) -> list[float]:
        """Return the best value at the first rung after each trial, in order; up to the first without a value."""
        best: list[float] = []
        for trial in self.trials:
            if trial.failure is None and 0 not in trial.values:
                break
            value = trial.values.get(0)
            if value is not None:
                best.append(value if not best or self.plan.is_better(value, best[-1]) else best[-1])
        return best

    def why_pruned(self, trial: Trial) -> str | None:
        """Return in words at which rung a trial was pruned, and why; None if it was not."""
        rung = trial.pruned_at
        if rung is None:
            return None
        others = [other for other in self.trials if rung in other.values]
        promoted = [other for other in others if other.decisions.get(rung) == "promoted"]
        worst = sorted(promoted, key=lambda other: self.plan.rank(other.values[rung]))[-1] if promoted else None
        if self.plan.asynchronous:
            place = 1 + [other.number for other in ranked(self.plan, others, rung)].index(trial.number)
            return (
                f"pruned at rung {rung + 1} of {self.plan.rungs}, iteration {trial.iters.get(rung)}: "
                f"{self.plan.metric} {trial.values[rung]:.4g}, place {place} of {len(others)}, where one of "
                f"{self.plan.reduction} can go on"
            )
        beside = "" if worst is None else f", the last of those that went on {worst.values[rung]:.4g}"
        return (
            f"pruned at rung {rung + 1} of {self.plan.rungs}, iteration {trial.iters.get(rung)}: {self.plan.metric} "
            f"{trial.values[rung]:.4g}{beside} ({len(promoted)} of {len(others)})"
        )

    def importance(self) -> dict[str, float]:
        """Return the share of each option in the differences at the first rung; empty if they cannot tell."""
        study = self._study()
        if len(study.trials) < 2 or len(self.plan.space) < 2 or len(study.trials) > MOST_EVALUATED:
            return {}
        evaluators = optuna().importance
        try:
            found = evaluators.get_param_importances(study, evaluator=evaluators.FanovaImportanceEvaluator(seed=0))
        except (ValueError, RuntimeError):  # all values are equal, say
            return {}
        return {name: float(share) for name, share in found.items()}

    def _study(self) -> Any:
        """Return a study of Optuna's in memory with the values at the first rung, which all trials have."""
        study = optuna().create_study(direction=self.plan.direction, study_name=self.name)
        space = distributions(self.plan)
        for trial in self.trials:
            if 0 in trial.values:
                study.add_trial(
                    optuna().trial.create_trial(value=trial.values[0], params=dict(trial.params), distributions=space)
                )
        return study

    def figures(self) -> dict[str, str]:
        """Return history, parallel coordinates and importance as SVG, by file name."""
        study = self._study()
        if len(study.trials) < 2 or self.plan.repeats:
            return {}
        title = f"{self.plan.metric} at rung 1"
        from matplotlib.figure import Figure  # noqa: F401 - before Optuna's own import of pyplot

        plots = optuna().visualization.matplotlib
        figures = {"history.svg": _svg(lambda: plots.plot_optimization_history(study, target_name=title))}
        figures["parallel_coordinates.svg"] = _svg(lambda: plots.plot_parallel_coordinate(study, target_name=title))
        if shares := self.importance():
            figures["importance.svg"] = _svg(lambda: _bars(shares))
        return {name: text for name, text in figures.items() if text}


def _svg(draw: Any) -> str:
    """Return a figure of pyplot's as SVG, without touching the caller's figures."""
    import matplotlib

    with (
        warnings.catch_warnings(),
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "study", "figure.figsize": (9.0, 5.0)}),
    ):
        warnings.simplefilter("ignore")  # Optuna calls its plots experimental
        before = matplotlib.get_backend()
        import matplotlib.pyplot as plt

        try:
            plt.switch_backend("agg")
            axes = draw()
            figure = axes.figure if not isinstance(axes, Sequence) else axes[0].figure
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
            return buffer.getvalue()
        except (ValueError, RuntimeError):  # a plot that these trials have too little for
            return ""
        finally:
            plt.switch_backend(before)


def _bars(shares: Mapping[str, float]) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    names = sorted(shares, key=lambda name: shares[name])
    axes.barh(names, [shares[name] for name in names])
    axes.set_title("Importance of the options at rung 1 (fANOVA)")
    axes.set_xlim(0, 1)
    return figure.axes[0]
