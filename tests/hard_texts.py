"""A few thousand texts on which tokenizers disagree, the same ones at every call."""

import random
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)

CODE = (
    "def f(x: int = 0x1F) -> list[str]:\n\treturn [f'{i:>08.3f}' for i in range(10**6)]\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] << 3; }  // 3.14e-10\r\n",
    "SELECT * FROM t WHERE a='it''s' AND b>=10000 ORDER BY 1,2;",
    '{"a": [1, 2.50, -3e8, null], "b": {"c": "\\u00e9\\n"}}',
    "#!/bin/sh\nset -eu\ngrep -rn 'x\\.y' . | awk '{print $1}' > /dev/null 2>&1\n",
    "\\frac{a_{12}}{b^{345}} \\leq \\sum_{i=0}^{n} \\binom{n}{i} $$x$$",
    "<div class='a b'>&nbsp;&#x1F600;</div><!-- -- -->",
    "fn main() -> Result<(), Box<dyn Error>> { let x = &mut y[..]; Ok(()) }",
    "    \tif a:\n        \t b()\n\n\n\n    c = '''\n'''\n",
    "x=1;y=-2;z=+3;w=1_000_000;v=0b1010;u=1e5f;t=.5;s=5.",
)

CONTRACTIONS = (
    "It's we'll I'd they'RE you'Ve I'M don't 'S 'T 'LL",
    "O'Reilly's 'tis rock'n'roll 'quoted' ''s '' ' s",
    "it\u2019s we\u2019ll",
    "'\u017f 's\u0301 'ſt 'K 'ld 'd' 've've",
    "l'été d'Artagnan qu'il 'REVE",
)

SCRIPTS = {
    "Latin": (0x00C0, 0x024F),
    "Greek": (0x0370, 0x03FF),
    "Cyrillic": (0x0400, 0x04FF),
    "Armenian": (0x0531, 0x058A),
    "Hebrew": (0x0591, 0x05F4),
    "Arabic": (0x0600, 0x06FF),
    "Devanagari": (0x0900, 0x097F),
    "Bengali": (0x0980, 0x09FE),
    "Tamil": (0x0B82, 0x0BFA),
    "Thai": (0x0E01, 0x0E5B),
    "Tibetan": (0x0F00, 0x0FDA),
    "Georgian": (0x10A0, 0x10FF),
    "Hangul Jamo": (0x1100, 0x11FF),
    "Ethiopic": (0x1200, 0x139F),
    "Khmer": (0x1780, 0x17F9),
    "Mongolian": (0x1800, 0x18AA),
    "Phonetic": (0x1D00, 0x1DBF),
    "Greek extended": (0x1F00, 0x1FFE),
    "Punctuation": (0x2000, 0x206F),
    "Superscripts": (0x2070, 0x209C),
    "Letterlike": (0x2100, 0x218B),
    "Arrows and mathematics": (0x2190, 0x22FF),
    "Enclosed": (0x2460, 0x24FF),
    "Boxes and dingbats": (0x2500, 0x27BF),
    "CJK symbols": (0x3000, 0x303F),
    "Kana": (0x3041, 0x30FF),
    "CJK": (0x4E00, 0x9FFF),
    "Yi": (0xA000, 0xA4C6),
    "Hangul": (0xAC00, 0xD7A3),
    "Presentation forms": (0xFB00, 0xFDFF),
    "Half and full width": (0xFF01, 0xFFEE),
    "Gothic": (0x10330, 0x1034A),
    "Cuneiform": (0x12000, 0x12399),
    "Hieroglyphs": (0x13000, 0x1342E),
    "Mathematical letters": (0x1D400, 0x1D7FF),
    "Emoji": (0x1F300, 0x1F6FF),
    "More emoji": (0x1F900, 0x1F9FF),
    "CJK B": (0x20000, 0x2A6DF),
    "Tags": (0xE0020, 0xE007F),
}

COMBINING = "\u0301\u0300\u0308\u0323\u0327\u030a\u0338\u20dd\u3099\u0651\u093c\u0f39"
SPACES = " \t\n\r\u000b\u000c\u00a0\u1680\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000\u0085"
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u061c\u200e\u200f\u202e\ufe0f\u180e"
EMOJI = (
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "🇺🇳",
    "🇩🇪🇫🇷🇯🇵",
    "👍🏽",
    "1️⃣",
    "❤️‍🔥",
    "☺️☻",
    "🧑🏿‍🚀",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
)
DIGITS = "0123456789٠١٢٣۴۵৬७௮๙²³¹½¾Ⅷ①⑳㊿𝟘𝟡〇一"


@cache
def hard_texts() -> tuple[str, ...]:
    """Valid text, at least 3,000 pieces of it, each once."""
    return tuple(dict.fromkeys(_all_texts()))


def lone_surrogates() -> tuple[str, ...]:
    """Strings that are no Unicode text, as a broken program may hand them over."""
    return (
        "\ud800",
        "\udfff",
        "a\ud83db",
        "\ude00\ud83d",
        "x \ud800\ud800 y",
        "\ud83d<think>",
        "é\udcff",
    )


def _all_texts() -> Iterator[str]:
    chance = random.Random(20250305)
    yield ""
    yield from CODE
    yield from CONTRACTIONS
    yield from EMOJI
    for special in SPECIAL:
        yield special
        yield f"a{special}b"
        yield f" {special} \n{special}\n\n"
        yield special[:-1]
        yield special[1:]
        yield special.upper()
        yield special[:3] + " " + special[3:]
    for first in SPACES:
        for n in (1, 2, 3, 8, 33):
            yield first * n
            yield "a" + first * n + "b"
            yield first * n + "9"
            yield "." + first * n
    for length in (*range(1, 21), 40, 100):
        yield "".join(chance.choices("0123456789", k=length))
        yield "".join(chance.choices(DIGITS, k=length))
        yield ",".join("".join(chance.choices("0123456789", k=3)) for _ in range(length))
    for start, stop in SCRIPTS.values():
        letters = [chr(code) for code in range(start, stop + 1) if _assigned(code)]
        for _ in range(24):
            yield "".join(chance.choices(letters, k=chance.randint(1, 24)))
        for _ in range(8):
            words = ["".join(chance.choices(letters, k=chance.randint(1, 6))) for _ in range(5)]
            yield chance.choice((" ", ", ", "-", "\n")).join(words)
        for _ in range(4):
            yield "".join(
                letter + "".join(chance.choices(COMBINING, k=chance.randint(0, 3)))
                for letter in chance.choices(letters, k=8)
            )
    every = [chr(code) for code in range(0x20, 0x30000) if _assigned(code)]
    pieces = (
        *CODE,
        *CONTRACTIONS,
        *EMOJI,
        *SPECIAL,
        *SPACES,
        *COMBINING,
        *INVISIBLE,
        *DIGITS,
        *"abcXYZ'\"`-_=+*/\\|<>()[]{}.,;:!?#$%&@^~",
    )
    for _ in range(600):
        yield "".join(chance.choices(every, k=chance.randint(1, 16)))
    for _ in range(1200):
        yield "".join(chance.choices(pieces, k=chance.randint(2, 10)))


def _assigned(code: int) -> bool:
    """Characters that Unicode has had since long: tables of different age agree on them."""
    category = unicodedata.category(chr(code))
    return category not in ("Cn", "Cs", "Co") and code <= sys.maxunicode
