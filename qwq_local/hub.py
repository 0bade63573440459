"""A model by the name that a user gives: a folder on this machine, or a repository on the hub."""

import re
from pathlib import Path

from convert.errors import QwqError

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CHECKPOINT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "README.md",
    "LICENSE*",
)


def resolve_model(name: str) -> Path:
    """The folder or file of that path, or the checkpoint of that repository, fetched where needed.

    Raises QwqError where it is neither, or cannot be fetched.
    """
    path = Path(name)
    if path.exists():
        return path
    if not REPO_ID.fullmatch(name):
        raise QwqError(
            f"{name}: no such file or folder; give a path, or a repository as in Qwen/QwQ-32B"
        )
    return fetch_checkpoint(name)


def fetch_checkpoint(repo_id: str) -> Path:
    """Download a checkpoint's files from Hugging Face, continuing where an earlier try ended.

    Progress goes to stderr. Files that the cache has and the hub has not changed are not fetched
    again; without a network the cache alone answers. Raises QwqError where that is not enough.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=list(CHECKPOINT_FILES)))
    except GatedRepoError as error:
        raise QwqError(
            f"{repo_id}: its owner asks for consent first; give it on the model's page, then run "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise QwqError(
            f"{repo_id}: neither a folder here nor a public repository on Hugging Face; "
            "check the name"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0][:160]
        raise QwqError(
            f"{repo_id}: no folder here, and it cannot be fetched from Hugging Face ({reason}); "
            "check the network, or give the path of a downloaded checkpoint"
        ) from error
    if not (folder / "config.json").is_file():
        raise QwqError(
            f"{repo_id}: the repository holds no config.json, so no checkpoint that can be "
            "converted; give the repository of the unquantized model"
        )
    return folder
