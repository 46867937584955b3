"""Checkpoints of several processes: all come to the same end, and whoever waits is told for whom."""

import threading
from collections.abc import Callable

import pytest

from tests.checkpoint.processes import outcomes
from tlite_jax.checkpoint.peers import PeerError, Peers, Talk


class Store:
    """As jax's distributed client."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}
        self._lock = threading.Lock()

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        with self._lock:
            assert allow_overwrite or key not in self.words
            self.words[key] = value

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        with self._lock:
            return [(key, value) for key, value in self.words.items() if key.startswith(prefix)]

    def key_value_delete(self, prefix: str) -> None:
        with self._lock:
            self.words = {key: value for key, value in self.words.items() if not key.startswith(prefix)}


def in_processes(work: Callable[[Talk], str], count: int, seconds: float = 60.0) -> list[str]:
    """What each of `count` processes got, or the error that it met."""
    store, got = Store(), [""] * count

    def run(process: int) -> None:
        try:
            got[process] = work(Talk(store, "talk", process, count, seconds))
        except (PeerError, OSError) as error:
            got[process] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=run, args=(process,)) for process in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def test_all_get_what_process_0_decides_from_the_words_of_all() -> None:
    def work(talk: Talk) -> str:
        talk.meet("before")
        return talk.meet("sum", str(talk.process), lambda words: "+".join(words))

    assert in_processes(work, 3) == ["0+1+2"] * 3
    assert in_processes(work, 1) == ["0"]


@pytest.mark.parametrize("failing", [0, 2])
def test_the_failure_of_one_is_raised_in_all_and_named(failing: int) -> None:
    def work(talk: Talk) -> str:
        talk.meet("begun")
        if talk.process == failing:
            error = OSError(28, "No space left on device")
            talk.fail(error)
            raise error
        return talk.meet("written")

    own, told = (
        "OSError: [Errno 28] No space left on device",
        f"PeerError: process {failing}: OSError: [Errno 28] No space",
    )
    outcomes = in_processes(work, 3)
    assert outcomes.pop(failing) == own
    assert all(outcome.startswith(told) for outcome in outcomes)


def test_what_process_0_cannot_do_fails_in_all() -> None:
    def full(words: list[str]) -> str:
        raise OSError(28, "No space left on device")

    first, *others = in_processes(lambda talk: talk.meet("named", decide=full), 3)
    assert first == "OSError: [Errno 28] No space left on device"
    assert others == [f"PeerError: process 0: {first}"] * 2


@pytest.mark.parametrize(("absent", "named"), [({1, 2}, "processes 1, 2"), ({2}, "process 2"), ({0}, "process 0")])
def test_waiting_ends_and_names_the_absent(absent: set[int], named: str) -> None:
    outcomes = in_processes(lambda talk: "" if talk.process in absent else talk.meet("written"), 3, seconds=0.4)
    assert {outcome for process, outcome in enumerate(outcomes) if process not in absent} == {
        f"PeerError: {named} did not come within {1 if 0 in absent else 0} s"
    }


def test_what_was_said_is_forgotten() -> None:
    store = Store()
    jobs = [Peers(store, process, 2) for process in range(2)]
    for _ in range(9):
        threads = [threading.Thread(target=job.talk("save").meet, args=("written", "word")) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({key.split("/")[2] for key in store.words}) == 2


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What two real processes of four devices each have found; see `job`."""
    return outcomes("tests.checkpoint.job", tmp_path_factory.mktemp("job"))


def test_a_save_that_fails_in_one_process_fails_in_both_and_costs_itself_only(found: list[dict]) -> None:
    for own, other in (found[::-1], found[::-1]):
        assert own["whole"] == own["whole again"] == other["whole"] == other["whole again"] == []
        assert own["full step"] == other["full step"] == 2
    other, own = found
    for name, step in (("full", 2), ("unreadable", 3)):
        (mine,), (told,) = own[name], other[name]
        assert mine.startswith(f"checkpoint {step} was not saved: ")
        assert told.startswith(f"checkpoint {step} was not saved: process 1: ")
        assert mine.removeprefix(f"checkpoint {step} was not saved: ")[:40] in told
    assert "Input/output error" in other["unreadable"][0]
    assert own["left"] == other["left"] == ["1", "4"]  # and the room is given back


def test_two_processes_verify_halves_and_find_the_same(found: list[dict]) -> None:
    one, other = found
    assert one["intact"] == other["intact"] == []
    assert min(one["read"], other["read"]) > 0
    assert one["equal"]
    assert other["equal"]
    assert one["damaged"] == other["damaged"]
    (damage,) = one["damaged"]
    assert "ocdbt.process_1/d/" in damage
    assert damage.endswith("its bytes are not those that were written")
    assert one["steps"] == other["steps"] == [1]
