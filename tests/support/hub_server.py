"""A small Hub on loopback: the part of the Hub's HTTP protocol that uploading and loading a model needs.

The unmodified `huggingface_hub` client talks to it, with HF_ENDPOINT set to `Hub.endpoint` and HF_HUB_DISABLE_XET=1.
Everything is kept in memory, where tests can read it: `repos`, `large_files`, `requests`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".png", ".pdf")  # sent as large files (git LFS); the real Hub decides by kind and size
CHUNK = 1 << 14


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        """The hash that the client compares: sha256 of a large file, git's blob hash of any other file."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """A model or Space, with all its commits."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)  # name → commit
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit hash; None if there is none."""
        revisions = {**self.branches, **self.tags, **{commit: commit for commit in self.commits}}
        return revisions.get(revision)

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """The contents of all files in a branch, by name."""
        return {name: blob.content for name, blob in self.commits[self.branches[branch]].items()}

    def add_commit(self, branch: str, message: str, files: dict[str, Blob]) -> str:
        """Commit `files` as the whole content of a branch. Returns the commit."""
        content = json.dumps([message, len(self.commits), {name: blob.oid for name, blob in files.items()}])
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        self.messages.append(message)
        return commit


class Hub(ThreadingHTTPServer):
    """The server. `users` are user names by token.

    `part_bytes`: large files must be sent in parts of this size. `cut_next`: this many of the next uploads of large
    files lose their connection half-way. `on_half`: called when half of a large file has arrived; it may block.
    """

    daemon_threads = True

    def __init__(self, users: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.users = users
        self.repos: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str, bytes]] = []  # method, path, body
        self.part_bytes: int | None = None
        self.cut_next = 0
        self.on_half: Callable[[], None] = lambda: None
        self.lock = threading.Lock()

    def sent(self, method: str, pattern: str) -> list[bytes]:
        """The bodies of the requests so far with a matching path."""
        return [
            body for sent_method, path, body in self.requests if sent_method == method and re.search(pattern, path)
        ]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: some tests disconnect on purpose."""


@contextmanager
def running_hub(users: dict[str, str]) -> Iterator[Hub]:
    """A Hub that serves until the block ends."""
    with Hub(users) as hub:
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield hub
        hub.shutdown()


class Refusal(Exception):
    """An error response of the Hub."""

    def __init__(self, status: int, message: str, code: str = "", **fields: str) -> None:
        super().__init__(message)
        self.status, self.code, self.fields = status, code, fields


REPO = r"/api/(?:models/|(?=spaces/))((?:spaces/)?[^/]+/[^/]+)"  # a Space is stored as "spaces/USER/NAME"
ROUTES: list[tuple[str, str, str]] = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create"),
    ("GET", REPO, "info"),
    ("GET", REPO + r"/revision/([^/]+)", "info"),
    ("GET", REPO + r"/refs", "refs"),
    ("GET", REPO + r"/tree/([^/]+)(?:/(.*))?", "tree"),
    ("POST", REPO + r"/branch/([^/]+)", "create_branch"),
    ("POST", REPO + r"/tag/([^/]+)", "create_tag"),
    ("POST", REPO + r"/preupload/([^/]+)", "preupload"),
    ("POST", REPO + r"/commit/([^/]+)", "commit"),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "large_batch"),
    ("PUT", r"/large/(\w+)", "large_put"),
    ("PUT", r"/large/(\w+)/(\d+)", "large_put"),
    ("POST", r"/large/(\w+)/complete", "large_complete"),
    ("GET", r"/((?:spaces/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
]


class Handler(BaseHTTPRequestHandler):
    """Answers one request by the method that ROUTES names."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        request_method = "GET" if self.command == "HEAD" else self.command
        try:
            self.body = self._read()
            self.server.requests.append((self.command, parts.path, self.body))
            for method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, parts.path)
                if match and method == request_method:
                    with self.server.lock:
                        getattr(self, name)(*(unquote(group or "") for group in match.groups()))
                    return
            raise Refusal(404, "not found")
        except Refusal as refusal:
            code = {"X-Error-Code": refusal.code} if refusal.code else {}
            self._json({"error": str(refusal), **refusal.fields}, refusal.status, code, str(refusal))
        except ConnectionError:
            self.close_connection = True

    def _read(self) -> bytes:
        """The body of the request. Half-way through a large file the connection breaks if `cut_next` asks for it."""
        length = int(self.headers.get("Content-Length") or 0)
        body, half = bytearray(), length // 2
        while len(body) < length:
            end = half if len(body) < half else length
            chunk = self.rfile.read(min(CHUNK, end - len(body)))
            if not chunk:
                raise ConnectionError("the client disconnected")
            body += chunk
            if len(body) == half and self.command == "PUT":
                self.server.on_half()
                if self.server.cut_next > 0:
                    self.server.cut_next -= 1
                    raise ConnectionError("cut_next")
        return bytes(body)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None, error: str = "") -> None:
        all_headers = {"Content-Type": "application/json", **(headers or {})}
        if error:
            all_headers["X-Error-Message"] = error
        self._send(status, json.dumps(value).encode(), all_headers)

    # ---- users and permissions -----------------------------------------------------------------------------------
    def _user(self, required: bool = True) -> str | None:
        """The name of the user with the token of this request."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.server.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if required and not token:
            raise Refusal(401, "Invalid username or password.")
        return self.server.users.get(token)

    def _repo(self, repo_id: str, write: bool = False) -> Repository:
        user, owner = self._user(required=write), repo_id.removeprefix("spaces/").split("/")[0]
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and user != owner):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise Refusal(403, "Authorization error: you have no write access to this repository")
        return repo

    def _commit_of(self, repo: Repository, revision: str) -> str:
        commit = repo.resolve(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def whoami(self) -> None:
        self._json({"type": "user", "name": self._user(), "orgs": []})

    def validate_yaml(self) -> None:
        content, errors = json.loads(self.body)["content"], []
        try:
            yaml.safe_load(content.split("---\n")[1])
        except (IndexError, yaml.YAMLError) as error:
            errors = [{"message": f"the front matter is not valid: {type(error).__name__}"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    # ---- repositories ---------------------------------------------------------------------------------------------
    def create(self) -> None:
        options = json.loads(self.body)
        user = self._user()
        owner = options.get("organization") or user
        if owner != user:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner}")
        is_space = options.get("type") == "space"
        sdk = options.get("sdk")
        if is_space and sdk not in ("gradio", "static"):
            raise Refusal(400, "a Space needs an sdk")
        repo_id = f"{'spaces/' if is_space else ''}{owner}/{options['name']}"
        if repo_id in self.server.repos:
            raise Refusal(409, "You already created this model repo", url=f"{self.server.endpoint}/{repo_id}")
        private = options.get("private") is True or options.get("visibility") == "private"
        self.server.repos[repo_id] = Repository(private)
        own_card = f"---\nsdk: {sdk}\n---\n\nThe Hub's own card".encode()
        first = {"README.md": Blob(own_card, large=False)} if is_space else {}
        if sdk == "static":
            first["index.html"] = Blob(b"The Hub's own page", large=False)
        self.server.repos[repo_id].add_commit("main", "initial commit", first)
        self._json({"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id})

    def info(self, repo_id: str, revision: str = "main") -> None:
        repo = self._repo(repo_id)
        commit = self._commit_of(repo, revision)
        siblings = [{"rfilename": name} for name in repo.commits[commit]]
        self._json({"id": repo_id, "sha": commit, "private": repo.private, "tags": [], "siblings": siblings})

    def refs(self, repo_id: str) -> None:
        repo = self._repo(repo_id)
        by_kind = {
            kind: [
                {"name": name, "ref": f"refs/{place}/{name}", "targetCommit": commit} for name, commit in refs.items()
            ]
            for kind, place, refs in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
        }
        self._json({**by_kind, "converts": [], "pullRequests": []})

    def tree(self, repo_id: str, revision: str, folder: str) -> None:
        repo = self._repo(repo_id)
        files = repo.commits[self._commit_of(repo, revision)]
        files = {name: blob for name, blob in files.items() if not folder or name.startswith(f"{folder}/")}
        if folder and not files:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        self._json([{"type": "file", "path": n, "oid": b.oid, "size": len(b.content)} for n, b in files.items()])

    def create_branch(self, repo_id: str, branch: str) -> None:
        repo = self._repo(repo_id, write=True)
        if branch in repo.branches:
            raise Refusal(409, "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        self._json({})

    def create_tag(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        tag = json.loads(self.body)["tag"]
        if tag in repo.tags:
            raise Refusal(409, "Tag reference exists already")
        repo.tags[tag] = self._commit_of(repo, revision)
        self._json({})

    # ---- committing -----------------------------------------------------------------------------------------------
    def preupload(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write="create_pr" not in self.query)
        existing = repo.commits[self._commit_of(repo, revision)]
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": existing[file["path"]].oid if file["path"] in existing else None,
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }
        )

    def large_batch(self, repo_id: str) -> None:
        self._repo(repo_id)
        objects = []
        for large_file in json.loads(self.body)["objects"]:
            if large_file["oid"] not in self.server.large_files:  # without an action, the client sends nothing
                large_file["actions"] = {"upload": self._upload_action(large_file["oid"], large_file["size"])}
            objects.append(large_file)
        self._json({"transfer": "basic", "objects": objects})

    def _upload_action(self, oid: str, size: int) -> dict[str, Any]:
        address, part = f"{self.server.endpoint}/large/{oid}", self.server.part_bytes
        if part is None:
            return {"href": address}
        addresses = {str(number): f"{address}/{number}" for number in range(1, -(-size // part) + 1)}
        return {"href": f"{address}/complete", "header": {"chunk_size": str(part), **addresses}}

    def large_put(self, oid: str, part: str = "") -> None:
        if part:
            self.server.parts[oid, int(part)] = self.body
        else:
            self._store(oid, self.body)
        self._send(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def large_complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self._store(oid, b"".join(self.server.parts[oid, number] for number in numbers))
        self._json({})

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the sha256 of the content does not match")
        self.server.large_files[oid] = content

    def commit(self, repo_id: str, revision: str) -> None:
        is_pull_request = "create_pr" in self.query
        repo = self._repo(repo_id, write=not is_pull_request)
        files = dict(repo.commits[self._commit_of(repo, revision)])
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.large_files:
                    raise Refusal(400, f"{value['path']}: its content was never uploaded")
                files[value["path"]] = Blob(self.server.large_files[value["oid"]], large=True)
        pull_requests = sum(name.startswith("refs/pr") for name in repo.branches)
        branch = f"refs/pr/{pull_requests + 1}" if is_pull_request else revision
        commit = repo.add_commit(branch, header["value"]["summary"], files)
        address = f"{self.server.endpoint}/{repo_id}"
        request = {"pullRequestUrl": f"{address}/discussions/{branch.split('/')[-1]}"} if is_pull_request else {}
        self._json({"commitUrl": f"{address}/commit/{commit}", "commitOid": commit, **request})

    # ---- loading --------------------------------------------------------------------------------------------------
    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        repo = self._repo(repo_id)
        commit = self._commit_of(repo, revision)
        blob = repo.commits[commit].get(name)
        if blob is None:
            self._json({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, "Entry not found")
            return
        self._send(200, blob.content, {"ETag": f'"{blob.oid}"', "X-Repo-Commit": commit})
