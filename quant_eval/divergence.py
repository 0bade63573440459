"""How far a model's predictions lie from the reference's, token by token, with standard errors.

Scored are the tokens of replies, thought and answer with their closing tags; the prompt is context
only. Both models' logits come as streams of chunks whose sizes need not agree; of each scored token
a few numbers are kept, never the logits.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convert.calibration import TokenizedConversation
from convert.errors import QwqError

MAX_SLICE_ELEMENTS = 1 << 19  # logits worked on at a time by a thread: 2 MiB an array
TAIL_POINTS = 60
KIND_PART = "kind "
POSITION_STARTS = (0, 128, 512, 2048, 8192, 32_768)  # the last is where YaRN begins

Floats = NDArray[np.float64]
Logits = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean or quantile of n observations; one cluster alone gives it no standard error."""

    value: float
    standard_error: float | None
    n: int


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What is kept of one passage's scored tokens, an entry each.

    kl_nats, nll_nats, reference_nll_nats: (n,) float64. same_top, is_answer: (n,) bool; is_answer
    is None for plain text, which has no thought either. first_position: how many tokens stand
    before the first one.
    """

    kl_nats: Floats
    nll_nats: Floats
    reference_nll_nats: Floats
    same_top: Mask
    is_answer: Mask | None
    first_position: int

    @property
    def squared_change(self) -> Floats:
        """Of the probability of the token that the text has, from the reference to the model."""
        change: Floats = np.exp(-self.nll_nats) - np.exp(-self.reference_nll_nats)
        return change * change

    @property
    def in_thought(self) -> Mask:
        return self._of_no_part if self.is_answer is None else ~self.is_answer

    @property
    def in_answer(self) -> Mask:
        return self._of_no_part if self.is_answer is None else self.is_answer

    @property
    def _of_no_part(self) -> Mask:
        return np.zeros(len(self.kl_nats), dtype=np.bool_)

    @property
    def positions(self) -> NDArray[np.int64]:
        """Of each scored token in its sequence, from 0."""
        return np.arange(self.first_position, self.first_position + len(self.kl_nats))


@dataclass(frozen=True, slots=True)
class Divergence:
    """Distance of a model from the reference over n_tokens tokens of n_passages passages.

    kl_nats is the mean of KL(reference || model); top1_agreement the share of tokens where both
    would greedily pick the same; rms_change the root mean square of the change in probability of
    the text's own tokens; perplexity_ratio the model's over the reference's, paired. Standard
    errors are clustered by passage.
    """

    n_tokens: int
    n_passages: int
    perplexity: Estimate
    reference_perplexity: Estimate
    kl_nats: Estimate
    kl_median_nats: Estimate
    kl_q99_nats: Estimate
    kl_q999_nats: Estimate
    top1_agreement: Estimate
    rms_change: Estimate
    perplexity_ratio: Estimate


def scored_rows(passage: TokenizedConversation) -> tuple[int, int]:
    """First and one past the last row of logits that predict reply tokens.

    The logits after token i predict token i + 1.
    """
    return passage.n_prompt - 1, passage.stop - 1


def score_passage(
    passage: TokenizedConversation,
    reference: Iterable[Logits],
    model: Iterable[Logits],
    *,
    threads: int | None = 1,
) -> TokenScores:
    """Score one passage from two streams of logits.

    Each stream holds, in chunks (n, vocab_size) of any n, the logits of `scored_rows` alone.
    Raises QwqError where a stream is too short, the vocabularies differ, or logits are not finite.
    """
    targets = np.asarray(passage.ids[passage.n_prompt : passage.stop], dtype=np.int64)
    parts: list[_RowScores] = []
    n_done = 0
    with ThreadPoolExecutor(threads) as pool:
        for ours, theirs in aligned(reference, model):
            if ours.shape[1] != theirs.shape[1]:
                raise QwqError(
                    f"logits: the model has a vocabulary of {theirs.shape[1]} tokens, the "
                    f"reference of {ours.shape[1]}; evaluate against the checkpoint that the file "
                    "was made from"
                )
            wanted = targets[n_done : n_done + len(ours)]
            n = max(1, MAX_SLICE_ELEMENTS // ours.shape[1])
            slices = [slice(start, start + n) for start in range(0, len(wanted), n)]
            parts += pool.map(
                _score_rows, *([rows[one] for one in slices] for rows in (wanted, ours, theirs))
            )
            n_done += len(wanted)
    if n_done != len(targets):
        raise QwqError(
            f"logits: {n_done} of {len(targets)} scored tokens came; the engine stopped early"
        )
    kl, nll, reference_nll, same_top = map(np.concatenate, zip(*parts, strict=True))
    return TokenScores(
        kl_nats=kl,
        nll_nats=nll,
        reference_nll_nats=reference_nll,
        same_top=same_top,
        is_answer=None
        if passage.answer_start is None
        else np.arange(passage.n_prompt, passage.stop) >= passage.answer_start,
        first_position=passage.n_prompt,
    )


_RowScores = tuple[Floats, Floats, Floats, Mask]


def _score_rows(targets: NDArray[np.int64], ours: Logits, theirs: Logits) -> _RowScores:
    """KL, NLL of model and reference, and whether the likeliest token is the same, (n,) each."""
    same_top = ours.argmax(axis=1) == theirs.argmax(axis=1)
    p, q = _shifted(ours, "the reference"), _shifted(theirs, "the model")
    rows = np.arange(len(targets))
    p_target, q_target = (each[rows, targets].astype(np.float64) for each in (p, q))
    weights = np.exp(p)
    p -= q
    p *= weights
    p_sum = weights.sum(axis=1, dtype=np.float64)
    q_sum = np.exp(q, out=q).sum(axis=1, dtype=np.float64)
    log_ratio = np.log(p_sum) - np.log(q_sum)
    mean = p.sum(axis=1, dtype=np.float64) / p_sum
    kl = np.maximum(mean - log_ratio, 0.0)  # KL >= 0: below it lies rounding only
    return kl, np.log(q_sum) - q_target, np.log(p_sum) - p_target, same_top


def position_part(start: int, stop: int | None) -> str:
    """The name of the part that lies between two positions."""
    return f"from {start}" if stop is None else f"{start} to {stop - 1}"


POSITION_PARTS = {
    position_part(start, stop): (start, stop)
    for start, stop in zip(POSITION_STARTS, (*POSITION_STARTS[1:], None), strict=True)
}
"""Parts of the sequence by name: first position and one past the last."""


def summarize(scores: Sequence[TokenScores], kinds: Sequence[str] = ()) -> dict[str, Divergence]:
    """Divergence over whole replies, thoughts, answers, by position and by kind of passage.

    kinds: of each passage; these parts are called KIND_PART and the kind. A part without tokens is
    left out.
    """
    parts: dict[str, list[Mask]] = {
        "reply": [np.ones(len(one.kl_nats), dtype=np.bool_) for one in scores],
        "thought": [one.in_thought for one in scores],
        "answer": [one.in_answer for one in scores],
    }
    for name, (start, stop) in POSITION_PARTS.items():
        parts[name] = [
            (one.positions >= start) & (one.positions < (stop or math.inf)) for one in scores
        ]
    for kind in dict.fromkeys(kinds):
        parts[KIND_PART + kind] = [
            np.full(len(one.kl_nats), kind == its, dtype=np.bool_)
            for one, its in zip(scores, kinds, strict=True)
        ]
    return {
        name: _summarize_part(scores, masks)
        for name, masks in parts.items()
        if any(mask.any() for mask in masks)
    }


def _summarize_part(scores: Sequence[TokenScores], masks: Sequence[Mask]) -> Divergence:
    passages = [(one, mask) for one, mask in zip(scores, masks, strict=True) if mask.any()]
    kl = [one.kl_nats[mask] for one, mask in passages]
    nll = clustered_mean([one.nll_nats[mask] for one, mask in passages])
    reference_nll = clustered_mean([one.reference_nll_nats[mask] for one, mask in passages])
    log_ratio = clustered_mean([(one.nll_nats - one.reference_nll_nats)[m] for one, m in passages])
    mean_kl = clustered_mean(kl)
    median, q99, q999 = clustered_quantiles(kl, (0.5, 0.99, 0.999))
    return Divergence(
        n_tokens=mean_kl.n,
        n_passages=len(passages),
        perplexity=_exponential(nll),
        reference_perplexity=_exponential(reference_nll),
        kl_nats=mean_kl,
        kl_median_nats=median,
        kl_q99_nats=q99,
        kl_q999_nats=q999,
        top1_agreement=clustered_mean(
            [one.same_top[mask].astype(np.float64) for one, mask in passages]
        ),
        rms_change=root(clustered_mean([one.squared_change[mask] for one, mask in passages])),
        perplexity_ratio=_exponential(log_ratio),
    )


def tail(scores: Sequence[TokenScores]) -> tuple[tuple[float, float], ...]:
    """Shares of tokens from all down to one, each with the KL that they have at least."""
    if not scores:
        return ()
    kl = np.sort(np.concatenate([one.kl_nats for one in scores]))[::-1]
    counts = np.unique(np.geomspace(len(kl), 1, TAIL_POINTS).round().astype(np.int64))[::-1]
    return tuple((float(f"{n / len(kl):.4g}"), float(f"{kl[n - 1]:.4g}")) for n in counts)


def clustered_mean(clusters: Sequence[Floats]) -> Estimate:
    """Mean over all observations, with the standard error for independent clusters of them.

    clusters: non-empty arrays, one a passage. Tokens of a passage depend on one another, so the
    passages are what was sampled: the error is a ratio estimator's, with G / (G - 1).
    Source: Cochran, Sampling Techniques, 1977, section 6.3.
    """
    sums = np.array([cluster.sum() for cluster in clusters])
    counts = np.array([len(cluster) for cluster in clusters], dtype=np.float64)
    n, n_clusters = counts.sum(), len(clusters)
    mean = sums.sum() / n
    if n_clusters < 2:
        return Estimate(float(mean), None, int(n))
    residuals = sums - mean * counts
    variance = n_clusters / (n_clusters - 1) * float(residuals @ residuals) / n**2
    return Estimate(float(mean), math.sqrt(variance), int(n))


def clustered_quantiles(clusters: Sequence[Floats], shares: Sequence[float]) -> list[Estimate]:
    """Quantiles over all observations, with standard errors for independent clusters of them.

    The share of observations above a quantile has a clustered error; half the distance between the
    quantiles that lie one such error below and above is the quantile's own. It is absent where the
    sample ends before that.
    Source: Woodruff 1952, "Confidence intervals for medians and other position measures".
    """
    ordered = np.sort(np.concatenate(clusters))
    found = []
    for share in shares:
        value = float(np.quantile(ordered, share))
        above = clustered_mean([(one > value).astype(np.float64) for one in clusters])
        spread, error = above.standard_error, None
        if spread is not None and spread <= min(share, 1 - share) + 1e-9:
            ends = np.clip((share - spread, share + spread), 0.0, 1.0)
            low, high = np.quantile(ordered, ends)
            error = float(high - low) / 2
        found.append(Estimate(value, error, len(ordered)))
    return found


def _exponential(nll: Estimate) -> Estimate:
    """A perplexity from a mean negative log-likelihood; its error by the delta method."""
    perplexity = math.exp(nll.value)
    error = None if nll.standard_error is None else perplexity * nll.standard_error
    return Estimate(perplexity, error, nll.n)


def root(mean_square: Estimate) -> Estimate:
    """A root mean square from a mean of squares; its error by the delta method."""
    root, error = math.sqrt(mean_square.value), mean_square.standard_error
    if root == 0:
        return Estimate(0.0, error, mean_square.n)
    return Estimate(root, None if error is None else error / (2 * root), mean_square.n)


def _shifted(logits: Logits, whose: str) -> Logits:
    """Logits (n, vocab_size) less the largest of each row, so that no exponential overflows.

    Exponentials are taken in float32 and summed in float64: KL comes out within 1e-8 nats at a
    quarter of the time that float64 takes. Raises QwqError on NaN or Inf.
    """
    if not np.isfinite(logits).all():
        raise QwqError(f"logits: {whose} gives NaN or Inf; the file is damaged, make it again")
    shifted: Logits = logits - logits.max(axis=1, keepdims=True)
    return shifted


def aligned(left: Iterable[Logits], right: Iterable[Logits]) -> Iterator[tuple[Logits, Logits]]:
    """Two streams of chunks cut at the same rows, until the shorter ends."""
    ours, theirs = iter(left), iter(right)
    a, b = next(ours, None), next(theirs, None)
    while a is not None and b is not None:
        n = min(len(a), len(b))
        yield a[:n], b[:n]
        a = a[n:] if n < len(a) else next(ours, None)
        b = b[n:] if n < len(b) else next(theirs, None)
