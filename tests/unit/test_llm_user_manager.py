"""Which groups a service manager has, as its process tells."""

from __future__ import annotations

from roles.llm_user.library.llm_user_manager import groups_of

STATUS = "Name:\tsystemd\nUid:\t1500\t0\t0\t0\nGid:\t1500\t7\t7\t7\nGroups:\t44 997 999 \nVmRSS:\t1 kB\n"


def test_the_groups_of_a_process() -> None:
    assert groups_of(STATUS) == {44, 997, 999, 1500}
    assert groups_of("Gid:\t1500\t1500\t1500\t1500\nGroups:\t\n") == {1500}
