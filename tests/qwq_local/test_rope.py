"""YaRN: when it is used, and that both engines compute what transformers computes."""

import json
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from convert.checkpoint import Checkpoint
from convert.errors import UsageError
from convert.gguf_export import export_gguf
from convert.gguf_header import read_header
from qwq_local import QwQ, Sampling
from qwq_local.engine import Engine, EngineSettings, Intervention
from qwq_local.engines.gguf import GgufEngine
from qwq_local.rope import NATIVE_LENGTH, RopePlan, Yarn, longest_context, plan_rope
from tests.qwq_local.conftest import NANO
from tests.synthetic import Array, write_checkpoint

YARN = Yarn(4.0)
N_LAST = 256
GREEDY = Sampling(temperature=0)
Logits = np.ndarray[Any, np.dtype[np.float32]]


@pytest.mark.parametrize(
    ("mode", "context", "expected"),
    [
        ("auto", 8_192, RopePlan(8_192, 8_192, None)),
        ("auto", 32_768, RopePlan(32_768, 32_768, None)),
        ("auto", 49_152, RopePlan(49_152, 32_768, Yarn(1.5, 32_768))),
        ("auto", 131_072, RopePlan(131_072, 32_768, Yarn(4.0, 32_768))),
        ("auto", 200_000, RopePlan(200_000, 32_768, Yarn(4.0, 32_768))),
        ("native", 40_960, RopePlan(40_960, 40_960, None)),
        ("yarn", 65_536, RopePlan(65_536, 0, Yarn(2.0, 32_768))),
        ("yarn", 4_096, RopePlan(4_096, 4_096, None)),
    ],
)
def test_the_plan(mode: Any, context: int, expected: RopePlan) -> None:
    """Would catch YaRN on short texts, and a factor that is always 4."""
    plan = plan_rope(mode, context)
    assert plan == expected
    assert plan.rope_for(NATIVE_LENGTH + 1) == plan.yarn
    assert plan.room(plan.yarn) == context
    assert plan.rope_for(1) == (plan.yarn if mode == "yarn" else None)


def test_how_long_a_context_may_be() -> None:
    assert longest_context("auto", 40_960) == 131_072
    assert longest_context("native", 40_960) == 40_960
    assert longest_context("auto", 4_096) == 4_096
    with pytest.raises(UsageError, match="'static' is unknown; use one of auto, native, yarn"):
        longest_context("static", 40_960)  # type: ignore[arg-type]


def kl(theirs: Logits, ours: Logits) -> float:
    """Mean divergence over the positions, in nats."""
    p = torch.from_numpy(theirs).double().log_softmax(-1)
    q = torch.from_numpy(ours).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def reference(folder: Path, ids: list[int]) -> Logits:
    """Logits of the last positions from transformers with QwQ's rope_scaling in the config."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, rope_parameters={"rope_theta": 1e6} | scaling
    )
    with torch.inference_mode():
        logits: Logits = model(torch.tensor([ids]), logits_to_keep=N_LAST).logits[0].numpy()
    return logits


def last_logits(engine: Engine, ids: list[int], rope: Yarn | None) -> Logits:
    rows = deque(engine.logits(ids, rope=rope), maxlen=2)
    return np.concatenate(list(rows))[-N_LAST:]


def gguf_of(folder: Path, path: Path) -> Path:
    with Checkpoint.open(folder) as checkpoint:
        export_gguf(checkpoint, "F32", path, threads=1)
    return path


def test_both_engines_compute_transformers_yarn(tmp_path: Path) -> None:
    """Would catch a factor, an original length or a scale of attention that is off."""
    path = gguf_of(NANO, tmp_path / "nano.gguf")
    for model, bound in ((path, 1e-3), (NANO, 1e-6)):
        with QwQ.open(model, context=40_960, threads=1) as qwq:
            ids = qwq.engine.tokenize("What is 12 + 34? Let me see: " * 12, parse_special=False)
            theirs = reference(NANO, ids)
            assert kl(theirs, last_logits(qwq.engine, ids, YARN)) < bound
            assert kl(theirs, last_logits(qwq.engine, ids, None)) > 5 * bound


@pytest.mark.slow
def test_yarn_is_the_same_at_long_positions(tmp_path: Path) -> None:
    """33,792 positions, of a model narrow enough to read them in seconds."""

    def sharpen(tensors: dict[str, Array]) -> None:
        for name in tensors:
            if name.endswith(("q_proj.weight", "k_proj.weight", "lm_head.weight")):
                tensors[name] *= 4

    config = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 40960,
    }
    folder = write_checkpoint(tmp_path / "narrow", config=config, dtype="F32", edit=sharpen)
    path = gguf_of(folder, tmp_path / "narrow.gguf")
    engine = GgufEngine(path, read_header(path), EngineSettings(40_960, 1, "native"))
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 250, 33 * 1024)]
    theirs = reference(folder, ids)
    assert kl(theirs, last_logits(engine, ids, YARN)) < 1e-5
    assert kl(theirs, last_logits(engine, ids, None)) > 0.1
    engine.close()


def test_a_files_own_scaling_is_not_always_on(tmp_path: Path, gguf_qwq: QwQ) -> None:
    """Would catch a checkpoint's static YaRN on short texts."""
    folder = tmp_path / "static"
    shutil.copytree(NANO, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] = {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }
    (folder / "config.json").write_text(json.dumps(config))
    ids = gguf_qwq.engine.tokenize("What is 12 + 34?" * 8, parse_special=False)
    with QwQ.open(NANO, context=256) as plain, QwQ.open(folder, context=256) as static:
        ours, theirs = (np.concatenate(list(q.engine.logits(ids))) for q in (static, plain))
    np.testing.assert_array_equal(ours, theirs)


def test_a_reply_goes_on_with_yarn(bf16_gguf: Path) -> None:
    """Would catch a reply that is wrong after the switch: the ids are those of a fresh prompt."""
    with QwQ.open(bf16_gguf, context=40_960, threads=1) as qwq:
        engine = qwq.engine
        ids = engine.tokenize("What is 12 + 34?", parse_special=False)

        def greedy(prompt: list[int], rope: Yarn | None, n: int) -> list[int]:
            return list(
                engine.generate(
                    prompt, sampling=GREEDY, seed=0, max_tokens=n, stop_ids=(), rope=rope
                )
            )

        generation = engine.generate(ids, sampling=GREEDY, seed=0, max_tokens=20, stop_ids=())
        first = [next(generation) for _ in range(8)]
        rest = [generation.send(Intervention(rope=YARN)), *generation]
        assert first == greedy(ids, None, 8)
        assert rest == greedy(ids + first, YARN, 12)
