"""From text to batches: documents -> buckets -> mixture -> rows of tokens. Only `loader` imports jax."""
