"""vLLM for who grows past one machine: started on a checkpoint's folder as QwQ wants to be run."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from convert.errors import QwqError, UsageError
from qwq_local.description import read_json
from qwq_local.rope import NATIVE_LENGTH, RopeMode, longest_context, plan_rope

REASONING_PARSER = "deepseek_r1"  # as vLLM's documentation has it for QwQ-32B
TOOL_PARSER = "hermes"


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """How vLLM is started.

    context: tokens for prompt and reply; None is QwQ's native length, or the model's if that is
    less. n_gpus: of one host, None takes all that may share the model. n_hosts: joined by Ray.
    n_replies: made at once at most; None leaves it to vLLM. tls: certificate and key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    context: int | None = None
    rope: RopeMode = "auto"
    n_gpus: int | None = None
    n_hosts: int = 1
    n_replies: int | None = None
    tls: tuple[Path, Path] | None = None


def vllm_arguments(
    path: Path, config: Mapping[str, Any], settings: VllmSettings, *, n_gpus_here: int
) -> list[str]:
    """What `vllm` is called with. config: the folder's config.json.

    vLLM keeps one rope for all requests, so YaRN is on exactly where the context is longer than
    QwQ's native one, and said so whatever the file says. Raises UsageError for numbers that the
    model has not, or that its heads and groups cannot be divided by.
    """
    n_possible = longest_context(settings.rope, config["max_position_embeddings"])
    n_context = min(n_possible, NATIVE_LENGTH) if settings.context is None else settings.context
    if not 1 <= n_context <= n_possible:
        raise UsageError(
            f"context: {n_context:,} tokens are asked for and the model has 1 to {n_possible:,}; "
            "choose a number within"
        )
    if not 1 <= settings.n_hosts <= config["num_hidden_layers"]:
        raise UsageError(
            f"hosts: {settings.n_hosts} cannot share {config['num_hidden_layers']} layers; choose "
            f"1 to {config['num_hidden_layers']}"
        )
    overrides = {"rope_parameters": _rope_parameters(config, settings.rope, n_context)}
    arguments = ["serve", str(path), "--served-model-name", path.name]
    arguments += ["--host", settings.host, "--port", str(settings.port)]
    arguments += ["--max-model-len", str(n_context), "--hf-overrides", json.dumps(overrides)]
    arguments += ["--reasoning-parser", REASONING_PARSER]
    arguments += ["--enable-auto-tool-choice", "--tool-call-parser", TOOL_PARSER]
    arguments += ["--tensor-parallel-size", str(_tensor_parallel(config, settings, n_gpus_here))]
    if settings.n_hosts > 1:
        arguments += ["--pipeline-parallel-size", str(settings.n_hosts)]
        arguments += ["--distributed-executor-backend", "ray"]
    if settings.n_replies is not None:
        arguments += ["--max-num-seqs", str(settings.n_replies)]
    if settings.tls is not None:
        certificate, key = settings.tls
        arguments += ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
    return arguments


def run_vllm(
    path: Path, settings: VllmSettings, *, key: str | None, environment: Mapping[str, str]
) -> NoReturn:
    """Become vLLM. key: what clients must show; it travels in the environment alone.

    Raises QwqError where vLLM is not installed, UsageError where it cannot run the model.
    """
    from qwq_local.memory_plan import find_nvidia_gpus

    if not path.is_dir():
        raise UsageError(
            f"{path}: vLLM runs a GPTQ folder or a checkpoint and not this file; give one, as "
            "`qwq convert gptq` makes it"
        )
    config = read_json(path / "config.json")
    n_gpus_here = len(find_nvidia_gpus())
    if visible := environment.get("CUDA_VISIBLE_DEVICES"):
        n_gpus_here = min(n_gpus_here, visible.count(",") + 1)
    arguments = vllm_arguments(path, config, settings, n_gpus_here=n_gpus_here)
    program = shutil.which("vllm", path=str(Path(sys.executable).parent)) or shutil.which("vllm")
    if program is None:
        raise QwqError(
            "vllm: it is not installed here; install it with `pip install vllm` on a machine with "
            "CUDA, or serve without --engine vllm"
        )
    secrets = {} if key is None else {"VLLM_API_KEY": key}
    os.execve(program, [program, *arguments], {**environment, **secrets})


def _rope_parameters(config: Mapping[str, Any], rope: RopeMode, n_context: int) -> dict[str, Any]:
    known = config.get("rope_parameters") or {}
    theta = config.get("rope_theta", known.get("rope_theta"))
    yarn = plan_rope(rope, n_context).yarn
    if yarn is None:
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
    }


def _tensor_parallel(config: Mapping[str, Any], settings: VllmSettings, n_gpus_here: int) -> int:
    """How many GPUs of a host share each layer."""
    if settings.n_gpus is None:
        return max(n for n in range(1, max(1, n_gpus_here) + 1) if _divides(config, n))
    if not _divides(config, settings.n_gpus):
        group_size = _group_size(config)
        raise UsageError(
            f"gpus: {settings.n_gpus} cannot share {config['num_attention_heads']} heads and "
            f"{config['intermediate_size']:,} columns in groups of {group_size}; choose a number "
            "that divides them"
        )
    return settings.n_gpus


def _divides(config: Mapping[str, Any], n: int) -> bool:
    """Whether n GPUs get the same heads each, and whole groups of quantized columns."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    group_size = _group_size(config)
    return (
        n >= 1
        and heads % n == 0
        and (kv_heads % n == 0 or n % kv_heads == 0)
        and config["intermediate_size"] % (n * group_size) == 0
        and config["hidden_size"] % (n * group_size) == 0
    )


def _group_size(config: Mapping[str, Any]) -> int:
    group_size: int = (config.get("quantization_config") or {}).get("group_size", 1)
    return max(1, group_size)  # -1: a group is a whole row, which any number may share
