"""Noticing that a model goes round in circles."""

import re
from collections.abc import Sequence

LONGEST_PERIOD = 512
N_REPEATS = 3
"""So often a passage is said again, word for word, before it counts as a loop."""
FEWEST_REPEATED = 64
"""Tokens: a row of zeros, a ruled line or a table's border is no loop yet."""
MOST_PUNCTUATION = 192
"""Tokens without a letter or digit in a row."""
_LOOK_EVERY, _MATCH = 16, 32
"""So often, in tokens, periods are looked for, by so many tokens that are said again.

Together less than FEWEST_REPEATED, so a period is known before it counts.
"""
_WORD = re.compile(rb"[0-9A-Za-z\x80-\xff]")
"""Bytes above 127 are letters of other scripts, or parts of them."""


class LoopDetector:
    """Watches a text's tokens for exact repeats of any period up to LONGEST_PERIOD tokens.

    A loop is N_REPEATS repeats of a period, FEWEST_REPEATED tokens at least, or
    MOST_PUNCTUATION tokens of nothing but signs and white space, whatever their order.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._n_matched: dict[int, int] = {}  # in a row, by period
        self._n_signs = 0

    def add(self, token_id: int, piece: bytes) -> bool:
        """Take the next token; whether the text is in a loop now."""
        ids = self._ids
        ids.append(token_id)
        self._n_signs = 0 if _WORD.search(piece) else self._n_signs + 1
        if self._n_matched:
            goes_on = ((p, n) for p, n in self._n_matched.items() if ids[-1 - p] == token_id)
            self._n_matched = {period: n + 1 for period, n in goes_on}
        if len(ids) % _LOOK_EVERY == 0:
            self._look()
        return self._n_signs >= MOST_PUNCTUATION or any(
            n >= max(N_REPEATS * period, FEWEST_REPEATED) for period, n in self._n_matched.items()
        )

    def _look(self) -> None:
        """Find the periods in which the last ids go."""
        ids = self._ids
        newest, n_ids = ids[-1], len(ids)
        for period in range(1, min(LONGEST_PERIOD, n_ids - _MATCH) + 1):
            if ids[-1 - period] != newest or period in self._n_matched:
                continue
            n = 1
            while n < n_ids - period and ids[-1 - n] == ids[-1 - n - period]:
                n += 1
            if n >= _MATCH:
                self._n_matched[period] = n


def has_loop(ids: Sequence[int], pieces: Sequence[bytes]) -> bool:
    """Whether a detector would speak up anywhere in a text."""
    detector = LoopDetector()
    return any(detector.add(*token) for token in zip(ids, pieces, strict=True))
