"""What `submit` refuses, in one line, before anything is written."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny
from tests.launch.in_process import Ended
from tests.launch.submitting import KUBERNETES, tool


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
        (("--name", "a b"), "--name 'a b' is not at most 64 letters, digits, _ . -"),
        (("--name", ""), "--name '' is not"),
        (("--time", "١٢"), "--time '١٢' is not a time limit"),
        (("--sbatch", "--nodes=3"), "--sbatch=--nodes=3 contradicts the script; give --nodes instead"),
        (("--sbatch", "--wrap=true"), "--sbatch=--wrap=true contradicts the script; leave it out"),
        (("--mount", "/a:/b"), "--mount is of a container, and there is none"),
        (("--image", "", "--container", "pyxis"), "--image '' is not one line"),
        (("--python", "a\nb"), "--python 'a\\nb' is not one line"),
        (("--queue", "team"), "--queue is for Kubernetes only, and this goes to slurm"),
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
    ended = submit(*([] if "--cluster" in words else ["--cluster", "slurm"]), "--no-plan", *words)
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("output=/elsewhere/run",), "output /elsewhere/run is not below --mount-path /data"),
        (("output=../elsewhere",), "output ../elsewhere is not below --mount-path /data"),
        (("--mount-path", "data"), "--mount-path 'data' is not an absolute path below /"),
        (("--mount-path", "/dev/shm"), "--mount-path /dev/shm: the pod has something else there"),
        (("--volume-size", "0"), "--volume-size '0' is not a quantity"),
        (("--resource", "nvidia.com/gpu=4"), "--resource nvidia.com/gpu: --gpus-per-node says how many"),
        (("--env", "NUM_PROCESSES=3"), "--env NUM_PROCESSES: the manifest sets this itself"),
        (("--time", "1:00:00"), "--time is for Slurm only, and this goes to kubernetes"),
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
