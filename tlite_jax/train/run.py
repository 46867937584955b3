"""Opening a run: what it starts from, whether its directory is its own, and where it goes on.

config --resolve--> config with model and tokenizer --open_run--> Run(plan, state, position)
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tlite_jax import checkpoint as checkpoints
from tlite_jax.checkpoint import Checkpoint, Meta, Recent, StateReading
from tlite_jax.checkpoint.parts import drop_after, parts_of
from tlite_jax.checkpoint.resume import newest_intact
from tlite_jax.checkpoint.seal import seal_alone
from tlite_jax.checkpoint.verify import is_sealed, require_intact, tokenizer_damages
from tlite_jax.config import RunConfig
from tlite_jax.config_files import differences, load_config, save_config
from tlite_jax.data.buckets import BucketStore
from tlite_jax.data.files import sync
from tlite_jax.data.mixture import make_plan
from tlite_jax.data.order import Plan
from tlite_jax.data.segment_files import SEGMENTS_FILE, read_segments, read_timeline, timeline_of, write_timeline
from tlite_jax.data.segments import Segment, Timeline, describe_change
from tlite_jax.data.tokenize import check_vocabulary, load_tokenizer
from tlite_jax.errors import UserError
from tlite_jax.sharding import CONTEXT
from tlite_jax.train.context import check_context
from tlite_jax.train.directory import CONFIG_FILE, count_steps
from tlite_jax.train.lock import FILE as LOCK_FILE
from tlite_jax.train.lock import locked
from tlite_jax.train.rewind import finish_automatic
from tlite_jax.train.state import TrainState, init_state, start_state
from tlite_jax.train.step import check_batch


@dataclass(frozen=True)
class Run:
    """Everything a training loop needs, found out before anything is computed."""

    config: RunConfig
    directory: Path
    timeline: Timeline
    store: BucketStore
    base: Checkpoint | None
    resumed: Checkpoint | None
    schedule_offset: int
    total_steps: int
    reading: StateReading | None = None  # of the state of `resumed`, which was read while it was verified

    @property
    def plan(self) -> Plan:
        """The plan of the last segment."""
        return self.timeline.last_plan

    @property
    def segments(self) -> tuple[Segment, ...]:
        """From which row on which plan is read."""
        return self.timeline.segments

    @property
    def start_step(self) -> int:
        """Batches completed before this start."""
        return self.resumed.step if self.resumed else 0

    @property
    def rows_consumed(self) -> int:
        """Rows read by the batches completed."""
        return self.resumed.meta.rows_consumed if self.resumed else 0

    def meta(self, step: int, recent: Recent) -> Meta:
        """What a checkpoint after `step` batches says of itself."""
        rows = self.rows_consumed + (step - self.start_step) * self.config.train.batch_size
        assert self.config.model is not None
        source = self.resumed or self.base
        return Meta(
            step=step,
            rows_consumed=rows,
            segments=self.segments,
            ledger=self.timeline.consumed(rows),
            skipped=self.timeline.skipped(rows),
            schedule_offset=self.schedule_offset,
            model=self.config.model,
            weights_dtype=source.meta.weights_dtype if source else "bfloat16",
            origin=self._origin(),
            config=self.config.model_dump(mode="json"),
            tensor_dtypes=source.meta.tensor_dtypes if source else {},
            recent=recent,
        )

    def _origin(self) -> str:
        if self.resumed is not None:
            return self.resumed.meta.origin
        return f"trained from {self.base.path}" if self.base else "trained from random weights"


def resolve(
    config: RunConfig, resumed: Checkpoint | None = None
) -> tuple[RunConfig, Checkpoint | None, Checkpoint | None]:
    """Fills in what the checkpoint to go on from decides: the model's shape and the tokenizer.

    Args:
      config: as given by the user.
      resumed: the run's own checkpoint to go on from; None: the newest in its directory.

    Returns:
      The config, the source that `init_from` names (None when it is not needed any more) and the run's own checkpoint,
      if it has one.

    Raises:
      UserError: no such checkpoint, or a model section that is not the checkpoint's.
    """
    if resumed is None and checkpoints.steps_on_disk(config.output):
        resumed = checkpoints.find(config.output)
    if resumed is not None and resumed.meta.config is None:
        raise UserError(f"{config.output} holds an imported model, not a run; choose another output")
    if config.init_from is None:
        return config, None, resumed
    # The step is pinned, so that the run is the same value after its source has trained on.
    step = _pinned_step(config)
    base = checkpoints.find(config.init_from.path, step) if resumed is None else None
    source = resumed or base
    assert source is not None
    if config.model is not None and config.model != source.meta.model:
        old, new = source.meta.model.model_dump(mode="json"), config.model.model_dump(mode="json")
        changed = "; ".join(differences(old, new, "model."))
        raise UserError(f"model is not that of init_from ({source.path}): {changed}; leave model out")
    if config.init_from.optimizer == "carry" and not source.has_optimizer:
        raise UserError(f"{source.path} holds no optimizer state; set init_from.optimizer: reset")
    pinned = config.init_from.model_copy(update={"step": base.step if base else step})
    data = config.data.model_copy(update={"tokenizer": config.data.tokenizer or source.tokenizer_dir})
    return config.model_copy(update={"model": source.meta.model, "init_from": pinned, "data": data}), base, resumed


def _pinned_step(config: RunConfig) -> int | None:
    """The step of init_from: as given, else the one that the run has started from, else None for the newest."""
    assert config.init_from is not None
    saved = config.output / CONFIG_FILE
    if config.init_from.step is None and saved.exists():
        started = load_config(saved).init_from
        if started is not None and started.path == config.init_from.path:
            return started.step
    return config.init_from.step


def open_run(config: RunConfig, *, mesh: Mesh | None = None, allow_change: bool = False) -> Run:
    """Checks a run's inputs, claims its directory and finds out where it goes on. Only process 0 writes.

    Args:
      config: as given by the user.
      mesh: where it will run, so that a batch that does not divide over it is refused before anything is written.
      allow_change: accept a semantic config or a data plan that differs from the one the run has used so far; the
        change is recorded as a new segment.

    Raises:
      UserError: anything that would make the run fail later or harm another one.
    """
    if mesh is not None:
        check_batch(config.train.batch_size, mesh, config.execution.num_microbatches)
    _wait_for_the_trainer_before(config.output)
    local = config.checkpoint.local_dir
    parts = parts_of(config.output, local, mesh) if local is not None and mesh is not None else None
    newest = newest_intact(config.output, mesh, parts)
    config, base, resumed = resolve(config, newest.checkpoint)
    if base is not None:
        require_intact(base)
    assert config.model is not None
    if mesh is not None:
        check_context(config.model, mesh.shape[CONTEXT], config.data.sequence_length)
    directory = config.output
    store = _store(config)
    timeline, change = _timeline(config, store, resumed)
    intended, total_steps = count_steps(config, timeline)
    config = _with_cosine_length(config, intended)
    _check_directory(config, directory, allow_change)
    if change is not None and not allow_change:
        raise UserError(change)
    consumed = resumed.meta.rows_consumed if resumed else 0
    needed = (total_steps - (resumed.step if resumed else 0)) * config.train.batch_size
    if needed > (available := timeline.total_rows - consumed):
        raise UserError(
            f"train.steps {total_steps} needs {needed} more rows, the mixture has {available} left; "
            "enlarge data.mixture or lower train.steps"
        )
    if parts is not None:
        drop_after(parts, resumed.step if resumed else -1)
    if jax.process_count() > 1:  # no process may find the directory half claimed
        multihost_utils.sync_global_devices("run checked")
    if jax.process_index() == 0:
        _claim(config, directory, timeline)
    carried = base is not None and config.init_from is not None and config.init_from.schedule == "carry"
    if resumed is not None:
        schedule_offset = resumed.meta.schedule_offset
    else:
        schedule_offset = base.step + base.meta.schedule_offset if carried and base is not None else 0
    return Run(config, directory, timeline, store, base, resumed, schedule_offset, total_steps, newest.reading)


def _wait_for_the_trainer_before(directory: Path) -> None:
    """Until nobody trains the run: its last save may be under way. Then finishes a rewind that was interrupted."""
    if jax.process_index() == 0 and (directory / LOCK_FILE).exists():
        check_writable(directory)
        with locked(directory):
            finish_automatic(directory)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run free")


def first_state(run: Run, mesh: Mesh) -> TrainState:
    """The state to go on from: the run's own checkpoint, its source's, or random weights."""
    assert run.config.model is not None
    if run.resumed is not None:
        reading = run.reading
        if reading is None or not reading.is_of(run.resumed, mesh):
            reading = checkpoints.StateReading(run.resumed, mesh)
        state = start_state(*reading.finish(), mesh)
        return state._replace(step=jax.device_put(jax.numpy.int32(run.resumed.step), state.step.sharding))
    if run.base is not None and run.config.init_from is not None:
        adam = None
        if run.config.init_from.optimizer == "carry":
            adam = checkpoints.restore_optimizer(run.base, mesh)
        return start_state(checkpoints.restore_params(run.base, mesh), adam, mesh)
    return init_state(run.config.model, mesh, run.config.seed)


def _store(config: RunConfig) -> BucketStore:
    """Opens the buckets; refuses what the model or the config cannot read."""
    assert config.model is not None
    assert config.data.tokenizer is not None
    data = config.data
    tokenizer = load_tokenizer(config.data.tokenizer, data.document_start, data.document_end)
    check_vocabulary(tokenizer, config.model.vocab_size)
    store = BucketStore.open(data.buckets)
    store.check(sequence_length=data.sequence_length, vocab_size=config.model.vocab_size)
    if store.manifest["tokenizer"] != tokenizer.hash:
        raise UserError(f"{data.buckets} was prepared with another tokenizer than {data.tokenizer}; prepare it again")
    boundaries = {"document_start": tokenizer.document_start, "document_end": tokenizer.document_end}
    made_with = {name: store.manifest["origin"][name] for name in boundaries}
    if made_with != boundaries:
        changed = "; ".join(differences(made_with, boundaries))
        raise UserError(
            f"{data.buckets} was prepared with other document boundaries ({changed}, token ids); "
            "undo data.document_start and data.document_end or prepare again"
        )
    return store


def _plan(config: RunConfig, store: BucketStore, before: Timeline | None, row: int) -> Plan:
    """The order of rows that a config asks for, of buckets that have been read as far as `before` has by `row`."""
    data, infos = config.data, store.infos()
    rows = config.train.steps * config.train.batch_size if config.train.steps else None
    far = before.reached(row, config.seed) if before else {}
    reached = {info.name: far.get((info.name, info.rows, info.content), 0) for info in infos}
    plan = make_plan(
        data.mixture, infos, seed=config.seed, sequence_length=data.sequence_length, rows=rows, reached=reached
    )
    store.check_masks((bucket.name for bucket in plan.buckets), data.document_masking)
    return plan


def _timeline(config: RunConfig, store: BucketStore, resumed: Checkpoint | None) -> tuple[Timeline, str | None]:
    """What the run reads from its first row to its last, and how that differs from what it has declared, if it does."""
    if resumed is None:
        plan = _plan(config, store, None, 0)
        declared_segments, _ = read_segments(config.output)
        if declared_segments and declared_segments[-1].plan_hash == plan.hash:  # it has gone back to its beginning
            return timeline_of(config.output, declared_segments), None
        return Timeline((Segment(0, plan.hash),), {plan.hash: plan}), None
    row = resumed.meta.rows_consumed
    declared = read_timeline(config.output, resumed.meta.segments)
    if not declared.agrees(timeline_of(config.output, resumed.meta.segments), row):
        raise UserError(
            f"{resumed.path} has read other rows than {config.output / SEGMENTS_FILE} says; restore the file, or "
            "delete it to go on with what the checkpoint records"
        )
    before, began = declared.before_last_plan()
    plan = _plan(config, store, before, began)
    if plan.hash == declared.last_plan.hash:
        return declared, None
    change = (
        f"the data plan has changed from {declared.last_plan.hash} to {plan.hash} since step {resumed.step} "
        f"({describe_change(declared.last_plan, plan)}); undo it, or pass --allow-change to go on with the new one "
        "from here"
    )
    return declared.then(row, _plan(config, store, declared, row)), change


def _with_cosine_length(config: RunConfig, total_steps: int) -> RunConfig:
    """Pins the cosine's length, which is part of what is learned, where it was left to the run's."""
    if config.schedule.name == "constant_with_warmup" or config.schedule.total_steps is not None:
        return config
    schedule = config.schedule.model_copy(update={"total_steps": total_steps})
    return config.model_copy(update={"schedule": schedule})


def _check_directory(config: RunConfig, directory: Path, allow_change: bool) -> None:
    """Refuses a directory that another run owns, or that cannot be written."""
    saved = directory / CONFIG_FILE
    if saved.exists():
        old, new = load_config(saved).semantic(), config.semantic()
        if (changed := differences(old, new)) and not allow_change:
            raise UserError(
                f"{directory} holds another run; changed: {'; '.join(changed)}. "
                "Choose another output, or pass --allow-change to go on with the change from here"
            )
    elif directory.is_dir() and any(directory.iterdir()) and not _half_claimed(directory):
        raise UserError(f"output {directory} is not empty and holds no run; choose another directory")
    check_writable(directory)


def _half_claimed(directory: Path) -> bool:
    """Whether all there is comes from a `_claim` that was interrupted."""
    names = {entry.name for entry in directory.iterdir()}
    ours = {"plans", SEGMENTS_FILE, f".{SEGMENTS_FILE}.partial", "tokenizer", "tokenizer.partial"}
    return "plans" in names and names <= {*ours, f"{CONFIG_FILE}.partial"}


def check_writable(directory: Path) -> None:
    """Raises UserError unless files can be made in `directory`, which need not exist yet."""
    place = directory
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from error


def _claim(config: RunConfig, directory: Path, timeline: Timeline) -> None:
    """Writes what the run is: its config, tokenizer and plans. The config comes last: it marks the directory."""
    write_timeline(directory, timeline)
    assert config.data.tokenizer is not None
    if not (directory / CONFIG_FILE).exists() or not _same_tokenizer(config.data.tokenizer, directory):
        copy = directory / "tokenizer.partial"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(config.data.tokenizer, copy)
        seal_alone(copy)
        shutil.rmtree(directory / "tokenizer", ignore_errors=True)  # another one's, or of an interrupted start
        copy.rename(directory / "tokenizer")
    partial = directory / f"{CONFIG_FILE}.partial"
    save_config(config, partial)
    sync(partial)
    os.replace(partial, directory / CONFIG_FILE)
    sync(directory)


def _same_tokenizer(tokenizer: Path, run: Path) -> bool:
    """Whether a run has a whole copy of a tokenizer."""
    copy = run / "tokenizer"
    if not is_sealed(copy) or tokenizer_damages(run):
        return False
    files = [place / "tokenizer.json" for place in (tokenizer, copy)]
    if not all(file.is_file() for file in files):
        return True  # one that transformers converts: buckets and plan guard it
    return files[0].read_bytes() == files[1].read_bytes()
