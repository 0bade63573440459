"""Final hidden states of an evaluation text that rode along with a calibration.

What an evaluation needs of the unquantized model is then there without another pass over it.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from convert.calibration import TokenBatch
from convert.errors import QwqError
from convert.files import replacing_file

EVALUATION = "evaluation.npz"

Halves = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]


def normed(states: Floats, eps: float) -> Halves:
    """The final norm without its weight, in float16; (n_tokens, hidden_size).

    So none exceeds the root of hidden_size, and float16 keeps 11 bits of each. The mean of squares
    is taken in float32. Source: Zhang and Sennrich 2019, "Root mean square layer normalization".
    """
    variance = np.mean(np.square(states), axis=-1, keepdims=True, dtype=np.float32)
    halves: Halves = (states / np.sqrt(variance + np.float32(eps))).astype(np.float16)
    return halves


def write_evaluation(
    folder: Path,
    batches: Sequence[TokenBatch],
    states: Iterable[Floats],
    *,
    eps: float,
    calibration_sha256: str,
) -> None:
    """Keep the final hidden states of all sequences of the batches.

    states: (n_sequences, n_positions, hidden_size) a batch. calibration_sha256: of the set along
    with which they rode.
    """
    ids, lengths, kept = [], [], []
    for batch, of_batch in zip(batches, states, strict=True):
        for row, n in enumerate(batch.is_token.sum(dim=1).tolist()):
            ids.append(batch.ids[row, :n].numpy())
            lengths.append(n)
            kept.append(normed(of_batch[row, :n], eps))
    with replacing_file(folder / EVALUATION, force=True) as file:
        np.savez(
            file,
            ids=np.concatenate(ids),
            lengths=np.array(lengths),
            states=np.concatenate(kept),
            calibration_sha256=np.array(calibration_sha256),
        )


def read_evaluation(folder: Path) -> Mapping[tuple[int, ...], Halves]:
    """Final hidden states, (n_tokens, hidden_size), by the ids of their passage.

    Raises QwqError where none were kept, or the file cannot be read.
    """
    path = folder / EVALUATION
    if not path.is_file():
        raise QwqError(f"{folder}: holds no {EVALUATION}; give `qwq calibrate` --evaluation TEXT")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids, lengths, states = (arrays[name] for name in ("ids", "lengths", "states"))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise QwqError(f"{path}: cannot be read ({error}); calibrate again") from error
    ends = np.cumsum(lengths)[:-1]
    passages = (tuple(map(int, one)) for one in np.split(ids, ends))
    return dict(zip(passages, np.split(states, ends), strict=True))
