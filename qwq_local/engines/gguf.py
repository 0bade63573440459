"""GGUF files through llama.cpp's C interface, as llama-cpp-python binds it."""

import ctypes
import dataclasses
import json
import logging
import re
import unicodedata
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.errors import GgufError, QwqError, UsageError
from convert.gguf_header import GgufHeader, read_header
from qwq_local.chat_template import any_of
from qwq_local.engine import EngineSettings, KvChoice, KvType, OnProgress
from qwq_local.engines.draft import DraftModel, check_vocabulary
from qwq_local.engines.gguf_checks import ARCHITECTURE, check_model
from qwq_local.engines.loop import PREFILL_BATCH, EngineLoop, Sampler, n_logits_rows
from qwq_local.engines.speculation import NgramDrafter, Speculator
from qwq_local.memory import choose_context, choose_threads
from qwq_local.memory_plan import (
    KV_NBYTES,
    Device,
    GgufPlan,
    ModelSizes,
    best_plan,
    check_fits,
    find_devices,
    plan_memory,
)
from qwq_local.rope import Yarn, longest_context, plan_rope
from qwq_local.sampling import Sampling

KV_TYPES: tuple[KvType, ...] = ("f16", "q8_0")
_BATCHES = (PREFILL_BATCH, 256, 128)
PREFILL_SHARE = 128
"""Tokens of a prompt that join the decoding of other replies, which would else stand still."""
_SMALLEST_CONTEXT = 1024
_GGML_TYPES: dict[KvType, int] = {"f16": 1, "q8_0": 8}
_ROPE_NATIVE, _ROPE_YARN = 0, 2  # llama_rope_scaling_type
_FLASH_ATTENTION = 1  # llama_flash_attn_type
_CONTROL, _USER_DEFINED = 1 << 3, 1 << 4  # llama_token_attr
_UNUSED_OR_UNKNOWN = (1 << 0) | (1 << 1)

_WITHIN_GBNF = re.compile(  # a text, a class of all but some characters, a class
    r'"(?:\\.|[^"\\])*"|\[\^((?:\\.|[^\]\\])*)\]|\[(?:\\.|[^\]\\])*\]'
)
_LLAMA_ERROR = 4  # ggml_log_level
_BELOW_DEBUG = 5
_llama_log = logging.getLogger("qwq_local.llama")
_last_errors: deque[str] = deque(maxlen=3)


class GgufEngine(EngineLoop):
    """One GGUF file in llama.cpp, on the GPU where llama-cpp-python was built for one.

    Raises GgufError where llama.cpp refuses the file.
    """

    def __init__(
        self,
        path: Path,
        header: GgufHeader,
        settings: EngineSettings,
        *,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._llama = _library()
        self.memory_plan = plan_gguf(path, header, settings)
        check_fits(self.memory_plan, plan_alternatives(path, header, settings), path)
        n_weights = sum(prod(tensor.shape) for tensor in header.tensors.values())
        self._path = path
        self._n_threads = choose_threads(settings.threads, n_weights=n_weights)
        self._model = self._load_model(on_progress)
        self._context: Any = None
        self._vocab = self._llama.llama_model_get_vocab(self._model)
        super().__init__(
            vocab_size=self._llama.llama_vocab_n_tokens(self._vocab),
            rope_plan=plan_rope(settings.rope, self.memory_plan.context),
        )
        self.prefill_batch = min(PREFILL_BATCH, self.memory_plan.batch)
        self._draft: GgufEngine | None = None
        try:
            self._set_rope(self._rope)
            self.speculator = self._make_speculator(header, settings)
        except QwqError:
            self.close()
            raise
        self._batch_ids = (self._llama.llama_token * PREFILL_BATCH)()
        self._batch_outputs = (ctypes.c_int8 * PREFILL_BATCH)(*[1] * PREFILL_BATCH)
        self.control_tokens = self._tokens_with(_CONTROL)
        plain = self._tokens_with(_USER_DEFINED)
        self._special_tokens = {
            parse_special: re.compile(f"({any_of([*plain, *special])})")
            for parse_special, special in ((True, self.control_tokens), (False, ()))
        }

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        data = self._composed(text, parse_special).encode("utf-8", errors="replace")
        capacity = len(data) + 1
        ids = (self._llama.llama_token * capacity)()
        n = self._llama.llama_tokenize(
            self._open_vocab(), data, len(data), ids, capacity, False, parse_special
        )
        assert n >= 0, "no text has more tokens than bytes"
        return list(ids[:n])

    def _composed(self, text: str, parse_special: bool) -> str:
        """The text as Qwen2's tokenizer reads it, which llama.cpp leaves out: in NFC.

        Added tokens are cut out first, so that no accent after one becomes part of it.
        """
        parts = self._special_tokens[parse_special].split(text)
        return "".join(
            part if index % 2 else unicodedata.normalize("NFC", part)
            for index, part in enumerate(parts)
        )

    def _tokens_with(self, attributes: int) -> dict[str, int]:
        return {
            self._piece(token_id).decode("utf-8", errors="replace"): token_id
            for token_id in range(self.vocab_size)
            if self._llama.llama_vocab_get_attr(self._vocab, token_id) & attributes
        }

    def token_bytes(self, token_id: int) -> bytes:
        attributes = self._llama.llama_vocab_get_attr(self._open_vocab(), token_id)
        return b"" if attributes & _UNUSED_OR_UNKNOWN else self._piece(token_id)

    def close(self) -> None:
        with self._lock:
            if self._draft is not None:
                self._draft.close()
            self._free_context()
            self.stash.clear()
            if self._model is not None:
                self._llama.llama_model_free(self._model)
                self._model = None

    def _make_speculator(self, header: GgufHeader, settings: EngineSettings) -> Speculator | None:
        if settings.speculation == "off" or settings.parallel > 1:
            return None
        is_exact = settings.speculation == "exact"
        if settings.draft is None:
            return Speculator(NgramDrafter, is_exact=is_exact)
        path = Path(settings.draft)
        draft_header = read_header(path)
        shared = check_vocabulary(path, draft_header.metadata, header.metadata)
        n_context = min(
            self.rope_plan.context_length, check_model(path, draft_header)["context_length"]
        )
        self._draft = GgufEngine(
            path,
            draft_header,
            EngineSettings(
                n_context, settings.threads, "native", self.memory_plan.kv_type, speculation="off"
            ),
        )
        return Speculator(DraftModel(self._draft, shared, self).begin, is_exact=is_exact)

    def _load_model(self, on_progress: OnProgress | None) -> Any:
        params = self._llama.llama_model_default_params()
        params.n_gpu_layers = self.memory_plan.n_gpu_layers

        @self._llama.llama_progress_callback  # type: ignore[untyped-decorator]
        def report(fraction: float, _user_data: object) -> bool:
            if on_progress is not None:
                on_progress(round(100 * fraction), 100)
            return True

        params.progress_callback = report
        model = self._llama.llama_model_load_from_file(str(self._path).encode(), params)
        if model is None:
            raise GgufError(
                f"{self._path}: llama.cpp cannot load it ({explain()}); make the file again"
            )
        return model

    def _set_rope(self, rope: Yarn | None) -> None:
        self._free_context()
        params = self._context_params(rope)
        self._context = self._llama.llama_init_from_model(self._model, params)
        if self._context is None:
            raise QwqError(
                f"{self._path}: llama.cpp has no room for a context of {params.n_ctx:,} tokens "
                f"({explain()}); choose a smaller one with --context"
            )

    def _context_params(self, rope: Yarn | None) -> Any:
        """llama.cpp's parameters of a context for one sequence."""
        params = self._llama.llama_context_default_params()
        params.n_ctx = self.rope_plan.room(rope)
        params.n_batch = params.n_ubatch = max(self.prefill_batch, self.n_logits_rows)
        params.n_outputs_max = self.n_logits_rows
        params.n_threads = params.n_threads_batch = self._n_threads
        params.type_k = params.type_v = _GGML_TYPES[self.memory_plan.kv_type]
        if self.memory_plan.kv_type != "f16":
            params.flash_attn_type = _FLASH_ATTENTION  # without it values cannot be quantized
        if rope is None:
            params.rope_scaling_type = _ROPE_NATIVE
            params.rope_freq_scale = 1.0
        else:
            params.rope_scaling_type = _ROPE_YARN
            params.rope_freq_scale = 1 / rope.factor
            params.yarn_orig_ctx = rope.original_length
        return params

    def _free_context(self) -> None:
        if self._context is not None:
            self._llama.llama_free(self._context)
            self._context = None

    def _open_context(self) -> Any:
        if self._context is None:
            raise QwqError(f"{self._path}: the model is closed; open it again")
        return self._context

    def _open_vocab(self) -> Any:
        self._open_context()
        return self._vocab

    def _piece(self, token_id: int) -> bytes:
        capacity = 64
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            n = self._llama.llama_token_to_piece(self._vocab, token_id, buffer, capacity, 0, True)
            if n >= 0:
                return buffer.raw[:n]
            capacity = -n

    def _trim(self, n_kept: int) -> None:
        self.trim_sequence(0, n_kept)

    def _export(self) -> bytes:
        return self.export_sequence(0)

    def _import(self, state: bytes) -> None:
        self.import_sequence(0, state)

    def trim_sequence(self, sequence_id: int, n_kept: int) -> None:
        """Forget a sequence's positions from n_kept on."""
        memory = self._llama.llama_get_memory(self._open_context())
        removed = self._llama.llama_memory_seq_rm(memory, sequence_id, n_kept, -1)
        assert removed, "a kv_cache of attention layers can be cut anywhere"

    def export_sequence(self, sequence_id: int) -> bytes:
        """What the kv_cache holds of a sequence."""
        context = self._open_context()
        nbytes = self._llama.llama_state_seq_get_size(context, sequence_id)
        buffer = (ctypes.c_uint8 * nbytes)()
        n_written = self._llama.llama_state_seq_get_data(context, buffer, nbytes, sequence_id)
        return bytes(memoryview(buffer)[:n_written])

    def import_sequence(self, sequence_id: int, state: bytes) -> None:
        """Make a sequence what was exported. Raises QwqError where that cannot be."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        context = self._open_context()
        if not self._llama.llama_state_seq_set_data(context, buffer, len(state), sequence_id):
            raise QwqError(
                f"{self._path}: llama.cpp refuses the saved kv_cache ({explain()}); load the "
                "session without it"
            )

    def _feed(self, ids: Sequence[int], *, all_logits: bool) -> None:
        self._batch_ids[: len(ids)] = ids
        batch = self._llama.llama_batch(
            n_tokens=len(ids),
            token=self._batch_ids,
            logits=self._batch_outputs if all_logits else None,
        )
        status = self._llama.llama_decode(self._open_context(), batch)
        if status != 0:
            raise QwqError(
                f"llama.cpp: decoding {len(ids)} tokens failed with status {status} ({explain()}); "
                "open the model again, with a smaller --context if memory is short"
            )

    def _read_logits(self, n: int) -> NDArray[np.float32]:
        import numpy as np

        pointer = self._llama.llama_get_logits(self._open_context())
        return np.ctypeslib.as_array(pointer, shape=(n, self.vocab_size)).copy()

    @contextmanager
    def _sampler(self, sampling: Sampling, seed: int, prompt: Sequence[int]) -> Iterator[Sampler]:
        sampler = ChainSampler(self, self.new_chain(sampling, seed, prompt))
        try:
            yield sampler
        finally:
            sampler.free()

    def new_chain(self, sampling: Sampling, seed: int, prompt: Sequence[int]) -> Any:
        """A sampler chain for one reply."""
        return make_chain(
            self._llama,
            sampling,
            seed=seed,
            vocab_size=self.vocab_size,
            n_window=self.rope_plan.context_length,
            prompt=prompt,
        )

    def grammar(self, answer_format: Mapping[str, Any] | str) -> str:
        text = answer_format if isinstance(answer_format, str) else _gbnf_of_schema(answer_format)
        self._llama.llama_sampler_free(self._grammar_sampler(text))
        return text

    def _grammar_sampler(self, grammar: str) -> Any:
        sampler = self._llama.llama_sampler_init_grammar(
            self._open_vocab(), grammar.encode("utf-8", errors="replace"), b"root"
        )
        if not sampler or not grammar.strip():
            raise UsageError(f"answer_format: it is no GBNF grammar ({explain()}); correct it")
        return sampler


class ChainSampler:
    """A sampler chain of llama.cpp over the engine's last logits."""

    def __init__(self, engine: GgufEngine, chain: Any) -> None:
        self._engine = engine
        self._chain = chain

    def draw(self, row: int = -1) -> int:
        engine = self._engine
        token_id: int = engine._llama.llama_sampler_sample(self._chain, engine._open_context(), row)
        return token_id

    def accept(self, token_id: int) -> None:
        self._engine._llama.llama_sampler_accept(self._chain, token_id)

    def constrain(self, grammar: str) -> None:
        llama = self._engine._llama
        first = self._engine._grammar_sampler(grammar)
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        llama.llama_sampler_chain_add(chain, first)
        while llama.llama_sampler_chain_n(self._chain):
            step = llama.llama_sampler_chain_remove(self._chain, 0)
            llama.llama_sampler_chain_add(chain, step)
        self.free()
        self._chain = chain

    def free(self) -> None:
        self._engine._llama.llama_sampler_free(self._chain)


def make_chain(
    llama: Any,
    sampling: Sampling,
    *,
    seed: int,
    vocab_size: int,
    n_window: int,
    prompt: Sequence[int],
) -> Any:
    """llama.cpp's samplers in transformers' order, the draw last; to be freed by the caller.

    n_window: how many ids the penalties remember. Raises UsageError for a biased id that there is
    not.
    """
    sampling.check_ids(vocab_size)
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())

    def add(sampler: Any) -> None:
        llama.llama_sampler_chain_add(chain, sampler)

    if sampling.logit_bias:
        biases = (llama.llama_logit_bias * len(sampling.logit_bias))(*sampling.logit_bias)
        add(llama.llama_sampler_init_logit_bias(vocab_size, len(biases), biases))
    if sampling.repetition_penalty != 1:
        repetition = llama.llama_sampler_init_penalties(
            vocab_size, n_window, sampling.repetition_penalty, 0.0, 0.0
        )
        for token_id in prompt:
            llama.llama_sampler_accept(repetition, token_id)
        add(repetition)
    if sampling.presence_penalty != 0 or sampling.frequency_penalty != 0:
        add(
            llama.llama_sampler_init_penalties(
                vocab_size, n_window, 1.0, sampling.frequency_penalty, sampling.presence_penalty
            )
        )
    if sampling.greedy:
        add(llama.llama_sampler_init_greedy())
        return chain
    add(llama.llama_sampler_init_temp(sampling.temperature))
    add(llama.llama_sampler_init_top_k(sampling.top_k))
    add(llama.llama_sampler_init_top_p(sampling.top_p, 1))
    add(llama.llama_sampler_init_min_p(sampling.min_p, 1))
    add(llama.llama_sampler_init_dist(seed))
    return chain


def _gbnf_of_schema(schema: Mapping[str, Any]) -> str:
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        gbnf: str = json_schema_to_gbnf(json.dumps(schema))
    except (
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise UsageError(
            f"answer_format: the JSON schema cannot be turned into a grammar ({error!r}); "
            "use a plainer one"
        ) from error
    return _WITHIN_GBNF.sub(lambda found: _of_json(found[0], found[1]), gbnf)


def _of_json(part: str, excluded: str | None) -> str:
    """A class of all but some characters, without those too that a string of JSON cannot hold."""
    return part if excluded is None else rf"[^\"\\\x7F\x00-\x1F{excluded}]"


def plan_gguf(
    path: Path, header: GgufHeader, settings: EngineSettings, *, kv_type: KvChoice | None = None
) -> GgufPlan:
    """How the file would be loaded, whether it fits or not. kv_type: instead of settings'.

    What is left open is chosen in this order: that it fits, the longest context, all layers on
    GPUs, a kv_cache in f16, the largest batch.
    """
    choice = settings.kv_type if kv_type is None else kv_type
    sizes, n_possible = _model_sizes(path, header, settings)
    devices = find_devices(_library())
    batches = _BATCHES if settings.parallel == 1 else (batch_size(settings.parallel),)
    plans = [
        _plan_as(sizes, devices, settings, n_possible=n_possible, kv_type=one, batch=batch)
        for one in (KV_TYPES if choice == "auto" else (choice,))
        for batch in batches
    ]
    return best_plan(plans)


def _model_sizes(
    path: Path, header: GgufHeader, settings: EngineSettings
) -> tuple[ModelSizes, int]:
    """The numbers that memory follows from, and the longest context."""
    numbers = check_model(path, header)
    head_dim = numbers["embedding_length"] // numbers["attention.head_count"]
    vocab = header.metadata.get("tokenizer.ggml.tokens")
    feed_forward = header.metadata.get(f"{ARCHITECTURE}.feed_forward_length")
    sizes = ModelSizes(
        weights_nbytes=header.file_nbytes - header.data_offset,
        n_layers=numbers["block_count"],
        n_kv_values=2 * numbers["attention.head_count_kv"] * head_dim,
        embedding_length=numbers["embedding_length"],
        feed_forward_length=feed_forward if isinstance(feed_forward, int) else 0,
        vocab_size=len(vocab) if isinstance(vocab, list) else 0,
    )
    return sizes, longest_context(settings.rope, numbers["context_length"])


def _plan_as(
    sizes: ModelSizes,
    devices: Sequence[Device],
    settings: EngineSettings,
    *,
    n_possible: int,
    kv_type: KvType,
    batch: int,
) -> GgufPlan:
    n_context = choose_context(
        settings.context,
        n_possible=n_possible,
        kv_nbytes_per_token=round(
            settings.parallel * sizes.n_layers * sizes.n_kv_values * KV_NBYTES[kv_type]
        ),
        weights_nbytes=sizes.weights_nbytes,
    )
    if settings.parallel > 1 and plan_rope(settings.rope, n_context).native_length not in (
        0,
        n_context,
    ):
        raise UsageError(
            f"rope: a context of {n_context:,} tokens switches to YaRN on its way, which "
            f"{settings.parallel} conversations at once cannot; choose --rope native or --rope yarn"
        )
    return plan_memory(
        sizes,
        devices,
        context=n_context,
        n_sequences=settings.parallel,
        kv_type=kv_type,
        batch=batch,
        n_logits_rows=n_logits_rows(max(1, sizes.vocab_size)),
    )


def plan_alternatives(
    path: Path, header: GgufHeader, settings: EngineSettings
) -> Iterator[GgufPlan]:
    """Smaller ways to load the file, the least painful first."""
    context = plan_gguf(path, header, settings).context
    while context >= _SMALLEST_CONTEXT:
        smaller = dataclasses.replace(settings, context=context)
        for kv_type in KV_TYPES:
            yield plan_gguf(path, header, smaller, kv_type=kv_type)
        context //= 2


def batch_size(n_parallel: int) -> int:
    """Tokens in one llama_decode: a whole micro-batch of one prompt, or a share of each."""
    if n_parallel == 1:
        return PREFILL_BATCH
    return max(PREFILL_BATCH + n_parallel, PREFILL_SHARE * n_parallel)


@cache
def _library() -> Any:
    """llama.cpp, started, with its log going to Python's instead of stderr."""
    from llama_cpp import llama_cpp as llama

    _llama_log.addHandler(logging.NullHandler())  # silent unless the application listens
    llama.llama_log_set(_log_callback(), None)
    llama.llama_backend_init()
    return llama


@cache
def _log_callback() -> Any:
    """Forward llama.cpp's log, each level one lower; cached because llama.cpp keeps its address.

    What it calls an error is one for us only where a call fails, and then the exception says it.
    """
    from llama_cpp import llama_cpp as llama

    levels = {2: logging.DEBUG, 3: logging.INFO, _LLAMA_ERROR: logging.WARNING}

    @llama.llama_log_callback  # type: ignore[untyped-decorator]
    def forward(level: int, text: bytes, _user_data: object) -> None:
        message = text.decode("utf-8", errors="replace").strip()
        if message:
            if level == _LLAMA_ERROR:
                _last_errors.append(message)
            _llama_log.log(levels.get(level, _BELOW_DEBUG), "%s", message)

    return forward


def explain() -> str:
    """What llama.cpp logged last as errors, then forgotten."""
    reason = "; ".join(_last_errors) or "it gives no reason"
    _last_errors.clear()
    return reason
