"""Second implementers of the project's Protocols, as small as they can be."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwq_local.description import Description
from qwq_local.engine import Drafts, Generation, Intervention
from qwq_local.rope import Yarn, plan_rope
from qwq_local.sampling import Sampling

CONTROL_TOKENS = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}


class FakeEngine:
    """An engine of bytes that says what it was told to say, one reply after the other."""

    vocab_size = 259
    rope_plan = plan_rope("auto", 4096)

    def __init__(self, *replies: str) -> None:
        self.control_tokens = dict(CONTROL_TOKENS)
        self.replies = list(replies)
        self.prompts: list[list[int]] = []
        self.prefilled: list[list[int]] = []
        self.seeds: list[int] = []
        self.ropes: list[Yarn | None] = []
        self.changes: list[Intervention] = []
        self.said: list[bytes] = []  # before each change

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

    def grammar(self, answer_format: Mapping[str, Any] | str) -> str:
        return str(answer_format)

    def n_cached(self, ids: Sequence[int], *, rope: Yarn | None = None) -> int:
        return 0

    def prefill(self, ids: Sequence[int], *, rope: Yarn | None = None) -> Iterator[int]:
        self.prefilled.append(list(ids))
        for start in range(0, len(ids) - 64, 64):
            yield start + 64

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
        self.prompts.append(list(ids))
        self.seeds.append(seed)
        self.ropes.append(rope)
        rest = self.replies.pop(0).encode()
        said = b""
        while max_tokens > 0:
            said, rest = said + rest[:1], rest[1:]
            change = yield said[-1]
            max_tokens -= 1
            if change is not None:
                self.changes.append(change)
                self.said.append(said)
                max_tokens -= len(change.ids)
                if b"</think>" in bytes(change.ids):  # it answers
                    rest = rest.partition(b"</think>\n\n")[2]
            if not rest:
                yield CONTROL_TOKENS["<|im_end|>"]
                return

    def logits(
        self, ids: Sequence[int], *, first: int = 0, rope: Yarn | None = None
    ) -> Iterator[NDArray[np.float32]]:
        yield np.zeros((len(ids) - first, self.vocab_size), dtype=np.float32)

    def export_cache(self, ids: Sequence[int], *, rope: Yarn | None = None) -> bytes:
        return bytes(8)

    def import_cache(self, ids: Sequence[int], state: bytes, *, rope: Yarn | None = None) -> None:
        self.imported = state

    def close(self) -> None:
        self.replies.clear()


def describe_fake(template: str) -> Description:
    """What a model that runs on the fake says of itself."""
    return Description("fake", template, {}, Sampling(), frozenset({258}))
