"""What a plan promises, and what a file says of where it comes from."""

import hashlib
import json
import os
import sys
from importlib.metadata import version
from math import prod
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoint import Checkpoint
from convert.errors import CheckpointError
from convert.files import sha256_of
from convert.gguf_estimate import estimate_export
from convert.gguf_export import export_planned, in_flight_limit
from convert.gguf_header import read_header
from convert.imatrix import read_imatrix, write_imatrix
from convert.plan import FilePlan, plan_file
from convert.provenance import Origin, origin_of
from convert.qwen2 import parse_config, tensor_specs
from convert.recipe import RECIPES
from convert.recipe_file import recipe_text
from tests.processes import run_whole
from tests.synthetic import CONFIG, Array, write_checkpoint, write_tokenizer


def planned(checkpoint: Checkpoint, folder: Path, *, split_nbytes: int | None = None) -> FilePlan:
    return plan_file(checkpoint, RECIPES["Q8_0"], folder / "o.gguf", split_nbytes=split_nbytes)


def test_parts_are_those_of_one_file(tmp_path: Path, small: Path) -> None:
    """Parts of at most the size given, named as llama.cpp names them; all tensors, same bytes."""
    with Checkpoint.open(small) as checkpoint:
        whole = planned(checkpoint, tmp_path)
        split = planned(checkpoint, tmp_path, split_nbytes=200_000)
        export_planned(checkpoint, [whole])
        export_planned(checkpoint, [split])
    n_parts = len(split.parts)
    assert n_parts == 6
    names = [f"o-{i:05}-of-{n_parts:05}.gguf" for i in range(1, n_parts + 1)]
    assert [part.path.name for part in split.parts] == names
    header = read_header(whole.path)
    data = whole.path.read_bytes()
    seen = []
    for i, part in enumerate(split.parts):
        part_header = read_header(part.path)
        part_data = part.path.read_bytes()
        assert len(part_data) == part.nbytes
        assert sum(tensor.nbytes for tensor in part_header.tensors.values()) <= 200_000
        assert part_header.metadata["split.no"] == i
        assert part_header.metadata["split.count"] == n_parts
        assert part_header.metadata["split.tensors.count"] == len(header.tensors)
        for name, tensor in part_header.tensors.items():
            one = header.tensors[name]
            ours = part_data[tensor.offset : tensor.offset + tensor.nbytes]
            assert ours == data[one.offset : one.offset + one.nbytes]
            seen.append(name)
    assert seen == list(header.tensors)
    in_first = read_header(split.path).metadata.keys() - header.metadata.keys()
    assert in_first == {"split.no", "split.count", "split.tensors.count"}


def test_parts_load_in_llama_cpp(tmp_path: Path, synthetic: Path) -> None:
    """llama.cpp finds the other parts from the first and computes the same as from one file."""
    import llama_cpp

    def logits(path: Path) -> list[float]:
        model = llama_cpp.Llama(str(path), n_ctx=32, logits_all=True, verbose=False, n_threads=1)
        model.eval([5, 6, 7])
        row: list[float] = model.scores[2].tolist()
        model.close()
        return row

    with Checkpoint.open(synthetic) as checkpoint:
        plans = [
            planned(checkpoint, tmp_path),
            planned(checkpoint, tmp_path, split_nbytes=1_000_000),
        ]
        assert len(plans[1].parts) > 3
        export_planned(checkpoint, plans)
    assert logits(plans[0].path) == logits(plans[1].path)


def test_what_fits_is_not_split(tmp_path: Path, small: Path) -> None:
    """One part has the plain name and no keys of a split file."""
    with Checkpoint.open(small) as checkpoint:
        plan = planned(checkpoint, tmp_path, split_nbytes=1 << 40)
        assert plan == planned(checkpoint, tmp_path)


def test_a_file_names_its_source(tmp_path: Path, small: Path) -> None:
    """Digests of shards, tensors and imatrix, the recipe and the version, but no path."""
    imatrix_path = tmp_path / "secret-place.gguf"
    importance = {"blk.0.ffn_down.weight": np.ones(512, dtype=np.float32)}
    write_imatrix(imatrix_path, importance, n_tokens=10, dataset="/secret-place/words")
    with Checkpoint.open(small) as checkpoint:
        imatrix = read_imatrix(imatrix_path)
        plan = plan_file(checkpoint, RECIPES["Q8_0"], tmp_path / "o.gguf", imatrix=imatrix)
        export_planned(checkpoint, [plan])
    header = read_header(plan.path)
    data = plan.path.read_bytes()
    said = {key: value for key, value in header.metadata.items() if key.startswith("qwq.")}
    shards = sorted(small.glob("*.safetensors"))
    assert said == {
        "qwq.version": version("qwq-local"),
        "qwq.recipe": recipe_text(RECIPES["Q8_0"]),
        "qwq.file_type": header.metadata["general.file_type"],
        "qwq.imatrix.sha256": sha256_of(imatrix_path),
        "qwq.source.files": [shard.name for shard in shards],
        "qwq.source.sha256": [sha256_of(shard) for shard in shards],
        "qwq.tensor_sha256": [
            hashlib.sha256(data[one.offset : one.offset + one.nbytes]).hexdigest()
            for one in header.tensors.values()
        ],
    }
    of_imatrix = {
        key.removeprefix("quantize.imatrix."): value
        for key, value in header.metadata.items()
        if key.startswith("quantize.imatrix.")
    }
    assert of_imatrix == {"dataset": "words", "entries_count": 1, "chunks_count": 1}
    assert b"secret-place" not in data


def test_shards_are_hashed_with_what_is_not_converted(tmp_path: Path) -> None:
    """A table of rope between the tensors, and one behind them: read over, but hashed."""

    def add_tables(tensors: dict[str, Array]) -> None:
        head = tensors.pop("lm_head.weight")
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, dtype=np.float32)
        tensors["lm_head.weight"] = head
        tensors["model.rotary_emb.inv_freq"] = np.ones(16, dtype=np.float32)

    folder = write_checkpoint(tmp_path / "c", config={"num_hidden_layers": 1}, edit=add_tables)
    with Checkpoint.open(folder) as checkpoint:
        plan = planned(checkpoint, tmp_path)
        export_planned(checkpoint, [plan])
    said = read_header(plan.path).metadata["qwq.source.sha256"]
    assert said == [sha256_of(folder / "model.safetensors")]


def test_a_shard_that_shrinks(tmp_path: Path, small: Path) -> None:
    """Cut while it is converted: named, and nothing is left."""
    with Checkpoint.open(small) as checkpoint:
        plan = planned(checkpoint, tmp_path)
        shard = small / "model-00003-of-00003.safetensors"
        os.truncate(shard, shard.stat().st_size - 100)
        with pytest.raises(CheckpointError, match=r"00003\.safetensors: .+ ends 100 bytes early"):
            export_planned(checkpoint, [plan])
    assert not list(tmp_path.glob("o.gguf*"))


def test_origin(tmp_path: Path) -> None:
    """Repository and revision are read off the hub's cache and what its client leaves behind."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--Qwen--QwQ-32B" / "snapshots" / revision
    cached.mkdir(parents=True)
    assert origin_of(cached) == Origin("Qwen/QwQ-32B", revision)
    fetched = tmp_path / "fetched"
    left = fetched / ".cache" / "huggingface" / "download"
    left.mkdir(parents=True)
    assert origin_of(fetched) == Origin(None, None)
    (left / "config.json.metadata").write_text(f"{revision}\netag\n1700000000.0\n")
    assert origin_of(fetched) == Origin(None, revision)
    (left / "config.json.metadata").write_bytes(b"\xff" * 50)
    assert origin_of(fetched) == Origin(None, None)


def test_in_flight_slices_are_bounded() -> None:
    """Two a thread and two more, until bytes are the limit, whatever the threads."""
    assert in_flight_limit(1, 4 << 20) == 4
    assert in_flight_limit(16, 4 << 20) == 34
    assert in_flight_limit(1000, 4 << 20) == 128
    assert in_flight_limit(1000, 1 << 40) == 1


def test_the_estimate_counts_what_is_there(tmp_path: Path, small: Path) -> None:
    """Bytes of unfinished work are not needed again; time grows with the work, not with waiting."""
    with Checkpoint.open(small) as checkpoint:
        plan = planned(checkpoint, tmp_path)
        before = estimate_export(checkpoint, [plan], n_threads=1, patience=0.0)
        assert before.disk_needed_nbytes == plan.nbytes
        (tmp_path / "o.gguf.partial").write_bytes(bytes(500_000))
        after = estimate_export(checkpoint, [plan], n_threads=1, patience=0.0)
    assert plan.nbytes - 520_000 < after.disk_needed_nbytes <= plan.nbytes - 500_000
    assert after.disk_free_nbytes > 0
    assert 0 < after.duration_s < 60
    assert after.memory_nbytes > 100_000_000


def write_wide_checkpoint(folder: Path) -> Path:
    """One layer with QwQ-32B's row lengths and vocabulary; the weights are a hole in the file."""
    folder.mkdir()
    config = CONFIG | {
        "hidden_size": 5120,
        "intermediate_size": 27_648,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "num_hidden_layers": 1,
        "tie_word_embeddings": True,
        "vocab_size": 152_064,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, n_merges=151_387)
    header: dict[str, object] = {}
    end = 0
    for spec in tensor_specs(parse_config(config, "wide")):
        start, end = end, end + 2 * prod(spec.shape)
        header[spec.name] = {"dtype": "BF16", "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.mark.slow
def test_memory_with_the_embeddings_of_qwq(tmp_path: Path) -> None:
    """A whole process with 16 threads and one output stays below 1.5 GiB and its own estimate."""
    folder = write_wide_checkpoint(tmp_path / "wide")
    path = tmp_path / "o.gguf"
    with Checkpoint.open(folder) as checkpoint:
        plans = [plan_file(checkpoint, RECIPES["Q8_0"], path)]
        estimate = estimate_export(checkpoint, plans, n_threads=16, patience=0.0)
    program = "import sys; from qwq_local.cli import main; sys.argv[0] = 'qwq'; main()"
    command = [sys.executable, "-c", program, "convert", "gguf", str(folder), "--type", "Q8_0"]
    command += ["-o", str(path), "--threads", "16", "-q"]
    peak_nbytes = run_whole(command).peak_nbytes
    assert peak_nbytes < 1.5 * 2**30
    assert peak_nbytes < estimate.memory_nbytes
