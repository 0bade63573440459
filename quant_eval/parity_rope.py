"""What a file's positions are read with, held against transformers with the checkpoint's config.

Inverse frequencies and the scale of attention, without YaRN and with it: no weights are needed,
so it is exact for every size. Of a small model the logits too.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.errors import GgufError
from qwq_local.engine import Engine
from qwq_local.rope import MAX_FACTOR, NATIVE_LENGTH, Yarn, plan_rope

N_COMPARED = 64  # positions whose logits are compared
CARD_YARN = {"original_max_position_embeddings": 32_768}
"""What QwQ's card gives where the checkpoint has no YaRN of its own."""
_TOLERANCE = 1e-5  # relative, of a frequency: both sides compute in float32
MIN_COSINE = 0.5
"""Of the changes that YaRN makes to both logits; 0.88 for nano-qwq in Q8_0."""

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rope:
    """inverse_frequencies: radians a position, (head_dim / 2,). scale: of cosines and sines."""

    inverse_frequencies: NDArray[np.float64]
    scale: float


def longest_yarn() -> Yarn:
    """What the runtime reads the longest inputs with."""
    yarn = plan_rope("auto", MAX_FACTOR * NATIVE_LENGTH).yarn
    assert yarn is not None
    return yarn


def rope_of_gguf(metadata: Mapping[str, Any], yarn: Yarn | None) -> Rope:
    """As llama.cpp computes it with the runtime's settings and a file's own numbers.

    Raises GgufError for a number that is none.
    Source: llama.cpp, ggml_rope_yarn_corr_dims and rope_yarn in ggml-cpu/ops.cpp.
    """

    def number(key: str, default: float, *, above: float = 0) -> float:
        value = metadata.get(f"qwen2.rope.{key}", default)
        if not isinstance(value, int | float) or not above < value < math.inf:
            raise GgufError(
                f"qwen2.rope.{key}: is {str(value)[:40]}, not a number above {above:g}; make the "
                "file again"
            )
        return float(value)

    head_dim = metadata["qwen2.embedding_length"] // metadata["qwen2.attention.head_count"]
    n_dims = int(number("dimension_count", metadata.get("qwen2.attention.key_length", head_dim)))
    base = number("freq_base", 10_000.0, above=1)
    pairs = np.arange(n_dims // 2)
    plain = base ** (-2.0 * pairs / n_dims)
    if yarn is None:
        return Rope(plain, 1.0)
    low, high = (
        n_dims * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (number("scaling.yarn_beta_fast", 32), number("scaling.yarn_beta_slow", 1))
    )
    first, last = max(0, math.floor(low)), min(n_dims - 1, math.ceil(high))
    stretched = np.clip((pairs - first) / max(0.001, last - first), 0, 1)
    scale = number("scaling.attn_factor", 1) * (1 + 0.1 * math.log(yarn.factor))
    return Rope(plain * (1 - stretched + stretched / yarn.factor), scale)


def rope_of_folder(folder: Path, yarn: Yarn | None, *, expected: bool = False) -> Rope:
    """As transformers computes it. expected: by config.json and the card, not by the runtime."""
    embedding = _embedding(_config_of(folder), yarn, expected=expected)
    return Rope(embedding.inv_freq.double().numpy(), float(embedding.attention_scaling))


def frequency_problem(found: Rope, expected: Rope) -> str:
    """In words, "" where there is none."""
    ours, theirs = found.inverse_frequencies, expected.inverse_frequencies
    if len(ours) != len(theirs):
        return f"turns {len(ours)} pairs and transformers {len(theirs)}"
    apart = np.abs(ours / theirs - 1)
    worst = int(apart.argmax())
    if apart[worst] > _TOLERANCE:
        return (
            f"turns pair {worst} by {ours[worst]:.4g} radians a position and transformers by "
            f"{theirs[worst]:.4g}"
        )
    if abs(found.scale / expected.scale - 1) > _TOLERANCE:
        return f"scales attention by {found.scale:.4f} and transformers by {expected.scale:.4f}"
    return ""


def rope_problem(path: Path, metadata: Mapping[str, Any] | None, source: Path) -> str:
    """What is wrong with the frequencies, in words. metadata: a GGUF file's; None for a folder."""
    for name, yarn in (("without YaRN", None), ("with YaRN", longest_yarn())):
        found = rope_of_folder(path, yarn) if metadata is None else rope_of_gguf(metadata, yarn)
        # the checkpoint's own lengths where it has YaRN; the factor is the longest input's
        problem = frequency_problem(found, rope_of_folder(source, yarn, expected=True))
        if problem:
            return f"{name} {problem}"
    return ""


def logits_problem(engine: Engine, source: Path, ids: Sequence[int]) -> str:
    """Whether YaRN changes the file's logits as it changes those of the checkpoint's own weights.

    For files of 8 bits and more: what quantizing does to both logits falls out of the change.
    """
    ours = _change(_last_logits(engine, ids, None), _last_logits(engine, ids, longest_yarn()))
    theirs = _change(*_reference_logits(source, ids))
    if ours.shape != theirs.shape:
        return f"has {ours.shape[1]:,} logits and the checkpoint {theirs.shape[1]:,}"
    size = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
    cosine = float(np.vdot(ours, theirs)) / size if size > 0 else 0.0
    if not cosine >= MIN_COSINE:
        return (
            "with YaRN changes the logits otherwise than transformers does: cosine of the changes "
            f"{cosine:.2f}, at least {MIN_COSINE}"
        )
    return ""


def _change(native: Logits, with_yarn: Logits) -> NDArray[np.float64]:
    """In float64 and without each row's constant, which no probability shows; (n, vocab_size)."""
    change: NDArray[np.float64] = with_yarn.astype(np.float64) - native
    change -= change.mean(axis=1, keepdims=True)
    return change


def _last_logits(engine: Engine, ids: Sequence[int], rope: Yarn | None) -> Logits:
    return np.concatenate(list(engine.logits(ids, first=len(ids) - N_COMPARED, rope=rope)))


def _reference_logits(source: Path, ids: Sequence[int]) -> tuple[Logits, Logits]:
    """Without YaRN and with it, from the checkpoint in float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, local_files_only=True
    )
    found = []
    for yarn in (None, longest_yarn()):
        model.model.rotary_emb = _embedding(model.config, yarn, expected=True)
        with torch.inference_mode():
            found.append(model(torch.tensor([ids]), logits_to_keep=N_COMPARED).logits[0].numpy())
    return found[0], found[1]


def _config_of(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True)


def _embedding(config: Any, yarn: Yarn | None, *, expected: bool) -> Any:
    """expected: with YaRN's numbers by config.json and QwQ's card, the factor apart."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    config = copy.deepcopy(config)
    given = config.rope_parameters
    parameters = {"rope_type": "default", "rope_theta": given["rope_theta"]}
    if yarn is not None and not expected:
        parameters |= {"original_max_position_embeddings": yarn.original_length}
    elif yarn is not None:
        parameters |= CARD_YARN | (given if given["rope_type"] == "yarn" else {})
    if yarn is not None:
        parameters |= {"rope_type": "yarn", "factor": yarn.factor}
    config.rope_parameters = parameters
    return Qwen2RotaryEmbedding(config)
