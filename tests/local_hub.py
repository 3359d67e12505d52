"""A server on this machine that speaks the hub's metadata protocol; its repositories are what a test puts in.

    with LocalHub() as hub:
        hub.add("owner/name", {"model.gguf": b"content"})
        ... hub.url ...

It answers as the hub does: the commit of a revision, a paged listing with sizes and SHA-256, redirects for
files and for renamed repositories, X-Error-Code on refusals, 401 for what an anonymous caller must not know.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, quote, unquote, urlsplit

STORAGE = "https://storage.invalid"  # where the hub keeps large files: another host


@dataclass
class LocalRepository:
    """One repository. `plain` are files that are not in LFS: the hub publishes no SHA-256 of them."""

    files: dict[str, bytes]
    plain: set[str] = field(default_factory=set)
    branches: dict[str, str] = field(default_factory=dict)
    past: set[str] = field(default_factory=set)  # former commits
    gated: str | bool = False
    private: bool = False
    closed: bool = False  # gated so that even the metadata is refused
    bare_listing: bool = False  # a mirror whose listing leaves the checksums out

    def commit(self, revision: str) -> str | None:
        """The commit of a branch, or of itself."""
        known = {*self.branches.values(), *self.past}
        return self.branches.get(revision) or (revision if revision in known else None)

    def change(self, files: dict[str, bytes]) -> str:
        """Make a new commit of `main` that holds `files`. Returns it."""
        self.files = files
        self.past.add(self.branches["main"])
        self.branches["main"] = commit_of(files)
        return self.branches["main"]


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    authorization: str | None


def commit_of(files: dict[str, bytes]) -> str:
    """A commit's name that follows from its content."""
    digest = hashlib.sha1(usedforsecurity=False)
    for name, content in sorted(files.items()):
        digest.update(name.encode() + b"\0" + content + b"\0")
    return digest.hexdigest()


class LocalHub:
    """The server, on a free port of 127.0.0.1; a context manager."""

    def __init__(self, *, page_size: int = 1000) -> None:
        self.repositories: dict[str, LocalRepository] = {}
        self.renamed: dict[str, str] = {}  # old name -> path or URL that it redirects to
        self.seen: list[Seen] = []
        self.token = "hf_good"
        self.page_size = page_size
        self.raw: dict[str, tuple[int, dict[str, str], bytes]] = {}  # path -> an answer of the test's own
        hub = self

        class Handler(_Handler):
            local = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], **settings: object) -> LocalRepository:
        """Put a repository on the hub, its content on the branch `main`."""
        repository = LocalRepository(dict(files), **settings)  # type: ignore[arg-type]
        repository.branches.setdefault("main", commit_of(files))
        self.repositories[name] = repository
        return repository

    def __enter__(self) -> LocalHub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    local: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Say nothing: pytest shows what matters."""

    def _answer(self) -> None:
        hub, parts = self.local, urlsplit(self.path)
        authorization = self.headers.get("Authorization")
        hub.seen.append(Seen(self.command, self.path, authorization))
        if parts.path in hub.raw:
            return self._send(*hub.raw[parts.path])
        if authorization not in (None, f"Bearer {hub.token}"):
            return self._error(401, "", "Invalid credentials in Authorization header")
        words = [unquote(word) for word in parts.path.strip("/").split("/")]
        api = words[:2] == ["api", "models"]
        owner, name, verb, revision, *rest = [*(words[2:] if api else words), "", "", "", ""]
        full = f"{owner}/{name}"
        if full in hub.renamed:
            target = hub.renamed[full]
            location = target if "://" in target else self.path.replace(full, target)
            return self._send(307, {"Location": location}, b"")
        repository = hub.repositories.get(full)
        if repository is None or (repository.private and authorization is None):
            return self._error(401 if authorization is None else 404, "RepoNotFound", "Repository not found")
        if repository.closed and authorization is None:
            return self._error(401, "GatedRepo", f"Access to model {full} is restricted.")
        commit = repository.commit(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if api and verb == "revision":
            return self._json(
                {"id": full, "sha": commit, "gated": repository.gated, "private": repository.private}
            )
        if api and verb == "tree":
            return self._listing(repository, parts.path, parse_qs(parts.query))
        if not api and verb == "resolve":
            return self._resolve(repository, commit, "/".join(rest).rstrip("/"))
        return self._send(404, {}, b"Not Found")

    def _listing(self, repository: LocalRepository, path: str, query: dict[str, list[str]]) -> None:
        entries: list[dict[str, object]] = []
        for folder in sorted({name.rpartition("/")[0] for name in repository.files} - {""}):
            entries.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": folder})
        for name, content in sorted(repository.files.items()):
            entry: dict[str, object] = {"type": "file", "oid": "1" * 40, "size": len(content), "path": name}
            if name not in repository.plain and not repository.bare_listing:
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 135}
                entry["xetHash"] = "2" * 64
            entries.append(entry)
        if query.get("recursive") != ["true"]:
            entries = [entry for entry in entries if "/" not in str(entry["path"])]
        start = int(query.get("cursor", ["0"])[0])
        page, more = entries[start : start + self.local.page_size], start + self.local.page_size
        following = f"{self.local.url}{path}?recursive=true&cursor={more}"
        self._json(page, {"Link": f'<{following}>; rel="next"'} if more < len(entries) else {})

    def _resolve(self, repository: LocalRepository, commit: str, name: str) -> None:
        if name not in repository.files:
            return self._error(404, "EntryNotFound", "Entry not found")
        if repository.gated and self.headers.get("Authorization") is None:
            return self._error(401, "GatedRepo", "Access to this model is restricted.")
        content = repository.files[name]
        if name in repository.plain:
            return self._send(200, {"X-Repo-Commit": commit, "ETag": f'"{"1" * 40}"'}, content)
        digest = hashlib.sha256(content).hexdigest()
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
        }
        return self._send(302, {**headers, "Location": f"{STORAGE}/{quote(name)}"}, b"")

    def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(200, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, headers, json.dumps({"error": message}).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
