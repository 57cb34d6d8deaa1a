"""A small Hugging Face Hub on localhost: the part of its HTTP API that loading models and streaming data sets uses, and,
with fake_hub_uploads.py, what publishing a model uses.

The real clients (huggingface_hub, transformers, datasets) are pointed at it with HF_ENDPOINT, which they read when they
are imported; so whatever uses it runs in a process of its own that imports them (`run_client`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from command_line import ROOT, fork_code
from fake_hub_uploads import Account, Refused, Uploads


@dataclass
class FakeRepo:
    """A repository: its files by branch, its older commits, its tags, and who may see it."""

    kind: str  # "models" or "datasets"
    name: str
    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    history: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files by commit, of commits that were replaced

    def commit(self, revision: str) -> str:
        return hashlib.sha1(f"{self.kind}/{self.name}@{revision}#{len(self.history)}".encode()).hexdigest()

    def advance(self, branch: str, files: dict[str, bytes]) -> str:
        """Make a new commit of these files; its hash."""
        self.history[self.commit(branch)] = self.revisions[branch]
        self.revisions[branch] = files
        return self.commit(branch)

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) of a branch name, a tag or a commit hash."""
        revision = self.tags.get(revision, revision)
        for branch, files in self.revisions.items():
            if revision in (branch, self.commit(branch)):
                return self.commit(branch), files
        return (revision, self.history[revision]) if revision in self.history else None


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of a folder by their path with forward slashes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


class FakeHub:
    """A context manager; `endpoint` is what HF_ENDPOINT has to be, `requests` are (method, path, bytes sent)."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], FakeRepo] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.cut_path: str | None = None  # requests for this path get no answer: the connection is closed
        self.cuts: dict[str, int] = {}  # by part of a path: how many requests lose their connection in mid-body
        self.lost_answers: dict[str, int] = {}  # the same, but what was asked is done and only the answer is lost
        self.ignored: set[str] = set()  # paths that a .gitignore in every repository leaves out of commits
        self.uploads = Uploads(self)
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def add(
        self, kind: str, name: str, files: dict[str, bytes], *, revision: str = "main", gated: bool = False
    ) -> FakeRepo:
        repo = self.repos.setdefault((kind, name), FakeRepo(kind, name))
        repo.revisions[revision] = files
        repo.gated = gated
        return repo

    def add_account(self, token: str, name: str, **details: Any) -> Account:
        """Somebody who may publish with this token."""
        self.uploads.accounts[token] = Account(name, **details)
        return self.uploads.accounts[token]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FakeHub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _answer(self) -> None:
        hub = self.owner
        if cut := next((part for part, times in hub.cuts.items() if times > 0 and part in self.path), None):
            hub.cuts[cut] -= 1
            self._body(share=0.5)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self._body()
        if hub.cut_path is not None and hub.cut_path in self.path:
            self.close_connection = True
            return
        path = unquote(urlsplit(self.path).path).strip("/")
        try:
            written = hub.uploads.answer(self.command, path, body, self.headers.get("Authorization", ""))
        except Refused as refused:
            self._error(refused.status, refused.code, refused.message, body=refused.body)
            return
        if lost := next((part for part, times in hub.lost_answers.items() if times > 0 and part in self.path), None):
            hub.lost_answers[lost] -= 1
            self.close_connection = True
            return
        if written is not None:
            self._json(written)
            return
        if match := re.fullmatch(
            r"api/(models|datasets)/([^/]+/[^/]+|[^/]+)/(revision|tree|paths-info|auth-check)(?:/(.+))?", path
        ):
            self._api(match[1], match[2], match[3], match[4] or "", body)
        elif match := re.fullmatch(r"api/(models|datasets)/([^/]+/[^/]+|[^/]+)", path):
            self._api(match[1], match[2], "revision", "main", body)
        elif match := re.fullmatch(r"(?:(datasets)/)?((?:[^/]+/)?[^/]+)/resolve/(.+)", path):
            self._resolve(match[1] or "models", match[2], match[3])
        else:
            self._error(404, "RepoNotFound", "nothing here")

    def _body(self, share: float = 1.0) -> bytes:
        """The request's body, or the first part of it."""
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(share * int(self.headers.get("Content-Length") or 0)))
        chunks: list[bytes] = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
            if share < 1:
                return chunks[0]
        self.rfile.readline()
        return b"".join(chunks)

    def _readable(self, kind: str, name: str) -> FakeRepo | None:
        """The repository; a private one only for a token whose account may write to it."""
        repo = self.owner.repos.get((kind, name))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        account = self.owner.uploads.accounts.get(token)
        hidden = repo is not None and repo.private and not (account is not None and account.may_write(name))
        return None if hidden else repo

    def _api(self, kind: str, name: str, what: str, rest: str, body: bytes) -> None:
        repo = self._readable(kind, name)
        if repo is None:
            self._error(404, "RepoNotFound", "Repository not found")
            return
        if what == "auth-check":
            self._error(401, "GatedRepo", f"Access to {name} is restricted") if repo.gated else self._json({})
            return
        revision, _, below = self._split_revision(repo, rest)
        found = repo.files(revision)
        if found is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        commit, files = found
        if what == "revision":
            siblings = [{"rfilename": file} for file in files]
            self._json(
                {
                    "id": name,
                    "sha": commit,
                    "siblings": siblings,
                    "gated": "auto" if repo.gated else False,
                    "private": repo.private,
                }
            )
        elif what == "tree":
            recursive = "recursive=true" in self.path.lower()
            entries = self._entries(files, below, recursive)
            if entries:
                self._json(entries)
            else:
                self._error(404, "EntryNotFound", f"{below} does not exist")
        else:
            wanted = (
                json.loads(body)["paths"]
                if body.startswith(b"{")
                else re.findall(r"paths=([^&]+)", unquote(body.decode()))
            )
            self._json(
                [
                    entry
                    for path in wanted
                    for entry in self._entries(files, path.rpartition("/")[0], False)
                    if entry["path"] == path
                ]
            )

    @staticmethod
    def _split_revision(repo: FakeRepo, rest: str) -> tuple[str, str, str]:
        """Branch names may hold slashes: (revision, "/", path below it)."""
        for revision in sorted([*repo.revisions, *repo.tags], key=len, reverse=True):
            if rest == revision or rest.startswith(revision + "/"):
                return revision, "/", rest[len(revision) + 1 :]
        return rest.partition("/")

    @staticmethod
    def _entries(files: dict[str, bytes], below: str, recursive: bool) -> list[dict[str, Any]]:
        prefix = below + "/" if below else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, data in files.items():
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                folder = prefix + "/".join(parts[:depth])
                if recursive or depth == 1:
                    entries[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
            if recursive or len(parts) == 1:
                entries[path] = {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": path}
        return list(entries.values())

    def _resolve(self, kind: str, name: str, rest: str) -> None:
        repo = self._readable(kind, name)
        if repo is None:
            self._error(404, "RepoNotFound", "Repository not found")
            return
        revision, _, path = self._split_revision(repo, rest)
        found = repo.files(revision)
        if found is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        commit, files = found
        if repo.gated:
            self._error(401, "GatedRepo", f"Access to {kind} {name} is restricted", commit)
        elif path not in files:
            self._error(404, "EntryNotFound", "Entry not found", commit)
        else:
            self._file(files[path], commit)

    def _file(self, data: bytes, commit: str) -> None:
        start, end = 0, len(data)
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked and (asked[1] or asked[2]):
            start = int(asked[1]) if asked[1] else max(0, len(data) - int(asked[2]))
            end = min(len(data), int(asked[2]) + 1) if asked[1] and asked[2] else len(data)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self._send(data[start:end], "application/octet-stream")

    def _json(self, value: Any) -> None:
        self.send_response(200)
        self._send(json.dumps(value).encode(), "application/json")

    def _error(self, status: int, code: str, message: str, commit: str | None = None, body: Any = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        self._send(json.dumps({"error": message} if body is None else body).encode(), "application/json")

    def _send(self, data: bytes, content_type: str) -> None:
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        head = self.command == "HEAD"
        self.owner.requests.append((self.command, self.path, 0 if head else len(data)))
        if not head:
            self.wfile.write(data)


def run_client(
    code: str, endpoint: str, home: Path, *, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own whose Hub is `endpoint` and whose Hub cache lies under `home`."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    clean |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}
    clean |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NO_PROXY": "127.0.0.1", **environment}
    return fork_code(code, cwd=home, environment=clean, timeout=timeout)
