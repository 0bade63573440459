"""What travels over the wire, in OpenAI's form with QwQ's fields.

Fields that are not named here are accepted, and listed once in the log. What a number may be is
said by Sampling and Limits, which name the field too.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MOST_MESSAGES = 4096
MOST_TOOLS = 256
MOST_CHOICES = 8
MOST_STOPS = 16
MOST_BIASES = 1024
MOST_IDS = 1 << 20

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Stop = StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None
Count = Annotated[int, Field(ge=1)] | None
Budget = Annotated[int, Field(ge=0)] | None
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MOST_IDS)]


class Wire(BaseModel):
    model_config = ConfigDict(extra="allow", serialize_by_alias=True)


class ContentPart(Wire):
    type: str
    text: str | None = None


Content = str | list[str | ContentPart] | None


class CalledFunction(Wire):
    name: str
    arguments: str | dict[str, Any] | None = None


class Call(Wire):
    id: str | None = None
    type: str = "function"
    function: CalledFunction


class ChatMessage(Wire):
    role: str
    content: Content = None
    reasoning_content: Content = None
    reasoning: Content = None
    thinking: Content = None
    tool_calls: list[Call] | None = Field(None, max_length=MOST_TOOLS)
    tool_call_id: str | None = None
    name: str | None = None


class FunctionDescription(Wire):
    name: str = Field(pattern=r"^[\w.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Wire):
    type: Literal["function"] = "function"
    function: FunctionDescription


class NamedFunction(Wire):
    name: str


class NamedTool(Wire):
    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(Wire):
    name: str = "answer"
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class StreamOptions(Wire):
    include_usage: bool = False


class ReasoningOptions(Wire):
    """OpenRouter's spelling, and that of OpenAI's responses."""

    effort: Effort | None = None
    max_tokens: Budget = None
    enabled: bool | None = None
    exclude: bool = False


class ThinkingOptions(Wire):
    """Anthropic's spelling, which DeepSeek and others took over."""

    type: Literal["enabled", "disabled", "adaptive", "auto"] = "enabled"
    budget_tokens: Budget = None


class TemplateOptions(Wire):
    """vLLM's and SGLang's spelling."""

    enable_thinking: bool | None = None
    thinking_budget: Budget = None


class Sampled(Wire):
    """What chat and plain completions share."""

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Count = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Stop = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    logit_bias: (
        Annotated[
            dict[Annotated[str, StringConstraints(pattern=r"^\d{1,7}$")], float],
            Field(max_length=MOST_BIASES),
        ]
        | None
    ) = None
    user: str | None = None


class ChatRequest(Sampled):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: Count = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    enable_thinking: bool | None = None
    thinking_budget: Budget = None
    reasoning_effort: Effort | None = None
    reasoning: ReasoningOptions | None = None
    thinking: ThinkingOptions | None = None
    chat_template_kwargs: TemplateOptions | None = None


class Steering(Wire):
    hint: str = Field(min_length=1, max_length=4096)


class PromptDetails(BaseModel):
    cached_tokens: int


class CompletionDetails(BaseModel):
    reasoning_tokens: int


class WireUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class WireTimings(BaseModel):
    """Ours: tokens found in the cache and read anew, and how long reading and decoding took."""

    n_cached: int
    n_prefilled: int
    prefill_s: float
    n_decoded: int
    decode_s: float
    tokens_per_s: float | None


class WireNotice(BaseModel):
    """Ours: what the reader of a reply should know."""

    kind: str
    text: str


class FunctionCall(BaseModel):
    """arguments: JSON, as text."""

    name: str
    arguments: str


class ToolCallOut(BaseModel):
    index: int | None = None
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallOut] | None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class LikelyToken(BaseModel):
    """bytes: of the token, which may be part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenInfo(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChoiceLogprobs(BaseModel):
    content: list[TokenInfo]


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: WireUsage | None = None
    timings: WireTimings | None = None
    notices: list[WireNotice] | None = None


class ChatChoice(BaseModel):
    index: int
    message: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: WireUsage
    timings: WireTimings
    notices: list[WireNotice]


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["qwq-local"] = "qwq-local"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


class Health(BaseModel):
    status: Literal["loading", "ready", "down", "closed"]


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetails


class CompletionRequest(Sampled):
    """Plain text to go on from, special tokens included; no template is laid around it."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_CHOICES)]
    )
    max_tokens: Budget = None  # 0 with echo: how likely a text is
    echo: bool | None = None
    suffix: str | None = None
    logprobs: int | None = None


class MessageBlock(Wire):
    """A part of a message to /v1/messages; which fields it has depends on its type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[ContentPart] | None = None


Blocks = str | Annotated[list[MessageBlock], Field(max_length=MOST_MESSAGES)]


class MessagesMessage(Wire):
    role: Literal["user", "assistant", "system"]
    content: Blocks


class MessagesTool(Wire):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] = Field(default_factory=dict)


class MessagesToolChoice(Wire):
    type: Literal["auto", "any", "tool", "none"]
    name: str = ""


class MessagesFormat(Wire):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class MessagesOutput(Wire):
    effort: Effort | None = None
    format: MessagesFormat | None = None


class MessagesRequest(Wire):
    """Anthropic's form."""

    model: str = ""
    max_tokens: int = Field(ge=1)
    messages: list[MessagesMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    system: Blocks | None = None
    stream: bool = False
    stop_sequences: list[StopText] | None = Field(None, max_length=MOST_STOPS)
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    tools: list[MessagesTool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: MessagesToolChoice | None = None
    thinking: ThinkingOptions | None = None
    output_config: MessagesOutput | None = None


class ResponsesItem(Wire):
    """A piece of input to /v1/responses; which fields it has depends on its type."""

    type: str = "message"
    role: str | None = None
    content: Content = None
    summary: list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Content = None


class ResponsesTool(Wire):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ResponsesToolChoice(Wire):
    type: Literal["function"]
    name: str


class ResponsesFormat(Wire):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponsesText(Wire):
    format: ResponsesFormat | None = None


class ResponsesRequest(Wire):
    """OpenAI's newer form, without what a server would have to remember."""

    model: str = ""
    input: str | Annotated[list[ResponsesItem], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: str | None = None
    stream: bool = False
    max_output_tokens: Count = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[ResponsesTool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = None
    reasoning: ReasoningOptions | None = None
    text: ResponsesText | None = None
    previous_response_id: str | None = None
    user: str | None = None
