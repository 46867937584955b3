"""Opening a run: what it starts from, what is refused and left unharmed, and how it goes on."""

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tlite_jax import checkpoint as checkpoints
from tlite_jax.checkpoint import find
from tlite_jax.config_files import load_config, parse, save_config
from tlite_jax.data.mixture import Plan
from tlite_jax.errors import UserError
from tlite_jax.train.run import first_state, open_run


def from_checkpoint(path: Path, *, optimizer: str = "reset", schedule: str = "reset", **changes: str) -> list[str]:
    words = [f"init_from.path={path}", f"init_from.optimizer={optimizer}", f"init_from.schedule={schedule}"]
    return ["model=null", *words, *(f"{name}={value}" for name, value in changes.items())]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps, with checkpoints of steps 4 and 6."""
    output = tmp_path_factory.mktemp("source") / "run"
    tiny.start(tiny.config(output, "checkpoint.every=4", *from_checkpoint(tiny.data() / "imported")))
    return output


@pytest.fixture
def own_source(source: Path, tmp_path: Path) -> Path:
    """A copy that may be gone on with."""
    return Path(shutil.copytree(source, tmp_path / "own_source"))


def refused(tmp_path: Path, match: str, *overrides: str, output: Path | None = None, **options) -> str:
    """Asserts that a start is refused with one line, with nothing written or harmed."""
    before = tiny.contents(tmp_path)
    with pytest.raises(UserError, match=match) as caught:
        tiny.start(tiny.config(output or tmp_path / "run", *overrides), **options)
    assert len(str(caught.value).splitlines()) == 1
    assert tiny.contents(tmp_path) == before
    return str(caught.value)


def test_a_run_leaves_all_that_describes_it(source: Path) -> None:
    saved = load_config(source / "config.yaml")
    assert saved.model == parse(type(saved.model), tiny.MODEL, "test")
    assert saved.init_from.step == 0
    assert saved.schedule.total_steps == tiny.STEPS
    assert saved.data.tokenizer == tiny.data() / "tokenizer"
    assert saved.checkpoint.keep_every is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (source / "tokenizer" / name).read_bytes() == (tiny.data() / "tokenizer" / name).read_bytes()
    (plan_file,) = (source / "plans").iterdir()
    plan = Plan.from_json(plan_file.read_text())
    assert plan_file.stem == plan.hash
    assert plan.total_rows == tiny.STEPS * tiny.BATCH_SIZE
    for step in (4, 6):
        meta = find(source, step).meta
        assert (meta.step, meta.rows_consumed, meta.schedule_offset) == (step, step * tiny.BATCH_SIZE, 0)
        assert [(segment.start_row, segment.plan_hash) for segment in meta.segments] == [(0, plan.hash)]
        assert (meta.weights_dtype, meta.origin) == ("bfloat16", f"trained from {tiny.data()}/imported/checkpoints/0")
        assert meta.config == json.loads(saved.model_dump_json())


def test_the_saved_config_is_the_run(source: Path) -> None:
    run = open_run(load_config(source / "config.yaml"))
    assert (run.start_step, run.rows_consumed, run.total_steps) == (6, 6 * tiny.BATCH_SIZE, 6)


def test_a_finished_run_is_left_as_it_is(own_source: Path) -> None:
    before = tiny.contents(own_source)
    result = tiny.start(tiny.config(own_source, *from_checkpoint(tiny.data() / "imported")))
    assert (result.step, result.signal) == (6, None)
    changed = {name for name, content in tiny.contents(own_source).items() if before[name] != content}
    assert changed <= {"config.yaml"}  # checkpoint.every, which may change


@pytest.mark.parametrize("room", [0, 9, 400])
def test_a_start_that_is_cut_off_while_it_writes_costs_nothing(room: int, own_source: Path) -> None:
    asked = tiny.config(own_source, *from_checkpoint(tiny.data() / "imported"))
    before, limits = tiny.contents(own_source), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # what is written of a file then ends there
    try:
        with pytest.raises(OSError, match="File too large"):
            open_run(asked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = tiny.contents(own_source)
    assert [name for name in before if after[name] != before[name]] in ([], [".lock"])
    assert open_run(asked).start_step == 6


@pytest.mark.parametrize("optimizer", ["reset", "carry"])
@pytest.mark.parametrize("schedule", ["reset", "carry"])
def test_init_from_says_what_comes_along(optimizer: str, schedule: str, source: Path, tmp_path: Path) -> None:
    words = from_checkpoint(source, optimizer=optimizer, schedule=schedule)
    total = ["schedule.total_steps=10", "schedule.warmup_steps=3", "train.steps=2"]
    config = tiny.config(tmp_path / "stage2", *words, *total)
    adam = first_state(open_run(config), tiny.mesh()).optimizer
    assert int(adam.num_updates) == (6 if optimizer == "carry" else 0)
    assert bool(np.abs(adam.mu["embedding"]).max() > 0) == (optimizer == "carry")
    tiny.start(config)
    assert tiny.state(find(tmp_path / "stage2"))["['num_updates']"] == int(adam.num_updates) + 2
    rates = tiny.metrics(tmp_path / "stage2", "learning_rate")

    def cosine(t: int) -> float:
        return 1e-2 * (0.1 + 0.9 * (1 + np.cos(np.pi * (t - 3) / 7)) / 2)

    expected = {1: cosine(6), 2: cosine(7)} if schedule == "carry" else {1: 0.0, 2: 1e-2 / 3}
    assert rates == pytest.approx(expected, rel=1e-5)
    meta = find(tmp_path / "stage2").meta
    assert (meta.step, meta.rows_consumed) == (2, 2 * tiny.BATCH_SIZE)
    assert meta.schedule_offset == (6 if schedule == "carry" else 0)


def test_a_stage_of_a_stage_adds_up_its_schedule(source: Path, tmp_path: Path) -> None:
    length = ["schedule.total_steps=10", "train.steps=1"]
    tiny.start(tiny.config(tmp_path / "second", *from_checkpoint(source, schedule="carry"), *length))
    third = tiny.config(tmp_path / "third", *from_checkpoint(tmp_path / "second", schedule="carry"), *length)
    assert open_run(third).schedule_offset == 7


def test_a_step_of_the_source_can_be_chosen(source: Path, tmp_path: Path) -> None:
    run = open_run(tiny.config(tmp_path / "run", *from_checkpoint(source), "init_from.step=4"))
    assert run.base.step == 4
    refused(tmp_path, "has no checkpoint of step 5; it has 4, 6", *from_checkpoint(source), "init_from.step=5")


def test_a_stage_goes_on_after_its_source_has(own_source: Path, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "stage2", *from_checkpoint(own_source), "train.steps=2")
    assert open_run(config).base.step == 6
    shutil.copytree(own_source / "checkpoints" / "6", own_source / "checkpoints" / "8")
    assert open_run(config).base.step == 6
    assert load_config(tmp_path / "stage2" / "config.yaml").init_from.step == 6


def test_a_stage_goes_on_without_its_source(source: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny.data() / "imported", tmp_path / "base"))
    stage = tmp_path / "stage"
    amount = {"data.mixture.tokens": "4096", "schedule.total_steps": "3"}
    tiny.start(tiny.config(stage, *from_checkpoint(base, **amount, **{"train.steps": "2"})))
    origin = find(stage).meta.origin
    shutil.rmtree(base)
    assert tiny.start(tiny.config(stage, *from_checkpoint(base, **amount, **{"train.steps": "3"}))).step == 3
    assert find(stage).meta.origin == origin


def test_what_cannot_be_started_from_is_refused(source: Path, tmp_path: Path) -> None:
    imported = tiny.data() / "imported"
    refused(
        tmp_path, "no optimizer state; set init_from.optimizer: reset", *from_checkpoint(imported, optimizer="carry")
    )
    refused(tmp_path, "no checkpoint in", *from_checkpoint(tmp_path / "absent"))
    words = from_checkpoint(source)[1:]
    changes = ["model.rms_norm_eps=1e-6", "model.intermediate_size=32"]
    message = refused(tmp_path, "model is not that of init_from", *words, *changes)
    assert "model.intermediate_size: 30 -> 32; model.rms_norm_eps: 1e-05 -> 1e-06" in message


def test_a_changed_semantic_config_is_refused_or_declared(own_source: Path, tmp_path: Path) -> None:
    words = from_checkpoint(tiny.data() / "imported")
    changed = [*words, "optimizer.learning_rate=2e-2", "schedule.warmup_steps=1"]
    message = refused(tmp_path, "holds another run", *changed, output=own_source)
    assert "optimizer.learning_rate: 0.01 -> 0.02; schedule.warmup_steps: 2 -> 1" in message
    assert "--allow-change" in message
    assert open_run(tiny.config(own_source, *changed), allow_change=True).start_step == 6
    assert load_config(own_source / "config.yaml").optimizer.learning_rate == 2e-2


def test_a_changed_plan_is_refused_or_becomes_a_segment(own_source: Path, tmp_path: Path) -> None:
    old = find(own_source).meta.segments[0]
    words = [*from_checkpoint(tiny.data() / "imported"), "schedule.total_steps=6", "train.steps=8"]
    message = refused(tmp_path, f"the data plan has changed from {old.plan_hash}", *words, output=own_source)
    assert "--allow-change" in message
    tiny.start(tiny.config(own_source, *words), allow_change=True)
    meta = find(own_source).meta
    assert (meta.step, meta.rows_consumed) == (8, 8 * tiny.BATCH_SIZE)
    first, second = meta.segments
    assert first == old
    assert second.start_row == 6 * tiny.BATCH_SIZE
    assert {path.stem for path in (own_source / "plans").iterdir()} == {first.plan_hash, second.plan_hash}
    # Gone on with once more, the second plan is the one to agree with.
    assert open_run(tiny.config(own_source, *words)).segments == meta.segments


def test_the_second_segment_starts_at_its_plans_first_row(own_source: Path) -> None:
    words = [*from_checkpoint(tiny.data() / "imported"), "schedule.total_steps=6", "train.steps=7", "seed=9"]
    read = []
    real = tiny.loop.batches

    def noting(plan, store, **options):
        read.append((plan, options["start_row"]))
        return real(plan, store, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.loop, "batches", noting)
        tiny.start(tiny.config(own_source, *words), allow_change=True)
    ((timeline, start_row),) = read
    (segment,) = timeline.segments
    assert (segment.plan_hash, segment.start_row) == (find(own_source).meta.segments[-1].plan_hash, start_row)
    rows = np.arange(tiny.BATCH_SIZE)
    for ours, plans in zip(timeline.locate(start_row + rows), timeline.last_plan.locate(rows), strict=True):
        assert np.array_equal(ours, plans)


def test_the_runs_tokenizer_is_the_configs(own_source: Path) -> None:
    copy, given = own_source / "tokenizer" / "tokenizer.json", tiny.data() / "tokenizer" / "tokenizer.json"
    copy.write_bytes(given.read_bytes() + b"\n")  # as after a declared change of data.tokenizer
    (own_source / "tokenizer" / "of_the_old_one.txt").touch()
    tiny.start(tiny.config(own_source, *from_checkpoint(tiny.data() / "imported")))
    assert copy.read_bytes() == given.read_bytes()
    assert not (own_source / "tokenizer" / "of_the_old_one.txt").exists()


def test_a_mesh_may_change_and_prose_settings_too(own_source: Path) -> None:
    words = [*from_checkpoint(tiny.data() / "imported"), "mesh.replica=2", "execution.remat=full", "train.log_every=3"]
    assert open_run(tiny.config(own_source, *words)).start_step == 6


def test_outputs_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    refused(tmp_path, "not empty and holds no run; choose another", output=tmp_path / "foreign")
    (tmp_path / "file").write_text("a file")
    refused(tmp_path, "cannot write to", output=tmp_path / "file")
    refused(tmp_path, "cannot write to", output=tmp_path / "file" / "run")
    shutil.copytree(tiny.data() / "imported", tmp_path / "imported")
    refused(tmp_path, "holds an imported model, not a run", output=tmp_path / "imported")


def test_an_empty_output_and_an_interrupted_claim_are_ours(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    config = tiny.config(tmp_path / "run")
    open_run(config)
    (tmp_path / "run" / "config.yaml").unlink()
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text("half")
    open_run(config)
    whole = (tiny.data() / "tokenizer" / "tokenizer.json").read_bytes()
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes() == whole


def test_more_steps_than_the_mixture_has_are_refused(tmp_path: Path) -> None:
    tokens = 5 * tiny.BATCH_SIZE * tiny.LENGTH
    few = f"data.mixture.tokens={tokens}"
    message = refused(tmp_path, "train.steps 6 needs 144 more rows, the mixture has 120 left", few)
    assert message.endswith("enlarge data.mixture or lower train.steps")
    assert open_run(tiny.config(tmp_path / "run", few, "train.steps=null")).total_steps == 5
    refused(
        tmp_path,
        "the mixture has 23 rows, less than a batch of 24",
        f"data.mixture.tokens={23 * 16}",
        "train.steps=null",
    )


def test_a_batch_the_mesh_cannot_share_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "train.batch_size 25 is not divisible by 8 devices x 1 .*; use 24 or 32", "train.batch_size=25")
    words = ["execution.num_microbatches=5"]
    refused(tmp_path, "24 is not divisible by 8 devices x 5 microbatches .*; use 40", *words)


def test_a_tokenizer_the_model_or_the_buckets_do_not_know_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "ids up to 299, the model's vocab_size is 299", "model.vocab_size=299")
    (tmp_path / "other").mkdir()
    for file in (tiny.data() / "tokenizer").iterdir():
        (tmp_path / "other" / file.name).write_text(file.read_text() + "\n")
    refused(tmp_path, "prepared with another tokenizer", f"data.tokenizer={tmp_path / 'other'}")
    refused(tmp_path, "other document boundaries .document_start: ", "data.document_start=null")
    refused(tmp_path, "holds rows of 16 tokens, data.sequence_length is 32", "data.sequence_length=32")
    refused(tmp_path, "no finished buckets .*prepare", f"data.buckets={tmp_path / 'nothing'}")


def test_a_config_file_on_its_own_starts_the_same_run(tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run")
    save_config(config, tmp_path / "run.yaml")
    assert open_run(load_config(tmp_path / "run.yaml")).plan == open_run(config).plan
    assert checkpoints.steps_on_disk(tmp_path / "run") == []
