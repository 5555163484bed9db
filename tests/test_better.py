"""Whether one network, or one group of runs, is better than another beyond chance."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from shufflenet_mlflow.evaluation.report import Outcomes
from shufflenet_mlflow.evaluation.significance import bootstrap_interval
from shufflenet_mlflow.workflows.gate import gate_of
from tests.support.command_line import Invoke
from tests.support.training import run


@pytest.mark.parametrize(
    ("pairs", "shape"), [(5, "normal"), (8, "normal"), (20, "normal"), (8, "uniform"), (10, "skewed")]
)
def test_intervals_cover_the_true_difference(pairs: int, shape: str) -> None:
    """In 93 to 97 of 100 simulated comparisons, here of 1,000."""
    generator = np.random.default_rng(pairs)
    draw = {
        "normal": lambda: generator.normal(0.3, 1, pairs),
        "uniform": lambda: generator.uniform(-0.7, 1.3, pairs),
        "skewed": lambda: generator.exponential(1, pairs) - 0.7,
    }[shape]
    intervals = [bootstrap_interval(draw()) for _ in range(1000)]
    assert 930 <= sum(interval.low <= 0.3 <= interval.high for interval in intervals) <= 970


def test_intervals_of_little() -> None:
    assert bootstrap_interval([0.25]).low == -math.inf
    equal = bootstrap_interval([0.25, 0.25, 0.25])
    assert (equal.mean, equal.low, equal.high) == (0.25, 0.25, 0.25)
    assert bootstrap_interval([0.1, 0.3, 0.2]) == bootstrap_interval([0.1, 0.3, 0.2])


def outcomes(correct_N: np.ndarray) -> Outcomes:
    labels_N = np.zeros(len(correct_N), np.int64)
    share_N = np.ones(len(correct_N))
    paths = tuple(f"{number}.png" for number in range(len(correct_N)))
    return Outcomes(paths, labels_N, np.where(correct_N, 0, 1), share_N, share_N)


@pytest.mark.parametrize(("images", "accuracy"), [(50, 0.7), (400, 0.9), (2000, 0.6)])
def test_the_gate_lets_few_equals_pass(images: int, accuracy: float) -> None:
    generator = np.random.default_rng(images)
    drawn = (generator.random((2, images)) < accuracy for _ in range(1000))
    passed = sum(gate_of("new", "old", outcomes(new_N), outcomes(old_N)).is_open for new_N, old_N in drawn)
    assert passed <= 50
    better_N, worse_N = generator.random((2, 2000)) < np.array([[0.9], [0.7]])
    assert gate_of("new", "old", outcomes(better_N), outcomes(worse_N)).is_open


def test_the_gate(images: Path, shufflenet: Invoke) -> None:
    good, bad = run(images, "--total-iters", 40), run(images, "--seed", 1)
    promote = ("checkpoints", "promote", "--name", "pets", "--alias", "champion", "--json")
    assert shufflenet(*promote, f"{bad.run_id}@5").exit_code == 0
    images_of = ("--val-dir", images / "train")
    refused = shufflenet(*promote, f"{bad.run_id}@5", "--if-better", "models:/pets@champion", *images_of)
    assert refused.exit_code == 1, refused.output
    assert json.loads(refused.stdout)["error"]["code"] == "not-better"
    assert "p = 1" in refused.stderr
    taken = shufflenet(*promote, good.run_id, "--if-better", "models:/pets@champion", *images_of)
    assert taken.exit_code == 0, taken.output
    document = json.loads(taken.stdout)
    assert document["version"] == "2"
    assert document["gate"]["top1"] > document["gate"]["top1_beside"]
    assert (document["gate"]["images"], document["gate"]["p_value"] < 0.05) == (36, True)
