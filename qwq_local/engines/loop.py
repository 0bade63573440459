"""The one loop over a kv_cache that the engines of this process share."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Protocol

import numpy as np
import psutil
from numpy.typing import NDArray

from convert.errors import QwqError
from qwq_local.engine import Drafts, Generation, shared_prefix
from qwq_local.engines.speculation import KV_UNIT, Drafting, Speculator
from qwq_local.engines.stash import Stash, Stashed
from qwq_local.rope import RopePlan, Yarn
from qwq_local.sampling import Sampling
from qwq_local.scored import score

PREFILL_BATCH = 512
REUSE_UNIT = 64
"""The kv_cache is reused in multiples of this many positions, the row tile of CPU kernels.

Kernels round differently by the size of a batch. So a prompt is always read as multiples of the
unit and then its tail, and neither a tail nor what was decoded is ever reused: a reply comes out
the same, bit for bit on a CPU, whatever was in the kv_cache before.
"""
WORTH_STASHING = 256
"""So many positions of the kv_cache are copied aside rather than read again."""
_STASH_PART = 8  # of the memory that is free when the engine starts
MAX_LOGITS_IN_CHUNK = 1 << 25  # 128 MiB of float32


class Sampler(Protocol):
    """Draws ids from the engine's last logits, and remembers them."""

    def draw(self, row: int = -1) -> int:
        """The next id, from one row of the last _feed's logits."""

    def accept(self, token_id: int) -> None:
        """Take an id that was not drawn as one that was."""

    def constrain(self, grammar: str) -> None:
        """Let all further ids obey a GBNF grammar. Raises UsageError where it is none."""


class EngineLoop(ABC):
    """Prefill, decode and logits, with the longest shared prefix kept in the kv_cache.

    Each token is made under a lock from the ids that its own reply has so far, so replies may
    take turns in any order; taking turns costs a prefill of what the two do not share, and may
    change a choice between two tokens that are equally likely within rounding.
    """

    def __init__(self, *, vocab_size: int, rope_plan: RopePlan) -> None:
        self.vocab_size = vocab_size
        self.rope_plan = rope_plan
        self.n_logits_rows = n_logits_rows(vocab_size)
        self.prefill_batch = PREFILL_BATCH
        self.stash = Stash(psutil.virtual_memory().available // _STASH_PART)
        self._lock = threading.Lock()
        self._rope = rope_plan.rope_for(1)
        self._sequence: list[int] = []  # the kv_cache holds its first _n_filled ids,
        self._n_filled = 0
        self._n_reusable = 0  # of which another sequence may reuse so many
        self._ahead: list[int] = []  # proposed ids that the kv_cache holds beyond the _n_filled
        self._row = -1  # of the last logits, that which follows the _n_filled
        self._unread: tuple[list[int], Yarn | None, Drafting | None] | None = None
        self.speculator: Speculator | None = None

    @abstractmethod
    def _set_rope(self, rope: Yarn | None) -> None:
        """Empty the kv_cache, and read positions with this rope from now on."""

    @abstractmethod
    def _trim(self, n_kept: int) -> None:
        """Cut the kv_cache back to its first positions."""

    @abstractmethod
    def _feed(self, ids: Sequence[int], *, all_logits: bool) -> None:
        """Append ids to the kv_cache, with logits of the last of them or of all."""

    @abstractmethod
    def _read_logits(self, n: int) -> NDArray[np.float32]:
        """A copy of what the last _feed computed, (n, vocab_size)."""

    @abstractmethod
    def _sampler(
        self, sampling: Sampling, seed: int, prompt: Sequence[int]
    ) -> AbstractContextManager[Sampler]:
        """A sampler for one reply."""

    @abstractmethod
    def _export(self) -> bytes:
        """The kv_cache as it is."""

    @abstractmethod
    def _import(self, state: bytes) -> None:
        """Make the empty kv_cache what was exported. Raises QwqError where that cannot be."""

    def n_cached(self, ids: Sequence[int], *, rope: Yarn | None = None) -> int:
        with self._lock:
            n_shared = self._n_shared(ids, rope)
            n_stashed, _ = self._stashed(ids, rope, n_shared)
            return max(n_shared, n_stashed)

    def export_cache(self, ids: Sequence[int], *, rope: Yarn | None = None) -> bytes:
        with self._lock:
            self._begin(list(ids), rope)
            return self._n_filled.to_bytes(8, "little") + self._export()

    def import_cache(self, ids: Sequence[int], state: bytes, *, rope: Yarn | None = None) -> None:
        n_held = int.from_bytes(state[:8], "little")
        if len(state) < 8 or n_held > len(ids) or n_held % REUSE_UNIT:
            raise QwqError(
                f"kv_cache: a state of {n_held:,} ids was saved for {len(ids):,}, so it is "
                "damaged; load the session without it"
            )
        with self._lock:
            self._restart([], rope, 0)
            self._import(state[8:])
            self._sequence = list(ids[:n_held])
            self._n_filled = self._n_reusable = n_held

    def prefill(self, ids: Sequence[int], *, rope: Yarn | None = None) -> Iterator[int]:
        sequence = list(ids)
        stop = _whole_units(len(sequence) - 1)
        while True:
            with self._lock:
                if self._sequence is not sequence:
                    self._begin(sequence, rope)
                if self._n_filled >= stop:
                    return
                self._prefill_step(stop)
                n_filled = self._n_filled
            yield n_filled

    def generate(
        self,
        ids: Sequence[int],
        *,
        sampling: Sampling,
        seed: int,
        max_tokens: int,
        stop_ids: Collection[int],
        rope: Yarn | None = None,
        drafts: Drafts | None = None,
    ) -> Generation:
        assert ids, "a prompt has at least one id"
        assert len(ids) + max_tokens <= self.rope_plan.context_length
        sequence = list(ids)
        end = len(ids) + max_tokens
        n_top = sampling.top_logprobs
        drafting = None
        if self.speculator is not None and n_top is None:
            drafting = self.speculator.begin(Drafts() if drafts is None else drafts)
        with self._sampler(sampling, seed, ids) as sampler:
            while len(sequence) < end:
                with self._lock:
                    self._hold(sequence, rope, drafting)
                    token_id = sampler.draw(self._row)
                    if n_top is not None:
                        token_id = score(token_id, self._read_logits(1)[0], n_top)
                sequence.append(token_id)
                if drafting is not None:
                    drafting.drew(token_id)
                goes_on = len(sequence) < end and token_id not in stop_ids
                self._unread = (sequence, rope, drafting) if goes_on else None
                change = yield token_id
                if change is not None:
                    self._read_made(sequence, rope, drafting)  # forced ids are another batch
                    if drafting is not None:
                        drafting.forget()
                    for forced in change.ids:
                        sampler.accept(forced)
                    sequence += change.ids
                    if change.grammar is not None:
                        sampler.constrain(change.grammar)
                    rope = rope if change.rope is None else change.rope
                elif token_id in stop_ids:
                    return

    def read_on(self) -> None:
        """Read the id that was made last, while it is on its way to who decides how to go on.

        For a process where one thread alone uses the engine.
        """
        unread, self._unread = self._unread, None
        if unread is not None:
            self._read_made(*unread)

    def _read_made(self, sequence: list[int], rope: Yarn | None, drafting: Drafting | None) -> None:
        """Read the id that was made last, unless the kv_cache has turned to something else.

        What fails here fails again when the next id is asked for.
        """
        with self._lock, suppress(QwqError):
            if self._sequence is sequence and self._rope == rope:
                self._hold(sequence, rope, drafting)

    def logits(
        self, ids: Sequence[int], *, first: int = 0, rope: Yarn | None = None
    ) -> Iterator[NDArray[np.float32]]:
        n_room = self.rope_plan.room(rope)
        if len(ids) > n_room:
            raise QwqError(
                f"logits: {len(ids):,} ids do not fit in a context of {n_room:,}; "
                "cut the text, or open the model with a larger context"
            )
        sequence = list(ids)
        for start in range(_whole_units(first), len(sequence), self.n_logits_rows):
            chunk = sequence[start : start + self.n_logits_rows]
            with self._lock:
                if self._sequence is not sequence or self._n_filled != start:
                    self._restart(sequence, rope, 0)
                    self._prefill(start)
                    self._n_reusable = 0  # read in other pieces than a prompt
                self._feed(chunk, all_logits=True)
                self._n_filled += len(chunk)
                logits = self._read_logits(len(chunk))
            yield logits[max(first - start, 0) :]

    def look_ahead(self, sequence: list[int], n: int) -> list[int]:
        """The n likeliest ids to follow, one by one; they stay filled in case that they come.

        The list is to be the same at each call, longer by what came. None while a long prompt is
        still being read, a micro-batch at each call, and none beyond the room.
        """
        rope = self._rope
        if not sequence or len(sequence) + n > self.rope_plan.room(rope):
            return []
        with self._lock, self._sampler(Sampling(temperature=0), 0, ()) as sampler:
            if self._sequence is not sequence:
                self._begin(sequence, rope)
            self._take_up(sequence)
            if self._n_filled == len(sequence):  # without the logits of its last id
                self._n_filled -= 1
                self._trim(self._n_filled)
                self._ahead = []
            stop = _whole_units(len(sequence) - 1)
            if stop - self._n_filled > self.prefill_batch:
                self._prefill_step(stop)
                return []
            self._hold(sequence, rope)
            proposed = [sampler.draw()]
            while len(proposed) < n:
                self._feed(proposed[-1:], all_logits=False)
                self._ahead.append(proposed[-1])
                proposed.append(sampler.draw())
        return proposed

    def _n_shared(self, sequence: Sequence[int], rope: Yarn | None) -> int:
        """How many ids of the kv_cache serve this sequence, its last id not among them."""
        if rope != self._rope:
            return 0
        n = shared_prefix(self._sequence[: self._n_reusable], sequence)
        return _whole_units(min(n, len(sequence) - 1))

    def _hold(
        self, sequence: list[int], rope: Yarn | None, drafting: Drafting | None = None
    ) -> None:
        """Make the kv_cache hold the sequence, with logits of its last id in _row."""
        if self._sequence is not sequence or self._rope != rope:
            self._begin(sequence, rope)
            self._prefill(_whole_units(len(sequence) - 1))
        self._take_up(sequence)
        if drafting is not None and self._n_filled == len(sequence) - 1:
            self._read_last(sequence, rope, drafting)
            return
        for start in range(self._n_filled, len(sequence), self.prefill_batch):
            chunk = sequence[start : start + self.prefill_batch]
            self._feed(chunk, all_logits=False)
            self._n_filled += len(chunk)
            self._row = -1

    def _take_up(self, sequence: list[int]) -> None:
        """Count what was proposed and has come as filled, and cut off what has not."""
        while self._ahead and self._n_filled < len(sequence):
            if self._ahead[0] != sequence[self._n_filled]:
                self._trim(self._n_filled)
                self._ahead = []
                return
            del self._ahead[0]
            self._n_filled += 1
            self._row += 1

    def _read_last(self, sequence: list[int], rope: Yarn | None, drafting: Drafting) -> None:
        """Feed the last id, with proposed ones behind it where that pays."""
        start = self._n_filled
        n_room = min(self.rope_plan.room(rope) - len(sequence), KV_UNIT - 1 - start % KV_UNIT)
        proposed = drafting.propose(sequence, n_room)
        chunk = [sequence[-1], *proposed]
        if proposed and not self._trusts(chunk):
            proposed, chunk = [], chunk[:1]
        drafting.reading(len(chunk))
        self._feed(chunk, all_logits=len(chunk) > 1)
        self._n_filled += 1
        self._ahead = proposed
        self._row = 0 if proposed else -1

    def _trusts(self, chunk: list[int]) -> bool:
        """Whether a batch of these ids computes what they do one by one, bit for bit."""
        start, speculator = self._n_filled, self.speculator
        assert speculator is not None

        def compare() -> bool:
            started = time.perf_counter()
            self._feed(chunk, all_logits=True)
            together = self._read_logits(len(chunk))
            speculator.pace.took(len(chunk), time.perf_counter() - started)
            self._trim(start)
            agree = True
            for token_id, row in zip(chunk, together, strict=True):
                self._feed([token_id], all_logits=False)
                agree = agree and bool(np.array_equal(self._read_logits(1)[0], row))
            self._trim(start)
            return agree

        return speculator.trusts(len(chunk), start, compare)

    def _begin(self, sequence: list[int], rope: Yarn | None) -> None:
        """Turn to a sequence with as much of it as the kv_cache or the stash has."""
        n_kept = self._n_shared(sequence, rope)
        n_stashed, stashed = self._stashed(sequence, rope, n_kept)
        if stashed is None:
            self._restart(sequence, rope, n_kept)
            return
        self._restart(sequence, rope, 0)
        self._import(stashed.state)
        self._trim(n_stashed)
        self._n_filled = self._n_reusable = n_stashed
        self.stash.use(stashed)

    def _restart(self, sequence: list[int], rope: Yarn | None, n_kept: int) -> None:
        """Turn to a sequence, with the first positions of the kv_cache; put aside what is lost."""
        if self._n_reusable - n_kept >= WORTH_STASHING:
            self._cut(self._n_reusable)
            self.stash.put(Stashed(tuple(self._sequence), self._rope, self._export()))
        self._n_reusable = 0  # should the cut fail
        self._ahead = []
        if rope == self._rope:
            self._trim(n_kept)
        else:
            self._set_rope(rope)
            self._rope = rope
        self._sequence, self._n_filled, self._n_reusable = sequence, n_kept, n_kept

    def _cut(self, n_kept: int) -> None:
        """Forget what follows; whoever was writing it begins again."""
        self._trim(n_kept)
        self._ahead = []
        self._sequence = self._sequence[:n_kept]
        self._n_filled = self._n_reusable = n_kept

    def _stashed(
        self, sequence: Sequence[int], rope: Yarn | None, n_kept: int
    ) -> tuple[int, Stashed | None]:
        """What the stash has for a sequence, and for how many ids, where that is worth a copy."""
        n, entry = self.stash.best(sequence, rope)
        n = _whole_units(min(n, len(sequence) - 1))
        return (n, entry) if n - n_kept >= WORTH_STASHING else (0, None)

    def _prefill(self, stop: int) -> None:
        while self._n_filled < stop:
            self._prefill_step(stop)

    def _prefill_step(self, stop: int) -> None:
        end = min(self._n_filled + self.prefill_batch, stop)
        self._feed(self._sequence[self._n_filled : end], all_logits=False)
        self._n_filled = self._n_reusable = end


def n_logits_rows(vocab_size: int) -> int:
    """How many positions' logits are computed at a time where all are wanted."""
    return max(REUSE_UNIT, _whole_units(min(PREFILL_BATCH, MAX_LOGITS_IN_CHUNK // vocab_size)))


def _whole_units(n: int) -> int:
    return n // REUSE_UNIT * REUSE_UNIT
