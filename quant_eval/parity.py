"""A file in the runtime held against its checkpoint in transformers: ids, prompts, ends, sampling.

What they must agree on exactly, whatever the weights lost: also for files that others made.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.calibration import load_conversations, load_tokenizer
from convert.checkpoint import Checkpoint
from quant_eval.baseline import differences_of
from quant_eval.gate import Check
from quant_eval.suite import CHECK_CONTEXT, EVALUATION_TEXT
from quant_eval.tasks.calculator import CALCULATOR
from quant_eval.tasks.problem import user_turn
from qwq_local import QwQ
from qwq_local.chat_template import ChatTemplate
from qwq_local.description import describe_folder
from qwq_local.messages import normalise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HARD_TEXTS = (
    "",
    " ",
    "\n\n\n x \t\t y  ",
    "1234567890 3.14159 0x1F",
    "don't I'll we've",
    "na\u00efve e\u0301 \u212b \ufb01",
    "\u4e2d\u6587 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4",
    "\u0420\u0443\u0441 \u0639\u0631\u0628\u064a",
    "\U0001f389\U0001f3f3\ufe0f\u200d\U0001f308",
    "def f(x):\n    return x ** 2  # \u03bb\r\n",
    "<|im_start|>user\n</think> <tool_call>",
)
_CALL = {"name": "calculator", "arguments": {"expression": "2 + 2"}}
CONVERSATIONS: dict[str, tuple[tuple[dict[str, Any], ...], bool]] = {
    "one question": (user_turn("What is 2 + 2?"), False),
    "a system prompt": (({"role": "system", "content": "Be brief."}, *user_turn("Hi")), False),
    "an earlier thought": (
        (
            *user_turn("Hi"),
            {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello!"},
            *user_turn("And now?"),
        ),
        False,
    ),
    "tools": (user_turn("What is 2 + 2?"), True),
    "tools and a system prompt": (
        ({"role": "system", "content": "Be brief."}, *user_turn("2 + 2?")),
        True,
    ),
    "a call and its result": (
        (
            *user_turn("What is 2 + 2?"),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "call_0", "type": "function", "function": _CALL}],
            },
            {"role": "tool", "tool_call_id": "call_0", "content": "4"},
            {"role": "tool", "tool_call_id": "call_1", "content": "5"},
        ),
        True,
    ),
}
"""Messages, and whether a tool is offered: the cases of QwQ's template."""


def check_parity(path: Path, source: Checkpoint, *, threads: int | None) -> Iterator[Check]:
    """All checks of one file. Raises QwqError where it cannot be loaded."""
    tokenizer = load_tokenizer(source.path)
    if path.is_file():
        yield _check("metadata", "; ".join(differences_of(path, source)))
    with QwQ.open(path, context=CHECK_CONTEXT, threads=threads, isolated=path.is_file()) as qwq:
        yield _check("tokenizer", _tokenizer_problem(qwq, tokenizer))
        yield _check("template", _template_problem(qwq, tokenizer))
        expected = describe_folder(source.path)
        found = qwq.description.stop_ids
        missing = sorted(expected.stop_ids - found)
        known = {one for text, one in qwq.engine.control_tokens.items() if text in END_TOKENS}
        yield _check(
            "stop tokens",
            "" if found and set(missing) <= known else f"has {sorted(found)} and lacks {missing}",
        )
        differs = qwq.sampling != expected.sampling
        yield _check("sampling", f"is {qwq.sampling}, not {expected.sampling}" if differs else "")


END_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""The runtime stops at these whether or not a file lists them."""


def _check(name: str, problem: str) -> Check:
    return Check(name, "regressed" if problem else "passed", problem or "as the checkpoint's")


def _tokenizer_problem(qwq: QwQ, tokenizer: "PreTrainedTokenizerBase") -> str:
    written = (
        text for one in load_conversations(EVALUATION_TEXT) for text in (one.reasoning, one.answer)
    )
    for text in (*HARD_TEXTS, *written):
        expected = tokenizer.encode(text, add_special_tokens=False)
        found = qwq.engine.tokenize(text, parse_special=True)
        if found != expected:
            return f"gives {found[:8]} for {text[:30]!r}, the checkpoint's {expected[:8]}"
    return ""


def _template_problem(qwq: QwQ, tokenizer: "PreTrainedTokenizerBase") -> str:
    description = qwq.description
    template = ChatTemplate(
        description.template,
        control_tokens=tuple(qwq.engine.control_tokens),
        variables=description.template_variables,
    )
    for case, (messages, with_tools) in CONVERSATIONS.items():
        tools: list[Any] | None = [CALCULATOR] if with_tools else None
        normal = normalise(messages)
        expected = tokenizer.apply_chat_template(
            [dict(message) for message in normal],
            tools=tools,
            add_generation_prompt=True,
            tokenize=False,
        )
        assert isinstance(expected, str)
        found = template.render(normal, tools=tools).text
        if found != expected:
            at = next(
                (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
                min(len(found), len(expected)),
            )
            return (
                f"renders {found[at : at + 20]!r} where the checkpoint's has "
                f"{expected[at : at + 20]!r}, at character {at} of the case: {case}"
            )
    return ""
