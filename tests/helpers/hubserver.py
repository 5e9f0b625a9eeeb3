"""A hub of adapters on loopback, as much of it as `huggingface_hub` asks for: public, private and gated
repositories with revisions, commits over HTTP, a file that breaks off, an answer that takes its time."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_the_token_of_the_tests"


@dataclass
class Repository:
    """Commits by their hash, each with all files by path, and the branches and tags that point to them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        """All files of the branch with these in their places; returns the hash."""
        whole = {**self.commits.get(self.refs.get(branch, ""), {}), **files}
        sha = hashlib.sha1(repr((sorted(whole), message, len(self.commits))).encode()).hexdigest()
        self.commits[sha] = whole
        self.refs[branch] = sha
        self.messages.append(message)
        return sha


class Hub:
    """The server's content, and what it was asked.

    Attributes:
        repositories: by their id.
        asked: method and path of every request.
        broken: paths of files of which only a half is sent.
        slow: paths of files that take this many seconds.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.broken: set[str] = set()
        self.slow: dict[str, float] = {}
        self.url = ""

    def add(
        self, repo_id: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False
    ) -> Repository:
        """A new repository."""
        repository = self.repositories[repo_id] = Repository(private, gated)
        repository.commit(files)
        return repository


class Handler(BaseHTTPRequestHandler):
    """Answers the requests to one hub."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **names}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b'{"error": "no"}', X_Error_Code=code, X_Error_Message=code)

    def data(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode())

    def repository(self, repo_id: str) -> Repository | None:
        """The repository, if the caller may see it; else the answer is given."""
        known = self.hub.repositories.get(repo_id)
        mine = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if known is None or (known.private and not mine):
            self.refuse(404 if mine else 401, "RepoNotFound")
            return None
        return known

    def version(self, repository: Repository, revision: str) -> str | None:
        sha = repository.refs.get(unquote(revision), unquote(revision))
        if sha not in repository.commits:
            self.refuse(404, "RevisionNotFound")
            return None
        return sha

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            self.data({"name": "someone", "type": "user", "orgs": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path):
            self.describe(found[1], found[2], found[3] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(found[1], found[2], unquote(found[3]))
        else:
            self.refuse(404, "EntryNotFound")

    def describe(self, repo_id: str, what: str | None, revision: str) -> None:
        repository = self.repository(repo_id)
        sha = None if repository is None else self.version(repository, revision)
        if repository is None or sha is None:
            return
        files = repository.commits[sha]
        if what == "tree":
            self.data(
                [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in files.items()
                ]
            )
        else:
            siblings = [{"rfilename": name} for name in files]
            self.data(
                {
                    "id": repo_id,
                    "sha": sha,
                    "siblings": siblings,
                    "private": repository.private,
                    "gated": repository.gated,
                }
            )

    def file(self, repo_id: str, revision: str, name: str) -> None:
        repository = self.repository(repo_id)
        sha = None if repository is None else self.version(repository, revision)
        if repository is None or sha is None:
            return
        if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(403, "GatedRepo")
        elif name not in repository.commits[sha]:
            self.refuse(404, "EntryNotFound")
        else:
            content = repository.commits[sha][name]
            time.sleep(self.hub.slow.get(name, 0))
            tag = f'"{hashlib.sha1(content).hexdigest()}"'
            if self.command == "GET" and name in self.hub.broken:
                content = content[: len(content) // 2]
            # clients before huggingface-hub 1.0 go on where a download was cut
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            begin = 0 if wanted is None else int(wanted[1])
            status = 200 if wanted is None else 206
            self.answer(status, content[begin:], "application/octet-stream", ETag=tag, X_Repo_Commit=sha)

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.asked.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(401, "")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            if repo_id in self.hub.repositories:
                self.answer(409, json.dumps({"error": "exists", "url": f"{self.hub.url}/{repo_id}"}).encode())
            else:
                private = bool(asked.get("private")) or asked.get("visibility") == "private"
                self.hub.add(repo_id, {".gitattributes": b""}, private=private)
                self.data({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id})
        elif path == "/api/validate-yaml":
            self.data({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path):
            self.change(found[1], found[2], unquote(found[3]), body)
        else:
            self.refuse(404, "EntryNotFound")

    def change(self, repo_id: str, what: str, branch: str, body: bytes) -> None:
        repository = self.repository(repo_id)
        if repository is None:
            return
        if what == "branch":
            if branch in repository.refs:
                self.answer(409, b'{"error": "exists"}')
            else:
                repository.refs[branch] = repository.refs["main"]
                self.data({})
        elif self.version(repository, branch) is None:
            return
        elif what == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self.data({"files": modes, "commitOid": repository.refs[branch]})
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            summary = next(line["value"]["summary"] for line in lines if line["key"] == "header")
            sha = repository.commit(files, branch, summary)
            self.data(
                {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}
            )


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub, for the length of a ``with`` block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HandlerOfHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
