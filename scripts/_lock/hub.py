"""The hub's metadata API: the commit behind a revision, size and SHA-256 of each file. Nothing is downloaded.

GET /api/models/<repo>/revision/<revision>
    {"sha": commit, "gated": false or a word}
GET /api/models/<repo>/tree/<commit>?recursive=true
    [{"type", "path", "size", "lfs": {"oid": sha256, "size"}}, ...], the next page in a Link header
HEAD /<repo>/resolve/<commit>/<file>
    a redirect with X-Repo-Commit, X-Linked-Etag (the SHA-256) and X-Linked-Size
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import ipaddress
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import quote, urljoin, urlsplit

import certifi
import httpx

from . import COMMIT, SHA256, CannotRunError, RefusedError, last_line, refuse
from .inventory import ModelRequest

DEFAULT_ENDPOINT = "https://huggingface.co"
TIMEOUT = httpx.Timeout(30.0, connect=10.0)  # seconds
MAX_REDIRECTS = 5
MAX_PAGES = 100  # of 1000 entries each: no repository of models is that large
TOKEN = re.compile(r"[\x21-\x7e]+")
CHECK_ENDPOINT = "fix: check --hub-endpoint"


@dataclass(frozen=True)
class HubFile:
    """A file of a hub repository; `sha256` is None where the hub names none: it does for LFS files."""

    size: int
    sha256: str | None


def origin_of(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of a URL: what may share a secret."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def is_private(url: str) -> bool:
    """Whether nobody on the way reads what is sent to `url`: https, or this machine itself."""
    parts = urlsplit(url)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def token_from(environment: Mapping[str, str], endpoint: str) -> str | None:
    """HF_TOKEN, if set. Raises CannotRunError where sending it would disclose it."""
    token = environment.get("HF_TOKEN", "").strip()
    if not token:
        return None
    if not TOKEN.fullmatch(token):
        raise CannotRunError(
            "HF_TOKEN holds characters that no token has; fix: set it again, without quotes or spaces"
        )
    if not is_private(endpoint):
        raise CannotRunError(
            f"--hub-endpoint {endpoint}: HF_TOKEN would be readable on the way; fix: use https"
        )
    return token


@functools.cache
def trust() -> ssl.SSLContext:
    """Certificates to check servers against: this machine's too, where a company's own authority stands."""
    context = ssl.create_default_context(cafile=certifi.where())
    context.load_default_certs()
    return context


class Hubs:
    """The hub that the command asks, and those that single models name; use it as a context manager.

    HF_TOKEN belongs to the first alone. Raises CannotRunError where sending it would disclose it.
    """

    def __init__(self, endpoint: str, environment: Mapping[str, str]) -> None:
        self._stack = contextlib.ExitStack()
        self._main = endpoint.rstrip("/")
        self._hubs = {self._main: self._stack.enter_context(Hub(endpoint, token_from(environment, endpoint)))}

    def __enter__(self) -> Hubs:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def notes(self) -> list[str]:
        """What a person should know about what was found, once each."""
        return list(dict.fromkeys(note for hub in self._hubs.values() for note in hub.notes))

    def download(self, request: ModelRequest, commit: str, file: str) -> tuple[str, dict[str, str]]:
        """The URL of a file, and the headers that a request for it carries."""
        hub = self._hubs[request.endpoint or self._main]
        return f"{hub.endpoint}/{request.repo}/resolve/{commit}/{quote(file)}", hub.authorization

    def resolve(self, request: ModelRequest, locked: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The lock's entry for a model, from the hub that it names. Raises RefusedError or CannotRunError."""
        endpoint = request.endpoint or self._main
        if endpoint not in self._hubs:
            self._hubs[endpoint] = self._stack.enter_context(Hub(endpoint))
        return self._hubs[endpoint].resolve(request, locked)


class Hub:
    """One hub, asked through one pool of connections; use it as a context manager."""

    def __init__(self, endpoint: str, token: str | None = None) -> None:
        self.endpoint = endpoint.rstrip("/")
        self.notes: list[str] = []
        self._token = token
        self._client = httpx.Client(timeout=TIMEOUT, follow_redirects=False, verify=trust())
        self._trees: dict[tuple[str, str], dict[str, HubFile]] = {}

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def resolve(self, request: ModelRequest, locked: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The lock's entry for a model; `locked` is the entry so far, kept while its files are the same.

        Raises RefusedError or CannotRunError.
        """
        commit = self._commit(request)
        files = []
        for name in request.files:
            known = self._file(request, commit, name)
            files.append({"file": name, "size": known.size, "sha256": known.sha256})
        entry = {"repo": request.repo, "revision": request.revision, "commit": commit, "files": files}
        # A new text in a repository's README is a new commit, and no reason to change the lock.
        if locked and {**locked, "commit": commit} == entry and self._still_has(request, locked["commit"]):
            return dict(locked)
        return entry

    @property
    def authorization(self) -> dict[str, str]:
        """What shows the token; empty without one."""
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def _still_has(self, request: ModelRequest, commit: str) -> bool:
        """Whether a commit can still be downloaded from: a repository's history can be squashed."""
        try:
            return self._commit(dataclasses.replace(request, revision=commit)) == commit
        except RefusedError:
            return False

    def _commit(self, request: ModelRequest) -> str:
        path = f"/api/models/{request.repo}/revision/{quote(request.revision, safe='')}"
        info = self._decoded(self._ask("GET", path, request), dict)
        commit = info.get("sha")
        asked_commit = COMMIT.fullmatch(request.revision)
        if (
            not isinstance(commit, str)
            or not COMMIT.fullmatch(commit)
            or (asked_commit and commit != request.revision)
        ):
            raise CannotRunError(
                f"{self.endpoint} names no commit for {request.repo} at {request.revision}; {CHECK_ENDPOINT}"
            )
        if info.get("gated"):
            self.notes.append(
                f"{request.repo} is gated: its download needs the HF_TOKEN of an account with access"
            )
        return commit

    def _file(self, request: ModelRequest, commit: str, name: str) -> HubFile:
        key = f"gguf_models.{request.name}.hf.file"
        tree = self._tree(request, commit)
        if name not in tree:
            near = (
                difflib.get_close_matches(name, tree, n=3)
                or [one for one in tree if one.endswith(".gguf")][:3]
            )
            fix = (
                f"did you mean {', '.join(near)}?"
                if near
                else f"{self.endpoint}/{request.repo} lists its files"
            )
            refuse(key, name, f"no such file in {request.repo} at {request.revision}", fix)
        known = tree[name]
        if known.sha256 is None:  # the listing of a mirror may leave it out
            known = self._headers(request, commit, name)
        if known.sha256 is None:
            problem = "not an LFS file: the hub publishes no SHA-256 of it"
            refuse(
                key,
                name,
                problem,
                "replace hf by url, sha256 and size, from a copy that you checked yourself",
            )
        return known

    def _tree(self, request: ModelRequest, commit: str) -> dict[str, HubFile]:
        known = self._trees.get((request.repo, commit))
        if known is not None:
            return known
        files: dict[str, HubFile] = {}
        following: str | None = f"/api/models/{request.repo}/tree/{commit}?recursive=true"
        for _ in range(MAX_PAGES):
            response = self._ask("GET", following, request)
            for entry in self._decoded(response, list):
                if isinstance(entry, Mapping) and entry.get("type") == "file":
                    files[str(entry.get("path"))] = self._described(entry)
            following = response.links.get("next", {}).get("url")
            if not following:
                self._trees[request.repo, commit] = files
                return files
            following = urljoin(str(response.url), following)
        raise CannotRunError(
            f"{request.repo} lists its files on more than {MAX_PAGES} pages; {CHECK_ENDPOINT}"
        )

    def _described(self, entry: Mapping[str, Any]) -> HubFile:
        lfs = entry.get("lfs")
        lfs = lfs if isinstance(lfs, Mapping) else {}
        size = lfs.get("size", entry.get("size"))
        if not isinstance(size, int) or size < 0:
            raise CannotRunError(f"{self.endpoint} lists a file without its size; {CHECK_ENDPOINT}")
        digest = str(lfs.get("oid", ""))
        return HubFile(size, digest if SHA256.fullmatch(digest) else None)

    def _headers(self, request: ModelRequest, commit: str, name: str) -> HubFile:
        headers = self._ask("HEAD", f"/{request.repo}/resolve/{commit}/{quote(name)}", request).headers
        digest, size = headers.get("X-Linked-Etag", "").strip('"'), headers.get("X-Linked-Size", "")
        if headers.get("X-Repo-Commit") != commit or not SHA256.fullmatch(digest) or not size.isdecimal():
            return HubFile(0, None)
        return HubFile(int(size), digest)

    def _decoded(self, response: httpx.Response, kind: type) -> Any:
        try:
            decoded = response.json()
        except ValueError:
            decoded = None
        if not isinstance(decoded, kind):
            raise CannotRunError(f"{self.endpoint} does not speak the hub's API; {CHECK_ENDPOINT}")
        return decoded

    def _ask(self, method: str, target: str | None, request: ModelRequest) -> httpx.Response:
        """One request, its redirects within the hub followed: a renamed repository answers with one.

        A HEAD ends at the redirect that carries the file's headers; it leads to the storage, another host.
        """
        url = (
            urljoin(self.endpoint + "/", target) if target and "://" in target else f"{self.endpoint}{target}"
        )
        for _ in range(MAX_REDIRECTS + 1):
            if origin_of(url) != origin_of(self.endpoint):
                raise CannotRunError(
                    f"{self.endpoint} leads to another host, {urlsplit(url).hostname}; "
                    "fix: name that one with --hub-endpoint if you trust it"
                )
            response = self._send(method, url)
            if not response.has_redirect_location:
                break
            if method == "HEAD" and "X-Linked-Etag" in response.headers:
                return response
            url = urljoin(url, response.headers["Location"])
        else:
            raise CannotRunError(f"{self.endpoint} redirects in a circle; {CHECK_ENDPOINT}")
        if not response.is_success:
            self._explain(response, request)
        return response

    def _send(self, method: str, url: str) -> httpx.Response:
        headers = {"User-Agent": "lock_models", "Accept": "application/json", **self.authorization}
        try:
            return self._client.request(method, url, headers=headers)
        except httpx.TimeoutException:
            raise CannotRunError(
                f"no answer from {self.endpoint} in time; fix: check the network, run this again"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise CannotRunError(
                f"cannot reach {self.endpoint}: {last_line(str(error))}; "
                "fix: check the network, the proxy and --hub-endpoint"
            ) from None

    def _explain(self, response: httpx.Response, request: ModelRequest) -> NoReturn:
        """Turn an error answer into one line. Raises RefusedError or CannotRunError."""
        status, code = response.status_code, response.headers.get("X-Error-Code", "")
        key, repo, page = f"gguf_models.{request.name}.hf", request.repo, f"{self.endpoint}/{request.repo}"
        bad_token = "credentials" in response.headers.get("X-Error-Message", "").lower()
        if status == 401 and self._token and bad_token:
            raise CannotRunError(
                f"{self.endpoint} does not accept HF_TOKEN (401); fix: set a valid one, or unset it"
            )
        if code == "GatedRepo" or status == 403:
            fix = f"accept the terms on {page}, then set HF_TOKEN to a token of that account"
            refuse(f"{key}.repo", repo, f"gated or private ({status})", fix)
        if code == "RevisionNotFound":
            refuse(
                f"{key}.revision",
                request.revision,
                f"no such revision in {repo}",
                f"{page} names its branches",
            )
        if status == 401:  # so it answers for what does not exist, too
            fix = "correct the name; if it is private or gated, set HF_TOKEN to a token with access"
            refuse(f"{key}.repo", repo, f"no public repository of this name on {self.endpoint} (401)", fix)
        if status == 404:
            refuse(
                f"{key}.repo",
                repo,
                f"no such repository on {self.endpoint} (404)",
                "correct the name: owner/name",
            )
        raise CannotRunError(f"{self.endpoint} answered {status} for {repo}; fix: run this again later")
