"""nano-qwq's tokenizer: byte-level BPE, Qwen2's pre-tokenizer, QwQ's added tokens.

Merges make whole frequent pieces and none that occur inside other words: a word in quotes stays in
letters, so that a very small model can count them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

N_BPE_TOKENS = 800  # 256 bytes and the merges; QwQ has 151,643
RARE = 2000  # a piece in fewer than one place of so many is a word to spell, and stays in letters
CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"

# In the order of QwQ's ids 151643 to 151668. Decoding keeps those that are not special.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ADDED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)  # fmt: skip
_PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Train the merges on texts and write the files that a QwQ checkpoint has.

    Writes tokenizer.json, vocab.json, merges.txt and tokenizer_config.json, chat template included.
    """
    from tokenizers import AddedToken, Regex, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.normalizers import NFC
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from tokenizers.processors import ByteLevel as ByteLevelProcessor

    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = Sequence(
        [
            Split(Regex(_PRE_TOKENIZER), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.post_processor = ByteLevelProcessor(trim_offsets=False)
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    counts = Counter(piece for text in texts for piece, _ in split(text))
    merges = grown_merges(counts, N_BPE_TOKENS - 256)
    tokens = [*sorted(ByteLevel.alphabet()), *(first + second for first, second in merges)]
    tokenizer.model = BPE({token: index for index, token in enumerate(tokens)}, merges)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ADDED_TOKENS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    config = _tokenizer_config(tokenizer)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def grown_merges(counts: Counter[str], n_merges: int) -> list[tuple[str, str]]:
    """The merges that make the most frequent pieces, one letter at a time.

    A piece grows from its first byte, or, where that is a small letter, from the pair of letters
    that is rarest in the words to spell, which are the rare pieces.
    """
    rare = counts.total() // RARE
    in_words: Counter[str] = Counter()
    for piece, count in counts.items():
        if piece[0].islower() and count <= rare:
            in_words.update(dict.fromkeys(map("".join, pairwise(piece)), count))
    merges: dict[tuple[str, str], None] = {}
    for piece, count in counts.most_common():
        start = 0
        if piece[0].islower():
            if count <= rare:
                continue
            start = min(range(len(piece) - 1), key=lambda i: in_words[piece[i : i + 2]], default=0)
        steps = [(piece[start:end], piece[end]) for end in range(start + 1, len(piece))]
        steps += [(piece[i], piece[i + 1 :]) for i in reversed(range(start))]
        if len(merges.keys() | steps) <= n_merges:
            merges.update(dict.fromkeys(steps))
    return list(merges)


def _tokenizer_config(tokenizer: Any) -> dict[str, Any]:
    added = {
        str(tokenizer.token_to_id(text)): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": text in SPECIAL_TOKENS,
        }
        for text in SPECIAL_TOKENS + ADDED_TOKENS
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE.read_text().rstrip("\n"),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
