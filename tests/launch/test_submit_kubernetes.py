"""`submit` for Kubernetes: manifests that it would take."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests import tiny
from tests.launch.in_process import Ended
from tests.launch.submitting import KUBERNETES, tool


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
