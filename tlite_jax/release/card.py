"""The model card of a release: README.md with the hub's front matter. What was not measured is left out, or said."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tlite_jax.config.recipe import CardConfig
from tlite_jax.release import card_tables
from tlite_jax.release.evaluated import Evaluated, Evaluation
from tlite_jax.release.hub import public
from tlite_jax.release.result import ReleaseResult
from tlite_jax.report.read import RunData

FILE_NAME = "README.md"
LOSS_PLOT, BOARD_PLOT = "plots/loss-{run}.png", "plots/forgetting-{run}.png"


@dataclass(frozen=True)
class CardFacts:
    """All that a card is made of.

    Attributes:
      directory: the release, with hf/ and release.json.
      stages: the runs, in their order.
      evaluation: of the last stage, all of it.
      plots: paths relative to `directory`.
    """

    name: str
    card: CardConfig
    directory: Path
    result: ReleaseResult
    stages: Sequence[RunData]
    evaluation: Evaluation
    plots: Sequence[str]


def write_card(facts: CardFacts) -> Path:
    """Writes README.md, and reads it back as the hub would; returns its path."""
    path = facts.directory / FILE_NAME
    text = card_text(facts)
    ModelCard(text)  # parses the front matter
    scratch = path.with_name(f"{FILE_NAME}.partial")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
    return path


def card_text(facts: CardFacts) -> str:
    """The whole file."""
    parts = [f"---\n{front_matter(facts).to_yaml()}\n---\n", f"# {facts.name}\n"]
    parts += [f"{facts.card.description.strip()}\n"] if facts.card.description else []
    parts += [f"## {title}\n\n{body.strip()}\n" for title, body in _sections(facts) if body.strip()]
    return "\n".join(parts)


def front_matter(facts: CardFacts) -> ModelCardData:
    """What the hub reads: licence, languages, base model, results."""
    card = facts.card
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=found.task,
            dataset_name=_dataset_name(found),
            metric_type=found.metric,
            metric_name=found.metric_name,
            metric_value=found.value,
        )
        for found in facts.evaluation.rows
        if math.isfinite(found.value)
    ]
    optional: dict[str, Any] = {
        "license": card.license,
        "language": list(card.languages) or None,
        "base_model": card.base_model,
        "base_model_relation": "finetune" if card.base_model else None,
        "datasets": list(card.datasets) or None,
        "model_name": facts.name if results else None,
        "eval_results": results or None,
    }
    tags = list(dict.fromkeys(["continual-pretraining", "llama", "gguf", *card.tags]))
    if facts.result.quantizations is None:
        tags.remove("gguf")
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        **{name: value for name, value in optional.items() if value is not None},
    )


def _sections(facts: CardFacts) -> Iterator[tuple[str, str]]:
    yield "Use", _use(facts)
    yield "Model", card_tables.architecture(_model_config(facts.directory), facts.result.num_parameters)
    for stage in facts.stages:
        name = stage.directory.name
        yield f"Training: {name}", card_tables.hyperparameters(stage)
        yield f"Data: {name}", card_tables.ledger(stage)
        yield f"What it gained and lost: {name}", card_tables.forgetting(stage)
        yield f"Time and hardware: {name}", card_tables.hardware(stage)
    yield "Plots", "\n\n".join(f"![{plot}]({plot})" for plot in facts.plots)
    yield "Evaluation", _evaluation(facts.evaluation)
    yield "Quantisations", card_tables.quantizations(facts.result)
    yield "Checks", card_tables.checks(facts.result)
    yield "Limitations", _limitations(facts)
    yield "Licence and base model", _origin(facts)
    yield "Files", card_tables.files(facts.result, facts.stages)


def _model_config(directory: Path) -> Mapping[str, Any]:
    values: Mapping[str, Any] = json.loads((directory / "hf" / "config.json").read_text(encoding="utf-8"))
    return values


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

place = "."  # the hub id, or this directory's hf/
tokenizer = AutoTokenizer.from_pretrained(place)
model = AutoModelForCausalLM.from_pretrained(place)
tokens = tokenizer({prompt!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=64)[0]))
```
"""


def _use(facts: CardFacts) -> str:
    generated = facts.result.generated
    prompt = generated[0].prompt if generated else "Once upon a time"
    text = _USE.format(prompt=prompt)
    table = facts.result.quantizations
    if table is not None and table.rows:
        file = next((f.path for f in facts.result.files if f.path.endswith(table.rows[-1].file)), table.rows[-1].file)
        text += f"\n```sh\nllama-cli -m {file} -p {json.dumps(prompt, ensure_ascii=False)} -n 64\n```\n"
    if generated:
        written = generated[0]
        text += f"\nWritten greedily, {written.num_tokens} tokens:\n\n> {written.prompt}**{written.text.strip()}**\n"
    return text


def _dataset_name(found: Evaluated) -> str:
    shots = None if found.num_fewshot is None else f"{found.num_fewshot}-shot"
    said = ", ".join(part for part in (shots, found.extent) if part)
    return f"{found.task} ({said})" if said else found.task


def _evaluation(evaluation: Evaluation) -> str:
    if not evaluation.rows and not evaluation.remarks:
        return "No tasks were run."
    rows = [
        (
            part.task,
            "" if part.num_fewshot is None else str(part.num_fewshot),
            part.extent,
            part.metric_name,
            f"{part.value:.4f}" + ("" if part.error is None else f" ± {part.error:.4f}"),
        )
        for part in evaluation.rows
    ]
    parts = [card_tables.table(("task", "shots", "measured on", "metric", "value"), rows), *evaluation.remarks]
    return "\n\n".join(part for part in parts if part)


def _limitations(facts: CardFacts) -> str:
    lines = [f"- {line}" for line in facts.card.limitations]
    lines.append("- A language model writes what is likely, not what is true; nothing here filters what it says.")
    if not facts.evaluation.rows:
        lines.append("- It was not evaluated on tasks.")
    return "\n".join(lines)


def _origin(facts: CardFacts) -> str:
    card = facts.card
    base = card.base_model or (facts.result.base and public(facts.result.base))
    lines = [f"Base model: {base}." if base else "The base model is not recorded."]
    lines.append(f"Licence: {card.license}." if card.license else "No licence was stated by the publisher.")
    return "\n".join(lines)
