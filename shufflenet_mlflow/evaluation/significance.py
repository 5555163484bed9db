"""Whether a difference is more than chance: between two networks on the same images, and between groups of runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIGNIFICANT = 0.05
"""The share of equals that a test takes for better."""
RESAMPLES = 4000


def p_of_better(only_new: int, only_old: int) -> float:
    """Return the one-sided p-value of McNemar's exact test (McNemar, 1947) that the new network is better.

    Args:
        only_new: images that only the new network gets right.
        only_old: images that only the old one gets right.
    """
    from scipy.stats import binomtest

    changed = only_new + only_old
    return 1.0 if not changed else float(binomtest(only_new, changed, 0.5, alternative="greater").pvalue)


@dataclass(frozen=True)
class Interval:
    """A mean difference, and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference is more than chance."""
        return self.low > 0 or self.high < 0


def bootstrap_interval(differences: Sequence[float], *, seed: int = 0) -> Interval:
    """Return the mean of paired differences and its studentized bootstrap interval.

    Bootstrap-t (Efron and Tibshirani, 1993, "An Introduction to the Bootstrap", section 12.5): of few pairs, percentile
    intervals are too short. With one pair, or equal differences, nothing can be said, or nothing differs.

    Args:
        differences: one for each pair, such as two runs of one seed.
        seed: of the resampling; the same differences give the same interval.
    """
    values_N = np.asarray(differences, np.float64)
    count, mean = len(values_N), float(np.mean(values_N))
    if count < 2:
        return Interval(mean, -math.inf, math.inf)
    error = float(np.std(values_N, ddof=1)) / math.sqrt(count)
    if error == 0:
        return Interval(mean, mean, mean)
    drawn_RN = np.random.default_rng(seed).choice(values_N, (RESAMPLES, count))
    errors_R = np.std(drawn_RN, axis=1, ddof=1) / math.sqrt(count)
    usable_R = errors_R > error * 1e-9
    t_R = (np.mean(drawn_RN, axis=1)[usable_R] - mean) / errors_R[usable_R]
    low, high = np.quantile(t_R, (0.975, 0.025))
    return Interval(mean, mean - float(low) * error, mean - float(high) * error)
