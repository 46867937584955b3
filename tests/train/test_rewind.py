"""Going back and skipping batches: the same bits each time, a true ledger, nothing lost."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import typer
from typer.testing import CliRunner

from launch import mixture
from launch import rewind as rewind_command
from tests import tiny
from tlite_jax.checkpoint import find, steps_on_disk
from tlite_jax.config import RunConfig
from tlite_jax.config_files import save_config
from tlite_jax.data.buckets import BucketStore
from tlite_jax.errors import UserError
from tlite_jax.train import rewind as rewinding
from tlite_jax.train.rewind import rewind
from tlite_jax.train.run import open_run


def config(output: Path, *words: str) -> RunConfig:
    """A run that starts from the imported model and saves every second step."""
    return tiny.config(output, *tiny.from_imported(), "checkpoint.every=2", *words)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints of steps 2, 4 and 6."""
    output = tmp_path_factory.mktemp("whole") / "run"
    tiny.start(config(output))
    return output


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy that may be gone on with."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def read_rows(start) -> list[Counter]:
    """What a start trains on, batch by batch: rows of each bucket, recognised by their tokens."""
    store = BucketStore.open(tiny.data() / "buckets")
    owner = {}
    for name, bucket in store.buckets.items():
        for row in range(bucket.manifest["rows"]):
            tokens = bucket.read_row(row).astype(np.int32)
            owner.setdefault(tokens.tobytes(), name)
    seen = []
    real = tiny.loop.batches

    def noting(plan, store, **options):
        for batch in real(plan, store, **options):
            seen.append(Counter(owner[row.tobytes()] for row in np.asarray(batch["tokens"])))
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.loop, "batches", noting)
        start()
    return seen


def test_the_ledger_is_what_was_read(tmp_path: Path) -> None:
    seen = read_rows(lambda: tiny.start(config(tmp_path / "run")))
    for step in (2, 4, 6):
        meta = find(tmp_path / "run", step).meta
        assert Counter(meta.ledger) == sum(seen[:step], Counter())
        assert meta.skipped == {}
        timeline = open_run(config(tmp_path / "run")).timeline
        assert meta.ledger == timeline.consumed(meta.rows_consumed)


def test_skipped_batches_are_left_out_and_the_rest_is_as_it_was(run: Path, whole: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(run, tmp_path / "again"))
    old = tiny.metrics(whole)
    for directory in (run, again):
        done = rewind(directory, to=3, skip=(4, 4))
        assert (done.step, done.total_steps, done.set_aside) == (2, 5, (4, 6))
        assert sum(done.skipped_rows.values()) == tiny.BATCH_SIZE
        assert steps_on_disk(directory) == [2]
        assert steps_on_disk(directory / "rewound" / "1") == [4, 6]
        assert (directory / "rewound" / "1" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    seen = read_rows(lambda: tiny.start(config(run)))
    tiny.start(config(again))
    losses = tiny.metrics(run)
    assert list(losses) == [1, 2, 3, 4, 5]
    assert {step: losses[step] for step in (1, 2, 3)} == {step: old[step] for step in (1, 2, 3)}
    assert losses[4] != old[4]
    assert losses == tiny.metrics(again)
    tiny.assert_same_state(find(run), find(again))
    # Batches 3, 5 and 6 of the old order were read; the ledger counts 1 and 2 too, and the fourth as skipped.
    order = open_run(config(run)).plan
    names = [bucket.name for bucket in order.buckets]

    def of_batch(number: int) -> Counter:
        rows = np.arange((number - 1) * tiny.BATCH_SIZE, number * tiny.BATCH_SIZE)
        return Counter(names[i] for i in order.locate(rows)[0])

    assert seen == [of_batch(3), of_batch(5), of_batch(6)]
    meta = find(run).meta
    assert (meta.step, meta.rows_consumed) == (5, 5 * tiny.BATCH_SIZE)
    assert Counter(meta.ledger) == sum((of_batch(n) for n in (1, 2, 3, 5, 6)), Counter())
    assert Counter(meta.skipped) == of_batch(4)


def test_skipped_before_and_after_an_interruption(run: Path, tmp_path: Path) -> None:
    """Killed between its steps and gone on with, a rewound run is the same run."""
    again = Path(shutil.copytree(run, tmp_path / "again"))
    for directory in (run, again):
        rewind(directory, to=2, skip=(4, 4))
    tiny.start(config(run, "train.steps=6"))
    tiny.start(config(again, "checkpoint.every=1"))
    for step in (4, 5):
        shutil.rmtree(again / "checkpoints" / str(step))
    tiny.start(config(again))
    assert tiny.metrics(again) == tiny.metrics(run)
    assert find(again).meta.ledger == find(run).meta.ledger


def test_rewound_twice_the_steps_are_those_of_the_run(run: Path) -> None:
    rewind(run, to=None, skip=(5, 5))
    tiny.start(config(run))
    assert steps_on_disk(run) == [2, 4, 5]
    done = rewind(run, to=None, skip=(3, 3))
    assert (done.step, done.total_steps, done.directory.name) == (2, 4, "2")
    tiny.start(config(run))
    meta = find(run).meta
    assert (meta.step, sum(meta.ledger.values()), sum(meta.skipped.values())) == (4, 96, 48)
    plan = open_run(config(run)).plan
    assert Counter(meta.ledger) + Counter(meta.skipped) == {b.name: b.quota for b in plan.buckets}


def test_going_back_alone_reads_the_same_again(run: Path, whole: Path) -> None:
    assert rewind(run, to=5, skip=None).step == 4
    tiny.start(config(run))
    assert tiny.metrics(run) == tiny.metrics(whole)
    tiny.assert_same_state(find(run), find(whole))


def test_an_interrupted_rewind_is_finished_by_the_same_call(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rewinding, "_set_aside", killed)
        with pytest.raises(KeyboardInterrupt):
            rewind(run, to=3, skip=(4, 4))
    with pytest.raises(
        UserError, match=r"was interrupted; finish it with `python -m launch rewind .* --to 3 --skip 4\.\.4`"
    ):
        open_run(config(run))
    with pytest.raises(UserError, match="another rewind"):
        rewind(run, to=3, skip=(5, 5))
    assert rewind(run, to=3, skip=(4, 4)).set_aside == (4, 6)
    assert tiny.start(config(run)).step == 5
    assert sum(find(run).meta.skipped.values()) == tiny.BATCH_SIZE


@pytest.fixture
def call(run: Path, tmp_path: Path):
    """Runs `mixture` or `rewind` on the run and returns what it prints."""
    save_config(config(run), tmp_path / "run.yaml")
    app = typer.Typer()
    app.command("mixture")(mixture.main)
    app.command("rewind")(rewind_command.main)

    def invoke(command: str, *words: str) -> str:
        place = run if command == "rewind" else tmp_path / "run.yaml"
        result = CliRunner().invoke(app, [command, str(place), *words])
        if result.exception is not None:
            raise result.exception
        return result.stdout

    return invoke


def test_a_step_is_replayed_document_by_document(run: Path, call) -> None:
    assert json.loads(call("rewind", "--skip", "4", "--json"))["skipped_rows"]
    rows = json.loads(call("mixture", "--replay", "4", "--json", "--text"))["rows"]
    store, timeline = BucketStore.open(tiny.data() / "buckets"), open_run(config(run)).timeline
    # The fourth step of the new order is the fifth batch of the plan.
    places = zip(*timeline.last_plan.locate(np.arange(4 * tiny.BATCH_SIZE, 5 * tiny.BATCH_SIZE)), strict=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny.data() / "tokenizer" / "tokenizer.json"))
    for slot, (row, (number, epoch, place)) in enumerate(zip(rows, places, strict=True)):
        bucket = store.buckets[timeline.last_plan.buckets[number].name]
        assert (row["slot"], row["bucket"], row["pass"], row["row"]) == (slot, bucket.name, epoch, place)
        # Documents begin where segment ids say that they do.
        starts = np.fromfile(bucket.directory / "documents.bin", "<i8")[: bucket.manifest["documents"]]
        own = [int(n) for n, s in enumerate(starts) if place * tiny.LENGTH <= s < (place + 1) * tiny.LENGTH]
        first, last = row["documents"]
        assert row["starts"] == [int(starts[n]) - place * tiny.LENGTH for n in own]
        assert last - first + 1 == bucket.segment_ids(int(place)).max()
        assert last == (own[-1] if own else first)
        assert tokenizer.decode(bucket.read_row(int(place)).tolist()).replace("\n", " ").startswith(row["text"])
    table = call("mixture", "--replay", "4", "--text")
    assert rows[0]["text"][:20] in table
    for step in ("0", "6"):
        with pytest.raises(UserError, match=f"--replay {step}: the run has steps 1 to 5"):
            call("mixture", "--replay", step)


def test_the_ledger_is_shown_against_the_plan(run: Path, call) -> None:
    assert "ends after step 5" in call("rewind", "--skip", "4")
    tiny.start(config(run))
    values = json.loads(call("mixture", "--ledger", "--json"))
    assert (values["step"], values["rows"], values["of_rows"], values["agrees"]) == (5, 120, 120, True)
    meta = find(run).meta
    assert {b["name"]: (b["trained_rows"], b["skipped_rows"]) for b in values["buckets"]} == {
        name: (count, meta.skipped[name]) for name, count in meta.ledger.items()
    }
    assert "the ledger equals the plan's closed form" in call("mixture", "--ledger")
    file = run / "checkpoints" / "5" / "meta" / "metadata"
    values = json.loads(file.read_text())
    values["ledger"][next(iter(values["ledger"]))] += 1
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="at step 5 is not what its segments say"):
        call("mixture", "--ledger")


def test_a_dry_run_changes_nothing(run: Path) -> None:
    before = tiny.contents(run)
    assert rewind(run, to=3, skip=(4, 5), dry_run=True).total_steps == 4
    assert tiny.contents(run) == before


def test_what_cannot_be_gone_back_to_is_refused(run: Path, tmp_path: Path) -> None:
    before = tiny.contents(run)
    for match, to, skip in (
        ("nothing to do", None, None),
        ("no checkpoint at or before step 1; it has 2, 4, 6", 1, None),
        ("no checkpoint at or before step 0", None, (1, 3)),
        ("step 4 is part of the checkpoint of step 4 that --to leaves; give --to 3 or less", 4, (4, 4)),
        (r"--skip 5\.\.7: the run has no more than 6 steps", None, (5, 7)),
        ("give the first and the last step", None, (5, 4)),
    ):
        with pytest.raises(UserError, match=match):
            rewind(run, to=to, skip=skip)
    with pytest.raises(UserError, match="is not a run"):
        rewind(tmp_path, to=3, skip=None)
    assert tiny.contents(run) == before


def test_a_changed_mixture_does_not_read_again_what_the_pass_has_seen(tmp_path: Path) -> None:
    """Two bodies of one pass: what a declared change reads is what the first mixture had left."""
    words = ["train.steps=2", "schedule.total_steps=6"]
    first = "data.mixture={tokens: 768, targets: {language=ru: 0.75}}"
    second = "data.mixture={tokens: 768, targets: {language=ru: 0.5}}"
    tiny.start(config(tmp_path / "run", *words, first))
    longer = ["train.steps=4", "schedule.total_steps=6", second]
    with pytest.raises(
        UserError, match=r"holds another run; changed: data\.mixture\.targets\.language=ru: 0\.75 -> 0\.5\."
    ):
        open_run(config(tmp_path / "run", *longer))
    tiny.start(config(tmp_path / "run", *longer), allow_change=True)
    timeline = open_run(config(tmp_path / "run", *longer)).timeline
    bucket, epoch, row = timeline.locate(np.arange(4 * tiny.BATCH_SIZE))
    seen = list(zip(bucket.tolist(), epoch.tolist(), row.tolist(), strict=True))
    assert len(set(seen)) == len(seen)
    # Without train.steps it goes on to the end of the new mixture, counted from the change.
    whole = open_run(config(tmp_path / "run", "train.steps=null", "schedule.total_steps=6", second))
    assert whole.total_steps == 4


def test_an_undeclared_change_of_buckets_is_named(run: Path) -> None:
    shutil.copytree(tiny.data() / "buckets", run.parent / "buckets")
    store = BucketStore.open(run.parent / "buckets")
    assert store.infos()
    same = [f"data.buckets={run.parent / 'buckets'}"]
    assert open_run(config(run, *same)).start_step == 6
    with pytest.raises(UserError, match=r"since step 6 \(bucket .*: \d+ -> \d+ rows; "):
        open_run(config(run, "train.steps=7", "schedule.total_steps=6"))
