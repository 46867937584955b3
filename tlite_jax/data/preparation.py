"""A preparation as a value: what is read, with what, into what. It travels to any machine that sees the same files."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlite_jax.config import DataConfig, PrepareConfig, RunConfig
from tlite_jax.data.chat import ChatTemplate, load_chat_template
from tlite_jax.data.documents import Shard, make_shards
from tlite_jax.data.evaluation_items import EvaluationItems, find_items
from tlite_jax.data.inputs import InputFile, find_files
from tlite_jax.data.labels.labelling import Labelling
from tlite_jax.data.shards import ShardSettings
from tlite_jax.data.tokenize import TokenizerFile, check_vocabulary, load_tokenizer
from tlite_jax.errors import UserError

SHARDS = ".shards"


@dataclass(frozen=True)
class Preparation:
    """The input as it was found, and all that turns it into buckets.

    Attributes:
      data, todo: the run's `data` and `data.prepare`.
      tokenizer: read from its directory.
      files: source -> its files.
      items: what must not be trained on; `build` them before shards are tokenised.
      labelling: the labellers.
      chat_template: the tokenizer's, where a source needs it.
    """

    data: DataConfig
    todo: PrepareConfig
    tokenizer: TokenizerFile
    files: dict[str, list[InputFile]]
    items: EvaluationItems | None
    labelling: Labelling
    chat_template: ChatTemplate | None

    @property
    def buckets(self) -> Path:
        """Where the buckets go."""
        return self.data.buckets

    @property
    def input_bytes(self) -> int:
        """All input, as stored."""
        return sum(file.bytes for found in self.files.values() for file in found)

    @property
    def num_workers(self) -> int:
        """Processes on this machine."""
        return self.todo.num_workers or len(os.sched_getaffinity(0))

    def shards(self) -> list[Shard]:
        """The input cut into tasks, in the order of sources, files and lines."""
        size = self.todo.shard_bytes
        return [shard for source in self.todo.sources for shard in make_shards(source, self.files[source.name], size)]

    def settings(self) -> ShardSettings:
        """What every shard needs to know."""
        todo = self.todo
        return ShardSettings(
            self.buckets / SHARDS,
            self.tokenizer,
            todo.bucket_labels,
            todo.max_document_characters,
            todo.near_duplicates,
            self.items,
            self.labelling,
            self.chat_template,
        )

    def origin(self) -> dict[str, Any]:
        """Everything that the buckets' bytes depend on."""
        excluded = {"num_workers", "max_quarantine_rate", "shard_bytes", "decontaminate", "labellers"}
        values = self.todo.model_dump(mode="json", exclude=excluded)
        if self.items is not None:
            values["decontaminate"] = self.items.origin()
        sources = values.pop("sources")
        for source in sources:
            del source["paths"]
        return {
            "prepare": values,
            "sources": {source.pop("name"): source for source in sources},
            "files": {name: [file.identity() for file in found] for name, found in self.files.items()},
            "tokenizer": self.tokenizer.hash,
            "document_start": self.tokenizer.document_start,
            "document_end": self.tokenizer.document_end,
            "sequence_length": self.data.sequence_length,
            "order": list(self.files),
            "labellers": list(self.labelling.fingerprints),
            "chat_template": self.chat_template.hash if self.chat_template else None,
        }


def find_preparation(config: RunConfig, tokenizer_dir: Path) -> Preparation:
    """Reads the tokenizer and finds the input files of a run's `data.prepare`.

    Args:
      config: the run.
      tokenizer_dir: a Hugging Face tokenizer directory.

    Raises:
      UserError: nothing to prepare, files that are not there, a tokenizer that does not suit the model.
    """
    data, todo = config.data, config.data.prepare
    if todo is None:
        raise UserError("data.prepare is null: nothing says which documents to prepare")
    tokenizer = load_tokenizer(tokenizer_dir, data.document_start, data.document_end)
    if config.model is not None:
        check_vocabulary(tokenizer, config.model.vocab_size)
    items = None if todo.decontaminate is None else find_items(todo.decontaminate, data.buckets / SHARDS)
    files = {source.name: find_files(source) for source in todo.sources}
    labelling = Labelling.of(todo.labellers, data.buckets / SHARDS / "labels")
    has_chat = any(source.chat and source.chat.template == "tokenizer" for source in todo.sources)
    template = load_chat_template(tokenizer_dir) if has_chat else None
    preparation = Preparation(data, todo, tokenizer, files, items, labelling, template)
    if not preparation.input_bytes:
        raise UserError(no_documents(todo))
    return preparation


def no_documents(todo: PrepareConfig) -> str:
    """Says that there is nothing."""
    return f"no documents in {', '.join(source.name for source in todo.sources)}: the files are empty"
