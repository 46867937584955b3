"""One of several processes that open a Hugging Face directory; arguments: COORDINATOR COUNT PROCESS SOURCE OUT.

Writes, as JSON, what it has read of the weights' files and a hash of every shard that its devices hold.
"""

import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np

from launch.job.distributed import initialize
from launch.language_model import open_language_model
from tlite_jax.bridge import stored


def main(source: Path) -> dict[str, object]:
    really, reads = stored.read_bytes, []

    def counted(path: Path, offset: int, num_bytes: int) -> np.ndarray:
        reads.append((path.name, offset, num_bytes))
        return really(path, offset, num_bytes)

    stored.read_bytes = counted
    before = system_reads()
    model = open_language_model(source, dtype="bfloat16")
    shards = {}
    for path, array in jax.tree_util.tree_leaves_with_path(model.params):
        for shard in array.addressable_shards:
            place = [slice_.indices(size)[:2] for slice_, size in zip(shard.index, array.shape, strict=True)]
            content = np.asarray(shard.data).tobytes()
            shards[f"{jax.tree_util.keystr(path)} {place}"] = hashlib.sha256(content).hexdigest()
    return {"reads": reads, "system": system_reads() - before, "shards": shards}


def system_reads() -> int:
    """Bytes that this process has asked the kernel for, of whatever file (proc(5), rchar)."""
    return int(Path("/proc/self/io").read_text().split()[1])


if __name__ == "__main__":
    coordinator, count, process, source, out = sys.argv[1:]
    if int(count) > 1:
        initialize(coordinator, int(count), int(process))
    Path(out).write_text(json.dumps(main(Path(source))))
