"""Checkpoint folders through transformers: unquantized ones, and GPTQ ones with GPTQModel."""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from convert.errors import CheckpointError, QwqError, UsageError
from qwq_local.description import read_json
from qwq_local.engine import EngineSettings, OnProgress
from qwq_local.engines.folder import (
    Folder,
    find_torch_device,
    import_torch,
    plan_folder,
    read_folder,
    smaller_plans,
    torch_device,
)
from qwq_local.engines.loop import EngineLoop, Sampler
from qwq_local.memory import usable_cores
from qwq_local.memory_plan import check_fits
from qwq_local.rope import Yarn, plan_rope
from qwq_local.sampling import Sampling

if TYPE_CHECKING:
    import torch

    from qwq_local.engines.buffers import FixedSteps, KvBuffers

_log = logging.getLogger(__name__)
_quiet = threading.Lock()  # streams and the level of logging are the whole process's


class TransformersEngine(EngineLoop):
    """A Qwen2 checkpoint in torch, on CUDA or MPS where there is one, else on the CPU.

    On a CPU everything is computed in float32, whatever the file holds: the exact reference.
    On a GPU in the file's own type. settings.threads is torch's for the whole process.
    Raises CheckpointError where the folder cannot be loaded.
    """

    def __init__(
        self, path: Path, settings: EngineSettings, *, on_progress: OnProgress | None = None
    ) -> None:
        torch = import_torch(path)
        folder, free = read_folder(path), find_torch_device(torch)
        self.memory_plan = plan_folder(folder, settings, free)
        check_fits(self.memory_plan, smaller_plans(folder, settings, free), path)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self._path = path
        self._torch = torch
        self._tokenizer, self._plain_tokenizer = _load_tokenizers(folder)
        self._bytes_of_symbol = _bytes_of_symbols()
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.control_tokens = {
            token.content: token_id for token_id, token in added.items() if token.special
        }
        self._device = torch_device(torch)
        with _quietly():
            self._model: Any = _load_model(folder, self._device, on_progress)
        super().__init__(
            vocab_size=folder.model.vocab_size,
            rope_plan=plan_rope(settings.rope, self.memory_plan.context),
        )
        self._kv_cache: KvBuffers
        self._steps: FixedSteps | None = None
        self._logits: Any = None  # (n, vocab_size) of the last forward pass
        self._set_rope(self._rope)
        if on_progress is not None:
            on_progress(100, 100)

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        tokenizer = self._tokenizer if parse_special else self._plain_tokenizer
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            text: str = self._added[token_id]
            return text.encode()
        symbols = self._tokenizer.id_to_token(token_id) or ""
        return bytes(self._bytes_of_symbol[symbol] for symbol in symbols)

    def close(self) -> None:
        with self._lock:
            self._model = self._steps = self._logits = None
            self._kv_cache.layers.clear()
            self.stash.clear()

    def grammar(self, answer_format: Mapping[str, Any] | str) -> str:  # noqa: ARG002
        raise UsageError(
            "answer_format: only GGUF files can be held to a grammar; use one, or ask in words"
        )

    def _set_rope(self, rope: Yarn | None) -> None:
        from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

        from qwq_local.engines.buffers import FixedSteps, KvBuffers, graph_capture

        model = self._open_model()
        config = copy.deepcopy(model.config)
        parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
        if rope is not None:
            parameters |= {
                "rope_type": "yarn",
                "factor": rope.factor,
                "original_max_position_embeddings": rope.original_length,
            }
        config.rope_parameters = parameters
        model.model.rotary_emb = Qwen2RotaryEmbedding(config).to(self._device)
        self._kv_cache = KvBuffers(config.num_hidden_layers, self.rope_plan.room(rope))
        if self._device.type == "cuda":
            self._steps = FixedSteps(model, self._kv_cache, graph_capture())

    def _trim(self, n_kept: int) -> None:
        self._kv_cache.n_filled = min(n_kept, self._kv_cache.n_filled)

    def _export(self) -> bytes:
        from safetensors.torch import save

        return save(self._kv_cache.tensors()) if self._kv_cache.n_filled else b""

    def _import(self, state: bytes) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load

        if not state:
            return
        try:
            tensors = load(state)
            self._check_dtype({tensor.dtype for tensor in tensors.values()})
            with self._torch.inference_mode():
                for index in range(self._open_model().config.num_hidden_layers):
                    keys, values = (tensors[f"{kind}.{index}"] for kind in ("keys", "values"))
                    self._kv_cache.update(keys.to(self._device), values.to(self._device), index)
            self._kv_cache.n_filled = keys.shape[2]
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise QwqError(
                f"{self._path}: the saved kv_cache is of another model ({error}); load the session "
                "without it"
            ) from error

    def _check_dtype(self, saved: set[Any]) -> None:
        """Another type, as a GPU's, would be read on with, or rounded to this one."""
        expected = self._open_model().dtype
        if saved != {expected}:
            names = ", ".join(sorted(map(str, saved)))
            raise QwqError(
                f"{self._path}: the saved kv_cache holds {names} and this model computes in "
                f"{expected}; open it on a device like that which saved it, or load the session "
                "without the kv_cache"
            )

    def _feed(self, ids: Sequence[int], *, all_logits: bool) -> None:
        model = self._open_model()
        with self._torch.inference_mode():
            if self._steps is not None and len(ids) == 1 and self._kv_cache.n_filled:
                self._logits = self._steps.step(ids[0])
            else:
                output = model(
                    input_ids=self._torch.tensor([ids], device=self._device),
                    past_key_values=self._kv_cache,
                    use_cache=True,
                    logits_to_keep=0 if all_logits else 1,  # 0 keeps all
                )
                self._logits = output.logits[0]
        self._kv_cache.n_filled += len(ids)

    def _open_model(self) -> Any:
        if self._model is None:
            raise QwqError(f"{self._path}: the model is closed; open it again")
        return self._model

    def _read_logits(self, n: int) -> NDArray[np.float32]:
        array: NDArray[np.float32] = self._logits[-n:].float().cpu().numpy()
        return array

    @contextmanager
    def _sampler(self, sampling: Sampling, seed: int, prompt: Sequence[int]) -> Iterator[Sampler]:
        yield _WarperSampler(self, sampling, seed, list(prompt))


class _WarperSampler:
    """transformers' warpers over the engine's last logits, on the CPU."""

    def __init__(
        self, engine: TransformersEngine, sampling: Sampling, seed: int, seen: list[int]
    ) -> None:
        self._engine = engine
        self._greedy = sampling.greedy
        self._generator = engine._torch.Generator().manual_seed(seed)
        self._seen = seen
        self._chain = make_chain(sampling, n_prompt=len(seen))

    def draw(self, row: int = -1) -> int:
        torch = self._engine._torch
        logits = self._engine._logits[row].float().cpu()[None]
        scores = self._chain(torch.tensor([self._seen]), logits)
        if self._greedy:
            token_id = int(scores[0].argmax())
        else:
            probabilities = scores[0].softmax(dim=-1)
            token_id = int(torch.multinomial(probabilities, 1, generator=self._generator))
        self._seen.append(token_id)
        return token_id

    def accept(self, token_id: int) -> None:
        self._seen.append(token_id)

    def constrain(self, grammar: str) -> None:
        self._engine.grammar(grammar)


def make_chain(sampling: Sampling, *, n_prompt: int) -> Any:
    """transformers' own processors and warpers in its order, as `generate` would build them.

    Called with ids (1, n) and logits (1, vocab_size); returns logits. Biases and the penalties
    that transformers lacks are ours; they look at the ids after the first n_prompt.
    """
    import torch
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    def bias(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        sampling.check_ids(scores.shape[1])
        scores = scores.clone()
        for token_id, value in sampling.logit_bias:
            scores[0, token_id] += value
        return scores

    def penalize(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen, counts = torch.unique(input_ids[0, n_prompt:], return_counts=True)
        scores = scores.clone()
        scores[0, seen] -= sampling.presence_penalty + counts * sampling.frequency_penalty
        return scores

    chain: Any = LogitsProcessorList()
    if sampling.logit_bias:
        chain.append(bias)
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.presence_penalty != 0 or sampling.frequency_penalty != 0:
        chain.append(penalize)
    if sampling.greedy:
        return chain
    chain.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        chain.append(MinPLogitsWarper(float(sampling.min_p)))
    return chain


def _load_model(folder: Folder, device: Any, on_progress: OnProgress | None) -> Any:
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if folder.is_gptq and usable_cores() <= 2:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer its pool cannot start
    on_cpu = device.type == "cpu"
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    bars = logging.set_tqdm_hook(None if on_progress is None else _hook(on_progress))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder.path,
            dtype=torch.float32 if on_cpu else "auto",
            device_map={"": device},
            local_files_only=True,
        )
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        ImportError,
        RuntimeError,
        LookupError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        reason = " ".join(str(error).split())[:300] or repr(error)
        raise CheckpointError(
            f"{folder.path}: transformers cannot load it ({reason}); make or fetch the folder again"
        ) from error
    finally:
        logging.set_tqdm_hook(bars)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _hook(on_progress: OnProgress) -> Callable[..., Any]:
    """What tells of transformers' loop over the weights, in place of its own bar."""

    def counted(items: Collection[Any]) -> Iterator[Any]:
        for n_done, item in enumerate(items):
            on_progress(100 * n_done // len(items), 100)
            yield item

    def begin(make_bar: Callable[..., Any], arguments: Any, options: Any) -> Any:
        if options.get("desc") == "Loading weights":
            return counted(*arguments)
        return make_bar(*arguments, **options)

    return begin


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the streams clean: GPTQModel prints to stdout, and torch's extensions warn.

    One load at a time, so that each puts back what it found.
    """
    printed = io.StringIO()
    with _quiet, warnings.catch_warnings(), redirect_stdout(printed):
        warnings.simplefilter("ignore")
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
    for line in filter(None, map(str.strip, printed.getvalue().splitlines())):
        _log.debug("%s", line)


def _load_tokenizers(folder: Folder) -> tuple[Any, Any]:
    """The tokenizer twice: with special tokens parsed, and with special tokens as text."""
    from tokenizers import Tokenizer

    path = folder.path / "tokenizer.json"
    source = json.dumps(read_json(path))
    try:
        tokenizer, plain = Tokenizer.from_str(source), Tokenizer.from_str(source)
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(
            f"{path}: tokenizers cannot load it ({error}); fetch the file again"
        ) from error
    last_id = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if last_id >= folder.model.vocab_size:
        raise CheckpointError(
            f"{path}: it has the id {last_id:,} and the model {folder.model.vocab_size:,} rows; "
            "fetch tokenizer and weights of one model"
        )
    plain.encode_special_tokens = True
    return tokenizer, plain


def _bytes_of_symbols() -> dict[str, int]:
    """The byte behind each symbol of a byte-level BPE.

    Bytes that are printable in Latin-1 stand for themselves, the others, in order, for the
    characters from U+0100 on. Source: Radford et al. 2019 (GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }
