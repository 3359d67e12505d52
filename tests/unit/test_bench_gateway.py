"""What the gateway's benchmark makes of its figures."""

from __future__ import annotations

import re
from typing import Any

from scripts import _gateway_probe as probe
from scripts import bench_gateway as bench


def one_row(rows: list[str], what: str) -> list[str]:
    """The cells of the row that begins with these words."""
    [found] = [line for line in rows if line.startswith(f"| {what}")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def rounds(*outages: float, share: float = 0.0) -> list[dict[str, float]]:
    """Cold rounds with these outages, of a file that was out of memory."""
    same = {"resident_before": 0.0, "read_share": share}
    return [{**same, "seconds": 2 * outage, "outage": outage} for outage in outages]


def cold(**more: Any) -> dict[str, Any]:
    """What the cold part finds."""
    own = {"with": rounds(0.5, 0.6, 0.7), "without": rounds(1.0, 1.1, 1.2, share=1.0)}
    return {"own": own, "slow": {}, "rates": [], "skipped": "", **more}


def test_a_row_has_min_median_max() -> None:
    assert bench.row("x", [3, 1, 2], 1, "<= 2", "met") == "| x | 1.0 | 2.0 | 3.0 | <= 2 | met |"


def switches(to: str, *seconds: float, router: float) -> list[dict[str, Any]]:
    """Pairs of switches to one preset; the router always takes the same time."""
    return [{"to": to, "gateway": one, "router": router} for one in seconds]


def test_a_switch_is_compared_with_the_router_s_for_each_target() -> None:
    small, large = switches("small", 0.2, 0.25, 0.3, router=0.2), switches("large", 0.7, 0.8, 0.9, router=1.0)
    mixed = [pair for both in zip(small, large, strict=True) for pair in both]
    rows, bars = bench.switch_lines({"pairs": mixed})
    cells = one_row(rows, "switch to small: gateway to router mode, 3 pairs")
    assert cells[1:] == ["1.00", "1.25", "1.50", "<= 1.1", "**not met**"]
    cells = one_row(rows, "switch to large: gateway to router mode, 3 pairs")
    assert cells[1:] == ["0.70", "0.80", "0.90", "<= 1.1", "met"]
    assert one_row(rows, "switch to large: ratio in each pair")[1:4] == ["0.70", "0.80", "0.90"]
    assert [bar.length for bar in bars] == [0.25, 0.2, 0.8, 1.0]


def test_overhead_is_a_difference_of_quantiles() -> None:
    found = {
        "latency": [{"direct": [0.001] * 99 + [0.002], "gateway": [0.002] * 99 + [0.015]}] * 3,
        "stream": [{"direct": 100.0, "gateway": 97.0}],
        "idle": [{"rss": 50e6, "open": 500}, {"rss": 95e6, "open": 499}],
    }
    rows, _ = bench.overhead_lines(found)
    assert one_row(rows, "added latency p50")[1:] == ["1.00", "1.00", "1.00", "<= 2", "met"]
    assert one_row(rows, "added latency p99")[-1] == "**not met**"
    cells = one_row(rows, "streamed tok/s, gateway to direct, 1 pairs")
    assert cells[1:] == ["0.970", "0.970", "0.970", ">= 0.98", "**not met**"]
    assert one_row(rows, "gateway's RSS")[-1] == "**not met**", "the worst of them counts"
    assert one_row(rows, "idle connections")[-1] == "**not met**"


def test_outages_on_a_slow_disk_are_compared_by_their_medians() -> None:
    slow = {"with": rounds(0.6, 0.7, 0.8), "without": rounds(5.0, 6.0, 7.0)}
    rows, bars = bench.cold_lines(cold(slow=slow, rates=[49e6, 50e6]))
    cells = one_row(rows, "disk at 50 MB/s: outage, with prefetch to without")
    assert cells[1:] == ["0.11", "0.12", "0.12", "<= 0.5", "met"]
    assert one_row(rows, "disk at 50 MB/s: reads")[1:4] == ["49.0", "49.5", "50.0"]
    assert len(bars) == 4
    slow["with"] = rounds(4.0, 5.0, 6.0)
    rows, _ = bench.cold_lines(cold(slow=slow, rates=[5e7]))
    assert one_row(rows, "disk at 50 MB/s: outage, with")[-1] == "**not met**"
    slow = {"with": rounds(1.0, 4.0, 6.0), "without": rounds(4.0, 5.0, 20.0)}
    rows, _ = bench.cold_lines(cold(slow=slow, rates=[5e7]))
    cells = one_row(rows, "disk at 50 MB/s: outage, with")
    assert (cells[2], cells[-1]) == ("0.80", "**not met**")


def test_a_file_that_stayed_in_memory_is_no_cold_file() -> None:
    found = cold(slow={"with": rounds(0.6), "without": rounds(5.0)}, rates=[5e7])
    assert one_row(bench.cold_lines(found)[0], "cold file: part in memory")[1:] == [
        *("0.000", "0.000", "0.000", "<= 0.01", "met")
    ]
    found["slow"]["without"][0]["resident_before"] = 0.02
    assert one_row(bench.cold_lines(found)[0], "cold file: part in memory")[-1] == "**not met**"


def test_a_disk_that_cannot_be_slowed_down_is_skipped_with_the_reason() -> None:
    rows, bars = bench.cold_lines(cold(skipped="no control group limits reads"))
    cells = one_row(rows, "disk at 50 MB/s: outage")
    assert cells[1:] == ["", "", "", "<= 0.5", "SKIPPED: no control group limits reads"]
    assert one_row(rows, "cold file without prefetch: outage, s")[1:4] == ["1.00", "1.10", "1.20"]
    assert len(bars) == 2


def test_the_page_says_where_and_shows_every_chart() -> None:
    text = bench.page(["| x |"], where="a machine", revision="abc", day="2026-01-02")
    assert "Commit abc, 2026-01-02. a machine" in text
    assert set(re.findall(r"\]\(([^)]+)\)", text)) == set(bench.CHARTS)
    assert all(part in bench.PARTS for _, _, parts in bench.CHARTS.values() for part in parts)


def test_the_router_gets_the_presets_own_flags() -> None:
    argv = ["/bin/llama-server", "--host", "/run/x.sock", "--port", "0", "--alias", "a", "--model", "/m.gguf"]
    text = probe.router_ini({"smol": [*argv, "--jinja", "--threads", "2"]})
    own = ["model = /m.gguf", "jinja = true", "threads = 2"]
    assert text.splitlines() == ["version = 1", "", "[smol]", *own]
