"""A thought as it is written: sentences, second looks, paragraphs; no phrase twice in a row."""

import random
from collections.abc import Iterable, Mapping

BANKS: Mapping[str, tuple[str, ...]] = {
    "open": (
        "Okay, let me work through this.",
        "Alright, so I need to figure this out step by step.",
        "Let me read that again carefully.",
        "Okay, so what is given, and what is wanted?",
        "Hmm, let's see what we have here.",
        "First, let me restate the problem in my own words.",
        "Let me start by writing down what I know.",
        "So, what is this really asking?",
        "Let me think about this one from the beginning.",
        "Alright, let's break it down.",
        "Hmm, okay. Let me set this up.",
        "I'll go slowly here, since a slip early on would spoil everything.",
        "Let me first make sure that I understand the question.",
    ),
    "doubt": (
        "Wait, is that right?",
        "Hold on.",
        "Wait, let me double-check that.",
        "Hmm, am I missing something?",
        "But wait, I should be careful here.",
        "Is that really so?",
        "Hmm, let me not rush.",
        "Wait a second.",
        "Let me look at that once more.",
        "Hmm, I want to be sure about this step.",
        "Did I read that correctly?",
        "Actually, wait.",
    ),
    "check": (
        "Let me verify.",
        "Let me check this against the original statement.",
        "Let me plug it back in.",
        "A quick check can't hurt.",
        "Let me test that with the numbers as they were given.",
        "To be safe, let me go through the conditions one by one.",
        "Now the check.",
        "Let me make sure by going backwards.",
        "Does it fit everything that was said?",
        "I'd like to confirm this.",
    ),
    "fine": (
        "Good.",
        "That works.",
        "Yes, that matches.",
        "Okay, that fits.",
        "Right.",
        "So far so good.",
        "Great, no contradiction.",
        "Yes, consistent.",
        "Fine, that holds.",
        "That checks out.",
    ),
    "second": (
        "Let me see whether another way gives the same.",
        "Maybe I should do it a second way, to be certain.",
        "Is there an independent way to see this?",
        "Alternatively, I could approach it from the other side.",
        "As a cross-check, let me try a different method.",
        "Just to be thorough, here is another route.",
        "Another way to think about it might catch a mistake, if there is one.",
        "Suppose I had made an error somewhere; a second method would show it.",
    ),
    "agree": (
        "Both ways agree, so I'm fairly confident.",
        "Same result. Good.",
        "The two methods give the same, which is reassuring.",
        "It comes out the same, so I trust it.",
        "That agrees with what I had before.",
        "Great, the same number again.",
    ),
    "close": (
        "I think that's it.",
        "So that should be the answer.",
        "Okay, I'm confident in this now.",
        "That seems solid. Time to write it up.",
        "Alright, everything is consistent; let me write the answer.",
        "I'm satisfied with that.",
        "Now I just need to state it clearly.",
        "Good, I can answer now.",
    ),
    "stuck": (
        "Hmm, that doesn't lead anywhere quickly.",
        "No, that gets messy. Let me back up.",
        "Hmm, that is a dead end.",
        "That won't work directly.",
        "Okay, scrap that.",
        "No, there must be a cleaner way.",
        "That path seems longer than it has to be.",
    ),
    "next": (
        "Next.",
        "Moving on.",
        "Now the next one.",
        "Okay, on to the next.",
        "Let me continue.",
        "Going on.",
        "And then?",
    ),
}
"""What anybody thinks on the way, by the turn that the thought takes."""


class Thought:
    """Collects sentences into lines and paragraphs; `text` is what came of it."""

    def __init__(
        self,
        rng: random.Random,
        banks: Mapping[str, tuple[str, ...]] = BANKS,
        *,
        join: str = " ",
    ) -> None:
        self._rng = rng
        self._banks = banks
        self._join = join
        self._paragraphs: list[list[str]] = [[]]
        self._unsaid: dict[tuple[str, ...], list[str]] = {}

    def pick(self, *options: str) -> str:
        """One of the options, each once before any comes again."""
        left = self._unsaid.get(options)
        if not left:
            left = self._unsaid[options] = self._rng.sample(options, len(options))
        return left.pop()

    def say(self, *options: str) -> "Thought":
        """Add one of the options to the line."""
        sentence = self.pick(*options)
        lines = self._paragraphs[-1]
        if lines and lines[-1]:
            lines[-1] += self._join + sentence
        elif lines:
            lines[-1] = sentence
        else:
            lines.append(sentence)
        return self

    def line(self, *options: str) -> "Thought":
        """Begin a new line with one of the options."""
        self._paragraphs[-1].append(self.pick(*options))
        return self

    def lines(self, texts: Iterable[str]) -> "Thought":
        self._paragraphs[-1].extend(texts)
        return self

    def turn(self, *names: str, chance: float = 1.0) -> "Thought":
        """Say something of one of these banks, or by chance nothing."""
        if self._rng.random() < chance:
            self.say(*self._banks[self._rng.choice(names)])
        return self

    def gap(self) -> "Thought":
        """Begin a new paragraph."""
        if self._paragraphs[-1]:
            self._paragraphs.append([])
        return self

    @property
    def text(self) -> str:
        return "\n\n".join("\n".join(lines) for lines in self._paragraphs if lines)


def listed(items: Iterable[object], last: str = "and") -> str:
    """Words in a row: a, b and c."""
    *first, end = map(str, items)
    return f"{', '.join(first)} {last} {end}" if first else end


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
