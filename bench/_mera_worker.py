"""Runs a checkout of the original MERA on local documents with a fake model; started by `mera_original.py`.

Modules that it imports but does not need here are replaced by empty ones; nothing of it is changed.
"""

import copy
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _mera_fake import score_text, write_text


def main() -> None:
    """Arguments: checkout, documents, output directory, file of squad_metrics.py, JSON of task -> shots."""
    checkout, data, output = (Path(argument).resolve() for argument in sys.argv[1:4])
    squad, shots = Path(sys.argv[4]), json.loads(sys.argv[5])
    _replace_modules(squad)
    _serve_documents(data)
    result: dict[str, Any] = {"requests": _answer(checkout, output / "logs", shots)}
    result["submission"] = _pack(checkout, output / "logs", output / "submission")
    result["scores"] = _score(checkout, output)
    (output / "original.json").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")


def _answer(checkout: Path, logs: Path, shots: dict[str, int]) -> dict[str, list[Any]]:
    """Every request of every task, in order."""
    sys.path.insert(0, str(checkout / "lm-evaluation-harness"))
    import lm_eval.base
    import lm_eval.evaluator

    class Recorder(lm_eval.base.LM):
        """Answers by the fake's rules and keeps what it is asked."""

        def __init__(self) -> None:
            super().__init__()
            self.asked: list[Any] = []

        def loglikelihood(self, requests: Any, task: Any = None) -> list[Any]:
            self.asked += requests
            return [[(score_text("".join(request)), False), ""] for request in requests]

        def greedy_until(self, requests: Any, task: Any = None, num_generation: int = 1) -> list[Any]:
            self.asked += requests
            return [[self._write(context, given["until"], task, num_generation), ""] for context, given in requests]

        def loglikelihood_rolling(self, requests: Any) -> Any:
            raise NotImplementedError

        def _write(self, context: str, stops: list[str], task: str | None, count: int) -> Any:
            texts = [write_text(context, seed) for seed in (range(count) if task == "humaneval" else [None])]
            for stop in stops:
                texts = [text.split(stop)[0] for text in texts]
            return texts if task == "humaneval" else texts[0]

    requests = {}
    for name, count in shots.items():
        model = Recorder()
        lm_eval.evaluator.simple_evaluate(
            model=model,
            tasks=[name],
            num_fewshot=count,
            no_cache=True,
            inference=True,
            write_out=True,
            output_base_path=str(logs),
        )
        requests[name] = model.asked
    return requests


def _pack(checkout: Path, logs: Path, submission: Path) -> dict[str, str]:
    """The files of the ZIP."""
    path = checkout / "lm-evaluation-harness" / "scripts" / "log_to_submission.py"
    spec = importlib.util.spec_from_file_location("log_to_submission", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.create_submission(str(logs), str(submission))
    with zipfile.ZipFile(f"{submission}.zip") as archive:
        return {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".json")}


def _score(checkout: Path, output: Path) -> dict[str, Any]:
    """Results of the scoring module; its ruDetox needs three models and fails here."""
    scoring = output / "scoring"
    shutil.copytree(checkout / "modules" / "scoring", scoring)
    os.chdir(scoring)
    sys.path.insert(0, str(scoring))
    from src.worker import Worker

    worker = Worker(conf="configs/main.yaml", no_load_models=True)
    worker.load()
    results: dict[str, Any] = worker.evaluate(str(output / "submission.zip"))["results"]
    return results


def _serve_documents(data: Path) -> None:
    import datasets

    splits: dict[str, dict[str, list[Any]]] = {}
    for path in sorted(data.glob("data/*/*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        splits.setdefault(path.parent.name, {})["validation" if path.stem == "dev" else path.stem] = rows
    datasets.load_dataset = lambda path, name, **_: copy.deepcopy(splits[name])


def _replace_modules(squad: Path) -> None:
    import datasets  # noqa: F401  # with what they import lazily, before companions of theirs are replaced
    import transformers

    for name in ("PreTrainedModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        getattr(transformers, name)

    names = ("accelerate", "accelerate.utils", "accelerate.utils.memory", "sqlitedict", "omegaconf", "lm_eval.models")
    modules = {name: types.ModuleType(name) for name in names}
    for module in modules.values():
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    for name, attributes in {
        "accelerate": ["find_executable_batch_size"],
        "accelerate.utils.memory": ["should_reduce_batch_size", "is_xpu_available", "is_npu_available"],
        "sqlitedict": ["SqliteDict"],
    }.items():
        for attribute in attributes:
            setattr(modules[name], attribute, None)
    modules["omegaconf"].OmegaConf = types.SimpleNamespace(load=_load_yaml)  # type: ignore[attr-defined]
    sys.modules.update(modules)
    source = re.sub(r"^from \.\.\..*$", "", squad.read_text(encoding="utf-8"), flags=re.MULTILINE)
    metrics = types.ModuleType("transformers.data.metrics.squad_metrics")
    exec(source.replace("logging.get_logger", "str"), metrics.__dict__)
    package = types.ModuleType("transformers.data.metrics")
    package.squad_metrics = metrics  # type: ignore[attr-defined]
    sys.modules |= {package.__name__: package, metrics.__name__: metrics}
    transformers.data.metrics = package


class _Settings(dict[str, Any]):
    """A mapping whose keys are attributes too."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__  # type: ignore[assignment]


def _load_yaml(path: str) -> Any:
    def wrap(value: Any) -> Any:
        return _Settings({key: wrap(x) for key, x in value.items()}) if isinstance(value, dict) else value

    return wrap(yaml.safe_load(Path(path).read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
