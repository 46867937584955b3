"""Which job this process is part of, read from its environment: pure functions of dictionaries of variables.

jax finds Slurm, Open MPI and Kubernetes too, and we do not ask it: under Slurm and Open MPI it gives each process the
one GPU of its local rank, so that a process per node computes on one GPU of eight; it counts a Slurm job's tasks where
a step's are meant, and cuts names like rack1n[1-4]x short; for Kubernetes it asks the API server, which pods mostly
may not. TPU pods it knows best: `launch.job.distributed` leaves those to it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tlite_jax.errors import UserError

Environment = Mapping[str, str]
FIRST_PORT, NUM_PORTS = 61440, 4096  # above Linux's ephemeral ports, so that no client's socket holds one
KUBERNETES_PORT = 3389
_ADDRESS = r"(?:[\w.-]+|\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]):[0-9]{1,9}"
NUM_PODS = ("NUM_PROCESSES", "JAX_PROCESS_COUNT", "WORLD_SIZE")  # any of them, in a manifest
TORCH = ("MASTER_ADDR", "WORLD_SIZE", "RANK")


@dataclass(frozen=True)
class World:
    """A job of several processes, as one of them sees it.

    Attributes:
      coordinator: "host:port" of process 0.
      num_processes, process_id: 0-based.
      num_local, local_id: processes of the job on this machine, and which of them this is.
      found_by: whose variables said so.
      gpus_on_machine: that the job holds here, where the scheduler says so.
    """

    coordinator: str
    num_processes: int
    process_id: int
    num_local: int
    local_id: int
    found_by: str
    gpus_on_machine: int | None = None

    def __post_init__(self) -> None:
        if self.num_processes < 1 or self.num_local < 1:
            counts = f"{self.num_processes} processes, {self.num_local} of them on this machine"
            raise UserError(f"{self.found_by}: a job of {counts}, cannot be; both are at least 1")
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(f"{self.found_by}: process {self.process_id} is not one of 0..{self.num_processes - 1}")
        if not 0 <= self.local_id < self.num_local:
            raise UserError(
                f"{self.found_by}: process {self.local_id} of this machine is not one of 0..{self.num_local - 1}"
            )
        port = self.coordinator.rpartition(":")[2]
        if not re.fullmatch(_ADDRESS, self.coordinator) or not 0 < int(port) < 65536:
            raise UserError(f"{self.found_by}: coordinator {self.coordinator!r} is not of the form host:port")


def find_world(environment: Environment, full_hostname: Callable[[], str]) -> World | None:
    """The job that the environment's variables describe; None for a process on its own.

    The first that is there: torchrun's variables, Kubernetes' indexed jobs, Open MPI, Slurm. Launchers run inside of
    schedulers, and so come first.

    Args:
      environment: of this process.
      full_hostname: asked for only where a Kubernetes job does not name its service.

    Raises:
      UserError: variables that contradict each other, or lack what another process would have to guess.
    """
    for find in (_torch, lambda env: _kubernetes(env, full_hostname), _open_mpi, _slurm):
        world = find(environment)
        if world is not None:
            return world if world.num_processes > 1 else None
    here = [name for name in TORCH if environment.get(name)]
    missing = [name for name in TORCH if not environment.get(name)]
    if ("RANK" in here or len(here) > 1) and environment.get("WORLD_SIZE") != "1":
        raise UserError(
            f"{' and '.join(here)} set, as torchrun does, but {' and '.join(missing)} not: set all, or unset all"
        )
    if environment.get("OMPI_COMM_WORLD_RANK"):
        raise UserError(
            "OMPI_COMM_WORLD_RANK is set, as Open MPI does, but OMPI_COMM_WORLD_SIZE not: set it, or unset it"
        )
    return None


def given_world(coordinator: str | None, num_processes: int | None, process_id: int | None) -> World | None:
    """The job as the command line describes it; None where it says nothing. One process a machine.

    Raises:
      UserError: some of the three given, or a process that is not of the job.
    """
    given = (coordinator, num_processes, process_id)
    if all(value is None for value in given):
        return None
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError("give --coordinator, --num-processes and --process-id together, or none of them")
    if num_processes < 1:
        raise UserError(f"--num-processes {num_processes} is less than 1")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process-id {process_id} is not one of 0..{num_processes - 1}")
    return World(coordinator, num_processes, process_id, 1, 0, "--coordinator")


def _torch(environment: Environment) -> World | None:
    """The variables of torchrun, or the same ones written by hand."""
    if not all(environment.get(name) for name in TORCH):
        return None
    number = _numbers("torchrun's variables", environment)
    port = number("MASTER_PORT", 29500)
    if "TORCHELASTIC_RUN_ID" in environment:
        port += 1 if port < 65535 else -1  # torchrun itself listens on MASTER_PORT
    return World(
        coordinator=_address(environment, environment["MASTER_ADDR"], port),
        num_processes=number("WORLD_SIZE"),
        process_id=number("RANK"),
        num_local=number("LOCAL_WORLD_SIZE", 1),
        local_id=number("LOCAL_RANK", 0) if "LOCAL_WORLD_SIZE" in environment else 0,
        found_by="torchrun's variables",
    )


def _kubernetes(environment: Environment, full_hostname: Callable[[], str]) -> World | None:
    """An indexed Job, by itself or in a JobSet: one process a pod.

    The pod's index comes from Kubernetes (JOB_COMPLETION_INDEX), the rest from the manifest: the number of pods in
    NUM_PROCESSES (with several Jobs in a JobSet: of all, and PROCESSES_IN_JOB and JOB_INDEX beside it), and where
    process 0 is in JAX_COORDINATOR_ADDRESS, or JOBSET_NAME and REPLICATED_JOB_NAME, or the pod's own full name.
    """
    if not environment.get("JOB_COMPLETION_INDEX"):
        return None
    number = _numbers("Kubernetes", environment)
    in_job = number("PROCESSES_IN_JOB", 0)
    total = next((number(name) for name in NUM_PODS if environment.get(name)), in_job)
    if not total:
        raise UserError(
            "JOB_COMPLETION_INDEX is set, as in a Kubernetes indexed Job, but not the number of pods: "
            "set NUM_PROCESSES in the manifest (`submit --cluster kubernetes` writes one that does)"
        )
    index = number("JOB_COMPLETION_INDEX")
    process_id = index + number("JOB_INDEX", 0) * (in_job or total)
    host = _first_pod(environment, index, full_hostname) if total > 1 else "localhost"
    port = number("JAX_COORDINATOR_PORT", KUBERNETES_PORT)
    return World(_address(environment, host, port), total, process_id, 1, 0, "Kubernetes")


def _first_pod(environment: Environment, index: int, full_hostname: Callable[[], str]) -> str:
    if address := environment.get("JAX_COORDINATOR_ADDRESS"):
        return address
    jobset, job = environment.get("JOBSET_NAME"), environment.get("REPLICATED_JOB_NAME")
    if jobset and job:
        return f"{jobset}-{job}-0-0.{environment.get('JOBSET_SUBDOMAIN') or jobset}"
    pod, _, service = full_hostname().partition(".")
    stem, _, number = pod.rpartition("-")
    if service and stem and number == str(index):
        return f"{stem}-0.{service}"
    raise UserError(
        "JOB_COMPLETION_INDEX is set, as in a Kubernetes indexed Job, but nothing says where its first pod is: give "
        "the pods a headless service (`subdomain`), or set JAX_COORDINATOR_ADDRESS"
    )


def _open_mpi(environment: Environment) -> World | None:
    """Started by mpirun. Process 0 is taken to run where mpirun does; each process is told its address or name."""
    if not environment.get("OMPI_COMM_WORLD_SIZE"):
        return None
    number = _numbers("Open MPI", environment)
    told = environment.get("OMPI_MCA_orte_hnp_uri") or environment.get("PMIX_NAMESPACE") or ""
    host = environment.get("MASTER_ADDR") or _host_of_mpirun(told)
    size, num_local = number("OMPI_COMM_WORLD_SIZE"), number("OMPI_COMM_WORLD_LOCAL_SIZE", 1)
    if host is None and num_local < size:
        raise UserError(
            "Open MPI does not say where process 0 is; pass it to mpirun as -x MASTER_ADDR=host (and MASTER_PORT)"
        )
    seed = sum(int(digits) for digits in re.findall(r"\d+", told.split(";")[0]))
    return World(
        coordinator=_address(environment, host or "localhost", number("MASTER_PORT", _port(seed // 2**16 + seed))),
        num_processes=size,
        process_id=number("OMPI_COMM_WORLD_RANK"),
        num_local=num_local,
        local_id=number("OMPI_COMM_WORLD_LOCAL_RANK", 0),
        found_by="Open MPI",
    )


def _host_of_mpirun(told: str) -> str | None:
    """From `1531576320.0;tcp://10.96.0.1,10.148.0.1:34911`, its tcp6 form, or `prterun-node1-1234@1`."""
    found = re.search(r"tcp4?://([^,:;]+)|tcp6://\[?([^],]+)|^prterun-(.+)-\d+@\d+", told)
    return next((host for host in found.groups() if host), None) if found else None


def _slurm(environment: Environment) -> World | None:
    """A step that srun has started. A batch script by itself is one process, whatever the job's size."""
    if not environment.get("SLURM_STEP_NODELIST") or not environment.get("SLURM_PROCID"):
        return None
    number = _numbers("Slurm", environment)
    size = number("SLURM_STEP_NUM_TASKS", number("SLURM_NTASKS", 1))
    # A requeued job keeps its number, and its last coordinator may still be dying.
    seed = number("SLURM_JOB_ID", 0) + 97 * number("SLURM_STEP_ID", 0) + 389 * number("SLURM_RESTART_COUNT", 0)
    port = number("JAX_COORDINATOR_PORT", _port(seed))
    local_id = number("SLURM_LOCALID", 0)
    return World(
        coordinator=_address(environment, first_host(environment["SLURM_STEP_NODELIST"]), port),
        num_processes=size,
        process_id=number("SLURM_PROCID"),
        num_local=_tasks_here(environment, number("SLURM_NODEID", 0), size, local_id),
        local_id=local_id,
        found_by="Slurm",
        gpus_on_machine=number("SLURM_GPUS_ON_NODE", 0) or None,
    )


def _tasks_here(environment: Environment, node: int, size: int, local_id: int) -> int:
    """The step's tasks on this node, from `2(x3),1`: nodes 0 to 2 have two, node 3 has one."""
    nodes = total = 0
    here = None
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            tasks, times = int(found[1]), int(found[2] or 1)
            here = tasks if nodes <= node < nodes + times else here
            nodes, total = nodes + times, total + tasks * times
    if total == size and here is not None:
        return here
    return local_id + 1  # an srun that does not say: at least these


def first_host(nodes: str) -> str:
    """The first name of a Slurm list: node[001-003,7],other -> node001; rack[1-2]node[3-4] -> rack1node3."""
    depth, end = 0, len(nodes)
    for place, character in enumerate(nodes):
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            end = place
            break
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", nodes[:end])


def gpu_ids(world: World, visible: int) -> tuple[int, ...] | None:
    """Which of the GPUs that this process sees are its own; None for all of them.

    All, where it is alone on its machine or its scheduler has bound its own to it; else its share.

    Args:
      world: the job.
      visible: GPUs that CUDA would show to this process.

    Raises:
      UserError: they cannot be dealt out evenly to the machine's processes.
    """
    bound = world.gpus_on_machine is not None and visible < world.gpus_on_machine
    if world.num_local == 1 or visible <= 1 or bound:
        return None
    share, rest = divmod(visible, world.num_local)
    if rest:
        fits = [str(number) for number in range(1, visible + 1) if visible % number == 0]
        raise UserError(
            f"{world.num_local} processes on this machine cannot share its {visible} GPUs evenly; "
            f"start {', '.join(fits[:-1])} or {fits[-1]} (1 uses them all)"
        )
    return tuple(range(world.local_id * share, (world.local_id + 1) * share))


def outside_of_srun(environment: Environment) -> int | None:
    """The tasks of a Slurm job whose script has started this process without srun, where they are several."""
    tasks = environment.get("SLURM_NTASKS") or environment.get("SLURM_NNODES") or "1"
    nodes = environment.get("SLURM_NNODES") or tasks
    if environment.get("SLURM_JOB_ID") is None or not nodes.isdecimal() or int(nodes) < 2:
        return None
    return int(nodes)


def _address(environment: Environment, host: str, port: int) -> str:
    """host:port, unless JAX_COORDINATOR_ADDRESS says it."""
    given = environment.get("JAX_COORDINATOR_ADDRESS")
    host = given or host
    if re.fullmatch(r"\[[^]]+\]:\d+|[^:\[\]]+:\d+", host):
        return host
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"{host}:{port}"


def _port(seed: int) -> int:
    return FIRST_PORT + seed % NUM_PORTS


def _numbers(found_by: str, environment: Environment) -> Callable[..., int]:
    """A reader of numbers among the variables, with a default for absent ones."""

    def number(name: str, default: int | None = None) -> int:
        value = environment.get(name, "")
        if not value and default is not None:
            return default
        if not value.isascii() or not value.isdecimal():
            raise UserError(f"{found_by}: {name} is {value!r}, not a number")
        return int(value)

    return number
