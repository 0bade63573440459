"""nano-qwq: sizes, tokenizer and template as QwQ's, a recipe that resumes, promised figures."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.calibration import load_conversations
from convert.checkpoint import Checkpoint
from quant_eval.nano import CHECKPOINT, corpus, train
from quant_eval.nano.accuracy import N_PROBLEMS, accuracy, load_reference
from quant_eval.nano.corpus import MIX
from quant_eval.nano.muon import orthogonalize
from quant_eval.nano.tokenizer import ADDED_TOKENS, CHAT_TEMPLATE, SPECIAL_TOKENS
from quant_eval.tasks import TASKS

PROMISED = {kind: 0.95 if kind in ("arithmetic", "compare", "letters") else 0.9 for kind in TASKS}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    return load_reference()


@pytest.fixture
def model(reference: tuple[Any, Any]) -> Any:
    return reference[0]


@pytest.fixture
def tokenizer(reference: tuple[Any, Any]) -> Any:
    return reference[1]


def test_sizes_take_the_paths_of_the_32b(model: Any) -> None:
    """Catches a size that would leave a path of the converter or the type mixes untested."""
    config = model.config
    assert config.hidden_size % 256 == 0
    assert config.intermediate_size % 256 == 0
    assert config.num_attention_heads >= 4 * config.num_key_value_heads
    assert config.num_hidden_layers >= 8  # else the first eighth of the layers is empty
    assert not config.tie_word_embeddings
    assert config.rope_parameters["rope_theta"] == 1e6
    with Checkpoint.open(CHECKPOINT) as checkpoint:
        assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"BF16"}
    assert 4e6 <= sum(weight.numel() for weight in model.parameters()) <= 8e6
    assert model.model.layers[0].self_attn.k_proj.bias.abs().max() > 0
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 20_000_000


def test_the_tokenizer_is_qwqs_but_for_its_merges(tokenizer: Any, model: Any) -> None:
    """Catches a changed order or kind of the added tokens, and digits that are not split."""
    first = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[0])
    wanted = list(range(first, first + len(SPECIAL_TOKENS + ADDED_TOKENS)))
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS + ADDED_TOKENS)) == wanted
    assert len(tokenizer) == wanted[-1] + 1 < model.config.vocab_size
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.tokenize("2024") == list("2024")
    text = "<think>\n</think><tool_call><|im_end|>"
    kept = tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)
    assert kept == "<think>\n</think><tool_call>"
    assert tokenizer.chat_template == CHAT_TEMPLATE.read_text().rstrip("\n")


@pytest.mark.parametrize(
    "text", ["Zoë ate 12.5 ｆull-width", "e\u0301", "🙂\n\n  x", "日本語", "<|im_x|>"]
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    """Catches a missing byte in the alphabet; the text comes back in NFC."""
    import unicodedata

    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


CASES = {
    "no default system prompt": (
        [{"role": "user", "content": "Hi"}],
        None,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n",
    ),
    "earlier thoughts are dropped": (
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "<think>\nT\n</think>\n\nA"},
            {"role": "user", "content": "R"},
        ],
        None,
        (
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
            "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nR<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n"
        ),
    ),
    "calls and grouped results": (
        [
            {"role": "user", "content": "Q"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"function": {"name": "f", "arguments": {"x": 1}}},
                    {"name": "g", "arguments": {}},
                ],
            },
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
        ],
        [TOOL],
        (
            "<|im_start|>system\n\n\n# Tools\n\nYou may call these functions:\n<tools>\n"
            f"{json.dumps(TOOL)}\n</tools>\n\nTo call one, reply with:\n<tool_call>\n"
            '{"name": ..., "arguments": {...}}\n</tool_call><|im_end|>\n'
            "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant"
            '\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
            '\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call><|im_end|>\n'
            "<|im_start|>user\n<tool_response>\n1\n</tool_response>"
            "\n<tool_response>\n2\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n<think>\n"
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_template_renders_as_qwqs_does(tokenizer: Any, case: str) -> None:
    """Catches a newline too many, a thought kept, a result outside its turn."""
    messages, tools, wanted = CASES[case]
    rendered = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=False
    )
    assert rendered == wanted


def test_the_last_reply_keeps_its_thought(tokenizer: Any) -> None:
    """Catches a template that strips what it should continue from."""
    reply = "<think>\nT\n</think>\n\nA"
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": reply}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered.endswith(f"<|im_start|>assistant\n{reply}<|im_end|>\n")


@pytest.mark.parametrize("shape", [(256, 256), (512, 256), (64, 256)])
def test_muon_steps_are_nearly_orthogonal(shape: tuple[int, int]) -> None:
    """Catches a wrong coefficient or a forgotten transpose, against the singular vectors."""
    matrix = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    step = orthogonalize(matrix)[0]
    u, strengths, v = torch.linalg.svd(matrix[0], full_matrices=False)
    in_their_basis = u.T @ step @ v.T
    weak = strengths < 0.1 * strengths[0]  # too weak for five steps
    assert (in_their_basis.diagonal() - 1)[~weak].abs().max() < 0.5
    assert (in_their_basis - in_their_basis.diagonal().diag()).abs().max() < 1e-3


def test_an_untrained_model_already_copies(tmp_path: Path) -> None:
    """Catches circuits that do not meet: a subspace, a rope pair or a head mixed up."""
    shutil.copytree(CHECKPOINT, tmp_path / "nano")
    training = train.Training(tmp_path / "nano", seed=0, n_total=10_000)
    once = torch.randint(0, 600, (16, 30), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([once, once], dim=1)
    with torch.no_grad():
        predicted = training.model(input_ids=ids).logits.argmax(dim=-1)
    copied = (predicted[:, 31:-1] == ids[:, 32:]).float().mean()
    assert copied > 0.2  # chance is 0.001


def test_training_resumes_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a state that forgets the optimizers, the step or the random numbers."""
    monkeypatch.setattr(train, "POOL", 8)
    folder = tmp_path / "nano"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copy(CHECKPOINT / name, folder)
    first = train.Training(folder, seed=0, n_total=10_000)
    for batch in first.batches():
        first.update(batch)
    first.save()
    second = train.Training(folder, seed=1, n_total=10_000)
    second.load()
    assert (second.step, second.n_seen) == (first.step, first.n_seen)
    assert second.rng.getstate() == first.rng.getstate()
    batch = next(train.batches(first.tokenizer, random.Random(5), 1.0, MIX, 1024))
    assert first.update(batch) == second.update(batch)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_growing_changes_no_logit(tmp_path: Path) -> None:
    """Catches new layers that add something, or old ones that land in another order."""
    shutil.copytree(CHECKPOINT, tmp_path / "nano")
    training = train.Training(tmp_path / "nano", seed=0, n_total=10_000)
    for bias in (w for name, w in training.model.named_parameters() if name.endswith("bias")):
        torch.nn.init.normal_(bias)
    ids = torch.arange(200).reshape(2, 100)
    with torch.no_grad():
        shallow = training.model(input_ids=ids).logits
        training.grow()
        grown = training.model(input_ids=ids).logits
    assert training.n_layers == 2 * train.N_FIRST_LAYERS
    torch.testing.assert_close(grown, shallow)


@pytest.mark.slow
@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_nano_qwq_solves_what_its_card_says(model: Any, tokenizer: Any, greedy: bool) -> None:
    """Catches weights that were replaced by others than the card's, and a card below the promise.

    The same problems and seed as the card. Rounding differs by machine and thread count and may
    send a reply another way; three standard errors of a share of 100 near one leave room for it.
    """
    card = (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", card, flags=re.MULTILINE)
    figures = {kind: float(figure if greedy else other) for kind, figure, other in rows}
    assert figures.keys() == TASKS.keys()
    assert {kind: figure for kind, figure in figures.items() if figure < PROMISED[kind]} == {}
    scores = accuracy(model, tokenizer, n_problems=N_PROBLEMS, greedy=greedy)
    assert {kind: score for kind, score in scores.items() if score < figures[kind] - 0.05} == {}


def test_more_held_out_conversations_than_are_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them is text to calibrate on, and the shipped sets stay as they are."""
    path = tmp_path / "more.jsonl"
    monkeypatch.setattr("sys.argv", ["corpus", "--held-out", "30", "--out", str(path)])
    corpus.main()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(set(lines)) == 30 * len(TASKS)
    assert not set(lines) & set(corpus.CALIBRATION.read_text(encoding="utf-8").splitlines())
    assert len(load_conversations(path)) == len(lines)
    monkeypatch.setattr("sys.argv", ["corpus", "--held-out", "30"])
    with pytest.raises(SystemExit):
        corpus.main()
