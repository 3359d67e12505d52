"""The hub's side of the lock: commits, sizes, checksums, refusals in one line, and where the token goes."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator

import httpx
import pytest

from scripts._lock import CannotRunError, RefusedError, hub
from scripts._lock.hub import Hub, Hubs
from scripts._lock.inventory import ModelRequest
from tests.local_hub import LocalHub

NAME = "owner/Model-GGUF"
FILES = {
    "model-Q4_K_M.gguf": b"four bits" * 100,
    "sub/model-Q8_0.gguf": b"eight bits" * 300,
    "README.md": b"text",
}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is on this machine, whatever proxy the machine uses."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[LocalHub]:
    with LocalHub() as running:
        yield running


def request(
    *files: str, repo: str = NAME, revision: str = "main", endpoint: str | None = None
) -> ModelRequest:
    return ModelRequest("m", repo, revision, files or ("model-Q4_K_M.gguf",), endpoint)


def resolve(server: LocalHub, asked: ModelRequest, **environment: str) -> dict[str, object]:
    with Hubs(server.url, environment) as hubs:
        return hubs.resolve(asked)


def refusal(server: LocalHub, asked: ModelRequest, **environment: str) -> str:
    """The one line that the request is refused with."""
    with pytest.raises((RefusedError, CannotRunError)) as caught:
        resolve(server, asked, **environment)
    line = str(caught.value)
    assert "\n" not in line and "; fix: " in line
    return line


def test_an_entry_is_the_question_and_the_answer(server: LocalHub) -> None:
    repository = server.add(NAME, FILES)
    content = FILES["model-Q4_K_M.gguf"]
    assert resolve(server, request()) == {
        "repo": NAME,
        "revision": "main",
        "commit": repository.branches["main"],
        "files": [{"file": "model-Q4_K_M.gguf", "size": 900, "sha256": hashlib.sha256(content).hexdigest()}],
    }


def test_the_listing_is_that_of_the_commit_and_not_of_the_branch(server: LocalHub) -> None:
    commit = server.add(NAME, FILES).branches["main"]
    resolve(server, request())
    assert [one.path for one in server.seen] == [
        f"/api/models/{NAME}/revision/main",
        f"/api/models/{NAME}/tree/{commit}?recursive=true",
    ]


def test_parts_keep_their_order_and_folders_are_found(server: LocalHub) -> None:
    server.add(NAME, FILES)
    entry = resolve(server, request("sub/model-Q8_0.gguf", "model-Q4_K_M.gguf"))
    assert [one["file"] for one in entry["files"]] == ["sub/model-Q8_0.gguf", "model-Q4_K_M.gguf"]  # type: ignore[attr-defined]


def test_every_page_of_a_listing_is_read(server: LocalHub) -> None:
    server.page_size = 2
    server.add(NAME, {f"part-{number}.gguf": bytes([number]) * 10 for number in range(9)})
    entry = resolve(server, request("part-8.gguf"))
    assert entry["files"][0]["sha256"] == hashlib.sha256(bytes([8]) * 10).hexdigest()  # type: ignore[index]
    assert sum("/tree/" in one.path for one in server.seen) == 5


def test_a_listing_is_asked_for_once_for_all_models_of_a_repository(server: LocalHub) -> None:
    server.add(NAME, FILES)
    with Hubs(server.url, {}) as hubs:
        hubs.resolve(request())
        hubs.resolve(request("sub/model-Q8_0.gguf"))
    assert sum("/tree/" in one.path for one in server.seen) == 1


def test_a_revision_with_a_slash_is_one_part_of_the_address(server: LocalHub) -> None:
    repository = server.add(NAME, FILES)
    repository.branches["refs/pr/1"] = repository.branches["main"]
    assert resolve(server, request(revision="refs/pr/1"))["commit"] == repository.branches["main"]


def test_a_listing_without_checksums_falls_back_to_the_files_own_headers(server: LocalHub) -> None:
    server.add(NAME, FILES, bare_listing=True)
    content = FILES["sub/model-Q8_0.gguf"]
    entry = resolve(server, request("sub/model-Q8_0.gguf"))
    assert entry["files"] == [
        {"file": "sub/model-Q8_0.gguf", "size": 3000, "sha256": hashlib.sha256(content).hexdigest()}
    ]
    assert server.seen[-1].method == "HEAD"


def test_a_file_outside_lfs_has_no_checksum_and_is_refused(server: LocalHub) -> None:
    server.add(NAME, {"tiny.gguf": b"x"}, plain={"tiny.gguf"})
    line = refusal(server, request("tiny.gguf"))
    assert line.startswith(
        'gguf_models.m.hf.file = "tiny.gguf": not an LFS file: the hub publishes no SHA-256 of it'
    )
    assert "fix: replace hf by url, sha256 and size" in line


def test_a_file_that_is_not_there_is_refused_with_its_likes(server: LocalHub) -> None:
    server.add(NAME, FILES)
    line = refusal(server, request("model-Q4_K_S.gguf"))
    assert f'gguf_models.m.hf.file = "model-Q4_K_S.gguf": no such file in {NAME} at main' in line
    assert line.split("did you mean ")[1].startswith("model-Q4_K_M.gguf")


def test_a_repository_that_is_not_there_or_not_public(server: LocalHub) -> None:
    line = refusal(server, request())
    assert (
        f'gguf_models.m.hf.repo = "{NAME}": no public repository of this name' in line and "HF_TOKEN" in line
    )
    line = refusal(server, request(), HF_TOKEN="hf_good")
    assert f'gguf_models.m.hf.repo = "{NAME}": no such repository on {server.url} (404)' in line


def test_a_revision_that_is_not_there(server: LocalHub) -> None:
    server.add(NAME, FILES)
    assert f'gguf_models.m.hf.revision = "v9": no such revision in {NAME}' in refusal(
        server, request(revision="v9")
    )


def test_a_gated_repository_without_access_is_refused_with_the_token_hint(server: LocalHub) -> None:
    server.add(NAME, FILES, gated="manual", closed=True)
    line = refusal(server, request())
    assert "gated or private (401)" in line
    assert f"fix: accept the terms on {server.url}/{NAME}, then set HF_TOKEN" in line
    assert resolve(server, request(), HF_TOKEN="hf_good")["commit"]


def test_a_gated_repository_with_open_metadata_is_locked_with_a_note(server: LocalHub) -> None:
    server.add(NAME, FILES, gated="auto")
    with Hubs(server.url, {}) as hubs:
        hubs.resolve(request())
        hubs.resolve(request("sub/model-Q8_0.gguf"))
        assert hubs.notes == [f"{NAME} is gated: its download needs the HF_TOKEN of an account with access"]


def test_a_wrong_token_is_named_but_never_shown(server: LocalHub) -> None:
    server.add(NAME, FILES)
    line = refusal(server, request(), HF_TOKEN="hf_wrong")
    assert "does not accept HF_TOKEN (401)" in line and "hf_wrong" not in line


@pytest.mark.parametrize("token", ["hf_a b", "hf_a\nb", "hf_\u00e9"])
def test_a_token_that_is_none_is_not_sent_nor_shown(server: LocalHub, token: str) -> None:
    line = refusal(server, request(), HF_TOKEN=token)
    assert "HF_TOKEN holds characters that no token has" in line and token not in line
    assert server.seen == []


def test_the_token_crosses_no_network_in_the_clear() -> None:
    with pytest.raises(CannotRunError, match="HF_TOKEN would be readable on the way") as caught:
        Hubs("http://hub.example.invalid", {"HF_TOKEN": "hf_secret"})
    assert "hf_secret" not in str(caught.value)


def test_the_token_goes_to_the_hub_and_to_no_other_host(server: LocalHub) -> None:
    with LocalHub() as other:
        server.add(NAME, FILES)
        other.add(NAME, FILES)
        with Hubs(server.url, {"HF_TOKEN": "hf_good"}) as hubs:
            hubs.resolve(request())
            hubs.resolve(request(endpoint=other.url))
        assert {one.authorization for one in server.seen} == {"Bearer hf_good"}
        assert other.seen and {one.authorization for one in other.seen} == {None}


def test_a_redirect_to_another_host_is_refused_and_gets_no_token(server: LocalHub) -> None:
    with LocalHub() as other:
        server.renamed[NAME] = f"{other.url}/api/models/{NAME}"
        line = refusal(server, request(), HF_TOKEN="hf_good")
        assert "leads to another host, 127.0.0.1" in line
        assert other.seen == []


def test_a_next_page_on_another_host_is_refused_and_gets_no_token(server: LocalHub) -> None:
    with LocalHub() as other:
        commit = server.add(NAME, FILES).branches["main"]
        link = {"Link": f'<{other.url}/more>; rel="next"', "Content-Type": "application/json"}
        server.raw[f"/api/models/{NAME}/tree/{commit}"] = (200, link, b"[]")
        assert "leads to another host" in refusal(server, request(), HF_TOKEN="hf_good")
        assert other.seen == []


def test_a_renamed_repository_is_followed(server: LocalHub) -> None:
    commit = server.add("owner/New-GGUF", FILES).branches["main"]
    server.renamed[NAME] = "owner/New-GGUF"
    entry = resolve(server, request())
    assert (entry["repo"], entry["commit"]) == (NAME, commit)  # the question stays as it was asked


def test_a_circle_of_redirects_ends(server: LocalHub) -> None:
    server.renamed[NAME] = NAME
    assert "redirects in a circle" in refusal(server, request())
    assert len(server.seen) == hub.MAX_REDIRECTS + 1


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"sha": "main"}', b"{}"])
def test_a_server_that_is_no_hub_is_one_line(server: LocalHub, body: bytes) -> None:
    server.raw[f"/api/models/{NAME}/revision/main"] = (200, {}, body)
    assert "fix: check --hub-endpoint" in refusal(server, request())


def test_a_pinned_commit_is_never_answered_by_another(server: LocalHub) -> None:
    body = b'{"sha": "' + b"b" * 40 + b'"}'
    server.raw[f"/api/models/{NAME}/revision/{'a' * 40}"] = (200, {}, body)
    assert "names no commit" in refusal(server, request(revision="a" * 40))


def test_a_server_error_is_not_taken_for_an_answer(server: LocalHub) -> None:
    server.raw[f"/api/models/{NAME}/revision/main"] = (503, {}, b"")
    with pytest.raises(CannotRunError, match=f"answered 503 for {NAME}; fix: run this again later"):
        resolve(server, request())


def test_no_server_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with (
        Hub(url) as silent,
        pytest.raises(CannotRunError, match=f"cannot reach {url}: .*; fix: check the network"),
    ):
        silent.resolve(request())


def test_a_server_that_never_answers_ends_at_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TIMEOUT", httpx.Timeout(0.2))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Hub(url) as slow, pytest.raises(CannotRunError, match=f"no answer from {url} in time"):
            slow.resolve(request())
