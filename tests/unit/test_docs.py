"""The documentation: every relative link leads somewhere, every command runs after a mere `make setup`."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_LINK = re.compile(r"\]\((?!https?://|mailto:)(?P<target>[^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
# Programs of the venv with arguments; a bare name, as in "reads it through `ansible-inventory`" is none.
_BARE = re.compile(
    r"(?:^|[;&|(] *|\w=\S* )((?:ansible(?:-\w+)?|pytest|pip|ruff|mypy|python3?) +(?!-m lab\b)\S.*)$"
)
_HEADING = re.compile(r"^#+ +(?P<text>.+?) *$", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Names of the headings as GitHub forms them."""
    headings = [match["text"].lower() for match in _HEADING.finditer(_FENCE.sub("", text))]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str, known: set[Path]) -> list[str]:
    """Relative links in `text`, the page's, that lead nowhere; `known` are the files there are."""
    broken = []
    for match in _LINK.finditer(_FENCE.sub("", text)):
        path, _, anchor = match["target"].partition("#")
        file = (page.parent / path).resolve() if path else page
        there = file in known or any(file in one.parents for one in known)
        if not there or (anchor and file.suffix == ".md" and anchor not in anchors(file.read_text())):
            broken.append(match["target"])
    return broken


def bare_commands(text: str) -> list[str]:
    """Commands in `text` that name a program of the venv without its folder."""
    typed = [
        line.removeprefix("$ ").removeprefix("# ")
        for block in _FENCE.findall(text)
        for line in block.splitlines()
    ]
    typed += _CODE.findall(_FENCE.sub("", text))
    return [match[1] for line in typed if (match := _BARE.search(line.strip()))]


@pytest.fixture(scope="module")
def known() -> set[Path]:
    """Files that git has or would take: a page that only this machine has is no page."""
    argv = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return {ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path, known: set[Path]) -> None:
    assert broken_links(page, page.read_text(), known) == []


def test_a_broken_link_is_found(known: set[Path]) -> None:
    text = (
        "# A\n[a](docs/nowhere.md) [b](README.md) [c](docs) [d](#a) [e](README.md#no-such) [f](https://x)\n"
    )
    page = ROOT / "README.md"
    assert broken_links(page, text, known)[:1] == ["docs/nowhere.md"]
    assert "README.md#no-such" in broken_links(page, text, known)
    assert "README.md" not in broken_links(page, text, known)
    assert "docs" not in broken_links(page, text, known)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_names_the_venv_s_program(page: Path) -> None:
    assert bare_commands(page.read_text()) == []


def test_a_command_that_needs_the_venv_is_found() -> None:
    text = """
`ansible-doc -t role x` `.venv/bin/ansible-doc -t role x` `ansible-inventory` `python3 -m lab up`
`make && pytest tests/unit` `LAB_NAME=x ansible-playbook site.yml` `.venv/bin/python -m pytest tests/unit`
```console
$ ansible-playbook site.yml
$ .venv/bin/ansible-playbook site.yml
```
"""
    assert bare_commands(text) == [
        "ansible-playbook site.yml",
        "ansible-doc -t role x",
        "pytest tests/unit",
        "ansible-playbook site.yml",
    ]
