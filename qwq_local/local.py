"""A model on this machine: its template makes the prompt, its engine the reply."""

import hashlib
import logging
import threading
from collections.abc import Generator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from convert.errors import ContextError, QwqError
from qwq_local.chat_template import ChatTemplate, Prompt
from qwq_local.description import Description
from qwq_local.engine import Engine, shared_prefix
from qwq_local.messages import Message
from qwq_local.reply import Event, Notice
from qwq_local.respond import Request, respond, rope_notice
from qwq_local.rope import Yarn
from qwq_local.saved import Cached, identify
from qwq_local.stream import Control
from qwq_local.turn import Turn, sampling_notices

N_PIECES = 256
"""Texts between control tokens whose ids are kept: the messages of earlier turns."""
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")
_log = logging.getLogger(__name__)


class LocalModel:
    """Replies to turns, and reads ahead while nothing is asked.

    repair_template: whether a template that opens no thought is mended, or refused.
    """

    def __init__(
        self, engine: Engine, description: Description, path: Path, *, repair_template: bool = True
    ) -> None:
        self.engine = engine
        self.path: Path | str = path
        self.name = description.name
        self.description = description
        self.sampling = description.sampling
        self._tokenize = lru_cache(N_PIECES)(
            lambda text: tuple(engine.tokenize(text, parse_special=False))
        )
        self._repair_template = repair_template
        self._template = ChatTemplate(
            description.template,
            control_tokens=tuple(engine.control_tokens),
            variables=description.template_variables,
        )
        named = [token for token in _END_TOKENS if token in engine.control_tokens]
        self._stop_ids = description.stop_ids | {engine.control_tokens[token] for token in named}
        self._lock = threading.RLock()  # a dropped reply may end within another call of its thread
        self._n_active = 0
        self._warming = threading.Event()  # set: the thread that reads ahead is to stop
        self._warmer: threading.Thread | None = None

    def reply(self, turn: Turn, control: Control) -> Generator[Event]:
        """Stream the reply to a turn.

        Raises QwqError where the messages cannot be rendered, ContextError where they do not fit.
        """
        with self._lock:
            self._n_active += 1
            self._warming.set()
        try:
            prompt, notices = self._prompt(turn)
            request = self._request(turn, prompt)
            yield from notices
            if request.rope is not None and not turn.yarn:
                yield rope_notice(self.engine.rope_plan)
            yield from respond(self.engine, request, control)
        finally:
            with self._lock:
                self._n_active -= 1

    def fits(self, turn: Turn) -> bool:
        """Whether a turn leaves room for max_tokens, or for a quarter of the context if less."""
        n_context = self.engine.rope_plan.context_length
        n_reply = min(turn.limits.max_tokens or n_context, max(1, n_context // 4))
        prompt, _ = self._prompt(turn)
        return len(self._ids(prompt)) + n_reply <= n_context

    def warm(self, turn: Turn, role: str) -> None:
        """Read what the next turn's prompt will begin with, while nothing else is asked.

        turn: the messages so far. role: who speaks next, "user" or "tool".
        """
        with self._lock:
            if self._n_active:
                return
            self._warming.set()
            self._warming = stop = threading.Event()
            self._warmer = threading.Thread(
                target=self._warm, args=(turn, role, stop), name="qwq-warm", daemon=True
            )
            self._warmer.start()

    def bound_to(self) -> dict[str, str]:
        """By what this model is told from others, for sessions that are saved."""
        template = hashlib.sha256(self.description.template.encode()).hexdigest()
        return {"model": identify(self.path), "template": template}

    def export_cache(self, turn: Turn, role: str) -> tuple[Cached, bytes]:
        """What warm would read, and the kv_cache of it."""
        self.warm(turn, role)
        self.wait_until_warm()
        cached = self._cached(turn, role)
        return cached, self.engine.export_cache(cached.ids, rope=cached.rope)

    def import_cache(self, turn: Turn, role: str, cached: Cached, state: bytes) -> None:
        """Raises QwqError where it is not the kv_cache of the conversation with this rope."""
        expected = self._cached(turn, role)
        if cached.ids != expected.ids:
            raise QwqError(
                "session: its ids are not those of its messages, so the kv_cache is of no use; "
                "load it with cache=False"
            )
        if cached.rope != expected.rope:
            raise QwqError(
                f"session: its kv_cache was read with {_named(cached.rope)}, and here the "
                f"same ids are read with {_named(expected.rope)}; open the model with the "
                "context that it was saved with, or load it with cache=False"
            )
        self.engine.import_cache(cached.ids, state, rope=cached.rope)

    def _cached(self, turn: Turn, role: str) -> Cached:
        ids = self._next_prefix(turn, role)
        return Cached(ids, self._rope(turn, ids))

    def _rope(self, turn: Turn, ids: list[int]) -> Yarn | None:
        plan = self.engine.rope_plan
        return plan.yarn if turn.yarn else plan.rope_for(len(ids))

    def wait_until_warm(self) -> None:
        """Return when there is nothing left to read ahead."""
        with self._lock:
            warmer = self._warmer
        if warmer is not None:
            warmer.join()

    def close(self) -> None:
        """Free the memory."""
        with self._lock:
            self._warming.set()
        self.wait_until_warm()
        self.engine.close()

    def _warm(self, turn: Turn, role: str, stop: threading.Event) -> None:
        try:
            ids = self._next_prefix(turn, role)
            if len(ids) < self.engine.rope_plan.context_length:
                for _ in self.engine.prefill(ids, rope=self._rope(turn, ids)):
                    if stop.is_set():
                        return
        except QwqError as error:
            _log.debug("reading ahead was given up: %s", error)

    def _next_prefix(self, turn: Turn, role: str) -> list[int]:
        """The ids that the next prompt begins with, whatever its message says."""

        def ids(content: str) -> list[int]:
            messages = [*turn.messages, {"role": role, "content": content}]
            return self._ids(self._render(messages, turn.tools))

        ours = ids("a")
        return ours[: shared_prefix(ours, ids("b")) + 1]  # prefill leaves the last one out

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Prompt:
        return self._template.render(messages, tools=tools or None)

    def _ids(self, prompt: Prompt) -> list[int]:
        return prompt.ids(self.engine.control_tokens, self._tokenize)

    def _prompt(self, turn: Turn) -> tuple[Prompt, list[Notice]]:
        prompt = self._render(turn.messages, turn.tools)
        notices = []
        if not prompt.opens_thought:
            repaired = prompt.with_open_thought()
            if repaired is None or not self._repair_template:
                raise QwqError(
                    "chat template: it ends in "
                    f"{prompt.text[-40:]!r} and not in '<think>\\n', so the model would skip its "
                    "thought; use the template of the original checkpoint"
                )
            prompt = repaired
            notices.append(
                Notice("template", "the chat template opens no thought; <think> was added to it")
            )
        return prompt, notices + sampling_notices(turn.sampling)

    def _request(self, turn: Turn, prompt: Prompt) -> Request:
        plan, limits = self.engine.rope_plan, turn.limits
        ids = self._ids(prompt)
        n_left = plan.context_length - len(ids)
        if n_left < 1:
            raise ContextError(
                f"prompt: {len(ids):,} tokens leave no room for a reply in a context of "
                f"{plan.context_length:,}; shorten it, or open the model with a larger "
                "context (--context)"
            )
        answer_format = limits.answer_format
        return Request(
            ids=ids,
            room=n_left if limits.max_tokens is None else min(limits.max_tokens, n_left),
            rope=plan.yarn if turn.yarn else plan.rope_for(len(ids) + 1),
            stop_ids=self._stop_ids,
            grammar=None if answer_format is None else self.engine.grammar(answer_format),
            turn=turn,
        )


def _named(rope: Yarn | None) -> str:
    return "native rope" if rope is None else f"YaRN with factor {rope.factor:g}"
