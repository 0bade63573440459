"""Sampling: whose numbers, in whose order."""

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from llama_cpp import llama_cpp as llama
from numpy.typing import NDArray

from convert.errors import QwqError, UsageError
from qwq_local import QwQ
from qwq_local.engines import gguf, transformers
from qwq_local.sampling import Sampling, sampling_of_generation_config, sampling_of_gguf

VOCAB_SIZE = 1000
PROMPT = [1, 2, 3, 5, 8, 5]
SETTINGS = [
    Sampling(),
    Sampling(temperature=1.3, top_k=0, top_p=0.9),
    Sampling(temperature=0.9, top_k=100, top_p=1.0, min_p=0.05),
    Sampling(temperature=1.5, top_k=0, top_p=0.8, min_p=0.1),
    Sampling(temperature=1.0, top_k=5, top_p=0.5),
    Sampling(temperature=2.0, top_k=1),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=1.2, top_k=0, top_p=1.0, repetition_penalty=1.1, presence_penalty=1.5),
    Sampling(temperature=1.2, top_k=0, top_p=1.0, presence_penalty=-0.5, frequency_penalty=0.7),
    Sampling(top_k=0, frequency_penalty=-1.0, logit_bias=((5, 4.0), (7, -100.0), (9, 1.5))),
]


def llama_probabilities(
    sampling: Sampling, logits: NDArray[np.float32], reply: list[int]
) -> NDArray[np.float64]:
    chain = gguf.make_chain(
        llama, sampling, seed=1, vocab_size=VOCAB_SIZE, n_window=100, prompt=PROMPT
    )
    for token_id in reply:
        llama.llama_sampler_accept(chain, token_id)
    candidates = (llama.llama_token_data * VOCAB_SIZE)(
        *[llama.llama_token_data(i, float(logit), 0.0) for i, logit in enumerate(logits)]
    )
    array = llama.llama_token_data_array(
        data=candidates, size=VOCAB_SIZE, selected=-1, sorted=False
    )
    llama.llama_sampler_apply(chain, ctypes.byref(array))
    probabilities = np.zeros(VOCAB_SIZE)
    for i in range(array.size):
        probabilities[int(array.data[i].id)] = float(array.data[i].p)
    llama.llama_sampler_free(chain)
    return probabilities


def transformers_probabilities(
    sampling: Sampling, logits: NDArray[np.float32], reply: list[int]
) -> NDArray[np.float64]:
    chain = transformers.make_chain(sampling, n_prompt=len(PROMPT))
    scores = chain(torch.tensor([PROMPT + reply]), torch.from_numpy(logits)[None])
    probabilities: NDArray[np.float64] = scores[0].double().softmax(dim=-1).numpy()
    return probabilities


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_the_distribution_is_that_of_transformers_warpers(sampling: Sampling) -> None:
    """Would catch another order of the chain, another cut, a penalty on the wrong ids."""
    rng = np.random.default_rng(0)
    for scale in np.linspace(0.5, 8.0, 40):
        logits = rng.normal(0.0, scale, VOCAB_SIZE).astype(np.float32)
        reply = [int(i) for i in rng.integers(0, VOCAB_SIZE, 20)] + [5, 5, 7, 5]
        ours = llama_probabilities(sampling, logits, reply)
        theirs = transformers_probabilities(sampling, logits, reply)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_transformers_builds_the_same_chain() -> None:
    """Would catch a change of order in transformers itself."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    sampling = Sampling(min_p=0.1, repetition_penalty=1.1)
    model: Any = Qwen2ForCausalLM(config)
    generation = type(model.generation_config)(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
    )
    theirs = model._get_logits_processor(generation, input_ids_seq_length=1)
    ours = transformers.make_chain(sampling, n_prompt=1)
    assert [type(step) for step in ours] == [type(step) for step in theirs]


def test_greedy_takes_the_likeliest() -> None:
    logits = np.random.default_rng(0).normal(size=VOCAB_SIZE).astype(np.float32)
    assert Sampling(temperature=0).greedy
    scores = transformers_probabilities(Sampling(temperature=0), logits, [])
    assert scores.argmax() == logits.argmax()


def test_defaults_come_from_the_files() -> None:
    """Would catch llama.cpp's defaults (min_p 0.05, top_p 0.95 after top_k) slipping in."""
    assert sampling_of_gguf({}) == sampling_of_generation_config({}) == Sampling()
    assert Sampling() == Sampling(0.6, 40, 0.95, 0.0, 1.0, 0.0)
    metadata = {
        "general.sampling.temp": float(np.float32(0.7)),
        "general.sampling.top_k": 20,
        "general.sampling.top_p": float(np.float32(0.8)),
        "general.sampling.min_p": float(np.float32(0.05)),
        "general.sampling.penalty_repeat": float(np.float32(1.05)),
    }
    expected = Sampling(0.7, 20, 0.8, 0.05, 1.05)
    assert sampling_of_gguf(metadata) == expected
    config = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "do_sample": True}
    assert sampling_of_generation_config(config | {"repetition_penalty": 1.05}) == expected
    assert sampling_of_generation_config({"top_k": None}) == Sampling()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 3.0},
        {"frequency_penalty": -2.1},
        {"logit_bias": [[3, 101.0]]},
        {"logit_bias": [[-1, 1.0]]},
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(wrong))}: .* out of range; choose"):
        Sampling(**wrong)


def test_an_id_that_there_is_not_cannot_be_biased(gguf_qwq: QwQ) -> None:
    """Would catch a write past the logits."""
    sampling = Sampling(logit_bias=((gguf_qwq.engine.vocab_size, 1.0),))
    with pytest.raises(UsageError, match=r"^logit_bias: there is no id .*; choose one below"):
        gguf_qwq.ask("Hi", sampling=sampling, max_tokens=1)
    with pytest.raises(UsageError, match="there is no id 8"):
        transformers.make_chain(Sampling(logit_bias=((8, 1.0),)), n_prompt=0)(
            torch.zeros((1, 0), dtype=torch.int64), torch.zeros((1, 8))
        )


def test_a_file_with_a_text_for_a_number_is_refused() -> None:
    with pytest.raises(QwqError, match="no number"):
        sampling_of_gguf({"general.sampling.temp": "warm"})
