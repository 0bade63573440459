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
MAX_LOGITS_IN_CHUNK = 1 << 25  # 128 MiB of float32


class EngineLoop(ABC):
    """Prefill, decode and logits, with the longest shared prefix kept in the kv_cache.

    Each token is made under a lock from the ids that its own reply has so far, so replies may
    take turns in any order; taking turns costs a prefill of what the two do not share.
    """

    def __init__(self, *, vocab_size: int, context_length: int) -> None:
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.prefill_batch = PREFILL_BATCH
        self.n_logits_rows = max(1, min(PREFILL_BATCH, MAX_LOGITS_IN_CHUNK // vocab_size))
        self._lock = threading.Lock()
        self._sequence: list[int] = []  # the kv_cache holds its first _n_filled ids
        self._n_filled = 0

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
            return self._n_shared(ids, limit=len(ids) - 1)

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
                    self._extend(sequence, len(sequence), n_logits=1)
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
            stop = min(start + self.n_logits_rows, len(sequence))
            with self._lock:
                self._extend(sequence, stop, n_logits=stop - start)
                chunk = self._read_logits(stop - start)
            yield chunk

    def _n_shared(self, sequence: Sequence[int], *, limit: int) -> int:
        if self._sequence is sequence:
            return min(self._n_filled, limit)
        return min(shared_prefix(self._sequence[: self._n_filled], sequence), limit)

    def _extend(self, sequence: list[int], stop: int, *, n_logits: int) -> None:
        """Make the kv_cache hold sequence[:stop], with logits of the last n_logits of them."""
        start = self._n_shared(sequence, limit=stop - n_logits)
        if self._sequence is not sequence or start != self._n_filled:
            self._n_filled = 0  # holds while the cut may fail half-way
            self._trim(start)
            self._sequence, self._n_filled = sequence, start
        with_logits = stop - n_logits if n_logits > 1 else stop
        while self._n_filled < stop:
            at = self._n_filled
            end = min(at + self.prefill_batch, with_logits if at < with_logits else stop)
            self._feed(sequence[at:end], all_logits=at >= with_logits)
            self._n_filled = end
