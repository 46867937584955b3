"""Buckets that are declared in a config rather than prepared: enough to plan a mixture before there is any data."""

from collections.abc import Sequence

from tlite_jax.config import DeclaredBucket
from tlite_jax.data.bucket_info import BucketInfo
from tlite_jax.errors import UserError


def declared_infos(declared: Sequence[DeclaredBucket], sequence_length: int) -> list[BucketInfo]:
    """Buckets as a mixture sees them, in whole rows, the last one padded as `prepare` does.

    Raises:
      UserError: two of one name.
    """
    result: dict[str, BucketInfo] = {}
    for bucket in declared:
        name = bucket.name or ".".join(bucket.labels.values())
        if name in result:
            raise UserError(f"data.declared: two buckets are called {name}; give one of them another name or labels")
        result[name] = BucketInfo(name, dict(bucket.labels), -(-bucket.tokens // sequence_length))
    return list(result.values())
