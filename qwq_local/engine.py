"""What every engine offers: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from qwq_local.sampling import Sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Engine(Protocol):
    """One loaded model with its tokenizer and its kv_cache.

    Several threads may use it, and several replies take turns on it.
    """

    @property
    def vocab_size(self) -> int:
        """Columns of the logits, padding rows of the vocabulary included."""

    @property
    def context_length(self) -> int:
        """The most ids that prompt and reply may have together."""

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Text and id of each special token; the tags of thoughts and calls are not special."""

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        """Ids of a text; where parse_special is false, special tokens in it are plain text."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that an id stands for, b"" for a padding row; they may cut a character."""

    def n_cached(self, ids: Sequence[int]) -> int:
        """How many leading ids a reply to this prompt would find in the kv_cache."""

    def generate(
        self,
        ids: Sequence[int],
        *,
        sampling: Sampling,
        seed: int,
        max_tokens: int,
        stop_ids: Collection[int],
    ) -> Iterator[int]:
        """Sample ids that follow the prompt, as they come.

        Ends after max_tokens ids, or with the first id of stop_ids, which is yielded too.
        len(ids) + max_tokens must not exceed context_length. Closing the iterator cancels.
        """

    def logits(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Logits at every position of the ids, in order, as chunks of (n, vocab_size)."""

    def close(self) -> None:
        """Free the memory; the engine is of no use afterwards. A second call does nothing."""


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading ids two sequences share."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
