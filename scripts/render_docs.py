#!/usr/bin/env python3
"""Render the pages under docs/ that repeat what an inventory says: docs/presets.md.

    scripts/render_docs.py [--inventory DIR]... [--output FILE] [--check]

Exit codes: 0 written or up to date, 1 stale (--check), 2 could not run.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import _venv

if __name__ == "__main__":
    _venv.enter()

import argparse
from collections.abc import Sequence
from typing import Any

import jinja2
from llama_common.presets import HostConfig
from llama_common.tables import preset_table
from pydantic import ValidationError

from scripts._inventory import ROOT, InventoryUnreadable, load

INVENTORIES = [ROOT / "inventory/production", ROOT / "inventory/lab"]
PAGE = ROOT / "docs/presets.md"
TEMPLATE = ROOT / "templates/presets.md.j2"


def boxes(inventory: Path) -> list[dict[str, Any]]:
    """Every host that has presets, with its table. Raises InventoryUnreadable and ValidationError."""
    found = []
    for host in load(inventory):
        names = HostConfig.model_fields.keys() & host.variables.keys()
        if not host.variables.get("llama_presets"):
            continue
        # The shape is enough for a table: an inventory that is not locked yet has one too.
        config = HostConfig.model_validate({name: host.variables[name] for name in names})
        found.append(
            {"host": host.name, "inventory": f"inventory/{inventory.name}", "table": preset_table(config)}
        )
    return found


def page(inventories: Sequence[Path]) -> str:
    """The page for these inventories. Raises InventoryUnreadable and ValidationError."""
    every = [box for inventory in inventories for box in boxes(inventory)]
    # Markdown, not HTML: nothing is to be escaped.
    template = jinja2.Template(TEMPLATE.read_text(), trim_blocks=True, undefined=jinja2.StrictUndefined)
    return str(template.render(boxes=every)).rstrip("\n") + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--inventory", type=Path, action="append", metavar="DIR", help="default: production and lab"
    )
    parser.add_argument("--output", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is stale")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Render or check the page."""
    args = parse(argv)
    try:
        text = page(args.inventory or INVENTORIES)
    except (InventoryUnreadable, ValidationError) as error:
        print(f"render_docs: {error}", file=sys.stderr)
        return 2
    if args.output.is_file() and args.output.read_text() == text:
        return 0
    if args.check:
        print(f"render_docs: {args.output} is stale; run scripts/render_docs.py", file=sys.stderr)
        return 1
    args.output.write_text(text)
    print(f"wrote {args.output}", file=sys.stderr)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
