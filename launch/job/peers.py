"""How the processes of a job leave word for each other, besides what they compute together."""

from typing import Any

_ALARM = "tlite/alarm"
_PACE = "tlite/pace"


class JobBoard:
    """The key-value store of the job's coordinator; no device takes part."""

    def __init__(self, client: Any):
        self._client = client

    def alarm(self) -> str | None:
        """What has been raised; None when nothing has."""
        found = self._client.key_value_dir_get(f"{_ALARM}/")
        return str(found[0][1]) if found else None

    def raise_alarm(self, text: str) -> None:
        """Tells all processes; the first alarm stays."""
        self._client.key_value_set(f"{_ALARM}/text", text)

    def tell_pace(self, step: int, process: int, text: str) -> None:
        """Leaves what a process measured up to a step."""
        self._client.key_value_set(f"{_PACE}/{step}/{process}", text, allow_overwrite=True)

    def paces(self, step: int) -> dict[int, str]:
        """Process -> what it has left for a step."""
        found = self._client.key_value_dir_get(f"{_PACE}/{step}/")
        return {int(key.rpartition("/")[2]): str(text) for key, text in found}

    def forget_paces(self, step: int) -> None:
        """Removes what has been left for a step."""
        self._client.key_value_delete(f"{_PACE}/{step}/")


def job_board() -> JobBoard | None:
    """The board of this job; None for a process that is alone."""
    from tlite_jax.coordinator import store

    client = store()
    return JobBoard(client) if client is not None else None
