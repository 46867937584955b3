"""`python -m launch push RELEASE ORG/NAME`: a gated release to the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from tlite_jax.errors import UserError

_IGNORED = (".partial", ".lock")


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
      UserError: not passed, files that changed since, no token, no right to write, no hub.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    from tlite_jax.release.result import load

    result = load(release)
    if not result.passed and not force:
        stopped = ", ".join(check.name for check in result.checks if check.holds_up)
        raise UserError(f"{release} has not passed its gate ({stopped}); mend it, or give --force")
    _check_unchanged(release, force=force)
    adds = [CommitOperationAdd(name, str(path)) for name, path in on_the_hub(release).items()]
    api = HfApi()
    try:
        place = api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        done = api.create_commit(
            place.repo_id, operations=adds, commit_message=f"Release step {result.step}", repo_type="model"
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        mend = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        raise UserError(f"cannot upload to {repository}: {reason}; {mend}") from error
    return str(done.commit_url)


def on_the_hub(release: Path) -> dict[str, Path]:
    """Name in the repository -> file: hf/ is at the top there, so that from_pretrained(ORG/NAME) finds the model.

    Raises:
      UserError: two files would have one name, or one leads out of the release.
    """
    found: dict[str, Path] = {}
    for path in sorted(release.rglob("*")):
        if not path.is_file() or path.name.endswith(_IGNORED):
            continue
        if path.is_symlink():
            raise UserError(f"{path} is a link; a release holds its files itself")
        name = path.relative_to(release).as_posix().removeprefix("hf/")
        if name in found:
            raise UserError(f"{path} and {found[name]} would have one name on the hub; rename one")
        found[name] = path
    return found


def _check_unchanged(release: Path, *, force: bool) -> None:
    """What is uploaded is what the gate has read."""
    import hashlib

    from tlite_jax.release.result import load

    for file in load(release).files:
        path = release / file.path
        if force or not path.is_file():
            if force:
                continue
            raise UserError(f"{path} was checked and is gone; run the gate again")
        with path.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
                raise UserError(f"{path} has changed since the gate read it; run the gate again")
