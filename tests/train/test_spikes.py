"""Spikes in a run: reported with their rows, and gone back before, to the bits of a run that never read them."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from launch import __main__ as commands
from tests import tiny
from tlite_jax.checkpoint import find, steps_on_disk
from tlite_jax.config import RunConfig, SpikesConfig
from tlite_jax.data.loader import RowSource
from tlite_jax.data.segment_files import read_segments
from tlite_jax.data.segments import Segment, Timeline
from tlite_jax.errors import SpikesError
from tlite_jax.telemetry.goodput import FILE, read_starts
from tlite_jax.train import rewind as rewinding
from tlite_jax.train.anomalies import Anomalies
from tlite_jax.train.directory import ANOMALIES_FILE
from tlite_jax.train.rewind import RECORD, count_automatic, rewind
from tlite_jax.train.run import open_run
from tlite_jax.train.spikes import Spikes, kept_to_go_back

STEPS, BAD = 28, (20, 21)
REWIND = "{action: rewind, window: 16, in_a_row: 2, back: 5, margin: 1, gradient_norm_deviations: null, max_rewinds: 2}"


def config(output: Path, *words: str, spikes: str = REWIND) -> RunConfig:
    """A run that goes back by itself and saves every fourth step."""
    steps = [f"train.steps={STEPS}", f"data.mixture.tokens={STEPS * tiny.BATCH_SIZE * tiny.LENGTH}"]
    schedule = [f"schedule.total_steps={STEPS}"]
    return tiny.config(
        output, *tiny.from_imported(), *steps, *schedule, "checkpoint.every=4", f"train.spikes={spikes}", *words
    )


def start(asked: RunConfig, around_step: "Bad") -> tiny.loop.Result:
    """On two devices, which is quicker than on eight."""
    return tiny.start(asked, tiny.mesh(1, 2), around_step=around_step)


def tokens(asked: RunConfig, steps: tuple[int, ...]) -> set[bytes]:
    """The batches of steps of a plan."""
    run = open_run(asked.model_copy(update={"output": asked.output.with_name("unused")}))
    source = RowSource(run.plan, run.store, document_masking=False)
    size = tiny.BATCH_SIZE
    return {source.read(np.arange((n - 1) * size, n * size))["tokens"].tobytes() for n in steps}


class Bad:
    """Some batches are poison: their loss is tenfold, and they spoil a parameter. May signal in a step."""

    def __init__(self, asked: RunConfig, steps: tuple[int, ...] = BAD, stop_in: int | None = None):
        self._tokens, self.stop_in = tokens(asked, steps), stop_in

    def __call__(self, step_fn):
        def step(state, batch):
            if int(state.step) + 1 == self.stop_in:
                self.stop_in = signal.raise_signal(signal.SIGTERM)
            bad = np.asarray(batch["tokens"]).tobytes() in self._tokens
            state, metrics = step_fn(state, batch)
            if bad:
                norm = state.params["final_norm"]
                spoilt = jax.device_put(np.asarray(norm) * np.float32(1.5), norm.sharding)
                state = state._replace(params={**state.params, "final_norm": spoilt})
            return state, {**metrics, "loss": metrics["loss"] * (10 if bad else 1)}

        return step


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / ANOMALIES_FILE).read_text(encoding="utf-8").splitlines()]


def assert_same_run(found: Path, expected: Path) -> None:
    for name in ("loss", "gradient_norm", "learning_rate"):
        assert tiny.metrics(found, name) == tiny.metrics(expected, name)
    tiny.assert_same_state(find(found), find(expected))
    assert find(found).meta.model_copy(update={"config": None}) == find(expected).meta.model_copy(
        update={"config": None}
    )


@pytest.fixture(scope="module")
def rewound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has met two bad batches and gone back before them."""
    output = tmp_path_factory.mktemp("rewound") / "run"
    assert start(config(output), around_step=Bad(config(output))).step == STEPS - 7
    return output


def test_a_spike_is_reported_with_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = "{window: 16, gradient_norm_deviations: null}"
    asked = config(tmp_path / "run", "train.log_every=100", spikes=report)
    assert asked.train.spikes.action == "report"
    assert start(asked, around_step=Bad(asked)).step == STEPS
    assert tiny.metrics(tmp_path / "run", "spikes") == {20: 1.0, 21: 2.0}
    assert steps_on_disk(tmp_path / "run") == list(range(4, STEPS + 1, 4))
    first, second = lines(tmp_path / "run")
    assert [(line["step"], line["kind"], line["first_row"]) for line in (first, second)] == [
        (20, "spike", 19 * tiny.BATCH_SIZE),
        (21, "spike", 20 * tiny.BATCH_SIZE),
    ]
    losses = tiny.metrics(tmp_path / "run")
    assert (first["loss"], second["loss"]) == (losses[20], losses[21])
    assert first["loss_median"] < first["loss"] / 5
    assert first["loss_deviations"] == tiny.metrics(tmp_path / "run", "loss_deviations")[20] > 8
    assert len(first["rows"]) == tiny.BATCH_SIZE
    assert "warning: step 20 spikes: loss" in capsys.readouterr().err


def test_off_looks_at_nothing(tmp_path: Path) -> None:
    asked = config(tmp_path / "run", spikes="{action: off}")
    assert asked.train.spikes.action == "off"
    start(asked, around_step=Bad(asked))
    assert not (tmp_path / "run" / ANOMALIES_FILE).exists()


def test_it_goes_back_and_ends_as_a_run_rewound_by_hand(rewound: Path, tmp_path: Path) -> None:
    by_hand = config(tmp_path / "run", spikes="{action: off}")
    start(by_hand, around_step=Bad(by_hand))
    done = rewind(tmp_path / "run", to=15, skip=(16, 22))
    assert done.step == 12
    start(by_hand, around_step=Bad(by_hand))
    without_recent = {"recent": find(rewound).meta.recent}
    assert read_segments(rewound) == read_segments(tmp_path / "run")
    tiny.assert_same_state(find(rewound), find(tmp_path / "run"))
    expected = find(tmp_path / "run").meta.model_copy(update={"config": None, **without_recent})
    assert find(rewound).meta.model_copy(update={"config": None}) == expected
    assert tiny.metrics(rewound) == tiny.metrics(tmp_path / "run")
    assert sum(find(rewound).meta.skipped.values()) == 7 * tiny.BATCH_SIZE


def test_what_was_is_set_aside_and_the_rewind_is_on_record(rewound: Path) -> None:
    assert steps_on_disk(rewound) == [4, 8, 12, 16, 20, 21]
    aside = rewound / "rewound" / "1"
    assert steps_on_disk(aside) == [16, 20]
    assert json.loads((aside / RECORD).read_text())["skip"] == [16, 22]
    assert [line["step"] for line in lines(aside)] == [20, 21]
    assert max(tiny.metrics(aside, "gradient_norm")) == 21
    assert lines(rewound) == []
    assert count_automatic(rewound) == 1
    starts = [(start.first_step, start.last_step, start.status) for start in read_starts(rewound / FILE)]
    assert starts == [(0, 20, "went back before a spike"), (12, 21, "done")]


@pytest.mark.parametrize("at", [20, 21])
def test_stopped_in_a_spike_and_resumed_it_decides_as_undisturbed(at: int, rewound: Path, tmp_path: Path) -> None:
    asked = config(tmp_path / "run", "train.log_every=100", "telemetry.jsonl=false")
    stopped = start(asked, around_step=Bad(asked, stop_in=at))
    assert (stopped.step, stopped.signal) == (at, signal.SIGTERM)
    assert steps_on_disk(tmp_path / "run")[-1] == 20
    assert find(tmp_path / "run").meta.recent.spikes == (20,)
    start(asked, around_step=Bad(asked))
    tiny.assert_same_state(find(tmp_path / "run"), find(rewound))
    assert find(tmp_path / "run").meta.recent == find(rewound).meta.recent


@pytest.mark.parametrize("after", ["nothing", "a checkpoint"])
def test_killed_while_it_goes_back_the_next_start_ends_it(
    after: str, rewound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = rewinding._set_aside

    def killed(run, steps, directory, record) -> None:
        if after != "nothing":
            real(run, steps[1:], directory, record)
        raise KeyboardInterrupt

    asked = config(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(rewinding, "_set_aside", killed)
        with pytest.raises(KeyboardInterrupt):
            start(asked, around_step=Bad(asked))
    _, pending = read_segments(tmp_path / "run")
    assert pending is not None
    assert pending.automatic
    start(asked, around_step=Bad(asked))
    assert_same_run(tmp_path / "run", rewound)
    assert steps_on_disk(tmp_path / "run" / "rewound" / "1") == [16, 20]
    assert count_automatic(tmp_path / "run") == 1


def test_without_a_checkpoint_before_it_the_run_begins_anew(rewound: Path, tmp_path: Path) -> None:
    asked = config(tmp_path / "run", "checkpoint.every=18")
    assert start(asked, around_step=Bad(asked)).step == STEPS - 7
    assert steps_on_disk(tmp_path / "run" / "rewound" / "1") == [18]
    assert_same_run(tmp_path / "run", rewound)
    starts = [start.first_step for start in read_starts(tmp_path / "run" / FILE)]
    assert starts == [0, 0]


def test_after_too_many_rewinds_the_run_fails_until_one_by_hand(tmp_path: Path) -> None:
    every_batch_from_20_on = tuple(range(20, STEPS + 1))
    asked = config(tmp_path / "run", "train.spikes.max_rewinds=1")
    with pytest.raises(SpikesError, match=r"steps 17 to 18 spike after 1 automatic rewinds of .*/run: .*max_rewinds"):
        start(asked, around_step=Bad(asked, every_batch_from_20_on))
    assert count_automatic(tmp_path / "run") == 1
    newest = steps_on_disk(tmp_path / "run")[-1]
    rewind(tmp_path / "run", to=newest, skip=None)
    assert count_automatic(tmp_path / "run") == 0


def test_the_command_ends_with_its_own_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fails() -> None:
        raise SpikesError("steps 3 to 5 spike")

    monkeypatch.setattr(commands, "build_app", lambda: fails)
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert end.value.code == 77
    assert capsys.readouterr().err == "error: steps 3 to 5 spike\n"


def test_other_data_is_another_level_and_no_spike(tmp_path: Path) -> None:
    asked = config(tmp_path / "run")
    run = open_run(asked)
    other = replace(run.plan, seed=99)
    change = Segment(20 * tiny.BATCH_SIZE, other.hash)
    changed = replace(run, timeline=Timeline((*run.segments, change), {run.plan.hash: run.plan, other.hash: other}))
    for opened, found in ((run, {"spikes", "loss_deviations"}), (changed, set())):
        seen = Spikes(opened, Anomalies(opened))
        for step in range(1, 21):
            assert not seen.see(step, 2.0 + 0.01 * (step % 3), 1.0)
        assert seen.see(21, 4.0, 1.0).keys() == found


def test_checkpoints_to_go_back_to_are_kept() -> None:
    """However soon the next spike comes, there is one far enough before it, and never more than two besides."""
    spikes = SpikesConfig(action="rewind", back=100, in_a_row=3)
    on_disk: list[int] = []
    for step in range(10, 1000, 10):
        on_disk.append(step)
        kept = {*kept_to_go_back(spikes, on_disk), *on_disk[-2:]}
        on_disk = [old for old in on_disk if old in kept]
        assert len(on_disk) <= 4
        for first in range(step - 1, step + 11):
            place = max((old for old in on_disk if old <= first - spikes.back), default=0)
            assert place or first < 10 + spikes.back
            assert first - place <= 2 * spikes.back + 20
    assert kept_to_go_back(SpikesConfig(action="report"), on_disk) == ()
