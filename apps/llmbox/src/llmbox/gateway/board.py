"""The board: which requests wait, which are with the server, and when the box goes over to another preset.

One task, `Board.run`, moves the box from state to state; requests only join and leave. No process, file or
socket of its own: the machine comes in through `Box`, so that every path is tested against a fake one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from llmbox.errors import LlmboxError
from llmbox.gateway.refusals import Refusal
from llmbox.gateway.requests import TOO_LONG
from llmbox.gateway.settings import Settings

LOOK_LOADING_S = 0.1  # between two looks at a server that loads
LOOK_DOWN_S = 2.0  # between two looks at a box where nothing runs: somebody may start a preset by hand
LOCKED_S = 0.25
TROUBLE_S = 1.0
FAILED_AGAIN_S = 30.0  # a preset that failed to start is not tried again for so long
BY_HAND = "the box is being switched by hand"
SOON = {"Retry-After": "1"}  # for whoever is held then in any case
END_GRACE_S = 2.0  # for a request that was told to end to leave the server
SMOOTHING = 0.2  # weight of the newest figure in a running mean
LOAD_GUESS_S = 30.0  # what loading a preset takes, until it was seen: 20 to 57 s for large models
# Of hold_timeout: what a measurement may wait for its turn, others behind it, and what it may then last. Who
# came meanwhile and needs another preset has the rest for its start.
ALONE_TURN, ALONE_LEASE = 0.25, 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """What a look at the box showed. `pid` is the server's process; `reason` says why nothing runs.

    `unloaded` is the preset that was stopped because nobody used it, and that the next request starts.
    """

    state: Literal["ready", "coming", "down"]
    preset: str | None = None
    pid: int = 0
    reason: str = ""
    unloaded: str | None = None


@dataclass(frozen=True)
class Moved:
    """How a switch ended. `parts` are the seconds that it took: stop, load; `seen` is the box after it."""

    ok: bool
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    seen: Seen | None = None


class Busy(Exception):
    """Somebody else holds the switch lock."""


class Box(Protocol):
    """What the board needs of the machine (llmbox.gateway.box.SystemdBox, or a fake)."""

    async def look(self) -> Seen: ...
    async def refusal(self, preset: str) -> str: ...
    async def gone(self, pid: int) -> None: ...
    async def switch(self, preset: str) -> Moved: ...
    async def unload(self, preset: str) -> None: ...
    async def prefetch(self, preset: str) -> None: ...


@dataclass(eq=False)
class Lease:
    """Leave to send one request to the server that runs now; ends with `Board.release`."""

    ticket: Ticket
    preset: str
    pid: int
    granted: float
    ended: Refusal | None = None
    abort: Callable[[], None] = lambda: None
    deadline: asyncio.TimerHandle | None = None

    def end(self, refusal: Refusal) -> None:
        """Take the leave back: whoever holds it closes its connection and tells its client."""
        if self.ended is None:
            self.ended = refusal
            self.abort()


@dataclass(eq=False)
class Ticket:
    """A request in the queue. `preset` is the one that it needs, None when any will do.

    `may_use` tells whether its account may use a preset. `reads`: it does no work, see requests.Route.
    `alone`: a measurement. It goes when no other request runs, and none goes while it does.
    """

    preset: str | None
    account: str
    slot: bool
    may_use: Callable[[str], bool]
    alone: bool
    arrived: float
    granted: asyncio.Future[Lease]
    unserved_since: float | None = None
    losses: int = 0
    switch: str = ""  # caused, waited: what it had to do with a switch
    reads: bool = False


class Board:
    """The queue and the one server behind it."""

    def __init__(
        self, slots: Mapping[str, int], settings: Settings, box: Box, clock: Callable[[], float] | None = None
    ) -> None:
        self.slots = dict(slots)
        self.settings = settings
        self.box = box
        self.clock = clock or asyncio.get_running_loop().time
        self.serving: Seen | None = None
        self.blocked = ""  # why every request is refused
        self.phase = "starting"
        self.target: str | None = None  # the preset that is loading
        self.since = self.clock()
        self.waiting: dict[Ticket, None] = {}
        self.leases: set[Lease] = set()
        self.failed: dict[str, tuple[float, str]] = {}
        self.last_switch: dict[str, object] = {}
        self.switches: dict[tuple[str, str], int] = {}
        self.switch_parts: dict[tuple[str, str], tuple[int, float]] = {}  # how many, and their seconds
        self.load_s: dict[str, float] = {}
        self.service_s = 0.0
        self._run = 0
        self._ready_since = self.clock()
        self._last_used = self.clock()
        self._holds: dict[object, str | None] = {}
        self._cleared: tuple[str | None, dict[str, float]] = (None, {})  # for a hold: what served, and parts
        self._drained = asyncio.Event()
        self._wake = asyncio.Event()
        self._suspect = False
        self._prepared: str | None = None  # whose file has been read while the present server serves
        self._known: Seen | None = None  # what a switch has just found, so that nobody need look again

    # --- what requests do ---

    def ask(
        self,
        preset: str | None,
        account: str,
        *,
        slot: bool,
        alone: bool = False,
        may_use: Callable[[str], bool] = lambda _: True,
        reads: bool = False,
    ) -> Ticket:
        """Join the queue; the ticket's `granted` is done at once when the server is free.

        Raises Refusal: 429 when the queue is full, 503 for a preset that just failed or may not be started,
        and while the gateway is blocked.
        """
        if self.blocked:
            raise Refusal(503, self.blocked, {"Retry-After": str(int(FAILED_AGAIN_S))})
        ticket = Ticket(preset, account, slot, may_use, alone, self.clock(), _future())
        ticket.reads = reads
        self._used(ticket)
        if self._fits(ticket) and self._free(ticket) and not self._before(ticket):
            self._grant(ticket)
            return ticket
        try:
            self._check_preset(ticket)
            self._check_room(ticket)
        except Refusal as refusal:
            refusal.headers.update(self.queue_headers(ticket))
            raise
        if not self._fits(ticket):
            ticket.unserved_since = ticket.arrived
        self.waiting[ticket] = None
        self._wake.set()
        return ticket

    def again(self, lease: Lease, *, counts: bool = True) -> Ticket:
        """Join again at the head, after the server was lost under a request that had given nothing yet.

        `counts`: the request had reached the server, and may be why it is gone.
        """
        old = lease.ticket
        ticket = Ticket(old.preset, old.account, old.slot, old.may_use, old.alone, old.arrived, _future())
        ticket.losses = old.losses + counts
        ticket.switch, ticket.reads = old.switch, old.reads
        ticket.unserved_since = self.clock()
        self.waiting = {ticket: None, **self.waiting}
        if self.blocked:
            self._refuse(ticket, 503, self.blocked)
        self._wake.set()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Go away: a ticket that waits is torn up, a lease that it got is given back."""
        self.waiting.pop(ticket, None)
        if ticket.granted.done() and not ticket.granted.cancelled() and ticket.granted.exception() is None:
            self.release(ticket.granted.result())
        else:
            ticket.granted.cancel()
        self._pump()  # it may have kept others back: a measurement does
        self._wake.set()

    def release(self, lease: Lease) -> None:
        """Give a lease back; safe to repeat."""
        if lease not in self.leases:
            return
        self.leases.discard(lease)
        if lease.deadline:
            lease.deadline.cancel()
        self._used(lease.ticket)
        if lease.ticket.slot:
            took = self.clock() - lease.granted
            self.service_s = took if not self.service_s else _mean(self.service_s, took)
        self._pump()
        self._wake.set()

    def lost(self, lease: Lease) -> None:
        """The server went away under a lease: nobody is sent to it before it has been looked at again."""
        if self.serving and self.serving.pid == lease.pid:
            self.serving = None
            self._suspect = True
            self._wake.set()

    def block(self, reason: str) -> None:
        """Refuse everything that waits, runs and comes, with this reason; "" serves again."""
        if reason == self.blocked:
            return
        log.warning("every request is refused: %s", reason or "no longer")
        self.blocked = reason
        if reason:
            for ticket in list(self.waiting):
                self._refuse(ticket, 503, reason)
            for lease in list(self.leases):
                lease.end(Refusal(503, reason, {"Retry-After": str(int(FAILED_AGAIN_S))}))
        self._wake.set()

    def overdue(self, ticket: Ticket) -> bool:
        """Whether the ticket has waited for longer than `hold_timeout` for its preset, or to be alone."""
        if ticket.alone:
            return self.clock() - ticket.arrived > ALONE_TURN * self.settings.hold_timeout
        since = ticket.unserved_since
        return since is not None and self.clock() - since > self.settings.hold_timeout

    def position(self, ticket: Ticket) -> int:
        """How many requests of the same preset are before this one in the queue, plus one."""
        ahead = itertools.takewhile(lambda other: other is not ticket, self.waiting)
        return 1 + sum(1 for other in ahead if ticket.preset in (None, other.preset))

    def estimate_s(self, ticket: Ticket) -> float:
        """Seconds until the ticket's turn, from the last loads and requests."""
        target = ticket.preset or (self.serving.preset if self.serving else None) or ""
        slots = max(1, self.slots.get(target, 1))
        turns = self.position(ticket) * self.service_s / slots
        return turns if self._fits(ticket) else turns + self.load_s.get(target, LOAD_GUESS_S)

    def queue_headers(self, ticket: Ticket) -> dict[str, str]:
        """Headers that tell a refused client where it stood."""
        return {
            "X-Queue-Position": str(self.position(ticket)),
            "X-Queue-Estimate-S": f"{self.estimate_s(ticket):.0f}",
        }

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self.waiting)

    @property
    def in_flight(self) -> int:
        """Requests that are with the server."""
        return len(self.leases)

    @asynccontextmanager
    async def hold(self, preset: str | None) -> AsyncIterator[Callable[[bool, Mapping[str, float]], None]]:
        """Keep every request here while somebody else switches; the body starts when the server is drained.

        `preset` is where that switch goes, None when it stops the server. The body may tell how it went:
        whether it is done, and the seconds of its parts.
        """
        me = object()

        def switched(ok: bool, parts: Mapping[str, float]) -> None:
            former, cleared = self._cleared
            self._record(former, preset, ok, {**cleared, **parts})

        self._drained.clear()
        self._holds[me] = preset
        self._wake.set()
        try:
            await self._drained.wait()
            yield switched
        finally:
            del self._holds[me]
            self._wake.set()

    # --- the one task that moves the box ---

    async def run(self) -> None:
        """Follow the box, and move it when requests need another preset. Runs until it is cancelled."""
        while True:
            if self._holds:  # a server that was lost may have left requests that still run
                await self._drain(BY_HAND, lambda: bool(self._holds))
                if self._holds:
                    await self._held()
                continue
            self._suspect = False
            known, self._known = self._known, None
            try:
                await self._step(known or await self.box.look())
            except (LlmboxError, OSError) as error:  # systemd did not answer: requests stay where they are
                log.error("%s; looking again in %g s", error, TROUBLE_S)
                await asyncio.sleep(TROUBLE_S)

    async def _step(self, seen: Seen) -> None:
        if seen.state == "ready":
            await self._serve(seen)
        elif seen.state == "coming":
            self._enter("loading", seen.preset)
            await asyncio.sleep(LOOK_LOADING_S)
        else:
            await self._down(seen)

    async def _serve(self, seen: Seen) -> None:
        assert seen.preset is not None
        if seen.pid != self._run:
            self._run, self._ready_since = seen.pid, self.clock()
        self.serving = seen
        self._prepared = None
        self.failed.pop(seen.preset, None)
        for ticket in self.waiting:
            if self._fits(ticket):
                ticket.unserved_since = None
        gone = asyncio.ensure_future(self.box.gone(seen.pid))
        try:
            while not gone.done() and not self._suspect:
                self._enter("ready")
                self._turn_away()
                self._pump()
                if not any(ticket.preset == self._prepared for ticket in self.waiting):
                    self._prepared = None  # by the next time it may no longer be in memory
                if self._holds:
                    ahead = self._prepare(next(iter(self._holds.values())), gone, lambda: bool(self._holds))
                    parts = {"prefetch": await self._timed(ahead)}
                    parts["drain"] = await self._timed(self._drain(BY_HAND, lambda: bool(self._holds)))
                    if self._holds:
                        self._cleared = (seen.preset, parts)
                    return
                target = self._target()
                if target:
                    if await self._go_to(target, gone):
                        return
                    continue
                if self._idle():
                    await self._unload(seen.preset)
                    return
                await self._woken(self._patience(), gone)
            if gone.done():
                log.warning("%s: its process %d is gone", seen.preset, seen.pid)
        finally:
            self.serving = None
            await _end(gone)
            now = self.clock()
            for ticket in self.waiting:
                ticket.unserved_since = ticket.unserved_since or now

    async def _held(self) -> None:
        self._enter("held")
        self._known = None
        while self._holds:
            self._drained.set()  # again for whoever joined
            self._wake.clear()
            await self._wake.wait()
        self._cleared = (None, {})
        for ticket in self.waiting:
            ticket.switch = ticket.switch or "waited"

    async def _down(self, seen: Seen) -> None:
        self._enter("failed" if seen.reason else "stopped")
        if seen.preset and seen.reason:
            self.failed.setdefault(seen.preset, (self.clock(), seen.reason))
        fallback = seen.unloaded or self.settings.default_preset or None
        for ticket in list(self.waiting):
            wanted = ticket.preset or fallback
            if wanted is None or ticket.reads:
                self._refuse(ticket, 503, _nothing_runs(seen))
            elif not ticket.may_use(wanted):  # nothing is started for whoever may not use it then
                said = f"no preset is active, and this key may not start {wanted}"
                self._refuse(ticket, 403, f"{said}; name one of its own in 'model'")
            elif ticket.preset and self.settings.switch_policy == "off" and ticket.preset != fallback:
                self._refuse(ticket, 503, f"{_nothing_runs(seen)} (switch_policy is off)")
            elif self._recently_failed(wanted):
                self._refuse(ticket, 503, self.failed[wanted][1])
            else:
                await self._move(None, wanted, {})
                return
        self._wake.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), LOOK_DOWN_S)

    async def _go_to(self, target: str, gone: asyncio.Future[None]) -> bool:
        """Go over to a preset. False: not now, and the present server is as it was."""
        assert self.serving is not None
        former = self.serving.preset

        def wanted() -> bool:
            return not self._holds and any(ticket.preset == target for ticket in self.waiting)

        refused = await self.box.refusal(target)
        if refused:  # known before anything is touched: those that run are not to be drained for it
            self._not_moved(target, refused, (target,))
            return False
        parts = {"prefetch": 0.0}
        if self._prepared != target:  # else the pause that it waits for would be over after another look
            parts["prefetch"] = await self._timed(self._prepare(target, gone, wanted))
            if wanted():
                self._prepared = target
        if self.serving is None or not wanted() or self._target() != target:
            return False  # it was lost, is to be switched by hand, or is not idle any more; or nobody waits
        parts["drain"] = await self._timed(self._drain(f"the box goes over to the preset {target}"))
        await self._move(former, target, parts)
        return True

    async def _prepare(
        self, target: str | None, gone: asyncio.Future[None], wanted: Callable[[], bool]
    ) -> None:
        """Read the next model's file into memory while the present server still serves, and it is wanted."""
        if not (target and self.settings.prefetch and target in self.slots):
            return
        self._enter("prefetching")
        reading = asyncio.ensure_future(self.box.prefetch(target))
        while wanted() and not (reading.done() or gone.done() or self._suspect):
            await self._woken(None, reading, gone)
        await _end(reading)

    async def _drain(self, why: str, wanted: Callable[[], bool] = lambda: True) -> None:
        """Let what runs finish, for `drain_timeout` at most; then end it with an error, if that is wanted.

        A measurement is ended at once: it is repeated, and whoever switches is not to wait for it.
        """
        if not wanted():
            return
        for lease in list(self.leases):
            if lease.ticket.alone:
                lease.end(Refusal(503, f"{why}: the measurement was given up", SOON))
        self._enter("draining")
        self.serving = None
        deadline = self.clock() + self.settings.drain_timeout
        while self.leases and wanted() and self.clock() < deadline:
            await self._woken(deadline - self.clock())
        if not wanted():
            return
        for lease in list(self.leases):
            said = f"{why} and this request took longer than drain_timeout; send it again"
            lease.end(Refusal(503, said, SOON))
        deadline = self.clock() + END_GRACE_S
        while self.leases and self.clock() < deadline:
            await self._woken(deadline - self.clock())

    async def _move(self, former: str | None, target: str, parts: dict[str, float]) -> None:
        self._enter("loading", target)
        began = self.clock()
        wanting = (target,) if former else (target, None)
        cause = next((ticket for ticket in self.waiting if ticket.preset in wanting), None)
        try:
            moved = await self.box.switch(target)
        except Busy:
            await asyncio.sleep(LOCKED_S)
            return
        if cause:
            cause.switch = "caused"
        for ticket in self.waiting:
            ticket.switch = ticket.switch or ("waited" if ticket.preset in (target, None) else "")
        self._record(former, target, moved.ok, {**parts, **moved.parts, "ready": self.clock() - began})
        if moved.ok:
            self._known = moved.seen
            return
        self._not_moved(target, moved.reason, wanting)

    def _not_moved(self, target: str, reason: str, wanting: Sequence[str | None]) -> None:
        """The box did not go over: whoever waits for one of these presets is told why."""
        if not self.blocked:  # else it is the guard that forbade it, and says so itself
            self.failed[target] = (self.clock(), reason)
        for ticket in list(self.waiting):
            if ticket.preset in wanting:
                self._refuse(ticket, 503, reason)

    def _record(self, former: str | None, target: str | None, ok: bool, parts: dict[str, float]) -> None:
        """Keep what a switch took; `target` is None when it stopped the server."""
        self.last_switch = {"from": former, "to": target, "ok": ok, "parts": parts}
        if target is None:
            return
        outcome = (target, "ok" if ok else "failed")
        self.switches[outcome] = self.switches.get(outcome, 0) + 1
        for part, seconds in parts.items():
            count, total = self.switch_parts.get((target, part), (0, 0.0))
            self.switch_parts[target, part] = (count + 1, total + seconds)
        if ok:
            self.load_s[target] = parts.get("ready", 0.0)

    async def _timed(self, work: Awaitable[None]) -> float:
        began = self.clock()
        await work
        return self.clock() - began

    async def _unload(self, preset: str) -> None:
        log.info("%s: idle for %g s, unloading it", preset, self.clock() - self._last_used)
        await self._drain("the preset is being unloaded")
        try:
            await self.box.unload(preset)
        except Busy:  # somebody does something with the box: that is use as well
            self._last_used = self.clock()

    # --- who may go, and when ---

    def _fits(self, ticket: Ticket) -> bool:
        return self.serving is not None and ticket.preset in (None, self.serving.preset)

    def _free(self, ticket: Ticket) -> bool:
        if self._measuring():
            return False
        if ticket.alone:
            return not self.leases and not self._awaited(ticket)
        if not ticket.slot or self.serving is None:
            return True
        taken = sum(1 for lease in self.leases if lease.ticket.slot)
        return taken < self.slots[self.serving.preset or ""]

    def _before(self, ticket: Ticket) -> bool:
        """Whether others wait for the same thing, or one of them to be alone."""
        return any(
            self._fits(other) and (other.slot == ticket.slot or other.alone or ticket.alone)
            for other in self.waiting
        )

    def _awaited(self, ticket: Ticket) -> bool:
        """Whether somebody has waited longer for another preset, to which the box may go over now.

        To look at that preset and at its file takes a moment, in which the next measurement would begin.
        """
        assert self.serving is not None
        here = (None, self.serving.preset)
        return self._dwell_left() <= 0 and any(
            other.preset not in here and other.arrived <= ticket.arrived for other in self.waiting
        )

    def _measuring(self) -> bool:
        """Whether the server is leased to one request alone."""
        return any(lease.ticket.alone for lease in self.leases)

    def _grant(self, ticket: Ticket) -> None:
        assert self.serving is not None and self.serving.preset is not None
        lease = Lease(ticket, self.serving.preset, self.serving.pid, self.clock())
        self.leases.add(lease)
        if ticket.alone:
            after = ALONE_LEASE * self.settings.hold_timeout
            over = Refusal(503, f"{TOO_LONG} ({after:g} s)", SOON)
            lease.deadline = asyncio.get_running_loop().call_later(after, lease.end, over)
        ticket.granted.set_result(lease)

    def _pump(self) -> None:
        """Let every waiting request go that may."""
        if self.serving is None:
            return
        for ticket in list(self.waiting):
            if not self._fits(ticket):
                continue
            if self._free(ticket):
                del self.waiting[ticket]
                self._grant(ticket)
            elif ticket.alone:
                return  # who came later lets it go first: otherwise it would never be alone

    def _turn_away(self) -> None:
        """Where nobody may switch, refuse who waited for another preset than the one that came up."""
        if self.settings.switch_policy == "off":
            for ticket in list(self.waiting):
                if ticket.preset and not self._fits(ticket):
                    self._refuse(ticket, 503, _not_active(ticket.preset))

    def _target(self) -> str | None:
        """The preset to go to now: that of the oldest request which the present one cannot serve."""
        assert self.serving is not None
        wanted = next(
            (ticket.preset for ticket in self.waiting if ticket.preset not in (None, self.serving.preset)),
            None,
        )
        if wanted is None or self._dwell_left() > 0 or self._measuring():
            return None
        if self.settings.switch_policy == "when_idle" and any(lease.ticket.slot for lease in self.leases):
            return None
        return wanted

    def _dwell_left(self) -> float:
        return self._ready_since + self.settings.min_dwell - self.clock()

    def _used(self, ticket: Ticket) -> None:
        if not ticket.reads:
            self._last_used = self.clock()

    def _idle(self) -> bool:
        after = self.settings.idle_unload
        return bool(after) and not self.leases and not self.waiting and self._idle_left() <= 0

    def _idle_left(self) -> float:
        return max(self._last_used, self._ready_since) + self.settings.idle_unload - self.clock()

    def _patience(self) -> float | None:
        """Seconds after which the present state may have to change without anybody's doing; None: never."""
        timers = []
        if self.settings.idle_unload and not self.leases:
            timers.append(self._idle_left())
        if self.waiting and self._dwell_left() > 0:
            timers.append(self._dwell_left())
        return max(0.001, min(timers)) if timers else None

    def _check_preset(self, ticket: Ticket) -> None:
        preset = ticket.preset
        if preset is None or self._fits(ticket):
            return
        if self._recently_failed(preset):
            raise Refusal(503, self.failed[preset][1], {"Retry-After": str(int(FAILED_AGAIN_S))})
        if self.settings.switch_policy == "off" and self.serving:
            raise Refusal(
                503,
                _not_active(preset),
                {"Retry-After": str(int(FAILED_AGAIN_S))},
            )

    def _check_room(self, ticket: Ticket) -> None:
        limits = self.settings
        mine = sum(1 for other in self.waiting if other.account == ticket.account)
        for waiting, limit, whose in (
            (mine, limits.queue_limit_per_key, "this key's queue"),
            (len(self.waiting), limits.queue_limit, "the queue"),
        ):
            if waiting >= limit:
                wait = max(1, round(self.estimate_s(ticket)))
                raise Refusal(
                    429,
                    f"{whose} is full: {waiting} requests wait, the limit is {limit}; try again in {wait} s",
                    {"Retry-After": str(wait)},
                )

    def _recently_failed(self, preset: str) -> bool:
        when, _ = self.failed.get(preset, (float("-inf"), ""))
        return self.clock() - when < FAILED_AGAIN_S

    def _refuse(self, ticket: Ticket, status: int, message: str) -> None:
        self.waiting.pop(ticket, None)
        if not ticket.granted.done():
            headers = {"Retry-After": str(int(FAILED_AGAIN_S))} if status == 503 else {}
            ticket.granted.set_exception(Refusal(status, message, headers))
            ticket.granted.exception()  # seen: a client that left meanwhile does not ask for it

    def _enter(self, phase: str, target: str | None = None) -> None:
        self.target = target
        if phase != self.phase:
            self.phase, self.since = phase, self.clock()

    async def _woken(self, timeout: float | None, *ends: asyncio.Future[None]) -> None:
        """Wait until a request joins or leaves, one of the `ends` is there, or `timeout` seconds are over."""
        self._wake.clear()
        waker = asyncio.ensure_future(self._wake.wait())
        waiting: set[asyncio.Future[Any]] = {waker, *ends}
        try:
            await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waker.cancel()


async def _end(work: asyncio.Future[None]) -> None:
    """Cancel it and wait for its end. A cancellation of the caller meanwhile is not swallowed."""
    work.cancel()
    await asyncio.wait({work})
    if not work.cancelled():
        work.result()


def _future() -> asyncio.Future[Lease]:
    return asyncio.get_running_loop().create_future()


def _mean(mean: float, newest: float) -> float:
    return mean + SMOOTHING * (newest - mean)


def _not_active(preset: str) -> str:
    return f"the preset {preset} is not active; start it with: lmswitch {preset} (switch_policy is off)"


def _nothing_runs(seen: Seen) -> str:
    why = f"the preset {seen.preset} failed: {seen.reason}" if seen.reason else "no preset is active"
    return f"{why}; start one with: lmswitch PRESET"
