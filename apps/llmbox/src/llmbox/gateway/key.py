"""`llmbox-key`: makes a key for somebody who may use the gateway."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import secrets
import sys

from llmbox.errors import EXIT_DONE, EXIT_USAGE
from llmbox.gateway.keyfile import BUDGETS, NAME

PREFIX = "llmbox-"  # by which a person, or a scanner for secrets, knows what it is
BYTES = 32


def new(name: str) -> tuple[str, dict[str, object]]:
    """A random key, and its entry for `llm_gateway_keys`."""
    key = PREFIX + secrets.token_urlsafe(BYTES)
    digest = hashlib.sha256(key.encode()).hexdigest()
    return key, {"name": name, "sha256": digest, "presets": None, **dict.fromkeys(BUDGETS)}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = argparse.ArgumentParser(
        "llmbox-key",
        description="Print a new random key for the gateway, and its entry for llm_gateway_keys.",
        epilog="The key is kept nowhere. Whoever loses it gets a new one, whose sha256 replaces the old one.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="new")
    verbs.add_parser("new", help="make a key").add_argument("name", metavar="NAME", help="who gets it")
    name = parser.parse_args(argv).name
    if not re.fullmatch(NAME, name):
        print(
            f"llmbox-key: NAME = {name!r:.80}: take 1 to 64 letters, digits, '.', '_', '@' or '-', "
            "the first a letter or digit",
            file=sys.stderr,
        )
        return EXIT_USAGE
    key, entry = new(name)
    print(f"The key of {name}, which is not shown again:\n\n{key}\n")
    print("Its entry in llm_gateway_keys (presets: null means all; a limit that is null is none):\n")
    print(f"- {json.dumps(entry)}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
