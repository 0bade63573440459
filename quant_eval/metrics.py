"""What two models are compared by: each quantity with which direction of it is worse."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_eval.behaviour import FLAGS, flags_of
from quant_eval.measurement import Measured
from quant_eval.paired import Sample
from quant_eval.tasks import TASKS


@dataclass(frozen=True, slots=True)
class Metric:
    """A quantity; more of it is worse, less of it where `more_is_better`, each where `two_sided`.

    slack: by which share of the baseline's value it may always be worse. Another processor's
    rounding adds to what is a square of it, as KL is; what it moves either way averages out.
    of_replies: it is the share of replies to which something applies. against_reference: the
    unquantized model is the measure, so the path itself has some of it.
    """

    title: str
    more_is_better: bool = False
    two_sided: bool = False
    slack: float = 0.0
    of_replies: bool = False
    against_reference: bool = False


_SOLVED = "solved_"
TAILS = {"kl_above_median": 0.5, "kl_above_q99": 0.99, "kl_above_q999": 0.999}
"""Shares of tokens whose KL lies above a quantile of the first model's."""

METRICS = {
    "kl": Metric("mean KL, nats", slack=0.01, against_reference=True),
    "kl_thought": Metric("mean KL of thoughts, nats", slack=0.01, against_reference=True),
    "kl_answer": Metric("mean KL of answers, nats", slack=0.01, against_reference=True),
    "kl_above_median": Metric(
        "tokens above the first's median KL", slack=0.01, against_reference=True
    ),
    "kl_above_q99": Metric("tokens above the first's 99 % KL", slack=0.01, against_reference=True),
    "kl_above_q999": Metric(
        "tokens above the first's 99.9 % KL", slack=0.01, against_reference=True
    ),
    "nll": Metric("log perplexity, nats", against_reference=True),
    "top1": Metric("top-1 agreement", more_is_better=True, against_reference=True),
    "squared_change": Metric(
        "mean squared change of probability", slack=0.01, against_reference=True
    ),
    "solved": Metric("problems solved", more_is_better=True, of_replies=True),
    **{
        f"{_SOLVED}{kind}": Metric(f"solved: {kind}", more_is_better=True, of_replies=True)
        for kind in TASKS
    },
    **{flag: Metric(flag.replace("_", " "), of_replies=True) for flag in FLAGS},
    "thought_tokens": Metric("tokens of a thought", two_sided=True),
}


def is_metric(name: str) -> bool:
    """Whether it is one of METRICS, or the share solved of a benchmark from a file."""
    return name in METRICS or name.startswith(_SOLVED)


def metrics_among(names: Iterable[str]) -> dict[str, Metric]:
    """Those of METRICS that are named, in their order, then those of benchmarks from files."""
    wanted = set(names)
    known = {name: metric for name, metric in METRICS.items() if name in wanted}
    others = sorted(name for name in wanted - known.keys() if is_metric(name))
    return known | {
        name: Metric(f"solved: {name.removeprefix(_SOLVED)}", more_is_better=True, of_replies=True)
        for name in others
    }


def tails_of(measured: Measured) -> dict[str, float]:
    """The quantiles of a model's KL over all tokens, by the names in TAILS."""
    if not measured.scores:
        return {}
    kl = np.concatenate([scores.kl_nats for scores in measured.scores.values()])
    return {name: float(np.quantile(kl, share)) for name, share in TAILS.items()}


def samples_of(measured: Measured, tails: Mapping[str, float]) -> dict[str, Sample]:
    """All quantities that were measured, by passage or by problem.

    tails: the thresholds of the model that the comparison begins from.
    """
    samples = {}
    for name, sample in _all_samples(measured, tails):
        if sample.counts:
            samples[name] = sample
    return samples


def noise_of(floor: Measured, tails: Mapping[str, float]) -> dict[str, float]:
    """What the 16-bit file has of each metric against the reference: the noise of the path itself.

    tails: of the model whose numbers it stands beside.
    """
    samples = samples_of(floor, tails)
    means = {name: samples[name].mean for name in METRICS.keys() & samples.keys()}
    return {
        name: mean.value
        for name, mean in sorted(means.items())
        if mean is not None and METRICS[name].against_reference
    }


def path_noise(floor: Measured, tails: Mapping[str, float]) -> dict[str, float]:
    """How far the 16-bit file is from the reference by each metric; tails as in `noise_of`."""
    noise = noise_of(floor, tails)
    if noise:
        noise["top1"] = 1 - noise["top1"]
        exact = np.concatenate([one.reference_nll_nats for one in floor.scores.values()])
        noise["nll"] = abs(noise["nll"] - float(exact.mean()))
    return noise


def absent_from(names: Collection[str]) -> list[str]:
    """Titles of what can be measured and is not among these; of tasks, all in a few words."""
    absent = {name: metric for name, metric in METRICS.items() if name not in names}
    of_tasks = {name for name, metric in METRICS.items() if not metric.against_reference}
    if of_tasks <= absent.keys():
        absent = {name: metric for name, metric in absent.items() if name not in of_tasks}
        return [*(metric.title for metric in absent.values()), "tasks", "behaviour"]
    return [metric.title for metric in absent.values()]


def _all_samples(measured: Measured, tails: Mapping[str, float]) -> Iterator[tuple[str, Sample]]:
    scores = measured.scores
    per_token: dict[str, dict[str, NDArray[Any]]] = {
        "kl": {name: one.kl_nats for name, one in scores.items()},
        "kl_thought": {name: one.kl_nats[one.in_thought] for name, one in scores.items()},
        "kl_answer": {name: one.kl_nats[one.in_answer] for name, one in scores.items()},
        "nll": {name: one.nll_nats for name, one in scores.items()},
        "top1": {name: one.same_top for name, one in scores.items()},
        "squared_change": {name: one.squared_change for name, one in scores.items()},
        **{
            tail: {name: one.kl_nats > threshold for name, one in scores.items()}
            for tail, threshold in tails.items()
        },
    }
    for metric, passages in per_token.items():
        filled = {name: values for name, values in passages.items() if len(values)}
        yield (
            metric,
            Sample(
                {name: float(values.sum()) for name, values in filled.items()},
                {name: len(values) for name, values in filled.items()},
            ),
        )
    attempts = measured.attempts
    graded = [one for one in attempts if one.correct is not None]
    yield "solved", Sample.of((one.problem, bool(one.correct)) for one in graded)
    for kind in sorted({one.kind for one in graded}):
        of_kind = (one for one in graded if one.kind == kind)
        yield f"{_SOLVED}{kind}", Sample.of((one.problem, bool(one.correct)) for one in of_kind)
    for flag in FLAGS:
        yield flag, Sample.of((one.problem, flags_of(one)[flag]) for one in attempts)
    yield "thought_tokens", Sample.of((one.problem, one.thought_tokens) for one in attempts)
