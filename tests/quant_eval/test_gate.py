"""The gate's rules: what fails, what is unmeasured, and how often it cries wolf."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from convert.errors import QwqError, UsageError
from quant_eval.baseline import (
    Baseline,
    Entry,
    find_entry,
    load_baseline,
    save_baseline,
    summarize_entry,
)
from quant_eval.closeness import Closeness
from quant_eval.gate import (
    ALARM_RATE,
    LIMITS,
    Check,
    Limit,
    check_conditions,
    judge_differences,
    judge_limit,
    judge_samples,
    judge_weights,
    limit_of,
    settings_of_gate,
)
from quant_eval.metrics import METRICS, absent_from
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


def verdicts(
    before: dict[str, Sample], after: dict[str, Sample], floor: dict[str, float] | None = None
) -> dict[str, str]:
    return {check.name: check.verdict for check in judge_samples(before, after, floor=floor)}


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


def test_shorter_thoughts_are_a_regression_too() -> None:
    """Catches thoughts that collapse and pass, since more of them is what was worse."""
    rng = np.random.default_rng(0)
    lengths = rng.gamma(4, 20, N_PASSAGES)
    before = {"thought_tokens": kl(lengths, 1)}
    for factor, verdict in ((0.2, "regressed"), (3.0, "regressed"), (1.0, "passed")):
        after = {"thought_tokens": kl(lengths * factor, 1)}
        assert list(verdicts(before, after).values()) == [verdict], factor


def test_what_is_below_the_noise_of_the_path_is_no_regression() -> None:
    """Catches another processor's rounding, the same in all passages, that fails a sound file."""
    base = np.linspace(0.1, 0.3, N_PASSAGES)
    for name, better in (("nll", -1), ("top1", 1)):
        before, floor = {name: kl(base)}, {name: 0.001}
        below, above = ({name: kl(base - better * shift)} for shift in (0.0009, 0.0011))
        title = METRICS[name].title
        assert verdicts(before, below, floor) == {title: "passed"}
        assert verdicts(before, above, floor) == {title: "regressed"}
        assert verdicts(before, below) == {title: "regressed"}


def test_the_numbers_behind_the_words_are_given() -> None:
    """Catches a document that a program must read sentences of, and numbers that JSON has not."""
    rng = np.random.default_rng(0)
    before = {"kl": kl(rng.gamma(1, 0.02, N_PASSAGES)), "top1": kl(np.ones(3))}
    after = {"kl": kl(rng.gamma(1, 0.04, N_PASSAGES)), "top1": kl(np.ones(3))}
    checks = {one["metric"]: one for one in map(asdict, judge_samples(before, after))}
    numbers = checks["kl"]["numbers"]
    assert numbers["low"] < numbers["difference"] < numbers["high"]
    assert numbers["allowed"] == pytest.approx(0.01 * numbers["baseline"])
    assert (numbers["n"], numbers["n_baseline"]) == (N_PASSAGES, N_PASSAGES)
    assert "floor" not in numbers
    assert checks["top1"]["numbers"] == {"n": 3, "n_baseline": 3}
    (limit,) = map(asdict, judge_limit(Limit(0.01, None), after, floor={"kl": 0.001}))
    assert limit["numbers"]["limit"] == 0.01
    assert limit["numbers"]["floor"] == 0.001
    assert limit["numbers"]["value"] - limit["numbers"]["reach"] > 0.01
    assert limit["verdict"] == "regressed"


def test_what_a_baseline_lacks_is_said() -> None:
    """Catches a baseline without tasks whose gate looks as if they had passed."""
    assert absent_from(METRICS) == []
    assert absent_from(METRICS.keys() - {"loops", "kl"}) == ["mean KL, nats", "loops"]
    of_text = [name for name in METRICS if METRICS[name].against_reference]
    assert absent_from(of_text) == ["tasks", "behaviour"]
    summary = summarize_entry(entry("a.gguf"))
    assert [one["name"] for one in summary["metrics"]] == ["kl", "solved"]
    assert summary["metrics"][0]["n"] == 9 * 50
    assert METRICS["loops"].title in summary["not_measured"]


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


def test_heavy_tails_raise_no_more_alarms() -> None:
    """Catches bounds that a few tokens with a thousand times the KL of others break.

    500 gates of a model that is no worse, on 24 passages: tokens' KL spans orders of magnitude and
    depends on the passage; agreement, tails and perplexity hang on the same tokens. At a rate of
    ALARM_RATE more than 14 alarms come less than one time in a thousand.
    """
    rng = np.random.default_rng(5)
    n_passages, n_tokens = 24, 60
    n_alarms = 0
    for _ in range(500):
        hard = rng.normal(0, 1, (n_passages, 1))
        before, after = (
            token_samples(0.01 * np.exp(hard + rng.normal(0, 2, (n_passages, n_tokens))), rng)
            for _ in range(2)
        )
        n_alarms += "regressed" in verdicts(before, after).values()
    assert n_alarms <= 14, f"{n_alarms} of 500 at a stated {ALARM_RATE:.0%}"


def token_samples(values: NDArray[np.float64], rng: np.random.Generator) -> dict[str, Sample]:
    """Of every metric against the reference, from the KL of (n_passages, n_tokens)."""
    size = np.sqrt(values)
    per_token = {
        "kl": values,
        "kl_thought": values[:, :40],
        "kl_answer": values[:, 40:],
        "kl_above_median": values > 0.01,
        "kl_above_q99": values > 1.7,
        "kl_above_q999": values > 10,
        "nll": values + size * rng.normal(0, 1, values.shape),
        "top1": rng.random(values.shape) > size / 4,
        "squared_change": values**2,
    }
    assert per_token.keys() == {name for name in METRICS if METRICS[name].against_reference}
    return {name: kl(one.mean(axis=1), one.shape[1]) for name, one in per_token.items()}


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
    assert {
        "Q8_0": Limit(0.0015, 0.98),
        "Q6_K": Limit(0.003, 0.975),
        "Q5_K_M": Limit(0.008, None),
        "Q4_K_M": Limit(0.025, 0.92),
        "Q3_K_M": Limit(0.09, None),
        "Q2_K": Limit(0.35, None),
    } == LIMITS


def test_weights_and_words_are_held_against_what_was_accepted() -> None:
    """Catches a tensor that got worse, one that is not there, and a key that changed."""
    accepted = {"a": Closeness(0.05, 0.998), "b": Closeness(0.0, 1.0)}

    def judged(**changed: Closeness) -> Check:
        return judge_weights(accepted, accepted | changed)

    assert judged(a=Closeness(0.0505, 0.998)).verdict == "passed"
    worse = judged(a=Closeness(0.0515, 0.998))
    assert worse.verdict == "regressed"
    assert worse.words == "a differs from the checkpoint by 5.150%, was 5.000%"
    assert judged(b=Closeness(0.001, 1.0)).verdict == "regressed"
    assert judged(a=Closeness(0.05, 1.002)).verdict == "passed"
    assert judged(a=Closeness(0.04, 1.006)).verdict == "passed"
    assert judged(a=Closeness(0.0495, 0.978)).verdict == "regressed"
    larger = judged(a=Closeness(0.05, 1.018))
    assert larger.verdict == "regressed"
    assert larger.words == "a is 1.0180 times the checkpoint's, was 0.9980"
    assert judge_weights(accepted, {"a": accepted["a"]}).verdict == "unmeasured"
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
        weights={"a": Closeness(0.05, 0.998)},
    )


REPORT = Report("nano", "cd" * 32, "ef" * 32, EvaluationSettings(seed=3), {"python": "3"}, ())


def test_a_baseline_survives_the_disk(tmp_path: Path) -> None:
    """Catches a field that is lost, and numbers that pair with nothing afterwards."""
    path = tmp_path / "baseline.json"
    folder = Entry("b", "cd", "", {}, {}, (), {"x": Closeness(0.1, 1.0)}, {"kl": 0.001})
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


def test_an_older_baseline_says_what_to_do(tmp_path: Path) -> None:
    """Catches a gate that holds a folder against a baseline that knows nothing of its weights."""
    path = tmp_path / "baseline.json"
    path.write_text('{"format": 1, "entries": []}')
    with pytest.raises(QwqError, match=r"has format 1 and 2 is read; make .* `qwq eval baseline`"):
        load_baseline(path)


@pytest.mark.parametrize("text", ["{}", '{"format": 2}', '{"format": 3}', "[]", ""])
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
