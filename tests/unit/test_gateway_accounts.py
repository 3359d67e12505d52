"""Keys and budgets of the gateway: who gets in, how much each may use, and that no key is ever told."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import random
import secrets
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from llmbox.errors import UsageError
from llmbox.gateway import accounts as module
from llmbox.gateway.accounts import SECONDS, Account, Accounts
from llmbox.gateway.key import main as key_main
from llmbox.gateway.keyfile import BUDGETS, read_keys
from llmbox.gateway.refusals import Refusal
from llmbox.gateway.windows import BUCKETS, Window

NOON = 1_800_000_000.0
KEY = "llmbox-" + secrets.token_urlsafe(32)
OTHER = "llmbox-" + secrets.token_urlsafe(32)
SEEDS = range(20)


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def entry(name: str = "alice", key: str = KEY, **fields: Any) -> dict[str, Any]:
    return {"name": name, "sha256": digest(key), **fields}


class Place:
    """A directory with a keys file and a usage file."""

    def __init__(self, path: Path) -> None:
        self.keys = path / "keys.json"
        self.usage = path / "state" / "usage.json"
        self.clock = Clock()

    def write(self, *entries: dict[str, Any]) -> None:
        new = self.keys.with_name("new")
        new.write_text(json.dumps({"version": 1, "keys": entries}))
        new.replace(self.keys)

    def load(self, *networks: str) -> Accounts:
        return Accounts.load(self.keys, self.usage, networks, self.clock)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"Bearer {key}".encode())]


def refused(accounts: Accounts, headers: list[tuple[bytes, bytes]], client: str = "127.0.0.1") -> Refusal:
    with pytest.raises(Refusal) as caught:
        accounts.identify(headers, client)
    return caught.value


def breach(account: Account, preset: str | None = None) -> Refusal:
    with pytest.raises(Refusal) as caught:
        if preset is None:
            account.admit()
        else:
            account.check(preset)
    return caught.value


# --- who it is ---


@pytest.mark.parametrize(
    "headers",
    [
        bearer(KEY),
        [(b"authorization", f"bEARER   {KEY} ".encode())],
        [(b"x-api-key", KEY.encode())],
        [(b"x-api-key", b" " + KEY.encode() + b" ")],
        # What Claude Code sends with both of its variables set.
        [(b"authorization", b"Bearer unused"), (b"x-api-key", KEY.encode())],
    ],
)
def test_a_key_is_found_in_either_header(place: Place, headers: list[tuple[bytes, bytes]]) -> None:
    place.write(entry("bob", OTHER), entry())
    assert place.load().identify(headers, "203.0.113.9").name == "alice"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        bearer(""),
        bearer("wrong"),
        bearer(KEY[:-1]),
        bearer(KEY + "x"),
        bearer(digest(KEY)),
        [(b"authorization", KEY.encode())],
        [(b"authorization", b"Basic " + KEY.encode())],
        [(b"authorization", b"\xff\x00")],
        [(b"x-api-key", b"wrong"), (b"x-api-key", KEY.encode())],
        [(b"cookie", KEY.encode())],
    ],
)
def test_without_a_known_key_the_words_are_always_the_same(
    place: Place, headers: list[tuple[bytes, bytes]]
) -> None:
    place.write(entry())
    refusal = refused(place.load("127.0.0.0/8"), headers)
    assert refusal.status == 401
    assert refusal.headers == {"WWW-Authenticate": "Bearer"}
    assert refusal.message == refused(place.load(), []).message


def test_every_entry_is_compared_whichever_matches(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    real = hmac.compare_digest

    def compare(one: bytes, two: bytes) -> bool:
        compared.append(one)
        return real(one, two)

    keys = [secrets.token_urlsafe(32) for _ in range(5)]
    place.write(*(entry(f"k{number}", key) for number, key in enumerate(keys)))
    accounts = place.load()
    monkeypatch.setattr(hmac, "compare_digest", compare)
    for number, key in enumerate(keys):
        compared.clear()
        assert accounts.identify(bearer(key), "").name == f"k{number}"
        assert [one.hex() for one in compared] == [digest(key) for key in keys]


@pytest.mark.parametrize(
    ("client", "welcome"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("192.168.1.7", True),
        ("::ffff:192.168.1.7", True),
        ("10.1.2.3", True),
        ("fd00::1", True),
        ("fd00::1%eth0", True),
        ("192.168.2.7", False),
        ("::ffff:192.168.2.7", False),
        ("::ffff:10.1.3.3", False),
        ("2001:db8::1", False),
        ("0.0.0.0", False),
        ("", False),
        ("localhost", False),
    ],
)
def test_without_keys_only_near_clients_get_in(place: Place, client: str, welcome: bool) -> None:
    place.write()
    accounts = place.load("192.168.1.0/24", "fd00::/8", "::ffff:10.1.2.0/120")
    if welcome:
        account = accounts.identify([], client)
        account.admit()
        account.spend(10**9)
        assert (account.name, account.tokens_left()) == ("anonymous", None)
    else:
        assert refused(accounts, bearer(KEY), client).status == 403


@pytest.mark.parametrize(
    ("origin", "welcome"),
    [
        (None, True),
        (b"http://box:1234", True),
        (b"vscode-webview://abc", True),
        (b"http://box", False),
        (b"https://example.org", False),
        (b"HTTP://Example.org", False),
        (b"null", False),
        (b"http://", False),
    ],
)
def test_without_keys_a_page_of_another_origin_may_not_ask(
    place: Place, origin: bytes | None, welcome: bool
) -> None:
    headers = [(b"host", b"Box:1234"), *([(b"origin", origin)] if origin else [])]
    place.write()
    accounts = place.load()
    if welcome:
        assert accounts.identify(headers, "127.0.0.1").name == "anonymous"
    else:
        with pytest.raises(Refusal, match="no page of") as refused:
            accounts.identify(headers, "127.0.0.1")
        assert refused.value.status == 403
    place.write(entry())
    accounts.reread()
    assert accounts.identify([*headers, (b"x-api-key", KEY.encode())], "127.0.0.1").name == "alice"


def test_that_there_are_no_keys_is_said_loudly(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.write()
    place.load("192.168.1.0/24")
    assert "NO KEYS" in caplog.text and "192.168.1.0/24" in caplog.text
    caplog.clear()
    place.write(entry())
    place.load()
    assert not caplog.records


def test_a_key_may_be_bound_to_presets(place: Place) -> None:
    place.write(entry(presets=["coder", "tiny"]), entry("bob", OTHER), entry("eve", "e" * 43, presets=[]))
    accounts = place.load()
    alice = accounts.identify(bearer(KEY), "")
    refusal = breach(alice, "big")
    assert refusal.status == 403
    assert refusal.message.endswith("may not use the preset big; it may use: coder, tiny")
    alice.check("coder")
    assert alice.may_use("tiny") and not alice.may_use("big")
    alice.start("tiny")
    with pytest.raises(Refusal, match="big"):
        alice.start("big")
    assert accounts.identify(bearer(OTHER), "").may_use("big")
    assert "it may use: none" in breach(accounts.identify(bearer("e" * 43), ""), "coder").message


# --- how much ---


def test_requests_are_refused_past_the_limit_until_the_window_has_passed(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.write(entry(requests_per_minute=3))
    accounts = place.load()
    alice = accounts.identify(bearer(KEY), "")
    for _ in range(3):
        alice.admit()
        place.clock.now += 10
    refusal = breach(alice)
    assert refusal.status == 429
    assert refusal.headers == {"Retry-After": "31"}  # the first was at 0 s, now it is 30 s; a step is 1 s
    assert refusal.message == "the key alice has used up its requests_per_minute (3); try again in 31 s"
    assert [record.getMessage() for record in caplog.records] == [
        "key alice: requests_per_minute (3) is used up for 31 s"
    ]
    place.clock.now += 30
    assert breach(alice).headers == {"Retry-After": "1"}
    place.clock.now += 1
    alice.admit()
    place.clock.now += 9
    assert breach(alice).headers == {"Retry-After": "1"}
    assert accounts.breaches == {budget: 3 * (budget == "requests_per_minute") for budget in BUDGETS}
    assert len(caplog.records) == 1  # once a minute, however often it is tried
    place.clock.now += 20
    alice.admit()
    alice.admit()
    breach(alice)
    assert len(caplog.records) == 2


def test_a_refused_request_counts_nothing(place: Place) -> None:
    place.write(entry(requests_per_minute=1, presets=["coder"]))
    alice = place.load().identify(bearer(KEY), "")
    breach(alice, "big")
    alice.admit()
    for _ in range(100):
        breach(alice)
    place.clock.now += 61
    alice.admit()


def test_the_longest_wait_of_several_budgets_is_told(place: Place) -> None:
    place.write(entry(requests_per_minute=1, requests_per_day=1))
    alice = place.load().identify(bearer(KEY), "")
    alice.admit()
    refusal = breach(alice)
    assert "requests_per_day" in refusal.message
    assert 86400 <= int(refusal.headers["Retry-After"]) <= 86400 * (1 + 1 / BUCKETS)


def test_the_longest_wait_is_told_whichever_budget_comes_first(place: Place) -> None:
    place.write(entry(requests_per_day=1, tokens_per_minute=1))
    alice = place.load().identify(bearer(KEY), "")
    alice.admit()
    alice.spend(5)
    assert "requests_per_day" in breach(alice).message


def test_tokens_that_are_spent_stop_the_next_request(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.write(entry(tokens_per_minute=100, tokens_per_day=150))
    accounts = place.load()
    alice = accounts.identify(bearer(KEY), "")
    assert alice.tokens_left() == 100
    alice.spend(120)
    alice.spend(-21)
    assert alice.tokens_left() == 1
    alice.admit()
    alice.spend(1)
    assert alice.tokens_left() == 0
    assert "tokens_per_minute" in breach(alice).message
    place.clock.now += 61
    alice.admit()
    assert alice.tokens_left() == 50
    alice.spend(51)
    assert alice.tokens_left() == -1
    caplog.clear()
    assert "used up its tokens_per_day (150)" in alice.exhausted()
    assert "tokens_per_day" in caplog.text
    assert accounts.breaches["tokens_per_day"] == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_no_stretch_of_a_window_ever_holds_more_than_its_limit(place: Place, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    limit = chance.randint(1, 20)
    budget = chance.choice(["requests_per_minute", "requests_per_day"])
    length = 60 if budget.endswith("minute") else 86400
    place.clock.now += chance.random() * length
    place.write({**entry(), budget: limit})
    alice = place.load().identify(bearer(KEY), "")
    admitted: deque[float] = deque()
    for _ in range(400):
        place.clock.now += chance.expovariate(limit * 3 / length)
        now = place.clock.now
        while admitted and admitted[0] <= now - length * (1 + 1 / BUCKETS):
            admitted.popleft()
        inside = sum(1 for when in admitted if when > now - length)
        try:
            alice.admit()
        except Refusal as refusal:
            assert len(admitted) >= limit  # what was used longer ago is forgotten
            place.clock.now += int(refusal.headers["Retry-After"])
            alice.admit()
            now = place.clock.now
        else:
            assert inside < limit
        admitted.append(now)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_window_stays_small_and_right_whatever_the_clock_does(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    window, now = Window(60), NOON
    for _ in range(500):
        now += chance.choice([0.01, 0.5, 1, 3, 59, 61, -1, -30, -86400, 86400])
        before = window.used(now)
        window.add(chance.randint(-5, 50), now)
        assert len(window.steps()) <= BUCKETS + 1
        assert window.used(now) == sum(count for _, count in window.steps())
        assert all(number <= now for number, _ in window.steps())
        again = Window(60, window.steps())
        assert again.used(now) == window.used(now) and before is not None
    assert window.used(now + 62) == 0


def test_a_clock_set_back_forgives_nothing_and_blocks_nobody_for_long(place: Place) -> None:
    place.write(entry(requests_per_minute=1))
    alice = place.load().identify(bearer(KEY), "")
    alice.admit()
    place.clock.now -= 10 * 365 * 86400
    assert int(breach(alice).headers["Retry-After"]) <= 61


# --- over restarts and changes ---


@pytest.mark.parametrize("seed", range(4))  # each writes to the disk some 30 times
def test_budgets_go_on_over_restarts(place: Place, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    place.write(entry(tokens_per_minute=1000, tokens_per_day=5000, requests_per_day=1000))
    accounts, kept = place.load(), place.load()
    straight = kept.identify(bearer(KEY), "")
    for _ in range(60):
        place.clock.now += chance.choice([0.2, 7, 30, 2000])
        alice = accounts.identify(bearer(KEY), "")
        tokens = chance.randint(1, 400)
        for account in (alice, straight):
            account.spend(tokens)
        if chance.random() < 0.5:
            accounts.flush()
            accounts = place.load()
        assert accounts.identify(bearer(KEY), "").tokens_left() == straight.tokens_left()


def test_the_usage_file_is_private_and_replaced_whole(place: Place) -> None:
    place.write(entry(requests_per_day=5), entry("bob", OTHER))
    accounts = place.load()
    accounts.flush()
    assert not place.usage.exists()
    old = os.umask(0)
    try:
        accounts.identify(bearer(KEY), "").admit()
        accounts.flush()
    finally:
        os.umask(old)
    assert place.usage.stat().st_mode & 0o777 == 0o600
    assert place.usage.parent.stat().st_mode & 0o777 == 0o700
    inode = place.usage.stat().st_ino
    accounts.flush()
    assert place.usage.stat().st_ino == inode  # nothing has changed
    accounts.identify(bearer(KEY), "").admit()
    accounts.flush()
    assert place.usage.stat().st_ino != inode
    assert [path.name for path in place.usage.parent.iterdir()] == ["usage.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"version": 2, "keys": {}}',
        b'{"version": 1, "keys": {"alice": {"requests_per_day": [[1]]}}}',
        b'{"version": 1, "keys": {"alice": {"requests_per_year": []}}}',
        b'{"version": 1, "keys": {"alice": {"requests_per_day": [[1, 1e99]]}}}',
        b"[" * 100_000,
    ],
)
def test_a_broken_usage_file_is_put_aside(
    place: Place, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    place.write(entry(requests_per_day=1))
    place.usage.parent.mkdir()
    place.usage.write_bytes(content)
    place.load().identify(bearer(KEY), "").admit()
    assert place.usage.with_name("usage.json.broken").read_bytes() == content
    assert "budgets begin anew" in caplog.text


def test_a_disk_that_is_full_is_logged_once_a_minute_and_made_good(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.write(entry(requests_per_day=5))
    place.usage.parent.write_text("a file where the directory should be")
    accounts = place.load()
    caplog.clear()
    accounts.identify(bearer(KEY), "").admit()
    for _ in range(5):
        accounts.flush()
    assert len(caplog.records) == 1 and "cannot be written" in caplog.text
    place.usage.parent.unlink()
    accounts.flush()
    assert json.loads(place.usage.read_text())["keys"]["alice"]


def test_the_background_task_writes_and_rereads(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK_S", 0.01)
    place.write(entry(requests_per_day=5))

    async def follow() -> None:
        accounts = place.load()
        running = asyncio.create_task(accounts.run())
        accounts.identify(bearer(KEY), "").admit()
        place.write(entry("bob", OTHER))
        async with asyncio.timeout(5):
            while not place.usage.exists() or refuses(accounts, OTHER):
                await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(follow())


def test_what_was_used_is_on_the_disk_before_it_replaces_the_former(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[int, bool]] = []
    real = os.fsync

    def fsync(file: int) -> None:
        real(file)
        written.append((os.fstat(file).st_size, place.usage.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    place.write(entry(requests_per_day=2))
    accounts = place.load()
    accounts.identify(bearer(KEY), "").admit()
    accounts.flush()
    assert written == [(place.usage.stat().st_size, False)]


def test_a_thread_that_is_late_does_not_write_over_what_is_newer(place: Place) -> None:
    place.write(entry(requests_per_day=5))
    accounts = place.load()
    accounts.identify(bearer(KEY), "").admit()
    late = accounts._snapshot()
    accounts.identify(bearer(KEY), "").admit()
    accounts.flush()
    newest = place.usage.read_bytes()
    accounts._save(*late)
    assert place.usage.read_bytes() == newest != late[1]


def refuses(accounts: Accounts, key: str) -> bool:
    try:
        accounts.identify(bearer(key), "")
    except Refusal:
        return True
    return False


def test_a_changed_keys_file_is_taken_over_with_what_was_used(place: Place) -> None:
    place.write(entry(requests_per_minute=2))
    accounts = place.load()
    under_way = accounts.identify(bearer(KEY), "")
    under_way.admit()
    place.write(
        entry(key=OTHER, requests_per_minute=2), entry("bob", KEY)
    )  # alice has a new key, bob her old
    accounts.reread()
    assert accounts.identify(bearer(KEY), "").name == "bob"
    alice = accounts.identify(bearer(OTHER), "")
    under_way.admit()
    assert breach(alice).status == 429


@pytest.mark.parametrize("damage", ["{", '{"version": 1}', None])
def test_a_keys_file_that_breaks_leaves_the_former_keys(
    place: Place, damage: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    place.write(entry())
    accounts = place.load()
    if damage is None:
        place.keys.unlink()
    else:
        place.keys.write_text(damage)
    for _ in range(3):
        accounts.reread()
    assert accounts.identify(bearer(KEY), "").name == "alice"
    assert refused(accounts, []).status == 401
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
    place.write(entry("bob", OTHER))
    accounts.reread()
    assert refuses(accounts, KEY) and not refuses(accounts, OTHER)


# --- the keys file, and what is never told ---


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not JSON (line 1"),
        ("[" * 100_000, "is not usable JSON"),
        ('{"version": 1}', "keys: Field required"),
        ('{"version": 2, "keys": []}', "version:"),
        ({"key": KEY}, "keys.0: a field that is none of name, sha256"),
        ({KEY: 1}, "keys.0: a field that is none of name, sha256"),
        ({"sha256": KEY}, "keys.0.sha256: must be the 64 hexadecimal digits"),
        ({"sha256": digest(KEY) + "\n"}, "keys.0.sha256: must be"),
        ({"name": "al ice\n" + KEY}, "keys.0.name: String should match"),
        ({"name": None}, "keys.0.name: "),
        ({"presets": KEY}, "keys.0.presets: "),
        ({"presets": [KEY.upper()]}, "keys.0.presets.0: "),
        ({"requests_per_day": 0}, "keys.0.requests_per_day: "),
        ({"tokens_per_day": "12"}, "keys.0.tokens_per_day: "),
        ({"tokens_per_minute": True}, "keys.0.tokens_per_minute: "),
        ([entry(), entry(key=OTHER)], "'alice' is there twice; give each key a name of its own"),
        ([entry(), {**entry("bob"), "sha256": digest(KEY).upper()}], "has the sha256 of another key"),
    ],
)
def test_a_bad_keys_file_is_told_in_one_line_without_its_values(
    place: Place, content: Any, said: str
) -> None:
    if isinstance(content, dict):
        content = [{**entry(), **content}]
    text = content if isinstance(content, str) else json.dumps({"version": 1, "keys": content})
    place.keys.write_text(text)
    with pytest.raises(UsageError) as caught:
        place.load()
    told = str(caught.value)
    assert said in told and str(place.keys) in told and "run the playbook" in told
    assert "\n" not in told
    assert_silent(told)
    assert caught.value.__suppress_context__


def test_a_missing_keys_file_opens_nothing(place: Place) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        place.load()


def assert_silent(text: str) -> None:
    """Nothing of a key or a hash, not even a part."""
    for secret in (KEY.removeprefix("llmbox-"), OTHER.removeprefix("llmbox-"), digest(KEY), digest(OTHER)):
        for start in range(len(secret) - 11):
            assert secret[start : start + 12].lower() not in text.lower()


def test_no_key_and_no_hash_is_ever_told(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    place.write(entry(requests_per_minute=1, tokens_per_day=1, presets=["coder"]), entry("bob", OTHER))
    accounts = place.load()
    alice = accounts.identify(bearer(KEY), "")
    alice.admit()
    alice.spend(2)
    told = [breach(alice, preset).message for preset in (None, "big")]
    told += [alice.exhausted(), refused(accounts, bearer(KEY + "x")).message, repr(read_keys(place.keys))]
    place.keys.write_text(json.dumps({"version": 1, "keys": [{"sha256": KEY, "name": OTHER}]}))
    accounts.reread()
    accounts.flush()
    told += [
        place.usage.read_text(),
        caplog.text,
        repr(vars(alice)),
        repr(accounts.identify(bearer(OTHER), "")),
    ]
    assert caplog.records
    for text in told:
        assert_silent(text)


# --- llmbox-key ---


def test_a_new_key_opens_what_its_entry_says(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert key_main(["new", "carol"]) == 0
    lines = capsys.readouterr().out.splitlines()
    key = next(text for text in lines if text.startswith("llmbox-"))
    made = json.loads(next(text for text in lines if text.startswith("- ")).removeprefix("- "))
    assert list(made) == ["name", "sha256", "presets", *BUDGETS]
    place.write(made)
    assert place.load().identify(bearer(key), "").name == "carol"
    assert key_main(["new", "carol"]) == 0
    assert key not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "a b", "-", "x" * 65, "a\n", "ä"])
def test_a_key_for_no_usable_name_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert key_main(["new", "--", name]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1


def test_every_budget_has_its_seconds() -> None:
    assert SECONDS == {
        "requests_per_minute": 60,
        "requests_per_day": 86400,
        "tokens_per_minute": 60,
        "tokens_per_day": 86400,
    }
