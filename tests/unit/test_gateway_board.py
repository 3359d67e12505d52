"""The queue: who may go, who waits, and when the box goes over to another preset."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from llmbox.errors import LlmboxError
from llmbox.gateway import board as board_module
from llmbox.gateway.board import LOAD_GUESS_S, SMOOTHING, Board, Lease, Seen, Ticket
from llmbox.gateway.refusals import Refusal
from llmbox.gateway.requests import TOO_LONG

from tests.unit.fake_box import FakeBox
from tests.unit.gateway_settings import settings

PATIENCE_S = 20.0


@asynccontextmanager
async def running(
    box: FakeBox, slots: dict[str, int] | None = None, **changed: object
) -> AsyncIterator[Board]:
    board = Board(slots or {"a": 1, "b": 1, "c": 2}, settings(**changed), box)
    task = asyncio.ensure_future(board.run())
    try:
        await until(lambda: board.phase != "starting")
        yield board
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


async def turn(ticket: Ticket) -> Lease:
    async with asyncio.timeout(PATIENCE_S):
        return await ticket.granted


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(body())  # type: ignore[arg-type]


def test_a_free_server_is_had_at_once() -> None:
    async def body() -> None:
        async with running(FakeBox()) as board:
            ticket = board.ask(None, "k", slot=True)
            assert ticket.granted.done()
            assert (await turn(ticket)).preset == "a"

    run(body)


def test_as_many_at_a_time_as_the_preset_has_slots_and_in_order() -> None:
    async def body() -> None:
        async with running(FakeBox("c")) as board:
            tickets = [board.ask(None, "k", slot=True) for _ in range(4)]
            assert [ticket.granted.done() for ticket in tickets] == [True, True, False, False]
            assert [board.position(ticket) for ticket in tickets[2:]] == [1, 2]
            board.release(await turn(tickets[0]))
            assert [ticket.granted.done() for ticket in tickets[2:]] == [True, False]

    run(body)


def test_what_takes_no_slot_passes_those_that_wait_for_one() -> None:
    async def body() -> None:
        async with running(FakeBox()) as board:
            board.ask(None, "k", slot=True)
            board.ask(None, "k", slot=True)
            assert board.ask(None, "k", slot=False).granted.done()

    run(body)


def test_a_named_preset_is_started_once_what_runs_has_finished() -> None:
    async def body() -> None:
        box = FakeBox()
        async with running(box) as board:
            first = await turn(board.ask("a", "k", slot=True))
            other = board.ask("b", "k", slot=True)
            late = board.ask("a", "k", slot=True)
            await until(lambda: board.phase == "draining")
            assert not late.granted.done()
            assert box.log == ["prefetch b"]
            board.release(first)
            lease = await turn(other)
            assert (lease.preset, box.log) == ("b", ["prefetch b", "switch b"])
            assert board.last_switch["ok"] and set(board.last_switch["parts"]) == {  # type: ignore[call-overload]
                "prefetch",
                "drain",
                "stop",
                "load",
                "ready",
            }
            board.release(lease)
            assert (await turn(late)).preset == "a"

    run(body)


def test_a_preset_that_is_refused_beforehand_disturbs_nobody() -> None:
    """What runs goes on for as long as it likes, and nobody else waits."""

    async def body() -> None:
        box = FakeBox()
        box.refused["b"] = "b is refused: it does not know --x; a still serves"
        async with running(box, {"a": 2, "b": 1}, drain_timeout=0.01) as board:
            runs = await turn(board.ask("a", "k", slot=True))
            for _ in range(2):  # at once the second time: it is known to fail
                with pytest.raises(Refusal, match="does not know --x") as refused:
                    await turn(board.ask("b", "k", slot=True))
                assert refused.value.status == 503
            assert await turn(board.ask("a", "k", slot=True))
            await asyncio.sleep(0.05)
            assert (runs.ended, board.phase, box.log) == (None, "ready", [])
            assert not board.last_switch

    run(body)


def test_when_idle_what_begins_while_the_next_file_is_read_is_not_ended() -> None:
    class SlowDisk(FakeBox):
        async def prefetch(self, preset: str) -> None:
            await super().prefetch(preset)
            await asyncio.sleep(0.05)

    async def body() -> None:
        box = SlowDisk()
        async with running(box, switch_policy="when_idle", drain_timeout=0.01) as board:
            other = board.ask("b", "k", slot=True)
            await until(lambda: "prefetch b" in box.log)
            late = await turn(board.ask("a", "k", slot=True))
            await asyncio.sleep(0.15)
            assert late.ended is None and "switch b" not in box.log
            board.release(late)
            assert (await turn(other)).preset == "b"

    run(body)


def test_a_server_that_dies_while_the_next_file_is_read_ends_the_reading() -> None:
    class DeadDisk(FakeBox):
        async def prefetch(self, preset: str) -> None:
            await super().prefetch(preset)
            await asyncio.Event().wait()

    async def body() -> None:
        box = DeadDisk()
        async with running(box) as board:
            other = board.ask("b", "k", slot=True)
            await until(lambda: "prefetch b" in box.log)
            box.die()
            box.coming = False
            async with asyncio.timeout(3):
                assert (await other.granted).preset == "b"

    run(body)


class Disk(FakeBox):
    """A box whose files take for ever to be read the first time."""

    async def prefetch(self, preset: str) -> None:
        first = f"prefetch {preset}" not in self.log
        await super().prefetch(preset)
        if first:
            await asyncio.Event().wait()


@pytest.mark.parametrize("dies", [True, False], ids=["the server is gone", "only its connection"])
def test_a_server_lost_under_a_request_while_the_next_file_is_read(dies: bool) -> None:
    async def body() -> None:
        box = Disk()
        async with running(box) as board, asyncio.timeout(5):
            lease = await turn(board.ask("a", "k", slot=True))
            other = board.ask("b", "k", slot=True)
            await until(lambda: "prefetch b" in box.log)
            if dies:
                box.die()
            board.lost(lease)
            board.release(lease)
            again = board.ask("a", "k", slot=True)
            await until(lambda: board.phase == "loading" or not dies)
            box.coming = False
            board.release(await turn(again))
            assert (await other.granted).preset == "b"

    run(body)


def test_the_server_is_not_stopped_before_what_was_ended_has_left_it() -> None:
    async def body() -> None:
        box = FakeBox()
        async with running(box, drain_timeout=0.05) as board:
            lease = await turn(board.ask("a", "k", slot=True))

            def left() -> None:
                box.log.append("left")
                board.release(lease)

            def leaves() -> None:
                asyncio.get_running_loop().call_later(0.1, left)

            lease.abort = leaves
            await turn(board.ask("b", "k", slot=True))
            assert box.log == ["prefetch b", "left", "switch b"]

    run(body)


def test_what_outlasts_the_drain_is_ended_with_a_reason() -> None:
    async def body() -> None:
        async with running(FakeBox(), drain_timeout=0.05) as board:
            lease = await turn(board.ask("a", "k", slot=True))
            ended = asyncio.Event()
            lease.abort = ended.set
            other = board.ask("b", "k", slot=True)
            await asyncio.wait_for(ended.wait(), PATIENCE_S)
            assert lease.ended and lease.ended.status == 503 and "drain_timeout" in lease.ended.message
            board.release(lease)
            assert (await turn(other)).preset == "b"

    run(body)


def test_requests_are_grouped_by_preset_while_it_dwells() -> None:
    async def body() -> None:
        box = FakeBox()
        async with running(box, min_dwell=0.2) as board:
            for _ in range(3):
                board.ask("b", "k", slot=False)
                lease = await turn(board.ask("a", "k", slot=False))
                assert lease.preset == "a"
                board.release(lease)
                await asyncio.sleep(0.02)  # the board may look, and must not go yet
            assert "switch b" not in box.log
            await until(lambda: board.in_flight == 3)
            assert box.log.count("switch b") == 1

    run(body)


def test_when_idle_a_switch_waits_for_the_last_one_that_runs() -> None:
    async def body() -> None:
        box = FakeBox()
        async with running(box, switch_policy="when_idle") as board:
            running_one = await turn(board.ask("a", "k", slot=True))
            other = board.ask("b", "k", slot=True)
            next_one = board.ask("a", "k", slot=True)
            await asyncio.sleep(0.05)
            assert board.phase == "ready" and not other.granted.done()
            board.release(running_one)
            board.release(await turn(next_one))
            assert (await turn(other)).preset == "b"

    run(body)


def test_switching_off_refuses_what_another_preset_would_have_to_serve() -> None:
    async def body() -> None:
        async with running(FakeBox(), switch_policy="off") as board:
            with pytest.raises(Refusal, match="lmswitch b") as caught:
                board.ask("b", "k", slot=True)
            assert caught.value.status == 503 and "Retry-After" in caught.value.headers

    run(body)


def test_a_preset_that_fails_is_told_once_and_the_former_serves_on() -> None:
    async def body() -> None:
        box = FakeBox()
        box.failing["b"] = "b failed: out of memory"
        async with running(box) as board:
            running_one = await turn(board.ask("a", "k", slot=True))
            other = board.ask("b", "k", slot=True)
            await until(lambda: board.phase == "draining")
            bystander = board.ask("a", "k", slot=True)
            board.release(running_one)
            with pytest.raises(Refusal, match="out of memory") as caught:
                await turn(other)
            assert caught.value.status == 503 and caught.value.headers["Retry-After"]
            assert (await turn(bystander)).preset == "a"
            with pytest.raises(Refusal, match="out of memory"):
                board.ask("b", "k", slot=True)
            assert box.log.count("switch b") == 1

    run(body)


def test_a_preset_that_was_mended_and_started_by_hand_has_failed_no_longer() -> None:
    async def body() -> None:
        box = FakeBox()
        box.failing["b"] = "no such file"
        async with running(box) as board:
            with pytest.raises(Refusal, match="no such file"):
                await turn(board.ask("b", "k", slot=True))
            box.failing.clear()
            box.become("b")
            await until(lambda: board.serving is not None and board.serving.preset == "b")
            board.release(await turn(board.ask("a", "k", slot=True)))
            assert (await turn(board.ask("b", "k", slot=True))).preset == "b"

    run(body)


def test_a_crash_holds_what_comes_until_the_server_is_back() -> None:
    async def body() -> None:
        box = FakeBox()
        async with running(box) as board:
            lease = await turn(board.ask(None, "k", slot=True))
            box.die()
            await until(lambda: board.phase == "loading")
            waiting = board.ask(None, "k", slot=True)
            again = board.again(lease)
            board.release(lease)
            assert not waiting.granted.done()
            box.coming = False
            assert (await turn(again)).pid == box.pid
            assert not waiting.granted.done(), "who had lost its server comes first"
            assert again.losses == 1

    run(body)


def test_who_lost_its_server_starts_nothing_that_it_could_not_have_started_before() -> None:
    async def body() -> None:
        box = FakeBox("c")
        async with running(box, default_preset="b") as board:
            barred = await turn(board.ask(None, "k", slot=True, may_use="c".__eq__))
            reading = await turn(board.ask(None, "k", slot=False, reads=True))
            box.become(None)
            await until(lambda: board.phase == "stopped")
            for lease, status in ((barred, 403), (reading, 503)):
                again = board.again(lease)
                board.release(lease)
                with pytest.raises(Refusal) as caught:
                    await turn(again)
                assert caught.value.status == status
            assert not box.log

    run(body)


def test_who_lost_its_server_waits_no_longer_than_others_for_it_to_come_back() -> None:
    async def body() -> None:
        box = FakeBox()
        async with running(box, hold_timeout=0.05) as board:
            lease = await turn(board.ask(None, "k", slot=True))
            box.die()
            await until(lambda: board.phase == "loading")
            again = board.again(lease)
            board.release(lease)
            await until(lambda: board.overdue(again))

    run(body)


def test_nobody_is_sent_to_a_server_that_was_lost() -> None:
    async def body() -> None:
        box = FakeBox()
        async with running(box) as board:
            lease = await turn(board.ask(None, "k", slot=True))
            box.coming = True  # the socket is dead before the process is
            board.lost(lease)
            board.release(lease)
            assert not board.ask(None, "k", slot=True).granted.done()

    run(body)


def test_who_tells_late_that_a_former_server_was_lost_does_not_disturb_the_present_one() -> None:
    async def body() -> None:
        box = FakeBox("c")
        async with running(box) as board:
            former = await turn(board.ask(None, "k", slot=True))
            box.become("c")
            await until(lambda: board.serving is not None and board.serving.pid == box.pid)
            board.lost(former)
            assert board.ask(None, "k", slot=True).granted.done()

    run(body)


def test_when_nothing_runs_a_request_is_told_how_to_start_one() -> None:
    async def body() -> None:
        async with running(FakeBox(None)) as board:
            with pytest.raises(Refusal, match=r"no preset is active.*lmswitch"):
                await turn(board.ask(None, "k", slot=True))

    run(body)


def test_when_nothing_runs_the_default_preset_is_started() -> None:
    async def body() -> None:
        async with running(FakeBox(None), default_preset="b", switch_policy="off") as board:
            assert (await turn(board.ask(None, "k", slot=True))).preset == "b"

    run(body)


@pytest.mark.parametrize("policy", ["always", "off"])
def test_nothing_is_started_for_a_key_that_may_not_use_it(policy: str) -> None:
    async def body() -> None:
        box = FakeBox(None)
        async with running(box, default_preset="b", switch_policy=policy) as board:
            barred = board.ask(None, "k", slot=True, may_use="a".__eq__)
            with pytest.raises(Refusal, match="may not start b; name one of its own") as refusal:
                await turn(barred)
            assert refusal.value.status == 403 and not refusal.value.headers and not box.log
            barred = board.ask(None, "k", slot=True, may_use="a".__eq__)
            assert (await turn(board.ask(None, "other", slot=True))).preset == "b"
            with pytest.raises(Refusal):
                await turn(barred)
            assert box.log == ["switch b"]

    run(body)


def test_when_the_default_preset_fails_everybody_who_waits_is_told_why() -> None:
    async def body() -> None:
        box = FakeBox(None)
        box.failing["b"] = "no such file"
        async with running(box, default_preset="b") as board:
            with pytest.raises(Refusal, match="no such file"):
                await turn(board.ask(None, "k", slot=True))

    run(body)


def test_when_nothing_runs_and_switching_is_off_only_the_default_preset_is_started() -> None:
    async def body() -> None:
        box = FakeBox(None)
        async with running(box, default_preset="b", switch_policy="off") as board:
            with pytest.raises(Refusal, match="switch_policy is off") as refusal:
                await turn(board.ask("a", "k", slot=True))
            assert refusal.value.status == 503 and not box.log
            assert (await turn(board.ask("b", "k", slot=True))).preset == "b"

    run(body)


def test_a_preset_that_has_failed_by_itself_is_not_started_again_at_once() -> None:
    class Failed(FakeBox):
        async def look(self) -> Seen:
            return Seen("down", "b", reason="out of memory")

    async def body() -> None:
        box = Failed(None)
        async with running(box, default_preset="b") as board:
            assert board.phase == "failed"
            for preset in ("b", None):
                with pytest.raises(Refusal, match="out of memory"):
                    await turn(board.ask(preset, "k", slot=True))
            assert not box.log

    run(body)


def test_a_preset_that_fails_costs_nobody_else_an_answer() -> None:
    async def body() -> None:
        box = FakeBox(load_s=0.05)
        box.failing["b"] = "out of memory"
        async with running(box) as board:
            other = board.ask("b", "k", slot=True)
            await until(lambda: board.phase == "loading")
            bystander = board.ask(None, "k", slot=True)
            with pytest.raises(Refusal, match="out of memory"):
                await turn(other)
            assert (await turn(bystander)).preset == "a"

    run(body)


def test_a_full_queue_says_when_to_come_again() -> None:
    async def body() -> None:
        async with running(FakeBox(), queue_limit=3, queue_limit_per_key=2) as board:
            board.ask(None, "x", slot=True)
            for _ in range(2):
                board.ask(None, "x", slot=True)
            with pytest.raises(Refusal, match="this key's queue is full: 2") as mine:
                board.ask(None, "x", slot=True)
            board.ask(None, "y", slot=True)
            with pytest.raises(Refusal, match="the queue is full: 3") as all_of_it:
                board.ask(None, "z", slot=True)
            assert mine.value.status == all_of_it.value.status == 429
            for refusal, position in ((mine, "3"), (all_of_it, "4")):
                assert int(refusal.value.headers["Retry-After"]) >= 1
                assert refusal.value.headers["X-Queue-Position"] == position
                assert refusal.value.headers["X-Queue-Estimate-S"].isdigit()

    run(body)


def test_overdue_only_while_its_preset_does_not_serve() -> None:
    async def body() -> None:
        box = FakeBox()
        async with running(box, hold_timeout=0.05) as board:
            board.ask(None, "k", slot=True)
            in_line = board.ask(None, "k", slot=True)
            await asyncio.sleep(0.1)
            assert not board.overdue(in_line)
            box.die()
            await until(lambda: board.phase == "loading")
            await until(lambda: board.overdue(in_line))

    run(body)


def test_who_leaves_makes_room() -> None:
    async def body() -> None:
        async with running(FakeBox()) as board:
            first = board.ask(None, "k", slot=True)
            second = board.ask(None, "k", slot=True)
            third = board.ask(None, "k", slot=True)
            board.leave(second)
            assert board.position(third) == 1
            board.leave(first)
            assert third.granted.done() and board.in_flight == 1 and board.queued == 0

    run(body)


def test_a_hold_drains_and_then_keeps_everybody_waiting() -> None:
    async def body() -> None:
        box = FakeBox()
        async with running(box) as board:
            lease = await turn(board.ask(None, "k", slot=True))
            entered = asyncio.Event()
            leave = asyncio.Event()

            async def by_hand() -> None:
                async with board.hold("b"):
                    entered.set()
                    await leave.wait()

            holding = asyncio.ensure_future(by_hand())
            await until(lambda: board.phase == "draining")
            assert not entered.is_set()
            board.release(lease)
            await asyncio.wait_for(entered.wait(), PATIENCE_S)
            waiting = board.ask(None, "k", slot=True)
            box.become("b")
            await asyncio.sleep(0.02)
            assert not waiting.granted.done() and box.log == ["prefetch b"]
            leave.set()
            assert (await turn(waiting)).preset == "b" and waiting.switch == "waited"
            await holding

    run(body)


def test_whoever_holds_second_is_let_in_as_well() -> None:
    async def body() -> None:
        async with running(FakeBox()) as board, asyncio.timeout(PATIENCE_S):
            async with board.hold("b"), board.hold(None):
                assert board.phase == "held"
            one = board.hold("b")
            await one.__aenter__()
            two = asyncio.ensure_future(board.hold("b").__aenter__())
            await one.__aexit__(None, None, None)  # nothing ran in between: the box is held as before
            await two
            assert board.phase == "held"

    run(body)


def test_a_hold_that_is_given_up_while_it_drains_lets_requests_go_on() -> None:
    async def body() -> None:
        async with running(FakeBox()) as board:
            lease = await turn(board.ask(None, "k", slot=True))

            async def by_hand() -> None:
                async with board.hold(None):
                    pass

            holding = asyncio.ensure_future(by_hand())
            await until(lambda: board.phase == "draining")
            holding.cancel()
            board.release(lease)
            assert (await turn(board.ask(None, "k", slot=True))).preset == "a"

    run(body)


def test_a_hold_that_is_given_up_ends_nobody_and_lets_others_go_at_once() -> None:
    async def body() -> None:
        async with running(FakeBox("c"), drain_timeout=60.0) as board:
            lease = await turn(board.ask(None, "k", slot=True))

            async def by_hand() -> None:
                async with board.hold("b"):
                    pass

            holding = asyncio.ensure_future(by_hand())
            await until(lambda: board.phase == "draining")
            holding.cancel()
            assert (await turn(board.ask(None, "k", slot=True))).preset == "c"
            assert lease in board.leases and lease.ended is None

    run(body)


def test_a_lock_that_lmswitch_has_is_waited_for() -> None:
    async def body() -> None:
        box = FakeBox()
        box.locked = 2
        async with running(box) as board:
            assert (await turn(board.ask("b", "k", slot=True))).preset == "b"

    run(body)


def test_idle_unload_and_the_reload_by_the_next_request_to_the_next_gateway() -> None:
    async def body() -> None:
        box = FakeBox()
        async with running(box, idle_unload=0.05) as board:
            await until(lambda: board.phase == "stopped")
            assert box.log == ["unload a"]
        async with running(box) as restarted:
            assert restarted.phase == "stopped"
            assert (await turn(restarted.ask(None, "k", slot=True))).preset == "a"

    run(body)


def test_nothing_is_unloaded_under_a_request_nor_until_it_is_over_for_so_long() -> None:
    async def body() -> None:
        box = FakeBox()
        async with running(box, idle_unload=0.2) as board:
            lease = await turn(board.ask(None, "k", slot=True))
            await asyncio.sleep(0.4)
            assert not box.log
            board.release(lease)
            over = board.clock()
            await until(lambda: bool(box.log))
            assert board.clock() - over >= 0.19

    run(body)


def test_a_box_that_somebody_has_locked_is_not_tried_over_and_over() -> None:
    async def body() -> None:
        box = FakeBox()
        box.locked = 2
        async with running(box, idle_unload=0.1) as board:
            began = board.clock()
            await until(lambda: box.log == ["unload a"])
            assert board.clock() - began >= 0.28

    run(body)


def test_whoever_ends_the_board_while_it_unloads_does_not_wait_for_ever() -> None:
    class EndsThen(FakeBox):
        task: asyncio.Future[None]

        async def unload(self, preset: str) -> None:
            await super().unload(preset)
            asyncio.get_running_loop().call_soon(self.task.cancel)

    async def body() -> None:
        box = EndsThen()
        board = Board({"a": 1}, settings(idle_unload=0.01), box)
        box.task = asyncio.ensure_future(board.run())
        done, _ = await asyncio.wait({box.task}, timeout=3)
        box.task.cancel()
        assert done and box.log == ["unload a"]

    run(body)


def test_who_only_reads_keeps_nothing_loaded_and_starts_nothing() -> None:
    async def body() -> None:
        box = FakeBox()
        async with running(box, idle_unload=0.2, default_preset="b") as board:
            async with asyncio.timeout(PATIENCE_S):
                while not box.log:
                    board.release(await turn(board.ask(None, "k", slot=False, reads=True)))
                    await asyncio.sleep(0.01)
            await until(lambda: board.phase == "stopped")
            with pytest.raises(Refusal, match="no preset is active") as refusal:
                await turn(board.ask(None, "k", slot=False, reads=True))
            assert refusal.value.status == 503 and box.log == ["unload a"]

    run(body)


def test_what_is_started_by_hand_after_a_long_rest_is_not_unloaded_at_once() -> None:
    async def body() -> None:
        box = FakeBox()
        async with running(box, idle_unload=0.2) as board:
            await until(lambda: board.phase == "stopped")
            await asyncio.sleep(0.3)
            async with board.hold("b"):
                box.become("b")
            await until(lambda: board.phase == "ready")
            began = board.clock()
            await until(lambda: box.log == ["unload a", "unload b"])
            assert board.clock() - began >= 0.19

    run(body)


def test_where_nobody_may_switch_who_waited_for_another_preset_is_refused() -> None:
    async def body() -> None:
        box = FakeBox("a")
        box.coming = True
        async with running(box, switch_policy="off") as board:
            other, same, any_of_them = (board.ask(preset, "k", slot=False) for preset in ("b", "a", None))
            box.coming = False
            with pytest.raises(Refusal, match=r"the preset b is not active.*switch_policy is off") as refusal:
                await turn(other)
            assert refusal.value.status == 503 and refusal.value.headers["Retry-After"]
            assert [(await turn(one)).preset for one in (same, any_of_them)] == ["a", "a"]
            assert not box.log

    run(body)


def test_a_request_that_was_held_does_not_undo_a_switch_by_hand_where_it_may_not_switch() -> None:
    async def body() -> None:
        box = FakeBox("a")
        async with running(box, switch_policy="off") as board:
            async with asyncio.timeout(PATIENCE_S), board.hold("b"):
                held = board.ask("a", "k", slot=True)
                box.become("b")
            with pytest.raises(Refusal, match="switch_policy is off"):
                await turn(held)
            assert (await turn(board.ask(None, "k", slot=True))).preset == "b"
            assert box.log == ["prefetch b"]

    run(body)


class SlowDisk(FakeBox):
    """Reads a model's file for ever; `given_up` when that was cancelled."""

    given_up = False

    async def prefetch(self, preset: str) -> None:
        """Read on."""
        await super().prefetch(preset)
        try:
            await asyncio.Event().wait()
        finally:
            self.given_up = True


@pytest.mark.parametrize("busy", [True, False])
def test_a_switch_by_hand_does_not_wait_for_a_file_that_is_read_for_another_preset(busy: bool) -> None:
    async def body() -> None:
        box = SlowDisk("a")
        async with running(box) as board:
            running_ = await turn(board.ask("a", "k", slot=True)) if busy else None
            other = board.ask("b", "k", slot=True)
            await until(lambda: board.phase == "prefetching")
            entered = asyncio.Event()

            async def by_hand() -> None:
                async with board.hold(None):
                    entered.set()
                    box.become("b")

            holding = asyncio.ensure_future(by_hand())
            await until(lambda: box.given_up)
            if running_:
                await until(lambda: board.phase == "draining")
                assert not entered.is_set(), "what runs is drained first"
                board.release(running_)
            await asyncio.wait_for(holding, PATIENCE_S)
            assert (await turn(other)).preset == "b" and box.log == ["prefetch b"]

    run(body)


def test_a_hold_drains_what_still_runs_though_the_server_was_lost_to_others() -> None:
    async def body() -> None:
        box = FakeBox("c")
        async with running(box) as board:
            one, other = [await turn(board.ask("c", "k", slot=True)) for _ in range(2)]
            box.coming = True
            board.lost(one)
            board.release(one)
            await until(lambda: board.phase == "loading")
            entered = asyncio.Event()

            async def by_hand() -> None:
                async with board.hold("b"):
                    entered.set()

            holding = asyncio.ensure_future(by_hand())
            await until(lambda: board.phase == "draining")
            assert not entered.is_set() and other.ended is None
            board.release(other)
            await asyncio.wait_for(holding, PATIENCE_S)

    run(body)


def test_a_hold_that_is_given_up_while_a_file_is_read_ends_no_measurement() -> None:
    async def body() -> None:
        box = SlowDisk("a")
        async with running(box) as board:
            alone = await turn(board.ask("a", "m", slot=True, alone=True))

            async def by_hand() -> None:
                async with board.hold("b"):
                    pass

            holding = asyncio.ensure_future(by_hand())
            await until(lambda: board.phase == "prefetching")
            holding.cancel()
            await until(lambda: board.phase == "ready")
            assert alone.ended is None and alone in board.leases

    run(body)


class SlowLook(FakeBox):
    """Takes a while to find that a file is in memory already."""

    async def prefetch(self, preset: str) -> None:
        """Look."""
        await super().prefetch(preset)
        await asyncio.sleep(0.05)


def test_pauses_that_are_shorter_than_a_look_at_the_file_are_enough_to_go_over() -> None:
    async def body() -> None:
        box = SlowLook("a")
        async with running(box, switch_policy="when_idle") as board:
            lease = await turn(board.ask("a", "k", slot=True))
            other = board.ask("b", "k", slot=True)
            for _ in range(20):
                board.release(lease)
                await asyncio.sleep(0.01)  # the pause
                if other.granted.done():
                    break
                mine = board.ask("a", "k", slot=True)
                if not mine.granted.done():
                    break
                lease = mine.granted.result()
                await asyncio.sleep(0.06)
            assert (await turn(other)).preset == "b" and box.log[:2] == ["prefetch b", "switch b"]

    run(body)


def test_a_file_that_was_read_for_who_has_left_is_looked_at_again() -> None:
    async def body() -> None:
        box = SlowLook("a")
        async with running(box, switch_policy="when_idle") as board:
            other = board.ask("b", "k", slot=True)
            await until(lambda: board.phase == "prefetching")
            lease = await turn(board.ask("a", "k", slot=True))
            await until(lambda: board.phase == "ready")
            board.leave(other)
            await asyncio.sleep(0.01)
            board.release(lease)
            assert (await turn(board.ask("b", "k", slot=True))).preset == "b"
            assert box.log == ["prefetch b", "prefetch b", "switch b"]

    run(body)


def test_a_file_is_read_no_further_when_nobody_wants_it_any_more() -> None:
    async def body() -> None:
        box = SlowDisk("a")
        async with running(box) as board:
            other = board.ask("b", "k", slot=True)
            await until(lambda: board.phase == "prefetching")
            board.leave(other)
            await until(lambda: board.phase == "ready")
            assert box.given_up
            assert (await turn(board.ask("a", "k", slot=True))).preset == "a"

    run(body)


def test_who_waited_behind_a_measurement_that_was_given_up_goes_at_once() -> None:
    async def body() -> None:
        async with running(FakeBox("c")) as board:
            before = await turn(board.ask("c", "k", slot=True))
            alone = board.ask("c", "m", slot=True, alone=True)
            behind = board.ask("c", "k", slot=True)
            assert not behind.granted.done()
            board.leave(alone)
            assert behind.granted.done() and before in board.leases

    run(body)


def test_what_the_guard_forbade_is_not_held_against_the_preset() -> None:
    async def body() -> None:
        box = FakeBox("a", load_s=0.05)
        box.failing["b"] = "the card is out of service"
        async with running(box) as board:
            asked = board.ask("b", "k", slot=True)
            await until(lambda: board.phase == "loading")
            board.block("the card is hot")
            with pytest.raises(Refusal, match="the card is hot"):
                await turn(asked)
            await until(lambda: board.phase == "ready")
            board.block("")
            box.failing.clear()
            assert (await turn(board.ask("b", "k", slot=True))).preset == "b"

    run(body)


def test_a_measurement_goes_when_nothing_else_runs_and_alone() -> None:
    async def body() -> None:
        async with running(FakeBox("c")) as board:
            before = await turn(board.ask(None, "k", slot=True))
            counting = await turn(board.ask(None, "k", slot=False))
            alone = board.ask("c", "m", slot=True, alone=True)
            later = [board.ask(None, "k", slot=slot) for slot in (True, False)]
            board.release(before)
            assert not alone.granted.done(), "what takes no slot uses the machine too"
            board.release(counting)
            lease = await turn(alone)
            assert [ticket.granted.done() for ticket in later] == [False, False]
            assert not board.ask(None, "k", slot=True).granted.done()
            board.release(lease)
            assert [ticket.granted.done() for ticket in later] == [True, True]

    run(body)


def test_between_two_measurements_who_waited_is_served() -> None:
    async def body() -> None:
        async with running(FakeBox()) as board:
            first = await turn(board.ask(None, "m", slot=True, alone=True))
            waiting = board.ask(None, "k", slot=True)
            second = board.ask(None, "m", slot=True, alone=True)
            board.release(first)
            assert waiting.granted.done() and not second.granted.done()
            board.release(await turn(waiting))
            assert second.granted.done()

    run(body)


def test_a_measurement_is_over_after_half_of_the_hold_timeout() -> None:
    async def body() -> None:
        async with running(FakeBox(), hold_timeout=0.1) as board:
            lease = await turn(board.ask(None, "m", slot=True, alone=True))
            ended = asyncio.Event()
            lease.abort = ended.set
            waiting = board.ask(None, "k", slot=True)
            await asyncio.wait_for(ended.wait(), PATIENCE_S)
            assert lease.ended and lease.ended.status == 503 and TOO_LONG in lease.ended.message
            board.release(lease)  # what the relay does then
            board.release(await turn(waiting))
            quick = await turn(board.ask(None, "m", slot=True, alone=True))
            board.release(quick)
            assert quick.deadline and quick.deadline.cancelled()

    run(body)


def test_a_measurement_lasts_no_longer_than_half_of_the_hold_timeout() -> None:
    async def body() -> None:
        async with running(FakeBox(), hold_timeout=600.0) as board:
            lease = await turn(board.ask(None, "m", slot=True, alone=True))
            assert lease.deadline
            assert lease.deadline.when() - asyncio.get_running_loop().time() == pytest.approx(300.0, abs=5.0)
            board.release(lease)

    run(body)


def test_a_measurement_that_gets_no_turn_lets_the_others_go() -> None:
    async def body() -> None:
        async with running(FakeBox("c"), hold_timeout=0.1) as board:
            board.ask(None, "k", slot=True)
            alone = board.ask(None, "m", slot=True, alone=True)
            behind = board.ask(None, "k", slot=True)
            await until(lambda: board.overdue(alone))
            assert not board.overdue(behind)
            board.leave(alone)
            assert (await turn(behind)).preset == "c"

    run(body)


def test_no_request_switches_while_something_is_measured() -> None:
    async def body() -> None:
        box = FakeBox()
        async with running(box) as board:
            lease = await turn(board.ask("a", "m", slot=True, alone=True))
            other = board.ask("b", "k", slot=True)
            await asyncio.sleep(0.02)
            assert (board.phase, box.log) == ("ready", [])
            board.release(lease)
            assert (await turn(other)).preset == "b"

    run(body)


@pytest.mark.parametrize("policy", ["always", "when_idle"])
def test_between_two_measurements_another_preset_has_its_turn_however_long_the_look_at_it_takes(
    policy: str,
) -> None:
    class Slow(FakeBox):
        async def refusal(self, preset: str) -> str:
            await asyncio.sleep(0.03)
            return await super().refusal(preset)

        async def prefetch(self, preset: str) -> None:
            await asyncio.sleep(0.03)

    async def body() -> None:
        async with running(Slow(), switch_policy=policy) as board:
            lease = await turn(board.ask("a", "m", slot=True, alone=True))
            other = board.ask("b", "k", slot=True)
            later = board.ask("a", "k", slot=True)
            board.release(lease)
            assert later.granted.done(), "what is no measurement goes on meanwhile"
            board.release(await turn(later))
            again = board.ask("a", "m", slot=True, alone=True)
            assert (await turn(other)).preset == "b"
            assert not again.granted.done()

    run(body)


def test_who_comes_for_another_preset_later_does_not_keep_a_measurement_waiting() -> None:
    async def body() -> None:
        async with running(FakeBox()) as board:
            before = await turn(board.ask("a", "k", slot=True))
            alone = board.ask("a", "m", slot=True, alone=True)
            await asyncio.sleep(0.01)
            other = board.ask("b", "k", slot=True)
            board.release(before)
            board.release(await turn(alone))
            assert (await turn(other)).preset == "b"

    run(body)


def test_a_preset_that_may_not_be_gone_to_yet_keeps_no_measurement_waiting() -> None:
    async def body() -> None:
        async with running(FakeBox(), min_dwell=PATIENCE_S) as board:
            board.ask("b", "k", slot=True)
            board.release(await turn(board.ask("a", "m", slot=True, alone=True)))

    run(body)


def test_a_switch_by_hand_does_not_wait_for_a_measurement() -> None:
    async def body() -> None:
        async with running(FakeBox(), drain_timeout=60.0, hold_timeout=600.0) as board:
            lease = await turn(board.ask(None, "m", slot=True, alone=True))
            lease.abort = lambda: board.release(lease)
            async with asyncio.timeout(PATIENCE_S), board.hold("b"):
                assert lease.ended and lease.ended.status == 503

    run(body)


def test_a_box_that_does_not_answer_is_looked_at_again_after_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(board_module, "TROUBLE_S", 0.03)

    class Silent(FakeBox):
        looks = 0

        async def look(self) -> Seen:
            self.looks += 1
            if self.looks < 4:
                raise LlmboxError("systemd does not answer")
            return await super().look()

    async def body() -> None:
        began = asyncio.get_running_loop().time()
        async with running(Silent()) as board:
            assert (await turn(board.ask(None, "k", slot=True))).preset == "a"
            assert board.clock() - began >= 0.08
        assert caplog.text.count("systemd does not answer; looking again") == 3

    run(body)


def test_random_traffic_loses_nobody() -> None:
    import random

    rng = random.Random(7)  # noqa: S311  (a seed, not a secret)

    async def body() -> None:
        box = FakeBox("a", load_s=0.002)
        served = 0

        async with running(box, queue_limit=500, queue_limit_per_key=500) as board:

            async def client(number: int) -> None:
                nonlocal served
                for _ in range(30):
                    ticket = board.ask(
                        rng.choice([None, "a", "b", "c"]), f"k{number}", slot=rng.random() < 0.8
                    )
                    while True:
                        lease = await turn(ticket)
                        assert ticket.preset in (None, lease.preset)
                        await asyncio.sleep(rng.random() * 0.003)
                        board.release(lease)
                        if lease.pid == box.pid or rng.random() < 0.5:
                            break
                        ticket = board.again(lease)
                    served += 1

            async def trouble() -> None:
                for _ in range(10):
                    await asyncio.sleep(0.02)
                    box.die()
                    await asyncio.sleep(0.005)
                    box.coming = False

            await asyncio.gather(*(client(number) for number in range(8)), trouble())
            assert served == 240 and board.queued == 0 and board.in_flight == 0

    run(body)


def test_blocked_everybody_is_refused_with_the_reason_until_it_serves_again() -> None:
    async def body() -> None:
        box = FakeBox()
        async with running(box) as board:
            running_one = await turn(board.ask(None, "k", slot=True))
            waiting = board.ask(None, "k", slot=True)
            board.block("the card is hot")
            assert running_one.ended and running_one.ended.status == 503
            board.lost(running_one)
            for refused in (waiting, board.again(running_one)):
                with pytest.raises(Refusal, match="the card is hot"):
                    await turn(refused)
            board.release(running_one)
            with pytest.raises(Refusal, match="the card is hot") as caught:
                board.ask(None, "k", slot=False)
            assert caught.value.status == 503 and caught.value.headers["Retry-After"]
            board.block("")
            await turn(board.ask(None, "k", slot=True))

    run(body)


def test_without_prefetch_the_next_file_is_left_alone() -> None:
    async def body() -> None:
        box = FakeBox()
        async with running(box, prefetch=False) as board:
            await turn(board.ask("b", "k", slot=True))
            assert box.log == ["switch b"]

    run(body)


def test_a_waiting_request_is_told_what_its_turn_will_take() -> None:
    async def body() -> None:
        async with running(FakeBox()) as board:
            board.service_s, board.load_s = 3.0, {"b": 40.0}  # what the last ones took
            held = await turn(board.ask("a", "k", slot=True))
            same, other = board.ask("a", "k", slot=True), board.ask("b", "k", slot=True)
            assert (board.position(same), board.position(other)) == (1, 1), "each in the line of its preset"
            assert (board.estimate_s(same), board.estimate_s(other)) == (3.0, 43.0)
            board.load_s.clear()
            assert board.estimate_s(other) == 3.0 + LOAD_GUESS_S
            board.release(held)

    run(body)


def test_the_estimate_is_of_what_requests_took_that_generate() -> None:
    async def body() -> None:
        now = 0.0
        board = Board({"a": 1}, settings(), FakeBox(), lambda: now)
        board.serving = Seen("ready", "a", 100)
        for took, slot in ((10.0, True), (99.0, False), (20.0, True)):
            lease = await turn(board.ask("a", "k", slot=slot))
            now += took
            board.release(lease)
            now += 60.0  # its client is slow
            board.release(lease)
        assert board.service_s == 10.0 + SMOOTHING * 10.0

    run(body)


def test_who_takes_any_preset_is_told_of_the_slots_of_the_one_that_serves() -> None:
    async def body() -> None:
        async with running(FakeBox("c")) as board:
            board.service_s = 4.0
            tickets = [board.ask(None, "k", slot=True) for _ in range(3)]
            assert board.estimate_s(tickets[2]) == 4.0 / board.slots["c"] == 2.0

    run(body)
