"""Presets against the memory of a card: what is refused, with which fix, and what cannot be checked."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from llama_common import fit
from llama_common.dialect import Dialect
from llama_common.draft import MTP, SIMPLE, Draft
from llama_common.memory import CUDA, MIB, Estimate, NotPredicted, Settings, Use, estimate
from llama_common.model import Model
from llama_common.presets import HostConfig
from llama_common.problems import MISSING, InventoryError, Problem
from llama_common.rules import LOCK_COMMAND

from scripts import _tiny_models, plan_vram
from scripts._ask_host import Unreachable
from scripts._header import NoHeader, client, read_file, read_url
from scripts._inventory import Host
from scripts._llm_box import LlmBox
from scripts._server_memory import NoFigure

SHA = "a" * 64


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def header(architecture: str, folder: Path) -> dict[str, Any]:
    path = _tiny_models.write(architecture, folder, weights=False)
    return {"sha256": SHA, **Model.of([read_file(path)]).facts()}


def config(card_mib: int, lock: dict[str, Any], **preset: Any) -> HostConfig:
    model = {"url": "http://x.invalid/m.gguf", "sha256": SHA, "size": 1}
    keys = {"description": "d", "build": "b", "model": "m", "context": 65_536, "kv_cache_type": "f16"}
    return HostConfig.load(
        {
            "llama_cpp_builds": {"b": {"repo": "https://x.invalid/a.git", "commit": "b" * 40}},
            "gguf_models": {"m": model},
            "llama_presets": {"p": {**keys, **preset}},
            "llama_lock": {"headers": {"m": lock} if lock else {}},
            "llama_presets_gpu_memory_mib": card_mib and card_mib + 1024,  # what stays free by default
        }
    )


def test_what_fits_is_not_spoken_of(folder: Path) -> None:
    assert fit.check(config(600, header("qwen3moe", folder))) == ([], [])


def test_a_part_of_the_card_stays_free(folder: Path) -> None:
    lock = header("qwen3moe", folder)
    taken = fit.estimate_of(config(600, lock), "p", fit.models(config(600, lock))).gpu.total
    exact = config(-(-taken // MIB), lock)
    assert fit.check(exact) == ([], [])
    more = exact.model_copy(update={"llama_presets_gpu_reserved_mib": 1025})
    (problem,) = fit.check(more)[0]
    assert "llama_presets_gpu_reserved_mib" in problem.message


def test_a_draft_takes_its_part_with_a_cache_of_its_own(folder: Path) -> None:
    known = {name: Model.from_facts(header(name, folder)) for name in ("qwen3moe", "qwen3")}
    preset = config(600, {}, kv_cache_type="q8_0", n_cpu_moe=1).llama_presets["p"]
    alone = fit.preset_estimate(preset, ["qwen3moe"], known)
    draft = fit.preset_estimate(preset.model_copy(update={"kv_cache_type": "f16"}), ["qwen3"], known)
    assert fit.preset_estimate(preset, ["qwen3moe", "qwen3"], known) == alone + draft


def test_without_a_gpu_nothing_is_checked(folder: Path) -> None:
    assert fit.check(config(0, header("qwen3moe", folder))) == ([], [])


def test_what_does_not_fit_is_refused_with_the_smallest_change_of_each_key(folder: Path) -> None:
    tight = config(480, header("qwen3moe", folder))
    problems, unchecked = fit.check(tight)
    assert not unchecked
    (problem,) = problems
    assert problem.path == ("llama_presets", "p", "context")
    assert "weights 0.05 GiB, KV cache 0.38 GiB" in problem.message
    assert problem.fix.startswith("write n_cpu_moe: ")
    changes = list(fit.changes(tight.llama_presets["p"], ["m"], fit.models(tight), fit.Room.of(tight)))
    assert [change.key for change in changes] == ["n_cpu_moe", "context", "kv_cache_type"]
    step = {"n_cpu_moe": -1, "context": 256}
    for change in changes:
        assert change.taken <= 480 * MIB
        if change.key in step:
            before = change.value + step[change.key]  # type: ignore[operator]
            preset = tight.llama_presets["p"].model_copy(update={change.key: before})
            assert fit.preset_estimate(preset, ["m"], fit.models(tight)).gpu.total > 480 * MIB


def test_a_dense_model_is_offered_fewer_layers_on_the_gpu(folder: Path) -> None:
    problems, _ = fit.check(config(300, header("qwen3", folder)))
    assert "n_gpu_layers: " in problems[0].fix
    assert "n_cpu_moe" not in problems[0].fix


def test_an_agent_keeps_its_context(folder: Path) -> None:
    problems, _ = fit.check(config(120, header("qwen3", folder)))
    assert "context: " not in problems[0].fix


def least(lock: dict[str, Any], card: int, **preset: Any) -> dict[str, int | str]:
    """What each key would have to be for a preset to fit into so many bytes."""
    box = config(600, lock, **preset)
    found = fit.changes(box.llama_presets["p"], ["m"], fit.models(box), fit.Room(card))
    return {change.key: change.value for change in found}


def takes(lock: dict[str, Any], **preset: Any) -> int:
    """The bytes that a preset takes of the GPU."""
    box = config(600, lock, **preset)
    return fit.estimate_of(box, "p", fit.models(box)).gpu.total


def test_an_agent_keeps_its_context_in_each_of_its_slots(folder: Path) -> None:
    lock = header("llama", folder)
    two = {"context": 131_072, "parallel": 2}
    enough = takes(lock, **{**two, "context": 65_536})
    assert least(lock, enough, **two)["context"] == 65_536
    assert "context" not in least(lock, enough - 1, **two)
    chat = least(lock, enough - 1, **two, agent=False)["context"]
    assert chat == 65_536 - 512, "a step of 256 tokens for each slot"


def test_what_takes_exactly_the_card_fits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = header("qwen3moe", folder)
    for layers in (1, 3, 6):  # the first change that is tried, one between, the last
        card = takes(lock, n_cpu_moe=layers)
        assert least(lock, card)["n_cpu_moe"] == layers
        assert least(lock, card - 1).get("n_cpu_moe") == (layers + 1 if layers < 6 else None)
    for more, refused in ((0, 0), (1, 1)):
        monkeypatch.setattr(fit, "estimate_of", lambda *_, more=more, **__: Estimate(Use(600 * MIB + more)))
        assert len(fit.check(config(600, lock))[0]) == refused
        assert plan_vram.Plan("box", "p", fit.Room(600 * MIB), Estimate(Use(600 * MIB + more))).fits == (
            not refused
        )


def test_without_flash_attention_no_quantized_cache_is_offered(folder: Path) -> None:
    lock = header("llama", folder)
    card = takes(lock, kv_cache_type="q8_0")
    assert least(lock, card)["kv_cache_type"] == "q8_0"
    assert "kv_cache_type" not in least(lock, takes(lock, flash_attention=False) - 1, flash_attention=False)


def test_where_no_key_alone_is_enough_two_are_named_before_a_smaller_model(folder: Path) -> None:
    lock = header("qwen3moe", folder)
    agent = {"context": 32_768}  # which keeps it
    card = takes(lock, kv_cache_type="q4_0", n_cpu_moe=2, **agent)
    box = config(-(-card // MIB), lock, **agent)
    room = fit.Room(card)
    assert not list(fit.changes(box.llama_presets["p"], ["m"], fit.models(box), room))
    (first, *_) = fit.remedies(box.llama_presets["p"], ["m"], fit.models(box), room, "gpu")
    assert first.startswith("kv_cache_type: q4_0 and n_cpu_moe: 2 (")
    assert fit.check(config(card // MIB, lock, **agent))[0][0].fix.startswith(
        "write kv_cache_type: q4_0 and n_cpu_moe: "
    )
    # What there is no room for in the other memory is no remedy.
    least_cpu = fit.estimate_of(box, "p", fit.models(box)).cpu.total
    full = fit.Room(card, least_cpu)
    assert not any(
        "n_cpu_moe" in one
        for one in fit.remedies(box.llama_presets["p"], ["m"], fit.models(box), full, "gpu")
    )


def test_all_experts_beside_the_smallest_cache_and_a_shorter_context_are_the_last_that_is_tried(
    folder: Path,
) -> None:
    lock = header("qwen3moe", folder)
    layers = int(fit.models(config(600, lock))["m"].layers)
    wanted = {"context": 262_144, "agent": False}
    card = takes(lock, kv_cache_type="q4_0", n_cpu_moe=layers, **{**wanted, "context": 4096})
    box = config(600, lock, **wanted)
    (only,) = fit.remedies(box.llama_presets["p"], ["m"], fit.models(box), fit.Room(card), "gpu")
    assert only.startswith(f"kv_cache_type: q4_0 and n_cpu_moe: {layers} and context: 4096 (")


def test_what_cannot_fit_says_so(folder: Path) -> None:
    problems, _ = fit.check(config(1, header("gpt-oss", folder), n_cpu_moe=99))
    assert problems[0].fix == "choose a smaller model, or a smaller quantization of it"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architecture": "falcon-h9"}, "the architecture falcon-h9 is not known"),
        ({"sha256": "c" * 64}, "the lock has no header of m"),
        (None, "the lock has no header of m"),
    ],
)
def test_what_cannot_be_checked_is_named(folder: Path, change: dict[str, str] | None, reason: str) -> None:
    lock = {} if change is None else header("llama", folder) | change
    problems, unchecked = fit.check(config(16_376, lock))
    assert not problems
    assert unchecked[0].preset == "p"
    assert reason in unchecked[0].reason


# --- main memory ---


def with_main(box: HostConfig, mib: int) -> HostConfig:
    """The same host with so much of its main memory for presets."""
    return box.model_copy(
        update={"llama_presets_main_memory_mib": mib and mib + box.llama_presets_main_reserved_mib}
    )


def test_what_takes_more_main_memory_than_there_is_is_refused(folder: Path) -> None:
    lock = header("qwen3moe", folder)
    box = config(600, lock, n_cpu_moe=6)
    taken = fit.estimate_of(box, "p", fit.models(box))
    need = -(-taken.cpu.total // MIB)
    for mib in (need, 0):  # as much as it takes, and nobody knows how much
        assert fit.check(with_main(box, mib)) == ([], [])
    tight = with_main(box, need - 20)
    (problem,) = fit.check(tight)[0]
    assert problem.path == ("llama_presets", "p", "context")
    assert "of main memory (weights 0.05 GiB" in problem.message
    assert "llama_presets_main_memory_mib without llama_presets_main_reserved_mib" in problem.message
    room = fit.Room.of(tight)
    found = {
        change.key: change
        for change in fit.changes(box.llama_presets["p"], ["m"], fit.models(box), room, "cpu")
    }
    assert problem.fix == "write " + ", or ".join(change.text for change in found.values())
    layers = int(found["n_cpu_moe"].value)
    assert layers < 6

    def on_the_cpu(value: int) -> int:
        preset = box.llama_presets["p"].model_copy(update={"n_cpu_moe": value})
        return fit.preset_estimate(preset, ["m"], fit.models(box)).cpu.total

    assert found["n_cpu_moe"].taken == on_the_cpu(layers) <= room.cpu < on_the_cpu(layers + 1)
    all_of_them = config(600, lock, n_cpu_moe=99)
    assert "write n_cpu_moe: 5 " in fit.check(with_main(all_of_them, need - 1))[0][0].fix


def test_without_a_gpu_main_memory_is_all_there_is(folder: Path) -> None:
    box = with_main(config(0, header("qwen3moe", folder), n_cpu_moe=6), 400)
    (problem,) = fit.check(box)[0]
    assert "KV cache 0.38 GiB" in problem.message, "all of it is on the CPU"
    assert "kv_cache_type: q8_0" in problem.fix
    assert "n_cpu_moe" not in problem.fix and "n_gpu_layers" not in problem.fix


def test_a_dense_model_is_offered_more_layers_on_the_gpu(folder: Path) -> None:
    box = config(600, header("qwen3", folder), n_gpu_layers=3)
    taken = fit.estimate_of(box, "p", fit.models(box))
    (problem,) = fit.check(with_main(box, taken.cpu.total // MIB - 1))[0]
    assert "n_gpu_layers: 4 " in problem.fix


@pytest.mark.parametrize(("place", "layers"), [("gpu", 0), ("cpu", 6)])
def test_no_fix_is_what_the_other_memory_cannot_take(folder: Path, place: fit.Place, layers: int) -> None:
    box = config(0, header("qwen3moe", folder), n_cpu_moe=layers)
    known, preset = fit.models(box), box.llama_presets["p"]
    taken = fit.preset_estimate(preset, ["m"], known)
    gpu, cpu = taken.gpu.total, taken.cpu.total
    for other, offered in ((2**40, True), (cpu if place == "gpu" else gpu, False)):
        room = fit.Room(gpu - 1, other) if place == "gpu" else fit.Room(other, cpu - 1)
        keys = {change.key for change in fit.changes(preset, ["m"], known, room, place)}
        assert ("n_cpu_moe" in keys) is offered
        assert "context" in keys, "it takes less of both"


def test_a_plan_tells_whether_main_memory_is_checked() -> None:
    taken = Estimate(Use(100 * MIB), Use(300 * MIB))
    for room, fits, said in (
        (fit.Room(600 * MIB, 300 * MIB), True, "in main memory 0"),
        (fit.Room(600 * MIB, 299 * MIB), False, "in main memory -1"),
        (fit.Room(600 * MIB), True, "in main memory not checked"),
        (fit.Room(0), True, "margin no GPU, in main memory not checked"),
    ):
        plan = plan_vram.Plan("box", "p", room, taken, "header")
        assert plan.fits is fits and plan.check.detail.endswith(said)
        assert ("not checked" in plan_vram.screen([plan])) is (not room.cpu)


# --- scripts/plan_vram.py ---


@pytest.mark.parametrize("flag", ["--mmproj", "--mmproj-url", "-mmu", "-ot"])
def test_a_flag_that_moves_memory_is_not_predicted(flag: str) -> None:
    with pytest.raises(NotPredicted, match=flag):
        Settings.of({"context": 512, "extra_args": [flag, "x"]})


def test_the_estimator_gets_the_flags_that_it_knows() -> None:
    server = Dialect({"--model": "FNAME", "--fit": "[on|off]", "--port": "N", "--jinja": "", "-ub": "N"})
    estimator = Dialect({"--model": "FNAME", "--fit": "[on|off]", "-ub": "N"})
    command = [
        "/r/bin/llama-server",
        "--model",
        "/m.gguf",
        "--port",
        "1",
        "--fit",
        "off",
        "--jinja",
        "-ub",
        "64",
    ]
    assert plan_vram.fit_command(command, server, estimator) == [
        *("/r/bin/llama-fit-params", "--fit-print", "on", "--model", "/m.gguf", "-ub", "64")
    ]


class Asked:
    """A host that answers as llama-fit-params does, and a box with the preset p on it."""

    said = "CUDA0 100 20 3\nHost 40 0 5\n"
    estimator = "--model, -m FNAME  its file\n-ot, --override-tensor WORDS  where\n"

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known = {name: Model.from_facts(header(name, folder)) for name in ("qwen3moe", "qwen3")}
        self.commands: list[str] = []
        self.words: list[str] = []
        monkeypatch.setattr(plan_vram, "run", self.run)
        monkeypatch.setattr(plan_vram, "presets_plan", lambda *_, **__: {"p": {"command": self.words}})

    def run(self, _: object, command: str) -> str:
        self.commands.append(command)
        if command.endswith("help.txt"):
            return "--model, -m FNAME  its file\n"
        return self.estimator if command.endswith("--help") else self.said

    def ask(self, words: Sequence[str] = (), draft: Draft | None = None, **preset: Any) -> Estimate:
        self.words = ["/r/bin/llama-server", "--model", "/m.gguf", *words]
        entry = config(600, {}, **preset).llama_presets["p"]
        told = SimpleNamespace(
            llama_presets={"p": entry},
            llama_presets_gpu_memory_mib=600,
            draft=lambda _: draft,
            models_of=lambda _: ["qwen3moe", *([draft.model] if draft and draft.model else [])],
        )
        box = SimpleNamespace(config=told, user="llm", builds_root="/b", models_dir="/m")
        return plan_vram.ask(cast(Host, None), cast(LlmBox, box), self.known, "p")


@pytest.fixture
def host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(folder, monkeypatch)


def test_what_the_estimator_says_counts(host: Asked) -> None:
    said = host.ask()
    assert (said.gpu, said.cpu) == (Use(100 * MIB, 20 * MIB, 3 * MIB), Use(40 * MIB, 0, 5 * MIB))
    assert host.ask(["-ot", "exps=CPU"], extra_args=["-ot", "exps=CPU"]) == said, "the estimator knows it"


@pytest.mark.parametrize(("more_mib", "replaced"), [(0, True), (1, False), (-1, False)])
@pytest.mark.parametrize("place", ["gpu", "cpu"])
def test_logits_that_the_server_does_not_reserve_are_taken_out_where_the_header_agrees(
    host: Asked, more_mib: int, replaced: bool, place: str
) -> None:
    """What a card says otherwise, nobody has worked out: it is shown as it was said."""
    model = host.known["m"] = host.known["qwen3moe"]
    settings = Settings.of(config(600, {}).llama_presets["p"].model_dump())
    most = estimate(model, replace(settings, outputs=settings.batch), CUDA)
    least = estimate(model, settings, CUDA)
    mib = {"gpu": most.gpu.compute // MIB, "cpu": most.cpu.compute // MIB}
    mib[place] += more_mib
    host.said = f"CUDA0 100 20 {mib['gpu']}\nHost 40 0 {mib['cpu']}\n"
    told = host.ask()
    said = Estimate(Use(100 * MIB, 20 * MIB, mib["gpu"] * MIB), Use(40 * MIB, 0, mib["cpu"] * MIB))
    served = Estimate(
        replace(said.gpu, compute=least.gpu.compute), replace(said.cpu, compute=least.cpu.compute)
    )
    assert told == (served if replaced else said) and served != said


def test_to_what_the_estimator_says_comes_the_draft_of_which_it_knows_nothing(host: Asked) -> None:
    words = ["--spec-type", "draft-simple", "--spec-draft-model", "/d.gguf"]
    said = host.ask(words, Draft(SIMPLE, "qwen3"), kv_cache_type="q8_0")
    entry = config(600, {}).llama_presets["p"].model_copy(update={"kv_cache_type": "f16"})
    assert said == host.ask() + fit.preset_estimate(entry, ["qwen3"], host.known)
    assert said.gpu.cache > 21 * MIB
    with pytest.raises(NotPredicted, match="no header of other"):
        host.ask(words, Draft(SIMPLE, "other"))
    with pytest.raises(NotPredicted, match="-ot"):
        host.ask(words, Draft(SIMPLE, "qwen3"), extra_args=["-ot", "exps=CPU"])
    with pytest.raises(NotPredicted, match="head"):
        host.ask(["--spec-type", "draft-mtp"], Draft(MTP))


@pytest.mark.parametrize("flag", ["--mmproj", "--mmproj-url"])
def test_where_the_estimator_lacks_a_flag_that_takes_memory_it_is_not_asked(host: Asked, flag: str) -> None:
    with pytest.raises(NoFigure, match=f"no {flag}"):
        host.ask([flag, "x"])
    assert not [command for command in host.commands if "--fit-print" in command]


def test_what_the_estimator_cannot_tell_is_worked_out_from_the_header_or_named(
    host: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(600, {})
    box = SimpleNamespace(config=made)
    said: list[str] = []
    monkeypatch.setattr(LlmBox, "of", lambda _: box)
    monkeypatch.setattr(plan_vram, "headers", lambda _: {})
    for error in (Unreachable("gone"), NoFigure("nothing"), NotPredicted("a head")):

        def fails(*_: object, error: Exception = error) -> Estimate:
            raise error

        monkeypatch.setattr(plan_vram, "ask", fails)
        (plan,) = plan_vram.plan_host(Host("box", variables={}), offline=False, tell=said.append)
        assert plan.taken is None and "the lock has no header of m" in plan.problem
        assert said.pop() == f"box: p: {error}; using the header"


@pytest.mark.parametrize("card", [0, 480, 600])
def test_a_plan_from_the_header_is_for_the_card_that_the_host_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch, card: int
) -> None:
    made = config(card, header("qwen3moe", folder))
    monkeypatch.setattr(LlmBox, "of", lambda _: SimpleNamespace(config=made))
    (plan,) = plan_vram.plan_host(Host("box", variables={}), offline=True, tell=pytest.fail)
    assert plan.taken == fit.estimate_of(made, "p", fit.models(made), gpu=bool(card))
    assert (plan.taken.gpu.total > 480 * MIB, plan.fits) == (card > 0, card != 480)


@pytest.mark.parametrize(
    ("gpus", "code"), [([1], 0), ([], 0), ([1, 601], 1), ([1, None], 2), ([601, None], 2)]
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, gpus: list[int | None], code: int) -> None:
    plans = [
        plan_vram.Plan("box", "p", fit.Room(600), None if gpu is None else Estimate(Use(gpu)), problem="why")
        for gpu in gpus
    ]
    monkeypatch.setattr(plan_vram, "load", lambda *_, **__: [Host("box", groups=frozenset({"llama_hosts"}))])
    monkeypatch.setattr(plan_vram, "plan_host", lambda *_, **__: plans)
    assert plan_vram.main(["--inventory", "x"]) == code


def test_no_host_at_all_is_no_plan_that_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_vram, "load", lambda *_, **__: [Host("mac", groups=frozenset({"clients"}))])
    assert plan_vram.main(["--inventory", "x"]) == 2
    assert "none of the hosts is in the group llama_hosts" in capsys.readouterr().err


def test_a_plan_names_everything(folder: Path) -> None:
    box = config(480, header("qwen3moe", folder))
    taken = fit.preset_estimate(box.llama_presets["p"], ["m"], fit.models(box))
    plan = plan_vram.Plan("box", "p", fit.Room(480 * MIB), taken, "header")
    assert not plan.fits
    assert plan.check.limit == 480
    assert plan.check.value == round(taken.gpu.total / MIB)
    assert "does not fit" in plan_vram.screen([plan])
    assert plan_vram.chart([plan]).startswith(b"\x89PNG")
    unknown = plan_vram.Plan("box", "q", fit.Room(1), problem="the architecture x is not known")
    assert "box: q: the architecture x is not known" in plan_vram.screen([unknown])
    assert not unknown.check.ok


def test_fixes_of_a_plan_can_be_typed_as_they_stand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Wherever they are told: in the table, in the report, and where the inventory itself is refused."""
    command = "scripts/lock_models.py --inventory 'my boxes'"
    broken = InventoryError([Problem(("llama_lock",), MISSING, "is missing", f"run {LOCK_COMMAND}")])
    where: Any = {"config": config(600, {})}
    asked: list[Exception] = [NotPredicted(f"run {LOCK_COMMAND}")]

    def fails(*_: object) -> Estimate:
        raise asked[0]

    def of(_: object) -> SimpleNamespace:
        if not where:
            raise broken
        return SimpleNamespace(**where)

    monkeypatch.setattr(plan_vram, "load", lambda *_, **__: [Host("box", groups=frozenset({"llama_hosts"}))])
    monkeypatch.setattr(LlmBox, "of", of)
    monkeypatch.setattr(plan_vram, "headers", lambda _: {})
    monkeypatch.setattr(plan_vram, "ask", fails)
    report = tmp_path / "plan.json"
    assert plan_vram.main(["--inventory", "my boxes", "--json", str(report)]) == 2
    said = capsys.readouterr()
    for text in (said.out, said.err, report.read_text()):
        assert command in text and "--inventory DIR" not in text
    where.clear()
    assert plan_vram.main(["--inventory", "my boxes"]) == 2
    assert f"plan_vram: {broken}".replace(LOCK_COMMAND, command) == capsys.readouterr().err.strip()


def test_a_picture_that_cannot_be_written_is_told_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_vram, "load", lambda *_, **__: pytest.fail("it began to work"))
    for wrong in (tmp_path, tmp_path / "no-folder" / "plan.png"):
        assert plan_vram.main(["--inventory", "x", "--chart", str(wrong)]) == 2
        assert f"--chart {wrong}: " in capsys.readouterr().err


ENDLESS = 2**28  # bytes


class Ranges(http.server.BaseHTTPRequestHandler):
    """One file, by ranges."""

    content = b""
    whole = False
    more = False
    sent = 0

    def do_GET(self) -> None:
        first, last = (int(word) for word in self.headers["Range"].removeprefix("bytes=").split("-"))
        body = self.content[first : last + 1]
        self.send_response(200 if self.whole else 206)
        if not self.more:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        type(self).sent += len(body)
        self.wfile.write(body)
        with contextlib.suppress(ConnectionError):
            while self.more and self.sent < ENDLESS:
                self.wfile.write(body)
                type(self).sent += len(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def served(folder: Path) -> Iterator[str]:
    path = _tiny_models.write("llama", folder, weights=False)
    Ranges.content, Ranges.whole, Ranges.more, Ranges.sent = path.read_bytes(), False, False, 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/m.gguf"
        server.shutdown()


def test_only_the_header_is_fetched(served: str) -> None:
    with client() as web:
        assert read_url(web, served, len(Ranges.content)).architecture == "llama"
    assert Ranges.sent == 2**20 < len(Ranges.content) / 10


def test_a_server_that_sends_more_than_the_range_is_not_listened_to(served: str) -> None:
    Ranges.more = True
    with client() as web, pytest.raises(NoHeader, match="sent more than the range that was asked for"):
        read_url(web, served, len(Ranges.content))
    assert Ranges.sent < ENDLESS


def test_a_server_without_ranges_is_not_read_from(served: str) -> None:
    Ranges.whole = True
    with client() as web, pytest.raises(NoHeader, match="answered 200 to a request for a range"):
        read_url(web, served, len(Ranges.content))


def test_a_draft_beside_a_preset_has_its_context_but_neither_its_cache_nor_its_experts_placed() -> None:
    """As llama-server starts it: what the preset puts into main memory is the large model's."""
    preset = Settings(context=32768, kv_cache_type="q4_0", n_cpu_moe=24, parallel=2)
    assert fit.as_draft(preset) == Settings(context=32768, parallel=2)
