"""A run in MLflow. Needs the extra `mlflow`; imported only by the process that speaks to it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tlite_jax.telemetry.trackers.mlflow_names import MOST, encoded
from tlite_jax.telemetry.trackers.process import Point, RefusedError

KEY = "tlite.run"  # the tag by which a run is found again
_METRICS, _PARAMS = 1000, 100  # of one request
_LONGEST_PARAM = 500
_USELESS_TO_REPEAT = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


class MlflowRun:
    """Metrics under the names of `mlflow_names`, at their steps and times."""

    def __init__(self, client: MlflowClient, run_id: str, url: str | None):
        self._client, self._id, self.url = client, run_id, url

    def log(self, points: Sequence[Point]) -> None:
        """See Tracker."""
        metrics = [
            Metric(encoded(name)[:MOST], value, round(1000 * seconds), step)
            for step, seconds, values in points
            for name, value in values.items()
        ]
        for first in range(0, len(metrics), _METRICS):
            try:
                self._client.log_batch(self._id, metrics=metrics[first : first + _METRICS], synchronous=True)
            except MlflowException as error:
                if error.error_code in _USELESS_TO_REPEAT:
                    raise RefusedError(error.message) from error
                raise

    def close(self, finished: bool) -> None:
        """See Tracker."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


def open_run(settings: Mapping[str, Any]) -> MlflowRun:
    """Starts the run, or goes on with the one that has its key.

    Args:
      settings: `tracking_uri` (None: the environment's), `experiment`, `name`, `tags`; `id`, the key; `config`.
    """
    client = MlflowClient(tracking_uri=settings["tracking_uri"])
    experiment = client.get_experiment_by_name(settings["experiment"])
    place = client.create_experiment(settings["experiment"]) if experiment is None else experiment.experiment_id
    found = client.search_runs([place], f"tags.`{KEY}` = '{settings['id']}'", max_results=1)
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        tags = {**settings["tags"], KEY: settings["id"]}
        run_id = client.create_run(place, run_name=settings["name"], tags=tags).info.run_id
        params = [Param(encoded(name)[:MOST], value) for name, value in _flat(settings["config"])]
        for first in range(0, len(params), _PARAMS):
            client.log_batch(run_id, params=params[first : first + _PARAMS], synchronous=True)
    address = client.tracking_uri
    url = f"{address}/#/experiments/{place}/runs/{run_id}" if address.startswith("http") else f"{address}, run {run_id}"
    return MlflowRun(client, run_id, url)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values as text, long ones cut; empty sections have none."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield prefix + name, text if len(text) <= _LONGEST_PARAM else f"{text[: _LONGEST_PARAM - 1]}…"
