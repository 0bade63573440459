"""QwQ: a path becomes a model that answers."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from convert.errors import QwqError, UsageError
from qwq_local.chat_template import ChatTemplate
from qwq_local.description import Description, describe_folder, describe_gguf, read_json
from qwq_local.engine import Engine
from qwq_local.find import find_model
from qwq_local.messages import normalise
from qwq_local.reply import Done, Event, Notice, Reply, ReplySplitter, Timings, Usage
from qwq_local.sampling import Sampling, choose_seed
from qwq_local.session import Session

_END_TOKENS = ("<|im_end|>", "<|endoftext|>")


class QwQ:
    """A model that is loaded, with its template and its sampling defaults.

    Use it as a context manager, or call close(). It may be used from several threads; replies
    that overlap take turns.
    """

    def __init__(self, engine: Engine, description: Description, path: Path) -> None:
        self.engine = engine
        self.description = description
        self.path = path
        self.sampling = description.sampling
        self._template = ChatTemplate(
            description.template,
            control_tokens=tuple(engine.control_tokens),
            variables=description.template_variables,
        )
        named = [token for token in _END_TOKENS if token in engine.control_tokens]
        self._stop_ids = description.stop_ids | {engine.control_tokens[token] for token in named}

    @classmethod
    def open(
        cls, path: str | Path, *, context: int | None = None, threads: int | None = None
    ) -> Self:
        """Load a GGUF file, a GPTQ folder, a checkpoint, or the best model within a folder.

        context: tokens for prompt and reply together; None takes the model's own, at most
        32,768, and less where the memory is short. threads: None takes the physical cores, and
        one for a small model. Raises QwqError where there is no model or it cannot be loaded.
        """
        model = find_model(Path(path))
        engine, description = _LOADERS[model.kind](model.path, context, threads)
        return cls(engine, description, model.path)

    def session(
        self,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
    ) -> Session:
        """A conversation. tools: function descriptions in OpenAI's form."""
        return Session(self, system=system, tools=tools, sampling=sampling, seed=seed)

    def ask(
        self,
        text: str,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
    ) -> Reply:
        """One question and its whole reply."""
        session = self.session(system=system, sampling=sampling, seed=seed)
        return session.ask(text, max_tokens=max_tokens)

    def reply(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
    ) -> Iterator[Event]:
        """Stream the reply to messages in OpenAI's form.

        sampling: None takes the model's defaults. seed: 0 to 2**32 - 2, the same seed gives the
        same reply on the same machine; None draws one. max_tokens: None ends at the context.
        Closing the iterator cancels. Raises QwqError where the messages cannot be rendered or
        do not fit in the context.
        """
        sampling = self.sampling if sampling is None else sampling
        seed = choose_seed(seed)
        prompt = self._template.render(normalise(messages), tools=tools)
        ids = prompt.tokenize(self.engine)
        n_left = self.engine.context_length - len(ids)
        if n_left < 1:
            raise QwqError(
                f"prompt: {len(ids):,} tokens leave no room for a reply in a context of "
                f"{self.engine.context_length:,}; shorten it, or open the model with a larger "
                "context (--context)"
            )
        max_tokens = n_left if max_tokens is None else min(max_tokens, n_left)
        if max_tokens < 1:
            raise UsageError(f"max_tokens: {max_tokens} leaves no reply; choose 1 or more")
        if not prompt.opens_thought:
            yield Notice(
                "template",
                "the chat template does not end in <think>, so the model may skip its thought",
            )
        if sampling.greedy:
            yield Notice("sampling", "greedy decoding: QwQ tends to repeat itself without end")
        splitter = ReplySplitter(
            opens_thought=prompt.opens_thought,
            tools=bool(tools),
            call_prefix=f"call_{len(messages)}_",
        )
        n_cached = self.engine.n_cached(ids)
        n_made = n_reasoning = 0
        token_id = None
        started = first = last = time.perf_counter()
        for token_id in self.engine.generate(
            ids, sampling=sampling, seed=seed, max_tokens=max_tokens, stop_ids=self._stop_ids
        ):
            last = time.perf_counter()
            first = last if n_made == 0 else first
            n_made += 1
            n_reasoning += splitter.in_thought
            if token_id not in self._stop_ids:
                yield from splitter.feed(self.engine.token_bytes(token_id))
        yield from splitter.finish()
        stopped = token_id in self._stop_ids
        finish_reason = "tool_calls" if splitter.n_calls else "stop"
        yield Done(
            finish_reason if stopped else "length",
            Usage(len(ids), n_made, n_reasoning),
            Timings(n_cached, len(ids) - n_cached, first - started, n_made, last - first),
        )

    def close(self) -> None:
        """Free the memory."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _load_gguf(path: Path, context: int | None, threads: int | None) -> tuple[Engine, Description]:
    from convert.gguf_header import read_header
    from qwq_local.engines.gguf import GgufEngine

    header = read_header(path)
    description = describe_gguf(path, header)
    return GgufEngine(path, header, context=context, threads=threads), description


def _load_folder(
    path: Path, context: int | None, threads: int | None
) -> tuple[Engine, Description]:
    from convert.checkpoint import Checkpoint
    from qwq_local.engines.transformers import TransformersEngine, is_gptq

    description = describe_folder(path)
    config = read_json(path / "config.json")
    if not is_gptq(config):
        with Checkpoint.open(path):
            pass  # opening it checks all that needs no reading of weights
    return TransformersEngine(path, config, context=context, threads=threads), description


_LOADERS: dict[str, Callable[..., tuple[Engine, Description]]] = {
    "gguf": _load_gguf,
    "folder": _load_folder,
}
