"""Products in eight bits: how far from float32 they lie, and where they are refused."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlite_jax.errors import UserError
from tlite_jax.model.fp8 import check_fp8, fp8_product
from tlite_jax.model.layers import product


def device(platform, compute_capability):
    return SimpleNamespace(platform=platform, compute_capability=compute_capability)


def arrays(scale=1.0):
    rng = np.random.default_rng(0)
    x_BTI, weight_OI, dy_BTO = (rng.normal(size=shape).astype("f4") for shape in ((2, 40, 96), (64, 96), (2, 40, 64)))
    return x_BTI * scale, weight_OI * 0.02, dy_BTO / scale


def relative_error(found, expected):
    return np.linalg.norm(np.asarray(found, "f4") - expected) / np.linalg.norm(expected)


# Far beyond the range of e4m3 (2^-9 to 448) and of e5m2: the scales bring them into it.
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products_and_gradients_err_as_eight_bits_do(dtype, scale):
    pytest.importorskip("qwix", reason="the extra fp8 is not installed")
    x, weight, dy = arrays(scale)
    expected, vjp = jax.vjp(product, x, weight)
    y, fp8_vjp = jax.vjp(fp8_product, jnp.asarray(x, dtype), jnp.asarray(weight, dtype))
    gradients = fp8_vjp(jnp.asarray(dy, dtype))
    assert y.dtype == gradients[0].dtype == gradients[1].dtype == dtype
    # A rounding to e4m3 errs by 0.026 of a value (root mean square), one to e5m2 by twice that; a product has two.
    assert 0.03 < relative_error(y, expected) < 0.045
    for found, wanted in zip(gradients, vjp(dy), strict=True):
        assert 0.05 < relative_error(found, wanted) < 0.07


def test_arrays_of_zeros_have_a_scale():
    pytest.importorskip("qwix", reason="the extra fp8 is not installed")
    x, weight, dy = (jnp.zeros_like(array) for array in arrays())
    y, vjp = jax.vjp(fp8_product, x, weight)
    assert not np.any(y)
    assert not any(np.any(gradient) for gradient in vjp(dy))


def test_what_is_not_finite_stays_so():
    """Such a step is skipped, which it would not be if quantising hid it."""
    pytest.importorskip("qwix", reason="the extra fp8 is not installed")
    x, weight, _ = arrays()
    for value in (np.nan, np.inf):
        x[0, 0, 0] = value
        assert not np.all(np.isfinite(fp8_product(x, weight)))


@pytest.mark.parametrize(
    ("platform", "capability", "match"),
    [
        ("cuda", "8.0", r"needs compute capability 8\.9 .* not 8\.0; set execution\.fp8=false"),
        ("gpu", "gfx942", "not gfx942"),
        ("tpu", None, "for NVIDIA GPUs, not tpu; set execution.fp8=false"),
    ],
)
def test_devices_without_it_are_refused(platform, capability, match):
    with pytest.raises(UserError, match=match):
        check_fp8(device(platform, capability))


def test_without_qwix_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"execution\.fp8 needs 'qwix': pip install 'tlite_jax\[fp8\]'"):
        check_fp8(device("cuda", "9.0"))
