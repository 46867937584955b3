"""A JobSet and the config that it mounts, as values; YAML is written from them, never pasted together."""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.submit_parts.environment import TEMPLATES, Processes, checked
from tlite_jax.errors import UserError

_LABEL, _LABEL_SAID = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", "a DNS label of at most 40 characters"
_QUANTITY, _QUANTITY_SAID = r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?", "a quantity such as 64Gi"
_SIZE = r"[1-9][0-9]*(\.[0-9]+)?(k|Ki|M|Mi|G|Gi|T|Ti)?"
_KEY = r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?"

_TAKEN = ("/etc", "/etc/tlite", "/dev", "/dev/shm", "/proc", "/sys")  # where a pod or jobset.yaml has something


@dataclass(frozen=True)
class Kubernetes:
    """How pods are asked for.

    Attributes:
      image: of the container; `python -m launch` must work in it.
      namespace: of everything.
      volume_claim: a PersistentVolumeClaim that all pods may write (ReadWriteMany).
      volume_size, storage_class: of a claim to be made; None where it exists.
      mount_path: of the volume; the working directory.
      queue: of Kueue, or None.
      node_selector: label=value words.
      resources: name=quantity words beside the GPUs: cpu, memory, rdma/ib ...
      gpu_resource: what the cluster calls a GPU.
      shared_memory: of /dev/shm, which NCCL uses within a node.
      restart_limit, grace_seconds: as for Slurm.
    """

    image: str
    namespace: str = "default"
    volume_claim: str = "tlite"
    volume_size: str | None = None
    storage_class: str | None = None
    mount_path: str = "/data"
    queue: str | None = None
    node_selector: Sequence[str] = ()
    resources: Sequence[str] = ()
    gpu_resource: str = "nvidia.com/gpu"
    shared_memory: str = "64Gi"
    restart_limit: int = 100
    grace_seconds: int = 300


def manifests(name: str, processes: Processes, kubernetes: Kubernetes, config: str) -> list[dict[str, Any]]:
    """What to apply: a claim where its size is given, the config and the JobSet.

    Args:
      name: of the JobSet.
      processes: what is started; one process a pod.
      kubernetes: the rest.
      config: the run's, as YAML.

    Raises:
      UserError: a value that Kubernetes would refuse.
    """
    _check(name, kubernetes)
    labels = {"app.kubernetes.io/name": "tlite-jax", "app.kubernetes.io/instance": name}
    metadata = {"name": name, "namespace": kubernetes.namespace, "labels": labels}
    configuration = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"config.yaml": config}}
    template = yaml.safe_load((TEMPLATES / "jobset.yaml").read_text(encoding="utf-8"))
    jobset = _filled(template, _values(name, labels, processes, kubernetes))
    if kubernetes.queue is not None:
        jobset["metadata"]["labels"] = {**labels, "kueue.x-k8s.io/queue-name": kubernetes.queue}
        jobset["spec"]["suspend"] = True  # Kueue lets it go
    claim = [] if kubernetes.volume_size is None else [_claim(kubernetes)]
    return [*claim, configuration, jobset]


def to_yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    """The documents of one file."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def submit(file: Path) -> str:
    """Hands the file to kubectl; what it said.

    Raises:
      UserError: no kubectl here, or it refuses.
    """
    command = ["kubectl", "apply", "--server-side", "-f", str(file)]
    if shutil.which("kubectl") is None:
        raise UserError(f"kubectl is not on this machine; run `{' '.join(command)}` where it is")
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        said = (ended.stderr.strip().splitlines() or [f"status {ended.returncode}"])[-1]
        raise UserError(f"kubectl refuses {file}: {said}")
    return ended.stdout.strip()


class _Dumper(yaml.SafeDumper):
    """Writes a config in lines, and repeats what is the same instead of pointing at it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _values(name: str, labels: dict[str, str], processes: Processes, kubernetes: Kubernetes) -> dict[str, Any]:
    resources = dict(_pair("--resource", word, _QUANTITY, _QUANTITY_SAID) for word in kubernetes.resources)
    if kubernetes.gpu_resource in resources:
        raise UserError(f"--resource {kubernetes.gpu_resource}: --gpus-per-node says how many")
    gpus = {kubernetes.gpu_resource: str(processes.gpus_per_node)} if processes.gpus_per_node else {}
    world = {"JOBSET_NAME": name, "REPLICATED_JOB_NAME": "train", "NUM_PROCESSES": str(processes.nodes)}
    variables = {variable.name: variable.value for variable in processes.variables}
    if own := sorted({*world} & {*variables}):
        raise UserError(f"--env {own[0]}: the manifest sets this itself; leave it out")
    variables |= world
    selector = dict(_pair("--node-selector", word, r"[A-Za-z0-9_.-]*", "a label") for word in kubernetes.node_selector)
    return {
        "name": name,
        "namespace": kubernetes.namespace,
        "labels": labels,
        "restart_limit": kubernetes.restart_limit,
        "nodes": processes.nodes,
        "grace": kubernetes.grace_seconds,
        "node_selector": selector,
        "image": kubernetes.image,
        "command": ["python", "-m", "launch", "train", "/etc/tlite/config.yaml"],
        "environment": [{"name": key, "value": _literally(value)} for key, value in variables.items()],
        "requests": {**resources, **gpus},
        "limits": {**{key: value for key, value in resources.items() if key != "cpu"}, **gpus},
        "mount_path": kubernetes.mount_path,
        "volume_claim": kubernetes.volume_claim,
        "shared_memory": kubernetes.shared_memory,
    }


def _literally(value: str) -> str:
    """A variable's value, in which Kubernetes would replace $(NAME)."""
    return value.replace("$", "$$")


def _filled(value: Any, words: Mapping[str, Any]) -> Any:
    """The template with $words replaced by values, keys and structure untouched."""
    if isinstance(value, dict):
        return {key: _filled(each, words) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, words) for each in value]
    if isinstance(value, str) and value.startswith("$"):
        return words[value[1:]]
    return value


def _claim(kubernetes: Kubernetes) -> dict[str, Any]:
    assert kubernetes.volume_size is not None
    storage = {"storageClassName": kubernetes.storage_class} if kubernetes.storage_class else {}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": kubernetes.volume_claim, "namespace": kubernetes.namespace},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            **storage,
            "resources": {"requests": {"storage": kubernetes.volume_size}},
        },
    }


def _check(name: str, kubernetes: Kubernetes) -> None:
    checked("--name", name, _LABEL, _LABEL_SAID)
    checked("--namespace", kubernetes.namespace, _LABEL, _LABEL_SAID)
    checked("--volume-claim", kubernetes.volume_claim, r"[a-z0-9]([a-z0-9.-]{0,60}[a-z0-9])?", "a claim's name")
    checked("--mount-path", kubernetes.mount_path, r"/[^:\x00-\x1f]+", "an absolute path below /")
    if kubernetes.mount_path in _TAKEN:
        raise UserError(f"--mount-path {kubernetes.mount_path}: the pod has something else there; choose such as /data")
    checked("--image", kubernetes.image, r"[A-Za-z0-9][A-Za-z0-9._/:@-]*", "a container image")
    checked("--gpu-resource", kubernetes.gpu_resource, _KEY, "a resource such as nvidia.com/gpu")
    checked("--shared-memory", kubernetes.shared_memory, _SIZE, _QUANTITY_SAID)
    for option, value in (("--queue", kubernetes.queue), ("--storage-class", kubernetes.storage_class)):
        if value is not None:
            checked(option, value, r"[a-z0-9]([a-z0-9.-]{0,60}[a-z0-9])?", "a name")
    if kubernetes.volume_size is not None:
        checked("--volume-size", kubernetes.volume_size, _SIZE, _QUANTITY_SAID)


def _pair(option: str, word: str, pattern: str, what: str) -> tuple[str, str]:
    key, separator, value = word.partition("=")
    if not separator:
        raise UserError(f"{option} {word!r} is not of the form NAME=VALUE")
    return checked(option, key, _KEY, "a name"), checked(f"{option} {key}", value, pattern, what)
