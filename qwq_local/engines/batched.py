"""A GGUF file that several replies read at once: what they ask for is decoded in one batch."""

import ctypes
import itertools
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.errors import EngineError, QwqError
from convert.gguf_header import GgufHeader
from qwq_local.engine import Drafts, EngineSettings, Generation, OnProgress, shared_prefix
from qwq_local.engines.gguf import (
    PREFILL_SHARE,
    ChainSampler,
    GgufEngine,
    batch_size,
    explain,
)
from qwq_local.engines.loop import PREFILL_BATCH, REUSE_UNIT, EngineLoop, Sampler
from qwq_local.engines.speculation import Drafting
from qwq_local.rope import Yarn
from qwq_local.sampling import Sampling

GRACE_S, MOST_GRACE_S = 0.005, 0.1
"""So long a batch waits for those that were in the one before it: they come back, or have ended.

Half as long as the last batch took, within these bounds: on a busy machine all takes longer.
"""
_CANDIDATE = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])  # llama_token_data


class BatchedEngine(GgufEngine):
    """One GGUF file with a kv_cache of settings.parallel sequences.

    Replies that overlap in time, each read in a thread of its own, are decoded together; more of
    them than there are sequences take turns. A batch's size moves logits by a rounding error, so
    a reply may differ from the one made alone where two tokens are equally likely within it.
    What any sequence holds of a prompt's beginning serves all of them, by a copy. Each has a
    stream of its own in the kv_cache, so that a row's attention looks at its own reply alone.
    """

    def __init__(
        self,
        path: Path,
        header: GgufHeader,
        settings: EngineSettings,
        *,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.n_parallel = settings.parallel
        super().__init__(path, header, settings, on_progress=on_progress)
        self.llama = self._llama
        self.n_batch = batch_size(self.n_parallel)
        self._batch = Batch(self)
        self._slots = [Slot(self, self._batch, index) for index in range(self.n_parallel)]
        for slot in self._slots:
            slot.neighbours = [other for other in self._slots if other is not slot]
        self._choosing = threading.Lock()
        self._clock = itertools.count(1)

    def n_cached(self, ids: Sequence[int], *, rope: Yarn | None = None) -> int:
        return max(slot.n_cached(ids, rope=rope) for slot in self._slots)

    def prefill(self, ids: Sequence[int], *, rope: Yarn | None = None) -> Iterator[int]:
        with self._slot_for(ids, rope) as slot:
            yield from slot.prefill(ids, rope=rope)

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
        with self._slot_for(ids, rope) as slot:
            yield from slot.generate(
                ids,
                sampling=sampling,
                seed=seed,
                max_tokens=max_tokens,
                stop_ids=stop_ids,
                rope=rope,
                drafts=drafts,
            )

    def logits(
        self, ids: Sequence[int], *, first: int = 0, rope: Yarn | None = None
    ) -> Iterator[NDArray[np.float32]]:
        with self._slot_for(ids, rope) as slot:
            yield from slot.logits(ids, first=first, rope=rope)

    def export_cache(self, ids: Sequence[int], *, rope: Yarn | None = None) -> bytes:
        with self._slot_for(ids, rope) as slot:
            return slot.export_cache(ids, rope=rope)

    def import_cache(self, ids: Sequence[int], state: bytes, *, rope: Yarn | None = None) -> None:
        with self._slot_for(ids, rope) as slot:
            slot.import_cache(ids, state, rope=rope)

    def close(self) -> None:
        with ExitStack() as stack:
            for slot in self._slots:
                stack.enter_context(slot.held())
            stack.enter_context(self._batch.alone())
            super().close()

    def open_context(self) -> Any:
        """llama.cpp's context. Raises QwqError where the engine is closed."""
        return self._open_context()

    @property
    def n_rows(self) -> int:
        """How many positions' logits one batch may give."""
        return self.n_logits_rows + self.n_parallel

    def _context_params(self, rope: Yarn | None) -> Any:
        params = super()._context_params(rope)
        params.n_ctx *= self.n_parallel
        params.n_seq_max = self.n_parallel
        params.kv_unified = False
        params.n_batch = params.n_ubatch = batch_size(self.n_parallel)
        params.n_outputs_max = self.n_rows
        return params

    @contextmanager
    def _slot_for(self, ids: Sequence[int], rope: Yarn | None) -> Iterator["Slot"]:
        """The least busy slot; of these the one that loses least by turning to these ids."""

        def cost(slot: Slot) -> tuple[int, int, int, int]:
            n_lost, n_shared = slot.overlap(ids, rope)
            return slot.n_streams, n_lost, -n_shared, slot.last_used

        with self._choosing:
            slot = min(self._slots, key=cost)
            slot.n_streams += 1
            slot.last_used = next(self._clock)
        try:
            yield slot
        finally:
            with self._choosing:
                slot.n_streams -= 1
            self._batch.leave(slot.index)


@dataclass(slots=True, eq=False)
class _Piece:
    """Ids that a slot wants read. result: logits (n, vocab_size), or why there are none."""

    slot_index: int
    start: int
    ids: Sequence[int]
    all_logits: bool
    result: NDArray[np.float32] | QwqError | None = None

    @property
    def n_rows(self) -> int:
        return len(self.ids) if self.all_logits else 1


class Batch:
    """Gathers what the slots want read, and reads it with one llama_decode.

    There is no thread of its own: whoever comes while nothing is read does it for all who wait.
    """

    def __init__(self, engine: BatchedEngine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._is_busy = False
        self._n_before = 0  # so many are to be alone before the next batch
        self._last_s = 0.0  # what the last batch took
        self._pieces: list[_Piece] = []
        self._expected: set[int] = set()  # slots that begin, or were in the last batch: they come
        n, llama = engine.n_batch, engine.llama
        self._tokens = (llama.llama_token * n)()
        self._positions = (llama.llama_pos * n)()
        self._n_sequences = (ctypes.c_int32 * n)(*[1] * n)
        ids = [(llama.llama_seq_id * 1)(index) for index in range(engine.n_parallel)]
        self._sequence_ids = [ctypes.cast(one, ctypes.POINTER(llama.llama_seq_id)) for one in ids]
        self._kept = ids  # what the pointers point to
        self._sequences = (ctypes.POINTER(llama.llama_seq_id) * n)()
        self._outputs = (ctypes.c_int8 * n)()

    def read(
        self, slot_index: int, start: int, ids: Sequence[int], *, all_logits: bool
    ) -> NDArray[np.float32]:
        """Logits of the last id or of all, after reading ids at positions from `start` on."""
        piece = _Piece(slot_index, start, ids, all_logits)
        with self._changed:
            self._pieces.append(piece)
            self._expected.discard(slot_index)
            self._changed.notify_all()
            while piece.result is None:
                if self._is_busy or self._n_before:
                    self._changed.wait()
                else:
                    self._lead()
        if isinstance(piece.result, QwqError):
            raise piece.result
        return piece.result

    def expect(self, slot_index: int) -> None:
        """Let the next batch wait for a slot that begins, within the grace."""
        with self._changed:
            self._expected.add(slot_index)

    def leave(self, slot_index: int) -> None:
        """Wait no longer for a slot whose reply has ended."""
        with self._changed:
            self._expected.discard(slot_index)
            self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While nothing is read: between two batches, however many wait for the next."""
        with self._changed:
            self._n_before += 1
            self._changed.wait_for(lambda: not self._is_busy)
            self._n_before -= 1
            self._is_busy = True
        try:
            yield
        finally:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()

    def _lead(self) -> None:
        """Read one batch, with _changed held but for the time of reading."""
        self._is_busy = True
        pieces: list[_Piece] = []
        try:
            grace_s = max(GRACE_S, min(self._last_s / 2, MOST_GRACE_S))
            self._changed.wait_for(lambda: not self._expected, grace_s)
            pieces = self._take()
            self._changed.release()
            started = time.perf_counter()
            try:
                self._read(pieces)
            finally:
                self._last_s = time.perf_counter() - started
                self._changed.acquire()
            self._expected = {piece.slot_index for piece in pieces}
            self._expected -= {piece.slot_index for piece in self._pieces}
        finally:
            for piece in pieces:
                if piece.result is None:
                    piece.result = EngineError("llama.cpp: reading was interrupted; ask again")
            self._is_busy = False
            self._changed.notify_all()

    def _take(self) -> list[_Piece]:
        """Those that fit, whoever came first before all others."""
        taken: list[_Piece] = []
        n_ids, n_rows = self._engine.n_batch, self._engine.n_rows
        for piece in self._pieces:
            if len(piece.ids) <= n_ids and piece.n_rows <= n_rows:
                n_ids -= len(piece.ids)
                n_rows -= piece.n_rows
                taken.append(piece)
        self._pieces = [piece for piece in self._pieces if piece not in taken]
        return taken

    def _read(self, pieces: Sequence[_Piece]) -> None:
        """Give each piece its result; where they fail together each is tried alone."""
        try:
            logits = self._decode(pieces)
        except QwqError as error:
            if len(pieces) == 1:
                pieces[0].result = error
                return
            for piece in pieces:
                self._read([piece])
            return
        n_before = 0
        for piece in pieces:
            piece.result = logits[n_before : n_before + piece.n_rows].copy()
            n_before += piece.n_rows

    def _decode(self, pieces: Sequence[_Piece]) -> NDArray[np.float32]:
        """A view of the logits that were asked for, in order; the next call overwrites it."""
        llama, n = self._engine.llama, 0
        for piece in pieces:
            end = n + len(piece.ids)
            self._tokens[n:end] = piece.ids
            self._positions[n:end] = range(piece.start, piece.start + len(piece.ids))
            for index in range(n, end):
                self._sequences[index] = self._sequence_ids[piece.slot_index]
                self._outputs[index] = piece.all_logits or index == end - 1
            n = end
        batch = llama.llama_batch(
            n_tokens=n,
            token=self._tokens,
            pos=self._positions,
            n_seq_id=self._n_sequences,
            seq_id=self._sequences,
            logits=self._outputs,
        )
        context = self._engine.open_context()
        status = llama.llama_decode(context, batch)
        if status != 0:
            raise QwqError(
                f"llama.cpp: decoding {n} tokens failed with status {status} ({explain()}); "
                "open the model again, with a smaller --context if memory is short"
            )
        pointer = llama.llama_get_logits(context)
        shape = (sum(piece.n_rows for piece in pieces), self._engine.vocab_size)
        return np.ctypeslib.as_array(pointer, shape=shape)


class Slot(EngineLoop):
    """One sequence of a BatchedEngine. n_streams: what is being read or made in it now."""

    def __init__(self, engine: BatchedEngine, batch: Batch, index: int) -> None:
        super().__init__(vocab_size=engine.vocab_size, rope_plan=engine.rope_plan)
        self.stash = engine.stash
        self.index = index
        self.n_streams = 0
        self.last_used = 0
        self.neighbours: Sequence[Slot] = ()
        self._engine = engine
        self._batch = batch
        self.last_logits: NDArray[np.float32] = np.empty((0, self.vocab_size), np.float32)

    def held(self) -> AbstractContextManager[Any]:
        """While no reply makes a token here."""
        return self._lock

    def overlap(self, ids: Sequence[int], rope: Yarn | None) -> tuple[int, int]:
        """How many positions turning to these ids would lose, and how many it would use again."""
        n_shared = self._n_shared(ids, rope)
        return self._n_reusable - n_shared, n_shared

    def n_cached(self, ids: Sequence[int], *, rope: Yarn | None = None) -> int:
        """Without the lock, which a reply holds while it is decoded: it is an estimate."""
        n_shared = self._n_shared(ids, rope)
        return max(n_shared, self._stashed(ids, rope, n_shared)[0])

    def _begin(self, sequence: list[int], rope: Yarn | None) -> None:
        self._turn_to(sequence, rope)
        self._batch.expect(self.index)

    def _turn_to(self, sequence: list[int], rope: Yarn | None) -> None:
        """With as much of it as this sequence has, or the stash, or a neighbour."""
        n_own = self.n_cached(sequence, rope=rope)
        donor = max(self.neighbours, key=lambda slot: slot._n_shared(sequence, rope), default=self)
        if donor._n_shared(sequence, rope) < n_own + REUSE_UNIT:
            super()._begin(sequence, rope)
            return
        self._restart(sequence, rope, 0)
        with self._batch.alone():
            # the donor cannot be trimmed now, and says that it holds nothing before it is
            n = donor._n_shared(sequence, rope)
            llama = self._engine.llama
            memory = llama.llama_get_memory(self._engine.open_context())
            llama.llama_memory_seq_cp(memory, donor.index, self.index, -1, -1)
            self._engine.trim_sequence(self.index, n)
        self._n_filled = self._n_reusable = n

    def _n_shared(self, sequence: Sequence[int], rope: Yarn | None) -> int:
        """Tails of prompts too, cut anywhere: what a batch rounds depends on the others in it."""
        if rope != self._rope:
            return 0
        n = shared_prefix(self._sequence[: self._n_reusable], sequence)
        return min(n, len(sequence) - 1)

    def _hold(
        self, sequence: list[int], rope: Yarn | None, drafting: Drafting | None = None
    ) -> None:
        is_new = self._sequence is not sequence
        super()._hold(sequence, rope, drafting)
        if is_new:
            self._n_reusable = self._n_filled

    def export_cache(self, ids: Sequence[int], *, rope: Yarn | None = None) -> bytes:
        """In whole units, as an engine for one reply will have it."""
        with self._lock:
            self._begin(list(ids), rope)
            self._cut(self._n_filled // REUSE_UNIT * REUSE_UNIT)
            return self._n_filled.to_bytes(8, "little") + self._export()

    def _set_rope(self, rope: Yarn | None) -> None:
        raise QwqError(
            f"rope: {rope} is asked for, and all sequences share {self._rope}; "
            "choose --rope native or --rope yarn for all"
        )

    def _prefill_step(self, stop: int) -> None:
        alone = not any(slot.n_streams for slot in self.neighbours)
        end = min(self._n_filled + (PREFILL_BATCH if alone else PREFILL_SHARE), stop)
        self._feed(self._sequence[self._n_filled : end], all_logits=False)
        self._n_filled = self._n_reusable = end

    def _trim(self, n_kept: int) -> None:
        with self._batch.alone():
            self._engine.trim_sequence(self.index, n_kept)

    def _export(self) -> bytes:
        with self._batch.alone():
            return self._engine.export_sequence(self.index)

    def _import(self, state: bytes) -> None:
        with self._batch.alone():
            self._engine.import_sequence(self.index, state)

    def _feed(self, ids: Sequence[int], *, all_logits: bool) -> None:
        self.last_logits = self._batch.read(self.index, self._n_filled, ids, all_logits=all_logits)

    def _read_logits(self, n: int) -> NDArray[np.float32]:
        return self.last_logits[-n:]

    @contextmanager
    def _sampler(self, sampling: Sampling, seed: int, prompt: Sequence[int]) -> Iterator[Sampler]:
        sampler = _SlotSampler(self, self._engine, self._engine.new_chain(sampling, seed, prompt))
        try:
            yield sampler
        finally:
            sampler.free()


class _SlotSampler(ChainSampler):
    """A sampler chain of llama.cpp over a slot's last logits."""

    def __init__(self, slot: Slot, engine: BatchedEngine, chain: Any) -> None:
        super().__init__(engine, chain)
        self._llama = engine.llama
        self._slot = slot
        self._candidates = np.zeros(slot.vocab_size, _CANDIDATE)

    def draw(self, row: int = -1) -> int:
        llama, candidates = self._llama, self._candidates
        candidates["id"] = np.arange(len(candidates), dtype=np.int32)
        candidates["logit"] = self._slot.last_logits[row]
        data = candidates.ctypes.data_as(ctypes.POINTER(llama.llama_token_data))
        array = llama.llama_token_data_array(data, len(candidates), -1, False)
        llama.llama_sampler_apply(self._chain, ctypes.byref(array))
        token_id = int(candidates["id"][array.selected])
        self.accept(token_id)
        return token_id
