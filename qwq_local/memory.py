"""How much context a machine has room for."""

from convert.errors import UsageError

NATIVE_CONTEXT = 32_768  # what QwQ was trained on; a file's own number may say more or less
_SMALLEST_CONTEXT = 2_048
_WORTH_THREADS = 100_000_000


def choose_context(
    asked: int | None,
    *,
    n_possible: int,
    kv_nbytes_per_token: int,
    weights_nbytes: int,
    free_nbytes: int | None = None,
) -> int:
    """The context length to load a model with.

    asked: the caller's number, which is taken as it is. Else the model's own, at most 32,768,
    halved until the kv_cache takes at most half of the memory that the weights leave free.
    n_possible: the model's own limit in tokens. free_nbytes: of the device that holds the
    kv_cache; None asks for this machine's memory. Raises UsageError where more is asked.
    """
    if asked is not None:
        if not 1 <= asked <= n_possible:
            raise UsageError(
                f"context: {asked:,} tokens are asked for and the model has 1 to {n_possible:,}; "
                "choose a number within"
            )
        return asked
    import psutil

    if free_nbytes is None:
        free_nbytes = psutil.virtual_memory().available
    n_free = max(0, free_nbytes - weights_nbytes)
    context = min(n_possible, NATIVE_CONTEXT)
    while context > _SMALLEST_CONTEXT and context * kv_nbytes_per_token > n_free // 2:
        context //= 2
    return context


def choose_threads(asked: int | None, *, n_weights: int) -> int:
    """How many threads decode fastest: the caller's number, else the physical cores.

    One for a model so small that its threads would spend their time waiting for each other.
    """
    if asked is not None:
        return asked
    return 1 if n_weights < _WORTH_THREADS else usable_cores()


def usable_cores() -> int:
    """Physical cores that this process may use."""
    import os

    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(allowed or 1, psutil.cpu_count(logical=False) or 1))
