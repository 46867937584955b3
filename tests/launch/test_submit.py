"""`submit`: scripts that bash and Slurm read as meant, whatever the names; manifests that Kubernetes would take."""

import json
import os
import shlex
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from launch.submit_parts import planned, slurm
from tests import tiny
from tests.launch.in_process import Ended, run_command
from tlite_jax.config_files import load_config

HOSTILE = "/data/it's $(touch pwned) `touch pwned`; touch pwned & \\ \"x"


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Ended]:
    """Calls `submit` on the tests' run for 12 nodes of 2 GPUs, without planning, in this process."""
    tiny.write_config(tmp_path / "run.yaml", tmp_path / "runs" / "stage1", train={"batch_size": 24})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()

    def invoke(*words: str) -> Ended:
        command = ["submit", tmp_path / "run.yaml", "--nodes", "12", "--gpus-per-node", "2"]
        return run_command(monkeypatch, capsys, *command, *words)

    return invoke


def tool(directory: Path, name: str, text: str) -> None:
    """A command that stands in for the cluster's."""
    file = directory / "bin" / name
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def sbatch_lines(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_a_dry_run_prints_a_script_and_writes_nothing(submit: Callable[..., Ended], tmp_path: Path) -> None:
    before = tiny.contents(tmp_path)
    ended = submit("--cluster", "slurm", "--no-plan", "--dry-run", "--time", "12:00:00", "--partition", "gpu")
    assert ended.status == 0, ended.err
    assert tiny.contents(tmp_path) == before
    lines = sbatch_lines(ended.out)
    wanted = ["--nodes=12", "--gpus-per-node=2", "--ntasks-per-node=1", "--time=12:00:00", "--signal=USR1@300"]
    assert {*wanted, "--requeue", "--open-mode=append", "--partition=gpu", "--job-name=runs-stage1"} <= {*lines}
    assert subprocess.run(["bash", "-n"], input=ended.out, text=True, check=False).returncode == 0
    assert "export NCCL_DEBUG=WARN" in ended.out
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in ended.out
    hopper = submit("--cluster", "slurm", "--no-plan", "--dry-run", "--hardware", "h100", "--env", "NCCL_DEBUG=INFO")
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=1" in hopper.out
    assert "export NCCL_DEBUG=INFO" in hopper.out
    assert "NCCL_DEBUG=WARN" not in hopper.out


SRUN = """
printf '%s\\n' "$@" > srun.words
env > srun.environment
exit "$(cat status)"
"""


def run_script(
    script: Path, directory: Path, status: int, restarts: int = 0, job: str = "JobState=RUNNING EndTime=Unknown"
) -> int:
    """Runs a job script as slurmd would, with an srun that ends so; scontrol notes what it is asked."""
    (directory / "status").write_text(str(status))
    tool(directory, "srun", f"cd {directory}\n{SRUN}")
    case = f"case $1 in requeue) echo $@ > {directory}/scontrol.words ;; *) echo 'JobId=7 {job} NumNodes=12' ;; esac"
    tool(directory, "scontrol", case)
    environment = {
        "PATH": f"{directory}/bin:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-12]",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    return subprocess.run(["bash", str(script)], env=environment, capture_output=True, check=False).returncode


def test_names_from_a_config_never_reach_a_shell_unquoted(
    submit: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script runs in a directory with a hostile name; what it starts sees every word as it was."""
    place = tmp_path / "it is $(touch pwned) `touch pwned` & #%j"
    place.mkdir()
    monkeypatch.chdir(place)
    tool(tmp_path, "sbatch", f'echo "$@" > {tmp_path}/sbatch.words; echo 41')
    words = ["--env", f"VALUE={HOSTILE}", "--python", HOSTILE, "output=a $(touch pwned)/b;c"]
    ended = submit("--cluster", "slurm", "--no-plan", *words)
    assert ended.status == 0, ended.err
    directory = place / "a $(touch pwned)" / "b;c.jobs" / "1"
    assert ended.out.splitlines()[0] == f"submitted 41: {directory}/job.sh"
    assert load_config(directory / "config.yaml").output == Path("a $(touch pwned)/b;c")
    assert sbatch_lines((directory / "job.sh").read_text())[0] == "--job-name=a-touch-pwned--b-c"
    assert run_script(directory / "job.sh", tmp_path, 0) == 0
    started = (tmp_path / "srun.words").read_text().splitlines()
    assert started[-5:] == [HOSTILE, "-m", "launch", "train", f"{directory}/config.yaml"]
    assert f"--output={directory}/logs/%j-%t.log".replace("#%j", "#%%j") in started
    assert f"\nVALUE={HOSTILE}\n" in (tmp_path / "srun.environment").read_text()
    assert not list(tmp_path.rglob("pwned"))
    output = next(line for line in sbatch_lines((directory / "job.sh").read_text()) if line.startswith("--output="))
    assert shlex.split(output) == [f"--output={directory}/logs/%j.log".replace("#%j", "#%%j")]


@pytest.mark.parametrize(
    ("status", "restarts", "asked", "finished"),
    [(0, 0, False, "0"), (75, 3, True, None), (76, 3, True, None), (137, 0, True, None), (75, 100, False, None)]
    + [(status, 0, False, str(status)) for status in (1, 2, 77, 78, 130)],
)
def test_what_each_exit_status_leads_to(
    status: int, restarts: int, asked: bool, finished: str | None, submit: Callable[..., Ended], tmp_path: Path
) -> None:
    tool(tmp_path, "sbatch", "echo 41")
    assert submit("--cluster", "slurm", "--no-plan").status == 0
    directory = tmp_path / "runs" / "stage1.jobs" / "1"
    assert run_script(directory / "job.sh", tmp_path, status, restarts) == (0 if asked else status)
    assert (tmp_path / "scontrol.words").exists() == asked
    if asked:
        assert (tmp_path / "scontrol.words").read_text() == "requeue 7\n"
    history = (directory / "history.log").read_text()
    assert history.endswith(f"job 7, start {restarts + 1}, on n[1-12]: status {status}\n")
    assert ((directory / "finished").read_text().strip() if finished else None) == finished
    if finished:  # the next of a chain starts nothing
        (tmp_path / "srun.words").unlink()
        assert run_script(directory / "job.sh", tmp_path, 0) == status
        assert not (tmp_path / "srun.words").exists()


def test_a_cancelled_job_is_not_requeued(submit: Callable[..., Ended], tmp_path: Path) -> None:
    tool(tmp_path, "sbatch", "echo 41")
    assert submit("--cluster", "slurm", "--no-plan").status == 0
    script = tmp_path / "runs" / "stage1.jobs" / "1" / "job.sh"
    assert run_script(script, tmp_path, 75, job="JobState=COMPLETING EndTime=Unknown") == 75
    assert not (tmp_path / "scontrol.words").exists()


def test_a_chain_hands_over_at_the_end_of_its_time(submit: Callable[..., Ended], tmp_path: Path) -> None:
    tool(tmp_path, "sbatch", f'echo "$@" >> {tmp_path}/sbatch.words; wc -l < {tmp_path}/sbatch.words')
    ended = submit("--cluster", "slurm", "--no-plan", "--chain", "3", "--json")
    script = tmp_path / "runs" / "stage1.jobs" / "1" / "job.sh"
    submitted = {"cluster": "slurm", "directory": str(script.parent), "submitted": ["1", "2", "3"]}
    assert json.loads(ended.out) == submitted
    dependencies = [line.split() for line in (tmp_path / "sbatch.words").read_text().splitlines()]
    assert [words[1:-1] for words in dependencies] == [[], ["--dependency=afterany:1"], ["--dependency=afterany:2"]]
    assert (
        run_script(script, tmp_path, 75, job="JobState=RUNNING EndTime=2020-01-01T00:00:00") == 75
    )  # long past: the next one goes on
    assert not (tmp_path / "scontrol.words").exists()
    assert run_script(script, tmp_path, 75, job="JobState=RUNNING EndTime=2099-01-01T00:00:00") == 0  # preempted early
    assert (tmp_path / "scontrol.words").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--partition", "gpu; rm -rf /"), "--partition 'gpu; rm -rf /' is not a plain name"),
        (("--time", "two days"), "--time 'two days' is not a time limit"),
        (("--time", "4"), "--time 4 leaves no time to train before --grace 300"),
        (("--sbatch", "gres=gpu:8"), "--sbatch 'gres=gpu:8' is not --name or --name=value"),
        (("--sbatch", "--comment=x\n#SBATCH --uid=0"), "is not --name or --name=value"),
        (("--env", "A B=1"), "--env 'A B=1' is not of the form NAME=VALUE"),
        (("--env", "A=1\nB=2"), "--env A: the value holds a control character"),
        (("--name", "a b"), "--name 'a b' is not a name"),
        (("--cluster", "lsf"), "--cluster lsf is not known; choose slurm or kubernetes"),
        (("--image", "x.sqsh"), "--container pyxis or apptainer together with --image"),
        (("--processes-per-node", "3"), "--processes-per-node 3 cannot share 2 GPUs evenly"),
        (("--hardware", "a10"), "--hardware a10 is not known"),
        (("output=a'b",), "Slurm cannot take a path with quotes"),
        (("mesh.replica=5",), "replica 5 x fsdp the rest in the config, 12 x 2 = 24 devices found"),
        (("train.batch_size=25",), "25 is not divisible by 24 devices"),
    ],
)
def test_what_a_cluster_would_misread_is_refused(
    words: tuple[str, ...], message: str, submit: Callable[..., Ended], tmp_path: Path
) -> None:
    before = tiny.contents(tmp_path)
    plan = [] if "--hardware" in words else ["--no-plan"]
    ended = submit(*([] if "--cluster" in words else ["--cluster", "slurm"]), *plan, *words)
    assert (ended.status, ended.out) == (2, "")
    assert message in ended.err.splitlines()[-1]
    assert tiny.contents(tmp_path) == before


def test_clusters_that_are_not_there_or_refuse(submit: Callable[..., Ended], tmp_path: Path) -> None:
    os.environ["PATH"] = str(tmp_path / "bin")  # monkeypatch puts it back
    assert "neither sbatch nor kubectl is on this machine" in submit("--no-plan").err
    assert "sbatch is not on this machine; run `sbatch" in submit("--no-plan", "--cluster", "slurm").err
    kubernetes = ("--cluster", "kubernetes", "--no-plan", "--image", "x/y:1", "output=run", "data.buckets=buckets")
    assert "kubectl is not on this machine; run `kubectl apply --server-side -f" in submit(*kubernetes).err
    os.environ["PATH"] += ":/usr/bin:/bin"
    tool(tmp_path, "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    ended = submit("--no-plan", "--cluster", "slurm")
    assert ended.status == 2
    assert ended.err.strip().endswith("job.sh: sbatch: error: invalid partition")


def test_containers_of_slurm(submit: Callable[..., Ended]) -> None:
    words = ["--cluster", "slurm", "--no-plan", "--dry-run", "--image", "/images/t.sif", "--mount", "/scratch:/scratch"]
    ended = submit(*words, "--container", "apptainer")
    assert "apptainer exec --nv --pwd" in ended.out
    assert "--bind /scratch:/scratch" in ended.out
    assert "/images/t.sif python -m launch train" in ended.out
    ended = submit(*words, "--container", "pyxis")
    assert "--container-image=/images/t.sif" in ended.out
    assert "--container-mounts=/scratch:/scratch," in ended.out


def test_time_limits_are_read_as_sbatch_does() -> None:
    times = {"90": 5400, "90:30": 5430, "1:30:00": 5400, "1-12": 129600, "1-00:30": 88200, "2-00:00:00": 172800}
    assert {time: slurm.seconds(time) for time in times} == times


def test_the_plan_has_a_say(submit: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuses(*words: Any) -> str:
        asked.append(words)
        raise planned.DoesNotFitError("does not fit: 90 of 79 GiB; fits with execution.remat=full")

    monkeypatch.setattr(planned, "plan", refuses)
    tool(tmp_path, "sbatch", "echo 41")
    ended = submit("--cluster", "slurm", "--hardware", "h100")
    assert (ended.status, ended.out) == (1, "")
    assert "fits with execution.remat=full; not submitted (--force does it all the same)" in ended.err
    assert asked[0][1:4] == ("h100", 12, 2)
    assert not (tmp_path / "runs").exists()
    ended = submit("--cluster", "slurm", "--hardware", "h100", "--force")
    assert (ended.status, ended.out.splitlines()[0][:12]) == (0, "submitted 41")
    assert "submitted all the same" in ended.err


def test_the_plan_is_asked_for_the_nodes_that_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`plan` itself has its tests; here its command line and its answers are what matters."""
    from launch.submit import HARDWARE
    from tlite_jax.errors import UserError

    answer = subprocess.CompletedProcess([], 1, "", "compiling\nerror: does not fit: 90 of 79 GiB\n")
    seen: list[Any] = []

    def run(command: list[str], **_: Any) -> Any:
        described = command[command.index("--hardware") + 1]
        seen.append((yaml.safe_load(Path(described).read_text())["devices_per_node"], command[-1]))
        return answer

    monkeypatch.setattr(planned.subprocess, "run", run)
    with pytest.raises(planned.DoesNotFitError, match="does not fit: 90"):
        planned.plan(tmp_path / "run.yaml", "a100-80gb", 12, 4, HARDWARE)
    assert seen == [(4, "12")]
    answer.returncode, answer.stderr = 2, "error: 'plan' needs the compiler\n"
    with pytest.raises(UserError, match=r"plan: 'plan' needs the compiler; mend it, or pass --no-plan"):
        planned.plan(tmp_path / "run.yaml", "a100-80gb", 12, 4, HARDWARE)


# --- Kubernetes ---

KUBERNETES = ("--cluster", "kubernetes", "--no-plan", "--image", "registry.example/team/tlite:1", "output=stage1")
KUBERNETES = (*KUBERNETES, "data.buckets=buckets", "data.tokenizer=tokenizer")


def strict(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": list(required or properties),
    }


TEXT, NUMBER = {"type": "string"}, {"type": "integer"}
# The fields of jobset.x-k8s.io/v1alpha2 that we use, by JobSet's API reference; TLITE_JOBSET_CRD names the whole CRD.
JOBSET = strict(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object"},
        "spec": strict(
            {
                "suspend": {"type": "boolean"},
                "network": strict({"enableDNSHostnames": {"const": True}, "publishNotReadyAddresses": {"const": True}}),
                "failurePolicy": strict(
                    {
                        "maxRestarts": NUMBER,
                        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate"]},
                        "rules": {
                            "type": "array",
                            "items": strict(
                                {
                                    "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                    "action": {"enum": ["FailJobSet", "RestartJobSet"]},
                                    "onJobFailureReasons": {"type": "array", "items": {"enum": ["PodFailurePolicy"]}},
                                }
                            ),
                        },
                    }
                ),
                "replicatedJobs": {
                    "type": "array",
                    "items": strict({"name": TEXT, "replicas": NUMBER, "template": {"type": "object"}}),
                },
            },
            "network",
            "failurePolicy",
            "replicatedJobs",
        ),
    }
)


def made_strict(schema: Any) -> Any:
    """A CRD's schema, with unknown fields refused as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [made_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: made_strict(each) for key, each in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def check_manifests(documents: list[dict[str, Any]]) -> None:
    """Validates native kinds, the JobSet, and the Job and pods inside of it, strictly."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate").validate
    for document in documents:
        if document["kind"] != "JobSet":
            validate(document, "1.31", strict=True)
            continue
        jsonschema.validate(document, JOBSET)
        if crd := os.environ.get("TLITE_JOBSET_CRD"):
            version = yaml.safe_load(Path(crd).read_text())["spec"]["versions"][0]
            schema = made_strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            jsonschema.validate(document, schema)
        (replicated,) = document["spec"]["replicatedJobs"]
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **replicated["template"]}
        validate(job, "1.31", strict=True)


def test_manifests_are_valid_in_strict_mode(submit: Callable[..., Ended], tmp_path: Path) -> None:
    words = ["--dry-run", "--volume-size", "2Ti", "--storage-class", "fast", "--queue", "team", "--namespace", "ml"]
    words += ["--resource", "cpu=90", "--resource", "rdma/ib=8", "--node-selector", "gpu.example/model=a100"]
    before = tiny.contents(tmp_path)
    ended = submit(*KUBERNETES, *words)
    assert ended.status == 0, ended.err
    assert tiny.contents(tmp_path) == before
    documents = list(yaml.safe_load_all(ended.out))
    assert [each["kind"] for each in documents] == ["PersistentVolumeClaim", "ConfigMap", "JobSet"]
    check_manifests(documents)
    check_manifests(list(yaml.safe_load_all(submit(*KUBERNETES, "--dry-run").out)))
    documents[2]["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        check_manifests(documents)


def test_what_the_pods_are_told(submit: Callable[..., Ended]) -> None:
    ended = submit(*KUBERNETES, "--dry-run", "--env", "SECRET=$(HOME) $x", "--grace", "120", "--restart-limit", "7")
    config, jobset = yaml.safe_load_all(ended.out)
    assert yaml.safe_load(config["data"]["config.yaml"])["output"] == "stage1"
    spec = jobset["spec"]
    assert (spec["failurePolicy"]["maxRestarts"], jobset["metadata"]["name"]) == (7, "run-stage1")
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (12, 12, "Indexed")
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2, 77, 78, 130]
    pod = job["template"]["spec"]
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 120)
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert container["workingDir"] == "/data"
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert variables["SECRET"] == "$$(HOME) $$x"  # as Kubernetes reads it: no reference
    # What launch/job/world.py makes of it in the fourth pod.
    from launch.job.world import find_world

    world = find_world({**variables, "JOB_COMPLETION_INDEX": "3"}, lambda: "unused")
    assert world is not None
    assert (world.coordinator, world.process_id) == ("run-stage1-train-0-0.run-stage1:3389", 3)


def test_a_jobset_is_applied_and_written_down(submit: Callable[..., Ended], tmp_path: Path) -> None:
    tool(tmp_path, "kubectl", f'cp "$4" {tmp_path}/applied; echo "$@" > {tmp_path}/kubectl.words; echo jobset created')
    ended = submit(*KUBERNETES)
    assert ended.status == 0, ended.err
    assert ended.out.startswith("jobset created\n")
    directory = tmp_path / "run-stage1.jobs" / "1"
    assert (tmp_path / "applied").read_text() == (directory / "jobset.yaml").read_text()
    assert (tmp_path / "kubectl.words").read_text().startswith("apply --server-side -f ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("output=/elsewhere/run",), "output /elsewhere/run is not below --mount-path /data"),
        (("--image", "x; y"), "--image 'x; y' is not a container image"),
        (("--namespace", "A"), "--namespace 'A' is not a DNS label"),
        (("--name", "x" * 41), "is not a DNS label of at most 40 characters"),
        (("--resource", "cpu"), "--resource 'cpu' is not of the form NAME=VALUE"),
        (("--shared-memory", "lots"), "--shared-memory 'lots' is not a quantity"),
        (("--processes-per-node", "2"), "on Kubernetes one process drives all GPUs of its pod"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused(
    words: tuple[str, ...], message: str, submit: Callable[..., Ended]
) -> None:
    ended = submit(*KUBERNETES, *words)
    assert (ended.status, ended.out) == (2, "")
    assert message in ended.err
