"""Runs side by side: what differs, which is better, and whether that is more than chance."""

from shufflenet_mlflow.compare.comparison import Comparison, Curve, ResultRow, RunColumn, compare_runs
from shufflenet_mlflow.compare.page import write_page
from shufflenet_mlflow.compare.paired import PairedTest

__all__ = ["Comparison", "Curve", "PairedTest", "ResultRow", "RunColumn", "compare_runs", "write_page"]
