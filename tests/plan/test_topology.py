"""Hardware files, the slices of TPUs, and what compilers make of the descriptions."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.plan.fakes import hardware
from tlite_jax.errors import UserError
from tlite_jax.plan import worker
from tlite_jax.plan.topology import domain, load_hardware, topology_name
from tlite_jax.telemetry.throughput import peak_flops

DIRECTORY = Path(__file__).resolve().parent.parent.parent / "configs" / "hardware"
NAMES = sorted(path.stem for path in DIRECTORY.glob("*.yaml"))
PROMISED = {"a100-80gb", "a100-80gb-1nic", "a100-40gb", "h100", "h200", "b200", "v4", "v5e", "v5p", "v6e", "7x", "cpu"}


def test_the_promised_machines_are_there() -> None:
    assert set(NAMES) >= PROMISED


@pytest.mark.parametrize("name", NAMES)
def test_a_machines_rates_are_below_its_peaks(name: str) -> None:
    machine = load_hardware(name, DIRECTORY)
    rates, peak = machine.rates, machine.peak_flops.value
    assert rates.attention_backward.value <= rates.attention_forward.value < rates.matmul.value < peak
    assert rates.memory.value > rates.intra_node.value
    if machine.gpu is not None:
        assert rates.memory.value < machine.gpu.memory_bandwidth


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a100-80gb", "NVIDIA A100-SXM4-80GB"),
        ("h100", "NVIDIA H100 80GB HBM3"),
        ("h200", "NVIDIA H200"),
        ("b200", "NVIDIA B200"),
        ("v4", "TPU v4"),
        ("v5e", "TPU v5 lite"),
        ("v5p", "TPU v5"),
        ("v6e", "TPU v6 lite"),
        ("7x", "TPU7x"),
    ],
)
def test_mfu_has_the_same_denominator_as_in_training(name: str, kind: str) -> None:
    assert load_hardware(name, DIRECTORY).peak_flops.value == peak_flops(kind)


def test_one_nic_is_an_eighth_of_eight() -> None:
    eight, one = load_hardware("a100-80gb", DIRECTORY), load_hardware("a100-80gb-1nic", DIRECTORY)
    assert eight.rates.inter_node.value == 8 * one.rates.inter_node.value
    without_nics = {"rates": {"inter_node"}, "title": True, "price": True}
    assert eight.model_dump(exclude=without_nics) == one.model_dump(exclude=without_nics)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    values = yaml.safe_load((DIRECTORY / "cpu.yaml").read_text(encoding="utf-8"))
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({**values, "devices_per_node": 3}), encoding="utf-8")
    assert load_hardware(str(mine), DIRECTORY).devices_per_node == 3
    mine.write_text(yaml.safe_dump({**values, "device_per_node": 3}), encoding="utf-8")
    with pytest.raises(UserError, match=r"mine.yaml: device_per_node: unknown key; did you mean 'devices_per_node'\?"):
        load_hardware(str(mine), DIRECTORY)
    del values["rates"]["memory"]["source"]
    mine.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(UserError, match=r"rates.memory.source: required"):
        load_hardware(str(mine), DIRECTORY)
    mine.write_text(yaml.safe_dump({**values, "kind": "tpu"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"rates.memory.source"):
        load_hardware(str(mine), DIRECTORY)
    mine.write_text("- a list", encoding="utf-8")
    with pytest.raises(UserError, match="a hardware file is a mapping"):
        load_hardware(str(mine), DIRECTORY)


def test_a_kind_has_its_own_target() -> None:
    with pytest.raises(ValueError, match="kind tpu needs the section tpu"):
        hardware(kind="tpu")
    with pytest.raises(ValueError, match="kind cpu needs neither gpu nor tpu"):
        hardware(tpu={"version": "v5p", "largest_slice": (16, 16, 24)})


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(
        UserError, match=r"--hardware a10 is not known; choose from 7x, a100-40gb, .*v6e, or give a YAML"
    ):
        load_hardware("a10", DIRECTORY)


@pytest.mark.parametrize(
    ("name", "nodes", "expected"),
    [
        ("a100-80gb", 12, "1x12x8"),
        ("v5p", 1, "v5p:2x2x1"),
        ("v5p", 24, "v5p:4x4x6"),
        ("v5p", 16, "v5p:4x4x4"),
        ("v5e", 1, "v5e:2x2"),
        ("v5e", 24, "v5e:8x12"),
        ("v6e", 64, "v6e:16x16"),
        ("v6e", 128, "v6e:16x16"),
        ("7x", 12, "tpu7x:4x4x3"),
        ("cpu", 4, "cpu"),
    ],
)
def test_clusters_have_the_compilers_names(name: str, nodes: int, expected: str) -> None:
    assert topology_name(load_hardware(name, DIRECTORY), nodes) == expected


@pytest.mark.parametrize("name", ["v4", "v5e", "v5p", "v6e", "7x"])
def test_a_slice_has_all_chips_within_the_pod(name: str) -> None:
    machine = load_hardware(name, DIRECTORY)
    chips_per_node = machine.devices_per_node // machine.tpu.devices_per_chip
    for nodes in (1, 2, 4, 8, 16, 24, 48, 96, 192):
        cluster = domain(machine, nodes)
        shape = [int(size) for size in topology_name(machine, nodes).split(":")[1].split("x")]
        assert math.prod(shape) * cluster.num_domains == nodes * chips_per_node
        assert all(size <= most for size, most in zip(shape, machine.tpu.largest_slice, strict=True))
        assert shape[0] % 2 == shape[1] % 2 == 0  # of hosts of 2 x 2 chips
        assert cluster.num_devices == nodes * machine.devices_per_node
        assert cluster.nodes_per_domain * cluster.num_domains == nodes


def test_a_pod_too_small_makes_slices() -> None:
    cluster = domain(load_hardware("v6e", DIRECTORY), 128)
    assert (cluster.num_domains, cluster.devices_per_domain, cluster.nodes_per_domain) == (2, 256, 64)
    gpus = domain(load_hardware("h100", DIRECTORY), 3)
    assert (gpus.num_domains, gpus.devices_per_domain, gpus.nodes_per_domain) == (3, 8, 1)


def test_hosts_that_make_no_slice_are_refused() -> None:
    with pytest.raises(UserError, match=r"--nodes 13: 52 chips make no slices of v5e \(at most 16x16.*use --nodes 12"):
        domain(load_hardware("v5e", DIRECTORY), 13)


def test_a_gpu_is_told_to_xla_in_its_own_format() -> None:
    text = load_hardware("h200", DIRECTORY).gpu.textproto(123)
    assert text.startswith('platform_name: "CUDA"\n')
    for line in ("cuda_compute_capability { major: 9 minor: 0 }", "device_memory_size: 123", "core_count: 132"):
        assert f"  {line}\n" in text


_COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pathlib import Path
from tlite_jax.plan.topology import devices, load_hardware
name, nodes, attention = sys.argv[1], int(sys.argv[2]), sys.argv[3]
hardware = load_hardware(name, Path(sys.argv[4]))
mesh = Mesh(np.asarray(devices(hardware, nodes)), ("x",))
def loss(q, k, w):
    attended = jax.nn.dot_product_attention((q.reshape(1, -1, 512) @ w).reshape(q.shape), k, k, is_causal=True,
                                            implementation=attention)
    return jax.lax.psum((attended.astype(jnp.float32) ** 2).sum(), "x")
specs = (P("x"), P("x"), P())
gradients = jax.grad(jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False), argnums=(0, 1, 2))
def abstract(shape, spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
n = mesh.size
arguments = abstract((n, 1024, 4, 128), P("x")), abstract((n, 1024, 2, 128), P("x")), abstract((512, 512), P())
compiled = jax.jit(gradients).lower(*arguments).compile()
text = compiled.as_text()
print(json.dumps([n, "all-reduce" in text, "cudnn" in text, compiled.memory_analysis().temp_size_in_bytes]))
"""


def compiled(name: str, nodes: int, attention: str) -> list:
    """Compiles a product, attention and a reduction for described devices, in a process of its own."""
    command = [sys.executable, "-c", _COMPILE, name, str(nodes), attention, str(DIRECTORY)]
    environment = {**worker.inherited(), **worker.ENVIRONMENT}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["a100-80gb", "a100-40gb", "h100", "h200", "b200"])
def test_the_compiler_takes_each_gpu(name: str) -> None:
    machine = load_hardware(name, DIRECTORY)
    if (missing := worker.plugin_is_missing(machine)) is not None:
        pytest.skip(missing)
    num_devices, reduces, has_cudnn, temporaries = compiled(name, 2, "cudnn")
    assert num_devices == 16
    assert reduces
    assert has_cudnn
    assert 0 < temporaries < machine.memory_bytes


@pytest.mark.parametrize("name", ["v4", "v5e", "v5p", "v6e", "7x"])
def test_the_compiler_knows_each_tpu(name: str) -> None:
    machine = load_hardware(name, DIRECTORY)
    if (missing := worker.plugin_is_missing(machine)) is not None:
        pytest.skip(missing)
    script = (
        "import sys; from pathlib import Path; from tlite_jax.plan.topology import devices, load_hardware\n"
        "machine = load_hardware(sys.argv[1], Path(sys.argv[2]))\n"
        "print([len(devices(machine, nodes)) for nodes in (1, 2, 24, 128)])"
    )
    environment = {**worker.inherited(), **worker.ENVIRONMENT}
    command = [sys.executable, "-c", script, name, str(DIRECTORY)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.splitlines()[-1] == str([nodes * machine.devices_per_node for nodes in (1, 2, 24, 128)])


def test_describing_takes_no_jax() -> None:
    script = "import sys, tlite_jax.plan.worker, tlite_jax.plan.search; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], env=worker.inherited(), check=True, timeout=60)
