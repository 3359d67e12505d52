#!/usr/bin/python3
"""Ansible module: what the installed llama-server of each build says of its flags."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

DOCUMENTATION = r"""
---
module: llama_preset_help
short_description: Read the help text of the current release of each llama.cpp build
description: [Reads help.txt beside each build's current llama-server. Changes nothing.]
options:
  root: {description: Folder of the builds., type: path, required: true}
  builds: {description: Names of the builds., type: list, elements: str, required: true}
author: [llmbox]
"""

EXAMPLES = r"""
- name: Ask the binaries which flags they know
  llama_preset_help:
    root: /opt/llama.cpp
    builds: [upstream]
"""

RETURN = r"""
texts: {description: Help text by build; null where none is installed., type: dict, returned: always}
"""


def read(path: Path) -> str | None:
    """The file's text, None where there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "builds": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    root = Path(module.params["root"])
    texts = {build: read(root / build / "current/help.txt") for build in module.params["builds"]}
    module.exit_json(changed=False, texts=texts)


if __name__ == "__main__":
    main()
