"""Evaluation of a real run: the base measured once and kept, stages, meshes, the best step, refusals."""

import json
import shutil
from pathlib import Path

import pytest

from launch.train_parts.evaluation import check_evaluation, make_evaluation
from tests import tiny
from tlite_jax.best import BOARD_FILE
from tlite_jax.checkpoint import find, steps_on_disk
from tlite_jax.errors import UserError
from tlite_jax.evaluate import base_files
from tlite_jax.evaluate.base import find_base
from tlite_jax.evaluate.divergence import DivergenceMeter
from tlite_jax.evaluate.in_loop import SAMPLES_FILE
from tlite_jax.train.run import open_run

EVALUATION = (
    "evaluation={every: 2, batch_size: 3, kl: {tokens: 120, top_k: 16}, "
    "watch: [{select: {language: en}, worse_by: 9.0, action: stop}], best: {objective: {language=ru: 1.0}}}"
)


def start(output: Path, *words: str, mesh=None, source: Path | None = None):
    """A run from the imported model, or another, with its evaluation."""
    path = source or tiny.data() / "imported"
    words = ["model=null", f"init_from={{path: {path}, optimizer: reset, schedule: reset}}", EVALUATION, *words]
    config = tiny.config(output, *words)
    check_evaluation(config)
    mesh = mesh or tiny.mesh()
    evaluation = make_evaluation(open_run(config, mesh=mesh), mesh)
    return tiny.start(config, mesh, evaluate=evaluation)


def board(output: Path) -> dict[int, dict]:
    return {line["step"]: line for line in map(json.loads, (output / BOARD_FILE).read_text().splitlines())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluated") / "run"
    start(output, "checkpoint.every=4")
    return output


def test_the_board_holds_every_step_and_metrics_say_the_same(whole: Path) -> None:
    lines = board(whole)
    assert list(lines) == [0, 2, 4, 6]
    base = json.loads((whole / base_files.BASE_FILE).read_text())
    assert lines[0]["scores"] == base["scores"]
    for step, line in lines.items():
        nats, num_bytes, _ = line["scores"]["ru.ru"]
        before = base["scores"]["ru.ru"][0]
        bits = tiny.metrics(whole, "bits_per_byte/language=ru")[step]
        assert bits == pytest.approx(nats / 0.6931471805599453 / num_bytes)
        delta = tiny.metrics(whole, "bits_per_byte_delta/language=ru")[step]
        assert delta == pytest.approx((nats - before) / 0.6931471805599453 / num_bytes)
        kl_nats, tokens = line["kl"]["en.en"]
        assert tokens == 60
        assert tiny.metrics(whole, "kl/language=en")[step] == pytest.approx(kl_nats / 60)
        assert line["objective"] == pytest.approx(bits)
    kls = [line["kl"]["en.en"][0] for line in lines.values()]
    assert 0 == kls[0] < kls[1] < kls[2]
    assert {"evaluation_seconds", "evaluation_padding_share", "evaluation_tokens"} <= set(
        json.loads((whole / "metrics.jsonl").read_text().splitlines()[3])
    )


def test_a_run_that_goes_on_on_another_mesh_measures_the_same(whole: Path, tmp_path: Path, monkeypatch) -> None:
    """Its base is read from disk: it has no way to measure it, even with the base gone."""
    monkeypatch.setattr(DivergenceMeter, "write_base", None)
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints" / "6")
    start(copy, "mesh.replica=2", "evaluation.batch_size=8", mesh=tiny.mesh(2, 2))
    found, expected = board(copy), board(whole)
    assert list(found) == [0, 2, 4, 6]
    assert found[4] == expected[4]
    for kind in ("scores", "kl"):
        for name, (nats, *counts) in expected[6][kind].items():
            assert found[6][kind][name][0] == pytest.approx(nats, rel=2e-6 if kind == "scores" else 1e-4)
            assert found[6][kind][name][1:] == counts


def test_a_base_that_is_gone_is_remembered_or_missed(tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny.data() / "imported", tmp_path / "source"))
    start(tmp_path / "run", "train.steps=2", "checkpoint.every=1", source=source)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    shutil.rmtree(source)
    start(tmp_path / "run", "train.steps=2", "checkpoint.every=1", source=source)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    with pytest.raises(UserError, match="the base to compare with, is gone, and was measured on other text"):
        start(tmp_path / "run", "train.steps=2", "evaluation.max_tokens=50", source=source)
    shutil.rmtree(tmp_path / "run" / "evaluation")
    with pytest.raises(UserError, match=r"the base to compare with is gone .*restore it or set evaluation.base"):
        start(tmp_path / "run", "train.steps=2", source=source)


def test_the_base_stays_the_first_stages_through_stages(whole: Path, tmp_path: Path, monkeypatch) -> None:
    """The second stage's text is the same, so that it takes over what the first measured."""
    expected = json.loads((whole / base_files.BASE_FILE).read_text())
    with monkeypatch.context() as patch:
        patch.setattr(DivergenceMeter, "write_base", None)
        start(tmp_path / "second", "train.steps=2", source=whole)
    assert json.loads((tmp_path / "second" / base_files.BASE_FILE).read_text()) == expected
    first = board(tmp_path / "second")[0]
    assert first["scores"]["ru.ru"] == pytest.approx(board(whole)[6]["scores"]["ru.ru"], rel=1e-6)
    assert first["scores"] != expected["scores"]
    words = ["model=null", f"init_from={{path: {tmp_path / 'second'}, optimizer: reset, schedule: reset}}", EVALUATION]
    third = tiny.config(tmp_path / "third", *words)
    assert find_base(third, tmp_path / "third").checkpoint == find(tiny.data() / "imported")
    named = tiny.config(tmp_path / "third", *words, f"evaluation.base={whole}")
    assert find_base(named, tmp_path / "third").checkpoint == find(whole)


def test_the_best_step_can_be_named(whole: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(whole, tmp_path / "run"))
    assert steps_on_disk(copy) == [2, 4, 6]  # each was the best so far when it was evaluated
    text = (copy / BOARD_FILE).read_text().splitlines()
    lines = [json.loads(line) for line in text]
    lines[2]["objective"] = -1.0
    (copy / BOARD_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert find(copy, "4").step == 4
    assert find(copy, "best").step == find(Path(f"{copy}@best")).step == 4
    assert find(copy).step == 6
    assert find(Path(f"{copy}@2")).step == 2
    assert find(Path(f"{copy}@2"), 6).step == 6
    (tmp_path / "odd@name").symlink_to(copy)
    assert find(tmp_path / "odd@name").step == 6
    with pytest.raises(UserError, match="step 'bst' is neither a number nor best"):
        find(Path(f"{copy}@bst"))
    with pytest.raises(UserError, match=r"has no best step: evaluation.best was not set"):
        find(tiny.data() / "imported", "best")


def test_random_weights_are_a_base_too_and_samples_are_written(tmp_path: Path) -> None:
    samples = "evaluation.samples=[Чтобы сохранить, Open the]"
    config = tiny.config(tmp_path / "run", EVALUATION, "train.steps=2", samples, "evaluation.sample_tokens=5")
    evaluation = make_evaluation(open_run(config, mesh=tiny.mesh()), tiny.mesh())
    tiny.start(config, evaluate=evaluation)
    found = board(tmp_path / "run")
    assert found[0]["kl"]["en.en"][0] == 0 < found[2]["kl"]["en.en"][0]
    assert json.loads((tmp_path / "run" / base_files.BASE_FILE).read_text())["base"] == "random weights"
    written = [json.loads(line) for line in (tmp_path / "run" / SAMPLES_FILE).read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in written] == [
        (step, prompt) for step in (0, 2) for prompt in ("Чтобы сохранить", "Open the")
    ]
    assert all(line["continuation"] for line in written)


@pytest.mark.parametrize(
    ("word", "match"),
    [
        (
            "evaluation.watch=[{select: {language: fr}, worse_by: 1.0}]",
            r"language=fr matches no held-out bucket; there",
        ),
        ("evaluation.best={objective: {domain=law: 1.0}}", "evaluation.best.objective domain=law matches no held-out"),
        (
            "evaluation.kl={tokens: 100000}",
            "evaluation.kl.tokens 100000 is more than the [0-9]+ held-out tokens of the 2",
        ),
        ("evaluation.kl={tokens: 10, select: {language: fr}}", "evaluation.kl.select language=fr matches no held-out"),
    ],
)
def test_bad_selections_are_refused(word: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match):
        start(tmp_path / "run", word)
    if "kl" not in word:
        assert not (tmp_path / "run").exists()  # refused before anything is written


def test_a_base_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny.data() / "tokenizer", tmp_path / "tokenizer"))
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("\n", " "))
    tiny.write_imported(tmp_path / "other", other)
    with pytest.raises(UserError, match=r"evaluation.base .*other has another tokenizer than the run"):
        start(tmp_path / "run", f"evaluation.base={tmp_path / 'other'}")
    tiny.write_imported(tmp_path / "larger", tiny.data() / "tokenizer", vocab_size=310)
    with pytest.raises(UserError, match="has a vocabulary of 310, the run's has 307"):
        start(tmp_path / "run", f"evaluation.base={tmp_path / 'larger'}")


def test_without_held_out_text_evaluation_is_refused(tmp_path: Path) -> None:
    from tlite_jax.data.prepare import prepare

    words = [f"data.buckets={tmp_path / 'buckets'}", "data.prepare.held_out.fraction=0.0"]
    config = tiny.config(tmp_path / "run", *words)
    prepare(config, tiny.data() / "tokenizer")
    with pytest.raises(
        UserError, match=r"holds no held-out documents; prepare with data.prepare.held_out.fraction > 0"
    ):
        start(tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_tasks_of_the_harness_run_while_training(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is 200 MB: make test-eval installs it")
    documents = [{"question": f"Река {number}", "choices": ["берег", "лодка", "туман"]} for number in range(4)]
    (tmp_path / "rivers.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "rivers.yaml").write_text(
        f"task: rivers\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/rivers.jsonl}}\n"
        'test_split: train\noutput_type: multiple_choice\ndoc_to_text: "{{question}}:"\ndoc_to_target: 0\n'
        "doc_to_choice: choices\nmetric_list: [{metric: acc}]\n"
    )
    asked = f"evaluation.tasks={{names: [rivers], every: 4, limit: 3, include_path: {tmp_path}}}"
    start(tmp_path / "run", asked, "evaluation.kl=null", "train.steps=4")
    found = tiny.metrics(tmp_path / "run", "tasks/rivers/acc")
    assert list(found) == [0, 4]
    assert all(value * 3 == pytest.approx(round(value * 3)) for value in found.values())
    with pytest.raises(UserError, match="river"):
        start(tmp_path / "other", asked.replace("[rivers]", "[riverz]"), "evaluation.kl=null")
