"""Conversations from file to batches: what the model sees, and where its reply starts."""

import json
from pathlib import Path

import pytest

from convert.calibration import (
    Conversation,
    load_conversations,
    load_tokenizer,
    set_digest,
    take_tokens,
    token_batches,
    tokenize_conversation,
)
from convert.errors import QwqError
from tests.synthetic import write_checkpoint

RECORD = {
    "kind": "sum",
    "messages": [{"role": "user", "content": "What is 2 + 3?"}],
    "reasoning": "2 and 3 make 5.",
    "answer": "5",
}
CONVERSATION = Conversation("sum", tuple(RECORD["messages"]), "2 and 3 make 5.", "5")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config: dict[str, object] = {"num_hidden_layers": 1}
    return write_checkpoint(tmp_path_factory.mktemp("calibration") / "model", config=config)


def test_a_conversation_is_rendered_whole(folder: Path) -> None:
    """Catches a lost tag, a thought left out, and indices off by one."""
    tokenizer = load_tokenizer(folder)
    tokenized = tokenize_conversation(CONVERSATION, tokenizer)

    def text(start: int, stop: int) -> str:
        return str(tokenizer.decode(list(tokenized.ids[start:stop])))

    prompt = "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert tokenized.answer_start is not None
    assert text(0, tokenized.n_prompt) == prompt
    assert text(tokenized.n_prompt, tokenized.answer_start) == "2 and 3 make 5.\n</think>"
    assert text(tokenized.answer_start, tokenized.stop) == "\n\n5<|im_end|>"
    assert text(tokenized.stop, len(tokenized.ids)) == "\n"


def test_the_prompts_newline_stays_its_own(folder: Path) -> None:
    """Catches the prompt's end merged with a thought that starts with a newline."""
    tokenizer = load_tokenizer(folder)
    newline = Conversation("sum", CONVERSATION.messages, "\nHm.", "5")
    tokenized = tokenize_conversation(newline, tokenizer)
    plain = tokenize_conversation(CONVERSATION, tokenizer)
    assert tokenized.ids[: tokenized.n_prompt] == plain.ids[: plain.n_prompt]


def test_a_template_without_think_leaves_the_tag_to_the_reply(folder: Path, tmp_path: Path) -> None:
    """Catches thoughts that no tag opens, as with plain Qwen2.5 templates."""
    for file in folder.glob("tokenizer*.json"):
        text = file.read_text(encoding="utf-8")
        if file.name == "tokenizer_config.json":
            config = json.loads(text)
            config["chat_template"] = config["chat_template"].replace("<think>\\n", "")
            config["chat_template"] = config["chat_template"].replace("<think>\n", "")
            text = json.dumps(config)
        (tmp_path / file.name).write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    tokenized = tokenize_conversation(CONVERSATION, tokenizer)
    ids = tokenized.ids[tokenized.n_prompt : tokenized.answer_start]
    reply = str(tokenizer.decode(list(ids)))
    assert reply == "<think>\n2 and 3 make 5.\n</think>"


def test_a_folder_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    """Catches a stack trace, or a look on the network, where files are missing."""
    with pytest.raises(QwqError, match="tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '"text"',
        "{}",
        json.dumps(RECORD | {"messages": []}),
        json.dumps(RECORD | {"messages": ["hello"]}),
        json.dumps(RECORD | {"answer": None}),
        json.dumps(RECORD | {"tools": "calculator"}),
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_conversation_is_named(line: str, tmp_path: Path) -> None:
    """Catches a bad line that passes, or an error that does not say where."""
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(RECORD) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(QwqError, match=r"set\.jsonl:3: .*; mend or remove the line"):
        load_conversations(path)


def test_an_empty_or_missing_set_is_an_error(tmp_path: Path) -> None:
    """Catches a calibration on nothing."""
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    for name in ("empty.jsonl", "missing.jsonl"):
        with pytest.raises(QwqError, match=name):
            load_conversations(tmp_path / name)


def test_digests_tell_sets_apart(tmp_path: Path) -> None:
    """Catches a digest that depends on layout or kind, or misses a part of the conversation."""
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(RECORD | {"kind": "other"}, indent=None) + "\n", encoding="utf-8")
    (loaded,) = load_conversations(path)
    assert loaded.digest == CONVERSATION.digest
    changed = [
        Conversation("sum", ({"role": "user", "content": "?"},), "2 and 3 make 5.", "5"),
        Conversation("sum", CONVERSATION.messages, "", "5"),
        Conversation("sum", CONVERSATION.messages, "2 and 3 make 5.", "6"),
        Conversation("sum", CONVERSATION.messages, "2 and 3 make 5.", "5", tools=({"a": 1},)),
    ]
    assert len({one.digest for one in [*changed, CONVERSATION]}) == 5
    assert set_digest([CONVERSATION, changed[0]]) != set_digest([CONVERSATION])


def test_take_tokens_counts() -> None:
    """Catches one token too many, a cut that is forgotten, and an empty sequence at the end."""
    sequences = [range(5), range(3), range(4)]
    taken = [len(one) for one in take_tokens(sequences, 9, max_length=4)]
    assert taken == [4, 3, 2]
    assert [len(one) for one in take_tokens(sequences, 8, max_length=5)] == [5, 3]
    assert [len(one) for one in take_tokens(sequences, None, max_length=9)] == [5, 3, 4]


@pytest.mark.parametrize("batch_tokens", [1, 12, 1000])
def test_batches_hold_every_token_once(batch_tokens: int) -> None:
    """Catches a sequence lost between batches, padding taken for text, and batches too large."""
    sequences = [list(range(1, 1 + n)) for n in (5, 1, 3, 9, 2)]
    batches = token_batches(sequences, batch_tokens=batch_tokens)
    rows = [
        ids[mask].tolist()
        for batch in batches
        for ids, mask in zip(batch.ids, batch.is_token, strict=True)
    ]
    assert sorted(rows, key=len) == sorted(sequences, key=len)
    assert all(batch.ids.numel() <= batch_tokens or len(batch.ids) == 1 for batch in batches)


def test_the_default_set_is_read() -> None:
    """Catches a default set that its own reader refuses."""
    path = Path(__file__).parents[2] / "convert" / "data" / "calibration.jsonl"
    conversations = load_conversations(path)
    assert len({one.kind for one in conversations}) >= 5
    assert all(one.reasoning for one in conversations)
