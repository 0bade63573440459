"""The one loop over a kv_cache that the engines of this process share."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray

from convert.errors import QwqError
from qwq_local.engine import shared_prefix
from qwq_local.sampling import Sampling

PREFILL_BATCH = 512
REUSE_UNIT = 64
"""The kv_cache is reused in multiples of this many positions, the row tile of CPU kernels.

Kernels round differently by the size of a batch. So a prompt is always read as multiples of the
unit and then its tail, and neither a tail nor what was decoded is ever reused: a reply comes out
the same, bit for bit on a CPU, whatever was in the kv_cache before.
"""
MAX_LOGITS_IN_CHUNK = 1 << 25  # 128 MiB of float32


class EngineLoop(ABC):
    """Prefill, decode and logits, with the longest shared prefix kept in the kv_cache.

    Each token is made under a lock from the ids that its own reply has so far, so replies may
    take turns in any order; taking turns costs a prefill of what the two do not share, and may
    change a choice between two tokens that are equally likely within rounding.
    """

    def __init__(self, *, vocab_size: int, context_length: int) -> None:
        self.vocab_size = vocab_size
        self.context_length = context_length
        n_rows = min(PREFILL_BATCH, MAX_LOGITS_IN_CHUNK // vocab_size)
        self.n_logits_rows = max(REUSE_UNIT, n_rows // REUSE_UNIT * REUSE_UNIT)
        self._lock = threading.Lock()
        self._sequence: list[int] = []  # the kv_cache holds its first _n_filled ids,
        self._n_filled = 0
        self._n_reusable = 0  # of which another sequence may reuse so many

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
    ) -> AbstractContextManager[Callable[[], int]]:
        """A function that draws one id from the last logits, and remembers it."""

    def n_cached(self, ids: Sequence[int]) -> int:
        with self._lock:
            return self._n_shared(ids)

    def generate(
        self,
        ids: Sequence[int],
        *,
        sampling: Sampling,
        seed: int,
        max_tokens: int,
        stop_ids: Collection[int],
    ) -> Iterator[int]:
        assert ids, "a prompt has at least one id"
        assert len(ids) + max_tokens <= self.context_length
        sequence = list(ids)
        with self._sampler(sampling, seed, ids) as draw:
            for _ in range(max_tokens):
                with self._lock:
                    self._hold(sequence)
                    token_id = draw()
                sequence.append(token_id)
                yield token_id
                if token_id in stop_ids:
                    return

    def logits(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        if len(ids) > self.context_length:
            raise QwqError(
                f"logits: {len(ids):,} ids do not fit in a context of {self.context_length:,}; "
                "cut the text, or open the model with a larger context"
            )
        sequence = list(ids)
        for start in range(0, len(sequence), self.n_logits_rows):
            chunk = sequence[start : start + self.n_logits_rows]
            with self._lock:
                if self._sequence is not sequence or self._n_filled != start:
                    self._restart(sequence, 0)
                    self._prefill(start)
                    self._n_reusable = 0  # read in other pieces than a prompt
                self._feed(chunk, all_logits=True)
                self._n_filled += len(chunk)
                logits = self._read_logits(len(chunk))
            yield logits

    def _n_shared(self, sequence: Sequence[int]) -> int:
        """How many ids of the kv_cache serve this sequence, its last id not among them."""
        n = shared_prefix(self._sequence[: self._n_reusable], sequence)
        return min(n, len(sequence) - 1) // REUSE_UNIT * REUSE_UNIT

    def _hold(self, sequence: list[int]) -> None:
        """Make the kv_cache hold the sequence, with logits of its last id."""
        if self._sequence is not sequence or self._n_filled != len(sequence) - 1:
            self._restart(sequence, self._n_shared(sequence))
            self._prefill((len(sequence) - 1) // REUSE_UNIT * REUSE_UNIT)
        self._feed(sequence[self._n_filled :], all_logits=False)
        self._n_filled = len(sequence)

    def _restart(self, sequence: list[int], n_kept: int) -> None:
        self._n_reusable = 0  # should the cut fail
        self._trim(n_kept)
        self._sequence, self._n_filled, self._n_reusable = sequence, n_kept, n_kept

    def _prefill(self, stop: int) -> None:
        for start in range(self._n_filled, stop, PREFILL_BATCH):
            end = min(start + PREFILL_BATCH, stop)
            self._feed(self._sequence[start:end], all_logits=False)
            self._n_filled = self._n_reusable = end
