"""Opening a model to evaluate or to write with: a run, an imported checkpoint, an HF directory or a GGUF file."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.evaluate.language_model import LanguageModel

DTYPES = ("float32", "bfloat16")


def open_language_model(
    source: Path, *, step: int | str | None = None, dtype: str = "float32", **options: Any
) -> "LanguageModel":
    """Reads a model into its shards on all devices there are.

    Args:
      source: a run (the newest step, or the given one), one RUN/checkpoints/STEP, a Hugging Face directory, one weights
        file in it, a hub id, or a GGUF file.
      step: of a run, or best.
      dtype: float32 or bfloat16, to keep and to compute in.
      options: of `LanguageModel`: max_length, batch_tokens.

    Raises:
      UserError: nothing there, no tokenizer, an unknown dtype.
    """
    import jax

    from tlite_jax.checkpoint import find, restore_params
    from tlite_jax.config import MeshConfig
    from tlite_jax.evaluate.language_model import LanguageModel
    from tlite_jax.sharding import make_mesh

    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose {' or '.join(DTYPES)}")
    mesh = make_mesh(MeshConfig(fsdp=jax.device_count()))
    if _is_foreign(source):
        if step is not None:
            raise UserError(f"--step is for runs; {source} is a single model")
        return _open_foreign(str(source), mesh, dtype, options)
    checkpoint = find(source, step)
    tokenizer = load_tokenizer(checkpoint.tokenizer_dir)
    params = restore_params(checkpoint, mesh, dtype)
    options["end_ids"] = _end_ids(checkpoint.tokenizer_dir / "generation_config.json")
    return LanguageModel(params, checkpoint.meta.model, mesh, tokenizer, dtype=dtype, **options)


def load_tokenizer(directory: Path) -> Any:
    """Transformers' tokenizer of a directory.

    Raises:
      UserError: there is none.
    """
    from transformers import AutoTokenizer

    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory.parent} has no tokenizer directory; import the model with its tokenizer")
    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _end_ids(file: Path) -> tuple[int, ...]:
    """The ids that end a text by a generation_config.json: often several where models chat."""
    if not file.is_file():
        return ()
    found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    return tuple(number for number in (found if isinstance(found, list) else [found]) if isinstance(number, int))


def _is_foreign(source: Path) -> bool:
    from tlite_jax.bridge.hf import is_hub_id

    if source.exists():
        return source.is_file() or (source / "config.json").is_file()
    return is_hub_id(str(source))


def _open_foreign(source: str, mesh: Any, dtype: str, options: dict[str, Any]) -> "LanguageModel":
    from launch.import_ import read_model
    from tlite_jax.evaluate.language_model import LanguageModel
    from tlite_jax.model.decoder import param_specs
    from tlite_jax.sharding import place_params

    imported = read_model(source)
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in imported.tokenizer.items():
            (Path(scratch) / "tokenizer").mkdir(exist_ok=True)
            (Path(scratch) / "tokenizer" / name).write_bytes(content)
        if "tokenizer.json" not in imported.tokenizer:
            raise UserError(f"{source} has no tokenizer; copy the tokenizer's files into it")
        tokenizer = load_tokenizer(Path(scratch) / "tokenizer")
        options["end_ids"] = _end_ids(Path(scratch) / "tokenizer" / "generation_config.json")
    params = place_params(imported.params, param_specs(imported.model), mesh, dtype)
    return LanguageModel(params, imported.model, mesh, tokenizer, dtype=dtype, **options)
