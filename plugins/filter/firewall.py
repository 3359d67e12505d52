"""The filter firewall_rules: the nftables table of a host; a thin wrapper of llama_common.firewall."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps/llama_common/src"))

from llama_common import firewall
from llama_common.plain import plain


def firewall_rules(variables: Mapping[str, Any]) -> str:
    """The table as nft reads it."""
    try:
        return firewall.rules(plain(variables))
    except ValueError as error:
        raise AnsibleFilterError(str(error)) from None


class FilterModule:
    """The filters of this file, for Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name to function."""
        return {"firewall_rules": firewall_rules}
