"""A hub on this machine: what huggingface_hub asks of the real one to make a repository, commit files and fetch them.

Repositories are directories. It takes a commit whole or not at all, as the real one does, and refuses front matter that
is not YAML, an unknown licence, a language that is no code, and results without a model's name.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

LICENSES = ("apache-2.0", "mit", "llama3", "llama3.1", "cc-by-4.0", "other")


class Hub:
    """What is there: `root`/ORG/NAME, and the commits that were made, each a list of (what, path)."""

    def __init__(self, root: Path):
        self.root = root
        self.commits: list[list[tuple[str, str]]] = []
        self.address = ""

    def sha(self) -> str:
        """Of the newest commit."""
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


@contextmanager
def standing_in(root: Path) -> Iterator[Hub]:
    """Serves a hub; its address is `Hub.address`."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def wrong_in_card(text: str) -> list[str]:
    """What is wrong with a model card's front matter."""
    match = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    try:
        values = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(values, dict):
        return ["no metadata"]
    wrong = []
    if values.get("license", "mit") not in LICENSES:
        wrong.append(f'"license" must be one of {LICENSES}')
    languages = values.get("language", [])
    if not all(re.fullmatch("[a-z]{2,3}", code) for code in ([languages] if isinstance(languages, str) else languages)):
        wrong.append('"language" must be codes')
    try:
        for entry in values.get("model-index", []):
            model_index_to_eval_results([{"name": entry["name"], "results": entry["results"]}])
    except (KeyError, TypeError, ValueError) as error:
        wrong.append(f'"model-index": {error!r}')
    return wrong


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.headers.get("Authorization"):
            self._json({"error": "no token"}, 401)
        elif self.path == "/api/repos/create":
            values = json.loads(body)
            (self.hub.root / values["organization"] / values["name"]).mkdir(parents=True, exist_ok=True)
            self._json({"url": f"{self.hub.address}/{values['organization']}/{values['name']}"})
        elif self.path == "/api/validate-yaml":
            wrong = [{"message": line} for line in wrong_in_card(json.loads(body)["content"])]
            self._json({"errors": wrong, "warnings": []}, 400 if wrong else 200)
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        else:
            self._commit([json.loads(line) for line in body.splitlines()])

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
        repository, done = self.hub.root / name, []
        for line in lines:
            path = repository / line["value"].get("path", "")
            if line["key"] == "file":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
            elif line["key"] == "deletedFile":
                path.unlink()
            elif line["key"] == "deletedFolder":
                shutil.rmtree(path)
            if line["key"] != "header":
                done.append((line["key"], line["value"]["path"]))
        self.hub.commits.append(done)
        url = f"{self.hub.address}/{name}/commit/{self.hub.sha()}"
        self._json({"commitUrl": url, "commitOid": self.hub.sha()})

    def do_HEAD(self) -> None:
        self._file()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            self._file()
            return
        match = re.match(r"/api/models/([^/]+/[^/]+)(/tree/.*)?", path)
        repository = self.hub.root / match[1] if match else self.hub.root / "absent"
        if not repository.is_dir():
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(file for file in repository.rglob("*") if file.is_file())
        names = {str(file.relative_to(repository)): file for file in files}
        if match and match[2]:
            self._json(
                [{"type": "file", "path": n, "size": f.stat().st_size, "oid": _oid(f)} for n, f in names.items()]
            )
        else:
            self._json({"id": match[1], "sha": self.hub.sha(), "siblings": [{"rfilename": name} for name in names]})

    def _file(self) -> None:
        match = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/([^?]+)", self.path)
        file = self.hub.root / match[1] / match[2] if match else self.hub.root / "absent"
        if not file.is_file():
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        self._send(file.read_bytes(), 200, {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": self.hub.sha()})

    def _json(self, values: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(values).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
