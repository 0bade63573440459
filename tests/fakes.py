"""Second implementers of the project's Protocols, as small as they can be."""

import re
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from qwq_local.description import Description
from qwq_local.sampling import Sampling

CONTROL_TOKENS = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}


class FakeEngine:
    """An engine of bytes that says what it was told to say, one reply after the other."""

    vocab_size = 259
    context_length = 4096

    def __init__(self, *replies: str) -> None:
        self.control_tokens = dict(CONTROL_TOKENS)
        self.replies = list(replies)
        self.prompts: list[list[int]] = []
        self.seeds: list[int] = []

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        if not parse_special:
            return list(text.encode())
        parts = re.split(r"(<\|\w+\|>)", text)
        ids = [[CONTROL_TOKENS[p]] if p in CONTROL_TOKENS else list(p.encode()) for p in parts]
        return [token_id for part in ids for token_id in part]

    def token_bytes(self, token_id: int) -> bytes:
        return (
            bytes([token_id]) if token_id < 256 else list(CONTROL_TOKENS)[token_id - 256].encode()
        )

    def n_cached(self, ids: Sequence[int]) -> int:
        return 0

    def generate(
        self,
        ids: Sequence[int],
        *,
        sampling: Sampling,
        seed: int,
        max_tokens: int,
        stop_ids: Collection[int],
    ) -> Iterator[int]:
        self.prompts.append(list(ids))
        self.seeds.append(seed)
        yield from [*self.replies.pop(0).encode(), CONTROL_TOKENS["<|im_end|>"]][:max_tokens]

    def logits(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        yield np.zeros((len(ids), self.vocab_size), dtype=np.float32)

    def close(self) -> None:
        self.replies.clear()


def describe_fake(template: str) -> Description:
    """What a model that runs on the fake says of itself."""
    return Description("fake", template, {}, Sampling(), frozenset({258}))
