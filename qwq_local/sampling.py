"""Which tokens may follow: the numbers of the sampler chain, and where their defaults come from."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convert.errors import QwqError, UsageError

MAX_SEED = 2**32 - 2  # one below llama.cpp's mark for "any seed"
MAX_BIAS = 100
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampler chain: biases, penalties, then temperature, top_k, top_p, min_p, then one draw.

    That is transformers' order, in which QwQ's numbers were chosen. temperature 0 is greedy;
    top_k 0, top_p 1, min_p 0, repetition_penalty 1 and other penalties 0 switch a step off.
    repetition_penalty looks at the prompt and the reply, the others at the reply alone:
    presence_penalty is taken off the logit of each id in it once, frequency_penalty each time.
    logit_bias: pairs of an id and what is added to its logit. top_logprobs: how many of the
    likeliest ids are told with each id that is drawn, and its own logprob; None tells nothing.
    Defaults: QwQ-32B's generation_config.json. Raises UsageError for a number out of range.
    """

    temperature: float = 0.6
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        pairs = tuple((token_id, bias) for token_id, bias in self.logit_bias)
        object.__setattr__(self, "logit_bias", pairs)  # from JSON it comes as lists
        for token_id, bias in pairs:
            if token_id < 0 or not -MAX_BIAS <= bias <= MAX_BIAS:
                raise UsageError(
                    f"logit_bias: {bias} for id {token_id} is out of range; choose ids from 0 on "
                    f"and values from {-MAX_BIAS} to {MAX_BIAS}"
                )
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise UsageError(
                f"top_logprobs: {self.top_logprobs} is out of range; choose a number from 0 to "
                f"{MAX_TOP_LOGPROBS}"
            )
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(
                    f"{name}: {value} is out of range; choose a value from {low:g} to {high:g}"
                )

    def check_ids(self, vocab_size: int) -> None:
        """Raises UsageError where an id is biased that a model does not have."""
        for token_id, _ in self.logit_bias:
            if token_id >= vocab_size:
                raise UsageError(
                    f"logit_bias: there is no id {token_id}, for the model has {vocab_size:,}; "
                    "choose one below"
                )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def choose_seed(seed: int | None) -> int:
    """The seed as it was given, or one that is drawn. Raises UsageError where it is no seed."""
    if seed is None:
        return secrets.randbelow(MAX_SEED + 1)
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"seed: {seed} is out of range; choose a number from 0 to {MAX_SEED}")
    return seed


_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 10.0),
    "top_k": (0, 2**31 - 1),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 10.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}

_GGUF_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def sampling_of_gguf(metadata: Mapping[str, Any]) -> Sampling:
    """The defaults that a GGUF file carries; QwQ's for each key it lacks."""
    return _from_table({name: metadata.get(key) for name, key in _GGUF_KEYS.items()})


def sampling_of_generation_config(config: Mapping[str, Any]) -> Sampling:
    """The defaults of a checkpoint's generation_config.json; QwQ's for each key it lacks."""
    return _from_table({name: config.get(name) for name in _RANGES})


def _from_table(values: Mapping[str, Any]) -> Sampling:
    known = {name: value for name, value in values.items() if value is not None}
    for name, value in known.items():
        if type(value) not in (int, float) or (name == "top_k" and value % 1):
            raise QwqError(
                f"{name}: the model's default is {str(value)[:40]!r}, no number of its kind; "
                "correct its files"
            )
        # a GGUF holds float32: 0.6 comes back as 0.6000000238, and is meant as 0.6
        known[name] = int(value) if name == "top_k" else float(f"{float(value):.6g}")
    return Sampling(**known)
