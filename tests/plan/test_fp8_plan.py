"""What XLA makes of products in eight bits, compiled for a described H100, and how they are priced."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from tests.helpers import tiny_model
from tests.plan.fakes import collective, hardware, program
from tlite_jax.config import ExecutionConfig, MeshConfig
from tlite_jax.errors import UserError
from tlite_jax.model.fp8 import fp8_product
from tlite_jax.plan.cost import product_seconds, transfer
from tlite_jax.plan.hlo import Module
from tlite_jax.plan.topology import Sourced, devices, load_hardware
from tlite_jax.sharding import make_mesh
from tlite_jax.train.step import make_gradients

TOKENS, INPUTS, OUTPUTS = 512, 256, 1024
FLOPS = 3 * 2.0 * TOKENS * INPUTS * OUTPUTS  # a product, and two for its gradients
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins.xla_cuda12") is None,
    reason="needs the compiler for NVIDIA: pip install 'tlite_jax[plan-gpu]'",
)


def compiled_for_h100(directory, *, knows_cuda, **options):
    """The text of a product and its gradients; a GPU's own target description also says which CUDA it has."""
    described = load_hardware("h100", directory)
    target = described.gpu.textproto(described.memory_bytes)
    target += "runtime_version { major: 12 minor: 9 }" if knows_cuda else ""
    device = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1").devices
    sharding = NamedSharding(make_mesh(MeshConfig(), device), PartitionSpec())

    def products(x, weight, dy):
        y, vjp = jax.vjp(fp8_product, x, weight)
        return y, vjp(dy)

    shapes = (1, TOKENS, INPUTS), (OUTPUTS, INPUTS), (1, TOKENS, OUTPUTS)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    return jax.jit(products, compiler_options=options).lower(*arguments).compile().as_text()


@needs_compiler
def test_xla_multiplies_in_eight_bits(request):
    pytest.importorskip("qwix", reason="the extra fp8 is not installed")
    directory = request.config.rootpath / "configs" / "hardware"
    triton = compiled_for_h100(directory, knows_cuda=False)
    cublas = compiled_for_h100(directory, knows_cuda=True, xla_gpu_enable_triton_gemm=False)
    assert cublas.count('"__cublas$lt$matmul$f8"') == 3
    for text in (triton, cublas):
        module = Module(text)
        assert module.computation_flops(module.entry) == FLOPS
        assert module.computation_flops(module.entry, fp8=True) == FLOPS


@needs_compiler
def test_an_a100_is_refused(request):
    described = load_hardware("a100-80gb", request.config.rootpath / "configs" / "hardware")
    mesh = make_mesh(MeshConfig(), devices(described, 1))
    with pytest.raises(UserError, match=r"compute capability 8\.9 .* not 8\.0"):
        make_gradients(tiny_model(), ExecutionConfig(fp8=True), mesh, document_masking=False)


def test_eight_bits_have_a_rate_of_their_own():
    machine = hardware()
    twice = machine.rates.model_copy(update={"matmul_fp8": Sourced(value=200.0, source="a test")})
    assert product_seconds(1000.0, 400.0, machine.rates) == 10.0
    assert product_seconds(1000.0, 400.0, twice) == 8.0
    gather = collective(overlapped_flops=100.0, overlapped_fp8_flops=100.0)
    assert transfer(gather, machine, nic=2.0).hidden_seconds == 1.0
    assert transfer(gather, machine.model_copy(update={"rates": twice}), nic=2.0).hidden_seconds == 0.5
    assert program(gather).work.fp8_flops == 0.0
