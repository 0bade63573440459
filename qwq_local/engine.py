"""What every engine offers: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from convert.errors import UsageError
from qwq_local.rope import RopeMode, RopePlan, Yarn
from qwq_local.sampling import Sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KvType = Literal["f16", "q8_0"]
KvChoice = Literal["auto", "f16", "q8_0"]
Speculation = Literal["off", "exact", "close"]
MOST_PARALLEL = 64
OnProgress = Callable[[int, int], None]
"""Told how much of how much is done."""


@dataclass(frozen=True, slots=True)
class Intervention:
    """What changes in a reply while it is generated.

    ids: appended as if they had been sampled. grammar: GBNF that all further ids obey.
    rope: what the sequence is read with from now on.
    """

    ids: tuple[int, ...] = ()
    grammar: str | None = None
    rope: Yarn | None = None


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to load a model.

    context: tokens for prompt and reply; None chooses by the model and the free memory.
    threads: None chooses by the cores and the model's size. kv_type: what a GGUF file's kv_cache
    is stored in; "auto" is f16, or q8_0 where f16 does not fit. parallel: how many replies of a
    GGUF file are decoded together, each with a context of its own. speculation: whether ids of a
    GGUF file's replies are proposed and read in batches: "exact" only where that was found to
    compute the same bits, "close" wherever it pays. draft: the GGUF file of a smaller model to
    propose them; None takes them from the context.
    """

    context: int | None = None
    threads: int | None = None
    rope: RopeMode = "auto"
    kv_type: KvChoice = "auto"
    parallel: int = 1
    speculation: Speculation = "exact"
    draft: str | None = None

    def __post_init__(self) -> None:
        if self.speculation not in get_args(Speculation):
            raise UsageError(
                f"speculation: {self.speculation!r} is unknown; use one of "
                f"{', '.join(get_args(Speculation))}"
            )
        if not 1 <= self.parallel <= MOST_PARALLEL:
            raise UsageError(
                f"parallel: {self.parallel} replies at once cannot be; choose 1 to {MOST_PARALLEL}"
            )


@dataclass(slots=True)
class Drafts:
    """How many ids were proposed and read in batches for one reply, and how many of them came."""

    n_drafted: int = 0
    n_accepted: int = 0


Generation = Generator[int, Intervention | None, None]
"""Sampled ids, ScoredIds where sampling.top_logprobs is set; what is sent in takes effect before
the next one."""


class Engine(Protocol):
    """One loaded model with its tokenizer and its kv_cache.

    Several threads may use it, and several replies take turns on it. `rope` says what the
    positions of a sequence are read with: None is native.
    """

    @property
    def vocab_size(self) -> int:
        """Columns of the logits, padding rows of the vocabulary included."""

    @property
    def rope_plan(self) -> RopePlan:
        """How many ids prompt and reply may have together, and with which rope."""

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Text and id of each special token; the tags of thoughts and calls are not special."""

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        """Ids of a text; where parse_special is false, special tokens in it are plain text."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that an id stands for, b"" for a padding row; they may cut a character."""

    def grammar(self, answer_format: Mapping[str, Any] | str) -> str:
        """The GBNF of a JSON schema, or a GBNF grammar as it is, after a check.

        Raises UsageError where it is neither, or where the engine has no grammars.
        """

    def n_cached(self, ids: Sequence[int], *, rope: Yarn | None = None) -> int:
        """How many leading ids a reply to this prompt would find in the kv_cache."""

    def prefill(self, ids: Sequence[int], *, rope: Yarn | None = None) -> Iterator[int]:
        """Read a prompt into the kv_cache, all but its tail, for a generate that follows.

        Yields how many ids are there after each micro-batch. Stopping early keeps what was read.
        """

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
        """Sample ids that follow the prompt, as they come.

        Ends after max_tokens ids, sent ones included, or with the first id of stop_ids, which is
        yielded too, unless ids are sent in then. len(ids) + max_tokens must not exceed the
        context. Closing it cancels.
        drafts: counted up on the way.
        """

    def logits(
        self, ids: Sequence[int], *, first: int = 0, rope: Yarn | None = None
    ) -> Iterator[NDArray[np.float32]]:
        """Logits at the positions from first on, in order, as chunks of (n, vocab_size)."""

    def export_cache(self, ids: Sequence[int], *, rope: Yarn | None = None) -> bytes:
        """What the kv_cache holds of these ids' beginning, for import_cache of the same model."""

    def import_cache(self, ids: Sequence[int], state: bytes, *, rope: Yarn | None = None) -> None:
        """Fill the kv_cache with what was exported for these ids.

        Raises QwqError where the state does not belong to this model.
        """

    def close(self) -> None:
        """Free the memory; the engine is of no use afterwards. A second call does nothing."""


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading ids two sequences share."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
