"""From pydantic's errors to problems: the key as written, what is wrong in plain words, and the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llama_common.problems import MISSING, Problem, show

_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}

_TYPES = {
    bool: "true/false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "empty",
}


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def misspelt(word: str, known: Collection[str]) -> str | None:
    """The known word of which `word` looks like a misspelling, None for a known or a quite different word."""
    found = [] if word in known else difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.92)
    return found[0] if found else None


def problems_of(error: ValidationError, data: Mapping[str, Any], model: type[BaseModel]) -> list[Problem]:
    """Every problem that `error` reports about `data`, in the order of the data, one per key."""
    found: dict[tuple[str, ...], Problem] = {}
    for details in error.errors(include_url=False):
        problem = _problem(details, data, model)
        known = found.get(problem.path)
        # A union reports each of its members: what a validator of ours says is the useful one.
        if known is None or details["type"] == "refused":
            found[problem.path] = problem
    return list(found.values())


def _problem(details: ErrorDetails, data: Mapping[str, Any], model: type[BaseModel]) -> Problem:
    path, value = _locate(details, data)
    kind = details["type"]
    context = details.get("ctx", {})
    if kind == "refused":
        return Problem(path, value, context["message"], context["fix"])
    if kind == "extra_forbidden":
        known = _keys_at(model, path[:-1])
        guess = closest(path[-1], known)
        fix = f"did you mean '{guess}'?" if guess else "remove it"
        return Problem(path, value, f"unknown key; known here: {', '.join(known)}", fix)
    if kind == "missing":
        return Problem(path, MISSING, "this key is required", f"add '{path[-1]}:'{_about(model, path)}")
    if kind in _KINDS:
        wanted = _KINDS[kind]
        return Problem(
            path,
            value,
            f"must be {wanted}, not {_TYPES.get(_plain_type(value), 'something else')}",
            _type_fix(kind, value, path[-1]),
        )
    if kind == "literal_error":
        allowed = [item.strip().strip("'") for item in re.split(r", | or ", str(context["expected"]))]
        guess = closest(str(value), allowed)
        return Problem(
            path,
            value,
            f"must be one of {', '.join(allowed)}",
            _yaml_word(value, allowed) or (f"did you mean '{guess}'?" if guess else "write one of them"),
        )
    limit = _limit(kind, context, value)
    if limit is not None:
        return Problem(path, value, *limit)
    return Problem(
        path,
        value,
        str(details["msg"]),
        "see the description of this key in docs/schema/llama_hosts.schema.json",
    )


def _yaml_word(value: object, allowed: Collection[str]) -> str | None:
    """The fix for a word that YAML has read as true or false, None for any other value."""
    if not isinstance(value, bool):
        return None
    words = ("on", "yes", "true") if value else ("off", "no", "false")
    return next((f'put it in quotes: "{word}"' for word in words if word in allowed), None)


def _limit(kind: str, context: Mapping[str, Any], value: object) -> tuple[str, str] | None:
    """Message and fix for a value outside its bounds."""
    match kind:
        case "greater_than_equal":
            return f"must be at least {context['ge']}", f"write {context['ge']} or more"
        case "greater_than":
            return f"must be more than {context['gt']}", f"write a number above {context['gt']}"
        case "less_than_equal":
            return f"must be at most {context['le']}", f"write {context['le']} or less"
        case "multiple_of":
            step = int(context["multiple_of"])
            below = int(value) // step * step if isinstance(value, int) else step
            return f"must be a multiple of {step}", f"write {max(below, step)}"
        case "too_short":
            return f"needs at least {context['min_length']} items", "add what is missing"
        case "too_long":
            return f"has more than {context['max_length']} items", "remove some"
    return None


def _type_fix(kind: str, value: object, key: str) -> str:
    """How to write a value of the wrong type."""
    if (
        kind in ("int_type", "float_type")
        and isinstance(value, str)
        and re.fullmatch(r"-?\d+(\.\d+)?", value)
    ):
        return f"write it without quotes: {key}: {value}"
    if (
        kind == "bool_type"
        and isinstance(value, str)
        and value.lower() in ("true", "false", "yes", "no", "on", "off")
    ):
        return (
            f"write it without quotes: {key}: {'true' if value.lower() in ('true', 'yes', 'on') else 'false'}"
        )
    if kind == "bool_type":
        return f"write {key}: true or {key}: false"
    if kind == "string_type" and isinstance(value, int | float):
        return f'put it in quotes: "{show(value)}"'
    if kind == "list_type" and isinstance(value, str):
        return f"put it in brackets: {key}: [{show(value)}]"
    return f"write {_KINDS[kind]}"


def _plain_type(value: object) -> type:
    for kind in (bool, int, float, str, list, dict):
        if isinstance(value, kind):
            return kind
    return type(value)


def _locate(details: ErrorDetails, data: Any) -> tuple[tuple[str, ...], Any]:
    """The path of an error through the data as written, without pydantic's names in it, and the value."""
    path: list[str] = []
    value: Any = data
    location = details["loc"]
    for position, step in enumerate(location):
        if _has(value, step):
            value = value[step]
        elif position == len(location) - 1 and details["type"] == "missing":
            return (*path, str(step)), MISSING
        elif step == "[key]":
            return tuple(path), details["input"]
        else:
            continue
        path.append(str(step))
    return tuple(path), value


def _has(value: object, step: str | int) -> bool:
    """Whether `step` is a key or a position of `value`."""
    if isinstance(value, Mapping):
        return step in value
    return isinstance(value, list) and isinstance(step, int) and step < len(value)


def _model_at(model: type[BaseModel], path: Iterable[str]) -> type[BaseModel] | None:
    """The model that describes the mapping at `path`."""
    current: Any = model
    for step in path:
        if _is_model(current):
            field = current.model_fields.get(step)
            current = _container(field.annotation) if field else None
        else:
            arguments = get_args(current)
            current = _container(arguments[-1]) if arguments else None
    return current if _is_model(current) else None


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _container(annotation: Any) -> Any:
    """The model, mapping or list in an annotation that may be optional; otherwise the annotation."""
    if get_origin(annotation) in (Union, UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return next(
            (member for member in members if _is_model(member) or get_origin(member) in (dict, list)),
            members[0],
        )
    return annotation


def _keys_at(model: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    found = _model_at(model, path)
    return list(found.model_fields) if found else []


def _about(model: type[BaseModel], path: tuple[str, ...]) -> str:
    """The description of a key, in brackets."""
    found = _model_at(model, path[:-1])
    field = found.model_fields.get(path[-1]) if found else None
    return f" ({field.description.rstrip('.')})" if field and field.description else ""
