"""What role llm_user takes for a public key."""

from __future__ import annotations

from functools import cache

import pytest
import yaml
from llama_common.roles import RoleVariables

from tests.support import ROOT

BLOB = "AAAAC3NzaC1lZDI1NTE5AAAAIFx0ZzJ7cQ8o4hZ3m1vV0l1mB8hN2c0r6s4y9u3w5k7p"


@cache
def role() -> RoleVariables:
    """The variables of the role."""
    specs = yaml.safe_load((ROOT / "roles/llm_user/meta/argument_specs.yml").read_text(encoding="utf-8"))
    return RoleVariables.of({"llm_user": specs})


def refused(key: str) -> bool:
    """Whether a list with this key is refused."""
    return bool(role().check({"llm_user_authorized_keys": [key]}))


@pytest.mark.parametrize(
    "key",
    [
        f"ssh-ed25519 {BLOB}",
        f"ssh-rsa {BLOB}== someone@laptop, the new one",
        f"ecdsa-sha2-nistp256 {BLOB}=",
        f"sk-ssh-ed25519@openssh.com {BLOB} token",
    ],
)
def test_a_public_key_is_accepted(key: str) -> None:
    assert not refused(key)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "ssh-ed25519",
        BLOB,
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "/home/me/.ssh/id_ed25519.pub",
        f"ssh-ed25519 {BLOB} me\nssh-ed25519 {BLOB} you",
        f"ssh-ed25519 {BLOB}\n",
        f"ssh-ed25519 {BLOB} me\rssh-ed25519",
        f" ssh-ed25519 {BLOB}",
        f'command="sh" ssh-ed25519 {BLOB}',
    ],
)
def test_what_is_no_public_key_in_one_line_is_refused(key: str) -> None:
    assert refused(key)
