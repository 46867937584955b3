"""Writing text with a model: prefill, a compiled decoding loop with a KV cache, sampling, and stops."""

from tlite_jax.generate.decoding import Decoding, Generator
from tlite_jax.generate.sampling import GREEDY, Sampling
from tlite_jax.generate.text import TextStream, Written, write

__all__ = ["GREEDY", "Decoding", "Generator", "Sampling", "TextStream", "Written", "write"]
