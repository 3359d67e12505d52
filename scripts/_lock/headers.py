"""What the headers of models say of memory and tokenizer: of each file at most 32 MB are read, in ranges.

A header that cannot be read is no failure: whether the presets of that model fit is then not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llama_common.draft import tokenizer_facts
from llama_common.model import Model

from scripts._header import NoHeader, client, read_url

from .hub import Hubs, trust
from .inventory import Requests

Headers = Mapping[str, str]


def resolve_all(
    requests: Requests,
    models: Mapping[str, Mapping[str, Any]],
    hubs: Hubs,
    old: Mapping[str, Mapping[str, Any]],
    progress: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """The lock's entry for each header; the one of `old` where the file is still the same."""
    wanted: dict[str, list[tuple[str, int, str, Headers]]] = {
        name: [(url, size, digest, {}) for url, size, digest in request.files]
        for name, request in requests.headers.items()
    }
    for name, entry in models.items():
        wanted[name] = []
        for file in entry["files"]:
            url, authorization = hubs.download(requests.models[name], entry["commit"], file["file"])
            wanted[name].append((url, file["size"], file["sha256"], authorization))
    found = {}
    with client(trust()) as web:
        for name, files in wanted.items():
            digest = files[0][2]
            if name in old and old[name]["sha256"] == digest and old[name].get("tokenizer"):
                found[name] = dict(old[name])
                continue
            progress(f"reading the header of {name}")
            try:
                headers = [read_url(web, url, size, authorization) for url, size, _, authorization in files]
            except NoHeader as error:
                progress(f"note: {error}: whether presets of {name} fit is not checked")
                continue
            facts = Model.of(headers).facts()
            found[name] = {"sha256": digest, **facts, "tokenizer": tokenizer_facts(headers[0])}
    return found
