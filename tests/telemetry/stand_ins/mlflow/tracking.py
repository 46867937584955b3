import json
import posixpath
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow.exceptions import MlflowException


class MlflowClient:
    def __init__(self, tracking_uri: str):
        self.tracking_uri = tracking_uri
        self._path = Path(tracking_uri)
        self._state: dict[str, Any] = {"experiments": {}, "runs": {}}
        if self._path.exists():
            self._state = json.loads(self._path.read_text())

    def _save(self) -> None:
        self._path.write_text(json.dumps(self._state))

    def get_experiment_by_name(self, name: str) -> Any:
        found = self._state["experiments"].get(name)
        return None if found is None else SimpleNamespace(experiment_id=found)

    def create_experiment(self, name: str) -> str:
        self._state["experiments"][name] = str(1 + len(self._state["experiments"]))
        return self._state["experiments"][name]

    def search_runs(self, experiments: list[str], filter_string: str, max_results: int) -> list[Any]:
        match = re.fullmatch(r"tags\.`([^`]+)` = '([^']*)'", filter_string)
        assert match is not None
        assert max_results == 1
        return [
            SimpleNamespace(info=SimpleNamespace(run_id=run_id))
            for run_id, run in self._state["runs"].items()
            if run["experiment"] in experiments and run["tags"].get(match[1]) == match[2]
        ]

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        run_id = f"run{len(self._state['runs'])}"
        run = {"experiment": experiment, "name": run_name, "tags": tags, "metrics": [], "params": {}}
        self._state["runs"][run_id] = {**run, "status": ["RUNNING"]}
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id: str, status: str) -> None:
        self._state["runs"][run_id]["status"].append(status)

    def set_terminated(self, run_id: str, status: str) -> None:
        self.update_run(run_id, status)
        self._save()

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), *, synchronous: bool) -> None:
        assert synchronous
        if len(metrics) > 1000 or len(params) > 100:
            raise MlflowException("too many", "INVALID_PARAMETER_VALUE")
        for key, *_ in (*metrics, *params):
            if not re.match(r"^[/\w.\- :]*$", key) or posixpath.normpath(key) != key or len(key) > 250:
                raise MlflowException(f"Invalid value {key}", "INVALID_PARAMETER_VALUE")
        run = self._state["runs"][run_id]
        run["metrics"] += [list(metric) for metric in metrics]
        assert not {param.key for param in params} & run["params"].keys()
        run["params"] |= {param.key: param.value for param in params}
        self._save()
