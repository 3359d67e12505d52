"""Plain Python values from those of a templating engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

ReadError = Callable[[tuple[str, ...], Exception], Exception]


def plain(value: Any, path: tuple[str, ...] = (), on_error: ReadError | None = None) -> Any:
    """`value` rebuilt of dict, list, str, bool, int and float: Ansible's tagged and lazy types are subclasses of them.

    Reading a lazy value may fail. `on_error` turns (path, exception) into the exception to raise instead.
    """
    try:
        if isinstance(value, Mapping):
            items: list[tuple[Any, Any]] = [(key, None) for key in value]
        elif isinstance(value, list | tuple):
            items = [(index, None) for index in range(len(value))]
        else:
            return _scalar(value)
    except Exception as error:
        if on_error is None:
            raise
        raise on_error(path, error) from error
    read = []
    for key, _ in items:
        try:
            child = value[key]
        except Exception as error:
            if on_error is None:
                raise
            raise on_error((*path, str(key)), error) from error
        read.append((key, plain(child, (*path, str(key)), on_error)))
    if isinstance(value, Mapping):
        return {_scalar(key): child for key, child in read}
    return [child for _, child in read]


def _scalar(value: Any) -> Any:
    """A scalar without its subclass."""
    if isinstance(value, bool) or value is None:
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value
