"""What running a GGUF file takes beside its weights: the kv_cache, and the buffers of a batch.

qwq_local plans with the same numbers, and a test holds the two together.
"""

from dataclasses import dataclass

from convert.errors import UsageError
from convert.qwen2 import Qwen2Config

KV_NBYTES: dict[str, float] = {"f16": 2, "q8_0": 34 / 32}
BATCH = 512
"""Tokens of a prompt that are read at a time."""
MARGIN_NBYTES = 512 << 20
"""Left free: the driver's own, and what other programs come to need."""
_LOGITS_IN_BATCH = 1 << 25


@dataclass(frozen=True, slots=True)
class Room:
    """How a device's memory is shared out, in bytes."""

    total: int
    kv_cache: int
    compute: int
    margin: int

    @property
    def weights(self) -> int:
        return self.total - self.kv_cache - self.compute - self.margin


def share_out(
    model: Qwen2Config, total_nbytes: int, *, context: int, kv_type: str, margin_nbytes: int
) -> Room:
    """What is left for weights where all layers are on one device.

    Compute buffers are counted from above: a batch's activations, the logits of as many of its rows
    as are computed at a time, and the mask of attention.
    Raises UsageError for a kv_cache of an unknown type.
    """
    if kv_type not in KV_NBYTES:
        known = " or ".join(KV_NBYTES)
        raise UsageError(f"--kv {kv_type}: is no type of a kv_cache; give {known}")
    n_kv_values = 2 * model.n_kv_heads * model.head_dim  # keys and values of a layer and token
    n_activations = 2 * model.intermediate_size + 4 * model.hidden_size
    n_logits_rows = max(1, min(BATCH, _LOGITS_IN_BATCH // model.vocab_size))
    return Room(
        total_nbytes,
        round(context * model.n_layers * n_kv_values * KV_NBYTES[kv_type]),
        4 * (BATCH * n_activations + n_logits_rows * model.vocab_size) + 2 * BATCH * context,
        margin_nbytes,
    )
