"""Downloads against a real server that misbehaves, over loopback."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from roles.gguf_models.module_utils.gguf_files import download, store, worker
from roles.gguf_models.module_utils.gguf_files.store import ModelFile, Plan, Refusal
from tests.lab.flaky_server import FlakyServer, Served, running
from tests.support import ROOT

SIZE = 1_000_000
CONTENT, OTHER = (random.Random(seed).randbytes(SIZE) for seed in (1, 2))  # noqa: S311 - test data


@pytest.fixture
def server() -> Iterator[FlakyServer]:
    with running() as flaky:
        yield flaky


def model_file(
    server: FlakyServer, content: bytes = CONTENT, name: str = "a.gguf", **changes: Any
) -> ModelFile:
    fields: dict[str, Any] = {
        "model": "m",
        "name": name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "url": f"{server.url}/{name}",
    }
    return ModelFile(**(fields | changes))


def plan_for(directory: Path, *files: ModelFile, **changes: Any) -> Plan:
    fields: dict[str, Any] = {"directory": str(directory), "files": files, "retries": 2, "stall_timeout": 5.0}
    return Plan(**(fields | changes))


def bring_in(
    plan: Plan, tmp_path: Path, free: int = 10**12, token: str | None = None
) -> dict[str, list[str]]:
    progress = worker.Progress(tmp_path / "progress.json")
    fetcher = download.Fetcher(plan, token, sleep=lambda _: None)
    return worker.bring_in(plan, progress, free=lambda _: free, fetcher=fetcher)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    directory = tmp_path / "models"
    directory.mkdir()
    return directory


def left_over(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()} - {store.LOCK_NAME}


@pytest.mark.parametrize("chunked", [False, True])
def test_a_cut_at_30_and_70_percent_is_resumed(
    server: FlakyServer, models: Path, tmp_path: Path, chunked: bool
) -> None:
    cuts = [SIZE * 3 // 10, SIZE * 7 // 10]
    server.files["/a.gguf"] = Served(CONTENT, cut_at=list(cuts), chunked=chunked)
    plan = plan_for(models, model_file(server))

    assert bring_in(plan, tmp_path) == {"verified": [], "installed": ["a.gguf"], "refusals": []}

    assert (models / "a.gguf").read_bytes() == CONTENT
    assert server.bytes_served["/a.gguf"] == SIZE
    assert [request.range for request in server.requests] == [None, *(f"bytes={cut}-" for cut in cuts)]
    assert server.requests[1].if_range == server.files["/a.gguf"].entity_tag
    assert left_over(models) == {"a.gguf", ".a.gguf.sha256"}
    assert (models / "a.gguf").stat().st_mode & 0o777 == 0o644
    assert [state.state for state in store.inspect(plan)] == ["ok"]


def test_a_second_run_asks_the_server_nothing(server: FlakyServer, models: Path, tmp_path: Path) -> None:
    server.files["/a.gguf"] = Served(CONTENT)
    plan = plan_for(models, model_file(server))
    bring_in(plan, tmp_path)
    assert bring_in(plan, tmp_path) == {"verified": [], "installed": [], "refusals": []}
    assert len(server.requests) == 1


def test_a_server_without_range_is_restarted_from_zero(
    server: FlakyServer, models: Path, tmp_path: Path
) -> None:
    server.files["/a.gguf"] = Served(CONTENT, cut_at=[SIZE // 2], ranges=False)
    assert bring_in(plan_for(models, model_file(server)), tmp_path)["installed"] == ["a.gguf"]
    assert (models / "a.gguf").read_bytes() == CONTENT


def test_a_server_that_always_cuts_at_the_same_byte_is_given_up(
    server: FlakyServer, models: Path, tmp_path: Path
) -> None:
    server.files["/a.gguf"] = Served(CONTENT, cut_at=[SIZE // 2] * 50, ranges=False)
    (line,) = bring_in(plan_for(models, model_file(server)), tmp_path)["refusals"]
    assert "gave up after 3 tries without progress" in line
    assert len(server.requests) == 4  # the first made progress, then retries + 1 without


def test_tries_with_progress_cost_no_retry(server: FlakyServer, models: Path, tmp_path: Path) -> None:
    server.files["/a.gguf"] = Served(CONTENT, cut_at=list(range(SIZE // 10, SIZE, SIZE // 10)))
    assert bring_in(plan_for(models, model_file(server), retries=0), tmp_path)["installed"] == ["a.gguf"]
    assert server.bytes_served["/a.gguf"] == SIZE


def test_a_changed_file_on_the_server_is_not_glued_to_the_old_part(
    server: FlakyServer, models: Path, tmp_path: Path
) -> None:
    server.files["/a.gguf"] = Served(OTHER, cut_at=[SIZE // 2, SIZE // 2, SIZE // 2, SIZE // 2])
    file = model_file(server)
    assert bring_in(plan_for(models, file, retries=0), tmp_path)["refusals"]
    server.files["/a.gguf"] = Served(CONTENT)
    assert bring_in(plan_for(models, file), tmp_path)["installed"] == ["a.gguf"]
    assert (models / "a.gguf").read_bytes() == CONTENT


def test_a_wrong_checksum_replaces_nothing(server: FlakyServer, models: Path, tmp_path: Path) -> None:
    (models / "a.gguf").write_bytes(b"the former model")
    server.files["/a.gguf"] = Served(OTHER)
    server.files["/b.gguf"] = Served(CONTENT)
    plan = plan_for(models, model_file(server), model_file(server, name="b.gguf"))
    result = bring_in(plan, tmp_path)
    (line,) = result["refusals"]
    assert "a.gguf: wrong checksum" in line
    assert hashlib.sha256(CONTENT).hexdigest() in line
    assert hashlib.sha256(OTHER).hexdigest() in line
    assert "fix: " in line
    assert "\n" not in line
    assert (models / "a.gguf").read_bytes() == b"the former model"
    assert result["installed"] == ["b.gguf"], "another file must not suffer"
    assert left_over(models) == {"a.gguf", "b.gguf", ".b.gguf.sha256"}


def test_a_disk_too_small_is_refused_before_the_first_byte(
    server: FlakyServer, models: Path, tmp_path: Path
) -> None:
    names = ["a.gguf", "b.gguf"]
    server.files |= {f"/{name}": Served(CONTENT) for name in names}
    plan = plan_for(models, *(model_file(server, name=name) for name in names), reserve_bytes=1000)
    with pytest.raises(store.DiskFull, match=r"2\.0 MB of models are missing .* too few; fix: "):
        bring_in(plan, tmp_path, free=2 * SIZE + 999)
    assert server.requests == []
    assert bring_in(plan, tmp_path, free=2 * SIZE + 1000)["installed"] == names


def test_what_is_there_of_a_part_is_not_needed_twice(
    server: FlakyServer, models: Path, tmp_path: Path
) -> None:
    server.files["/a.gguf"] = Served(CONTENT, cut_at=[600_000, 600_000])
    plan = plan_for(models, model_file(server), retries=0)
    assert bring_in(plan, tmp_path)["refusals"]
    assert bring_in(plan, tmp_path, free=400_000)["installed"] == ["a.gguf"]
    assert server.bytes_served["/a.gguf"] == SIZE


def test_all_parts_of_a_split_model_are_installed(server: FlakyServer, models: Path, tmp_path: Path) -> None:
    names = [f"big-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    contents = [CONTENT[: 1000 * n] for n in (1, 2, 3)]
    server.files |= {f"/{name}": Served(content) for name, content in zip(names, contents, strict=True)}
    entries = [
        {
            "file": name,
            "url": f"{server.url}/{name}",
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
        }
        for name, content in zip(names, contents, strict=True)
    ]
    files = store.select([{"name": "big", "files": entries}], store.HUB)
    assert bring_in(plan_for(models, *files), tmp_path)["installed"] == names
    (models / names[1]).write_bytes(b"x" * 2000)
    plan = plan_for(models, *files)
    assert [state.state for state in store.inspect(plan)] == ["ok", "unverified", "ok"]
    assert bring_in(plan, tmp_path)["installed"] == [names[1]]


@pytest.mark.parametrize(
    ("served", "text"),
    [
        (
            Served(CONTENT, claimed_length=SIZE + 1),
            "the server's file has 1000001 bytes, the lock says 1000000",
        ),
        (Served(CONTENT[:-1]), "the server's file has 999999 bytes, the lock says 1000000"),
        (Served(CONTENT + b"x", chunked=True), "sends more than the locked 1000000 bytes"),
        (Served(CONTENT, statuses=[404]), "answers HTTP 404; fix: correct gguf_models.m"),
        (Served(CONTENT, statuses=[401]), "answers HTTP 401; fix: accept the model's licence"),
    ],
)
def test_a_lying_or_refusing_server_is_refused_at_once(
    server: FlakyServer, models: Path, tmp_path: Path, served: Served, text: str
) -> None:
    server.files["/a.gguf"] = served
    (line,) = bring_in(plan_for(models, model_file(server)), tmp_path)["refusals"]
    assert text in line
    assert len(server.requests) == 1
    assert not (models / "a.gguf").exists()


def test_a_length_that_differs_is_seen_before_the_body_is_read(
    server: FlakyServer, models: Path, tmp_path: Path
) -> None:
    server.files["/a.gguf"] = Served(CONTENT * 20)
    bring_in(plan_for(models, model_file(server)), tmp_path)
    assert server.bytes_served.get("/a.gguf", 0) < 5 * SIZE  # what fits in the sockets' buffers


def test_busy_answers_are_tried_again(server: FlakyServer, models: Path, tmp_path: Path) -> None:
    server.files["/a.gguf"] = Served(CONTENT, statuses=[503, 429])
    assert bring_in(plan_for(models, model_file(server)), tmp_path)["installed"] == ["a.gguf"]


def test_a_stall_is_given_up_and_resumed(server: FlakyServer, models: Path, tmp_path: Path) -> None:
    server.files["/a.gguf"] = Served(CONTENT, stall_at=[SIZE // 2])
    started = time.monotonic()
    assert bring_in(plan_for(models, model_file(server), stall_timeout=0.3), tmp_path)["installed"] == [
        "a.gguf"
    ]
    assert server.bytes_served["/a.gguf"] == SIZE
    assert time.monotonic() - started < server.files["/a.gguf"].stall_seconds / 2


def test_a_trickle_counts_as_a_stall(
    server: FlakyServer, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SLOWEST_BYTES_PER_S", 10 * SIZE)
    server.files["/a.gguf"] = Served(CONTENT, bytes_per_s=3 * SIZE)
    plan = plan_for(models, model_file(server), stall_timeout=0.1)
    assert bring_in(plan, tmp_path)["installed"] == ["a.gguf"]
    assert len(server.requests) > 1, "nobody gave the slow connection up"


def test_no_server_at_all(models: Path, tmp_path: Path) -> None:
    file = ModelFile("m", "a.gguf", "0" * 64, 10, url="http://127.0.0.1:9/a.gguf")
    (line,) = bring_in(plan_for(models, file), tmp_path)["refusals"]
    assert "no connection (Connection refused)" in line


def test_redirects_are_followed_without_the_token(server: FlakyServer, models: Path, tmp_path: Path) -> None:
    with running() as content_network:
        content_network.files["/blob"] = Served(CONTENT)
        server.files["/a.gguf"] = Served(b"", redirect_to="/renamed")
        server.files["/renamed"] = Served(b"", redirect_to=f"{content_network.url}/blob?X-Signature=s3cret")
        plan = plan_for(models, model_file(server), hf_endpoint=server.url)
        assert bring_in(plan, tmp_path, token="hf_secret")["installed"] == ["a.gguf"]
        assert [request.authorization for request in server.requests] == ["Bearer hf_secret"] * 2
        assert [request.authorization for request in content_network.requests] == [None]


def test_the_token_goes_to_the_hub_only(server: FlakyServer, models: Path, tmp_path: Path) -> None:
    server.files["/a.gguf"] = Served(CONTENT)
    plan = plan_for(models, model_file(server), hf_endpoint="https://hub.example")
    assert bring_in(plan, tmp_path, token="hf_secret")["installed"] == ["a.gguf"]
    assert server.requests[0].authorization is None


def test_a_token_never_leaves_unencrypted(models: Path) -> None:
    with pytest.raises(Refusal, match="unencrypted"):
        download.Fetcher(plan_for(models, hf_endpoint="http://hub.example"), "hf_secret")


@pytest.mark.parametrize("target", ["http://other.example/a", "file:///etc/passwd", "ftp://other.example/a"])
def test_a_redirect_out_of_https_is_refused(target: str) -> None:
    request = urllib.request.Request("https://hub.example/a")
    with pytest.raises(Refusal, match="not followed"):
        download._Redirects().redirect_request(
            request, io.BytesIO(), 302, "Found", http.client.HTTPMessage(), target
        )


def test_secrets_in_a_url_are_in_no_message_and_no_file(
    server: FlakyServer, models: Path, tmp_path: Path
) -> None:
    server.files["/a.gguf"] = Served(CONTENT, cut_at=[SIZE // 2, SIZE // 2])
    file = model_file(server, url=f"{server.url}/a.gguf?token=s3cret")
    (line,) = bring_in(plan_for(models, file, retries=0), tmp_path)["refusals"]
    written = [path.read_bytes() for path in (*models.iterdir(), tmp_path / "progress.json")]
    assert "s3cret" not in line
    assert not any(b"s3cret" in text for text in written)


def test_a_second_run_at_once_is_refused(server: FlakyServer, models: Path, tmp_path: Path) -> None:
    with (
        store.locked(models),
        pytest.raises(Refusal, match=r"another run is writing models there.*fix: wait for it"),
    ):
        bring_in(plan_for(models, model_file(server)), tmp_path)
    assert server.requests == []


def test_after_a_power_failure_only_what_was_synced_is_trusted(
    server: FlakyServer, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/a.gguf"] = Served(CONTENT, cut_at=[500_000, 500_000])
    plan = plan_for(models, model_file(server), retries=0)
    assert bring_in(plan, tmp_path)["refusals"]
    part, note = store.part_path(models, "a.gguf"), store.part_note_path(models, "a.gguf")
    part.write_bytes(part.read_bytes()[:200_000] + bytes(300_000))
    note.write_text(json.dumps({**json.loads(note.read_text()), "synced": 200_000}))
    for module in (store, download):
        monkeypatch.setattr(module, "boot_id", lambda: "after the failure")
    assert bring_in(plan, tmp_path)["installed"] == ["a.gguf"]
    assert server.requests[-1].range == "bytes=200000-"


def test_a_long_download_is_synced_on_the_way(
    server: FlakyServer, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SYNC_BYTES", 200_000)
    synced: list[int] = []
    remember = download.Part._write_note

    def spy(part: download.Part) -> None:
        synced.append(part.synced)
        remember(part)

    monkeypatch.setattr(download.Part, "_write_note", spy)
    server.files["/a.gguf"] = Served(CONTENT, cut_at=[250_000, 500_000])
    assert bring_in(plan_for(models, model_file(server)), tmp_path)["installed"] == ["a.gguf"]
    assert [at for at in sorted(set(synced)) if 200_000 <= at < SIZE]


def test_a_local_file_is_copied_and_verified(models: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    source.write_bytes(CONTENT)
    (tmp_path / "link.gguf").symlink_to(source)
    right = ModelFile(
        "m", "a.gguf", hashlib.sha256(CONTENT).hexdigest(), SIZE, path=str(tmp_path / "link.gguf")
    )
    wrong = ModelFile("m", "b.gguf", hashlib.sha256(OTHER).hexdigest(), SIZE, path=str(source))
    short = ModelFile("m", "c.gguf", hashlib.sha256(OTHER).hexdigest(), SIZE + 1, path=str(source))
    absent = ModelFile("m", "d.gguf", "0" * 64, SIZE, path=str(tmp_path / "absent.gguf"))
    result = bring_in(plan_for(models, right, wrong, short, absent), tmp_path)
    assert result["installed"] == ["a.gguf"]
    assert not (models / "a.gguf").is_symlink()
    assert (models / "a.gguf").stat().st_ino != source.stat().st_ino
    assert [line.partition(":")[0] for line in result["refusals"]] == [
        "b.gguf",
        "gguf_models.m",
        "gguf_models.m",
    ]
    assert "wrong checksum" in result["refusals"][0]
    assert "has 1000000 bytes, the lock says 1000001" in result["refusals"][1]
    assert "cannot be read: No such file" in result["refusals"][2]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_resumes(
    how: signal.Signals, server: FlakyServer, models: Path, tmp_path: Path
) -> None:
    server.files["/a.gguf"] = Served(CONTENT, stall_at=[SIZE // 3])
    plan = plan_for(models, model_file(server), stall_timeout=60.0)
    credentials, runtime = tmp_path / "credentials", tmp_path / "runtime"
    credentials.mkdir()
    runtime.mkdir()
    (credentials / worker.PLAN_CREDENTIAL).write_text(plan.to_json())
    command = [
        sys.executable,
        "-c",
        "import sys; from roles.gguf_models.module_utils.gguf_files.worker import main; sys.exit(main())",
    ]
    env = {**os.environ, "CREDENTIALS_DIRECTORY": str(credentials), "RUNTIME_DIRECTORY": str(runtime)}

    with subprocess.Popen(command, cwd=ROOT, env=env) as first:
        part = store.part_path(models, "a.gguf")
        while not part.exists() or part.stat().st_size < SIZE // 3:
            assert first.poll() is None
            time.sleep(0.01)
        second = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=10, check=False
        )
        assert second.returncode == 1
        assert "another run is writing models there" in second.stderr
        first.send_signal(how)

    assert not (models / "a.gguf").exists()
    synced = json.loads(store.part_note_path(models, "a.gguf").read_text())["synced"]
    assert synced == (SIZE // 3 if how == signal.SIGTERM else 0)
    (runtime / worker.RESULT_NAME).unlink()
    subprocess.run(command, cwd=ROOT, env=env, timeout=10, check=True)
    result = json.loads((runtime / worker.RESULT_NAME).read_text())
    assert result == {"plan": plan.identity, "verified": [], "installed": ["a.gguf"], "refusals": []}
    assert (models / "a.gguf").read_bytes() == CONTENT
    assert server.bytes_served["/a.gguf"] == SIZE
    assert any(request.range for request in server.requests)
