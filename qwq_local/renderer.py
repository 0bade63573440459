"""Renders chat templates in a process of its own, where a hostile one can do no harm."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from convert.errors import EngineError, QwqError
from qwq_local.child import Channel, Child

if TYPE_CHECKING:
    import jinja2

RENDER_SECONDS = 10.0
MAX_PROMPT_CHARS = 1 << 24
MAX_RENDERER_NBYTES = 1 << 30
_ORIGINAL = "use the template of the original checkpoint"


def render(source: str, arguments: Mapping[str, Any]) -> str:
    """What jinja2's immutable sandbox makes of a template, within RENDER_SECONDS.

    Output is bounded by MAX_PROMPT_CHARS, and memory by MAX_RENDERER_NBYTES where the system can
    bound it. Raises QwqError where the template is broken, refuses its arguments, asks for what the
    sandbox forbids, or exceeds a bound.
    """
    return _renderer().render(source, arguments)


class _Renderer:
    """The process that renders; it is started anew after one that was stopped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: Child | None = None

    def render(self, source: str, arguments: Mapping[str, Any]) -> str:
        with self._lock:
            self._child = child = self._child or _start()
            deadline = threading.Timer(RENDER_SECONDS, child.kill)
            try:
                deadline.start()
                kind, text = child.ask([source, arguments]).value
            except EngineError as error:
                child.close()
                self._child = None
                raise QwqError(
                    f"chat template: it ran for more than {RENDER_SECONDS:g} s or took too much "
                    f"memory, and was stopped; {_ORIGINAL}"
                ) from error
            finally:
                deadline.cancel()
        if kind == "error":
            raise QwqError(f"chat template: {text}")
        assert isinstance(text, str)
        return text


def _start() -> Child:
    child = Child("qwq_local.renderer:serve")
    child.receive()  # it is ready: from here on the time counts
    return child


@lru_cache(maxsize=1)
def _renderer() -> _Renderer:
    return _Renderer()


def serve(channel: Channel) -> None:
    """The life of the process: a template and its arguments in, a prompt or an error out."""
    import jinja2.sandbox  # noqa: F401 - before the first template's time begins

    _bound_memory()
    channel.send("ready")
    while True:
        request = channel.receive()
        channel.send(_answer(*request.value), number=request.number)


def _answer(source: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
    import jinja2

    try:
        template = _compile(source)
    except jinja2.TemplateError as error:
        return "error", f"it is no valid template ({error}); {_ORIGINAL}"
    try:
        text = template.render(arguments)
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error) or type(error).__name__
        return (
            "error",
            f"it fails on these messages ({reason}); change the messages, or {_ORIGINAL}",
        )
    if len(text) > MAX_PROMPT_CHARS:
        problem = f"it makes {len(text):,} characters, of which {MAX_PROMPT_CHARS:,} are allowed"
        return "error", f"{problem}; shorten the messages, or {_ORIGINAL}"
    return "prompt", text


def _bound_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such bound
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_RENDERER_NBYTES, MAX_RENDERER_NBYTES))


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """Set jinja2 up as transformers does: these options, filters and globals are its interface."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(jinja2.ext.Extension):
        """`{% generation %}` marks what the model wrote; to a renderer it is only its content."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)
