"""A reference on the disk: made once, used for every file, and only for what it was made of."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.calibration import TokenizedConversation
from convert.checkpoint import Checkpoint, read_json_object
from convert.errors import CheckpointError, QwqError
from convert.evaluation_states import Halves
from convert.files import partial_path, remove, replacing_file
from quant_eval.reference import Reference
from quant_eval.results import write_json

STATES = "states.npy"
INDEX = "reference.json"
FORMAT = 3
_AGAIN = "make it again with `qwq eval reference`"


@dataclass(frozen=True, slots=True)
class EvaluationTokens:
    """The evaluation text in the checkpoint's tokens.

    names, kinds: the digest and the kind of each passage. opening: the first as text, by which
    another tokenizer is told.
    """

    names: tuple[str, ...]
    passages: tuple[TokenizedConversation, ...]
    opening: str
    kinds: tuple[str, ...] = ()

    @property
    def n_scored(self) -> int:
        """Tokens of replies."""
        return sum(passage.stop - passage.n_prompt for passage in self.passages)


@dataclass(frozen=True, slots=True)
class Binding:
    """What a reference belongs to.

    checkpoint_sha256 covers weights, tokenizer and template; evaluation_sha256 the whole text, of
    which at least n_tokens reply tokens are scored.
    """

    checkpoint_sha256: str
    evaluation_sha256: str
    n_tokens: int


def save_reference(
    folder: Path, tokens: EvaluationTokens, reference: Reference, binding: Binding
) -> None:
    """Write states and index, whole or not at all, over older ones; the index goes last."""
    states = np.concatenate(reference.hidden)
    with replacing_file(folder / STATES, force=True) as file:
        np.save(file, states)
    index = {
        "format": FORMAT,
        **asdict(binding),
        "sha256": _sha256(tokens, states),
        "opening": tokens.opening,
        "passages": [
            {"name": name, "kind": kind, **asdict(passage)}
            for name, kind, passage in zip(tokens.names, tokens.kinds, tokens.passages, strict=True)
        ],
    }
    write_json(folder / INDEX, index, indent=None)


def forget_reference(folder: Path) -> None:
    """Let the next one be made from the start, whatever the folder holds of this one."""
    remove(folder / INDEX)
    remove(partial_path(unfinished_path(folder)))


def unfinished_path(folder: Path) -> Path:
    """What a reference is called while its layers are run."""
    return folder / "layers"


def why_stale(folder: Path, wanted: Binding) -> str:
    """Why the folder's reference cannot serve, with what to do; "" where it can.

    All of it is read, since states that are damaged cannot serve either.
    """
    try:
        _read(folder, wanted)
    except QwqError as error:
        return str(error)
    return ""


def load_reference(
    folder: Path, checkpoint: Checkpoint, wanted: Binding
) -> tuple[EvaluationTokens, Reference]:
    """The first passages that together have the wanted tokens, with their states.

    Raises QwqError where the reference is stale or its bytes are not those that were written.
    """
    kept, states = _read(folder, wanted)
    hidden: list[Halves] = []
    start = n_scored = 0
    for passage in kept.passages:
        if n_scored >= wanted.n_tokens:
            break
        hidden.append(states[start : start + len(passage.ids)])
        start += len(passage.ids)
        n_scored += passage.stop - passage.n_prompt
    n = len(hidden)
    tokens = EvaluationTokens(kept.names[:n], kept.passages[:n], kept.opening, kept.kinds[:n])
    return tokens, Reference(checkpoint, tuple(hidden))


def _read(folder: Path, wanted: Binding) -> tuple[EvaluationTokens, Halves]:
    """All that is kept, checked."""
    path = folder / INDEX
    if not path.is_file():
        raise QwqError(f"{folder}: holds no {INDEX}; make it with `qwq eval reference`")
    try:
        index = read_json_object(path)
    except (OSError, CheckpointError) as error:
        raise QwqError(f"{path}: cannot be read as JSON; {_AGAIN}") from error
    if index.get("format") != FORMAT:
        raise QwqError(
            f"{path}: has format {index.get('format')} and {FORMAT} is read here; {_AGAIN}"
        )
    for key, what in (("checkpoint_sha256", "checkpoint"), ("evaluation_sha256", "text")):
        here, there = str(getattr(wanted, key)), str(index.get(key))
        if here != there:
            raise QwqError(
                f"{folder}: was made of a {what} with SHA-256 {there[:12]} and the one given has "
                f"{here[:12]}; {_AGAIN}"
            )
    tokens = _tokens(index, path)
    if index["n_tokens"] < wanted.n_tokens:
        raise QwqError(
            f"{folder}: holds {index['n_tokens']:,} scored tokens and {wanted.n_tokens:,} are "
            f"wanted; {_AGAIN}"
        )
    states = _states(folder / STATES, sum(len(passage.ids) for passage in tokens.passages))
    if _sha256(tokens, states) != index["sha256"]:
        raise QwqError(f"{folder}: its bytes changed since it was written; {_AGAIN}")
    return tokens, states


def _tokens(index: dict[str, Any], path: Path) -> EvaluationTokens:
    match index:
        case {
            "n_tokens": int(),
            "sha256": str(),
            "opening": str(opening),
            "passages": [_, *_] as entries,
        }:
            found = [_passage(entry, f"{path}: passage {i}") for i, entry in enumerate(entries)]
        case _:
            raise QwqError(f"{path}: lacks a key, or its value is of another kind; {_AGAIN}")
    names, kinds, passages = zip(*found, strict=True)
    return EvaluationTokens(names, passages, opening, kinds)


def _passage(entry: object, where: str) -> tuple[str, str, TokenizedConversation]:
    match entry:
        case {
            "name": str(name),
            "kind": str(kind),
            "ids": [*ids],
            "n_prompt": int(n_prompt),
            "answer_start": int(answer_start),
            "stop": int(stop),
        } if all(
            type(one) is int and one >= 0 for one in ids
        ) and 0 <= n_prompt <= answer_start <= stop <= len(ids):
            return name, kind, TokenizedConversation(tuple(ids), n_prompt, answer_start, stop)
    raise QwqError(f"{where} lacks a key, or its value is of another kind; {_AGAIN}")


def _states(path: Path, n_tokens: int) -> Halves:
    """The array in the file, read only where the file is as long as its header says."""
    try:
        mapped = np.lib.format.open_memmap(path, mode="r")  # type: ignore[no-untyped-call]
        states: Halves = np.array(mapped)
    except (OSError, ValueError, OverflowError) as error:
        raise QwqError(f"{path}: cannot be read ({error}); {_AGAIN}") from error
    if states.dtype != np.float16 or states.ndim != 2 or len(states) != n_tokens:
        raise QwqError(
            f"{path}: holds {states.dtype} of shape {states.shape} and not float16 of "
            f"{n_tokens:,} tokens; {_AGAIN}"
        )
    return states


def _sha256(tokens: EvaluationTokens, states: Halves) -> str:
    """Of both, so that neither changes, nor is found beside another's, unseen."""
    digest = hashlib.sha256(np.ascontiguousarray(states).data)
    digest.update(json.dumps(asdict(tokens), sort_keys=True).encode())
    return digest.hexdigest()
