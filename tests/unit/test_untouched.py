"""What says that a machine was left alone notices when it was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests import untouched
from tests.untouched import MachineState


def test_a_file_a_setting_a_module_and_the_clock_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "grub.cfg"
    file.write_text("as it was")
    monkeypatch.setattr(untouched, "PLACES", (str(tmp_path),))
    monkeypatch.setattr(untouched, "_modules", lambda: frozenset({"nvidia", "veth"}))
    before = MachineState.now()
    assert before.changes() == {}
    file.write_text("otherwise")
    (name,) = before.changes()
    assert name == str(file)
    file.write_text("as it was")
    for changed, found in (
        (replace(before, modules=frozenset({"veth"})), "module nvidia"),
        (replace(before, modules=before.modules | {"gone"}), "module gone"),
        (replace(before, clock_offset=before.clock_offset - 3), "clock"),
        (
            replace(before, sysctls=before.sysctls | {"/proc/sys/kernel/panic": "17"}),
            "/proc/sys/kernel/panic",
        ),
    ):
        assert list(changed.changes()) == [found]
    assert replace(before, modules=frozenset({"nvidia"})).changes() == {}, "a lab loads it by using it"
