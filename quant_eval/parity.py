"""A file in the runtime held against its checkpoint in transformers: ids, prompts, ends, sampling,
rope.

What they must agree on exactly, whatever the weights lost: also for files that others made.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.calibration import load_conversations, load_tokenizer
from convert.checkpoint import Checkpoint
from convert.gguf_header import read_header
from convert.gguf_parts import read_model
from convert.metadata_parity import config_differences, metadata_differences
from quant_eval.gate import Check
from quant_eval.parity_rope import logits_problem, rope_problem
from quant_eval.parity_sampling import generation_config, sampling_problem
from quant_eval.pipeline import is_small
from quant_eval.sizes import model_size
from quant_eval.suite import CHECK_CONTEXT, EVALUATION_TEXT, GENERAL_TEXT
from quant_eval.tasks.calculator import CALCULATOR
from quant_eval.tasks.problem import user_turn
from qwq_local import QwQ
from qwq_local.chat_template import ChatTemplate
from qwq_local.engines.folder import read_folder
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
    "\u3000\u00a0x\u2003\u2028y \r\n\t \r",
    "\u0661\u0662\u0663 \u00b2\u00b3 \u2168 \uff11\uff12",
    "it\u2019s 'RE '\u017f l'\u00e9t\u00e9",
    "\u0915\u094d\u0937 \u0e01\u0e34\u0e19 \u1112\u1161\u11ab",
    "<think>\u0301 a\u200db\ufeff\u0308",
    "x=1;y[i]<<=0b10;  // ** \\frac{a_{12}}{b} **",
    "=" * 33 + " " * 33 + "\n" * 9,
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
    """All checks of one file. Raises QwqError where it cannot be loaded.

    A note is what the file says otherwise, and yet works as the checkpoint does.
    """
    tokenizer = load_tokenizer(source.path)
    generation = generation_config(source.path)
    metadata = read_header(path).metadata if path.is_file() else None
    yield from _metadata_checks(path, source)
    with QwQ.open(path, context=CHECK_CONTEXT, threads=threads, isolated=path.is_file()) as qwq:
        yield _check("tokenizer", _tokenizer_problem(qwq, tokenizer))
        yield _check("template", _template_problem(qwq, tokenizer))
        yield _check("stop tokens", _stop_problem(qwq, metadata, tokenizer, generation))
        yield _check("sampling", sampling_problem(qwq.sampling, generation, metadata))
        problem = rope_problem(path, metadata, source.path)
        if not problem and is_small(source) and model_size(path).bits_per_weight >= MIN_ROPE_BITS:
            text = "\n".join(_evaluation_texts(EVALUATION_TEXT)[:ROPE_TOKENS])
            ids = tokenizer.encode(text, add_special_tokens=False)[:ROPE_TOKENS]
            problem = logits_problem(qwq.engine, source.path, ids)
        yield _check("rope", problem)


ROPE_TOKENS = 256
MIN_ROPE_BITS = 8.0
"""A weight: with fewer, what quantizing changes of nano-qwq's logits hides what YaRN changes."""
END_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""The runtime stops at these whether or not a file lists them."""


def _check(name: str, problem: str) -> Check:
    return Check(name, "regressed" if problem else "passed", problem or "as the checkpoint's")


def _metadata_checks(path: Path, source: Checkpoint) -> Iterator[Check]:
    if path.is_file():
        found = metadata_differences(read_model(path), source)
    else:
        found = config_differences(read_folder(path).model, source.model)
    yield _check("metadata", "; ".join(f"{one.key} {one.words}" for one in found if one.grave))
    for one in found:
        if not one.grave:
            yield Check("metadata", "note", f"{one.key} {one.words}")


def _stop_problem(
    qwq: QwQ,
    metadata: Mapping[str, Any] | None,
    tokenizer: "PreTrainedTokenizerBase",
    generation: Any,
) -> str:
    """A folder lists all ends. A GGUF file names one, the tokenizer's; the runtime knows others."""
    given = generation.eos_token_id
    expected = set(given if isinstance(given, list) else [] if given is None else [given])
    found, required = set(qwq.description.stop_ids), set(expected)
    if metadata is not None:
        found |= {one for one in map(metadata.get, _OTHER_ENDS) if isinstance(one, int)}
        known = {one for text, one in qwq.engine.control_tokens.items() if text in END_TOKENS}
        required = (expected - known) | {tokenizer.eos_token_id}
    odd, missing = sorted(found - expected), sorted(required - found)
    parts = [f"ends at {odd}, where the checkpoint does not"] if odd else []
    parts += [f"lacks {missing}"] if missing else []
    return f"has {sorted(found)}: {' and '.join(parts)}" if parts else ""


_OTHER_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def _tokenizer_problem(qwq: QwQ, tokenizer: "PreTrainedTokenizerBase") -> str:
    written = (text for path in (EVALUATION_TEXT, GENERAL_TEXT) for text in _evaluation_texts(path))
    for text in (*HARD_TEXTS, *written):
        expected = tokenizer.encode(text, add_special_tokens=False)
        found = qwq.engine.tokenize(text, parse_special=True)
        if found != expected:
            return f"gives {found[:8]} for {text[:30]!r}, the checkpoint's {expected[:8]}"
    return ""


def _evaluation_texts(path: Path) -> list[str]:
    return [
        text for one in load_conversations(path) for text in (one.reasoning, one.answer) if text
    ]


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
