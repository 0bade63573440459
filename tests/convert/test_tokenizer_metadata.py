"""The file says of itself what llama.cpp's converter writes, and tokenizes as the checkpoint."""

import json
import re
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.checkpoint import Checkpoint
from convert.errors import CheckpointError
from convert.gguf_export import export_gguf
from convert.gguf_header import MetadataValue, read_header
from tests.converter_cases import CASES, GOLDEN, comparable, write_case
from tests.hard_texts import SPECIAL, hard_texts, lone_surrogates
from tests.oracles.llama_tokenizer import tokenizer_of
from tests.synthetic import (
    CHAT_TEMPLATE,
    PLAIN_ADDED_TOKENS,
    SPECIAL_TOKENS,
    write_checkpoint,
    write_tokenizer,
)

NANO = Path(__file__).parents[2] / "quant_eval/nano/checkpoint"


def metadata_of(folder: Path, path: Path) -> dict[str, MetadataValue]:
    with Checkpoint.open(folder) as checkpoint:
        export_gguf(checkpoint, "BF16", path)
    return read_header(path).metadata


@cache
def golden() -> dict[str, dict[str, object]]:
    """By case, what llama.cpp's converter writes."""
    cases: dict[str, dict[str, object]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return cases


def small(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "Tiny-Qwen-4M", config={"num_hidden_layers": 1})


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def test_the_golden_list_is_of_these_cases() -> None:
    assert golden().keys() == CASES.keys()


@pytest.mark.parametrize("case", CASES)
def test_metadata_is_the_converters(tmp_path: Path, case: str) -> None:
    """Key for key and value for value what llama.cpp's converter writes for the same checkpoint.

    Beyond it only what sampling needs, and our own keys of where the file comes from.
    """
    ours = comparable(metadata_of(write_case(case, tmp_path), tmp_path / "o.gguf"))
    expected = golden()[case]
    assert {key: ours.get(key) for key in expected} == expected
    added = {key for key in ours.keys() - expected.keys() if not key.startswith("qwq.")}
    assert added - {"general.sampling.penalty_repeat"} == {
        "general.sampling.min_p",
        "general.sampling.sequence",
    }


def test_values(tmp_path: Path) -> None:
    """Sizes, tokens with their types, special ids, template and sampling, spelled out."""
    metadata = metadata_of(small(tmp_path), tmp_path / "o.gguf")
    expected: dict[str, object] = {
        "general.architecture": "qwen2",
        "general.name": "Tiny Qwen 4M",
        "general.basename": "Tiny-Qwen",
        "general.file_type": 32,
        "general.quantization_version": 2,
        "general.sampling.temp": pytest.approx(0.6),
        "general.sampling.top_k": 40,
        "general.sampling.top_p": pytest.approx(0.95),
        "general.sampling.min_p": 0.0,
        "general.sampling.penalty_repeat": 1.0,
        "general.sampling.sequence": "penalties;temperature;top_k;top_p;min_p",
        "qwen2.block_count": 1,
        "qwen2.context_length": 4096,
        "qwen2.embedding_length": 256,
        "qwen2.feed_forward_length": 512,
        "qwen2.attention.head_count": 8,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.rope.freq_base": 1e6,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.merges": ["t h", "th e", "Ġ the"],
        "tokenizer.ggml.bos_token_id": 259,
        "tokenizer.ggml.eos_token_id": 261,
        "tokenizer.ggml.padding_token_id": 259,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    assert {key: metadata[key] for key in expected} == expected
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, np.ndarray)
    assert len(tokens) == len(types) == 320
    assert tokens[256:259] == ["th", "the", "Ġthe"]
    assert tokens[259:266] == [*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS]
    assert tokens[266:268] == ["[PAD266]", "[PAD267]"]
    assert types.tolist() == [1] * 259 + [3] * 3 + [4] * 4 + [5] * 54


def test_rope_scaling_only_where_config_has_it(tmp_path: Path) -> None:
    """Yarn writes type, factor and original length; without it there is no key of scaling."""
    folder = small(tmp_path)
    plain = metadata_of(folder, tmp_path / "plain.gguf")
    assert not [key for key in plain if "rope.scaling" in key]
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    edit_json(folder / "config.json", lambda config: config.update(rope_scaling=yarn))
    scaled = metadata_of(folder, tmp_path / "scaled.gguf")
    assert {key: scaled[key] for key in scaled if "rope.scaling" in key} == {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32768,
    }


def test_model_card_and_template_file(tmp_path: Path) -> None:
    """The card's front matter names the model; chat_template.jinja serves as well as the key."""
    folder = small(tmp_path)
    (folder / "README.md").write_text(
        "---\nmodel_name: My Model\nlicense: apache-2.0\nlanguage: [en]\n---\n# Hello\n"
    )
    edit_json(folder / "tokenizer_config.json", lambda config: config.pop("chat_template"))
    (folder / "chat_template.jinja").write_text("template {{ messages }}")
    metadata = metadata_of(folder, tmp_path / "o.gguf")
    assert metadata["general.name"] == "My Model"
    assert metadata["general.license"] == "apache-2.0"
    assert metadata["general.languages"] == ["en"]
    assert metadata["tokenizer.chat_template"] == "template {{ messages }}"


def test_the_name_of_a_download(tmp_path: Path) -> None:
    """In the hub's cache the folder is a revision: the model's name is that of the repository."""
    folder = tmp_path / "models--Qwen--QwQ-32B" / "snapshots" / "976055f8c83f394f"
    write_checkpoint(folder, config={"num_hidden_layers": 1})
    metadata = metadata_of(folder, tmp_path / "o.gguf")
    assert metadata["general.name"] == "QwQ 32B"
    revised = [key for key, value in metadata.items() if "976055f8" in str(value)]
    assert revised == ["qwq.source.revision"]
    assert metadata["qwq.source.repository"] == "Qwen/QwQ-32B"


def composed(text: str) -> bytes:
    """NFC as the checkpoint's tokenizer does it: the texts between added tokens, each by itself."""
    parts = re.split(f"({'|'.join(map(re.escape, SPECIAL))})", text)
    return "".join(unicodedata.normalize("NFC", part) for part in parts).encode()


@pytest.mark.parametrize("checkpoint", ["nano-qwq", "random with 20,000 merges"])
def test_tokenizes_as_the_checkpoint(tmp_path: Path, checkpoint: str) -> None:
    """llama.cpp reads the same ids out of some 3,700 hard texts as the checkpoint's own tokenizer.

    It has no normalizer: NFC is the reader's part, and is done here as a reader has to do it.
    Text with lone surrogates is none: neither takes it, and readers replace them.
    """
    from tokenizers import Tokenizer

    folder = NANO
    if checkpoint != "nano-qwq":
        sizes = {"num_hidden_layers": 1, "vocab_size": 20_480}
        folder = write_checkpoint(tmp_path / "c", config=sizes)
        write_tokenizer(folder, n_merges=20_000, added=SPECIAL)
    metadata_of(folder, tmp_path / "o.gguf")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = hard_texts()
    assert len(texts) > 3_500
    with tokenizer_of(tmp_path / "o.gguf") as tokenize:
        for text in texts:
            expected = tokenizer.encode(text, add_special_tokens=False).ids
            assert tokenize(composed(text)) == expected, text
        for broken in lone_surrogates():
            with pytest.raises((TypeError, UnicodeError)):
                tokenizer.encode(broken)
            replaced = broken.encode("utf-8", errors="replace")
            expected = tokenizer.encode(replaced.decode(), add_special_tokens=False).ids
            assert tokenize(replaced) == expected, broken


def reorder_split(tokenizer: dict[str, Any]) -> None:
    split = tokenizer["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"\p{N}|", r"\p{N}{1,3}|")


@pytest.mark.parametrize(
    ("file_name", "change", "message"),
    [
        (
            "tokenizer.json",
            lambda t: t["model"].update(type="WordPiece"),
            "holds no BPE vocabulary",
        ),
        ("tokenizer.json", lambda t: t["model"].update(merges=[]), "vocabulary with merges"),
        ("tokenizer.json", reorder_split, "its pre-tokenizer is not Qwen2's"),
        ("tokenizer.json", lambda t: t.update(pre_tokenizer=None), "its pre-tokenizer is not"),
        ("tokenizer.json", lambda t: t["model"]["vocab"].update(a=320), "token 'a' has id 320 and"),
        ("tokenizer.json", lambda t: t["model"]["vocab"].update(a="5"), "token 'a' has id 5 and"),
        ("tokenizer.json", lambda t: t["model"]["vocab"].update(xx=3), "share id 3"),
        ("tokenizer.json", lambda t: t["added_tokens"][0].pop("special"), "an added token lacks"),
        ("tokenizer.json", lambda t: t["model"].update(merges=[1, 2]), r"cannot be used \("),
        ("tokenizer_config.json", lambda t: t.pop("chat_template"), "there is no chat template"),
        ("generation_config.json", lambda t: t.update(top_k="all"), "top_k is all, not a number"),
        ("generation_config.json", lambda t: t.update(temperature=-1), "temperature is -1"),
    ],
)
def test_tokenizers_that_do_not_fit(
    tmp_path: Path, file_name: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    """What GGUF readers would misread is refused with the file's name before work starts."""
    folder = small(tmp_path)
    edit_json(folder / file_name, change)
    with pytest.raises(CheckpointError, match=message):
        metadata_of(folder, tmp_path / "o.gguf")
    assert not (tmp_path / "o.gguf").exists()


@pytest.mark.parametrize("card", ["---\n{\n---\n", "---\nname: [1]\n---\n"])
def test_model_cards_that_do_not_fit(tmp_path: Path, card: str) -> None:
    """A front matter that is no YAML, or no text where text belongs."""
    folder = small(tmp_path)
    (folder / "README.md").write_text(card)
    with pytest.raises(CheckpointError, match="model card"):
        metadata_of(folder, tmp_path / "o.gguf")


@pytest.mark.parametrize("file_name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_tokenizer_files(tmp_path: Path, file_name: str) -> None:
    """The file that is missing is named."""
    folder = small(tmp_path)
    (folder / file_name).unlink()
    with pytest.raises(CheckpointError, match=f"{file_name}: the file is missing"):
        metadata_of(folder, tmp_path / "o.gguf")
