"""From a chat request to what the runtime is asked for."""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from qwq_local import Limits, QwQ, Sampling, Stream, UsageError
from qwq_local.engine import OnProgress
from qwq_local.sampling import MAX_SEED
from qwq_local.server.errors import ApiError
from qwq_local.server.schema import ChatRequest, Effort, NamedTool, Sampled
from qwq_local.server.schema_bounds import check_schema
from qwq_local.tools import CALL_CLOSE, CALL_OPEN

EFFORT_TOKENS: dict[Effort, int | None] = {
    "none": 0,
    "minimal": 256,
    "low": 1024,
    "medium": 4096,
    "high": None,
    "xhigh": None,
    "max": None,
}
"""What a thought may take at each effort; None is without limit."""
_SAMPLING = tuple(
    field.name
    for field in dataclasses.fields(Sampling)
    if field.name not in ("logit_bias", "top_logprobs")
)
_log = logging.getLogger(__name__)


class UnknownFields:
    """Writes each field that nothing reads to the log, once."""

    MOST = 100

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def note(self, body: BaseModel) -> None:
        for name in body.model_extra or {}:
            short = name[:64]
            if short not in self._seen and len(self._seen) < self.MOST:
                self._seen.add(short)
                _log.warning("request field %r is not known; it is ignored", short)


@dataclass(frozen=True, slots=True)
class Question:
    """What QwQ.reply is called with.

    sampling: changes to the model's own. forced_tools: of these one must be called.
    """

    messages: list[dict[str, Any]]
    sampling: Mapping[str, Any]
    seed: int | None
    limits: Limits
    tools: tuple[Mapping[str, Any], ...] = ()
    forced_tools: tuple[Mapping[str, Any], ...] = ()

    def ask(self, qwq: QwQ, on_progress: OnProgress) -> Stream:
        """Raises UsageError for numbers out of range, and for messages that cannot be."""
        limits = self.limits
        if self.forced_tools:
            grammar = call_grammar(qwq, self.forced_tools)
            limits = dataclasses.replace(limits, answer_format=grammar)
        return qwq.reply(
            self.messages,
            tools=self.tools,
            sampling=dataclasses.replace(qwq.sampling, **self.sampling),
            seed=self.seed,
            limits=limits,
            on_progress=on_progress,
        )


def chat_request(fields: Mapping[str, Any]) -> ChatRequest:
    """A chat request that another interface's came to. Raises ApiError where it cannot be."""
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise ApiError(
            400,
            f"{first['loc'][0]}: {first['msg']}",
            param=str(first["loc"][0]),
            code="invalid_value",
        ) from error


def question_of(body: ChatRequest, *, choice: int = 0) -> Question:
    """What is asked for; `choice` counts the replies to one request, each with another seed.

    Raises ApiError or UsageError where a field cannot be.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(
            400,
            "top_logprobs: it goes with logprobs; set that to true",
            param="top_logprobs",
            code="invalid_value",
        )
    tools, forced = _tools(body)
    answer_format = _answer_format(body)
    if answer_format is not None and forced:
        raise ApiError(
            400,
            "tool_choice: a call and response_format cannot both be had; leave one out",
            param="tool_choice",
            code="invalid_value",
        )
    return Question(
        messages=[message.model_dump(exclude_none=True) for message in body.messages],
        sampling=sampling_of(body, (body.top_logprobs or 0) if body.logprobs else None),
        seed=seed_of(body, choice),
        limits=Limits(
            max_tokens=body.max_completion_tokens or body.max_tokens,
            reasoning_tokens=thinking_budget(body),
            stop=stops_of(body),
            answer_format=answer_format,
        ),
        tools=tools,
        forced_tools=forced,
    )


def sampling_of(body: Sampled, top_logprobs: int | None) -> dict[str, Any]:
    """The numbers that a request sets itself, checked."""
    given = {name: getattr(body, name) for name in _SAMPLING}
    if body.logit_bias is not None:
        given["logit_bias"] = tuple((int(i), bias) for i, bias in body.logit_bias.items())
    given = {name: value for name, value in given.items() if value is not None}
    Sampling(**given, top_logprobs=top_logprobs)
    return given | {"top_logprobs": top_logprobs}


def seed_of(body: Sampled, choice: int) -> int | None:
    """Any number that a client may send as one that the runtime takes; -1 draws one."""
    return None if body.seed in (None, -1) else ((body.seed or 0) + choice) % (MAX_SEED + 1)


def stops_of(body: Sampled) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def thinking_budget(body: ChatRequest) -> int | None:
    """Tokens that the thought may take, from whichever spelling the client uses."""
    reasoning, thinking = body.reasoning, body.thinking
    template = body.chat_template_kwargs
    switches = (
        body.enable_thinking,
        template.enable_thinking if template else None,
        reasoning.enabled if reasoning else None,
        False if thinking is not None and thinking.type == "disabled" else None,
    )
    if False in switches:
        return 0
    budgets = (
        body.thinking_budget,
        template.thinking_budget if template else None,
        reasoning.max_tokens if reasoning else None,
        thinking.budget_tokens if thinking else None,
    )
    effort = body.reasoning_effort or (reasoning.effort if reasoning else None)
    by_effort = None if effort is None else EFFORT_TOKENS[effort]
    return next((budget for budget in budgets if budget is not None), by_effort)


def call_grammar(qwq: QwQ, tools: tuple[Mapping[str, Any], ...]) -> str:
    """A grammar of one call of one of the tools, as QwQ writes it.

    Raises UsageError where the parameters' schema has no grammar.
    """
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    try:
        grammar = qwq.engine.grammar(calls[0] if len(calls) == 1 else {"anyOf": calls})
    except UsageError as error:
        raise UsageError(f"tools: {str(error).partition(': ')[2]}") from error
    renamed = re.sub(r"(?m)^root(?= *::=)", "tool-call", grammar)
    return f'root ::= "{CALL_OPEN}\\n" tool-call "\\n{CALL_CLOSE}"\n{renamed}'


def _tools(
    body: ChatRequest,
) -> tuple[tuple[Mapping[str, Any], ...], tuple[Mapping[str, Any], ...]]:
    """The tools on offer, and those of which one must be called."""
    tools = tuple(
        tool.model_dump(exclude_unset=True) | {"type": "function"} for tool in body.tools or ()
    )
    for index, tool in enumerate(tools):
        if tool["function"].get("parameters"):
            check_schema(tool["function"]["parameters"], f"tools[{index}].function.parameters")
    choice = body.tool_choice
    if choice == "none":
        return (), ()
    if isinstance(choice, NamedTool):
        named = tuple(t for t in tools if t["function"]["name"] == choice.function.name)
        if not named:
            raise ApiError(
                400,
                f"tool_choice: {choice.function.name!r} is none of the tools; name one of them",
                param="tool_choice",
                code="invalid_value",
            )
        return tools, named[:1]
    if choice == "required" and not tools:
        raise ApiError(
            400, "tool_choice: there are no tools; give some", param="tool_choice", code="no_tools"
        )
    return tools, tools if choice == "required" else ()


def _answer_format(body: ChatRequest) -> Mapping[str, Any] | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    schema = wanted.json_schema.schema_ if wanted.json_schema else None
    param = "response_format.json_schema.schema"
    if schema is None:
        raise ApiError(400, f"{param}: it is missing; give it", param=param, code="invalid_value")
    check_schema(schema, param)
    return schema


def refuse(asked: Mapping[str, Any]) -> None:
    """Raises ApiError where a field that is not offered is used."""
    for name, value in asked.items():
        if value:
            raise ApiError(
                400,
                f"{name}: {json.dumps(value)[:40]} is not offered here; leave it out",
                param=name,
                code="unsupported_parameter",
            )
