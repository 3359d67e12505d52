"""The models directory: names, stamps, unused files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from roles.gguf_models.module_utils.gguf_files import store, worker
from roles.gguf_models.module_utils.gguf_files.store import ModelFile, Plan, Refusal

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def local(name: str = "a.gguf", **changes: Any) -> ModelFile:
    fields: dict[str, Any] = {
        "model": "m",
        "name": name,
        "sha256": SHA256,
        "size": len(CONTENT),
        "path": "/nowhere.gguf",
    }
    return ModelFile(**(fields | changes))


def verified(directory: Path, name: str = "a.gguf") -> Plan:
    """A directory with one verified file."""
    (directory / name).write_bytes(CONTENT)
    plan = Plan(str(directory), (local(name),))
    assert worker.bring_in(plan, worker.Progress(directory / "progress.json"))["verified"] == [name]
    return plan


def state(plan: Plan) -> str:
    (only,) = store.inspect(plan)
    return only.state


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../a.gguf"},
        {"name": "a/b.gguf"},
        {"name": "/etc/a.gguf"},
        {"name": ".a.gguf"},
        {"name": "a.bin"},
        {"name": "a\n.gguf"},
        {"name": "a.gguf\n"},
        {"name": ""},
        {"name": "x" * 300 + ".gguf"},
        {"sha256": "0" * 63},
        {"sha256": "G" * 64},
        {"size": 0},
        {"size": -1},
        {"size": True},
        {"path": "relative.gguf"},
        {"path": None},
        {"url": "http://x/a.gguf"},
        {"path": None, "url": "file:///etc/passwd"},
        {"path": None, "url": "ftp://x/a.gguf"},
    ],
)
def test_a_bad_file_is_refused_in_one_line(changes: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as refused:
        local(**changes)
    assert "gguf_models.m" in str(refused.value)
    assert "fix: " in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_mirror_takes_the_place_of_the_hub_and_of_nothing_else() -> None:
    entry = {"file": "a.gguf", "path": None, "sha256": SHA256, "size": 5}
    urls = {
        "https://huggingface.co/o/r/resolve/main/a.gguf": "https://mirror.example/o/r/resolve/main/a.gguf",
        "https://huggingface.co.evil.example/a.gguf": "https://huggingface.co.evil.example/a.gguf",
    }
    for url, expected in urls.items():
        models = [{"name": "one", "files": [{**entry, "url": url}]}]
        (file,) = store.select(models, "https://mirror.example/")
        assert file.url == expected


def test_two_models_cannot_fight_over_a_file() -> None:
    entry = {"file": "a.gguf", "url": "https://x/a.gguf", "sha256": SHA256, "size": 5}
    same = [{"name": "one", "files": [entry]}, {"name": "two", "files": [entry]}]
    assert len(store.select(same, store.HUB)) == 1
    with pytest.raises(Refusal, match=r"one and two both install a\.gguf"):
        store.select([same[0], {"name": "two", "files": [{**entry, "sha256": "0" * 64}]}], store.HUB)


def test_a_verified_file_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = verified(tmp_path)
    monkeypatch.setattr(worker, "hash_file", lambda *_: pytest.fail("hashed again"))
    assert worker.bring_in(plan, worker.Progress(tmp_path / "progress.json"))["verified"] == []


def test_any_change_of_the_content_is_seen(tmp_path: Path) -> None:
    plan = verified(tmp_path)
    path = tmp_path / "a.gguf"
    before = path.stat()
    with path.open("r+b") as stream:
        stream.write(b"W")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size, mtime and inode: ctime tells
    assert state(plan) == store.UNVERIFIED
    path.write_bytes(CONTENT + b"x")
    assert state(plan) == store.WRONG


def test_a_replaced_file_is_seen(tmp_path: Path) -> None:
    plan = verified(tmp_path)
    (tmp_path / "new").write_bytes(CONTENT)
    (tmp_path / "new").replace(tmp_path / "a.gguf")
    assert state(plan) == store.UNVERIFIED


def test_full_verification_trusts_no_stamp(tmp_path: Path) -> None:
    plan = verified(tmp_path)
    assert state(plan) == store.OK
    full = Plan(plan.directory, plan.files, verify="full")
    assert state(full) == store.UNVERIFIED
    assert worker.bring_in(full, worker.Progress(tmp_path / "progress.json"))["verified"] == ["a.gguf"]


def test_another_locked_checksum_needs_no_hash_to_be_seen(tmp_path: Path) -> None:
    verified(tmp_path)
    assert state(Plan(str(tmp_path), (local(sha256="0" * 64),))) == store.WRONG


@pytest.mark.parametrize("name", ["size", "mtime_ns", "ctime_ns", "inode"])
def test_every_figure_of_the_stamp_counts(tmp_path: Path, name: str) -> None:
    plan = verified(tmp_path)
    stamp = json.loads(store.stamp_path(tmp_path, "a.gguf").read_text())
    assert stamp[name] == getattr((tmp_path / "a.gguf").stat(), {"inode": "st_ino"}.get(name, f"st_{name}"))
    store.stamp_path(tmp_path, "a.gguf").write_text(json.dumps({**stamp, name: stamp[name] + 1}))
    assert state(plan) == store.UNVERIFIED


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"sha256": 5}', "x" * 10_000])
def test_a_broken_stamp_is_no_stamp(tmp_path: Path, text: str) -> None:
    plan = verified(tmp_path)
    store.stamp_path(tmp_path, "a.gguf").write_text(text)
    assert state(plan) == store.UNVERIFIED


def test_a_symlink_in_the_place_of_a_model_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(CONTENT)
    (tmp_path / "a.gguf").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refusal, match="is a symlink, it is left alone; fix: "):
        store.inspect(Plan(str(tmp_path), (local(),)))


def test_a_mode_is_mended_without_another_hash(tmp_path: Path) -> None:
    plan = verified(tmp_path)
    (tmp_path / "a.gguf").chmod(0o600)
    store.stamp_path(tmp_path, "a.gguf").write_text(
        json.dumps(store.stamp_of((tmp_path / "a.gguf").stat(), SHA256))
    )
    assert store.inspect(plan)[0].mode_differs
    store.set_mode(tmp_path, "a.gguf")
    assert store.inspect(plan) == [store.FileState("a.gguf", store.OK)]


def test_only_models_and_what_belongs_to_them_are_removed(tmp_path: Path) -> None:
    plan = verified(tmp_path)
    outside = tmp_path.parent / f"{tmp_path.name}-outside.gguf"
    outside.write_bytes(b"not ours")
    for name in (
        "old.gguf",
        ".old.gguf.sha256",
        ".gone.gguf.part",
        ".gone.gguf.part.json",
        "notes.txt",
        "x.gguf.bak",
        ".hidden",
        "mmproj.bin",
    ):
        (tmp_path / name).write_bytes(b"12345")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "folder.gguf" / "inner.gguf").write_bytes(b"12345")
    (tmp_path / "link.gguf").symlink_to(outside)
    kept = {
        "a.gguf",
        ".a.gguf.sha256",
        "notes.txt",
        "x.gguf.bak",
        ".hidden",
        "mmproj.bin",
        "folder.gguf",
        "link.gguf",
        store.LOCK_NAME,
        "progress.json",
    }

    found = store.unused_files(tmp_path, plan.names)
    assert {(unused.name, unused.size) for unused in found} == {("old.gguf", 5), ("gone.gguf", 5)}
    assert store.remove_unused(tmp_path, plan.names) == found
    assert {entry.name for entry in tmp_path.iterdir()} == kept
    assert outside.exists()
    assert (tmp_path / "folder.gguf" / "inner.gguf").exists()


def test_a_part_of_another_content_is_not_used(tmp_path: Path) -> None:
    store.part_path(tmp_path, "a.gguf").write_bytes(b"123")
    assert store.usable_part(tmp_path, local()) == 0
    note = {"sha256": SHA256, "boot": store.boot_id(), "synced": 0}
    store.write_json(store.part_note_path(tmp_path, "a.gguf"), note)
    assert store.usable_part(tmp_path, local()) == 3
    assert store.usable_part(tmp_path, local(sha256="0" * 64)) == 0


def test_the_plan_survives_its_journey() -> None:
    plan = Plan(
        "/models",
        (local(), local("b.gguf", path=None, url="https://x/b.gguf")),
        reserve_bytes=7,
        verify="full",
    )
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).identity == plan.identity


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_that_root_copied_are_adopted(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(CONTENT)
    with pytest.raises(Refusal, match="belongs to user 0, not to the models' owner"):
        store.adopt(tmp_path, frozenset({"a.gguf"}), 1234, 1234)
    os.chown(tmp_path, 1234, 1234)
    (tmp_path / "other.gguf").write_bytes(CONTENT)
    assert store.adopt(tmp_path, frozenset({"a.gguf"}), 1234, 1234) == ["a.gguf"]
    assert (tmp_path / "a.gguf").stat().st_uid == 1234
    assert (tmp_path / "other.gguf").stat().st_uid == 0
    os.link(tmp_path / "other.gguf", tmp_path / "b.gguf")
    with pytest.raises(Refusal, match="other hard links"):
        store.adopt(tmp_path, frozenset({"b.gguf"}), 1234, 1234)


def test_a_source_in_the_models_directory_is_found_by_every_way_to_it(tmp_path: Path) -> None:
    models, link = tmp_path / "models", tmp_path / "link"
    models.mkdir()
    link.symlink_to(models)
    (tmp_path / "alias.gguf").symlink_to(models / "target.gguf")
    (models / "inside.gguf").symlink_to(tmp_path / "elsewhere.gguf")
    ways = [
        str(models / "plain.gguf"),
        str(models / "../models" / "dots.gguf"),
        str(link / "linked.gguf"),
        str(tmp_path / "alias.gguf"),
        str(models / "inside.gguf"),
        str(tmp_path / "elsewhere.gguf"),
    ]
    names = {"plain.gguf", "dots.gguf", "linked.gguf", "target.gguf", "inside.gguf"}
    assert store.names_of(models, ways) == names
    assert store.names_of(link, ways) == names
