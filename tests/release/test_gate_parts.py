"""The gate's rules: when numbers are too far apart, when a text is none, when a limit is broken."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tlite_jax.bridge.safetensors_io import StoredTensor
from tlite_jax.errors import UserError
from tlite_jax.release import forgetting, inversions, references, table, weights, writing
from tlite_jax.release.files import MainKind
from tlite_jax.release.passes import compare
from tlite_jax.release.sample import half_windows, own_text, read_text, whole_windows


def row(kind: str, bits: float, kl: float, error: float = 1e-4) -> Any:
    measured = {
        "kl": np.array([kl - error, kl + error]),
        "logp": np.log(np.array([0.5, 0.25])),
        "base_logp": np.log(np.array([0.5, 0.5])),
        "same_top": np.array([1.0, 0.0]),
    }
    return table.row(kind, f"x.{kind}.gguf", 100, bits, measured)


def test_a_rows_numbers_are_llama_cpps() -> None:
    found = row("Q8_0", 8.5, 0.01, 0.002)
    assert found.perplexity == pytest.approx(np.sqrt(8))
    assert found.log_ratio == pytest.approx(np.log(2) / 2)
    assert (found.mean_kl, found.max_kl, found.same_top) == pytest.approx((0.01, 0.012, 0.5))
    assert found.mean_kl_error == pytest.approx(0.002)  # std sqrt(2) 0.002, of two values
    assert found.kl_99 == pytest.approx(0.01196)
    assert found.rms_delta_p == pytest.approx(0.25 / np.sqrt(2))
    assert found.same_top_error == pytest.approx(0.5)


def test_files_that_cannot_be_right_are_named() -> None:
    rows = [row("F16", 16, 1e-5, 0), row("Q8_0", 8.5, 0.03), row("Q4_0", 4.5, float("nan"))]
    assert [line.split(":")[0] for line in table.too_far(rows[:2], {}, 0.02)] == []
    assert [line.split(":")[0] for line in table.too_far(rows[:2], {})] == ["x.Q8_0.gguf"]
    assert not table.too_far([row("Q2_K", 2.6, 3.0)], {})  # much, but no proof of damage
    for ratio, wrong in ((0.9, 0), (2.1, 1), (float("nan"), 1)):
        changed = row("Q2_K", 2.6, 0.4).model_copy(update={"log_ratio": ratio})
        assert len(table.too_far([changed], {})) == wrong


def test_the_users_limits_hold() -> None:
    rows = [row("Q4_K_M", 4.9, 0.1), row("Q4_0", 4.5, 0.2), row("Q2_K", 2.6, float("nan"))]
    assert not table.too_far(rows[:2], {"Q4_K_M": 0.11, "Q4_0": 0.21})
    found = table.too_far(rows, {"Q4_K_M": 0.09, "Q4_0": 0.21, "Q2_K": 9.0}, 0.5)
    assert found == [
        "x.Q4_K_M.gguf: mean KL 0.1 nats a token, --most-kl Q4_K_M=0.09",
        "x.Q2_K.gguf: mean KL nan nats a token, --most-kl Q2_K=9",
    ]


def test_what_is_not_measurable_has_no_row() -> None:
    sound = {"kl": np.zeros(2), "logp": np.full(2, -3.0), "base_logp": np.full(2, -3.0)}
    assert table.is_measurable(sound)
    assert not table.is_measurable({**sound, "kl": np.array([0, np.nan])})
    assert not table.is_measurable({**sound, "logp": np.full(2, -1e4)})  # its perplexity is no float64
    assert not table.is_measurable({**sound, "base_logp": np.full(2, -1e4)})


def held(name: str) -> MainKind:
    return MainKind(name, 0.75, frozenset({576}))


def test_fewer_bits_that_are_better_are_explained() -> None:
    rows = [row("Q8_0", 8.5, 0.01), row("Q5_K_M", 6.6, 0.3), row("Q4_K_M", 6.2, 0.1), row("Q4_0", 4.5, 0.2)]
    kinds = {"Q8_0": held("Q8_0"), "Q5_K_M": held("Q5_1"), "Q4_K_M": held("Q5_0"), "Q4_0": held("Q4_0")}
    random = np.random.default_rng(0)
    shared = random.normal(size=400)
    kl = {part.type: part.mean_kl + shared + 0.01 * random.normal(size=400) for part in rows}
    (found,) = inversions.inversions(rows, kl, kinds, held("Q4_1"))
    assert "Q5_K_M (6.60 bits) predicts worse than Q4_K_M (6.20): mean KL 0.3000 and 0.1000" in found
    assert "+-0.0007;" in found  # of the tokens' differences: what all files find hard is no error
    assert "so no chance; Q5_K_M is 75% Q5_1 (blocks of 32), as rows of 576 are no multiple of 256" in found
    assert "the base was Q4_1" in found
    assert "the base was" not in inversions.inversions(rows, kl, kinds)[0]
    assert not inversions.inversions([rows[0], rows[2], rows[3]], kl, kinds)
    kl["Q5_K_M"] = kl["Q4_K_M"] + 0.2 + 3 * random.normal(size=400)
    assert "within 2 errors: this sample does not tell them apart" in inversions.inversions(rows, kl, kinds)[0]


def test_files_of_the_bases_own_type_are_pointed_out() -> None:
    kinds = {"Q8_0": held("Q8_0"), "Q4_1": held("Q4_1"), "F16": held("F16")}
    assert [line.split()[0] for line in inversions.of_the_bases_type(kinds, held("Q4_1"))] == ["Q4_1"]
    assert not inversions.of_the_bases_type(kinds, held("F16"))
    assert not inversions.of_the_bases_type(kinds, None)


def test_the_comparison_of_predictions_is_exact() -> None:
    base, other = np.log(np.array([[0.5, 0.25, 0.25]])), np.log(np.array([[0.25, 0.5, 0.25]]))
    found = compare(other + 3, base - 7, np.array([0]))
    assert found["kl"] == pytest.approx(0.25 * np.log(2))
    assert (found["logp"], found["base_logp"]) == (pytest.approx(np.log(0.25)), pytest.approx(np.log(0.5)))
    assert not found["same_top"][0]
    assert compare(base, base, np.array([0]))["same_top"][0]


def test_windows_are_llama_cpps() -> None:
    windows = half_windows(range(100, 150), 1, 8, most=3)
    assert windows.tokens[:, 0].tolist() == [1, 1, 1]
    assert windows.tokens[1, 1:].tolist() == list(range(109, 116))
    assert (windows.first, windows.last, windows.num_scored) == (4, 7, 3)
    assert windows.targets[1].tolist() == [113, 114, 115]
    assert half_windows(range(100, 150), None, 8, most=99).tokens.shape == (6, 8)
    with pytest.raises(UserError, match="the sample has 15 tokens, 16 are needed"):
        half_windows(range(15), None, 8, most=3)
    assert whole_windows([range(9), range(5), range(7)], 8).tokens.shape == (3, 5)


def test_the_sample_is_balanced_and_a_users_is_read(tmp_path: Path) -> None:
    begin = own_text()[:4000]
    assert "def " in begin
    assert any("а" <= letter <= "я" for letter in begin)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_text(tmp_path / "bad.txt")


def test_bfloat16_is_judged_by_transformers_own_rounding() -> None:
    random = np.random.default_rng(0)
    truth, noise, other = (random.normal(size=(3, 40, 50)).astype(np.float32) for _ in range(3))
    found = {"float32": (truth, truth), "bfloat16": (truth + 0.1 * noise, truth + 0.1 * other)}
    values, wrong = references.judge_logits(found)
    assert len(values) == 2
    assert not wrong
    _, wrong = references.judge_logits({**found, "bfloat16": (truth + 0.2 * noise, truth + 0.1 * other)})
    assert len(wrong) == 1
    _, wrong = references.judge_logits({"float32": (truth + 1e-4, truth)})
    assert len(wrong) == 1
    _, wrong = references.judge_logits({"bfloat16": (truth + np.nan, truth)})
    assert len(wrong) == 1
    noisy = {"bfloat16": (truth + 0.05 * noise, truth)}
    assert not references.judge_logits(noisy)[1]


def test_loops_from_the_start_are_no_text() -> None:
    assert writing.is_degenerate([5] * 32)
    assert writing.is_degenerate([5, 6] * 16)
    assert not writing.is_degenerate([1, *[5] * 31])
    assert not writing.is_degenerate([5] * 3)  # an end came
    assert writing.agreement([1, 2, 3], [1, 2, 4]) == 2


def test_stored_tensors_are_compared_by_bits() -> None:
    def stored(**arrays: np.ndarray) -> dict[str, StoredTensor]:
        return {name: StoredTensor(a.shape, a.dtype.name, lambda rows, a=a: a[rows]) for name, a in arrays.items()}

    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert not weights.compare_stored(stored(a=array), stored(a=array.copy())).differences
    assert weights.compare_stored(stored(a=array), stored(a=array + 1)).differences == ["a: 6 values differ"]
    zeros = np.zeros((2, 3), np.float32)
    assert weights.compare_stored(stored(a=zeros), stored(a=-zeros)).differences == ["a: 6 values differ"]
    half = weights.compare_stored(stored(a=array), stored(a=array.astype(np.float16))).differences
    assert half == ["a is float16, it was float32"]
    assert weights.compare_stored(stored(a=array), stored(b=array)).differences == ["a is missing", "b is new"]


@pytest.mark.parametrize(
    ("worse_by", "step", "broken"),
    [(0.05, 6, True), (0.2, 6, False), (0.05, 3, False), (0.05, 2, True)],  # at step 2 nothing was measured
)
def test_forgetting_is_held_against_the_runs_limits(tmp_path: Path, worse_by: float, step: int, broken: bool) -> None:
    lines = [
        {"step": number, "time": 1.0, "bits_per_byte_delta/language=en": delta, "bits_per_byte_delta/all": delta}
        for number, delta in ((3, 0.01), (6, 0.1))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    watch = [{"select": {"language": "en"}, "worse_by": worse_by}]
    meta = SimpleNamespace(config={"evaluation": {"every": 3, "watch": watch}})
    found = forgetting.read(SimpleNamespace(meta=meta, run=tmp_path, step=step))  # type: ignore[arg-type]
    assert bool(found.broken) is broken
    assert len(found.limits) == 1
    assert (found.step, "bits per byte" in found.summary) == ((None, False) if step == 2 else (step, True))


def test_a_run_without_limits_has_none_to_break(tmp_path: Path) -> None:
    meta = SimpleNamespace(config=None)
    assert not forgetting.read(SimpleNamespace(meta=meta, run=tmp_path, step=0)).limits  # type: ignore[arg-type]
