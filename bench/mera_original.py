"""Our MERA beside the original's code: the same prompts, submission files and scores on the same documents?

    git clone https://github.com/ai-forever/MERA && pip install datasets scikit-learn sacrebleu torch
    pip download --no-deps transformers==4.41.2 -d wheels && unzip -d wheels wheels/transformers*.whl
    python bench/mera_original.py MERA --squad wheels/transformers/data/metrics/squad_metrics.py

The checkout must hold `lm-evaluation-harness/lm_eval` (its `main` of July 2024). Both sides are asked by the same fake
model on made-up documents (`mini_mera.py`), with ruHumanEval's programs executed. Exit status 1 where anything differs.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import mini_mera  # noqa: E402
from _mera_fake import FakeModel  # noqa: E402

from tlite_jax.evaluate.mera.run import TaskRun, prepare, run_task  # noqa: E402
from tlite_jax.evaluate.mera.score import total_score  # noqa: E402
from tlite_jax.evaluate.mera.submission import submission_json  # noqa: E402
from tlite_jax.evaluate.mera.tasks import TASKS, Task  # noqa: E402


def main() -> None:
    """Runs both and prints, for each task, what was compared and whether it is equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--squad", type=Path, required=True, help="squad_metrics.py of transformers 4")
    parser.add_argument("--documents", type=int, default=40, help="of each task")
    parser.add_argument("--seed", type=int, default=0, help="of the documents")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        data = mini_mera.write(directory / "mini", documents=given.documents, answers=True, seed=given.seed)
        theirs = _original(given.checkout, given.squad, data, directory / "original")
        runs = [_ours(task, data, directory / "ours") for task in TASKS]
    scores = {run.task.name: run.scores() for run in runs}
    equal = [_compare(run, theirs) for run in runs]
    total = total_score({name: found for name, found in scores.items() if found})
    same_total = total is not None and math.isclose(total, theirs["scores"]["total_score"], rel_tol=1e-12)
    print(f"total: ours {total}, theirs {theirs['scores']['total_score']}: {'equal' if same_total else 'DIFFERENT'}")
    sys.exit(0 if all(equal) and same_total else 1)


def _original(checkout: Path, squad: Path, data: Path, output: Path) -> dict[str, Any]:
    output.mkdir()
    shots = json.dumps({task.folder: task.shots for task in TASKS})
    worker = Path(__file__).with_name("_mera_worker.py")
    command = [sys.executable, str(worker), str(checkout), str(data), str(output), str(squad.resolve()), shots]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the original failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads((output / "original.json").read_text(encoding="utf-8"))
    return result


def _ours(task: Task, data: Path, store: Path) -> TaskRun:
    questions = prepare(data, task, split="test", limit=None)
    return run_task(FakeModel(), questions, allow_code=True, store=store, identity={}, progress=lambda *_: None)


def _compare(run: TaskRun, theirs: dict[str, Any]) -> bool:
    task = run.task
    requests: list[Any] = []
    for record in run.records:
        if task.choices:
            requests += [[record.context, f" {choice}"] for choice in task.choices]
        else:
            requests.append([record.context, {"until": list(task.stops)}])
    text = submission_json(
        task, run.documents, {record.id: record.answer for record in run.records}, [record.id for record in run.records]
    )
    scores = run.scores() or {}
    expected = theirs["scores"].get(task.name, {})
    same = {
        "requests": requests == theirs["requests"][task.folder],
        "file": text == theirs["submission"][f"{task.name}.json"],
        "scores": scores.keys() == expected.keys()
        and all(math.isclose(scores[name], expected[name], rel_tol=1e-12, abs_tol=1e-12) for name in scores),
    }
    words = ", ".join(f"{what} {'equal' if is_same else 'DIFFERENT'}" for what, is_same in same.items())
    print(f"{task.name:14s} {task.shots}-shot, {len(requests):4d} requests: {words} {_short(scores)}")
    return all(same.values())


def _short(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if "." not in name)


if __name__ == "__main__":
    main()
