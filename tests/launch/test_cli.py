"""The command line as a user meets it: help with examples, one-line errors, exit statuses, nothing harmed."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import __main__ as launch_main
from tests import tiny
from tests.launch.in_process import Ended, run_command
from tlite_jax.checkpoint import find, steps_on_disk
from tlite_jax.train import loop

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ended]]:
    """Calls `python -m launch` in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("TLITE_DEBUG", "")  # so that what --debug sets is undone

    def invoke(*words: object) -> Ended:
        return run_command(monkeypatch, capsys, *words)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield invoke
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a good config, `run.yaml`, whose output is `run`."""
    tiny.write_config(tmp_path / "run.yaml", tmp_path / "run")
    return tmp_path


@pytest.fixture
def refuse(call: Callable[..., Ended], place: Path) -> Callable[..., str]:
    """Asserts that a command is refused: one line, status 2, nothing written or harmed. Returns the line."""

    def invoke(*words: object) -> str:
        before = tiny.contents(place)
        ended = call(*words)
        assert ended.status == 2, ended
        (line,) = ended.err.splitlines()
        assert line.startswith("error: ")
        assert ended.out == ""
        assert tiny.contents(place) == before
        return line

    return invoke


def test_help_lists_every_command_in_the_order_of_a_run(call: Callable[..., Ended]) -> None:
    ended = call("--help")
    assert ended.status == 0
    places = [ended.out.index(f"\n  {command} ") for command in launch_main.COMMANDS]
    assert places == sorted(places)
    assert call().status in (0, 2)  # help too


@pytest.mark.parametrize("command", launch_main.COMMANDS)
def test_every_command_shows_an_example(command: str, call: Callable[..., Ended]) -> None:
    ended = call(command, "--help")
    assert ended.status == 0
    assert f"Example: python -m launch {command}" in ended.out


@pytest.mark.parametrize("command", ["train", "prepare", "mixture"])
def test_a_missing_config_is_refused(command: str, refuse: Callable[..., str], place: Path) -> None:
    assert "cannot read config" in refuse(command, place / "absent.yaml")


@pytest.mark.parametrize("command", ["train", "prepare", "mixture"])
def test_a_typo_is_refused(command: str, refuse: Callable[..., str], place: Path) -> None:
    line = refuse(command, place / "run.yaml", "optimizer.learning_rat=1e-4")
    assert "optimizer.learning_rat: unknown key; did you mean 'learning_rate'?" in line


@pytest.mark.parametrize("command", ["eval", "generate", "export"])
def test_a_missing_checkpoint_is_refused(command: str, refuse: Callable[..., str], place: Path) -> None:
    rest = {"eval": [], "generate": ["--prompt", "x"], "export": [place / "hf"]}[command]
    assert "no checkpoint in" in refuse(command, place / "absent", *rest)
    assert "has no checkpoint of step 3; it has 0" in refuse(command, tiny.data() / "imported", *rest, "--step", "3")


def test_a_missing_document_is_refused(refuse: Callable[..., str], place: Path) -> None:
    words = [f"data.prepare.sources=[{{name: ru, paths: [{place}/absent.jsonl]}}]", f"data.buckets={place}/buckets"]
    assert "absent.jsonl" in refuse("prepare", place / "run.yaml", *words)


def test_an_empty_corpus_is_refused(call: Callable[..., Ended], place: Path) -> None:
    (place / "empty.jsonl").write_text("")
    words = [f"data.prepare.sources=[{{name: ru, paths: [{place}/empty.jsonl]}}]", f"data.buckets={place}/buckets"]
    before = tiny.contents(place)
    ended = call("prepare", place / "run.yaml", *words)
    assert ended.status == 2
    assert ended.err.splitlines()[-1] == "error: no documents in ru: the files are empty"
    after = tiny.contents(place)
    assert {name: after[name] for name in before} == before
    assert "no finished buckets" in call("train", place / "run.yaml", *words).err


def test_a_batch_the_mesh_cannot_share_is_refused(refuse: Callable[..., str], place: Path) -> None:
    line = refuse("train", place / "run.yaml", "train.batch_size=25")
    assert "train.batch_size 25 is not divisible by 8 devices" in line
    assert "use 24 or 32" in line
    line = refuse("train", place / "run.yaml", "mesh.replica=3")
    assert "replica 3 x fsdp the rest in the config, 1 x 8 = 8 devices found" in line
    assert "nearest first: mesh.replica=4 mesh.fsdp=2; mesh.replica=2 mesh.fsdp=4; mesh.replica=8" in line


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_a_vocabulary_too_small_is_refused(command: str, refuse: Callable[..., str], place: Path) -> None:
    words = ["model.vocab_size=290", f"data.buckets={place}/buckets" if command == "prepare" else "seed=1"]
    line = refuse(command, place / "run.yaml", *words)
    assert "the tokenizer has ids up to 299, the model's vocab_size is 290" in line


def test_an_unwritable_output_is_refused(refuse: Callable[..., str], place: Path) -> None:
    (place / "file").write_text("a file")
    assert "cannot write to" in refuse("train", place / "run.yaml", f"output={place}/file/run")
    assert "cannot write" in refuse("prepare", place / "run.yaml", f"data.buckets={place}/file/buckets")
    assert "cannot write" in refuse("quickstart", "--model", "tiny", "--out", place / "file" / "quick")
    assert "cannot write" in refuse("export", tiny.data() / "imported", place / "file" / "hf")


def test_an_output_of_another_run_is_refused(
    refuse: Callable[..., str], call: Callable[..., Ended], place: Path
) -> None:
    tiny.start(tiny.config(place / "run", *tiny.from_imported()))
    line = refuse("train", place / "run.yaml", *tiny.from_imported(), "optimizer.learning_rate=1e-4")
    assert "holds another run; changed: optimizer.learning_rate: 0.01 -> 0.0001. Choose another output" in line
    assert "is not empty" in refuse("export", tiny.data() / "imported", place / "run")
    assert "is not empty" in refuse("import", tiny.data() / "tokenizer", place / "run")
    ended = call("train", place / "run.yaml", *tiny.from_imported())
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.splitlines()[0] == f"{place}/run: step 6 of 6, done"


def test_other_mistakes_are_one_line_too(refuse: Callable[..., str], place: Path) -> None:
    imported = tiny.data() / "imported"
    assert "--model huge is not known; choose from smollm2, tiny" in refuse("quickstart", "--model", "huge")
    assert "--dtype int4" in refuse("eval", imported, "--dtype", "int4")
    assert "give --buckets" in refuse("eval", imported)
    assert "the prompt is empty" in refuse("generate", imported, "--prompt", "")
    assert "together, or none" in refuse("train", place / "run.yaml", "--process-id", "0")
    assert "--process-id 2 is not one of 0..1" in refuse(
        "train", place / "run.yaml", "--coordinator", "127.0.0.1:1", "--num-processes", "2", "--process-id", "2"
    )


def test_a_failure_of_ours_is_one_line_and_debug_shows_the_trace(
    call: Callable[..., Ended], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_, **__):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("tlite_jax.train.run.open_run", broken)
    assert call("train", place / "run.yaml") == (1, "", "error: RuntimeError: first line\n")
    traced = call("--debug", "train", place / "run.yaml")
    assert traced.status == 1
    assert "Traceback" in traced.err
    assert traced.err.endswith("error: RuntimeError: first line\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_saves_and_has_its_own_status(
    number: signal.Signals, status: int, call: Callable[..., Ended], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.batches

    def batches(*arguments, **options):
        for batch in real(*arguments, **options):
            signal.raise_signal(number)
            yield batch

    monkeypatch.setattr(loop, "batches", batches)
    monkeypatch.setattr(loop, "make_step", tiny.make_quick_step)
    ended = call("train", place / "run.yaml", *tiny.from_imported())
    assert ended.status == status
    answered = signal.SIGTERM if number == signal.SIGUSR1 else number
    assert f"step 1 of 6, stopped by {answered.name}; run again to go on" in ended.out
    assert steps_on_disk(place / "run") == [1]
    monkeypatch.setattr(loop, "batches", real)
    ended = call("train", place / "run.yaml", *tiny.from_imported(), "telemetry.console=true")
    assert ended.status == 0
    assert f"going on from step 1 of {place}/run" in ended.out
    assert find(place / "run").step == 6


def test_ctrl_c_where_nothing_can_be_saved(
    call: Callable[..., Ended], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tlite_jax.train.run.open_run", interrupted)
    ended = call("train", place / "run.yaml")
    assert ended.status == 130
    assert ended.err == "error: interrupted; start the same command again to go on\n"


def test_a_trained_run_is_evaluated_continued_and_exported(call: Callable[..., Ended], place: Path) -> None:
    """The commands after training, on one run."""
    run = place / "run"
    tiny.start(tiny.config(run, *tiny.from_imported()))
    ended = call("eval", run, "--json")
    assert ended.status == 0, ended.err
    assert '"language=ru": {"bits_per_byte": ' in ended.out
    ended = call("generate", run, "--prompt", "Утром над рекой", "--max-new-tokens", "3")
    assert ended.status == 0, ended.err
    assert ended.out.startswith("Утром над рекой")
    ended = call("export", run, place / "hf")
    assert (ended.status, ended.out.splitlines()[-1]) == (0, f"{place}/hf: step 6 of {run}, weights bfloat16")
    assert (place / "hf" / "model.safetensors").stat().st_size > 0
    assert call("export", run / "checkpoints" / "6", place / "hf").status == 2


def test_a_checkpoint_without_tokenizer_is_refused(refuse: Callable[..., str], place: Path) -> None:
    shutil.copytree(tiny.data() / "imported" / "checkpoints", place / "bare" / "checkpoints")
    assert "has no tokenizer directory" in refuse("generate", place / "bare", "--prompt", "x")


def test_the_real_process_agrees(place: Path) -> None:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}

    def ended(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch", *words]
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)

    refused = ended("train", str(place / "run.yaml"), "train.stepz=3")
    assert (refused.returncode, refused.stdout) == (2, "")
    # Where the compiler for NVIDIA is installed and no driver is, it says so itself, whatever we do.
    ours = [line for line in refused.stderr.splitlines() if "absl::InitializeLog" not in line and "cudart" not in line]
    assert ours == [f"error: {place}/run.yaml: train.stepz: unknown key; did you mean 'steps'?"]
