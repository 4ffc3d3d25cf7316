"""A small Hub on the loopback, for tests: what `huggingface_hub` asks of model repositories, and faults on request.

It knows HTTP, tokens and faults; `hub_repositories` keeps what is stored. The real client talks to it, so that status
codes, headers and JSON are those the client reads. Not here: datasets and Spaces, branches, pull requests, private
repositories, Xet, multi-part uploads, paging, and the redirect of downloads to another host.
"""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_repositories import GIT_ATTRIBUTES, Commit, Repository, StoredFile


TOKEN = "hf_test"
LFS_THRESHOLD = 10 * 1024 * 1024
NO_PAGE = "Sorry, we can't find the page you are looking for."


class Request(NamedTuple):
    """A line of the server's log; the path is decoded and without its query."""

    method: str
    path: str


class HubError(Exception):
    """An error as the Hub answers it: `code` goes into `X-Error-Code`, the message into `X-Error-Message`."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@dataclass
class Answer:
    """What goes back to the client. A HEAD is answered by `length` in place of the body's own."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None


@dataclass
class Call:
    """A request with everything that an endpoint may look at."""

    method: str
    body: bytes
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    user: str | None

    @property
    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("1", "true")


@dataclass
class Fault:
    """Something that goes wrong with the requests it matches, after `skip` of them and `times` times (None: always)."""

    kind: str
    method: str
    path: str
    times: int | None
    skip: int = 0
    answer: HubError | None = None
    after_bytes: int = 0
    change: Callable[[bytes], bytes] | None = None

    def strikes(self, request: Request) -> bool:
        """Whether it happens to this request, which is counted."""
        if self.times == 0 or self.method not in ("*", request.method) or not re.search(self.path, request.path):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


class HubServer:
    """The server, its repositories and its faults.

    ```py
    server = HubServer()
    server.start()                               # server.url is the endpoint
    server.commit("user/base", {"a.txt": b"1"})  # as if someone had pushed
    server.fail(method="GET", path="/resolve/", status=500, times=2)
    ```

    Paths are regular expressions, searched in the decoded path without its query.
    """

    def __init__(self):
        self._lock = threading.RLock()
        self._httpd: _Listener | None = None
        self.environment: dict[str, str] = {}  # of a process that is to talk to this server
        self.reset()

    def start(self) -> None:
        """Listens on a free port of 127.0.0.1, in a thread that does not keep the process alive."""
        self._httpd = _Listener(self)
        threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Listens no longer, and hangs up on those who are still connected."""
        self._httpd.shutdown()
        self._httpd.server_close()
        self._httpd.hang_up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._httpd.server_address[1]}"

    def reset(self) -> None:
        """Forgets repositories, faults, races and the log."""
        with self._lock:
            self._repositories: dict[str, Repository] = {}
            self._faults: list[Fault] = []
            self._races: list[tuple[str, dict[str, bytes | None], str]] = []
            self.requests: list[Request] = []
            self.errors: list[str] = []  # what the server itself did wrong; a test fails over them

    # What tests do to repositories behind the client's back

    def create(self, repo: str) -> None:
        """Makes a repository; nothing happens to one that exists."""
        with self._lock:
            self._repositories.setdefault(repo, Repository(repo))

    def commit(
        self, repo: str, files: Mapping[str, bytes | None], message: str = "Update", *, revision: str = "main"
    ) -> str:
        """Commits `files` over those that are there (None deletes) and returns the commit's hash; makes the repository."""
        with self._lock:
            self.create(repo)
            repository = self._repositories[repo]
            tree = dict(repository.history[repository.branches[revision]].files)
            for path, content in files.items():
                if content is None:
                    del tree[path]
                else:
                    tree[path] = StoredFile(content, _is_lfs(path, len(content), content[:512]))
            return repository.add_commit(revision, tree, message).oid

    def repos(self) -> list[str]:
        with self._lock:
            return sorted(self._repositories)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Path to content, with the `.gitattributes` that every repository starts with."""
        with self._lock:
            commit = self._repositories[repo].find(revision)
            if commit is None:
                raise KeyError(f"{repo} has no revision {revision}")
            return {path: stored.content for path, stored in commit.files.items()}

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """Newest first; the last one is the Hub's own initial commit."""
        with self._lock:
            return self._repositories[repo].log(revision)

    def tags(self, repo: str) -> dict[str, str]:
        """Tag to commit hash."""
        with self._lock:
            return dict(self._repositories[repo].tags)

    # What tests make go wrong

    def fail(
        self,
        *,
        method: str = "*",
        path: str = "",
        status: int = 500,
        times: int | None = 1,
        skip: int = 0,
        headers: Mapping[str, str] | None = None,
        message: str = "Internal Error - We're working hard to fix this as soon as possible!",
        code: str | None = None,
    ) -> None:
        """Answers with an error; nothing of the request is done."""
        self._add(Fault("fail", method, path, times, skip, answer=HubError(status, message, code, headers)))

    def cut(
        self, *, method: str = "GET", path: str = "", after_bytes: int = 0, times: int | None = 1, skip: int = 0
    ) -> None:
        """Drops the connection within the body: a GET's answer, of every other method what the client sends."""
        self._add(Fault("cut", method, path, times, skip, after_bytes=after_bytes))

    def lose_answer(self, *, method: str = "*", path: str = "", times: int | None = 1, skip: int = 0) -> None:
        """Does what is asked and drops the connection before answering, so that the client cannot know."""
        self._add(Fault("lose", method, path, times, skip))

    def corrupt(self, path: str, change: Callable[[bytes], bytes], *, times: int | None = None) -> None:
        """Serves `change(content)` in downloads, under the headers of the true content."""
        self._add(Fault("corrupt", "GET", path, times, change=change))

    def race(self, repo: str, files: Mapping[str, bytes | None], message: str = "Someone else's commit") -> None:
        """Commits `files` just before the next commit request of `repo` is looked at; called twice, before the next two."""
        with self._lock:
            self._races.append((repo, dict(files), message))

    def clear_faults(self) -> None:
        with self._lock:
            self._faults.clear()
            self._races.clear()

    def _add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    # The way of a request

    def arrived(self, request: Request) -> Fault | None:
        """Writes the log and returns the first fault that strikes."""
        with self._lock:
            self.requests.append(request)
            faults = [fault for fault in self._faults if fault.kind != "corrupt"]
            return next((fault for fault in faults if fault.strikes(request)), None)

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Finds the endpoint and runs it, one request at a time."""
        split = urlsplit(target)
        with self._lock:
            try:
                call = Call(method, body, parse_qs(split.query), headers, _authenticate(headers))
                for methods, pattern, endpoint in _ENDPOINTS:
                    match = pattern.fullmatch(split.path)
                    if match and method in methods.split():
                        return endpoint(self, call, *(unquote(part or "") for part in match.groups()))
                raise HubError(404, NO_PAGE)
            except HubError as error:
                return _error_answer(error)

    def _visible(self, call: Call, repo: str) -> Repository:
        repository = self._repositories.get(repo)
        if repository is None:
            # The Hub does not tell strangers that a repository is missing; over https the client reads the same from a
            # bare 401, over http it needs the code.
            if call.user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, call: Call, repo: str) -> Repository:
        repository = self._visible(call, repo)
        _require_user(call)
        return repository

    def _revision(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Account and repositories

    def _create(self, call: Call) -> Answer:
        _require_user(call)
        asked = call.json
        if asked.get("type", "model") != "model":
            raise HubError(400, "This server has model repositories only")
        repo = f"{asked.get('organization') or call.user}/{asked['name']}"
        if repo in self._repositories:
            error = _error_answer(HubError(409, "You already created this model repo"))
            error.body = json.dumps({**json.loads(error.body), "url": f"{self.url}/{repo}"}).encode()
            return error
        self.create(repo)
        return _json({"url": f"{self.url}/{repo}", "name": repo, "id": repo})

    def _info(self, call: Call, repo: str, revision: str = "main") -> Answer:
        repository = self._visible(call, repo)
        info = _model_info(repository, self._revision(repository, revision), blobs=call.flag("blobs"))
        if "expand" in call.query:
            kept = {"_id", "id", "modelId", *call.query["expand"]}
            info = {name: value for name, value in info.items() if name in kept}
        return _json(info)

    # Refs and history

    def _refs(self, call: Call, repo: str) -> Answer:
        repository = self._visible(call, repo)

        def listed(kind: str, refs: Mapping[str, str]) -> list[dict]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        return _json(
            {
                "branches": listed("heads", repository.branches),
                "tags": listed("tags", repository.tags),
                "converts": [],
                "pullRequests": [],
            }
        )

    def _tag(self, call: Call, repo: str, revision: str) -> Answer:
        repository = self._writable(call, repo)
        if call.method == "DELETE":
            if repository.tags.pop(revision, None) is None:
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return Answer()
        commit = self._revision(repository, revision)
        if call.json["tag"] in repository.tags:
            raise HubError(409, f"Tag reference exists already: refs/tags/{call.json['tag']}")
        repository.tags[call.json["tag"]] = commit.oid
        return Answer()

    def _squash(self, call: Call, repo: str, branch: str) -> Answer:
        repository = self._writable(call, repo)
        if branch not in repository.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return _json({"commitId": repository.squash(branch, call.json["message"]).oid})

    # Listing files

    def _tree(self, call: Call, repo: str, revision: str, path: str) -> Answer:
        repository = self._visible(call, repo)
        commit = self._revision(repository, revision)
        entries = _entries(commit)
        inside = f"{path}/" if path else ""
        below = [entry for entry in entries if entry["path"].startswith(inside)]
        if path and not below:
            raise _no_entry(commit, f'{path} does not exist on "{revision}"')
        if not call.flag("recursive"):
            below = [entry for entry in below if "/" not in entry["path"].removeprefix(inside)]
        return _json(below)

    # Downloads

    def _resolve(self, call: Call, repo: str, revision: str, path: str) -> Answer:
        repository = self._visible(call, repo)
        commit = self._revision(repository, revision)
        stored = commit.files.get(path)
        if stored is None:
            raise _no_entry(commit, "Entry not found")
        headers = {"ETag": f'"{stored.etag}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if stored.lfs:
            headers |= {"X-Linked-Etag": f'"{stored.sha256}"', "X-Linked-Size": str(len(stored.content))}
        if call.method == "HEAD":
            return Answer(headers=headers, length=len(stored.content))
        content = stored.content
        for fault in self._faults:
            if fault.kind == "corrupt" and fault.strikes(Request("GET", f"/{repo}/resolve/{revision}/{path}")):
                content = fault.change(content)
        return _ranged(content, call.headers.get("Range"), headers)

    # Uploads

    def _validate_yaml(self, call: Call) -> Answer:
        try:
            metadata = _metadata(call.json["content"])
        except yaml.YAMLError as error:
            return _json({"errors": [{"message": f"YAML Metadata Error: {error}"}], "warnings": []}, status=400)
        bases = metadata.get("base_model") or []
        for base in [bases] if isinstance(bases, str) else bases:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)):
                message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
                return _json({"errors": [{"message": message}], "warnings": []}, status=400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return _json({"errors": [], "warnings": warnings})

    def _preupload(self, call: Call, repo: str, revision: str) -> Answer:
        repository = self._writable(call, repo)
        present = self._revision(repository, revision).files

        def told(asked: dict) -> dict:
            path = asked["path"]
            lfs = _is_lfs(path, asked["size"], base64.b64decode(asked["sample"]))
            told = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            return told | ({"oid": present[path].etag} if path in present else {})

        return _json({"files": [told(asked) for asked in call.json["files"]]})

    def _lfs_batch(self, call: Call, repo: str) -> Answer:
        repository = self._writable(call, repo)
        objects = []
        for asked in call.json["objects"]:
            oid, size = asked["oid"], asked["size"]
            answer = {"oid": oid, "size": size, "authenticated": True}
            if oid not in repository.lfs_objects:
                upload = {"href": f"{self.url}/lfs/{repo}/{oid}", "header": {}}
                verify = {"href": f"{self.url}/{repo}.git/info/lfs/objects/verify", "header": {}}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return _json({"transfer": "basic", "objects": objects, "hash_algo": "sha256"})

    def _lfs_upload(self, call: Call, repo: str, oid: str) -> Answer:
        # No token: as with the Hub's storage, the address is the permission.
        if repo not in self._repositories or hashlib.sha256(call.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the SHA-256 that was announced")
        self._repositories[repo].lfs_objects[oid] = call.body
        return Answer()

    def _lfs_verify(self, call: Call, repo: str) -> Answer:
        content = self._writable(call, repo).lfs_objects.get(call.json["oid"])
        if content is None or len(content) != call.json["size"]:
            raise HubError(404, "Object not found")
        return Answer()

    def _commit(self, call: Call, repo: str, revision: str) -> Answer:
        repository = self._writable(call, repo)
        if call.flag("create_pr"):
            raise HubError(400, "This server has no pull requests")
        if revision not in repository.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        race = next((race for race in self._races if race[0] == repo), None)
        if race is not None:
            self._races.remove(race)
            self.commit(repo, race[1], race[2], revision=revision)
        lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
        header = lines[0]["value"]
        head = repository.branches[revision]
        if not head.startswith(header.get("parentCommit", head)):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repository.history[head].files)
        for line in lines[1:]:
            _apply(repository, tree, line["key"], line["value"])
        commit = repository.add_commit(revision, tree, header["summary"])
        return _json({"success": True, "commitOid": commit.oid, "commitUrl": f"{self.url}/{repo}/commit/{commit.oid}"})


_REPO = r"([^/]+/[^/]+)"
_ENDPOINTS = [
    (methods, re.compile(pattern), endpoint)
    for methods, pattern, endpoint in (
        ("POST", "/api/repos/create", HubServer._create),
        ("POST", "/api/validate-yaml", HubServer._validate_yaml),
        ("GET", f"/api/models/{_REPO}", HubServer._info),
        ("GET", f"/api/models/{_REPO}/revision/([^/]+)", HubServer._info),
        ("GET", f"/api/models/{_REPO}/refs", HubServer._refs),
        ("POST DELETE", f"/api/models/{_REPO}/tag/([^/]+)", HubServer._tag),
        ("POST", f"/api/models/{_REPO}/super-squash/([^/]+)", HubServer._squash),
        ("GET", f"/api/models/{_REPO}/tree/([^/]+)(?:/(.+))?", HubServer._tree),
        ("POST", f"/api/models/{_REPO}/preupload/([^/]+)", HubServer._preupload),
        ("POST", f"/api/models/{_REPO}/commit/([^/]+)", HubServer._commit),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", HubServer._lfs_batch),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", HubServer._lfs_verify),
        ("PUT", f"/lfs/{_REPO}/([0-9a-f]+)", HubServer._lfs_upload),
        ("GET HEAD", f"/{_REPO}/resolve/([^/]+)/(.+)", HubServer._resolve),
    )
]


def _authenticate(headers: Mapping[str, str]) -> str | None:
    given = headers.get("Authorization")
    if given not in (None, f"Bearer {TOKEN}"):
        raise HubError(401, "Invalid credentials in Authorization header")
    return None if given is None else "user"


def _require_user(call: Call) -> None:
    if call.user is None:
        raise HubError(401, "Invalid username or password.")


def _is_lfs(path: str, size: int, sample: bytes) -> bool:
    """As the Hub decides: large files, extensions of `.gitattributes`, and what git takes for binary."""
    extensions = {line.split()[0] for line in GIT_ATTRIBUTES.splitlines()}
    named = any(fnmatch.fnmatch(path.rsplit("/", 1)[-1], extension) for extension in extensions)
    return size > 0 and (named or size > LFS_THRESHOLD or b"\0" in sample)


def _apply(repository: Repository, tree: dict[str, StoredFile], kind: str, value: dict) -> None:
    """One line of a commit request, applied to the tree."""
    path = value["path"]
    if kind == "file":
        tree[path] = StoredFile(base64.b64decode(value["content"]), lfs=False)
    elif kind == "lfsFile":
        if value["oid"] not in repository.lfs_objects:
            message = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
            raise HubError(400, message)
        tree[path] = StoredFile(repository.lfs_objects[value["oid"]], lfs=True)
    elif kind == "deletedFolder":
        inside = [name for name in tree if name.startswith(path.rstrip("/") + "/")]
        if not inside:
            raise HubError(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
        for name in inside:
            del tree[name]
    else:
        raise HubError(400, f"Unknown operation {kind}")


def _metadata(card: str) -> dict:
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---", card, flags=re.DOTALL)
    metadata = yaml.safe_load(block.group(1)) if block else None
    return metadata if isinstance(metadata, dict) else {}


def _model_info(repository: Repository, commit: Commit, *, blobs: bool) -> dict:
    siblings = []
    for path, stored in sorted(commit.files.items()):
        sibling = {"rfilename": path}
        if blobs:
            sibling |= {"size": len(stored.content), "blobId": stored.blob_id}
            if stored.lfs:
                size = {"size": len(stored.content), "pointerSize": len(stored.pointer)}
                sibling["lfs"] = {"sha256": stored.sha256, **size}
        siblings.append(sibling)
    return {
        "_id": hashlib.sha1(repository.repo_id.encode()).hexdigest()[:24],
        "id": repository.repo_id,
        "modelId": repository.repo_id,
        "author": repository.repo_id.split("/")[0],
        "sha": commit.oid,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": siblings,
    }


def _entries(commit: Commit) -> list[dict]:
    """Every folder and file of a tree, sorted by path."""
    entries: dict[str, dict] = {}
    for path, stored in commit.files.items():
        entry = {"type": "file", "oid": stored.blob_id, "size": len(stored.content), "path": path}
        if stored.lfs:
            entry["lfs"] = {"oid": stored.sha256, "size": len(stored.content), "pointerSize": len(stored.pointer)}
        entries[path] = entry
        parts = path.split("/")[:-1]
        for end in range(len(parts)):
            folder = "/".join(parts[: end + 1])
            inside = sorted(
                (name, kept.blob_id) for name, kept in commit.files.items() if name.startswith(folder + "/")
            )
            oid = hashlib.sha1(repr(inside).encode()).hexdigest()  # tells trees apart, but is not git's own
            entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
    return [entries[path] for path in sorted(entries)]


def _no_entry(commit: Commit, message: str) -> HubError:
    # With the commit, so that the client can remember that the file is missing.
    return HubError(404, message, "EntryNotFound", {"X-Repo-Commit": commit.oid})


def _ranged(content: bytes, asked: str | None, headers: dict[str, str]) -> Answer:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
    if match is None:
        return Answer(content, headers=headers)
    start, end = int(match[1]), int(match[2] or len(content) - 1)
    if start >= len(content):
        raise HubError(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
    part = content[start : end + 1]
    return Answer(part, 206, {**headers, "Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"})


def _json(value: object, *, status: int = 200) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json; charset=utf-8"})


def _error_answer(error: HubError) -> Answer:
    answer = _json({"error": str(error)}, status=error.status)
    answer.headers |= error.headers
    return answer


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub: HubServer):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self._connections: set[socket.socket] = set()

    def process_request(self, request, client_address) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address) -> None:
        """Clients may leave when they like: what goes wrong in endpoints is kept by the handler."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def _serve(self) -> None:
        hub = self.server.hub
        request = Request(self.command, unquote(urlsplit(self.path).path))
        fault = hub.arrived(request)
        kind = fault.kind if fault else None
        if kind == "cut" and self.command not in ("GET", "HEAD"):
            self.rfile.read(min(fault.after_bytes, int(self.headers.get("Content-Length", 0))))
            self._hang_up()
            return
        body = self._read_body()
        if kind == "fail":
            answer = _error_answer(fault.answer)
        else:
            try:
                answer = hub.answer(self.command, self.path, self.headers, body)
            except Exception as error:
                hub.errors.append(f"{request.method} {request.path}: {error!r}")
                answer = _error_answer(HubError(500, f"The test server failed: {error!r}"))
        if kind == "lose":
            self._hang_up()
            return
        self._send(answer, after_bytes=fault.after_bytes if kind == "cut" else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer: Answer, *, after_bytes: int | None) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body) if answer.length is None else answer.length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:after_bytes])
        if after_bytes is not None:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args) -> None:
        """The log is `HubServer.requests`."""
