"""What is known of a manufacturer's nameplates: data, one YAML file each, beside the customer's own folder.

A template says how the name is written, which labels the manufacturer uses beside the usual ones, and what a
serial
number, asset tag or registration looks like on its plates. `_generic.yml` is the fallback for all others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ocr_pipeline.errors import SettingsError
from ocr_pipeline.reading import FIELDS
from ocr_pipeline.words import alike, fold, squeezed

GENERIC = "_GENERIC"
MAX_FILE = 64 * 1024
CODES = ("numero_serie", "patrimonio", "matricula")
Phrase = Annotated[str, Field(min_length=2, max_length=60)]


class Template(BaseModel):
    """One manufacturer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[
        str, Field(pattern=r"^_?[A-Z0-9][A-Z0-9 .&-]{0,39}$", description="the canonical value of fabricante")
    ]
    aliases: Annotated[list[Phrase], Field(max_length=20, description="how the name is printed")] = []
    labels: Annotated[
        dict[str, list[Phrase]], Field(description="labels by field, beside the usual ones")
    ] = {}
    patterns: Annotated[
        dict[Literal["numero_serie", "patrimonio", "matricula"], str],
        Field(description="regular expression that the whole value matches; another value is for a person"),
    ] = {}
    absent: Annotated[list[str], Field(description="fields that these plates never carry")] = []

    @field_validator("labels")
    @classmethod
    def _known_labels(cls, labels: dict[str, list[str]]) -> dict[str, list[str]]:
        for name in labels:
            if name not in FIELDS:
                raise ValueError(f"{name!r} is no field; the fields are {', '.join(FIELDS)}")
        return labels

    @field_validator("absent")
    @classmethod
    def _known_absent(cls, absent: list[str]) -> list[str]:
        for name in absent:
            if name not in FIELDS:
                raise ValueError(f"{name!r} is no field; the fields are {', '.join(FIELDS)}")
        return absent

    @field_validator("patterns")
    @classmethod
    def _compiles(cls, patterns: dict[str, str]) -> dict[str, str]:
        for name, pattern in patterns.items():
            if len(pattern) > 200:
                raise ValueError(f"{name}: a pattern has at most 200 characters")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from None
        return patterns


class Templates:
    """All templates; the customer's replace those of the package with the same name."""

    def __init__(self, templates: Iterable[Template]) -> None:
        self.by_name = {template.name: template for template in templates}
        self.generic = self.by_name.get(GENERIC) or Template(name=GENERIC)
        self._names = [
            (squeezed(alias), template.name)
            for template in self.by_name.values()
            if template.name != GENERIC
            for alias in (template.name, *template.aliases)
        ]
        self._names.sort(key=lambda entry: -len(entry[0]))

    def of(self, manufacturer: str | None) -> Template:
        """The manufacturer's own template, or the generic one."""
        return self.by_name.get(manufacturer or "", self.generic)

    def named_in(self, text: str) -> tuple[str, str] | None:
        """The manufacturer that a text names, as (canonical name, the words that name it), or None.

        A short name must be a word of its own; a long one may be misread by a letter.
        """
        words = re.findall(r"[0-9A-Z]+", fold(text))
        for wanted, name in self._names:
            for size in range(1, min(4, len(words)) + 1):
                for at in range(len(words) - size + 1):
                    if alike("".join(words[at : at + size]), wanted):
                        return name, " ".join(words[at : at + size])
            if len(wanted) >= 6 and wanted in "".join(words):
                return name, wanted
        return None


@lru_cache(maxsize=8)
def load(folder: str = "") -> Templates:
    """The templates of the package and of `folder`. Raises SettingsError that names file, key and fix."""
    shipped = resources.files("ocr_pipeline") / "data" / "templates"
    found = [
        _parse(entry.name, entry.read_text(encoding="utf-8"))
        for entry in shipped.iterdir()
        if entry.name.endswith(".yml")
    ]
    own = {template.name for template in found}
    source = resources.files("ocr_pipeline") / "data" / "manufacturers.yml"
    names: dict[str, list[str]] = yaml.safe_load(source.read_text(encoding="utf-8"))
    found += [Template(name=name, aliases=aliases) for name, aliases in names.items() if name not in own]
    if folder:
        try:
            paths = sorted(path for path in Path(folder).iterdir() if path.suffix == ".yml")
        except OSError as error:  # `glob` would find nothing
            raise SettingsError(f"templates = {folder!r}: {error.strerror}") from None
        for path in paths:
            try:
                if path.stat().st_size > MAX_FILE:
                    raise SettingsError(f"{path}: more than {MAX_FILE} bytes; a template is a few lines")
                found.append(_parse(str(path), path.read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                raise SettingsError(f"{path}: not UTF-8") from None
            except OSError as error:
                raise SettingsError(f"{path}: {error.strerror}") from None
    return Templates(found)


def _parse(name: str, text: str) -> Template:
    try:
        return Template.model_validate(yaml.safe_load(text))
    except yaml.YAMLError:
        raise SettingsError(f"{name}: not YAML") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise SettingsError(f"{name}: {where}: {problem['msg']}") from None


def schema() -> dict[str, Any]:
    """The JSON Schema of a template file, for editors."""
    return Template.model_json_schema()
