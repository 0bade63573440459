"""Speculation: ids are proposed and read in one batch, and kept while the model draws the same.

Every id is drawn by the target itself, from its own logits, with the sampler of the plain loop. So
a reply is that of the plain loop wherever a batch computes the bits that single rows do, which
depends on the file's types and the machine; it is tried out before it is relied on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Protocol

from qwq_local.engine import Drafts

SIZES = (8, 4, 2)
"""Rows of a batch: the last id of the sequence, and what is proposed to follow it."""
KV_UNIT = 256
"""llama.cpp's kernels see so many positions or a multiple: what held for one unit holds in it."""
N_MATCH = 3  # ids that must have occurred before
_GUESSED_COST = 1.2  # of a batch that was never timed, in single rows
_LEAST_SPEEDUP = 1.1
_PAUSES = (16, 512)  # tokens between the tries of a draft that costs something, least and greatest


class Drafter(Protocol):
    """Proposes ids for one reply. is_free: whether that costs next to nothing."""

    is_free: bool

    def propose(self, sequence: Sequence[int], n: int) -> list[int]:
        """What may follow, n ids at most. The sequence is that of the last call, or longer."""


class NgramDrafter:
    """Proposes what followed the sequence's last ids where they occurred before."""

    is_free = True

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # the last place where it occurred
        self._n_seen = N_MATCH

    def propose(self, sequence: Sequence[int], n: int) -> list[int]:
        for end in range(self._n_seen, len(sequence)):
            self._ends[tuple(sequence[end - N_MATCH : end])] = end
        self._n_seen = max(N_MATCH, len(sequence))
        start = self._ends.get(tuple(sequence[-N_MATCH:]))
        if start is None:
            return []
        period = len(sequence) - start
        return [sequence[start + index % period] for index in range(n)]


class Pace:
    """What batches bring and cost, as measured lately.

    least_speedup: what a batch must promise over single rows to be read.
    """

    def __init__(self) -> None:
        self.least_speedup = _LEAST_SPEEDUP
        self._gain = dict.fromkeys(SIZES, 1.0)  # ids that a batch of so many rows brings
        self._n_gains = dict.fromkeys(SIZES, 3)
        self._seconds: dict[int, deque[float]] = {size: deque(maxlen=9) for size in (1, *SIZES)}
        self._draft_s: deque[float] = deque([0.0], maxlen=9)  # for one proposed id

    def took(self, n_rows: int, seconds: float) -> None:
        self._seconds[n_rows].append(seconds)

    def drafted(self, n: int, seconds: float) -> None:
        self._draft_s.append(seconds / n)

    def brought(self, n_right: int, *, ended: bool) -> None:
        """So many proposed ids came. ended: the next did not; else it is not known."""
        for size in SIZES:
            if ended or n_right >= size - 1:
                self._n_gains[size] += 1
                part = max(0.1, 1 / self._n_gains[size])
                self._gain[size] += part * (1 + min(n_right, size - 1) - self._gain[size])

    def best(self, sizes: Sequence[int]) -> int:
        """How many rows make ids fastest; 1 where none of the sizes pays."""
        hopeful = [size for size in sizes if self._gain[size] >= self.least_speedup]
        if not hopeful or not self._seconds[1]:
            return 1
        size = max(hopeful, key=self._speedup)
        return size if self._speedup(size) >= self.least_speedup else 1

    def _speedup(self, size: int) -> float:
        single_s = median(self._seconds[1])
        batch_s = median(self._seconds[size] or [_GUESSED_COST * single_s])
        return self._gain[size] * single_s / (batch_s + (size - 1) * median(self._draft_s))


class Speculator:
    """What the replies of one engine have in common.

    is_exact: whether only batches are read that were found to compute the bits of single rows.
    """

    def __init__(self, make_drafter: Callable[[], Drafter], *, is_exact: bool) -> None:
        self.pace = Pace()
        self._make_drafter = make_drafter
        self._is_exact = is_exact
        self._sizes = list(SIZES)
        self._agreed: set[tuple[int, int]] = set()

    def begin(self, drafts: Drafts) -> Drafting:
        """For one reply, whose drafts are counted there."""
        return Drafting(self, self._make_drafter(), drafts)

    def sizes(self, n_room: int) -> list[int]:
        return [size for size in self._sizes if size - 1 <= n_room]

    def trusts(self, size: int, n_filled: int, compare: Callable[[], bool]) -> bool:
        """Whether a batch after n_filled ids may be read, by comparison where it is not known."""
        place = size, n_filled // KV_UNIT
        if not self._is_exact or place in self._agreed:
            return True
        if compare():
            self._agreed.add(place)
            return True
        self._sizes.remove(size)
        return False


class Drafting:
    """The proposals for one reply, those that are only watched included, and what came of them."""

    def __init__(self, speculator: Speculator, drafter: Drafter, drafts: Drafts) -> None:
        self._speculator = speculator
        self._drafter = drafter
        self._drafts = drafts
        self._proposed: list[int] = []  # and not contradicted so far
        self._n_right = 0
        self._n_read = 0  # of them, in a batch
        self._n_waited, self._pause = 0, _PAUSES[0]
        self._n_rows = 0
        self._started = 0.0

    def propose(self, sequence: Sequence[int], n_room: int) -> list[int]:
        """Ids to be read with the last one; none where that would not pay.

        n_room: how many ids may be read beside it.
        """
        pace, sizes = self._speculator.pace, self._speculator.sizes(n_room)
        size = pace.best(sizes)
        if not sizes or (size == 1 and (self._proposed or not self._is_due())):
            return []
        self._settle(ended=False)
        if size > 1:
            self._pause = _PAUSES[0]
        started = time.perf_counter()
        n = (SIZES[0] if size == 1 else size) - 1
        self._proposed = self._drafter.propose(sequence, n)
        if self._proposed and not self._drafter.is_free:
            pace.drafted(len(self._proposed), time.perf_counter() - started)
        return self._proposed[:] if 1 < size == len(self._proposed) + 1 else []

    def reading(self, n_rows: int) -> None:
        """The last id is being read, with n_rows - 1 proposed ones."""
        self._n_read = n_rows - 1
        self._drafts.n_drafted += self._n_read
        self._n_rows, self._started = n_rows, time.perf_counter()

    def drew(self, token_id: int) -> None:
        """The target drew an id."""
        if self._n_rows:
            self._speculator.pace.took(self._n_rows, time.perf_counter() - self._started)
            self._n_rows = 0
        self._n_waited += 1
        if not self._proposed:
            return
        if self._proposed[self._n_right] != token_id:
            self._settle(ended=True)
            return
        self._drafts.n_accepted += self._n_right < self._n_read
        self._n_right += 1
        if self._n_right == len(self._proposed):
            self._settle(ended=False)

    def forget(self) -> None:
        """Something other than drawn ids follows."""
        self._proposed, self._n_right, self._n_read = [], 0, 0

    def _settle(self, *, ended: bool) -> None:
        if self._proposed:
            self._speculator.pace.brought(self._n_right, ended=ended)
        self.forget()

    def _is_due(self) -> bool:
        """Whether a proposal is worth watching, though none is read."""
        if self._drafter.is_free:
            return True
        if self._n_waited < self._pause:
            return False
        self._n_waited, self._pause = 0, min(2 * self._pause, _PAUSES[1])
        return True
