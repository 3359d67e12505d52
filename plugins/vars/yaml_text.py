"""Refuse variable files that cannot be read in one line that names the file: Ansible's own message does not.

Broken YAML, keys that stand twice, text that is not UTF-8, a vault without its password.

It runs before Ansible's own reader of group_vars and host_vars, in every play, and defines no variables.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ansible.errors import AnsibleParserError  # type: ignore[import-untyped]
from ansible.inventory.group import InventoryObjectType  # type: ignore[import-untyped]
from ansible.plugins.vars import BaseVarsPlugin  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps/llama_common/src"))

from llama_common.source import Document, shown

DOCUMENTATION = """
name: yaml_text
short_description: Refuse variable files that cannot be read
description: Checks the text of group_vars and host_vars before they are loaded.
"""


class VarsModule(BaseVarsPlugin):  # type: ignore[misc]
    """Reads each file once; defines nothing."""

    is_stateless = True
    _checked: ClassVar[set[str]] = set()

    def get_vars(self, loader: Any, path: str, entities: Any, cache: bool = True) -> dict[str, Any]:
        """No variables. Raises AnsibleParserError for the first broken file."""
        super().get_vars(loader, path, entities)
        base = Path(path) if Path(path).is_dir() else Path(path).parent
        for entity in entities if isinstance(entities, list) else [entities]:
            kind = "host_vars" if entity.base_type is InventoryObjectType.HOST else "group_vars"
            place = f"{base}/{kind}/{entity.name}"
            if place in self._checked:
                continue
            self._checked.add(place)
            for name in loader.find_vars_files(str(base / kind), entity.name):
                file = Path(name)
                document = Document.of(file.read_bytes(), partial(loader.get_text_file_contents, name))
                for found in document.problems:
                    raise AnsibleParserError(found.problem.line(f"{shown(file)}:{found.line}"))
        return {}
