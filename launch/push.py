"""`python -m launch push RELEASE ORG/NAME`: a gated release to the Hugging Face hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.release.result import ReleaseResult

_MEND = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def main(
    release: Annotated[Path, typer.Argument(help="Release directory, with release.json.")],
    repository: Annotated[str, typer.Argument(help="ORG/NAME on the hub; made if absent.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Although the gate has not passed.")] = False,
) -> None:
    """Upload a release in one commit: the HF model at the top, GGUF files, card, plots and release.json beside it.

    The token is that of `hf auth login`, or of the environment variable HF_TOKEN.

    Example: python -m launch push runs/smollm2_russian/release my-lab/SmolLM2-135M-Russian --private
    """
    print(push(release, repository, private=private, force=force))


def push(release: Path, repository: str, *, private: bool = False, force: bool = False) -> str:
    """Uploads a release; returns the address of the commit.

    Args:
      release: a directory with release.json, whose files are what it says.
      repository: ORG/NAME.
      private: of a repository that is made for it.
      force: although the gate has not passed.

    Raises:
      UserError: not passed, files that changed or came since, no token, no right to write, no hub, a card that the hub
        refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    from tlite_jax.release.hub import as_uploaded, on_the_hub
    from tlite_jax.release.result import FILE_NAME, load, text_of

    result = load(release)
    refuse_destination(repository)
    if not result.passed and not force:
        stopped = ", ".join(check.name for check in result.checks if check.holds_up)
        raise UserError(f"{release} has not passed its gate ({stopped}); mend it, or give --force")
    files = on_the_hub(release)
    _refuse_changed(release, result, list(files.values()))
    adds = [CommitOperationAdd(name, str(path)) for name, path in files.items() if name != FILE_NAME]
    adds.append(CommitOperationAdd(FILE_NAME, text_of(as_uploaded(result)).encode()))
    api = HfApi()
    try:
        place = api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        gone = [CommitOperationDelete(name) for name in _replaced(api, place.repo_id, set(files))]
        message = f"Release step {result.step}"
        done = api.create_commit(place.repo_id, operations=[*adds, *gone], commit_message=message, repo_type="model")
    except Exception as error:  # the hub raises kinds that share no base
        reason = " ".join(str(error).split()) or type(error).__name__
        mend = "correct the recipe's `card` and run it again" if "metadata in README.md" in reason else _MEND
        raise UserError(f"cannot upload to {repository}: {reason[:500]}; {mend}") from error
    return str(done.commit_url)


def refuse_destination(repository: str) -> None:
    """Says what can be known before anything is made or read.

    Raises:
      UserError: not ORG/NAME, or no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        is_name = repository.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        raise UserError(f"{repository!r} is no repository of the hub; give ORG/NAME")
    if get_token() is None:
        raise UserError(f"cannot upload to {repository}: there is no token; {_MEND}")


def _refuse_changed(release: Path, result: "ReleaseResult", files: list[Path]) -> None:
    """What is uploaded is what the gate has read, all of it, and nothing that it has not."""
    from tlite_jax.bridge.checksums import sha256_of
    from tlite_jax.release.hub import outside, unread_weights

    if strange := outside(result.files):
        raise UserError(f"{strange[0]} was checked, and lies outside of {release}; put it there and run the gate again")
    for file in result.files:
        path = release / file.path
        if not path.is_file():
            raise UserError(f"{path} was checked and is gone; run the gate again")
        if sha256_of(path) != file.sha256:
            raise UserError(f"{path} has changed since the gate read it; run the gate again")
    if unread := unread_weights(result, [path.relative_to(release).as_posix() for path in files]):
        raise UserError(f"{release / unread[0]} came after the gate, which has not read it; run the gate again")


def _replaced(api: Any, repository: str, names: set[str]) -> list[str]:
    """Files of the release that lies there, which the new one has not."""
    from tlite_jax.release.hub import hub_name
    from tlite_jax.release.result import FILE_NAME, load

    there = set(api.list_repo_files(repository))
    if FILE_NAME not in there:
        return []
    try:
        before = load(Path(api.hf_hub_download(repository, FILE_NAME)))
    except UserError:
        return []  # somebody else's file of that name
    return sorted({hub_name(file.path) for file in before.files} & there - names)
