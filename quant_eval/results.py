"""What an evaluation found, as values that go to JSON and back; what was not measured is absent."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, Self

import numpy as np

from convert.files import replacing_file
from quant_eval.divergence import Divergence, Estimate
from quant_eval.layers import LayerErrors
from quant_eval.paired import Sample

SCHEMA_VERSION = 2
Z95 = NormalDist().inv_cdf(0.975)
UNQUANTIZED_BITS = 16  # per weight: such a file differs by the noise of the path alone


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How much is measured, the same for every file of a report.

    n_tokens: reply tokens of the evaluation text that are scored, at most; whole passages.
    n_problems: problems of each kind; n_replies: replies to each problem. task_seconds: no problem
    is begun after so long, so that a slow engine's rows have a smaller n. max_tokens: longest
    reply. seed: of the problems. reply_seed: of the sampling; None takes seed. n_task_problems: of
    each benchmark's file; None takes all. needles: tokens of the texts in which needles are hidden.
    """

    n_tokens: int = 16_384
    n_problems: int = 16
    n_replies: int = 1
    task_seconds: float = 45.0
    max_tokens: int = 512
    seed: int = 0
    reply_seed: int | None = None
    n_task_problems: int | None = None
    needles: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How many replies solved problems, and how many max_tokens cut.

    n counts replies that could be graded, to n_problems problems; n_ungraded the others.
    standard_error, low, high: of the share solved and its 95 % interval, clustered by problem; None
    where no reply could be graded.
    """

    n: int
    n_correct: int
    n_cut: int
    n_problems: int
    n_ungraded: int = 0
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, attempts: "Sequence[Attempt]") -> Self:
        """Of these replies."""
        graded = [(one.problem, bool(one.correct)) for one in attempts if one.correct is not None]
        sample = Sample.of(graded)
        n_cut = sum(one.finish_reason == "length" for one in attempts)
        share = share_of(sample)
        return cls(
            n=len(graded),
            n_correct=sum(correct for _, correct in graded),
            n_cut=n_cut,
            n_problems=len(sample.counts),
            n_ungraded=len(attempts) - len(graded),
            standard_error=None if share is None else share.estimate.standard_error,
            low=None if share is None else share.low,
            high=None if share is None else share.high,
        )

    @property
    def share(self) -> float:
        """Replies that solved their problem over replies."""
        return self.n_correct / self.n


@dataclass(frozen=True, slots=True)
class Attempt:
    """One reply to a problem, or to a question that nobody grades.

    problem: the digest of what was asked. correct: None for a reply that was not graded, by choice
    or because no rule is known. thought_tokens: of the
    thought with the tag that ends it. elapsed_s: of the whole reply; first_token_s: until its first
    token; tokens_per_s: of decoding, None for a reply of one token. seed: of the sampling. at_once:
    how many replies the model was asked for at the same time.
    """

    problem: str
    kind: str
    question: str
    correct: bool | None
    reasoning: str
    answer: str
    finish_reason: str
    notices: tuple[str, ...]
    thought_tokens: int
    elapsed_s: float
    first_token_s: float
    tokens_per_s: float | None
    seed: int = 0
    at_once: int = 1


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How replies to problems behave, whatever they say; shares are of all replies.

    thought_tokens: mean length of a thought. first_token_s: median time to the first token. Errors
    are clustered by problem.
    """

    n_replies: int
    unfinished_thoughts: Estimate
    empty_thoughts: Estimate
    loops: Estimate
    language_switches: Estimate
    cut_replies: Estimate
    thought_tokens: Estimate
    first_token_s: Estimate


@dataclass(frozen=True, slots=True)
class Speed:
    """Median speed at which a reply is decoded, over replies; its error is clustered by problem.

    at_once: how many replies were asked for at the same time, at most.
    """

    tokens_per_s: Estimate
    at_once: int = 1


@dataclass(frozen=True, slots=True)
class Example:
    """One reply, to be read by people."""

    question: str
    reasoning: str
    answer: str
    finish_reason: str


@dataclass(frozen=True, slots=True)
class TaskLoss:
    """Share of problems solved less the 16-bit file's, paired, with a 95 % interval.

    n counts problems that both were asked; of fewer than MIN_CLUSTERS there is no interval.
    """

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Flip:
    """A problem that the 16-bit file solved and this one did not, with a reply of each.

    n_solved, n_reference_solved: of n_replies that both made, seed by seed. With several the two
    differ by more than one, which the luck of a single seed can do.
    """

    question: str
    reference_reasoning: str
    reference_answer: str
    reasoning: str
    answer: str
    n_solved: int = 0
    n_reference_solved: int = 1
    n_replies: int = 1


@dataclass(frozen=True, slots=True)
class Floor:
    """The noise of the path itself: what the same engine makes of the unquantized weights."""

    name: str
    sha256: str
    divergence: Mapping[str, Divergence]


@dataclass(frozen=True, slots=True)
class FileResult:
    """One file's row: its size, its divergence by part of the reply, its accuracy by task.

    sha256: of the file, or of the names and hashes of a folder's files, or of a server's address
    and its model's name. nbytes, bits_per_weight: None for a server. recipe: by which the file says
    it was made, None where it says nothing. overall_accuracy: all kinds of task together. floor:
    None for a 16-bit file itself, and where none of its engine was measured. task_loss,
    thought_change, flips: against the 16-bit file that was asked the same problems; thought_change
    is the mean thought's tokens less that file's, paired by problem, n counting problems.
    elapsed_s: of measuring. kl_tail: shares of tokens, each with the KL that they have at least.
    layers: None where the error by layer was not measured.
    """

    name: str
    sha256: str
    nbytes: int | None
    bits_per_weight: float | None
    engine: str
    divergence: Mapping[str, Divergence]
    accuracy: Mapping[str, Accuracy]
    behaviour: Behaviour | None
    speed: Speed | None
    examples: tuple[Example, ...]
    elapsed_s: float
    recipe: str | None = None
    overall_accuracy: Accuracy | None = None
    floor: Floor | None = None
    task_loss: TaskLoss | None = None
    thought_change: Estimate | None = None
    flips: tuple[Flip, ...] = ()
    kl_tail: tuple[tuple[float, float], ...] = ()
    layers: LayerErrors | None = None

    @property
    def is_unquantized(self) -> bool:
        """Whether it differs from the reference by the noise of the path alone."""
        return (self.bits_per_weight or 0) >= UNQUANTIZED_BITS


@dataclass(frozen=True, slots=True)
class Report:
    """All files of one run against one reference.

    model: the checkpoint's name. checkpoint_sha256, evaluation_sha256: of weights and text; None
    where a server's replies are all that was looked at. benchmarks: what was given as --task, with
    the SHA-256 of files.
    """

    model: str
    checkpoint_sha256: str | None
    evaluation_sha256: str | None
    settings: EvaluationSettings
    environment: Mapping[str, str]
    files: tuple[FileResult, ...]
    benchmarks: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class Share:
    """A share of replies, with the 95 % interval that belongs to its standard error."""

    estimate: Estimate
    low: float
    high: float


def share_of(sample: Sample) -> Share | None:
    """The share of replies with something, clustered by problem; None where there are no replies.

    Two problems with and two without it are added, each of as many replies as there are to a
    problem on average, so that none or all is not taken for certainty. With one reply to each
    problem these are the error and interval of the source.
    Source: Agresti and Coull 1998, "Approximate is better than exact".
    """
    if not sample.counts:
        return None
    counts = np.array(list(sample.counts.values()), dtype=np.float64)
    sums = np.array([sample.sums[name] for name in sample.counts])
    n, mean_count = float(counts.sum()), float(counts.mean())
    total = n + 4 * mean_count
    centre = float(sums.sum() + 2 * mean_count) / total
    residuals = sums - centre * counts
    added = 2 * mean_count**2 * (centre**2 + (1 - centre) ** 2)
    error = math.sqrt(float(residuals @ residuals) + added) / total
    estimate = Estimate(float(sums.sum()) / n, error, int(n))
    return Share(estimate, max(0.0, centre - Z95 * error), min(1.0, centre + Z95 * error))


def short_names(names: Sequence[str]) -> list[str]:
    """What tells the files apart: names without their ending and without what all begin with."""
    stems = [name.removesuffix(".gguf") for name in names]
    if len(stems) < 2:
        return stems
    words = [stem.split("-") for stem in stems]
    n_shared = 0
    while len({tuple(each[: n_shared + 1]) for each in words}) == 1 and n_shared < len(words[0]):
        n_shared += 1
    return ["-".join(each[n_shared:]) or stem for each, stem in zip(words, stems, strict=True)]


def to_json(value: Any) -> Any:
    """A value of this module as JSON's types, without keys for what is absent."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: to_json(each) for name, each in fields.items() if each is not None}
    if isinstance(value, Mapping):
        return {str(name): to_json(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(each) for each in value]
    return value


def write_json(path: Path, document: Any, *, indent: int | None = 2) -> None:
    """Write one JSON document with sorted keys, whole or not at all, over an older one."""
    text = json.dumps(to_json(document), indent=indent, sort_keys=True, allow_nan=False)
    with replacing_file(path, force=True) as file:
        file.write((text + "\n").encode())
