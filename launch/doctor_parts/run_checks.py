"""What would keep a config from running here."""

from typing import TYPE_CHECKING

from launch.doctor_parts.findings import Finding, ok, refused, unless_refused
from launch.job.mesh_fit import check_world
from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.config import RunConfig

BYTES_PER_PARAMETER = 12  # float32: the parameter and Adam's two moments


def check_config(config: "RunConfig") -> tuple[list[Finding], "RunConfig"]:
    """Everything that `train` would refuse, found at once; and the config with what its checkpoint decides."""
    import jax

    from tlite_jax.train.run import resolve

    findings = [unless_refused("mesh", lambda: _mesh(config, jax.process_count(), jax.local_device_count()))]
    try:
        resolved, base, resumed = resolve(config)
    except UserError as error:
        findings.append(refused("init_from", error))
        resolved = config
    else:
        where = f"would go on from step {resumed.step}" if resumed else "would start"
        findings.append(ok("run", f"{config.output}: {where}{f' from {base.path}' if base else ''}"))
    findings.append(unless_refused("output", lambda: _output(config)))
    findings.append(unless_refused("tokenizer", lambda: _tokenizer(resolved)))
    findings.append(unless_refused("buckets", lambda: _buckets(resolved)))
    return findings, resolved


def checkpoint_bytes(config: "RunConfig") -> int | None:
    """Of one checkpoint of a run, where its model is known."""
    from tlite_jax.telemetry.throughput import num_parameters

    return None if config.model is None else BYTES_PER_PARAMETER * num_parameters(config.model)


def _mesh(config: "RunConfig", num_processes: int, devices_per_process: int) -> str:
    from tlite_jax.plan.search import check_batch
    from tlite_jax.train.context import check_context

    check_world(config, num_processes, devices_per_process)
    devices = num_processes * devices_per_process
    check_batch(config, devices, config.execution.num_microbatches)
    if config.model is not None:
        check_context(config.model, config.mesh.context, config.data.sequence_length)
    rows = config.train.batch_size * config.mesh.context // (devices * config.execution.num_microbatches)
    return f"{devices} devices, a microbatch of {rows} sequences on each"


def _output(config: "RunConfig") -> str:
    from tlite_jax.train.run import check_writable

    check_writable(config.output)
    return f"{config.output} can be written"


def _tokenizer(config: "RunConfig") -> str:
    from tlite_jax.data.tokenize import check_vocabulary, load_tokenizer

    data = config.data
    if data.tokenizer is None:
        raise UserError("data.tokenizer is null, and init_from is not there to take it from; import the model first")
    tokenizer = load_tokenizer(data.tokenizer, data.document_start, data.document_end)
    if config.model is not None:
        check_vocabulary(tokenizer, config.model.vocab_size)
    return f"{data.tokenizer}"


def _buckets(config: "RunConfig") -> str:
    from tlite_jax.data.buckets import BucketStore

    store = BucketStore.open(config.data.buckets)
    if config.model is not None:
        store.check(sequence_length=config.data.sequence_length, vocab_size=config.model.vocab_size)
    return f"{config.data.buckets}: {len(store.infos())} buckets"
