"""Tokenizer, chat template, sampling defaults and model card -> GGUF keys.

The keys are those of llama.cpp's converter.
Source: llama.cpp, conversion/base.py and conversion/qwen.py; the gguf package's
SpecialVocab and Metadata are the parts of that converter that it publishes.
"""

from pathlib import Path
from typing import Any

import gguf
from yaml import YAMLError  # type: ignore[import-untyped] # gguf reads model cards with it

from convert.checkpoint import Checkpoint, read_json_object
from convert.errors import CheckpointError

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2's pre-tokenizer splits text; llama.cpp knows it as `qwen2`."""

SAMPLING_SEQUENCE = "penalties;temperature;top_k;top_p;min_p"
"""The order of transformers, in llama.cpp's names; llama.cpp alone would put temperature last."""

_WHAT_TO_DO = "use the checkpoint's own files"


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Write tokens, their types, merges, special ids and the chat template.

    Ids that the tokenizer leaves free up to vocab_size become unused `[PADn]` tokens.
    Raises CheckpointError for a missing file, another tokenizer than Qwen2's, and ids that clash.
    """
    path = folder / "tokenizer.json"
    tokenizer = _read_object(path)
    _check_kind(tokenizer, path)
    tokens, types = _tokens(tokenizer, path, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    config_path = folder / "tokenizer_config.json"
    _read_object(config_path)
    try:
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
        if _adds_nothing(tokenizer.get("post_processor")):
            special.add_special_token = {"bos": False, "eos": False}
        special.add_to_gguf(writer, quiet=True)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{config_path}: cannot be used ({error}); {_WHAT_TO_DO}") from error
    if not special.chat_template:
        raise CheckpointError(f"{config_path}: there is no chat template; {_WHAT_TO_DO}")


def add_general(writer: gguf.GGUFWriter, checkpoint: Checkpoint, n_weights: int) -> None:
    """Write general.* from the model card and the model's name, and general.sampling.*.

    Beyond what llama.cpp's converter writes, the order of samplers and the values that stand for
    "off" are explicit, since llama.cpp's own defaults differ.
    Raises CheckpointError for a model card or generation_config.json that cannot be used.
    """
    try:
        metadata = gguf.Metadata.apply_metadata_heuristic(
            gguf.Metadata(),
            gguf.Metadata.load_model_card(checkpoint.path),
            checkpoint.config,
            Path(checkpoint.name),
            n_weights,
        )
        if metadata.size_label is None:
            metadata.size_label = gguf.size_label(n_weights, n_weights, 0, 0)
        _set_sampling(metadata, checkpoint.path / "generation_config.json")
        writer.add_type(gguf.GGUFType.MODEL)
        metadata.set_gguf_meta_model(writer)
    except (YAMLError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{checkpoint.path / 'README.md'}: the model card cannot be used ({reason}); "
            f"{_WHAT_TO_DO}"
        ) from error


def _set_sampling(metadata: gguf.Metadata, path: Path) -> None:
    defaults = read_json_object(path) if path.is_file() else {}
    top_k = _number(defaults, "top_k", path)
    metadata.sampling_sequence = SAMPLING_SEQUENCE
    metadata.sampling_top_k = None if top_k is None else int(top_k)
    metadata.sampling_top_p = _number(defaults, "top_p", path)
    metadata.sampling_min_p = _number(defaults, "min_p", path) or 0.0
    metadata.sampling_temp = _number(defaults, "temperature", path)
    metadata.sampling_penalty_repeat = _number(defaults, "repetition_penalty", path) or 1.0


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing; download the checkpoint again")
    return read_json_object(path)


def _check_kind(tokenizer: dict[str, Any], path: Path) -> None:
    match tokenizer.get("model"):
        case {"type": "BPE", "vocab": dict(), "merges": list(merges)} if merges:
            pass
        case _:
            raise CheckpointError(f"{path}: holds no BPE vocabulary with merges; {_WHAT_TO_DO}")
    match tokenizer.get("pre_tokenizer"):
        case {"pretokenizers": [{"pattern": {"Regex": str(pattern)}}, *_]}:
            pass
        case _:
            pattern = ""
    if pattern != QWEN2_PATTERN:
        raise CheckpointError(
            f"{path}: its pre-tokenizer is not Qwen2's, and GGUF readers would split text "
            f"otherwise; {_WHAT_TO_DO}"
        )


def _adds_nothing(post_processor: object) -> bool:
    """Whether the tokenizer puts no token before or after a text, whatever its config claims."""
    match post_processor:
        case None | {"type": "ByteLevel"}:
            return True
        case {"type": "Sequence", "processors": list(processors)}:
            return all(map(_adds_nothing, processors))
        case _:
            return False


def _tokens(
    tokenizer: dict[str, Any], path: Path, vocab_size: int
) -> tuple[list[str], list[gguf.TokenType]]:
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size

    def place(token_id: object, token: object, token_type: gguf.TokenType) -> None:
        if (
            type(token_id) is not int
            or not 0 <= token_id < vocab_size
            or not isinstance(token, str)
        ):
            raise CheckpointError(
                f"{path}: token {str(token)[:40]!r} has id {str(token_id)[:40]} and the model "
                f"{vocab_size:,} rows; {_WHAT_TO_DO}"
            )
        if types[token_id] != gguf.TokenType.UNUSED and tokens[token_id] != token:
            raise CheckpointError(
                f"{path}: {tokens[token_id]!r} and {token!r} share id {token_id}; {_WHAT_TO_DO}"
            )
        tokens[token_id] = token
        types[token_id] = token_type

    for token, token_id in tokenizer["model"]["vocab"].items():
        place(token_id, token, gguf.TokenType.NORMAL)
    for entry in tokenizer.get("added_tokens", ()):
        match entry:
            case {"id": token_id, "content": str(content), "special": bool(special)}:
                is_control = special or (content.startswith("<|") and content.endswith("|>"))
                kind = gguf.TokenType.CONTROL if is_control else gguf.TokenType.USER_DEFINED
                place(token_id, content, kind)
            case _:
                raise CheckpointError(
                    f"{path}: an added token lacks id, content or special; {_WHAT_TO_DO}"
                )
    return tokens, types


def _number(table: dict[str, Any], key: str, path: Path) -> float | None:
    value = table.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value < 1e6:
        raise CheckpointError(
            f"{path}: {key} is {str(value)[:40]}, not a number from 0 to 1e6; {_WHAT_TO_DO}"
        )
    return float(value)
