"""QwQ-32B's own tensor shapes and vocabulary, two layers of it, from checkpoint to reply."""

import sys
from pathlib import Path

import pytest

from convert.checkpoint import Checkpoint
from convert.gguf_parts import read_model
from convert.inspection import warnings_of
from convert.metadata_parity import metadata_differences
from convert.verify import verify_model
from qwq_local import QwQ
from tests.processes import run_whole
from tests.real_shapes import write_real_shapes

TYPES = ("Q4_K_M", "Q6_K", "Q8_0")
LIMIT_NBYTES = 2 * 2**30


@pytest.mark.slow
def test_three_types_in_one_pass(tmp_path: Path) -> None:
    """5 GB to three files below 2 GiB; each loads and generates, and the coarsest is verified.

    Catches what small shapes hide: an offset beyond 32 bits, a whole tensor in memory, a vocabulary
    or a row length that a type or llama.cpp cannot have.
    """
    folder = write_real_shapes(tmp_path / "QwQ-shapes", n_layers=2)
    program = "import sys; from qwq_local.cli import main; sys.argv[0] = 'qwq'; main()"
    options = [option for name in TYPES for option in ("--type", name)]
    command = [sys.executable, "-c", program, "convert", "gguf", str(folder), *options]
    cost = run_whole([*command, "-o", str(tmp_path), "-q"])
    assert cost.peak_nbytes < LIMIT_NBYTES
    paths = [tmp_path / f"QwQ-shapes-{name}.gguf" for name in TYPES]
    with Checkpoint.open(folder) as checkpoint:
        checks = list(verify_model(paths[0], source=checkpoint))
        assert not [check.message for check in checks if check.problem]
        assert metadata_differences(read_model(paths[0]), checkpoint) == []
    for path in paths:
        model = read_model(path)
        assert model.tensors["token_embd.weight"].shape == (152_064, 5120)
        assert [one for one in warnings_of(model) if "says nothing about rope" not in one] == []
        with QwQ.open(path, context=256) as qwq:
            reply = qwq.ask("Hello", seed=0, max_tokens=3)
        assert reply.reasoning or reply.answer
        path.unlink()
