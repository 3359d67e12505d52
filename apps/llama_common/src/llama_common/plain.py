"""Plain Python values from those of a templating engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """`value` rebuilt of dict, list, str, int, float and bool: Ansible's tagged types are subclasses."""
    if isinstance(value, Mapping):
        return {scalar(key): plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    return scalar(value)


def scalar(value: Any) -> Any:
    """A scalar without its subclass; anything else as it is."""
    if isinstance(value, bool) or value is None:
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value
