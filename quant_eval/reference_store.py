"""A reference on the disk: made once, used for every file, and only for what it was made of."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from convert.calibration import TokenizedConversation
from convert.checkpoint import Checkpoint, read_json_object
from convert.errors import QwqError
from convert.evaluation_states import Halves
from convert.files import replacing_file
from quant_eval.reference import Reference
from quant_eval.results import write_json

STATES = "states.npy"
INDEX = "reference.json"
FORMAT = 2


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
        "states_sha256": _sha256(states),
        "opening": tokens.opening,
        "passages": [
            {"name": name, "kind": kind, **asdict(passage)}
            for name, kind, passage in zip(tokens.names, tokens.kinds, tokens.passages, strict=True)
        ],
    }
    write_json(folder / INDEX, index, indent=None)


def why_stale(folder: Path, wanted: Binding) -> str:
    """Why the folder's reference cannot serve, with what to do; "" where it can."""
    index = folder / INDEX
    if not index.is_file():
        return f"{folder}: holds no {INDEX}; make it with `qwq eval reference`"
    found = read_json_object(index)
    again = "make it again with `qwq eval reference`"
    if found.get("format") != FORMAT:
        return f"{index}: has format {found.get('format')} and {FORMAT} is read here; {again}"
    for key, what in (("checkpoint_sha256", "checkpoint"), ("evaluation_sha256", "text")):
        here, there = str(getattr(wanted, key)), str(found.get(key))
        if here != there:
            return (
                f"{folder}: was made of a {what} with SHA-256 {there[:12]} and the one given has "
                f"{here[:12]}; {again}"
            )
    if found["n_tokens"] < wanted.n_tokens:
        return (
            f"{folder}: holds {found['n_tokens']:,} scored tokens and {wanted.n_tokens:,} are "
            f"wanted; {again}"
        )
    return ""


def load_reference(
    folder: Path, checkpoint: Checkpoint, wanted: Binding
) -> tuple[EvaluationTokens, Reference]:
    """The first passages that together have the wanted tokens, with their states.

    Raises QwqError where the reference is stale or its bytes are not those that were written.
    """
    if reason := why_stale(folder, wanted):
        raise QwqError(reason)
    index = read_json_object(folder / INDEX)
    states: Halves = np.load(folder / STATES, allow_pickle=False)
    if _sha256(states) != index["states_sha256"]:
        raise QwqError(f"{folder / STATES}: its bytes changed since it was written; make it again")
    names: list[str] = []
    kinds: list[str] = []
    passages: list[TokenizedConversation] = []
    hidden: list[Halves] = []
    start = n_scored = 0
    for entry in index["passages"]:
        if n_scored >= wanted.n_tokens:
            break
        names.append(entry.pop("name"))
        kinds.append(entry.pop("kind"))
        passages.append(TokenizedConversation(**{**entry, "ids": tuple(entry["ids"])}))
        hidden.append(states[start : start + len(passages[-1].ids)])
        start += len(hidden[-1])
        n_scored += passages[-1].stop - passages[-1].n_prompt
    tokens = EvaluationTokens(tuple(names), tuple(passages), index["opening"], tuple(kinds))
    return tokens, Reference(checkpoint, tuple(hidden))


def _sha256(states: Halves) -> str:
    return hashlib.sha256(np.ascontiguousarray(states).data).hexdigest()
