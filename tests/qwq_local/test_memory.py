"""How much context and how many threads a model gets."""

import psutil
import pytest

from convert.errors import UsageError
from qwq_local.memory import choose_context, choose_threads, usable_cores

GIB = 1 << 30
QWQ_KV_NBYTES = 64 * 2 * 8 * 128 * 2  # a token of QwQ-32B in f16: 256 KiB


@pytest.mark.parametrize(
    ("free_gib", "n_possible", "expected"),
    [(64, 131_072, 32_768), (64, 8_192, 8_192), (32, 131_072, 16_384), (9, 131_072, 2_048)],
)
def test_the_context_fits_the_memory(
    monkeypatch: pytest.MonkeyPatch, free_gib: int, n_possible: int, expected: int
) -> None:
    """Would catch the file's 131,072 tokens, 32 GiB of kv_cache, being reserved."""
    memory = type("Memory", (), {"available": free_gib * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    n_context = choose_context(
        None,
        n_possible=n_possible,
        kv_nbytes_per_token=QWQ_KV_NBYTES,
        weights_nbytes=20 * 10**9,
    )
    assert n_context == expected
    elsewhere = choose_context(
        None,
        n_possible=n_possible,
        kv_nbytes_per_token=QWQ_KV_NBYTES,
        weights_nbytes=20 * 10**9,
        free_nbytes=9 * GIB,
    )
    assert elsewhere == 2_048


def test_what_is_asked_for_is_taken_or_refused() -> None:
    def choose(asked: int) -> int:
        return choose_context(
            asked, n_possible=40_960, kv_nbytes_per_token=QWQ_KV_NBYTES, weights_nbytes=10**15
        )

    assert choose(40_960) == 40_960
    with pytest.raises(UsageError, match="40,961 tokens are asked for and the model has 1 to"):
        choose(40_961)


def test_small_models_get_one_thread() -> None:
    assert choose_threads(None, n_weights=5_000_000) == 1
    assert choose_threads(None, n_weights=32_000_000_000) == usable_cores() >= 1
    assert choose_threads(3, n_weights=5_000_000) == 3
