"""The commands that judge, from the outside: exit codes, what is printed, what is refused."""

import json
import sys
from pathlib import Path

import pytest

from convert.checkpoint import Checkpoint
from convert.gguf_export import export_gguf, export_planned
from convert.gguf_header import read_header
from convert.plan import plan_file
from convert.recipe import find_recipe
from quant_eval import terminal
from quant_eval.compare_cli import differences
from quant_eval.measurement import Measured
from quant_eval.metrics import METRICS
from quant_eval.results import Attempt
from qwq_local.cli import main
from tests.synthetic import write_checkpoint

SMALL = ("--tokens", "200", "--problems", "0", "--max-tokens", "2")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run the program in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["qwq", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_from_a_baseline_to_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a gate that a build would not notice: 0 passes, 3 names what regressed."""
    folder = write_checkpoint(tmp_path / "tiny", config={"num_hidden_layers": 1})
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    with Checkpoint.open(folder) as checkpoint:
        export_gguf(checkpoint, "Q8_0", good, threads=1)
        export_gguf(checkpoint, "Q2_K", bad, threads=1)
    text = tmp_path / "text.jsonl"
    lines = (
        {"messages": [{"role": "user", "content": f"{i}?"}], "reasoning": "So", "answer": f"{i}."}
        for i in range(20)
    )
    text.write_text("\n".join(map(json.dumps, lines)))
    common = ("--reference", folder, "--text", text, "-o", tmp_path / "out")
    saved = tmp_path / "baseline.json"
    assert run(monkeypatch, "baseline", good, *common, *SMALL, "--save", saved) == 0
    assert "good.gguf: not measured: tasks, behaviour" in capsys.readouterr().err
    assert run(monkeypatch, "baseline", good, *common, *SMALL, "--save", saved) == 1
    assert "exists already; give --force" in capsys.readouterr().err

    assert run(monkeypatch, "gate", good, *common, "--baseline", saved) == 0
    captured = capsys.readouterr()
    assert "passed      mean KL, nats: was" in captured.out
    assert captured.out.splitlines()[-1] == "not part of this baseline: tasks, behaviour"
    assert "fails in at most 1% of gates" in captured.err
    assert "the noise of the path itself is not known" in captured.err
    assert "noise of the path" not in captured.out

    assert run(monkeypatch, "gate", bad, *common, "--baseline", saved, "--json") == 3
    captured = capsys.readouterr()
    verdict = json.loads(captured.out)
    assert not verdict["passed"]
    failed = {one["name"] for one in verdict["checks"] if one["verdict"] == "regressed"}
    assert {"mean KL, nats", "weights"} <= failed
    (check,) = (one for one in verdict["checks"] if one.get("metric") == "kl")
    assert (
        0 < check["numbers"]["allowed"] < check["numbers"]["low"] < check["numbers"]["difference"]
    )
    assert verdict["not_in_baseline"] == ["tasks", "behaviour"]
    assert "mean KL, nats (regressed)" in captured.err.splitlines()[-1]

    assert run(monkeypatch, "gate", bad, *common, "--limits") == 0
    assert "limit of mean KL, nats: is" in capsys.readouterr().out
    assert run(monkeypatch, "gate", bad, *common) == 2
    assert "give --baseline or --limits" in capsys.readouterr().err

    assert run(monkeypatch, "compare", good, bad, *common, *SMALL, "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["differences"]}
    assert rows["kl"]["verdict"] == rows["top1"]["verdict"] == "worse"  # more of it, and less
    assert rows["top1"]["high"] < 0
    assert 0 < rows["kl"]["low"] < rows["kl"]["difference"] < rows["kl"]["high"]
    assert "solved" not in rows
    assert not any("floor" in row for row in rows.values())
    assert run(monkeypatch, "compare", good, bad, *common, *SMALL) == 0
    assert "give the BF16 file as --floor" in capsys.readouterr().out
    exact = tmp_path / "exact.gguf"
    with Checkpoint.open(folder) as checkpoint:
        export_gguf(checkpoint, "BF16", exact, threads=1)
    assert run(monkeypatch, "compare", good, bad, *common, *SMALL, "--floor", exact, "--json") == 0
    with_floor = json.loads(capsys.readouterr().out)["differences"]
    assert {row["name"] for row in with_floor if "floor" in row} == {
        name for name in rows if METRICS[name].against_reference
    }
    assert {name for name in rows if name.startswith(("kl", "nll", "top1", "squared"))} == {
        name for name in rows if METRICS[name].against_reference
    }
    assert [{k: row[k] for k in row if k != "floor"} for row in with_floor] == [*rows.values()]
    (noise,) = (row["floor"] for row in with_floor if row["name"] == "kl")
    assert 0 <= noise < rows["kl"]["first"] / 10
    assert run(monkeypatch, "compare", exact, bad, *common, *SMALL, "--json") == 0
    (row,) = (r for r in json.loads(capsys.readouterr().out)["differences"] if r["name"] == "kl")
    assert row["floor"] == row["first"] == pytest.approx(noise)
    assert run(monkeypatch, "compare", good, bad, *common, *SMALL, "--floor", bad) == 2
    assert "bits per weight and the noise of the path shows" in capsys.readouterr().err

    monkeypatch.setattr(terminal, "TABLE_WIDTH", 80)  # where no number may be cut
    assert run(monkeypatch, "compare", good, bad, *common, *SMALL, "--floor", exact) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    assert f"({noise:.3g})" in out

    floored = tmp_path / "floored.json"
    making = ("baseline", good, *common, *SMALL, "--save", floored)
    assert run(monkeypatch, *making, "--floor", bad) == 2
    assert "bits per weight and the noise of the path shows" in capsys.readouterr().err
    assert run(monkeypatch, *making, "--floor", exact) == 0
    assert run(monkeypatch, "gate", good, *common, "--baseline", floored, "--limits") == 0
    captured = capsys.readouterr()
    shown = [line for line in captured.out.splitlines() if "noise of the path" in line]
    titles = {METRICS[name].title for name in rows if METRICS[name].against_reference}
    assert {line.split(":")[0].split(maxsplit=1)[1] for line in shown} == titles | {
        "limit of mean KL, nats",
        "limit of top-1 agreement",
    }
    assert f"noise of the path {noise:.4g}" in shown[0]
    assert "is not known" not in captured.err
    floor = json.loads(floored.read_text())["entries"][0]["floor"]
    assert 0 <= floor["nll"] < rows["nll"]["first"] / 1000  # a distance, and no perplexity
    assert 0 <= floor["top1"] < 0.1
    assert (
        json.loads(floored.read_text())["entries"][0]["samples"]
        == json.loads(saved.read_text())["entries"][0]["samples"]
    )

    assert run(monkeypatch, "layers", bad, *common, "--tokens", "60", "--json") == 0
    captured = capsys.readouterr()
    (layer,) = json.loads(captured.out)["layers"]
    assert layer["so_far"]["value"] > 0.05
    assert (tmp_path / "out" / "bad.gguf-layers.svg").read_text().startswith("<svg")
    assert run(monkeypatch, "layers", bad, *common, "--tokens", "60") == 0
    captured = capsys.readouterr()
    assert "error by layer, layers" not in captured.err  # it was kept
    assert "…" not in captured.out
    assert f"{100 * layer['so_far']['value']:.3g}" in captured.out
    assert run(monkeypatch, "run", good, bad, *common, *SMALL, "-q") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [len(file["layers"]["layers"]) for file in report["files"]] == [1, 1]

    states = tmp_path / "states"
    assert run(monkeypatch, "reference", folder, "--text", text, "-o", states, *SMALL[:2]) == 0
    assert run(monkeypatch, "compare", good, bad, *common, *SMALL, "--states", states) == 0
    text.write_text(text.read_text().replace("So", "Thus"))
    capsys.readouterr()
    assert run(monkeypatch, "compare", good, bad, *common, *SMALL, "--states", states) == 1
    assert "was made of a text with SHA-256" in capsys.readouterr().err
    assert run(monkeypatch, "gate", good, *common, "--baseline", saved) == 1
    assert "was made with another evaluation text" in capsys.readouterr().err


def test_a_fault_in_a_second_part_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a gate that reads the first part of a split model and passes what it knows of it."""
    folder = write_checkpoint(tmp_path / "tiny", config={"num_hidden_layers": 1})
    with Checkpoint.open(folder) as checkpoint:
        plan = plan_file(checkpoint, find_recipe("Q8_0"), tmp_path / "m.gguf", split_nbytes=300_000)
        export_planned(checkpoint, [plan], threads=1)
    first, *others = sorted(tmp_path.glob("m-*.gguf"))
    text = tmp_path / "text.jsonl"
    lines = (
        {"messages": [{"role": "user", "content": f"{i}?"}], "reasoning": "So", "answer": f"{i}."}
        for i in range(20)
    )
    text.write_text("\n".join(map(json.dumps, lines)))
    common = ("--reference", folder, "--text", text, "-o", tmp_path / "out")
    saved = tmp_path / "baseline.json"
    assert run(monkeypatch, "baseline", first, *common, *SMALL, "--save", saved, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["baseline"] == str(saved)
    (entry,) = document["entries"]
    assert entry["name"] == first.name
    assert entry["not_measured"] == ["tasks", "behaviour"]
    assert {"kl", "kl_above_median", "nll"} <= {one["name"] for one in entry["metrics"]}
    gate = ("gate", first, *common, "--baseline", saved)
    assert run(monkeypatch, *gate) == 0
    assert "file: is the baseline's, byte for byte" in capsys.readouterr().out

    name, tensor = max(read_header(others[0]).tensors.items(), key=lambda one: one[1].nbytes)
    data = bytearray(others[0].read_bytes())
    data[tensor.offset : tensor.offset + tensor.nbytes] = bytes(tensor.nbytes)
    others[0].write_bytes(data)
    assert run(monkeypatch, *gate) == 3
    captured = capsys.readouterr()
    assert f"regressed   weights: {name} " in captured.out
    assert "weights (regressed)" in captured.err.splitlines()[-1]


def test_tasks_have_no_floor() -> None:
    """Catches the 16-bit file's share of solved problems shown as the noise of a path."""
    attempts = tuple(
        Attempt(
            f"problem {i}", "letters", "?", i % 3 > 0, "So.", "Yes.", "stop", (), 2, 1.0, 0.1, 9
        )
        for i in range(9)
    )
    measured = Measured("a.gguf", Path("a.gguf"), "", {}, attempts, (), 9.0)
    rows = {row["name"]: row for row in differences(measured, measured, {"llama.cpp": measured})}
    assert rows["solved"]["first"] == pytest.approx(6 / 9)
    assert not any("floor" in row for row in rows.values())
