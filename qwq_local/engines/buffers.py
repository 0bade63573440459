"""A kv_cache in buffers that stay in place, and decoding over it in shapes that stay the same.

Import it where torch and transformers are there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from qwq_local.engines.folder import STEP_UNIT

_log = logging.getLogger(__name__)

Tensor = torch.Tensor
Run = Callable[[], Tensor]


class KvBuffers(Cache):
    """Keys and values of all layers, (1, n_kv_heads, n_max, head_dim) each.

    n_filled positions hold something; whoever runs the model counts them up afterwards. position:
    where a step of fixed shape writes, (1,), which sees n_visible positions; else None.
    """

    def __init__(self, n_layers: int, n_max: int) -> None:
        self.n_max = n_max
        self.n_filled = 0
        self.position: Tensor | None = None
        self.n_visible = 0
        super().__init__(layers=[_LayerBuffers(self) for _ in range(n_layers)])

    def tensors(self) -> dict[str, Tensor]:
        """Copies of what is filled."""
        return {
            f"{kind}.{index}": getattr(layer, kind)[:, :, : self.n_filled].contiguous()
            for index, layer in enumerate(self.layers)
            for kind in ("keys", "values")
        }


class _LayerBuffers(CacheLayerMixin):
    def __init__(self, cache: KvBuffers) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # noqa: ARG002
        shape = (*key_states.shape[:2], self._cache.n_max, key_states.shape[3])
        self.keys, self.values = _zeros(shape, key_states), _zeros(shape, key_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        cache = self._cache
        if cache.position is None:
            n_visible = cache.n_filled + key_states.shape[2]
            self.keys[:, :, cache.n_filled : n_visible] = key_states
            self.values[:, :, cache.n_filled : n_visible] = value_states
        else:
            n_visible = cache.n_visible
            self.keys.index_copy_(2, cache.position, key_states)
            self.values.index_copy_(2, cache.position, value_states)
        return self.keys[:, :, :n_visible], self.values[:, :, :n_visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.n_filled + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.n_filled

    def get_max_length(self) -> int:
        return self._cache.n_max


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros, since a masked position that holds NaN would still spoil its row of attention.

    On a CPU they take no memory until they are written, which torch.zeros would do at once.
    """
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    zeros = np.zeros(math.prod(shape) * like.element_size(), np.uint8)
    return torch.from_numpy(zeros).view(like.dtype).view(shape)


class FixedSteps:
    """Decodes one id after the other, each kind of step captured once and then repeated.

    capture: turns a step into one that repeats it without Python, as graph_capture's does. What it
    gives is held against the step itself; where it fails or differs, steps stay as they are. The
    step that sees most is captured first, since the others then find room in its memory.
    """

    def __init__(self, model: Any, cache: KvBuffers, capture: Callable[[Run], Run]) -> None:
        self._model = model
        self._cache = cache
        self._capture: Callable[[Run], Run] | None = capture
        self._id = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        self._position = torch.zeros(1, dtype=torch.long, device=model.device)
        self._steps: dict[int, Run] = {}

    def step(self, token_id: int) -> Tensor:
        """Logits after one more id, (1, vocab_size), good until the next step."""
        n_units = self._cache.n_filled // STEP_UNIT + 1
        n_visible = min(n_units * STEP_UNIT, self._cache.n_max)
        self._id.fill_(token_id)
        self._position.fill_(self._cache.n_filled)
        for n in (n_visible,) if self._steps else (self._cache.n_max, n_visible):
            if n not in self._steps:
                self._steps[n] = self._captured(partial(self._run, n))
        return self._steps[n_visible]()

    def _run(self, n_visible: int) -> Tensor:
        cache = self._cache
        visible = torch.arange(n_visible, device=self._id.device) <= self._position
        cache.position, cache.n_visible = self._position, n_visible
        try:
            output = self._model(
                input_ids=self._id,
                position_ids=self._position[None],
                attention_mask={"full_attention": visible[None, None, None]},
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        finally:
            cache.position = None
        logits: Tensor = output.logits[0]
        return logits

    def _captured(self, run: Run) -> Run:
        if self._capture is None:
            return run
        expected = run().clone()
        try:
            repeat = self._capture(run)
            logits = repeat()
        except RuntimeError as error:
            reason = str(error)
        else:
            if torch.allclose(logits, expected, rtol=1e-3, atol=1e-2 * float(expected.std())):
                return repeat
            reason = "it gives other logits"
        _log.warning("decoding is not captured as a graph, and slower: %s", reason)
        self._capture = None
        return run


def graph_capture() -> Callable[[Run], Run]:
    """What captures steps as CUDA graphs that share their memory.

    So they run one at a time, and what one gives is spoilt by the next.
    """
    return partial(_capture_graph, torch.cuda.graph_pool_handle())


def _capture_graph(pool: Any, run: Run) -> Run:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()  # lazy initialization of kernels is not to be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        logits = run()

    def repeat() -> Tensor:
        graph.replay()
        return logits

    return repeat
