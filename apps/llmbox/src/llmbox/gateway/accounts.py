"""Who may use the gateway, and how much of it each of them has used."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from llmbox.errors import UsageError
from llmbox.gateway.keyfile import BUDGETS, Budget, Key, read_keys
from llmbox.gateway.refusals import Refusal
from llmbox.gateway.windows import Window

ANONYMOUS = "anonymous"
TICK_S = 1.0  # between two looks at the keys file, and two writes of the usage file
LOG_AGAIN_S = 60.0  # between two log lines about one budget of one key

SECONDS: dict[Budget, int] = {budget: 60 if budget.endswith("minute") else 86400 for budget in BUDGETS}
TOKEN_BUDGETS: tuple[Budget, ...] = ("tokens_per_minute", "tokens_per_day")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

log = logging.getLogger(__name__)


class _Used(BaseModel):
    """The usage file: for each key and budget the steps of a Window."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    keys: dict[str, dict[Budget, list[tuple[int, int]]]] = {}


class Book:
    """What all accounts share: the clock (seconds since the epoch), and what they tell of themselves."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.changed = False
        self.breaches: Counter[str] = Counter()
        self._said: dict[tuple[str, str], float] = {}

    def breach(self, name: str, budget: Budget, limit: int, wait: int) -> None:
        """Count a breach and log it; a client that keeps on trying is not logged more than once a minute."""
        self.breaches[budget] += 1
        now = self.clock()
        if not 0 <= now - self._said.get((name, budget), float("-inf")) < LOG_AGAIN_S:
            self._said[name, budget] = now
            log.warning("key %s: %s (%d) is used up for %d s", name, budget, limit, wait)


class Account:
    """Whoever sent a request, and what it may still use."""

    def __init__(
        self,
        name: str,
        book: Book,
        presets: Sequence[str] | None = None,
        limits: dict[Budget, int] | None = None,
        windows: dict[Budget, Window] | None = None,
        *,
        measures: bool = True,
    ) -> None:
        self.name = name
        self._measures = measures
        self._book = book
        self._presets = None if presets is None else frozenset(presets)
        self._limits = limits or {}
        self._windows = {} if windows is None else windows
        for budget in self._limits:
            self._windows.setdefault(budget, Window(SECONDS[budget]))

    def may_use(self, preset: str) -> bool:
        """Whether its requests may be sent to the preset."""
        return self._presets is None or preset in self._presets

    def check(self, preset: str) -> None:
        """Raises Refusal(403) for a preset that it may not use."""
        if not self.may_use(preset):
            allowed = ", ".join(sorted(self._presets or ())) or "none"
            raise Refusal(403, f"the key {self.name} may not use the preset {preset}; it may use: {allowed}")

    def check_measuring(self) -> None:
        """Raises Refusal(403) when it may not have the server for itself."""
        if not self._measures:
            raise Refusal(
                403,
                f"the key {self.name} may not have the server for itself, as a measurement does; "
                "fix: measures: true in its entry of llm_gateway_keys",
            )

    def admit(self) -> None:
        """Count a request, before anything of it is read. Raises Refusal(429) for a budget used up."""
        self._halt(BUDGETS)
        self._count("requests", 1)

    def start(self, preset: str) -> None:
        """A request that was admitted is about to be sent to `preset`.

        Raises Refusal: 403 for a preset that is not its own, 429 for tokens used up while it waited.
        """
        self.check(preset)
        self._halt(TOKEN_BUDGETS)

    def spend(self, tokens: int) -> None:
        """Count tokens; less than nothing takes back what was counted too much."""
        if tokens:
            self._count("tokens", tokens)

    def tokens_left(self) -> int | None:
        """Tokens that it may still use now, None when nothing limits it; below 0 it has used too many."""
        now = self._book.clock()
        left = [
            self._limits[budget] - self._windows[budget].used(now)
            for budget in TOKEN_BUDGETS
            if budget in self._limits
        ]
        return min(left, default=None)

    def exhausted(self) -> str:
        """Count and log that a request is cut off because its tokens are used up; what its client is told."""
        found = self._breach(TOKEN_BUDGETS)
        return found[0] if found else f"the key {self.name} has used up its tokens; try again later"

    def _halt(self, budgets: Sequence[Budget]) -> None:
        found = self._breach(budgets)
        if found:
            message, wait = found
            raise Refusal(429, message, {"Retry-After": str(wait)})

    def _breach(self, budgets: Sequence[Budget]) -> tuple[str, int] | None:
        """Which of these is used up, for the longest time: a sentence, and the seconds to wait."""
        now = self._book.clock()
        found: tuple[int, Budget, int] | None = None
        for budget in budgets:
            limit = self._limits.get(budget)
            if limit is None:
                continue
            over = self._windows[budget].used(now) - limit + 1
            if over > 0:
                wait = self._windows[budget].wait(over, now)
                found = max(found or (0, budget, 0), (wait, budget, limit))
        if found is None:
            return None
        wait, budget, limit = found
        self._book.breach(self.name, budget, limit, wait)
        return f"the key {self.name} has used up its {budget} ({limit}); try again in {wait} s", wait

    def _count(self, what: str, count: int) -> None:
        now = self._book.clock()
        for budget in self._limits:
            if budget.startswith(what):
                self._windows[budget].add(count, now)
                self._book.changed = True


class Accounts:
    """The accounts of the keys file, read again when it changes. Make it with `load`."""

    def __init__(
        self, keys_file: Path, usage_file: Path, networks: Sequence[str], clock: Callable[[], float]
    ) -> None:
        self.keys_file = keys_file
        self.usage_file = usage_file
        self.networks = [_plain_network(ipaddress.ip_network(network)) for network in networks]
        self.book = Book(clock)
        self._seen = _signature(keys_file)
        self._windows: dict[str, dict[Budget, Window]] = {}
        self._accounts: list[tuple[bytes, Account]] = []
        self._anonymous = Account(ANONYMOUS, self.book)
        self._writing = threading.Lock()
        self._taken = self._written = 0
        self._said = float("-inf")

    @classmethod
    def load(
        cls, keys_file: Path, usage_file: Path, networks: Sequence[str], clock: Callable[[], float]
    ) -> Accounts:
        """Read both files; `clock` gives seconds since the epoch.

        Raises UsageError in one line for keys that cannot be meant. A usage file that cannot be read is put
        aside: then the budgets begin anew.
        """
        found = cls(keys_file, usage_file, networks, clock)
        keys = read_keys(keys_file)
        found._windows = found._read_usage()
        found._take(keys)
        return found

    @property
    def breaches(self) -> dict[str, int]:
        """How often each budget was found used up."""
        return {budget: self.book.breaches[budget] for budget in BUDGETS}

    def identify(self, headers: Iterable[tuple[bytes, bytes]], client_ip: str) -> Account:
        """Whose request this is. Raises Refusal(401) without a known key; 403 where no keys are in use and
        the client is neither this machine nor in `networks`, or a page that came from elsewhere asks."""
        headers = list(headers)
        if not self._accounts:
            if not self._near(client_ip):
                raise Refusal(
                    403,
                    "this gateway has no keys, so only its own machine and llm_gateway_networks may use it",
                )
            if origin := _foreign_origin(headers):
                raise Refusal(403, f"this gateway has no keys, so no page of {origin[:100]!r} may use it")
            return self._anonymous
        for shown in _shown(headers):
            digest = hashlib.sha256(shown).digest()
            # No early exit: how long it takes must not tell which entry it was.
            matches = [account for known, account in self._accounts if hmac.compare_digest(known, digest)]
            if matches:
                return matches[0]
        raise Refusal(
            401,
            "a valid key is needed: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'",
            {"WWW-Authenticate": "Bearer"},
        )

    async def run(self) -> None:
        """Follow the keys file and write the usage file, each second until cancelled; then `flush`."""
        while True:
            await asyncio.sleep(TICK_S)
            self.reread()
            if self.book.changed:
                await asyncio.to_thread(self._save, *self._snapshot())

    def flush(self) -> None:
        """Write what was used to the usage file, if that has changed."""
        if self.book.changed:
            self._save(*self._snapshot())

    def reread(self) -> None:
        """Take over the keys file if it has changed; one that cannot be meant is logged and not taken."""
        signature = _signature(self.keys_file)
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._take(read_keys(self.keys_file))
        except UsageError as error:
            log.error("%s; the former keys stay in force", error)
        else:
            log.warning("%s has changed: %d keys in force", self.keys_file, len(self._accounts))

    def _take(self, keys: Sequence[Key]) -> None:
        # A request under way keeps its account, a replaced key its name: both share the windows.
        self._windows = {key.name: self._windows.get(key.name, {}) for key in keys}
        self._accounts = [
            (
                bytes.fromhex(key.sha256),
                Account(
                    key.name,
                    self.book,
                    key.presets,
                    _limits(key),
                    self._windows[key.name],
                    measures=key.measures,
                ),
            )
            for key in keys
        ]
        if not keys:
            where = ", ".join(str(network) for network in self.networks)
            log.warning(
                "NO KEYS are configured: whoever connects from this machine%s may use it without one",
                f" or from {where}" if where else "",
            )

    def _near(self, client_ip: str) -> bool:
        try:
            address = ipaddress.ip_address(client_ip)
        except ValueError:
            return False
        plain = (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address
        return plain.is_loopback or any(plain in network for network in self.networks)

    # --- the usage file ---

    def _read_usage(self) -> dict[str, dict[Budget, Window]]:
        try:
            used = _Used.model_validate_json(self.usage_file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as error:
            what = error.strerror if isinstance(error, OSError) else "it is not a usage file"
            aside = self.usage_file.with_name(self.usage_file.name + ".broken")
            try:
                self.usage_file.replace(aside)
                log.error("%s cannot be read (%s): now %s, budgets begin anew", self.usage_file, what, aside)
            except OSError as worse:
                log.error(
                    "%s: %s; nor put aside: %s; budgets begin anew", self.usage_file, what, worse.strerror
                )
            return {}
        return {
            name: {budget: Window(SECONDS[budget], steps) for budget, steps in budgets.items()}
            for name, budgets in used.keys.items()
        }

    def _snapshot(self) -> tuple[int, bytes]:
        self.book.changed = False
        self._taken += 1
        used = _Used(
            keys={
                name: {budget: window.steps() for budget, window in windows.items()}
                for name, windows in self._windows.items()
                if windows
            }
        )
        return self._taken, used.model_dump_json().encode()

    def _save(self, number: int, content: bytes) -> None:
        with self._writing:  # run's thread may write still when the gateway flushes at its end
            if number <= self._written:
                return
            try:
                _write(self.usage_file, content)
                self._written = number
            except OSError as error:
                self.book.changed = True
                now = self.book.clock()
                if not 0 <= now - self._said < LOG_AGAIN_S:
                    self._said = now
                    log.error("%s cannot be written (%s); trying again", self.usage_file, error.strerror)


def _limits(key: Key) -> dict[Budget, int]:
    found: dict[Budget, int] = {}
    for budget in BUDGETS:
        limit = getattr(key, budget)
        if limit is not None:
            found[budget] = limit
    return found


def _shown(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """The keys that a request shows: one of each header at most."""
    bearer: bytes | None = None
    plain: bytes | None = None
    for name, value in headers:
        if name == b"authorization" and bearer is None:
            scheme, _, rest = value.strip().partition(b" ")
            bearer = rest.strip() if scheme.lower() == b"bearer" else b""
        elif name == b"x-api-key" and plain is None:
            plain = value.strip()
    return [key for key in (bearer, plain) if key]


def _foreign_origin(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The origin of a browser's page that is not this gateway's own; empty for every other client.

    Any page may send a plain POST anywhere; that it cannot read the answer does not undo a switch.
    """
    told = {name: value.decode("latin-1").strip().lower() for name, value in headers}
    scheme, _, place = told.get(b"origin", "").partition("://")
    own = scheme in ("http", "https") and place == told.get(b"host")
    # Another scheme is a program's own. "null" is a page that hides where it came from.
    return told[b"origin"] if scheme in ("http", "https", "null") and not own else ""


def _plain_network(network: Network) -> Network:
    """The IPv4 network behind one that is written as ::ffff:0:0/96 and below."""
    mapped = network.network_address.ipv4_mapped if isinstance(network, ipaddress.IPv6Network) else None
    if mapped is None or network.prefixlen < 96:
        return network
    return ipaddress.IPv4Network((mapped, network.prefixlen - 96))


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
