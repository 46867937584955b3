"""A release on a hub that stands in for the real one, and as it is there: downloaded, verified, loaded."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.import_ import read_model
from launch.push import push
from tests.launch.hub_stand_in import Hub, standing_in
from tests.launch.in_process import run_command
from tlite_jax.errors import UserError
from tlite_jax.release.hub import on_the_hub
from tlite_jax.release.result import load, save

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def release(finished: Path, tmp_path: Path) -> Path:
    """A copy of a release, as the recipe left it."""
    return Path(shutil.copytree(finished / "out" / "release", tmp_path / "release"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that huggingface_hub finds; with a token."""
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with standing_in(tmp_path / "hub") as there:
        monkeypatch.setattr(constants, "ENDPOINT", there.address)
        template = there.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield there


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls `python -m launch` in this process; returns the status and all that was printed."""

    def invoke(*words: object) -> tuple[int, str]:
        ended = run_command(monkeypatch, capsys, *words)
        return ended.status, ended.out + ended.err

    return invoke


@pytest.mark.filterwarnings("ignore:.*upload_folder:UserWarning")
def test_what_is_downloaded_is_the_release(release: Path, hub: Hub, call: Call, tmp_path: Path) -> None:
    status, said = call("push", release, "a-lab/tiny-ru", "--private")
    assert status == 0, said
    assert f"{hub.address}/a-lab/tiny-ru/commit/" in said
    assert len(hub.commits) == 1
    place = Path(snapshot_download("a-lab/tiny-ru"))
    assert (place / "model.safetensors").is_symlink()  # into the blobs of the hub's cache
    status, said = call("verify", place)
    assert status == 0, said
    assert "release, intact" in said
    result = load(place)
    for file in result.files:
        assert hashlib.sha256((place / file.path).read_bytes()).hexdigest() == file.sha256
    assert str(tmp_path.parent) not in (place / "release.json").read_text()
    text = "Утром над рекой стоял туман"
    ids = AutoTokenizer.from_pretrained(place)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        there, here = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (place, release / "hf"))
    assert torch.equal(there, here)
    assert read_model(str(place / "gguf" / "Tiny-Russian.Q8_0.gguf")).model.vocab_size == 307
    assert "| config.json |" in (place / "README.md").read_text()


def test_a_finished_recipe_is_uploaded_by_itself(finished: Path, hub: Hub, call: Call) -> None:
    status, said = call("recipe", finished / "recipe.yaml", "--push-to-hub", "a-lab/tiny-ru")
    assert status == 0, said
    assert said.splitlines()[-1].startswith(f"push: {hub.address}/a-lab/tiny-ru/commit/")
    assert (hub.root / "a-lab" / "tiny-ru" / "model.safetensors").exists()
    status, said = call("recipe", finished / "recipe.yaml", "--push-to-hub", "a-lab/tiny-ru", "--dry-run")
    assert said.splitlines()[-1] == f"push: python -m launch push {finished}/out/release a-lab/tiny-ru"
    assert len(hub.commits) == 1


def test_a_harmed_download_is_named(release: Path, hub: Hub, call: Call, tmp_path: Path) -> None:
    push(release, "a-lab/tiny-ru")
    place = tmp_path / "local"
    snapshot_download("a-lab/tiny-ru", local_dir=place)
    gguf = place / "gguf" / "Tiny-Russian.F16.gguf"
    content = bytearray(gguf.read_bytes())
    content[-3] ^= 1
    gguf.write_bytes(content)
    (place / "gguf" / "Tiny-Russian.Q8_0.gguf").unlink()
    (place / "chat.gguf").write_bytes(content)
    (place / "config.json").write_text((place / "config.json").read_text() + " ")
    status, said = call("verify", place, "--json")
    assert status == 1
    damages = {damage["file"]: damage["problem"] for damage in json.loads(said)["damages"]}
    assert "SHA-256 is" in damages["gguf/Tiny-Russian.F16.gguf"]
    assert damages["gguf/Tiny-Russian.Q8_0.gguf"] == "missing; release.json lists it"
    assert damages["chat.gguf"] == "was not there when the gate read the release"
    assert "SHA-256 is" in damages["config.json"]
    assert len(damages) == 4


def test_a_stranger_s_release_leads_nowhere(release: Path, call: Call, tmp_path: Path) -> None:
    """Paths out of the directory, a link to one, a verdict that is none."""
    outside = tmp_path / "outside"
    outside.mkdir()
    secret = outside / "secret.txt"
    secret.write_text("secret")
    result = load(release)
    entry = result.files[0].model_copy(update={"sha256": hashlib.sha256(b"secret").hexdigest()})
    paths = [str(secret), "../outside/secret.txt", "linked.txt", "folder/secret.txt", "hf/../../outside/secret.txt"]
    (release / "linked.txt").symlink_to(secret)
    (release / "folder").symlink_to(outside)
    files = [*result.files, *(entry.model_copy(update={"path": path}) for path in paths)]
    save(result.model_copy(update={"files": tuple(files), "passed": False}), release)
    status, said = call("verify", release)
    assert status == 1
    assert said.count("which lies outside") == 3
    assert "'linked.txt' is a link out of" in said
    assert "folder: is a link out of the release" in said
    assert "the gate has not passed" in said
    for content in ("[" * 10**5, '{"passed": 1}', "\x00", '{"files": ['):
        (release / "release.json").write_text(content)
        status, said = call("verify", release)
        assert (status, "damaged: release.json" in said) == (1, True)
    os.truncate(release / "release.json", 1 << 40)
    assert "such a file has at most" in call("verify", release)[1]


def test_a_second_release_takes_the_place_of_the_first(release: Path, hub: Hub) -> None:
    repository = hub.root / "a-lab" / "tiny"
    push(release, "a-lab/tiny")
    (repository / "LICENSE").write_text("theirs")
    result = load(release)
    for name in ("Tiny-Russian.Q8_0.gguf", "Tiny-Russian.Q8_0.gguf.sha256"):
        (release / "gguf" / name).unlink()
    kept = tuple(file for file in result.files if "Q8_0" not in file.path)
    save(result.model_copy(update={"files": kept}), release)
    push(release, "a-lab/tiny")
    assert [path for what, path in hub.commits[1] if what == "deletedFile"] == [
        "gguf/Tiny-Russian.Q8_0.gguf",
        "gguf/Tiny-Russian.Q8_0.gguf.sha256",
    ]
    assert (repository / "LICENSE").exists()
    assert not (repository / "gguf" / "Tiny-Russian.Q8_0.gguf").exists()


def test_only_what_passed_and_has_not_changed_is_uploaded(release: Path, hub: Hub, tmp_path: Path) -> None:
    def refused(words: str, **options: bool) -> None:
        with pytest.raises(UserError, match=words) as error:
            push(release, "a-lab/tiny", **options)
        assert "\n" not in str(error.value)

    model, result = release / "hf" / "model.safetensors", load(release)
    content = model.read_bytes()
    model.write_bytes(content + b"\0")
    refused("has changed since", force=True)
    model.write_bytes(content)
    extra = release / "gguf" / "Other.Q4_0.gguf"
    extra.write_bytes(b"GGUF")
    refused(r"Other\.Q4_0\.gguf came after the gate")
    extra.unlink()
    save(result.model_copy(update={"passed": False}), release)
    refused("has not passed")
    elsewhere = result.files[0].model_copy(update={"path": str(tmp_path / "x")})
    save(result.model_copy(update={"files": (*result.files, elsewhere)}), release)
    refused("lies outside of")
    save(result, release)
    card = release / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: Apache Two"))
    refused("Invalid metadata in README.md.*license.*recipe's `card`")
    assert hub.commits == []
    card.write_text(card.read_text().replace("license: Apache Two", "license: mit"))
    save(result.model_copy(update={"passed": False}), release)
    push(release, "a-lab/tiny", force=True)
    assert not load(hub.root / "a-lab" / "tiny").passed


def test_where_it_goes_is_checked_first(release: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    for name in ("tiny", "a/b/c", "a-lab/..", "a lab/tiny", ""):
        status, said = call("push", release, name)
        assert status == 2
        assert "give ORG/NAME" in said
    status, said = call("push", release, "a-lab/tiny")
    assert status == 2  # the tests are offline
    assert "cannot upload to a-lab/tiny: " in said
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "there is no token; log in with" in call("push", release, "a-lab/tiny")[1]


def test_a_link_is_not_uploaded(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link"):
        on_the_hub(tmp_path / "release")
