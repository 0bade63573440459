"""What the kv_cache held for other conversations, kept aside while one of them has it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from qwq_local.engine import shared_prefix
from qwq_local.rope import Yarn


@dataclass(frozen=True, slots=True)
class Stashed:
    """The kv_cache of these ids, as the engine exported it."""

    ids: tuple[int, ...]
    rope: Yarn | None
    state: bytes


class Stash:
    """Exported caches within a budget in bytes; the least recently used go first.

    It may be used from several threads.
    """

    def __init__(self, budget_nbytes: int) -> None:
        self.budget_nbytes = budget_nbytes
        self._entries: OrderedDict[tuple[tuple[int, ...], Yarn | None], Stashed] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._nbytes()

    def put(self, entry: Stashed) -> None:
        """Keep it, in place of those that it continues."""
        with self._lock:
            for key, old in list(self._entries.items()):
                if old.rope == entry.rope and entry.ids[: len(old.ids)] == old.ids:
                    del self._entries[key]
            self._entries[entry.ids, entry.rope] = entry
            while self._entries and self._nbytes() > self.budget_nbytes:
                self._entries.popitem(last=False)

    def best(self, ids: Sequence[int], rope: Yarn | None) -> tuple[int, Stashed | None]:
        """The entry that shares most leading ids, and how many these are."""
        with self._lock:
            entries = [entry for entry in self._entries.values() if entry.rope == rope]
        shared = [(shared_prefix(entry.ids, ids), entry) for entry in entries]
        return max(shared, key=lambda pair: pair[0], default=(0, None))

    def use(self, entry: Stashed) -> None:
        """Note that it was of use."""
        key = (entry.ids, entry.rope)
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def _nbytes(self) -> int:
        return sum(len(entry.state) for entry in self._entries.values())
