"""Runs side by side: what differs, which is better, and whether that is more than chance."""

from shufflenet_mlflow.compare.comparison import Comparison, Curve, ResultRow, RunColumn, compare_runs
from shufflenet_mlflow.compare.exports import ExportComparison, compare_export
from shufflenet_mlflow.compare.groups import GroupComparison, compare_groups, trials_of
from shufflenet_mlflow.compare.paired import PairedTest

__all__ = [
    "Comparison",
    "Curve",
    "ExportComparison",
    "GroupComparison",
    "PairedTest",
    "ResultRow",
    "RunColumn",
    "compare_export",
    "compare_groups",
    "compare_runs",
    "trials_of",
]
