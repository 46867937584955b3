"""`python -m launch submit CONFIG`: a run on a Slurm or Kubernetes cluster, by one command."""

import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.submit_parts import kubernetes as kube
from launch.submit_parts import slurm as slurm_parts
from launch.submit_parts.environment import Processes, checked, make_environment
from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.config import RunConfig

HARDWARE = Path(__file__).resolve().parent.parent / "configs" / "hardware"
Words = list[str] | None


def main(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="The run, as YAML.")],
    overrides: Annotated[Words, typer.Argument(help="section.field=value ...")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Hosts.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each; 0: none, compute on CPUs.")] = 8,
    processes_per_node: Annotated[int, typer.Option(min=1, help="One drives all GPUs of its node.")] = 1,
    cluster: Annotated[str | None, typer.Option(help="slurm or kubernetes; default: whose command is here.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script or manifest; write nothing.")] = False,
    hardware: Annotated[str, typer.Option(help="To plan for: a name in configs/hardware, or a file.")] = "a100-80gb",
    plan: Annotated[bool, typer.Option("--plan/--no-plan", help="Compile the step first, without a GPU.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Submit although the plan says that it cannot fit.")] = False,
    name: Annotated[str | None, typer.Option(help="Of the job; default: from the config's output.")] = None,
    jobs_directory: Annotated[Path | None, typer.Option(help="For scripts and logs; default: OUTPUT.jobs.")] = None,
    env: Annotated[Words, typer.Option("--env", help="NAME=VALUE for the processes; may be repeated.")] = None,
    restart_limit: Annotated[int, typer.Option(min=0, help="Restarts of a job after statuses 75, 76, a crash.")] = 100,
    grace: Annotated[int, typer.Option(min=30, help="Seconds to save in, before the time limit.")] = 300,
    image: Annotated[str | None, typer.Option(help="Container image; Kubernetes needs one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was submitted as JSON.")] = False,
    partition: Annotated[str | None, typer.Option(help="Slurm.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm.")] = None,
    time: Annotated[str | None, typer.Option(help="Slurm: time limit of a job, such as 2-00:00:00.")] = None,
    sbatch: Annotated[Words, typer.Option("--sbatch", help="Slurm: a further option, --name=value.")] = None,
    exclusive: Annotated[bool, typer.Option(help="Slurm: whole nodes.")] = True,
    chain: Annotated[int, typer.Option(min=1, max=1000, help="Slurm: jobs, for runs beyond the time limit.")] = 1,
    container: Annotated[str | None, typer.Option(help="Slurm: what runs --image: pyxis or apptainer.")] = None,
    mount: Annotated[Words, typer.Option("--mount", help="Slurm: SOURCE:TARGET of the container.")] = None,
    python: Annotated[str | None, typer.Option(help="Slurm: the Python of the nodes; default: this one.")] = None,
    namespace: Annotated[str, typer.Option(help="Kubernetes.")] = "default",
    volume_claim: Annotated[str, typer.Option(help="Kubernetes: claim that every pod writes to.")] = "tlite",
    volume_size: Annotated[str | None, typer.Option(help="Kubernetes: make the claim, so large.")] = None,
    storage_class: Annotated[str | None, typer.Option(help="Kubernetes: of the claim to make.")] = None,
    mount_path: Annotated[str, typer.Option(help="Kubernetes: where the volume is, and the run works.")] = "/data",
    queue: Annotated[str | None, typer.Option(help="Kubernetes: queue of Kueue.")] = None,
    node_selector: Annotated[Words, typer.Option("--node-selector", help="Kubernetes: LABEL=VALUE.")] = None,
    resource: Annotated[Words, typer.Option("--resource", help="Kubernetes: NAME=QUANTITY beside GPUs.")] = None,
    gpu_resource: Annotated[str, typer.Option(help="Kubernetes: what a GPU is called.")] = "nvidia.com/gpu",
    shared_memory: Annotated[str, typer.Option(help="Kubernetes: size of /dev/shm.")] = "64Gi",
) -> None:
    """Start a run on a Slurm or Kubernetes cluster: checked, planned, written down and submitted.

    The job saves and starts again when its time ends or it is preempted, and when a process or a node is lost.
    docs/clusters.md describes every option. Exits with status 1 when the run does not fit.

    Example: python -m launch submit configs/tlite_8b_stage1.yaml --nodes 12 --gpus-per-node 8 --dry-run
    """
    from tlite_jax.config_files import load_config

    run = load_config(config, overrides or ())
    cluster = _cluster(cluster, dry_run)
    _check_options(context, cluster)
    variables = make_environment(gpus_per_node, hardware, env or ())
    processes = Processes(nodes, processes_per_node, gpus_per_node, hardware, variables)
    _check_devices(run, processes)
    if cluster == "slurm":
        if container not in (None, "pyxis", "apptainer") or (container is None) != (image is None):
            raise UserError("give --container pyxis or apptainer together with --image, or neither")
        if mount and container is None:
            raise UserError("--mount is of a container, and there is none; give --container and --image, too")
        options = slurm_parts.Slurm(
            partition=partition,
            account=account,
            qos=qos,
            time=time,
            extra=sbatch or (),
            exclusive=exclusive,
            chain=chain,
            restart_limit=restart_limit,
            grace_seconds=grace,
            container=container,
            image=image,
            mounts=mount or (),
        )
        job: _Job = _SlurmJob(run, processes, name, jobs_directory, options, python)
    else:
        if image is None:
            raise UserError("--cluster kubernetes needs --image, a container with this package (see Containerfile)")
        pods = kube.Kubernetes(
            image=image,
            namespace=namespace,
            volume_claim=volume_claim,
            volume_size=volume_size,
            storage_class=storage_class,
            mount_path=mount_path,
            queue=queue,
            node_selector=node_selector or (),
            resources=resource or (),
            gpu_resource=gpu_resource,
            shared_memory=shared_memory,
            restart_limit=restart_limit,
            grace_seconds=grace,
        )
        job = _KubernetesJob(run, processes, name, jobs_directory, pods)
    text = job.text()  # refused before anything is compiled, if it is
    if plan and not _fits(run, processes, force):
        raise typer.Exit(1)
    if dry_run:
        print(text, end="")
        return
    submitted = job.submit()
    if as_json:
        print(json.dumps({"cluster": cluster, "directory": str(job.directory), "submitted": submitted}))
    else:
        print("\n".join(job.said(submitted)))


@dataclass
class _Job:
    """A run about to be submitted; its directory is made when it is."""

    run: "RunConfig"
    processes: Processes
    given_name: str | None
    given_directory: Path | None

    def __post_init__(self) -> None:
        parent = self._parent()
        number = next(number for number in itertools.count(1) if not (parent / str(number)).exists())
        self.directory = parent / str(number)

    def _parent(self) -> Path:
        output = Path(f"{self.run.output.resolve()}.jobs")
        return self.given_directory.resolve() if self.given_directory is not None else output

    def text(self) -> str:
        raise NotImplementedError

    def submit(self) -> list[str]:
        raise NotImplementedError

    def said(self, submitted: list[str]) -> list[str]:
        raise NotImplementedError

    def write(self, file: str) -> Path:
        """Makes the directory, with a snapshot of the config and the file that is submitted."""
        from tlite_jax.config_files import save_config

        text = self.text()
        try:
            (self.directory / "logs").mkdir(parents=True)
            save_config(self.run, self.directory / "config.yaml")
            (self.directory / file).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write to {self.directory}: {error.strerror}; see --jobs-directory") from error
        return self.directory / file


@dataclass
class _SlurmJob(_Job):
    slurm: slurm_parts.Slurm
    python: str | None

    def text(self) -> str:
        name = self.given_name
        if name is None:
            name = re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(self.run.output.parts[-2:])).strip("-.")
        checked("--name", name, r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", "at most 64 letters, digits, _ . -")
        python = self.python
        if python is None:
            python = "python" if self.slurm.container else sys.executable
        place = slurm_parts.Place(self.directory, Path.cwd(), _repository(), python)
        return slurm_parts.script(name, self.processes, self.slurm, place)

    def submit(self) -> list[str]:
        return slurm_parts.submit(self.write("job.sh"), self.slurm.chain)

    def said(self, submitted: list[str]) -> list[str]:
        log = self.directory / "logs" / f"{submitted[0]}-0.log"
        return [f"submitted {', '.join(submitted)}: {self.directory}/job.sh", f"to watch it: tail -F {log}"]


@dataclass
class _KubernetesJob(_Job):
    kubernetes: kube.Kubernetes

    def _parent(self) -> Path:
        if self.given_directory is not None:
            return self.given_directory.resolve()
        return Path.cwd() / f"{self._name()}.jobs"  # the output lies on a volume of the cluster

    def text(self) -> str:
        from tlite_jax.config_files import save_config

        if self.processes.per_node != 1:
            raise UserError("--processes-per-node: on Kubernetes one process drives all GPUs of its pod")
        self._check_paths()
        with tempfile.TemporaryDirectory() as scratch:
            save_config(self.run, Path(scratch) / "config.yaml")
            config = (Path(scratch) / "config.yaml").read_text(encoding="utf-8")
        return kube.to_yaml(kube.manifests(self._name(), self.processes, self.kubernetes, config))

    def submit(self) -> list[str]:
        return kube.submit(self.write("jobset.yaml")).splitlines()

    def said(self, submitted: list[str]) -> list[str]:
        pod = f"jobset.sigs.k8s.io/jobset-name={self._name()},batch.kubernetes.io/job-completion-index=0"
        watch = f"to watch it: kubectl logs -f -n {self.kubernetes.namespace} -l {pod}"
        return [*submitted, f"written to {self.directory}", watch]

    def _name(self) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", "-".join(self.run.output.parts[-2:]).lower()).strip("-")
        return self.given_name if self.given_name is not None else f"run-{words}"[:40].rstrip("-")

    def _check_paths(self) -> None:
        paths = {"output": self.run.output, "data.buckets": self.run.data.buckets}
        if self.run.init_from is not None:
            paths["init_from.path"] = self.run.init_from.path
        for field, path in paths.items():
            there = os.path.normpath(Path(self.kubernetes.mount_path) / path)
            if not Path(there).is_relative_to(self.kubernetes.mount_path):
                raise UserError(
                    f"{field} {path} is not below --mount-path {self.kubernetes.mount_path}, where pods have the volume"
                )


def _cluster(given: str | None, dry_run: bool) -> str:
    if given is not None:
        if given not in ("slurm", "kubernetes"):
            raise UserError(f"--cluster {given} is not known; choose slurm or kubernetes")
        return given
    if shutil.which("sbatch") or (dry_run and not shutil.which("kubectl")):
        return "slurm"
    if shutil.which("kubectl"):
        return "kubernetes"
    raise UserError("neither sbatch nor kubectl is on this machine; run this where one is, or pass --dry-run")


def _check_options(context: typer.Context, cluster: str) -> None:
    """Refuses what was given for the other kind of cluster, as the beginning of its help says."""
    other = "Kubernetes:" if cluster == "slurm" else "Slurm"
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if (
            source is not None
            and source.name == "COMMANDLINE"
            and (getattr(parameter, "help", "") or "").startswith(other)
        ):
            raise UserError(
                f"{parameter.opts[0]} is for {other.rstrip(':')} only, and this goes to {cluster}; leave it out"
            )


def _check_devices(run: "RunConfig", processes: Processes) -> None:
    from launch.job.mesh_fit import check_world
    from tlite_jax.plan.search import check_batch
    from tlite_jax.plan.topology import load_hardware

    if not processes.gpus_per_node:
        return
    load_hardware(processes.hardware, HARDWARE)  # without a plan, too: the environment depends on it
    if processes.gpus_per_node % processes.per_node:
        raise UserError(
            f"--processes-per-node {processes.per_node} cannot share {processes.gpus_per_node} GPUs evenly; use 1"
        )
    check_world(run, processes.nodes, processes.gpus_per_node)
    check_batch(run, processes.nodes * processes.gpus_per_node, run.execution.num_microbatches)


def _fits(run: "RunConfig", processes: Processes, force: bool) -> bool:
    """Says on stderr what the plan says."""
    from launch.submit_parts.planned import DoesNotFitError, plan
    from tlite_jax.config_files import save_config

    if not processes.gpus_per_node:
        return True
    print(f"planning for {processes.nodes} nodes of {processes.hardware}", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            save_config(run, Path(scratch) / "config.yaml")
            said = plan(
                Path(scratch) / "config.yaml", processes.hardware, processes.nodes, processes.gpus_per_node, HARDWARE
            )
    except DoesNotFitError as error:
        mend = "submitted all the same" if force else "not submitted (--force does it all the same)"
        print(f"{'warning' if force else 'error'}: {error}; {mend}", file=sys.stderr)
        return force
    print(said, file=sys.stderr)
    return True


def _repository() -> Path | None:
    """Where this package is imported from, unless it is installed as others are."""
    parent = Path(__file__).resolve().parent.parent
    return None if parent.name in ("site-packages", "dist-packages") else parent
