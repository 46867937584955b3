"""What a program runs with: facts that a run notes beside what it did."""

import platform
from importlib import metadata

import tlite_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def environment() -> dict[str, str]:
    """Versions of Python, of this package and of those that decide what a step computes; the host's name."""
    found = {"host": platform.node(), "python": platform.python_version(), "tlite_jax": tlite_jax.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
