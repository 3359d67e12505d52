"""Which packages count as installed by the lab: those of its own run of apt-get, whatever comes later."""

from __future__ import annotations

from lab.packages import new_packages

SIMULATED = """\
NOTE: This is only a simulation!
Inst libnspr4 (2:4.35-1.1 Debian:12.12/oldstable [amd64])
Inst systemd [252.30-1] (252.39-1 Debian:12.12/oldstable [amd64]) []
Inst systemd-container (252.39-1 Debian:12.12/oldstable [amd64])
Conf libnspr4 (2:4.35-1.1 Debian:12.12/oldstable [amd64])
"""


def test_what_is_new_and_not_what_is_replaced() -> None:
    assert new_packages(SIMULATED) == ["libnspr4", "systemd-container"]
