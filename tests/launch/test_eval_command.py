"""`eval --tasks` and `generate` as a user meets them."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny
from tests.launch.in_process import Ended, run_command
from tlite_jax.release.evaluated import from_harness

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness's own libraries


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Calls `python -m launch` in this process."""
    monkeypatch.setenv("TLITE_DEBUG", "")

    def invoke(*words: object) -> Ended:
        return run_command(monkeypatch, capsys, *words)

    return invoke


@pytest.fixture
def refused(call: Callable[..., Ended]) -> Callable[..., str]:
    """Asserts that a command is refused with status 2; returns the line that says why."""

    def invoke(*words: object) -> str:
        ended = call(*words)
        assert ended.status == 2, ended
        return ended.err.splitlines()[-1]

    return invoke


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A directory with a multiple-choice task and one that writes, over local files."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is 200 MB: make test-eval installs it")
    documents = [{"question": f"Река {number}", "choices": ["берег", "лодка", "туман"]} for number in range(6)]
    (tmp_path / "rivers.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    shared = f"dataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/rivers.jsonl}}\ntest_split: train\n"
    (tmp_path / "rivers.yaml").write_text(
        "task: rivers\n" + shared + "output_type: multiple_choice\nfewshot_split: train\n"
        'doc_to_text: "{{question}}:"\ndoc_to_target: 0\ndoc_to_choice: choices\nmetric_list: [{metric: acc}]\n'
    )
    (tmp_path / "songs.yaml").write_text(
        "task: songs\n" + shared + "output_type: generate_until\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[0]}}"\nmetric_list: [{metric: exact_match}]\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}\n'
    )
    (tmp_path / "waters.yaml").write_text(
        "group: waters\ntask: [rivers]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    (tmp_path / "lost.yaml").write_text("task: lost\n" + shared.replace("rivers.jsonl", "absent.jsonl"))
    return tmp_path


def test_local_tasks_run_and_write_the_harness_files(call, tasks):
    words = ["--tasks", "rivers,songs", "--include-path", tasks, "--output", tasks / "out", "--log-samples"]
    ended = call("eval", tiny.data() / "imported", *words, "--limit", 4, "--num-fewshot", 1)
    assert ended.status == 0, ended.err
    assert "|rivers|" in ended.out.replace(" ", "")
    (results,) = (tasks / "out").rglob("results_*.json")
    found = json.loads(results.read_text())
    assert found["results"]["rivers"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
    assert found["n-samples"]["rivers"] == {"original": 6, "effective": 4}
    assert found["config"]["num_truncated"] == {"requests": 0, "prompts": 0}
    (samples,) = (tasks / "out").rglob("samples_songs_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == 4
    assert all(isinstance(line["resps"][0][0], str) for line in lines)


def test_a_card_reads_what_the_harness_writes(call, tasks):
    words = ["--tasks", "waters,songs", "--include-path", tasks, "--output", tasks / "out", "--limit", 4]
    assert call("eval", tiny.data() / "imported", *words).status == 0
    (results,) = (tasks / "out").rglob("results_*.json")
    found = from_harness(json.loads(results.read_text()))
    assert {(row.task, row.metric_name, row.num_fewshot, row.extent) for row in found.rows} == {
        ("waters", "acc", 0, "1 subtask, 4 of 6 documents"),
        ("songs", "exact_match", 0, "4 of 6 documents"),
    }
    assert len(found.remarks) == 1


def test_json_and_cut_contexts(call, tasks):
    words = ["--tasks", "rivers", "--include-path", tasks, "--num-fewshot", 3, "--max-length", 12, "--json"]
    ended = call("eval", tiny.data() / "imported", *words)
    assert ended.status == 0, ended.err
    found = json.loads(ended.out.splitlines()[-1])
    assert 0 <= found["results"]["rivers"]["acc,none"] <= 1
    assert found["num_truncated"] == {"requests": 18, "prompts": 0}


def test_what_is_wrong_with_tasks_is_said_in_a_line(refused, tasks):
    words = ["eval", tiny.data() / "imported", "--include-path", tasks, "--tasks"]
    line = refused(*words, "lost")
    assert "task lost: its data is not here" in line
    assert "absent.jsonl" in line
    assert "--include-path" in line
    assert "the tokenizer has no chat template" in refused(*words, "rivers", "--apply-chat-template")
    assert "give --output" in refused(*words, "rivers", "--log-samples")
    assert "no task file absent.yaml" in refused(*words, "absent.yaml")
    assert "--limit 2.5: a whole number" in refused(*words, "rivers", "--limit", "2.5")
    (tasks / "file").write_text("")
    assert "cannot write to --output" in refused(*words, "rivers", "--output", tasks / "file" / "out")
    assert "is not a directory" in refused("eval", tiny.data() / "imported", "--tasks", "x", "--include-path", "absent")


def test_an_unknown_task_has_neighbours(refused, tasks):
    line = refused("eval", tiny.data() / "imported", "--tasks", "arc_eazy")
    assert "lm-evaluation-harness has no task 'arc_eazy'; the nearest are " in line
    assert "arc_easy" in line


def test_without_the_harness_its_extra_is_named(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = refused("eval", tiny.data() / "imported", "--tasks", "arc_easy")
    assert line == "error: --tasks needs 'lm_eval': pip install 'tlite_jax[eval]'"


def test_prompts_come_from_files_and_answers_as_json(call, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Утром"}\n{"prompt": "Он"}\n')
    words = ["--prompt-file", tmp_path / "prompts.jsonl", "--max-tokens", 4, "--temperature", 1, "--num-samples", 2]
    ended = call("generate", tiny.data() / "imported", *words, "--json")
    assert ended.status == 0, ended.err
    lines = [json.loads(line) for line in ended.out.splitlines() if line.startswith("{")]
    assert [line["prompt"] for line in lines] == ["Утром", "Утром", "Он", "Он"]
    assert lines[0]["text"] != lines[1]["text"]
    assert all(line["ending"] in ("length", "end") and line["tokens"] <= 4 for line in lines)


def test_standard_input_is_continued(call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Утром над рекой".encode())))
    ended = call("generate", tiny.data() / "imported", "--prompt-file", "-", "--max-tokens", 3)
    assert ended.status == 0, ended.err
    assert "Утром над рекой" in ended.out


def test_wrong_options_are_refused(refused, tmp_path):
    words = ["generate", tiny.data() / "imported"]
    assert "the tokenizer has no chat template" in refused(*words, "--prompt", "x", "--chat")
    assert "give --prompt" in refused(*words)
    assert "--system is for --chat" in refused(*words, "--prompt", "x", "--system", "y")
    assert "set --temperature above 0" in refused(*words, "--prompt", "x", "--num-samples", "2")
    assert "top_p 2.0 is not in" in refused(*words, "--prompt", "x", "--top-p", "2")
    assert "cannot read --prompt-file" in refused(*words, "--prompt-file", tmp_path / "absent")
    (tmp_path / "bad.txt").write_bytes(b"ok \xff")
    assert "is not UTF-8 at byte 3" in refused(*words, "--prompt-file", tmp_path / "bad.txt")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert 'bad.jsonl, line 2: expected {"prompt": "..."}' in refused(*words, "--prompt-file", tmp_path / "bad.jsonl")
    assert "exceed the model's context of 64" in refused(*words, "--prompt", "x", "--max-tokens", "64")
