"""`checkpoints promote --if-better`: promote only what is better than another network beyond chance."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shufflenet_mlflow.errors import NotBetterError
from shufflenet_mlflow.evaluation.report import Outcomes
from shufflenet_mlflow.evaluation.significance import SIGNIFICANT, p_of_better
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.tracking.client import prepare_environment
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.workflows.eval import EvalRequest, measure, measure_on


@dataclass(frozen=True)
class Gate:
    """Two networks on the same images."""

    ref: str
    beside: str
    """Reference of the network to be better than."""
    images: int
    top1: float
    top1_beside: float
    only_new: int
    """Images that only the first network gets right."""
    only_old: int

    @property
    def p_value(self) -> float:
        """Probability of so many more right answers, or more, if both are equally good; see `p_of_better`."""
        return p_of_better(self.only_new, self.only_old)

    @property
    def is_open(self) -> bool:
        """Whether the first network is better beyond chance."""
        return self.p_value < SIGNIFICANT

    def in_words(self) -> str:
        """Return accuracies and p-value."""
        return (
            f"accuracy {self.top1:.4f} against {self.top1_beside:.4f} of {self.beside} on the same "
            f"{counted(self.images, 'image')} (only this one right: {self.only_new}, only the other: {self.only_old}; "
            f"p = {self.p_value:.3g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the entry `gate` of `checkpoints promote --json`."""
        return {
            "beside": self.beside,
            "images": self.images,
            "top1": self.top1,
            "top1_beside": self.top1_beside,
            "only_new": self.only_new,
            "only_old": self.only_old,
            "p_value": self.p_value,
        }


def require_better(
    ref: str,
    beside: str,
    *,
    val_dir: str | None,
    tracking_uri: str | None,
    cache_dir: Path | None,
    reporter: Reporter,
    stop: StopFlag,
) -> Gate:
    """Evaluate two networks on the same images, and refuse the first if it is not better beyond chance.

    Args:
        ref: checkpoint that is to be better.
        beside: checkpoint that it is compared with.
        val_dir: the images; by default the validation images of the first one's run.

    Raises:
        NotBetterError: it is not.
        ShuffleNetError: one of them cannot be evaluated.
    """
    prepare_environment()
    context, store = JobContext.alone(reporter, stop), Connection(tracking_uri)
    new = EvalRequest(ref, val_dir=val_dir, tracking_uri=tracking_uri, cache_dir=cache_dir, log_to="none")
    images, measured = measure(new, new.load(store, reporter), context)
    old = replace(new, ref=beside)
    other = measure_on(old, old.load(store, reporter), images.listing, context, is_digits=images.directory is None)
    gate = gate_of(ref, beside, measured.report.outcomes, other.report.outcomes)
    if not gate.is_open:
        raise NotBetterError(
            f"{ref} is not better beyond chance: {gate.in_words()}; nothing is promoted", code="not-better"
        )
    return gate


def gate_of(ref: str, beside: str, new: Outcomes, old: Outcomes) -> Gate:
    """Compare two networks image by image, without images that only one of them could read."""
    right_before = dict(zip(old.paths, old.is_correct.tolist(), strict=True))
    pairs = [
        (right, right_before[path])
        for path, right in zip(new.paths, new.is_correct.tolist(), strict=True)
        if path in right_before
    ]
    images = max(1, len(pairs))
    return Gate(
        ref,
        beside,
        len(pairs),
        sum(now for now, _ in pairs) / images,
        sum(before for _, before in pairs) / images,
        sum(now and not before for now, before in pairs),
        sum(before and not now for now, before in pairs),
    )
