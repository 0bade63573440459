"""How many tokens a text has, where no tokenizer of Qwen's is at hand."""

import re

_PIECES = re.compile(r"\d|[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]+|[^\W\d_]+| ?[^\s\w]+")


def n_tokens_at_least(text: str) -> int:
    """A bound from below: Qwen's pre-tokenizer alone, and two signs of Chinese to a token.

    Each digit, each word and each run of punctuation is at least one token; long words are more.
    """
    pieces = _PIECES.findall(text)
    return sum((len(one) + 1) // 2 if ord(one[-1]) > 0x3000 else 1 for one in pieces)
