"""How a model's replies behave, whatever they say: what quantizing breaks before answers flip."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from quant_eval.divergence import Estimate, clustered_quantiles
from quant_eval.paired import Sample
from quant_eval.results import Attempt, Behaviour, share_of

_OF_EVERY_LANGUAGE = frozenset({"LATIN", "GREEK", "MATHEMATICAL", "DOUBLE-STRUCK", "MICRO"})
"""Scripts that formulas use too."""

FLAGS = ("unfinished_thoughts", "empty_thoughts", "loops", "language_switches", "cut_replies")


def flags_of(attempt: Attempt) -> dict[str, bool]:
    """What went wrong in one reply, by the names in FLAGS."""
    is_unfinished = "unfinished_thought" in attempt.notices
    return {
        "unfinished_thoughts": is_unfinished,
        "empty_thoughts": not attempt.reasoning.strip(),
        "loops": "repetition" in (*attempt.notices, attempt.finish_reason),
        "language_switches": switches_language(
            attempt.question, attempt.reasoning + attempt.answer
        ),
        "cut_replies": attempt.finish_reason == "length",
    }


def switches_language(question: str, reply: str) -> bool:
    """Whether the reply has letters of a script that the question has not; Latin is in every one's.

    Two languages of one script are not told apart.
    """
    return bool(_scripts(reply) - _scripts(question) - _OF_EVERY_LANGUAGE)


def _scripts(text: str) -> set[str]:
    """First words of the letters' Unicode names: LATIN, CJK, CYRILLIC and so on."""
    return {unicodedata.name(one, "?").split()[0] for one in set(text) if one.isalpha()}


def summarize_behaviour(attempts: Sequence[Attempt]) -> Behaviour | None:
    """Of replies to problems; None where there are none."""
    if not attempts:
        return None
    flags = [flags_of(attempt) for attempt in attempts]
    shares = {}
    for name in FLAGS:
        found = zip(attempts, flags, strict=True)
        share = share_of(Sample.of((one.problem, its[name]) for one, its in found))
        assert share is not None
        shares[name] = share.estimate
    lengths = Sample.of((one.problem, one.thought_tokens) for one in attempts).mean
    assert lengths is not None
    return Behaviour(
        n_replies=len(attempts),
        **shares,
        thought_tokens=lengths,
        first_token_s=median_of((one.problem, one.first_token_s) for one in attempts),
    )


def median_of(observations: Iterable[tuple[str, float]]) -> Estimate:
    """The median of one or more observations, each with the problem that it belongs to."""
    problems: defaultdict[str, list[float]] = defaultdict(list)
    for problem, value in observations:
        problems[problem].append(value)
    (median,) = clustered_quantiles([np.array(each) for each in problems.values()], (0.5,))
    return median
