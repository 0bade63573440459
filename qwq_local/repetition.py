"""Noticing that a model goes round in circles."""

from collections.abc import Sequence

LONGEST_PERIOD = 512
N_REPEATS = 3
"""So often a passage is said again, word for word, before it counts as a loop."""
FEWEST_REPEATED = 64
"""Tokens: a row of zeros, a ruled line or a table's border is no loop yet."""
MOST_PUNCTUATION = 192
"""Tokens without a letter or digit in a row."""


class LoopDetector:
    """Watches a text's tokens for exact repeats of any period up to LONGEST_PERIOD tokens.

    A loop is N_REPEATS repeats of a period, FEWEST_REPEATED tokens at least, or
    MOST_PUNCTUATION tokens of nothing but signs and white space, whatever their order.
    """

    def __init__(self) -> None:
        import numpy as np

        self._recent = np.full(LONGEST_PERIOD, -1, dtype=np.int64)  # newest first
        self._n_matched = np.zeros(LONGEST_PERIOD, dtype=np.int64)  # in a row, by period - 1
        periods = np.arange(1, LONGEST_PERIOD + 1)
        self._n_enough = np.maximum(N_REPEATS * periods, FEWEST_REPEATED)
        self._n_signs = 0

    def add(self, token_id: int, piece: bytes) -> bool:
        """Take the next token; whether the text is in a loop now."""
        self._n_matched += 1
        self._n_matched *= self._recent == token_id
        self._recent[1:] = self._recent[:-1]
        self._recent[0] = token_id
        # bytes above 127 are letters of other scripts, or parts of them
        has_word = any(byte > 127 or chr(byte).isalnum() for byte in piece)
        self._n_signs = 0 if has_word else self._n_signs + 1
        return self._n_signs >= MOST_PUNCTUATION or bool((self._n_matched >= self._n_enough).any())


def has_loop(ids: Sequence[int], pieces: Sequence[bytes]) -> bool:
    """Whether a detector would speak up anywhere in a text."""
    detector = LoopDetector()
    return any(detector.add(*token) for token in zip(ids, pieces, strict=True))
