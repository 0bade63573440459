"""The gate's rules: what fails, what is unmeasured, and how often it cries wolf."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from convert.errors import QwqError, UsageError
from quant_eval.baseline import Baseline, Entry, find_entry, load_baseline, save_baseline
from quant_eval.gate import (
    ALARM_RATE,
    LIMITS,
    Limit,
    check_conditions,
    judge_differences,
    judge_limit,
    judge_samples,
    judge_weights,
    limit_of,
    settings_of_gate,
)
from quant_eval.metrics import METRICS
from quant_eval.paired import Sample
from quant_eval.results import EvaluationSettings, Report

N_PASSAGES = 40


def kl(values: NDArray[np.floating[Any]], n_tokens: int = 50) -> Sample:
    return Sample(
        {f"{i:016x}": float(x) * n_tokens for i, x in enumerate(values)},
        {f"{i:016x}": n_tokens for i in range(len(values))},
    )


def replies(rng: np.random.Generator, shares: list[float], n: int = 1) -> Sample:
    return Sample(
        {f"{i:016x}": int(rng.binomial(n, share)) for i, share in enumerate(shares)},
        {f"{i:016x}": n for i in range(len(shares))},
    )


def verdicts(before: dict[str, Sample], after: dict[str, Sample]) -> dict[str, str]:
    return {check.name: check.verdict for check in judge_samples(before, after)}


def test_a_change_within_the_noise_passes_and_one_beyond_it_does_not() -> None:
    """Catches a decision on the mean, in either direction."""
    rng = np.random.default_rng(0)
    base = rng.gamma(1, 0.02, N_PASSAGES)
    noise = rng.normal(0, 0.004, N_PASSAGES)
    before = {"kl": kl(base)}
    name = METRICS["kl"].title
    assert verdicts(before, {"kl": kl(base + noise - noise.mean() + 0.0005)}) == {name: "passed"}
    assert verdicts(before, {"kl": kl(base + noise + 0.01)}) == {name: "regressed"}
    assert verdicts(before, {"kl": kl(base - 0.01)}) == {name: "passed"}  # better is no regression


def test_less_of_what_is_good_is_worse() -> None:
    """Catches a sign: fewer problems solved, lower agreement."""
    rng = np.random.default_rng(0)
    before = {"solved": replies(rng, [0.95] * N_PASSAGES), "top1": kl(np.full(N_PASSAGES, 0.99))}
    after = {"solved": replies(rng, [0.3] * N_PASSAGES), "top1": kl(np.full(N_PASSAGES, 0.9))}
    assert set(verdicts(before, after).values()) == {"regressed"}
    assert set(verdicts(after, before).values()) == {"passed"}


def test_unmeasured_is_not_passed() -> None:
    """Catches a pass for what the file was never asked, or was asked in part."""
    before = {"kl": kl(np.ones(N_PASSAGES))}
    name = METRICS["kl"].title
    assert verdicts(before, {}) == {name: "unmeasured"}
    assert verdicts(before, {"kl": kl(np.ones(30))}) == {name: "unmeasured"}
    assert verdicts(before, {"kl": kl(np.ones(38))}) == {name: "passed"}
    few = {"kl": kl(np.ones(5))}
    assert verdicts(few, few) == {name: "unmeasured"}


def test_false_alarms_are_as_rare_as_stated() -> None:
    """Catches bounds that are too narrow for so many quantities at once.

    500 gates of a model that is no worse: it is asked again with other seeds, so all its replies
    are new. At a rate of ALARM_RATE more than 14 alarms come less than one time in a thousand.
    """
    rng = np.random.default_rng(3)
    shares = list(rng.beta(2, 1, 112))
    rare = [0.02] * 112
    kinds = [name for name in METRICS if name.startswith("solved_")]
    n_alarms = 0
    for _ in range(500):
        before, after = (
            {
                "solved": replies(rng, shares),
                "loops": replies(rng, rare),
                "cut_replies": replies(rng, rare),
                "thought_tokens": kl(rng.gamma(4, 20, 112), 1),
                **{
                    kind: replies(rng, shares[i * 16 : i * 16 + 16]) for i, kind in enumerate(kinds)
                },
            }
            for _ in range(2)
        )
        n_alarms += "regressed" in verdicts(before, after).values()
    assert n_alarms <= 14, f"{n_alarms} of 500 at a stated {ALARM_RATE:.0%}"


def test_limits_are_held_on_the_bound() -> None:
    """Catches a limit that noise alone breaks, and one that nothing breaks."""
    rng = np.random.default_rng(0)
    limit = Limit(0.02, 0.9)
    top1 = kl(np.full(N_PASSAGES, 0.95))

    def judged(mean: float) -> list[str]:
        found = {"kl": kl(rng.normal(mean, 0.01, N_PASSAGES)), "top1": top1}
        return [check.verdict for check in judge_limit(limit, found)]

    assert judged(0.0205) == ["passed", "passed"]
    assert judged(0.05) == ["regressed", "passed"]
    assert [check.verdict for check in judge_limit(limit, {})] == ["unmeasured"] * 2
    low = {"kl": kl(np.zeros(N_PASSAGES)), "top1": kl(np.full(N_PASSAGES, 0.8))}
    assert [check.verdict for check in judge_limit(limit, low)] == ["passed", "regressed"]
    assert [check.verdict for check in judge_limit(Limit(1, None), low)] == ["passed"]


def test_the_starting_limits_are_those_agreed_upon() -> None:
    """Catches a limit that is loosened in passing."""
    kl_nats = {name: limit.kl_nats for name, limit in LIMITS.items()}
    assert list(kl_nats.values()) == [0.0015, 0.003, 0.008, 0.025, 0.09, 0.35]
    assert [limit.top1 for limit in LIMITS.values()] == [0.98, 0.975, None, 0.92, None, None]


def test_weights_and_words_are_held_against_what_was_accepted() -> None:
    """Catches a tensor that got worse, one that is not there, and a key that changed."""
    accepted = {"a": 0.05, "b": 0.0}
    assert judge_weights(accepted, {"a": 0.0505, "b": 0.0}).verdict == "passed"
    worse = judge_weights(accepted, {"a": 0.0515, "b": 0.0})
    assert worse.verdict == "regressed"
    assert worse.words.startswith("a differs from the checkpoint by 5.150%, was 5.000%")
    assert judge_weights(accepted, {"a": 0.05, "b": 0.001}).verdict == "regressed"
    assert judge_weights(accepted, {"a": 0.05}).verdict == "unmeasured"
    assert judge_differences(["x is 1"], ["x is 1"]).verdict == "passed"
    assert judge_differences(["x is 1"], ["x is 2"]).words == "x is 2"


def entry(name: str) -> Entry:
    return Entry(
        name=name,
        sha256="ab",
        recipe="Q8_0",
        tails={"kl_above_q99": 0.123456},
        samples={"kl": kl(np.linspace(0, 1, 9)), "solved": kl(np.ones(8), 1)},
        differences=("x is 1",),
        weights={"a": 0.05},
    )


REPORT = Report("nano", "cd" * 32, "ef" * 32, EvaluationSettings(seed=3), {"python": "3"}, ())


def test_a_baseline_survives_the_disk(tmp_path: Path) -> None:
    """Catches a field that is lost, and numbers that pair with nothing afterwards."""
    path = tmp_path / "baseline.json"
    folder = Entry("b", "cd", "", {}, {}, None, None)
    save_baseline(path, REPORT, [entry("a.gguf"), folder])
    first = path.read_bytes()
    read = load_baseline(path)
    assert read == Baseline(
        "nano",
        "cd" * 32,
        "ef" * 32,
        EvaluationSettings(seed=3),
        {"python": "3"},
        (entry("a.gguf"), folder),
    )
    save_baseline(path, REPORT, read.entries)
    assert path.read_bytes() == first
    assert settings_of_gate(read, 5).reply_seed == 5
    assert settings_of_gate(read, None).seed == 3
    check_conditions(read, path, checkpoint="cd" * 32, text="ef" * 32)
    with pytest.raises(
        QwqError, match=r"was made with another checkpoint, of SHA-256 cdcd.*qwq eval bas"
    ):
        check_conditions(read, path, checkpoint="00" * 32, text="ef" * 32)
    with pytest.raises(QwqError, match="another evaluation text"):
        check_conditions(read, path, checkpoint="cd" * 32, text="00" * 32)


def test_the_entry_is_chosen_by_name(tmp_path: Path) -> None:
    """Catches a file held against another type's entry because it stands first."""
    path = tmp_path / "b.json"
    save_baseline(path, REPORT, [entry("a.gguf"), entry("b.gguf")])
    two = load_baseline(path)
    assert find_entry(two, Path("x/b.gguf"), None, path).name == "b.gguf"
    assert find_entry(two, Path("c.gguf"), "a.gguf", path).name == "a.gguf"
    with pytest.raises(UsageError, match=r"no entry c.gguf; choose one .*a.gguf, b.gguf"):
        find_entry(two, Path("c.gguf"), None, path)
    save_baseline(path, REPORT, [entry("a.gguf")])
    assert find_entry(load_baseline(path), Path("c.gguf"), None, path).name == "a.gguf"


@pytest.mark.parametrize("text", ["{}", '{"format": 1}', '{"format": 2}', "[]", ""])
def test_what_is_no_baseline_is_refused(tmp_path: Path, text: str) -> None:
    """Catches a crash, or a gate that passes because there is nothing to hold against."""
    path = tmp_path / "baseline.json"
    path.write_text(text)
    with pytest.raises(QwqError):
        load_baseline(path)
    with pytest.raises(QwqError, match="no such file"):
        load_baseline(tmp_path / "none.json")
    with pytest.raises(QwqError):
        limit_of(tmp_path)
