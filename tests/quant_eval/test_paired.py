"""Paired differences: their arithmetic, and how often their intervals are wrong."""

import math

import numpy as np
import pytest

from quant_eval.paired import Difference, Sample, paired_difference, t_quantile


def sample(values: dict[str, list[float]]) -> Sample:
    return Sample.of((name, value) for name, each in values.items() for value in each)


def test_differences_are_of_the_same_clusters() -> None:
    """Catches clusters that are matched by their order, or that one of the two has not."""
    first = sample({"a": [1.0, 3.0], "b": [10.0], "c": [5.0]})
    second = sample({"b": [11.0], "a": [2.0, 4.0], "d": [99.0]})
    difference = paired_difference(first, second)
    assert difference == Difference(1.0, 1.0, 0.0, 2)
    assert paired_difference(first, sample({"d": [1.0]})) is None
    alone = paired_difference(first, sample({"c": [7.0]}))
    assert alone == Difference(2.0, 2.0, None, 1)
    assert alone.interval(0.95) == (-math.inf, math.inf)


def test_error_equals_the_textbook_one() -> None:
    """Catches another formula: for one observation a cluster it is the paired t-test's."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=20), rng.normal(size=20)
    difference = paired_difference(
        sample({str(i): [x] for i, x in enumerate(a)}),
        sample({str(i): [x] for i, x in enumerate(b)}),
    )
    assert difference is not None
    assert difference.value == pytest.approx((b - a).mean())
    assert difference.standard_error == pytest.approx((b - a).std(ddof=1) / math.sqrt(20))


def test_observations_of_a_cluster_are_no_more_evidence() -> None:
    """Catches replies to one problem that count as problems."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=20), rng.normal(size=20)
    once, thrice = (
        paired_difference(
            sample({str(i): [x] * n for i, x in enumerate(a)}),
            sample({str(i): [x] * n for i, x in enumerate(b)}),
        )
        for n in (1, 3)
    )
    assert once is not None
    assert thrice is not None
    assert thrice.standard_error == pytest.approx(once.standard_error)


def test_the_mean_is_of_observations() -> None:
    """Catches a mean of clusters, which short ones would dominate."""
    mean = sample({"a": [1.0, 1.0, 1.0], "b": [5.0]}).mean
    assert mean is not None
    assert (mean.value, mean.n) == (2.0, 4)
    assert Sample({}, {}).mean is None


@pytest.mark.parametrize(
    ("probability", "n_degrees", "expected"),
    [
        (0.975, 10, 2.228),
        (0.975, 139, 1.977),
        (0.999, 30, 3.385),
        (0.9995, 15, 4.073),
        (0.9995, 7, 5.408),
    ],
)
def test_t_quantiles_are_the_tables(probability: float, n_degrees: int, expected: float) -> None:
    """Catches a lost term of the expansion; values of a printed table."""
    assert t_quantile(probability, n_degrees) == pytest.approx(expected, rel=0.01)


def test_intervals_cover() -> None:
    """Catches a wrong scale: of 400 differences about 95 % lie in their interval.

    Below 360 or above 395 of 400 less than one time in ten thousand; the seed is fixed.
    """
    rng = np.random.default_rng(1)
    n_covered = 0
    for _ in range(400):
        hard = rng.normal(0, 5, size=40)
        a, b = ({str(i): list(rng.normal(x, 1, size=8)) for i, x in enumerate(hard)} for _ in "ab")
        difference = paired_difference(sample(a), sample(b))
        assert difference is not None
        low, high = difference.interval(0.95)
        n_covered += low < 0 < high
    assert 360 <= n_covered <= 395


def test_few_problems_are_no_certainty() -> None:
    """Catches an interval of no width: all of three problems solved by the one, none by the other.

    For one reply each it is the interval of Agresti and Min, worked out by hand here.
    """
    yes, no = (sample({str(i): [value] for i in range(14)}) for value in (1.0, 0.0))
    difference = paired_difference(yes, no, of_shares=True)
    assert difference is not None
    assert difference.value == -1.0
    assert difference.centre == pytest.approx(-14 / 16)
    by_hand = 14 / 13 * 14 * (1 - 14 / 16) ** 2 + 1 + 2 * (14 / 16) ** 2
    assert difference.standard_error == pytest.approx(math.sqrt(by_hand) / 16)
    few = paired_difference(
        sample({str(i): [1.0] for i in range(3)}),
        sample({str(i): [0.0] for i in range(3)}),
        of_shares=True,
    )
    assert few is not None
    low, high = few.interval(0.99)
    assert low < 0 < high
