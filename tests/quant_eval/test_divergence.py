"""The divergence's arithmetic against torch and against properties that hold for any logits."""

import itertools
import math
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.calibration import TokenizedConversation
from convert.errors import QwqError
from quant_eval import divergence
from quant_eval.divergence import (
    Floats,
    Logits,
    TokenScores,
    clustered_mean,
    clustered_quantiles,
    score_passage,
    scored_rows,
    summarize,
    tail,
)

PASSAGE = TokenizedConversation(
    ids=(3, 1, 4, 1, 5, 9, 2, 6, 5, 3), n_prompt=3, answer_start=6, stop=9
)


def logits(seed: int, n: int = 10, n_vocab: int = 12, scale: float = 3.0) -> Logits:
    return np.random.default_rng(seed).normal(0, scale, (n, n_vocab)).astype(np.float32)


def cut(rows: Logits, sizes: list[int]) -> Iterator[Logits]:
    start = 0
    for size in itertools.cycle(sizes):
        if start >= len(rows):
            return
        yield rows[start : start + size]
        start += size


def score(
    passage: TokenizedConversation,
    reference: Logits,
    model: Logits,
    sizes: tuple[list[int], list[int]] = ([99], [99]),
    threads: int = 1,
) -> TokenScores:
    """Score from logits after every token, cut into chunks of these sizes."""
    rows = slice(*scored_rows(passage))
    ours, theirs = (cut(every[rows], n) for every, n in zip((reference, model), sizes, strict=True))
    return score_passage(passage, ours, theirs, threads=threads)


def test_scores_equal_torch() -> None:
    """Catches a wrong direction of the KL, a target off by one, and a thought's end off by one."""
    reference, model = logits(0), logits(1)
    scores = score(PASSAGE, reference, model)
    p = torch.log_softmax(torch.tensor(reference).double(), dim=-1)[2:8]
    q = torch.log_softmax(torch.tensor(model).double(), dim=-1)[2:8]
    targets = torch.tensor(PASSAGE.ids[3:9])
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(scores.kl_nats, kl.numpy(), rtol=1e-6, atol=1e-7)
    nll = torch.nn.functional.nll_loss(q, targets, reduction="none")
    np.testing.assert_allclose(scores.nll_nats, nll.numpy(), rtol=1e-6, atol=1e-7)
    reference_nll = torch.nn.functional.nll_loss(p, targets, reduction="none")
    np.testing.assert_allclose(
        scores.reference_nll_nats, reference_nll.numpy(), rtol=1e-6, atol=1e-7
    )
    assert (scores.same_top == (p.argmax(-1) == q.argmax(-1)).numpy()).all()
    assert scores.in_answer.tolist() == [False] * 3 + [True] * 3


def test_summary_equals_plain_numpy() -> None:
    """Catches parts that mix, and a perplexity that is not the exponential of the mean."""
    scores = [score(PASSAGE, logits(i), logits(i + 50)) for i in range(5)]
    parts = summarize(scores)
    assert parts["reply"].n_tokens == 30
    assert parts["thought"].n_tokens == parts["answer"].n_tokens == 15
    kl = np.concatenate([one.kl_nats for one in scores])
    assert parts["reply"].kl_nats.value == pytest.approx(kl.mean())
    assert parts["reply"].kl_median_nats.value == pytest.approx(np.median(kl))
    answer = np.concatenate([one.nll_nats[3:] for one in scores])
    assert parts["answer"].perplexity.value == pytest.approx(math.exp(answer.mean()))
    assert parts["reply"].n_passages == 5
    assert parts["reply"].kl_q999_nats.value == pytest.approx(np.quantile(kl, 0.999))
    every, reference = (
        np.concatenate([getattr(one, name) for one in scores])
        for name in ("nll_nats", "reference_nll_nats")
    )
    rms = np.sqrt(np.mean((np.exp(-every) - np.exp(-reference)) ** 2))
    assert parts["reply"].rms_change.value == pytest.approx(rms)
    ratio = parts["reply"].perplexity.value / parts["reply"].reference_perplexity.value
    assert parts["reply"].perplexity_ratio.value == pytest.approx(ratio)


def test_positions_count_from_the_prompt() -> None:
    """Catches a long text whose far end, where rope may be wrong, is averaged away."""
    far = replace(PASSAGE, ids=(7,) * 125 + PASSAGE.ids, n_prompt=125, answer_start=127, stop=130)
    parts = summarize([score(far, logits(0, 140), logits(1, 140))])
    assert parts["0 to 127"].n_tokens == 3
    assert parts["128 to 511"].n_tokens == 2
    assert "512 to 2047" not in parts


def test_a_paired_ratio_knows_more_than_two_perplexities() -> None:
    """Catches a ratio whose error forgets that both models read the same text."""
    scores = [score(PASSAGE, logits(i), logits(i) * np.float32(0.99)) for i in range(20)]
    reply = summarize(scores)["reply"]
    assert reply.perplexity_ratio.standard_error is not None
    assert reply.perplexity.standard_error is not None
    assert reply.perplexity_ratio.standard_error < reply.perplexity.standard_error / 5


def test_a_model_does_not_diverge_from_itself() -> None:
    """Catches any asymmetry between the two sides."""
    parts = summarize([score(PASSAGE, logits(0), logits(0)) for _ in range(3)])
    assert parts["reply"].kl_nats.value == 0.0
    assert parts["reply"].top1_agreement.value == 1.0
    assert parts["reply"].perplexity == parts["reply"].reference_perplexity


@given(st.integers(0, 1 << 30), st.floats(1e-3, 1e4))
@settings(max_examples=50, deadline=None)
def test_kl_is_never_negative_and_never_overflows(seed: int, scale: float) -> None:
    """Catches an unstable softmax: logits of any size give finite, non-negative numbers."""
    scores = score(PASSAGE, logits(seed, scale=scale), logits(seed + 1, scale=scale))
    assert (scores.kl_nats >= 0).all()
    assert np.isfinite(scores.kl_nats).all()
    assert np.isfinite(scores.nll_nats).all()


def test_a_shift_of_all_logits_changes_nothing() -> None:
    """Catches a missing normalisation: adding a constant is no change of the distribution."""
    plain = score(PASSAGE, logits(0), logits(1))
    shifted = score(PASSAGE, logits(0) + np.float32(64), logits(1))
    np.testing.assert_allclose(plain.kl_nats, shifted.kl_nats, rtol=1e-4)


@given(st.lists(st.integers(1, 7), min_size=1), st.lists(st.integers(1, 7), min_size=1))
@settings(max_examples=50, deadline=None)
def test_chunk_sizes_do_not_matter(left: list[int], right: list[int]) -> None:
    """Catches rows lost or doubled where two streams are cut at different places."""
    whole = score(PASSAGE, logits(0), logits(1))
    chunked = score(PASSAGE, logits(0), logits(1), (left, right))
    for name in ("kl_nats", "nll_nats", "reference_nll_nats", "same_top", "is_answer"):
        assert (getattr(whole, name) == getattr(chunked, name)).all()


def test_small_divergences_are_exact() -> None:
    """Catches a KL that rounding swallows: over a large vocabulary and close to nothing."""
    passage = TokenizedConversation((0, 1, 2), n_prompt=1, answer_start=2, stop=3)
    reference = logits(0, n=3, n_vocab=50_000)
    for distance in (1e-1, 1e-2, 1e-3):
        model = reference + logits(1, n=3, n_vocab=50_000, scale=distance)
        found = score(passage, reference, model).kl_nats
        p, q = (
            torch.log_softmax(torch.tensor(each).double(), dim=-1)[:2]
            for each in (reference, model)
        )
        expected = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-8)


def test_slices_are_bounded() -> None:
    """Catches a whole chunk worked on at once: an array of its size would be 16 MB."""
    passage = TokenizedConversation((0,) * 4001, n_prompt=1, answer_start=2, stop=4001)
    ours, theirs = logits(0, n=4000, n_vocab=1000), logits(1, n=4000, n_vocab=1000)
    tracemalloc.start()
    score_passage(passage, [ours], [theirs])
    _, peak_nbytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_nbytes < 14e6


@pytest.mark.parametrize(("n_elements", "threads"), [(12, 3), (30, 2), (1 << 19, 4)])
def test_slices_and_threads_do_not_matter(
    n_elements: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches slices that threads bring back in another order, and tokens taken for others."""
    whole = score(PASSAGE, logits(0), logits(1))
    monkeypatch.setattr(divergence, "MAX_SLICE_ELEMENTS", n_elements)
    sliced = score(PASSAGE, logits(0), logits(1), threads=threads)
    for name in ("kl_nats", "nll_nats", "reference_nll_nats", "same_top", "is_answer"):
        assert (getattr(whole, name) == getattr(sliced, name)).all()


def test_standard_error_is_clustered() -> None:
    """Catches errors as of independent tokens: repeating each token must not shrink them."""
    rng = np.random.default_rng(0)
    clusters = [rng.normal(size=n) for n in rng.integers(5, 20, size=30)]
    once = clustered_mean(clusters)
    thrice = clustered_mean([np.repeat(cluster, 3) for cluster in clusters])
    assert once.standard_error is not None
    assert thrice.value == pytest.approx(once.value)
    assert thrice.standard_error == pytest.approx(once.standard_error)
    assert thrice.n == 3 * once.n


def test_standard_error_covers() -> None:
    """Catches a wrong scale: of 400 samples about 95 % lie within 1.96 standard errors.

    With clusters this many the count is binomial(400, 0.94 to 0.95): below 360 or above 395 less
    than one time in ten thousand, and the seed is fixed.
    """
    rng = np.random.default_rng(1)
    n_covered = 0
    for _ in range(400):
        means = rng.normal(size=60)
        clusters = [rng.normal(mean, 1.0, size=rng.integers(5, 20)) for mean in means]
        estimate = clustered_mean(clusters)
        assert estimate.standard_error is not None
        n_covered += abs(estimate.value) < 1.96 * estimate.standard_error
    assert 360 <= n_covered <= 395


def test_one_passage_has_no_standard_error() -> None:
    """Catches an error of 0 reported for what was not measured."""
    parts = summarize([score(PASSAGE, logits(0), logits(1))])
    assert parts["reply"].kl_nats.standard_error is None


def test_a_part_without_tokens_is_absent() -> None:
    """Catches a mean over nothing."""
    one = score(PASSAGE, logits(0), logits(1))
    thought_only = TokenScores(
        one.kl_nats,
        one.nll_nats,
        one.reference_nll_nats,
        one.same_top,
        np.zeros_like(one.in_answer),
        one.first_position,
    )
    assert set(summarize([thought_only])) == {"reply", "thought", "0 to 127"}


def test_bad_streams_are_errors() -> None:
    """Catches another vocabulary, a stream that ends early, and logits that are not numbers."""
    with pytest.raises(QwqError, match="vocabulary of 13 tokens, the reference of 12"):
        score(PASSAGE, logits(0), logits(1, n_vocab=13))
    with pytest.raises(QwqError, match="3 of 6 scored tokens"):
        score(PASSAGE, logits(0), logits(1)[:5])
    broken = logits(1)
    broken[4, 2] = np.nan
    with pytest.raises(QwqError, match="the model gives NaN or Inf"):
        score(PASSAGE, logits(0), broken)


def test_kinds_are_parts_of_the_whole() -> None:
    """Catches a passage under another's kind, and one that is lost."""
    scores = [score(PASSAGE, logits(i), logits(i + 9)) for i in range(3)]
    parts = summarize(scores, ["code", "prose", "code"])
    assert parts["kind code"].n_passages == 2
    assert parts["kind prose"].kl_nats.value == pytest.approx(scores[1].kl_nats.mean())
    assert parts["kind code"].n_tokens + parts["kind prose"].n_tokens == parts["reply"].n_tokens


def test_the_tail_ends_at_the_largest() -> None:
    """Catches shares of the wrong side, and a last token that is interpolated away."""
    scores = score(PASSAGE, logits(0), logits(1))
    points = tail([scores, scores])
    assert points[0][0] == 1.0
    assert points[0][1] == pytest.approx(scores.kl_nats.min(), rel=1e-3)
    assert points[-1][1] == pytest.approx(scores.kl_nats.max(), rel=1e-3)
    for share, kl in points:
        assert share >= np.mean(scores.kl_nats >= 1.001 * kl) - 1e-3
        assert share <= np.mean(scores.kl_nats >= 0.999 * kl) + 1e-3
    assert tail([]) == ()


def test_quantiles_have_errors_that_cover() -> None:
    """Catches errors as if tokens were independent, and errors of one quantile under another.

    200 samples of 80 passages whose tokens share their passage's level. Two errors must hold the
    true quantile in at least 170 of them for the median and 99 %, in 150 for 99.9 %, whose tail is
    thin; with a true cover of 0.93 and 0.86 the chance of a false alarm is below 1e-4. Errors of
    independent tokens cover the median in about half of them.
    """
    rng = np.random.default_rng(11)
    shares = (0.5, 0.99, 0.999)

    def passages(n: int) -> list[Floats]:
        levels = rng.normal(size=n)
        sizes = rng.integers(30, 300, size=n)
        drawn = (one + 1.5 * rng.normal(size=size) for one, size in zip(levels, sizes, strict=True))
        return [np.exp(one).astype(np.float64) for one in drawn]

    truth = np.quantile(np.concatenate(passages(10_000)), shares)
    n_held = np.zeros(3)
    for _ in range(200):
        found = clustered_quantiles(passages(80), shares)
        for index, one in enumerate(found):
            assert one.standard_error is not None
            n_held[index] += abs(one.value - truth[index]) <= 2 * one.standard_error
    assert (n_held >= (170, 170, 150)).all(), n_held
    assert (n_held < 199).all(), n_held


def test_a_quantile_at_the_end_of_the_sample_has_no_error() -> None:
    """Catches certainty about a tail of which the sample has not one token."""
    few = list(np.arange(20, dtype=np.float64).reshape(2, 10))
    median, tail = clustered_quantiles(few, (0.5, 0.999))
    assert median.value == 9.5
    assert median.standard_error == pytest.approx(9.5)
    assert tail.value == pytest.approx(18.981)
    assert tail.standard_error is None
    assert clustered_quantiles(few[:1], (0.5,))[0].standard_error is None
