"""A fixed computation on this process's own accelerators, by whose time processes can be compared."""

import time
from typing import Any


class UnitOfWork:
    """Matrix products on each device, all at once; no other process takes part.

    Args:
      width: of the square matrices.
      products: in a row; by default about 5 ms of an A100, 24 MB of its memory.
    """

    def __init__(self, width: int = 2048, products: int = 64) -> None:
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        devices = jax.local_devices()
        mesh = jax.sharding.Mesh(devices, ("device",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = NamedSharding(mesh, PartitionSpec("device"))

        @jax.jit
        def make() -> Any:
            x_NDD = jnp.broadcast_to(jnp.eye(width, dtype=jnp.bfloat16), shape)
            return jax.lax.with_sharding_constraint(x_NDD, sharding)

        @jax.jit
        def multiply(x_NDD: Any) -> Any:
            def product(_: int, y_NDD: Any) -> Any:
                return jax.lax.with_sharding_constraint(y_NDD @ x_NDD, sharding)

            return jax.lax.fori_loop(0, products, product, x_NDD)

        shape = (len(devices), width, width)
        self._matrices = make()
        self._compiled = multiply.lower(self._matrices).compile()
        self.seconds()

    def seconds(self) -> float:
        """Computes it; the devices should have nothing else to do."""
        began = time.perf_counter()
        self._compiled(self._matrices).block_until_ready()
        return time.perf_counter() - began
