"""Instructions that a rule can check: IFEval's, those that need no other data.

A rule is a function of the reply and of what it is asked to hold, under IFEval's own name. A rule
that is not here leaves a reply without a grade, and UNGRADED says why.
Source: Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models".
"""

import json
import re
from collections.abc import Callable
from typing import Any

from quant_eval.tasks.problem import Problem

Arguments = dict[str, Any]
Rule = Callable[[str, Arguments], bool]
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_SENTENCE_END = re.compile(r"(\S+?)[.!?]+[\"'”’)\]*]*(?=\s+[^a-z\s]|\s*$)")
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st jr sr vs etc e.g i.e no fig vol approx gen col capt rev inc ltd".split()
)
_DIVIDER = re.compile(r"\s?\*\*\*\s?")
_CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def grade(problem: Problem, answer: str) -> bool | None:
    """All rules hold, strictly; None where one is unknown and none of the others is broken."""
    if not answer.strip():
        return False
    held = [_holds(name, answer, given) for name, given in json.loads(problem.expected)]
    if False in held:
        return False
    return None if None in held else True


def _holds(name: str, answer: str, given: Arguments) -> bool | None:
    """None where the rule is unknown, or is given without what it asks for."""
    if name not in RULES:
        return None
    try:
        return RULES[name](answer, given)
    except (KeyError, TypeError, AttributeError):
        return None


def _compares(n: int, relation: str, than: int) -> bool:
    return n >= than if relation == "at least" else n < than


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.IGNORECASE))


def _has_keywords(text: str, given: Arguments) -> bool:
    return all(_count(re.escape(word), text) for word in given["keywords"])


def _keyword_frequency(text: str, given: Arguments) -> bool:
    n = _count(re.escape(given["keyword"].strip()), text)
    return _compares(n, given["relation"], given["frequency"])


def _lacks_words(text: str, given: Arguments) -> bool:
    return not any(_count(rf"\b{re.escape(w)}\b", text) for w in given["forbidden_words"])


def _letter_frequency(text: str, given: Arguments) -> bool:
    n = text.lower().count(given["letter"].lower())
    return _compares(n, given["let_relation"], given["let_frequency"])


def _number_of_words(text: str, given: Arguments) -> bool:
    return _compares(len(re.findall(r"\w+", text)), given["relation"], given["num_words"])


def _number_of_sentences(text: str, given: Arguments) -> bool:
    """A sentence ends with a mark before a blank and no small letter, but not at `Dr.` or `J.`.

    IFEval counts by NLTK's trained splitter, which may count a few texts otherwise.
    """
    last_words = (match[1].lower().lstrip("\"'“‘([*") for match in _SENTENCE_END.finditer(text))
    n = sum(word not in _ABBREVIATIONS and len(word) > 1 for word in last_words)
    return _compares(n, given["relation"], given["num_sentences"])


def _number_of_paragraphs(text: str, given: Arguments) -> bool:
    """Paragraphs are what `***` divides; an empty one counts only at either end, as nothing."""
    parts = _DIVIDER.split(text)
    inner = parts[1:-1]
    if not all(part.strip() for part in inner):
        return False
    return bool(sum(bool(part.strip()) for part in parts) == given["num_paragraphs"])


def _first_word_of_paragraph(text: str, given: Arguments) -> bool:
    paragraphs = [part for part in re.split(r"\n\n", text) if part.strip()]
    nth = given["nth_paragraph"]
    if len(paragraphs) != given["num_paragraphs"] or nth > len(paragraphs):
        return False
    words = paragraphs[nth - 1].split()
    first = re.split(r"[.,?!'\"]", words[0].lstrip("'\""))[0]
    return bool(first.lower() == given["first_word"].lower())


def _placeholders(text: str, given: Arguments) -> bool:
    return bool(len(re.findall(r"\[.*?\]", text)) >= given["num_placeholders"])


def _postscript(text: str, given: Arguments) -> bool:
    letters = [re.escape(one) for one in given["postscript_marker"].strip() if one not in ". "]
    return bool(re.search(r"^\s*" + r"\.?\s?".join(letters), text, re.IGNORECASE | re.MULTILINE))


def _bullets(text: str, given: Arguments) -> bool:
    n = len(re.findall(r"^\s*(?:\*[^*]|-)", text, re.MULTILINE))
    return bool(n == given["num_bullets"])


def _one_of_the_choices(text: str, _: Arguments) -> bool:
    return any(choice in text for choice in _CHOICES)


def _highlights(text: str, given: Arguments) -> bool:
    found = re.findall(r"\*\*([^*\n]+)\*\*|\*([^*\n]+)\*", text)
    n = sum(any(part.strip() for part in one) for one in found)
    return bool(n >= given["num_highlights"])


def _sections(text: str, given: Arguments) -> bool:
    mark = re.escape(given["section_spliter"].strip())
    return bool(len(re.findall(rf"\s?{mark}\s?\d+\s?", text)) >= given["num_sections"])


def _is_json(text: str, _: Arguments) -> bool:
    inside = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(inside)
    except (ValueError, RecursionError):
        return False
    return True


def _has_title(text: str, _: Arguments) -> bool:
    return any(one.strip("<> ") for one in re.findall(r"<<[^\n]+>>", text))


def _repeats_prompt(text: str, given: Arguments) -> bool:
    wanted = given["prompt_to_repeat"].strip().lower()
    return text.strip().lower().startswith(wanted)


def _two_responses(text: str, _: Arguments) -> bool:
    parts = [part.strip() for part in text.split("******")]
    parts = parts[bool(parts[0] == "") : len(parts) - (parts[-1] == "")]
    return len(parts) == 2 and "" not in parts and parts[0] != parts[1]


def _ends_with(text: str, given: Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())


def _is_quoted(text: str, _: Arguments) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


def _capital_words(text: str, given: Arguments) -> bool:
    n = sum(word.isupper() for word in _WORD.findall(text))
    return _compares(n, given["capital_relation"], given["capital_frequency"])


RULES: dict[str, Rule] = {
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda text, _: text.isupper(),
    "change_case:english_lowercase": lambda text, _: text.islower(),
    "combination:repeat_prompt": _repeats_prompt,
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": _one_of_the_choices,
    "detectable_format:json_format": _is_json,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": _has_title,
    "keywords:existence": _has_keywords,
    "keywords:forbidden_words": _lacks_words,
    "keywords:frequency": _keyword_frequency,
    "keywords:letter_frequency": _letter_frequency,
    "length_constraints:nth_paragraph_first_word": _first_word_of_paragraph,
    "length_constraints:number_paragraphs": _number_of_paragraphs,
    "length_constraints:number_sentences": _number_of_sentences,
    "length_constraints:number_words": _number_of_words,
    "punctuation:no_comma": lambda text, _: "," not in text,
    "startend:end_checker": _ends_with,
    "startend:quotation": _is_quoted,
}
UNGRADED = {"language:response_language": "a trained detector of languages would be needed"}
"""IFEval's rules that are not checked here, and why."""


def why_ungraded(problem: Problem) -> str:
    """Why replies to a problem may stay without a grade; "" where all of its rules are known."""
    unknown = (name for name, _ in json.loads(problem.expected) if name not in RULES)
    return "; ".join(f"{name}: {UNGRADED.get(name, 'is no rule of IFEval')}" for name in unknown)
