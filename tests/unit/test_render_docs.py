"""The page of presets: written when it is stale, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import render_docs


def test_a_stale_page_is_named_and_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        render_docs, "boxes", lambda inventory: [{"host": "a", "inventory": "i", "table": "| x |\n"}]
    )
    page = tmp_path / "presets.md"
    page.write_text("old")
    assert render_docs.main(["--check", "--output", str(page)]) == 1
    assert page.read_text() == "old"
    assert "is stale; run scripts/render_docs.py" in capsys.readouterr().err
    assert render_docs.main(["--output", str(page)]) == 0
    assert "| x |" in page.read_text()
    assert render_docs.main(["--check", "--output", str(page)]) == 0
