"""Errors of jax's runtime that mean that another process is gone, and the others, which a restart would not mend."""

import os

import jax
import pytest

from launch.job.lost_peer import is_lost_peer, restart_when_alone

LOST = [
    "UNAVAILABLE: Gloo all-reduce failed",
    "INTERNAL: Buffer Definition Event: Gloo AllGather failed: [..] Connection closed by peer [127.0.0.1]:4000",
    "ABORTED: The following tasks are unhealthy (stopped sending heartbeats)",
    "INTERNAL: NCCL operation ncclGroupEnd() failed: unhandled system error",
    "DEADLINE_EXCEEDED: Barrier timed out",
]
OWN = [
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes",
    "INVALID_ARGUMENT: Mismatched shapes",
    "INTERNAL: something else",
]


@pytest.mark.parametrize(("text", "lost"), [*((text, True) for text in LOST), *((text, False) for text in OWN)])
def test_which_errors_mean_a_lost_process(text: str, lost: bool) -> None:
    assert is_lost_peer(jax.errors.JaxRuntimeError(text)) == lost
    assert not is_lost_peer(ValueError(text))


def test_only_a_job_of_several_processes_is_restarted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = jax.errors.JaxRuntimeError(f"{LOST[0]}\nat line 3")
    with pytest.raises(jax.errors.JaxRuntimeError), restart_when_alone():
        raise error
    ended: list[int] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", ended.append)
    with restart_when_alone():
        raise error
    assert ended == [76]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: lost another process of the job, start it again: {LOST[0]}"
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"), restart_when_alone():
        raise jax.errors.JaxRuntimeError(OWN[0])
