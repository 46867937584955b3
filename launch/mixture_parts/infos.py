"""The buckets that a config names."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.config import RunConfig
    from tlite_jax.data.mixture import BucketInfo


def bucket_infos(run: "RunConfig", *, declared: bool) -> "Sequence[BucketInfo]":
    """The buckets that a config names: prepared ones, else those that it declares."""
    from tlite_jax.data.buckets import BucketStore, read_store_manifest
    from tlite_jax.data.declared import declared_infos

    data = run.data
    if declared and not data.declared:
        raise UserError("--declared: this config has no data.declared")
    if data.declared and (declared or read_store_manifest(data.buckets) is None):
        return declared_infos(data.declared, data.sequence_length)
    return BucketStore.open(data.buckets).infos()
