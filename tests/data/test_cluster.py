"""datatrove's executors make the same buckets; `make test-cluster` asks Slurm and Ray themselves."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from written_texts import ENGLISH, RUSSIAN, make_texts, write_jsonl

from tlite_jax.config import RunConfig
from tlite_jax.config_files import save_config
from tlite_jax.data.preparation import find_preparation
from tlite_jax.data.prepare import prepare
from tlite_jax.errors import UserError

cluster = pytest.importorskip("tlite_jax.data.cluster", reason="needs datatrove: extra data")

Snapshot = dict[str, bytes]


def snapshot(directory: Path) -> Snapshot:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def config(run_config: Callable[..., RunConfig], tmp_path: Path) -> RunConfig:
    sources = []
    for name, sentences in (("ru", RUSSIAN), ("en", ENGLISH)):
        texts = make_texts(sentences, 60, 3)
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in [*texts, texts[5]]])
        sources.append({"name": name, "paths": [str(path)], "labels": {"language": name}})
    return run_config(sources, prepare={"shard_bytes": 5000, "near_duplicates": {"threshold": 0.8}})


@pytest.fixture
def expected(config: RunConfig, tokenizer_dir: Path, tmp_path: Path) -> Snapshot:
    """What processes of this machine make."""
    data = config.data.model_copy(update={"buckets": tmp_path / "reference"})
    prepare(config.model_copy(update={"data": data}), tokenizer_dir)
    return snapshot(tmp_path / "reference")


def executor(tmp_path: Path, **options: object) -> object:
    return replace(cluster.Executor(tasks=3, workers=2, logs=tmp_path / "logs", memory_gb=1), **options)


# The tests' process has jax's threads; the command's has not.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_datatroves_local_executor_makes_the_same(
    config: RunConfig, tokenizer_dir: Path, tmp_path: Path, expected: Snapshot
) -> None:
    report = prepare(config, tokenizer_dir, run_shards=cluster.run_local(executor(tmp_path)))
    assert not report.reused
    assert snapshot(config.data.buckets) == expected


def test_tasks_cut_the_shards_among_them_and_the_join_wants_all(
    config: RunConfig, tokenizer_dir: Path, expected: Snapshot
) -> None:
    preparation = find_preparation(config, tokenizer_dir)
    total = len(preparation.shards())
    job = cluster._save(preparation)
    step = cluster.TokenizeShards(job)
    for rank in (2, 0):
        step(None, rank, 3)
    join = cluster.JoinShards(job, 1, force=False)
    with pytest.raises(UserError, match=rf"{total // 3} of {total} shards are not tokenised; start the same"):
        join(None, 0, 1)
    step(None, 1, 3)
    # A finished shard that lost its bytes is no finished shard, whatever marks there are.
    (damaged,) = list((config.data.buckets / ".shards").glob("[0-9a-f]*/tokens.bin"))[:1]
    damaged.write_bytes(b"")
    with pytest.raises(UserError, match=rf"1 of {total} shards"):
        join(None, 0, 1)
    for rank in range(3):
        step(None, rank, 3)
    join(None, 0, 1)
    assert snapshot(config.data.buckets) == expected


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for sbatch: keeps what it is given, answers with numbers 11, 12 ..."""
    kept = tmp_path / "kept"
    kept.mkdir()
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    lines = [
        f"#!{sys.executable}",
        "import pathlib, shutil, sys",
        f"kept = pathlib.Path({str(kept)!r})",
        "number = 11 + len(list(kept.glob('*.slurm')))",
        "shutil.copy(sys.argv[-1], kept / f'{number}.slurm')",
        "(kept / f'{number}.words').write_text(' '.join(sys.argv[1:-1]))",
        "print('Submitted batch job', number)",
    ]
    program.write_text("\n".join(lines))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return kept


def test_two_jobs_are_submitted_and_the_join_waits(
    config: RunConfig, tokenizer_dir: Path, tmp_path: Path, sbatch: Path
) -> None:
    preparation = find_preparation(config, tokenizer_dir)
    slurm = cluster.Slurm("cpu", "02:00:00", 4, {"account": "lab"})
    done = cluster.submit_slurm(preparation, executor(tmp_path), slurm, force=False)
    assert (done.tokenize_job, done.join_job, done.tasks) == ("11", "12", 3)
    assert done.shards == len(preparation.shards())
    assert len(list(sbatch.glob("*.slurm"))) == 2, "no job for datatrove's statistics"
    first, second = ((sbatch / f"{number}.slurm").read_text() for number in (11, 12))
    wanted = ("--array=0-2%2", "--partition=cpu", "--time=02:00:00", "--account=lab", "--requeue", "--cpus-per-task=1")
    for line in wanted:
        assert f"#SBATCH {line}\n" in first
        assert f"export PATH={Path(sys.executable).parent}" in first.replace("PATH='", "PATH=")
    assert "#SBATCH --cpus-per-task=4\n" in second
    assert "--dependency=afterany:11" in (sbatch / "12.words").read_text()
    # What Slurm is to run finds its way from another directory and process.
    dill = pytest.importorskip("dill")
    pickled = dill.loads(next((tmp_path / "logs").glob("tokenise-*/executor.pik")).read_bytes())
    assert (pickled.world_size, pickled.skip_completed) == (3, False)
    pickled.pipeline[0](None, 1, 3)
    mine = preparation.shards()[1::3]
    assert len(list((config.data.buckets / ".shards").glob("[0-9a-f]*/manifest.json"))) == len(mine)


def test_what_sbatch_refuses_is_one_line(config: RunConfig, tokenizer_dir: Path, tmp_path: Path, sbatch: Path) -> None:
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    slurm = cluster.Slurm("none", "1", 1, {})
    with pytest.raises(UserError, match=r"sbatch did not take the jobs: .*sbatch") as caught:
        cluster.submit_slurm(find_preparation(config, tokenizer_dir), executor(tmp_path), slurm, force=False)
    assert "\n" not in str(caught.value)


def _has_slurm() -> bool:
    return bool(shutil.which("sinfo")) and subprocess.run(["sinfo"], capture_output=True).returncode == 0


@pytest.mark.skipif("TLITE_CLUSTER" not in os.environ or not _has_slurm(), reason="make test-cluster, with a Slurm")
def test_slurm_makes_the_same_though_a_task_is_killed(
    config: RunConfig, tokenizer_dir: Path, tmp_path: Path, expected: Snapshot
) -> None:
    save_config(config, tmp_path / "run.yaml")
    listed = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, check=True)
    partition = listed.stdout.split()[0]
    command = [sys.executable, "-m", "launch", "prepare", str(tmp_path / "run.yaml"), "--executor", "slurm", "--json"]
    command += ["--partition", partition, "--tasks", "3", "--memory-gb", "1", "--join-cores", "1", "--time", "10"]
    for attempt in range(3):
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        answer = json.loads(ran.stdout)
        if "submitted" not in answer:
            break
        jobs = answer["submitted"]
        if attempt == 0:
            subprocess.run(["scancel", f"{jobs['tokenize_job']}_1"], check=True)
        _wait_for([jobs["tokenize_job"], jobs["join_job"]])
        assert (config.data.buckets / "manifest.json").exists() == (attempt > 0)
    assert snapshot(config.data.buckets) == expected


def _wait_for(jobs: list[str]) -> None:
    while subprocess.run(["squeue", "-h", "-j", ",".join(jobs)], capture_output=True, text=True).stdout.strip():
        time.sleep(1)


@pytest.mark.skipif("TLITE_CLUSTER" not in os.environ, reason="make test-cluster: starting Ray takes a minute")
def test_ray_makes_the_same(config: RunConfig, tokenizer_dir: Path, tmp_path: Path, expected: Snapshot) -> None:
    pytest.importorskip("ray", reason="extra ray")
    prepare(config, tokenizer_dir, run_shards=cluster.run_ray(executor(tmp_path), None))
    assert snapshot(config.data.buckets) == expected
