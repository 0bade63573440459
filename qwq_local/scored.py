"""Ids that know how likely they were."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class ScoredId(int):
    """An id with its logprob in nats, and the likeliest ids with theirs, the best first.

    They are the model's own: before temperature, penalties and all else of the sampler chain.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


def score(token_id: int, logits: NDArray[np.float32], n_top: int) -> ScoredId:
    """logits: (vocab_size,), from which the id was drawn; summed in float64."""
    import numpy as np

    logprobs = logits.astype(np.float64)
    logprobs -= logprobs.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    best = np.argsort(-logprobs, kind="stable")[:n_top]
    return _scored(token_id, logprobs[token_id], [(i, logprobs[i]) for i in best])


def pack(scored: ScoredId) -> list[Any]:
    """What JSON can hold, and unpack makes the same of elsewhere."""
    return [scored.logprob, scored.top]


def unpack(token_id: int, packed: list[Any]) -> ScoredId:
    """The inverse of pack."""
    return _scored(token_id, *packed)


def _scored(token_id: int, logprob: float, top: list[tuple[float, float]]) -> ScoredId:
    scored = ScoredId(token_id)
    scored.logprob = float(logprob)
    scored.top = tuple((int(i), float(value)) for i, value in top)
    return scored
