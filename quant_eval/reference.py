"""The unquantized model's logits, from its final hidden states: never the whole model in memory.

The hidden states come layer by layer and are kept in 16 bits, 10 KB a token for QwQ-32B where its
logits would be 304 KB; logits are recomputed from them on demand, in float32, slice by slice of the
output matrix.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from convert.calibrate import open_calibration
from convert.calibration import token_batches
from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from convert.evaluation_states import Halves, normed, read_evaluation
from convert.layer_stream import LayerStream
from convert.layer_work import LayerWork

BATCH_TOKENS = 2048
MAX_CHUNK_ELEMENTS = 1 << 27  # of logits at a time: 512 MiB
NORM = "model.norm.weight"
MATRIX_ROWS = 1024  # of the output matrix at a time: 20 MiB, which a processor's cache may hold
READ_ROWS = 128  # by one thread
N_READERS = 2

Floats = npt.NDArray[np.float32]
Span = tuple[int, int, int]
"""A passage, its first row and one past its last: the logits after these tokens."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Final hidden states, (n_tokens, hidden_size) float16 a passage.

    They are normed but not yet multiplied by the norm's weight: so none exceeds the root of
    hidden_size, and float16 keeps 11 bits of each.
    """

    checkpoint: Checkpoint
    hidden: tuple[Halves, ...]

    def logits(self, spans: Sequence[Span]) -> Iterator[Generator[Floats]]:
        """For each span its logits, in chunks (n, vocab_size) float32.

        The output matrix is read once for as many rows as a chunk holds, whichever passages they
        are of. What is not taken of a span when the next one is asked for is dropped.
        """
        chunks = self._chunks(spans)
        chunk: Floats = np.empty((0, 0), dtype=np.float32)
        n_left = 0

        def rows() -> Generator[Floats]:
            nonlocal chunk, n_left
            while n_left:
                if not len(chunk):
                    chunk = next(chunks)
                part, chunk = chunk[:n_left], chunk[n_left:]
                n_left -= len(part)
                yield part

        for _, start, stop in spans:
            n_left = stop - start
            yield rows()
            deque(rows(), maxlen=0)

    def _chunks(self, spans: Sequence[Span]) -> Iterator[Floats]:
        """The logits of all spans, one behind the other."""
        weight = self.checkpoint.read(NORM)
        states = np.concatenate(
            [self.hidden[passage][start:stop] for passage, start, stop in spans]
        )
        n_rows = self.chunk_rows
        for first in range(0, len(states), n_rows):
            yield self._project(weight * states[first : first + n_rows].astype(np.float32))

    @property
    def chunk_rows(self) -> int:
        """For how many rows of logits the output matrix is read once."""
        return max(1, MAX_CHUNK_ELEMENTS // self.checkpoint.model.vocab_size)

    def _project(self, states: Floats) -> Floats:
        """(n, hidden_size) to (n, vocab_size), a slice of the output matrix after the other."""
        logits = np.empty((len(states), self.checkpoint.model.vocab_size), dtype=np.float32)
        for start, matrix in self.output_matrix():
            np.matmul(states, matrix.T, out=logits[:, start : start + len(matrix)])
        return logits

    def output_matrix(self) -> Iterator[tuple[int, Floats]]:
        """The output matrix in float32, in slices that follow one another in the same memory.

        Yields the first row's number and the rows, which the next slice overwrites. They are read
        and widened in threads.
        """
        model = self.checkpoint.model
        name = "model.embed_tokens.weight" if model.tied_embeddings else "lm_head.weight"
        buffer: Floats = np.empty((MATRIX_ROWS, model.hidden_size), dtype=np.float32)
        with ThreadPoolExecutor(N_READERS) as pool:
            for start in range(0, model.vocab_size, MATRIX_ROWS):
                matrix = buffer[: model.vocab_size - start]

                def read(first: int, start: int = start, matrix: Floats = matrix) -> None:
                    part = matrix[first : first + READ_ROWS]
                    self.checkpoint.rows(name, start + first, start + first + len(part), out=part)

                deque(pool.map(read, range(0, len(matrix), READ_ROWS)), maxlen=0)
                yield start, matrix


def final_hidden_states(
    checkpoint: Checkpoint,
    passages: Sequence[Sequence[int]],
    work: LayerWork,
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """Run the unquantized model over the passages' token ids, in float32, one layer in memory.

    passages: token ids, of any lengths from 1. work: of the same checkpoint, passages and
    batch_tokens; its finished layers are not run again. on_progress: called with the layers done
    and all.
    """
    stream = LayerStream(checkpoint)
    # A batch of one passage each, sorted by length, tells which passage each row is.
    order = sorted(range(len(passages)), key=lambda i: len(passages[i]))
    batches = token_batches(passages, batch_tokens=batch_tokens)
    finished = stream.final_hidden(batches, work, on_progress=on_progress)
    rows = (
        states[row][: int(n)].numpy()
        for states, batch in zip(finished, batches, strict=True)
        for row, n in enumerate(batch.is_token.sum(dim=1))
    )
    hidden = {
        i: normed(states, checkpoint.model.rms_norm_eps)
        for i, states in zip(order, rows, strict=True)
    }
    return Reference(checkpoint, tuple(hidden[i] for i in range(len(passages))))


def kept_hidden_states(
    checkpoint: Checkpoint, passages: Sequence[Sequence[int]], calibration: Path
) -> Reference:
    """The same from a calibration that these passages rode along with.

    Raises QwqError where it lacks one of them, or is of another checkpoint.
    """
    open_calibration(calibration, checkpoint)
    kept = read_evaluation(calibration)
    if missing := [ids for ids in passages if tuple(ids) not in kept]:
        raise QwqError(
            f"{calibration}: lacks {len(missing)} of {len(passages)} passages of the evaluation "
            "text; calibrate with --evaluation and the same text"
        )
    return Reference(checkpoint, tuple(kept[tuple(ids)] for ids in passages))
