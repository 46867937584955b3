"""What a card says of evaluations, from results files that the harness and MERA's part really wrote.

harness_whole.json and harness_limited.json are lm_eval 0.4.13's own (without paths and what it says of the machine), of
SmolLM2-135M-Instruct on made-up tasks: one with gsm8k's two filters, a group of groups as MMLU is, and a group that has
no metrics of its own; the second with --limit 3.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.release.made_result import made_result
from tlite_jax.config.recipe import CardConfig
from tlite_jax.release.card import CardFacts, card_text, front_matter
from tlite_jax.release.evaluated import Evaluation, from_bits, from_harness, from_mera, joined

HERE = Path(__file__).parent


@pytest.fixture
def whole() -> dict[str, Any]:
    return json.loads((HERE / "harness_whole.json").read_text())


@pytest.fixture
def limited() -> dict[str, Any]:
    return json.loads((HERE / "harness_limited.json").read_text())


def lines(found: Evaluation) -> list[tuple[object, ...]]:
    return [(row.task, row.num_fewshot, row.extent, row.metric_name, round(row.value, 4)) for row in found.rows]


def card_of(evaluation: Evaluation, directory: Path) -> str:
    """The card of a release that has nothing else."""
    (directory / "hf").mkdir()
    (directory / "hf" / "config.json").write_text("{}")
    return card_text(facts_of(evaluation, directory))


def facts_of(evaluation: Evaluation, directory: Path) -> CardFacts:
    return CardFacts("X", CardConfig(license="mit"), directory, made_result(), [], evaluation, [])


def test_two_filters_are_told_apart_and_a_group_stands_for_its_subtasks(whole: dict[str, Any]) -> None:
    found = from_harness(whole)
    assert lines(found) == [
        ("sums", 2, "12 documents", "exact_match (strict-match)", 0.9167),
        ("sums", 2, "12 documents", "exact_match (flexible-extract)", 0.9167),
        ("plain_a", 0, "7 documents", "acc", 0.1429),
        ("plain_a", 0, "7 documents", "acc_norm", 0.2857),
        ("plain_b", 0, "7 documents", "acc", 0.1429),
        ("plain_b", 0, "7 documents", "acc_norm", 0.2857),
        ("exam", 1, "3 subtasks, 19 documents", "acc", 0.2632),
    ]
    assert [row.error for row in found.rows if row.task == "exam"] == [pytest.approx(0.10766372971777384)]
    assert found.remarks == ()


def test_subtasks_with_other_numbers_of_shots_have_none_in_common(whole: dict[str, Any]) -> None:
    whole["n-shot"]["exam_law"] = 5
    assert [row.num_fewshot for row in from_harness(whole).rows if row.task == "exam"] == [None]


def test_a_limit_and_what_was_cut_are_said(limited: dict[str, Any], tmp_path: Path) -> None:
    limited["config"]["num_truncated"] = {"requests": 0, "prompts": 2}
    found = from_harness(limited)
    assert {(row.task, row.extent) for row in found.rows} == {
        ("sums", "3 of 12 documents"),
        ("plain_a", "3 of 7 documents"),
        ("plain_b", "3 of 7 documents"),
        ("exam", "3 subtasks, 9 of 19 documents"),
    }
    assert "3 documents of each task at most (`limit`)" in found.remarks[0]
    assert "2 prompts were longer than the context" in found.remarks[1]
    limited["config"]["limit"] = 0.1
    assert "0.1 of the documents of each task" in from_harness(limited).remarks[0]
    text = card_of(found, tmp_path)
    assert "| sums | 2 | 3 of 12 documents | exact_match (strict-match) | 1.0000 ± 0.0000 |" in text
    assert all(remark in text for remark in found.remarks)


def test_the_hub_is_told_filters_shots_and_limits(limited: dict[str, Any], tmp_path: Path) -> None:
    limited["results"]["plain_b"]["acc,none"] = float("nan")  # which the hub does not take
    rows = front_matter(facts_of(from_harness(limited), tmp_path)).to_dict()["model-index"][0]["results"]
    sums = next(row for row in rows if row["dataset"]["type"] == "sums")
    assert sums["dataset"]["name"] == "sums (2-shot, 3 of 12 documents)"
    assert [(metric["type"], metric["name"]) for metric in sums["metrics"]] == [
        ("exact_match", "exact_match (strict-match)"),
        ("exact_match", "exact_match (flexible-extract)"),
    ]
    plain = next(row for row in rows if row["dataset"]["type"] == "plain_b")
    assert [metric["type"] for metric in plain["metrics"]] == ["acc_norm"]


def mera(**changes: Any) -> dict[str, Any]:
    """As results.json of `eval --mera --mera-split train --limit 1`, with one task that nothing is known of."""
    tasks = {
        "LCS": {"shots": 2, "documents": 1, "metrics": {"acc": 0.0}, "score": 0.0},
        "CheGeKa": {"shots": 4, "documents": 1, "metrics": {"f1": 0.18, "em": 0.0}, "score": 0.09},
        "ruMMLU": {"shots": 5, "documents": 1, "metrics": {"acc": 0.0, "acc.philosophy": 0.0}, "score": 0.0},
        "ruHumanEval": {"shots": 0, "documents": 1, "metrics": None, "score": None},
    }
    values = {"version": "1.1.0", "split": "train", "limit": 1.0, "tasks": tasks, "total": None, "truncated": 0}
    return copy.deepcopy(values | changes)


def test_of_mera_shots_limit_split_and_what_is_not_scored_are_said() -> None:
    found = from_mera(mera())
    assert lines(found) == [
        ("MERA 1.1.0, train: LCS", 2, "1 document, limited", "acc", 0.0),
        ("MERA 1.1.0, train: CheGeKa", 4, "1 document, limited", "f1", 0.18),
        ("MERA 1.1.0, train: CheGeKa", 4, "1 document, limited", "em", 0.0),
        ("MERA 1.1.0, train: ruMMLU", 5, "1 document, limited", "acc", 0.0),
    ]
    assert "1 documents of each task at most (`limit`)" in found.remarks[0]
    assert "no total" in found.remarks[1]
    assert "not scored here" in found.remarks[2]
    assert found.remarks[2].endswith("ruHumanEval.")


def test_answers_that_only_the_site_can_score_are_not_called_no_tasks(tmp_path: Path) -> None:
    tasks = {name: task | {"metrics": None, "score": None} for name, task in mera()["tasks"].items()}
    text = card_of(from_mera(mera(split="test", limit=None, tasks=tasks)), tmp_path)
    assert "No tasks were run" not in text
    assert "not scored here, for want of public answers or of a scorer: LCS, CheGeKa, ruMMLU, ruHumanEval." in text


def test_what_was_not_run_is_said(tmp_path: Path) -> None:
    assert "No tasks were run." in card_of(joined([]), tmp_path)


def test_bits_per_byte_say_how_much_text(tmp_path: Path) -> None:
    found = from_bits({"results": {"ru": {"bits_per_byte": 0.95, "bytes": 9000, "tokens": 1500}}})
    assert lines(joined([found, found])) == 2 * [("held-out text, ru", None, "1,500 tokens", "bits_per_byte", 0.95)]
