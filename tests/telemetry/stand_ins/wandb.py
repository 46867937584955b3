"""What is used of W&B's library: a run is a file of JSON lines, TLITE_STAND_IN/ID.jsonl."""

import json
import os
from pathlib import Path
from typing import Any


class Settings:
    def __init__(self, *, console: str, silent: bool, save_code: bool, disable_git: bool):
        pass


class Run:
    url = "https://wandb.example/run"

    def __init__(self, path: Path):
        self._path = path

    def add(self, **record: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        pass

    def log(self, values: dict[str, float]) -> None:
        self.add(log=values)

    def finish(self, exit_code: int) -> None:
        self.add(finish=exit_code)


def init(*, id: str, **options: Any) -> Run:
    run = Run(Path(os.environ["TLITE_STAND_IN"]) / f"{id}.jsonl")
    options.pop("settings")
    run.add(init=options)
    return run
