"""A release as it lies in a repository of the hub: the HF model at the top, everything else under its own name."""

import re
from pathlib import Path

from tlite_jax.errors import UserError
from tlite_jax.release.result import FILE_NAME, Check, ReleasedFile, ReleaseResult

_IGNORED = (".partial", ".lock")
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_MODEL = "hf/"


def public(text: str) -> str:
    """A line without the directories of the machine that wrote it."""
    return re.sub(r"(?<![\w.])/(?:[^/\s,:;]+/)+", "", text)


def hub_name(path: str) -> str:
    """Where a file of a release lies in the repository, so that from_pretrained(ORG/NAME) finds the model."""
    return path.removeprefix(_MODEL)


def on_the_hub(release: Path) -> dict[str, Path]:
    """Name in the repository -> file.

    Raises:
      UserError: two files would have one name, or one leads out of the release.
    """
    found: dict[str, Path] = {}
    for path in sorted(release.rglob("*")):
        if path.is_symlink():
            raise UserError(f"{path} is a link; a release holds its files itself")
        if not path.is_file() or path.name.endswith(_IGNORED):
            continue
        name = hub_name(path.relative_to(release).as_posix())
        if name in found:
            raise UserError(f"{path} and {found[name]} would have one name on the hub; rename one")
        found[name] = path
    return found


def unread_weights(result: ReleaseResult, names: list[str]) -> list[str]:
    """Files of a release, by its own paths, that decide what a model computes and that its gate has not read."""
    listed = {file.path for file in result.files}
    return [name for name in names if name not in listed and (name.startswith(_MODEL) or name.endswith(_WEIGHTS))]


def as_uploaded(result: ReleaseResult) -> ReleaseResult:
    """What release.json says in the repository: its files' names there, and no directories of this machine."""
    run = Path(result.checkpoint)
    return result.model_copy(
        update={
            "checkpoint": "/".join(run.parts[-3:]) if run.is_absolute() else result.checkpoint,
            "base": None if result.base is None else public(result.base),
            "checks": tuple(_public_check(check) for check in result.checks),
            "files": tuple(file.model_copy(update={"path": hub_name(file.path)}) for file in result.files),
            "quantizations": result.quantizations
            and result.quantizations.model_copy(update={"sample": public(result.quantizations.sample)}),
        }
    )


def _public_check(check: Check) -> Check:
    return check.model_copy(update={"value": public(check.value), "details": tuple(map(public, check.details))})


def outside(files: tuple[ReleasedFile, ...]) -> list[str]:
    """Listed files whose paths lead out of the release, or are none."""
    return [file.path for file in files if not is_inside(file.path)]


def is_inside(path: str) -> bool:
    """Whether a path of release.json is one of the release: relative, of plain names, with slashes between."""
    parts = path.split("/")
    return path != FILE_NAME and not any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts)
