"""Log-probabilities of fixed windows under a model, and how far two models' are apart.

Shapes: B rows (one a device), T tokens of a window, S scored places of it, V vocab.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tlite_jax.config import ExecutionConfig, ModelConfig
from tlite_jax.evaluate.forward import make_pass, on_mesh
from tlite_jax.release.sample import Windows

Measured = dict[str, np.ndarray]


class Passes:
    """The compiled passes over windows; parameters are stored and sharded, and a mesh works on a row a device.

    Args:
      model: shape of the models.
      mesh: from `make_mesh`.
      dtype: to compute in; logits are float32 always, and so is what is made of them.
      windows: what is read.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, dtype: str, windows: Windows):
        self._mesh, self._windows, self._vocab_size = mesh, windows, model.vocab_size
        execution = ExecutionConfig.model_validate({"compute_dtype": dtype})
        scored = slice(windows.first, windows.last)

        def logits(hidden_BTD: jax.Array, head_VD: jax.Array, _: Any) -> jax.Array:
            return jnp.einsum("bsd,vd->bsv", hidden_BTD[:, scored], head_VD, preferred_element_type=jnp.float32)

        def compared(hidden_BTD: jax.Array, head_VD: jax.Array, batch: Any) -> dict[str, jax.Array]:
            return compare(logits(hidden_BTD, head_VD, batch), batch["base"], batch["targets"], xp=jnp)

        self._logits = make_pass(model, execution, mesh, logits)
        self._compared = make_pass(model, execution, mesh, compared)

    def logits(self, params: Any) -> Iterator[np.ndarray]:
        """Yields float32 logits [S, V] of each window in order."""
        for first in range(0, len(self._windows), self._mesh.size):
            result = self._run(self._logits, params, first, {})
            yield from np.asarray(result)[: len(self._windows) - first]

    def write(self, params: Any, path: Path) -> np.ndarray:
        """Puts the logits of all windows into a file; returns it, mapped: [windows, S, V] float32."""
        shape = (len(self._windows), self._windows.num_scored, self._vocab_size)
        file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        for row, logits in enumerate(self.logits(params)):
            file[row] = logits
        return file

    def compare(self, params: Any, base: np.ndarray) -> Measured:
        """Compares a model's predictions with a base's.

        Args:
          params: the model.
          base: the base's logits, from `write`.

        Returns:
          What `compare` gives, of all scored tokens, in order.
        """
        found: list[Mapping[str, np.ndarray]] = []
        for first in range(0, len(self._windows), self._mesh.size):
            rows = self._rows(first)
            extra = {"base": base[rows], "targets": self._windows.targets[rows]}
            result = jax.tree.map(np.asarray, self._run(self._compared, params, first, extra))
            found.append({name: array[: len(self._windows) - first].reshape(-1) for name, array in result.items()})
        return {name: np.concatenate([part[name] for part in found]).astype(np.float64) for name in found[0]}

    def _rows(self, first: int) -> np.ndarray:
        """Numbers of a batch's windows; the last is repeated where they end."""
        return np.minimum(np.arange(first, first + self._mesh.size), len(self._windows) - 1)

    def _run(self, compiled: Any, params: Any, first: int, extra: Mapping[str, np.ndarray]) -> Any:
        tokens = self._windows.tokens[self._rows(first)]
        batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), **extra}
        # Accelerators would multiply float32 matrices with fewer bits.
        with jax.default_matmul_precision("highest"):
            return compiled(params, {name: on_mesh(array, self._mesh) for name, array in batch.items()})


def compare(logits_XV: Any, base_XV: Any, targets_X: Any, xp: Any = np) -> dict[str, Any]:
    """What llama.cpp's `llama-perplexity --kl-divergence` takes its numbers from, for each scored token.

    Args:
      logits_XV, base_XV: [..., V] of the model and of the base.
      targets_X: [...] int32, the text's own next tokens.
      xp: numpy, or jax.numpy.

    Returns:
      [...] each: `kl` = KL(base || model) in nats, `logp` and `base_logp` of the target, `same_top`.
    """

    def log_softmax(logits: Any) -> Any:
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - xp.log(xp.exp(shifted).sum(-1, keepdims=True))

    q_XV, p_XV = log_softmax(logits_XV), log_softmax(base_XV)

    def of_target(logp_XV: Any) -> Any:
        return xp.take_along_axis(logp_XV, targets_X[..., None], -1)[..., 0]

    return {
        "kl": (xp.exp(p_XV) * (p_XV - q_XV)).sum(-1),
        "logp": of_target(q_XV),
        "base_logp": of_target(p_XV),
        "same_top": q_XV.argmax(-1) == p_XV.argmax(-1),
    }
