"""What a GGUF file is made of and says of itself, and what in it will surprise."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

import gguf
import numpy as np

from convert.encode import QuantType
from convert.gguf_header import MetadataValue
from convert.gguf_parts import GgufModel

YARN_ORIGINAL_LENGTH = 32_768
"""The length that QwQ was trained on and YaRN scales from, whatever a file's context length says.

Source: QwQ-32B's model card.
"""

THINK = "<think>"
TURN_END = "<|im_end|>"
_QWEN2_SPLITTERS = ("qwen2", "deepseek-r1-qwen")
"""llama.cpp's names of pre-tokenizers that split as Qwen2's does."""
_N_SHOWN_ITEMS = 8
_N_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class TypeShare:
    """All tensors of one type together."""

    quant_type: QuantType
    n_tensors: int
    n_weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.n_weights


def type_shares(model: GgufModel) -> list[TypeShare]:
    """By type, the largest share of the bytes first."""
    tensors = sorted(model.tensors.values(), key=lambda tensor: tensor.quant_type)
    shares = []
    for quant_type, group in groupby(tensors, key=lambda tensor: tensor.quant_type):
        members = list(group)
        n_weights = sum(prod(tensor.shape) for tensor in members)
        nbytes = sum(tensor.nbytes for tensor in members)
        shares.append(TypeShare(quant_type, len(members), n_weights, nbytes))
    return sorted(shares, key=lambda share: -share.nbytes)


def bits_per_weight(model: GgufModel) -> float | None:
    """Over all tensors; None for a file without any, such as a vocabulary alone."""
    shares = type_shares(model)
    if not shares:
        return None
    return 8 * sum(share.nbytes for share in shares) / sum(share.n_weights for share in shares)


def types_by_layer(model: GgufModel) -> dict[str, str]:
    """By role, in the order of the file, the type; where layers differ, which have which.

    As in {"attn_q.weight": "Q4_K", "attn_v.weight": "Q6_K 0-7, 10, 13; Q4_K 8-9, 11-12"}.
    """
    layers: dict[str, dict[QuantType, list[int]]] = defaultdict(lambda: defaultdict(list))
    described: dict[str, str] = {}
    for name, tensor in model.tensors.items():
        layer, role = _layer_and_role(name)
        described[role] = tensor.quant_type.name
        if layer is not None:
            layers[role][tensor.quant_type].append(layer)
    for role, by_type in layers.items():
        if len(by_type) > 1:
            rarest_first = sorted(by_type.items(), key=lambda item: (len(item[1]), item[0]))
            described[role] = "; ".join(
                f"{quant_type.name} {_ranges(numbers)}" for quant_type, numbers in rarest_first
            )
    return described


def shown_value(value: MetadataValue) -> str:
    """On one line, cut where long, nothing in it that a terminal would obey."""
    if isinstance(value, str):
        text = printable(value[: _N_SHOWN_CHARACTERS + 1])
        cut = len(value) > _N_SHOWN_CHARACTERS
        return f"{text[:_N_SHOWN_CHARACTERS]}... ({len(value):,} characters)" if cut else text
    if isinstance(value, list | np.ndarray):
        items = ", ".join(printable(str(item)[:40]) for item in value[:_N_SHOWN_ITEMS])
        return f"[{items}, ...] ({len(value):,})" if len(value) > _N_SHOWN_ITEMS else f"[{items}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def printable(text: str) -> str:
    """Control characters, and bytes that are no UTF-8, as escapes."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode("ascii")
        for one in text
    )


def json_value(value: MetadataValue) -> object:
    """For a JSON document: long lists as their length, float32 without its noise, text in UTF-8."""
    if isinstance(value, list | np.ndarray):
        if len(value) > _N_SHOWN_ITEMS:
            return {"length": len(value)}
        return [json_value(item if isinstance(item, str) else item.item()) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if isinstance(value, float):
        return float(f"{value:.7g}") if np.isfinite(value) else str(value)
    return value


def warnings_of(model: GgufModel) -> list[str]:
    """What makes a file behave otherwise than QwQ does, in words, the gravest first."""
    metadata = model.metadata
    warnings = list(_missing_tensors(model))
    tokens = metadata.get("tokenizer.ggml.tokens")
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(tokens, list):
        return [*warnings, "it has no tokenizer: programs cannot turn text into ids"]
    embedding = model.tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape[0] != len(tokens):
        warnings.append(
            f"it has {len(tokens):,} tokens and {embedding.shape[0]:,} rows of embeddings: "
            "no program will load it"
        )
    if isinstance(template, str):
        warnings += _template_warnings(template)
    else:
        warnings.append("it has no chat template: programs will guess how to render messages")
    warnings += _token_warnings(metadata, tokens, template if isinstance(template, str) else "")
    warnings += _rope_warnings(metadata)
    if "general.sampling.temp" not in metadata:
        warnings.append("it has no sampling defaults: programs will use their own, not QwQ's 0.6")
    return warnings


def _missing_tensors(model: GgufModel) -> Iterator[str]:
    n_layers = model.metadata.get(_key(model.metadata, "block_count"), 0)
    roles: dict[int, set[str]] = defaultdict(set)
    for name in model.tensors:
        layer, role = _layer_and_role(name)
        if layer is not None:
            roles[layer].add(role)
    expected = roles[0]
    for layer in range(min(n_layers, len(model.tensors)) if isinstance(n_layers, int) else 0):
        missing = sorted(expected - roles[layer])
        if missing:
            yield f"layer {layer} lacks {', '.join(missing)}: no program will load it"
    if not expected and n_layers:
        yield f"it holds no tensors of its {n_layers} layers: no program will load it"


def _template_warnings(template: str) -> Iterator[str]:
    if THINK not in template:
        yield f"its chat template does not open the thought: there is no {THINK} in it"
    if "enable_thinking" in template:
        yield "its chat template reads enable_thinking: without it the thought may be left out"


def _token_warnings(
    metadata: dict[str, MetadataValue], tokens: Sequence[str], template: str
) -> Iterator[str]:
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    if not isinstance(eos, int) or not 0 <= eos < len(tokens):
        yield f"its eos token is {eos} of {len(tokens):,} tokens: replies may not end"
    elif TURN_END in template and tokens[eos] != TURN_END:
        yield (
            f"its eos token is {eos} {printable(tokens[eos][:40])} and its template ends a turn "
            f"with {TURN_END}: replies may not end"
        )
    if metadata.get("tokenizer.ggml.add_bos_token") is True:
        yield "it asks for a bos token before the prompt, and Qwen2 models know none"
    pre = metadata.get("tokenizer.ggml.pre", "missing")
    if metadata.get("general.architecture") == "qwen2" and pre not in _QWEN2_SPLITTERS:
        yield f"its pre-tokenizer is {shown_value(pre)} and not qwen2: text is split otherwise"
    types = metadata.get("tokenizer.ggml.token_type")
    if TURN_END in template and isinstance(types, np.ndarray) and len(types) == len(tokens):
        kinds = dict(zip(tokens, types.tolist(), strict=True))
        if kinds.get(TURN_END) != gguf.TokenType.CONTROL:
            yield f"{TURN_END} is no control token in it: turns will not be told apart"
        if THINK in template and kinds.get(THINK) == gguf.TokenType.CONTROL:
            yield f"{THINK} is a control token in it: programs that hide those hide the thought"


def _rope_warnings(metadata: dict[str, MetadataValue]) -> Iterator[str]:
    if metadata.get("general.architecture") != "qwen2":
        return
    length = metadata.get("qwen2.context_length")
    if metadata.get("qwen2.rope.scaling.type") in (None, "none"):
        if isinstance(length, int) and length > YARN_ORIGINAL_LENGTH:
            yield (
                f"its context length of {length:,} says nothing about rope: beyond "
                f"{YARN_ORIGINAL_LENGTH:,} tokens QwQ needs YaRN switched on"
            )
        return
    original = metadata.get("qwen2.rope.scaling.original_context_length")
    if original != YARN_ORIGINAL_LENGTH:
        yield (
            f"its rope is scaled from a length of {original} and QwQ's is {YARN_ORIGINAL_LENGTH}: "
            "long texts will go wrong"
        )
    else:
        yield "its rope is scaled at every length, which may hurt short texts"


def _key(metadata: dict[str, MetadataValue], name: str) -> str:
    return f"{metadata.get('general.architecture')}.{name}"


def _layer_and_role(name: str) -> tuple[int | None, str]:
    """blk.3.attn_q.weight -> (3, attn_q.weight)."""
    parts = name.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal() and len(parts[1]) < 6:
        return int(parts[1]), parts[2]
    return None, name


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
