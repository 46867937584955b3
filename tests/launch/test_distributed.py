"""Jobs recognised from dictionaries of variables as schedulers set them, and GPUs dealt out to processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.job import distributed
from launch.job.world import World, find_world, first_host, given_world, gpu_ids, outside_of_srun
from tlite_jax.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# What srun and others set, as they set it; the second process of a node, of two nodes.
SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "8",  # of the job: a step may be smaller
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_GPUS_ON_NODE": "8",
}
TORCHRUN = {
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29400",
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
JOBSET = {
    "JOB_COMPLETION_INDEX": "3",
    "NUM_PROCESSES": "4",
    "JOBSET_NAME": "stage1",
    "REPLICATED_JOB_NAME": "train",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
}


def find(environment: dict[str, str], hostname: str = "host") -> World | None:
    return find_world(environment, lambda: hostname)


def test_slurm() -> None:
    world = find(SLURM)
    assert world is not None
    assert (world.num_processes, world.process_id, world.num_local, world.local_id) == (4, 3, 2, 1)
    assert (world.found_by, world.gpus_on_machine) == ("Slurm", 8)
    host, port = world.coordinator.split(":")
    assert host == "gpu003"
    assert 61440 <= int(port) < 65536  # where no client's socket is
    others = [SLURM | {"SLURM_STEP_ID": "1"}, SLURM | {"SLURM_RESTART_COUNT": "1"}, SLURM | {"SLURM_JOB_ID": "4243"}]
    assert len({world.coordinator, *(find(other).coordinator for other in others)}) == 4
    assert find(SLURM | {"JAX_COORDINATOR_PORT": "7000"}).coordinator == "gpu003:7000"
    assert find(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,3"}).num_local == 3
    assert find(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None  # nothing to join


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[001-004,7],other", "gpu001"),
        ("gpu[3,7-9]", "gpu3"),
        ("rack[1-2]node[3-4]", "rack1node3"),
        ("node[1-2]-ib,x", "node1-ib"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_numbers_of_slurm_that_cannot_be() -> None:
    with pytest.raises(UserError, match="Slurm: a job of 0 processes"):
        find(SLURM | {"SLURM_STEP_NUM_TASKS": "0"})
    with pytest.raises(UserError, match=r"process 3 is not one of 0\.\.1"):
        find(SLURM | {"SLURM_STEP_NUM_TASKS": "2"})
    for tasks in ("2(x9999999999999)", "x", ""):
        assert find(SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks}).num_local == 2  # at least, by its own number
    assert find(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_LOCALID": "0"}).num_local == 3


def test_a_batch_script_is_not_a_step() -> None:
    script = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    assert find(script) is None
    assert outside_of_srun(script) == 2
    assert outside_of_srun(script | {"SLURM_NNODES": "1"}) is None
    assert outside_of_srun({}) is None


def test_torchrun() -> None:
    # torchrun's own store listens on MASTER_PORT.
    assert find(TORCHRUN) == World("10.0.0.1:29401", 4, 3, 2, 1, "torchrun's variables")
    by_hand = {name: TORCHRUN[name] for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")}
    assert find(by_hand) == World("10.0.0.1:29400", 4, 3, 1, 0, "torchrun's variables")
    assert find(by_hand | {"MASTER_ADDR": "fe80::1"}).coordinator == "[fe80::1]:29400"
    assert find(TORCHRUN | SLURM).found_by == "torchrun's variables"  # which srun may have started
    assert find(SLURM | {"MASTER_ADDR": "x", "WORLD_SIZE": "4"}).found_by == "Slurm"  # as many scripts export
    with pytest.raises(UserError, match=r"RANK set, as torchrun does, but MASTER_ADDR and WORLD_SIZE not"):
        find({"RANK": "0"})
    with pytest.raises(UserError, match=r"MASTER_ADDR and WORLD_SIZE set, as torchrun does, but RANK not"):
        find({"MASTER_ADDR": "x", "WORLD_SIZE": "4"})
    assert find({"WORLD_SIZE": "4"}) is find({"MASTER_ADDR": "x", "WORLD_SIZE": "1"}) is None


def test_open_mpi() -> None:
    world = find(OPEN_MPI)
    assert (world.num_processes, world.process_id, world.num_local, world.local_id) == (4, 3, 2, 1)
    assert world.coordinator.startswith("10.96.0.1:")
    assert find(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0"}).coordinator == world.coordinator
    six = {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:ac5d,2620:10d::2]:43370"}
    assert find(OPEN_MPI | six).coordinator.startswith("[fe80::b9b:ac5d]:")
    five = {name: value for name, value in OPEN_MPI.items() if "orte" not in name}
    assert find(five | {"PMIX_NAMESPACE": "prterun-my-node1-1234@1"}).coordinator.startswith("my-node1:")
    assert find(five | {"MASTER_ADDR": "n5", "MASTER_PORT": "99"}).coordinator == "n5:99"
    assert find(five | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}).coordinator.startswith("localhost:")
    with pytest.raises(UserError, match="-x MASTER_ADDR=host"):
        find(five)
    with pytest.raises(UserError, match="OMPI_COMM_WORLD_RANK is set, as Open MPI does, but OMPI_COMM_WORLD_SIZE not"):
        find({"OMPI_COMM_WORLD_RANK": "1"})
    assert find(OPEN_MPI | {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}).found_by == "Open MPI"


def test_kubernetes() -> None:
    assert find(JOBSET) == World("stage1-train-0-0.stage1:3389", 4, 3, 1, 0, "Kubernetes")
    job = {"JOB_COMPLETION_INDEX": "3", "NUM_PROCESSES": "4"}
    assert find(job, "stage1-3.pods.ns.svc").coordinator == "stage1-0.pods.ns.svc:3389"
    address = job | {"JAX_COORDINATOR_ADDRESS": "pod0.svc:7000"}
    assert find(address).coordinator == "pod0.svc:7000"
    several = address | {"JOB_INDEX": "1", "PROCESSES_IN_JOB": "4", "NUM_PROCESSES": "8"}
    assert (find(several).process_id, find(several).num_processes) == (7, 8)
    with pytest.raises(UserError, match=r"give the pods a headless service"):
        find(job, "stage1-3")
    with pytest.raises(UserError, match="set NUM_PROCESSES in the manifest"):
        find({"JOB_COMPLETION_INDEX": "0"})
    with pytest.raises(UserError, match=r"process 4 is not one of 0..3"):
        find(JOBSET | {"JOB_COMPLETION_INDEX": "4"})


@pytest.mark.parametrize(
    ("environment", "name"), [(SLURM, "SLURM_PROCID"), (TORCHRUN, "RANK"), (JOBSET, "JOB_COMPLETION_INDEX")]
)
def test_a_variable_that_is_no_number_is_named(environment: dict[str, str], name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 'x', not a number"):
        find(environment | {name: "x"})


def test_a_process_on_its_own() -> None:
    assert find({"PATH": "/bin", "HOSTNAME": "x"}) is None
    assert find(TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}) is None


def test_the_command_line() -> None:
    assert given_world(None, None, None) is None
    assert given_world("h:1", 2, 1) == World("h:1", 2, 1, 1, 0, "--coordinator")
    with pytest.raises(UserError, match="together, or none"):
        given_world("h:1", 2, None)
    with pytest.raises(UserError, match="--num-processes 0 is less than 1"):
        given_world("h:1", 0, 0)
    for address in ("host", "host:", ":1", "host:99999", "a b:1", "http://host:1", "[host:1", "(null):1"):
        with pytest.raises(UserError, match="not of the form host:port"):
            given_world(address, 2, 1)


@pytest.mark.parametrize(
    ("num_local", "local_id", "visible", "on_machine", "own"),
    [
        (1, 0, 8, 8, None),  # a process a node: all of them (jax would take the first)
        (8, 3, 8, 8, (3,)),  # a process a GPU
        (2, 1, 8, None, (4, 5, 6, 7)),
        (8, 3, 1, 8, None),  # --gpus-per-task=1: bound already (jax would look for a fourth)
        (2, 1, 4, 8, None),  # --gpus-per-task=4: likewise
        (2, 1, 0, None, None),  # no GPU
    ],
)
def test_every_gpu_is_used_once(
    num_local: int, local_id: int, visible: int, on_machine: int | None, own: tuple[int, ...] | None
) -> None:
    world = World("h:1", num_local * 2, local_id, num_local, local_id, "test", on_machine)
    assert gpu_ids(world, visible) == own


def test_gpus_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"3 processes on this machine cannot share its 8 GPUs evenly; start 1, 2, 4 or 8"
    ):
        gpu_ids(World("h:1", 6, 0, 3, 0, "test"), 8)


def test_gpus_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.count_gpus({"CUDA_VISIBLE_DEVICES": "0,2,5"}) == 3
    assert distributed.count_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert distributed.count_gpus({"CUDA_VISIBLE_DEVICES": "1,-1,2"}) == 1  # as CUDA reads it
    assert distributed.count_gpus({"CUDA_VISIBLE_DEVICES": "0,1", "JAX_PLATFORMS": "cpu"}) == 0
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A100 (UUID: GPU-1)'\necho '  MIG 1g.5gb'\necho 'GPU 1: A100'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert distributed.count_gpus({}) == 2
    (tmp_path / "accel0").touch()
    assert distributed.on_tpu({"JAX_PLATFORMS": "cpu"}, tmp_path) is False
    assert distributed.on_tpu({}, tmp_path / "nothing") is False


def test_what_jax_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    calls: list = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *words, **options: calls.append((words, options)))
    monkeypatch.setattr(distributed, "count_gpus", lambda _: 8)
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_")):
            monkeypatch.delenv(name)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    distributed.initialize(None, None, None)
    distributed.initialize("h:1", 2, 1)
    (found, options), (given, given_options) = calls
    assert found == (find(SLURM).coordinator, 4, 3)
    assert options["local_device_ids"] == (4, 5, 6, 7)
    assert options["cluster_detection_method"] == "deactivate"
    assert options["heartbeat_timeout_seconds"] == 10
    assert (given, given_options["local_device_ids"]) == (("h:1", 2, 1), None)


def test_a_port_that_another_process_has_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "PORT_SECONDS", 0.0)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"process 0 of 2 \(--coordinator\) cannot listen on port {port}: .* in use"
        ):
            distributed.initialize(f"localhost:{port}", 2, 0)
        with pytest.raises(SystemExit) as ended:  # which `submit` starts again, with another port
            distributed._wait_for_port(World(f"localhost:{port}", 2, 0, 1, 0, "Slurm"))
    assert ended.value.code == 76
    assert "in use; start the job again" in capsys.readouterr().err
    distributed._wait_for_port(World(f"localhost:{port}", 2, 0, 1, 0, "--coordinator"))  # free again


PROGRAM = """
import json, sys
from launch.job.distributed import initialize
initialize(None, None, None)
import jax
from jax.experimental import multihost_utils
ids = multihost_utils.process_allgather(jax.numpy.asarray([jax.process_index()]))
print("found", json.dumps([jax.process_index(), jax.process_count(), jax.device_count(), ids.ravel().tolist()]))
"""


def test_two_real_processes_find_each_other() -> None:
    """By torchrun's variables and as the pods of an indexed Job."""
    ports = []
    for _ in range(2):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            ports.append(listener.getsockname()[1])
    launchers = [
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0]), "WORLD_SIZE": "2", "RANK": "{}"},
        {"JOB_COMPLETION_INDEX": "{}", "NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{ports[1]}"},
    ]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "JAX_NUM_CPU_DEVICES": "2",
                **{name: value.format(rank) for name, value in each.items()},
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for each in launchers
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0].splitlines() for process in started]
    found = [json.loads(line.removeprefix("found ")) for lines in said for line in lines if line.startswith("found ")]
    assert found == [[0, 2, 4, [0, 1]], [1, 2, 4, [0, 1]]] * 2
