"""The doctor: each thing that it looks at, well and ill, and the command as a script reads it."""

import json
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from launch import doctor
from launch.doctor_parts import installed, interconnect, machine
from launch.doctor_parts.findings import Finding, refused
from launch.doctor_parts.interconnect import Rate
from tests import tiny
from tests.launch.in_process import run_command
from tlite_jax.errors import UserError
from tlite_jax.plan.topology import load_hardware


class Ended(NamedTuple):
    """How a call ended."""

    status: int
    out: str
    err: str

    def findings(self) -> dict[str, list[dict[str, str]]]:
        found: dict[str, list[dict[str, str]]] = {}
        for each in json.loads(self.out):
            found.setdefault(each["name"], []).append(each)
        return found


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., Ended]]:
    """Calls `doctor` in this process, without a network, on a small file."""
    monkeypatch.setattr(machine, "DISK_BYTES", 2**20)
    monkeypatch.setattr(machine, "CHUNK", 2**16)
    monkeypatch.setattr(machine.Network.__init__, "__defaults__", (lambda: None, lambda: "no network"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    tiny.write_config(tmp_path / "run.yaml", tmp_path / "run")

    def invoke(*words: object) -> Ended:
        return Ended(*run_command(monkeypatch, capsys, "doctor", *words))

    handler = signal.getsignal(signal.SIGTERM)
    yield invoke
    signal.signal(signal.SIGTERM, handler)


def test_a_run_that_would_start(call: Callable[..., Ended], tmp_path: Path) -> None:
    before = tiny.contents(tmp_path)
    ended = call(tmp_path / "run.yaml", "--json")
    assert ended.status == 0, ended
    assert tiny.contents(tmp_path) == before
    found = ended.findings()
    assert {"versions", "devices", "mesh", "output", "tokenizer", "buckets", "space", "disk", "clock"} <= found.keys()
    assert found["mesh"][0]["message"] == "8 devices, a microbatch of 3 sequences on each"
    assert [each["message"].split(":")[0] for each in found["interconnect"]] == [
        f"{collective} over fsdp (8 devices)" for collective in ("all-gather", "reduce-scatter", "all-reduce")
    ]
    assert (found["hub"][0]["status"], found["hub"][0]["message"]) == ("warn", "not reached: no network")
    assert "2 checkpoints take" not in found["space"][0]["message"]
    assert "10 checkpoints take" in found["space"][0]["message"]  # keep_latest 9, and the one being written


def test_a_run_that_would_not(call: Callable[..., Ended], tmp_path: Path) -> None:
    words = ["mesh.replica=3", f"data.buckets={tmp_path}/absent", "model.vocab_size=290"]
    words += [f"output={tmp_path}/run.yaml/inside_a_file"]
    ended = call(tmp_path / "run.yaml", *words)
    assert ended.status == 1
    lines = [line for line in ended.out.splitlines() if line.startswith("fail")]
    assert [line.split()[1] for line in lines] == ["mesh", "output", "tokenizer", "buckets"]
    assert "mend: run `python -m launch prepare CONFIG` first" in ended.out
    assert ended.out.splitlines()[-1].startswith("4 to mend")
    assert call(tmp_path / "run.yaml", "mesh.replicas=3").status == 2


def test_versions_that_do_not_belong_together() -> None:
    assert installed.unmet(["numpy >= 2", "torch >= 99; extra == 'torch'"]) == []
    (old,) = installed.unmet(["numpy >= 99"])
    assert (old.status, old.mend) == ("fail", "pip install 'numpy>=99'")
    (absent,) = installed.unmet(["no-such-package"])
    assert absent.message.startswith("no-such-package is absent")
    parts = {"jax": "0.11.0", "jaxlib": "0.11.0", "jax-cuda12-plugin": "0.10.2", "jax-cuda13-plugin": None}
    (mixed,) = installed.mismatched(parts)
    assert mixed.message == "jaxlib 0.11.0, but jax-cuda12-plugin 0.10.2"
    assert mixed.mend == "pip install jax==0.11.0 jaxlib==0.11.0 jax-cuda12-plugin==0.11.0"
    assert installed.mismatched({**parts, "jax-cuda12-plugin": "0.11.0"}) == []


def test_extras_that_other_packages_extras_make_up() -> None:
    names = set(installed._of_extra("tlite_jax", "cuda12"))
    assert {"jax", "jax-cuda12-plugin"} <= names  # of jax[cuda12]
    assert "numpy" not in names
    (found,) = installed.check_extras()
    if installed.nccl() is None:
        assert "cuda12" in found.message


@pytest.mark.parametrize(
    ("driver", "plugins", "nccl", "environment", "message"),
    [
        ("550.54.15", [12], "2.27", {}, None),
        ("470.10", [12], "2.27", {}, "driver 470.10 cannot run CUDA 12, which needs 525 or later"),
        ("550.54.15", [13], "2.27", {}, "driver 550.54.15 cannot run CUDA 13"),
        ("580.1", [], "2.27", {}, "jax has no CUDA plugin"),
        ("580.1", [13], None, {}, "NCCL is absent"),
        ("580.1", [13], "2.27", {"LD_LIBRARY_PATH": "/usr/local/cuda/lib64"}, "LD_LIBRARY_PATH has CUDA's libraries"),
    ],
)
def test_drivers(
    driver: str, plugins: list[int], nccl: str | None, environment: dict[str, str], message: str | None
) -> None:
    found = installed.driver_problems(driver, plugins, nccl, environment)
    assert bool(found) == (message is not None)
    assert all(message in each.message and each.mend for each in found)
    if plugins == [13] and driver.startswith("550"):
        assert found[0].mend == "use the extra cuda12"


def test_gpus_that_jax_does_not_use_are_a_failure() -> None:
    (found,) = machine.check_devices(8)
    assert found.status == "fail"
    assert "though 8 GPUs are here" in found.message
    assert machine.check_devices(0)[0].status == "ok"


def test_the_exchange_between_devices_is_measured() -> None:
    rates = interconnect.measure(tiny.mesh(2, 4), 2**16)
    assert [(rate.collective, rate.axis, rate.group_size) for rate in rates] == [
        ("all-gather", "fsdp", 4),
        ("reduce-scatter", "fsdp", 4),
        ("all-reduce", "replica", 2),
    ]
    assert all(1e3 < rate.bytes_per_second < 1e12 for rate in rates)
    assert interconnect.measure(tiny.mesh(1, 1)) == []


def test_bytes_are_counted_as_nccl_does(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: dict[str, float] = {}
    real = interconnect._time

    def one_second(*words):
        _, sent = real(*words)
        seconds[words[1]] = sent
        return 1.0, sent

    monkeypatch.setattr(interconnect, "_time", one_second)
    rates = interconnect.measure(tiny.mesh(1, 4), 4096)
    assert [rate.bytes_per_second for rate in rates] == [3072, 3072, 6144]


@pytest.mark.parametrize(
    ("axis", "size", "gigabytes", "status", "said"),
    [
        ("fsdp", 8, 180, "ok", "90% of the described 200 (in nodes)"),
        ("fsdp", 8, 100, "warn", "50% of the described 200 (in nodes)"),
        ("replica", 12, 20, "ok", "89% of the described 22 (between nodes)"),  # a NIC's share of each of 8 devices
        ("replica", 12, 3, "fail", "13% of the described 22 (between nodes)"),
        ("fsdp", 96, 150, "ok", "83% of the described 180 (between nodes)"),
    ],
)
def test_rates_are_compared_with_the_hardware(axis: str, size: int, gigabytes: float, status: str, said: str) -> None:
    hardware = load_hardware("a100-80gb", doctor.HARDWARE)
    (found,) = interconnect.compare([Rate("all-gather", axis, size, gigabytes * 1e9)], hardware, 8)
    assert (found.status, bool(found.mend)) == (status, status != "ok")
    assert said in found.message
    assert interconnect.compare([Rate("all-gather", axis, size, 1.0)], None, 8)[0].status == "ok"


def test_hardware_is_known_by_the_drivers_name() -> None:
    found = doctor.described("NVIDIA A100-SXM4-80GB")
    assert found is not None
    assert found.title.startswith("NVIDIA A100-SXM4-80GB")
    assert doctor.described("NVIDIA GeForce RTX 3090") is None


def test_a_disk_without_room_or_too_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DISK_BYTES", 2**20)
    free = shutil.disk_usage(tmp_path).free
    space, _ = machine.check_disk(tmp_path / "not" / "yet", free // 2, 3)
    assert (space.status, space.mend) == (
        "fail",
        "another output, or fewer: checkpoint.keep_latest, checkpoint.keep_every",
    )
    monkeypatch.setattr(machine, "disk_rates", lambda *_: (1e6, 1e9))
    space, disk = machine.check_disk(tmp_path, 10**9, 2)
    assert (space.status, disk.status) == ("ok", "warn")
    assert "a checkpoint of 1.00 GB in 1,000.0 s" in disk.message
    assert not list(tmp_path.iterdir())


def test_disk_rates_are_those_of_a_real_file(tmp_path: Path) -> None:
    written, read = machine.disk_rates(tmp_path, 2**22)
    assert written > 1e5
    assert read > 1e5
    assert not list(tmp_path.iterdir())


def test_a_clock_is_compared_with_a_time_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(10)

        def answer() -> None:
            asked, client = server.recvfrom(48)
            assert asked[0] & 7 == 3  # a client
            behind = struct.pack("!II", int(time.time()) - 100 + machine.NTP_EPOCH, 0)
            server.sendto(40 * b"\0" + behind, client)

        thread = threading.Thread(target=answer)
        thread.start()
        address = server.getsockname()
        monkeypatch.setattr(machine.socket, "socket", _redirected(address))
        offset = machine.ntp_offset()
        thread.join()
    assert offset == pytest.approx(100, abs=3)
    assert machine.judge_ntp(offset).status == "warn"
    assert machine.judge_ntp(0.01).status == "ok"
    assert machine.judge_ntp(None).status == "ok"


def _redirected(address: tuple[str, int]) -> type[socket.socket]:
    class Redirected(socket.socket):
        def sendto(self, data, _):
            return super().sendto(data, address)

    return Redirected


def test_the_hub_may_be_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens on discard
    problem = machine.hub_problem()
    assert problem is not None
    assert problem.startswith("http://127.0.0.1:9: ")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert machine.judge_hub(problem).status == "warn"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert machine.judge_hub(problem).status == "ok"


def test_a_refusals_mend_is_its_end() -> None:
    assert refused("x", UserError("a is 3; use 4")) == Finding("x", "fail", "a is 3", "use 4")
    assert refused("x", UserError("nothing in b: prepare it")) == Finding("x", "fail", "nothing in b", "prepare it")
    assert refused("x", UserError("no")) == Finding("x", "fail", "no", "no")


def test_one_process_has_no_clocks_to_compare() -> None:
    assert jax.process_count() == 1
    assert machine.check_clocks() == []
