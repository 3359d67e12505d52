"""What an inventory asks of its lock: builds with a `ref`, models with `hf`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llama_common.presets import Build, HubSource
from pydantic import BaseModel, ValidationError

from . import CannotRunError, RefusedError, last_line, refuse, run, without_token

GROUP = "llama_hosts"
TIMEOUT_S = 120.0

Form = TypeVar("Form", bound=BaseModel)


@dataclass(frozen=True)
class BuildRequest:
    """A build that follows a tag or a branch."""

    name: str
    repo: str
    ref: str


@dataclass(frozen=True)
class ModelRequest:
    """A model on the hub; `files` in the inventory's order: the first is what gets loaded.

    `endpoint` is None for the hub that the command asks, or the address that the inventory names.
    """

    name: str
    repo: str
    revision: str
    files: tuple[str, ...]
    endpoint: str | None = None


@dataclass(frozen=True)
class HeaderRequest:
    """A model that is downloaded from URLs of its own: (URL, bytes, SHA-256) of each file, in order."""

    name: str
    files: tuple[tuple[str, int, str], ...]


@dataclass
class Requests:
    """Everything that the lock must answer, by name."""

    builds: dict[str, BuildRequest] = field(default_factory=dict)
    models: dict[str, ModelRequest] = field(default_factory=dict)
    headers: dict[str, HeaderRequest] = field(default_factory=dict)


def _mapping(key: str, value: object) -> Mapping[str, Any]:
    if isinstance(value, str) and "{{" in value:
        refuse(key, value, "a template, which the lock cannot see through", "write the entries out")
    if not isinstance(value, Mapping):
        refuse(key, value, "not a mapping of names to values", "correct it")
    return value


def _checked(key: str, data: Mapping[str, Any], form: type[Form]) -> Form:
    """`data` as the data model has it. Raises RefusedError for the first thing that it does not allow."""
    for name, value in data.items():
        if "{{" in str(value):
            refuse(
                f"{key}.{name}",
                value,
                "a template, and the lock holds the question itself",
                "write the value",
            )
    try:
        return form.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join([key, *(str(part) for part in first["loc"][:1])])
        refuse(place, first["input"], first["msg"], str(first.get("ctx", {}).get("fix", "correct it")))


def build_request(name: str, entry: object) -> BuildRequest | None:
    """What an entry of llama_cpp_builds asks: nothing when it names a commit itself. Raises RefusedError."""
    key = f"llama_cpp_builds.{name}"
    data = _mapping(key, entry)
    if data.get("commit") is not None:
        return None
    # CMake options may be templates: the lock is about the source alone.
    build = _checked(key, {field: data[field] for field in ("repo", "ref") if field in data}, Build)
    if build.ref is None:
        refuse(f"{key}.ref", None, "neither ref nor commit", "write ref: and a tag or branch")
    return BuildRequest(name, build.repo, build.ref)


def model_request(name: str, entry: object) -> ModelRequest | None:
    """What an entry of gguf_models asks: nothing when it is not on the hub. Raises RefusedError."""
    key = f"gguf_models.{name}"
    data = _mapping(key, entry)
    if data.get("hf") is None:
        return None
    source = _checked(f"{key}.hf", _mapping(f"{key}.hf", data["hf"]), HubSource)
    if not source.files or len(set(source.files)) != len(source.files):
        refuse(f"{key}.hf.file", source.files, "no file, or one twice", "name each part once, in order")
    endpoint = source.endpoint if "endpoint" in source.model_fields_set else None
    return ModelRequest(name, source.repo, source.revision, tuple(source.files), endpoint)


def header_request(name: str, entry: object) -> HeaderRequest | None:
    """The files of a model with URLs of its own; nothing where one is missing or a template."""
    data = entry if isinstance(entry, Mapping) else {}
    files = []
    for part in data.get("files") or [data]:
        url, size, digest = (
            part.get(key) if isinstance(part, Mapping) else None for key in ("url", "size", "sha256")
        )
        if (
            not isinstance(url, str)
            or not isinstance(size, int)
            or not isinstance(digest, str)
            or "{{" in url
        ):
            return None
        files.append((url, size, digest))
    return HeaderRequest(name, tuple(files))


def requests_of(hostvars: Mapping[str, Mapping[str, Any]], hosts: Iterable[str]) -> Requests:
    """What the variables of `hosts` ask together.

    Raises RefusedError, also where two hosts mean different things by one name: a lock has one entry a name.
    """
    found = Requests()
    origin: dict[tuple[str, str], str] = {}

    def add(variable: str, host: str, into: dict[str, Any], request: Any) -> None:
        if request is None:
            return
        known = into.setdefault(request.name, request)
        first = origin.setdefault((variable, request.name), host)
        if known != request:
            problem = (
                f"{first} and {host} mean different things by this name, and the lock has one entry a name"
            )
            refuse(variable, request.name, problem, "give one of them another name")

    for host in sorted(hosts):
        variables = hostvars.get(host, {})
        for name, entry in _mapping("llama_cpp_builds", variables.get("llama_cpp_builds") or {}).items():
            add("llama_cpp_builds", host, found.builds, build_request(name, entry))
        for name, entry in _mapping("gguf_models", variables.get("gguf_models") or {}).items():
            add("gguf_models", host, found.models, model_request(name, entry))
            add("gguf_models", host, found.headers, header_request(name, entry))
    return found


def group_hosts(listing: Mapping[str, Any], group: str) -> set[str]:
    """Hosts of a group and of its children, in what `ansible-inventory --list` prints."""
    entry = listing.get(group, {})
    return set(entry.get("hosts", [])).union(
        *(group_hosts(listing, child) for child in entry.get("children", []))
    )


def read(inventory: Path) -> Requests:
    """Ask ansible-inventory, which honours group_vars and inventory programs; no host is contacted.

    Raises CannotRunError when the inventory cannot be read, RefusedError when what it asks cannot be locked.
    """
    where = f"--inventory {inventory}"
    if not inventory.exists():
        raise CannotRunError(f"{where}: no such file or directory; fix: name the inventory's folder")
    beside = Path(sys.executable).parent / "ansible-inventory"
    program = str(beside) if beside.exists() else shutil.which("ansible-inventory")
    if program is None:
        raise CannotRunError("ansible-inventory is not installed; fix: make setup")
    environment = {
        **without_token(),
        "ANSIBLE_CONFIG": "ansible.cfg",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED": "1",
    }
    code, output, errors = run(
        [program, "--inventory", str(inventory.resolve()), "--list"], TIMEOUT_S, environment
    )
    if code != 0:
        said = [line for line in errors.splitlines() if "ERROR" in line] or [errors]
        raise CannotRunError(
            f"{where}: {last_line(said[0])}; fix: .venv/bin/ansible-inventory -i {inventory} --list says more"
        )
    listing = json.loads(output)
    hosts = group_hosts(listing, GROUP)
    if not hosts:
        raise CannotRunError(
            f"{where}: no host in the group {GROUP}; fix: put the boxes into {GROUP} or its children"
        )
    try:
        return requests_of(listing["_meta"]["hostvars"], hosts)
    except RefusedError as error:
        raise RefusedError(f"{inventory}: {error}") from None
