"""`quickstart --model tiny` as a user starts it: the whole path, Ctrl-C in the middle of it, and starting again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tlite_jax.checkpoint import find, steps_on_disk

STEPS = 12
REPOSITORY = Path(__file__).resolve().parent.parent.parent
TIMEOUT = 300


def begin(out: Path) -> subprocess.Popen[str]:
    words = ["quickstart", "--model", "tiny", "--steps", str(STEPS), "--out", str(out)]
    quick = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": quick, "COLUMNS": "120"}
    return subprocess.Popen(
        [sys.executable, "-m", "launch", *words],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == status, output
    return output


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Its directory and what it printed."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    return out, finish(begin(out))


def table(output: str) -> str:
    return output[output.rindex("bits per byte  ") :]


def test_it_ends_with_what_was_learned_and_where_it_is(done: tuple[Path, str]) -> None:
    out, output = done
    rows = {cells[1].strip(): cells for line in output.splitlines() if len(cells := line.split("│")) == 6}
    assert list(rows) == ["Russian", "English", "code", "russian_letters (never trained on)"]
    for before, after, change in ((float(row[2]), float(row[3]), row[4].strip()) for row in rows.values()):
        assert float(change.removesuffix("%")) == pytest.approx(100 * (after / before - 1), abs=0.1)
    assert float(rows["Russian"][3]) < 0.97 * float(rows["Russian"][2])
    scores = tiny.metrics(out / "run", "bits_per_byte/language=ru")
    assert [f"{scores[step]:.3f}" for step in (0, STEPS)] == [rows["Russian"][i].strip() for i in (2, 3)]
    seen = [line.split("│") for line in output.splitlines() if len(line.split("│")) == 5]
    tokens = {cells[1].strip(): int(cells[2].replace(",", "")) for cells in seen}
    assert set(tokens) == {"russian.ru", "english.en", "code.code"}
    assert sum(tokens.values()) == STEPS * 8 * 256
    assert "before: Чтобы сохранить документ, нужно" in output
    assert "after: Чтобы сохранить документ, нужно" in output
    assert f"run: {out}/run" in output
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_transformers_loads_what_it_exported(done: tuple[Path, str]) -> None:
    out, output = done
    assert f"HF model: {out}/hf" in output
    model = AutoModelForCausalLM.from_pretrained(out / "hf")
    tokenizer = AutoTokenizer.from_pretrained(out / "hf")
    tokens = tokenizer("Чтобы сохранить документ, нужно", return_tensors="pt")
    written = model.generate(**tokens, max_new_tokens=8, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    (sample,) = (line for line in output.splitlines() if line.startswith("after: "))
    assert sample.removeprefix("after: Чтобы сохранить документ, нужно").startswith(
        tokenizer.decode(written, skip_special_tokens=True).rstrip()
    )
    embedding = tiny.params_of(find(out / "run"))["embedding"]
    assert np.array_equal(model.get_input_embeddings().weight.detach().numpy(), embedding)


def test_interrupted_and_started_again_it_ends_the_same(done: tuple[Path, str], tmp_path: Path) -> None:
    whole, expected = done
    out = tmp_path / "out"
    process, metrics = begin(out), out / "run" / "metrics.jsonl"
    end = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < end:
        if metrics.exists() and '"loss"' in metrics.read_text():
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.01)
    output = finish(process, status=130)
    assert "stopped by SIGINT; run again to go on" in output
    (stopped,) = steps_on_disk(out / "run")
    assert 0 < stopped < STEPS
    output = finish(begin(out))
    assert f"going on from step {stopped}" in output
    assert tiny.metrics(out / "run") == tiny.metrics(whole / "run")
    tiny.assert_same_state(find(out / "run"), find(whole / "run"))
    assert table(output).replace(str(out), "") == table(expected).replace(str(whole), "")


def test_started_again_when_done_it_says_the_same(done: tuple[Path, str]) -> None:
    out, expected = done
    before = tiny.contents(out / "run" / "checkpoints")
    output = finish(begin(out))
    assert f"step {STEPS} of {STEPS}, done" in output
    assert "\nstep " not in output
    assert table(output) == table(expected)
    assert tiny.contents(out / "run" / "checkpoints") == before
