"""Differences between two models on the same passages and problems, and what they can prove.

A passage or a problem is a cluster: its tokens or replies depend on one another, so clusters are
what was sampled. Two models are compared cluster by cluster, which takes out what makes a text
hard for both.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Self

import numpy as np

from quant_eval.divergence import Estimate, clustered_mean

MIN_CLUSTERS = 8
"""With fewer, no interval is to be trusted."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One quantity of one model: by cluster the sum of its observations and how many there are."""

    sums: Mapping[str, float]
    counts: Mapping[str, int]

    @classmethod
    def of(cls, observations: Iterable[tuple[str, float]]) -> Self:
        """From single observations, each with the cluster that it belongs to."""
        sums: defaultdict[str, float] = defaultdict(float)
        counts: Counter[str] = Counter()
        for name, value in observations:
            sums[name] += value
            counts[name] += 1
        return cls(dict(sums), dict(counts))

    @property
    def mean(self) -> Estimate | None:
        """Over all observations, None where there are none."""
        if not self.counts:
            return None
        clusters = [np.full(n, self.sums[name] / n) for name, n in self.counts.items()]
        return clustered_mean(clusters)


@dataclass(frozen=True, slots=True)
class Difference:
    """The second's mean minus the first's over n clusters that both have.

    centre, standard_error: of the interval around it; without an error where n is 1.
    """

    value: float
    centre: float
    standard_error: float | None
    n: int

    def reach(self, probability: float) -> float:
        """How far from its centre a bound lies that holds with this probability."""
        if self.standard_error is None:
            return math.inf
        return t_quantile(probability, self.n - 1) * self.standard_error

    def interval(self, confidence: float) -> tuple[float, float]:
        """Two-sided."""
        reach = self.reach(0.5 + confidence / 2)
        return self.centre - reach, self.centre + reach


def paired_difference(
    first: Sample, second: Sample, *, of_shares: bool = False
) -> Difference | None:
    """The difference over the clusters that both have, None where there are none.

    Clusters weigh as many observations as the first has in them. of_shares: observations are yes or
    no and few; two pairs are added, half a pair of each kind, so that the same luck in all of a few
    problems is not taken for certainty.
    Source: Cochran, Sampling Techniques, 1977, section 6.3, on differences; Agresti and Min 2005,
    "Simple improved confidence intervals for comparing matched proportions".
    """
    shared = [name for name in first.counts if name in second.counts]
    if not shared:
        return None
    n = len(shared)
    weights = np.array([first.counts[name] for name in shared], dtype=np.float64)
    differences = np.array(
        [
            second.sums[name] / second.counts[name] - first.sums[name] / first.counts[name]
            for name in shared
        ]
    )
    total = float(weights.sum())
    value = float(weights @ differences) / total
    added = 2 * total / n if of_shares else 0.0
    centre = value * total / (total + added)
    if n < 2:
        return Difference(value, centre, None, n)
    residuals = weights * (differences - centre)
    squares = n / (n - 1) * float(residuals @ residuals)
    if of_shares:  # half a pair each of +1, -1, and twice 0
        squares += (total / n) ** 2 * (1 + 2 * centre**2)
    return Difference(value, centre, math.sqrt(squares) / (total + added), n)


def t_quantile(probability: float, n_degrees: int) -> float:
    """Student's t, within 1 % of the true value for 7 degrees of freedom and more.

    Source: Abramowitz and Stegun 1964, 26.7.5.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160,
    )
    return math.fsum(term / n_degrees**power for power, term in enumerate(terms))
