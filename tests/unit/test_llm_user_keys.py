"""What role llm_user takes for a public key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

BLOB = "AAAAC3NzaC1lZDI1NTE5AAAAIFx0ZzJ7cQ8o4hZ3m1vV0l1mB8hN2c0r6s4y9u3w5k7p"


@pytest.fixture(scope="module")
def pattern(root: Path) -> re.Pattern[str]:
    """The role's own expression."""
    variables = yaml.safe_load((root / "roles/llm_user/vars/main.yml").read_text(encoding="utf-8"))
    return re.compile(variables["_llm_user_key"])


@pytest.mark.parametrize(
    "key",
    [
        f"ssh-ed25519 {BLOB}",
        f"ssh-rsa {BLOB}== someone@laptop, the new one",
        f"ecdsa-sha2-nistp256 {BLOB}=",
        f"sk-ssh-ed25519@openssh.com {BLOB} token",
    ],
)
def test_a_public_key_is_accepted(pattern: re.Pattern[str], key: str) -> None:
    assert pattern.match(key)


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
        f" ssh-ed25519 {BLOB}",
        f'command="sh" ssh-ed25519 {BLOB}',
    ],
)
def test_what_is_no_public_key_in_one_line_is_refused(pattern: re.Pattern[str], key: str) -> None:
    assert not pattern.match(key)
