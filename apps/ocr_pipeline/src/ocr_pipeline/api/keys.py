"""`keys.json`: who may use the service, by the SHA-256 of each key, as the role ocr_service renders it.

The key itself is kept nowhere: it has 256 random bits (`ocr-key new NAME`), so a slow hash would protect
nothing and delay every request. Without a key in the file only the machine itself is let in.
"""

from __future__ import annotations

import argparse
import hashlib
import ipaddress
import json
import re
import secrets
import sys
import threading
from collections.abc import Mapping
from hmac import compare_digest
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ocr_pipeline.api.errors import Refusal

PREFIX = "ocr-"  # by which a person, or a scanner for secrets, knows what it is
NAME = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"
LOCAL = "local"  # who comes from the machine itself while there are no keys
MAX_KEY = 512


class Key(BaseModel):
    """An entry of the keys file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    name: Annotated[str, Field(pattern=NAME)]
    sha256: str = Field(pattern=r"^[0-9a-fA-F]{64}$", repr=False)


class KeysFile(BaseModel):
    """The whole of keys.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    version: Literal[1] = 1
    keys: list[Key] = []

    @model_validator(mode="after")
    def _distinct(self) -> KeysFile:
        names = [key.name for key in self.keys]
        if len(set(names)) < len(names):
            raise ValueError("two keys have one name; give each its own")
        if len({key.sha256.lower() for key in self.keys}) < len(names):
            raise ValueError("two names have one key; make each its own with `ocr-key new NAME`")
        return self


class KeyStore:
    """The keys of a file, read anew when it changes. A file that is wrong leaves the former keys in force."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._keys: list[tuple[str, bytes]] = []
        self._lock = threading.Lock()
        self.problem = ""
        if path is not None:
            self._refresh()
            if self.problem:
                raise ValueError(self.problem)

    def name_of(self, headers: Mapping[str, str], query_key: str | None, peer: str | None) -> str:
        """Who sends a request. Raises Refusal 401."""
        self._refresh()
        shown = _shown_key(headers, query_key)
        if not self._keys:
            if _is_loopback(peer):
                return LOCAL
            raise _refused("no key is set up on this box, only the box itself is served")
        if not shown:
            raise _refused("no key; send it as x-goog-api-key, as ?key= or as a Bearer token")
        # Every key is compared, each in constant time: how long it takes tells nothing of any.
        digest = hashlib.sha256(shown.encode("utf-8", "surrogatepass")[:MAX_KEY]).digest()
        found = [name for name, known in self._keys if compare_digest(known, digest)]
        if not found:
            raise _refused("this key is not known")
        return found[0]

    def _refresh(self) -> None:
        if self._path is None:
            return
        with self._lock:
            try:
                status = self._path.stat()
                seen = (status.st_mtime_ns, status.st_size, status.st_ino)
                if seen == self._seen:
                    return
                self._keys = [
                    (key.name, bytes.fromhex(key.sha256))
                    for key in KeysFile.model_validate_json(self._path.read_bytes()).keys
                ]
                self._seen, self.problem = seen, ""
            except OSError as error:
                self.problem = (
                    f"{self._path} cannot be read ({error.strerror}); run the playbook ocr_server.yml"
                )
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False, include_context=False)[0]
                words = first["msg"].removeprefix("Value error, ")
                self.problem = f"{self._path}: {words}; mend ocr_service_keys in the inventory"


def _shown_key(headers: Mapping[str, str], query_key: str | None) -> str:
    """The key that a request shows, "" for none."""
    kind, _, bearer = headers.get("authorization", "").partition(" ")
    return headers.get("x-goog-api-key") or query_key or (bearer.strip() if kind.lower() == "bearer" else "")


def _is_loopback(peer: str | None) -> bool:
    try:
        return peer is not None and ipaddress.ip_address(peer).is_loopback
    except ValueError:
        return False


def _refused(message: str) -> Refusal:
    return Refusal(401, "API_KEY_INVALID", message, headers={"WWW-Authenticate": "Bearer"})


def new(name: str) -> tuple[str, dict[str, str]]:
    """A random key, and its entry for `ocr_service_keys`."""
    key = PREFIX + secrets.token_urlsafe(32)
    return key, {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest()}


def main(argv: list[str] | None = None) -> int:
    """Entry point of `ocr-key`."""
    parser = argparse.ArgumentParser(
        "ocr-key",
        description="Print a new random key for the OCR service, and its entry for ocr_service_keys.",
        epilog="The key is kept nowhere: whoever loses it gets a new one. Exit codes: 0 done, 2 bad usage.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="new")
    verbs.add_parser("new", help="make a key").add_argument("name", metavar="NAME", help="who gets it")
    name = parser.parse_args(argv).name
    if not re.fullmatch(NAME, name):
        fix = "take 1 to 64 letters, digits, '.', '_', '@' or '-', the first a letter or digit"
        print(f"ocr-key: NAME = {name!r:.80}: {fix}", file=sys.stderr)
        return 2
    key, entry = new(name)
    print(f"The key of {name}, which is not shown again:\n\n{key}\n")
    print(f"Its entry in ocr_service_keys:\n\n- {json.dumps(entry)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
