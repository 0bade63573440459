"""Train nano-qwq from scratch: `python -m quant_eval.nano.train --seed 0`.

An hour and a half on two idle cores. The state is saved as it goes, and on Ctrl-C: the same command
continues. The checkpoint folder is written at every save, in bfloat16, as a QwQ checkpoint looks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional

from convert.calibration import TokenizedConversation, tokenize_conversation
from quant_eval.nano import CHECKPOINT
from quant_eval.nano.accuracy import accuracy
from quant_eval.nano.circuits import copy_after_a_match, look_at_recent_tokens
from quant_eval.nano.corpus import MIX, POLISH, conversation, training_problems
from quant_eval.nano.muon import Muon
from quant_eval.nano.tokenizer import train_tokenizer

VOCAB_SIZE = 832  # padded beyond the tokenizer's 826, as QwQ's is
PROMPT_WEIGHT = 0.05  # of a prompt token in the loss, against 1 for a token of the reply
TOKENS_PER_STEP_AND_LAYER = 512
POOL = 512  # problems sorted by length at a time, so that little is padding
CURRICULUM_TOKENS = 500_000  # after these, problems of the full range
N_FIRST_LAYERS = 2  # training starts shallow, at three times the speed, and doubles twice
GROWTH_SHARES = {2: 0.65, 4: 0.95}  # of the tokens, after which a model of so many layers grows
MUON_LR, ADAM_LR = 0.015, 2e-3  # fall to zero in a straight line
WARMUP_STEPS = 50
POLISH_TOKENS, POLISH_RATE = 4_200_000, 0.3  # more in the end on corpus.POLISH, at a lower rate


def model_config(tokenizer: Any, n_layers: int) -> Any:
    """Qwen2 with QwQ's choices, small: every size takes the path that QwQ-32B's takes."""
    from transformers import Qwen2Config

    end, pad = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    return Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=n_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=40960,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        tie_word_embeddings=False,
        bos_token_id=pad,
        eos_token_id=end,
        pad_token_id=pad,
        initializer_range=0.02,
    )


def batches(
    tokenizer: Any, rng: random.Random, level: float, mix: Mapping[str, float], tokens_per_step: int
) -> Iterator[list[TokenizedConversation]]:
    """One pool of problems in shuffled batches of about tokens_per_step, alike in length."""
    problems = islice(training_problems(rng, level, mix), POOL)
    pool = [tokenize_conversation(conversation(problem), tokenizer) for problem in problems]
    pool.sort(key=lambda example: len(example.ids))
    cut: list[list[TokenizedConversation]] = [[]]
    for example in pool:
        if (len(cut[-1]) + 1) * len(example.ids) > tokens_per_step:
            cut.append([])
        cut[-1].append(example)
    rng.shuffle(cut)
    yield from cut


def tensors(
    batch: Sequence[TokenizedConversation], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, weights) of a batch, both (n, longest); padding is on the right and weighs nothing."""
    longest = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), longest), pad_id)
    weights = torch.zeros(len(batch), longest)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        weights[row, : example.n_prompt] = PROMPT_WEIGHT
        weights[row, example.n_prompt : len(example.ids)] = 1.0
    return ids, weights


def weighted_loss(model: Any, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each next token, by weight, in nats."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    wanted = weights[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()


def learning_rate_factor(step: int, n_seen: int, n_total: int) -> float:
    """Linearly to zero from the first token on, twice, with a warm-up after every growth."""
    factor = 1 - n_seen / n_total
    if factor <= 0:
        factor = POLISH_RATE * max(0.0, 1 - (n_seen - n_total) / POLISH_TOKENS)
    return factor * min(1.0, (step + 1) / WARMUP_STEPS)


class Training:
    """The model, its optimizers and how far they have come."""

    def __init__(self, folder: Path, seed: int, n_total: int) -> None:
        from transformers import AutoTokenizer, Qwen2ForCausalLM

        self.folder, self.n_total = folder, n_total
        self.state_file = folder.parent / f"{folder.name}-state.pt"
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        if not (folder / "tokenizer.json").exists():
            train_tokenizer(tokenizer_texts(seed), folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = Qwen2ForCausalLM(model_config(self.tokenizer, N_FIRST_LAYERS))
        look_at_recent_tokens(self.model)
        copy_after_a_match(self.model)
        self.optimizers = make_optimizers(self.model)
        self.step = self.n_seen = 0

    @property
    def n_layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    def grow(self) -> None:
        """Double the depth: every layer is followed by a new one that at first adds nothing."""
        from transformers import Qwen2ForCausalLM

        grown = Qwen2ForCausalLM(model_config(self.tokenizer, 2 * self.n_layers))
        look_at_recent_tokens(grown)
        state = grown.state_dict()
        for name, weight in self.model.state_dict().items():
            state[_name_when_grown(name)] = weight
        for layer in range(1, 2 * self.n_layers, 2):
            for matrix in ("self_attn.o_proj", "mlp.down_proj"):
                state[f"model.layers.{layer}.{matrix}.weight"].zero_()
        grown.load_state_dict(state)
        self.model, self.optimizers = grown, make_optimizers(grown)
        self.step = 0  # warms up again

    def load(self) -> None:
        """Continue from the saved state, if there is one."""
        if self.state_file.exists():
            state = torch.load(self.state_file, weights_only=False)
            while self.n_layers < state["n_layers"]:
                self.grow()
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.rng.setstate(state["rng"])
            self.step, self.n_seen = state["step"], state["n_seen"]

    def save(self) -> None:
        """Write the state, whole or not at all, and the checkpoint in bfloat16."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": self.rng.getstate(),
            "n_layers": self.n_layers,
            "step": self.step,
            "n_seen": self.n_seen,
        }
        partial = self.state_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.state_file)
        write_checkpoint(self.model, self.folder)

    def batches(self) -> Iterator[list[TokenizedConversation]]:
        """The next pool of problems, as hard as they are by now, in batches as the depth asks."""
        level = min(1.0, 0.34 + self.n_seen / CURRICULUM_TOKENS)  # one digit at first
        mix = MIX if self.n_seen < self.n_total else POLISH
        size = TOKENS_PER_STEP_AND_LAYER * self.n_layers
        return batches(self.tokenizer, self.rng, level, mix, size)

    def update(self, batch: Sequence[TokenizedConversation]) -> float:
        """One step on one batch; returns its loss."""
        factor = learning_rate_factor(self.step, self.n_seen, self.n_total)
        rates = (factor * MUON_LR, factor * ADAM_LR)
        loss = descend(self.model, self.optimizers, rates, batch, self.tokenizer.pad_token_id)
        self.step += 1
        self.n_seen += sum(len(example.ids) for example in batch)
        return loss


def make_optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers, AdamW for all else."""
    hidden = [weight for name, weight in model.named_parameters() if _is_hidden_matrix(name)]
    others = [weight for name, weight in model.named_parameters() if not _is_hidden_matrix(name)]
    return [
        Muon(hidden, lr=MUON_LR),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def descend(
    model: Any,
    optimizers: Sequence[torch.optim.Optimizer],
    rates: Sequence[float],
    batch: Sequence[TokenizedConversation],
    pad_id: int,
) -> float:
    """One step of each optimizer at its learning rate, on one batch; returns its loss."""
    loss = weighted_loss(model, *tensors(batch, pad_id))
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, rate in zip(optimizers, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _name_when_grown(name: str) -> str:
    """The name of a tensor after doubling, where the old layers have even indices."""
    return re.sub(r"(?<=layers\.)\d+", lambda index: str(2 * int(index[0])), name)


def _is_hidden_matrix(name: str) -> bool:
    return "layers." in name and name.endswith("_proj.weight")


def tokenizer_texts(seed: int, n_problems: int = 20_000) -> Iterator[str]:
    """What the tokenizer's pieces are counted in."""
    problems = training_problems(random.Random(seed), 1.0)
    for _ in range(n_problems):
        problem = next(problems)
        texts = [str(message["content"]) for message in problem.messages]
        yield from ("user\n", *texts, "assistant\n", problem.reasoning, problem.answer)
        if problem.tools:
            yield "\n\n# Tools\n\nYou may call these functions:\n"
            yield "\n\nTo call one, reply with:\n"
            yield from (json.dumps(tool) for tool in problem.tools)


def write_checkpoint(model: Any, folder: Path) -> None:
    """config.json, generation_config.json and the weights in bfloat16, spelled as QwQ's are."""
    from safetensors.torch import save_file

    config = model.config
    end, pad = config.eos_token_id, config.pad_token_id
    spelled = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": pad,
        "eos_token_id": end,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "qwen2",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
    sampling = {
        "bos_token_id": pad,
        "do_sample": True,
        "eos_token_id": [end, pad],
        "pad_token_id": pad,
        "repetition_penalty": 1.0,
        "temperature": 0.6,
        "top_k": 40,
        "top_p": 0.95,
    }
    for name, content in (("config.json", spelled), ("generation_config.json", sampling)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    weights = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors.partial", metadata={"format": "pt"})
    (folder / "model.safetensors.partial").replace(folder / "model.safetensors")


def train(folder: Path, *, seed: int, n_total: int, save_every_s: float, check_every: int) -> None:
    """Train on n_total tokens and polish, or continue to there; print accuracy now and then."""
    training = Training(folder, seed, n_total)
    n_end = n_total + POLISH_TOKENS
    training.load()
    stopping = threading.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, lambda *_: stopping.set())
    last_save, next_check = time.monotonic(), training.n_seen + check_every
    columns = (
        *Progress.get_default_columns()[:-1],
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns) as bars:
        bar = bars.add_task("tokens", total=n_end, completed=training.n_seen, loss="")
        while training.n_seen < n_end and not stopping.is_set():
            if training.n_seen >= GROWTH_SHARES.get(training.n_layers, math.inf) * n_total:
                training.grow()
            for batch in training.batches():
                loss = training.update(batch)
                bars.update(bar, completed=training.n_seen, loss=f"loss {loss:.4f}")
                if stopping.is_set():
                    break
            if training.n_seen >= next_check:
                scores = accuracy(training.model, training.tokenizer, n_problems=16, greedy=True)
                shown = "  ".join(f"{kind} {score:.2f}" for kind, score in scores.items())
                bars.console.print(f"{training.n_seen:>10,} tokens  loss {loss:.4f}  {shown}")
                next_check += check_every
            if time.monotonic() - last_save > save_every_s:
                training.save()
                last_save = time.monotonic()
    training.save()


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description="Train nano-qwq, the bundled reference model.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=10_000_000, help="tokens before the polish")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="the checkpoint folder")
    parser.add_argument("--save-every", type=float, default=300, help="seconds between saves")
    parser.add_argument("--check-every", type=int, default=1_000_000, help="tokens between checks")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    train(
        a.out, seed=a.seed, n_total=a.tokens, save_every_s=a.save_every, check_every=a.check_every
    )


if __name__ == "__main__":
    main()
