"""What an evaluation found, as values that go to JSON and back; what was not measured is absent."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.files import replacing_file
from quant_eval.divergence import Divergence, Estimate
from quant_eval.layers import LayerErrors

SCHEMA_VERSION = 1
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
    """How many replies solved problems of one kind, and how many max_tokens cut.

    n counts replies that could be graded, n_ungraded the others.
    """

    n: int
    n_correct: int
    n_cut: int
    n_ungraded: int = 0

    @property
    def share(self) -> float:
        """Solved problems over problems."""
        return self.n_correct / self.n

    @property
    def standard_error(self) -> float:
        return share_error(self.n_correct, self.n)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One reply to a problem, or to a question that nobody grades.

    problem: the digest of what was asked. correct: None for a reply that was not graded, by choice
    or because no rule is known. thought_tokens: of the
    thought with the tag that ends it. elapsed_s: of the whole reply; first_token_s: until its first
    token; tokens_per_s: of decoding, None for a reply of one token.
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


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How replies to problems behave, whatever they say; shares are of all replies.

    thought_tokens: mean length of a thought. first_token_s: median time to the first token.
    """

    n_replies: int
    unfinished_thoughts: Estimate
    empty_thoughts: Estimate
    loops: Estimate
    language_switches: Estimate
    cut_replies: Estimate
    thought_tokens: Estimate
    first_token_s: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Median speed of decoding over replies that were one at a time."""

    median_tokens_per_s: float
    n_replies: int


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

    n counts problems that both were asked.
    """

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Flip:
    """A problem that the 16-bit file solved and this one did not, with both replies."""

    question: str
    reference_reasoning: str
    reference_answer: str
    reasoning: str
    answer: str


@dataclass(frozen=True, slots=True)
class FileResult:
    """One file's row: its size, its divergence by part of the reply, its accuracy by task.

    sha256: of the file, or of the names and hashes of a folder's files, or of a server's address
    and its model's name. nbytes, bits_per_weight: None for a server. task_loss, flips: against
    the 16-bit file of the same report. elapsed_s: of measuring. kl_tail: shares of tokens, each
    with the KL that they have at least. layers: None where the error by layer was not measured.
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
    task_loss: TaskLoss | None = None
    flips: tuple[Flip, ...] = ()
    kl_tail: tuple[tuple[float, float], ...] = ()
    layers: LayerErrors | None = None

    @property
    def overall_accuracy(self) -> Accuracy | None:
        """All kinds of task together, None where no problem was asked."""
        parts = self.accuracy.values()
        if not any(one.n for one in parts):
            return None
        return Accuracy(
            sum(one.n for one in parts),
            sum(one.n_correct for one in parts),
            sum(one.n_cut for one in parts),
            sum(one.n_ungraded for one in parts),
        )


@dataclass(frozen=True, slots=True)
class Report:
    """All files of one run against one reference.

    model: the checkpoint's name. checkpoint_sha256, evaluation_sha256: of weights and text; None
    where a server's replies are all that was looked at.
    """

    model: str
    checkpoint_sha256: str | None
    evaluation_sha256: str | None
    settings: EvaluationSettings
    environment: Mapping[str, str]
    files: tuple[FileResult, ...]
    schema_version: int = SCHEMA_VERSION


def share_error(n_with: int, n: int) -> float:
    """Standard error of a share, two observations with and two without added.

    So that none or all is not taken for certainty.
    Source: Agresti and Coull 1998, "Approximate is better than exact".
    """
    share = (n_with + 2) / (n + 4)
    return math.sqrt(share * (1 - share) / (n + 4))


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
