"""Hugging Face directories: import and export."""

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from tlite_jax.bridge import safetensors_io
from tlite_jax.bridge.assemble import (
    WEIGHT_DTYPES,
    Imported,
    Params,
    Report,
    WeightsDtype,
    expected_slots,
    harmless_extras,
    main_dtype,
    match_names,
    no_report,
    outgoing,
    stack,
)
from tlite_jax.bridge.checksums import SUMS_NAME, sha256_of, sums_text
from tlite_jax.bridge.files import contained, new_directory, parse_json, read_json
from tlite_jax.bridge.hazards import ADAPTER
from tlite_jax.bridge.hf_config import hf_config, model_config_from_hf
from tlite_jax.bridge.source import ParamsSource
from tlite_jax.bridge.stored import StoredTensor
from tlite_jax.bridge.tokenizer import GENERATION, TOKEN_IDS, TOKENIZER, check_vocabulary, read_files, read_tokenizer
from tlite_jax.config import ModelConfig
from tlite_jax.errors import UserError, require

_PICKLE, _PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SHARD = re.compile(r".+-[0-9]+-of-[0-9]+\.(safetensors|bin)")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_OTHER_KINDS = {
    "checkpoints": "a run, not a Hugging Face directory; other commands take it as it is, `export` makes one of it",
    "_CHECKPOINT_METADATA": "a checkpoint, not a Hugging Face directory; `export` makes one of it",
    ADAPTER: "an adapter without the model it changes; merge it, with PEFT's merge_and_unload, and import the result",
    "params.json": "weights in Meta's own format; import the model's Hugging Face directory instead",
}
DEFAULT_SHARD_BYTES = 5 * 10**9


def import_hf(source: Path) -> Imported:
    """Opens a Llama model in a Hugging Face directory, or in one weights file beside its config.json.

    Weights are read when a part of a parameter is asked for, and no more of them than that part.

    Weights keep the dtype they are stored in; a parameter whose layers differ in dtype is widened to float32. Either
    way an export in the remembered dtypes is byte for byte the same.

    Args:
      source: a directory, or a .safetensors or .bin file in one.

    Raises:
      UserError: another architecture; missing, extra or misshapen tensors; files that are damaged or lead elsewhere.
    """
    directory = source.parent if source.is_file() else source
    _refuse_other_kinds(directory)
    config = read_json(contained(directory, "config.json", str(source)), max_bytes=1 << 24)
    model = model_config_from_hf(config, str(directory / "config.json"))
    tokenizer = read_tokenizer(directory, config)
    check_vocabulary(tokenizer, model, str(directory))
    stored = _stored_tensors(source)
    wanted = {slot.hugging_face: slot for slot in expected_slots(model, stored, source)}
    harmless = harmless_extras(stored, model, source)
    match_names(wanted, stored, source, harmless)
    for name in wanted:
        if stored[name].dtype not in WEIGHT_DTYPES:
            raise UserError(f"{source}: {name} is {stored[name].dtype}; weights are {', '.join(WEIGHT_DTYPES)}")
    params = stack(wanted, stored)
    main = main_dtype((stored[name].dtype, stored[name].shape) for name in wanted)
    others = {name: stored[name].dtype for name in wanted if stored[name].dtype != main}
    notes = [f"left out {name}: {reason}" for name, reason in _grouped(harmless).items()]
    if others:
        notes.append(f"weights are {main}, {len(others)} tensors are not; an export restores each one's dtype")
    if TOKENIZER not in tokenizer:
        notes.append("no tokenizer found")
    if (directory / ADAPTER).exists():
        notes.append(f"left out the adapter ({ADAPTER}): merge it into the weights first if it belongs to the model")
    return Imported(model, params, cast(WeightsDtype, main), others, tokenizer, tuple(notes))


def _refuse_other_kinds(directory: Path) -> None:
    """Names what lies there, where it is something else that holds a model."""
    if (directory / "config.json").exists():
        return
    for name, line in _OTHER_KINDS.items():
        if (directory / name).exists():
            raise UserError(f"{directory}: {line}")


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form of a model's name on the Hugging Face hub, org/name."""
    return _HUB_ID.fullmatch(source) is not None


def download(hub_id: str, revision: str | None = None) -> Path:
    """Fetches a model's files from the Hugging Face hub (or its local cache) and returns their directory.

    Raises:
      UserError: no network, no such model, no access; in one line.
    """
    import huggingface_hub

    wanted = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
    try:
        info = huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=[*wanted, "*.safetensors"])
        if not any(Path(info).glob("*.safetensors")):
            info = huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=[*wanted, "*.bin"])
    except Exception as error:  # the hub raises kinds that share no base
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot fetch {hub_id!r} from the Hugging Face hub, and no such directory is here: {line}"
        ) from error
    return Path(info)


def export_hf(
    params: Params,
    model: ModelConfig,
    destination: Path,
    tokenizer_dir: Path | None,
    weights_dtype: WeightsDtype,
    tensor_dtypes: Mapping[str, str] = MappingProxyType({}),
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    report: Report = no_report,
    before_publishing: Callable[[], None] = lambda: None,
) -> None:
    """Writes a directory that AutoModelForCausalLM and AutoTokenizer of transformers 4 and 5 load.

    Args:
      params: nested dict of arrays (see assemble.Imported); anything that slices like numpy and converts to it.
      model: their shape.
      destination: must not exist, or be empty; appears whole or not at all.
      tokenizer_dir: Hugging Face tokenizer files and generation_config.json, or None.
      weights_dtype: the dtype to write in.
      tensor_dtypes: Hugging Face names of tensors to write in another dtype.
      max_shard_bytes: of tensor data in one file.
      report: called with (bytes written, bytes in all).
      before_publishing: called when all is written; if it raises, nothing appears.

    Raises:
      UserError: the destination is occupied or cannot be written; values do not fit float16; the tokenizer has more
        ids than the model.
    """
    tensors = outgoing(ParamsSource(params, model), weights_dtype, tensor_dtypes)
    files = {}
    if tokenizer_dir is not None:
        files = read_files(tokenizer_dir)
        check_vocabulary(files, model, str(tokenizer_dir))
    generation = parse_json(files.get(GENERATION, b"{}"), GENERATION)
    files[GENERATION] = (json.dumps(generation, indent=2, ensure_ascii=False) + "\n").encode()
    config = hf_config(model, weights_dtype, {name: generation.get(name) for name in TOKEN_IDS})
    files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    with new_directory(destination) as directory:
        for name, content in files.items():
            (directory / name).write_bytes(content)
        sums = safetensors_io.write_directory(directory, tensors, max_shard_bytes, report)
        for path in directory.iterdir():
            if path.name not in sums:
                sums[path.name] = sha256_of(path)
        (directory / SUMS_NAME).write_text(sums_text(sums), encoding="utf-8")
        before_publishing()


def _stored_tensors(source: Path) -> dict[str, StoredTensor]:
    if source.is_file():
        path = contained(source.parent, source.name, str(source))
        return _read_pickle(path) if source.suffix == ".bin" else safetensors_io.read_file(path)
    names = {path.name for path in source.iterdir()}
    if names & {safetensors_io.SINGLE_NAME, safetensors_io.INDEX_NAME}:
        return safetensors_io.read_directory(source)
    if _PICKLE in names:
        return _read_pickle(contained(source, _PICKLE, str(source)))
    if _PICKLE_INDEX in names:
        index = contained(source, _PICKLE_INDEX, str(source))
        return safetensors_io.read_index(index, _read_pickle)
    if parts := sorted(name for name in names if _SHARD.fullmatch(name)):
        raise UserError(f"{source}: {parts[0]} is a part of the weights, and the index is missing; fetch it too")
    raise UserError(
        f"{source}: no weights; expected {safetensors_io.SINGLE_NAME}, {safetensors_io.INDEX_NAME} or {_PICKLE}"
    )


def _read_pickle(path: Path) -> dict[str, StoredTensor]:
    """Lists the tensors of a pytorch_model.bin; torch refuses whatever is not a tensor."""
    torch = require("torch", extra="torch", purpose=f"reading {path.name}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except Exception as error:  # pickle's, torch's and the archive's errors
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: torch.load(weights_only=True) refused it: {line}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise UserError(f"{path}: not a dictionary of tensors")
    return {
        name: StoredTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), partial(_to_numpy, tensor))
        for name, tensor in state.items()
    }


def _to_numpy(tensor: Any, rows: slice) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    tensor = (tensor[rows] if tensor.ndim else tensor).contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(WEIGHT_DTYPES["bfloat16"])
    return tensor.numpy()


def _grouped(reasons: Mapping[str, str]) -> dict[str, str]:
    """Layers' numbers become `*`, so that a hundred buffers are one line."""
    return {re.sub(r"\.[0-9]+\.", ".*.", name): reason for name, reason in reasons.items()}
