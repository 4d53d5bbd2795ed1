"""A hub of one's own: as much of the Hugging Face Hub's HTTP API as sending a model and loading it again needs.

By hand: `python tests/helpers/fake_hub.py FOLDER [--port P]`, then export what it prints and push to it. What it gets
lies in `FOLDER/<owner>/<name>/<branch>/`, to be looked at, and is forgotten when it ends.
"""

import argparse
import base64
import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import HfApi, constants

OWNER = "me"
"""Whose token it is that everybody sends."""

LARGE_ENDINGS = (".safetensors", ".png", ".bin")
"""Files that are uploaded by themselves; the others come with the commit, as on the hub."""

_RELATIONS = {"adapter", "finetune", "merge", "quantized"}


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def card_problems(text: str) -> list[str]:
    """What the hub would refuse about a card's metadata."""
    block = re.match(r"^---\n(.*?)\n---\n", text, re.S)
    if block is None:
        return []
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    found = []
    for name in ("base_model", "datasets", "tags", "language", "library_name", "pipeline_tag"):
        values = data.get(name, [])
        if not all(isinstance(value, str) and value for value in (values if isinstance(values, list) else [values])):
            found.append(f'"{name}" must be a string or a list of strings')
    if data.get("base_model_relation", "finetune") not in _RELATIONS:
        found.append(f'"base_model_relation" must be one of {sorted(_RELATIONS)}')
    for result in (result for model in data.get("model-index", []) for result in model["results"]):
        if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
            found.append('"model-index" lacks a task or a data set')
        if not all(metric["type"] and isinstance(metric["value"], (int, float)) for metric in result["metrics"]):
            found.append('"model-index" has a metric without a value')
    return found


@dataclass
class Repository:
    """Commits by their ids, each a map of paths to contents, and branches by their names."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        text = json.dumps([message, len(self.commits), {path: git_hash(content) for path, content in files.items()}])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class FakeHub:
    """The state of the hub, and what it shall do wrong.

    Args:
        folder: where each branch is written out to; nowhere by default.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.address = folder, ""
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.failures: dict[str, int | str] = {}
        """By endpoint (see `ROUTES`) a status to answer, or `hang` to never answer."""
        self.asked: list[tuple[str, str]] = []
        """Endpoint and path of every request, in order."""
        self.received: list[bytes] = []
        """Every body."""
        self.tokens: set[str | None] = set()
        self.released = threading.Event()

    def write_out(self, name: str, branch: str) -> None:
        if self.folder is None:
            return
        for path, content in self.repositories[name].files(branch).items():
            target = self.folder / name / branch / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    # Each of these answers one endpoint: a status, and what is sent as JSON or as it is.

    def whoami(self, request, _):
        return 200, {"type": "user", "name": OWNER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def create(self, request, _):
        asked = request.json()
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        url = {"url": f"{self.address}/{name}", "name": name}
        if name in self.repositories:
            return 409, {**url, "error": "You already created this model repo"}
        self.repositories[name] = Repository(asked.get("visibility") == "private")
        self.repositories[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return 200, url

    def validate(self, request, _):
        problems = card_problems(request.json()["content"])
        return (400 if problems else 200), {"errors": [{"message": text} for text in problems], "warnings": []}

    def preupload(self, request, match):
        repository, revision = self.repositories[match["repo"]], unquote(match["revision"])
        if revision not in repository.branches:
            return 404, {"error": f"Invalid rev id: {revision}"}
        return 200, {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE_ENDINGS) else "regular",
                    "shouldIgnore": False,
                }
                for file in request.json()["files"]
            ]
        }

    def batch(self, request, _):
        upload = {"actions": {}}
        objects = []
        for asked in request.json()["objects"]:
            upload = {"upload": {"href": f"{self.address}/objects/{asked['oid']}"}}
            there = asked["oid"] in self.objects
            objects.append({**asked, "authenticated": True, **({} if there else {"actions": upload})})
        return 200, {"transfer": "basic", "objects": objects}

    def upload(self, request, match):
        if hashlib.sha256(request.body).hexdigest() != match["oid"]:
            return 400, {"error": "the checksum differs"}
        self.objects[match["oid"]] = request.body
        return 200, {}

    def commit(self, request, match):
        repository, branch = self.repositories[match["repo"]], unquote(match["revision"])
        files, message = dict(repository.files(branch)), ""
        for line in filter(None, request.body.splitlines()):
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(branch, files, message)
        self.write_out(match["repo"], branch)
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{self.address}/{match['repo']}/commit/{sha}"}

    def branch(self, request, match):
        repository, branch = self.repositories[match["repo"]], unquote(match["revision"])
        if branch in repository.branches:
            return 409, {"error": "Reference already exists"}
        repository.branches[branch] = repository.branches["main"]
        return 200, {}

    def _found(self, match) -> tuple[str, dict[str, bytes]] | None:
        repository, revision = self.repositories.get(match["repo"]), unquote(match["revision"] or "main")
        if repository is None or repository.branches.get(revision, revision) not in repository.commits:
            return None
        return repository.branches.get(revision, revision), repository.files(revision)

    def info(self, request, match):
        if (found := self._found(match)) is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        sha, files = found
        siblings = [{"rfilename": path} for path in files]
        return 200, {
            "id": match["repo"], "modelId": match["repo"], "sha": sha, "siblings": siblings, "tags": [],
            "private": self.repositories[match["repo"]].private,
        }  # fmt: skip

    def tree(self, request, match):
        if (found := self._found(match)) is None:
            return 404, {"error": "Repository not found"}
        inside = unquote(match["inside"] or "").strip("/")
        return 200, [
            {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            for path, content in found[1].items()
            if path.startswith(f"{inside}/" if inside else "")
        ]

    def resolve(self, request, match):
        found, path = self._found(match), unquote(match["path"])
        if found is None or path not in found[1]:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound" if found else "RepoNotFound"}
        content = found[1][path]
        return 200, content, {"ETag": f'"{git_hash(content)}"', "X-Repo-Commit": found[0]}


_MODEL, _REVISION = r"/api/models/(?P<repo>[^/]+/[^/]+)", r"/(?P<revision>[^/]+)"
ROUTES = [
    ("whoami", "GET", r"/api/whoami-v2"),
    ("create", "POST", r"/api/repos/create"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", _MODEL + "/preupload" + _REVISION),
    ("batch", "POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("upload", "PUT", r"/objects/(?P<oid>[0-9a-f]{64})"),
    ("commit", "POST", _MODEL + "/commit" + _REVISION),
    ("branch", "POST", _MODEL + "/branch" + _REVISION),
    ("tree", "GET", _MODEL + "/tree" + _REVISION + r"(?P<inside>/.*)?"),
    ("info", "GET", _MODEL + r"(?:/revision/(?P<revision>[^/]+))?"),
    ("resolve", "GET", r"/(?P<repo>[^/]+/[^/]+)/resolve" + _REVISION + r"/(?P<path>.+)"),
]
"""Name, method and path of every endpoint; a `HEAD` is answered as a `GET` is."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def json(self):
        return json.loads(self.body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        self.body, self.query = self._body(), parse_qs(urlsplit(self.path).query)
        method = "GET" if self.command == "HEAD" else self.command
        name, match = next(
            ((name, match) for name, verb, route in ROUTES if verb == method and (match := re.fullmatch(route, path))),
            ("unknown", None),
        )
        hub.asked.append((name, self.path))
        hub.received.append(self.body)
        hub.tokens.add((self.headers.get("Authorization") or "").removeprefix("Bearer ") or None)
        failure = hub.failures.get(name)
        if failure == "hang":
            hub.released.wait(600)
            self.close_connection = True
            return
        if failure is not None or match is None:
            said = "As asked" if failure else f"No endpoint {method} {path}"
            self._send(failure or 404, {"error": said, "errors": [{"message": said}]}, {})
            return
        status, content, *headers = getattr(hub, name)(self, match.groupdict() or {})
        self._send(status, content, headers[0] if headers else {})

    def _send(self, status: int, content, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def log_message(self, *_):
        pass


@contextmanager
def fake_hub(folder: Path | None = None, port: int = 0):
    """A `FakeHub` that answers on 127.0.0.1 at its `address`."""
    hub = FakeHub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    server.daemon_threads, server.hub = True, hub
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()


@contextmanager
def asked_hub(patch, folder):
    """A `FakeHub` that the hub's client asks, without the pauses between its attempts.

    Args:
        patch: a monkeypatch.
        folder: where what is loaded from it is kept.
    """
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    patch.setattr("huggingface_hub.utils._http.time", impatient)
    with fake_hub() as hub:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr("huggingface_hub.hf_api.api.endpoint", hub.address)  # which peft asks
        # transformers keeps its client, and the first test that needed one may have made it for another address.
        patch.setattr("transformers.trainer.hf_api", lambda: HfApi(endpoint=hub.address), raising=False)
        yield hub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    with fake_hub(options.folder, options.port) as hub:
        # Xet is a protocol of its own beside the hub's HTTP API, which this one does not speak.
        print(f"export HF_ENDPOINT={hub.address} HF_TOKEN=hf_any HF_HUB_DISABLE_XET=1", flush=True)
        print(f"What is pushed appears in {options.folder}; Ctrl-C ends it.", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
