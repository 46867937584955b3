import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlite_jax.generate.network import product


@pytest.mark.parametrize("shape", [(1,), (8,), (8, 1), (2, 3), (65,)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_of_any_number_of_rows_are_right(shape: tuple[int, ...], dtype: str, has_bias: bool) -> None:
    random = np.random.default_rng(0)
    x, weight, bias = (jnp.asarray(random.standard_normal(size), dtype) for size in ((*shape, 96), (40, 96), 40))
    exact = [np.asarray(array, np.float64) for array in (x, weight, bias)]
    wanted = exact[0] @ exact[1].T + (exact[2] if has_bias else 0)
    found = jax.jit(product)(x, weight, bias if has_bias else None)
    assert (found.shape, found.dtype) == ((*shape, 40), dtype)
    assert np.abs(np.asarray(found, np.float64) - wanted).max() < (1e-4 if dtype == "float32" else 0.2)


@pytest.mark.parametrize(("rows", "is_summed"), [(1, False), (2, True), (64, True), (65, False)])
def test_only_a_few_rows_are_multiplied_as_sums_and_only_on_a_cpu(rows: int, is_summed: bool) -> None:
    arguments = jnp.ones((rows, 96)), jnp.ones((40, 96))
    for platform in ("cpu", "tpu"):
        text = jax.jit(product).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        assert ("dot_general" not in text) == (is_summed and platform == "cpu")
