"""No code from data: no pickle, remote code, YAML tag or shell; no token in what is written."""

import contextlib
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import yaml

from launch import __main__ as launch_main
from tests import tiny
from tests.faults.source_scan import problems, python_files
from tlite_jax.config_files import _Loader, load_config, read_yaml, save_config
from tlite_jax.errors import UserError
from tlite_jax.telemetry.environment import environment

REPOSITORY = Path(__file__).resolve().parents[2]
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")
# Each with its reason.
ALLOWED = {
    # MERA's code tasks are programs: they run in a process without the environment, limited, and only when asked.
    ("tlite_jax/evaluate/mera/program_runner.py", "exec() runs a string"),
    # The job file of `prepare` on a cluster, read back only under the hash it was written with.
    ("tlite_jax/data/cluster.py", "imports pickle"),
    # The source of MERA's own metrics, installed by whoever runs this comparison.
    ("bench/_mera_worker.py", "exec() runs a string"),
}


def test_no_source_runs_what_it_reads() -> None:
    files = python_files(REPOSITORY)
    assert len(files) > 150
    found = {
        (str(path.relative_to(REPOSITORY)), text): line for path in files for line, text in problems(path.read_text())
    }
    assert {f"{name}:{line}: {text}" for (name, text), line in found.items() if (name, text) not in ALLOWED} == set()
    assert found.keys() >= ALLOWED  # none is kept for nothing


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import pickle", "imports pickle"),
        ("from joblib import load", "imports from joblib"),
        ("torch.load(p)", "without weights_only=True"),
        ("torch.load(p, weights_only=False)", "without weights_only=True"),
        ("np.load(p)", "without allow_pickle=False"),
        ("yaml.load(t, Loader=yaml.Loader)", "not safe"),
        ("yaml.load(t)", "not safe"),
        ("yaml.unsafe_load(t)", "tags run code"),
        ("AutoTokenizer.from_pretrained(p)", "trust_remote_code"),
        ("AutoModel.from_pretrained(p, trust_remote_code=x)", "other than False"),
        ("subprocess.run(c, shell=True)", "shell="),
        ("os.system(c)", "a shell"),
        ("eval(t)", "runs a string"),
        ("tarfile.open(p).extractall(d)", "elsewhere"),
    ],
)
def test_the_scan_sees(source: str, complaint: str) -> None:
    ((line, text),) = problems(source)
    assert line == 1
    assert complaint in text


def test_the_yaml_loader_is_a_safe_one() -> None:
    assert issubclass(_Loader, yaml.SafeLoader)
    for text in ("a: !!python/object/apply:os.getcwd []", "a: !!python/name:os.system", "a: !custom 1"):
        with pytest.raises(UserError):
            read_yaml(text, "test")


class _Hostile:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("ran"),)


def test_a_job_file_of_another_content_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = pytest.importorskip("tlite_jax.data.cluster")
    monkeypatch.chdir(tmp_path)
    job = tmp_path / f"job-{'0' * 64}.pickle"
    job.write_bytes(pickle.dumps(_Hostile()))
    with pytest.raises(UserError, match="not what was written for this job"):
        cluster._load(str(job))
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Values of variables that hold tokens, set."""
    for name in SECRETS:
        monkeypatch.setenv(name, f"secret-of-{name.lower()}")
    return [os.environ[name] for name in SECRETS]


@pytest.mark.parametrize("cluster", [["slurm"], ["kubernetes", "--image", "registry/tlite:1"]])
def test_no_token_is_written_down(
    cluster: list[str],
    secrets: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Configs as saved, the environment that a run notes, a job's script or manifest."""
    monkeypatch.chdir(tmp_path)
    path = tiny.write_config(tmp_path / "run.yaml", tmp_path / "run")
    save_config(load_config(path), tmp_path / "saved.yaml")
    words = ["--nodes", "2", "--gpus-per-node", "2", "--no-plan", "--dry-run", "--cluster", *cluster]
    if cluster[0] == "kubernetes":
        words += ["--mount-path", os.path.commonpath([tmp_path, tiny.data()])]
    monkeypatch.setattr(sys, "argv", ["launch", "submit", str(path), *words])
    with contextlib.suppress(SystemExit):
        launch_main.main()
    job = capsys.readouterr()
    assert len(job.out) > 1000, job.err
    texts = [(tmp_path / "saved.yaml").read_text(), json.dumps(environment()), job.out, job.err]
    assert [(secret, text) for secret in secrets for text in texts if secret in text] == []
