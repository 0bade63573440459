"""Conversations with long thoughts, made by seeded chance: true, varied, in several languages.

What is computed in a thought is computed here too, so nothing in it is wrong; second looks and dead
ends are in it, since that is how QwQ thinks.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, cycle
from typing import Any, Literal

from convert.calibration import Conversation
from convert.texts import (
    chinese,
    coding,
    languages,
    numbers,
    planning,
    prose,
    puzzles,
    quantities,
    tables,
    tools,
)
from convert.texts.worked import Dice, Maker, boxed, choice, worksheet

Half = Literal["calibration", "evaluation"]
"""What a model is calibrated on, and what it is judged by. Every prompt belongs to one of them by
its hash, and every piece that was written by hand by its place."""

_CHOOSABLE = (*numbers.PROBLEMS, *quantities.PROBLEMS, *puzzles.PROBLEMS[:2], *tables.PROBLEMS)
MAKERS: Mapping[str, tuple[Maker, ...]] = {
    "mathematics": tuple(
        boxed("mathematics", problem) for problem in (*numbers.PROBLEMS, *quantities.PROBLEMS)
    ),
    "code": coding.MAKERS,
    "choice": tuple(choice(problem) for problem in _CHOOSABLE),
    "puzzles": tuple(boxed("puzzles", problem) for problem in puzzles.PROBLEMS),
    "planning": tuple(boxed("planning", problem) for problem in planning.PROBLEMS),
    "tables": tuple(boxed("tables", problem) for problem in tables.PROBLEMS),
    "worksheets": (worksheet("worksheets", (*numbers.PROBLEMS, *quantities.PROBLEMS)),),
    "tools": tools.MAKERS,
    "prose": prose.MAKERS,
    "science": (prose.explanation,),
    "chinese": chinese.MAKERS,
    **languages.MAKERS,
}
"""Makers by the kind of conversation that they make."""

TURNS = (
    "mathematics code choice chinese puzzles tools prose planning {} mathematics chinese tables code "
    "puzzles {} worksheets chinese science code puzzles {} tools chinese prose"
).split()
"""The kinds in the order of their turns for calibration; {}: the next of the other languages."""

TRIES = 50
"""With none of them new, a maker has said all that it can say, and the next one has its turn."""


def half_of(messages: Sequence[Mapping[str, Any]]) -> Half:
    """Which half a prompt belongs to."""
    text = json.dumps(list(messages), sort_keys=True, ensure_ascii=False)
    return "evaluation" if hashlib.sha256(text.encode()).digest()[0] & 1 else "calibration"


def conversations(
    half: Half, *, seed: int, sizes: Sequence[int], turns: Sequence[str] = tuple(MAKERS)
) -> Iterator[Conversation]:
    """Ever more conversations of a half, no prompt twice, the kinds taking turns.

    sizes: of the thoughts, in turn; 1 is some hundred tokens, 5 some thousands. turns: the kinds in
    their order; "{}" is the next of the languages beside English and Chinese.
    """
    rng = Dice(f"{half} {seed}", half=("calibration", "evaluation").index(half))
    seen: set[str] = set()
    n_of_kind: Counter[str] = Counter()
    others = cycle(languages.LANGUAGES)
    for kind, size in zip(cycle(turns), cycle(sizes)):
        kind = next(others) if kind == "{}" else kind
        makers = MAKERS[kind]
        for n_tried in count():
            turn = n_of_kind[kind] + n_tried // TRIES
            made = makers[turn % len(makers)](rng, size)
            if half_of(made.messages) == half and str(made.messages) not in seen:
                break
        n_of_kind[kind] = turn + 1
        seen.add(str(made.messages))
        yield made
