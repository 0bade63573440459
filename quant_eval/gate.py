"""Is a file worse than its baseline? Decided on bounds, with a stated rate of false alarms.

A quantity has regressed where even the favourable bound of its paired difference is worse than the
baseline by more than the metric's slack, or the noise of the path itself where that is more. The
bounds of all quantities together are so wide that a file which is not worse fails in ALARM_RATE of
all gates at most (Bonferroni). What a baseline has and the file lacks counts as unmeasured, and
unmeasured is not passed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from gguf import LlamaFileType

from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from convert.gguf_header import read_header
from quant_eval.baseline import AGAIN, Baseline, Entry, differences_of, shortened
from quant_eval.closeness import Closeness, closeness_of
from quant_eval.measurement import Measured
from quant_eval.metrics import METRICS, Metric, metrics_among, samples_of
from quant_eval.paired import MIN_CLUSTERS, Sample, paired_difference, t_quantile
from quant_eval.results import EvaluationSettings

ALARM_RATE = 0.01
MIN_SHARE_OF_CLUSTERS = 0.9
WEIGHT_SLACK = 0.02  # of a tensor's relative error
WEIGHT_FLOOR = 1e-6
SCALE_SLACK = 0.005  # of a tensor's size on the whole

Verdict = Literal["passed", "note", "regressed", "unmeasured"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was held against the baseline or a limit, and in words what came out."""

    name: str
    verdict: Verdict
    words: str


@dataclass(frozen=True, slots=True)
class NumberCheck(Check):
    """A check of one of METRICS, with the numbers that the words are made of; finite ones alone.

    Against a baseline: baseline, difference, low, high (the bounds of the difference), allowed, n,
    n_baseline. Against a limit: value, reach, limit, n. Of either: floor, the noise of the path.
    """

    metric: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Limit:
    """The most that a type may cost, whatever the baseline: mean KL in nats, and top-1 share."""

    kl_nats: float
    top1: float | None


LIMITS = {
    "Q8_0": Limit(0.0015, 0.98),
    "Q6_K": Limit(0.003, 0.975),
    "Q5_K_M": Limit(0.008, None),
    "Q4_K_M": Limit(0.025, 0.92),
    "Q3_K_M": Limit(0.09, None),
    "Q2_K": Limit(0.35, None),
}
"""Where to start with models of QwQ's size."""


def judge_samples(
    baseline: Mapping[str, Sample],
    found: Mapping[str, Sample],
    *,
    alarm_rate: float = ALARM_RATE,
    floor: Mapping[str, float] | None = None,
) -> Iterator[Check]:
    """Every quantity of the baseline, paired with the file's; floor: the noise of some of them."""
    metrics = metrics_among(baseline)
    for name, metric in metrics.items():
        before = baseline[name].mean
        difference = paired_difference(
            baseline[name], found.get(name, Sample({}, {})), of_shares=metric.of_replies
        )
        n_wanted = len(baseline[name].counts)
        n = 0 if difference is None else difference.n
        if (
            before is None
            or difference is None
            or n < max(MIN_CLUSTERS, MIN_SHARE_OF_CLUSTERS * n_wanted)
        ):
            words = f"has {n} of the baseline's {n_wanted} passages or problems"
            counts = {"n": n, "n_baseline": n_wanted}
            yield NumberCheck(metric.title, "unmeasured", words, name, counts)
            continue
        noise = (floor or {}).get(name, 0.0)
        allowed = max(metric.slack * abs(before.value), noise)
        reach = difference.reach(1 - alarm_rate / len(metrics) / (2 if metric.two_sided else 1))
        low, high = difference.centre - reach, difference.centre + reach
        numbers = {
            "baseline": before.value,
            "difference": difference.value,
            "low": low,
            "high": high,
            "allowed": allowed,
            "n": n,
            "n_baseline": n_wanted,
            **({"floor": noise} if floor and name in floor else {}),
        }
        regressed, bounds = _verdict(metric, low, high, allowed)
        yield NumberCheck(
            metric.title,
            "regressed" if regressed else "passed",
            f"was {before.value:.4g} and changed by {difference.value:+.3g}; it is {bounds} "
            f"(n = {n}{_noise(name, floor)})",
            name,
            {key: number for key, number in numbers.items() if math.isfinite(number)},
        )


def _verdict(metric: Metric, low: float, high: float, allowed: float) -> tuple[bool, str]:
    """Whether a difference between these bounds is a regression, and the bounds in words."""
    if metric.two_sided:
        return low > allowed or high < -allowed, f"other by {low:+.2g} to {high:+.2g}"
    least, most = (-high, -low) if metric.more_is_better else (low, high)
    return least > allowed, f"worse by {least:.2g} to {most:.2g}"


def _noise(name: str, floor: Mapping[str, float] | None) -> str:
    """Behind a number against the reference: what the path itself has of it."""
    return f"; noise of the path {floor[name]:.4g}" if floor and name in floor else ""


def judge_limit(
    limit: Limit, found: Mapping[str, Sample], *, floor: Mapping[str, float] | None = None
) -> Iterator[Check]:
    """Mean KL and top-1 agreement against fixed numbers, on their bounds too."""
    allowed = {"kl": limit.kl_nats, "top1": limit.top1}
    for name, number in allowed.items():
        if number is None:
            continue
        metric = METRICS[name]
        title = f"limit of {metric.title}"
        mean = found[name].mean if name in found else None
        n = len(found[name].counts) if name in found else 0
        if mean is None or mean.standard_error is None or n < MIN_CLUSTERS:
            words = f"has {n} passages to hold against {number:g}"
            yield NumberCheck(title, "unmeasured", words, name, {"n": n, "limit": number})
            continue
        reach = t_quantile(1 - ALARM_RATE / len(allowed), n - 1) * mean.standard_error
        excess = number - mean.value if metric.more_is_better else mean.value - number
        verdict: Verdict = "regressed" if excess - reach > 0 else "passed"
        words = f"is {mean.value:.4g} +- {reach:.2g} and may be {number:g}{_noise(name, floor)}"
        numbers = {"value": mean.value, "reach": reach, "limit": number, "n": n}
        if floor and name in floor:
            numbers["floor"] = floor[name]
        yield NumberCheck(title, verdict, words, name, numbers)


def judge_differences(accepted: Sequence[str], found: Sequence[str]) -> Check:
    """What the file says of itself against the checkpoint: sizes, rope, tokenizer, template."""
    new = [words for words in found if words not in accepted]
    if new:
        return Check("metadata", "regressed", "; ".join(new))
    return Check("metadata", "passed", "says what the checkpoint says")


def judge_weights(accepted: Mapping[str, Closeness], found: Mapping[str, Closeness]) -> Check:
    """Each tensor against the checkpoint's; it is not sampled, so the slack alone counts."""
    odd = sorted(accepted.keys() ^ found.keys())
    if odd:
        return Check("weights", "unmeasured", f"has other tensors than the baseline: {odd[0]}")
    worse = [words for name in accepted for words in _why_worse(name, accepted[name], found[name])]
    if worse:
        return Check("weights", "regressed", _first_of(worse))
    return Check("weights", "passed", f"{len(accepted)} tensors are as close as they were")


def _why_worse(name: str, before: Closeness, after: Closeness) -> Iterator[str]:
    """A size that moved is a fault in either direction, unless the tensor came clearly nearer.

    Coarse types shrink a tensor, so that scales off by 2 % may bring its size nearer to 1.
    """
    if after.relative > before.relative * (1 + WEIGHT_SLACK) + WEIGHT_FLOOR:
        yield (
            f"{name} differs from the checkpoint by {after.relative:.3%}, was {before.relative:.3%}"
        )
    elif abs(after.scale - before.scale) > SCALE_SLACK and after.relative > before.relative * (
        1 - WEIGHT_SLACK
    ):
        yield f"{name} is {after.scale:.4f} times the checkpoint's, was {before.scale:.4f}"


def _first_of(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


def settings_of_gate(baseline: Baseline, reply_seed: int | None) -> EvaluationSettings:
    """The baseline's own, without a limit of time and with other replies where that is asked."""
    settings = replace(baseline.settings, task_seconds=math.inf)
    return settings if reply_seed is None else replace(settings, reply_seed=reply_seed)


def gate_file(
    measured: Measured, entry: Entry, checkpoint: Checkpoint, *, threads: int | None
) -> list[Check]:
    """All checks of a measured file against its entry of a baseline.

    Weights and metadata are read unless the file is the baseline's, byte for byte.
    """
    found = samples_of(measured, entry.tails)
    kept = {name: shortened(one) for name, one in found.items()}
    checks = list(judge_samples(entry.samples, kept, floor=entry.floor))
    if measured.sha256 == entry.sha256:
        return [*checks, Check("file", "passed", "is the baseline's, byte for byte")]
    path = measured.path
    assert path is not None
    return [
        *checks,
        _check_differences(path, entry.differences, checkpoint),
        _check_weights(path, entry.weights, checkpoint, threads),
    ]


def _check_differences(path: Path, accepted: Sequence[str], checkpoint: Checkpoint) -> Check:
    try:
        found = differences_of(path, checkpoint)
    except QwqError as error:  # as of a tokenizer that nobody knows
        return Check("metadata", "regressed", str(error))
    return judge_differences(accepted, found)


def _check_weights(
    path: Path, accepted: Mapping[str, Closeness], checkpoint: Checkpoint, threads: int | None
) -> Check:
    found, problems = closeness_of(path, checkpoint, threads=threads)
    if problems:
        return Check("weights", "regressed", _first_of(problems))
    return judge_weights(accepted, found)


def check_conditions(baseline: Baseline, path: Path, *, checkpoint: str, text: str) -> None:
    """Raise QwqError where the baseline was measured against something else."""
    for what, here, there in (
        ("checkpoint", checkpoint, baseline.checkpoint_sha256),
        ("evaluation text", text, baseline.evaluation_sha256),
    ):
        if here != there:
            raise QwqError(
                f"{path}: was made with another {what}, of SHA-256 {there[:12]} and not "
                f"{here[:12]}; {AGAIN}"
            )


def limit_of(path: Path) -> Limit:
    """The limit for a GGUF file's own type. Raises QwqError where there is none."""
    number = read_header(path).metadata.get("general.file_type") if path.is_file() else None
    known = {int(one): one.name.removeprefix("MOSTLY_") for one in LlamaFileType}
    name = known.get(number, "") if isinstance(number, int) else ""
    if name not in LIMITS:
        raise QwqError(
            f"{path}: is of type {name or number}, for which there is no limit; "
            f"there are some for {', '.join(LIMITS)}"
        )
    return LIMITS[name]
