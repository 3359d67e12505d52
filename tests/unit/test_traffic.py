"""What counts as lost by the clients of the losses test."""

from __future__ import annotations

import time

import pytest

from scripts._traffic import CUT_S, Sent, Traffic

CUT = Sent(began=100.0, took=2.0, model=None, stream=True, status=200, tokens=3, error="gone", event=True)


@pytest.mark.parametrize(
    ("kills", "excused"),
    [
        ([], False),
        ([(101.8, 101.9)], True),
        ([(50.0, 50.1), (101.8, 101.9)], True),
        ([(102.1, 102.2)], False),  # it broke before anybody did anything
        ([(100.5, 101.9 - CUT_S)], False),  # the server was there again long ago
    ],
)
def test_only_what_ends_at_a_kill_is_excused(kills: list[tuple[float, float]], excused: bool) -> None:
    traffic = Traffic([CUT], kills)
    assert traffic.failed == ([] if excused else [CUT])
    assert f"'{'excused' if excused else 'failed'}': 1" in traffic.summary()


@pytest.mark.parametrize("change", [{"tokens": 0}, {"event": False}])
def test_at_a_kill_only_a_stream_that_says_so_after_its_first_token_is_excused(
    change: dict[str, int],
) -> None:
    one = Sent(**{**vars(CUT), **change})
    assert Traffic([one], [(101.8, 101.9)]).failed == [one]


def test_a_kill_is_as_long_as_it_takes() -> None:
    traffic = Traffic()
    traffic.kill(lambda: time.sleep(0.05))
    [(begun, over)] = traffic.kills
    assert 0.05 <= over - begun < 5
