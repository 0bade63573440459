"""A smaller model that proposes ids to a larger one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.errors import UsageError

if TYPE_CHECKING:
    from qwq_local.engines.gguf import GgufEngine

_MOST_MISSING = 1024  # ids that only one of the two has: padding, and tags that came later
_NORMAL, _UNKNOWN, _UNUSED = 1, 2, 5  # tokenizer.ggml.token_type


def check_vocabulary(path: Path, draft: Mapping[str, Any], target: Mapping[str, Any]) -> set[int]:
    """The ids that mean the same in both models' metadata.

    A draft may lack ids at the end, as Qwen2.5 lacks the tags of thoughts. Raises UsageError where
    any id that both have means another text.
    """
    ours, theirs = _texts(target), _texts(draft)
    shared = ours.keys() & theirs.keys()
    for token_id in sorted(shared):
        if ours[token_id] != theirs[token_id]:
            raise UsageError(
                f"{path}: its token {token_id:,} is {theirs[token_id]!r} and the model's is "
                f"{ours[token_id]!r}; choose a draft with the same vocabulary"
            )
    n_missing = len(ours.keys() ^ theirs.keys())
    if not shared or n_missing > _MOST_MISSING:
        raise UsageError(
            f"{path}: {n_missing:,} tokens are not in both vocabularies, where {_MOST_MISSING:,} "
            "may be; choose a draft of the same family"
        )
    return shared


def _texts(metadata: Mapping[str, Any]) -> dict[int, str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list):
        return {}
    kinds = types.tolist() if isinstance(types, np.ndarray) else [_NORMAL] * len(tokens)
    pairs = enumerate(zip(tokens, kinds, strict=False))
    return {i: text for i, (text, kind) in pairs if kind not in (_UNUSED, _UNKNOWN)}


class DraftModel:
    """A small model for one target. shared: the ids that mean the same in both."""

    def __init__(self, engine: GgufEngine, shared: set[int], target: GgufEngine) -> None:
        self.engine = engine
        self.shared = shared
        self._target = target

    def begin(self) -> DraftDrafter:
        """For one reply."""
        return DraftDrafter(self)

    def spell(self, token_id: int) -> list[int]:
        """The draft's ids for one of the target's; its text in pieces where the draft lacks it."""
        if token_id in self.shared:
            return [token_id]
        text = self._target.token_bytes(token_id).decode("utf-8", errors="replace")
        return self.engine.tokenize(text, parse_special=False)


class DraftDrafter:
    """Proposes, for one reply, what a draft model finds likeliest."""

    is_free = False

    def __init__(self, model: DraftModel) -> None:
        self._model = model
        self._spelled: list[int] = []  # the sequence in the draft's ids
        self._n_seen = 0

    def propose(self, sequence: Sequence[int], n: int) -> list[int]:
        for token_id in sequence[self._n_seen :]:
            self._spelled += self._model.spell(token_id)
        self._n_seen = len(sequence)
        proposed = self._model.engine.look_ahead(self._spelled, n)
        return list(itertools.takewhile(self._model.shared.__contains__, proposed))
