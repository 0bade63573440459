"""`qwq serve --engine vllm`: what vLLM is told, and that it is told with nothing lost."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convert.errors import QwqError, UsageError
from qwq_local.vllm import VllmSettings, run_vllm, vllm_arguments

QWQ: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "max_position_embeddings": 131_072,
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rope_theta": 1_000_000.0,
}
GPTQ = QWQ | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
FOLDER = Path("models/qwq-32b-gptq")


def options(settings: VllmSettings, config: dict[str, Any] = GPTQ, n: int = 1) -> dict[str, str]:
    """The arguments by name."""
    arguments = vllm_arguments(FOLDER, config, settings, n_gpus_here=n)
    assert arguments[:2] == ["serve", str(FOLDER)]
    arguments.remove("--enable-auto-tool-choice")
    return dict(zip(arguments[2::2], arguments[3::2], strict=True))


def rope(settings: VllmSettings, config: dict[str, Any] = GPTQ) -> dict[str, Any]:
    overrides: dict[str, Any] = json.loads(options(settings, config)["--hf-overrides"])
    assert overrides.keys() == {"rope_parameters"}
    parameters: dict[str, Any] = overrides["rope_parameters"]
    return parameters


def test_what_the_model_card_asks_for_is_said() -> None:
    """Would catch thoughts in the answer, calls as text, and a context of 131,072 by default."""
    assert options(VllmSettings()) | {"--hf-overrides": ""} == {
        "--served-model-name": "qwq-32b-gptq",
        "--host": "127.0.0.1",
        "--port": "8000",
        "--max-model-len": "32768",
        "--hf-overrides": "",
        "--reasoning-parser": "deepseek_r1",
        "--tool-call-parser": "hermes",
        "--tensor-parallel-size": "1",
    }


def test_yarn_is_on_where_it_is_needed() -> None:
    """Would catch YaRN always or never, and a factor from the file's own length."""
    native = {"rope_type": "default", "rope_theta": 1e6}
    assert rope(VllmSettings()) == native
    assert rope(VllmSettings(context=32_768)) == native
    baked = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    assert rope(VllmSettings(), GPTQ | {"rope_parameters": baked}) == native
    assert rope(VllmSettings(context=40_000, rope="native")) == native
    newer = {k: v for k, v in GPTQ.items() if k != "rope_theta"}
    newer |= {"max_position_embeddings": 40_960, "rope_parameters": native}
    for config in (GPTQ, newer):
        yarn = {"rope_type": "yarn", "rope_theta": 1e6, "original_max_position_embeddings": 32_768}
        assert rope(VllmSettings(context=131_072), config) == yarn | {"factor": 4.0}
        assert rope(VllmSettings(context=65_536), config) == yarn | {"factor": 2.0}
    for settings in (VllmSettings(context=131_073), VllmSettings(context=0)):
        with pytest.raises(UsageError, match="tokens are asked for and the model has 1 to 131,072"):
            options(settings)


@pytest.mark.parametrize(("n_gpus", "n_used"), [(0, 1), (1, 1), (2, 2), (3, 2), (6, 4), (8, 8)])
def test_as_many_gpus_as_divide_the_model(n_gpus: int, n_used: int) -> None:
    """Would catch three GPUs for 40 heads, which vLLM refuses only once it has started."""
    assert options(VllmSettings(), n=n_gpus)["--tensor-parallel-size"] == str(n_used)


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(UsageError, match=r"gpus: 3 cannot share 40 heads and 27,648 columns in gr"):
        options(VllmSettings(n_gpus=3))
    small = GPTQ | {"intermediate_size": 384, "hidden_size": 1280}
    with pytest.raises(UsageError, match="384 columns in groups of 128; choose"):
        options(VllmSettings(n_gpus=2), small)
    assert options(VllmSettings(n_gpus=2), small | {"quantization_config": None})
    with pytest.raises(UsageError, match="hosts: 65 cannot share 64 layers"):
        options(VllmSettings(n_hosts=65))


def test_several_hosts_are_joined_by_ray() -> None:
    found = options(VllmSettings(n_gpus=8, n_hosts=2, n_replies=32, tls=(Path("c"), Path("k"))))
    assert found["--tensor-parallel-size"] == "8"
    assert found["--pipeline-parallel-size"] == "2"
    assert found["--distributed-executor-backend"] == "ray"
    assert found["--max-num-seqs"] == "32"
    assert (found["--ssl-certfile"], found["--ssl-keyfile"]) == ("c", "k")


def folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(GPTQ))
    return path


def test_it_becomes_vllm(tmp_path: Path) -> None:
    """Would catch arguments that are lost, and a key that others see in the list of processes."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$VLLM_API_KEY"\nprintf "%s\\n" "$@"\nexit 7\n')
    program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "QWQ_API_KEY": "a-key-of-sixteen-letters",
    }
    model = folder(tmp_path / "model")
    command = [sys.executable, "-m", "qwq_local.cli", "serve", "--engine", "vllm", "-m", str(model)]
    command += ["--context", "65536", "--gpus", "2", "--port", "8123"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    key, *arguments = done.stdout.splitlines()
    assert key == "a-key-of-sixteen-letters"
    settings = VllmSettings(port=8123, context=65_536, n_gpus=2)
    assert arguments == vllm_arguments(model, GPTQ, settings, n_gpus_here=0)
    assert key not in arguments


def test_without_vllm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QwqError, match="vllm: it is not installed here; install it with"):
        run_vllm(folder(tmp_path / "model"), VllmSettings(), key=None, environment={})
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"model.gguf: vLLM runs a GPTQ folder or a checkpoint"):
        run_vllm(tmp_path / "model.gguf", VllmSettings(), key=None, environment={})
