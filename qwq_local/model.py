"""QwQ: a path becomes a model that answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from convert.errors import EngineError, UsageError
from qwq_local.description import (
    Description,
    describe_folder,
    describe_gguf,
    read_json,
)
from qwq_local.engine import Engine, EngineSettings, KvChoice, OnProgress, Speculation
from qwq_local.find import ModelPath, find_model
from qwq_local.local import LocalModel
from qwq_local.messages import normalise
from qwq_local.remote import RemoteModel
from qwq_local.reply import Reply
from qwq_local.rope import RopeMode
from qwq_local.sampling import Sampling, choose_seed
from qwq_local.session import Overflow, Session, Tool
from qwq_local.stream import Stream
from qwq_local.turn import Limits, Turn


class QwQ:
    """A model that is loaded, with its template and its sampling defaults.

    Use it as a context manager, or call close(). It may be used from several threads; replies
    that overlap take turns.
    """

    def __init__(self, model: LocalModel | RemoteModel) -> None:
        self._model = model
        self.path = model.path
        self.name = model.name

    @property
    def sampling(self) -> Sampling:
        """The model's own defaults."""
        return self._model.sampling

    @property
    def engine(self) -> Engine:
        """What runs the model on this machine. Raises UsageError where a server runs it."""
        return self._local().engine

    @property
    def description(self) -> Description:
        """What the model's files say. Raises UsageError where a server runs it."""
        return self._local().description

    def _local(self) -> LocalModel:
        if not isinstance(self._model, LocalModel):
            raise UsageError(f"{self.path}: a server runs this model; open it from files instead")
        return self._model

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        context: int | None = None,
        threads: int | None = None,
        rope: RopeMode = "auto",
        kv_type: KvChoice = "auto",
        speculation: Speculation = "exact",
        draft: str | Path | None = None,
        parallel: int = 1,
        repair_template: bool = True,
        isolated: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Self:
        """Load a GGUF file, a GPTQ folder, a checkpoint, or the best model within a folder.

        Or the address of an OpenAI-compatible server, as in http://localhost:8000/v1#qwq-32b; the
        key is taken from QWQ_API_KEY, the server does what else is set here for itself.

        context: tokens for prompt and reply together; None takes the model's own, at most
        32,768, and less where the memory is short. threads: None takes the physical cores, and
        one for a small model. rope: "auto" is native up to 32,768 tokens and switches to YaRN
        when a conversation needs more; "native" and "yarn" never switch. kv_type: of a GGUF
        file's kv_cache; "auto" is f16, or q8_0, which takes half, where f16 does not fit.
        speculation: ids of a GGUF file's replies are proposed from the context and read in batches
        while that pays; "exact" does so only where a batch was found to compute the same bits, so
        that the reply stays the same, "close" also where it rounds otherwise, "off" never. draft:
        a smaller GGUF model that proposes them instead.
        parallel: how many replies of a GGUF file, each read in a thread of its own, are decoded
        together, each with a context of its own; what does not overlap in time takes turns.
        repair_template: whether a chat template that opens no thought is mended, with a Notice, or
        refused. isolated: whether the model runs in a process of its own, whose death is an
        EngineError and no more. on_progress: told how much of the files is loaded, in percent.
        Raises QwqError where there is no model or it cannot be loaded.
        """
        if str(path).startswith(("http://", "https://")):
            return cls(RemoteModel(str(path)))
        model = find_model(Path(path))
        settings = EngineSettings(
            context,
            threads,
            rope,
            kv_type,
            parallel=parallel,
            speculation=speculation,
            draft=None if draft is None else str(draft),
        )
        from qwq_local.engines.here import open_here
        from qwq_local.engines.parallel import isolate

        description = _describe(model, settings)
        open_engine = isolate if isolated else open_here
        try:
            engine = open_engine(model.path, settings, on_progress=on_progress)
        except EngineError as error:
            raise EngineError(
                f"{model.path}: loading it ended the process that did ({error}); fetch or make it "
                "again"
            ) from error
        return cls(LocalModel(engine, description, model.path, repair_template=repair_template))

    def session(
        self,
        *,
        system: str | None = None,
        tools: Sequence[Tool] = (),
        sampling: Sampling | None = None,
        seed: int | None = None,
        overflow: Overflow = "error",
    ) -> Session:
        """A conversation.

        tools: function descriptions in OpenAI's form, or Python functions. overflow: what becomes
        of a conversation that outgrows the context: ContextError, or "drop_oldest" leaves the
        oldest turns out and says so.
        """
        return Session(
            self._model, system=system, tools=tools, sampling=sampling, seed=seed, overflow=overflow
        )

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
        limits: Limits | None = None,
        on_progress: OnProgress | None = None,
    ) -> Stream:
        """Stream the reply to messages in OpenAI's form.

        sampling: None takes the model's defaults. seed: 0 to 2**32 - 2, the same seed gives the
        same reply on the same machine; None draws one. max_tokens: shorthand for limits that say
        no more. on_progress: told how much of a long prompt is read, in tokens. Raises QwqError
        where the messages cannot be rendered or do not fit in the context.
        """
        turn = Turn(
            normalise(messages),
            sampling=self.sampling if sampling is None else sampling,
            seed=choose_seed(seed),
            tools=tuple(tools or ()),
            limits=Limits(max_tokens) if limits is None else limits,
            call_prefix=f"call_{len(messages)}_",
            on_progress=on_progress,
        )
        return Stream(lambda control: self._model.reply(turn, control))

    def load_session(
        self, path: str | Path, *, tools: Sequence[Tool] = (), cache: bool = True
    ) -> Session:
        """A session that was saved with this model, with its kv_cache if that was saved.

        tools: Python functions anew, which no file can hold; without any, the saved descriptions.
        Raises QwqError where the file is damaged or of another model, template or kv_cache.
        """
        return Session.load(self._model, Path(path), tools=tools, cache=cache)

    def wait_until_idle(self) -> None:
        """Return when the next turns are prepared, for who wants to measure."""
        self._model.wait_until_warm()

    def close(self) -> None:
        """Free the memory."""
        self._model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _describe(model: ModelPath, settings: EngineSettings) -> Description:
    """What the files say, checked as far as it needs no reading of weights."""
    if model.kind == "gguf":
        from convert.gguf_header import read_header

        return describe_gguf(model.path, read_header(model.path))
    if settings.parallel > 1:
        raise UsageError(
            f"{model.path}: {settings.parallel} replies at once are asked for, and a folder makes "
            "one; use a GGUF file, or leave --parallel out"
        )
    from qwq_local.engines.folder import read_folder

    description = describe_folder(model.path)
    read_json(model.path / "tokenizer.json")  # before a process is started in vain
    read_folder(model.path)
    return description
