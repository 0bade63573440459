"""Names of models: paths, repositories, and what is neither; nothing here needs a network."""

from pathlib import Path

import huggingface_hub
import pytest

from convert.errors import QwqError
from qwq_local.hub import CHECKPOINT_FILES, resolve_model


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    """Catches a folder that is looked up on the hub."""
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["nosuch", "a/b/c", "./a/b", "/tmp/a-b/c-d", "a/b c"])
def test_what_is_neither_is_an_error(name: str) -> None:
    """Catches a look-up of what can be no repository."""
    with pytest.raises(QwqError, match="no such file or folder"):
        resolve_model(name)


def test_offline_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a stack trace of the hub's client, and an error that hides the remedy."""

    def unreachable(*args: object, **kwargs: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot find it.\nLong story. More.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(QwqError) as caught:
        resolve_model("Qwen/QwQ-32B")
    message = str(caught.value)
    assert "\n" not in message
    assert "Cannot find it" in message
    assert "More" not in message
    assert "give the path" in message


def test_only_needed_files_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a download of what nothing reads, and a repository that is no checkpoint."""
    asked = {}

    def fetch(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked[repo_id] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(QwqError, match=r"holds no config\.json"):
        resolve_model("some/GGUF")
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model("Qwen/QwQ-32B") == tmp_path
    assert asked["Qwen/QwQ-32B"] == list(CHECKPOINT_FILES)
