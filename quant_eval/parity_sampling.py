"""The distribution that a file is sampled from, held against transformers' own warpers."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwq_local.sampling import Sampling

NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What a model's files say of sampling."""
SEQUENCE = "general.sampling.sequence"
_VOCAB_SIZE = 400
_SEEN = (1, 2, 3, 5, 8, 5)  # ids that a penalty is for
_TOLERANCE = 1e-4  # of a probability: both sides round to float32
_STEPS = {
    "RepetitionPenaltyLogitsProcessor": ("penalties",),
    "TemperatureLogitsWarper": ("temperature", "temp"),
    "TopKLogitsWarper": ("top_k", "top-k"),
    "TopPLogitsWarper": ("top_p", "top-p", "nucleus"),
    "MinPLogitsWarper": ("min_p", "min-p"),
}
"""transformers' steps by llama.cpp's names in general.sampling.sequence."""

Logits = NDArray[np.float32]
Probabilities = NDArray[np.float64]


def generation_config(checkpoint: Path) -> Any:
    """The checkpoint's GenerationConfig, where it has none transformers' own by its config.json."""
    from transformers import AutoConfig, GenerationConfig

    if (checkpoint / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(checkpoint, local_files_only=True)
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    return GenerationConfig.from_model_config(config)


def expected_sampling(generation: Any) -> Sampling:
    """What a GenerationConfig says; QwQ's own for each number that it leaves open."""
    values = {name: getattr(generation, name) for name in NAMES}
    return replace(Sampling(), **{name: one for name, one in values.items() if one is not None})


def sampling_problem(
    found: Sampling, generation: Any, metadata: Mapping[str, object] | None
) -> str:
    """What is wrong with a file's sampling, in words; "" where nothing is.

    Both chains are given the same table of logits, among them such that another order of the
    steps chooses among other ids. metadata: a GGUF file's; None for a folder.
    """
    expected = expected_sampling(generation)
    differing = [
        f"{name} is {getattr(found, name):g} and {getattr(expected, name):g} by the checkpoint"
        for name in NAMES
        if getattr(found, name) != getattr(expected, name)
    ]
    if differing or expected.greedy:
        return "; ".join(differing)
    steps = _reference_steps(generation, expected)
    table = _table()
    theirs = [_reference_probabilities(steps, row) for row in table]
    run = _folder_probabilities if metadata is None else _llama_probabilities
    apart = _largest_difference([run(found, row) for row in table], theirs)
    if apart > _TOLERANCE:
        return f"gives an id another probability than transformers does, by up to {apart:.2g}"
    sequence = None if metadata is None else metadata.get(SEQUENCE)
    if not isinstance(sequence, str):
        return ""
    ordered = [_reference_probabilities(_in_order(steps, sequence), row) for row in table]
    apart = _largest_difference(ordered, theirs)
    if apart > _TOLERANCE:
        return (
            f"{SEQUENCE} is {sequence}, which gives an id another probability than transformers' "
            f"order, by up to {apart:.2g}"
        )
    return ""


def _table() -> Logits:
    """Logits from nearly even ones to peaked ones, (n, _VOCAB_SIZE)."""
    rng = np.random.default_rng(0)
    scales = np.linspace(0.5, 8.0, 20)[:, None]
    return (scales * rng.standard_normal((len(scales), _VOCAB_SIZE))).astype(np.float32)


def _largest_difference(ours: Sequence[Probabilities], theirs: Sequence[Probabilities]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def _reference_steps(generation: Any, sampling: Sampling) -> Sequence[Any]:
    """The processors that transformers' `generate` would build."""
    import copy

    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes: dict[str, Any] = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 8)
    numbers: dict[str, Any] = dict.fromkeys(
        ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1
    )
    model: Any = Qwen2ForCausalLM(Qwen2Config(**sizes, **numbers))
    asked = copy.deepcopy(generation)
    asked.do_sample = True
    for name in NAMES:
        setattr(asked, name, getattr(sampling, name))
    steps: Sequence[Any] = model._get_logits_processor(asked, input_ids_seq_length=len(_SEEN))
    return steps


def _in_order(steps: Sequence[Any], sequence: str) -> list[Any]:
    """The steps as a file names them: those that it leaves out do not take place."""
    wanted = [name.strip() for name in sequence.split(";")]
    return [
        step
        for name in wanted
        for step in steps
        if name in _STEPS.get(type(step).__name__, (type(step).__name__,))
    ]


def _reference_probabilities(steps: Sequence[Any], logits: Logits) -> Probabilities:
    import torch

    seen, scores = torch.tensor([_SEEN]), torch.from_numpy(logits)[None]
    for step in steps:
        scores = step(seen, scores)
    probabilities: Probabilities = scores[0].double().softmax(dim=-1).numpy()
    return probabilities


def _folder_probabilities(sampling: Sampling, logits: Logits) -> Probabilities:
    from qwq_local.engines import transformers

    return _reference_probabilities(transformers.make_chain(sampling, n_prompt=len(_SEEN)), logits)


def _llama_probabilities(sampling: Sampling, logits: Logits) -> Probabilities:
    from llama_cpp import llama_cpp as llama

    from qwq_local.engines import gguf

    chain = gguf.make_chain(
        llama, sampling, seed=0, vocab_size=len(logits), n_window=len(_SEEN), prompt=_SEEN
    )
    candidates = (llama.llama_token_data * len(logits))(
        *[llama.llama_token_data(i, float(logit), 0.0) for i, logit in enumerate(logits)]
    )
    array = llama.llama_token_data_array(candidates, len(logits), -1, False)
    llama.llama_sampler_apply(chain, ctypes.byref(array))
    probabilities = np.zeros(len(logits))
    for i in range(array.size):
        probabilities[int(array.data[i].id)] = float(array.data[i].p)
    llama.llama_sampler_free(chain)
    return probabilities
