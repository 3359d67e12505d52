"""What choose_draft.py decides from what was measured, when it measures at all, and what it writes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from llama_common import fit
from llama_common.derive import presets_plan
from llama_common.dialect import Dialect
from llama_common.draft import MTP, SIMPLE, Draft
from llama_common.memory import Estimate, Use
from llama_common.presets import DraftChoice, HostConfig
from llama_common.rules import LOCK_COMMAND

from scripts import _draft_choice, choose_draft
from scripts._compare import MOST_PAIRS
from scripts._draft_choice import Judged, answers, judge, path_of, write
from scripts._gpu_watch import GpuWatch
from scripts._inventory import Host, InventoryUnreadable
from scripts._llm_box import LlmBox
from scripts._measure import NotMeasured, Shape, Timed
from scripts._verdict import Behaviour, Comparison
from scripts.verify_health import Check, HostReport
from tests.unit.test_compare import Box
from tests.unit.test_draft import BOTH, HELP, OLD_HELP, SIZES, choice, config, header, variables
from tests.unit.test_verify_health import VARIABLES

SHAPE = Shape("short", 1536, 400)
RELEASE = f"{'b' * 40}-abc"


def pairs(without: float, drafted: float, noise: float = 0.003, count: int = 5) -> Any:
    rng = random.Random(3)  # noqa: S311
    return tuple(
        (without * rng.uniform(1 - noise, 1 + noise), drafted * rng.uniform(1 - noise, 1 + noise))
        for _ in range(count)
    )


def found(generation: float = 100.0, prefill: float = 2000.0, **more: Any) -> Comparison:
    """A comparison with 100 tokens per second and 2000 without the draft."""
    noise = more.pop("noise", 0.003)
    return replace(
        Comparison(
            "p", generation=pairs(100, generation, noise), prefill=pairs(2000, prefill, noise), trouble=""
        ),
        **more,
    )


@pytest.mark.parametrize(
    ("case", "word", "reason"),
    [
        (found(150), "kept", "an answer comes 1.39 times as fast (1.3"),
        (found(103), "rejected", "an answer comes 1.03 times as fast (1.0"),  # faster, and not by enough
        (found(110), "kept", "an answer comes 1.0"),
        (found(100), "rejected", "an answer comes 1.00 times as fast"),
        (found(60), "rejected", "an answer comes 0.64 times as fast"),
        (found(120, prefill=1000), "rejected", "an answer comes 0.9"),
        (found(110, noise=0.25), "undecided", "an answer comes 1."),
        (found(new=Behaviour(start="vocabularies differ")), "rejected", "it does not start with it: vocab"),
        (found(old=Behaviour(start="broken")), "undecided", "it does not start without the draft either"),
        (found(150, new=Behaviour(tool_call="no")), "rejected", "with it the preset breaks tool calls: no"),
        (found(150, old=Behaviour(tool_call="no"), new=Behaviour(tool_call="no")), "kept", "an answer"),
        (found(150, new=Behaviour(health="it ended")), "rejected", "with it the preset is not healthy: it"),
        (found(150, new=Behaviour(prompt_cache="of")), "rejected", "with it the preset loses the prompt"),
        (Comparison("p", trouble="no run of 10"), "undecided", "it could not be measured: no run of 10"),
    ],
)
def test_a_draft_is_kept_only_where_it_was_measured_to_be_faster(
    case: Comparison, word: str, reason: str
) -> None:
    judged = judge(case, SHAPE)
    assert (judged.word, judged.reason[: len(reason)]) == (word, reason)
    if judged.figures:
        assert set(judged.figures) == {"answer", "generation", "prefill"}


@pytest.mark.parametrize("case", [found(150), found(100), found(110, noise=0.25)])
def test_what_the_preset_cannot_do_without_the_draft_either_is_told(case: Comparison) -> None:
    broken = Behaviour(tool_call="no template")
    plain, told, better = (
        judge(replace(case, old=old, new=new), SHAPE)
        for old, new in ((Behaviour(), Behaviour()), (broken, broken), (broken, Behaviour()))
    )
    also = "; without it too the preset breaks tool calls: no template"
    assert told == replace(plain, reason=plain.reason + also) and better == plain


def test_more_pairs_are_made_only_while_they_could_decide_it() -> None:
    assert not _draft_choice.is_open(found(150), SHAPE)
    assert not _draft_choice.is_open(found(60), SHAPE)
    assert _draft_choice.is_open(found(110, noise=0.25), SHAPE)
    assert not _draft_choice.is_open(replace(found(noise=0.25), trouble="busy"), SHAPE)
    assert not _draft_choice.is_open(found(110, noise=0.25, old=Behaviour(start="broken")), SHAPE)


def test_an_answer_counts_what_is_read_too() -> None:
    case = Comparison("p", generation=((100.0, 200.0),), prefill=((1536.0, 768.0),))
    ((without, drafted),) = answers(case, SHAPE)
    assert without == pytest.approx(400 / (1 + 4)) and drafted == pytest.approx(400 / (2 + 2))


# --- which, and whether at all ---


def test_the_candidate_is_one_that_the_release_can_start() -> None:
    own = config({**BOTH, "big": header("big", "attn", "head")}, SIZES)
    assert choose_draft.candidate(own, "p", Dialect.from_help(HELP)) == Draft(MTP)
    assert choose_draft.candidate(own, "p", Dialect.from_help(OLD_HELP)) == Draft(SIMPLE, "small")


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "the lock has no header of big; run scripts/lock_models.py"),
        ({"big": header("big"), "small": header("small", tokens=1)}, "there is no draft for it: big has no"),
    ],
)
def test_what_is_missing_for_a_candidate_is_told(headers: dict[str, Any], said: str) -> None:
    with pytest.raises(NotMeasured, match=said):
        choose_draft.candidate(config(headers, SIZES), "p", Dialect.from_help(HELP))


class Bench:
    """Stands in for the measurement: counts, and says that the draft is faster."""

    def __init__(self, judged: Judged) -> None:
        self.judged = judged
        self.seen: list[choose_draft.Commands] = []

    def __call__(self, *args: Any) -> Judged:
        self.seen.append(args[4])
        return self.judged


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(judge(found(150), SHAPE))
    monkeypatch.setattr(choose_draft, "measure", made)
    return made


def box(data: HostConfig, deployed: HostConfig | None = None, **more: Any) -> choose_draft.Box:
    """A host that runs what `deployed` says."""
    llm = LlmBox(data, "llm", "/home/llm", "/opt/llama.cpp", "/m", 0, "/etc/llmbox/presets.json", {}, {})
    plan = presets_plan(
        deployed or data, models_dir="/m", releases_root="/opt/llama.cpp", dialects={"b": HELP}
    )
    seen = {
        "builds": {"b": {"current": f"/opt/llama.cpp/b/releases/{RELEASE}"}},
        "presets": {"presets": plan},
        "files": {"big.gguf": 1000, "small.gguf": 10},
    }
    return choose_draft.Box(Host("box"), llm, {**seen, **more}, "none", {"b": HELP})


def decide(of: choose_draft.Box, *, again: bool = False) -> DraftChoice:
    with httpx.Client() as client:
        return choose_draft.choose(of, client, "p", again=again, tell=lambda _: None)


def test_a_decision_holds_its_figures_and_what_it_is_for(bench: Bench) -> None:
    made = decide(box(config(BOTH, SIZES)))
    assert (made.verdict, made.draft, made.release, made.driver) == ("kept", "small", RELEASE, "none")
    assert made.figures["generation"].drafted == pytest.approx(150, rel=0.02) and made.pairs == 5
    ((without, drafted),) = bench.seen
    assert without[0] == drafted[0] == f"/opt/llama.cpp/b/releases/{RELEASE}/bin/llama-server"
    assert "--spec-type" not in without
    assert drafted[-6:] == [
        *("--spec-draft-model", "/m/small.gguf"),
        *("--spec-draft-ngl", "99"),
        *("--spec-type", "draft-simple"),
    ]


@pytest.mark.parametrize("verdict", ["kept", "rejected"])
def test_what_is_decided_is_not_started_again(bench: Bench, verdict: str) -> None:
    data = config(BOTH, SIZES, llama_drafts={"p": choice(verdict, release=RELEASE)})
    assert decide(box(data)) is data.llama_drafts["p"]
    assert bench.seen == []
    decide(box(data), again=True)
    assert len(bench.seen) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"release": "another"},
        {"driver": "580.1"},
        {"model_sha256": "9" * 64},
        {"draft_sha256": "9" * 64},
        {"verdict": "undecided"},
    ],
    ids=lambda one: next(iter(one)),
)
def test_a_rejected_draft_is_tried_again_when_something_changed(
    bench: Bench, changes: dict[str, Any]
) -> None:
    data = config(
        BOTH, SIZES, llama_drafts={"p": choice(**{"verdict": "rejected", "release": RELEASE, **changes})}
    )
    assert decide(box(data)).verdict == "kept"
    assert len(bench.seen) == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda data: box(data, files={"small.gguf": None}), "small.gguf is not on the box; fix: run site"),
        (lambda data: box(data, files={"small.gguf": 9}), "small.gguf is not on the box; fix: run site"),
        (lambda data: box(data, presets={"presets": {"p": {"command": ["x"]}}}), "with other flags than the"),
        (lambda data: box(data, builds={"b": {"current": None}}), "has no release on the box; fix: run"),
    ],
)
def test_a_box_that_is_not_as_the_inventory_says_decides_nothing(
    bench: Bench, make: Callable[[HostConfig], choose_draft.Box], said: str
) -> None:
    with pytest.raises(NotMeasured, match=said):
        decide(make(config(BOTH, SIZES)))
    assert bench.seen == []


def test_a_draft_that_does_not_fit_the_card_is_never_started(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose_draft, "too_large", lambda *_: "with it the preset takes 20.00 GiB of the GPU")
    made = decide(box(config(BOTH, SIZES)))
    assert (made.verdict, made.reason[:22], bench.seen) == ("rejected", "with it the preset tak", [])


@pytest.mark.parametrize(
    ("now", "verdict", "measured"),
    [("{} 20 GiB", "rejected", False), ("{} 18 GiB", "rejected", False), ("", "kept", True)],
    ids=["as before", "still too large", "room was made"],
)
def test_a_rejection_by_prediction_holds_as_long_as_the_prediction(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, now: str, verdict: str, measured: bool
) -> None:
    before, now = (text.format(choose_draft.TOO_LARGE) for text in ("{} 20 GiB", now))
    old = choice("rejected", release=RELEASE, pairs=0, reason=before)
    monkeypatch.setattr(choose_draft, "too_large", lambda *_: now)
    data = config(BOTH, SIZES, llama_drafts={"p": old})
    made = decide(box(data))
    assert (made.verdict, bool(bench.seen)) == (verdict, measured)
    assert made.reason == now or measured
    assert (made is data.llama_drafts["p"]) is (now == before), "the file changes only with the reason"


@pytest.mark.parametrize(("more", "refused"), [(0, False), (1, True)])
@pytest.mark.parametrize("place", ["gpu", "cpu"])
def test_a_draft_with_which_a_memory_is_full_to_the_last_byte_fits(
    monkeypatch: pytest.MonkeyPatch, place: fit.Place, more: int, refused: bool
) -> None:
    data = config(BOTH, SIZES, **{f"{fit.PLACES[place][1]}_memory_mib": 9216})
    use = Use(fit.Room.of(data).at(place) + more)
    monkeypatch.setattr(
        fit, "estimate_of", lambda *_, **__: Estimate(use) if place == "gpu" else Estimate(Use(), use)
    )
    said = choose_draft.too_large(data, "p")
    assert bool(said) is said.startswith(choose_draft.TOO_LARGE) is refused


def test_fixes_of_a_report_can_be_typed_as_they_stand() -> None:
    fix = f"run {LOCK_COMMAND}"
    open_yet = Check("p.draft", False, None, "", None, fix)
    for report in (HostReport("box", error=fix), HostReport("box", (open_yet,))):
        (line,) = choose_draft.told([choose_draft.typed(report, Path("boxes"))])
        assert line.endswith(": run scripts/lock_models.py --inventory boxes")


# --- the whole command, with a box that does what it is asked ---


class Drafted(Box):
    """A box on trial whose "new" side is the preset with its draft."""

    preset = "p"

    def __init__(self) -> None:
        super().__init__()
        self.driver = "580.95"
        self.held: list[str] = []
        self.keys: set[str | None] = set()

    def which(self, command: Sequence[str]) -> str:
        return "new" if "--spec-type" in command else "old"

    def series(self, shape: Shape, count: int) -> Iterator[Timed]:
        assert shape == SHAPE
        return super().series(shape, count)

    def http(self, request: httpx.Request) -> httpx.Response:
        self.keys.add(request.headers.get("authorization"))
        return super().http(request)


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Drafted:
    """What goes over ssh is answered here; the inventory has what was decided."""
    fake, client = Drafted(), httpx.Client

    def read(*_: object, **__: object) -> list[Host]:
        file = path_of(tmp_path, "box")
        decided = yaml.safe_load(file.read_text()) if file.exists() else {}
        of = {**VARIABLES, **variables(BOTH, SIZES), "gguf_models_dir": "/m", **decided}
        return [Host("box", frozenset({"llm_servers"}), of)]

    def asked(host: Host, _request: object, *, become: bool) -> dict[str, Any]:
        return {"llm": box(LlmBox.of(host.variables).config).seen}

    def watched(_: Host) -> AbstractContextManager[GpuWatch]:
        watch = GpuWatch()
        watch.add(0.0, {"driver": fake.driver})
        return nullcontext(watch)

    def held(_: Host, preset: str) -> AbstractContextManager[Drafted]:
        fake.held.append(preset)
        return nullcontext(fake)

    for name, value in {
        "load": read, "ask": asked, "watched": watched, "trial": held,
        "run_on": lambda _, command: {"cat /opt/llama.cpp/b/current/help.txt": HELP}[command],
        "reach": lambda *_: nullcontext("http://box"),
        "Meter": lambda *_: fake,
    }.items():  # fmt: skip
        monkeypatch.setattr(choose_draft, name, value)
    transport = httpx.MockTransport(fake.http)
    monkeypatch.setattr(httpx, "Client", lambda **options: client(transport=transport, **options))
    return fake


def run(inventory: Path, *words: str) -> tuple[int, DraftChoice]:
    """The command's exit code, and what the inventory has now."""
    code = choose_draft.main(["--inventory", str(inventory), *words])
    written = yaml.safe_load(path_of(inventory, "box").read_text())["llama_drafts"]
    return code, DraftChoice.model_validate(written["p"])


def test_without_and_with_the_draft_in_turn_and_what_came_of_it_is_kept(
    drafted: Drafted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLMBOX_KEY", "k")
    drafted.speed["new"] = 150.0
    code, made = run(tmp_path)
    assert (code, made.verdict, made.pairs) == (0, "kept", 5)
    assert (made.draft, made.release, made.driver) == ("small", RELEASE, "580.95")
    assert made.model_sha256 == BOTH["big"]["sha256"] and made.draft_sha256 == BOTH["small"]["sha256"]
    figures = {name: (one.without, one.drafted) for name, one in made.figures.items()}
    assert figures["generation"] == pytest.approx((100, 150), rel=0.01)
    assert figures["prefill"] == pytest.approx((1000, 1000), rel=0.01)
    assert drafted.held == ["p"] and drafted.keys == {"Bearer k"}


def test_a_decision_is_measured_again_for_another_driver_or_when_asked(
    drafted: Drafted, tmp_path: Path
) -> None:
    for words, driver, measured in (
        ((), "580.95", 1), ((), "580.95", 1), ((), "590.10", 2), (("--again",), "590.10", 3),
    ):  # fmt: skip
        drafted.driver = driver
        code, made = run(tmp_path, *words)
        assert (code, made.verdict, made.driver, len(drafted.held)) == (0, "rejected", driver, measured)


def test_more_pairs_are_made_while_it_is_open_whether_the_draft_is_worth_it(
    drafted: Drafted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As an update of llama.cpp these would have been settled: nowhere slower."""
    speeds = itertools.cycle((97.0, 125.0))

    def series(_shape: Shape, _count: int) -> Iterator[Timed]:
        yield Timed(1536, 1000.0, 400, 100.0 if drafted.release == "old" else next(speeds), 0.0, 1.0)

    monkeypatch.setattr(drafted, "series", series)
    code, made = run(tmp_path)
    assert (code, made.verdict, made.pairs) == (1, "undecided", MOST_PAIRS)


# --- the file ---


def test_the_file_says_again_what_was_decided_and_drops_what_means_nothing(tmp_path: Path) -> None:
    path = path_of(tmp_path, "box")
    judged = judge(found(150), SHAPE)
    new = DraftChoice.model_validate(
        {**choice(), "figures": {k: v.model_dump() for k, v in judged.figures.items()}}
    )
    old = config(BOTH, SIZES, llama_drafts={"gone": choice(), "p": choice("rejected")})
    assert write(path, old, {"p": new}, "scripts/choose_draft.py --inventory x")
    assert path == tmp_path / "host_vars/box/drafts.yml"
    loaded = yaml.safe_load(path.read_text())
    again = config(BOTH, SIZES, **loaded)
    assert again.llama_drafts == {"p": new}
    assert not write(path, again, {}, "scripts/choose_draft.py --inventory x")


def test_a_file_of_the_host_that_would_be_hidden_is_named(tmp_path: Path) -> None:
    (tmp_path / "host_vars").mkdir()
    (tmp_path / "host_vars/box.yml").write_text("a: 1\n")
    with pytest.raises(InventoryUnreadable, match=r"box.yml: Ansible stops reading it once .* as main.yml"):
        path_of(tmp_path, "box")
    (tmp_path / "host_vars/box").mkdir()
    assert path_of(tmp_path, "box").name == "drafts.yml"


@pytest.mark.parametrize(
    ("groups", "words", "said"),
    [
        ((), (), "choose_draft: x: none of the hosts is in the group llm_servers"),
        (
            ("llm_servers",),
            ("--preset", "plain"),
            "choose_draft: --preset plain: nothing to choose, it has draft: none; fix: write draft: auto",
        ),
        (
            ("llm_servers",),
            ("--preset", "p", "--preset", "named"),
            "choose_draft: --preset named: nothing to choose, it has draft: small; fix: write draft: auto",
        ),
        (
            ("llm_servers",),
            ("--preset", "q"),
            "choose_draft: --preset q: no such preset; known: named, p, plain",
        ),
    ],
)
def test_what_leaves_nothing_to_choose_is_refused(
    groups: tuple[str, ...],
    words: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    presets = {"p": {"draft": "auto"}, "named": {"draft": "small"}, "plain": {}}
    host = Host("box", groups=frozenset(groups), variables={"llama_presets": presets})
    monkeypatch.setattr(choose_draft, "load", lambda *_, **__: [host])
    monkeypatch.setattr(choose_draft, "choose_and_keep", lambda *_: pytest.fail("it began to measure"))
    assert choose_draft.main(["--inventory", "x", *words]) == 2
    assert capsys.readouterr().err.strip() == said
