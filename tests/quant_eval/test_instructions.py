"""Each rule with a reply that keeps it and one that breaks it, both written by hand."""

from typing import Any

import pytest

from quant_eval.benchmarks.instructions import RULES

THREE = {"relation": "at least"}
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "less than"},
        "One LOUD word",
        "TWO LOUD words",
    ),
    "change_case:english_capital": ({}, "ALL 3 LOUD!", "ALL BUT one"),
    "change_case:english_lowercase": ({}, "all 3 quiet.", "All quiet"),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "Say it."},
        "Say it. I did.",
        "I did. Say it.",
    ),
    "combination:two_responses": ({}, "One way\n******\nanother", "One\n******\nOne"),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        "[name] at [place]",
        "[name] at a place",
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.P.S"},
        "Bye.\n\nP.P.S. More.",
        "Bye. P.S. More.",
    ),
    "detectable_format:constrained_response": ({}, "My answer is maybe.", "Maybe."),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{'a': 1}"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na",
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        "So:\n* a\n- b\n**bold**",
        "* a\n* b\n* c",
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        "*one* and **two**",
        "*one* and * *",
    ),
    "detectable_format:title": ({}, "<<A Title>>\nText", "<A Title>\n<<>>"),
    "keywords:existence": ({"keywords": ["Moon", "sea"]}, "the moon, the Sea", "the moon"),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, "concatenate", "a Cat"),
    "keywords:frequency": (
        {"keyword": "up", "frequency": 2, **THREE},
        "Up and up",
        "up and down",
    ),
    "keywords:letter_frequency": (
        {"letter": "A", "let_frequency": 3, "let_relation": "less than"},
        "a ban",
        "Banana",
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First.\n\nThen, second.",
        "Then.\n\nSecond.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        'Dr. Lee paid 3.50, i.e. too much. "Why?" she asked.',
        "One. Two! Is it three?",
    ),
    "length_constraints:number_words": ({"num_words": 3, **THREE}, "one two three", "one two"),
    "punctuation:no_comma": ({}, "none; none", "one, here"),
    "startend:end_checker": ({"end_phrase": "That's all."}, "So that's all.\n", "That's all. Bye."),
    "startend:quotation": ({}, ' "quoted" ', '"'),
}


def test_every_rule_has_its_case() -> None:
    assert CASES.keys() == RULES.keys()


@pytest.mark.parametrize("name", RULES)
def test_rules_tell_right_from_wrong(name: str) -> None:
    """Catches a rule that everything keeps, or that counts otherwise than it says."""
    given, right, wrong = CASES[name]
    assert RULES[name](right, given)
    assert not RULES[name](wrong, given)
